"""What runs a model. One module a runtime; each has `Engine`, whose `Options` are `[backends.<name>]`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

from edge_agent.config import Table
from edge_agent.data import Image, ModelFacts, PreprocessSpec, Tensors
from edge_agent.geometry import Placement


@dataclass(frozen=True, slots=True)
class Ticket:
    """A batch on its way through an engine, and where each of its pictures lies in the model's input."""

    placements: Sequence[Placement]
    preprocess_ms: float


class Engine(Protocol):
    """A model in a runtime, driven by the one thread that owns it.

    Created with the model's path and the backend's options (raises `ModelError` where they do not
    fit together); `prepare` is called once, before the first `submit`.
    """

    Options: ClassVar[type[Table]]

    @property
    def facts(self) -> ModelFacts: ...

    @property
    def max_batch(self) -> int:
        """The most pictures a `submit` may bring."""

    def prepare(self, spec: PreprocessSpec, *, max_batch: int) -> None:
        """Make room for batches of pictures that `spec` describes."""

    def submit(self, images: Sequence[Image]) -> Ticket:
        """Start on a batch of [h, w, 3] uint8 BGR pictures of any size."""

    def collect(self, ticket: Ticket) -> Tensors:
        """Wait for a batch: output name → array, batch axis first; views, valid until the next `submit`."""

    def close(self) -> None:
        """Free the model; may be called twice."""


def choose(name: str) -> tuple[str, str]:
    """The backend that `name` means here, and why."""
    if name != "auto":
        return name, "configured"
    return "onnx", "the TensorRT backend is not part of this version"
