"""The CPU takes over where the GPU cannot be used, and says why, once."""

from __future__ import annotations

from pathlib import Path

import pytest

from edge_agent import backends
from tests.rigs import ROOT, AgentProcess, Broker, Probe, config

pytestmark = pytest.mark.slow

CAMERA = '[cameras.a]\nsource = "synthetic"\n'


@pytest.fixture(autouse=True)
def no_gpu() -> None:
    if backends.nvidia_devices():
        pytest.skip("there is an NVIDIA GPU here")


def test_a_machine_without_a_gpu_runs_on_the_cpu_as_a_matter_of_course(
    tmp_path: Path, broker: Broker, probe: Probe
) -> None:
    with AgentProcess(tmp_path, config(broker.port, CAMERA)) as agent:
        probe.wait("cameras/a/results", n=3)
        health = probe.wait("health", lambda value: value["checks"]["engine"]["fact"] == "onnx")[-1].json()
        assert health["checks"]["engine"]["state"] == "ok"
        [running] = agent.events("agent.running")
    assert running["backend"] == "onnx"
    assert running["because"].startswith("no NVIDIA GPU here (")
    assert not agent.events("engine.fallback")


def test_a_gpu_that_was_asked_for_and_is_not_there_shows_in_health(
    tmp_path: Path, broker: Broker, probe: Probe
) -> None:
    body = f'{CAMERA}[inference]\nbackend = "tensorrt"\n'
    with AgentProcess(tmp_path, config(broker.port, body)) as agent:
        probe.wait("cameras/a/results", n=40)
        health = probe.wait("health", lambda value: value["checks"]["model"]["state"] == "ok")[-1].json()
        status = probe.on("status")[-1].json()
    assert health["checks"]["engine"]["state"] == "degraded"
    assert health["checks"]["engine"]["fact"].startswith("tensorrt cannot be used: ")
    assert status["backend"] == "onnx"
    assert "engine" in status["degraded"]
    [told] = agent.events("engine.fallback")
    assert told["reason"] == health["checks"]["engine"]["fact"]


def test_without_a_fallback_it_does_not_start_and_says_what_to_do(tmp_path: Path, broker: Broker) -> None:
    body = f'{CAMERA}[inference]\nbackend = "tensorrt"\nfallback = ""\n'
    with AgentProcess(tmp_path, config(broker.port, body)) as agent:
        assert agent.process.wait(20) == 78
    assert 'or let the CPU take over: inference.fallback = "onnx"' in agent.text()


def test_an_engine_that_cannot_be_had_leaves_the_model_to_the_fallback(
    tmp_path: Path, broker: Broker, probe: Probe
) -> None:
    body = f'{CAMERA}[inference]\nbackend = "tests.misbehaving:UnbuildableEngine"\n'
    with AgentProcess(tmp_path, config(broker.port, body), environ={"PYTHONPATH": str(ROOT)}) as agent:
        probe.wait("cameras/a/results", n=5)
        health = probe.wait("health", lambda value: value["checks"]["engine"]["state"] == "degraded")[-1].json()
        reply = probe.command("model.activate", name="demo-160")
        probe.wait("cameras/a/results", n=10)
    assert health["checks"]["engine"]["fact"] == "demo-320: no engine can be made of it, as told"
    assert len(agent.events("engine.fallback")) == 1
    assert reply["status"] == "error"
    assert reply["code"] == "model_rejected"


def test_a_gpu_that_is_lost_while_a_model_loads_ends_the_process_too(
    tmp_path: Path, broker: Broker, probe: Probe
) -> None:
    body = f'{CAMERA}[inference]\nbackend = "tests.misbehaving:LostAtOnceEngine"\nfallback = ""\n'
    with AgentProcess(tmp_path, config(broker.port, body), environ={"PYTHONPATH": str(ROOT)}) as agent:
        assert agent.process.wait(20) == 75
    assert agent.text().splitlines()[-1].startswith("error: the GPU is lost to this process: ")


def test_an_engine_whose_gpu_is_lost_ends_the_process_with_its_own_status(
    tmp_path: Path, broker: Broker, probe: Probe
) -> None:
    """By a fake; `tests/gpu` does it with a kernel that faults."""
    body = f'{CAMERA}[inference]\nbackend = "tests.misbehaving:LostEngine"\n'
    with AgentProcess(tmp_path, config(broker.port, body), environ={"PYTHONPATH": str(ROOT)}) as agent:
        assert agent.process.wait(20) == 75
        probe.wait("available", lambda text: text == "offline")
    results = [message.json()["seq"] for message in probe.on("cameras/a/results")]
    assert results == list(range(9))  # all that was inferred reached the broker; it was lost with the tenth batch
    last = agent.text().splitlines()[-1]
    assert last == "error: the GPU is lost to this process: fake: CUDA_ERROR_ILLEGAL_ADDRESS (700): as told"
