"""FrameQueue: bounds, policies, fairness, and honest counts."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import hypothesis.strategies as st
import numpy as np
from hypothesis import given, settings

from edge_agent.data import Frame
from edge_agent.queue import FrameQueue, QueueLimits
from tests.rigs import wait_until


def frame(camera: str, seq: int, *, size: int = 30, mono_ns: int | None = None) -> Frame:
    now = time.monotonic_ns() if mono_ns is None else mono_ns
    return Frame(camera, seq, np.zeros((1, size // 3, 3), np.uint8), 0, now)


def run(test: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(asyncio.wait_for(test(), 20))


steps = st.lists(
    st.one_of(
        st.tuples(st.just("put"), st.sampled_from("abc"), st.sampled_from((30, 60, 300, 3000))),
        st.tuples(st.just("take"), st.integers(1, 5), st.just(0)),
        st.tuples(st.just("wait"), st.integers(1, 500), st.just(0)),
    ),
    max_size=80,
)


@settings(max_examples=200, deadline=None)
@given(
    steps=steps,
    drop=st.sampled_from(("drop_oldest", "drop_newest")),
    max_frames=st.integers(1, 5),
    max_bytes=st.sampled_from((60, 600, 6000)),
    staleness_ms=st.sampled_from((0, 100)),
)
def test_frames_in_equal_frames_out_plus_drops_and_bounds_hold(
    steps: list[tuple[str, Any, int]], drop: Any, max_frames: int, max_bytes: int, staleness_ms: int
) -> None:
    now_ms = 0
    released: list[Frame] = []
    queue = FrameQueue(release=released.append, clock_ns=lambda: now_ms * 1_000_000)
    for name in "abc":
        queue.add_camera(name, QueueLimits(max_frames, max_bytes, drop, staleness_ms))
    put: list[Frame] = []
    taken: list[Frame] = []
    seq = 0
    for step, value, size in steps:
        if step == "put":
            put.append(frame(value, seq, size=size, mono_ns=now_ms * 1_000_000))
            seq += 1
            queue.put(put[-1])
        elif step == "wait":
            now_ms += value
        elif any(queue.waiting(name) for name in "abc"):
            batch = queue.take(value)  # empty where all that waited was stale
            assert len(batch) <= value
            assert not staleness_ms or all(now_ms - f.captured_mono_ns / 1e6 <= staleness_ms for f in batch)
            taken += batch
        for name in "abc":
            assert queue.waiting(name) <= max_frames
    for name in "abc":
        ours = [f.seq for f in taken if f.camera == name]
        assert ours == sorted(ours), "order within a camera is kept"
        dropped = sum(queue.drops(name).values())
        assert len([f for f in put if f.camera == name]) == len(ours) + dropped + queue.waiting(name)
        assert len([f for f in released if f.camera == name]) == dropped
    queue.close()
    queue.discard()
    assert len(put) == len(taken) + len(released)


@given(overload=st.integers(2, 20), max_frames=st.integers(1, 8))
def test_under_overload_what_is_taken_is_fresh(overload: int, max_frames: int) -> None:
    now_ms, ages_ms = 0, []
    queue = FrameQueue(clock_ns=lambda: now_ms * 1_000_000)
    queue.add_camera("a", QueueLimits(max_frames))
    for now_ms in range(0, 10_000, 10):
        queue.put(frame("a", now_ms, mono_ns=now_ms * 1_000_000))
        if now_ms % (10 * overload) == 0:
            ages_ms += [now_ms - one.captured_mono_ns / 1e6 for one in queue.take()]
    late = sorted(ages_ms[len(ages_ms) // 2 :])
    # Where a lane fills up between two takes, each is the freshest; else it may fill up once in two seconds.
    assert late[-1 if overload > max_frames else int(0.9 * len(late))] <= 10


def test_a_hiccup_of_the_engine_costs_no_frame_and_after_one_that_does_the_line_grows_again() -> None:
    now_s = 0
    queue = FrameQueue(clock_ns=lambda: now_s * 1_000_000_000)
    queue.add_camera("a", QueueLimits(max_frames=4, max_staleness_ms=0))
    for seq in range(4):
        assert queue.put(frame("a", seq))
    assert [one.seq for one in queue.take(4)] == [0, 1, 2, 3]
    for seq in range(4, 9):
        queue.put(frame("a", seq))
    assert [one.seq for one in queue.take(2)] == [7, 8]
    now_s = 3
    for seq in range(9, 13):
        queue.put(frame("a", seq))
    assert [one.seq for one in queue.take(4)] == [9, 10, 11, 12]
    assert queue.drops("a") == {"full": 3}


def test_an_engine_that_takes_batches_catches_up_after_a_hiccup_and_drops_no_more() -> None:
    now_ms, dropped = 0, []
    queue = FrameQueue(clock_ns=lambda: now_ms * 1_000_000)
    queue.add_camera("a", QueueLimits(max_frames=4))
    for now_ms in range(0, 20_000, 30):
        queue.put(frame("a", now_ms, mono_ns=now_ms * 1_000_000))
        if now_ms % 90 == 0 and not 5_000 < now_ms < 5_400:  # three at once, in time
            queue.take(8)
        dropped.append(queue.drops("a").get("full", 0))
    assert 0 < dropped[-1] == dropped[len(dropped) // 3]


def test_bursts_that_fit_lose_nothing_once_a_hiccup_is_over() -> None:
    now_ms, dropped, free_at = 0, [], 0
    queue = FrameQueue(clock_ns=lambda: now_ms * 1_000_000)
    queue.add_camera("a", QueueLimits(max_frames=4, max_staleness_ms=0))
    for now_ms in range(0, 20_000, 10):
        if now_ms % 200 < 30:  # three at once
            queue.put(frame("a", now_ms, mono_ns=now_ms * 1_000_000))
        if now_ms >= free_at and not 5_000 < now_ms < 5_700 and queue.waiting("a"):
            queue.take()
            free_at = now_ms + 20
        dropped.append(queue.drops("a").get("full", 0))
    assert 0 < dropped[-1] == dropped[len(dropped) // 2] < 30


def test_a_crowded_lane_keeps_as_many_frames_as_the_engine_has_room_for() -> None:
    queue = FrameQueue()
    queue.add_camera("a", QueueLimits(max_frames=4))
    for seq in range(6):
        queue.put(frame("a", seq))
    assert [one.seq for one in queue.take(batches=3)] == [3]
    assert [one.seq for one in queue.take(batches=2)] == [4]
    assert [one.seq for one in queue.take()] == [5]


def test_a_lane_with_other_limits_is_not_crowded() -> None:
    queue = FrameQueue()
    queue.add_camera("a", QueueLimits(max_frames=4))
    for seq in range(6):
        queue.put(frame("a", seq))
    queue.add_camera("a", QueueLimits(max_frames=4, drop="block"))
    assert [queue.take()[0].seq for _ in range(4)] == [2, 3, 4, 5]


def test_a_frame_larger_than_the_bound_is_dropped_whatever_the_policy() -> None:
    queue = FrameQueue()
    for drop in ("drop_oldest", "drop_newest", "block"):
        queue.add_camera(drop, QueueLimits(max_bytes=100, drop=drop))
        assert not queue.put(frame(drop, 0, size=300))
        assert queue.drops(drop) == {"full": 1}


def test_a_fast_camera_starves_nobody() -> None:
    queue = FrameQueue()
    for name in ("fast", "slow", "other"):
        queue.add_camera(name, QueueLimits(max_frames=100))
    for seq in range(50):
        queue.put(frame("fast", seq))
    queue.put(frame("slow", 0))
    queue.put(frame("other", 0))
    first = [queue.take()[0].camera for _ in range(3)]
    assert sorted(first) == ["fast", "other", "slow"]
    for seq in range(1, 3):
        queue.put(frame("slow", seq))
    assert sorted(f.camera for f in queue.take(4)) == ["fast", "fast", "slow", "slow"]


def test_block_waits_for_room_and_is_freed_by_close() -> None:
    queue = FrameQueue()
    queue.add_camera("file", QueueLimits(max_frames=2, drop="block", max_staleness_ms=1))
    outcomes: list[bool] = []

    def produce() -> None:
        outcomes.extend(queue.put(frame("file", seq)) for seq in range(6))

    producer = threading.Thread(target=produce)
    producer.start()
    taken = [queue.take()[0].seq for _ in range(3)]
    wait_until(lambda: queue.waiting("file") == 2)
    queue.close()
    producer.join()
    rest = [f.seq for f in queue.take(10)]
    assert taken + rest == [0, 1, 2, 3, 4]
    assert outcomes == [True] * 5 + [False]
    assert queue.drops("file") == {"shutdown": 1}
    assert queue.take() == []


def test_take_wakes_up_for_a_frame_put_by_another_thread() -> None:
    queue = FrameQueue()
    queue.add_camera("a", QueueLimits())
    with ThreadPoolExecutor(1) as other:
        taking = other.submit(queue.take)
        queue.put(frame("a", 0))
        assert [f.seq for f in taking.result(5)] == [0]
        taking = other.submit(queue.take, 0)
        queue.put(frame("a", 1))
        queue.nudge()
        assert taking.result(5) == []
        assert other.submit(queue.take).result(5)[0].seq == 1


def test_the_window_lets_a_batch_fill() -> None:
    queue = FrameQueue()
    queue.add_camera("a", QueueLimits(max_frames=10))
    queue.put(frame("a", 0))
    with ThreadPoolExecutor(1) as other:
        taking = other.submit(queue.take, 3, window_s=10.0)
        wait_until(lambda: queue.waiting("a") == 0)
        for seq in (1, 2):
            queue.put(frame("a", seq))
        assert [f.seq for f in taking.result(5)] == [0, 1, 2]
    queue.put(frame("a", 3))
    assert [f.seq for f in queue.take(3, window_s=0.01)] == [3]


def test_many_threads_lose_nothing() -> None:
    queue = FrameQueue()
    names = [f"c{i}" for i in range(4)]
    for name in names:
        queue.add_camera(name, QueueLimits(max_frames=3, drop="block"))

    def produce(name: str) -> None:
        for seq in range(200):
            queue.put(frame(name, seq))

    threads = [threading.Thread(target=produce, args=(name,)) for name in names]
    for thread in threads:
        thread.start()
    taken: dict[str, list[int]] = {name: [] for name in names}
    while sum(map(len, taken.values())) < 800:
        for f in queue.take(4):
            taken[f.camera].append(f.seq)
    for thread in threads:
        thread.join()
    assert all(seqs == list(range(200)) for seqs in taken.values())
