"""A model put together: an engine that runs it and a family that understands it."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from edge_agent import memory, plugins
from edge_agent.backends import Constants, Engine, Outcome, Ticket
from edge_agent.config import InferenceOptions, Table
from edge_agent.data import Batch, Frame, ModelRef, Result, Timings
from edge_agent.errors import EngineError, GpuLost, GpuOutOfMemory, GpuUnavailable, ModelCode, ModelError, NotFinite
from edge_agent.families import Family
from edge_agent.models.engines import Engines, Progress, is_built
from edge_agent.models.inspect import make_family
from edge_agent.models.store import StoredModel


@dataclass(frozen=True, slots=True)
class Pending:
    """A batch on its way through a model."""

    batch: Batch
    ticket: Ticket
    started_ns: int


@dataclass(frozen=True, slots=True)
class Inferred:
    """What came of a batch: a result a frame, in order, and how long the inference of all of them took."""

    results: Sequence[Result]
    inference_ms: float


class LoadedModel:
    """Driven by one thread at a time; `close` frees the engine. With `requires_numbers` outputs that hold NaN are an
    error (`NotFinite`): a look at all of them, while the model is not trusted yet."""

    def __init__(
        self, ref: ModelRef, *, backend: str, engine: Engine, family: Family, inference: InferenceOptions
    ) -> None:
        self.ref = ref
        self.backend = backend
        self.inference = inference
        self.runtime = engine.runtime
        self.inference_clock: Literal["gpu", "cpu"] = getattr(engine, "inference_clock", "cpu")
        self.requires_numbers = True
        self._engine = engine
        self._family = family

    @property
    def size(self) -> tuple[int, int]:
        """Width and height of the picture that the model is given."""
        return self._family.preprocess.width, self._family.preprocess.height

    @property
    def max_batch(self) -> int:
        return self._engine.max_batch

    @property
    def depth(self) -> int:
        """How many batches may be on their way at once."""
        return self._engine.depth

    def submit(self, batch: Batch) -> Pending:
        """Start on `max_batch` frames at most; their pictures stay as they are until `collect`."""
        started = time.monotonic_ns()
        return Pending(batch, self._engine.submit([frame.image for frame in batch]), started)

    def collect(self, pending: Pending) -> Inferred:
        """What came of it; for batches in the order of their `submit`. Raises `EngineError`."""
        batch, family, placements = pending.batch, self._family, pending.ticket.placements
        outcome = self._engine.collect(pending.ticket)
        if self.requires_numbers:
            _require_numbers(outcome)
        collected = time.monotonic_ns()
        candidates = family.reduce(outcome.tensors) if outcome.candidates is None else outcome.candidates
        if len(candidates) != len(batch):
            raise EngineError(f"{self.ref.name}: the outputs are of {len(candidates)} pictures, not of {len(batch)}")
        predictions = [family.decode(found, at) for found, at in zip(candidates, placements, strict=True)]
        ended = time.monotonic_ns()
        count = len(batch)
        results = [
            Result(
                frame,
                self.ref,
                prediction,
                Timings(
                    queue_ms=(pending.started_ns - frame.captured_mono_ns) / 1e6,
                    preprocess_ms=outcome.preprocess_ms / count,
                    inference_ms=outcome.inference_ms / count,
                    postprocess_ms=(outcome.reduce_ms + (ended - collected) / 1e6) / count,
                    total_ms=(ended - frame.captured_mono_ns) / 1e6,
                ),
            )
            for frame, prediction in zip(batch, predictions, strict=True)
        ]
        return Inferred(results, outcome.inference_ms)

    def warm_up(self) -> float:
        """Run on pictures of noise; milliseconds it took. Raises `ModelError` if the model cannot."""
        began = time.monotonic()
        self.time_inferences(self.depth, within_s=math.inf)  # each of the engine's places once
        if getattr(self._engine, "prepares_batches", False):
            self._run_all_sizes()
        self.ref = dataclasses.replace(self.ref, names=self._family.names)  # a run may tell more than the file
        return (time.monotonic() - began) * 1e3

    def _run_all_sizes(self) -> None:
        """Batches of every size in each of the engine's places: those it has not seen would hold up the line."""
        width, height = self.size
        image = self._engine.new_image((height, width, 3))
        image[:] = 128
        frame = Frame("warm-up", 0, image, time.time_ns(), time.monotonic_ns())
        with self._translated():
            for size in range(2, self.max_batch + 1):
                for pending in [self.submit([frame] * size) for _ in range(self.depth)]:
                    self.collect(pending)

    def time_inferences(self, most: int, *, within_s: float) -> Sequence[float]:
        """Milliseconds of inferences of one picture, one after the other: `most` of them, or as many as fit into the
        time, and at least one. Raises `ModelError`."""
        width, height = self.size
        bytes_of_noise = random.Random(0).randbytes(height * width * 3)  # numpy.random is 3 MB that stay
        noise = np.frombuffer(bytes_of_noise, np.uint8).reshape(height, width, 3)
        frame = Frame("warm-up", 0, noise, time.time_ns(), time.monotonic_ns())
        until, took = time.monotonic() + within_s, list[float]()
        with self._translated():
            while len(took) < most and (not took or time.monotonic() < until):
                took.append(self.collect(self.submit([frame])).inference_ms)
        return took

    @contextlib.contextmanager
    def _translated(self) -> Iterator[None]:
        """A model that cannot run what it is shown first is rejected."""
        try:
            yield
        except GpuLost:
            raise
        except EngineError as error:
            code: ModelCode = "model_not_finite" if isinstance(error, NotFinite) else "model_rejected"
            raise ModelError(f"{self.ref.name}: warm-up failed: {error}", code=code) from error

    def close(self) -> None:
        self._engine.close()
        memory.give_back()


def open_model(
    stored: StoredModel,
    *,
    backend: str,
    backends: Mapping[str, Table],
    inference: InferenceOptions,
    tracked_from: float | None = None,
    engines: Engines | None = None,
    progress: Progress = lambda phase, percent: None,
) -> LoadedModel:
    """Load a model on a backend and make sense of it; a tracker wants detections from the score `tracked_from` on.

    Blocks, for minutes where an engine has to be built first; raises `ModelError` and frees what was opened.
    """
    engine_class = plugins.load("backends", backend)
    options = backends.get(backend) or engine_class.Options()
    try:
        path = stored.path
        if engine_class.is_built and is_built(stored):
            path = (engines or Engines(options)).get(stored, inference, progress)
        return _assemble(stored, backend, lambda: engine_class(path, options), inference, tracked_from)
    except GpuLost:
        raise
    except (GpuOutOfMemory, MemoryError) as error:
        raise ModelError(f"{stored.name}: no memory for it: {error}", code="no_memory") from error
    except (GpuUnavailable, EngineError) as error:
        raise ModelError(f"{stored.name}: {error}") from error


def _require_numbers(outcome: Outcome) -> None:
    for name, tensor in outcome.tensors.items():
        if tensor.dtype.kind == "f" and np.isnan(tensor).any():
            raise NotFinite(f"the output {name!r} holds values that are no numbers (NaN)")
    for found in outcome.candidates or ():
        if np.isnan(found.boxes).any() or np.isnan(found.scores).any():
            raise NotFinite("boxes or scores are no numbers (NaN)")


def constants_of(stored: StoredModel) -> Constants:
    """What the entry gives the inputs that take no picture. Raises `ModelError`."""
    constants = {}
    for name, value in stored.options.inputs.items():
        try:
            constants[name] = np.asarray(value, None if isinstance(value, list) else np.float64)
        except (ValueError, TypeError) as error:
            raise ModelError(f"inputs.{name}: {value!r} is neither a number nor an array of them") from error
        if constants[name].dtype.kind not in "biuf":
            raise ModelError(f"inputs.{name}: {value!r} is neither a number nor an array of them")
    return constants


def _assemble(
    stored: StoredModel,
    backend: str,
    make: Callable[[], Engine],
    inference: InferenceOptions,
    tracked_from: float | None,
) -> LoadedModel:
    engine: Engine | None = None
    try:
        engine = make()
        family, proposal = make_family(engine.facts, stored.options, stored.labels(), inference, tracked_from)
        engine.prepare(
            family.preprocess,
            max_batch=inference.max_batch if family.takes_batches else 1,
            reduction=family.reduction,
            constants=constants_of(stored),
        )
    except BaseException as error:
        if engine is not None:
            engine.close()
        if isinstance(error, ModelError):
            raise ModelError(f"{stored.name}: {error}", code=error.code) from error
        raise
    version = stored.options.version
    if stored.origin == "bundled":
        version = engine.facts.metadata.get("version", version)
    by_label = stored.options.options.get("class_thresholds", {})
    thresholds = {i: by_label[label] for i, label in enumerate(family.names.labels) if label in by_label}
    ref = ModelRef(stored.name, version, family.task, family.names, thresholds, proposal.family)
    return LoadedModel(ref, backend=backend, engine=engine, family=family, inference=inference)
