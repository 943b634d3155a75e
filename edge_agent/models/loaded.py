"""A model put together: an engine that runs it and a family that understands it."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

import msgspec
import numpy as np

from edge_agent import plugins
from edge_agent.backends import Engine
from edge_agent.config import InferenceOptions, Table
from edge_agent.data import Batch, Frame, ModelRef, Result, Timings
from edge_agent.errors import ConfigError, EngineError, ModelError
from edge_agent.families import Family, Meaning, Thresholds
from edge_agent.models.store import StoredModel


class LoadedModel:
    """Driven by one thread at a time; `close` frees the engine."""

    def __init__(self, ref: ModelRef, *, backend: str, engine: Engine, family: Family) -> None:
        self.ref = ref
        self.backend = backend
        self._engine = engine
        self._family = family

    @property
    def max_batch(self) -> int:
        return self._engine.max_batch

    def infer(self, batch: Batch) -> Sequence[Result]:
        """One result a frame, in order. Raises `EngineError`."""
        results: list[Result] = []
        for start in range(0, len(batch), self.max_batch):
            results += self._infer(batch[start : start + self.max_batch])
        return results

    def warm_up(self) -> float:
        """Run once on a grey picture; milliseconds it took. Raises `ModelError` if the model cannot."""
        spec = self._family.preprocess
        now = time.monotonic_ns()
        grey = np.full((spec.height, spec.width, 3), 127, np.uint8)
        try:
            self._infer([Frame("warm-up", 0, grey, time.time_ns(), now)])
        except EngineError as error:
            raise ModelError(f"{self.ref.name}: warm-up failed: {error}") from error
        return (time.monotonic_ns() - now) / 1e6

    def close(self) -> None:
        self._engine.close()

    def _infer(self, batch: Batch) -> Sequence[Result]:
        started = time.monotonic_ns()
        ticket = self._engine.submit([frame.image for frame in batch])
        outputs = self._engine.collect(ticket)
        inferred = time.monotonic_ns()
        candidates = self._family.reduce(outputs)
        predictions = [
            self._family.decode(found, placement)
            for found, placement in zip(candidates, ticket.placements, strict=True)
        ]
        ended = time.monotonic_ns()
        share = 1e6 * len(batch)
        return [
            Result(
                frame,
                self.ref,
                prediction,
                Timings(
                    queue_ms=(started - frame.captured_mono_ns) / 1e6,
                    preprocess_ms=ticket.preprocess_ms / len(batch),
                    inference_ms=(inferred - started) / share - ticket.preprocess_ms / len(batch),
                    postprocess_ms=(ended - inferred) / share,
                    total_ms=(ended - frame.captured_mono_ns) / 1e6,
                ),
            )
            for frame, prediction in zip(batch, predictions, strict=True)
        ]


def open_model(
    stored: StoredModel, *, backend: str, backends: Mapping[str, Table], inference: InferenceOptions
) -> LoadedModel:
    """Load a model on a backend and make sense of it. Blocks; raises `ModelError` and frees what was opened."""
    engine_class = plugins.load("backends", backend)
    engine: Engine = engine_class(stored.path, backends.get(backend) or engine_class.Options())
    try:
        family = _family(stored, engine, inference)
        engine.prepare(family.preprocess, max_batch=inference.max_batch)
    except BaseException as error:
        engine.close()
        if isinstance(error, ModelError):
            raise ModelError(f"{stored.name}: {error}", code=error.code) from error
        raise
    version = stored.options.version
    if stored.origin == "bundled":
        version = engine.facts.metadata.get("version", version)
    ref = ModelRef(stored.name, version, family.task, family.labels)
    return LoadedModel(ref, backend=backend, engine=engine, family=family)


def _family(stored: StoredModel, engine: Engine, inference: InferenceOptions) -> Family:
    try:
        family_class = plugins.load("families", stored.options.family)
    except ConfigError as error:
        raise ModelError(str(error)) from error
    try:
        options = msgspec.convert(stored.options.options, family_class.Options)
    except msgspec.ValidationError as error:
        raise ModelError(f"options: {error}") from error
    thresholds = Thresholds(inference.score_threshold, inference.iou_threshold, inference.max_detections)
    meaning = Meaning(
        facts=engine.facts,
        options=options,
        labels=stored.labels(),
        preprocess=stored.options.preprocess,
        thresholds=thresholds,
    )
    family: Family = family_class(meaning)
    return family
