"""What runs a model. One module a runtime; each has `Engine`, whose `Options` are `[backends.<name>]`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from edge_agent import plugins
from edge_agent.config import Table
from edge_agent.data import Candidates, Image, ModelFacts, PreprocessSpec, Reduction, Tensors, TensorSpec
from edge_agent.errors import ConfigError, ModelError
from edge_agent.geometry import Placement

Constants = Mapping[str, NDArray[Any]]
"""What the inputs that take no picture are given, by name, whatever the picture."""


@dataclass(frozen=True, slots=True)
class Ticket:
    """A batch on its way through an engine: where each of its pictures lies in the model's input, and what the
    engine itself needs to find it again."""

    placements: Sequence[Placement]
    held: Any = None


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of a batch, and how long the engine was at it (milliseconds, of the whole batch).

    `tensors`: output name → array, batch axis first; views, valid until their ticket's place is used again. An
    engine that reduced them itself gives `candidates`, a picture each, in their stead.
    """

    tensors: Tensors = field(default_factory=dict)
    candidates: Sequence[Candidates] | None = None
    preprocess_ms: float = 0.0
    inference_ms: float = 0.0
    reduce_ms: float = 0.0


class Engine(Protocol):
    """A model in a runtime, driven by one thread at a time.

    Created with the model's path and the backend's options (raises `ModelError` where they do not
    fit together); `prepare` is called once, before the first `submit`.
    """

    Options: ClassVar[type[Table]]
    is_built: ClassVar[bool]
    """Whether it runs engines that are built from the model's ONNX file on this machine."""
    prepares_batches: ClassVar[bool]
    """Whether the first batch of each size takes much longer than those after it. May be missing: it does not."""
    inference_clock: ClassVar[Literal["gpu", "cpu"]]
    """Whose time an outcome's `inference_ms` is: the GPU's own, or the CPU's, which waited. Where it is missing, the
    CPU's."""

    @staticmethod
    def unavailable(options: Any) -> str | None:
        """Why no engine of this kind can run on this machine, in a sentence; None if it can."""

    @staticmethod
    def new_image(shape: tuple[int, ...]) -> Image:
        """A buffer for pictures, of the kind that this engine reads at the least cost."""

    @property
    def facts(self) -> ModelFacts: ...

    @property
    def runtime(self) -> str:
        """What runs the model, with its version: `onnxruntime 1.23.2`."""

    @property
    def max_batch(self) -> int:
        """The most pictures a `submit` may bring."""

    @property
    def depth(self) -> int:
        """How many batches may be on their way at once."""

    def prepare(
        self,
        spec: PreprocessSpec,
        *,
        max_batch: int,
        reduction: Reduction | None = None,
        constants: Constants | None = None,
    ) -> None:
        """Make room for batches of pictures that `spec` describes. Raises `ModelError`."""

    def submit(self, images: Sequence[Image]) -> Ticket:
        """Start on a batch of [h, w, 3] uint8 BGR pictures of any size, which stay as they are until `collect`."""

    def collect(self, ticket: Ticket) -> Outcome:
        """Wait for a batch; tickets in the order in which they were given. Raises `EngineError`."""

    def close(self) -> None:
        """Free the model; may be called twice."""


def picture_input(facts: ModelFacts, spec: PreprocessSpec, constants: Constants) -> tuple[TensorSpec, int | None]:
    """The input that takes the pictures, and its batch size where that is fixed.

    Raises `ModelError` where it cannot be told, or where such pictures do not fit it.
    """
    known = [tensor.name for tensor in facts.inputs]
    for name in constants:
        if name not in known:
            raise ModelError(f"inputs: the model has no input {name!r}{plugins.nearest(name, known)}")
    free = [tensor for tensor in facts.inputs if tensor.name not in constants]
    if len(free) != 1:
        names = ", ".join(tensor.name for tensor in free) or "none"
        raise ModelError(
            f"one input takes the picture, here {len(free)} would ({names}); "
            "give the others' values in the entry, such as inputs = { scale = [1.0, 1.0] }"
        )
    [taken] = free
    if taken.dtype != spec.dtype:
        raise ModelError(f"the model wants {taken.dtype} pictures, the family gives {spec.dtype}")
    picture = spec.shape
    wanted = taken.shape[1:]
    if len(wanted) != 3 or any(a not in (None, b) for a, b in zip(wanted, picture, strict=True)):
        raise ModelError(
            f"the model's input {taken.name!r} is {list(taken.shape)}, "
            f"which pictures of {list(picture)} do not fit; set preprocess.size",
            code="model_shapes",
        )
    return taken, taken.shape[0]


def fitted_constants(facts: ModelFacts, constants: Constants, batch: int) -> dict[str, NDArray[Any]]:
    """The constants in the types and shapes that their inputs want for a batch of this size.

    Raises `ModelError` where they do not fit.
    """
    fitted = {}
    for tensor in facts.inputs:
        if tensor.name not in constants:
            continue
        given = np.asarray(constants[tensor.name])
        shape = tuple(batch if size is None else size for size in tensor.shape)
        try:
            fitted[tensor.name] = np.ascontiguousarray(np.broadcast_to(given, shape).astype(tensor.dtype))
        except (ValueError, TypeError) as error:
            raise ModelError(
                f"inputs.{tensor.name}: the input is {list(tensor.shape)}, "
                f"values of shape {list(given.shape)} do not fit"
            ) from error
    return fitted


@dataclass(frozen=True, slots=True)
class Choice:
    """The backend that runs models here, and why; `trouble` is what keeps the wanted one from it."""

    name: str
    because: str
    trouble: str | None = None


def choose(wanted: str, *, fallback: str, options: Mapping[str, Table]) -> Choice:
    """What `wanted` means on this machine. Imports what it asks; raises `ConfigError` where nothing is left.

    `auto` is TensorRT where that can be used. Where there is no sign of an NVIDIA GPU, that it cannot is no trouble.
    """
    name = "tensorrt" if wanted == "auto" else wanted
    reason = _unavailable(name, options)
    if reason is None:
        return Choice(name, "it can be used here" if wanted == "auto" else "configured")
    if wanted == "auto" and not nvidia_devices():
        fallback = fallback or "onnx"
        because = f"no NVIDIA GPU here ({reason})"
        trouble = None
    elif not fallback:
        raise ConfigError(f'{reason}; or let the CPU take over: inference.fallback = "onnx"')
    else:
        because = trouble = f"{name} cannot be used: {reason}"
    if fallback == name or (lacks := _unavailable(fallback, options)) is not None:
        raise ConfigError(reason if fallback == name else f"{reason}; nor the fallback: {lacks}")
    return Choice(fallback, because, trouble)


def nvidia_devices() -> list[str]:
    """The device files by which the NVIDIA driver of a PC or a Jetson shows itself."""
    patterns = ("nvidia[0-9]*", "nvidiactl", "nvhost-gpu", "nvgpu", "dxg")
    return sorted(str(path) for pattern in patterns for path in Path("/dev").glob(pattern))


def _unavailable(name: str, options: Mapping[str, Table]) -> str | None:
    engine: type[Engine] = plugins.load("backends", name)
    return engine.unavailable(options.get(name) or engine.Options())
