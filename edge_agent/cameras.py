"""All cameras by name, each with a task of its own; they come, go and change while the others run."""

from __future__ import annotations

import asyncio
import contextlib
import fnmatch
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager
from functools import partial

import anyio
import structlog

from edge_agent import sources
from edge_agent.camera import Camera
from edge_agent.config import CameraOptions, QueueOptions
from edge_agent.frames import FramePool
from edge_agent.hotplug import DeviceWatch
from edge_agent.queue import FrameQueue, QueueLimits
from edge_agent.sources import Source
from edge_agent.threads import spawn

log = structlog.get_logger()


class Cameras(Mapping[str, Camera]):
    """Event loop only. `on_change` hears of every new state of a camera, `on_removed` of one that is gone.
    Of a film, which waits, no more than `film_frames` are read ahead: they would only cost memory."""

    def __init__(
        self,
        *,
        frames: FrameQueue,
        pool: FramePool,
        queue: QueueOptions,
        film_frames: int,
        on_change: Callable[[Camera], None] = lambda camera: None,
        on_removed: Callable[[str], None] = lambda name: None,
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._frames = frames
        self._pool = pool
        self._queue = queue
        self._film_frames = film_frames
        self._on_change = on_change
        self._on_removed = on_removed
        self._cameras: dict[str, Camera] = {}
        self._news: dict[str, asyncio.Event] = {}
        self._ended: dict[str, asyncio.Event] = {}
        self._hotplug: dict[str, str] = {}
        self._tasks: anyio.abc.TaskGroup | None = None

    def __getitem__(self, name: str) -> Camera:
        return self._cameras[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._cameras)

    def __len__(self) -> int:
        return len(self._cameras)

    def add(self, name: str, options: CameraOptions, like: Source) -> Camera:
        """A new camera, connected at once if the cameras run; `like` is a source made of the same options.

        Raises `ValueError` if there is one of this name.
        """
        if name in self._cameras:
            raise ValueError(f"there is a camera {name!r} already")
        self._frames.add_camera(name, self._limits(options, is_live=like.is_live))
        news = self._news[name] = asyncio.Event()
        self._hotplug[name] = getattr(like, "hotplug", "")
        camera = self._cameras[name] = Camera(
            name,
            options,
            partial(sources.make, options),
            is_live=like.is_live,
            frames=self._frames,
            pool=self._pool,
            spawn=spawn,
            wake=partial(self._wake, news),
            on_change=self._on_change,
        )
        self._on_change(camera)
        if self._tasks is not None:
            self._start(camera, self._tasks)
        return camera

    def change(self, name: str, options: CameraOptions, like: Source) -> None:
        """Give a camera other options; it connects again, its counters go on. Raises `KeyError`."""
        camera = self._cameras[name]
        self._frames.add_camera(name, self._limits(options, is_live=like.is_live))
        self._hotplug[name] = getattr(like, "hotplug", "")
        camera.change(options, partial(sources.make, options), is_live=like.is_live)

    async def remove(self, name: str) -> None:
        """Let go of a camera for good; what waits of it is dropped. Raises `KeyError`."""
        self._cameras[name].close()
        try:
            if ended := self._ended.get(name):
                await ended.wait()
        finally:  # the name is free only once nothing of the camera is left
            for kept in (self._cameras, self._hotplug, self._news, self._ended):
                kept.pop(name, None)
            self._frames.remove_camera(name)
            self._on_removed(name)

    def close(self) -> None:
        """Ask all cameras to end."""
        for camera in self._cameras.values():
            camera.close()

    @asynccontextmanager
    async def running(self, devices: DeviceWatch, *, timeout_s: Callable[[], float]) -> AsyncIterator[None]:
        """Every camera in its thread; at the end they stop, and what is stuck is left behind after `timeout_s()`."""
        with devices.telling(self._on_device):
            async with anyio.create_task_group() as tasks:
                self._tasks = tasks
                for camera in self._cameras.values():
                    self._start(camera, tasks)
                try:
                    yield
                finally:
                    self._tasks = None
                    self.close()
                    with anyio.CancelScope(shield=True), anyio.move_on_after(timeout_s()):
                        for ended in list(self._ended.values()):
                            await ended.wait()
                    late = [name for name, ended in self._ended.items() if not ended.is_set()]
                    hung = [name for name, camera in self._cameras.items() if camera.hung]
                    if late or hung:
                        log.warning("camera.left_behind", cameras=sorted({*late, *hung}))
                    tasks.cancel_scope.cancel()

    def _start(self, camera: Camera, tasks: anyio.abc.TaskGroup) -> None:
        self._ended[camera.name] = asyncio.Event()
        tasks.start_soon(self._attend, camera, self._news[camera.name], self._ended[camera.name])

    async def _attend(self, camera: Camera, news: asyncio.Event, ended: asyncio.Event) -> None:
        try:
            news.clear()
            while (wait_s := camera.step()) is not None:
                with anyio.move_on_after(wait_s):
                    await news.wait()
                news.clear()
        finally:
            ended.set()

    def _wake(self, news: asyncio.Event) -> None:
        with contextlib.suppress(RuntimeError):  # the loop has ended and left a camera's thread behind
            self._loop.call_soon_threadsafe(news.set)

    def _on_device(self, device: str) -> None:
        for name, pattern in self._hotplug.items():
            if pattern and fnmatch.fnmatch(device, pattern):
                self._cameras[name].resume()

    def _limits(self, camera: CameraOptions, *, is_live: bool) -> QueueLimits:
        queue = self._queue
        return QueueLimits(
            max_frames=camera.max_frames or (queue.max_frames if is_live else min(queue.max_frames, self._film_frames)),
            max_bytes=int(queue.max_mb * 1e6),
            drop=camera.drop or (queue.drop if is_live else "block"),
            max_staleness_ms=queue.max_staleness_ms if camera.max_staleness_ms is None else camera.max_staleness_ms,
        )
