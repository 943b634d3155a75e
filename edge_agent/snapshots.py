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


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A JPEG of one frame, and the result that belongs to it."""

    jpeg: bytes
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
        self._cameras = cameras or {}
        self._wanted: dict[str, list[asyncio.Future[tuple[Result, Image]]]] = {}

    def offer(self, result: Result) -> None:
        """Show a result whose frame's buffer is still there; it is copied only if somebody waits."""
        if self._wanted.get(result.frame.camera):
            self._loop.call_soon_threadsafe(self._deliver, result, result.frame.image.copy())

    async def take(self, camera: str, *, annotated: bool = True, timeout_s: float = 5.0) -> Snapshot:
        """The next picture of a camera. Raises `CommandError` (`timeout`) if no result comes in time."""
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
        return Snapshot(await self._chores.call(_picture, result, image, annotated, options, self._quality), result)

    def _deliver(self, result: Result, image: Image) -> None:
        for waiter in self._wanted.pop(result.frame.camera, ()):
            if not waiter.done():
                waiter.set_result((result, image))


def _picture(result: Result, image: Image, annotated: bool, camera: CameraOptions | None, quality: int) -> bytes:
    from edge_agent import drawing, imaging

    shown = dataclasses.replace(result, frame=dataclasses.replace(result.frame, image=image))
    return imaging.encode_jpeg(drawing.annotated(shown, camera) if annotated else image, quality=quality)
