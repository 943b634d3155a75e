"""USB and other local cameras, by the kernel's own interface (Video4Linux2)."""

from __future__ import annotations

import errno
import os
import stat
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import msgspec
import structlog
from msgspec import Meta

from edge_agent import plugins
from edge_agent.config import CameraOptions, Count
from edge_agent.data import Image, VideoFormat
from edge_agent.errors import SourceError, SourceReason
from edge_agent.sources import LiveOptions, _opencv, _pixels, _v4l2

log = structlog.get_logger()

_POLL_S = 0.5
_MOST_AGE_NS = 60_000_000_000  # an older time stamp is from another clock
_USUAL_FPS = 30.0  # asked for where none is wanted: a driver keeps what the last program asked for
_REASONS: Mapping[int | None, SourceReason] = {
    errno.ENOENT: "device_not_found",
    errno.ENODEV: "device_not_found",
    errno.ENXIO: "device_not_found",
    errno.EBUSY: "device_busy",
    errno.ENOTTY: "unsupported",
    errno.EINVAL: "unsupported",
}


class V4l2Options(LiveOptions, kw_only=True):
    """`[cameras.<name>]` with `source = "v4l2"`; what is None is left to the driver."""

    device: Annotated[str, Meta(pattern=r"^(/\S+|usb:[0-9a-fA-F]{4}:[0-9a-fA-F]{4})\Z")] = "/dev/video0"
    format: Literal["auto", "MJPG", "YUYV", "UYVY", "NV12", "GREY"] = "auto"
    width: Count | None = None
    height: Count | None = None
    controls: dict[str, int] = msgspec.field(default_factory=dict)


class V4l2Source:
    """A device by path (`/dev/video0`), by a lasting name (`/dev/v4l/by-id/…`) or by `usb:VENDOR:PRODUCT`."""

    Options: ClassVar[type[CameraOptions]] = V4l2Options
    is_live = True
    hotplug = "video*"

    def __init__(self, options: V4l2Options) -> None:
        self._options = options
        self._device: _v4l2.Device | None = None
        self._mode: _v4l2.Negotiated | None = None
        self._taken: _v4l2.Taken | None = None

    def check(self) -> Sequence[str]:
        found = list(_opencv.problems("the source 'v4l2'"))
        try:
            path = self._path()
            if not stat.S_ISCHR(Path(path).stat().st_mode):
                found.append(f"device: {path} is no device")
            elif not os.access(path, os.R_OK | os.W_OK):
                found.append(f"device: {path} may not be opened; add this user to the group 'video'")
        except SourceError as error:
            found.append(f"device: {error}")
        except OSError as error:
            found.append(f"device: {self._options.device}: {error.strerror}")
        return found

    def open(self) -> VideoFormat:
        for problem in _opencv.problems("the source 'v4l2'"):
            raise SourceError(problem, reason="unsupported")
        path = self._path()
        try:
            self._device = _v4l2.Device(path)
            self._set_up(self._device, path)
        except OSError as error:
            raise _as_source_error(path, error) from error
        assert self._mode is not None
        return VideoFormat(self._mode.width, self._mode.height, self._mode.fps)

    def grab(self) -> int | None:
        assert self._device is not None, "open() comes first"
        try:
            self._let_go(self._device)
            self._taken = self._device.take(_POLL_S)
        except OSError as error:
            reason: SourceReason = "disconnected" if error.errno in (errno.ENODEV, errno.ENXIO) else "error"
            raise SourceError(f"{self._options.device} failed: {error.strerror}", reason=reason) from error
        if self._taken is None:
            return None
        now_ns = time.monotonic_ns()
        stamped_ns = self._taken.captured_ns
        return stamped_ns if stamped_ns and 0 <= now_ns - stamped_ns < _MOST_AGE_NS else now_ns

    def retrieve(self, into: Image) -> Image | None:
        assert self._device is not None and self._taken is not None and self._mode is not None, "grab() comes first"
        mode = self._mode
        if self._taken.is_damaged:
            return None
        raw = self._device.bytes_of(self._taken)
        return _pixels.to_bgr(mode.format, raw, mode.width, mode.height, mode.stride, into)

    def close(self) -> None:
        self._taken = None
        if self._device is not None:
            self._device.close()
            self._device = None

    def _set_up(self, device: _v4l2.Device, path: str) -> None:
        if not device.can_capture:
            raise SourceError(f"{path} ({device.card}) sends no pictures; is it another node's?", reason="unsupported")
        o, now = self._options, device.current()
        width, height = o.width or now.width, o.height or now.height
        self._mode = device.negotiate(self._format(device, width, height), width, height, o.fps or _USUAL_FPS)
        if self._mode.format not in _pixels.FORMATS:
            raise SourceError(f"{path} answers with the format {self._mode.format!r}", reason="unsupported")
        got = self._mode
        if (got.width, got.height) != (width, height):
            log.warning("v4l2.other_size", device=path, wanted=f"{width}x{height}", got=f"{got.width}x{got.height}")
        self._apply_controls(device, path)
        device.start()

    def _format(self, device: _v4l2.Device, width: int, height: int) -> str:
        """The wanted pixel format, or the cheapest that reaches the wanted rate at this size."""
        offered = device.formats()
        usable = [format for format in _pixels.FORMATS if format in offered]
        if self._options.format != "auto":
            if self._options.format not in offered:
                raise SourceError(
                    f"{self._options.device} has no format {self._options.format}; of use here: {', '.join(usable)}",
                    reason="unsupported",
                )
            return self._options.format
        if not usable:
            raise SourceError(
                f"{self._options.device} has only formats that cannot be read here: {', '.join(offered[:8])}",
                reason="unsupported",
            )
        rates = {format: device.fps_at(format, width, height) or 0.0 for format in usable}
        wanted = min(self._options.fps or _USUAL_FPS, max(rates.values()))
        return next(format for format in usable if rates[format] >= wanted)

    def _apply_controls(self, device: _v4l2.Device, path: str) -> None:
        if not self._options.controls:
            return
        known = {control.name: control for control in device.controls()}
        for name, value in self._options.controls.items():
            if name not in known:
                hint = plugins.nearest(name, list(known))
                raise SourceError(f"{path} has no control {name!r}{hint}", reason="unsupported")
            control = known[name]
            if not control.least <= value <= control.most:
                raise SourceError(
                    f"{path}: {name} = {value} is not in {control.least} … {control.most}", reason="unsupported"
                )
            device.set_control(control, value)

    def _let_go(self, device: _v4l2.Device) -> None:
        if self._taken is not None:
            taken, self._taken = self._taken, None
            device.give_back(taken.index)

    def _path(self) -> str:
        device = self._options.device
        if not device.startswith("usb:"):
            return device
        path = _v4l2.by_usb(device[4:])
        if path is None:
            raise SourceError(f"no camera {device[4:]} is plugged in", reason="device_not_found")
        return path


Source = V4l2Source


def _as_source_error(path: str, error: OSError) -> SourceError:
    if error.errno in (errno.EACCES, errno.EPERM):
        return SourceError(f"{path} may not be opened; add this user to the group 'video'")
    reason = _REASONS.get(error.errno, "error")
    hint = "; another program uses it" if reason == "device_busy" else ""
    return SourceError(f"{path}: {error.strerror}{hint}", reason=reason)
