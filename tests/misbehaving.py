"""Plug-ins from outside the tree that go wrong on purpose."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from edge_agent.backends import Outcome, Ticket
from edge_agent.backends.fake import FakeEngine
from edge_agent.config import Table
from edge_agent.data import Image
from edge_agent.errors import GpuLost, ModelError
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

    def collect(self, ticket: Ticket) -> Outcome:
        if self._seen > 1:
            threading.Event().wait()
        return super().collect(ticket)


class UnbuildableEngine(FakeEngine):
    """An engine that cannot be had of any model."""

    def __init__(self, path: Path, options: Table) -> None:
        raise ModelError("no engine can be made of it, as told")


class LostEngine(FakeEngine):
    """An engine whose GPU is gone with its eleventh batch."""

    def collect(self, ticket: Ticket) -> Any:
        self._seen = getattr(self, "_seen", 0) + 1
        if self._seen > 10:
            raise GpuLost("fake", 700, "CUDA_ERROR_ILLEGAL_ADDRESS", "as told")
        return super().collect(ticket)


class LostAtOnceEngine(FakeEngine):
    """An engine whose GPU is gone with its warm-up."""

    def submit(self, images: Sequence[Image]) -> Ticket:
        raise GpuLost("fake", 700, "CUDA_ERROR_ILLEGAL_ADDRESS", "as told")
