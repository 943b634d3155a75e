"""The active model: runs batches on it, puts another in its place between two batches, and takes it back if it fails.

The engine's thread owns whatever model runs, and the one before it until the new one has passed its probation. What it
has no more use for is closed by the loader's thread: freeing GPU memory takes as long as many batches.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import numpy as np
import structlog

from edge_agent.config import ModelChoice
from edge_agent.data import ModelRef
from edge_agent.errors import EdgeAgentError, EngineError, GpuLost, ModelCode, ModelError
from edge_agent.messages import Measurement, ModelState, Rejected, timestamp
from edge_agent.models.engines import Progress
from edge_agent.models.loaded import Inferred, LoadedModel
from edge_agent.models.loading import ModelLoader, Prepared, Wanted
from edge_agent.threads import OwnerThread

log = structlog.get_logger()

_TELL_S = 2.0  # between two words on how a build goes
_ENOUGH, _FEWEST = 20, 3  # inferences to judge a model's speed by: on the way, and at the end

Swap = Literal["beside", "replace"]


@dataclass(frozen=True, slots=True)
class Activation:
    """What an activation did and how long each part took. `pause_ms`: how long no model ran, where the old one had to
    go first; `probation_frames`: those that the new one was watched on."""

    id: str
    model: ModelRef
    previous: str | None
    load_ms: float
    warm_up_ms: float
    swap_ms: float
    pause_ms: float | None
    probation_frames: int
    measured: Measurement


class Probation:
    """The first frames of a new model. Begins when it is created; for the engine's thread."""

    def __init__(
        self, *, frames: int, seconds: float, limit_ms: float | None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.failure: ModelError | None = None
        self.seen = 0
        self._frames = frames
        self._limit_ms = limit_ms
        self._clock = clock
        self._until = clock() + seconds
        self._took: list[float] = []

    def record(self, inferred: Inferred) -> None:
        self.seen += len(inferred.results)
        self._took.append(inferred.inference_ms)
        self._require_speed(_ENOUGH)

    def fail(self, code: ModelCode, reason: str) -> None:
        self.failure = self.failure or ModelError(reason, code=code)

    def is_over(self) -> bool:
        """Whether it has ended; if by frames or time, after a last look at the speed."""
        if self.failure is None and (self.seen >= self._frames or self._clock() >= self._until):
            self._require_speed(_FEWEST)
            return True
        return self.failure is not None

    def _require_speed(self, least: int) -> None:
        if self._limit_ms is None or len(self._took) < least:
            return
        p95 = float(np.percentile(self._took, 95))
        if p95 > self._limit_ms:
            how = f"{p95:.1f} ms (95th percentile of {len(self._took)})"
            self.fail("model_too_slow", f"its inference takes {how}, more than {self._limit_ms:g} ms")


@dataclass(slots=True)
class _Handover:
    """A model for the engine's thread to run next (None: none), and what to do once it does. `keeps`: the one before
    stays open beside it."""

    model: LoadedModel | None
    done: Callable[[], object]
    probation: Callable[[], Probation] | None = None
    keeps: bool = False


class ModelSlot:
    """Holds the loaded model that the engine's thread runs, and hands it the next one.

    Models are brought up by `loader` in its `thread`. `nudge` makes the engine's thread come and look, `on_change`
    hears of every new state, `on_lost` of a GPU that was lost in a load, `on_inferred` (in the engine's thread) how
    many milliseconds each inference took.
    """

    def __init__(
        self,
        loader: ModelLoader,
        *,
        thread: OwnerThread,
        nudge: Callable[[], None],
        choice: ModelChoice,
        on_change: Callable[[], None] = lambda: None,
        on_lost: Callable[[GpuLost], None] = lambda error: None,
        on_inferred: Callable[[float], None] = lambda inference_ms: None,
    ) -> None:
        self.state: ModelState = "loading"
        self.reason: str | None = None
        self.expected_ms = 0.0
        """What the model took for a picture when it was brought up."""
        self.next: str | None = None
        self.rejected: Rejected | None = None
        self.running: Wanted | None = None
        self._loop = asyncio.get_running_loop()
        self._loader = loader
        self._thread = thread
        self._nudge = nudge
        self._choice = choice
        self._on_change = on_change
        self._on_lost = on_lost
        self._on_inferred = on_inferred
        self._active: LoadedModel | None = None
        self._before: LoadedModel | None = None
        self._retired: deque[LoadedModel] = deque()
        self._probation: Probation | None = None
        self._handover: _Handover | None = None
        self._is_leaving = False
        self._concluded: Callable[[Probation], object] = lambda probation: None
        self._activating = asyncio.Lock()

    @property
    def active(self) -> LoadedModel | None:
        return self._active

    @property
    def is_changing(self) -> bool:
        """Whether a model is on its way in, or on probation."""
        return self._activating.locked()

    # On the event loop

    async def activate(
        self,
        wanted: Wanted,
        *,
        swap: Swap | None = None,
        remember: bool = True,
        progress: Progress = lambda phase, percent: None,
    ) -> Activation:
        """Verify, admit, load, warm up, measure, swap, watch, close the old. One at a time, in the order of the calls.

        Raises `ModelError`; the old model then runs on, or again. With `remember` the next start begins with it.
        `progress` is called in the loader's thread.
        """
        async with self._activating:
            self.next = wanted.model
            try:
                done = await self._activate(wanted, swap or self._choice.swap, progress)
                if remember:
                    await self._remember(done)
            except ModelError as error:
                log.warning("model.rejected", model=wanted.model, code=error.code, reason=str(error))
                self.rejected = Rejected(wanted.model, error.code, str(error), timestamp(time.time_ns()))
                raise
            except GpuLost as error:
                self._on_lost(error)
                raise
            finally:
                self.next = None
                self._settle()
        log.info(
            "model.activated",
            model=done.id,
            previous=done.previous,
            backend=self._active.backend if self._active else None,
            load_ms=round(done.load_ms, 1),
            inference_ms=done.measured.latency_ms.p50,
            pause_ms=round(done.pause_ms, 1) if done.pause_ms is not None else None,
        )
        return done

    async def deactivate(self) -> str | None:
        """Close the model, so that no frame is inferred; its name, if there was one."""
        async with self._activating:
            previous, self.running = self.running, None
            await self._hand_over(None)
            self._set_state("ready", "no model is active: it was deactivated")
        return previous.model if previous else None

    async def measure(self, wanted: Wanted, *, inferences: int, within_s: float, progress: Progress) -> Measurement:
        """Measure a model beside the one that runs. Raises `ModelError`."""
        measure = partial(self._loader.measure, inferences=inferences, within_s=within_s, progress=progress)
        return await self._thread.call(measure, wanted)

    def abort(self) -> None:
        """End the build of an engine that an activation waits for; the activation then fails."""
        self._loader.abort()

    async def _activate(self, wanted: Wanted, swap: Swap, progress: Progress) -> Activation:
        previous = self.running
        paused_at: float | None = None
        try:
            prepared = await self._prepare(wanted, progress)
        except ModelError as error:
            if error.code != "no_memory" or swap != "replace" or previous is None:
                raise
            log.warning("model.replacing", model=wanted.model, previous=previous.model, reason=str(error))
            await self._hand_over(None)
            paused_at = time.monotonic()
            try:
                prepared = await self._prepare(wanted, progress)
            except ModelError:
                await self._bring_back(previous)
                raise
        asked = time.monotonic()
        outcome = await self._swap_in(prepared, keeps=paused_at is None, watches=previous is not None)
        swapped, self.running, seen = time.monotonic(), wanted, 0
        self.expected_ms = prepared.measured.latency_ms.p50
        if previous is not None:  # else there is nothing to go back to
            seen = await self._watch(prepared, previous, outcome, is_open=paused_at is None)
        return Activation(
            id=prepared.id,
            model=prepared.model.ref,
            previous=previous.model if previous else None,
            load_ms=prepared.load_ms,
            warm_up_ms=prepared.warm_up_ms,
            swap_ms=(swapped - asked) * 1e3,
            pause_ms=(swapped - paused_at) * 1e3 if paused_at is not None else None,
            probation_frames=seen,
            measured=prepared.measured,
        )

    async def _prepare(self, wanted: Wanted, progress: Progress) -> Prepared:
        told = began = time.monotonic()
        last = ""

        def tell(phase: str, percent: float | None) -> None:
            nonlocal told, last
            progress(phase, percent)
            if phase != last or time.monotonic() - told >= _TELL_S:
                told, last = time.monotonic(), phase
                done = f", {percent:.0f} %" if percent is not None else f", {told - began:.0f} s"
                self._tell(self._set_state, "loading", f"{wanted.model}: {phase}{done}")

        self._set_state("loading", f"{wanted.model}: waiting")
        return await self._thread.call(self._loader.prepare, wanted, tell)

    async def _swap_in(self, prepared: Prepared, *, keeps: bool, watches: bool) -> asyncio.Future[Probation]:
        """Give the model to the engine's thread and wait until it has taken it; what will come of its probation, if it
        `watches`."""
        outcome: asyncio.Future[Probation] = self._loop.create_future()
        limit_ms = prepared.limit_ms * self._choice.latency_factor if prepared.limit_ms is not None else None
        frames, seconds = self._choice.probation_frames, self._choice.probation_s
        begin = partial(Probation, frames=frames, seconds=seconds, limit_ms=limit_ms)
        self._concluded = lambda probation: self._tell(outcome.set_result, probation)
        await self._hand_over(prepared.model, begin if watches else None, keeps=keeps and watches)
        return outcome

    async def _watch(
        self, prepared: Prepared, previous: Wanted, outcome: asyncio.Future[Probation], *, is_open: bool
    ) -> int:
        """Wait for the end of a probation; the frames that it took. Raises `ModelError` once `previous` runs again,
        which is still open or has to be loaded."""
        self._set_state("probation", f"{prepared.id}: the first {self._choice.probation_frames} frames are watched")
        verdict = await self._verdict(outcome)
        if verdict.failure is None:
            return verdict.seen
        self.running = previous
        runs_again = is_open or await self._bring_back(previous)
        raise ModelError(
            f"{prepared.id} failed on probation, after {verdict.seen} frames: {verdict.failure}; "
            + (f"{previous.model} runs again" if runs_again else f"{previous.model} could not be loaded again"),
            code=verdict.failure.code,
        )

    async def _verdict(self, outcome: asyncio.Future[Probation]) -> Probation:
        """How the probation ended: after enough frames, or after its time, which a nudge makes the engine notice."""
        await asyncio.wait([outcome], timeout=self._choice.probation_s)
        while not outcome.done():
            self._nudge()
            await asyncio.wait([outcome], timeout=0.5)
        return outcome.result()

    async def _bring_back(self, previous: Wanted) -> bool:
        """Load what ran before again; whether that went."""
        try:
            prepared = await self._prepare(replace(previous, purpose="return"), lambda phase, percent: None)
        except ModelError as error:
            log.error("model.lost", model=previous.model, reason=str(error))
            self.running = None
            return False
        await self._hand_over(prepared.model)
        self.running = previous
        return True

    async def _remember(self, done: Activation) -> None:
        try:
            await self._thread.call(self._loader.passed, done.id, done.previous)
        except ModelError as error:
            log.warning("model.not_remembered", model=done.id, reason=str(error))

    async def _hand_over(
        self, model: LoadedModel | None, probation: Callable[[], Probation] | None = None, *, keeps: bool = False
    ) -> None:
        """Give the engine's thread a model, or none, and wait until it has taken it."""
        swapped = asyncio.Event()
        self._handover = _Handover(model, lambda: self._tell(swapped.set), probation, keeps)
        self._nudge()
        await swapped.wait()

    def _settle(self) -> None:
        """The state that holds when no change is under way."""
        if self._active is not None:
            self._set_state("ready", None)
        else:
            self._set_state("failed", self.rejected.message if self.rejected else "no model could be loaded")

    def _set_state(self, state: ModelState, reason: str | None) -> None:
        self.state, self.reason = state, reason
        self._on_change()

    # In the engine's thread

    @property
    def has_news(self) -> bool:
        """Whether `current` will give another model than before."""
        return self._handover is not None

    def current(self) -> LoadedModel | None:
        """The model to run the next batch on, after a change that was asked for. Call it when no batch is under way."""
        self._conclude()
        if (handover := self._handover) is not None:
            self._handover, self._is_leaving = None, False
            previous, self._active = self._active, handover.model
            if handover.keeps:
                self._before = previous
            elif previous is not None:
                self._retire(previous)
            if handover.probation is not None:
                self._probation = handover.probation()
            elif handover.model is not None:
                handover.model.requires_numbers = False
            handover.done()
        return self._active

    def judge(self, inferred: Inferred) -> None:
        """A batch came through the model."""
        self._on_inferred(inferred.inference_ms)
        if self._probation is not None:
            self._probation.record(inferred)
            self._conclude()

    def give_up(self, error: EngineError) -> bool:
        """The model failed in a batch. Whether it is taken back: `current` then gives the one that ran before, or
        none while that is loaded again."""
        if self._probation is None:
            return self._is_leaving  # it was on its way when the verdict fell
        self._probation.fail("model_not_finite" if error.code == "model_not_finite" else "model_failed", str(error))
        self._conclude()
        return True

    def close(self) -> None:
        """Close the model, the one before it, and one that came too late to be swapped in."""
        handover, self._handover = self._handover, None
        for model in (self._active, self._before, handover.model if handover else None):
            if model is not None:
                model.close()
        self._before = None
        self._close_retired()  # those that the loader's thread has not come to

    def _retire(self, model: LoadedModel) -> None:
        """Have it closed before the loader's thread does anything else that is asked for from now on."""
        self._retired.append(model)
        self._thread.post(self._close_retired)

    def _conclude(self) -> None:
        """End the probation, if it is over: the model before is closed, or takes over again."""
        probation, before = self._probation, self._before
        if probation is None or not probation.is_over():
            return
        self._probation = self._before = None
        if probation.failure is None:
            if self._active is not None:
                self._active.requires_numbers = False
            if before is not None:
                self._retire(before)
            self._concluded(probation)
        else:
            self._is_leaving = True
            self._handover = _Handover(before, lambda: self._concluded(probation))

    # In any thread

    def _close_retired(self) -> None:
        while self._retired:
            with contextlib.suppress(IndexError):  # another thread was faster
                model = self._retired.popleft()
                try:
                    model.close()
                except (EdgeAgentError, OSError, RuntimeError) as error:  # it runs no more: nothing else depends on it
                    log.error("model.not_closed", model=model.ref.name, reason=str(error))

    def _tell(self, callback: Callable[..., object], *values: object) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
            self._loop.call_soon_threadsafe(callback, *values)
