"""Network cameras by RTSP, through OpenCV's FFmpeg."""

from __future__ import annotations

import socket
import time
from collections.abc import Sequence
from typing import ClassVar, Literal
from urllib.parse import quote, urlsplit, urlunsplit

from edge_agent.config import CameraOptions, Positive, Secret
from edge_agent.data import Captured, Image, VideoFormat
from edge_agent.errors import SourceError
from edge_agent.sources import _opencv

_DEFAULT_PORT = 554


class RtspOptions(CameraOptions, kw_only=True):
    """`[cameras.<name>]` with `source = "rtsp"`."""

    url: str
    username: str = ""
    password: Secret | None = None
    transport: Literal["tcp", "udp"] = "tcp"
    open_timeout_s: Positive = 5.0
    read_timeout_s: Positive = 3.0


class RtspSource:
    """A stream; a read that takes as long as its time-out means that the stream is dead."""

    Options: ClassVar[type[CameraOptions]] = RtspOptions
    is_live = True

    def __init__(self, options: RtspOptions) -> None:
        self._options = options
        self._capture: _opencv.Capture | None = None

    def check(self) -> Sequence[str]:
        found = list(_opencv.problems("the source 'rtsp'"))
        try:
            parts = urlsplit(self._options.url)
            usable = parts.scheme == "rtsp" and bool(parts.hostname) and parts.port != 0
        except ValueError:
            usable = False
        if not usable:
            found.append("url: not of the form rtsp://host[:port]/path")
        return found

    def open(self) -> VideoFormat:
        for problem in self.check():
            raise SourceError(problem, reason="unsupported")
        self._knock()
        o = self._options
        self._capture = _opencv.Capture.open(
            self._url_with_credentials(),
            "CAP_FFMPEG",
            {
                "CAP_PROP_OPEN_TIMEOUT_MSEC": o.open_timeout_s * 1000,
                "CAP_PROP_READ_TIMEOUT_MSEC": o.read_timeout_s * 1000,
            },
            ffmpeg_options=f"rtsp_transport;{o.transport}",
        )
        if self._capture is None:
            raise SourceError(f"{self._shown()} does not play: wrong path, wrong user or password, or no video in it")
        return self._capture.format()

    def read(self, into: Image) -> Captured | None:
        assert self._capture is not None, "open() comes first"
        began = time.monotonic()
        captured = self._capture.read(into)
        # OpenCV hands out one buffered picture as a success after each timed-out read: it is stale.
        timed_out = time.monotonic() - began > 0.9 * self._options.read_timeout_s
        if timed_out:
            raise SourceError(f"{self._shown()} sent nothing for {self._options.read_timeout_s} s", reason="timeout")
        if captured is None:
            raise SourceError(f"{self._shown()} ended the stream", reason="disconnected")
        return captured

    def close(self) -> None:
        if self._capture is not None:
            self._capture.close()
            self._capture = None

    def _knock(self) -> None:
        """Tell an absent host or port from a refused stream, which OpenCV cannot."""
        parts = urlsplit(self._options.url)
        address = parts.hostname or "", parts.port or _DEFAULT_PORT
        try:
            socket.create_connection(address, timeout=self._options.open_timeout_s).close()
        except (socket.gaierror, UnicodeError) as error:
            raise SourceError(f"{address[0]} cannot be resolved: {error}", reason="not_found") from error
        except ConnectionRefusedError as error:
            raise SourceError(f"{address[0]}:{address[1]} refuses connections", reason="refused") from error
        except OSError as error:
            raise SourceError(f"{address[0]}:{address[1]} does not answer: {error}", reason="timeout") from error

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
        return f"rtsp://{parts.hostname}:{parts.port or _DEFAULT_PORT}"


Source = RtspSource
