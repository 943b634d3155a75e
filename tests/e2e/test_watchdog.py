"""What systemd hears: readiness, the watchdog's food, and what a person reads in `systemctl status`."""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.rigs import ROOT, AgentProcess, Broker, Probe, config, wait_until

pytestmark = pytest.mark.slow

CAMERA = '[cameras.a]\nsource = "synthetic"\n'
WATCHDOG_S = 2.0
PATIENT_S = 8.0  # for what is to be fed, on a machine that does other things too

STUCK_LOOP = """
import asyncio, sys, time
from edge_agent import agent, cli

run = agent.run

async def stuck(config, stop, **more):
    asyncio.get_running_loop().call_later(4, time.sleep, 600)
    return await run(config, stop, **more)

agent.run = stuck
cli.main(["run", "--config", sys.argv[1]])
"""


class Systemd:
    """The other end of NOTIFY_SOCKET: what it was told, and when."""

    def __init__(self, path: Path) -> None:
        self.environ = {
            "NOTIFY_SOCKET": str(path),
            "WATCHDOG_USEC": str(int(WATCHDOG_S * 1e6)),
            "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))),
        }
        self.told: list[tuple[float, str]] = []
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(str(path))
        self._thread = threading.Thread(target=self._listen, daemon=True)
        self._thread.start()

    def __enter__(self) -> Systemd:
        return self

    def __exit__(self, *error: object) -> None:
        self._socket.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._socket.close()

    def be_patient(self) -> None:
        self.environ["WATCHDOG_USEC"] = str(int(PATIENT_S * 1e6))

    def heard(self, start: str) -> list[str]:
        return [line for _, line in self.told if line.startswith(start)]

    def hungry_s(self) -> float:
        """For how long it was not fed."""
        return time.monotonic() - max((at for at, line in self.told if line == "WATCHDOG=1"), default=0.0)

    def _listen(self) -> None:
        while datagram := self._socket.recv(65536):
            now = time.monotonic()
            self.told += [(now, line) for line in datagram.decode().split("\n")]


@pytest.fixture
def systemd(tmp_path: Path) -> Iterator[Systemd]:
    with Systemd(tmp_path / "notify") as listening:
        yield listening


def starves(systemd: Systemd) -> None:
    wait_until(lambda: systemd.heard("WATCHDOG=1"), what="it is fed at first")
    wait_until(lambda: systemd.hungry_s() > WATCHDOG_S, timeout_s=40, what="it is not fed any more")
    count = len(systemd.heard("WATCHDOG=1"))
    time.sleep(2 * WATCHDOG_S)
    assert len(systemd.heard("WATCHDOG=1")) == count


def test_a_stuck_engine_starves_the_watchdog_and_health_says_so(
    tmp_path: Path, broker: Broker, probe: Probe, systemd: Systemd
) -> None:
    body = f'{CAMERA}[inference]\nbackend = "tests.misbehaving:StuckEngine"\n'
    with AgentProcess(tmp_path, config(broker.port, body), environ=systemd.environ) as agent:
        starves(systemd)
        probe.wait("health", lambda health: health["checks"]["engine"]["state"] == "failed")
        [event] = agent.events("watchdog.no_progress")
        assert event["of"] == "engine"
        agent.process.send_signal(signal.SIGABRT)  # as systemd does then
        assert agent.process.wait(10) == -signal.SIGABRT
    assert "misbehaving.py" in agent.text(), "it says where each thread stood"


def test_a_stuck_camera_thread_starves_the_watchdog(
    tmp_path: Path, broker: Broker, probe: Probe, systemd: Systemd
) -> None:
    body = '[cameras.a]\nsource = "tests.misbehaving:HungSource"\nstall_timeout_s = 0.3\n'
    with AgentProcess(tmp_path, config(broker.port, body), environ=systemd.environ) as agent:
        starves(systemd)
        [event] = agent.events("watchdog.no_progress")
        assert event["of"] == "capture"
        agent.process.kill()
        agent.process.wait()


def test_a_stuck_event_loop_starves_the_watchdog(tmp_path: Path, broker: Broker, systemd: Systemd) -> None:
    class Stuck(AgentProcess):
        command = (sys.executable, "-c", STUCK_LOOP)

    with Stuck(tmp_path, config(broker.port, CAMERA), environ=systemd.environ) as agent:
        starves(systemd)
        agent.process.kill()
        agent.process.wait()


def test_a_camera_that_is_not_there_and_a_broker_that_is_gone_are_no_reason_to_starve_it(
    tmp_path: Path, broker: Broker, probe: Probe, systemd: Systemd
) -> None:
    systemd.be_patient()
    body = '[cameras.a]\nsource = "v4l2"\ndevice = "/dev/video99"\nbackoff_max_s = 1\n'
    with AgentProcess(tmp_path, config(broker.port, body), environ=systemd.environ) as agent:
        wait_until(lambda: systemd.heard("READY=1"))
        broker.kill()
        hungriest = fed_for(systemd, 1.5 * PATIENT_S)
        assert agent.process.poll() is None
        assert "failed: broker: " in systemd.heard("STATUS=")[-1]
    assert hungriest < PATIENT_S


def test_an_idle_agent_that_is_well_feeds_it(tmp_path: Path, broker: Broker, probe: Probe, systemd: Systemd) -> None:
    systemd.be_patient()
    with AgentProcess(tmp_path, config(broker.port, f"{CAMERA}enabled = false\n"), environ=systemd.environ):
        wait_until(lambda: systemd.heard("READY=1"))
        hungriest = fed_for(systemd, 1.5 * PATIENT_S)
    assert hungriest < PATIENT_S


def test_a_file_system_that_hangs_is_told_and_statistics_go_on(
    tmp_path: Path, broker: Broker, probe: Probe, systemd: Systemd
) -> None:
    os.mkfifo(tmp_path / "a.jpg")  # whoever opens it to write waits for somebody who reads
    text = config(broker.port, CAMERA).replace("on_start = false", 'on_start = true\ndirectory = "."')
    with AgentProcess(tmp_path, text, environ=systemd.environ) as agent:
        told = probe.wait("health", lambda health: health["checks"]["disk"]["state"] == "failed", timeout_s=40)
        assert "has not come back" in told[-1].json()["checks"]["disk"]["fact"]
        assert probe.wait("stats", n=len(probe.on("stats")) + 2)
        assert not agent.events("watchdog.no_progress")
        with (tmp_path / "a.jpg").open("rb"):
            probe.wait("health", lambda health: health["checks"]["disk"]["state"] == "ok", timeout_s=40)


def fed_for(systemd: Systemd, seconds: float) -> float:
    """The longest that it was not fed in this time."""
    until, hungriest = time.monotonic() + seconds, 0.0
    while time.monotonic() < until:
        hungriest = max(hungriest, systemd.hungry_s())
        time.sleep(0.02)
    return hungriest


def test_it_is_ready_once_a_model_is_warm_and_reloads_and_stops_in_order(
    tmp_path: Path, broker: Broker, probe: Probe, systemd: Systemd
) -> None:
    body = f'{CAMERA}[inference]\nbackend = "fake"\n[backends.fake]\nlatency_ms = 60\n'
    with AgentProcess(tmp_path, config(broker.port, body), environ=systemd.environ) as agent:
        wait_until(lambda: systemd.heard("READY=1"))
        lines = [line for _, line in systemd.told]
        assert any(line.startswith("EXTEND_TIMEOUT_USEC=") for line in lines[: lines.index("READY=1")])
        [loaded] = agent.events("model.activated")
        assert loaded
        agent.process.send_signal(signal.SIGHUP)
        wait_until(lambda: len(systemd.heard("READY=1")) == 2)
        lines = [line for _, line in systemd.told]
        reloading = lines.index("RELOADING=1")
        assert lines[reloading + 1].startswith("MONOTONIC_USEC=")
        assert "READY=1" in lines[reloading:]
        wait_until(lambda: any("1 of 1 cameras" in line for line in systemd.heard("STATUS=running: demo-320 on fake")))
        assert agent.stop() == 0
    assert "STOPPING=1" in systemd.heard("STOPPING")
    assert systemd.heard("STATUS=")[-1] == "STATUS=stopping"


def test_it_is_not_ready_while_no_model_runs_and_is_once_one_does(
    tmp_path: Path, broker: Broker, probe: Probe, systemd: Systemd
) -> None:
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(b"no model")
    body = f'[model]\nactive = "mine"\n[models.mine]\npath = "{broken}"\n{CAMERA}'
    with AgentProcess(tmp_path, config(broker.port, body), environ=systemd.environ) as agent:
        wait_until(lambda: agent.events("agent.running"))
        probe.wait("health", lambda health: health["checks"]["model"]["state"] == "failed")
        assert not systemd.heard("READY=1")
        wait_until(lambda: any("no model" in line for line in systemd.heard("STATUS=")))
        assert probe.command("model.activate", name="demo-160")["status"] == "ok"
        wait_until(lambda: systemd.heard("READY=1"))
        assert agent.stop() == 0
