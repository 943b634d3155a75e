"""What is timed and counted where: in the line, in a camera's thread, on the way to the broker."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import ClassVar

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from edge_agent.config import CameraOptions, InferenceOptions
from edge_agent.connection import ConnectionQuality
from edge_agent.data import Detections, Frame, Image, Message, ModelRef, Result, Timings, VideoFormat
from edge_agent.frames import FramePool
from edge_agent.histogram import WINDOW_S, Histogram
from edge_agent.messages import Percentiles, Topics
from edge_agent.outbox import Outbox
from edge_agent.pipeline import Reporter
from edge_agent.queue import FrameQueue, QueueLimits
from edge_agent.session import Session, StillPicture
from edge_agent.snapshots import Snapshots
from edge_agent.stats import LineStats, percentiles
from edge_agent.threads import OwnerThread
from edge_agent.zones import Watch


class Clock:
    """Monotonic seconds that pass when somebody says so."""

    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s

    def ns(self) -> int:
        return round(self.now_s * 1e9)


def result(number: int, *, total_ms: float = 10.0, captured_s: float = 0.0) -> Result:
    nothing = Detections(np.zeros((0, 4), np.float32), np.zeros(0, np.float32), np.zeros(0, np.int64))
    frame = Frame("a", number, np.zeros((4, 4, 3), np.uint8), 0, int(captured_s * 1e9))
    return Result(frame, ModelRef("m", "1", "detect"), nothing, Timings(1.0, 2.0, 4.0, 0.5, total_ms))


# The line


def test_stages_are_told_over_the_last_minute() -> None:
    clock = Clock()
    stats = LineStats(clock=clock)
    for number in range(100):
        stats.record(result(number, total_ms=number + 1.0))
    first = percentiles(stats.stages["total"].recent(clock()))
    clock.now_s += WINDOW_S
    stats.record(result(100, total_ms=7.0))

    assert (first.n, first.max) == (100, 100.0)
    assert [first.p50, first.p95, first.p99] == pytest.approx([50, 95, 99], rel=0.01)
    last = percentiles(stats.stages["total"].recent(clock()))
    assert (last.n, last.max) == (1, 7.0)
    assert last.p50 == last.p99 == pytest.approx(7.0, rel=0.01)
    assert stats.stages["total"].total().count == 101


def test_stages_that_nothing_went_through_are_unknown() -> None:
    assert percentiles(Histogram()) == Percentiles(None, None, None, None, 0)


def test_batches_are_counted_by_size_and_forgotten() -> None:
    clock = Clock()
    stats = LineStats(clock=clock)
    for size in (1, 8, 1, 3):
        stats.record_batch(size)
    assert stats.batch_sizes() == {"1": 2, "3": 1, "8": 1}
    clock.now_s += WINDOW_S
    stats.record_batch(2)
    assert stats.batch_sizes() == {"2": 1}


def test_a_reset_begins_anew_what_the_line_timed() -> None:
    stats = LineStats(clock=Clock())
    stats.record(result(0))
    stats.record_batch(1)
    stats.record_encoding(0.1)
    stats.reset()
    assert {window.total().count for window in stats.stages.values()} == {0}
    assert stats.batch_sizes() == {}


def test_each_batch_is_counted_and_each_result_that_is_told_is_timed() -> None:
    told: list[Message] = []
    stats = LineStats()

    async def test() -> None:
        with OwnerThread("chores") as chores:
            report = Reporter(
                topics=Topics("edge", "rig"),
                publish=told.append,
                stats=stats,
                snapshots=Snapshots(chores=chores),
                tracks=None,
                watch=Watch({}, lost_frames=1),
                inference=InferenceOptions(max_results_per_s=1.0),
            )
            for start in range(0, 40, 4):
                report([result(number, captured_s=number / 10) for number in range(start, start + 4)])

    asyncio.run(test())
    assert stats.batch_sizes() == {"4": 10}
    assert stats.stages["encode"].total().count == len(told) == 4
    assert stats.stages["inference"].total().count == 40


# A camera's thread


class SlowSource:
    """A camera that takes its time, by a clock of ours: to wait for a picture, and to decode it."""

    Options: ClassVar[type[CameraOptions]] = CameraOptions
    is_live = True

    def __init__(self, clock: Clock, decode_ms: Sequence[float | None]) -> None:
        self._clock = clock
        self._decode_ms = iter(decode_ms)

    def check(self) -> Sequence[str]:
        return []

    def open(self) -> VideoFormat:
        return VideoFormat(4, 4)

    def grab(self) -> int | None:
        self._clock.now_s += 0.033
        return self._clock.ns()

    def retrieve(self, into: Image) -> Image | None:
        """None of a picture that is damaged."""
        took_ms = next(self._decode_ms)
        self._clock.now_s += (took_ms or 5.0) / 1e3
        return None if took_ms is None else into

    def close(self) -> None:
        """Nothing to close."""


def test_capture_is_what_reading_took_once_the_picture_was_there() -> None:
    clock, took_ms = Clock(), (12.0, None, 3.0, 100.0)
    quality = ConnectionQuality(clock=clock)
    frames = FrameQueue(clock_ns=clock.ns)
    frames.add_camera("a", QueueLimits())
    session = Session(
        "a",
        lambda: SlowSource(clock, took_ms),
        frames=frames,
        pool=FramePool(),
        quality=quality,
        still=StillPicture(0.0),
        clock_ns=clock.ns,
    )
    session.open()
    for _ in took_ms:
        session.step()
    seen = quality.capture.recent(clock())
    assert seen.count == quality.captured - 1 == 3, "the damaged one did not come to the queue"
    assert seen.percentiles_ms(1, 50, 100) == pytest.approx([3.0, 12.0, 100.0], rel=0.01)
    assert seen.sum_ms == pytest.approx(115.0, abs=0.01)


# On the way to the broker


@settings(max_examples=80, stateful_step_count=50, deadline=None)
class Publishing(RuleBasedStateMachine):
    """Whatever becomes of results: those that the broker has are timed once each, those it has not never are, and
    nothing is remembered of messages that are gone."""

    @initialize(spools=st.booleans(), most=st.integers(0, 4))
    def begin(self, spools: bool, most: int) -> None:
        self.loop = asyncio.new_event_loop()
        self.clock = Clock()
        self.put_at, self.took_ms = dict[str, float](), list[float]()
        self.under_way: list[Message] = []

        async def make() -> None:
            self.outbox = Outbox(max_results=most, spools_results=spools, clock=self.clock)

        self.loop.run_until_complete(make())
        self.outbox.connected()

    @rule(pause_ms=st.floats(1, 5000))
    def puts(self, pause_ms: float) -> None:
        self.clock.now_s += pause_ms / 1e3
        name = f"r{len(self.put_at)}"
        self.put_at[name] = self.clock()
        self.outbox.put(Message("t", b"{}", "results", id=name))

    @precondition(lambda self: self.outbox.is_connected and self.outbox.waiting()["results"])
    @rule()
    def sends(self) -> None:
        message = self.loop.run_until_complete(self.outbox.next())
        assert message is not None
        self.under_way.append(message)

    @precondition(lambda self: self.under_way)
    @rule(pause_ms=st.floats(1, 5000), which=st.integers(0, 99))
    def arrives(self, pause_ms: float, which: int) -> None:
        self.clock.now_s += pause_ms / 1e3
        message = self.under_way.pop(which % len(self.under_way))
        self.outbox.done(message)
        assert message.id is not None
        self.took_ms.append((self.clock() - self.put_at[message.id]) * 1e3)

    @precondition(lambda self: self.under_way)
    @rule()
    def is_refused(self) -> None:
        self.outbox.drop(self.under_way.pop(), "refused")

    @rule()
    def the_link_breaks(self) -> None:
        for message in self.under_way:
            self.outbox.put_back(message)
        self.under_way.clear()
        self.outbox.disconnected()

    @rule()
    def the_link_is_back(self) -> None:
        if not self.outbox.is_connected:
            self.outbox.connected()

    @invariant()
    def those_that_arrived_are_timed(self) -> None:
        seen = self.outbox.publishing.total()
        assert seen.count == len(self.took_ms)
        assert seen.sum_ms == pytest.approx(sum(self.took_ms))
        assert seen.max_ms == pytest.approx(max(self.took_ms, default=0.0))

    @invariant()
    def no_more_is_remembered_than_waits_or_is_under_way(self) -> None:
        assert len(self.outbox._put_at) == self.outbox.waiting()["results"] + len(self.under_way)

    def teardown(self) -> None:
        self.loop.close()


TestPublishing = Publishing.TestCase


def test_what_comes_from_the_spool_is_not_timed() -> None:
    async def test() -> None:
        outbox = Outbox(spools_results=True)
        outbox.put(Message("t", b"{}", "results", id="kept while the broker is away"))
        outbox.connected()
        [kept] = outbox.left_behind(10)
        outbox.done(kept)
        assert outbox.publishing.total().count == 0

    asyncio.run(test())


@pytest.mark.parametrize("kind", ["status", "replies", "events"])
def test_only_results_are_timed(kind: str) -> None:
    async def test() -> None:
        outbox = Outbox()
        outbox.connected()
        outbox.put(Message("t", b"{}", kind, id="one"))  # type: ignore[arg-type]
        message = await outbox.next()
        assert message is not None
        outbox.done(message)
        assert outbox.publishing.total().count == 0

    asyncio.run(test())
