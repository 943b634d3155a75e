"""Plug-ins from outside the tree that go wrong on purpose."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence

from edge_agent.backends import Ticket
from edge_agent.backends.fake import FakeEngine
from edge_agent.data import Image, Tensors
from edge_agent.sources.synthetic import SyntheticSource


class BuggySource(SyntheticSource):
    """A source with a bug: the error has no name of ours."""

    def grab(self) -> int | None:
        super().grab()
        raise ZeroDivisionError("a bug")


class StuckSource(SyntheticSource):
    """A source whose driver hangs for ever after a second of pictures."""

    def grab(self) -> int | None:
        self._grabbed = getattr(self, "_grabbed", 0) + 1
        if self._grabbed > 30:
            while True:
                time.sleep(1)
        return super().grab()


class BuggyEngine(FakeEngine):
    """An engine with a bug, from its second batch on; the first is its warm-up."""

    def submit(self, images: Sequence[Image]) -> Ticket:
        self._seen = getattr(self, "_seen", 0) + 1
        if self._seen > 1:
            raise ZeroDivisionError("a bug")
        return super().submit(images)


class StuckEngine(FakeEngine):
    """An engine that never comes back from its second batch; the first is its warm-up."""

    def submit(self, images: Sequence[Image]) -> Ticket:
        self._seen = getattr(self, "_seen", 0) + 1
        return super().submit(images)

    def collect(self, ticket: Ticket) -> Tensors:
        if self._seen > 1:
            threading.Event().wait()
        return super().collect(ticket)
