"""How long a camera's faults last after they are over, for `capture.py`.

The agent watches one RTSP camera; beside it, at the same time and on the same server, runs a naive loop:
`cv2.VideoCapture`, released and opened again whenever a read fails. Each fault has an agent of its own, so that its
back-off begins anew.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

from benchmarks._figures import Figure
from tests.network_cameras import Link
from tests.rigs import ROOT, AgentProcess, Broker, Probe, RtspServer, config, wait_until

SETTLE_S = 6.0  # a stream is asked about its size 5 s after it was opened, and not before
PATIENCE_S = 60.0
NAIVE_PATIENCE_S = 5.0  # beyond the agent's recovery
LONGEST_S = 60  # of any fault, from the first picture on; a film must be longer
RESIZED_S = 0.3  # until pictures of the other size flow
SIZES = ("1920x1080", "1280x720")
BODY = """
[inference]
backend = "fake"
[backends.fake]
detections = 1
[cameras.door]
source = "rtsp"
url = "{url}"
"""


@dataclass(frozen=True, slots=True)
class Rig:
    server: RtspServer
    link: Link


@dataclass(frozen=True, slots=True)
class Fault:
    """What is done to the server or the way to it, and undone `lasts_s` later; `width`: of the pictures after it."""

    name: str
    begin: Callable[[Rig], None]
    end: Callable[[Rig], None]
    lasts_s: float
    width: int | None = None


def _cut(rig: Rig) -> None:
    rig.link.is_down = True
    rig.link.cut()


def _mend(rig: Rig) -> None:
    rig.link.is_down = False


def _resize(rig: Rig) -> None:
    rig.server.resize(SIZES[1])


def _resize_and_freeze(rig: Rig) -> None:
    _resize(rig)
    time.sleep(RESIZED_S)
    rig.server.freeze()


WIDTH_AFTER = int(SIZES[1].partition("x")[0])
FAULTS = (
    Fault("server killed for 5 s", lambda rig: rig.server.kill(), lambda rig: rig.server.start(), 5.0),
    Fault("server frozen for 15 s", lambda rig: rig.server.freeze(), lambda rig: rig.server.thaw(), 15.0),
    Fault("network cut for 5 s", _cut, _mend, 5.0),
    Fault("size changed, then a pause", _resize_and_freeze, lambda rig: rig.server.thaw(), 0.7, WIDTH_AFTER),
    Fault("size changed, no pause", _resize, lambda rig: None, 0.0, WIDTH_AFTER),
)


@dataclass(slots=True)
class Faults:
    """What `capture.py` adds to its report."""

    figures: list[Figure] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    series: dict[str, Mapping[str, Sequence[float | None]]] = field(default_factory=dict)
    missing: dict[str, list[str]] = field(default_factory=dict)

    def add(self, name: str, ours: Sequence[float | None], naive: Sequence[float | None]) -> None:
        """A figure of the repeats in which the agent came to it, beside the naive loop's if it did so in each of
        them."""
        both = [(our, their) for our, their in zip(ours, naive, strict=True) if our is not None]
        there = [their for _, their in both if their is not None]
        if both:
            reference = ("naive cv2", there) if len(there) == len(both) else ("", ())
            self.figures.append(Figure(name, "s", [our for our, _ in both], *reference))
        for who, times in (("the agent", ours), ("the naive loop", naive)):
            if None in times:
                case = f"{name} ({sum(time is not None for time in times)} of {len(times)})"
                self.missing.setdefault(who, []).append(case)


class NaiveLoop:
    """A process that reads a stream, and what it said of each read: when, and the picture's width; 0: it failed."""

    def __init__(self, url: str) -> None:
        self.reads: list[tuple[float, int]] = []
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks._capture_faults", url],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            cwd=ROOT,
            env={**os.environ, "OPENCV_FFMPEG_CAPTURE_OPTIONS": "rtsp_transport;tcp"},
        )
        self._listener = threading.Thread(target=self._listen)

    def __enter__(self) -> NaiveLoop:
        self._listener.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._process.kill()
        self._listener.join()
        self._process.wait()

    def lost_at(self, since_s: float) -> float | None:
        return next((at_s for at_s, width in list(self.reads) if at_s > since_s and not width), None)

    def back_at(self, since_s: float, wanted: int | None) -> float | None:
        return next(
            (at_s for at_s, width in list(self.reads) if at_s > since_s and width and wanted in (None, width)), None
        )

    def _listen(self) -> None:
        assert self._process.stdout is not None
        with self._process.stdout as lines:
            for line in lines:
                at_s, width = line.split()
                self.reads.append((float(at_s), int(width)))


def read_naively(url: str) -> None:
    """Print each read; of failures in a row the first."""
    import cv2

    def opened() -> cv2.VideoCapture:
        return cv2.VideoCapture(url, cv2.CAP_FFMPEG, [cv2.CAP_PROP_N_THREADS, 1])

    capture, was_there = opened(), True
    while True:
        ok, frame = capture.read()
        if ok or was_there:
            print(f"{time.monotonic():.4f} {frame.shape[1] if ok else 0}", flush=True)
        if not ok:
            capture.release()
            capture = opened()
        was_there = ok


@dataclass(frozen=True, slots=True)
class Agent:
    """What the agent says over MQTT of its camera."""

    probe: Probe

    def lost_at(self, since_s: float) -> float | None:
        return next((at_s for at_s, state in self._states() if at_s > since_s and state != "running"), None)

    def back_at(self, since_s: float, width: int | None) -> float | None:
        for message in self.probe.on("cameras/door/results"):
            if message.at > since_s and (width is None or message.json()["width"] == width):
                return message.at
        return None

    def waited_s(self, since_s: float, until_s: float) -> float:
        """How long of that it waited for its next attempt, the one that was the last."""
        attempts = [at_s for at_s, state in self._states() if state == "connecting" and at_s < until_s]
        return max(0.0, attempts[-1] - since_s) if attempts else 0.0

    def _states(self) -> Sequence[tuple[float, str]]:
        return [(message.at, message.json()["state"]) for message in self.probe.on("cameras/door/status")]


def suffer(fault: Fault, video: Path, folder: Path, broker: Broker) -> dict[str, float | None]:
    """The fault once: seconds until each noticed, and, from its end, until each was back; None: not in time."""
    server = RtspServer(live=SIZES[0]) if fault.width else RtspServer(video)
    with (
        server,
        Link(server.port) as link,
        tempfile.TemporaryDirectory(dir=folder) as place,
        Probe(broker.port, "edge/rig/cameras/#", qos=0) as probe,
    ):
        url = server.url.replace(str(server.port), str(link.port))
        agent, rig = Agent(probe), Rig(server, link)
        with AgentProcess(Path(place), config(broker.port, BODY.format(url=url))), NaiveLoop(url) as naive:
            wait_until(lambda: agent.back_at(0, None) and naive.back_at(0, None), timeout_s=30, what="both read")
            time.sleep(SETTLE_S)
            began_s = time.monotonic()
            fault.begin(rig)
            time.sleep(fault.lasts_s)
            fault.end(rig)
            over_s = time.monotonic()
            back_at_s = _when(lambda: agent.back_at(over_s, fault.width), PATIENCE_S)
            naive_back_at_s = _when(lambda: naive.back_at(over_s, fault.width), NAIVE_PATIENCE_S)
            lost_at_s = agent.lost_at(began_s)
            return {
                "noticed_s": _since(began_s, lost_at_s),
                "naive_noticed_s": _since(began_s, naive.lost_at(began_s)),
                "back_s": _since(over_s, back_at_s),
                "naive_back_s": _since(over_s, naive_back_at_s),
                "waited_s": agent.waited_s(max(over_s, lost_at_s), back_at_s) if lost_at_s and back_at_s else None,
            }


def _when(look: Callable[[], float | None], patience_s: float) -> float | None:
    try:
        return float(wait_until(look, timeout_s=patience_s))
    except AssertionError:
        return None


def _since(began_s: float, at_s: float | None) -> float | None:
    return None if at_s is None else at_s - began_s


def measure(video: Path, folder: Path, *, repeats: int) -> Faults:
    """Every fault so many times; `video` is longer than LONGEST_S."""
    runs: dict[str, dict[str, list[float | None]]] = {fault.name: {} for fault in FAULTS}
    with Broker(folder) as broker:
        assert isinstance(broker, Broker)
        for _ in range(repeats):
            for fault in FAULTS:
                for name, value in suffer(fault, video, folder, broker).items():
                    runs[fault.name].setdefault(name, []).append(value)
    found = Faults(notes=list(KNOWN), series=dict(runs))
    for name, values in runs.items():
        found.add(f"{name}: noticed after", values["noticed_s"], values["naive_noticed_s"])
        found.add(f"{name}: back after", values["back_s"], values["naive_back_s"])
    waits = {name: [wait for wait in values["waited_s"] if wait is not None] for name, values in runs.items()}
    told = [f"{name} {median(waited):.2g} s" for name, waited in waits.items() if waited]
    found.notes.append(f"Of the agent's time back, its last back-off was: {', '.join(told)}.")
    found.notes += [
        f"While it was watched, {who} did not get so far each time: {', '.join(cases)}."
        for who, cases in found.missing.items()
    ]
    return found


KNOWN = (
    "Faults: the agent with its defaults, but for a fake engine. Noticed: from the fault's beginning until its "
    "status is no longer running. Back: from its end (the server is there again) until the first result over MQTT.",
    "The naive loop tries again without a pause, and takes a core while the camera is away; the agent backs off, for "
    "any share of 1, 2, 4 … 30 s, so that its time back grows with the fault's.",
    "A frozen server: the naive loop's read waits for 30 s, and goes on with the old connection and the pictures that "
    "waited in it; the agent gives up after 10 s and connects anew.",
    "A size that changes within the stream (at 15 pictures a second): OpenCV goes on in the old one; the agent asks "
    "the server after a pause of 0.5 s and more, and else every 30 s.",
)


if __name__ == "__main__":
    read_naively(sys.argv[1])
