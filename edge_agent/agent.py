"""Opens everything, starts the tasks, and closes in reverse. Read this first.

Three nested lifetimes: the link to the broker outlives the model, which outlives the cameras, so that
the last frames become results and the last results, and `offline`, reach the broker.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager, nullcontext
from functools import partial
from pathlib import Path

import anyio
import structlog

from edge_agent import messages
from edge_agent._compat import errors_unwrapped
from edge_agent.broker import embedded_broker
from edge_agent.camera import Camera
from edge_agent.cameras import Cameras
from edge_agent.check import Parts, gather
from edge_agent.commands import Dispatcher
from edge_agent.config import Config, MqttOptions
from edge_agent.data import Frame, Message
from edge_agent.errors import CommandError, ConfigError, EngineError, GpuLost, GpuUnavailable, ModelError
from edge_agent.frames import FramePool
from edge_agent.hotplug import DeviceWatch
from edge_agent.messages import Topics
from edge_agent.model_slot import ModelSlot
from edge_agent.models.engines import Progress, is_built
from edge_agent.models.loaded import LoadedModel, open_model
from edge_agent.mqtt import Link
from edge_agent.pipeline import Reporter, infer
from edge_agent.queue import FrameQueue, Outbox
from edge_agent.reports import Reports
from edge_agent.sdnotify import notify
from edge_agent.sensors.host import HostSensor
from edge_agent.snapshots import Snapshot, Snapshots
from edge_agent.stats import LineStats
from edge_agent.threads import OwnerThread, in_thread
from edge_agent.zones import Watch

log = structlog.get_logger()

_LAST_WORDS_S = 1.0
"""For an orderly end when the GPU is lost."""


async def run(config: Config, stop: asyncio.Event) -> None:
    """Run the agent until `stop` is set. Raises `ConfigError` before anything was started, and whatever
    ended a task that nobody had foreseen."""
    with OwnerThread("loader") as loader, OwnerThread("chores") as chores:
        parts = await loader.call(gather, config)
        agent = Agent(config, parts, loader=loader, chores=chores)
        with errors_unwrapped():
            async with _broker(config.mqtt), agent.linked(), agent.inferring():
                await _first(agent.has_tried_its_model, stop)
                if not stop.is_set():
                    async with agent.capturing():
                        _settle_heap()
                        agent.announce_running()
                        await stop.wait()
                        agent.announce_stopping()
    log.info("agent.stopped")


class Agent:
    """The parts of a running agent and how long each lives; the `Services` of the commands."""

    def __init__(self, config: Config, parts: Parts, *, loader: OwnerThread, chores: OwnerThread) -> None:
        self.topics = Topics(config.mqtt.prefix, parts.device)
        self.has_tried_its_model = asyncio.Event()
        self._config = config
        self._parts = parts
        self._loader = loader
        self._chores = chores
        self._pool = FramePool(allocate=parts.new_image)
        self._engine_trouble = parts.backend.trouble
        self._gpu_lost: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._end_within_s = config.agent.shutdown_timeout_s
        self._frames = FrameQueue(release=self._release)
        self._outbox = Outbox(max_results=config.mqtt.max_queued_results)
        self._stats = LineStats()
        self._tracks = parts.tracks
        self._watch = Watch(config.cameras, lost_frames=config.tracking.lost_frames)
        self._cameras = Cameras(
            frames=self._frames,
            pool=self._pool,
            queue=config.queue,
            on_change=self._on_camera_change,
            on_removed=self._on_camera_removed,
        )
        self.slot = ModelSlot(
            self._load,
            loader=loader,
            nudge=self._frames.nudge,
            on_change=self._on_model_change,
            on_lost=self._on_gpu_lost,
        )
        self.snapshots = Snapshots(chores=chores, jpeg_quality=config.snapshots.jpeg_quality, cameras=config.cameras)
        self._commands = Dispatcher(self)
        self._link = Link(
            config.mqtt,
            topics=self.topics,
            outbox=self._outbox,
            on_command=self._commands.handle,
            on_connect=self._on_connect,
        )
        self._reports = Reports(
            topics=self.topics,
            publish=self.publish,
            slot=self.slot,
            store=parts.store,
            cameras=self._cameras,
            frames=self._frames,
            link=self._link,
            outbox=self._outbox,
            stats=self._stats,
            engine_trouble=lambda: self._engine_trouble,
            interval_s=config.stats.interval_s,
        )
        for name, options in config.cameras.items():
            self._cameras.add(name, options, parts.sources[name])

    @asynccontextmanager
    async def linked(self) -> AsyncIterator[None]:
        """Connected to the broker, or trying; at the end all that waits is sent, then `offline`."""
        async with anyio.create_task_group() as tasks:
            finished = _start(tasks, self._link.run)
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
                tasks.cancel_scope.cancel()
        if not came_back:
            raise EngineError("the engine did not come back from its last batch; left behind")

    @asynccontextmanager
    async def capturing(self) -> AsyncIterator[None]:
        """Every enabled camera in its thread; at the end they stop, and a stuck one is left behind."""
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self._report_regularly)
            if self._config.snapshots.on_start:
                for name, options in self._config.cameras.items():
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
        mqtt, model = self._config.mqtt, self.slot.active
        backend = self._parts.backend
        log.info("agent.running", device=self.topics.device, backend=backend.name, because=backend.because)
        log.info("agent.results", topic=self.topics.camera("+", "results"), broker=f"{mqtt.host}:{mqtt.port}")
        watch = f"mosquitto_sub -h {mqtt.host} -p {mqtt.port} -v -t '{self.topics.root}/#'"
        log.info("agent.look", live_table=f"{Path(sys.executable).with_name('edgectl')} watch", raw_messages=watch)
        running = model.ref.name if model else "without a model"
        notify("READY=1", f"STATUS=running {running}, {len(self._cameras)} camera(s)")

    def announce_stopping(self) -> None:
        notify("STOPPING=1", "STATUS=stopping")
        log.info("agent.stopping")
        self._reports.enter("stopping")

    # What commands may use

    @property
    def camera_names(self) -> list[str]:
        return list(self._cameras)

    def publish(self, message: Message) -> None:
        self._outbox.put(message)

    def status(self) -> messages.Status:
        return self._reports.status()

    def models(self) -> messages.Models:
        return self._reports.models()

    # The line

    def _release(self, frame: Frame) -> None:
        self._pool.give(frame.image)

    def _load(self, name: str, backend: str | None, progress: Progress) -> LoadedModel:
        config, parts = self._config, self._parts
        return open_model(
            parts.store.get(name),
            backend=backend or parts.backend.name,
            backends=config.backends,
            inference=config.inference,
            tracked_from=config.tracking.low if parts.tracks else None,
            engines=parts.engines,
            progress=progress,
        )

    async def _activate_configured(self) -> None:
        """The model of the configuration. The fallback runs it while an engine for it is built, and where none can
        be; what kept the chosen backend from it is then told in health."""
        name, fallback = self._config.model.active, self._config.inference.fallback
        has_fallback = fallback not in ("", self._parts.backend.name)
        if self._engine_trouble:
            log.warning("engine.fallback", backend=self._parts.backend.name, reason=self._engine_trouble)
        if await self._loader.call(self._has_to_build, name):
            if has_fallback:
                self._engine_trouble = "an engine is being built; until then the CPU runs the model"
                await self._try_to_activate(name, fallback)
            self.has_tried_its_model.set()  # a build takes minutes; nobody waits for it
        reason = await self._try_to_activate(name)
        if reason is not None and has_fallback:
            log.warning("engine.fallback", backend=fallback, reason=reason)
            self._engine_trouble = reason
            if self.slot.active is None:
                await self._try_to_activate(name, fallback)
            self._reports.publish_state()
        if self.slot.active is None:
            log.error("model.none", hint="no frame is inferred until a model is activated, by command or in the config")
        self.has_tried_its_model.set()

    async def _try_to_activate(self, name: str, backend: str | None = None) -> str | None:
        """Why that did not go, if so."""
        try:
            await self.slot.activate(name, backend=backend)
        except (ModelError, ConfigError, GpuLost) as error:  # a backend may lack what it needs installed
            return str(error)
        return None

    def _has_to_build(self, name: str) -> bool:
        try:
            stored, engines = self._parts.store.get(name), self._parts.engines
            return engines is not None and is_built(stored) and engines.find(stored, self._config.inference) is None
        except (ModelError, GpuUnavailable):  # will be told when it is opened
            return False

    async def _watch_gpu(self) -> None:
        """Ends all of it when the GPU is lost, whoever noticed: nothing here can use it again, a new process can."""
        try:
            await self._gpu_lost
        except GpuLost:
            self._end_within_s = _LAST_WORDS_S
            raise

    async def _infer(self) -> None:
        report = Reporter(
            topics=self.topics,
            publish=self.publish,
            stats=self._stats,
            snapshots=self.snapshots,
            tracks=self._tracks,
            watch=self._watch,
        )
        window_s = self._config.inference.batch_window_ms / 1e3
        line = partial(infer, self._frames, self.slot, report, release=self._release, window_s=window_s)
        try:
            await in_thread("engine", line)
        except GpuLost as error:
            self._on_gpu_lost(error)

    # What is told

    def _on_connect(self) -> None:
        self._reports.publish_state()

    def _on_gpu_lost(self, error: GpuLost) -> None:
        if not self._gpu_lost.done():
            self._gpu_lost.set_exception(error)

    def _on_model_change(self) -> None:
        active, backend = self.slot.active, self._parts.backend
        if active is not None and active.backend == backend.name and not backend.trouble:
            self._engine_trouble = None
        self._reports.publish_models()

    def _on_camera_change(self, camera: Camera) -> None:
        self._reports.publish_camera(camera)

    def _on_camera_removed(self, name: str) -> None:
        self._reports.forget_camera(name)
        self._watch.forget(name)
        if self._tracks is not None:
            self._tracks.forget(name)

    async def _report_regularly(self) -> None:
        host = await self._chores.call(HostSensor)
        while True:
            await anyio.sleep(self._config.stats.interval_s)
            self._reports.publish_stats(await self._chores.call(host.read))

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
            path = Path(self._config.snapshots.directory) / f"{camera}.jpg"
            await self._chores.call(_write, path, shot, camera)

    def _share(self, share: float) -> float:
        """A part of the time that a shutdown may take."""
        return share * self._end_within_s


def _broker(options: MqttOptions) -> AbstractAsyncContextManager[None]:
    return embedded_broker(options.host, options.port) if options.embedded else nullcontext()


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
