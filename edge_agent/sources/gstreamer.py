"""Any GStreamer pipeline that ends in an appsink: CSI cameras and hardware decoders of a Jetson, and all else.

Through PyGObject, whose errors, time-outs and time stamps are GStreamer's own; where that is not installed,
through OpenCV, if its build knows GStreamer (the wheels from PyPI do not).
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from edge_agent.config import CameraOptions
from edge_agent.data import Image, VideoFormat
from edge_agent.errors import SourceError, SourceReason
from edge_agent.sources import LiveOptions, _opencv, _pixels
from edge_agent.sources._player import Playing

_POLL_NS = 500_000_000
_MOST_AGE_NS = 60_000_000_000  # an older time stamp is from another clock
_FORMATS: Mapping[str, str] = {"BGR": "BGR3", "BGRx": "BGRx", "YUY2": "YUYV", "NV12": "NV12", "GRAY8": "GREY"}
_NEEDS = "needs python3-gi with gir1.2-gst-plugins-base-1.0, or an OpenCV built with GStreamer"


class GstreamerOptions(LiveOptions, kw_only=True):
    """`[cameras.<name>]` with `source = "gstreamer"`."""

    pipeline: str


class GstreamerSource(Playing):
    """Pictures from the pipeline's appsink, in one of BGR, BGRx, YUY2, NV12 and GRAY8."""

    Options: ClassVar[type[CameraOptions]] = GstreamerOptions
    is_live = True

    def __init__(self, options: GstreamerOptions) -> None:
        self._options = options

    def check(self) -> Sequence[str]:
        found = list(_opencv.problems("the source 'gstreamer'"))
        if "appsink" not in self._options.pipeline:
            found.append("pipeline: it must end in ! appsink")
        if not found and not _has_gi() and not _opencv.has_gstreamer():
            found.append(f"the source 'gstreamer' {_NEEDS}")
        return found

    def open(self) -> VideoFormat:
        for problem in self.check():
            raise SourceError(problem, reason="unsupported")
        self._player = player = _Gi(self._options.pipeline) if _has_gi() else _OpenCv(self._options.pipeline)
        return player.start(self._options.open_timeout_s)


Source = GstreamerSource


class _Gi:
    """A pipeline by way of PyGObject."""

    def __init__(self, description: str) -> None:
        self._gst = gst = _import_gi()
        gst.init(None)
        try:
            self._pipeline = gst.parse_launch(description)
        except Exception as error:
            raise SourceError(f"pipeline: {_words(error)}", reason="unsupported") from error
        self._sink = _appsink(self._pipeline)
        self._sample: Any = None
        self._is_fresh = False

    def start(self, timeout_s: float) -> VideoFormat:
        sink, gst = self._sink, self._gst
        if sink.get_property("caps") is None:
            sink.set_property("caps", gst.Caps.from_string(f"video/x-raw,format=(string){{{','.join(_FORMATS)}}}"))
        for name, value in (("max-buffers", 2), ("drop", True), ("sync", False)):
            sink.set_property(name, value)
        self._pipeline.set_state(gst.State.PLAYING)
        until = time.monotonic() + timeout_s
        while self._pull() is None:
            if time.monotonic() > until:
                raise SourceError("the pipeline plays, and no picture comes out of it", reason="timeout")
        self._is_fresh = True
        form = self._sample.get_caps().get_structure(0)
        known, numerator, denominator = form.get_fraction("framerate")
        fps = numerator / denominator if known and numerator and denominator else None
        return VideoFormat(form.get_value("width"), form.get_value("height"), fps)

    def grab(self) -> int | None:
        if not self._is_fresh and self._pull() is None:
            return None
        self._is_fresh = False
        return self._captured_ns()

    def retrieve(self, into: Image) -> Image | None:
        form, buffer = self._sample.get_caps().get_structure(0), self._sample.get_buffer()
        name, width, height = (form.get_value(key) for key in ("format", "width", "height"))
        if name not in _FORMATS:
            raise SourceError(
                f"pipeline: the appsink gets {name}; put one of {', '.join(_FORMATS)} before it", reason="unsupported"
            )
        is_mapped, mapped = buffer.map(self._gst.MapFlags.READ)
        if not is_mapped:
            return None
        try:
            raw = np.frombuffer(mapped.data, np.uint8)
            return _pixels.to_bgr(_FORMATS[name], raw, width, height, _stride(name, width), into)
        finally:
            buffer.unmap(mapped)

    def close(self) -> None:
        self._sample = None
        self._pipeline.set_state(self._gst.State.NULL)

    def _pull(self) -> Any:
        """The next sample, None if none comes for a while. Raises what the pipeline complains of."""
        sample = self._sink.try_pull_sample(_POLL_NS)
        if sample is None:
            self._raise_trouble()
        else:
            self._sample = sample
        return sample

    def _raise_trouble(self) -> None:
        gst = self._gst
        message = self._pipeline.get_bus().pop_filtered(gst.MessageType.ERROR)
        if message is not None:
            error, _ = message.parse_error()
            raise SourceError(f"pipeline: {_words(error)}", reason=_reason(gst, error))
        if self._sink.is_eos():
            raise SourceError("the pipeline has ended", reason="disconnected")

    def _captured_ns(self) -> int:
        """The buffer's time on the monotonic clock, which is what GStreamer's system clock shows."""
        now_ns = time.monotonic_ns()
        buffer, segment = self._sample.get_buffer(), self._sample.get_segment()
        if buffer.pts == self._gst.CLOCK_TIME_NONE:
            return now_ns
        running_ns = segment.to_running_time(self._gst.Format.TIME, buffer.pts)
        captured_ns = int(self._pipeline.get_base_time() + running_ns)
        return captured_ns if 0 <= now_ns - captured_ns < _MOST_AGE_NS else now_ns


class _OpenCv:
    """A pipeline by way of an OpenCV that was built with GStreamer; times are those of arrival."""

    def __init__(self, description: str) -> None:
        capture = _opencv.Capture.open(description, "CAP_GSTREAMER", {})
        if capture is None:
            raise SourceError("OpenCV cannot play the pipeline; gst-launch-1.0 would say why")
        self.retrieve, self.close = capture.retrieve, capture.close
        self._capture = capture

    def start(self, timeout_s: float) -> VideoFormat:
        return self._capture.format()

    def grab(self) -> int | None:
        if not self._capture.grab():
            raise SourceError("the pipeline has ended", reason="disconnected")
        return time.monotonic_ns()


def _import_gi() -> Any:
    import gi

    for name in ("Gst", "GstApp"):
        gi.require_version(name, "1.0")
    from gi.repository import Gst, GstApp  # noqa: F401  GstApp gives appsinks their methods

    return Gst


def _has_gi() -> bool:
    try:
        _import_gi()
    except (ImportError, ValueError):  # ValueError: gi is there, GStreamer's description is not
        return False
    return True


def _appsink(pipeline: Any) -> Any:
    elements = pipeline.iterate_sinks()
    while True:
        state, element = elements.next()
        if int(state) != 1:  # GST_ITERATOR_OK
            raise SourceError("pipeline: it must end in ! appsink", reason="unsupported")
        if element.get_factory().get_name() == "appsink":
            return element


def _stride(format: str, width: int) -> int:
    """Bytes a row in GStreamer's default layout: rounded up to 4."""
    pixel_bytes = {"BGR": 3, "BGRx": 4, "YUY2": 2}.get(format, 1)
    return (width * pixel_bytes + 3) // 4 * 4


def _reason(gst: Any, error: Any) -> SourceReason:
    resource, stream = gst.ResourceError, gst.StreamError
    known: Sequence[tuple[Any, Any, SourceReason]] = (
        (gst.resource_error_quark(), resource.NOT_FOUND, "not_found"),
        (gst.resource_error_quark(), resource.BUSY, "device_busy"),
        (gst.resource_error_quark(), resource.NOT_AUTHORIZED, "auth_failed"),
        (gst.stream_error_quark(), stream.CODEC_NOT_FOUND, "unsupported_codec"),
        (gst.stream_error_quark(), stream.WRONG_TYPE, "unsupported"),
    )
    return next((reason for domain, code, reason in known if error.matches(domain, code)), "error")


def _words(error: Any) -> str:
    return str(getattr(error, "message", error)).strip()
