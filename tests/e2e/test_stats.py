"""Statistics of a running agent, beside what a client counts and times itself."""

from __future__ import annotations

import re
import urllib.request
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from edge_agent.sources.world import World
from edge_agent.stats import STAGES
from tests import schemas
from tests.rigs import AgentProcess, Broker, Probe, config, free_port, wait_until

pytestmark = pytest.mark.slow

FRAMES = 90


def film(path: Path) -> None:
    world = World(width=640, height=480, seed=31, objects=5)
    video = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"MJPG"), 30, (640, 480))
    frame = np.empty((480, 640, 3), np.uint8)
    for index in range(FRAMES):
        world.draw(index, frame)
        video.write(frame)
    video.release()


def stats_now(probe: Probe) -> dict[str, Any]:
    reply = probe.command("stats.get")
    assert reply["status"] == "ok", reply
    stats: dict[str, Any] = reply["result"]
    return stats


def scraped(port: int) -> dict[str, float]:
    """Samples by name and labels, as they are written."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as answer:
        lines = [line for line in answer.read().decode().splitlines() if not line.startswith("#")]
    return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines)}


def test_statistics_are_what_a_client_makes_of_the_results(tmp_path: Path, broker: Broker, probe: Probe) -> None:
    pytest.importorskip("prometheus_client", reason="not installed: pip install 'edge-agent[prometheus]'")
    film(tmp_path / "world.avi")
    port = free_port()
    body = f"""
[prometheus]
listen = "{port}"
[inference]
backend = "onnx"
max_batch = 4
[cameras.film]
source = "file"
path = "world.avi"
pace = "fast"
"""
    with AgentProcess(tmp_path, config(broker.port, body)):
        probe.wait("stats", lambda stats: stats["cameras"]["film"]["published"] == FRAMES, timeout_s=60)
        schemas.validate(probe.wait("stats")[-1])
        stats, metrics = stats_now(probe), scraped(port)
        results = [message.json() for message in probe.wait("cameras/film/results", n=FRAMES)]

    stages = stats["stages_ms"]
    assert tuple(stages) == STAGES
    assert {stage: told["n"] for stage, told in stages.items()} == dict.fromkeys(STAGES, FRAMES)
    for stage in ("queue", "inference", "postprocess", "total"):
        took_ms = [result["latency_ms"][stage] for result in results]
        expected = np.percentile(took_ms, (50, 95, 99), method="inverted_cdf")
        found = np.array([stages[stage][p] for p in ("p50", "p95", "p99")])
        assert (np.abs(found - expected) <= 0.01 * expected + 0.002).all(), (stage, found, expected)  # both are rounded
        assert stages[stage]["max"] == pytest.approx(max(took_ms), abs=0.002), stage
    for stage, told in stages.items():
        assert 0 < told["p50"] <= told["p95"] <= told["p99"] <= told["max"], stage
    assert stats["cameras"]["film"]["capture_ms"] == stages["capture"]
    assert sum(int(size) * count for size, count in stats["batch_sizes"].items()) == FRAMES
    assert {int(size) for size in stats["batch_sizes"]} <= {1, 2, 3, 4}
    assert (stats["inference_clock"], stats["window_s"], stats["log_lines_dropped"]) == ("cpu", 60.0, 0)

    name = "edge_agent_stage_duration_seconds"
    totals_s = np.array([result["latency_ms"]["total"] for result in results]) / 1e3
    assert metrics[f'{name}_count{{stage="total"}}'] == FRAMES
    assert metrics[f'{name}_sum{{stage="total"}}'] == pytest.approx(totals_s.sum(), rel=1e-3)
    for limit_s in (0.01, 0.05, 0.25, 1.0, 10.0):
        counted = metrics[f'{name}_bucket{{le="{limit_s}",stage="total"}}']
        assert (totals_s * 1.011 <= limit_s).sum() <= counted <= (totals_s * 0.989 <= limit_s).sum()
    assert metrics['edge_agent_camera_capture_seconds_count{camera="film"}'] == FRAMES


def test_the_machine_is_in_statistics_and_metrics_as_its_kernel_tells_it(
    tmp_path: Path, broker: Broker, probe: Probe
) -> None:
    pytest.importorskip("prometheus_client", reason="not installed: pip install 'edge-agent[prometheus]'")
    port = free_port()
    body = f'[prometheus]\nlisten = "{port}"\n[cameras.a]\nsource = "synthetic"\n'
    with AgentProcess(tmp_path, config(broker.port, body)):
        told = probe.wait("stats", lambda stats: stats["host"] is not None and stats["loop_lag_ms"]["n"] > 0)[-1].json()
        health = probe.wait("health", lambda health: health["checks"]["memory"]["fact"] != "not read yet")[-1].json()
        metrics = scraped(port)

    host, lag = told["host"], told["loop_lag_ms"]
    total_mb = int(re.findall(r"MemTotal: +(\d+) kB", Path("/proc/meminfo").read_text())[0]) * 1024 / 1e6
    assert host["memory_total_mb"] == pytest.approx(total_mb, abs=0.1)
    assert 0 < host["memory_used_mb"] < total_mb and host["uptime_s"] > 0
    assert 0 < lag["p50"] <= lag["p95"] <= lag["p99"] <= lag["max"]
    assert told["process"]["threads"] > 1 and told["process"]["rss_mb"] > 20
    assert told["sensor_troubles"] == {}
    assert metrics["edge_agent_host_memory_total_bytes"] == host["memory_total_mb"] * 1e6
    assert metrics["edge_agent_log_dropped_lines_total"] == 0
    assert {name for name in metrics if name.startswith("edge_agent_loop_lag_seconds")} == {
        f'edge_agent_loop_lag_seconds{{quantile="{quantile}"}}' for quantile in ("0.5", "0.95", "0.99", "1")
    }
    synchronised = host["clock_synchronised"]
    if synchronised is not None:
        assert metrics["edge_agent_host_clock_synchronised"] == synchronised
        assert health["checks"]["clock"]["state"] == ("ok" if synchronised else "degraded")
        assert metrics['edge_agent_health{check="clock"}'] == (0 if synchronised else 1)
    for check in health["checks"]:
        assert f'edge_agent_health_since_seconds{{check="{check}"}}' in metrics


def test_without_a_model_nobody_times_inference(tmp_path: Path, broker: Broker, probe: Probe) -> None:
    with AgentProcess(tmp_path, config(broker.port, '[cameras.a]\nsource = "synthetic"')):
        probe.wait("cameras/a/results")
        assert stats_now(probe)["inference_clock"] == "cpu"
        assert probe.command("model.deactivate")["status"] == "ok"
        stats = stats_now(probe)
    assert (stats["model"], stats["inference_clock"]) == (None, None)


def test_the_rate_of_published_results_is_told_beside_the_others(tmp_path: Path, broker: Broker, probe: Probe) -> None:
    body = '[inference]\nbackend = "fake"\nmax_results_per_s = 4\n[cameras.a]\nsource = "synthetic"\nfps = 40\n'
    with AgentProcess(tmp_path, config(broker.port, body)):
        [stats, *_] = probe.wait(
            "stats",
            lambda stats: 0 < stats["cameras"]["a"]["published_fps"] < stats["cameras"]["a"]["inferred_fps"] / 3,
        )
        told = stats.json()
        results = len(probe.on("cameras/a/results"))
    assert 0 < told["cameras"]["a"]["published"] <= results
    assert told["stages_ms"]["encode"]["n"] < told["stages_ms"]["inference"]["n"]


def test_all_that_is_counted_is_counted_since_the_last_reset(tmp_path: Path) -> None:
    body = '[inference]\nbackend = "fake"\n[cameras.a]\nsource = "synthetic"\nfps = 30\n'
    broker = Broker(tmp_path)
    with AgentProcess(tmp_path, config(broker.port, body, mqtt="max_queued_results = 5")) as agent:
        wait_until(lambda: makes_results(agent), timeout_s=60)
        with broker, Probe(broker.port) as probe:
            before = probe.wait(
                "stats", lambda stats: stats["outbox"]["dropped"].get("results", {}).get("away", 0) > 0, timeout_s=90
            )[-1].json()
            assert probe.command("model.activate", name="nope")["code"] == "model_not_found"
            assert stats_now(probe)["commands"]["model_not_found"] == 1
            assert probe.command("camera.disable", camera="a")["status"] == "ok"
            wait_until(lambda: is_at_rest(stats_now(probe)), what="what was captured is inferred, and sent")
            assert probe.command("stats.reset")["status"] == "ok"
            after = stats_now(probe)
            assert stats_now(probe)["commands"]["ok"] == after["commands"]["ok"] + 1

    assert after["since"] > before["since"]
    assert after["commands"] == {name: int(name == "ok") for name in after["commands"]}, "the reset's own reply"
    dropped = after["outbox"]["dropped"]
    assert dropped["results"]["away"] == 0 and {count for causes in dropped.values() for count in causes.values()} == {
        0
    }
    camera = after["cameras"]["a"]
    counted = {name: camera[name] for name in ("captured", "inferred", "published", "skipped")}
    assert counted == dict.fromkeys(counted, 0)
    assert set(camera["drops"].values()) == {0}
    assert [camera["connection"][name] for name in ("reconnects", "stalls", "threads_left_behind")] == [0, 0, 0]
    assert {told["n"] for told in after["stages_ms"].values()} == {0}
    assert after["batch_sizes"] == {}


def makes_results(agent: AgentProcess) -> bool:
    """Whether its log says so: there may be no broker yet."""
    return any(one["inferred_fps"] > 0 for one in agent.events("camera.frames"))


def is_at_rest(stats: dict[str, Any]) -> bool:
    camera = stats["cameras"]["a"]
    is_inferred = camera["captured"] == camera["inferred"] + sum(camera["drops"].values())
    return is_inferred and not stats["outbox"]["waiting"]["results"]
