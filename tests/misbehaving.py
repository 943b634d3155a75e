"""Plug-ins from outside the tree that go wrong on purpose."""

from __future__ import annotations

import threading
from collections.abc import Sequence

from edge_agent.backends import Ticket
from edge_agent.backends.fake import FakeEngine
from edge_agent.data import Captured, Image, Tensors
from edge_agent.sources.synthetic import SyntheticSource


class BuggySource(SyntheticSource):
    """A source with a bug: the error has no name of ours."""

    def read(self, into: Image) -> Captured | None:
        super().read(into)
        raise ZeroDivisionError("a bug")


class StuckEngine(FakeEngine):
    """An engine that never comes back from its second batch; the first is its warm-up."""

    def submit(self, images: Sequence[Image]) -> Ticket:
        self._seen = getattr(self, "_seen", 0) + 1
        return super().submit(images)

    def collect(self, ticket: Ticket) -> Tensors:
        if self._seen > 1:
            threading.Event().wait()
        return super().collect(ticket)
