"""What grows in an agent that runs for long, while cameras, broker and models come and go.

`python -m benchmarks.soak [--minutes 10] [--cameras 4] [--json FILE] [--plot FILE]`. Needs a mosquitto, and matplotlib
for the plot. It is one long measurement and has no repeats: how sure one may be is told of each slope. An agent in a
process of its own watches synthetic cameras and two over HTTP, one of these in a process of its own, that lose their
server once a cycle; once a cycle the broker is killed, the model swapped and swapped back, and a command sent, now and
then a wrong one. Exit status: 0 all is flat, 1 something grows or went wrong, 2 that cannot be told yet: then the table
says for about how long to measure. CTRL+C ends it early, with what there is.
"""

from __future__ import annotations

import argparse
import math
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psutil

from benchmarks import _figures, _slopes
from benchmarks._figures import Figure, Report, command, machine
from benchmarks._slopes import CONFIDENCE, Slope
from benchmarks._troubles import FEEDS, Disturbances, Listener, configuration, need_mosquitto
from tests.network_cameras import Link, MjpegServer, synthetic_jpegs
from tests.rigs import AgentProcess, Broker, config, wait_until

START_S = 60.0
RECOVERY_S = 40.0
STOP_S = 15.0
MOST_POINTS = 300
"""Of each quantity that is kept for a plot."""


@dataclass(frozen=True, slots=True)
class Quantity:
    """What is watched, by its name in a sample, and by how much it may grow an hour."""

    name: str
    unit: str
    most_per_h: float


QUANTITIES = (
    Quantity("rss", "MB", 1.0),
    Quantity("children_rss", "MB", 1.0),
    Quantity("gpu_memory", "MB", 1.0),
    Quantity("fds", "", 1.0),
    Quantity("threads", "", 1.0),
    Quantity("children", "", 1.0),
    Quantity("state_files", "MB", 1.0),
    Quantity("cpu", "%", 2.0),
    Quantity("loop_lag_p99", "ms", 5.0),
    Quantity("drops_a_minute", "", 5.0),
)

Sample = Mapping[str, float | None]


@dataclass(slots=True)
class Soaked:
    """What came of it: samples, each at its time, what happened meanwhile, and what should not have."""

    at_s: list[float] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)
    happened: dict[str, int] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)

    def values(self, name: str, *, cycle_s: float) -> list[float | None]:
        """One quantity at all times."""
        if name == "drops_a_minute":
            return a_minute(self.at_s, [one["drops"] for one in self.samples], cycle_s)
        return [one[name] for one in self.samples]


def soak(options: argparse.Namespace) -> Soaked:
    """Run the agent for so long."""
    done = Soaked()
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        broker = Broker(folder)
        stack.enter_context(broker)
        server = stack.enter_context(MjpegServer(synthetic_jpegs(width=640, height=480), fps=2 * options.fps))
        feeds = stack.enter_context(Link(urlsplit(server.url).port or 0))
        feed = f"http://127.0.0.1:{feeds.port}/video"
        body = configuration(options.cameras, options.fps, feed, options.backend)
        agent = stack.enter_context(AgentProcess(folder, config(broker.port, body)))
        listener = stack.enter_context(Listener(broker.port))
        wait_until(lambda: len(listener.results) == options.cameras, timeout_s=START_S, what="results of all cameras")
        troubles = Disturbances(broker, feeds, listener, cycle_s=options.cycle)
        try:
            _watch(done, options, agent, listener, troubles, folder / "state")
            troubles.end()
            done.wrong += _wrong_at_the_end(agent, listener, options.cameras)
        except KeyboardInterrupt:  # the agent and the broker were interrupted too
            print(f"interrupted after {done.at_s[-1] / 60 if done.at_s else 0:.1f} minutes")
        done.happened = {**troubles.done, "results": listener.results.total(), **listener.replies}
    return done


def _watch(
    done: Soaked,
    options: argparse.Namespace,
    agent: AgentProcess,
    listener: Listener,
    troubles: Disturbances,
    state: Path,
) -> None:
    process, began_s, tick = psutil.Process(agent.process.pid), time.monotonic(), threading.Event()
    while (elapsed_s := time.monotonic() - began_s) < options.minutes * 60 and agent.process.poll() is None:
        troubles.step(elapsed_s)
        try:
            done.samples.append(sample(process, state, listener.stats))
        except psutil.Error:  # the agent has gone
            return
        done.at_s.append(elapsed_s)
        tick.wait(max(0.0, began_s + len(done.at_s) * options.every - time.monotonic()))


def _wrong_at_the_end(agent: AgentProcess, listener: Listener, cameras: int) -> list[str]:
    """What should not be so, once all is there again."""
    if agent.process.poll() is not None:
        return [f"the agent ended by itself, with {agent.process.returncode}: {agent.text()[-2000:]}"]
    before = dict(listener.results)
    wrong = []
    try:
        wait_until(
            lambda: listener.is_answered() and sum(listener.results[name] > before[name] for name in before) == cameras,
            timeout_s=RECOVERY_S,
        )
    except AssertionError:
        silent = [name for name in before if listener.results[name] == before[name]]
        wrong += [f"no results of {name} within {RECOVERY_S:g} s" for name in silent]
    return [*wrong, *listener.wrong, *_wrong_when_stopped(agent)]


def _wrong_when_stopped(agent: AgentProcess) -> list[str]:
    try:
        status = agent.stop(timeout_s=STOP_S)
    except subprocess.TimeoutExpired:
        agent.process.kill()
        agent.process.wait()
        return [f"the agent did not end within {STOP_S:g} s of being stopped"]
    return [f"the agent ended with {status} when it was stopped"] if status else []


def sample(process: psutil.Process, state: Path, stats: Mapping[str, Any] | None) -> Sample:
    """One look at the agent, from outside and as it tells itself."""
    children = process.children(recursive=True)
    told: dict[str, float | None] = dict.fromkeys(("gpu_memory", "cpu", "loop_lag_p99", "drops"))
    if stats is not None:
        used = [gpu["memory_used_mb"] for gpu in stats["gpus"] or () if gpu["memory_used_mb"] is not None]
        drops = sum(sum(camera["drops"].values()) for camera in stats["cameras"].values())
        lag_ms, cpu = stats["loop_lag_ms"]["p99"], stats["process"]["cpu_percent"]
        told = {"gpu_memory": sum(used) if used else None, "cpu": cpu, "loop_lag_p99": lag_ms, "drops": drops}
    return {
        **told,
        "rss": process.memory_info().rss / 1e6,
        "children_rss": sum(_rss(child) for child in children) / 1e6,
        "fds": process.num_fds(),
        "threads": process.num_threads(),
        "children": len(children),
        "state_files": sum(_size(path) for path in state.rglob("*")) / 1e6,  # without SQLite's logs: 4 MB, then anew
    }


def _rss(process: psutil.Process) -> int:
    try:
        return int(process.memory_info().rss)
    except psutil.Error:  # it has gone
        return 0


def _size(path: Path) -> int:
    try:
        return 0 if path.name.endswith(("-wal", "-shm")) else path.stat().st_size
    except FileNotFoundError:
        return 0


def a_minute(at_s: Sequence[float], counts: Sequence[float | None], over_s: float) -> list[float | None]:
    """The rate of a counter at each time, over the time before it."""
    rates: list[float | None] = []
    begin = 0
    for now_s, count in zip(at_s, counts, strict=True):
        while now_s - at_s[begin] > over_s:
            begin += 1
        before = counts[begin]
        known = count is not None and before is not None and now_s - at_s[begin] > over_s / 2
        rates.append((count - before) * 60 / (now_s - at_s[begin]) if known else None)  # type: ignore[operator]
    return rates


def judge(done: Soaked, options: argparse.Namespace) -> dict[str, Slope]:
    """The slope of each quantity that is there, after the warm-up."""
    slopes = {}
    for quantity in QUANTITIES:
        values = done.values(quantity.name, cycle_s=options.cycle)
        seen = [
            (at_s, value)
            for at_s, value in zip(done.at_s, values, strict=True)
            if value is not None and at_s >= options.warm_up * 60
        ]
        if seen:
            slopes[quantity.name] = _slopes.fit(*zip(*seen, strict=True), block_s=options.cycle)
    return slopes


def report(done: Soaked, slopes: Mapping[str, Slope]) -> int:
    """Print the table; the exit status."""
    print(
        "\n| quantity | level | growth an hour | 99 % sure | may be | verdict |\n| --- | --- | --- | --- | --- | --- |"
    )
    verdicts = set()
    for quantity in QUANTITIES:
        slope = slopes.get(quantity.name)
        if slope is None:
            print(f"| {quantity.name} | | | | {quantity.most_per_h:g} | not there |")
            continue
        verdict = slope.verdict(quantity.most_per_h)
        verdicts.add(verdict)
        longer = f", {_told(slope.needed_h(quantity.most_per_h))}" if verdict == "cannot tell yet" else ""
        print(
            f"| {quantity.name} | {slope.level:.4g} {quantity.unit} | {slope.per_h:+.3g} | "
            f"{slope.low:+.3g} to {slope.high:+.3g} | {quantity.most_per_h:g} | {verdict}{longer} |"
        )
    print("\n" + ", ".join(f"{count} {what}" for what, count in done.happened.items()))
    for wrong in done.wrong:
        print(f"WRONG: {wrong}")
    if done.wrong or "grows" in verdicts:
        return 1
    return 2 if "cannot tell yet" in verdicts or not verdicts else 0


def _told(needed_h: float | None) -> str:
    return "measure for several times as long" if needed_h is None else f"some {needed_h:.2g} h would tell"


def gathered(
    done: Soaked, slopes: Mapping[str, Slope], options: argparse.Namespace, about: Mapping[str, str]
) -> Report:
    """The same for the common report. Its figures have no bar: a slope alone, without its interval, is no verdict; what
    the verdict is stands in the notes, and in the exit status."""
    here = [quantity for quantity in QUANTITIES if quantity.name in slopes]
    happened = ", ".join(f"{count} {what}" for what, count in done.happened.items())
    return Report(
        "soak",
        "Whether an agent that runs for long grows",
        command("soak"),
        about,
        [Figure(f"{one.name}, growth", f"{one.unit} an hour".strip(), [slopes[one.name].per_h]) for one in here],
        [
            *(_in_words(one, slopes[one.name]) for one in here),
            f"Meanwhile: {happened}.",
            *(f"WRONG: {wrong}" for wrong in done.wrong),
        ],
        series(done, slopes, options),
    )


def _in_words(quantity: Quantity, slope: Slope) -> str:
    unit = f"{quantity.unit} an hour".strip()
    known = f"{slope.low:+.3g} to {slope.high:+.3g} {unit} with {CONFIDENCE:.0%}"
    between = known if math.isfinite(slope.high - slope.low) else "too short for an interval"
    return f"{quantity.name}: {slope.verdict(quantity.most_per_h)}; {between}; may be {quantity.most_per_h:g} {unit}"


def series(done: Soaked, slopes: Mapping[str, Slope], options: argparse.Namespace) -> dict[str, Any]:
    """All quantities over time, at 300 times at most; the slopes are of all samples after the warm-up."""
    thinned = slice(None, None, max(1, -(-len(done.at_s) // MOST_POINTS)))
    return {
        "minutes": [round(at_s / 60, 3) for at_s in done.at_s[thinned]],
        "over_time": {
            f"{quantity.name} {quantity.unit}".strip(): done.values(quantity.name, cycle_s=options.cycle)[thinned]
            for quantity in QUANTITIES
            if quantity.name in slopes
        },
        "warm_up_minutes": options.warm_up,
        "slopes": {name: _finite(asdict(slope)) for name, slope in slopes.items()},
        "happened": done.happened,
        "wrong": done.wrong,
    }


def _finite(figures: Mapping[str, float]) -> dict[str, float | None]:
    """JSON knows no infinity."""
    return {name: value if math.isfinite(value) else None for name, value in figures.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--warm-up", type=float, default=4.0, help="minutes that do not count")
    parser.add_argument("--cameras", type=int, default=4)
    parser.add_argument("--fps", type=float, default=5.0, help="of each camera")
    parser.add_argument("--cycle", type=float, default=30.0, help="seconds in which everything happens once")
    parser.add_argument("--every", type=float, default=2.0, help="seconds between samples")
    parser.add_argument("--backend", default="onnx")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there too")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="with matplotlib: a .png or .svg")
    options = parser.parse_args()
    if options.cameras <= len(FEEDS):
        parser.error(f"--cameras must be more than {len(FEEDS)}")
    if options.minutes - options.warm_up < 3 * options.cycle / 60:
        parser.error("--minutes must be three cycles more than --warm-up")
    if options.plot and not find_spec("matplotlib"):
        parser.error("--plot needs matplotlib: pip install 'edge-agent[bench]'")
    need_mosquitto()
    about = machine()
    print(f"{options.minutes:g} minutes, {options.cameras} cameras, a cycle of {options.cycle:g} s", flush=True)
    done = soak(options)
    try:
        slopes = judge(done, options)
    except ValueError as error:  # it ended early
        print(error)
        slopes = {}
    status = report(done, slopes)
    told = gathered(done, slopes, options, about)
    if options.json:
        _figures.write(told, options.json)
    print()
    _figures.show(told)
    if options.plot and slopes:
        from benchmarks import _plots  # needs matplotlib

        _plots.over_time(told.title, told.series).savefig(options.plot)
    sys.exit(status)


if __name__ == "__main__":
    main()
