"""Cameras that go away, seen from outside: a real RTSP server that is killed, frozen, resized and cut off."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from edge_agent.sources.world import World
from tests.brokers import on_all_brokers
from tests.network_cameras import Link, MjpegServer, TcpServer, say_garbage, synthetic_jpegs
from tests.rigs import ROOT, AgentProcess, Broker, Probe, RtspServer, Server, config, encode_h264, wait_until

pytestmark = pytest.mark.slow

BACKOFF_S = 0.4
SICK = f"backoff_max_s = {BACKOFF_S}\nstall_timeout_s = 1.0\nopen_timeout_s = 4.0\n"
ENGINE = '[inference]\nbackend = "fake"\n[backends.fake]\ndetections = 1\n[queue]\nmax_staleness_ms = 1000\n'
HEALTHY = "".join(
    f'[cameras.h{index}]\nsource = "synthetic"\nfps = 10\nseed = {index}\nwidth = 160\nheight = 120\n'
    "max_staleness_ms = 0\nmax_frames = 50\n"
    for index in range(3)
)


class Watched:
    """One camera as its retained status tells it."""

    def __init__(self, probe: Probe, name: str) -> None:
        self._probe = probe
        self._topic = f"cameras/{name}/status"
        self._seen = 0

    def comes_to(self, state: str, reason: str | None = None, *, timeout_s: float = 20.0) -> dict[str, Any]:
        """The next status of this kind, in the order they were heard."""

        def found() -> dict[str, Any] | None:
            heard = self._probe.on(self._topic)
            for index in range(self._seen, len(heard)):
                status = heard[index].json()
                if (status["state"], status["reason"]) == (state, reason):
                    self._seen = index + 1
                    return dict(status)
            return None

        try:
            return dict(wait_until(found, timeout_s=timeout_s, what=f"{state} {reason}"))
        except AssertionError:
            heard = [(m.json()["state"], m.json()["reason"], m.json()["message"]) for m in self._probe.on(self._topic)]
            raise AssertionError(f"never {state} {reason} after {self._seen} of {heard[-40:]}") from None


def lost_nothing(probe: Probe) -> None:
    """The healthy cameras gave a result for every frame, in order."""
    for index in range(3):
        seqs = [message.json()["seq"] for message in probe.on(f"cameras/h{index}/results")]
        assert seqs == list(range(len(seqs)))
        assert len(seqs) > 20


@pytest.fixture(scope="module")
def film(tmp_path_factory: pytest.TempPathFactory) -> Path:
    world, path = World(width=320, height=240, seed=5), tmp_path_factory.mktemp("film") / "film.mp4"

    def drawn() -> Any:
        for index in range(900):
            frame = np.empty((240, 320, 3), np.uint8)
            world.draw(index, frame)
            yield frame

    return encode_h264(drawn(), path, fps=30)


def test_a_camera_absent_frozen_killed_and_resized_comes_back_each_time_and_the_others_do_not_notice(
    tmp_path: Path, broker: Broker, probe: Probe
) -> None:
    with RtspServer(live="320x240", is_started=False) as server:
        body = f'{ENGINE}{HEALTHY}[cameras.sick]\nsource = "rtsp"\nurl = "{server.url}"\n{SICK}'
        with AgentProcess(tmp_path, config(broker.port, body)) as agent:
            sick = Watched(probe, "sick")
            sick.comes_to("connecting")
            sick.comes_to("backoff", "refused")

            def restored(act: Callable[[], None], width: int = 320) -> None:
                act()
                began = time.monotonic()
                running = sick.comes_to("running")
                assert time.monotonic() - began < BACKOFF_S + 2.0 + 1.0, "and a second for this machine"
                assert running["width"] == width

            restored(server.start)
            server.freeze()
            stalled = sick.comes_to("stalled", "stalled")
            assert "no picture for" in stalled["message"]
            sick.comes_to("backoff", "stalled")
            sick.comes_to("connecting")
            sick.comes_to("backoff", "timeout")
            restored(server.thaw)
            server.kill()
            sick.comes_to("backoff", "disconnected")
            sick.comes_to("backoff", "refused")
            restored(server.start)
            server.resize("640x480")
            time.sleep(5.2)  # a stream is not asked about its size more often
            server.freeze()
            time.sleep(0.7)  # as an encoder that is set up anew
            server.thaw()
            sick.comes_to("backoff", "disconnected")
            assert sick.comes_to("running")["width"] == 640
            wait_until(lambda: probe.on("cameras/sick/results")[-1].json()["width"] == 640)
            assert agent.stop() == 0
        lost_nothing(probe)
        warned = [(event["reason"]) for event in agent.events("camera.backoff") if event["level"] == "warning"]
        assert len(warned) == len([r for i, r in enumerate(warned) if i == 0 or r != warned[i - 1]]), "once each"


def test_cameras_that_cannot_be_opened_tell_why(tmp_path: Path, broker: Broker, probe: Probe) -> None:
    with RtspServer(live="320x240", login="viewer:secret") as server, TcpServer(say_garbage) as other:
        sick = {
            "locked": (server.url, "auth_failed"),
            "elsewhere": (server.url.replace("://", "://viewer:secret@").replace("/stream", "/no"), "not_found"),
            "noise": (f"rtsp://127.0.0.1:{other.port}/stream", "error"),
        }
        body = ENGINE + HEALTHY
        for name, (url, _) in sick.items():
            body += f'[cameras.{name}]\nsource = "rtsp"\nurl = "{url}"\n{SICK}'
        with AgentProcess(tmp_path, config(broker.port, body)) as agent:
            for name, (_, reason) in sick.items():
                watched = Watched(probe, name)
                for _ in range(2):
                    watched.comes_to("connecting")
                    watched.comes_to("backoff", reason)
            probe.wait("cameras/h0/results", n=25)
            assert agent.stop() == 0
        assert "secret" not in agent.text()
        lost_nothing(probe)


def test_a_slow_link_gives_fresh_results_or_none(tmp_path: Path, broker: Broker, probe: Probe, film: Path) -> None:
    with RtspServer(film) as server, Link(server.port) as link:
        url = server.url.replace(str(server.port), str(link.port))
        body = f'{ENGINE}{HEALTHY}[cameras.sick]\nsource = "rtsp"\nurl = "{url}"\n{SICK}'
        with AgentProcess(tmp_path, config(broker.port, body)):
            sick = Watched(probe, "sick")
            sick.comes_to("running")
            probe.wait("cameras/sick/results", n=30)
            link.bytes_per_s = 8_000
            sick.comes_to("stalled", "stalled", timeout_s=40)
            link.bytes_per_s = None
            sick.comes_to("running")
            count = len(probe.on("cameras/sick/results"))
            probe.wait("cameras/sick/results", n=count + 30)
        ages = [message.json()["latency_ms"]["total"] for message in probe.on("cameras/sick/results")]
        assert max(ages) < 1500, "published late: older than a second, and what the engine took"
        lost_nothing(probe)


@pytest.mark.soak
def test_200_losses_leave_nothing_behind(tmp_path: Path, broker: Broker, probe: Probe, film: Path) -> None:
    """Memory, threads, sockets and files, after the server was killed or the link was cut 200 times."""
    cycles, kills = 200, 20
    with RtspServer(film) as server, Link(server.port) as link:
        url = server.url.replace(str(server.port), str(link.port))
        quick = SICK.replace(str(BACKOFF_S), "0.05")
        body = f'{ENGINE}{HEALTHY}[cameras.sick]\nsource = "rtsp"\nurl = "{url}"\n{quick}'
        with AgentProcess(tmp_path, config(broker.port, body)) as agent:
            process = psutil.Process(agent.process.pid)
            sick = Watched(probe, "sick")
            sick.comes_to("running")
            rss_kb, threads, files = [], [], []
            for cycle in range(cycles):
                if cycle % (cycles // kills) == 0:
                    server.kill()
                    server.start()
                else:
                    link.cut()
                sick.comes_to("running")
                rss_kb.append(process.memory_info().rss / 1024)
                threads.append(process.num_threads())
                files.append(process.num_fds())
            settled = slice(cycles // 4, None)
            slope_kb = float(np.polyfit(range(cycles)[settled], rss_kb[settled], 1)[0])
            print(f"RSS {rss_kb[0]:.0f} → {rss_kb[-1]:.0f} kB, slope {slope_kb:.2f} kB a reconnection")
            print(f"threads {min(threads)} to {max(threads)}, files {min(files)} to {max(files)}")
            assert slope_kb < 10
            assert np.median(threads[-20:]) <= np.median(threads[:20]) + 1
            assert np.median(files[-20:]) <= np.median(files[:20]) + 1
            assert agent.stop() == 0
        lost_nothing(probe)


def test_a_driver_that_hangs_is_killed_with_its_process_and_the_camera_goes_on(
    tmp_path: Path, broker: Broker, probe: Probe
) -> None:
    body = f'{ENGINE}{HEALTHY}[cameras.sick]\nsource = "tests.misbehaving:StuckSource"\nisolation = "process"\n{SICK}'
    with AgentProcess(tmp_path, config(broker.port, body), environ={"PYTHONPATH": str(ROOT)}) as agent:
        sick = Watched(probe, "sick")
        sick.comes_to("running")
        sick.comes_to("stalled", "stalled")
        sick.comes_to("backoff", "stalled")
        sick.comes_to("running")
        assert agent.stop() == 0
        assert not psutil.Process().children() or all(
            "isolated" not in " ".join(child.cmdline()) for child in psutil.Process().children(recursive=True)
        )
    assert len(probe.on("cameras/sick/results")) > 30
    lost_nothing(probe)


def test_a_driver_that_hangs_in_a_thread_is_left_behind_counted_and_does_not_hold_up_the_end(
    tmp_path: Path, broker: Broker, probe: Probe
) -> None:
    body = f'{ENGINE}{HEALTHY}[cameras.sick]\nsource = "tests.misbehaving:StuckSource"\n{SICK}'
    with AgentProcess(tmp_path, config(broker.port, body), environ={"PYTHONPATH": str(ROOT)}) as agent:
        sick = Watched(probe, "sick")
        sick.comes_to("running")
        sick.comes_to("backoff", "stalled")
        sick.comes_to("running")
        probe.wait("stats", lambda stats: stats["cameras"]["sick"]["connection"]["threads_left_behind"] >= 1)
        began = time.monotonic()
        assert agent.stop() == 0
        assert time.monotonic() - began < 6.0
    lost_nothing(probe)


def test_an_isolated_cameras_process_dies_with_an_agent_that_is_killed(
    tmp_path: Path, broker: Broker, probe: Probe
) -> None:
    body = f'{ENGINE}[cameras.sick]\nsource = "tests.misbehaving:StuckSource"\nisolation = "process"\n'
    with AgentProcess(tmp_path, config(broker.port, body), environ={"PYTHONPATH": str(ROOT)}) as agent:
        Watched(probe, "sick").comes_to("running")
        children = psutil.Process(agent.process.pid).children()
        assert children
        agent.process.kill()
        agent.process.wait()
        psutil.wait_procs(children, timeout=5)
        assert not [child for child in children if child.is_running() and child.status() != psutil.STATUS_ZOMBIE]


def test_a_source_with_a_bug_is_told_once_and_tried_again(tmp_path: Path, broker: Broker, probe: Probe) -> None:
    body = f'{ENGINE}{HEALTHY}[cameras.sick]\nsource = "tests.misbehaving:BuggySource"\n{SICK}'
    with AgentProcess(tmp_path, config(broker.port, body), environ={"PYTHONPATH": str(ROOT)}) as agent:
        sick = Watched(probe, "sick")
        for _ in range(3):
            assert "ZeroDivisionError: a bug" in sick.comes_to("backoff", "error")["message"]
        probe.wait("health", lambda health: health["checks"]["camera.sick"]["state"] == "failed")
        probe.wait("cameras/h0/results", n=25)
        assert agent.stop() == 0
    assert len(agent.events("camera.bug")) == 1
    lost_nothing(probe)


def test_motion_jpeg_over_http_is_read_and_thinned(tmp_path: Path, broker: Broker, probe: Probe) -> None:
    with MjpegServer(synthetic_jpegs(), login=("viewer", "secret")) as server:
        body = f'{ENGINE}[cameras.door]\nsource = "http"\nurl = "{server.url}"\nfps = 5\n{SICK}'
        body += 'username = "viewer"\npassword = "secret"\n'
        with AgentProcess(tmp_path, config(broker.port, body)) as agent:
            door = Watched(probe, "door")
            assert door.comes_to("running")["width"] == 160
            stats = probe.wait("stats", lambda stats: stats["cameras"]["door"]["captured"] > 20)[0].json()
            camera = stats["cameras"]["door"]
            assert camera["skipped"] > 3 * camera["captured"]
            server.silent.set()
            door.comes_to("stalled", "stalled")
            door.comes_to("backoff", "stalled")
            server.silent.clear()
            door.comes_to("running")
            assert agent.stop() == 0


@on_all_brokers
def test_health_and_stats_tell_of_the_connection(tmp_path: Path, broker: Server, probe: Probe) -> None:
    with RtspServer(live="320x240") as server:
        body = f'{ENGINE}[cameras.sick]\nsource = "rtsp"\nurl = "{server.url}"\n{SICK}'
        with AgentProcess(tmp_path, config(broker.port, body)) as agent:
            sick = Watched(probe, "sick")
            sick.comes_to("running")
            os.kill(server._process.pid, signal.SIGKILL)  # type: ignore[union-attr]
            sick.comes_to("backoff", "disconnected")
            failed = probe.wait("health", lambda health: health["state"] == "failed")[-1].json()
            assert failed["checks"]["camera.sick"]["fact"] in ("disconnected", "refused")
            stats = probe.wait("stats", lambda stats: stats["cameras"]["sick"]["connection"]["reconnects"] > 0)
            connection = stats[-1].json()["cameras"]["sick"]["connection"]
            assert connection["last_reason"] in ("disconnected", "refused")
            assert connection["nominal_fps"] == 15
            assert 0 < connection["first_frame_ms"] < 5000
            assert connection["jitter_ms"] is not None
            assert agent.stop() == 0
