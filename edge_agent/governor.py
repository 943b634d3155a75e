"""Carries out what the latency ladder decides: watches inference, asks the ladder, and has the slot change models.

A model that somebody asked for begins a new ladder; the ladder's own changes are not remembered over a restart.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

import structlog

from edge_agent.config import Cheaper, ModelOptions, PolicyOptions
from edge_agent.errors import EdgeAgentError, ModelError
from edge_agent.messages import PolicyStatus
from edge_agent.model_slot import ModelSlot
from edge_agent.models.loading import ModelLoader, Purpose, Wanted
from edge_agent.models.store import ModelStore
from edge_agent.policy import Conditions, Ladder, Move, Rung, rungs
from edge_agent.threads import OwnerThread

log = structlog.get_logger()

_OFF = PolicyStatus("off", 0, [], None, None, 0, "nothing runs, or its latency is not watched")


class Governor:
    """`record` is for the engine's thread, all else for the event loop. `conditions` (called in
    the `chores` thread) tells what the sensors see."""

    def __init__(
        self,
        slot: ModelSlot,
        *,
        loader: ModelLoader,
        store: ModelStore,
        options: PolicyOptions,
        chores: OwnerThread,
        conditions: Callable[[], Conditions],
        on_change: Callable[[], None] = lambda: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.status = _OFF
        self._slot = slot
        self._loader = loader
        self._store = store
        self._options = options
        self._chores = chores
        self._conditions = conditions
        self._on_change = on_change
        self._clock = clock
        self._ladder: Ladder | None = None
        self._runs: Wanted | None = None
        self._asked: Wanted | None = None
        self._is_stale = False

    def record(self, inference_ms: float) -> None:
        """An inference has just ended."""
        if (ladder := self._ladder) is not None:
            ladder.record(self._clock(), inference_ms)

    def change(self, options: PolicyOptions) -> None:
        """Other rules, from the next look on."""
        self._options = options
        self._is_stale = True

    async def run(self) -> None:
        """Watch, for ever."""
        while True:
            await self.step()
            await asyncio.sleep(self._ladder.interval_s if self._ladder else 1.0)

    async def step(self) -> None:
        """One look, and what follows from it."""
        if self._slot.is_changing:
            return
        runs = self._slot.running
        if self._is_stale or not _is_same(runs, self._runs):
            if not _is_same(runs, self._runs):  # somebody asked for another one
                self._asked = runs
            self._runs, self._is_stale = runs, False
            self._ladder = await self._chores.call(self._below, self._asked, runs) if self._asked and runs else None
        if (ladder := self._ladder) is not None and self._asked is not None:
            measured, conditions = await self._chores.call(self._look, ladder, self._asked)
            move = ladder.decide(self._clock(), measured_ms=measured, conditions=conditions)
            is_as_it_was = not self._slot.is_changing and _is_same(self._slot.running, runs)
            if move is not None and is_as_it_was and not self._is_stale:
                await self._carry_out(ladder, move, self._asked)
        self._tell()

    def _below(self, asked: Wanted, runs: Wanted) -> Ladder | None:
        """A ladder below a model that was asked for, on the rung that runs; without the precisions of engines where
        none are built."""
        if not self._loader.watches(asked):
            return None
        models: dict[str, ModelOptions] = {}
        try:
            for stored in sorted(self._store, key=lambda stored: stored.origin == "config"):  # these come first
                models[stored.id] = models[stored.name] = stored.options
        except ModelError as error:
            log.error("policy.off", reason=str(error))
            return None
        builds = self._loader.builds(asked.backend or self._loader.backend)
        first, *lower = rungs(asked.model, models, self._options)
        lower = [rung for rung in lower if builds or rung.precision is None]
        unbuilt = [rung for rung in lower if self._loader.has_to_build(_wanted(asked, rung))]
        if unbuilt:  # not now, when the GPU has enough to do
            log.warning(
                "policy.not_built", rungs=[str(rung) for rung in unbuilt], hint="model.build makes their engines"
            )
        found = [first, *(rung for rung in lower if rung not in unbuilt)]
        at = next((i for i, rung in enumerate(found) if _is_same(_wanted(asked, rung), runs)), 0)
        return Ladder(found, self._options, at=at)

    def _look(self, ladder: Ladder, asked: Wanted) -> tuple[list[float | None], Conditions]:
        return [self._loader.measured_ms(_wanted(asked, rung)) for rung in ladder.rungs], self._conditions()

    async def _carry_out(self, ladder: Ladder, move: Move, asked: Wanted) -> None:
        purpose: Purpose = "relief" if move.to > ladder.standing.rung else "recovery"
        wanted = _wanted(asked, ladder.rungs[move.to], purpose)
        log.warning("policy.moving", to=str(ladder.rungs[move.to]), cause=move.cause, reason=move.reason)
        try:
            await self._slot.activate(wanted, remember=False)
        except EdgeAgentError as error:
            ladder.refused(self._clock(), move.to, str(error))
            return
        self._runs = wanted
        ladder.moved(self._clock(), move.to)

    def _tell(self) -> None:
        told = self._status()
        if (told.state, told.rung, told.models) != (self.status.state, self.status.rung, self.status.models):
            self.status = told
            log.info("policy.state", state=told.state, rung=told.rung, detail=told.detail)
            self._on_change()
        self.status = told

    def _status(self) -> PolicyStatus:
        if self._ladder is None:
            return _OFF
        standing = self._ladder.standing
        return PolicyStatus(
            state=standing.state,
            rung=standing.rung,
            models=[str(rung) for rung in self._ladder.rungs],
            limit_ms=standing.limit_ms,
            p95_ms=standing.p95_ms,
            changes_last_hour=standing.changes_last_hour,
            detail=standing.detail,
            cause=standing.last.cause if standing.last else None,
            reason=standing.last.reason if standing.last else None,
        )


def _wanted(asked: Wanted, rung: Rung, purpose: Purpose = "asked") -> Wanted:
    cheaper = Cheaper(rung.precision, rung.size) if rung.precision or rung.size else None
    return Wanted(rung.model, asked.backend, cheaper, purpose)


def _is_same(one: Wanted | None, other: Wanted | None) -> bool:
    """Whether it is the same model, run in the same way, for whatever purpose."""
    if one is None or other is None:
        return one is other
    return (one.model, one.backend, one.cheaper) == (other.model, other.backend, other.cheaper)
