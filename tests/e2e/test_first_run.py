"""What a newcomer does: the shipped configuration, the embedded broker, edgectl."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import cv2
import paho.mqtt.client as paho
import pytest

from tests.rigs import DEVICE, ROOT, AgentProcess, Probe, free_port, wait_until


def shipped(port: int) -> str:
    text = (ROOT / "config.toml").read_text()
    return text.replace("port = 1883 ", f"port = {port} ").replace('# device = "line-3-front"', f'device = "{DEVICE}"')


@pytest.fixture
def agent(tmp_path: Path) -> Iterator[AgentProcess]:
    port = free_port()
    with AgentProcess(tmp_path, shipped(port)) as agent:
        agent.port = port  # type: ignore[attr-defined]
        wait_until(lambda: agent.events("agent.running"))
        yield agent


def edgectl(agent: AgentProcess, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", "from edgectl.app import main; main()", *arguments, "--config", str(agent.config)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.mark.alone  # the rate is the camera's
def test_the_shipped_configuration_sees_and_tells_within_seconds(agent: AgentProcess, tmp_path: Path) -> None:
    [written] = wait_until(lambda: agent.events("snapshot.written"))
    [frames, *_] = wait_until(lambda: agent.events("camera.frames"))
    [look] = agent.events("agent.look")
    assert Path(written["path"]) == tmp_path / "snapshots" / "demo.jpg"
    assert cv2.imread(written["path"]).shape == (480, 640, 3)
    assert written["detections"] > 0
    assert frames["captured_fps"] == pytest.approx(30, abs=3)
    assert look["raw_messages"].startswith("mosquitto_sub -h 127.0.0.1 -p ")
    with Probe(agent.port, version=paho.MQTTv311) as probe:  # type: ignore[attr-defined]
        result = probe.wait("cameras/demo/results", lambda result: result["detections"])[0].json()
    assert result["model"] == {"name": "demo-320", "version": "1", "task": "detect"}
    assert agent.stop() == 0
    assert "Traceback" not in agent.text()


def test_edgectl_cmd_prints_replies_and_refusals(agent: AgentProcess) -> None:
    done = edgectl(agent, "cmd", "model.activate", "name=demo-160")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["model"]["name"] == "demo-160"
    refused = edgectl(agent, "cmd", "model.activate", "name=demo-161")
    assert refused.returncode == 1
    assert refused.stderr.startswith("error: model_not_found: there is no model 'demo-161'; did you mean")
    silent = edgectl(agent, "cmd", "agent.info", "--device", "nobody", "--timeout", "0.5")
    assert (silent.returncode, silent.stderr) == (1, "error: nobody did not answer within 0.5 s; is it online?\n")


@pytest.mark.alone  # that too
def test_edgectl_watch_shows_the_running_camera(agent: AgentProcess) -> None:
    wait_until(lambda: agent.events("snapshot.written"))
    done = edgectl(agent, "watch", "--for", "3")
    assert done.returncode == 0, done.stderr
    assert DEVICE in done.stdout
    assert "online" in done.stdout
    assert "running" in done.stdout
    [row] = [line for line in done.stdout.splitlines() if "demo" in line and "running" in line and "│" in line][-1:]
    fps = float(row.split("│")[3])
    assert fps == pytest.approx(30, abs=4)


def test_edgectl_doctor_tells_what_is_there(agent: AgentProcess) -> None:
    done = edgectl(agent, "doctor")
    assert done.returncode == 0, done.stdout
    assert "onnxruntime" in done.stdout
    assert f"127.0.0.1:{agent.port} accepts connections" in done.stdout  # type: ignore[attr-defined]


def test_edgectl_says_in_a_sentence_that_there_is_no_broker(tmp_path: Path) -> None:
    config = tmp_path / "config.toml"
    config.write_text(f'[mqtt]\nport = {free_port()}\n[cameras.a]\nsource = "synthetic"\n')
    run = [sys.executable, "-c", "from edgectl.app import main; main()"]
    done = subprocess.run([*run, "watch", "--config", config], capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("error: no broker at 127.0.0.1:")
    assert "Traceback" not in done.stderr
    doctor = subprocess.run(
        [*run, "doctor", "--config", config], capture_output=True, text=True, timeout=30, check=False
    )
    assert doctor.returncode == 1
    assert "start the broker, or correct host and port in [mqtt]" in doctor.stdout
