"""Another model takes over while frames run."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import schemas
from tests.rigs import AgentProcess, Broker, Probe, config

pytestmark = pytest.mark.slow

CAMERA = '[cameras.a]\nsource = "synthetic"\n'


def test_activate_swaps_the_model_between_two_frames(tmp_path: Path, broker: Broker, probe: Probe) -> None:
    with AgentProcess(tmp_path, config(broker.port, CAMERA)):
        probe.wait("cameras/a/results", n=10)
        reply = probe.command("model.activate", name="demo-160")
        probe.wait("cameras/a/results", lambda result: result["model"]["name"] == "demo-160", n=10)
        status = probe.wait("status", lambda status: status["model"]["name"] == "demo-160")[0].json()
        models = probe.wait("models", lambda models: models["active"] == "demo-160")[0].json()
    assert reply["status"] == "ok"
    assert (reply["result"]["model"]["name"], reply["result"]["previous"]) == ("demo-160", "demo-320")
    assert status["model"]["state"] == "ready"
    assert [model["name"] for model in models["models"] if model["active"]] == ["demo-160"]
    results = [message.json() for message in probe.on("cameras/a/results")]
    names = [result["model"]["name"] for result in results]
    assert names == sorted(names, reverse=True), "once the new model runs, the old one is gone"
    lost = results[-1]["seq"] - results[0]["seq"] + 1 - len(results)
    assert lost <= 1, f"{lost} frames were lost in the swap"
    for message in probe.heard:
        schemas.validate(message)


def test_old_model_keeps_running_when_the_new_one_is_rejected(tmp_path: Path, broker: Broker, probe: Probe) -> None:
    (tmp_path / "broken.onnx").write_bytes(b"this is no model")
    body = CAMERA + '[models.broken]\npath = "broken.onnx"\n[models.gone]\npath = "gone.onnx"\n'
    with AgentProcess(tmp_path, config(broker.port, body)):
        probe.wait("cameras/a/results")
        broken = probe.command("model.activate", name="broken")
        gone = probe.command("model.activate", name="gone")
        unknown = probe.command("model.activate", name="demo-321")
        before = len(probe.on("cameras/a/results"))
        results = probe.wait("cameras/a/results", n=before + 10)
        status = probe.command("agent.status")["result"]
    assert (broken["status"], broken["code"]) == ("error", "model_rejected")
    assert (gone["status"], gone["code"]) == ("error", "model_not_found")
    assert unknown["code"] == "model_not_found"
    assert "did you mean 'demo-320'" in unknown["message"] or "did you mean 'demo-160'" in unknown["message"]
    assert {message.json()["model"]["name"] for message in results} == {"demo-320"}
    assert status["model"] == {"name": "demo-320", "version": "1", "task": "detect", "state": "ready", "reason": None}


def test_an_agent_whose_configured_model_fails_says_so_and_takes_another(
    tmp_path: Path, broker: Broker, probe: Probe
) -> None:
    (tmp_path / "broken.onnx").write_bytes(b"this is no model")
    body = CAMERA + '[model]\nactive = "broken"\n[models.broken]\npath = "broken.onnx"\n'
    with AgentProcess(tmp_path, config(broker.port, body)):
        probe.wait("status", lambda status: status["model"]["state"] == "failed")
        health = probe.wait("health", lambda health: health["checks"]["model"]["state"] == "failed")[0].json()
        reply = probe.command("model.activate", name="demo-160")
        probe.wait("cameras/a/results", n=3)
    assert health["state"] == "failed"
    assert "broken" in health["checks"]["model"]["fact"]
    assert reply["status"] == "ok"
