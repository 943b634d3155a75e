"""Histograms beside numpy on the same durations, and windows that forget."""

from __future__ import annotations

import itertools
import math
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_agent.histogram import HIGHEST_MS, LOWEST_MS, RELATIVE_ERROR, WINDOW_S, Histogram, Window, durations

PERCENTS = (0, 1, 25, 50, 75, 95, 99, 100)
SLICE_S = WINDOW_S / 6
ERROR = RELATIVE_ERROR * (1 + 1e-9)  # of the floats themselves

milliseconds = st.floats(LOWEST_MS, HIGHEST_MS) | st.floats(math.log(LOWEST_MS), math.log(HIGHEST_MS)).map(
    lambda exponent: min(max(math.exp(exponent), LOWEST_MS), HIGHEST_MS)
)


def histogram(took_ms: Sequence[float]) -> Histogram:
    seen = Histogram()
    for one in took_ms:
        seen.record(one)
    return seen


def told(seen: Histogram) -> tuple[object, ...]:
    """All that can be asked of one."""
    limits = list(np.geomspace(LOWEST_MS, HIGHEST_MS, 400))
    everything = *seen.percentiles_ms(*range(101)), *seen.at_most(limits), seen.count, seen.max_ms, seen.clamped
    return *everything, pytest.approx(seen.sum_ms)


@given(st.lists(milliseconds, min_size=1, max_size=300))
def test_percentiles_are_those_of_numpy_within_one_percent(took_ms: list[float]) -> None:
    found = histogram(took_ms).percentiles_ms(*PERCENTS)
    lower, upper = (np.percentile(took_ms, PERCENTS, method=method) for method in ("lower", "higher"))
    for percent, one, least, most in zip(PERCENTS, found, lower, upper, strict=True):
        ranked = sorted(took_ms)[max(1, -(-percent * len(took_ms) // 100)) - 1]
        assert one == pytest.approx(ranked, rel=ERROR), percent
        assert least * (1 - ERROR) <= one <= most * (1 + ERROR), percent


@pytest.mark.parametrize("scale_ms", [0.01, 3.0, 250.0])
def test_a_hundred_thousand_durations_are_still_right(scale_ms: float) -> None:
    took_ms = np.random.default_rng(7).lognormal(np.log(scale_ms), 1.0, 100_000).clip(LOWEST_MS, HIGHEST_MS)
    found = histogram(took_ms.tolist()).percentiles_ms(50, 95, 99)
    assert found == pytest.approx(np.percentile(took_ms, (50, 95, 99)), rel=0.011)


@given(st.lists(milliseconds, max_size=100))
def test_count_sum_and_maximum_are_exact(took_ms: list[float]) -> None:
    seen = histogram(took_ms)
    assert (seen.count, seen.max_ms, seen.clamped) == (len(took_ms), max(took_ms, default=0.0), 0)
    assert seen.sum_ms == pytest.approx(math.fsum(took_ms))
    assert all(one is None or one <= seen.max_ms for one in seen.percentiles_ms(*PERCENTS))


def test_of_nothing_nothing_is_known() -> None:
    assert Histogram().percentiles_ms(50, 99) == [None, None]
    assert Histogram().at_most([1.0, 1e9]) == [0, 0]


@given(st.lists(milliseconds, max_size=100), st.lists(milliseconds, min_size=1, max_size=20))
def test_as_many_took_no_longer_than_a_limit_as_numpy_counts(took_ms: list[float], limits_ms: list[float]) -> None:
    samples = np.array(took_ms)
    for limit_ms, count in zip(limits_ms, histogram(took_ms).at_most(limits_ms), strict=True):
        assert (samples * (1 + ERROR) <= limit_ms).sum() <= count <= (samples * (1 - ERROR) <= limit_ms).sum()


@pytest.mark.parametrize(
    ("took_ms", "counts_as"),
    [
        (0.0, LOWEST_MS),
        (-3.5, LOWEST_MS),
        (LOWEST_MS / 2, LOWEST_MS),
        (math.nan, LOWEST_MS),
        (-math.inf, LOWEST_MS),
        (HIGHEST_MS * 1.5, HIGHEST_MS),
        (math.inf, HIGHEST_MS),
    ],
)
def test_what_is_out_of_range_is_counted_as_the_nearest_that_is_not(took_ms: float, counts_as: float) -> None:
    seen = histogram([took_ms, 50.0])
    assert (seen.count, seen.clamped) == (2, 1)
    assert counts_as in (pytest.approx(one, rel=ERROR) for one in seen.percentiles_ms(50, 100))
    assert seen.sum_ms == pytest.approx(counts_as + 50.0)


@given(st.lists(st.lists(milliseconds | st.floats(), max_size=30), max_size=6))
def test_merged_ones_are_as_one_that_saw_it_all(parts: list[list[float]]) -> None:
    whole = histogram([took_ms for part in parts for took_ms in part])
    assert told(Histogram.merged(map(histogram, parts))) == told(whole)


def test_merging_leaves_the_parts_as_they_were() -> None:
    part = histogram([1.0, 2.0])
    Histogram.merged([part, part]).record(3.0)
    assert (part.count, part.max_ms) == (2, 2.0)


@contextmanager
def threads_that_change_often() -> Iterator[None]:
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        yield
    finally:
        sys.setswitchinterval(before)


def test_one_thread_records_while_another_reads() -> None:
    window, most = durations(), 100_000
    done, odd = threading.Event(), list[str]()

    def record() -> None:
        for number in range(most):
            window.at(number * WINDOW_S / most / 2).record(1.0 + number)  # through three slices, all in the window
        done.set()

    with threads_that_change_often():
        writer = threading.Thread(target=record)
        writer.start()
        counted, looks = 0, 0
        while not done.is_set() or not looks:
            seen, looks = window.recent(0.0), looks + 1
            median, last = seen.percentiles_ms(50, 100)
            if seen.count < counted or seen.count > most:
                odd.append(f"{seen.count} after {counted}")
            if median is not None and last is not None and not median <= last <= seen.max_ms <= most:
                odd.append(f"{median}, {last}, {seen.max_ms}")
            if last is not None and last < seen.count * (1 - ERROR):
                odd.append(f"{seen.count} durations up to {last}")
            counted = seen.count
        writer.join()
    assert not odd, (looks, odd[:5])
    assert (window.recent(0.0).count, window.total().count) == (most, most)


times = st.lists(st.floats(0, 40 * SLICE_S, allow_nan=False), min_size=1, max_size=60).map(sorted)


@given(times, st.floats(0, 20 * SLICE_S))
def test_a_window_forgets_what_is_old_slice_by_slice_and_nothing_else(at_s: list[float], later_s: float) -> None:
    window = durations()
    for number, now_s in enumerate(at_s):
        window.at(now_s).record(1.0 + number)
    now_s = at_s[-1] + later_s
    young = [one for one in at_s if math.floor(now_s / SLICE_S) - math.floor(one / SLICE_S) < 6]
    seen = window.recent(now_s)
    assert seen.count == len(young)
    assert seen.max_ms == (len(at_s) if young else 0.0)
    assert {one for one in at_s if now_s - one < WINDOW_S - SLICE_S - 1e-6} <= set(young)
    assert all(now_s - one < WINDOW_S + 1e-6 for one in young)


@given(times, st.lists(milliseconds, min_size=60, max_size=60))
def test_the_total_forgets_nothing(at_s: list[float], took_ms: list[float]) -> None:
    window = durations()
    for now_s, one in zip(at_s, took_ms, strict=False):
        window.at(now_s).record(one)
    assert told(window.total()) == told(histogram(took_ms[: len(at_s)]))


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=60))
def test_a_clock_that_jumps_loses_nothing_of_the_total(at_s: list[float]) -> None:
    window = durations()
    for now_s in at_s:
        window.at(now_s).record(5.0)
        assert window.recent(now_s).count >= 1, "what was just recorded is there"
    assert window.total().count == len(at_s)
    assert window.recent(max(at_s) + WINDOW_S + SLICE_S).count == 0


@given(st.lists(st.floats(0, 2 * SLICE_S), min_size=20, max_size=60))
def test_a_window_keeps_no_more_than_its_slices(steps_s: list[float]) -> None:
    window = Window(list[int], lambda parts: [len([*parts])])
    for now_s in itertools.accumulate(steps_s):
        window.at(now_s)
        [parts] = window.total()
        assert parts <= 7, "what was before, and six slices"


def test_a_reset_forgets_everything_and_recording_goes_on() -> None:
    window = durations()
    window.at(5.0).record(9.0)
    window.reset()
    assert (window.recent(5.0).count, window.total().count) == (0, 0)
    window.at(5.0).record(7.0)
    assert (window.recent(5.0).max_ms, window.total().max_ms) == (7.0, 7.0)


def test_resets_while_another_thread_records_leave_the_window_whole() -> None:
    window, stop = durations(), threading.Event()

    def record() -> None:
        now_s = 0.0
        while not stop.is_set():
            window.at(now_s).record(1.0)
            now_s += SLICE_S / 3

    with threads_that_change_often():
        writer = threading.Thread(target=record)
        writer.start()
        for _ in range(300):
            window.reset()
            window.total()
        stop.set()
        writer.join()
    window.reset()
    window.at(1e9).record(4.0)
    assert (window.recent(1e9).count, window.total().count) == (1, 1)
