"""Whether the benchmarks of latency and of overload count right, and whether both come to an end."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import pytest

from benchmarks import _figures, latency, overload
from benchmarks.latency import STAGES, arrivals, gap, summary
from tests.rigs import DEVICE, ROOT, Heard, need_program


def result(seq: int, *, captured_s: float, camera: str = "c0", **stages: float) -> dict[str, Any]:
    captured_at = datetime.fromtimestamp(captured_s, timezone.utc).isoformat().replace("+00:00", "Z")
    told = {"queue": 1.0, "preprocess": 0.5, "inference": 5.0, "postprocess": 0.5, "total": 7.0, **stages}
    return {"camera": camera, "seq": seq, "captured_at": captured_at, "latency_ms": told}


def heard(seq: int, age_s: float, camera: str = "c0") -> Heard:
    at = time.monotonic()
    payload = json.dumps(result(seq, captured_s=time.time() - age_s, camera=camera)).encode()
    return Heard(f"edge/{DEVICE}/cameras/{camera}/results", payload, False, at)


def counters(**of: int) -> dict[str, Any]:
    drops = {"full": of.pop("full", 0), "stale": 0, "shutdown": of.pop("shutdown", 0)}
    return {"captured": 0, "inferred": 0, "waiting": 0, **of, "drops": drops}


def test_a_results_age_runs_from_its_picture_to_its_arrival() -> None:
    found = arrivals([heard(3, 0.25), Heard(f"edge/{DEVICE}/stats", b"{}", False, 0.0)])
    assert [(one.camera, one.seq) for one in found] == [("c0", 3)]
    assert found[0].age_ms == pytest.approx(250, abs=5)


def test_the_gap_is_a_share_of_the_total_whichever_way_it_lies() -> None:
    assert gap({"a": 4.0, "b": 5.5}, 10.0) == pytest.approx(0.05)
    assert gap({"a": 4.0, "b": 6.5}, 10.0) == pytest.approx(0.05)


def test_a_stage_that_nobody_measures_is_missing_from_the_sum() -> None:
    now = time.monotonic()
    stamps = [(int((now + n) * 1e9), int((now + n + 1e-4) * 1e9)) for n in range(3)]
    bare = [Heard(f"bare/{n}", b"", False, now + n + 6e-4) for n in range(3)]
    told = {stage: {"p50": 0.25} for stage in ("encode", "publish", "capture")}
    found = summary(arrivals([heard(n, 0.0100) for n in range(5)]), told, stamps, bare)
    assert found["broker and delivery"] == pytest.approx(0.5, abs=0.01)
    assert found["bare"] == pytest.approx(0.6, abs=0.01)
    assert sum(found[stage] for stage in STAGES) == pytest.approx(8.0, abs=0.01)
    assert found["gap"] == pytest.approx(0.2, abs=0.05)  # of 10 ms, where the stages come to 8


def test_without_results_there_is_a_sentence_and_no_figure() -> None:
    with pytest.raises(SystemExit, match="0 results and 0 of 1 bare messages"):
        summary([], {}, [(0, 1)], [])


def test_ages_are_in_periods_and_without_the_inference() -> None:
    found = overload.ages(arrivals([heard(n, 0.025) for n in range(10)]), fps=100.0)
    assert found["p50"] == pytest.approx(2.0, abs=0.5)
    assert found["max"] >= found["p99"] >= found["p50"]
    with pytest.raises(SystemExit, match="no result arrived"):
        overload.ages([], fps=100.0)


@pytest.mark.parametrize(
    ("cameras", "published", "lost"),
    [
        ({"a": counters(captured=100, inferred=10, full=90)}, {"a": 10}, 0),
        ({"a": counters(captured=100, inferred=10, full=87, shutdown=3)}, {"a": 10}, 0),
        ({"a": counters(captured=100, inferred=10, full=89)}, {"a": 10}, 1),
        ({"a": counters(captured=100, inferred=10, full=90)}, {"a": 11}, 1),
        ({"a": counters(captured=5, inferred=4), "b": counters(captured=5, inferred=6)}, {"a": 4, "b": 6}, 2),
        ({"a": counters(captured=5, inferred=0, full=4)}, {}, 1),
    ],
)
def test_a_frame_is_unaccounted_for_whichever_way_the_sum_is_off(
    cameras: Mapping[str, Any], published: Mapping[str, int], lost: int
) -> None:
    assert overload.unaccounted(cameras, published) == lost


def test_memory_that_is_flat_does_not_grow_and_one_that_leaks_does() -> None:
    times = [0.25 * n for n in range(240)]
    assert overload.growth([(at_s, 100.0) for at_s in times])["growth"] == 0
    leaking = overload.growth([(at_s, 100.0 + 0.1 * at_s) for at_s in times])
    assert leaking["growth"] == pytest.approx(5.9, abs=0.2)
    assert leaking["swing"] == pytest.approx(5.975, abs=0.01)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "seconds"), [("latency", "2"), ("overload", "3")])
def test_a_short_run_comes_to_an_end_and_writes_its_figures(name: str, seconds: str, tmp_path: Path) -> None:
    need_program("mosquitto", "mosquitto")
    path = tmp_path / "figures.json"
    words = [sys.executable, "-m", f"benchmarks.{name}", "--repeats", "1", "--quick", "--seconds", seconds]
    done = subprocess.run([*words, "--json", str(path)], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode in (0, 1), done.stdout + done.stderr  # whether a bar is met is not for a busy machine to say
    report = _figures.read(path)
    assert report.benchmark == name
    counted = [figure for figure in report.figures if figure.unit == "frames"]
    assert all(figure.values == [0] for figure in counted)
    assert counted or set(report.series["stages"]) == set(latency.STAGES)


@pytest.mark.parametrize("name", ["latency", "overload"])
def test_a_bad_number_is_refused_with_a_sentence(name: str) -> None:
    words = [sys.executable, "-m", f"benchmarks.{name}", "--seconds", "0"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert "--seconds" in done.stderr
    assert "Traceback" not in done.stderr
