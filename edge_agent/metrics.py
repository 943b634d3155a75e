"""The agent's last messages as Prometheus metrics, in base units; what is unknown has no sample.

Knows nothing of HTTP. Needs `prometheus_client`, which is imported where the first metric is made.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec

from edge_agent.histogram import Histogram
from edge_agent.messages import CameraPhase, CameraStats, Health, Percentiles, Stats, Status
from edge_agent.readings import BoardReadings, GpuReadings, HostReadings, ProcessReadings, RailReadings

if TYPE_CHECKING:
    from prometheus_client import Metric

_HEALTH = ("ok", "degraded", "failed")
_PHASES: tuple[CameraPhase, ...] = ("connecting", "running", "stalled", "backoff", "disabled")
_QUANTILES = {"p50": "0.5", "p95": "0.95", "p99": "0.99", "max": "1"}
_BUCKETS_S = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
_PERCENT, _MB, _MHZ, _MS = 1e-2, 1e6, 1e6, 1e-3

Of = TypeVar("Of")


@dataclass(frozen=True, slots=True)
class Facts:
    """The last messages of each kind; `stats` is None until the first interval has ended. `latencies` by stage, and
    `captures` by camera, are of the same moment, and like counters from `stats.since` on."""

    status: Status
    health: Health
    stats: Stats | None = None
    latencies: Mapping[str, Histogram] = field(default_factory=dict)
    captures: Mapping[str, Histogram] = field(default_factory=dict)


def families(facts: Facts) -> Iterator[Metric]:
    """All that is known, each family once."""
    yield from _of_agent(facts.status, facts.health)
    stats = facts.stats
    if stats is None:
        return
    yield from _of_outbox(stats)
    yield from _of_process(stats)
    yield from _of_latency(stats, facts.latencies, facts.captures)
    yield from _of_cameras(stats.cameras)
    if stats.host is not None:
        yield from _of_host(stats.host)
    if stats.gpus is not None:
        yield from _of_gpus(stats.gpus)
    if stats.board is not None:
        yield from _of_board(stats.board)
    yield _present(
        "sensor_failed",
        "1 for a sensor that sees nothing now",
        ("sensor",),
        [(name,) for name in stats.sensor_troubles],
    )


def _of_agent(status: Status, health: Health) -> Iterator[Metric]:
    yield _present(
        "info",
        "Which agent this is, and what runs on it; always 1",
        ("version", "device", "model", "backend"),
        [(status.version, status.device, status.model.name or "", status.backend or "")],
    )
    yield _gauge("start_time_seconds", "When the agent started, in Unix time", (), [((), _epoch(status.started_at))])
    yield _gauge(
        "health",
        "Named health checks: 0 ok, 1 degraded, 2 failed",
        ("check",),
        [((name,), _HEALTH.index(check.state)) for name, check in health.checks.items()],
    )
    yield _gauge(
        "health_since_seconds",
        "When a check came to its state, in Unix time",
        ("check",),
        [((name,), _epoch(check.since)) for name, check in health.checks.items()],
    )
    yield _gauge(
        "health_fact_age_seconds",
        "How old the fact behind a check was when it was told",
        ("check",),
        [((name,), check.age_s) for name, check in health.checks.items()],
    )
    yield _gauge("health_time_seconds", "When the checks were last told, in Unix time", (), [((), _epoch(health.at))])
    yield _gauge(
        "camera_state",
        "1 for the state that a camera is in, 0 for the others",
        ("camera", "state"),
        [((name, phase), phase == now) for name, now in status.cameras.items() for phase in _PHASES],
    )
    yield _gauge("policy_rung", "Rung of the latency ladder; 0 is the wanted model", (), [((), status.policy.rung)])


def _of_outbox(stats: Stats) -> Iterator[Metric]:
    outbox = stats.outbox
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


def _of_process(stats: Stats) -> Iterator[Metric]:
    gauges: _Reads[ProcessReadings] = {
        "cpu_ratio": ("CPU cores in use; 1 is one core", lambda process: _scaled(process.cpu_percent, _PERCENT)),
        "resident_memory_bytes": ("Memory of the agent", lambda process: _scaled(process.rss_mb, _MB)),
        "threads": ("Threads of the agent", lambda process: process.threads),
        "open_fds": ("Open files of the agent", lambda process: process.open_files),
    }
    yield from _each(_gauge, "process", (), {(): stats.process}, gauges)
    yield _counter(
        "log_dropped_lines", "Lines that a stuck stdout kept from the log", (), [((), stats.log_lines_dropped)]
    )
    yield _gauge(
        "loop_lag_seconds",
        f"How late the event loop came to what was due, percentiles over the last {stats.window_s:g} s",
        ("quantile",),
        _quantiles((), stats.loop_lag_ms),
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
        [one for stage, percentiles in stats.stages_ms.items() for one in _quantiles((stage,), percentiles)],
    )
    yield _histogram("stage_duration_seconds", "How long frames were in each stage", "stage", latencies)
    yield _histogram("camera_capture_seconds", "From a picture that is there to one in the queue", "camera", captures)


def _of_cameras(cameras: Mapping[str, CameraStats]) -> Iterator[Metric]:
    counters: _Reads[CameraStats] = {
        "captured_frames": ("Frames that came from the camera", lambda camera: camera.captured),
        "inferred_frames": ("Frames that the model has seen", lambda camera: camera.inferred),
        "skipped_frames": ("Frames that were not wanted", lambda camera: camera.skipped),
        "published_results": ("Results that were given to the broker", lambda camera: camera.published),
        "reconnects": ("Times the camera was connected anew", lambda camera: camera.connection.reconnects),
        "stalls": ("Times the camera sent nothing", lambda camera: camera.connection.stalls),
    }
    gauges: _Reads[CameraStats] = {
        "queued_frames": ("Frames that wait for the model", lambda camera: camera.waiting),
        "nominal_fps": ("Frames a second, as the camera says", lambda camera: camera.connection.nominal_fps),
        "jitter_seconds": (
            "Standard deviation of the time between two frames, last hour",
            lambda camera: _scaled(camera.connection.jitter_ms, _MS),
        ),
        "first_frame_seconds": (
            "From the last connecting to the first frame",
            lambda camera: _scaled(camera.connection.first_frame_ms, _MS),
        ),
        "threads_left_behind": ("Threads that hang", lambda camera: camera.connection.threads_left_behind),
    }
    by_name: dict[tuple[str, ...], CameraStats] = {(name,): camera for name, camera in cameras.items()}
    yield from _each(_counter, "camera", ("camera",), by_name, counters)
    yield from _each(_gauge, "camera", ("camera",), by_name, gauges)
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


def _of_host(host: HostReadings) -> Iterator[Metric]:
    gauges: _Reads[HostReadings] = {
        "cpu_ratio": ("Share of all cores that is busy", lambda host: _scaled(host.cpu_percent, _PERCENT)),
        "memory_total_bytes": ("Memory", lambda host: _scaled(host.memory_total_mb, _MB)),
        "memory_available_bytes": (
            "Memory that programs can have",
            lambda host: _scaled(host.memory_available_mb, _MB),
        ),
        "memory_used_bytes": ("Memory that programs cannot have", lambda host: _scaled(host.memory_used_mb, _MB)),
        "memory_limit_bytes": (
            "What the agent's control group may have",
            lambda host: _scaled(host.memory_limit_mb, _MB),
        ),
        "memory_limit_used_bytes": (
            "What it cannot give back of that",
            lambda host: _scaled(host.memory_limit_used_mb, _MB),
        ),
        "swap_total_bytes": ("Swap space", lambda host: _scaled(host.swap_total_mb, _MB)),
        "swap_used_bytes": ("Swap space in use", lambda host: _scaled(host.swap_used_mb, _MB)),
        "disk_total_bytes": ("File system of the agent's state", lambda host: _scaled(host.disk_total_mb, _MB)),
        "disk_free_bytes": ("What is free of it", lambda host: _scaled(host.disk_free_mb, _MB)),
        "uptime_seconds": ("Since the machine was started", lambda host: host.uptime_s),
        "clock_synchronised": ("1 if the clock is, 0 if it is not", lambda host: host.clock_synchronised),
    }
    counters: _Reads[HostReadings] = {
        "network_received_bytes": ("Over the network, since boot", lambda host: host.network_rx_bytes),
        "network_sent_bytes": ("Over the network, since boot", lambda host: host.network_tx_bytes),
    }
    yield from _each(_gauge, "host", (), {(): host}, gauges)
    yield from _each(_counter, "host", (), {(): host}, counters)
    yield _gauge(
        "host_core_cpu_ratio",
        "Share of each core that is busy",
        ("core",),
        [((str(core),), percent * _PERCENT) for core, percent in enumerate(host.core_percent or ())],
    )
    loads = {"1": host.load_1m, "5": host.load_5m, "15": host.load_15m}
    yield _gauge(
        "host_load", "Load average over so many minutes", ("minutes",), [((key,), load) for key, load in loads.items()]
    )


def _of_gpus(gpus: Iterable[GpuReadings]) -> Iterator[Metric]:
    gauges: _Reads[GpuReadings] = {
        "utilisation_ratio": ("Share of time that kernels ran", lambda gpu: _scaled(gpu.utilisation_percent, _PERCENT)),
        "encoder_ratio": ("Share of the encoders in use", lambda gpu: _scaled(gpu.encoder_percent, _PERCENT)),
        "decoder_ratio": ("Share of the decoders in use", lambda gpu: _scaled(gpu.decoder_percent, _PERCENT)),
        "memory_total_bytes": ("The GPU's own memory", lambda gpu: _scaled(gpu.memory_total_mb, _MB)),
        "memory_used_bytes": ("Memory that programs cannot have", lambda gpu: _scaled(gpu.memory_used_mb, _MB)),
        "temperature_celsius": ("Temperature of the GPU", lambda gpu: gpu.temperature_c),
        "power_watts": ("Power that the GPU takes", lambda gpu: gpu.power_w),
        "power_limit_watts": ("Power that it may take", lambda gpu: gpu.power_limit_w),
        "sm_clock_hertz": ("Clock of the multiprocessors", lambda gpu: _scaled(gpu.sm_mhz, _MHZ)),
        "memory_clock_hertz": ("Clock of the memory", lambda gpu: _scaled(gpu.memory_mhz, _MHZ)),
        "throttle_reasons": ("How many reasons hold the clocks back", lambda gpu: _number(gpu.throttle_reasons)),
        "last_xid": ("The driver's last critical error", lambda gpu: gpu.last_xid),
        "last_xid_age_seconds": ("Since the driver told of that", lambda gpu: gpu.last_xid_age_s),
    }
    counters: _Reads[GpuReadings] = {
        "ecc_uncorrected_errors": ("Memory errors that could not be corrected", lambda gpu: gpu.ecc_uncorrected),
    }
    labels = ("gpu", "name")
    by_index: dict[tuple[str, ...], GpuReadings] = {(str(gpu.index), gpu.name or ""): gpu for gpu in gpus}
    yield from _each(_gauge, "gpu", labels, by_index, gauges)
    yield from _each(_counter, "gpu", labels, by_index, counters)
    yield _present(
        "gpu_throttled",
        "1 for each reason that holds the clocks back",
        (*labels, "reason"),
        [(*key, reason) for key, gpu in by_index.items() for reason in sorted(set(gpu.throttle_reasons or ()))],
    )
    yield _present(
        "gpu_info",
        "Which GPU it is; always 1",
        (*labels, "uuid", "driver"),
        [(*key, gpu.uuid or "", gpu.driver or "") for key, gpu in by_index.items()],
    )


def _of_board(board: BoardReadings) -> Iterator[Metric]:
    gauges: _Reads[BoardReadings] = {
        "gpu_utilisation_ratio": ("Load of the GPU", lambda board: _scaled(board.gpu_percent, _PERCENT)),
        "gpu_clock_hertz": ("Clock of the GPU", lambda board: _scaled(board.gpu_mhz, _MHZ)),
        "nvdec_clock_hertz": ("Clock of the fastest decoder", lambda board: _scaled(board.nvdec_mhz, _MHZ)),
        "nvenc_clock_hertz": ("Clock of the fastest encoder", lambda board: _scaled(board.nvenc_mhz, _MHZ)),
        "emc_clock_hertz": ("Clock of the memory", lambda board: _scaled(board.emc_mhz, _MHZ)),
        "power_watts": ("Power that goes into the module or the board", lambda board: board.power_w),
        "fan_ratio": ("How hard the fan is driven", lambda board: _scaled(board.fan_percent, _PERCENT)),
        "fan_rpm": ("Turns of the fan a minute", lambda board: board.fan_rpm),
        "throttle_reasons": ("How many slow clocks because of heat", lambda board: _number(board.throttling)),
    }
    rails: _Reads[RailReadings] = {
        "volts": ("Voltage of a rail", lambda rail: rail.voltage_v),
        "amperes": ("Current through a rail", lambda rail: rail.current_a),
        "watts": ("Power through a rail", lambda rail: rail.power_w),
    }
    yield from _each(_gauge, "board", (), {(): board}, gauges)
    yield from _each(
        _gauge, "board_rail", ("rail",), {(name,): rail for name, rail in (board.rails or {}).items()}, rails
    )
    yield _gauge(
        "board_temperature_celsius",
        "Temperature of a thermal zone",
        ("zone",),
        [((zone,), celsius) for zone, celsius in (board.temperatures_c or {}).items()],
    )
    yield _present(
        "board_throttled",
        "1 for each that slows clocks because of heat",
        ("by",),
        [(by,) for by in sorted({reason.partition(" ")[0] for reason in board.throttling or ()})],
    )
    yield _present(
        "board_info",
        "Which board this is, and its power mode; always 1",
        ("model", "l4t", "jetpack", "power_mode"),
        [(board.model or "", board.l4t or "", board.jetpack or "", board.power_mode or "")],
    )


_Reads = Mapping[str, "tuple[str, Callable[[Of], float | None]]"]
"""By the end of its name, what a metric says, and how it is read."""

_Samples = Iterable[tuple[tuple[str, ...], "float | None"]]


def _each(
    kind: Callable[[str, str, tuple[str, ...], _Samples], Metric],
    prefix: str,
    labels: tuple[str, ...],
    things: Mapping[tuple[str, ...], Of],
    reads: _Reads[Of],
) -> Iterator[Metric]:
    """A metric for each that is read of the things, which are by the values of their labels."""
    for name, (text, read) in reads.items():
        yield kind(f"{prefix}_{name}", text, labels, [(key, read(thing)) for key, thing in things.items()])


def _present(name: str, text: str, labels: tuple[str, ...], there: Iterable[tuple[str, ...]]) -> Metric:
    """A gauge that is 1 for all that there is, and says nothing of the rest."""
    return _gauge(name, text, labels, [(values, 1) for values in there])


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


def _quantiles(labels: tuple[str, ...], percentiles: Percentiles) -> list[tuple[tuple[str, ...], float | None]]:
    return [((*labels, quantile), _scaled(getattr(percentiles, key), _MS)) for key, quantile in _QUANTILES.items()]


def _number(found: Sequence[str] | None) -> int | None:
    return None if found is None else len(found)


def _scaled(value: float | None, factor: float) -> float | None:
    return None if value is None else value * factor


def _epoch(moment: str) -> float:
    return datetime.fromisoformat(moment.replace("Z", "+00:00")).timestamp()
