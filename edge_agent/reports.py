"""What the agent says of itself: status, health, models, camera states and statistics, from the facts."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import msgspec
import structlog

from edge_agent import __version__, messages
from edge_agent.camera import Camera
from edge_agent.checkup import Checkup
from edge_agent.data import Message, ModelRef
from edge_agent.histogram import WINDOW_S, Histogram, Window, durations
from edge_agent.messages import SCHEMA_VERSION, AgentState, CheckState, Topics, timestamp
from edge_agent.metrics import Facts
from edge_agent.model_slot import ModelSlot
from edge_agent.models.store import StoredModel
from edge_agent.mqtt import Link
from edge_agent.outbox import Outbox
from edge_agent.queue import FrameQueue
from edge_agent.readings import ProcessReadings, Readings
from edge_agent.stats import STAGES, LineStats, Rate, percentiles

log = structlog.get_logger()

_LONGEST_HEADLINE = 400
_RATES = ("captured", "inferred", "published")


class Reports:
    """Reads the parts of a running agent and publishes what they come to. Event loop only."""

    def __init__(
        self,
        *,
        topics: Topics,
        publish: Callable[[Message], None],
        slot: ModelSlot,
        cameras: Mapping[str, Camera],
        frames: FrameQueue,
        link: Link,
        outbox: Outbox,
        stats: LineStats,
        policy: Callable[[], messages.PolicyStatus],
        overrides: Callable[[], list[str]],
        commands: Callable[[], Mapping[str, int]],
        checkup: Checkup,
        interval_s: float,
        log_lines_dropped: Callable[[], int],
    ) -> None:
        self._topics = topics
        self._publish = publish
        self._slot = slot
        self.known: Sequence[StoredModel] = ()
        self._told_models: Message | None = None
        self._cameras = cameras
        self._frames = frames
        self._link = link
        self._outbox = outbox
        self._stats = stats
        self._policy = policy
        self._overrides = overrides
        self._commands = commands
        self._checkup = checkup
        self.interval_s = interval_s
        self._log_lines_dropped = log_lines_dropped
        self._state: AgentState = "starting"
        self._started_ns = self._since_ns = time.time_ns()
        self._at_reset: dict[str, Mapping[str, int]] = {}
        self.last_status: messages.Status | None = None
        self.last_health: messages.Health | None = None
        self.last_stats: messages.Stats | None = None
        self._loop_lag = durations()
        self._latencies: Mapping[str, Histogram] = {}
        self._captures: Mapping[str, Histogram] = {}
        self._rates: dict[str, Mapping[str, Rate]] = {}

    def enter(self, state: AgentState) -> None:
        """The agent itself has come to a new state."""
        self._state = state
        self.publish_state()

    def time_loop(self, late_s: float) -> None:
        """The event loop came so late to what was due."""
        self._loop_lag.at(time.monotonic()).record(late_s * 1e3)

    def headline(self) -> str:
        """All of it in a line, as `systemctl status` shows it."""
        model, health = self._slot.active, self.last_health
        phases = [camera.state.phase for camera in self._cameras.values()]
        fps = sum(rates["inferred"].last for rates in self._rates.values())
        runs = f"{model.ref.name} on {model.backend}" if model else f"no model ({self._slot.reason or 'loading'})"
        told = f"{self._state}: {runs}, {phases.count('running')} of {len(phases)} cameras, {fps:.1f} frames/s"
        if health is None:
            return told
        unwell = [f"{name}: {check.fact}" for name, check in health.checks.items() if check.state != "ok"]
        return f"{told}; {health.state}: {'; '.join(unwell) or 'all is well'}"[:_LONGEST_HEADLINE]

    def look(self) -> None:
        """Tell at once of what is no longer well, or is again."""
        before, now = self.last_health, self.health()
        if before is None or _states(before) != _states(now):
            self._tell_state(now)

    def publish_state(self) -> None:
        self._tell_state(self.health())

    def _tell_state(self, health: messages.Health) -> None:
        before, self.last_status, self.last_health = self.last_status, self._status(health), health
        if self.last_status != before:
            self._publish(messages.retained(self._topics.status, self.last_status))
        self._publish(messages.retained(self._topics.health, self.last_health))

    def facts(self) -> Facts | None:
        """What was told last, for whoever asks in between. For any thread."""
        if self.last_status is None or self.last_health is None:
            return None
        return Facts(self.last_status, self.last_health, self.last_stats, self._latencies, self._captures)

    def know(self, models: Sequence[StoredModel]) -> None:
        """These are the models that there are now."""
        self.known = models
        self.publish_models()

    def publish_models(self) -> None:
        """The index of models, if it is another than before."""
        told = messages.retained(self._topics.models, self.models())
        if told != self._told_models:
            self._told_models = told
            self._publish(told)

    def publish_camera(self, camera: Camera) -> None:
        state, shown = camera.state, camera.state.format
        self._rates.setdefault(camera.name, {of: Rate.from_zero() for of in _RATES})
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
        self._at_reset.pop(f"camera.{name}", None)
        self._publish(Message(self._topics.camera(name, "status"), b"", "status", retain=True))
        self.publish_state()

    def reset(self) -> None:
        """Count from now on, which is the new `since`."""
        self._since_ns = time.time_ns()
        self._at_reset = {
            "commands": _counts(self._commands()),
            "refused": _counts(self._link.refused),
            "log": _counts(self._log_counts()),
            **{f"dropped.{kind}": causes for kind, causes in self._drops().items()},
            **{f"camera.{name}": self._counts(name, camera) for name, camera in self._cameras.items()},
        }
        self._stats.reset()
        self._outbox.publishing.reset()
        self._loop_lag.reset()
        for camera in self._cameras.values():
            camera.quality.capture.reset()

    def publish_stats(self) -> None:
        """Statistics of the interval that ends now, on their topic and in the log."""
        for name in self._cameras:
            counts = self._counts(name, self._cameras[name])
            for of, rate in self._rates[name].items():
                rate.update(counts[of])
        stats = self.last_stats = self.statistics()
        self._latencies = {stage: window.total() for stage, window in self._timed().items()}
        self._captures = {name: camera.quality.capture.total() for name, camera in self._cameras.items()}
        self._publish(Message(self._topics.stats, messages.encode(stats), "status"))
        self.publish_state()
        for name, camera in stats.cameras.items():
            drops = {cause: count for cause, count in msgspec.structs.asdict(camera.drops).items() if count}
            log.info(
                "camera.frames",
                camera=name,
                captured_fps=camera.captured_fps,
                inferred_fps=camera.inferred_fps,
                published_fps=camera.published_fps,
                detections_in_last=self._stats.detections.get(name),
                inference_ms=stats.stages_ms["inference"].p50,
                dropped=drops or 0,
            )

    def publish_last_stats(self) -> None:
        """Statistics once all has ended, so that every frame is told; rates are still those of the last interval."""
        self._publish(Message(self._topics.stats, messages.encode(self.statistics()), "status"))

    def status(self) -> messages.Status:
        return self._status(self.health())

    def _status(self, health: messages.Health) -> messages.Status:
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
                next=self._slot.next,
                rejected=self._slot.rejected,
            ),
            backend=model.backend if model else None,
            policy=self._policy(),
            overrides=self._overrides(),
            degraded=[name for name, check in health.checks.items() if check.state != "ok"],
            cameras={name: camera.state.phase for name, camera in self._cameras.items()},
        )

    def health(self) -> messages.Health:
        state, checks = self._checkup.now()
        return messages.Health(SCHEMA_VERSION, self._topics.device, timestamp(time.time_ns()), state, checks)

    def models(self) -> messages.Models:
        running = self._slot.active.ref if self._slot.active else None
        entries = [_model_entry(model, running) for model in self.known]
        active = next((entry.id for entry in entries if entry.active), running.name if running else None)
        return messages.Models(schema=SCHEMA_VERSION, device=self._topics.device, active=active, models=entries)

    def statistics(self) -> messages.Stats:
        """Counters now; rates, and facts of the process, of the last interval."""
        now_s, model = time.monotonic(), self._slot.active
        readings = self._checkup.readings or Readings()
        return messages.Stats(
            schema=SCHEMA_VERSION,
            device=self._topics.device,
            at=timestamp(time.time_ns()),
            since=timestamp(self._since_ns),
            interval_s=self.interval_s,
            window_s=WINDOW_S,
            model=model.ref.name if model else None,
            inference_clock=model.inference_clock if model else None,
            cameras={name: self._camera_stats(name, camera) for name, camera in self._cameras.items()},
            stages_ms=self._stages_ms(now_s),
            batch_sizes=self._stats.batch_sizes(),
            outbox=self._outbox_stats(),
            commands=self._since("commands", self._commands()),
            process=readings.process or ProcessReadings(),
            loop_lag_ms=percentiles(self._loop_lag.recent(now_s)),
            host=readings.host,
            gpus=readings.gpus,
            board=readings.board,
            sensor_troubles=readings.troubles,
            log_lines_dropped=self._since("log", self._log_counts())["dropped"],
        )

    def _timed(self) -> Mapping[str, Window[Histogram]]:
        """The stages that all cameras share."""
        return {**self._stats.stages, "publish": self._outbox.publishing}

    def _stages_ms(self, now_s: float) -> dict[str, messages.Percentiles]:
        took = {stage: window.recent(now_s) for stage, window in self._timed().items()}
        took["capture"] = Histogram.merged(camera.quality.capture.recent(now_s) for camera in self._cameras.values())
        return {stage: percentiles(took[stage]) for stage in STAGES}

    def _outbox_stats(self) -> messages.OutboxStats:
        spool = self._outbox.spool
        return messages.OutboxStats(
            waiting=_counts(self._outbox.waiting()),
            dropped={kind: self._since(f"dropped.{kind}", causes) for kind, causes in self._drops().items()},
            refused=self._since("refused", self._link.refused),
            spool=messages.SpoolStats(len(spool), spool.nbytes, spool.trouble),
        )

    def _camera_stats(self, name: str, camera: Camera) -> messages.CameraStats:
        rates, quality = self._rates[name], camera.quality
        since_reset = self._since(f"camera.{name}", self._counts(name, camera))
        drops = {key.partition(".")[2]: count for key, count in since_reset.items() if key.startswith("drops.")}
        hour = quality.last_hour()
        return messages.CameraStats(
            captured=since_reset["captured"],
            inferred=since_reset["inferred"],
            published=since_reset["published"],
            drops=messages.Drops(**drops),
            skipped=since_reset["skipped"],
            waiting=self._frames.waiting(name),
            captured_fps=rates["captured"].last,
            inferred_fps=rates["inferred"].last,
            published_fps=rates["published"].last,
            capture_ms=percentiles(quality.capture.recent(time.monotonic())),
            objects=self._stats.objects(name),
            connection=messages.Connection(
                nominal_fps=quality.nominal_fps,
                fps_last_hour=hour.fps,
                jitter_ms=hour.jitter_ms,
                reconnects_last_hour=hour.reconnects,
                stalls_last_hour=hour.stalls,
                reconnects=since_reset["reconnects"],
                stalls=since_reset["stalls"],
                threads_left_behind=since_reset["threads_left_behind"],
                first_frame_ms=quality.first_frame_ms,
                last_reason=quality.last_reason,
            ),
        )

    def _counts(self, name: str, camera: Camera) -> dict[str, int]:
        """A camera's counters since it was added, which only grow."""
        quality = camera.quality
        return {
            "captured": quality.captured,
            "inferred": self._stats.inferred.get(name, 0),
            "published": self._link.sent[self._topics.camera(name, "results")],
            "skipped": quality.skipped,
            "reconnects": quality.reconnects,
            "stalls": quality.stalls,
            "threads_left_behind": quality.abandoned,
            **{f"drops.{cause}": count for cause, count in self._frames.drops(name).items()},
        }

    def _drops(self) -> dict[str, dict[str, int]]:
        """Messages that were dropped since the start, by class and cause."""
        drops = {str(kind): _counts(causes) for kind, causes in self._outbox.dropped().items()}
        if self._outbox.spool.dropped:
            drops["spool"] = _counts(self._outbox.spool.dropped)
        return drops

    def _log_counts(self) -> dict[str, int]:
        return {"dropped": self._log_lines_dropped()}

    def _since(self, group: str, counts: Mapping[Any, int]) -> dict[str, int]:
        """What came to these counters, which only grow, since the last reset."""
        before = self._at_reset.get(group, {})
        return {key: count - before.get(key, 0) for key, count in _counts(counts).items()}


def _states(health: messages.Health) -> dict[str, CheckState]:
    return {name: check.state for name, check in health.checks.items()}


def _counts(by_cause: Mapping[Any, int]) -> dict[str, int]:
    return {str(cause): count for cause, count in by_cause.items()}


def _model_entry(model: StoredModel, running: ModelRef | None) -> messages.ModelEntry:
    entry, version = model.entry, model.options.version
    is_active = running is not None and model.name == running.name
    if model.is_kept:
        is_active = is_active and running is not None and version == running.version
    family, task = (entry.family, entry.task) if entry else (None, None)
    if running is not None and is_active:
        family, task = running.family, running.task
    return messages.ModelEntry(
        id=model.id,
        name=model.name,
        version=version,
        family=family or model.options.family,
        task=task,
        path=str(model.path),
        size_bytes=model.size_bytes,
        sha256=entry.sha256 if entry else None,
        origin=model.origin,
        active=is_active,
        measured=entry.measured[0] if entry and entry.measured else None,
    )
