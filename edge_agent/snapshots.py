"""Pictures of what a camera and the model see, made when somebody asks and at no cost until then."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

from edge_agent.config import CameraOptions
from edge_agent.data import Image, Result
from edge_agent.errors import CommandError
from edge_agent.threads import OwnerThread

_LEAST_QUALITY = 45


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A JPEG of one frame, and the result that belongs to it."""

    jpeg: bytes
    width: int
    height: int
    result: Result


class Snapshots:
    """Waits for a camera's next result, copies its picture and draws on it in the `chores` thread.

    Results are offered by the engine's thread; all else happens on the event loop, where it is created.
    """

    def __init__(
        self, *, chores: OwnerThread, jpeg_quality: int = 85, cameras: Mapping[str, CameraOptions] | None = None
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._chores = chores
        self._quality = jpeg_quality
        self._cameras = dict(cameras or {})
        self._wanted: dict[str, list[asyncio.Future[tuple[Result, Image]]]] = {}

    def follow(self, camera: str, options: CameraOptions) -> None:
        """A camera is there, or has other zones and lines to draw."""
        self._cameras[camera] = options

    def forget(self, camera: str) -> None:
        """A camera is gone."""
        self._cameras.pop(camera, None)

    def offer(self, result: Result) -> None:
        """Show a result whose frame's buffer is still there; it is copied only if somebody waits."""
        if self._wanted.get(result.frame.camera):
            self._loop.call_soon_threadsafe(self._deliver, result, result.frame.image.copy())

    async def take(
        self, camera: str, *, annotated: bool = True, timeout_s: float = 5.0, max_bytes: int | None = None
    ) -> Snapshot:
        """The next picture of a camera, made as small as `max_bytes` wants. Raises `CommandError` (`timeout`) if no
        result comes in time."""
        waiter: asyncio.Future[tuple[Result, Image]] = asyncio.get_running_loop().create_future()
        self._wanted.setdefault(camera, []).append(waiter)
        try:
            result, image = await asyncio.wait_for(waiter, timeout_s)
        except asyncio.TimeoutError:
            raise CommandError(
                f"no frame of {camera} was inferred within {timeout_s:g} s; see its status topic", code="timeout"
            ) from None
        finally:
            if (waiting := self._wanted.get(camera)) and waiter in waiting:
                waiting.remove(waiter)
        options = self._cameras.get(camera) if annotated else None
        shown = await self._chores.call(_shown, result, image, annotated, options)
        jpeg, (width, height) = await self._chores.call(_jpeg, shown, self._quality, max_bytes)
        return Snapshot(jpeg, width, height, result)

    def _deliver(self, result: Result, image: Image) -> None:
        for waiter in self._wanted.pop(result.frame.camera, ()):
            if not waiter.done():
                waiter.set_result((result, image))


def _shown(result: Result, image: Image, annotated: bool, camera: CameraOptions | None) -> Image:
    from edge_agent import drawing

    shown = dataclasses.replace(result, frame=dataclasses.replace(result.frame, image=image))
    return drawing.annotated(shown, camera) if annotated else image


def _jpeg(image: Image, quality: int, max_bytes: int | None) -> tuple[bytes, tuple[int, int]]:
    """A JPEG, and its width and height: of less quality first, then of less size, until it is small enough."""
    from edge_agent import imaging

    while True:
        jpeg = imaging.encode_jpeg(image, quality=quality)
        height, width = image.shape[:2]
        if max_bytes is None or len(jpeg) <= max_bytes or min(width, height) < 32:
            return jpeg, (width, height)
        if quality > _LEAST_QUALITY:
            quality = max(_LEAST_QUALITY, quality - 20)
        else:
            image = imaging.halved(image)
