"""Whether the soak benchmark tells growth from noise, and says so when it cannot."""

from __future__ import annotations

import argparse
import math
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks import _figures
from benchmarks._slopes import Slope, fit
from benchmarks.soak import MOST_POINTS, QUANTITIES, Soaked, a_minute, gathered, judge, report
from tests.rigs import ROOT, need_program

BLOCK_S = 30.0
EVERY_S = 2.0


def times(minutes: float) -> list[float]:
    return list(np.arange(0, minutes * 60, EVERY_S))


@given(per_h=st.floats(-100, 100), level=st.floats(-1e3, 1e3), minutes=st.floats(8, 300))
@settings(deadline=None, max_examples=50)
def test_a_straight_line_has_its_own_slope(per_h: float, level: float, minutes: float) -> None:
    at_s = times(minutes)
    slope = fit(at_s, [level + per_h * one / 3600 for one in at_s], block_s=BLOCK_S)
    assert slope.per_h == pytest.approx(per_h, abs=1e-6)
    assert slope.low - 1e-6 <= per_h <= slope.high + 1e-6
    assert minutes / 60 * 0.8 <= slope.span_h <= minutes / 60


@pytest.mark.parametrize("correlation", [0.0, 0.7, 1.0])
@pytest.mark.parametrize("blocks", [12, 40])
def test_the_interval_holds_the_true_slope_nearly_always(blocks: int, correlation: float) -> None:
    """Where blocks tell nothing of each other, where each is much like the one before, and for a random walk."""
    chance, misses, told = np.random.default_rng(blocks), 0, 0
    for _ in range(200):
        noise = chance.normal(size=blocks)
        for index in range(1, blocks):
            noise[index] += correlation * noise[index - 1]
        at_s = [(index + 0.5) * BLOCK_S for index in range(blocks)]
        slope = fit([0.0, *at_s, blocks * BLOCK_S], [noise[0], *noise, noise[-1]], block_s=BLOCK_S)
        misses += not slope.low <= 0 <= slope.high
        told += math.isfinite(slope.high)
    assert misses <= 12
    assert told > 190


def test_what_climbs_and_wanders_grows() -> None:
    chance = np.random.default_rng(1)
    walk = np.cumsum(2.0 + chance.normal(0, 1.5, 20))
    at_s = [one for one in times(10) if one < 20 * BLOCK_S]
    slope = fit(at_s, [float(walk[int(one / BLOCK_S)]) for one in at_s], block_s=BLOCK_S)
    assert slope.verdict(1.0) == "grows"


def test_what_grows_in_steps_within_noise_is_found() -> None:
    chance, at_s = np.random.default_rng(5), times(60)
    values = [200 + 5 * (one // 300) + chance.normal(0, 2) for one in at_s]
    slope = fit(at_s, values, block_s=BLOCK_S)
    assert slope.per_h == pytest.approx(60, rel=0.1)
    assert slope.verdict(1.0) == "grows"


def test_what_repeats_itself_in_each_block_is_no_growth() -> None:
    at_s = times(60)
    values = [20.0 + (3 if one % BLOCK_S < 12 else 0) for one in at_s]
    assert fit(at_s, values, block_s=BLOCK_S).verdict(0.1) == "flat"


def test_a_short_look_at_noise_tells_nothing_and_for_how_long_to_look() -> None:
    chance = np.random.default_rng(2)
    short, at_s = times(10), times(300)
    values = 200 + chance.normal(0, 2, len(at_s))
    slope = fit(short, list(values[: len(short)]), block_s=BLOCK_S)
    assert slope.verdict(1.0) == "cannot tell yet"
    needed_h = slope.needed_h(1.0)
    assert needed_h is not None and 0.2 < needed_h < 5
    assert fit(at_s, list(values), block_s=BLOCK_S).verdict(1.0) == "flat"


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [
        (-1.0, 0.9, "flat"),
        (0.2, 0.9, "flat"),
        (-9.0, -3.0, "flat"),
        (-1.0, 1.1, "cannot tell yet"),
        (0.0, 1.1, "cannot tell yet"),
        (0.1, 1.1, "grows"),
        (2.0, 3.0, "grows"),
        (-math.inf, math.inf, "cannot tell yet"),
    ],
)
def test_the_verdict_is_of_the_interval(low: float, high: float, verdict: str) -> None:
    assert Slope(0.0, low, high, 0.0, 10, 1.0).verdict(1.0) == verdict


@pytest.mark.parametrize("at_s", [[], [1.0], [0.0, 10.0, 29.0, 31.0]])
def test_less_than_two_blocks_have_no_slope(at_s: list[float]) -> None:
    with pytest.raises(ValueError, match="a slope needs two at least"):
        fit(at_s, at_s, block_s=BLOCK_S)


def test_a_day_of_samples_is_brought_down_to_few_blocks() -> None:
    at_s = list(np.arange(0, 86_400.0, 20.0))
    slope = fit(at_s, [1.0] * len(at_s), block_s=BLOCK_S)
    assert 200 <= slope.blocks <= 400
    assert (slope.low, slope.per_h, slope.high) == (0.0, 0.0, 0.0)


def test_samples_that_are_missing_leave_a_gap_and_no_more() -> None:
    at_s = [one for one in times(60) if not 600 < one < 1200]
    slope = fit(at_s, [one / 3600 for one in at_s], block_s=BLOCK_S)
    assert slope.per_h == pytest.approx(1.0)
    assert slope.blocks < 120


# What a soak comes to


def soaked(rss: Sequence[float], *, drops: Sequence[float] | None = None) -> Soaked:
    """All else is flat, and there is no GPU."""
    at_s = [float(2 * index) for index in range(len(rss))]
    samples = []
    for index, value in enumerate(rss):
        flat = dict.fromkeys((quantity.name for quantity in QUANTITIES), 5.0)
        counted = float(drops[index]) if drops else float(index)
        samples.append({**flat, "rss": value, "drops": counted, "gpu_memory": None})
    return Soaked(at_s, samples)


def status(done: Soaked) -> int:
    options = argparse.Namespace(cycle=BLOCK_S, warm_up=2.0)
    return report(done, judge(done, options))


def test_what_grows_is_named_and_fails(capsys: pytest.CaptureFixture[str]) -> None:
    assert status(soaked([200 + index / 30 for index in range(300)])) == 1
    lines = capsys.readouterr().out.splitlines()
    [rss] = [line for line in lines if line.startswith("| rss")]
    assert rss == "| rss | 206 MB | +60 | +60 to +60 | 1 | grows |"
    assert "| gpu_memory | | | | 1 | not there |" in lines
    assert sum(line.endswith("| flat |") for line in lines) == len(QUANTITIES) - 2


def test_what_grew_while_it_warmed_up_does_not_count() -> None:
    assert status(soaked([200 + min(index, 55) for index in range(300)])) == 0


def test_what_cannot_be_told_is_no_success() -> None:
    noise = np.random.default_rng(3).normal(0, 3, 300)
    assert status(soaked([200 + float(one) for one in noise])) == 2


def test_drops_that_come_faster_and_faster_grow() -> None:
    assert status(soaked([200.0] * 300, drops=[index**2 / 10 for index in range(300)])) == 1


def test_what_went_wrong_fails_whatever_the_figures_say(capsys: pytest.CaptureFixture[str]) -> None:
    done = soaked([200.0] * 300)
    done.wrong.append("the agent ended by itself")
    assert status(done) == 1
    assert "WRONG: the agent ended by itself" in capsys.readouterr().out


def test_a_rate_is_of_the_time_before_it_and_unknown_where_a_count_is() -> None:
    counts = [0.0, 1.0, 2.0, None, 4.0, 10.0]
    rates = a_minute([0.0, 10.0, 20.0, 30.0, 40.0, 50.0], counts, 20.0)
    assert rates == [None, None, 6.0, None, 6.0, None]


def test_the_common_report_has_the_slopes_and_their_verdicts_and_few_points(tmp_path: Path) -> None:
    done = soaked([200 + index / 30 for index in range(1000)])
    done.wrong.append("no results of gate within 40 s")
    options = argparse.Namespace(cycle=BLOCK_S, warm_up=2.0)
    made = gathered(done, judge(done, options), options, {"date": "2026-11-26"})
    _figures.write(made, tmp_path / "soak.json")
    told = _figures.read(tmp_path / "soak.json")
    [rss] = [figure for figure in told.figures if figure.name == "rss, growth"]
    assert rss.values == [pytest.approx(60)]
    assert not told.missed, "a slope alone is no verdict"
    assert "rss: grows; +60 to +60 MB an hour with 99%; may be 1 MB an hour" in told.notes
    assert "WRONG: no results of gate within 40 s" in told.notes
    assert len(told.series["minutes"]) == len(told.series["over_time"]["rss MB"]) <= MOST_POINTS
    assert told.series["minutes"][-1] > 0.98 * done.at_s[-1] / 60
    assert told.series["slopes"]["rss"]["per_h"] == pytest.approx(60)


def test_an_interval_without_ends_is_null_in_the_json(tmp_path: Path) -> None:
    done = soaked([200.0 + index % 7 for index in range(120)])
    options = argparse.Namespace(cycle=BLOCK_S, warm_up=2.0)
    slopes = judge(done, options)
    assert math.isinf(slopes["rss"].high)
    _figures.write(gathered(done, slopes, options, {}), tmp_path / "soak.json")
    told = _figures.read(tmp_path / "soak.json")
    assert told.series["slopes"]["rss"]["high"] is None
    assert "rss: cannot tell yet; too short for an interval; may be 1 MB an hour" in told.notes


@pytest.mark.soak
def test_a_short_soak_is_survived_and_kept(tmp_path: Path) -> None:
    need_program("mosquitto", "mosquitto")
    kept = tmp_path / "soak.json"
    command = [sys.executable, "-m", "benchmarks.soak", "--minutes", "1.2", "--warm-up", "0.2", "--cycle", "15"]
    done = subprocess.run([*command, "--json", str(kept)], cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode in (0, 1, 2), done.stderr
    told = _figures.read(kept)
    assert told.series["wrong"] == []
    assert told.series["happened"]["broker killed"] >= 4
    assert told.series["happened"]["models swapped"] >= 7
    assert told.series["happened"]["results"] > 100
    assert max(told.series["over_time"]["children"]) <= 2
    assert len(told.figures) >= 8
