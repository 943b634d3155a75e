"""What holds for an agent whose models change under load, whatever runs them."""

from __future__ import annotations

import itertools
import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import psutil

from tests.rigs import AgentProcess, Probe

CAMERAS = "abcd"
BATCH = 4
FPS = 15
PERIOD_MS = 1000 / FPS
CAMERA_TABLES = "".join(
    f'[cameras.{name}]\nsource = "synthetic"\nfps = {FPS}.0\nseed = {seed}\n' for seed, name in enumerate(CAMERAS)
)

WATCHED = """
import asyncio, gc, json, sys, time
from pathlib import Path
from edge_agent import agent, cli

lags, pauses, began = [], [], [0.0]

def collected(phase, info):
    now = time.monotonic()
    if phase == "start":
        began[0] = now
    else:
        pauses.append(((now - began[0]) * 1e3, info["generation"], now))

gc.callbacks.append(collected)
started = time.monotonic()

async def watch():
    while True:
        began = time.monotonic()
        await asyncio.sleep(0.005)
        lags.append((time.monotonic() - began - 0.005) * 1e3)

run = agent.run

async def watched(config, stop, **more):
    watching = asyncio.ensure_future(watch())
    again = await run(config, stop, **more)
    watching.cancel()
    lags.sort()
    pause_ms, generation, at = max(pauses)
    told = {"n": len(lags), "p99": lags[int(0.99 * len(lags))], "max": lags[-1]}
    told["collection"] = f"{pause_ms:.0f} ms (generation {generation}, {at - started:.0f} s after the start)"
    Path("lags.json").write_text(json.dumps(told))
    return again

agent.run = watched
sys.exit(cli.main(["run", "--config", sys.argv[1]]))
"""


class Watched(AgentProcess):
    """An agent whose event loop is timed from within; `lags.json` says how late it was."""

    command = (sys.executable, "-c", WATCHED)


@dataclass
class Swaps:
    """What was seen of them: the replies' results, RSS after each in MB, the last statistics, and all results."""

    kinds: Mapping[str, str]
    """What each model's results hold."""
    replies: list[dict[str, Any]] = field(default_factory=list)
    resident_mb: list[float] = field(default_factory=list)
    stats: dict[str, Any] = field(default_factory=dict)
    results: dict[str, list[dict[str, Any]]] = field(default_factory=dict)

    def __iter__(self) -> Any:
        return iter(self.replies)

    def make(self, agent: AgentProcess, probe: Probe, models: Sequence[str], count: int, after: Any = None) -> None:
        """Swap `count` times; `after` is called after each."""
        process = psutil.Process(agent.process.pid)
        for name in CAMERAS:
            probe.wait(f"cameras/{name}/results", n=10, timeout_s=60)
        for model in itertools.islice(itertools.cycle(models), count):
            reply = probe.command("model.activate", name=model, timeout_s=60)
            assert reply["status"] == "ok", reply
            self.replies.append(reply["result"])
            self.resident_mb.append(process.memory_info().rss / 1e6)
            if after is not None:
                after()
        self.stats = probe.wait("stats", n=len(probe.on("stats")) + 2)[-1].json()

    def gather(self, probe: Probe) -> None:
        self.results = {name: [message.json() for message in probe.on(f"cameras/{name}/results")] for name in CAMERAS}

    def check(self, lags: Path) -> str:
        """Nothing is lost, nothing mixed up, no gap too long, nothing left behind; what was measured, in words."""
        self._check_replies()
        for name in CAMERAS:
            self._check_camera(name)
        everything = [result for name in CAMERAS for result in self.results[name]]
        for result in everything:
            given = {kind for kind in self.kinds.values() if kind in result}
            assert given == {self.kinds[result["model"]["name"]]}, "the output is of the model that is named"
        gap_ms, at, after = max(
            (gap, place, self.results[name][place + 1]["model"]["name"])
            for name in CAMERAS
            for place, gap in enumerate(gaps_ms(self.results[name]))
        )
        inference_ms = max(result["latency_ms"]["inference"] for result in everything) * BATCH
        lag = json.loads(lags.read_text())
        n = len(self.resident_mb)
        early, late = (
            statistics.median(some) for some in (self.resident_mb[n // 20 : n // 3], self.resident_mb[-n // 3 :])
        )
        told = (
            f"{len(self.replies)} swaps: longest gap {gap_ms:.0f} ms (after {at} results, before {after}), "
            f"longest inference {inference_ms:.0f} ms; loop lag p99 {lag['p99']:.1f} ms, max {lag['max']:.0f} ms; "
            f"longest garbage collection {lag['collection']}; "
            f"RSS {early:.0f} -> {late:.0f} MB; dropped {self.stats['cameras']['a']['drops']}"
        )
        assert gap_ms <= 2 * PERIOD_MS + inference_ms, told
        assert lag["p99"] < 20, told
        assert late <= 1.08 * early, told
        return told

    def _check_replies(self) -> None:
        before = [reply["previous"] for reply in self.replies[1:]]
        assert before == [reply["model"]["name"] for reply in self.replies[:-1]]

    def _check_camera(self, name: str) -> None:
        camera = self.stats["cameras"][name]
        dropped = sum(camera["drops"].values())
        under_way = camera["captured"] - camera["inferred"] - dropped
        assert 0 <= under_way <= camera["waiting"] + 4 * BATCH, camera
        assert dropped == camera["drops"]["full"] + camera["drops"]["stale"], "by policy and by nothing else"
        seqs = [result["seq"] for result in self.results[name]]
        assert seqs == sorted(set(seqs)), f"{name}: in order, and none comes twice"
        assert seqs[-1] - seqs[0] + 1 - len(seqs) <= dropped, "none is missing"


def gaps_ms(results: Sequence[dict[str, Any]]) -> list[float]:
    """Between the moments at which a camera's results were ready."""
    ready = [
        datetime.fromisoformat(result["captured_at"].replace("Z", "+00:00")).timestamp() * 1e3
        + result["latency_ms"]["total"]
        for result in results
    ]
    return [later - earlier for earlier, later in itertools.pairwise(ready)]
