"""What the line costs: CPU a frame and memory beside a bare loop in the same run, and frames a second at most.

`python benchmarks/line.py [--repeats N] [--model ONNX --head dense|yolox --video FILE]`. Needs a mosquitto.
The agent and the loop run in turn, each in a fresh process; ratios are of medians. The agent's figures
include capture, queue, inference, JSON and its side of MQTT; broker and subscriber are other processes.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import psutil

from edge_agent.models.store import ModelStore
from edge_agent.sources.world import World
from tests.rigs import AgentProcess, Broker, Probe, Server, config, need_program, wait_until

HERE = Path(__file__).parent
WARM_UP = 30
BARS = {"cpu": 1.15, "rss_mb": 300.0, "fps": 500.0}


def film(path: Path, *, frames: int) -> Path:
    """The synthetic world at 1280x720 as Motion-JPEG, which every OpenCV can write."""
    world = World(width=1280, height=720, seed=11)
    video = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"MJPG"), 30, (1280, 720))
    frame = np.empty((720, 1280, 3), np.uint8)
    for index in range(frames):
        world.draw(index, frame)
        video.write(frame)
    video.release()
    return path


def bare_loop(video: Path, model: Path, head: str, threads: int) -> dict[str, Any]:
    command = [sys.executable, str(HERE / "bare_loop.py"), str(video), str(model), head, str(threads)]
    answer: dict[str, Any] = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
    return answer


def agent(folder: Path, broker: Server, video: Path, model: Path, head: str, threads: int) -> dict[str, Any]:
    labels = 'labels = "coco80"' if head == "yolox" else ""
    body = f"""
[model]
active = "bench"
[models.bench]
path = "{model.resolve()}"
options = {{ head = "{head}" }}
{labels}
[inference]
backend = "onnx"
max_batch = 1
[backends.onnx]
threads = {threads}
[cameras.film]
source = "file"
path = "{video.resolve()}"
pace = "fast"
"""
    with Probe(broker.port, "edge/rig/#") as probe, AgentProcess(folder, config(broker.port, body)) as running:
        process = psutil.Process(running.process.pid)
        start = probe.wait("cameras/film/results", lambda result: result["seq"] >= WARM_UP, timeout_s=60)[0]
        before, seq = _cpu_s(process), probe.on("cameras/film/results")[-1].json()["seq"]
        began = time.perf_counter()
        probe.wait("cameras/film/status", lambda status: status["reason"] == "end_of_stream", timeout_s=300)
        last = probe.on("cameras/film/results")[-1].json()["seq"]
        cpu_s, elapsed_s = _cpu_s(process) - before, time.perf_counter() - began
        rss_mb = process.memory_info().rss / 1e6
    assert start is not None
    results = [message.json() for message in probe.on("cameras/film/results")]
    frames = last - seq
    return {
        "frames": frames,
        "cpu_ms": cpu_s / frames * 1e3,
        "fps": frames / elapsed_s,
        "rss_mb": rss_mb,
        "boxes": sum(len(result["detections"]) for result in results),
    }


def saturation(folder: Path, broker: Server, *, cameras: int, seconds: float) -> dict[str, float]:
    """Frames a second, end to end, with the fake engine and synthetic 640x480 frames as fast as they are taken."""
    tables = "".join(f'[cameras.c{i}]\nsource = "synthetic"\npace = "fast"\nseed = {i}\n' for i in range(cameras))
    body = f'[inference]\nbackend = "fake"\n{tables}'
    heard = folder / "heard"  # one byte and a line's end for each result, as mosquitto's own client received it
    subscribe = [need_program("mosquitto_sub", "mosquitto-clients"), "-p", str(broker.port), "-F", "."]
    with AgentProcess(folder, config(broker.port, body)) as running, heard.open("wb") as out:
        listener = subprocess.Popen([*subscribe, "-t", "edge/rig/cameras/+/results"], stdout=out)
        try:
            wait_until(lambda: heard.stat().st_size > 400, what="results arrive")
            process = psutil.Process(running.process.pid)
            began, count, cpu = time.perf_counter(), heard.stat().st_size, _cpu_s(process)
            time.sleep(seconds)
            elapsed, done = time.perf_counter() - began, (heard.stat().st_size - count) / 2
            return {"fps": done / elapsed, "cpu_ms": (_cpu_s(process) - cpu) / done * 1e3}
        finally:
            listener.kill()
            listener.wait()


def _cpu_s(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


def _line(name: str, runs: list[dict[str, Any]]) -> dict[str, float]:
    middle = {key: statistics.median(run[key] for run in runs) for key in ("cpu_ms", "fps", "rss_mb")}
    spread = max(run["cpu_ms"] for run in runs) - min(run["cpu_ms"] for run in runs)
    print(
        f"{name:10} {middle['cpu_ms']:8.2f} ms CPU a frame (spread {spread:.2f})  "
        f"{middle['fps']:7.1f} frames/s  {middle['rss_mb']:6.0f} MB  boxes {runs[0]['boxes']}"
    )
    return middle


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--frames", type=int, default=400)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--model", type=Path, default=ModelStore({}).get("demo-320").path)
    parser.add_argument("--head", choices=("dense", "yolox"), default="dense")
    parser.add_argument("--video", type=Path)
    options = parser.parse_args()
    machine = f"{platform.machine()}, {psutil.cpu_count()} cores"
    print(f"{machine}, Python {platform.python_version()}, OpenCV {cv2.__version__}")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        video = options.video or film(folder / "film.avi", frames=options.frames)
        loops, agents = [], []
        for _ in range(options.repeats):
            loops.append(bare_loop(video, options.model, options.head, options.threads))
            with Broker(folder) as broker:
                agents.append(agent(folder, broker, video, options.model, options.head, options.threads))
        with Broker(folder) as broker:
            fastest = saturation(folder, broker, cameras=1, seconds=5.0)
    print(f"{options.model.name} on {video.name}, {options.threads} thread(s), {options.repeats} runs each")
    loop, ours = _line("bare loop", loops), _line("agent", agents)
    ratio = ours["cpu_ms"] / loop["cpu_ms"]
    print(f"CPU ratio  {ratio:.3f} (bar {BARS['cpu']})   memory {ours['rss_mb']:.0f} MB (bar {BARS['rss_mb']:.0f})")
    print(
        f"fake engine, synthetic 640x480: {fastest['fps']:.0f} frames/s end to end (bar {BARS['fps']:.0f}), "
        f"{fastest['cpu_ms']:.2f} ms CPU a frame, drawing included"
    )
    missed = ratio > BARS["cpu"] or ours["rss_mb"] > BARS["rss_mb"] or fastest["fps"] < BARS["fps"]
    sys.exit(int(missed))


if __name__ == "__main__":
    main()
