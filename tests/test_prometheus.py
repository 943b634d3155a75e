"""Metrics as somebody sees them who scrapes the agent over HTTP."""

from __future__ import annotations

import contextlib
import math
import re
import socket
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_args

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from edge_agent import messages
from edge_agent.config import PrometheusOptions
from edge_agent.errors import ConfigError
from edge_agent.histogram import Histogram
from edge_agent.metrics import Facts, families
from edge_agent.prometheus import address, exporter
from edge_agent.readings import (
    BoardReadings,
    GpuReadings,
    HostReadings,
    ProcessReadings,
    RailReadings,
    Readings,
)
from edge_agent.sensors import detect
from edge_agent.sensors.jetson import JetsonSensor
from tests.jetson_trees import BOARDS, planted
from tests.rigs import free_port, wait_until

Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]
PHASES = get_args(messages.CameraPhase)
DROPS = messages.Drops.__struct_fields__
TOTALS_MS = (0.2, 7.0, 20.0, 20.0, 20.0, 80.0, 400.0, 12_000.0)
PROCESS = ProcessReadings(cpu_percent=150.0, rss_mb=128.0, threads=12)
GPUS = [
    GpuReadings(
        index=0,
        name="NVIDIA H100 80GB HBM3",
        uuid="GPU-0",
        driver="580.159.04",
        utilisation_percent=37,
        encoder_percent=5,
        decoder_percent=0,
        memory_total_mb=85520.81,
        memory_used_mb=21380.2,
        temperature_c=41,
        power_w=118.25,
        power_limit_w=700.0,
        sm_mhz=1980,
        memory_mhz=2619,
        throttle_reasons=["sw_power_cap", "hw_thermal_slowdown"],
        ecc_uncorrected=2,
        last_xid=79,
        last_xid_age_s=12.5,
    ),
    GpuReadings(index=1, throttle_reasons=[]),
]
SEES = Readings(
    process=PROCESS,
    host=HostReadings(
        cpu_percent=25.0,
        core_percent=[0.0, 50.0],
        load_1m=0.5,
        load_15m=0.25,
        memory_total_mb=8000.0,
        memory_available_mb=6000.0,
        memory_used_mb=2000.0,
        swap_total_mb=0.0,
        disk_free_mb=512.5,
        network_rx_bytes=2**40,
        network_tx_bytes=7,
        uptime_s=3600.5,
        clock_synchronised=False,
    ),
    gpus=GPUS,
    troubles={"nvml": "it does not answer"},
)


def facts(
    *,
    captured: int = 100,
    with_stats: bool = True,
    backend: str | None = "onnx",
    readings: Readings = SEES,
) -> Facts:
    at = "2026-01-31T12:00:00.000000Z"
    status = {
        "schema": 1,
        "device": "rig",
        "state": "running",
        "version": "1.2.3",
        "started_at": "2026-01-31T11:00:00.500000Z",
        "model": {"name": "demo", "version": "1", "task": "detect", "state": "ready"},
        "backend": backend,
        "policy": {
            "state": "ok",
            "rung": 1,
            "models": ["demo", "small"],
            "limit_ms": 50.0,
            "p95_ms": 20.0,
            "changes_last_hour": 1,
            "detail": "",
        },
        "overrides": [],
        "degraded": ["camera.front"],
        "cameras": {"front": "backoff", 'odd "name"\n': "running"},
    }
    checks = {
        "broker": {"state": "ok", "fact": "connected", "since": "2026-01-31T11:00:01.250000Z", "age_s": 0.0},
        "model": {"state": "failed", "fact": "gone", "since": at, "age_s": 0.0},
        "camera.front": {"state": "degraded", "fact": "no result yet", "since": at, "age_s": 6.5},
    }
    camera = {
        "captured": captured,
        "inferred": captured - 7,
        "published": captured - 8,
        "drops": dict.fromkeys(DROPS, 0) | {"full": 3, "stale": 4},
        "skipped": 5,
        "waiting": 2,
        "captured_fps": 10.0,
        "inferred_fps": 9.5,
        "published_fps": 9.5,
        "capture_ms": {"p50": 3.0, "p95": 5.0, "p99": 8.0, "max": 9.0, "n": 93},
        "objects": {"person": 2, "car": 1},
        "connection": {
            "nominal_fps": None,
            "fps_last_hour": None,
            "jitter_ms": 12.5,
            "reconnects_last_hour": 1,
            "stalls_last_hour": 1,
            "reconnects": 6,
            "stalls": 7,
            "threads_left_behind": 0,
            "first_frame_ms": 250.0,
            "last_reason": None,
        },
    }
    stats = {
        "schema": 1,
        "device": "rig",
        "at": at,
        "since": at,
        "interval_s": 10.0,
        "window_s": 60.0,
        "model": "demo",
        "inference_clock": "cpu",
        "cameras": {"front": camera},
        "stages_ms": {
            "total": {"p50": 20.0, "p95": 41.5, "p99": 60.0, "max": 80.0, "n": 93},
            "queue": dict.fromkeys(("p50", "p95", "p99", "max")) | {"n": 0},
        },
        "batch_sizes": {"1": 90, "3": 1},
        "outbox": {
            "waiting": {"results": 4},
            "dropped": {"results": {"full": 9}},
            "refused": {"quota_exceeded": 1},
            "spool": {"messages": 11, "bytes": 2048, "trouble": None},
        },
        "commands": {"ok": 3, "busy": 1},
        "process": readings.process,
        "loop_lag_ms": {"p50": 0.5, "p95": 2.0, "p99": None, "max": 40.0, "n": 200},
        "host": readings.host,
        "gpus": readings.gpus,
        "board": readings.board,
        "sensor_troubles": readings.troubles,
        "log_lines_dropped": 6,
    }
    return Facts(
        msgspec.convert(status, messages.Status),
        msgspec.convert({"schema": 1, "device": "rig", "at": at, "state": "failed", "checks": checks}, messages.Health),
        msgspec.convert(stats, messages.Stats) if with_stats else None,
        {"total": histogram(*TOTALS_MS), "queue": Histogram()},
        {"front": histogram(3.0, 3.0, 9.0)},
    )


def histogram(*took_ms: float) -> Histogram:
    seen = Histogram()
    for one in took_ms:
        seen.record(one)
    return seen


@contextlib.contextmanager
def serving(known: Callable[[], Facts | None]) -> Iterator[str]:
    with exporter(PrometheusOptions(listen=str(free_port())), known) as url:
        assert url is not None
        yield url


def page(url: str) -> str:
    with urllib.request.urlopen(url, timeout=5) as answer:
        text: str = answer.read().decode()
        return text


def scraped(text: str) -> Samples:
    """Every sample by name and labels; a series that is there twice fails the test."""
    found: Samples = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            key = (sample.name, tuple(sorted(sample.labels.items())))
            assert key not in found
            found[key] = sample.value
    return found


class _Once:
    """A collector of these facts."""

    def __init__(self, known: Facts) -> None:
        self._known = known

    def collect(self) -> Any:
        return families(self._known)


def rendered(known: Facts) -> Samples:
    """The samples of a page, without a server."""
    registry = CollectorRegistry()
    registry.register(_Once(known))
    return scraped(generate_latest(registry).decode())


def labelled(found: Samples, name: str) -> dict[str, float]:
    """The samples of a metric by the value of its one label."""
    return {labels[0][1]: value for (full, labels), value in found.items() if full == f"edge_agent_{name}"}


def value(found: Samples, name: str, /, **labels: str) -> float:
    return found[f"edge_agent_{name}", tuple(sorted(labels.items()))]


@pytest.fixture(scope="module")
def found() -> Samples:
    with serving(facts) as url:
        return scraped(page(url))


def test_the_agent_says_who_it_is(found: Samples) -> None:
    assert value(found, "info", version="1.2.3", device="rig", model="demo", backend="onnx") == 1
    assert value(found, "start_time_seconds") == 1769857200.5
    assert value(found, "policy_rung") == 1


def test_health_is_a_number_for_each_check(found: Samples) -> None:
    assert value(found, "health", check="broker") == 0
    assert value(found, "health", check="camera.front") == 1
    assert value(found, "health", check="model") == 2


def test_a_check_says_since_when_and_how_old_its_fact_is(found: Samples) -> None:
    assert value(found, "health_since_seconds", check="broker") == 1769857201.25
    assert value(found, "health_fact_age_seconds", check="camera.front") == 6.5
    assert value(found, "health_time_seconds") == value(found, "stats_time_seconds") == 1769860800


def test_a_camera_is_in_one_state_of_all(found: Samples) -> None:
    states = {phase: value(found, "camera_state", camera="front", state=phase) for phase in PHASES}

    assert states == dict.fromkeys(PHASES, 0) | {"backoff": 1}
    assert value(found, "camera_state", camera='odd "name"\n', state="running") == 1


def test_units_are_seconds_bytes_and_ratios(found: Samples) -> None:
    assert value(found, "stage_latency_seconds", stage="total", quantile="0.95") == pytest.approx(0.0415)
    assert value(found, "stage_latency_seconds", stage="total", quantile="1") == pytest.approx(0.08)
    assert value(found, "camera_jitter_seconds", camera="front") == pytest.approx(0.0125)
    assert value(found, "camera_first_frame_seconds", camera="front") == pytest.approx(0.25)
    assert value(found, "process_resident_memory_bytes") == pytest.approx(128e6)
    assert value(found, "process_cpu_ratio") == pytest.approx(1.5)
    assert value(found, "loop_lag_seconds", quantile="0.95") == pytest.approx(0.002)
    assert value(found, "loop_lag_seconds", quantile="1") == pytest.approx(0.04)
    assert not [name for name, _ in found if "_ms" in name or "_mb" in name or "percent" in name]


def test_durations_are_counted_into_buckets_that_can_be_added_up(found: Samples) -> None:
    limits = [dict(labels)["le"] for name, labels in found if name == "edge_agent_stage_duration_seconds_bucket"]
    buckets = {limit: value(found, "stage_duration_seconds_bucket", stage="total", le=limit) for limit in limits}

    assert buckets == {limit: sum(took_ms / 1e3 <= float(limit) for took_ms in TOTALS_MS) for limit in limits}
    assert buckets["+Inf"] == value(found, "stage_duration_seconds_count", stage="total") == len(TOTALS_MS)
    assert value(found, "stage_duration_seconds_sum", stage="total") == pytest.approx(sum(TOTALS_MS) / 1e3)
    assert value(found, "stage_duration_seconds_count", stage="queue") == 0
    assert value(found, "camera_capture_seconds_count", camera="front") == 3
    assert value(found, "camera_capture_seconds_bucket", camera="front", le="0.005") == 2


def test_counters_have_their_labels(found: Samples) -> None:
    assert value(found, "camera_captured_frames_total", camera="front") == 100
    assert value(found, "camera_dropped_frames_total", camera="front", cause="stale") == 4
    assert value(found, "camera_dropped_frames_total", camera="front", cause="shutdown") == 0
    assert value(found, "camera_reconnects_total", camera="front") == 6
    assert value(found, "outbox_dropped_total", **{"class": "results", "cause": "full"}) == 9
    assert value(found, "outbox_refused_total", reason="quota_exceeded") == 1
    assert value(found, "camera_objects", camera="front", label="person") == 2
    assert value(found, "spool_bytes") == 2048
    assert value(found, "log_dropped_lines_total") == 6


def test_what_is_unknown_has_no_sample(found: Samples) -> None:
    names = {name for name, _ in found}

    assert "edge_agent_process_open_fds" not in names
    assert "edge_agent_camera_nominal_fps" not in names
    assert ("edge_agent_stage_latency_seconds", (("quantile", "0.5"), ("stage", "queue"))) not in found
    assert ("edge_agent_loop_lag_seconds", (("quantile", "0.99"),)) not in found


def test_the_machine_is_told_in_ratios_bytes_and_seconds(found: Samples) -> None:
    assert value(found, "host_cpu_ratio") == 0.25
    assert [value(found, "host_core_cpu_ratio", core=core) for core in "01"] == [0, 0.5]
    assert {labels for name, labels in found if name == "edge_agent_host_load"} == {
        (("minutes", "1"),),
        (("minutes", "15"),),
    }
    assert value(found, "host_load", minutes="15") == 0.25
    assert value(found, "host_memory_total_bytes") == 8e9
    assert value(found, "host_memory_available_bytes") == 6e9
    assert value(found, "host_memory_used_bytes") == 2e9
    assert value(found, "host_swap_total_bytes") == 0
    assert value(found, "host_disk_free_bytes") == 512.5e6
    assert value(found, "host_network_received_bytes_total") == 2**40
    assert value(found, "host_network_sent_bytes_total") == 7
    assert value(found, "host_uptime_seconds") == 3600.5
    assert value(found, "host_clock_synchronised") == 0
    assert value(found, "sensor_failed", sensor="nvml") == 1
    assert not {"edge_agent_host_swap_used_bytes", "edge_agent_host_disk_total_bytes"} & {name for name, _ in found}


def test_each_gpu_is_told_by_its_number_and_name(found: Samples) -> None:
    of_0 = {"gpu": "0", "name": "NVIDIA H100 80GB HBM3"}

    assert value(found, "gpu_info", **of_0, uuid="GPU-0", driver="580.159.04") == 1
    assert value(found, "gpu_utilisation_ratio", **of_0) == pytest.approx(0.37)
    assert value(found, "gpu_decoder_ratio", **of_0) == 0
    assert value(found, "gpu_memory_total_bytes", **of_0) == pytest.approx(85520.81e6)
    assert value(found, "gpu_temperature_celsius", **of_0) == 41
    assert value(found, "gpu_power_watts", **of_0) == 118.25
    assert value(found, "gpu_sm_clock_hertz", **of_0) == 1.98e9
    assert value(found, "gpu_throttle_reasons", **of_0) == 2
    assert value(found, "gpu_throttled", **of_0, reason="hw_thermal_slowdown") == 1
    assert value(found, "gpu_ecc_uncorrected_errors_total", **of_0) == 2
    assert value(found, "gpu_last_xid", **of_0) == 79
    of_1 = {name for name, labels in found if ("gpu", "1") in labels}
    assert of_1 == {"edge_agent_gpu_info", "edge_agent_gpu_throttle_reasons"}, "of this one no more is known"


@pytest.mark.parametrize("board", BOARDS)
def test_a_board_is_told_by_its_zones_and_rails(tmp_path: Path, board: str) -> None:
    with planted(tmp_path, BOARDS[board]):
        seen = JetsonSensor(tmp_path).read().board
    assert seen is not None and seen.temperatures_c and seen.rails and seen.fan_percent is not None
    found = rendered(facts(readings=Readings(process=PROCESS, board=seen)))

    named = {"model": seen.model, "l4t": seen.l4t, "jetpack": seen.jetpack, "power_mode": seen.power_mode}
    assert value(found, "board_info", **{key: text or "" for key, text in named.items()}) == 1
    assert labelled(found, "board_temperature_celsius") == seen.temperatures_c
    assert labelled(found, "board_rail_watts") == {name: rail.power_w for name, rail in seen.rails.items()}
    assert labelled(found, "board_rail_volts") == {name: rail.voltage_v for name, rail in seen.rails.items()}
    assert value(found, "board_fan_ratio") == pytest.approx(seen.fan_percent / 100)
    assert labelled(found, "board_throttled") == {text.split()[0]: 1 for text in seen.throttling or ()}
    for name, known in (("gpu_utilisation_ratio", seen.gpu_percent), ("power_watts", seen.power_w)):
        assert (f"edge_agent_board_{name}" in {name for name, _ in found}) == (known is not None)


def test_of_what_is_not_there_no_metric_is_there() -> None:
    names = {name for name, _ in rendered(facts(readings=Readings(process=ProcessReadings())))}

    machine = re.compile(r"edge_agent_(host|gpu|board|process|sensor)_")
    assert names and not [name for name in names if machine.match(name)]


def test_what_this_machine_says_of_itself_can_be_scraped() -> None:
    sensors = detect()
    try:
        sensors.read()  # shares are of the time since
        readings = sensors.read()
    finally:
        sensors.close()
    found = rendered(facts(readings=readings))

    assert readings.host is not None and readings.host.memory_total_mb is not None
    assert value(found, "host_memory_total_bytes") == readings.host.memory_total_mb * 1e6
    assert len(labelled(found, "host_core_cpu_ratio")) == len(readings.host.core_percent or ())


NUMBERS = st.floats(0, 1e12, allow_nan=False)
SHORT = st.text(max_size=8)


def some(kind: type[Any], **special: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """Readings of which anything may be absent."""
    known = {name: st.none() | special.get(name, NUMBERS) for name in kind.__struct_fields__}
    return st.builds(kind, **known)


HOSTS = some(HostReadings, core_percent=st.lists(NUMBERS, min_size=1, max_size=4), clock_synchronised=st.booleans())
REASONS = st.lists(SHORT, max_size=3)
A_GPU = some(
    GpuReadings, index=st.just(0), throttle_reasons=REASONS, **dict.fromkeys(("name", "uuid", "driver"), SHORT)
)
A_BOARD = some(
    BoardReadings,
    temperatures_c=st.dictionaries(SHORT, NUMBERS, max_size=3),
    rails=st.dictionaries(SHORT, some(RailReadings), max_size=3),
    throttling=REASONS,
    **dict.fromkeys(("model", "l4t", "jetpack", "power_mode"), SHORT),
)


@settings(max_examples=100, deadline=None)
@given(st.none() | HOSTS, st.none() | st.lists(A_GPU, max_size=3), st.none() | A_BOARD)
def test_whatever_is_known_is_there_once_and_nothing_else(
    host: HostReadings | None, gpus: list[GpuReadings] | None, board: BoardReadings | None
) -> None:
    numbered = None if gpus is None else [msgspec.structs.replace(gpu, index=n) for n, gpu in enumerate(gpus)]
    found = rendered(facts(readings=Readings(process=ProcessReadings(), host=host, gpus=numbered, board=board)))

    told = {
        part: [key for key in found if key[0].startswith(f"edge_agent_{part}_")] for part in ("host", "gpu", "board")
    }
    assert len(told["host"]) == (numbers(host) if host else 0)
    of_gpus = [numbers(gpu) + 1 + len(set(gpu.throttle_reasons or ())) for gpu in numbered or ()]  # with info
    assert len(told["gpu"]) == sum(of_gpus) - len(of_gpus)  # their index is a label
    throttled = {reason.split(" ")[0] for reason in board.throttling or ()} if board else ()
    assert len(told["board"]) == (numbers(board) + 1 + len(throttled) if board else 0)
    assert all(math.isfinite(found[key]) for keys in told.values() for key in keys)


def numbers(readings: Any) -> int:
    """How many numbers there are in readings; a list of texts is one, its length."""
    if isinstance(readings, msgspec.Struct):
        return sum(numbers(getattr(readings, name)) for name in readings.__struct_fields__)
    if isinstance(readings, dict):
        return sum(map(numbers, readings.values()))
    if isinstance(readings, list):
        return len(readings) if readings and isinstance(readings[0], float) else 1
    return int(isinstance(readings, (bool, int, float)))


def test_each_family_has_a_type_and_a_text() -> None:
    with serving(facts) as url:
        text = page(url)
    families = list(text_string_to_metric_families(text))

    assert all(family.documentation and family.type in ("gauge", "counter", "histogram") for family in families)
    assert all(family.name.startswith("edge_agent_") for family in families)
    assert all(
        sample.name.endswith("_total") for family in families if family.type == "counter" for sample in family.samples
    )


def test_a_scrape_shows_the_messages_of_that_moment_and_counters_only_grow() -> None:
    known: list[Facts | None] = [None]
    with serving(lambda: known[0]) as url:
        assert scraped(page(url)) == {}
        known[0] = facts(with_stats=False, backend=None)
        early = scraped(page(url))
        assert value(early, "info", version="1.2.3", device="rig", model="demo", backend="") == 1
        known[0] = facts(captured=100)
        before = scraped(page(url))
        known[0] = facts(captured=250)
        after = scraped(page(url))

    counters = [key for key in before if key[0].endswith("_total")]
    assert counters and all(after[key] >= before[key] for key in counters)
    assert value(after, "camera_captured_frames_total", camera="front") == 250


def test_no_address_no_exporter() -> None:
    before = threading.active_count()
    with exporter(PrometheusOptions(listen=""), facts) as url:
        assert url is None
        assert threading.active_count() == before


@pytest.mark.parametrize(
    ("listen", "expected"),
    [
        ("9464", ("127.0.0.1", 9464)),
        ("127.0.0.1:9464", ("127.0.0.1", 9464)),
        ("0.0.0.0:80", ("0.0.0.0", 80)),
        ("[::1]:9464", ("::1", 9464)),
        ("edge-1.local:65535", ("edge-1.local", 65535)),
    ],
)
def test_the_address_is_loopback_unless_another_is_given(listen: str, expected: tuple[str, int]) -> None:
    assert address(listen) == expected


@pytest.mark.parametrize(
    "listen", ["x", "127.0.0.1", ":9464", "0", "65536", "::1:9464", "[::1]", "a:b:1", "9464\n", "٣"]
)
def test_a_bad_address_is_named(listen: str) -> None:
    with pytest.raises(ConfigError, match=r"prometheus\.listen: .* write 9464, 127\.0\.0\.1:9464"):
        address(listen)


def test_a_port_that_is_taken_is_an_error_that_says_so() -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        options = PrometheusOptions(listen=str(other.getsockname()[1]))
        with pytest.raises(ConfigError, match="another program listens there; end it, or choose another port"):
            exporter(options, facts).__enter__()


def test_two_agents_do_not_share_a_port() -> None:
    options = PrometheusOptions(listen=str(free_port()))
    with exporter(options, facts), pytest.raises(ConfigError, match="another program"):
        exporter(options, facts).__enter__()


@pytest.mark.parametrize(
    ("listen", "reason"), [("192.0.2.1:9464", "no such address"), ("no.such.host.invalid:9464", "is not known here")]
)
def test_an_address_that_is_not_ours_is_an_error(listen: str, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        exporter(PrometheusOptions(listen=listen), facts).__enter__()


def test_without_the_package_the_error_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    with pytest.raises(ConfigError, match=r"prometheus\.listen needs .* pip install 'edge-agent\[prometheus\]'"):
        exporter(PrometheusOptions(listen="9464"), facts).__enter__()


def test_it_listens_on_ipv6() -> None:
    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::1", 0))
    except OSError as error:
        pytest.skip(f"no IPv6 loopback here: {error.strerror}")
    with exporter(PrometheusOptions(listen=f"[::1]:{free_port()}"), facts) as url:
        assert url is not None and url.startswith("http://[::1]:")
        assert "edge_agent_info" in page(url)


def test_closing_ends_every_thread_even_of_clients_that_say_nothing() -> None:
    before = set(threading.enumerate())
    with contextlib.ExitStack() as clients:
        with serving(facts) as url:
            port = int(url.rsplit(":", 1)[1].split("/")[0])
            for said in (b"", b"GET /metr"):
                client = clients.enter_context(socket.create_connection(("127.0.0.1", port), timeout=5))
                client.sendall(said)
            wait_until(lambda: len(set(threading.enumerate()) - before) == 3, what="both clients are served")
            assert "edge_agent_info" in page(url)
        assert set(threading.enumerate()) <= before
        with pytest.raises(OSError):
            page(url)


def test_a_crowd_of_silent_clients_takes_no_more_than_its_share_of_threads() -> None:
    before = threading.active_count()
    with contextlib.ExitStack() as clients:
        with serving(facts) as url:
            where = ("127.0.0.1", int(url.rsplit(":", 1)[1].split("/")[0]))
            for _ in range(16):
                clients.enter_context(socket.create_connection(where, timeout=5))
            wait_until(lambda: threading.active_count() - before == 17, what="a thread for each, and one for all")
            late = clients.enter_context(socket.create_connection(where, timeout=5))
            assert late.recv(1) == b"", "one more is sent away at once"
        assert threading.active_count() == before


def test_a_scrape_that_fails_is_an_error_to_who_asks_and_not_the_end(capfd: pytest.CaptureFixture[str]) -> None:
    answers: list[Any] = [ZeroDivisionError("a bug"), facts()]

    def known() -> Facts:
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer  # type: ignore[no-any-return]

    with serving(known) as url:
        with pytest.raises(urllib.error.HTTPError, match="500") as caught:
            page(url)
        caught.value.close()
        assert "edge_agent_info" in page(url)
    assert "ZeroDivisionError" in capfd.readouterr().err
