"""Plug-ins from outside the tree that go wrong on purpose."""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from edge_agent.backends import Outcome, Ticket
from edge_agent.backends.fake import FakeEngine
from edge_agent.backends.onnx import OnnxEngine
from edge_agent.backends.tensorrt import TensorRtOptions
from edge_agent.config import Table
from edge_agent.data import Image
from edge_agent.errors import GpuLost, ModelError
from edge_agent.models.engines import Platform
from edge_agent.models.loading import MEASURED
from edge_agent.sources.synthetic import SyntheticSource

AT_START = 1 + MEASURED
"""Batches that warm up and measure an engine."""


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


class HungSource(SyntheticSource):
    """A source whose driver never comes back from the first picture."""

    def grab(self) -> int | None:
        while True:
            time.sleep(1)


class BuggyEngine(FakeEngine):
    """An engine with a bug, in the first batch after it was warmed up and measured."""

    def submit(self, images: Sequence[Image]) -> Ticket:
        self._seen = getattr(self, "_seen", 0) + 1
        if self._seen > AT_START:
            raise ZeroDivisionError("a bug")
        return super().submit(images)


class StuckEngine(FakeEngine):
    """An engine that never comes back from the first batch after it was warmed up and measured."""

    def submit(self, images: Sequence[Image]) -> Ticket:
        self._seen = getattr(self, "_seen", 0) + 1
        return super().submit(images)

    def collect(self, ticket: Ticket) -> Outcome:
        if self._seen > AT_START:
            threading.Event().wait()
        return super().collect(ticket)


class BlindEngine(FakeEngine):
    """An engine whose outputs are no numbers any more, in the tenth batch after it was warmed up and measured."""

    def collect(self, ticket: Ticket) -> Outcome:
        self._seen = getattr(self, "_seen", 0) + 1
        outcome = super().collect(ticket)
        if self._seen >= AT_START + 10:
            return dataclasses.replace(outcome, tensors={"output0": outcome.tensors["output0"] * np.float32("nan")})
        return outcome


class TiringEngine(FakeEngine):
    """An engine that was fast while it was measured, and is slow at work."""

    def collect(self, ticket: Ticket) -> Outcome:
        self._seen = getattr(self, "_seen", 0) + 1
        if self._seen > AT_START:
            time.sleep(0.03)
        return super().collect(ticket)


class BuiltEngine(OnnxEngine):
    """An engine that has to be built first, on a machine where nothing can be built."""

    Options: ClassVar[type[Table]] = TensorRtOptions
    is_built: ClassVar[bool] = True

    @staticmethod
    def unavailable(options: Any) -> None:
        Platform.here = classmethod(lambda cls, options: Platform("none", "none", "0.0", "0"))  # type: ignore[method-assign]


class UnbuildableEngine(FakeEngine):
    """An engine that cannot be had of any model."""

    def __init__(self, path: Path, options: Table) -> None:
        raise ModelError("no engine can be made of it, as told")


class LostEngine(FakeEngine):
    """An engine whose GPU is gone with the tenth batch after it was warmed up and measured."""

    def collect(self, ticket: Ticket) -> Any:
        self._seen = getattr(self, "_seen", 0) + 1
        if self._seen > AT_START + 9:
            raise GpuLost("fake", 700, "CUDA_ERROR_ILLEGAL_ADDRESS", "as told")
        return super().collect(ticket)


class LostAtOnceEngine(FakeEngine):
    """An engine whose GPU is gone with its warm-up."""

    def submit(self, images: Sequence[Image]) -> Ticket:
        raise GpuLost("fake", 700, "CUDA_ERROR_ILLEGAL_ADDRESS", "as told")
