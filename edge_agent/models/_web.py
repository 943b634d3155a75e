"""What may be had from the network, over HTTP(S), and in what time and size.

Connects to the addresses that were checked, and to no others. Proxies of the environment are not used: a proxy would
resolve the name by itself, and the address that was checked would not be the one that is connected to.
"""

from __future__ import annotations

import contextlib
import http.client
import io
import select
import socket
import ssl
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from functools import partial
from typing import TYPE_CHECKING, TypeVar

from edge_agent import __version__
from edge_agent.config import FetchOptions
from edge_agent.errors import ModelCode, ModelError
from edge_agent.models._addresses import Place, addresses, allowed, joined, shown

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

T = TypeVar("T")
Progress = Callable[[str, float | None], None]
"""Hears how it goes: `download` or `extract`, and how much of it is done in percent, None where that is unknown."""

BLOCK = 1 << 16
_MB = 1_000_000
_MOST_REDIRECTS = 5
_SLICE_MS = 200  # how long a cancellation may wait
_TOLD_EVERY_S = 0.5
_REDIRECTS = (301, 302, 303, 307, 308)
_GONE = (404, 410)


class Watch:
    """What every step keeps to: the time and the size that it may have, and whether anybody still wants it."""

    def __init__(self, options: FetchOptions, cancelled: Callable[[], bool]) -> None:
        self._options = options
        self._ends_s = time.monotonic() + options.timeout_s
        self._cancelled = cancelled

    def check(self) -> None:
        """Raises `ModelError` if it is to end here."""
        if self._cancelled():
            raise ModelError("the download was cancelled", code="cancelled")
        if time.monotonic() >= self._ends_s:
            limit = f"{self._options.timeout_s:g} s, which is fetch.timeout_s"
            raise ModelError(f"the download took more than {limit}", code="fetch_failed")

    def limit(self, size: int, what: str, most: int | None = None) -> None:
        """Raises `ModelError` if there are more bytes than there may be; `most` instead of `fetch.max_mb`."""
        if size > (self._options.max_mb * _MB if most is None else most):
            limit = f"{self._options.max_mb:g} MB; fetch.max_mb sets the limit" if most is None else f"{most} bytes"
            raise ModelError(f"{what} has more than {limit}", code="too_large")

    def limited(self, blocks: Iterable[bytes], what: str, most: int | None = None) -> Iterator[bytes]:
        """The same blocks, as long as it may go on."""
        size = 0
        for block in blocks:
            size += len(block)
            self.limit(size, what, most)
            self.check()
            yield block

    def wait(self, sock: socket.socket, act: Callable[[], T], events: int) -> T:
        """What `act` gives once the socket, which does not block, is ready for it. Raises `TimeoutError` if it
        does not get ready, and as `check` does."""
        stalls_s = time.monotonic() + self._options.stall_timeout_s
        poller = select.poll()
        while True:
            self.check()
            try:
                return act()
            except ssl.SSLWantReadError:
                events = select.POLLIN
            except ssl.SSLWantWriteError:
                events = select.POLLOUT
            except BlockingIOError:
                pass
            left_s = stalls_s - time.monotonic()
            if left_s <= 0:
                limit = f"{self._options.stall_timeout_s:g} s, which is fetch.stall_timeout_s"
                raise TimeoutError(f"it did nothing for {limit}")
            poller.register(sock, events)
            poller.poll(min(_SLICE_MS, 1000 * left_s + 1))


class Web:
    """What may be had from the network. `watch` is the caller's."""

    def __init__(self, options: FetchOptions, watch: Watch) -> None:
        self._options = options
        self._watch = watch
        try:
            self._trusted = ssl.create_default_context(cafile=options.ca_file)
        except (OSError, ssl.SSLError) as error:
            raise ModelError(
                f"fetch.ca_file: {options.ca_file} holds no certificates in PEM form: {error}", code="fetch_failed"
            ) from error

    def download(self, url: str, progress: Progress) -> Generator[bytes, None, None]:
        """A large file; says how far it is, twice a second at most."""
        with self._get(url) as (place, response):
            length, done, told_s = response.length, 0, float("-inf")
            self._watch.limit(length or 0, shown(url))
            for block in self._watch.limited(_body(response, place.url), shown(url)):
                done += len(block)
                if time.monotonic() - told_s >= _TOLD_EVERY_S:
                    told_s = time.monotonic()
                    progress("download", 100.0 * done / length if length else None)
                yield block

    def read(self, url: str, *, most: int, accept: str = "*/*", gone: ModelCode = "fetch_failed") -> tuple[str, bytes]:
        """A small file as a whole, after the URL that it came from in the end. `gone`: the error's code where there
        is none."""
        with self._get(url, accept, gone) as (place, response):
            return place.url, b"".join(self._watch.limited(_body(response, place.url), shown(url), most))

    @contextlib.contextmanager
    def _get(
        self, url: str, accept: str = "*/*", gone: ModelCode = "fetch_failed"
    ) -> Iterator[tuple[Place, http.client.HTTPResponse]]:
        """Where the redirects end, and the answer from there up to its body."""
        for _ in range(_MOST_REDIRECTS + 1):
            place = allowed(url, self._options)
            with contextlib.ExitStack() as opened:
                response = self._ask(place, accept, opened)
                location = response.headers.get("Location") if response.status in _REDIRECTS else None
                if location is None:
                    if response.status != 200:
                        raise ModelError(
                            f"{shown(place.url)} answers {response.status} {response.reason}",
                            code=gone if response.status in _GONE else "fetch_failed",
                        )
                    yield place, response
                    return
            url = joined(place.url, location)
        raise ModelError(f"{shown(url)}: redirected more than {_MOST_REDIRECTS} times", code="fetch_failed")

    def _ask(self, place: Place, accept: str, opened: contextlib.ExitStack) -> http.client.HTTPResponse:
        """The answer's status and headers; `opened` closes the connection."""
        with _named(place.url):
            sock = self._connected(place, opened)
            link = http.client.HTTPConnection(place.host, place.port)
            if place.scheme == "https":
                sock = self._secured(sock, place.host, opened)
                link.default_port = 443  # which Host leaves out
            link.sock = _Line(sock, self._watch)
            headers = {"Accept": accept, "User-Agent": f"edge-agent/{__version__}", "Connection": "close"}
            link.request("GET", place.path, headers=headers)
            return opened.enter_context(link.getresponse())

    def _connected(self, place: Place, opened: contextlib.ExitStack) -> socket.socket:
        """To one of the addresses that were checked, and to no other that the name may lead to a moment later."""
        failure = OSError("has no address")
        for family, address in addresses(place, self._options):
            sock = opened.enter_context(socket.socket(family, socket.SOCK_STREAM))
            sock.setblocking(False)
            try:
                self._watch.wait(sock, partial(sock.connect, address), select.POLLOUT)
            except OSError as error:
                failure = error
                continue
            return sock
        raise failure

    def _secured(self, sock: socket.socket, host: str, opened: contextlib.ExitStack) -> socket.socket:
        tls = self._trusted.wrap_socket(sock, server_hostname=host, do_handshake_on_connect=False)
        self._watch.wait(opened.enter_context(tls), tls.do_handshake, select.POLLIN)
        return tls


class _Line(io.RawIOBase):
    """A connected socket as http.client wants it, each read and write of which ends in time. Whoever opened the
    socket closes it."""

    def __init__(self, sock: socket.socket, watch: Watch) -> None:
        self._sock = sock
        self._watch = watch

    def makefile(self, mode: str) -> io.BufferedReader:
        return io.BufferedReader(_Line(self._sock, self._watch))

    def sendall(self, data: bytes) -> None:
        left = memoryview(data)
        while left:
            sent = self._watch.wait(self._sock, partial(self._sock.send, left), select.POLLOUT)
            left = left[sent:]

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: WriteableBuffer) -> int:
        return self._watch.wait(self._sock, partial(self._sock.recv_into, buffer), select.POLLIN)


def _body(response: http.client.HTTPResponse, url: str) -> Iterator[bytes]:
    length = response.length
    while True:
        with _named(url):
            block = response.read(BLOCK)
        if not block:
            break
        yield block
    if length and response.length:  # what is still to come, and does not
        done = length - response.length
        raise ModelError(f"{shown(url)} broke off after {done} of {length} bytes", code="fetch_failed")


@contextlib.contextmanager
def _named(url: str) -> Iterator[None]:
    """What goes wrong with a connection, as `ModelError`s."""
    try:
        yield
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise ModelError(f"{shown(url)} {_reason(error)}", code="fetch_failed") from error


def _reason(error: Exception) -> str:
    if isinstance(error, socket.gaierror):
        return f"cannot be resolved: {error.strerror}"
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"is not trusted: {error.verify_message}; fetch.ca_file names the authority of a server of your own"
    if isinstance(error, OSError):
        return f"cannot be reached, or broke off: {error.strerror or error}"
    return f"answers, but not in HTTP: {error or type(error).__name__}"
