"""What a change of models costs the line: the longest silence of a camera beside that of an undisturbed line.

`python -m benchmarks.swap [--repeats N] [--json FILE] [--changes N] [--models NAME NAME] [--threads N]`. Needs a
mosquitto. In each repeat a fresh agent with four synthetic cameras at 15 frames a second is told over MQTT to change
between two bundled models and back, and is left alone for as long after each change. Before it, in a process of its
own, the same is done to a bare onnxruntime loop at the same rate, as one does it without an agent: the session is
closed and the other one loaded. A gap runs from one result of a camera to its next: when both were ready, and when both
came to a subscriber. The broker sends at once (`set_tcp_nodelay`), so that its own waiting is not taken for the line's.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks._figures import Figure, Report, Runs, arguments, command, finish, machine
from benchmarks._troubles import need_mosquitto
from edge_agent.errors import ModelError
from edge_agent.models.store import ModelStore
from tests.rigs import AgentProcess, Broker, Heard, Probe, config
from tests.swapping import BATCH, CAMERA_TABLES, CAMERAS, FPS, PERIOD_MS, gaps_ms

SETTLE_S = 0.5
"""What is still counted to a change after its reply, and how long the line is left alone before it is looked at."""
PROBATION_FRAMES = 8
BROKER = "allow_anonymous true\nset_tcp_nodelay true"
BARE_S = 1.0
"""How long the bare loop runs each model."""
GAP_BAR, DROPS_BAR = 1.0, 0.0


@dataclass(frozen=True, slots=True)
class Window:
    """What came of the line in some time: each camera's results, from the last before that time to the first after."""

    heard: Mapping[str, Sequence[Heard]]

    @property
    def arrived_gap_ms(self) -> float:
        """The longest of any camera between two results as they came to the subscriber."""
        pairs = (pair for heard in self.heard.values() for pair in itertools.pairwise(heard))
        return max((later.at - earlier.at) * 1e3 for earlier, later in pairs)

    @property
    def gap_ms(self) -> float:
        """The same between the moments at which they were ready."""
        return max(max(gaps_ms(results)) for results in self._results())

    @property
    def dropped(self) -> int:
        """Frames that were captured between two results and have none."""
        numbers = [[result["seq"] for result in results] for results in self._results()]
        return sum(seqs[-1] - seqs[0] + 1 - len(seqs) for seqs in numbers)

    @property
    def inference_ms(self) -> float:
        """As long as one usually takes: a result has its share of a batch's, in which is a frame of each camera."""
        return BATCH * statistics.median(
            float(result["latency_ms"]["inference"]) for results in self._results() for result in results
        )

    def _results(self) -> Iterator[list[dict[str, Any]]]:
        for heard in self.heard.values():
            yield [result.json() for result in heard]


def watch(probe: Probe, work: Callable[[], object]) -> Window:
    """What the line did while `work` did something."""
    before = {name: len(probe.on(_topic(name))) for name in CAMERAS}
    work()
    after = {name: len(probe.on(_topic(name))) for name in CAMERAS}
    return Window({name: probe.wait(_topic(name), n=after[name] + 1)[before[name] - 1 :] for name in CAMERAS})


def _topic(camera: str) -> str:
    return f"cameras/{camera}/results"


def change(probe: Probe, model: str) -> tuple[Window, float, dict[str, Any]]:
    """Have the agent change to a model; what the line did, the seconds to the reply, and what the reply says. Raises
    SystemExit if it does not."""
    answers: list[tuple[float, Any]] = []

    def ask() -> None:
        began_s = time.monotonic()
        reply = probe.command("model.activate", name=model, timeout_s=60)
        answers.append((time.monotonic() - began_s, reply))
        time.sleep(SETTLE_S)

    window = watch(probe, ask)
    [(took_s, reply)] = answers
    if reply["status"] != "ok":
        raise SystemExit(f"the agent does not take {model}: {reply['message']}")
    return window, took_s, reply["result"]


def changes(probe: Probe, models: Sequence[str]) -> dict[str, float]:
    """Change to each of the models, and leave the line alone for as long after each; what that came to in all."""
    changed, quiet, took, told = [], [], [], []
    for model in models:
        time.sleep(SETTLE_S)
        window, took_s, result = change(probe, model)
        time.sleep(SETTLE_S)
        changed.append(window)
        quiet.append(watch(probe, partial(time.sleep, took_s + SETTLE_S)))
        took.append(took_s * 1e3)
        told.append(result["swap_ms"])
    return {
        "gap_ms": max(one.gap_ms for one in changed),
        "quiet_gap_ms": max(one.gap_ms for one in quiet),
        "arrived_gap_ms": max(one.arrived_gap_ms for one in changed),
        "quiet_arrived_gap_ms": max(one.arrived_gap_ms for one in quiet),
        "allowed_ms": 2 * PERIOD_MS + min(one.inference_ms for one in quiet),
        "dropped": sum(one.dropped for one in changed),
        "quiet_dropped": sum(one.dropped for one in quiet),
        "swap_ms": max(told),
        "took_ms": statistics.median(took),
    }


def bare(paths: Sequence[Path], threads: int) -> float:
    """The longest time in ms between two batches of a loop that closes each model and loads the next, at the
    cameras' rate and with the agent's settings of onnxruntime."""
    import onnxruntime

    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads, settings.inter_op_num_threads = threads, 1
    settings.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session, done_s = None, []
    for path in paths:
        del session
        session = onnxruntime.InferenceSession(str(path), settings, providers=["CPUExecutionProvider"])
        [model_input] = session.get_inputs()
        height, width = model_input.shape[2:]
        batch = np.full((len(CAMERAS), 3, height, width), 0.5, np.float32)
        next_s = time.monotonic()
        end_s = next_s + BARE_S
        while next_s < end_s:
            session.run(None, {model_input.name: batch})
            done_s.append(time.monotonic())
            next_s += 1 / FPS
            time.sleep(max(0.0, next_s - time.monotonic()))
    return max(later - earlier for earlier, later in itertools.pairwise(done_s)) * 1e3


def bare_in_a_process(paths: Sequence[Path], threads: int) -> float:
    words = [sys.executable, "-m", "benchmarks.swap", "--bare", *map(str, paths), "--threads", str(threads)]
    return float(json.loads(subprocess.run(words, check=True, stdout=subprocess.PIPE).stdout))


def agent(models: Sequence[str], threads: int) -> tuple[dict[str, float], dict[str, int]]:
    """What a fresh agent with the first of the models makes of changes to the others, and what it dropped meanwhile,
    by cause and as it counts it itself."""
    body = f"""
[model]
active = "{models[0]}"
probation_frames = {PROBATION_FRAMES}
[inference]
backend = "onnx"
max_batch = {BATCH}
[backends.onnx]
threads = {threads}
{CAMERA_TABLES}"""
    with (
        tempfile.TemporaryDirectory() as name,
        Broker(Path(name), config=BROKER) as broker,
        Probe(broker.port) as probe,
        AgentProcess(Path(name), config(broker.port, body, mqtt="max_queued_results = 100000")),
    ):
        for camera in CAMERAS:
            probe.wait(_topic(camera), n=10, timeout_s=60)
        before = _drops(probe)
        values = changes(probe, models[1:])
        return values, {cause: count - before[cause] for cause, count in _drops(probe).items()}


def _drops(probe: Probe) -> dict[str, int]:
    """Of all cameras, by cause, as the next statistics tell."""
    stats = probe.wait("stats", n=len(probe.on("stats")) + 1)[-1].json()
    total: Counter[str] = Counter()
    for camera in stats["cameras"].values():
        total.update(camera["drops"])
    return dict(total)


def figures(runs: Runs) -> list[Figure]:
    """The gap beside what it may be, an undisturbed line and a bare loop; and what was dropped. What has a bar is to
    hold for every change, so it is the worst of all repeats that is judged."""
    ours = runs["agent"]
    gap = ours["gap_ms"]
    worst, allowed = max(zip(gap, ours["allowed_ms"], strict=True), key=lambda pair: pair[0] / pair[1])
    quiet = "undisturbed for as long"
    return [
        Figure("longest gap of all repeats", "ms", [worst], "two periods + one inference", [allowed], GAP_BAR),
        Figure("longest gap", "ms", gap, quiet, ours["quiet_gap_ms"]),
        Figure("longest gap", "ms", gap, "bare loop: close, load", runs["bare"]["gap_ms"]),
        Figure(
            "longest gap, as a subscriber gets it", "ms", ours["arrived_gap_ms"], quiet, ours["quiet_arrived_gap_ms"]
        ),
        Figure("frames dropped in all changes", "", [sum(ours["dropped"])], bar=DROPS_BAR),
        Figure("frames dropped undisturbed", "", [sum(ours["quiet_dropped"])]),
        Figure("handing over, as the agent tells it, at most", "ms", ours["swap_ms"]),
        Figure("from a command to its reply", "ms", ours["took_ms"]),
    ]


def main() -> None:
    parser = arguments(__doc__, repeats=5)
    parser.add_argument("--changes", type=int, default=4, help="of models in each repeat; 4 unless told")
    parser.add_argument("--models", nargs=2, default=["demo-320", "demo-160"], metavar="NAME", help="bundled ones")
    parser.add_argument("--threads", type=int, default=0, help="of onnxruntime; 0, one for each core, unless told")
    parser.add_argument("--bare", nargs="+", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.bare:
        print(bare(options.bare, options.threads))
        return
    if options.repeats < 1 or options.changes < 1 or options.threads < 0:
        parser.error("--repeats and --changes must be more than 0, --threads not less")
    try:
        paths = {name: ModelStore({}).get(name).path for name in options.models}
    except ModelError as error:
        parser.error(str(error))
    need_mosquitto()
    about = machine("onnxruntime")
    runs, drops = Runs(), Counter[str]()
    models = list(itertools.islice(itertools.cycle(options.models), options.changes + 1))
    for _ in range(options.repeats):
        runs.add("bare", {"gap_ms": bare_in_a_process([paths[name] for name in models], options.threads)})
        values, dropped = agent(models, options.threads)
        runs.add("agent", values)
        drops.update(dropped)
    told = ", ".join(f"{count} {cause}" for cause, count in drops.items() if count) or "none"
    count = options.repeats * options.changes
    notes = [
        f"{count} changes, {options.changes} a repeat, between {' and '.join(options.models)}; {len(CAMERAS)} cameras "
        f"at {FPS} frames/s, batches of {BATCH} at most. A model is verified, loaded, warmed up, measured, handed over "
        f"and watched for {PROBATION_FRAMES} frames.",
        f"The longest gap of the undisturbed line: {max(runs['agent']['quiet_gap_ms']):.0f} ms.",
        f"Dropped from the first change to the last, as the agent itself counts: {told}.",
    ]
    title = "A change of models beside an undisturbed line"
    sys.exit(finish(Report("swap", title, command("swap"), about, figures(runs), notes), options))


if __name__ == "__main__":
    main()
