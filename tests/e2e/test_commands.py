"""Commands: what they do to a running agent, what survives a restart, and who may send them."""

from __future__ import annotations

import base64
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from edge_agent.models.store import ModelStore
from tests import schemas
from tests.brokers import on_all_brokers
from tests.rigs import DEVICE, AgentProcess, Broker, Probe, Server, config, wait_until

pytestmark = [pytest.mark.slow, pytest.mark.soak]

CAMERA = '[cameras.a]\nsource = "synthetic"\nfps = 20.0\n'
HOME = "[homeassistant]\nenabled = true\n"
QUICKLY = "[model]\nprobation_frames = 10\n"


@pytest.fixture(scope="module")
def module_broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Broker]:
    with Broker(tmp_path_factory.mktemp("broker")) as broker:
        yield broker


@pytest.fixture(scope="module")
def agent(tmp_path_factory: pytest.TempPathFactory, module_broker: Broker) -> Iterator[AgentProcess]:
    with AgentProcess(tmp_path_factory.mktemp("agent"), config(module_broker.port, CAMERA)) as agent:
        wait_until(lambda: agent.events("agent.running"))
        yield agent


def model_of(probe: Probe) -> Any:
    return probe.command("agent.status")["result"]["model"]["name"]


@on_all_brokers
def test_every_command_is_described_with_a_schema_that_its_arguments_fit(
    tmp_path: Path, broker: Server, probe: Probe
) -> None:
    with AgentProcess(tmp_path, config(broker.port, CAMERA)):
        probe.wait("cameras/a/results")
        described = probe.command("commands.list")["result"]["commands"]
        info = probe.command("agent.info")["result"]
    assert set(described) == set(info["commands"])
    for name in ("model.activate", "camera.add", "inference.set", "policy.set", "job.cancel", "agent.reload"):
        assert described[name]["description"]
    for one in described.values():
        jsonschema.Draft202012Validator.check_schema(one["arguments"])
    jsonschema.validate({"name": "demo-160", "swap": "replace"}, described["model.activate"]["arguments"])
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({"name": 3}, described["model.activate"]["arguments"])
    for message in probe.heard:
        schemas.validate(message)


@on_all_brokers
def test_cameras_come_change_and_go_and_that_survives_a_restart(tmp_path: Path, broker: Server, probe: Probe) -> None:
    text = config(broker.port, CAMERA)
    options = {"source": "synthetic", "fps": 30.0, "seed": 3}
    with AgentProcess(tmp_path, text):
        probe.wait("cameras/a/results")
        added = probe.command("camera.add", camera="b", options=options)
        again = probe.command("camera.add", camera="b", options=options)
        wrong = probe.command("camera.add", camera="c", options={"source": "synthetic", "fsp": 1})
        probe.wait("cameras/b/results", n=5)
        changed = probe.command("camera.set", camera="b", options={"width": 320, "height": 240})
        probe.wait("cameras/b/results", lambda result: result["width"] == 320)
        disabled = probe.command("camera.disable", camera="a")
        probe.wait("cameras/a/status", lambda status: status["state"] == "disabled")
        listed = probe.command("camera.list")["result"]["cameras"]
        unknown = probe.command("camera.remove", camera="bb")
    assert added["result"] == {"changed": ["cameras"], "cameras": ["b"], "needs_restart": []}
    assert (again["code"], wrong["code"], unknown["code"]) == ("bad_arguments", "bad_arguments", "not_found")
    assert "cameras.c.fsp: unknown key; did you mean 'fps'?" in wrong["message"]
    assert changed["status"] == disabled["status"] == "ok"
    assert {name: camera["enabled"] for name, camera in listed.items()} == {"a": False, "b": True}
    seen = len(probe.heard)
    with AgentProcess(tmp_path, text):
        wait_until(lambda: any(m.topic.endswith("b/results") for m in probe.heard[seen:]), timeout_s=20)
        status = probe.command("agent.status")["result"]
        removed = probe.command("camera.remove", camera="b")
        gone = [m for m in probe.wait("cameras/b/status", lambda text: text == "") if m.payload == b""]
        probe.command("camera.enable", camera="a")
        probe.wait("cameras/a/results", lambda result: result["width"] == 640)
        reset = probe.command("agent.reset_overrides")
        after = probe.command("agent.status")["result"]
    assert set(status["overrides"]) >= {"cameras.b.width", "cameras.a.enabled"}
    assert status["cameras"]["a"] == "disabled"
    assert removed["result"]["cameras"] == ["b"]
    assert gone
    assert reset["status"] == "ok"
    assert after["overrides"] == []
    assert (tmp_path / "state" / "edge-agent" / f"changes-{DEVICE}.json").stat().st_mode & 0o777 == 0o600


def test_inference_is_tuned_at_run_time(tmp_path: Path, broker: Broker, probe: Probe) -> None:
    with AgentProcess(tmp_path, config(broker.port, CAMERA + QUICKLY)):
        probe.wait("cameras/a/results", n=5)
        slower = probe.command("inference.set", max_results_per_s=4)
        seen = len(probe.on("cameras/a/results"))
        began = time.monotonic()
        probe.wait("cameras/a/results", n=seen + 8)
        rate = 8 / (time.monotonic() - began)
        probe.command("inference.set", max_results_per_s=0, classes=["square"])
        seen = len(probe.on("cameras/a/results"))
        some = [message.json() for message in probe.wait("cameras/a/results", n=seen + 20)[seen + 2 :]]
        none = probe.command("inference.set", score_threshold=0.999, classes=[])
        seen = len(probe.on("cameras/a/results"))
        sure = [message.json() for message in probe.wait("cameras/a/results", n=seen + 10)[seen + 1 :]]
        wrong = probe.command("inference.set", score_threshold=7)
        nonsense = probe.command("inference.set", scores=1)
    assert slower["result"]["changed"] == ["inference"]
    assert 2.5 < rate < 6
    assert {one["label"] for result in some for one in result["detections"]} == {"square"}
    assert none["result"]["needs_restart"] == []
    assert all(one["score"] >= 0.999 for result in sure for one in result["detections"])
    assert (wrong["code"], nonsense["code"]) == ("bad_arguments", "bad_arguments")
    assert "inference.score_threshold" in wrong["message"]


@on_all_brokers
def test_policy_statistics_and_logs(tmp_path: Path, broker: Server, probe: Probe) -> None:
    with AgentProcess(tmp_path, config(broker.port, CAMERA)) as agent:
        probe.wait("cameras/a/results", n=5)
        off = probe.command("agent.status")["result"]["policy"]
        probe.command("policy.set", enabled=True, max_latency_ms=1000, ladder=["demo-160"])
        on = probe.wait("status", lambda status: status["policy"]["state"] == "ok")[-1].json()["policy"]
        before = probe.command("stats.get")["result"]
        probe.command("stats.reset")
        after = probe.command("stats.get")["result"]
        quiet = probe.command("agent.log_level", level="error")
        told = len(agent.text())
        probe.command("model.show", name="nobody")
        assert len(agent.text()) == told
    assert (off["state"], on["models"], on["limit_ms"]) == ("off", ["demo-320", "demo-160"], 1000)
    assert before["cameras"]["a"]["inferred"] >= 5
    assert after["cameras"]["a"]["inferred"] < before["cameras"]["a"]["inferred"]
    assert after["since"] > before["since"]
    assert quiet["result"]["changed"] == ["logging"]


@on_all_brokers
def test_the_file_is_read_again_by_command_and_by_signal(tmp_path: Path, broker: Server, probe: Probe) -> None:
    with AgentProcess(tmp_path, config(broker.port, CAMERA)) as agent:
        probe.wait("cameras/a/results", n=3)
        agent.config.write_text(config(broker.port, CAMERA + '[cameras.b]\nsource = "synthetic"\n'))
        reloaded = probe.command("agent.reload")
        probe.wait("cameras/b/results", n=3)
        agent.config.write_text(config(broker.port, CAMERA + "[queue]\nmax_frames = 9\n"))
        agent.process.send_signal(1)
        wait_until(lambda: agent.events("agent.reloaded"))
        [event] = agent.events("agent.reloaded")
        agent.config.write_text("[cameras\n")
        broken = probe.command("agent.reload")
        assert probe.command("agent.info")["result"]["cameras"] == ["a"]
    assert reloaded["result"]["cameras"] == ["b"]
    assert (event["cameras"], event["needs_restart"]) == (["b"], ["queue"])
    assert (broken["code"], "not valid TOML" in broken["message"]) == ("bad_arguments", True)


@on_all_brokers
def test_a_restart_by_command_is_the_same_process_with_new_settings(
    tmp_path: Path, broker: Server, probe: Probe
) -> None:
    with AgentProcess(tmp_path, config(broker.port, CAMERA)) as agent:
        first = probe.wait("status", lambda status: status["state"] == "running")[-1].json()["started_at"]
        agent.config.write_text(config(broker.port, CAMERA + '[model]\nactive = "demo-160"\n'))
        reply = probe.command("agent.restart")
        probe.wait("status", lambda status: status["state"] == "running" and status["started_at"] != first)
        probe.wait("cameras/a/results", lambda result: result["model"]["name"] == "demo-160")
        assert agent.process.poll() is None
        assert agent.stop() == 0
    assert reply["status"] == "ok"
    told = [message.payload for message in probe.on("available")]
    assert told == [b"online", b"offline", b"online", b"offline"]


@on_all_brokers
def test_a_command_is_not_done_again_after_a_restart(tmp_path: Path, broker: Server, probe: Probe) -> None:
    text = config(broker.port, CAMERA + QUICKLY)
    command = json.dumps({"id": "once", "command": "model.activate", "args": {"name": "demo-160"}})
    is_last = lambda reply: reply["status"] != "accepted"  # noqa: E731
    with AgentProcess(tmp_path, text):
        probe.wait("cameras/a/results")
        probe.publish(f"edge/{DEVICE}/cmd", command)
        first = probe.wait("reply/once", is_last)[0].payload
        probe.command("model.activate", name="demo-cls")
        probe.publish(
            f"edge/{DEVICE}/cmd", json.dumps({"id": "cut", "command": "model.activate", "args": {"name": "demo-seg"}})
        )
        probe.wait("reply/cut")
    with AgentProcess(tmp_path, text) as agent:
        wait_until(lambda: agent.events("agent.running"))
        probe.publish(f"edge/{DEVICE}/cmd", command)
        assert probe.wait("reply/once", is_last, n=2)[-1].payload == first
        assert not [event for event in agent.events("model.activated") if event["model"] == "demo-160"]
        agent.process.kill()
        agent.process.wait()


@on_all_brokers
def test_a_command_that_a_kill_cut_short_is_answered_so(tmp_path: Path, broker: Server, probe: Probe) -> None:
    text = config(broker.port, CAMERA + "[model]\nprobation_s = 60.0\nprobation_frames = 100000\n")
    command = json.dumps({"id": "cut", "command": "model.activate", "args": {"name": "demo-160"}})
    with AgentProcess(tmp_path, text) as agent:
        probe.wait("cameras/a/results")
        probe.publish(f"edge/{DEVICE}/cmd", command)
        probe.wait("status", lambda status: status["model"]["state"] == "probation")
        agent.process.kill()
        agent.process.wait()
    seen = len(probe.on("cameras/a/results"))
    with AgentProcess(tmp_path, text):
        results = probe.wait("cameras/a/results", n=seen + 3)
        probe.publish(f"edge/{DEVICE}/cmd", command)
        reply = probe.wait("reply/cut", lambda reply: reply["status"] == "error")[0].json()
    assert reply["code"] == "interrupted"
    assert results[-1].json()["model"]["name"] == "demo-320", "a probation that was cut short was not passed"


@on_all_brokers
def test_jobs_are_listed_and_cancelled(tmp_path: Path, broker: Server, probe: Probe) -> None:
    with AgentProcess(tmp_path, config(broker.port, CAMERA)):
        probe.wait("cameras/a/results")
        probe.publish(
            f"edge/{DEVICE}/cmd",
            json.dumps({"id": "long", "command": "model.benchmark", "args": {"name": "demo-160", "seconds": 3}}),
        )
        probe.wait("jobs/long", lambda job: job["phase"] == "benchmark")
        listed = probe.command("job.list")["result"]["jobs"]
        cancelled = probe.command("job.cancel", id="long")
        unknown = probe.command("job.cancel", id="lnog")
        done = probe.wait("reply/long", lambda reply: reply["status"] != "accepted", timeout_s=30)[0].json()
    assert [(job["id"], job["phase"], job["state"]) for job in listed] == [("long", "benchmark", "running")]
    assert cancelled["result"] == {"id": "long", "command": "model.benchmark"}
    assert unknown["code"] == "not_found"
    assert done["status"] == "ok" or done["code"] == "cancelled"


@on_all_brokers
def test_a_benchmark_is_kept_and_a_rollback_goes_to_the_model_before(
    tmp_path: Path, broker: Server, probe: Probe
) -> None:
    with AgentProcess(tmp_path, config(broker.port, CAMERA + QUICKLY)):
        probe.wait("cameras/a/results")
        measured = probe.command("model.benchmark", name="demo-cls", inferences=50)
        shown = probe.command("model.show", name="demo-cls")["result"]
        nothing = probe.command("model.rollback")
        probe.command("model.activate", name="demo-160")
        probe.command("model.activate", name="demo-seg")
        back = probe.command("model.rollback")
        unbuilt = probe.command("model.build", name="demo-160")
        gone = probe.command("model.deactivate")
        idle = probe.command("agent.status")["result"]["model"]
        probe.command("model.activate", name="demo-320")
        assert model_of(probe) == "demo-320"
    assert measured["result"]["latency_ms"]["n"] == 50
    assert shown["measured"][0] == measured["result"]
    assert nothing["code"] == "model_not_found"
    assert (back["result"]["id"], back["result"]["previous"]) == ("demo-160", "demo-seg")
    assert "nothing is built for it here" in unbuilt["message"]
    assert gone["result"] == {"previous": "demo-160"}
    assert (idle["name"], idle["reason"]) == (None, "no model is active: it was deactivated")


@on_all_brokers
def test_many_agents_are_reached_at_once_and_each_says_who_it_is(tmp_path: Path, broker: Server, probe: Probe) -> None:
    mqtt = 'groups = ["north"]'
    with AgentProcess(tmp_path, config(broker.port, CAMERA, mqtt=mqtt)):
        probe.wait("cameras/a/results")
        for topic, key in (
            ("edge/all/cmd", "all"),
            ("edge/group/north/cmd", "north"),
            ("edge/group/south/cmd", "south"),
        ):
            probe.publish(topic, json.dumps({"id": key, "command": "agent.info"}))
        later = json.dumps({"id": "later", "command": "agent.info", "spread_s": 0.5})
        probe.publish("edge/all/cmd", later)
        other = json.dumps({"id": "other", "command": "agent.info", "device": "somebody-else"})
        probe.publish(f"edge/{DEVICE}/cmd", other)
        replies = [probe.wait(f"reply/{key}")[0].json() for key in ("all", "north", "later", "other")]
        assert not probe.on("reply/south")
    assert [reply["device"] for reply in replies] == [DEVICE] * 4
    assert [reply["status"] for reply in replies] == ["ok", "ok", "ok", "error"]


@on_all_brokers
def test_switched_off_commands_are_refused(tmp_path: Path, broker: Server, probe: Probe) -> None:
    mqtt = 'disabled_commands = ["model.fetch", "camera.*"]'
    with AgentProcess(tmp_path, config(broker.port, CAMERA, mqtt=mqtt)):
        probe.wait("cameras/a/results")
        refused = [
            probe.command("model.fetch", name="yolox-nano"),
            probe.command("camera.remove", camera="a"),
            probe.command("camera.list"),
        ]
        allowed = probe.command("model.list")
    assert [reply["code"] for reply in refused] == ["forbidden"] * 3
    assert allowed["status"] == "ok"


@on_all_brokers
def test_where_a_key_is_configured_only_its_owner_commands(tmp_path: Path, broker: Server, probe: Probe) -> None:
    pytest.importorskip("cryptography", reason="not installed: pip install 'edge-agent[signed]'")
    key, public = tmp_path / "operator.key", tmp_path / "operator.pem"
    subprocess.run(["openssl", "genpkey", "-algorithm", "ed25519", "-out", key], check=True, capture_output=True)
    subprocess.run(["openssl", "pkey", "-in", key, "-pubout", "-out", public], check=True, capture_output=True)

    def signed(command: dict[str, Any], *, spoilt: bool = False) -> str:
        text = json.dumps(command)
        (tmp_path / "text").write_text(text)
        done = subprocess.run(
            ["openssl", "pkeyutl", "-sign", "-inkey", key, "-rawin", "-in", tmp_path / "text"],
            check=True,
            capture_output=True,
        )
        text = text.replace("demo-160", "demo-seg") if spoilt else text
        return json.dumps({"signed": text, "signature": base64.b64encode(done.stdout).decode()})

    soon = (datetime.now(timezone.utc) + timedelta(minutes=5)).isoformat()
    good = {"id": "good", "command": "model.show", "args": {"name": "demo-160"}, "device": DEVICE, "expires_at": soon}
    attempts = {
        "plain": json.dumps({**good, "id": "plain"}),
        "spoilt": signed({**good, "id": "spoilt"}, spoilt=True),
        "anybody": signed({**{k: v for k, v in good.items() if k != "device"}, "id": "anybody"}),
        "others": signed({**{k: v for k, v in good.items() if k != "device"}, "id": "others", "group": "south"}),
        "everybody": signed({**{k: v for k, v in good.items() if k != "device"}, "id": "everybody", "group": "all"}),
        "forever": signed({**{k: v for k, v in good.items() if k != "expires_at"}, "id": "forever"}),
        "good": signed(good),
    }
    mqtt = f'command_public_key_file = "{public}"'
    with AgentProcess(tmp_path, config(broker.port, CAMERA, mqtt=mqtt)):
        probe.wait("cameras/a/results")
        for payload in attempts.values():
            probe.publish(f"edge/{DEVICE}/cmd", payload)
        replies = {name: probe.wait(f"reply/{name}")[0].json() for name in attempts}
        work = {"name": "demo-160", "seconds": 1.5, "inferences": 100_000}
        long = signed({**good, "id": "long", "command": "model.benchmark", "args": work})
        probe.publish(f"edge/{DEVICE}/cmd", long)
        probe.wait("reply/long", lambda reply: reply["status"] == "accepted")
        probe.publish(f"edge/{DEVICE}/cmd", json.dumps({"id": "long", "command": "agent.info"}))
        probe.wait("reply/long", lambda reply: reply.get("code") == "unsigned")
        done = probe.wait("reply/long", lambda reply: reply["status"] == "ok")[0].payload
        probe.publish(f"edge/{DEVICE}/cmd", long)
        again = probe.wait("reply/long", lambda reply: reply["status"] == "ok", n=2)[-1].payload
        edgectl = [sys.executable, "-c", "from edgectl.app import main; main()", "cmd", "agent.info"]
        with_key = subprocess.run([*edgectl, "--key", key], cwd=tmp_path, capture_output=True, text=True, check=False)
        without = subprocess.run(edgectl, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert again == done, "whoever takes its id does not take its reply"
    assert json.loads(with_key.stdout)["device"] == DEVICE
    assert (without.returncode, "unsigned" in without.stderr) == (1, True)
    assert {name: reply.get("code", "ok") for name, reply in replies.items()} == {
        "plain": "unsigned",
        "spoilt": "unsigned",
        "anybody": "unsigned",
        "others": "bad_arguments",
        "everybody": "ok",
        "forever": "unsigned",
        "good": "ok",
    }


@on_all_brokers
def test_a_snapshot_is_made_as_small_as_it_must_be(tmp_path: Path, broker: Server, probe: Probe) -> None:
    with AgentProcess(tmp_path, config(broker.port, CAMERA)):
        probe.wait("cameras/a/results")
        whole = probe.command("camera.snapshot", camera="a")["result"]
        small = probe.command("camera.snapshot", camera="a", max_kb=8, annotated=False)["result"]
        pictures = probe.wait("cameras/a/snapshot", n=2)
    assert (whole["width"], whole["height"]) == (640, 480)
    assert small["bytes"] <= 8000
    assert small["width"] < 640
    assert [len(picture.payload) for picture in pictures] == [whole["bytes"], small["bytes"]]


@pytest.mark.parametrize(
    ("command", "arguments"),
    [
        (
            "camera.add",
            {"camera": "x", "options": {"source": "rtsp", "url": "rtsp://x/", "password_file": "/etc/shadow"}},
        ),
        ("camera.add", {"camera": "x", "options": {"source": "rtsp", "url": "rtsp://x/${HOME}"}}),
        ("camera.add", {"camera": "x", "options": {"source": "gstreamer", "pipeline": "filesrc ! fakesink"}}),
        ("camera.add", {"camera": "x", "options": {"source": "tests.misbehaving:StuckSource"}}),
        ("camera.set", {"camera": "a", "options": {"path": "/etc/passwd"}}),
        ("model.activate", {"name": "demo-160", "backend": "antigravity:Engine"}),
        (
            "model.fetch",
            {"name": "m", "url": "https://x/", "sha256": "0" * 64, "entry": {"family": "antigravity:Family"}},
        ),
    ],
)
def test_a_command_reads_no_file_and_runs_no_program_of_the_sender_s_choice(
    agent: AgentProcess, module_broker: Broker, command: str, arguments: dict[str, Any]
) -> None:
    with Probe(module_broker.port) as probe:
        assert probe.command(command, **arguments)["code"] == "forbidden"


@on_all_brokers
def test_home_assistant_is_told_what_there_is_and_what_is_gone(tmp_path: Path, broker: Server, probe: Probe) -> None:
    topic = f"homeassistant/device/edge_{DEVICE}/config"

    def told() -> list[dict[str, Any]]:
        return [json.loads(one.payload) for one in list(probe.heard) if one.topic == topic and one.payload]

    body = CAMERA + '[cameras.b]\nsource = "synthetic"\n[homeassistant]\nenabled = true\n'
    with AgentProcess(tmp_path, config(broker.port, body)) as agent:
        wait_until(lambda: told() and "camera_b_connection" in json.dumps(told()[-1]))
        models = wait_until(lambda: [one for one in told() if "demo-160" in json.dumps(one)])[-1]
        count = len(told())
        probe.publish("homeassistant/status", "online")
        wait_until(lambda: len(told()) > count)
        probe.command("camera.remove", camera="b")
        gone = wait_until(lambda: [one for one in told() if {"p": "binary_sensor"} in one["cmps"].values()])[-1]
        [select] = [one for one in models["cmps"].values() if one["p"] == "select"]
        command = select["command_template"]
        agent.config.write_text(agent.config.read_text().replace("enabled = true", "enabled = false"))
        assert probe.command("agent.reload")["status"] == "ok"
        wait_until(lambda: [one for one in probe.heard if one.topic == topic][-1].payload == b"")
    assert select["options"] >= ["demo-160"]
    assert "model.activate" in command
    assert all("unique_id" in one for one in gone["cmps"].values() if len(one) > 1)


@on_all_brokers
def test_home_assistant_is_told_of_what_went_while_the_agent_was_away(
    tmp_path: Path, broker: Server, probe: Probe
) -> None:
    shutil.copy(ModelStore({}).get("demo-160").path, tmp_path / "spare.onnx")
    extra = '[cameras.b]\nsource = "synthetic"\n[models.spare]\npath = "spare.onnx"\n'

    def told() -> list[dict[str, Any]]:
        payloads = [one for one in list(probe.heard) if one.topic == f"homeassistant/device/edge_{DEVICE}/config"]
        return [one.json()["cmps"] for one in payloads]

    with AgentProcess(tmp_path, config(broker.port, f"{HOME}{CAMERA}{extra}")):
        wait_until(lambda: told() and "camera_b_fps" in told()[-1], what="the camera is announced")
        assert "spare" in told()[-1]["model"]["options"]
    count = len(told())
    with AgentProcess(tmp_path, config(broker.port, HOME + CAMERA)) as agent:
        wait_until(lambda: told()[count:], what="the device is announced again")
        wait_until(lambda: agent.events("agent.running"))
        assert probe.command("camera.disable", camera="a")["status"] == "ok"
    again = told()[count:]
    assert again[0]["camera_b_fps"] == {"p": "sensor"}
    assert {len(part) for name, part in again[0].items() if name.startswith("camera_b_")} == {1}
    assert all(len(cmps["model"]) > 1 and len(cmps["camera_a_fps"]) > 1 for cmps in again), "what stays is not removed"
    assert {"demo-160", "spare"} & set(again[-1]["model"]["options"]) == {"demo-160"}


@on_all_brokers
def test_a_device_that_is_no_longer_announced_goes_though_that_was_changed_while_the_agent_was_away(
    tmp_path: Path, broker: Server, probe: Probe
) -> None:
    def started(homeassistant: str) -> AgentProcess:
        return AgentProcess(tmp_path, config(broker.port, f"{CAMERA}[homeassistant]\n{homeassistant}\n"))

    def told(prefix: str) -> list[bytes]:
        topic = f"{prefix}/device/edge_{DEVICE}/config"
        return [one.payload for one in list(probe.heard) if one.topic == topic]

    with started("enabled = true"):
        wait_until(lambda: told("homeassistant"))
    with started('enabled = true\nprefix = "elsewhere"') as agent:
        wait_until(lambda: told("homeassistant")[-1] == b"" and told("elsewhere"), what="the device has moved")
        agent.process.kill()
        agent.process.wait()
    with started("enabled = false"):  # the kill left both to be seen to
        wait_until(lambda: told("elsewhere")[-1] == b"" and told("homeassistant")[-2:] == [b"", b""])
        assert probe.command("agent.info")["status"] == "ok"  # by then it has heard that too
    said = told("homeassistant") + told("elsewhere")
    with started("enabled = false"):
        probe.wait("available", lambda text: text == "online", n=4)
        assert probe.command("agent.info")["status"] == "ok"
    assert told("homeassistant") + told("elsewhere") == said, "it is not told for ever"
