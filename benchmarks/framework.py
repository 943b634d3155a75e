"""What the framework costs: an agent with drawn cameras, a fake engine and a real broker, by number of cameras.

`python -m benchmarks.framework [--cameras 1,4,16,64] [--seconds S] [--repeats N] [--quick] [--json FILE]`. Needs a
mosquitto and its clients, and cc for what is allocated and copied. Each measurement has a fresh agent, and broker and
subscriber share the machine with it. In each repeat, for each number of cameras:
- saturation: as many frames as go through;
- half load: cameras at their own pace, together half of what saturation gave in this repeat;
- the same rate for all: `EVEN_FPS` together, however many cameras share it. Whether a frame's cost depends on the
  number of cameras is judged here: at saturation it also depends on how full batches are, and on who wins the cores.
The cameras draw 640x480 pictures without shapes or noise. That is little work, but not the agent's: bare threads that
do no more than read the same cameras at the same rate tell how much of the CPU is theirs. The broker has
`set_tcp_nodelay true`: as it comes, it holds small messages back for up to 40 ms until the subscriber's TCP has spoken.
"""

from __future__ import annotations

import json
import multiprocessing
import subprocess
import sys
import tempfile
import threading
import time
from argparse import ArgumentTypeError
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from benchmarks import _threads
from benchmarks._counting import CannotCount, Counter
from benchmarks._figures import Figure, Report, Runs, arguments, command, finish, machine
from benchmarks._rigs import rigs_or_exit
from benchmarks._threads import STAGES
from edge_agent.sources.synthetic import SyntheticOptions, SyntheticSource
from tests.rigs import DEVICE, AgentProcess, Broker, Probe, need_program, wait_until

BATCH = 8
EVEN_FPS = 500.0
COUNTED_FPS, COUNTED_SIZE = 200.0, (1280, 720)
FPS_BAR, CPU_BAR_MS, P50_BAR_MS, P99_BAR_MS, FLAT_BAR = 1000.0, 0.7, 2.0, 10.0, 1.10
ALLOCATIONS_BAR = 0.001
"""A frame: none, less what happens once a minute."""

_SETTLE_S = 1.0
_BROKER = "allow_anonymous true\nset_tcp_nodelay true"
_RESULTS = f"edge/{DEVICE}/cameras/+/results"
PROGRAMS = {"mosquitto": "mosquitto", "mosquitto_sub": "mosquitto-clients"}


@dataclass(frozen=True, slots=True)
class Load:
    """So many drawn cameras of this size, together `total_fps` pictures a second; None: as many as are taken."""

    cameras: int
    total_fps: float | None = None
    width: int = 640
    height: int = 480

    @property
    def picture_bytes(self) -> int:
        return self.width * self.height * 3

    def camera(self, number: int) -> Mapping[str, Any]:
        """The options of one of them, as the configuration has them."""
        pace = {"fps": self.total_fps / self.cameras} if self.total_fps else {"pace": "fast"}
        picture = {"width": self.width, "height": self.height, "objects": 0, "noise": 0, "seed": number}
        return {"source": "synthetic", **picture, **pace}


class Agent(AgentProcess):
    """One whose threads can be told apart from outside."""

    command = (sys.executable, "-m", "benchmarks._threads", "run", "--config")


@dataclass(frozen=True, slots=True)
class Line:
    """An agent at work, what it says of itself, and the file of what came through the broker."""

    agent: AgentProcess
    probe: Probe
    heard: Path

    @property
    def pid(self) -> int:
        return self.agent.process.pid

    def stats(self, accept: Callable[[Any], bool] = lambda stats: True) -> Any:
        """The next statistics that are as wanted."""
        seen = len(self.probe.on("stats"))

        def found() -> Any:
            later = [message.json() for message in self.probe.on("stats")[seen:]]
            return next(filter(accept, later), None)

        return wait_until(found, timeout_s=60, what="statistics")

    def reset_stats(self) -> None:
        """Let the agent count and time anew."""
        self.probe.publish(f"edge/{DEVICE}/cmd", json.dumps({"id": "reset", "command": "stats.reset"}))


def configured(port: int, load: Load) -> str:
    """The agent's configuration: all as it comes, with statistics as often as in `config.toml`, but for the fake
    engine."""
    cameras = "".join(
        f"[cameras.c{number}]\n"
        + "".join(f"{key} = {json.dumps(value)}\n" for key, value in load.camera(number).items())
        for number in range(load.cameras)
    )
    return f"""
[agent]
device = "{DEVICE}"
[mqtt]
port = {port}
[snapshots]
on_start = false
[stats]
interval_s = 5
[inference]
backend = "fake"
max_batch = {BATCH}
{cameras}
"""


@contextmanager
def at_work(folder: Path, load: Load, *, form: str = ".", environ: Mapping[str, str] | None = None) -> Iterator[Line]:
    """An agent under this load, once all its cameras run. The subscriber, in a process of its own, writes a line of
    this form for each result."""
    heard = folder / "heard"
    with (
        Broker(folder, config=_BROKER) as broker,
        heard.open("wb") as out,
        Probe(broker.port, f"edge/{DEVICE}/stats") as probe,
        subprocess.Popen(["mosquitto_sub", "-p", str(broker.port), "-F", form, "-t", _RESULTS], stdout=out) as listener,
    ):
        try:
            with Agent(folder, configured(broker.port, load), environ=dict(environ or {})) as agent:
                line = Line(agent, probe, heard)
                line.stats(lambda stats: all(camera["inferred"] for camera in stats["cameras"].values()))
                time.sleep(_SETTLE_S)
                yield line
        finally:
            listener.kill()


def saturated(folder: Path, load: Load, seconds: float) -> dict[str, float]:
    """As fast as cameras, engine, loop and broker together can."""
    with at_work(folder, load) as line:
        return measured(line, seconds)


def paced(folder: Path, load: Load, seconds: float) -> dict[str, float]:
    """At the cameras' own pace; besides what `measured` gives, what the agent adds to a result's way."""
    with at_work(folder, load, form="%U %p") as line:
        began_s = time.time()
        found = measured(line, seconds)
        lines = line.heard.read_text().splitlines()[:-1]  # the last one may not be whole
    added_ms = [added for at_s, added in map(added_latency, lines) if at_s > began_s]
    p50, p99 = np.percentile(added_ms, [50, 99])
    return {**found, "added_p50_ms": float(p50), "added_p99_ms": float(p99)}


def measured(line: Line, seconds: float) -> dict[str, float]:
    """Results a second as they came through the broker; for each the CPU of the agent, and of each of its stages; and
    of the agent's own statistics of that time its loop's lag, the frames a batch, and the shares of frames dropped
    before the engine and of results after it."""
    line.reset_stats()
    before, frames, began_s = _threads.read(line.pid), results(line), time.perf_counter()
    time.sleep(seconds)
    after, done, elapsed_s = _threads.read(line.pid), results(line) - frames, time.perf_counter() - began_s
    if not done:
        sys.exit(f"no result came through in {seconds:g} s; the agent's log ends with:\n{line.agent.text()[-1000:]}")
    stats, spent = line.stats(lambda stats: stats["loop_lag_ms"]["n"]), after.since(before)
    inferred = sum(camera["inferred"] for camera in stats["cameras"].values())
    captured = sum(camera["captured"] for camera in stats["cameras"].values())
    missed = sum(sum(camera["drops"].values()) for camera in stats["cameras"].values())
    unsent = sum(stats["outbox"]["dropped"].get("results", {}).values())
    return {
        "fps": done / elapsed_s,
        "cpu_ms": (after.whole_ms - before.whole_ms) / done,
        **{stage: taken_ms / done for stage, taken_ms in spent.items()},
        "lag_p99_ms": stats["loop_lag_ms"]["p99"],
        "batch": inferred / sum(stats["batch_sizes"].values()),
        "missed": missed / captured,
        "unsent": unsent / inferred,
    }


def results(line: Line) -> int:
    """How many the subscriber has had."""
    return line.heard.read_bytes().count(b"\n")


def added_latency(line: str) -> tuple[float, float]:
    """When a result came (seconds of the wall clock), and the milliseconds from its picture's capture to then, less
    what the engine itself took."""
    at, payload = line.split(" ", 1)
    result = json.loads(payload)
    captured_s = datetime.fromisoformat(result["captured_at"].replace("Z", "+00:00")).timestamp()
    return float(at), (float(at) - captured_s) * 1e3 - result["latency_ms"]["inference"]


def cameras_alone(load: Load, seconds: float) -> float:
    """Milliseconds of CPU a picture of threads, in a fresh process, that read these cameras and do nothing else."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as fresh:
        return fresh.submit(_read_cameras, load, seconds).result()


def _read_cameras(load: Load, seconds: float) -> float:
    ended, counts = threading.Event(), [0] * load.cameras

    def read(number: int) -> None:
        source = SyntheticSource(SyntheticOptions(**load.camera(number)))
        source.open()
        picture = np.empty((load.height, load.width, 3), np.uint8)
        while not ended.is_set():
            if source.grab() is not None:
                source.retrieve(picture)
                counts[number] += 1

    threads = [threading.Thread(target=read, args=(number,)) for number in range(load.cameras)]
    for thread in threads:
        thread.start()
    wait_until(lambda: all(counts), timeout_s=60, what="all cameras run")
    time.sleep(_SETTLE_S / 2)
    before, cpu_s = sum(counts), time.process_time()
    time.sleep(seconds)
    done, cpu_s = sum(counts) - before, time.process_time() - cpu_s
    ended.set()
    for thread in threads:
        thread.join()
    return cpu_s / done * 1e3


def counted(folder: Path, load: Load, seconds: float) -> dict[str, float]:
    """Large allocations a frame, and what is copied in large pieces. Raises `CannotCount`."""
    counter = Counter(folder)
    with at_work(folder, load, environ=counter.environ) as line:
        before, frames = counter.read(), results(line)
        time.sleep(seconds)
        large, done = counter.read() - before, results(line) - frames
    return {"allocations": large.allocations / done, "copied": large.copied_bytes / done, "copies": large.copies / done}


def repeat(runs: Runs, numbers: Sequence[int], seconds: float, *, is_quick: bool) -> None:
    """All of it once, the numbers of cameras in turn."""
    for number in numbers:
        saturation = fresh(saturated, Load(number), seconds)
        half = Load(number, saturation["fps"] / 2)
        runs.add(f"saturation {number}", saturation)
        runs.add(f"half {number}", fresh(paced, half, seconds))
        if is_quick:
            continue
        even = Load(number, EVEN_FPS)
        runs.add(f"even {number}", fresh(paced, even, seconds))
        runs.add(f"cameras {number}", {"half": cameras_alone(half, seconds), "even": cameras_alone(even, seconds)})


def fresh(measure: Callable[[Path, Load, float], dict[str, float]], load: Load, seconds: float) -> dict[str, float]:
    """One measurement, in a folder that is gone after it."""
    with tempfile.TemporaryDirectory() as folder:
        return measure(Path(folder), load, seconds)


def of_a_number(runs: Runs, number: int, *, is_quick: bool) -> Iterator[Figure]:
    """What was found with so many cameras."""
    who, saturation, half = cameras(number), runs[f"saturation {number}"], runs[f"half {number}"]
    yield Figure(f"{who}, saturation: results", "/s", saturation["fps"], bar=FPS_BAR, better="more", quick=is_quick)
    for name, found in (("saturation", saturation), ("half load", half)):
        yield Figure(f"{who}, {name}: CPU a frame", "ms", found["cpu_ms"], bar=CPU_BAR_MS, quick=is_quick)
        if not is_quick:
            alone = runs[f"cameras {number}"]["half"]
            less = [all_of_it - theirs for all_of_it, theirs in zip(found["cpu_ms"], alone, strict=True)]
            yield Figure(f"{who}, {name}: less the cameras' drawing", "ms", less)
    yield Figure(f"{who}, half load: added latency, p50", "ms", half["added_p50_ms"], bar=P50_BAR_MS, quick=is_quick)
    yield Figure(f"{who}, half load: added latency, p99", "ms", half["added_p99_ms"], bar=P99_BAR_MS, quick=is_quick)
    for name, found in (("saturation", saturation), ("half load", half)):
        yield Figure(f"{who}, {name}: the loop's lag, p99", "ms", found["lag_p99_ms"])


def flatness(runs: Runs, numbers: Sequence[int]) -> Iterator[Figure]:
    """The cost of a frame beside that with the first of these numbers of cameras, at the same rate together."""
    first, *others = numbers
    costs = {number: runs[f"even {number}"]["cpu_ms"] for number in numbers}
    alone = {number: runs[f"cameras {number}"]["even"] for number in numbers}
    less = {n: [ours - theirs for ours, theirs in zip(costs[n], alone[n], strict=True)] for n in numbers}
    for number in others:
        name = f"{cameras(number)}, {EVEN_FPS:g}/s together: CPU a frame"
        yield Figure(name, "ms", costs[number], cameras(first), costs[first], bar=FLAT_BAR)
        yield Figure(f"{name}, less the cameras' drawing", "ms", less[number], cameras(first), less[first])


def pieces(numbers: Sequence[int], seconds: float, repeats: int) -> tuple[list[Figure], list[str]]:
    """What is allocated and copied with the fewest cameras, the most, and those at saturation; or why nobody knows."""
    most = Load(max(numbers), None, *COUNTED_SIZE)
    loads = [Load(number, COUNTED_FPS, *COUNTED_SIZE) for number in dict.fromkeys((min(numbers), max(numbers)))]
    figures = []
    for load in [*loads, most]:
        try:
            found = [fresh(counted, load, seconds) for _ in range(repeats)]
        except CannotCount as error:
            return [], [f"What is allocated and copied was left out: {error}."]
        pace = f"{load.total_fps:g}/s together" if load.total_fps else "saturation"
        who = f"{cameras(load.cameras)} of {load.width}x{load.height}, {pace}"
        allocations, copied = ([one[name] for one in found] for name in ("allocations", "copied"))
        figures += [
            Figure(f"{who}: allocations of 1 MiB a frame", "", allocations, bar=ALLOCATIONS_BAR, quick=True),
            Figure(f"{who}: copied a frame, at least", "bytes", copied),
        ]
    note = (
        f"Allocations are those of 1 MiB or more; one in {1 / ALLOCATIONS_BAR:,.0f} frames is tolerated, for what "
        "comes once a minute. Copied are bytes that went through memcpy and memmove, 4 KiB or more at once: at least "
        f"so many. A picture has {most.picture_bytes:,} bytes."
    )
    return figures, [note]


def cameras(number: int) -> str:
    return "1 camera" if number == 1 else f"{number} cameras"


def stages(runs: Runs, numbers: Sequence[int]) -> dict[str, Any]:
    """Medians of the CPU a frame by stage, for a plot."""
    cases = [(f"{cameras(number)}, {name}", f"{key} {number}") for number in numbers for name, key in _MODES]
    return {
        "cases": [name for name, _ in cases],
        "stages": {stage: [round(median(runs[key][stage]), 4) for _, key in cases] for stage in STAGES},
        "unit": "ms of CPU a frame; capture is the camera's drawing too",
    }


_MODES = (("saturation", "saturation"), ("half load", "half"))


def told(runs: Runs, numbers: Sequence[int]) -> Iterator[str]:
    """What the table has no room for."""
    yield (
        "CPU a frame is of the whole agent, for each result that came through; the bar on the number of cameras is for "
        f"{EVEN_FPS:g} frames a second together. Added latency: from the capture (drawing is in it) to the subscriber, "
        "less the engine's own time. The loop's lag is looked at four times a second: that p99 is the largest "
        "of a few. A camera's queue holds four frames, so that one camera alone makes no batch of eight."
    )
    for number in numbers:
        for name, key in _MODES:
            found = {what: median(values) for what, values in runs[f"{key} {number}"].items()}
            by_stage = ", ".join(f"{stage} {found[stage]:.3f}" for stage in STAGES)
            yield (
                f"{cameras(number)}, {name}: {by_stage} ms; {found['batch']:.1f} frames a batch; dropped before the "
                f"engine {found['missed']:.1%}, after it {found['unsent']:.1%}"
            )


def numbers_of(text: str) -> list[int]:
    """`1,4,16` as numbers of cameras."""
    try:
        numbers = [int(word) for word in text.split(",")]
    except ValueError:
        numbers = []
    if not numbers or min(numbers) < 1 or len(set(numbers)) < len(numbers):
        raise ArgumentTypeError(f"{text!r} is not a list of numbers of cameras, such as 1,4,16,64")
    return numbers


def main() -> None:
    parser = arguments(__doc__, repeats=5)
    parser.add_argument("--cameras", type=numbers_of, metavar="N,N,...", help="1,4,16,64 unless told")
    parser.add_argument("--seconds", type=float, help="of each measurement; 4 unless told")
    parser.add_argument("--quick", action="store_true", help="16 cameras for 2 s unless told, and no ratios")
    options = parser.parse_args()
    numbers = options.cameras or ([16] if options.quick else [1, 4, 16, 64])
    seconds = options.seconds or (2.0 if options.quick else 4.0)
    if options.repeats < 1 or seconds < 1:
        parser.error("--repeats and --seconds must be 1 or more")
    with rigs_or_exit():
        for name, package in PROGRAMS.items():
            need_program(name, package)
    runs, about = Runs(), machine("numpy", "msgspec", "aiomqtt", "paho-mqtt", "opencv-python-headless")
    for _ in range(options.repeats):
        repeat(runs, numbers, seconds, is_quick=options.quick)
    figures = [figure for number in numbers for figure in of_a_number(runs, number, is_quick=options.quick)]
    figures += [] if options.quick else flatness(runs, numbers)
    found, notes = pieces(numbers, seconds, 1 if options.quick else options.repeats)
    sys.exit(
        finish(
            Report(
                "framework",
                "What the framework costs: drawn cameras, a fake engine, a real broker",
                command("framework"),
                about,
                [*figures, *found],
                [*told(runs, numbers), *notes],
                stages(runs, numbers),
            ),
            options,
        )
    )


if __name__ == "__main__":
    main()
