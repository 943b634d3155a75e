"""Engines change under load: nothing is lost, nothing is mixed up, and the GPU gets its memory back."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

from edge_agent import cuda
from edge_agent.backends.tensorrt import TensorRtOptions
from edge_agent.config import ModelOptions
from edge_agent.models.engines import Engines
from edge_agent.models.store import ModelStore, StoredModel
from tests.gpu.conftest import INFERENCE, KEPT
from tests.gpu.test_agent import connected
from tests.rigs import ROOT, AgentProcess, free_port

KINDS = {"demo-320": "detections", "demo-160": "detections", "demo-seg": "segmentation"}
SWAPS = 60
CAMERAS = "abcd"
BODY = """
[agent]
device = "rig"
[mqtt]
embedded = true
port = {port}
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


def test_swaps_of_engines_lose_no_frame_and_give_the_gpu_its_memory_back(
    options: TensorRtOptions, gpu: cuda.Gpu, tmp_path: Path
) -> None:
    for name in KINDS:
        path = ModelStore({}).get(name).path
        Engines(options).get(StoredModel(name, "bundled", ModelOptions(path=str(path)), None), INFERENCE)
    port = free_port()
    text = BODY.format(port=port, engines=KEPT, sources=json.dumps(options.tactic_sources))
    text += "".join(
        f'[cameras.{name}]\nsource = "synthetic"\nfps = 15.0\nseed = {i}\n' for i, name in enumerate(CAMERAS)
    )
    swapped: list[dict[str, Any]] = []
    used_mb: list[float] = []
    with AgentProcess(tmp_path, text, environ={"PYTHONPATH": str(ROOT)}) as agent, connected(port) as probe:
        for name in CAMERAS:
            probe.wait(f"cameras/{name}/results", n=10, timeout_s=60)
        for model in itertools.islice(itertools.cycle(["demo-160", "demo-seg", "demo-320"]), SWAPS):
            reply = probe.command("model.activate", name=model, timeout_s=60)
            assert reply["status"] == "ok", reply
            swapped.append(reply["result"])
            free, total = gpu.memory()
            used_mb.append((total - free) / 1e6)
        stats = probe.wait("stats", n=len(probe.on("stats")) + 2)[-1].json()
        results = {name: [message.json() for message in probe.on(f"cameras/{name}/results")] for name in CAMERAS}
        assert agent.stop(timeout_s=20) == 0
    for name in CAMERAS:
        seqs = [result["seq"] for result in results[name]]
        assert seqs == sorted(set(seqs))
        dropped = stats["cameras"][name]["drops"]
        assert seqs[-1] - seqs[0] + 1 - len(seqs) <= sum(dropped.values())
        assert {cause for cause, count in dropped.items() if count} <= {"full", "stale"}
        for result in results[name]:
            given = {kind for kind in ("detections", "segmentation") if kind in result}
            assert given == {KINDS[result["model"]["name"]]}
    taken = [result["measured"]["memory_mb"] for result in swapped]
    step_mb = max(one["gpu_after"] - one["gpu_before"] for one in taken)
    round_mb = used_mb[2::3]  # each time the same model runs
    swap_ms = sorted(result["swap_ms"] for result in swapped)
    print(
        f"{SWAPS} swaps: swap_ms median {swap_ms[len(swap_ms) // 2]:.1f}, most {swap_ms[-1]:.1f}; "
        f"GPU memory with demo-320 {round_mb[0]:.0f} -> {round_mb[-1]:.0f} MB, most {max(round_mb):.0f}; "
        f"a model takes {step_mb:.0f} MB at most"
    )
    assert step_mb > 0
    assert max(round_mb) <= round_mb[0] + step_mb
