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
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from typing import TYPE_CHECKING, Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer

import msgspec
import structlog

from edge_agent import plugins
from edge_agent.config import PrometheusOptions
from edge_agent.errors import ConfigError
from edge_agent.histogram import Histogram
from edge_agent.messages import CameraPhase, CameraStats, Health, Stats, Status

if TYPE_CHECKING:
    from prometheus_client import Metric

log = structlog.get_logger()

LOOPBACK = "127.0.0.1"

_REQUEST_TIMEOUT_S = 5.0
_MAX_REQUESTS = 16
_HEALTH = ("ok", "degraded", "failed")
_PHASES: tuple[CameraPhase, ...] = ("connecting", "running", "stalled", "backoff", "disabled")
_QUANTILES = {"p50": "0.5", "p95": "0.95", "p99": "0.99", "max": "1"}
_BUCKETS_S = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)


@dataclass(frozen=True, slots=True)
class Facts:
    """The last messages of each kind; `stats` is None until the first interval has ended. `latencies` by stage, and
    `captures` by camera, are of the same moment, and like counters from `stats.since` on."""

    status: Status
    health: Health
    stats: Stats | None = None
    latencies: Mapping[str, Histogram] = field(default_factory=dict)
    captures: Mapping[str, Histogram] = field(default_factory=dict)


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


def families(facts: Facts) -> Iterator[Metric]:
    """The metrics, in seconds, bytes and ratios; what is unknown has no sample."""
    yield from _of_agent(facts.status, facts.health)
    if facts.stats is not None:
        yield from _of_process(facts.stats)
        yield from _of_latency(facts.stats, facts.latencies, facts.captures)
        yield from _of_cameras(facts.stats.cameras)


def _of_agent(status: Status, health: Health) -> Iterator[Metric]:
    yield _gauge(
        "info",
        "Which agent this is, and what runs on it; always 1",
        ("version", "device", "model", "backend"),
        [((status.version, status.device, status.model.name or "", status.backend or ""), 1)],
    )
    yield _gauge("start_time_seconds", "When the agent started, in Unix time", (), [((), _epoch(status.started_at))])
    yield _gauge(
        "health",
        "Named health checks: 0 ok, 1 degraded, 2 failed",
        ("check",),
        [((name,), _HEALTH.index(check.state)) for name, check in health.checks.items()],
    )
    yield _gauge(
        "camera_state",
        "1 for the state that a camera is in, 0 for the others",
        ("camera", "state"),
        [((name, phase), phase == now) for name, now in status.cameras.items() for phase in _PHASES],
    )
    yield _gauge("policy_rung", "Rung of the latency ladder; 0 is the wanted model", (), [((), status.policy.rung)])


def _of_process(stats: Stats) -> Iterator[Metric]:
    outbox, process = stats.outbox, stats.process
    yield _gauge("stats_time_seconds", "When the counters were last read, in Unix time", (), [((), _epoch(stats.at))])
    yield _gauge(
        "outbox_messages",
        "Messages that wait in memory for the broker",
        ("class",),
        [((kind,), count) for kind, count in outbox.waiting.items()],
    )
    yield _counter(
        "outbox_dropped",
        "Messages that were never sent",
        ("class", "cause"),
        [((kind, cause), count) for kind, causes in outbox.dropped.items() for cause, count in causes.items()],
    )
    yield _counter(
        "outbox_refused",
        "Messages that the broker did not take",
        ("reason",),
        [((reason,), count) for reason, count in outbox.refused.items()],
    )
    yield _gauge("spool_messages", "Messages that wait on disk for the broker", (), [((), outbox.spool.messages)])
    yield _gauge("spool_bytes", "What waits on disk for the broker", (), [((), outbox.spool.bytes)])
    yield _gauge("process_cpu_ratio", "CPU cores in use; 1 is one core", (), [((), _scaled(process.cpu_percent, 1e-2))])
    yield _gauge("process_resident_memory_bytes", "Memory of the agent", (), [((), _scaled(process.rss_mb, 1e6))])
    yield _gauge("process_threads", "Threads of the agent", (), [((), process.threads)])
    yield _gauge("process_open_fds", "Open files of the agent", (), [((), process.open_files)])
    yield _counter(
        "log_dropped_lines", "Lines that a stuck stdout kept from the log", (), [((), stats.log_lines_dropped)]
    )


def _of_latency(
    stats: Stats, latencies: Mapping[str, Histogram], captures: Mapping[str, Histogram]
) -> Iterator[Metric]:
    # The gauge for who wants a number and its maximum, as the message has them; the histograms can be added up over
    # devices, and over any time. Capture is by camera: what one that is removed had counted would else be missing.
    yield _gauge(
        "stage_latency_seconds",
        f"Percentiles over the last {stats.window_s:g} s; total is from capture to the end of post-processing",
        ("stage", "quantile"),
        [
            ((stage, quantile), _scaled(getattr(percentiles, key), 1e-3))
            for stage, percentiles in stats.stages_ms.items()
            for key, quantile in _QUANTILES.items()
        ],
    )
    yield _histogram("stage_duration_seconds", "How long frames were in each stage", "stage", latencies)
    yield _histogram("camera_capture_seconds", "From a picture that is there to one in the queue", "camera", captures)


def _of_cameras(cameras: Mapping[str, CameraStats]) -> Iterator[Metric]:
    counters: dict[str, tuple[str, Callable[[CameraStats], float]]] = {
        "captured_frames": ("Frames that came from the camera", lambda camera: camera.captured),
        "inferred_frames": ("Frames that the model has seen", lambda camera: camera.inferred),
        "skipped_frames": ("Frames that were not wanted", lambda camera: camera.skipped),
        "published_results": ("Results that were given to the broker", lambda camera: camera.published),
        "reconnects": ("Times the camera was connected anew", lambda camera: camera.connection.reconnects),
        "stalls": ("Times the camera sent nothing", lambda camera: camera.connection.stalls),
    }
    gauges: dict[str, tuple[str, Callable[[CameraStats], float | None]]] = {
        "queued_frames": ("Frames that wait for the model", lambda camera: camera.waiting),
        "nominal_fps": ("Frames a second, as the camera says", lambda camera: camera.connection.nominal_fps),
        "jitter_seconds": (
            "Standard deviation of the time between two frames, last hour",
            lambda camera: _scaled(camera.connection.jitter_ms, 1e-3),
        ),
        "first_frame_seconds": (
            "From the last connecting to the first frame",
            lambda camera: _scaled(camera.connection.first_frame_ms, 1e-3),
        ),
        "threads_left_behind": ("Threads that hang", lambda camera: camera.connection.threads_left_behind),
    }
    for name, (text, read) in counters.items():
        yield _counter(f"camera_{name}", text, ("camera",), [((key,), read(camera)) for key, camera in cameras.items()])
    for name, (text, find) in gauges.items():
        yield _gauge(f"camera_{name}", text, ("camera",), [((key,), find(camera)) for key, camera in cameras.items()])
    yield _counter(
        "camera_dropped_frames",
        "Frames that were captured and not inferred",
        ("camera", "cause"),
        [
            ((name, cause), count)
            for name, camera in cameras.items()
            for cause, count in msgspec.structs.asdict(camera.drops).items()
        ],
    )
    yield _gauge(
        "camera_objects",
        "Objects in the last result",
        ("camera", "label"),
        [((name, label), count) for name, camera in cameras.items() for label, count in camera.objects.items()],
    )


_Samples = Iterable[tuple[tuple[str, ...], "float | None"]]


def _gauge(name: str, text: str, labels: tuple[str, ...], samples: _Samples) -> Metric:
    from prometheus_client.core import GaugeMetricFamily

    return _filled(GaugeMetricFamily(f"edge_agent_{name}", text, labels=labels), samples)


def _counter(name: str, text: str, labels: tuple[str, ...], samples: _Samples) -> Metric:
    """`_total` is added to the name."""
    from prometheus_client.core import CounterMetricFamily

    return _filled(CounterMetricFamily(f"edge_agent_{name}", text, labels=labels), samples)


def _histogram(name: str, text: str, label: str, seen: Mapping[str, Histogram]) -> Metric:
    from prometheus_client.core import HistogramMetricFamily

    family = HistogramMetricFamily(f"edge_agent_{name}", text, labels=(label,))
    for key, one in seen.items():
        counts = [*one.at_most([limit_s * 1e3 for limit_s in _BUCKETS_S]), one.count]
        limits = [*map(str, _BUCKETS_S), "+Inf"]
        family.add_metric((key,), list(zip(limits, counts, strict=True)), sum_value=one.sum_ms / 1e3)
    return family


def _filled(family: Any, samples: _Samples) -> Metric:
    for labels, value in samples:
        if value is not None:
            family.add_metric(labels, float(value))
    metric: Metric = family
    return metric


def _scaled(value: float | None, factor: float) -> float | None:
    return None if value is None else value * factor


def _epoch(moment: str) -> float:
    return datetime.fromisoformat(moment.replace("Z", "+00:00")).timestamp()


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
