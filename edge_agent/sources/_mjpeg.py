"""Motion-JPEG over HTTP: the pictures of a multipart/x-mixed-replace body (RFC 2046), undecoded."""

from __future__ import annotations

import email.message
import http.client
from dataclasses import dataclass
from typing import Protocol

_MOST_BYTES = 64_000_000
_MOST_LINE = 4096


class Body(Protocol):
    """What is read from: a buffered byte stream."""

    def read(self, length: int, /) -> bytes: ...
    def readline(self, length: int, /) -> bytes: ...


@dataclass(frozen=True, slots=True)
class Part:
    """One picture, and the camera's own time stamp (seconds) where it sends one."""

    jpeg: bytes
    stamp_s: float | None


def boundary_of(content_type: str) -> bytes | None:
    """The separator of a multipart body, or None if the type is another."""
    header = email.message.Message()
    header["Content-Type"] = content_type
    boundary = header.get_boundary()
    if header.get_content_maintype() != "multipart" or not boundary:
        return None
    return b"--" + boundary.removeprefix("--").encode("latin-1", "replace")  # some cameras count the dashes in


def next_part(body: Body, boundary: bytes) -> Part | None:
    """The next picture, or None at the end. Raises `ValueError` if the body is not of this form."""
    line = _line(body)
    while line.strip() == b"":
        if not line:
            return None
        line = _line(body)
    if not line.startswith(boundary):
        raise ValueError(f"expected a boundary, got {line[:40]!r}")
    if line.strip() == boundary + b"--":
        return None
    headers = http.client.parse_headers(body)  # type: ignore[call-overload]
    length = headers.get("Content-Length")
    jpeg = _exactly(body, int(length)) if length else _until(body, boundary)
    return Part(jpeg, _stamp_s(headers))


def _line(body: Body) -> bytes:
    line = body.readline(_MOST_LINE)
    if len(line) == _MOST_LINE:
        raise ValueError("a line without an end")
    return line


def _exactly(body: Body, length: int) -> bytes:
    if not 0 <= length <= _MOST_BYTES:
        raise ValueError(f"a picture of {length} bytes")
    data = body.read(length)
    if len(data) < length:
        raise ValueError("the stream ended within a picture")
    return data


def _until(body: Body, boundary: bytes) -> bytes:
    """A picture whose length was not told: it ends with JPEG's own end mark before the next boundary.

    The boundary itself stays unread.
    """
    data = bytearray()
    while not data.endswith((b"\xff\xd9", b"\xff\xd9\r\n", b"\xff\xd9\n")):
        line = body.readline(_MOST_LINE)
        if not line or len(data) > _MOST_BYTES:
            raise ValueError("the stream ended within a picture")
        if line.startswith(boundary):
            raise ValueError("a picture without an end")
        data += line
    return bytes(data.rstrip(b"\r\n"))


def _stamp_s(headers: http.client.HTTPMessage) -> float | None:
    try:
        return float(headers.get("X-Timestamp", ""))
    except ValueError:
        return None
