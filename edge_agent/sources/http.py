"""Network cameras by HTTP: Motion-JPEG, read here, and HLS, through OpenCV's FFmpeg."""

from __future__ import annotations

import http.client
import socket
import ssl
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar
from urllib.parse import quote, unquote, urlsplit, urlunsplit

import numpy as np

from edge_agent.config import CameraOptions, ConfigPath, Secret
from edge_agent.data import Image, VideoFormat
from edge_agent.errors import SourceError, SourceReason
from edge_agent.sources import LiveOptions, _mjpeg, _opencv, _pixels, _tls, _url
from edge_agent.sources._clock import MediaClock
from edge_agent.sources._player import Playing

_PLAYLISTS = ("application/vnd.apple.mpegurl", "application/x-mpegurl", "audio/mpegurl", "audio/x-mpegurl")
_REASONS: Mapping[int, SourceReason] = {401: "auth_failed", 403: "auth_failed", 404: "not_found", 410: "not_found"}
_MOST_WAIT_S = 0.5


class HttpOptions(LiveOptions, kw_only=True):
    """`[cameras.<name>]` with `source = "http"`."""

    url: str
    username: str = ""
    password: Secret | None = None
    tls_ca: ConfigPath | None = None
    tls_insecure: bool = False


class HttpSource(Playing):
    """What the server sends at `url` decides how it is read: a multipart body, or an HLS playlist."""

    Options: ClassVar[type[CameraOptions]] = HttpOptions
    is_live = True

    def __init__(self, options: HttpOptions) -> None:
        self._options = options

    def check(self) -> Sequence[str]:
        return [*_opencv.problems("the source 'http'"), *_url.problems(self._options.url, ("http", "https"))]

    def open(self) -> VideoFormat:
        for problem in self.check():
            raise SourceError(problem, reason="unsupported")
        answer = self._get()
        kind = answer.headers.get("Content-Type", "")
        if boundary := _mjpeg.boundary_of(kind):
            self._player = pictures = _MotionJpeg(answer, boundary, self._shown())
            return pictures.start()
        answer.close()
        if kind.partition(";")[0].strip().lower() in _PLAYLISTS or urlsplit(self._options.url).path.endswith(".m3u8"):
            self._player = segments = self._hls()
            return segments.start()
        raise SourceError(
            f"{self._shown()} sends {kind or 'something unnamed'}, neither Motion-JPEG nor HLS", reason="unsupported"
        )

    def _get(self) -> Any:
        """The open answer to a GET. Raises `SourceError` with the reason why there is none."""
        o = self._options
        bare, username, password = self._login()
        logins = urllib.request.HTTPPasswordMgrWithDefaultRealm()
        logins.add_password(None, bare, username, password)
        opener = urllib.request.build_opener(
            urllib.request.ProxyHandler({}),  # cameras are near
            urllib.request.HTTPSHandler(
                context=_tls.context(self._options.tls_ca, insecure=self._options.tls_insecure)
            ),
            _Digest(logins),
            urllib.request.HTTPBasicAuthHandler(logins),
        )
        try:
            answer = opener.open(bare, timeout=o.open_timeout_s)
        except urllib.error.HTTPError as error:
            error.close()
            reason = _REASONS.get(error.code, "error")
            raise SourceError(f"{self._shown()} answers {error.code} {error.reason}", reason=reason) from error
        except (OSError, ValueError, http.client.HTTPException) as error:
            raise _as_source_error(self._shown(), error) from error
        _set_timeout(answer, 2 * o.stall_timeout_s)
        return answer

    def _hls(self) -> _Hls:
        o = self._options
        bare, username, password = self._login()
        parts = urlsplit(bare)
        login = f"{quote(username, safe='')}:{quote(password, safe='')}@" if username else ""
        if parts.scheme == "https" and not o.tls_insecure:
            raise SourceError(
                "HLS over https: FFmpeg checks the playlist's certificate and not those of the segments; if that "
                "will do, set tls_insecure = true",
                reason="tls",
            )
        began_s = time.monotonic()
        capture = _opencv.Capture.open(
            urlunsplit(parts._replace(netloc=login + parts.netloc)),
            "CAP_FFMPEG",
            {
                "CAP_PROP_OPEN_TIMEOUT_MSEC": o.open_timeout_s * 1000,
                "CAP_PROP_READ_TIMEOUT_MSEC": 2 * o.stall_timeout_s * 1000,
            },
            ffmpeg_options="tls_verify;0",
            timeout_s=o.open_timeout_s,
        )
        if capture is None:
            reason: SourceReason = "timeout" if time.monotonic() - began_s > 0.9 * o.open_timeout_s else "error"
            raise SourceError(f"{self._shown()} has a playlist that does not play", reason=reason)
        return _Hls(capture, self._shown(), 2 * o.stall_timeout_s)

    def _login(self) -> tuple[str, str, str]:
        """The URL without user and password, and those, from wherever they were given."""
        o, parts = self._options, urlsplit(self._options.url)
        bare = urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))
        if o.username:
            return bare, o.username, o.password.reveal() if o.password else ""
        return bare, unquote(parts.username or ""), unquote(parts.password or "")

    def _shown(self) -> str:
        """The camera's address; path and query may hold a secret."""
        parts = urlsplit(self._options.url)
        return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}"


Source = HttpSource


class _MotionJpeg:
    """A multipart body. A picture that is not wanted is never decoded."""

    def __init__(self, answer: Any, boundary: bytes, shown: str) -> None:
        self._answer = answer
        self._boundary = boundary
        self._shown = shown
        self._clock = MediaClock()
        self._jpeg = b""
        self._kept: int | None = None

    def start(self) -> VideoFormat:
        self._kept = self.grab()
        first = self.retrieve(np.empty((0, 0, 3), np.uint8))
        if first is None:
            raise SourceError(f"{self._shown} sends pictures that are no JPEG", reason="unsupported_codec")
        return VideoFormat(first.shape[1], first.shape[0])

    def grab(self) -> int | None:
        if self._kept is not None:
            kept, self._kept = self._kept, None
            return kept
        try:
            part = _mjpeg.next_part(self._answer, self._boundary)
        except TimeoutError as error:
            raise SourceError(f"{self._shown} sends nothing more", reason="stalled") from error
        except (OSError, ValueError, http.client.HTTPException) as error:
            raise SourceError(f"{self._shown} broke off: {error}", reason="disconnected") from error
        if part is None:
            raise SourceError(f"{self._shown} ended the stream", reason="disconnected")
        self._jpeg = part.jpeg
        return self._clock.captured_ns(part.stamp_s, time.monotonic_ns())

    def retrieve(self, into: Image) -> Image | None:
        return _pixels.to_bgr("MJPG", np.frombuffer(self._jpeg, np.uint8), 0, 0, 0, into) if self._jpeg else None

    def close(self) -> None:
        self._answer.close()


class _Hls:
    """Whole segments arrive at once: their pictures are handed out at the pace they were taken at."""

    def __init__(self, capture: _opencv.Capture, shown: str, read_timeout_s: float) -> None:
        self._capture = capture
        self._shown = shown
        self._read_timeout_s = read_timeout_s
        self._began: tuple[float, float] | None = None  # a moment by our clock, and by the stream's
        self._due_s: float | None = None
        self.retrieve, self.close, self.start = capture.retrieve, capture.close, capture.format

    def grab(self) -> int | None:
        if self._due_s is None:
            self._due_s = self._next_due()
        left_s = self._due_s - time.monotonic()
        if left_s > _MOST_WAIT_S:
            time.sleep(_MOST_WAIT_S)
            return None
        time.sleep(max(0.0, left_s))
        self._due_s = None
        return time.monotonic_ns()

    def _next_due(self) -> float:
        began_s = time.monotonic()
        is_there = self._capture.grab()
        now_s = time.monotonic()
        if now_s - began_s > 0.9 * self._read_timeout_s:
            raise SourceError(f"{self._shown} sent nothing for {self._read_timeout_s:g} s", reason="stalled")
        if not is_there:
            raise SourceError(f"{self._shown} ended the stream", reason="disconnected")
        stream_s = self._capture.stream_s()
        if stream_s is None:
            return now_s
        if self._began is None or not -1.0 < self._began[0] + stream_s - self._began[1] - now_s < 30.0:
            self._began = now_s, stream_s  # the first, or so late or early that the pace starts anew
        return self._began[0] + stream_s - self._began[1]


class _Digest(urllib.request.HTTPDigestAuthHandler):
    """urllib's, but a challenge that it does not know is a refusal and not a fault."""

    def http_error_401(self, *arguments: Any) -> Any:
        try:
            return super().http_error_401(*arguments)
        except ValueError:  # another algorithm, or Basic alone, which the next handler answers
            return None


def _set_timeout(answer: Any, timeout_s: float) -> None:
    """Bound each read of the body; http.client has no way of its own for that once it is connected."""
    link = getattr(getattr(answer.fp, "raw", None), "_sock", None)
    if link is not None:
        link.settimeout(timeout_s)


def _as_source_error(shown: str, error: Exception) -> SourceError:
    cause = error.reason if isinstance(error, urllib.error.URLError) else error
    if isinstance(cause, socket.gaierror):
        return SourceError(f"{shown} cannot be resolved: {cause}", reason="not_found")
    if isinstance(cause, ConnectionRefusedError):
        return SourceError(f"{shown} refuses connections", reason="refused")
    if isinstance(cause, ssl.SSLError):
        return SourceError(f"{shown}: no trusted TLS connection: {cause}", reason="tls")
    if isinstance(cause, ConnectionError):
        return SourceError(f"{shown} closes the connection: {cause}", reason="disconnected")
    if isinstance(cause, (http.client.HTTPException, ValueError)):
        return SourceError(f"{shown} answers, but not in HTTP")
    return SourceError(f"{shown} does not answer: {cause}", reason="timeout")
