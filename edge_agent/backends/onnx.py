"""The CPU engine: onnxruntime, which also runs on its other execution providers where they are installed."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import msgspec
import numpy as np
from msgspec import Meta
from numpy.typing import NDArray

from edge_agent import plugins
from edge_agent.backends import Constants, Outcome, Ticket, fitted_constants, picture_input
from edge_agent.config import Table
from edge_agent.data import Image, ModelFacts, PreprocessSpec, Reduction, TensorSpec
from edge_agent.errors import ConfigError, EngineError, ModelError
from edge_agent.frames import new_image

_DTYPES = {
    "tensor(float)": "float32",
    "tensor(float16)": "float16",
    "tensor(double)": "float64",
    "tensor(uint16)": "uint16",
    "tensor(uint32)": "uint32",
    "tensor(uint64)": "uint64",
    "tensor(int16)": "int16",
    "tensor(uint8)": "uint8",
    "tensor(int8)": "int8",
    "tensor(int32)": "int32",
    "tensor(int64)": "int64",
    "tensor(bool)": "bool",
}


_SIGNATURE = re.compile(r"\s*/\S+\.(?:cc|h):\d+ .*\)(?: const)?(?:\[\S+\])? (?=[A-Z\[])")
"""Of the C++ function that complained, with its file and line."""


class OnnxOptions(Table):
    """`[backends.onnx]`"""

    threads: Annotated[int, Meta(ge=0)] = 0
    providers: list[str] = msgspec.field(default_factory=lambda: ["CPUExecutionProvider"])


class OnnxEngine:
    """An onnxruntime session and the input buffers it reads; `collect` follows `submit` at once."""

    Options: ClassVar[type[Table]] = OnnxOptions
    is_built: ClassVar[bool] = False
    inference_clock: ClassVar[Literal["gpu", "cpu"]] = "cpu"
    prepares_batches: ClassVar[bool] = False
    depth = 1

    @staticmethod
    def unavailable(options: OnnxOptions) -> str | None:
        try:
            import onnxruntime  # noqa: F401
        except ImportError as error:
            return plugins.missing(error, needed_by="the backend 'onnx'")
        return None

    @staticmethod
    def new_image(shape: tuple[int, ...]) -> Image:
        return new_image(shape)

    def __init__(self, path: Path, options: OnnxOptions) -> None:
        try:
            import onnxruntime
        except ImportError as error:
            raise ConfigError(plugins.missing(error, needed_by="the backend 'onnx'")) from error
        there = onnxruntime.get_available_providers()
        for wanted in options.providers:
            if wanted not in there:
                raise ConfigError(
                    f"backends.onnx.providers: this onnxruntime has no {wanted!r}{plugins.nearest(wanted, there)}"
                )
        settings = onnxruntime.SessionOptions()
        settings.intra_op_num_threads = options.threads
        settings.inter_op_num_threads = 1
        settings.log_severity_level = 3
        # Threads that spin between frames would show as CPU load of an idle agent.
        settings.add_session_config_entry("session.intra_op.allow_spinning", "0")
        try:
            self._session = onnxruntime.InferenceSession(str(path), settings, providers=options.providers)
        except _errors() as error:
            raise ModelError(f"onnxruntime cannot load {path}: {_told(error)}") from error
        self.facts = ModelFacts(
            inputs=tuple(_spec(value) for value in self._session.get_inputs()),
            outputs=tuple(_spec(value) for value in self._session.get_outputs()),
            metadata=dict(self._session.get_modelmeta().custom_metadata_map),
        )
        self.runtime = f"onnxruntime {onnxruntime.__version__}"
        self._outputs = [spec.name for spec in self.facts.outputs]
        self.max_batch = 1

    def prepare(
        self,
        spec: PreprocessSpec,
        *,
        max_batch: int,
        reduction: Reduction | None = None,
        constants: Constants | None = None,
    ) -> None:
        from edge_agent.imaging import Preprocessor

        model_input, fixed = picture_input(self.facts, spec, constants or {})
        self.max_batch = fixed or max_batch
        self._is_fixed = fixed is not None
        self._input = np.zeros((self.max_batch, *spec.shape), model_input.dtype)
        self._constants = constants or {}
        self._preprocess = Preprocessor(spec)
        self._input_name = model_input.name

    def submit(self, images: Sequence[Image]) -> Ticket:
        began = time.perf_counter()
        placements = [self._preprocess(image, slot) for image, slot in zip(images, self._input, strict=False)]
        return Ticket(placements, held=(time.perf_counter() - began) * 1e3)

    def collect(self, ticket: Ticket) -> Outcome:
        began = time.perf_counter()
        count = len(ticket.placements)
        batch = self._input if self._is_fixed else self._input[:count]
        feeds = {self._input_name: batch, **fitted_constants(self.facts, self._constants, len(batch))}
        try:
            outputs: list[NDArray[Any]] = self._session.run(self._outputs, feeds)
        except _errors() as error:
            raise EngineError(f"onnxruntime failed in use: {_told(error)}") from error
        tensors = {
            name: output[:count] if output.shape[:1] == batch.shape[:1] else output  # some have no batch axis
            for name, output in zip(self._outputs, outputs, strict=True)
        }
        elapsed_ms = (time.perf_counter() - began) * 1e3
        return Outcome(tensors, preprocess_ms=ticket.held, inference_ms=elapsed_ms)

    def close(self) -> None:
        self._session = None


Engine = OnnxEngine


def _spec(value: Any) -> TensorSpec:
    shape = tuple(size if isinstance(size, int) and size > 0 else None for size in value.shape)
    return TensorSpec(value.name, shape, _DTYPES.get(value.type, value.type))


def _errors() -> tuple[type[Exception], ...]:
    """The exceptions that onnxruntime raises; they have no base class of their own."""
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    own = [kind for kind in vars(state).values() if isinstance(kind, type) and issubclass(kind, Exception)]
    return (*own, ValueError, RuntimeError)


def _told(error: Exception) -> str:
    """What onnxruntime says, without where in its own source it says so."""
    text = " ".join(str(error).split()) or type(error).__name__
    text = _SIGNATURE.sub(" ", text)
    if "INVALID_PROTOBUF" in text or "Protobuf parsing failed" in text:
        return f"it is no ONNX file, or cut short ({text[:200]})"
    if "IR version" in text or "opset" in text.lower():
        return f"{text[:300]}; export it for an older opset, or install a newer onnxruntime"
    return text[:300]
