"""`camera.*`: cameras come, go and change while the others run."""

from __future__ import annotations

from typing import Annotated, Any

from msgspec import Meta

from edge_agent import messages, plugins
from edge_agent.commands._base import Call, NoArguments, command
from edge_agent.config import Table
from edge_agent.data import Message
from edge_agent.errors import CommandError


class CameraNamed(Table):
    """`camera.remove`, `camera.enable`, `camera.disable`"""

    camera: str


class CameraTable(Table):
    """`camera.add`, `camera.set`: `options` are keys of `[cameras.<name>]`."""

    camera: str
    options: dict[str, Any]


class CameraSnapshot(Table):
    """`camera.snapshot`: a JPEG, with what was seen drawn on it or plain, of `max_kb` kilobytes at most (None: as
    configured)."""

    camera: str
    annotated: bool = True
    timeout_s: float = 5.0
    max_kb: Annotated[float, Meta(gt=0, le=100_000)] | None = None


@command("camera.list", NoArguments)
async def list_cameras(arguments: NoArguments, call: Call) -> dict[str, Any]:
    """Every camera: its source, and how it fares."""
    phases = call.agent.status().cameras
    return {
        "cameras": {
            name: {"source": options.source, "enabled": options.enabled, "state": phases.get(name)}
            for name, options in call.agent.config.cameras.items()
        }
    }


@command("camera.add", CameraTable)
async def add(arguments: CameraTable, call: Call) -> messages.Changed:
    """A new camera; it is connected to at once."""
    if arguments.camera in call.agent.camera_names:
        raise CommandError(f"there is a camera {arguments.camera!r} already; use camera.set", code="bad_arguments")
    return await _changed(call, arguments.camera, arguments.options)


@command("camera.set", CameraTable)
async def change(arguments: CameraTable, call: Call) -> messages.Changed:
    """Other options for a camera; it connects again."""
    _require(call, arguments.camera)
    return await _changed(call, arguments.camera, arguments.options)


@command("camera.remove", CameraNamed)
async def remove(arguments: CameraNamed, call: Call) -> messages.Changed:
    """Let go of a camera, and of all that is told of it."""
    _require(call, arguments.camera)
    return await _changed(call, arguments.camera, None)


@command("camera.enable", CameraNamed)
async def enable(arguments: CameraNamed, call: Call) -> messages.Changed:
    """Connect to a camera that was disabled."""
    _require(call, arguments.camera)
    return await _changed(call, arguments.camera, {"enabled": True})


@command("camera.disable", CameraNamed)
async def disable(arguments: CameraNamed, call: Call) -> messages.Changed:
    """Let go of a camera until it is enabled."""
    _require(call, arguments.camera)
    return await _changed(call, arguments.camera, {"enabled": False})


@command("camera.snapshot", CameraSnapshot)
async def snapshot(arguments: CameraSnapshot, call: Call) -> dict[str, Any]:
    """Publish a JPEG of the camera's next frame on its snapshot topic."""
    agent = call.agent
    _require(call, arguments.camera)
    shot = await agent.snapshots.take(
        arguments.camera,
        annotated=arguments.annotated,
        timeout_s=min(max(arguments.timeout_s, 0.1), 60.0),
        max_bytes=int((arguments.max_kb or agent.config.snapshots.max_kb) * 1e3),
    )
    topic = agent.topics.camera(arguments.camera, "snapshot")
    agent.publish(Message(topic, shot.jpeg, "replies"))
    frame = shot.result.frame
    return {
        "topic": topic,
        "bytes": len(shot.jpeg),
        "width": shot.width,
        "height": shot.height,
        "seq": frame.seq,
        "captured_at": messages.timestamp(frame.captured_at_ns),
    }


async def _changed(call: Call, camera: str, options: dict[str, Any] | None) -> messages.Changed:
    changes = {"cameras": {camera: options}}
    return await call.agent.change(lambda settings: settings.changed(changes))


def _require(call: Call, camera: str) -> None:
    names = call.agent.camera_names
    if camera not in names:
        raise CommandError(f"there is no camera {camera!r}{plugins.nearest(camera, names)}", code="not_found")
