"""How long a picture takes from the camera to a subscriber, stage by stage, and whether the stages add up.

`python -m benchmarks.latency [--repeats N] [--seconds S] [--quick] [--json FILE]`. Needs a mosquitto. An agent in a
process of its own watches one drawn camera at 30 pictures a second; a subscriber on the same clock notes when each
result arrives. Meanwhile a bare paho client, in another process, publishes a result's very bytes as often: that is the
reference, and how long the broker and the delivery take. No stage is found by subtraction: the line's come in each
result, encoding and publishing in the agent's statistics of the same time, the rest is that of the bare client.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import paho.mqtt.client as paho
from paho.mqtt.enums import CallbackAPIVersion

from benchmarks._figures import Figure, Report, Runs, arguments, command, finish, machine
from benchmarks._rigs import rigs_or_exit
from tests.rigs import DEVICE, ROOT, AgentProcess, Broker, Heard, Probe

FPS = 30.0
WARM_UP_S = 1.0
MOST_S = 50.0
"""The agent's statistics are of the last 50 to 60 s."""
BAR = 0.05
LINE = ("queue", "preprocess", "inference", "postprocess")
TOLD = ("encode", "publish")
STAGES = (*LINE, *TOLD, "broker and delivery")
BARE = "bare paho, the same bytes"


@dataclass(frozen=True, slots=True)
class Case:
    """An agent with one camera. `is_quick`: it is in the short run too."""

    name: str
    body: str
    is_quick: bool = False


def _cases() -> Sequence[Case]:
    engines = {
        "fake, 5 ms": '[inference]\nbackend = "fake"\n[backends.fake]\nlatency_ms = 5.0\n',
        "demo-320": '[model]\nactive = "demo-320"\n[inference]\nbackend = "onnx"\n',
    }
    return [
        Case(
            f"{engine}, {width}x{height}",
            f'{body}[cameras.c0]\nsource = "synthetic"\nwidth = {width}\nheight = {height}\nfps = {FPS}\n',
            is_quick=engine.startswith("fake") and width == 640,
        )
        for engine, body in engines.items()
        for width, height in ((640, 480), (1280, 720))
    ]


CASES = _cases()


# What was heard


@dataclass(frozen=True, slots=True)
class Arrival:
    """A result at the subscriber: how old its picture was then, and what it says of the stages (`latency_ms`)."""

    camera: str
    seq: int
    age_ms: float
    latency_ms: Mapping[str, float]


def arrivals(heard: Sequence[Heard]) -> list[Arrival]:
    """Of messages, those that are results. The two clocks of this machine are a constant apart, but where one sets it
    meanwhile."""
    apart_s = (time.time_ns() - time.monotonic_ns()) / 1e9
    return [
        _arrival(message.json(), message.at + apart_s)
        for message in heard
        if message.topic.startswith(f"edge/{DEVICE}/cameras/") and message.topic.endswith("/results")
    ]


def _arrival(result: Mapping[str, Any], at_s: float) -> Arrival:
    captured_s = datetime.fromisoformat(result["captured_at"].replace("Z", "+00:00")).timestamp()
    return Arrival(result["camera"], result["seq"], (at_s - captured_s) * 1e3, result["latency_ms"])


def percentile(values: Sequence[float], percent: float) -> float:
    return float(np.percentile(np.asarray(values, float), percent))


def gap(stages_ms: Mapping[str, float], total_ms: float) -> float:
    """By which share of the total the sum of the stages is off."""
    return abs(sum(stages_ms.values()) - total_ms) / total_ms


# The run


def configuration(port: int, body: str, *, stats_every_s: float = 5.0) -> str:
    """An agent's configuration, on the broker at a port; all that is not named here is as it comes."""
    return (
        f'[agent]\ndevice = "{DEVICE}"\n[mqtt]\nport = {port}\n[snapshots]\non_start = false\n'
        f"[stats]\ninterval_s = {stats_every_s}\n{body}"
    )


def measure(case: Case, seconds: float) -> dict[str, float]:
    """Milliseconds: of the total, of each stage, of the bare client, and of what comes after the model."""
    with (
        tempfile.TemporaryDirectory() as name,
        Broker(Path(name)) as broker,
        Probe(broker.port) as probe,
        AgentProcess(Path(name), configuration(broker.port, case.body)),
    ):
        payload = probe.wait("cameras/c0/results", timeout_s=60)[0].payload
        with bare_client(broker.port) as client:
            time.sleep(WARM_UP_S)
            probe.command("stats.reset")
            begin = len(probe.heard)
            stamps = publish_bare(client, payload, seconds)
        stats = probe.command("stats.get")["result"]
        heard = list(probe.heard[begin:])
    return summary(arrivals(heard), stats["stages_ms"], stamps, heard)


def summary(
    results: Sequence[Arrival], told: Mapping[str, Any], stamps: Sequence[tuple[int, int]], heard: Sequence[Heard]
) -> dict[str, float]:
    """What one run came to. `stamps`: before and after each of the bare client's publishes."""
    bare = {int(one.topic.rpartition("/")[2]): one.at * 1e3 for one in heard if one.topic.startswith("bare/")}
    there = [(began / 1e6, ended / 1e6, bare[n]) for n, (began, ended) in enumerate(stamps) if n in bare]
    if not results or not there:
        raise SystemExit(f"{len(results)} results and {len(there)} of {len(stamps)} bare messages arrived")
    totals = [one.age_ms for one in results]
    stages = {stage: percentile([one.latency_ms[stage] for one in results], 50) for stage in LINE}
    stages |= {stage: told[stage]["p50"] for stage in TOLD}
    stages["broker and delivery"] = percentile([at - ended for _, ended, at in there], 50)
    return {
        **{f"p{percent}": percentile(totals, percent) for percent in (50, 95, 99)},
        **stages,
        "gap": gap(stages, percentile(totals, 50)),
        "capture": told["capture"]["p50"],
        "after": percentile([one.age_ms - one.latency_ms["total"] for one in results], 50),
        "bare": percentile([at - began for began, _, at in there], 50),
        "results": len(results),
    }


# The bare client, in a process of its own


def bare_client(port: int) -> subprocess.Popen[str]:
    """It waits for what it is to publish."""
    words = [sys.executable, "-m", "benchmarks.latency", "--bare", str(port)]
    return subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT)


def publish_bare(client: subprocess.Popen[str], payload: bytes, seconds: float) -> list[tuple[int, int]]:
    """Let it publish for so long. Monotonic nanoseconds, before and after each."""
    said, _ = client.communicate(json.dumps({"payload": payload.decode(), "seconds": seconds}), timeout=seconds + 30)
    if client.returncode:
        raise SystemExit(f"the bare client ended with {client.returncode}")
    return [(began, ended) for began, ended in json.loads(said)]


def be_bare(port: int) -> None:
    """Publish from the calling thread, as aiomqtt does for the agent: when that returns, the socket has it."""
    client = paho.Client(CallbackAPIVersion.VERSION2, protocol=paho.MQTTv5)
    client.connect("127.0.0.1", port)
    while not client.is_connected():
        client.loop(0.1)
    wanted = json.load(sys.stdin)
    stamps, next_s = [], time.monotonic()
    for number in range(int(wanted["seconds"] * FPS)):
        began_ns = time.monotonic_ns()
        client.publish(f"bare/{number}", wanted["payload"].encode())
        stamps.append((began_ns, time.monotonic_ns()))
        next_s += 1 / FPS
        client.loop(0)
        time.sleep(max(0.0, next_s - time.monotonic()))
    client.disconnect()
    print(json.dumps(stamps))


# What is told


def figures(runs: Runs, cases: Sequence[Case]) -> list[Figure]:
    made = []
    for case in cases:
        run = runs[case.name]
        made += [Figure(f"{case.name}: total, {p}", "ms", run[p], quick=case.is_quick) for p in ("p50", "p95", "p99")]
        made.append(Figure(f"{case.name}: stages added up, off by", "", run["gap"], bar=BAR, quick=case.is_quick))
        made.append(Figure(f"{case.name}: after the model", "ms", run["after"], BARE, run["bare"]))
    return made


def series(runs: Runs, cases: Sequence[Case]) -> dict[str, Any]:
    """Medians: of each stage by case, and of the whole beside."""
    middle = {case.name: {key: percentile(values, 50) for key, values in runs[case.name].items()} for case in cases}
    return {
        "cases": [case.name for case in cases],
        "stages": {stage: [round(middle[case.name][stage], 4) for case in cases] for stage in STAGES},
        "total": [round(middle[case.name]["p50"], 4) for case in cases],
    }


def notes(drawn: Mapping[str, Any], runs: Runs) -> list[str]:
    told = []
    for index, name in enumerate(drawn["cases"]):
        parts = ", ".join(f"{stage} {values[index]:.2f}" for stage, values in drawn["stages"].items())
        whole, capture = drawn["total"][index], percentile(runs[name]["capture"], 50)
        told.append(f"{name}: {parts} of {whole:.2f} ms. In the queue's: {capture:.2f} ms until it is decoded.")
    told.append(
        "Total: from the camera's stamp to the subscriber. After the model: what of that its result does not tell."
    )
    return told


def main() -> None:
    parser = arguments(__doc__, repeats=5)
    parser.add_argument("--seconds", type=float, default=20.0, help=f"of each run, {MOST_S:g} at most; 20 unless told")
    parser.add_argument("--quick", action="store_true", help=f"only {', '.join(c.name for c in CASES if c.is_quick)}")
    parser.add_argument("--bare", type=int, metavar="PORT", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.bare:
        be_bare(options.bare)
        return
    if options.repeats < 1 or not 1 <= options.seconds <= MOST_S:
        parser.error(f"--repeats must be 1 or more, --seconds 1 to {MOST_S:g}")
    cases = [case for case in CASES if case.is_quick or not options.quick]
    runs, about = Runs(), machine("aiomqtt", "paho-mqtt", "onnxruntime", "numpy")
    for _ in range(options.repeats):
        for case in cases:
            with rigs_or_exit():
                runs.add(case.name, measure(case, options.seconds))
    drawn = series(runs, cases)
    report = Report(
        "latency",
        f"From the camera to an MQTT subscriber, {FPS:g} pictures a second",
        command("latency"),
        about,
        figures(runs, cases),
        notes(drawn, runs),
        drawn,
    )
    sys.exit(finish(report, options))


if __name__ == "__main__":
    main()
