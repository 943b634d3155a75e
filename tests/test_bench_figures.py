"""Whether figures, their intervals and their verdicts are what they say, and survive being written."""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Sequence
from math import comb
from pathlib import Path
from typing import Any, Literal

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks import _figures
from benchmarks._figures import HEADINGS, Figure, Report, Runs, interval

FINITE = st.floats(-1e6, 1e6)
POSITIVE = st.floats(1e-3, 1e6)


def figure(*values: float, **more: Any) -> Figure:
    return Figure("a picture", "ms", list(values), **more)


def report(*figures: Figure, **more: Any) -> Report:
    return Report("decode", "Decoding", "python -m benchmarks.decode", {"cpu": "2 cores"}, list(figures), **more)


# The interval


@pytest.mark.parametrize(
    ("count", "left_out"),
    [(1, 0), (2, 0), (5, 0), (6, 0), (8, 0), (9, 1), (11, 1), (12, 2), (15, 3), (20, 5), (100, 39)],
)
def test_as_many_are_left_out_at_each_end_as_tables_of_the_sign_test_say(count: int, left_out: int) -> None:
    assert interval(range(count)) == (left_out, count - 1 - left_out)


@given(count=st.integers(6, 600), confidence=st.sampled_from((0.9, 0.95, 0.99)))
def test_the_interval_is_the_shortest_that_has_the_confidence(count: int, confidence: float) -> None:
    left_out, last = interval(range(count), confidence)
    assert left_out + last == count - 1, "as many at each end"

    def outside(left_out: int) -> float:
        return 2 * sum(comb(count, index) for index in range(left_out + 1)) / 2**count

    assert outside(left_out) <= 1 - confidence or left_out == 0
    assert outside(left_out + 1) > 1 - confidence


@pytest.mark.parametrize("count", [6, 9, 15, 40])
@pytest.mark.parametrize("skewed", [False, True])
def test_the_true_median_lies_in_it_as_often_as_it_says(count: int, skewed: bool) -> None:
    chance = np.random.default_rng(count)
    draws = chance.exponential(size=(4000, count)) if skewed else chance.normal(size=(4000, count))
    true = np.log(2) if skewed else 0.0
    held = sum(low <= true <= high for low, high in (interval(list(draw)) for draw in draws))
    assert held / len(draws) > 0.94


@given(values=st.lists(FINITE, min_size=1, max_size=60), order=st.randoms(use_true_random=False))
def test_the_median_lies_in_it_and_the_order_is_of_no_account(values: list[float], order: Any) -> None:
    low, high = interval(values)
    assert min(values) <= low <= statistics.median(values) <= high <= max(values)
    order.shuffle(values)
    assert interval(values) == (low, high)


# Figures


@given(pairs=st.lists(st.tuples(POSITIVE, POSITIVE), min_size=1, max_size=30), scale=POSITIVE)
def test_a_ratio_is_made_in_each_repeat_so_that_what_both_saw_falls_out(
    pairs: list[tuple[float, float]], scale: float
) -> None:
    ours, theirs = [one for one, _ in pairs], [other for _, other in pairs]
    made = figure(*ours, reference="bare", beside=theirs)
    slower = figure(*(one * scale for one in ours), reference="bare", beside=[other * scale for other in theirs])
    assert made.judged == made.ratios == [one / other for one, other in pairs]
    assert slower.ratios == pytest.approx(made.ratios)
    assert made.interval[0] <= made.median <= made.interval[1]


def test_without_a_reference_the_values_themselves_are_judged() -> None:
    assert figure(1.0, 3.0, 2.0).ratios == []
    assert figure(1.0, 3.0, 2.0).median == 2.0


@pytest.mark.parametrize(
    ("values", "better", "verdict"),
    [
        ((0.9, 1.0, 1.1), "less", "met"),
        ((1.0, 1.0, 1.0), "less", "met"),
        ((0.9, 1.1, 1.2), "less", "within the noise"),
        ((1.05, 1.1, 1.2), "less", "missed"),
        ((0.9, 1.0, 1.1), "more", "met"),
        ((0.8, 0.9, 1.1), "more", "within the noise"),
        ((0.8, 0.9, 0.95), "more", "missed"),
        ((1.01,), "less", "missed"),
        ((0.9, *[1.2] * 8), "less", "missed"),  # the best of nine is left out
        ((0.9, *[1.2] * 4), "less", "within the noise"),
    ],
)
def test_a_bar_is_missed_when_the_better_end_of_the_interval_is_beyond_it(
    values: Sequence[float], better: Literal["less", "more"], verdict: str
) -> None:
    alone = figure(*values, bar=1.0, better=better)
    beside = figure(
        *(2 * value for value in values), reference="bare", beside=[2.0] * len(values), bar=1.0, better=better
    )
    assert alone.verdict == beside.verdict == verdict


def test_without_a_bar_there_is_no_verdict() -> None:
    assert figure(1.0).verdict is None
    assert report(figure(1e9)).missed == []


@given(values=st.lists(FINITE, min_size=1, max_size=30), bar=FINITE)
def test_less_and_more_are_mirror_images(values: list[float], bar: float) -> None:
    less = figure(*values, bar=bar)
    more = figure(*(-value for value in values), bar=-bar, better="more")
    assert less.verdict == more.verdict
    assert (less.verdict == "met") == (less.median <= bar)
    assert (less.verdict == "missed") == (less.interval[0] > bar)


def test_figures_that_make_no_sense_are_refused() -> None:
    with pytest.raises(ValueError, match="a picture: no values"):
        figure()
    with pytest.raises(ValueError, match="a picture: 2 values beside 1 of bare"):
        figure(1.0, 2.0, reference="bare", beside=[1.0])


def test_runs_keep_the_repeats_of_each_subject_apart() -> None:
    runs = Runs()
    for repeat in (1, 2):
        runs.add("agent", {"cpu_ms": repeat, "fps": 10 * repeat})
        runs.add("bare", {"cpu_ms": repeat / 2})
    assert runs["agent"] == {"cpu_ms": [1.0, 2.0], "fps": [10.0, 20.0]}
    assert figure(*runs["agent"]["cpu_ms"], reference="bare", beside=runs["bare"]["cpu_ms"]).median == 2.0
    with pytest.raises(KeyError):
        runs["nobody"]


# The report


@given(
    values=st.lists(st.tuples(POSITIVE, POSITIVE), min_size=1, max_size=5),
    bar=st.none() | POSITIVE,
    better=st.sampled_from(("less", "more")),
    name=st.text(max_size=20),
    quick=st.booleans(),
)
def test_what_was_written_is_read_again(
    tmp_path_factory: pytest.TempPathFactory,
    values: list[tuple[float, float]],
    bar: float | None,
    better: Literal["less", "more"],
    name: str,
    quick: bool,
) -> None:
    ours, theirs = [one for one, _ in values], [other for _, other in values]
    made = report(
        Figure(name, "µs", ours, "bare", theirs, bar, better, quick),
        Figure(name, "", ours),
        notes=[name],
        series={"minutes": [0.5, 1.0], "over_time": {"rss": [1.0, None]}},
    )
    path = tmp_path_factory.mktemp("kept") / "new" / "decode.json"
    _figures.write(made, path)
    assert _figures.read(path) == made


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"figures": [{"name": "a", "unit": "ms", "values": []}]}, "a: no values"),
        ({"figures": [{"name": "a", "unit": "ms", "values": [1], "better": "fewer"}]}, "fewer"),
        ({"figures": [{"name": "a", "unit": "ms", "values": ["1"]}]}, r"\$.figures\[0\].values\[0\]"),
        ({"figurs": []}, "figurs"),
    ],
)
def test_a_file_that_is_no_report_is_refused_and_what_is_wrong_named(
    tmp_path: Path, change: dict[str, Any], complaint: str
) -> None:
    path = tmp_path / "decode.json"
    _figures.write(report(figure(1.0)), path)
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(msgspec.ValidationError, match=complaint):
        _figures.read(path)


def test_a_file_that_is_not_there_is_said_to_be_missing(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        _figures.read(tmp_path / "decode.json")


@pytest.mark.parametrize(
    ("values", "status", "verdict"),
    [((0.9, 0.9, 0.9), 0, "met"), ((0.9, 1.1, 1.2), 0, "within the noise"), ((1.1, 1.2, 1.3), 1, "missed")],
)
def test_the_exit_status_is_1_where_a_bar_is_missed_and_the_json_is_there_in_any_case(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], values: Sequence[float], status: int, verdict: str
) -> None:
    kept = tmp_path / "decode.json"
    made = report(figure(*values, bar=1.0), notes=["On one core."])
    assert _figures.finish(made, argparse.Namespace(json=kept)) == status
    shown = capsys.readouterr().out
    assert verdict in shown
    assert "On one core." in shown
    assert _figures.read(kept) == made


def test_the_table_has_the_reference_the_ratio_and_the_bar(capsys: pytest.CaptureFixture[str]) -> None:
    made = report(figure(1.0, 2.0, 3.0, reference="bare loop", beside=[2.0, 2.0, 2.0], bar=1.1), figure(1234.5))
    assert _figures.finish(made, argparse.Namespace(json=None)) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any("≤ 1.1" in line and "bare loop" in line and "0.500 to 1.500" in line for line in lines)
    [alone] = [line for line in lines if "1,234" in line]
    assert "to" not in alone, "one value has no interval"
    assert all(len(_figures.row(one)) == len(HEADINGS) for one in made.figures)


@pytest.mark.parametrize(
    ("value", "text"), [(0.012345, "0.0123"), (1.2345, "1.23"), (123.45, "123.5"), (12345.6, "12,346"), (0.0, "0")]
)
def test_a_number_is_told_with_the_figures_that_count(value: float, text: str) -> None:
    assert _figures.number(value) == text


# What was typed, and where


@pytest.mark.parametrize(
    ("typed", "told"),
    [
        ([], "python -m benchmarks.decode"),
        (["--repeats", "3", "--json", "x.json"], "python -m benchmarks.decode --repeats 3"),
        (["--json=x.json", "--frames", "9"], "python -m benchmarks.decode --frames 9"),
    ],
)
def test_the_command_is_what_was_typed_less_where_the_json_goes(
    monkeypatch: pytest.MonkeyPatch, typed: list[str], told: str
) -> None:
    monkeypatch.setattr("sys.argv", ["benchmarks/decode.py", *typed])
    assert _figures.command("decode") == told


def test_all_benchmarks_have_repeats_and_json() -> None:
    parser = _figures.arguments("What it measures.", repeats=7)
    assert parser.parse_args([]) == argparse.Namespace(repeats=7, json=None)
    assert parser.parse_args(["--repeats", "2", "--json", "x.json"]).json == Path("x.json")


def test_the_machine_is_told_with_the_packages_that_count() -> None:
    about = _figures.machine("msgspec", "no-such-package")
    assert {"cpu", "memory", "system", "python", "date"} < set(about)
    assert about["msgspec"] == msgspec.__version__
    assert about["no-such-package"] == "not installed"


# The figures of a benchmark that runs elsewhere


def test_the_gpu_is_judged_by_the_way_the_agent_takes_and_by_its_batches() -> None:
    pytest.importorskip("onnx")
    from benchmarks.gpu import Measured, compared

    ways = [
        Measured(name, batch, None, [], fps=fps, cpu_us=[250.0, 310.0, 260.0])  # type: ignore[arg-type]
        for name, batch, fps in (
            ("depth 3", 1, [900.0, 900.0, 950.0]),
            ("depth 1", 1, [500.0, 500.0, 500.0]),
            ("batch 8", 8, [990.0, 990.0, 990.0]),
        )
    ]
    figures = compared(ways, [1000.0, 1000.0, 1000.0], [2000.0, 2000.0, 2000.0])
    judged = {(one.name, one.reference): one.verdict for one in figures if one.bar is not None}
    assert judged == {
        ("depth 3", "bare engine"): "missed",
        ("depth 3: CPU a frame", ""): "met",
        ("batch 8", "batch 1"): "met",
    }
    told = {(one.name, one.reference): one.median for one in figures if one.bar is None}
    assert told == {
        ("depth 1", "bare engine"): 0.5,
        ("batch 8", "bare engine"): 0.99,
        ("batch 8", "bare engine, batch 8"): 0.495,
    }
