"""Network cameras by RTSP, through OpenCV's FFmpeg."""

from __future__ import annotations

import ssl
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import ClassVar, Literal
from urllib.parse import quote, urlsplit, urlunsplit

from edge_agent.config import CameraOptions, ConfigPath, Count, Secret
from edge_agent.data import Image, VideoFormat
from edge_agent.errors import SourceError, SourceReason
from edge_agent.sources import LiveOptions, _opencv, _rtsp, _tls, _url
from edge_agent.sources._clock import MediaClock

_TRANSPORTS = {"tcp": "rtsp_transport;tcp", "udp": "rtsp_transport;udp", "auto": "rtsp_flags;prefer_tcp"}
_PROBE = "analyzeduration;100000"  # µs; FFmpeg's own 5 s would cost 2 s before the first picture, and age it so
_ASK_AGAIN_NS = 30_000_000_000
_HICCUP_NS, _AFTER_HICCUP_NS = 500_000_000, 5_000_000_000
_ASK_TIMEOUT_S = 3.0


class RtspOptions(LiveOptions, kw_only=True):
    """`[cameras.<name>]` with `source = "rtsp"`."""

    url: str
    username: str = ""
    password: Secret | None = None
    transport: Literal["tcp", "udp", "auto"] = "tcp"
    threads: Count = 1
    tls_ca: ConfigPath | None = None
    tls_insecure: bool = False


class RtspSource:
    """A stream. The server is asked first what it would play, since FFmpeg does not tell why it fails."""

    Options: ClassVar[type[CameraOptions]] = RtspOptions
    is_live = True

    def __init__(self, options: RtspOptions) -> None:
        self._options = options
        self._capture: _opencv.Capture | None = None
        self._clock = MediaClock()
        self._shape: _ShapeWatch | None = None
        self._arrived_ns = 0
        self._read_timeout_s = 2 * options.stall_timeout_s

    def check(self) -> Sequence[str]:
        return [*_opencv.problems("the source 'rtsp'"), *_url.problems(self._options.url, _rtsp.PORTS)]

    def open(self) -> VideoFormat:
        for problem in self.check():
            raise SourceError(problem, reason="unsupported")
        o = self._options
        until_s = time.monotonic() + o.open_timeout_s
        with self._asked(o.open_timeout_s / 2) as described:
            if described.fps:
                self._read_timeout_s = max(self._read_timeout_s, 6 / described.fps)
            self._capture = self._play(max(1.0, until_s - time.monotonic()))
        if self._capture is None:
            reason: SourceReason = "timeout" if time.monotonic() > until_s - 0.5 else "error"
            raise SourceError(f"{self._shown()} answers, and then does not play {described.codec}", reason=reason)
        self._clock = MediaClock()
        self._arrived_ns = time.monotonic_ns()
        self._shape = _ShapeWatch(described, lambda: self._asked(_ASK_TIMEOUT_S))
        opened = self._capture.format()
        return VideoFormat(opened.width, opened.height, described.fps or opened.fps)

    def grab(self) -> int | None:
        assert self._capture is not None, "open() comes first"
        began_ns = time.monotonic_ns()
        is_there = self._capture.grab()
        arrived_ns = time.monotonic_ns()
        # OpenCV hands out one buffered picture as a success after each timed-out read: it is stale.
        if arrived_ns - began_ns > 0.9e9 * self._read_timeout_s:
            raise SourceError(f"{self._shown()} sent nothing for {self._read_timeout_s:g} s", reason="stalled")
        if not is_there:
            raise SourceError(f"{self._shown()} ended the stream", reason="disconnected")
        is_hiccup = arrived_ns - self._arrived_ns > _HICCUP_NS
        self._arrived_ns = arrived_ns
        if self._shape and self._shape.has_changed(arrived_ns, _AFTER_HICCUP_NS if is_hiccup else _ASK_AGAIN_NS):
            raise SourceError(f"{self._shown()} changed its stream's size or codec", reason="disconnected")
        return self._clock.captured_ns(self._capture.stream_s(), arrived_ns)

    def retrieve(self, into: Image) -> Image | None:
        assert self._capture is not None, "grab() comes first"
        return self._capture.retrieve(into)

    def close(self) -> None:
        if self._capture is not None:
            self._capture.close()
            self._capture = None

    def _asked(self, timeout_s: float) -> AbstractContextManager[_rtsp.Described]:
        o = self._options
        password = o.password.reveal() if o.password else ""
        return _rtsp.described(o.url, username=o.username, password=password, timeout_s=timeout_s, tls=self._tls())

    def _play(self, timeout_s: float) -> _opencv.Capture | None:
        return _opencv.Capture.open(
            self._url_with_credentials(),
            "CAP_FFMPEG",
            {
                "CAP_PROP_OPEN_TIMEOUT_MSEC": timeout_s * 1000,
                "CAP_PROP_READ_TIMEOUT_MSEC": self._read_timeout_s * 1000,
                "CAP_PROP_N_THREADS": self._options.threads,
            },
            ffmpeg_options=self._ffmpeg_options(),
            timeout_s=timeout_s,
        )

    def _tls(self) -> ssl.SSLContext | None:
        o = self._options
        if not o.url.startswith("rtsps:"):
            return None
        if not o.tls_insecure and not _opencv.verifies_tls():
            raise SourceError(
                "this OpenCV cannot verify an RTSP server's certificate; install 4.13 or newer, or set "
                "tls_insecure = true",
                reason="tls",
            )
        return _tls.context(o.tls_ca, insecure=o.tls_insecure)

    def _ffmpeg_options(self) -> str:
        o = self._options
        options = [_TRANSPORTS[o.transport], _PROBE]
        if o.url.startswith("rtsps:") and not o.tls_insecure:
            options += _tls.ffmpeg_options(o.tls_ca)
        return "|".join(options)

    def _url_with_credentials(self) -> str:
        o, parts = self._options, urlsplit(self._options.url)
        if not o.username:
            return o.url
        login = quote(o.username, safe="")
        if o.password is not None:
            login += ":" + quote(o.password.reveal(), safe="")
        return urlunsplit(parts._replace(netloc=f"{login}@{parts.netloc.rpartition('@')[2]}"))

    def _shown(self) -> str:
        """The camera's address; some put user and password into path or query, so neither is shown."""
        parts = urlsplit(self._options.url)
        return f"{parts.scheme}://{parts.hostname}:{parts.port or _rtsp.PORTS[parts.scheme]}"


Source = RtspSource


class _ShapeWatch:
    """Asks the server again now and then, in a thread for that long: OpenCV goes on in the old size when the
    stream's changes."""

    def __init__(self, described: _rtsp.Described, ask: Callable[[], AbstractContextManager[_rtsp.Described]]) -> None:
        self._described = described
        self._ask = ask
        self._asked_ns = time.monotonic_ns()
        self._is_asking = False
        self._has_changed = False

    def has_changed(self, now_ns: int, pause_ns: int) -> bool:
        """What the last answer said; it is asked anew if that is longer ago than `pause_ns`."""
        if self._described.shape and not self._is_asking and now_ns - self._asked_ns >= pause_ns:
            self._asked_ns, self._is_asking = now_ns, True
            threading.Thread(target=self._run, name="ask", daemon=True).start()
        return self._has_changed

    def _run(self) -> None:
        before = self._described
        try:
            with self._ask() as now:
                self._has_changed = (now.codec, now.shape) != (before.codec, before.shape)
        except SourceError:
            return  # busy elsewhere; it still sends
        finally:
            self._is_asking = False
