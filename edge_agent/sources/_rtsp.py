"""Asks an RTSP server what it would play (RFC 2326, DESCRIBE), to learn what a failed player does not tell:
who refused, why, and in which codec the stream is."""

from __future__ import annotations

import base64
import http.client
import re
import socket
import ssl
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import BinaryIO
from urllib.parse import unquote, urlsplit, urlunsplit

from edge_agent.errors import SourceError, SourceReason

PORTS = {"rtsp": 554, "rtsps": 322}
CODECS = frozenset(("H264", "H265", "JPEG", "MP4V-ES", "MPV", "H263-1998", "VP8", "VP9", "AV1", "MP2T"))
"""Names of what OpenCV's FFmpeg can decode, as SDP writes them (RFC 8866, a=rtpmap)."""

_STATIC_PAYLOADS = {26: "JPEG", 32: "MPV", 33: "MP2T"}  # RFC 3551 gives them no rtpmap
_MOST_SDP_BYTES = 65536
_REASONS: Mapping[int, SourceReason] = {401: "auth_failed", 403: "auth_failed", 404: "not_found", 410: "not_found"}


@dataclass(frozen=True, slots=True)
class Described:
    """The first video of a stream: its codec's name, its rate where the server says, and what else of its
    description changes with the picture's size."""

    codec: str
    fps: float | None
    shape: Sequence[str]


@contextmanager
def described(
    url: str, *, username: str = "", password: str = "", timeout_s: float, tls: ssl.SSLContext | None = None
) -> Iterator[Described]:
    """What the server says of `url` within `timeout_s`.

    The connection is held while inside: a server that makes streams on demand would else unmake this one,
    and refuse a player that comes meanwhile.

    Raises `SourceError` with the reason why it would not play: not_found, refused, timeout, tls,
    auth_failed, unsupported_codec, error.
    """
    parts = urlsplit(url)
    shown = f"{parts.hostname}:{parts.port or PORTS[parts.scheme]}"
    bare = urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))
    if not username:
        username, password = unquote(parts.username or ""), unquote(parts.password or "")
    until_s = time.monotonic() + timeout_s
    with _connected(parts.hostname or "", parts.port or PORTS[parts.scheme], timeout_s, tls) as link:
        try:
            status, headers, sdp = _ask(link, bare, 1, until_s)
            if status == 401 and username:
                challenges = headers.get_all("WWW-Authenticate", [])
                login = _authorisation(challenges, username, password, bare)
                status, headers, sdp = _ask(link, bare, 2, until_s, login)
        except TimeoutError as error:
            raise SourceError(f"{shown} accepts connections and says nothing", reason="timeout") from error
        except OSError as error:
            raise SourceError(f"{shown} closes the connection: {error}", reason="disconnected") from error
        except (ValueError, http.client.HTTPException) as error:
            raise SourceError(f"{shown} answers, but not in RTSP") from error
        if status != 200:
            what = _REFUSALS.get(status, f"answers {status}")
            raise SourceError(f"{shown} {what}", reason=_REASONS.get(status, "error"))
        yield _video_of(sdp, shown)


_REFUSALS = {
    401: "does not accept this user and password",
    403: "does not let this user see the stream",
    404: "has no stream at this path",
    410: "has no stream at this path any more",
}


def _connected(host: str, port: int, timeout_s: float, tls: ssl.SSLContext | None) -> socket.socket:
    shown = f"{host}:{port}"
    try:
        link = socket.create_connection((host, port), timeout=timeout_s)
    except (socket.gaierror, UnicodeError) as error:
        raise SourceError(f"{host} cannot be resolved: {error}", reason="not_found") from error
    except ConnectionRefusedError as error:
        raise SourceError(f"{shown} refuses connections", reason="refused") from error
    except OSError as error:
        raise SourceError(f"{shown} does not answer: {error}", reason="timeout") from error
    if tls is None:
        return link
    try:
        return tls.wrap_socket(link, server_hostname=host)
    except (TimeoutError, ConnectionError) as error:
        link.close()
        reason: SourceReason = "timeout" if isinstance(error, TimeoutError) else "disconnected"
        raise SourceError(f"{shown} does not answer to TLS: {error}", reason=reason) from error
    except (OSError, ssl.SSLError, ssl.CertificateError) as error:
        link.close()
        why = getattr(error, "verify_message", "") or str(error)
        raise SourceError(f"{shown}: no trusted TLS connection: {why}", reason="tls") from error


def _ask(
    link: socket.socket, url: str, number: int, until_s: float, authorisation: str = ""
) -> tuple[int, http.client.HTTPMessage, str]:
    login = f"Authorization: {authorisation}\r\n" if authorisation else ""
    request = (
        f"DESCRIBE {url} RTSP/1.0\r\nCSeq: {number}\r\nAccept: application/sdp\r\nUser-Agent: edge-agent\r\n{login}\r\n"
    )
    link.settimeout(max(0.1, until_s - time.monotonic()))
    link.sendall(request.encode())
    with link.makefile("rb") as answer:
        status = _status(answer)
        headers = http.client.parse_headers(answer)
        length = min(int(headers.get("Content-Length", 0)), _MOST_SDP_BYTES)
        return status, headers, answer.read(length).decode("utf-8", "replace")


def _status(answer: BinaryIO) -> int:
    line = answer.readline(1024).decode("latin-1")
    if not line:
        raise ConnectionResetError("no answer")
    match = re.match(r"RTSP/\d\.\d (\d{3})", line)
    if match is None:
        raise ValueError(f"no RTSP: {line[:40]!r}")
    return int(match.group(1))


def _authorisation(challenges: list[str], username: str, password: str, url: str) -> str:
    """What answers a challenge: Digest (RFC 2617) if one is offered that urllib can, else Basic if offered."""
    request = urllib.request.Request(url, method="DESCRIBE")
    request.selector = url
    digest = urllib.request.HTTPDigestAuthHandler(_OneLogin(username, password))
    offered = [challenge.partition(" ") for challenge in challenges]
    for scheme, _, rest in offered:
        fields = urllib.request.parse_keqv_list(list(filter(None, urllib.request.parse_http_list(rest))))
        if scheme.lower() == "digest" and fields.get("algorithm", "MD5").upper() in ("MD5", "SHA"):
            return f"Digest {digest.get_authorization(request, fields)}"
    if any(scheme.lower() == "basic" for scheme, _, _ in offered):
        return "Basic " + base64.b64encode(f"{username}:{password}".encode()).decode()
    raise SourceError("the camera wants a login of a kind that is not known here", reason="auth_failed")


class _OneLogin(urllib.request.HTTPPasswordMgr):
    """The same user and password for everything: urllib's own table does not know rtsp URLs."""

    def __init__(self, username: str, password: str) -> None:
        super().__init__()
        self._login = username, password

    def find_user_password(self, realm: str, authuri: str) -> tuple[str | None, str | None]:
        return self._login


def _video_of(sdp: str, shown: str) -> Described:
    section = re.search(r"^m=video \S+ \S+ (\d+)(.*?)(?=^m=|\Z)", sdp, re.MULTILINE | re.DOTALL)
    if section is None:
        raise SourceError(f"{shown} plays no video at this path", reason="unsupported_codec")
    payload, rest = int(section.group(1)), section.group(2)
    named = re.search(rf"^a=rtpmap:{payload} ([^/\s]+)", rest, re.MULTILINE)
    codec = named.group(1).upper() if named else _STATIC_PAYLOADS.get(payload, f"payload {payload}")
    if codec not in CODECS:
        raise SourceError(f"{shown} sends {codec}, which cannot be decoded here", reason="unsupported_codec")
    rate = re.search(r"^a=framerate:\s*([0-9.]+)", rest, re.MULTILINE)
    fps = float(rate.group(1)) if rate and rate.group(1).count(".") < 2 else None
    return Described(
        codec, fps, tuple(re.findall(r"sprop-[a-z-]+=[^;\s]+|^a=(?:x-dimensions|framesize):.*$", rest, re.M))
    )
