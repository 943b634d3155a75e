"""Another model takes over while frames run."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from edge_agent.models.store import ModelStore
from tests import schemas
from tests.brokers import on_all_brokers
from tests.rigs import AgentProcess, Broker, Probe, Server, config

pytestmark = pytest.mark.slow

CAMERA = '[cameras.a]\nsource = "synthetic"\n'
QUICKLY = "[model]\nprobation_frames = 10\n"


@on_all_brokers
def test_activate_swaps_the_model_between_two_frames(tmp_path: Path, broker: Server, probe: Probe) -> None:
    with AgentProcess(tmp_path, config(broker.port, CAMERA)):
        probe.wait("cameras/a/results", n=10)
        reply = probe.command("model.activate", name="demo-160")
        probe.wait("cameras/a/results", lambda result: result["model"]["name"] == "demo-160", n=10)
        status = probe.command("agent.status")["result"]
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
    rejected = status["model"].pop("rejected")
    assert (rejected["model"], rejected["code"]) == ("demo-321", "model_not_found")
    assert status["model"] == {
        "name": "demo-320",
        "version": "1",
        "task": "detect",
        "state": "ready",
        "reason": None,
        "next": None,
    }


@on_all_brokers
def test_an_agent_whose_configured_model_fails_says_so_and_takes_another(
    tmp_path: Path, broker: Server, probe: Probe
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


def test_a_restart_begins_with_what_passed_last_unless_the_configuration_says_otherwise(
    tmp_path: Path, broker: Broker, probe: Probe
) -> None:
    store = tmp_path / "state" / "edge-agent" / "models"
    (store / "uploads").mkdir(parents=True)
    shutil.copy(ModelStore({}).get("demo-160").path, store / "uploads" / "m.onnx")

    def runs_after_start(body: str) -> str:
        seen = len(probe.on("cameras/a/results"))
        with AgentProcess(tmp_path, config(broker.port, CAMERA + body)):
            result = probe.wait("cameras/a/results", n=seen + 3)[-1].json()["model"]
        return f"{result['name']}@{result['version']}"

    with AgentProcess(tmp_path, config(broker.port, CAMERA + QUICKLY)):
        probe.wait("cameras/a/results")
        for version in ("1", "2"):
            entry = {"options": {"top_k": 100 * int(version)}}
            assert probe.command("model.register", file="m.onnx", name="mine", entry=entry)["status"] == "ok"
            assert probe.command("model.activate", name="mine")["result"]["id"] == f"mine@{version}"
        in_use = probe.command("model.remove", name="mine@1")
        assert (in_use["code"], "fallback" in in_use["message"]) == ("model_in_use", True)
    assert runs_after_start("") == "mine@2"
    (store / "mine" / "2" / "model.onnx").write_bytes(b"spoilt")
    assert runs_after_start("") == "mine@1"
    assert runs_after_start('[model]\nactive = "demo-160"\n').startswith("demo-160")
    (store / "registry.json").write_text("{ spoilt")
    (store / "registry.json.bak").write_text("{ spoilt")
    assert runs_after_start("").startswith("demo-320"), "what ran last is not known any more"
    assert {entry.id for entry in ModelStore({}, store).registry().models} >= {"mine@1", "mine@2"}


@on_all_brokers
def test_the_store_is_kept_by_command_and_jobs_tell_how_it_goes(tmp_path: Path, broker: Server, probe: Probe) -> None:
    store = tmp_path / "state" / "edge-agent" / "models"
    (store / "uploads").mkdir(parents=True)
    shutil.copy(ModelStore({}).get("demo-seg").path, store / "uploads" / "regions.onnx")
    with AgentProcess(tmp_path, config(broker.port, CAMERA + QUICKLY)):
        probe.wait("cameras/a/results")
        registered = probe.command("model.register", file="regions.onnx", name="regions", version="2026-11")
        outside = probe.command("model.register", file="../registry.json", name="regions")
        index = probe.wait("models", lambda models: any(m["name"] == "regions" for m in models["models"]))[0].json()
        activated = probe.command("model.activate", name="regions@2026-11")
        shown = probe.command("model.show", name="regions")["result"]
        in_use = probe.command("model.remove", name="regions")
        probe.command("model.activate", name="demo-320")
        probe.command("model.activate", name="demo-160")
        sound = probe.command("model.verify")["result"]
        (store / "regions" / "2026-11" / "model.onnx").write_bytes(b"")
        spoilt = probe.command("model.verify", name="regions")["result"]
        removed = probe.command("model.remove", name="regions")
        tidied = probe.command("model.gc")
        told = probe.wait("models", lambda models: all(m["name"] != "regions" for m in models["models"]))
        private = probe.command("model.fetch", name="x", url="https://127.0.0.1/x.onnx", sha256="0" * 64)
        unsure = probe.command("model.fetch", name="x", url="https://example.com/x.onnx")
    assert registered["result"]["task"] == "segment"
    assert registered["result"]["inputs"][0]["dtype"] == "float32"
    assert outside["code"] == "model_not_found"
    [entry] = [model for model in index["models"] if model["name"] == "regions"]
    assert (entry["id"], entry["origin"], entry["active"]) == ("regions@2026-11", "registered", False)
    assert activated["result"]["measured"]["latency_ms"]["p95"] > 0
    assert shown["measured"] == [activated["result"]["measured"]]
    assert in_use["code"] == "model_in_use"
    assert sound["sound"]
    assert not spoilt["sound"]
    assert removed["result"] == {"removed": "regions@2026-11"}
    assert not (store / "regions").exists()
    assert tidied["status"] == "ok"
    assert told
    assert private["code"] == "fetch_forbidden"
    assert (unsure["code"], "sha256" in unsure["message"]) == ("fetch_forbidden", True)
    jobs = [message.json() for message in probe.on("jobs/+")]
    phases = [job["phase"] for job in jobs if job["id"] == activated["id"]]
    order = ["begun", "verify", "admit", "load", "warm up", "measure", "measure"]
    assert phases == [phase for phase in order if phase in phases][-len(phases) :], "the latest, in order"
    assert [job["state"] for job in jobs if job["id"] == activated["id"]][-1] == "done"
    for message in probe.heard:
        schemas.validate(message)
