"""Opens everything, starts the tasks, and closes in reverse. Read this first.

Three nested lifetimes: the link to the broker outlives the model, which outlives the cameras, so that
the last frames become results and the last results, and `offline`, reach the broker.
"""

from __future__ import annotations

import asyncio
import contextlib
import fnmatch
import gc
import itertools
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AbstractAsyncContextManager, ExitStack, asynccontextmanager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TypeVar

import anyio
import msgspec
import structlog

from edge_agent import __version__, logs, messages, plugins
from edge_agent._compat import errors_unwrapped
from edge_agent.broker import embedded_broker
from edge_agent.camera import Camera
from edge_agent.cameras import Cameras
from edge_agent.check import Parts, gather
from edge_agent.checkup import Checkup
from edge_agent.commands import Dispatcher, registered
from edge_agent.commands.ledger import Ledger
from edge_agent.config import Config, InferenceOptions, MqttOptions, state_directory
from edge_agent.data import Frame, Message
from edge_agent.errors import CommandError, ConfigError, EdgeAgentError, EngineError, GpuLost, ModelError
from edge_agent.frames import FramePool
from edge_agent.governor import Governor
from edge_agent.homeassistant import Announced, Presence
from edge_agent.hotplug import DeviceWatch
from edge_agent.messages import Topics
from edge_agent.metrics import Facts
from edge_agent.model_slot import ModelSlot
from edge_agent.models.library import Library
from edge_agent.models.loading import Wanted
from edge_agent.mqtt import Inbound, Link
from edge_agent.outbox import Outbox
from edge_agent.pipeline import Reporter, infer
from edge_agent.policy import Conditions
from edge_agent.prometheus import exporter
from edge_agent.pulse import Pulse
from edge_agent.queue import FrameQueue
from edge_agent.reports import Reports
from edge_agent.sdnotify import notify
from edge_agent.sensors import detect
from edge_agent.sensors.throttling import ThrottlingSensor
from edge_agent.settings import Settings
from edge_agent.snapshots import Snapshot, Snapshots
from edge_agent.spool import DiskSpool, MemorySpool, Spool
from edge_agent.stats import LineStats
from edge_agent.threads import OwnerThread, in_thread
from edge_agent.watchdog import Watchdog, wanted_timeout_s
from edge_agent.zones import Watch

log = structlog.get_logger()

R = TypeVar("R")

_LAST_WORDS_S = 1.0
"""For an orderly end when the GPU is lost."""

_TURN_S = 0.0005
"""How long a thread may keep Python's interpreter once another waits for it. By default that is 5 ms, and a decoder
gives it up at each call into numpy and OpenCV, a dozen times a frame: a frame waited 100 ms while a model loaded."""

_LOOK_S = 0.25
"""Between two looks at whether the event loop is late; at every fourth, health is looked at."""

_SENSE_S = 5.0
"""Between two readings of the sensors, at most."""

_CAPTURE_PATIENCE = 4.0
"""A camera's thread that hangs is no reason to end all others in haste."""

_LOADER_PATIENCE = 40.0
"""Reading and hashing a large model from a slow disk is one step."""

_RELOAD_TIMEOUT_S = 60.0

_SLOWER = 3.0
"""A batch may take so many times what it is expected to, before the time counts for which it has not come back."""

_LIVE = ("cameras", "logging", "policy", "inference", "stats", "health")
"""Tables of the configuration that a running agent takes over."""


async def run(
    config: Config, stop: asyncio.Event, *, settings: Settings | None = None, reload: asyncio.Event | None = None
) -> bool:
    """Run the agent until `stop` is set, by a signal or a command; whether it is to start anew. Each time `reload` is
    set it reads its `settings` again.

    Raises `ConfigError` before anything was started, and whatever ended a task that nobody had foreseen.
    """
    settings = settings or Settings(fixed=config)
    with _turns_of(_TURN_S), _threads() as threads:
        parts = await threads.loader.call(gather, config)
        async with _kept(config, parts.device, threads.spooling) as (spool, ledger, announced):
            agent = Agent(config, parts, threads, spool, ledger, announced, settings, stop)
            with errors_unwrapped(), exporter(config.prometheus, agent.facts):
                async with _broker(config.mqtt), agent.linked(), agent.inferring():
                    await _first(agent.has_tried_its_model, stop)
                    if not stop.is_set():
                        async with agent.capturing(reload or asyncio.Event()):
                            _settle_heap()
                            agent.announce_running()
                            await stop.wait()
                            agent.announce_stopping()
    log.info("agent.stopped", restarts=agent.restarts)
    return agent.restarts


@dataclass(frozen=True)
class Threads:
    """Who does what blocks: brings models up, keeps the store, reads and writes what is small, keeps the spool, asks
    the sensors, whose drivers may hang."""

    loader: OwnerThread
    library: OwnerThread
    chores: OwnerThread
    spooling: OwnerThread
    sensing: OwnerThread


class Agent:
    """The parts of a running agent and how long each lives; the `Services` of the commands."""

    def __init__(
        self,
        config: Config,
        parts: Parts,
        threads: Threads,
        spool: Spool,
        ledger: Ledger,
        announced: Announced,
        settings: Settings,
        stop: asyncio.Event,
    ) -> None:
        self.topics = Topics(config.mqtt.prefix, parts.device)
        self.has_tried_its_model = asyncio.Event()
        self.restarts = False
        self.config = config
        self._is_running = False
        self._headline = ""
        self._parts = parts
        self._settings = settings
        self._stop = stop
        self._changing = asyncio.Lock()
        self._loader = threads.loader
        self._sensing = threads.sensing
        self._chores = threads.chores
        self._library = threads.library
        self._pool = FramePool(keep=self._most_pictures, allocate=parts.new_image)
        self._engine_trouble = parts.backend.trouble
        self._gpu_lost: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._end_within_s = config.agent.shutdown_timeout_s
        self._frames = FrameQueue(release=self._release)
        self._outbox = Outbox(
            max_results=config.mqtt.max_queued_results, spool=spool, spools_results=config.spool.results
        )
        self._stats = LineStats()
        self._tracks = parts.tracks
        self._watch = Watch(config.cameras, lost_frames=config.tracking.lost_frames)
        self._cameras = Cameras(
            frames=self._frames,
            pool=self._pool,
            queue=config.queue,
            film_frames=config.inference.max_batch * parts.depth,
            on_change=self._on_camera_change,
            on_removed=self._on_camera_removed,
        )
        self.slot = ModelSlot(
            parts.loader,
            thread=threads.loader,
            nudge=self._frames.nudge,
            choice=config.model,
            on_change=self._on_model_change,
            on_lost=self._on_gpu_lost,
            on_inferred=lambda inference_ms: self._governor.record(inference_ms),
        )
        self._governor = Governor(
            self.slot,
            loader=parts.loader,
            store=parts.store,
            options=config.policy,
            chores=threads.chores,
            conditions=_conditions(ThrottlingSensor()),
            on_change=self._on_policy_change,
        )
        self.snapshots = Snapshots(
            chores=threads.chores, jpeg_quality=config.snapshots.jpeg_quality, cameras=config.cameras
        )
        self._report = Reporter(
            topics=self.topics,
            publish=self.publish,
            stats=self._stats,
            snapshots=self.snapshots,
            tracks=self._tracks,
            watch=self._watch,
            inference=config.inference,
        )
        self._commands = Dispatcher(
            self,
            ledger=ledger,
            keeping=threads.spooling,
            signatures=parts.signatures,
            disabled=config.mqtt.disabled_commands,
        )
        self._presence = Presence(
            config.homeassistant,
            topics=self.topics,
            version=__version__,
            commands=_commands_of_home_assistant(config.mqtt),
            publish=self.publish,
            announced=announced,
        )
        self._link = Link(
            config.mqtt,
            topics=self.topics,
            outbox=self._outbox,
            spool=config.spool,
            spooling=threads.spooling,
            listens=[*self.topics.listened(config.mqtt.groups), *self._presence.listens],
            on_message=self._on_message,
            on_connect=self._on_connect,
        )
        self._pulse = Pulse()
        self._watchdog = Watchdog(
            {"engine": self._engine_silence, "capture": self._capture_silence, "loader": parts.loader.pulse.silent_s},
            patience={"capture": _CAPTURE_PATIENCE, "loader": _LOADER_PATIENCE},
            timeout_s=wanted_timeout_s(),
        )
        self._checkup = Checkup(
            config.health,
            slot=self.slot,
            cameras=self._cameras,
            link=self._link,
            outbox=self._outbox,
            stats=self._stats,
            watchdog=self._watchdog,
            spooling=threads.spooling,
            chores=threads.chores,
            policy=lambda: self._governor.status,
            engine_trouble=lambda: self._engine_trouble,
            sensed_every_s=min(_SENSE_S, config.stats.interval_s),
        )
        self._reports = Reports(
            topics=self.topics,
            publish=self.publish,
            slot=self.slot,
            cameras=self._cameras,
            frames=self._frames,
            link=self._link,
            outbox=self._outbox,
            stats=self._stats,
            policy=lambda: self._governor.status,
            overrides=lambda: self._settings.changed_keys,
            commands=lambda: self._commands.counts,
            checkup=self._checkup,
            interval_s=config.stats.interval_s,
            log_lines_dropped=logs.dropped,
        )
        parts.library.in_use = self._models_in_use
        for name, options in config.cameras.items():
            self._cameras.add(name, options, parts.sources[name])

    @asynccontextmanager
    async def linked(self) -> AsyncIterator[None]:
        """Connected to the broker, or trying; at the end all that waits is sent, then `offline`."""
        async with anyio.create_task_group() as tasks:
            finished = _start(tasks, self._link.run)
            tasks.start_soon(self._watchdog.run)
            try:
                yield
            finally:
                with anyio.CancelScope(shield=True):
                    await self._commands.close(timeout_s=self._share(0.1))
                    self._outbox.close()
                    if self._link.is_connected:
                        await _ended(finished, within_s=self._share(0.3))
                tasks.cancel_scope.cancel()

    @asynccontextmanager
    async def inferring(self) -> AsyncIterator[None]:
        """The engine's thread, and the configured model on its way to it; at the end what waits is still
        inferred, as far as there is time. Raises `EngineError` if the engine does not come back."""
        async with anyio.create_task_group() as tasks:
            finished = _start(tasks, self._infer)
            tasks.start_soon(self._activate_configured)
            tasks.start_soon(self._watch_gpu)
            tasks.start_soon(self._governor.run)
            tasks.start_soon(self._sense_regularly)
            tasks.start_soon(self._look_regularly)
            try:
                yield
            finally:
                if self._parts.engines is not None:
                    self._parts.engines.cancel()
                self._frames.close()
                with anyio.CancelScope(shield=True):
                    came_back = await _ended(finished, within_s=self._share(0.2))
                    if not came_back:  # busy with what waits, or stuck: the batch it is in will tell
                        self._frames.discard()
                        came_back = await _ended(finished, within_s=self._share(0.1))
                self._frames.discard()
                self._reports.publish_last_stats()
                tasks.cancel_scope.cancel()
        if not came_back:
            raise EngineError("the engine did not come back from its last batch; left behind")

    @asynccontextmanager
    async def capturing(self, reload: asyncio.Event) -> AsyncIterator[None]:
        """Every enabled camera in its thread; at the end they stop, and a stuck one is left behind."""
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self._attend, reload)
            tasks.start_soon(self._report_regularly)
            tasks.start_soon(self._look_at_models_regularly)
            if self.config.snapshots.on_start:
                for name, options in self.config.cameras.items():
                    if options.enabled:
                        tasks.start_soon(self._write_first_picture, name)
            with contextlib.closing(await self._chores.call(DeviceWatch)) as devices:
                async with self._cameras.running(devices, timeout_s=lambda: self._share(0.3)):
                    try:
                        yield
                    finally:
                        self._frames.close()
            tasks.cancel_scope.cancel()

    def announce_running(self) -> None:
        self._reports.enter("running")
        mqtt, backend = self.config.mqtt, self._parts.backend
        log.info("agent.running", device=self.topics.device, backend=backend.name, because=backend.because)
        log.info("agent.results", topic=self.topics.camera("+", "results"), broker=f"{mqtt.host}:{mqtt.port}")
        watch = f"mosquitto_sub -h {mqtt.host} -p {mqtt.port} -v -t '{self.topics.root}/#'"
        log.info("agent.look", live_table=f"{Path(sys.executable).with_name('edgectl')} watch", raw_messages=watch)
        self._is_running = True
        self._tell_ready()

    def announce_stopping(self) -> None:
        self._is_running = False
        if not self.restarts:  # the process goes on then, with another program in it
            notify("STOPPING=1", "STATUS=stopping")
        log.info("agent.stopping")
        self._reports.enter("stopping")

    def _tell_ready(self) -> None:
        """Tell systemd once the agent runs and a model is warm; until then it only starts."""
        if self._is_running and self.slot.active is not None and not self._watchdog.is_ready:
            self._watchdog.ready(f"STATUS={self._reports.headline()}")

    # What commands may use

    @property
    def camera_names(self) -> list[str]:
        return list(self._cameras)

    def publish(self, message: Message) -> None:
        self._outbox.put(message)

    def status(self) -> messages.Status:
        return self._reports.status()

    async def models(self) -> messages.Models:
        await self._look_at_models()
        return self._reports.models()

    def stats(self) -> messages.Stats:
        return self._reports.statistics()

    def reset_stats(self) -> None:
        self._reports.reset()

    def facts(self) -> Facts | None:
        return self._reports.facts()

    def restart(self) -> None:
        if not self._stop.is_set():
            self.restarts = True
            self._stop.set()

    async def change(self, work: Callable[[Settings], Config]) -> messages.Changed:
        async with self._changing:
            before, self.config = self.config, await self._chores.call(work, self._settings)
            try:
                changed = await self._take_over(before, self.config)
            finally:
                self._reports.publish_state()
        await self._load_anew()
        return changed

    async def look(self, work: Callable[[Library], R]) -> R:
        return await self._chores.call(work, self._parts.library)

    async def in_library(self, work: Callable[[Library], R]) -> R:
        try:
            return await self._library.call(work, self._parts.library)
        finally:
            await self._look_at_models()

    # What may change

    async def _attend(self, reload: asyncio.Event) -> None:
        """Read the settings again each time that is asked for."""
        while True:
            await reload.wait()
            reload.clear()
            if self._watchdog.is_ready:
                notify("RELOADING=1", f"MONOTONIC_USEC={time.monotonic_ns() // 1000}")
            try:
                with anyio.fail_after(_RELOAD_TIMEOUT_S):
                    log.info("agent.reloaded", **msgspec.structs.asdict(await self.change(Settings.reread)))
            except EdgeAgentError as error:
                log.error("agent.not_reloaded", reason=str(error))
            except TimeoutError:
                log.error("agent.not_reloaded", reason=f"it took more than {_RELOAD_TIMEOUT_S:g} s")
            finally:
                if self._watchdog.is_ready and self._is_running:
                    self._watchdog.ready(f"STATUS={self._reports.headline()}")

    async def _take_over(self, before: Config, now: Config) -> messages.Changed:
        """Make what runs as the configuration has it now, as far as a running agent can change."""
        changed = [name for name in Config.__struct_fields__ if getattr(before, name) != getattr(now, name)]
        cameras = await self._take_cameras(before, now)
        if before.logging != now.logging:
            logs.configure(level=now.logging.level, format=now.logging.format)
        self._parts.loader.change(now.inference, now.policy)
        self._report.inference = now.inference
        if before.policy != now.policy:
            self._governor.change(now.policy)
        self._reports.interval_s = now.stats.interval_s
        self._checkup.options, self._checkup.sensed_every_s = now.health, min(_SENSE_S, now.stats.interval_s)
        if before.homeassistant.enabled and not now.homeassistant.enabled:
            self._presence.leave()
        fixed = [name for name in changed if name not in _LIVE]
        if _but_for_tuning(before.inference) != _but_for_tuning(now.inference):
            fixed.append("inference")
        return messages.Changed(changed=changed, cameras=cameras, needs_restart=fixed)

    async def _load_anew(self) -> None:
        """The model that runs, beside itself, where it was loaded with other thresholds. Raises `ModelError`."""
        active, running = self.slot.active, self.slot.running
        if active is None or running is None:
            return
        if _thresholds(active.inference) != _thresholds(self.config.inference):
            await self.slot.activate(running, remember=False)

    async def _take_cameras(self, before: Config, now: Config) -> list[str]:
        """Cameras that are gone go, those that are new come, others connect again; the names of all of them."""
        touched = [
            name
            for name in dict.fromkeys([*before.cameras, *now.cameras])
            if before.cameras.get(name) != now.cameras.get(name)
        ]
        for name in touched:
            options = now.cameras.get(name)
            if options is None:
                await self._cameras.remove(name)
                continue
            source = plugins.load("sources", options.source)(options)
            self._watch.follow(name, options)
            self.snapshots.follow(name, options)
            if name in self._cameras:
                self._cameras.change(name, options, source)
            else:
                self._cameras.add(name, options, source)
        return touched

    # The line

    def _most_pictures(self) -> int:
        """How many there are at once at most: those that wait, and those that cameras read and the engine has."""
        batches = self._parts.depth + 1  # with the one that is being reported
        return self._frames.capacity + len(self._cameras) + batches * self.config.inference.max_batch

    def _release(self, frame: Frame) -> None:
        self._pool.give(frame.image)

    async def _activate_configured(self) -> None:
        """What passed its probation last, else what did before that, else the model of the configuration."""
        if self._engine_trouble:
            log.warning("engine.fallback", backend=self._parts.backend.name, reason=self._engine_trouble)
        configured = self.config.model.active
        for name in await self._loader.call(self._parts.store.preferred, configured):
            await self._start_with(name)
            if self.slot.active is not None:
                break
        else:
            log.error("model.none", hint="no frame is inferred until a model is activated, by command or in the config")
        self.has_tried_its_model.set()
        await self._look_at_models()

    async def _start_with(self, name: str) -> None:
        """Activate a model. The fallback runs it while an engine for it is built, and where none can be; what kept the
        chosen backend from it is then told in health."""
        fallback = self.config.inference.fallback
        has_fallback = fallback not in ("", self._parts.backend.name)
        if await self._loader.call(self._parts.loader.has_to_build, Wanted(name)):
            if has_fallback:
                self._engine_trouble = "an engine is being built; until then the CPU runs the model"
                await self._try_to_activate(Wanted(name, fallback))
            self.has_tried_its_model.set()  # a build takes minutes; nobody waits for it
        reason = await self._try_to_activate(Wanted(name))
        if reason is not None and has_fallback:
            log.warning("engine.fallback", backend=fallback, reason=reason)
            self._engine_trouble = reason
            if self.slot.active is None:
                await self._try_to_activate(Wanted(name, fallback))
            self._reports.publish_state()

    async def _try_to_activate(self, wanted: Wanted) -> str | None:
        """Why that did not go, if so. The model of the start needs not be remembered."""
        try:
            await self.slot.activate(replace(wanted, purpose="start"), remember=False)
        except (ModelError, ConfigError, GpuLost) as error:  # a backend may lack what it needs installed
            return str(error)
        return None

    async def _watch_gpu(self) -> None:
        """Ends all of it when the GPU is lost, whoever noticed: nothing here can use it again, a new process can."""
        try:
            await self._gpu_lost
        except GpuLost:
            self._end_within_s = _LAST_WORDS_S
            raise

    async def _infer(self) -> None:
        window_s = self.config.inference.batch_window_ms / 1e3
        line = partial(
            infer,
            self._frames,
            self.slot,
            self._report,
            release=self._release,
            pulse=self._pulse,
            window_s=window_s,
        )
        try:
            await in_thread("engine", line)
        except GpuLost as error:
            self._on_gpu_lost(error)

    # What is told

    def _on_connect(self) -> None:
        self._presence.connected()
        self._reports.publish_state()

    def _on_message(self, inbound: Inbound) -> None:
        if not self._presence.hear(inbound.topic, inbound.payload, is_retained=inbound.retain):
            self._commands.handle(inbound)

    def _models_in_use(self) -> list[str]:
        """Those that may not be removed, besides what the registry itself knows of."""
        active = self.slot.active
        runs = [f"{active.ref.name}@{active.ref.version}"] if active else []
        return [self.config.model.active, *self.config.policy.ladder, *runs]

    def _tell_home_assistant(self) -> None:
        self._presence.tell(list(self._cameras), [model.id for model in self._reports.known])

    def _on_gpu_lost(self, error: GpuLost) -> None:
        if not self._gpu_lost.done():
            self._gpu_lost.set_exception(error)

    def _on_model_change(self) -> None:
        active, backend = self.slot.active, self._parts.backend
        if active is not None and active.backend == backend.name and not backend.trouble:
            self._engine_trouble = None
        self._reports.publish_models()
        self._reports.publish_state()
        self._tell_ready()

    def _on_policy_change(self) -> None:
        self._reports.publish_state()

    async def _look_at_models(self) -> None:
        """What the store holds now, whoever changed it."""
        try:
            known = await self._chores.call(list, self._parts.store)
        except ModelError as error:
            log.error("registry.unreadable", reason=str(error))
            return
        self._presence.tell(list(self._cameras), [model.id for model in known])
        self._reports.know(known)

    def _on_camera_change(self, camera: Camera) -> None:
        self._tell_home_assistant()
        self._reports.publish_camera(camera)

    def _on_camera_removed(self, name: str) -> None:
        self._tell_home_assistant()
        self._reports.forget_camera(name)
        self._link.sent.pop(self.topics.camera(name, "results"), None)
        self.snapshots.forget(name)
        self._watch.forget(name)
        if self._tracks is not None:
            self._tracks.forget(name)

    async def _report_regularly(self) -> None:
        while True:
            await anyio.sleep(self.config.stats.interval_s)
            self._reports.publish_stats()

    async def _look_at_models_regularly(self) -> None:
        while True:
            await anyio.sleep(self.config.stats.interval_s)
            await self._look_at_models()

    async def _sense_regularly(self) -> None:
        """What the machine says of itself; a driver that hangs holds up nothing but this."""
        sensors = await self._sensing.call(lambda: detect(state_directory=state_directory()))
        try:
            while True:
                self._checkup.sense(await self._sensing.call(sensors.read))
                await anyio.sleep(self._checkup.sensed_every_s)
        finally:
            if not self._sensing.busy_s:
                with anyio.CancelScope(shield=True):
                    await self._sensing.call(sensors.close)

    async def _look_regularly(self) -> None:
        """At how late the event loop is, at health, and at what systemd is told."""
        for turn in itertools.count():
            due = time.monotonic() + _LOOK_S
            await anyio.sleep(_LOOK_S)
            self._reports.time_loop(max(0.0, time.monotonic() - due))
            if turn % 4 == 0:
                self._reports.look()
                self._tell_headline()

    def _tell_headline(self) -> None:
        headline = self._reports.headline()
        if headline != self._headline:
            self._headline = headline
            notify(f"STATUS={headline}")

    def _engine_silence(self) -> float:
        model = self.slot.active
        has_work = model is not None and any(self._frames.waiting(name) for name in self._cameras)
        batch_ms = self.slot.expected_ms * model.max_batch * model.depth if model else 0.0
        return max(0.0, self._pulse.silent_s(has_work=has_work) - _SLOWER * batch_ms / 1e3)

    def _capture_silence(self) -> float:
        return max((camera.stuck_s for camera in self._cameras.values()), default=0.0)

    async def _write_first_picture(self, camera: str) -> None:
        """One annotated picture at the start, as proof of what the model sees; best with something in it."""
        shot: Snapshot | None = None
        for _ in range(20):
            try:
                shot = await self.snapshots.take(camera, timeout_s=60.0)
            except CommandError:
                log.debug("snapshot.none", camera=camera)
                continue
            if len(shot.result.prediction):
                break
        if shot is not None:
            path = Path(self.config.snapshots.directory) / f"{camera}.jpg"
            await self._chores.call(_write, path, shot, camera)

    def _share(self, share: float) -> float:
        """A part of the time that a shutdown may take."""
        return share * self._end_within_s


@contextmanager
def _threads() -> Iterator[Threads]:
    with ExitStack() as stack:
        yield Threads(
            *(stack.enter_context(OwnerThread(name)) for name in ("loader", "library", "chores", "spool", "sensors"))
        )


@asynccontextmanager
async def _kept(config: Config, device: str, thread: OwnerThread) -> AsyncIterator[tuple[Spool, Ledger, Announced]]:
    """What keeps messages while the broker is away, what knows which commands were done, and what where Home Assistant
    was told of this device; at the end all of it is on the disk."""
    state = state_directory()
    spool: Spool = MemorySpool()
    if config.spool.enabled:
        spool = await thread.call(DiskSpool, state / f"spool-{device}.db", config.spool)
    ledger = await thread.call(Ledger, state / f"commands-{device}.db", device)
    topics = Topics(config.mqtt.prefix, device)
    announced = await thread.call(Announced, state / f"homeassistant-{device}.txt", topics, config.homeassistant)
    try:
        yield spool, ledger, announced
    finally:
        with anyio.CancelScope(shield=True):
            await thread.call(announced.close)
            await thread.call(spool.close)
            await thread.call(ledger.close)


def _thresholds(options: InferenceOptions) -> tuple[object, ...]:
    """What a model has to be loaded anew for."""
    return options.score_threshold, options.iou_threshold, options.max_detections


def _but_for_tuning(options: InferenceOptions) -> InferenceOptions:
    """What takes a restart: all that is not the same in every set of options here."""
    plain = InferenceOptions()
    tuned = ("score_threshold", "iou_threshold", "max_detections", "classes", "max_results_per_s")
    return msgspec.structs.replace(options, **{name: getattr(plain, name) for name in tuned})


def _commands_of_home_assistant(options: MqttOptions) -> set[str]:
    """It cannot sign, and a command that is switched off has no button."""
    if options.command_public_key_file:
        return set()
    return {
        name
        for name in registered()
        if not any(fnmatch.fnmatchcase(name, pattern) for pattern in options.disabled_commands)
    }


def _broker(options: MqttOptions) -> AbstractAsyncContextManager[None]:
    return embedded_broker(options.host, options.port) if options.embedded else nullcontext()


def _conditions(sensor: ThrottlingSensor) -> Callable[[], Conditions]:
    """What the latency ladder asks of the sensors."""

    def look() -> Conditions:
        seen = sensor.read()
        return Conditions(seen.throttling, seen.power_mode)

    return look


@contextmanager
def _turns_of(seconds: float) -> Iterator[None]:
    before = sys.getswitchinterval()
    sys.setswitchinterval(seconds)
    try:
        yield
    finally:
        sys.setswitchinterval(before)


def _settle_heap() -> None:
    """Take what was built at the start out of the garbage collector's sight: it stays, and walking it all again
    at every full collection would hold up the event loop for tens of milliseconds."""
    gc.collect()
    gc.freeze()


def _write(path: Path, shot: Snapshot, camera: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(shot.jpeg)
    except OSError as error:
        log.warning("snapshot.not_written", path=str(path), reason=error.strerror)
        return
    log.info("snapshot.written", camera=camera, path=str(path.resolve()), detections=len(shot.result.prediction))


def _start(tasks: anyio.abc.TaskGroup, work: Callable[[], Awaitable[None]]) -> asyncio.Event:
    """Start a task; the event is set when it has ended, however it did."""
    finished = asyncio.Event()

    async def run() -> None:
        try:
            await work()
        finally:
            finished.set()

    tasks.start_soon(run)
    return finished


async def _ended(finished: asyncio.Event, within_s: float) -> bool:
    """Whether a task that was started with `_start` ends in time."""
    with anyio.move_on_after(within_s):
        await finished.wait()
    return finished.is_set()


async def _first(*events: asyncio.Event) -> None:
    """Wait for one of the events."""
    async with anyio.create_task_group() as tasks:

        async def wait(event: asyncio.Event) -> None:
            await event.wait()
            tasks.cancel_scope.cancel()

        for event in events:
            tasks.start_soon(wait, event)
