"""`edgectl watch` and `edgectl events`, as people run them: beside a real agent, on a real mosquitto."""

from __future__ import annotations

import json
import os
import pty
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from edgectl._fleet import CameraView, FleetView, rank, sparkline
from edgectl.events import Wanted
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_agent.messages import EventMessage, ResultMessage, Topics
from edge_agent.sources.world import CLASS_NAMES
from tests import schemas
from tests.rigs import DEVICE, AgentProcess, Broker, Heard, Probe, config, free_port, wait_until

pytestmark = pytest.mark.slow

RUN = [sys.executable, "-c", "from edgectl.app import main; main()"]
CAMERAS = f"""
[tracking]
enabled = true
[cameras.a]
source = "synthetic"
fps = 15
[cameras.a.zones]
all = [[0.0, 0.0], [1.0, 0.0], [1.0, 1.0], [0.0, 1.0]]
corner = [[0.0, 0.0], [0.02, 0.0], [0.0, 0.02]]
[cameras.b]
source = "rtsp"
url = "rtsp://127.0.0.1:{free_port()}/x"
"""


@dataclass(frozen=True)
class Rig:
    folder: Path
    broker: Broker

    def edgectl(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*RUN, *arguments], cwd=self.folder, capture_output=True, text=True, timeout=60, check=False
        )


@pytest.fixture(scope="module")
def rig(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    """An agent of two cameras, one of which is not there."""
    folder = tmp_path_factory.mktemp("rig")
    with Broker(folder) as broker, AgentProcess(folder, config(broker.port, CAMERAS)) as agent:
        wait_until(lambda: agent.events("camera.running") and agent.events("camera.backoff"))
        with Probe(broker.port) as probe:
            probe.wait("cameras/a/results")
        yield Rig(folder, broker)


@pytest.fixture(scope="module")
def quiet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    """A broker, and nobody on it."""
    folder = tmp_path_factory.mktemp("quiet")
    with Broker(folder) as broker:
        (folder / "config.toml").write_text(config(broker.port, CAMERAS))
        yield Rig(folder, broker)


def followed(rig: Rig, *arguments: str) -> list[dict[str, Any]]:
    done = rig.edgectl("events", "--json", "--for", "30", *arguments)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_elsewhere_than_on_a_terminal_there_are_plain_lines(rig: Rig) -> None:
    done = rig.edgectl("watch", "--for", "2.5")
    assert (done.returncode, done.stderr) == (0, "")
    assert f"  {DEVICE}: online\n" in done.stdout
    assert f"  {DEVICE}/b: backoff (refused): 127.0.0.1:" in done.stdout
    assert f"  {DEVICE}: camera.b failed: refused\n" in done.stdout
    rows = [[cell.strip() for cell in line.split("│")] for line in done.stdout.splitlines() if "│" in line]
    [seen] = [row for row in rows if row[1] == "a"][-1:]
    assert seen[2] == "running"
    assert float(seen[3]) > 1
    p50, p95, p99 = map(float, seen[4].split("/"))
    assert 0 < p50 <= p95 <= p99
    assert any(name in seen[6] for name in CLASS_NAMES)
    assert [row[3:5] for row in rows if row[1] == "b"][-1] == ["-", "-"], "what was not measured is not there"
    assert "\x1b" not in done.stdout


def test_one_document_holds_all_that_was_seen(rig: Rig) -> None:
    done = rig.edgectl("watch", "--json", "--for", "2.5")
    assert (done.returncode, done.stderr) == (0, "")
    document = json.loads(done.stdout)
    assert list(document) == [DEVICE]
    view, topics = document[DEVICE], Topics("edge", DEVICE)
    camera = view["cameras"]["a"]
    for topic, message in (
        (topics.status, view["status"]),
        (topics.health, view["health"]),
        (topics.stats, view["stats"]),
        (topics.camera("a", "status"), camera["status"]),
        (topics.camera("a", "results"), camera["last"]),
    ):
        schemas.validate(Heard(topic, json.dumps(message).encode(), False, 0))
    assert view["available"] == "online"
    assert view["health"]["checks"]["camera.b"]["state"] == "failed"
    assert camera["results"] >= camera["latency_ms"]["n"] > 1
    assert 0 < camera["latency_ms"]["p50"] <= camera["latency_ms"]["p95"] <= camera["latency_ms"]["max"]
    assert camera["results_per_s"] > 1
    nothing = {"results": 0, "results_per_s": None, "latency_ms": None, "last": None}
    assert {key: view["cameras"]["b"][key] for key in nothing} == nothing


def test_on_a_terminal_it_is_drawn_again_and_again(rig: Rig) -> None:
    done, shown = on_a_terminal(rig, "watch", "--for", "3.5")
    assert done == 0
    last = shown[shown.rindex(f"{DEVICE}  online") :]
    assert "health failed" in last
    assert re.search(r"camera\.b failed for \d+ \w+: refused  \(looked at \d+ s ago\)", last)
    assert re.search(r"a +running +\d+\.\d +[\d.]+/[\d.]+/[\d.]+ +\d+ ", last)
    assert re.search(r"[▁▂▃▄▅▆▇█]{2}", last), "a curve of the seconds that are over"
    assert shown.count("sees") > 4


def test_a_fleet_is_everybody_under_the_prefix(rig: Rig) -> None:
    with Probe(rig.broker.port) as probe:
        probe.publish("edge/gone/available", "offline", retain=True)
        probe.publish("other/none/available", "online", retain=True)
        fleet = json.loads(rig.edgectl("watch", "--all", "--json", "--for", "1").stdout)
        alone = json.loads(rig.edgectl("watch", "gone", "--json", "--for", "0.5").stdout)
        probe.publish("edge/gone/available", "", retain=True)
        probe.publish("other/none/available", "", retain=True)
    assert {name: view["available"] for name, view in fleet.items()} == {DEVICE: "online", "gone": "offline"}
    assert list(alone) == ["gone"]
    assert alone["gone"]["status"] is None


def test_nobody_there_is_an_exit_status(quiet: Rig) -> None:
    silent = quiet.edgectl("watch", "nobody", "--for", "0.5")
    assert (silent.returncode, silent.stdout) == (1, "")
    assert silent.stderr == "error: nothing was heard of nobody within 0.5 s; is it online?\n"
    few = quiet.edgectl("events", "--count", "1", "--for", "0.5")
    assert (few.returncode, few.stdout) == (1, "")
    assert few.stderr == "error: only 0 of 1 came within 0.5 s\n"
    assert quiet.edgectl("events", "--for", "0.5").returncode == 0
    wild = quiet.edgectl("watch", "#")
    assert (wild.returncode, wild.stderr) == (1, "error: '#' is no device's name; --all is for all of them\n")
    assert quiet.edgectl("watch", "rig", "--all").returncode == 2


@pytest.mark.parametrize("command", ["watch", "events"])
def test_a_broker_that_goes_is_waited_for_and_one_that_never_was_is_not(tmp_path: Path, command: str) -> None:
    with Broker(tmp_path) as broker:
        (tmp_path / "config.toml").write_text(config(broker.port, CAMERAS))
        with Probe(broker.port) as probe:
            probe.publish(f"edge/{DEVICE}/available", "online", retain=True)
            probe.publish(f"edge/{DEVICE}/cameras/a/results", msgspec.json.encode(result()), retain=True)
        with Running(tmp_path, command) as running:
            running.wait_for("stdout", DEVICE)
            broker.kill()
            running.wait_for("stderr", "has gone")
            broker.start()
            running.wait_for("stderr", "the broker is back")
            running.process.send_signal(signal.SIGINT)
            assert running.process.wait(10) == 0
    done = subprocess.run([*RUN, command], cwd=tmp_path, capture_output=True, text=True, timeout=30, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith(f"error: no broker at 127.0.0.1:{broker.port} (")
    assert done.stderr.count("\n") == 1


def test_events_and_results_are_the_messages_themselves(rig: Rig) -> None:
    heard = followed(rig, "--count", "30")
    assert len(heard) == 30
    for message in heard:
        leaf = "events" if "type" in message else "results"
        topic = Topics("edge", DEVICE).camera(message["camera"], leaf)
        schemas.validate(Heard(topic, json.dumps(message).encode(), False, 0))
    assert any("detections" in message for message in heard)


def test_filters_hold_at_once_for_one_object(rig: Rig) -> None:
    filters = ("--camera", "a", "--kind", "result", "--label", "disc", "--label", "star", "--score", "0.6")
    for message in followed(rig, *filters, "--zone", "all", "--count", "5"):
        wanted = [one for one in message["detections"] if one["label"] in ("disc", "star") and one["score"] >= 0.6]
        assert wanted
        assert any(message["zones"]["all"].get(one["label"]) for one in wanted)
    [event] = followed(rig, "--kind", "update", "--kind", "new", "--count", "1", "--zone", "all")
    assert event["type"] in ("new", "update")
    done = rig.edgectl("events", "--camera", "a", "--label", "person", "--count", "1", "--for", "1")
    assert (done.returncode, done.stdout) == (1, "")


def test_people_read_a_line_each(rig: Rig) -> None:
    done = rig.edgectl("events", "--count", "3", "--kind", "result", "--for", "30")
    assert done.returncode == 0, done.stderr
    for line in done.stdout.splitlines():
        pattern = rf"\d\d:\d\d:\d\d\.\d\d\d  {DEVICE}/a  result  #\d+  (\d+ \w+ [\d.]+(, )?)+  [\d.]+ ms"
        assert re.fullmatch(pattern, line), line
    wrong = rig.edgectl("events", "--kind", "results")
    assert wrong.returncode == 2
    assert "'results' is not one of result, new, update, end" in wrong.stderr


def test_a_reader_that_has_enough_is_no_fault(rig: Rig) -> None:
    line = f"{sys.executable} -c 'from edgectl.app import main; main()' events --json | head -n 1"
    done = subprocess.run(line, shell=True, cwd=rig.folder, capture_output=True, text=True, timeout=30, check=False)
    assert json.loads(done.stdout)["device"] == DEVICE
    assert done.stderr == ""


# What the views make of what they hear


@given(st.lists(st.none() | st.floats(0, 1e6), max_size=30))
def test_a_curve_has_a_sign_for_each_value_the_largest_the_highest(values: list[float | None]) -> None:
    curve = sparkline(values)
    assert len(curve) == len(values)
    known = [(value, bar) for value, bar in zip(values, curve, strict=True) if value is not None]
    assert [bar for _, bar in sorted(known)] == sorted(bar for _, bar in known)
    assert all(bar == " " for value, bar in zip(values, curve, strict=True) if value is None)
    if any(value for value, _ in known):
        assert max(known)[1] == "█"


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=200), st.sampled_from([0.5, 0.95, 0.99, 1.0]))
def test_percentiles_are_values_that_were_seen(values: list[float], share: float) -> None:
    expected = np.percentile(values, 100 * share, method="inverted_cdf")
    assert rank(sorted(values), share) == expected


@settings(deadline=None)
@given(
    st.sampled_from(["available", "status", "health", "stats", "cameras/a/status", "cameras/a/results", "jobs/1", "x"]),
    st.binary(max_size=50) | st.from_regex(rb'\{"schema": ?1, "device": "a"[^\n]*\}', fullmatch=True),
)
def test_what_is_no_message_of_ours_is_passed_over(leaf: str, payload: bytes) -> None:
    view = FleetView("site/a")
    view.take(f"site/a/{DEVICE}/{leaf}", payload, 1.0)
    view.take(f"site/a/{DEVICE}/available", b"online", 2.0)
    assert json.loads(json.dumps(view.snapshot(3.0)))[DEVICE]["available"] == "online"


@given(st.lists(st.tuples(st.floats(0.001, 0.4), st.floats(0.1, 500)), min_size=1, max_size=120))
def test_rates_and_latencies_are_of_the_last_ten_seconds(arrivals: list[tuple[float, float]]) -> None:
    camera, now, all_of_them = CameraView(), 100.5, []
    assert camera.fps(now) is None
    assert camera.latency() is None
    for gap_s, total_ms in arrivals:
        now += gap_s
        all_of_them.append((now, total_ms))
        camera.arrived(result(total=total_ms), now)
    camera.roll(now)
    recent = [total for at, total in all_of_them if at >= now - 10.0]
    latency = camera.latency()
    assert latency is not None
    assert (latency.n, latency.max, latency.p50) == (len(recent), max(recent), rank(sorted(recent), 0.5))
    whole = [at for at, _ in all_of_them if 101 <= at < int(now)]
    assert sum(camera.rates) == len(whole), "each second that is over was counted whole"
    camera.roll(now + 60)
    assert camera.fps(now + 60) == (0.0 if len(arrivals) > 1 else None)
    assert camera.latency() is None


@pytest.mark.parametrize(
    ("wanted", "is_admitted"),
    [
        (Wanted(), True),
        (Wanted(labels=["person"]), True),
        (Wanted(labels=["person"], score=0.8), False),  # the sure one is the truck
        (Wanted(score=0.8), True),
        (Wanted(labels=["truck"], zones=["yard"]), False),  # the person stands there
        (Wanted(labels=["person"], zones=["yard"]), True),
        (Wanted(labels=["person", "truck"], zones=["yard", "gate"], score=0.8), False),
        (Wanted(zones=["gate"]), False),
        (Wanted(cameras=["a"], kinds=["result"]), True),
        (Wanted(cameras=["b"]), False),
        (Wanted(kinds=["new"]), False),
    ],
)
def test_one_object_has_to_meet_all_filters(wanted: Wanted, is_admitted: bool) -> None:
    objects = [("person", 0.7), ("truck", 0.9)]
    assert wanted.admits(result(objects=objects, zones={"yard": {"person": 1}})) is is_admitted


@pytest.mark.parametrize(
    ("wanted", "is_admitted"),
    [
        (Wanted(zones=["yard"]), True),  # it left that
        (Wanted(zones=["street"]), False),
        (Wanted(kinds=["end"], labels=["person"]), False),
        (Wanted(kinds=["update"], labels=["person"], score=0.9), True),
        (Wanted(labels=["truck"]), False),
    ],
)
def test_an_event_is_of_one_object_before_and_after(wanted: Wanted, is_admitted: bool) -> None:
    state = {"label": "person", "class_id": 0, "box": [0, 0, 1, 1]}
    event = {
        **HEAD,
        "type": "update",
        "track_id": 1,
        "entered": [],
        "left": ["yard"],
        "crossed": [],
        "before": {**state, "score": 0.9, "zones": ["yard"]},
        "after": {**state, "score": 0.5, "zones": []},
    }
    assert wanted.admits(msgspec.convert(event, EventMessage)) is is_admitted


HEAD = {"schema": 1, "id": "1", "device": DEVICE, "camera": "a", "seq": 1, "captured_at": "2026-01-01T00:00:00Z"}


def result(
    *, total: float = 1.0, objects: Sequence[tuple[str, float]] = (), zones: dict[str, dict[str, int]] | None = None
) -> ResultMessage:
    latency = {"queue": 0, "preprocess": 0, "inference": 0, "postprocess": 0, "total": total}
    message = {
        **HEAD,
        "width": 1,
        "height": 1,
        "model": {"name": "m", "version": "1", "task": "detect"},
        "latency_ms": latency,
        "detections": [{"label": name, "class_id": 0, "score": score, "box": [0, 0, 1, 1]} for name, score in objects],
        **({"zones": zones} if zones is not None else {}),
    }
    return msgspec.convert(message, ResultMessage)


class Running:
    """A command that goes on, and what it says."""

    def __init__(self, folder: Path, *arguments: str) -> None:
        self.process = subprocess.Popen(
            [*RUN, *arguments], cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        self._said: dict[str, list[str]] = {"stdout": [], "stderr": []}
        self._readers = [
            threading.Thread(target=lines.extend, args=(getattr(self.process, name),))
            for name, lines in self._said.items()
        ]

    def __enter__(self) -> Running:
        for reader in self._readers:
            reader.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.process.kill()
        self.process.wait()
        for reader in self._readers:
            reader.join()
        self.process.communicate()

    def wait_for(self, stream: str, text: str) -> None:
        wait_until(lambda: any(text in line for line in self._said[stream]), what=f"{text!r}, in {self._said}")


def on_a_terminal(rig: Rig, *arguments: str) -> tuple[int, str]:
    """The exit status, and what was drawn on a terminal of 150 columns, without its colours and moves."""
    ours, theirs = pty.openpty()
    environ = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "150", "LINES": "50"}
    process = subprocess.Popen([*RUN, *arguments], cwd=rig.folder, env=environ, stdout=theirs, stderr=theirs)
    os.close(theirs)
    drawn = b""
    try:
        while chunk := _read(ours):
            drawn += chunk
        status = process.wait(10)
    finally:
        process.kill()
        process.wait()
        os.close(ours)
    return status, re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", drawn.decode())


def _read(terminal: int) -> bytes:
    try:
        return os.read(terminal, 65536)
    except OSError:  # nobody has it open any more
        return b""
