"""Starting, stopping, crashing: exit statuses and what other clients of the broker see."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import textwrap
from pathlib import Path

import psutil
import pytest

from tests.brokers import OTHERS, on_all_brokers
from tests.rigs import DEVICE, ROOT, AgentProcess, Broker, Probe, Server, config, free_port, wait_until

pytestmark = pytest.mark.slow

CAMERA = '[cameras.a]\nsource = "synthetic"\n'


def edge_agent(*arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "edge_agent", *arguments],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@on_all_brokers
def test_kill_minus_nine_shows_the_will_to_another_client(tmp_path: Path, broker: Server, probe: Probe) -> None:
    with AgentProcess(tmp_path, config(broker.port, CAMERA)) as agent:
        probe.wait("available", lambda text: text == "online")
        agent.process.kill()
        probe.wait("available", lambda text: text == "offline")
    with Probe(broker.port, f"edge/{DEVICE}/available", version=broker.version) as latecomer:
        assert latecomer.wait("available")[0].payload == b"offline"
        assert latecomer.on("available")[0].retain


@on_all_brokers
def test_sigterm_under_load_ends_in_order_and_leaves_nothing(tmp_path: Path, broker: Server, probe: Probe) -> None:
    cameras = "".join(f'[cameras.c{i}]\nsource = "synthetic"\nfps = 120\n' for i in range(4))
    with AgentProcess(tmp_path, config(broker.port, cameras)) as agent:
        probe.wait("cameras/+/results", n=200)
        children = psutil.Process(agent.process.pid).children(recursive=True)
        assert agent.stop(timeout_s=8) == 0
        assert not [child for child in children if child.is_running()]
    last = probe.wait("available", lambda text: text == "offline")[-1]
    stopping = probe.wait("status", lambda status: status["state"] == "stopping")[-1]
    assert last.at >= stopping.at
    assert "Traceback" not in agent.text()
    assert [event["event"] for event in map(json.loads, agent.text().splitlines())][-1] == "agent.stopped"


@pytest.mark.parametrize(  # RabbitMQ hands on QoS 1 before QoS 0 that came earlier
    ("broker", "qos"),
    [("mosquitto", 0), *(pytest.param(other, 1, marks=pytest.mark.soak) for other in OTHERS)],
    indirect=["broker"],
)
def test_results_of_the_last_frames_arrive_before_offline(
    tmp_path: Path, broker: Server, probe: Probe, qos: int
) -> None:
    body = f'{CAMERA}[inference]\nbackend = "fake"\n[backends.fake]\nlatency_ms = 100\n'
    with AgentProcess(tmp_path, config(broker.port, body, mqtt=f"[mqtt.qos]\nresults = {qos}")) as agent:
        probe.wait("cameras/a/results", n=3)
        assert agent.stop() == 0
    offline = probe.wait("available", lambda text: text == "offline")[0]
    results = probe.on("cameras/a/results")
    stopping = probe.wait("status", lambda status: status["state"] == "stopping")[0]
    assert [result for result in results if stopping.at < result.at < offline.at], "frames in flight were finished"
    assert results[-1].at < offline.at


def test_sigterm_with_more_waiting_than_there_is_time_for_is_still_in_order(
    tmp_path: Path, broker: Broker, probe: Probe
) -> None:
    cameras = "".join(f'[cameras.c{i}]\nsource = "synthetic"\npace = "fast"\nmax_frames = 20\n' for i in range(3))
    body = f'{cameras}[inference]\nbackend = "fake"\nmax_batch = 1\n[backends.fake]\nlatency_ms = 150\n'
    with AgentProcess(tmp_path, config(broker.port, body)) as agent:
        probe.wait("stats", lambda stats: all(camera["waiting"] == 20 for camera in stats["cameras"].values()))
        assert agent.stop(timeout_s=8) == 0
    assert "did not come back" not in agent.text()
    assert probe.wait("available", lambda text: text == "offline")


def test_sigterm_while_the_model_loads_does_not_wait_for_it(tmp_path: Path, broker: Broker, probe: Probe) -> None:
    body = f'{CAMERA}[inference]\nbackend = "fake"\n[backends.fake]\nlatency_ms = 8000\n'
    with AgentProcess(tmp_path, config(broker.port, body)) as agent:
        probe.wait("status", lambda status: status["model"]["state"] == "loading")
        assert agent.stop(timeout_s=4) == 0
        probe.wait("available", lambda text: text == "offline")
    assert not agent.events("camera.running")


def test_a_second_signal_ends_at_once(tmp_path: Path, broker: Broker, probe: Probe) -> None:
    body = f'{CAMERA}[inference]\nbackend = "tests.misbehaving:StuckEngine"\n'
    with AgentProcess(tmp_path, config(broker.port, body), environ={"PYTHONPATH": str(ROOT)}) as agent:
        wait_until(lambda: agent.events("camera.frames"))
        agent.process.send_signal(signal.SIGTERM)
        wait_until(lambda: agent.events("agent.stopping"))
        with pytest.raises(subprocess.TimeoutExpired):
            agent.process.wait(0.5)
        agent.process.send_signal(signal.SIGTERM)
        assert agent.process.wait(1.0) == 128 + signal.SIGTERM


@on_all_brokers
def test_an_engine_that_hangs_cannot_outlast_the_time_out(tmp_path: Path, broker: Server, probe: Probe) -> None:
    body = f'{CAMERA}[inference]\nbackend = "tests.misbehaving:StuckEngine"\n'
    text = config(broker.port, body).replace("[agent]\n", "[agent]\nshutdown_timeout_s = 2\n")
    with AgentProcess(tmp_path, text, environ={"PYTHONPATH": str(ROOT)}) as agent:
        wait_until(lambda: agent.events("camera.frames"))
        agent.process.send_signal(signal.SIGTERM)
        assert agent.process.wait(5.0) == 1
        probe.wait("available", lambda text: text == "offline")
    assert "error: the engine did not come back from its last batch" in agent.text()
    assert agent.text().splitlines()[-1] == "warning: left behind: engine"


@on_all_brokers
def test_an_unnamed_exception_in_a_task_exits_1_with_one_traceback(
    tmp_path: Path, broker: Server, probe: Probe
) -> None:
    body = f'{CAMERA}[inference]\nbackend = "tests.misbehaving:BuggyEngine"\n'
    with AgentProcess(tmp_path, config(broker.port, body), environ={"PYTHONPATH": str(ROOT)}) as agent:
        assert agent.process.wait(20) == 1
        probe.wait("available", lambda text: text == "offline")
    assert agent.text().count("Traceback") == 1
    assert "ZeroDivisionError: a bug" in agent.text().splitlines()


def test_an_engine_that_fails_in_use_exits_1_with_a_sentence(tmp_path: Path, broker: Broker, probe: Probe) -> None:
    body = f'{CAMERA}[inference]\nbackend = "fake"\n[backends.fake]\nfail_after = 40\n'
    with AgentProcess(tmp_path, config(broker.port, body)) as agent:
        assert agent.process.wait(20) == 1
        probe.wait("available", lambda text: text == "offline")
    assert "error: the fake engine fails after 40 batches, as told" in agent.text().splitlines()


def test_check_names_every_mistake_and_exits_78(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text(
        textwrap.dedent(
            """
            [mqtt]
            prot = 1883
            keepalive_s = "soon"
            [queue]
            drop = "drop_oldst"
            [cameras.a]
            source = "sinthetic"
            [cameras.b]
            source = "file"
            paht = "x"
            """
        )
    )
    done = edge_agent("check", "--config", "config.toml", cwd=tmp_path)
    assert done.returncode == 78
    assert "mqtt.prot: unknown key; did you mean 'port'?" in done.stderr
    assert "mqtt.keepalive_s: expected `int`, got `str`; it is 'soon'" in done.stderr
    assert "queue.drop: 'drop_oldst' is not one of drop_oldest, drop_newest, block; did you mean" in done.stderr
    assert "cameras.a.source: unknown source 'sinthetic'; did you mean 'synthetic'?" in done.stderr
    assert "cameras.b.paht: unknown key; did you mean 'path'?" in done.stderr
    assert "cameras.b: the key 'path' is missing" in done.stderr
    assert "6 problem(s)" in done.stderr


def test_check_looks_at_models_and_sources_too(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text(
        '[models.mine]\npath = "no.onnx"\n[cameras.a]\nsource = "file"\npath = "no.mp4"\n'
        '[cameras.b]\nsource = "v4l2"\ndevice = "/dev/video99"\n[cameras.c]\nsource = "rtsp"\nurl = "http://x/"\n'
    )
    done = edge_agent("check", "--config", "config.toml", cwd=tmp_path)
    assert done.returncode == 78
    assert "cameras.a: path: no.mp4: No such file or directory" in done.stderr
    assert "cameras.b: device: /dev/video99: No such file or directory" in done.stderr
    assert "cameras.c: url: not of the form rtsp://host[:port]/path" in done.stderr
    assert "models.mine: " in done.stderr
    assert "4 problem(s)" in done.stderr


def test_check_names_mistakes_of_the_file_beside_those_of_models_and_sources(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text(
        '[mqtt]\nprot = 1\n[models.mine]\npath = "no.onnx"\n[cameras.a]\nsource = "file"\npath = "no.mp4"\n'
        '[cameras.off]\nsource = "v4l2"\ndevice = "/dev/video99"\nenabled = false\n'
    )
    done = edge_agent("check", "--config", "config.toml", cwd=tmp_path)
    assert done.returncode == 78
    assert "mqtt.prot: unknown key" in done.stderr
    assert "cameras.a: path: " in done.stderr
    assert "models.mine: " in done.stderr
    assert "3 problem(s)" in done.stderr


def test_check_is_content_with_the_shipped_configuration() -> None:
    done = edge_agent("check", "--config", "config.toml")
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("what", ["a missing file", "an unknown model", "a taken port"])
def test_run_exits_78_where_the_configuration_cannot_work(tmp_path: Path, what: str) -> None:
    port = free_port()
    body = {"an unknown model": '[model]\nactive = "demo-321"\n'}.get(what, "")
    (tmp_path / "config.toml").write_text(f"[mqtt]\nembedded = true\nport = {port}\n{body}{CAMERA}")
    with socket.socket() as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        other.bind(("127.0.0.1", port))
        if what == "a taken port":
            other.listen()
        else:
            other.close()
        name = "other.toml" if what == "a missing file" else "config.toml"
        done = edge_agent("run", "--config", name, cwd=tmp_path)
    assert done.returncode == 78
    assert "Traceback" not in done.stderr
    sentence = {
        "a missing file": "cannot read other.toml: No such file or directory; give the file with --config",
        "an unknown model": "model.active: there is no model 'demo-321'; did you mean",
        "a taken port": "set `embedded = false` in [mqtt] to use it",
    }[what]
    assert sentence in done.stderr


def test_version() -> None:
    assert edge_agent("version").stdout.strip() == edge_agent("--version").stdout.strip() != ""
