"""As much of HTTP/1.1 as one local page needs: one request a connection, its answer, and what keeps strangers out."""

from __future__ import annotations

import asyncio
import ipaddress
import socket
from collections.abc import Mapping
from dataclasses import dataclass, field
from http import HTTPStatus
from urllib.parse import parse_qs, unquote, urlsplit

import msgspec

HEAD_BYTES = 16_384
"""What a stream's reader must hold: the largest head."""
_MOST_BODY_BYTES = 16_384
_REQUEST_TIMEOUT_S = 10.0

_GUARDS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'; trusted-types 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}
"""With every answer. No inline scripts or styles, nothing from elsewhere, and the browser itself refuses to make HTML
of text: https://www.w3.org/TR/CSP3/, https://www.w3.org/TR/trusted-types/."""


class Refused(Exception):
    """A request that gets no more than a status and a sentence."""

    def __init__(self, status: HTTPStatus, why: str) -> None:
        super().__init__(why)
        self.status = status


@dataclass(frozen=True, slots=True)
class Request:
    """Names of `headers` are in lower case; of each key of the query the first value counts."""

    method: str
    path: str
    query: Mapping[str, str]
    headers: Mapping[str, str]
    body: bytes = b""


@dataclass(frozen=True, slots=True)
class Response:
    body: bytes
    content_type: str
    status: HTTPStatus = HTTPStatus.OK
    headers: Mapping[str, str] = field(default_factory=dict)

    def encoded(self) -> bytes:
        return self.head({"Content-Length": str(len(self.body))}) + self.body

    def head(self, more: Mapping[str, str] | None = None) -> bytes:
        lines = {"Content-Type": self.content_type, "Connection": "close", **_GUARDS, **self.headers, **(more or {})}
        text = "".join(f"{name}: {value}\r\n" for name, value in lines.items())
        return f"HTTP/1.1 {self.status.value} {self.status.phrase}\r\n{text}\r\n".encode("latin-1")


def json_response(value: object, status: HTTPStatus = HTTPStatus.OK) -> Response:
    return Response(msgspec.json.encode(value), "application/json", status)


async def read_request(reader: asyncio.StreamReader) -> Request | None:
    """The connection's request; None where nothing came. Raises `Refused`."""
    try:
        return await asyncio.wait_for(_read(reader), _REQUEST_TIMEOUT_S)
    except asyncio.TimeoutError:
        raise Refused(HTTPStatus.REQUEST_TIMEOUT, "the request took too long") from None
    except asyncio.LimitOverrunError:
        raise Refused(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, "the request's head is too large") from None
    except asyncio.IncompleteReadError as error:
        if error.partial:
            raise Refused(HTTPStatus.BAD_REQUEST, "the request ended too early") from None
        return None


async def _read(reader: asyncio.StreamReader) -> Request:
    method, target, headers = parse_head(await reader.readuntil(b"\r\n\r\n"))
    if "transfer-encoding" in headers:
        raise Refused(HTTPStatus.LENGTH_REQUIRED, "give the body's Content-Length")
    length = headers.get("content-length", "0")
    if not (length.isascii() and length.isdigit()):
        raise Refused(HTTPStatus.BAD_REQUEST, "Content-Length is no number")
    if len(length) > 9 or int(length) > _MOST_BODY_BYTES:
        raise Refused(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"a body has at most {_MOST_BODY_BYTES} bytes")
    body = await reader.readexactly(int(length))
    url = urlsplit(target)
    query = {key: values[0] for key, values in parse_qs(url.query, keep_blank_values=True).items()}
    return Request(method, unquote(url.path), query, headers, body)


def parse_head(head: bytes) -> tuple[str, str, dict[str, str]]:
    """Method, target and headers. Raises `Refused`."""
    first, *lines = head.decode("latin-1").rstrip("\r\n").split("\r\n")
    words = first.split(" ")
    if len(words) != 3 or not words[1].startswith("/") or not words[2].startswith("HTTP/1."):
        raise Refused(HTTPStatus.BAD_REQUEST, "no HTTP/1.1 request for a path")
    headers: dict[str, str] = {}
    for line in lines:
        name, colon, value = line.partition(":")
        name = name.lower()
        if not colon or not name or name != name.strip() or name in headers:
            raise Refused(HTTPStatus.BAD_REQUEST, "a header that is none, or comes twice")
        headers[name] = value.strip()
    return words[0], words[1], headers


class Hosts:
    """The names under which a browser may call this server. Any other is refused: it may be a stranger's, made to
    point here so that his page may read ours (DNS rebinding). Addresses cannot be made to point elsewhere. `port` is
    the one that is listened on."""

    def __init__(self, listen: str, *, port: int = 0) -> None:
        self.port = port
        self._names = {"localhost", listen.lower(), socket.gethostname().lower()}

    def __contains__(self, host: object) -> bool:
        if not isinstance(host, str):
            return False
        name, port = _split(host.lower())
        return port == str(self.port) and (name in self._names or _is_address(name))

    def allows_origin(self, origin: str) -> bool:
        """Whether a page of this origin is one of ours."""
        scheme, separator, host = origin.partition("://")
        return bool(separator) and scheme == "http" and host in self


def is_loopback(listen: str) -> bool:
    if listen.lower() == "localhost":
        return True
    return _is_address(listen) and ipaddress.ip_address(listen).is_loopback


def _split(host: str) -> tuple[str, str]:
    """Name and port of a Host header; the port that HTTP has where none is given."""
    if host.startswith("["):
        name, _, rest = host[1:].partition("]")
        return name, rest.removeprefix(":") or "80"
    name, colon, port = host.rpartition(":")
    return (name, port) if colon else (host, "80")


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
