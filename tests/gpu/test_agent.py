"""The whole agent on the GPU, and a fault that takes the GPU from it."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from edge_agent.backends.tensorrt import TensorRtOptions
from edge_agent.config import ModelOptions
from edge_agent.models.engines import Engines
from edge_agent.models.store import StoredModel
from tests.gpu.conftest import INFERENCE, KEPT
from tests.rigs import ROOT, Probe, free_port, wait_until

ZOO = ROOT / "edge_agent" / "models" / "zoo"
BODY = """
[agent]
device = "rig"
[mqtt]
embedded = true
port = {port}
[model]
active = "{name}"
[models.{name}]
path = "{model}"
family = "{family}"
[inference]
max_batch = 4
[backends.tensorrt]
engines = "{engines}"
optimization_level = 0
tactic_sources = {sources}
[cameras.a]
source = "synthetic"
[cameras.b]
source = "synthetic"
width = 1280
height = 720
seed = 4
[snapshots]
on_start = false
[stats]
interval_s = 0.5
[logging]
format = "json"
"""


def start(
    folder: Path, options: TensorRtOptions, *, family: str = "auto", engines: Path = KEPT, model: str = "demo-320"
) -> tuple[subprocess.Popen[str], int]:
    port, onnx = free_port(), ZOO / f"{model}.onnx"
    sources = json.dumps(options.tactic_sources)
    text = BODY.format(port=port, name=model, model=onnx, family=family, engines=engines, sources=sources)
    (folder / "config.toml").write_text(text)
    command = [sys.executable, "-m", "edge_agent", "run", "--config", str(folder / "config.toml")]
    agent = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return agent, port


def connected(port: int) -> Probe:
    until = time.monotonic() + 30
    while True:
        try:
            return Probe(port, version=4)
        except (OSError, AssertionError):
            if time.monotonic() > until:
                raise
            time.sleep(0.1)


def test_the_agent_runs_on_the_gpu_from_camera_to_mqtt(plans: Any, options: TensorRtOptions, tmp_path: Path) -> None:
    agent, port = start(tmp_path, options)
    try:
        with connected(port) as probe:
            for camera in ("a", "b"):
                probe.wait(f"cameras/{camera}/results", n=60, timeout_s=60)
            status = probe.wait("status", lambda value: value["backend"] == "tensorrt")[-1]
            health = probe.wait("health", lambda value: value["checks"]["engine"]["state"] == "ok")[-1]
            result = probe.on("cameras/a/results")[-1].json()
            print(json.dumps(result))
        assert result["latency_ms"]["inference"] > 0
        assert status.json()["model"]["state"] == "ready"
        assert health.json()["checks"]["engine"]["fact"] == "tensorrt"
    finally:
        agent.terminate()
        output = agent.communicate(timeout=20)[0]
        print(output[-3000:])
    assert agent.returncode == 0


def test_a_kernel_that_faults_ends_the_process_with_its_own_status_and_last_words(
    plans: Any, options: TensorRtOptions, tmp_path: Path
) -> None:
    family = "tests.gpu.faulty:FaultyFamily"
    entry = ModelOptions(path=str(ZOO / "demo-320.onnx"), family=family)
    Engines(options).get(StoredModel("demo-320", "config", entry, None), INFERENCE)  # the CPU would count pictures too
    agent, port = start(tmp_path, options, family=family)
    try:
        with connected(port) as probe:
            probe.wait("cameras/a/results", n=5, timeout_s=60)
            output = agent.communicate(timeout=60)[0]
            ended = time.monotonic()
            told = [message for message in probe.heard if message.topic.endswith("/available")]
    finally:
        agent.kill()
    print(output[-3000:])
    assert agent.returncode == 75
    assert "CUDA_ERROR_ILLEGAL_ADDRESS (700)" in output
    assert told[-1].payload == b"offline"
    fault = next(json.loads(line) for line in output.splitlines() if '"gpu.fault_planted"' in line)
    print(f"ended {ended - fault['monotonic_s']:.2f} s after the fault")
    assert ended - fault["monotonic_s"] < 1.5


def test_a_fault_is_named_by_cuda_itself(plans: Any, tmp_path: Path, options: TensorRtOptions) -> None:
    code = (
        "from tests.gpu.faulty import fault\n"
        "from edge_agent.errors import GpuLost\n"
        "from edge_agent import cuda\n"
        "gpu = cuda.open_gpu()\n"
        "try:\n    fault(); gpu.synchronize()\n"
        "except GpuLost as error:\n    print(error)\n"
        "try:\n    cuda.DeviceMemory(10)\n"
        "except GpuLost as error:\n    print('still', error.number)\n"
        "from pathlib import Path\n"
        "from edge_agent.backends.tensorrt import TensorRtEngine, TensorRtOptions\n"
        f"try:\n    TensorRtEngine(Path({str(plans['demo-160'])!r}), TensorRtOptions())\n"
        "except GpuLost as error:\n    print('nor by TensorRT', error.number)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert "cuCtxSynchronize: CUDA_ERROR_ILLEGAL_ADDRESS (700): an illegal memory access" in done.stdout, done
    assert "still 700" in done.stdout
    assert "nor by TensorRT 700" in done.stdout


def test_while_an_engine_is_built_the_cpu_runs_the_model(options: TensorRtOptions, tmp_path: Path) -> None:
    agent, port = start(tmp_path, options, engines=tmp_path / "engines", model="demo-160")
    try:
        with connected(port) as probe:
            probe.wait("cameras/a/results", n=20)
            first = probe.wait("status", lambda value: value["backend"] == "onnx")[-1].json()
            assert "engine" in first["degraded"], first
            probe.wait("status", lambda value: "demo-160: building" in (value["model"]["reason"] or ""), timeout_s=60)
            probe.wait("status", lambda value: value["backend"] == "tensorrt", timeout_s=120)
            probe.wait("health", lambda value: value["checks"]["engine"]["fact"] == "tensorrt")
            before = len(probe.on("cameras/a/results"))
            probe.wait("cameras/a/results", n=before + 30)
            numbers = [message.json()["seq"] for message in probe.on("cameras/a/results")]
        assert numbers == list(range(numbers[0], numbers[0] + len(numbers)))  # no frame was lost to the change
    finally:
        agent.terminate()
        print(agent.communicate(timeout=20)[0][-3000:])
    assert agent.returncode == 0


def test_a_build_is_given_up_when_the_agent_is_stopped(options: TensorRtOptions, tmp_path: Path) -> None:
    agent, port = start(tmp_path, options, engines=tmp_path / "engines", model="demo-160")
    try:
        with connected(port) as probe:
            probe.wait("cameras/a/results", n=20)
            [builder] = wait_until(lambda: _children(agent.pid), what="a build begins")
            agent.terminate()
            output = agent.communicate(timeout=20)[0]
    finally:
        agent.kill()
    assert agent.returncode == 0, output
    assert "left behind" not in output
    assert not Path(f"/proc/{builder}").exists()
    assert not list((tmp_path / "engines").rglob(".building-*"))


def _children(pid: int) -> list[str]:
    return " ".join(path.read_text() for path in Path(f"/proc/{pid}/task").glob("*/children")).split()
