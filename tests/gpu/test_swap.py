"""Engines change under load: nothing is lost, nothing is mixed up, and the GPU gets its memory back."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from edge_agent import cuda
from edge_agent.backends.tensorrt import TensorRtOptions
from edge_agent.config import ModelOptions
from edge_agent.models.engines import Engines
from edge_agent.models.store import ModelStore, StoredModel
from tests.gpu.conftest import INFERENCE, KEPT
from tests.gpu.test_agent import connected
from tests.rigs import ROOT, Server, free_port
from tests.swapping import CAMERA_TABLES, Swaps, Watched

KINDS = {"demo-160": "detections", "demo-seg": "segmentation", "demo-320": "detections"}
SWAPS = 200
BROKER = """
import asyncio, sys
from edge_agent.broker import embedded_broker

async def serve():
    async with embedded_broker("127.0.0.1", int(sys.argv[1])):
        await asyncio.Event().wait()

asyncio.run(serve())
"""
BODY = """
[agent]
device = "rig"
[mqtt]
port = {port}
protocol = "3.1.1"
max_queued_results = 100000
[model]
probation_frames = 20
[inference]
max_batch = 4
[backends.tensorrt]
engines = "{engines}"
optimization_level = 0
agreement = 0.9
tactic_sources = {sources}
[snapshots]
on_start = false
[stats]
interval_s = 0.5
[logging]
format = "json"
"""


def test_200_swaps_of_engines_lose_no_frame_and_give_the_gpu_its_memory_back(
    options: TensorRtOptions, gpu: cuda.Gpu, tmp_path: Path
) -> None:
    for name in KINDS:
        path = ModelStore({}).get(name).path
        Engines(options).get(StoredModel(name, "bundled", ModelOptions(path=str(path)), None), INFERENCE)
    port = free_port()
    # In a process of its own, as everywhere but in a first run: it would take half of the agent's turns in Python.
    broker = Server([sys.executable, "-c", BROKER, str(port)], port=port, plain_port=port, log=tmp_path / "broker.log")
    text = BODY.format(port=port, engines=KEPT, sources=json.dumps(options.tactic_sources)) + CAMERA_TABLES
    python_path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    swaps = Swaps(KINDS)
    used_mb: list[float] = []

    def look() -> None:
        free, total = gpu.memory()
        used_mb.append((total - free) / 1e6)

    with (
        broker,
        Watched(tmp_path, text, environ={"PYTHONPATH": python_path}) as agent,
        connected(port) as probe,
    ):
        swaps.make(agent, probe, tuple(KINDS), SWAPS, after=look)
        swaps.gather(probe)
        assert agent.stop(timeout_s=20) == 0
    told = swaps.check(tmp_path / "lags.json")
    taken = [reply["measured"]["memory_mb"] for reply in swaps]
    step_mb = max(one["gpu_after"] - one["gpu_before"] for one in taken)
    round_mb = used_mb[2::3]  # each time the same model runs
    swap_ms = sorted(reply["swap_ms"] for reply in swaps)
    print(
        f"{told}; swap_ms median {swap_ms[len(swap_ms) // 2]:.1f}, most {swap_ms[-1]:.1f}; "
        f"GPU memory with demo-320 {round_mb[0]:.0f} -> {round_mb[-1]:.0f} MB, most {max(round_mb):.0f}; "
        f"a model takes {step_mb:.0f} MB at most"
    )
    assert step_mb > 0
    assert max(round_mb) <= round_mb[0] + step_mb
