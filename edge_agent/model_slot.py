"""The active model: runs batches on it, and puts another in its place between two batches."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import structlog

from edge_agent.data import ModelRef
from edge_agent.errors import GpuLost, ModelError
from edge_agent.messages import ModelState
from edge_agent.models.engines import Progress
from edge_agent.models.loaded import LoadedModel
from edge_agent.threads import OwnerThread

log = structlog.get_logger()

_TELL_S = 2.0  # between two words on how a build goes


@dataclass(frozen=True, slots=True)
class Activation:
    """What an activation did and how long each part took."""

    model: ModelRef
    previous: str | None
    load_ms: float
    warm_up_ms: float
    swap_ms: float


class ModelSlot:
    """Holds the loaded model that the engine's thread runs, and hands it the next one.

    `load` opens a model by name, on a backend (None: the chosen one) and tells how it goes (blocking, in the
    `loader` thread; raises `ModelError`). `nudge` makes the engine's thread come and look, `on_change` hears of
    every new state, `on_lost` of a GPU that was lost in a load.
    """

    def __init__(
        self,
        load: Callable[[str, str | None, Progress], LoadedModel],
        *,
        loader: OwnerThread,
        nudge: Callable[[], None],
        on_change: Callable[[], None] = lambda: None,
        on_lost: Callable[[GpuLost], None] = lambda error: None,
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._load = load
        self._loader = loader
        self._nudge = nudge
        self._on_change = on_change
        self._on_lost = on_lost
        self._active: LoadedModel | None = None
        self._next: tuple[LoadedModel, Callable[[], object]] | None = None
        self._activating = asyncio.Lock()
        self.state: ModelState = "loading"
        self.reason: str | None = None

    @property
    def active(self) -> LoadedModel | None:
        return self._active

    @property
    def has_news(self) -> bool:
        """Whether `current` will give another model than before. Any thread may ask."""
        return self._next is not None

    async def activate(self, name: str, *, backend: str | None = None) -> Activation:
        """Load, warm up, swap, close the old. Raises `ModelError`; the old model then runs on, untouched."""
        async with self._activating:
            previous = self._active
            self._set_state("ready" if previous else "loading", None)
            try:
                model, load_ms, warm_up_ms = await self._loader.call(self._prepare, name, backend)
            except ModelError as error:
                if previous is None:
                    self._set_state("failed", str(error))
                else:
                    self._set_state("ready", None)
                log.warning("model.rejected", model=name, code=error.code, reason=str(error))
                raise
            except GpuLost as error:
                self._on_lost(error)
                raise
            began = time.monotonic()
            await self._hand_over(model)
            swap_ms = (time.monotonic() - began) * 1e3
            self._set_state("ready", None)
        done = Activation(model.ref, previous.ref.name if previous else None, load_ms, warm_up_ms, swap_ms)
        log.info(
            "model.activated",
            model=model.ref.name,
            previous=done.previous,
            backend=model.backend,
            load_ms=round(load_ms, 1),
            warm_up_ms=round(warm_up_ms, 1),
        )
        return done

    def current(self) -> LoadedModel | None:
        """The model to run the next batch on, after a swap that was asked for. In the engine's thread."""
        if self._next is not None:
            (model, tell), self._next = self._next, None
            previous, self._active = self._active, model
            if previous is not None:
                previous.close()
            tell()
        return self._active

    def close(self) -> None:
        """Close the model, and one that came too late to be swapped in. In the engine's thread."""
        waiting, self._next = self._next, None
        for model in (self._active, waiting[0] if waiting else None):
            if model is not None:
                model.close()

    async def _hand_over(self, model: LoadedModel) -> None:
        """Give the model to the engine's thread and wait until it has taken it."""
        loop = asyncio.get_running_loop()
        swapped = asyncio.Event()
        self._next = model, partial(loop.call_soon_threadsafe, swapped.set)
        self._nudge()
        await swapped.wait()

    def _prepare(self, name: str, backend: str | None) -> tuple[LoadedModel, float, float]:
        began = told = time.monotonic()

        def progress(phase: str, percent: float | None) -> None:
            nonlocal told
            if time.monotonic() - told >= _TELL_S:
                told = time.monotonic()
                done = f", {percent:.0f} %" if percent is not None else f", {told - began:.0f} s"
                text = f"building an engine for {name}: {phase}{done}"
                self._loop.call_soon_threadsafe(self._set_state, self.state, text)

        model = self._load(name, backend, progress)
        load_ms = (time.monotonic() - began) * 1e3
        try:
            return model, load_ms, model.warm_up()
        except BaseException:
            model.close()
            raise

    def _set_state(self, state: ModelState, reason: str | None) -> None:
        self.state, self.reason = state, reason
        self._on_change()
