"""Network cameras by RTSP, through OpenCV's FFmpeg."""

from __future__ import annotations

import ssl
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import ClassVar, Literal
from urllib.parse import quote, urlsplit, urlunsplit

from edge_agent.config import CameraOptions, ConfigPath, Count, Secret
from edge_agent.data import Image, VideoFormat
from edge_agent.errors import SourceError
from edge_agent.sources import LiveOptions, _opencv, _rtsp, _tls
from edge_agent.sources._clock import MediaClock

_TRANSPORTS = {"tcp": "rtsp_transport;tcp", "udp": "rtsp_transport;udp", "auto": "rtsp_flags;prefer_tcp"}
_PROBE = "analyzeduration;100000"  # µs; FFmpeg's own 5 s would cost 2 s before the first picture, and age it so
_ASK_AGAIN_NS = 30_000_000_000
_HICCUP_NS, _AFTER_HICCUP_NS = 500_000_000, 5_000_000_000


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
        self._described: _rtsp.Described | None = None
        self._last_asked_ns = 0
        self._arrived_ns = 0
        self._read_timeout_s = 2 * options.stall_timeout_s

    def check(self) -> Sequence[str]:
        found = list(_opencv.problems("the source 'rtsp'"))
        try:
            parts = urlsplit(self._options.url)
            usable = parts.scheme in _rtsp.PORTS and bool(parts.hostname) and parts.port != 0
        except ValueError:
            usable = False
        if not usable:
            found.append("url: not of the form rtsp://host[:port]/path or rtsps://…")
        return found

    def open(self) -> VideoFormat:
        for problem in self.check():
            raise SourceError(problem, reason="unsupported")
        o = self._options
        with self._asked(o.open_timeout_s / 2) as described:
            if described.fps:
                self._read_timeout_s = max(self._read_timeout_s, 6 / described.fps)
            self._capture = self._play()
        if self._capture is None:
            raise SourceError(f"{self._shown()} answers, and then does not play {described.codec}", reason="timeout")
        self._described = described
        self._clock = MediaClock()
        self._last_asked_ns = self._arrived_ns = time.monotonic_ns()
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
        self._require_same_shape(arrived_ns)
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

    def _play(self) -> _opencv.Capture | None:
        return _opencv.Capture.open(
            self._url_with_credentials(),
            "CAP_FFMPEG",
            {
                "CAP_PROP_OPEN_TIMEOUT_MSEC": self._options.open_timeout_s * 1000,
                "CAP_PROP_READ_TIMEOUT_MSEC": self._read_timeout_s * 1000,
                "CAP_PROP_N_THREADS": self._options.threads,
            },
            ffmpeg_options=self._ffmpeg_options(),
        )

    def _require_same_shape(self, arrived_ns: int) -> None:
        """Ask the server again now and then, and after each hiccup: OpenCV goes on in the old size when the
        stream's changes. Raises `SourceError` where it has."""
        before, self._arrived_ns = self._arrived_ns, arrived_ns
        pause_ns = _AFTER_HICCUP_NS if arrived_ns - before > _HICCUP_NS else _ASK_AGAIN_NS
        if self._described is None or not self._described.shape or arrived_ns - self._last_asked_ns < pause_ns:
            return
        self._last_asked_ns = arrived_ns
        try:
            with self._asked(1.0) as described:
                pass
        except SourceError:
            return  # busy elsewhere; it still sends
        if (described.codec, described.shape) != (self._described.codec, self._described.shape):
            raise SourceError(f"{self._shown()} changed its stream's size or codec", reason="disconnected")

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
