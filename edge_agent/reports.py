"""What the agent says of itself: status, health, models, camera states and statistics, from the facts."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

import msgspec
import structlog

from edge_agent import __version__, messages
from edge_agent.camera import Camera
from edge_agent.data import Message
from edge_agent.messages import SCHEMA_VERSION, AgentState, ProcessStats, Topics, timestamp
from edge_agent.model_slot import ModelSlot
from edge_agent.models.store import ModelStore
from edge_agent.mqtt import Link
from edge_agent.queue import FrameQueue, Outbox
from edge_agent.stats import CameraFacts, Facts, LineStats, Rate, health

log = structlog.get_logger()


class Reports:
    """Reads the parts of a running agent and publishes what they come to. Event loop only."""

    def __init__(
        self,
        *,
        topics: Topics,
        publish: Callable[[Message], None],
        slot: ModelSlot,
        store: ModelStore,
        cameras: Mapping[str, Camera],
        frames: FrameQueue,
        link: Link,
        outbox: Outbox,
        stats: LineStats,
        engine_trouble: Callable[[], str | None],
        interval_s: float,
    ) -> None:
        self._topics = topics
        self._publish = publish
        self._slot = slot
        self._store = store
        self._cameras = cameras
        self._frames = frames
        self._link = link
        self._outbox = outbox
        self._stats = stats
        self._engine_trouble = engine_trouble
        self._interval_s = interval_s
        self._state: AgentState = "starting"
        self._started_ns = time.time_ns()
        self._rates: dict[str, tuple[Rate, Rate]] = {}

    def enter(self, state: AgentState) -> None:
        """The agent itself has come to a new state."""
        self._state = state
        self.publish_state()

    def publish_state(self) -> None:
        self._publish(messages.retained(self._topics.status, self.status()))
        self._publish(messages.retained(self._topics.health, self.health()))

    def publish_models(self) -> None:
        self._publish(messages.retained(self._topics.models, self.models()))
        self.publish_state()

    def publish_camera(self, camera: Camera) -> None:
        state, shown = camera.state, camera.state.format
        self._rates.setdefault(camera.name, (Rate.from_zero(), Rate.from_zero()))
        status = messages.CameraStatus(
            schema=SCHEMA_VERSION,
            camera=camera.name,
            state=state.phase,
            since=timestamp(state.since_ns),
            reason=state.reason,
            message=state.message,
            width=shown.width if shown else None,
            height=shown.height if shown else None,
            fps=shown.fps if shown else None,
        )
        self._publish(messages.retained(self._topics.camera(camera.name, "status"), status))
        self.publish_state()

    def forget_camera(self, name: str) -> None:
        """A camera is gone: nothing of it stays on the broker."""
        self._rates.pop(name, None)
        self._stats.forget(name)
        self._publish(Message(self._topics.camera(name, "status"), b"", qos=1, retain=True))
        self.publish_state()

    def publish_stats(self, process: ProcessStats) -> None:
        """Statistics of the interval that ends now, on their topic and in the log."""
        stats = self._statistics(process)
        self._publish(Message(self._topics.stats, messages.encode(stats)))
        self.publish_state()
        for name, camera in stats.cameras.items():
            drops = {cause: count for cause, count in msgspec.structs.asdict(camera.drops).items() if count}
            log.info(
                "camera.frames",
                camera=name,
                captured_fps=camera.captured_fps,
                inferred_fps=camera.inferred_fps,
                detections_in_last=self._stats.detections.get(name),
                inference_ms=stats.stages_ms["inference"].p50,
                dropped=drops or 0,
            )

    def status(self) -> messages.Status:
        model = self._slot.active
        return messages.Status(
            schema=SCHEMA_VERSION,
            device=self._topics.device,
            state=self._state,
            version=__version__,
            started_at=timestamp(self._started_ns),
            model=messages.ActiveModel(
                name=model.ref.name if model else None,
                version=model.ref.version if model else None,
                task=model.ref.task if model else None,
                state=self._slot.state,
                reason=self._slot.reason,
            ),
            backend=model.backend if model else None,
            degraded=[name for name, check in self.health().checks.items() if check.state != "ok"],
            cameras={name: camera.state.phase for name, camera in self._cameras.items()},
        )

    def health(self) -> messages.Health:
        now, last = time.monotonic(), self._stats.last_result
        cameras = {
            name: CameraFacts(
                phase=camera.state.phase,
                reason=camera.trouble or camera.state.reason,
                result_age_s=now - last[name] if name in last else None,
            )
            for name, camera in self._cameras.items()
        }
        facts = Facts(
            broker_connected=self._link.is_connected,
            broker_error=self._link.error,
            model_state=self._slot.state,
            model_reason=self._slot.reason,
            backend=self._slot.active.backend if self._slot.active else None,
            engine_trouble=self._engine_trouble(),
            cameras=cameras,
        )
        state, checks = health(facts, max_result_age_s=max(5.0, 2 * self._interval_s))
        return messages.Health(SCHEMA_VERSION, self._topics.device, timestamp(time.time_ns()), state, checks)

    def models(self) -> messages.Models:
        running = self._slot.active.ref if self._slot.active else None
        active = running.name if running else None
        entries = [
            messages.ModelEntry(
                name=model.name,
                version=model.options.version,
                family=running.family if running and model.name == active else model.options.family,
                path=str(model.path),
                size_bytes=model.size_bytes,
                origin=model.origin,
                active=model.name == active,
            )
            for model in self._store
        ]
        return messages.Models(schema=SCHEMA_VERSION, device=self._topics.device, active=active, models=entries)

    def _statistics(self, process: ProcessStats) -> messages.Stats:
        return messages.Stats(
            schema=SCHEMA_VERSION,
            device=self._topics.device,
            at=timestamp(time.time_ns()),
            since=timestamp(self._started_ns),
            interval_s=self._interval_s,
            model=self._slot.active.ref.name if self._slot.active else None,
            cameras={name: self._camera_stats(name, camera) for name, camera in self._cameras.items()},
            stages_ms=self._stats.stages_ms(),
            outbox=messages.OutboxStats(waiting=len(self._outbox), dropped=self._outbox.dropped),
            process=process,
        )

    def _camera_stats(self, name: str, camera: Camera) -> messages.CameraStats:
        captured, inferred = self._rates[name]
        done, quality = self._stats.inferred.get(name, 0), camera.quality
        hour = quality.last_hour()
        return messages.CameraStats(
            captured=quality.captured,
            inferred=done,
            published=self._link.sent[self._topics.camera(name, "results")],
            drops=messages.Drops(**{str(cause): count for cause, count in self._frames.drops(name).items()}),
            skipped=quality.skipped,
            waiting=self._frames.waiting(name),
            captured_fps=captured.update(quality.captured),
            inferred_fps=inferred.update(done),
            connection=messages.Connection(
                nominal_fps=quality.nominal_fps,
                fps_last_hour=hour.fps,
                jitter_ms=hour.jitter_ms,
                reconnects_last_hour=hour.reconnects,
                stalls_last_hour=hour.stalls,
                reconnects=quality.reconnects,
                stalls=quality.stalls,
                threads_left_behind=quality.abandoned,
                first_frame_ms=quality.first_frame_ms,
                last_reason=quality.last_reason,
            ),
        )
