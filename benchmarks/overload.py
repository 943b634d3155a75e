"""An agent whose cameras bring ten times what its engine takes: how old its results are, whether its memory is flat,
and whether every frame is accounted for.

`python -m benchmarks.overload [--repeats N] [--seconds S] [--quick] [--json FILE]`. Needs a mosquitto. An agent in a
process of its own, with the queue as it is by default, watches drawn cameras; a subscriber on the same clock notes when
each result arrives. At the end the cameras are let go of, and it is counted; then they come again, and the agent is
stopped in the middle of it.
"""

from __future__ import annotations

import math
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from benchmarks import _slopes
from benchmarks._figures import Figure, Report, Runs, arguments, command, finish, machine
from benchmarks._rigs import rigs_or_exit
from benchmarks.latency import Arrival, arrivals, configuration, percentile
from tests.rigs import AgentProcess, Broker, Probe

TIMES = 10.0
SPARE = 1.2
"""Cameras of a real engine bring so many times more than that: how much it takes is known for a moment only."""
MOST_CAMERAS = 250
TRIAL = 64, 50.0
"""Cameras and their pictures a second, while it is found out how many an engine takes."""
TRIAL_S = 4.0
PERIODS_BAR = 2.0
GROWTH_BAR_MB = 1.0
MOST_WARM_UP_S = 60.0
"""The agent keeps the statistics of the last minute: until then there are more of them."""
EVERY_S = 0.25
BLOCK_S = 1.0
ASIDE_S = 1.0
"""Counting many cameras holds up results."""
SETTLE_S = 10.0
LAST_WORD_S = 5.0
FAKE = '[inference]\nbackend = "fake"\nmax_batch = 1\n[backends.fake]\nlatency_ms = 100.0\n'
REAL = '[model]\nactive = "demo-320"\n[inference]\nbackend = "onnx"\nmax_batch = 1\n'


@dataclass(frozen=True, slots=True)
class Case:
    """`cameras` 0: as many as bring `TIMES` what the engine takes. One frame a batch, so that an inference is what the
    result says it is."""

    name: str
    body: str
    cameras: int
    fps: float
    camera: str = ""
    is_quick: bool = False

    def configuration(self, port: int, cameras: int, fps: float) -> str:
        """Nothing comes on `stats` but the last word."""
        tables = "".join(
            f'[cameras.c{index}]\nsource = "synthetic"\nseed = {index}\nfps = {fps:.3f}\n{self.camera}'
            for index in range(cameras)
        )
        return configuration(port, self.body + tables, stats_every_s=3600.0)


CASES = (
    Case("fake engine, 1 camera", FAKE, 1, 100.0, is_quick=True),
    Case("fake engine, 4 cameras", FAKE, 4, 25.0, is_quick=True),
    Case("demo-320, many cameras", REAL, 0, 25.0, camera="width = 32\nheight = 32\nobjects = 0\nnoise = 0\n"),
)


# The run


def measure(case: Case, seconds: float) -> dict[str, float]:
    """What a run of one case came to."""
    cameras = case.cameras or min(MOST_CAMERAS, math.ceil(TIMES * SPARE * taken_per_s(case) / case.fps))
    names = [f"c{index}" for index in range(cameras)]
    with (
        tempfile.TemporaryDirectory() as name,
        Broker(Path(name)) as broker,
        Probe(broker.port) as probe,
        AgentProcess(Path(name), case.configuration(broker.port, cameras, case.fps)) as agent,
    ):
        probe.wait("cameras/+/results", n=cameras, timeout_s=60)
        time.sleep(min(seconds, MOST_WARM_UP_S))
        before = counters(probe)
        time.sleep(ASIDE_S)
        begin = len(probe.heard)
        memory = watch(agent.process.pid, seconds)
        heard, after = list(probe.heard[begin:]), counters(probe)
        return {
            "cameras": cameras,
            "times": _times(before, after),
            **ages(arrivals(heard), case.fps),
            **growth(memory),
            **let_go(probe, names),
            **stop(probe, agent, names),
        }


def taken_per_s(case: Case) -> float:
    """How many frames the engine takes of as much as may come."""
    with (
        tempfile.TemporaryDirectory() as name,
        Broker(Path(name)) as broker,
        Probe(broker.port) as probe,
        AgentProcess(Path(name), case.configuration(broker.port, *TRIAL)),
    ):
        probe.wait("cameras/+/results", n=TRIAL[0], timeout_s=60)
        before, began = counters(probe), time.monotonic()
        time.sleep(TRIAL_S)
        after, took_s = counters(probe), time.monotonic() - began
    return float(sum(after[name]["inferred"] - before[name]["inferred"] for name in after)) / took_s


def counters(probe: Probe) -> Mapping[str, Any]:
    """Of each camera, as the agent has them now."""
    cameras: Mapping[str, Any] = probe.command("stats.get")["result"]["cameras"]
    return cameras


def _times(before: Mapping[str, Any], after: Mapping[str, Any]) -> float:
    """How many times as many frames came as were inferred."""
    came, went = (sum(after[name][key] - before[name][key] for name in after) for key in ("captured", "inferred"))
    return came / went if went else 0.0


def watch(pid: int, seconds: float) -> list[tuple[float, float]]:
    """Resident memory, at each of its times: seconds, megabytes."""
    process, began, seen = psutil.Process(pid), time.monotonic(), list[tuple[float, float]]()
    while (at_s := time.monotonic() - began) < seconds:
        seen.append((at_s, process.memory_info().rss / 1e6))
        time.sleep(EVERY_S)
    return seen


def ages(results: Sequence[Arrival], fps: float) -> dict[str, float]:
    """At the subscriber, without the inference, in periods of a camera."""
    if not results:
        raise SystemExit("no result arrived")
    periods = [(one.age_ms - one.latency_ms["inference"]) * fps / 1e3 for one in results]
    return {"p50": percentile(periods, 50), "p99": percentile(periods, 99), "max": max(periods), "n": len(periods)}


def growth(memory: Sequence[tuple[float, float]]) -> dict[str, float]:
    """By how much memory grows in the time it was watched for, along the Theil-Sen line, and all that it swings."""
    slope = _slopes.fit(*zip(*memory, strict=True), block_s=BLOCK_S)
    levels = [level for _, level in memory]
    return {"growth": slope.per_h * slope.span_h, "swing": max(levels) - min(levels), "rss": levels[-1]}


def let_go(probe: Probe, cameras: Sequence[str]) -> dict[str, float]:
    """Frames that nobody accounts for once no more come, and by how much the queue's drops are not what came in less
    what came out."""
    for name in cameras:
        probe.command("camera.disable", camera=name)
    until = time.monotonic() + SETTLE_S
    while True:
        now, heard = counters(probe), received(probe)
        lost, wrong = unaccounted(now, heard), sum(map(_queue_error, now.values()))
        if not (lost or wrong) or time.monotonic() > until:
            return {"lost": lost, "queue": wrong}
        time.sleep(0.2)


def stop(probe: Probe, agent: AgentProcess, cameras: Sequence[str]) -> dict[str, float]:
    """Frames that nobody accounts for when it is stopped under load; -1 where its last word has no statistics."""
    for name in cameras:
        probe.command("camera.enable", camera=name)
    before = sum(received(probe).values())
    _until(lambda: sum(received(probe).values()) > before + len(cameras), "results after the cameras came again")
    if status := agent.stop(timeout_s=30):
        raise SystemExit(f"the agent ended with {status}: {agent.text()[-2000:]}")
    _until(lambda: probe.on("available")[-1].payload == b"offline", "the agent's last word")
    told = probe.on("stats")
    if not told:
        return {"lost_at_stop": -1.0, "shut_down": 0.0}
    last = told[-1].json()["cameras"]
    shut_down = sum(camera["drops"]["shutdown"] for camera in last.values())
    return {"lost_at_stop": unaccounted(last, received(probe)), "shut_down": shut_down}


def _until(is_so: Callable[[], bool], what: str) -> None:
    until = time.monotonic() + LAST_WORD_S
    while not is_so():
        if time.monotonic() > until:
            raise SystemExit(f"not within {LAST_WORD_S:g} s: {what}")
        time.sleep(0.02)


def received(probe: Probe) -> Counter[str]:
    """Results, by camera, as the subscriber counts them."""
    return Counter(message.topic.split("/")[3] for message in list(probe.heard) if message.topic.endswith("/results"))


def unaccounted(cameras: Mapping[str, Any], published: Mapping[str, int]) -> int:
    """Frames that were captured, and neither published nor dropped for a reason, or both: of all cameras."""
    return sum(
        abs(camera["captured"] - published.get(name, 0) - sum(camera["drops"].values()))
        for name, camera in cameras.items()
    )


def _queue_error(camera: Mapping[str, Any]) -> int:
    """By how many frames all that was dropped is not what came in less what came out and what waits."""
    dropped = sum(camera["drops"].values())
    return abs(int(camera["captured"] - camera["inferred"] - camera["waiting"] - dropped))


# What is told


def figures(runs: Runs, cases: Sequence[Case]) -> list[Figure]:
    made = []
    for case in cases:
        run, quick = runs[case.name], case.is_quick
        made += [
            Figure(f"{case.name}: frames that come, of those inferred", "times", run["times"]),
            Figure(f"{case.name}: age less inference, p50", "periods", run["p50"]),
            Figure(f"{case.name}: age less inference, p99", "periods", run["p99"], bar=PERIODS_BAR),
            Figure(f"{case.name}: age less inference, max", "periods", run["max"]),
            Figure(f"{case.name}: memory, growth in that time", "MB", run["growth"], bar=GROWTH_BAR_MB, quick=quick),
            Figure(f"{case.name}: memory, highest less lowest", "MB", run["swing"]),
            Figure(f"{case.name}: frames unaccounted for, cameras let go", "frames", run["lost"], bar=0.0, quick=quick),
            Figure(f"{case.name}: drops, less what came in and not out", "frames", run["queue"], bar=0.0, quick=quick),
        ]
        if min(run["lost_at_stop"]) >= 0:
            name = f"{case.name}: frames unaccounted for, stopped under load"
            made.append(Figure(name, "frames", run["lost_at_stop"], bar=0.0, quick=quick))
    return made


def notes(runs: Runs, cases: Sequence[Case]) -> list[str]:
    told = []
    for case in cases:
        run = {key: percentile(values, 50) for key, values in runs[case.name].items()}
        told.append(
            f"{case.name}: {run['cameras']:.0f} of {case.fps:g} pictures a second, a period is {1e3 / case.fps:g} ms; "
            f"{run['n']:.0f} results in a run, {run['rss']:.0f} MB"
        )
        if run["times"] < TIMES:
            told.append(f"{case.name}: only {run['times']:.1f} times as many frames came as were inferred")
        if min(runs[case.name]["lost_at_stop"]) < 0:
            told.append(
                f"{case.name}: the agent told no statistics when it was stopped, so those frames are not counted"
            )
    return told


def main() -> None:
    parser = arguments(__doc__, repeats=3)
    parser.add_argument(
        "--seconds",
        type=float,
        default=60.0,
        help="of each run, after as many, a minute at most, to warm up; 60 unless told",
    )
    parser.add_argument("--quick", action="store_true", help="without the real engine")
    options = parser.parse_args()
    if options.repeats < 1 or options.seconds < 3 * BLOCK_S:
        parser.error(f"--repeats must be 1 or more, --seconds {3 * BLOCK_S:g} or more")
    cases = [case for case in CASES if case.is_quick or not options.quick]
    runs, about = Runs(), machine("onnxruntime", "numpy", "paho-mqtt")
    for _ in range(options.repeats):
        for case in cases:
            with rigs_or_exit():
                runs.add(case.name, measure(case, options.seconds))
    title = f"{TIMES:g} times as many frames as the engine takes, for {options.seconds:g} s"
    report = Report("overload", title, command("overload"), about, figures(runs, cases), notes(runs, cases))
    sys.exit(finish(report, options))


if __name__ == "__main__":
    main()
