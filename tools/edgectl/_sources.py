"""What people call a camera, as the options that the agent would have of it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from edge_agent import config, plugins
from edge_agent.config import CameraOptions
from edge_agent.errors import EdgeAgentError, SourceError
from edge_agent.sources import _opencv, _rtsp, _tls
from edge_agent.sources._v4l2 import Device
from edge_agent.sources.file import FileOptions
from edge_agent.sources.rtsp import RtspOptions
from edge_agent.sources.v4l2 import V4l2Options, V4l2Source

_ASK_S = 3.0


def options_of(source: str, path: Path | None) -> CameraOptions:
    """Of a configured camera by its name, or of a URL, a device, a file, a folder, a pipeline, or "synthetic".

    Raises `ConfigError`, and `SourceError` where there is nothing of this kind.
    """
    raw = config.read(path) if path is not None else {}
    cameras = raw.get("cameras", {})
    cameras = cameras if isinstance(cameras, dict) else {}
    if source in cameras:
        named = {"config_version": raw["config_version"]} if "config_version" in raw else {}
        folder = path.parent if path is not None else Path()
        return config.parse({**named, "cameras": {source: cameras[source]}}, folder=folder).cameras[source]
    table = _table(source, list(cameras))
    return config.parse({"cameras": {"input": table}}, environ={}).cameras["input"]


def at_full_pace(options: CameraOptions) -> CameraOptions:
    """The same, as fast as it can be read; cameras have a pace of their own."""
    return _replaced(options, {"pace": "fast"})


def without_end(options: CameraOptions) -> CameraOptions:
    """The same, in this process, recordings round and round."""
    return _replaced(options, {"isolation": "thread", "loop": True})


def unthinned(options: CameraOptions) -> CameraOptions:
    """The same, with every picture that the camera sends. A V4L2 device sends what it is asked for, which stays."""
    is_thinned = "fps" in options.__struct_fields__ and options.source in ("rtsp", "http", "gstreamer")
    return _replaced(options, {"enabled": True, **({"fps": None} if is_thinned else {})})


def codec_of(options: CameraOptions) -> str | None:
    """What the pictures are sent in, as the server, the driver or the file says; None where nobody does."""
    try:
        if isinstance(options, RtspOptions):
            return _codec_of_stream(options)
        if isinstance(options, V4l2Options):
            return _format_of_device(options)
    except (OSError, EdgeAgentError):
        return None
    return _codec_of_file(Path(options.path)) if isinstance(options, FileOptions) else None


def _table(source: str, known: list[str]) -> Mapping[str, Any]:
    scheme = source.partition("://")[0].lower() if "://" in source else ""
    if scheme in ("rtsp", "rtsps"):
        return {"source": "rtsp", "url": _escaped(source)}
    if scheme in ("http", "https"):
        return {"source": "http", "url": _escaped(source)}
    if source == "synthetic":
        return {"source": "synthetic"}
    if source.startswith(("/dev/", "usb:")):
        return {"source": "v4l2", "device": source}
    if "!" in source:
        return {"source": "gstreamer", "pipeline": _escaped(source)}
    there = Path(source).absolute()
    if not there.exists():
        hint = plugins.nearest(source, known)
        raise SourceError(f"{source}: there is no such file, folder or camera{hint}", reason="not_found")
    return {"source": "folder" if there.is_dir() else "file", "path": str(there)}


def _escaped(text: str) -> str:
    """Without variables: what was typed is meant as it is. There is no other way to write `${` in a configuration."""
    if "${" in text:
        raise SourceError("write the value of ${…} itself; variables are for the configuration", reason="unsupported")
    return text


def _replaced(options: CameraOptions, changes: Mapping[str, Any]) -> CameraOptions:
    """With those of the changes for which it has a key."""
    return msgspec.structs.replace(options, **{key: changes[key] for key in changes if hasattr(options, key)})


def _codec_of_stream(options: RtspOptions) -> str:
    is_secure = options.url.startswith("rtsps:")
    with _rtsp.described(
        options.url,
        username=options.username,
        password=options.password.reveal() if options.password else "",
        timeout_s=_ASK_S,
        tls=_tls.context(options.tls_ca, insecure=options.tls_insecure) if is_secure else None,
    ) as described:
        return described.codec


def _format_of_device(options: V4l2Options) -> str:
    """What the driver is set to; a device that is read can be asked by others too."""
    device = Device(V4l2Source(options)._path())
    try:
        return device.current().format
    finally:
        device.close()


def _codec_of_file(path: Path) -> str | None:
    """The four letters that the container has for it."""
    if path.is_dir() or _opencv.problems("this"):
        return None
    import cv2

    capture = cv2.VideoCapture(str(path), cv2.CAP_FFMPEG)
    try:
        letters = int(capture.get(cv2.CAP_PROP_FOURCC)).to_bytes(4, "little", signed=True)
    finally:
        capture.release()
    text = letters.decode("ascii", "replace").strip("\0 ")
    return text if text.isprintable() and text else None
