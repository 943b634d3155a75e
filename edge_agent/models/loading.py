"""How a model is brought up: verified, admitted, loaded, warmed up and measured, beside whatever runs.

Every figure here is measured, and kept in the registry as such; what has to be estimated is said to be.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import msgspec
import numpy as np
import psutil
import structlog

from edge_agent import cuda, memory, plugins
from edge_agent.config import Cheaper, InferenceOptions, ModelChoice, PolicyOptions, Table
from edge_agent.errors import GpuUnavailable, ModelError
from edge_agent.messages import InferenceLatency, MeasuredOn, Measurement, MemoryUse, timestamp
from edge_agent.models import onnx_file
from edge_agent.models.engines import Engines, Progress, is_built
from edge_agent.models.loaded import LoadedModel, open_model
from edge_agent.models.registry import EngineRecord, TensorFacts
from edge_agent.models.store import ModelStore, StoredModel, variant
from edge_agent.pulse import Pulse

log = structlog.get_logger()

MEASURED = 30
"""Inferences that a new model is measured by, as far as they fit into a second."""

_WITHIN_S = 1.0
_PICKY = ("asked", "recovery")
"""Purposes for which a slow model is refused."""
_CALM = ("asked", "start")
"""Purposes whose figures replace earlier ones: for the others the machine is under stress."""

_MB = 1e6
_UNKNOWN_SIDE = 640
"""Of an input whose size only a run tells."""


Purpose = Literal["asked", "start", "relief", "recovery", "return"]


@dataclass(frozen=True, slots=True)
class Wanted:
    """What is to run, on which backend (None: the chosen one), and for what: because somebody asked for it, or it is
    the one to start with, as a relief or a recovery by the latency ladder, or because it ran before and what followed
    it failed (`return`)."""

    model: str
    backend: str | None = None
    cheaper: Cheaper | None = None
    purpose: Purpose = "asked"


@dataclass(frozen=True, slots=True)
class Prepared:
    """A model that is ready to run, and what it took. `limit_ms`: what its inference may take, if that is watched."""

    model: LoadedModel
    id: str
    limit_ms: float | None
    measured: Measurement
    load_ms: float
    warm_up_ms: float


class ModelLoader:
    """Brings models up, one at a time, in whatever thread calls; `power_mode` tells the device's, if it has some."""

    def __init__(
        self,
        store: ModelStore,
        *,
        backend: str,
        backends: Mapping[str, Table],
        engines: Engines | None,
        inference: InferenceOptions,
        choice: ModelChoice,
        policy: PolicyOptions,
        tracked_from: float | None = None,
        power_mode: Callable[[], str | None] = lambda: None,
    ) -> None:
        self.backend = backend
        self._store = store
        self._backends = backends
        self._engines = engines
        self._inference = inference
        self._choice = choice
        self._policy = policy
        self._tracked_from = tracked_from
        self._power_mode = power_mode
        self.pulse = Pulse()
        """Beats at each phase, and rests while another process builds an engine, which has a deadline of its own."""

    def prepare(self, wanted: Wanted, progress: Progress) -> Prepared:
        """Blocks, for minutes where an engine has to be built. Raises `ModelError`, by which nothing stays open,
        and `GpuLost`."""
        try:
            return self._prepare(wanted, progress)
        finally:
            self.pulse.rest()

    def _prepare(self, wanted: Wanted, told: Progress) -> Prepared:
        def progress(phase: str, percent: float | None) -> None:
            self.pulse.beat()
            told(phase, percent)

        progress("verify", None)
        stored, backend = self._stored(wanted), wanted.backend or self.backend
        self._store.require_sound(stored)
        if stored.path.suffix.lower() == ".onnx":
            onnx_file.require_numbers(stored.path)
        self.pulse.rest()
        self._build(stored, backend, told)
        progress("admit", None)
        before = _memory(self.builds(backend))
        if wanted.purpose != "return":
            self._admit(stored, backend, before)
        progress("load", None)
        began = time.monotonic()
        model = open_model(
            stored,
            backend=backend,
            backends=self._backends,
            inference=self._inference,
            tracked_from=self._tracked_from,
            engines=self._engines,
        )
        load_ms = (time.monotonic() - began) * 1e3
        try:
            progress("warm up", None)
            warm_up_ms = model.warm_up()
            memory.give_back()  # what verifying, parsing and converting took
            progress("measure", None)
            measured = self._measured(model, stored, before)
            self._require_speed(stored, measured, wanted)
            if wanted.purpose in _CALM or self._earlier(stored, backend) is None:
                self._keep(stored, measured)
        except BaseException:
            model.close()
            raise
        limit_ms = self._limit_ms(stored, backend) if wanted.purpose in _PICKY else None
        return Prepared(model, stored.id, limit_ms, measured, load_ms, warm_up_ms)

    def measure(
        self, wanted: Wanted, *, inferences: int, within_s: float, progress: Progress = lambda phase, percent: None
    ) -> Measurement:
        """Load a model beside whatever runs, measure it, and close it again; kept in the registry. Blocks; raises
        `ModelError`."""
        prepared = self.prepare(replace(wanted, purpose="relief"), progress)
        try:
            stored = self._stored(wanted)
            progress("benchmark", None)
            latency = _latency(prepared.model.time_inferences(inferences, within_s=within_s))
            measured = msgspec.structs.replace(prepared.measured, at=timestamp(time.time_ns()), latency_ms=latency)
            self._store.record(stored, measured, self._records(stored))
        finally:
            prepared.model.close()
        return measured

    def change(self, inference: InferenceOptions, policy: PolicyOptions) -> None:
        """For models that are brought up from now on."""
        self._inference, self._policy = inference, policy

    def abort(self) -> None:
        """End the build that runs, if one does. For any thread."""
        if self._engines is not None:
            self._engines.abort()

    def passed(self, model_id: str, before: str | None) -> None:
        """A model that somebody asked for has passed its probation: the next start begins with it."""
        self._store.choose(model_id, self._choice.active, before)

    def has_to_build(self, wanted: Wanted) -> bool:
        """Whether an engine has to be built before a model can run."""
        if not self.builds(wanted.backend or self.backend):
            return False
        try:
            stored = self._stored(wanted)
            return (
                self._engines is not None and is_built(stored) and self._engines.find(stored, self._inference) is None
            )
        except (ModelError, GpuUnavailable):  # will be told when it is opened
            return False

    def measured_ms(self, wanted: Wanted) -> float | None:
        """The 95th percentile of its inference as measured earlier, here, in this way; None where it was not."""
        try:
            found = self._earlier(self._stored(wanted), wanted.backend or self.backend)
        except ModelError:
            return None
        return found.latency_ms.p95 if found else None

    def watches(self, wanted: Wanted) -> bool:
        """Whether the latency of a model is held to the policy's limit where it is to run."""
        enabled = self._policy.enabled
        return enabled if isinstance(enabled, bool) else self.builds(wanted.backend or self.backend)

    def builds(self, backend: str) -> bool:
        """Whether a backend runs engines that are built here, on the GPU."""
        return bool(plugins.load("backends", backend).is_built)

    def _stored(self, wanted: Wanted) -> StoredModel:
        stored = self._store.get(wanted.model)
        return variant(stored, wanted.cheaper) if wanted.cheaper else stored

    def _build(self, stored: StoredModel, backend: str, progress: Progress) -> None:
        """Have the engine there before its memory is asked for: building takes some that is given back."""
        if self._engines is None or not self.builds(backend) or not is_built(stored):
            return
        try:
            self._engines.get(stored, self._inference, progress)
        except GpuUnavailable as error:
            raise ModelError(f"{stored.name}: {error}") from error

    def _limit_ms(self, stored: StoredModel, backend: str) -> float | None:
        if (own := stored.options.max_latency_ms) is not None:
            return own
        watched = self.watches(Wanted(stored.name, backend))
        return self._policy.max_latency_ms if watched else None

    def _admit(self, stored: StoredModel, backend: str, now: _Free) -> None:
        """Raises `ModelError` (`no_memory`) where the model does not fit beside what runs."""
        uses_gpu = self.builds(backend)
        free_mb = now.gpu_free_mb if uses_gpu and now.gpu_free_mb is not None else now.available_mb
        earlier = self._earlier(stored, backend)
        measured_mb = (earlier.memory_mb.gpu if uses_gpu else earlier.memory_mb.rss) if earlier else None
        needed_mb = measured_mb or self._estimated_mb(stored)
        how = "measured here" if measured_mb else "estimated from its weights, inputs and outputs"
        reserve_mb = self._choice.reserve_mb
        log.info("model.admitting", model=stored.id, needed_mb=round(needed_mb), how=how, free_mb=round(free_mb))
        if needed_mb > free_mb - reserve_mb:
            raise ModelError(
                f"{stored.id} needs {needed_mb:.0f} MB ({how}), {free_mb:.0f} MB are free and {reserve_mb:.0f} MB of "
                'them are kept in reserve; let it take the running model\'s place (swap = "replace"), or lower '
                "model.reserve_mb",
                code="no_memory",
            )

    def _earlier(self, stored: StoredModel, backend: str) -> Measurement | None:
        size, precision = stored.options.preprocess.size, self._precision(stored, backend)
        smaller = [cheaper.size for cheaper in stored.options.cheaper]
        for found in stored.entry.measured if stored.entry else ():
            where = found.where
            is_size = where.size == size if size is not None else where.size not in smaller
            same_way = (where.backend, where.precision, where.power_mode) == (backend, precision, self._power_mode())
            if same_way and is_size and where.device == _device(self.builds(backend)):
                return found
        return None

    def _estimated_mb(self, stored: StoredModel) -> float:
        entry = stored.entry
        weights = entry.size_bytes if entry else stored.size_bytes or 0
        tensors = [*(entry.inputs or ()), *(entry.outputs or ())] if entry else []
        return (weights + self._inference.max_batch * sum(_nbytes(tensor) for tensor in tensors)) / _MB

    def _precision(self, stored: StoredModel, backend: str) -> str | None:
        if not self.builds(backend):
            return None
        options = self._backends.get(backend) or plugins.load("backends", backend).Options()
        return stored.options.precision or getattr(options, "precision", None)

    def _measured(self, model: LoadedModel, stored: StoredModel, before: _Free) -> Measurement:
        latency = _latency(model.time_inferences(MEASURED, within_s=_WITHIN_S))
        uses_gpu = self.builds(model.backend)
        after = _memory(uses_gpu)
        return Measurement(
            at=timestamp(time.time_ns()),
            where=MeasuredOn(
                device=_device(uses_gpu),
                backend=model.backend,
                runtime=model.runtime,
                precision=self._precision(stored, model.backend),
                size=model.size,
                power_mode=self._power_mode(),
            ),
            latency_ms=latency,
            memory_mb=MemoryUse(
                gpu_before=before.gpu_used_mb,
                gpu_after=after.gpu_used_mb,
                rss_before=before.rss_mb,
                rss_after=after.rss_mb,
            ),
        )

    def _keep(self, stored: StoredModel, measured: Measurement) -> None:
        """A model need not go without, because its figures cannot be written down."""
        try:
            self._store.record(stored, measured, self._records(stored))
        except ModelError as error:
            log.warning("model.not_recorded", model=stored.id, code=error.code, reason=str(error))

    def _require_speed(self, stored: StoredModel, measured: Measurement, wanted: Wanted) -> None:
        limit_ms, factor = self._limit_ms(stored, measured.where.backend), self._choice.latency_factor
        p95 = measured.latency_ms.p95
        if limit_ms is not None and wanted.purpose in _PICKY and p95 > limit_ms * factor:
            raise ModelError(
                f"{stored.id} is too slow: its inference takes {p95:.1f} ms (95th percentile of "
                f"{measured.latency_ms.n}), the limit is {limit_ms:g} ms, and {factor:g} times that for a new model",
                code="model_too_slow",
            )

    def _records(self, stored: StoredModel) -> Sequence[EngineRecord]:
        try:
            return self._engines.records(stored, self._inference) if self._engines and is_built(stored) else ()
        except GpuUnavailable:
            return ()


def _latency(took: Sequence[float]) -> InferenceLatency:
    p50, p95, p99 = (round(float(value), 3) for value in np.percentile(took, (50, 95, 99)))
    return InferenceLatency(p50, p95, p99, n=len(took), batch=1)


@dataclass(frozen=True, slots=True)
class _Free:
    """Megabytes; of the GPU None where there is none."""

    rss_mb: float
    available_mb: float
    gpu_used_mb: float | None = None
    gpu_free_mb: float | None = None


def _memory(of_gpu: bool) -> _Free:
    """What cudaMemGetInfo, /proc and, where the GPU shares the machine's memory, MemAvailable say."""
    rss, available = psutil.Process().memory_info().rss / _MB, psutil.virtual_memory().available / _MB
    if not of_gpu:
        return _Free(rss, available)
    try:
        gpu = cuda.open_gpu()
    except GpuUnavailable:
        return _Free(rss, available)
    gpu.enter()
    free, total = gpu.memory()
    free_mb = min(free / _MB, available) if gpu.is_integrated else free / _MB
    return _Free(rss, available, (total - free) / _MB, free_mb)


def _device(of_gpu: bool) -> str:
    """The GPU's name, or the board's, or the processor's."""
    if of_gpu:
        try:
            return cuda.open_gpu().name
        except GpuUnavailable:
            pass
    for path in (Path("/proc/device-tree/model"), Path("/proc/cpuinfo")):
        try:
            text = path.read_text(encoding="utf-8", errors="replace")
        except OSError:
            continue
        if path.name == "model":
            return text.strip("\0\n ")
        named = [line.partition(":")[2].strip() for line in text.splitlines() if line.startswith("model name")]
        if named:
            return named[0]
    return platform.machine()


def _nbytes(tensor: TensorFacts) -> int:
    """Of one picture; an open side is taken for 640."""
    count = 1
    for axis, side in enumerate(tensor.shape):
        count *= 1 if axis == 0 else side or _UNKNOWN_SIDE
    return count * (np.dtype(tensor.dtype).itemsize if tensor.dtype != "bool" else 1)
