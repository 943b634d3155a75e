"""A fake engine: takes any model's place, looks at no picture and answers as told, as fast or as slow.

For measuring what the agent itself costs, and for tests that need an engine to misbehave on cue. It
is never chosen by `auto`.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import numpy as np
from msgspec import Meta

from edge_agent.backends import Constants, Outcome, Ticket
from edge_agent.config import Table
from edge_agent.data import Image, ModelFacts, PreprocessSpec, Reduction, TensorSpec
from edge_agent.errors import EngineError
from edge_agent.frames import new_image
from edge_agent.geometry import place

_CLASSES = ("disc", "square", "triangle", "star", "cross")
_CELLS = 100


class FakeOptions(Table):
    """`[backends.fake]`: `detections` boxes a frame, each batch `latency_ms` on its way and `depth` of them at once,
    failing after `fail_after` batches."""

    detections: Annotated[int, Meta(ge=0, le=_CELLS)] = 3
    latency_ms: Annotated[float, Meta(ge=0)] = 0.0
    depth: Annotated[int, Meta(ge=1)] = 1
    fail_after: Annotated[int, Meta(ge=1)] | None = None


class FakeEngine:
    """Answers every picture with the same `detections` boxes in the dense head's layout, [B, 9, 100]."""

    Options: ClassVar[type[Table]] = FakeOptions
    is_built: ClassVar[bool] = False
    inference_clock: ClassVar[Literal["gpu", "cpu"]] = "cpu"
    prepares_batches: ClassVar[bool] = False

    @staticmethod
    def unavailable(options: FakeOptions) -> str | None:
        return None

    @staticmethod
    def new_image(shape: tuple[int, ...]) -> Image:
        return new_image(shape)

    def __init__(self, path: Path, options: FakeOptions) -> None:
        self._options = options
        self._batches = 0
        self.max_batch = 1
        self.depth = options.depth
        self.runtime = "fake"
        self.facts = ModelFacts(
            inputs=(TensorSpec("images", (None, 3, 320, 320), "float32"),),
            outputs=(TensorSpec("output0", (None, 4 + len(_CLASSES), _CELLS), "float32"),),
            metadata={"task": "detect", "names": str(dict(enumerate(_CLASSES))), "imgsz": "[320, 320]"},
        )

    def prepare(
        self,
        spec: PreprocessSpec,
        *,
        max_batch: int,
        reduction: Reduction | None = None,
        constants: Constants | None = None,
    ) -> None:
        self._spec = spec
        self.max_batch = max_batch
        self._answer = np.zeros((max_batch, 4 + len(_CLASSES), _CELLS), np.float32)
        for i in range(self._options.detections):
            self._answer[:, :4, i] = 25 + 30 * (i % 10), 100 + 12 * (i // 10), 20, 10
            self._answer[:, 4 + i % len(_CLASSES), i] = 0.9

    def submit(self, images: Sequence[Image]) -> Ticket:
        return Ticket([place(image.shape[1], image.shape[0], self._spec) for image in images], held=time.perf_counter())

    def collect(self, ticket: Ticket) -> Outcome:
        began: float = ticket.held
        if (left_s := began + self._options.latency_ms / 1e3 - time.perf_counter()) > 0:
            time.sleep(left_s)
        self._batches += 1
        if self._options.fail_after is not None and self._batches > self._options.fail_after:
            raise EngineError(f"the fake engine fails after {self._options.fail_after} batches, as told")
        answer = {"output0": self._answer[: len(ticket.placements)]}
        return Outcome(answer, inference_ms=(time.perf_counter() - began) * 1e3)

    def close(self) -> None:
        """Nothing to free."""


Engine = FakeEngine
