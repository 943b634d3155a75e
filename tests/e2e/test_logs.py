"""The real agent while nobody reads its output, and while its configuration changes under it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import structlog

from edge_agent.backends import Ticket
from edge_agent.backends.fake import FakeEngine
from edge_agent.data import Image
from tests.rigs import ROOT, AgentProcess, Broker, Probe, config, wait_until

pytestmark = pytest.mark.slow

CAMERA = '[cameras.a]\nsource = "synthetic"\n'


class ChattyEngine(FakeEngine):
    """An engine from outside the tree that tells 50 kB about each batch."""

    def submit(self, images: Sequence[Image]) -> Ticket:
        for _ in range(50):
            structlog.get_logger().debug("engine.chatter", text="x" * 1000)
        return super().submit(images)


@contextmanager
def piped_agent(
    folder: Path, text: str, *, is_stderr_too: bool = False
) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    """The agent, and the end of its stdout, a pipe that nobody reads yet."""
    path = folder / "config.toml"
    path.write_text(text)
    theirs, ours = os.pipe()
    process = subprocess.Popen(
        [sys.executable, "-m", "edge_agent", "run", "--config", str(path)],
        stdout=ours,
        stderr=subprocess.STDOUT if is_stderr_too else subprocess.DEVNULL,
        cwd=folder,
        env={**os.environ, "XDG_STATE_HOME": str(folder / "state"), "PYTHONPATH": str(ROOT)},
    )
    os.close(ours)
    try:
        yield process, theirs
    finally:
        process.kill()
        process.wait()
        os.close(theirs)


def test_results_flow_on_while_nobody_reads_the_log_and_then_it_tells_what_was_dropped(
    tmp_path: Path, broker: Broker, probe: Probe
) -> None:
    body = f'[logging]\nlevel = "debug"\n{CAMERA}[inference]\nbackend = "tests.e2e.test_logs:ChattyEngine"\n'
    with piped_agent(tmp_path, config(broker.port, body)) as (process, stdout):
        probe.wait("cameras/a/results", n=100, timeout_s=30)  # 5 MB of lines, of which a pipe and the queue hold 1.1
        assert probe.command("agent.log_level", level="info")["status"] == "ok"
        probe.wait("cameras/a/results", n=30)
        with open(stdout, "rb", closefd=False) as log:
            events: list[dict[str, Any]] = []
            while not events or events[-1]["event"] != "log.dropped":
                events.append(json.loads(log.readline()))
            assert events[-1]["count"] > 1000
            probe.wait("stats", n=2)
            process.send_signal(signal.SIGTERM)
            rest = [json.loads(line) for line in log]
        assert process.wait(10) == 0
    assert rest[-1]["event"] == "agent.stopped"
    assert [event["event"] for event in rest].count("log.dropped") <= 1


@pytest.mark.parametrize("is_closed", [False, True], ids=["full", "closed"])
def test_the_agent_ends_in_order_though_nobody_reads_what_it_says(
    tmp_path: Path, broker: Broker, probe: Probe, is_closed: bool
) -> None:
    body = f'[logging]\nlevel = "debug"\n{CAMERA}[inference]\nbackend = "tests.e2e.test_logs:ChattyEngine"\n'
    with piped_agent(tmp_path, config(broker.port, body)) as (process, stdout):
        if is_closed:
            os.dup2(os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC), stdout)  # the pipe's only reader is gone
        probe.wait("cameras/a/results", n=40, timeout_s=30)
        process.send_signal(signal.SIGTERM)
        assert process.wait(10) == 0
    assert probe.wait("available", lambda text: text == "offline")


def test_an_error_at_the_end_is_not_waited_for_either(tmp_path: Path, broker: Broker, probe: Probe) -> None:
    engine = "tests.e2e.test_logs:ChattyEngine"
    body = f'{CAMERA}[inference]\nbackend = "{engine}"\n[backends."{engine}"]\nfail_after = 60\n'
    body += '[logging]\nlevel = "debug"\n'
    with piped_agent(tmp_path, config(broker.port, body), is_stderr_too=True) as (process, _):
        assert process.wait(30) == 1
    assert probe.wait("available", lambda text: text == "offline")


def test_a_login_is_not_in_the_log(tmp_path: Path, broker: Broker, probe: Probe) -> None:
    camera = '[cameras.gate]\nsource = "{}"\nurl = "{}://viewer:hunter2@127.0.0.1:9/x?token=hunter3"\n'
    body = "".join(
        camera.format(kind, scheme).replace("gate", kind) for kind, scheme in (("rtsp", "rtsp"), ("http", "http"))
    )
    with AgentProcess(tmp_path, config(broker.port, f'[logging]\nlevel = "debug"\n{body}')) as agent:
        wait_until(lambda: len({event["camera"] for event in agent.events("camera.backoff")}) == 2)
        assert agent.stop() == 0
    assert "hunter" not in agent.text()


class LeakyEngine(FakeEngine):
    """One whose library says in an error what it should not."""

    def submit(self, images: Sequence[Image]) -> Ticket:
        raise RuntimeError("no answer from https://viewer:hunter2@127.0.0.1/x")


def test_an_error_that_nobody_foresaw_ends_it_with_status_1_and_without_the_login(tmp_path: Path) -> None:
    engine = "tests.e2e.test_logs:LeakyEngine"
    text = f'{CAMERA}[inference]\nbackend = "{engine}"\nfallback = ""\n[mqtt]\nport = 9\n'
    with AgentProcess(tmp_path, text, environ={"PYTHONPATH": str(ROOT)}) as agent:
        assert agent.process.wait(30) == 1
    assert "no answer from https://viewer:***@127.0.0.1/x" in agent.text()
    assert "hunter2" not in agent.text()


@pytest.mark.parametrize("command", ["check", "run"])
def test_a_problem_is_told_without_the_login_in_it(tmp_path: Path, command: str) -> None:
    path = tmp_path / "config.toml"
    url = "https://viewer:hunter2@127.0.0.1"
    model = f'[models.m]\npath = "{url}/m.onnx"\n[model]\nactive = "m"\n'
    path.write_text(f'{CAMERA}{model}[mqtt]\nhost = "{url} {url}"\n')
    arguments = [sys.executable, "-m", "edge_agent", command, "--config", str(path)]
    done = subprocess.run(arguments, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True)
    assert done.returncode == 78
    assert b"mqtt.host: " in done.stderr
    assert b"hunter2" not in done.stdout + done.stderr
    assert (b"models.m" in done.stderr) == (command == "check")


HANGS_UP = """
import os, signal, threading
from edge_agent.sources.synthetic import SyntheticSource as Source

def hang_up():
    while True:
        os.kill(os.getpid(), signal.SIGHUP)
        threading.Event().wait(0.005)

os.set_inheritable(os.open(__file__, os.O_RDONLY), True)  # as OpenCV opens cameras
os.kill(os.getpid(), signal.SIGHUP)  # before there is a loop
threading.Thread(target=hang_up, daemon=True).start()
"""


def test_no_hangup_ends_it_from_the_start_to_a_restart_to_which_it_leaves_no_open_camera(
    tmp_path: Path, broker: Broker, probe: Probe
) -> None:
    module = tmp_path / "hangs_up.py"
    module.write_text(HANGS_UP)
    text = config(broker.port, '[cameras.a]\nsource = "hangs_up:Source"\n')
    with AgentProcess(tmp_path, text, environ={"PYTHONPATH": f"{tmp_path}:{ROOT}"}) as agent:
        first = probe.wait("status", lambda status: status["state"] == "running", timeout_s=30)[-1].json()["started_at"]
        wait_until(lambda: agent.events("agent.reloaded"))
        probe.command("agent.restart")
        probe.wait("status", lambda one: one["state"] == "running" and one["started_at"] != first, timeout_s=30)
        fds = Path(f"/proc/{agent.process.pid}/fd")
        assert [path.resolve() for path in fds.iterdir()].count(module.resolve()) == 1
        assert agent.process.poll() is None


def test_what_can_change_in_a_running_agent_does_on_sighup_and_the_rest_is_named(
    tmp_path: Path, broker: Broker, probe: Probe
) -> None:
    text = config(broker.port, CAMERA).replace("interval_s = 1", "interval_s = 6")
    with AgentProcess(tmp_path, text) as agent:
        probe.wait("cameras/a/results", n=3)
        body = """
[logging]
level = "debug"
[policy]
max_latency_ms = 77.0
[inference]
score_threshold = 0.99
max_batch = 2
[spool]
max_mb = 3.0
[cameras.b]
source = "synthetic"
width = 320
height = 240
"""
        changed = config(broker.port, body).replace("interval_s = 1", "interval_s = 0.25")
        agent.config.write_text(changed.replace('device = "rig"', 'device = "rig"\nshutdown_timeout_s = 9.0'))
        agent.process.send_signal(signal.SIGHUP)
        [told] = wait_until(lambda: agent.events("agent.reloaded"))
        probe.wait("cameras/b/results", lambda result: result["width"] == 320 and not result["detections"], n=5)
        probe.wait("stats", lambda stats: stats["cameras"].keys() == {"b"}, n=8, timeout_s=20)  # not one in 6 s
        reloaded = probe.command("agent.reload")
        assert agent.process.poll() is None
    assert sorted(told["needs_restart"]) == ["agent", "inference", "spool"]
    assert told["cameras"] == ["a", "b"]
    assert {"logging", "policy", "stats", "cameras"} <= set(told["changed"])
    assert reloaded["result"] == {"changed": [], "cameras": [], "needs_restart": []}
    assert '"level": "debug"' in agent.text()


@pytest.mark.parametrize("how", ["SIGHUP", "agent.reload"])
def test_a_bad_new_file_leaves_the_old_running_and_names_every_mistake(
    tmp_path: Path, broker: Broker, probe: Probe, how: str
) -> None:
    with AgentProcess(tmp_path, config(broker.port, CAMERA)) as agent:
        probe.wait("cameras/a/results", n=3)
        wrong = (
            '[inference]\nscore_threshold = 0.99\n[cameras.b]\nsource = "synthetic"\nfsp = 1\n[spool]\nmax_mb = -1\n'
        )
        agent.config.write_text(config(broker.port, wrong))
        if how == "SIGHUP":
            agent.process.send_signal(signal.SIGHUP)
            [event] = wait_until(lambda: agent.events("agent.not_reloaded"))
            reason = event["reason"]
        else:
            reply = probe.command("agent.reload")
            reason = reply["message"]
            assert (reply["status"], reply["code"]) == ("error", "bad_arguments")
        n = len(probe.on("cameras/a/results"))
        probe.wait("cameras/a/results", lambda result: bool(result["detections"]), n=n + 5)
        assert probe.command("agent.info")["result"]["cameras"] == ["a"]
        agent.config.write_text(config(broker.port, CAMERA + '[cameras.b]\nsource = "synthetic"\n'))
        agent.process.send_signal(signal.SIGHUP)
        probe.wait("cameras/b/results")
    assert "cameras.b.fsp: unknown key; did you mean 'fps'?" in reason
    assert "spool.max_mb: " in reason


def test_a_file_of_an_older_version_runs_and_says_what_has_another_name(
    tmp_path: Path, broker: Broker, probe: Probe
) -> None:
    gate = '[cameras.gate]\nsource = "rtsp"\nurl = "rtsp://127.0.0.1:9/x"\nread_timeout_s = 3.0\n'
    with AgentProcess(tmp_path, config(broker.port, CAMERA + gate)) as agent:
        probe.wait("cameras/a/results")
        [event] = agent.events("config.moved")
    assert event["level"] == "warning"
    assert "cameras.gate.read_timeout_s is cameras.gate.stall_timeout_s now" in event["what"]
    checked = subprocess.run(
        [sys.executable, "-m", "edge_agent", "check", "--config", str(agent.config)], capture_output=True, text=True
    )
    assert "warning: cameras.gate.read_timeout_s is cameras.gate.stall_timeout_s now" in checked.stderr
    assert (checked.returncode, checked.stdout) == (0, f"{agent.config}: ok\n")
    agent.config.write_text("config_version = 3\n" + agent.config.read_text())
    newer = subprocess.run(
        [sys.executable, "-m", "edge_agent", "run", "--config", str(agent.config)], capture_output=True, text=True
    )
    assert newer.returncode == 78
    assert newer.stderr.startswith(
        "error: config_version: 3 was written for a newer edge_agent; this one reads versions"
    )
