"""What health asks of the parts of a running agent."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

from edge_agent.camera import Camera
from edge_agent.config import HealthOptions
from edge_agent.health import CameraFacts, Facts, Monitor, find
from edge_agent.messages import Check, CheckState, PolicyStatus
from edge_agent.model_slot import ModelSlot
from edge_agent.mqtt import Link
from edge_agent.outbox import Outbox
from edge_agent.readings import Readings
from edge_agent.stats import LineStats
from edge_agent.threads import OwnerThread
from edge_agent.watchdog import Watchdog


class Checkup:
    """Event loop only. `options` may be replaced at any time; `sensed_every_s`: how old readings become."""

    def __init__(
        self,
        options: HealthOptions,
        *,
        slot: ModelSlot,
        cameras: Mapping[str, Camera],
        link: Link,
        outbox: Outbox,
        stats: LineStats,
        watchdog: Watchdog,
        spooling: OwnerThread,
        chores: OwnerThread,
        policy: Callable[[], PolicyStatus],
        engine_trouble: Callable[[], str | None],
        sensed_every_s: float,
    ) -> None:
        self.options = options
        self.sensed_every_s = sensed_every_s
        self.readings: Readings | None = None
        self._sensed_at = time.monotonic()
        self._had_gpu = False
        self._slot = slot
        self._cameras = cameras
        self._link = link
        self._outbox = outbox
        self._stats = stats
        self._watchdog = watchdog
        self._spooling = spooling
        self._chores = chores
        self._policy = policy
        self._engine_trouble = engine_trouble
        self._monitor = Monitor()

    def sense(self, readings: Readings) -> None:
        """This is what the sensors see now."""
        self.readings, self._sensed_at = readings, time.monotonic()
        self._had_gpu = self._had_gpu or bool(readings.gpus)

    def now(self) -> tuple[CheckState, dict[str, Check]]:
        """The worst state, and the named checks."""
        found = find(self._facts(), self.options, self._monitor.states)
        return self._monitor.follow(found, recovery_s=self.options.recovery_s)

    def _facts(self) -> Facts:
        now, model, late = time.monotonic(), self._slot.active, self._watchdog.late()
        return Facts(
            broker_connected=self._link.is_connected,
            broker_error=self._link.error,
            broker_refusal=self._link.refusal,
            spool_trouble=self._outbox.spool.trouble,
            model_state=self._slot.state,
            model_reason=self._slot.reason,
            backend=model.backend if model else None,
            engine_trouble=self._engine_trouble(),
            engine_silent_s=late.get("engine"),
            loader_silent_s=late.get("loader"),
            spool_busy_s=self._spooling.busy_s,
            chores_busy_s=self._chores.busy_s,
            policy=self._policy(),
            cameras={name: self._camera(name, camera, now) for name, camera in self._cameras.items()},
            readings=self.readings,
            readings_age_s=now - self._sensed_at,
            uses_gpu=model is not None and model.inference_clock == "gpu",
            had_gpu=self._had_gpu,
            sensed_every_s=self.sensed_every_s,
        )

    def _camera(self, name: str, camera: Camera, now: float) -> CameraFacts:
        last = self._stats.last_result.get(name)
        return CameraFacts(
            phase=camera.state.phase,
            reason=camera.trouble or camera.state.reason,
            result_age_s=None if last is None else now - last,
            stuck_s=camera.stuck_s,
            period_s=camera.period_s,
        )
