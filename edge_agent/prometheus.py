"""The agent's last messages as Prometheus metrics, for whoever asks over HTTP.

Counts nothing itself: each scrape is made from the last `Status`, `Health` and `Stats`, in the server's threads.
Needs `prometheus_client` (the extra `prometheus`), which is imported only where `[prometheus] listen` is set.
"""

from __future__ import annotations

import errno
import re
import socket
import socketserver
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer

import structlog

from edge_agent import plugins
from edge_agent.config import PrometheusOptions
from edge_agent.errors import ConfigError
from edge_agent.metrics import Facts, families

if TYPE_CHECKING:
    from prometheus_client import Metric


log = structlog.get_logger()

LOOPBACK = "127.0.0.1"

_REQUEST_TIMEOUT_S = 5.0
_MAX_REQUESTS = 16


@contextmanager
def exporter(options: PrometheusOptions, facts: Callable[[], Facts | None]) -> Iterator[str | None]:
    """Serves metrics while it is entered; yields their URL, None where none are wanted.

    `facts` is called in threads of the server, once a scrape; None: nothing is known yet, and the page is empty.
    Raises `ConfigError` where the package is missing, or the address cannot be listened on.
    """
    if not options.listen:
        yield None
        return
    host, port = address(options.listen)
    try:
        import prometheus_client
    except ImportError as error:
        raise ConfigError(plugins.missing(error, needed_by="prometheus.listen")) from error
    registry = prometheus_client.CollectorRegistry()
    registry.register(_Messages(facts))
    with _serving(host, port, prometheus_client.make_wsgi_app(registry)):
        url = f"http://{f'[{host}]' if ':' in host else host}:{port}/metrics"
        log.info("prometheus.serving", url=url)
        yield url


def address(listen: str) -> tuple[str, int]:
    """Host and port of a text such as `9464` (of this machine's loopback), `0.0.0.0:9464` or `[::1]:9464`.
    Raises `ConfigError`."""
    match = re.fullmatch(r"(?:(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9_.-]+):)?([0-9]{1,5})", listen, re.ASCII)
    if match is None or not 1 <= int(match.group(2)) <= 65535:
        raise ConfigError(
            f"prometheus.listen: {listen!r} is no address and port; write 9464, 127.0.0.1:9464 or [::1]:9464"
        )
    return (match.group(1) or LOOPBACK).strip("[]"), int(match.group(2))


class _Messages:
    """A collector, as `prometheus_client` wants one: metric families at the time of the scrape."""

    def __init__(self, facts: Callable[[], Facts | None]) -> None:
        self._facts = facts

    def collect(self) -> Iterable[Metric]:
        facts = self._facts()
        return families(facts) if facts else ()


class _Handler(WSGIRequestHandler):
    timeout = _REQUEST_TIMEOUT_S  # for a client that connects and says nothing

    def log_message(self, format: str, *args: object) -> None:
        """A scrape is no event."""


class _Server(socketserver.ThreadingMixIn, WSGIServer):
    """A thread a request, like `prometheus_client`'s own server, but closing it ends them all."""

    daemon_threads = False
    request_queue_size = _MAX_REQUESTS
    allow_reuse_port = False  # or two agents would share a port, and each scrape would meet one of them

    def __init__(self, family: socket.AddressFamily, host: str, port: int) -> None:
        self.address_family = family
        self._open: set[socket.socket] = set()
        super().__init__((host, port), _Handler)

    def server_bind(self) -> None:
        """As `HTTPServer` does it, but without asking the name server for our name."""
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = str(self.server_address[0]), int(self.server_address[1])
        self.setup_environ()

    def verify_request(self, request: Any, client_address: Any) -> bool:
        return len(self._open) < _MAX_REQUESTS

    def process_request(self, request: Any, client_address: Any) -> None:
        self._open.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        self._open.discard(request)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        log.debug("prometheus.request_failed", client=client_address[0], reason=str(sys.exc_info()[1]))

    def server_close(self) -> None:
        for request in list(self._open):
            try:
                request.shutdown(socket.SHUT_RDWR)
            except OSError:  # its thread was faster
                continue
        super().server_close()


@contextmanager
def _serving(host: str, port: int, app: Any) -> Iterator[None]:
    server = _listening(host, port)
    try:
        server.set_app(app)
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.1}, name="prometheus")
        thread.start()
        try:
            yield
        finally:
            server.shutdown()
            thread.join()
    finally:
        server.server_close()


def _listening(host: str, port: int) -> _Server:
    where = f"prometheus.listen: {host} port {port}"
    try:
        family, *_, resolved = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        return _Server(family, str(resolved[0]), port)
    except socket.gaierror as error:
        raise ConfigError(f"{where}: {host!r} is not known here: {error.strerror}; write its address") from error
    except OSError as error:
        raise ConfigError(f"{where}: {_WHY_NOT.get(error.errno or 0, error.strerror)}") from error


_WHY_NOT = {
    errno.EADDRINUSE: "another program listens there; end it, or choose another port",
    errno.EADDRNOTAVAIL: "this machine has no such address; 0.0.0.0 stands for all that it has",
    errno.EACCES: "this user may not listen there; choose a port above 1023",
}
