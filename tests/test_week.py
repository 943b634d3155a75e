"""Seven days of everything that counts, waits, remembers or tries again, on a clock of the tests' own: what is bounded
stays bounded, what was lost was to be lost, and what failed a thousand times still recovers."""

from __future__ import annotations

import asyncio
import gc
import math
import random
import tempfile
import tracemalloc
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain, pairwise
from pathlib import Path
from typing import Any, get_args

import pytest
import structlog

from edge_agent.camera import MAX_ABANDONED
from edge_agent.config import HealthOptions, PolicyOptions, SpoolOptions
from edge_agent.data import Message
from edge_agent.health import CameraFacts, Facts, Monitor, find, worst
from edge_agent.histogram import WINDOW_S
from edge_agent.messages import CheckState
from edge_agent.outbox import Outbox
from edge_agent.queue import QueueLimits
from edge_agent.spool import DiskSpool
from edge_agent.stats import LineStats, percentiles
from edge_agent.watchdog import Watchdog
from tests.simulation import FakeCamera, Fault, Simulation, Told
from tests.test_policy import HOT, NONE, Board, most_in_an_hour
from tests.test_stats import Clock, result

pytestmark = pytest.mark.slow

HOUR_S = 3600.0
DAY_S = 24 * HOUR_S
WEEK_S = 7 * DAY_S
NOON_S = 1.8e9  # of a wall clock that is set


def outages(
    chance: random.Random, *, up_s: tuple[float, float], down_s: tuple[float, float]
) -> Iterator[tuple[float, float]]:
    """From when to when something is away, all week; as many short as long ones."""
    now_s = 0.0
    while True:
        begin_s = now_s + math.exp(chance.uniform(*map(math.log, up_s)))
        now_s = begin_s + math.exp(chance.uniform(*map(math.log, down_s)))
        if now_s > WEEK_S - 2 * HOUR_S:
            return
        yield begin_s, now_s


# Cameras

CAP_S = 30.0
PATIENCE_S = 30.0
GRACE_S = 2.0
PERIOD_S = 10.0


def sick(chance: random.Random) -> FakeCamera:
    """One with faults of every kind, of seconds to half a day, and one more in the last hour."""
    spells = [*outages(chance, up_s=(300, 4 * HOUR_S), down_s=(20, 12 * HOUR_S)), (WEEK_S - 3000, WEEK_S - 1500)]
    return FakeCamera(fps=1 / PERIOD_S, faults=[(begin, end, chance.choice(get_args(Fault))) for begin, end in spells])


def attempts_at_most(lasts_s: float) -> float:
    """Each waits half of the cap on the average, once the first few were quicker."""
    return lasts_s / (CAP_S / 2) * 1.2 + 12


@pytest.mark.parametrize("seed", [1, pytest.param(2, marks=pytest.mark.soak)])
def test_cameras_that_fail_for_days_are_tried_within_bounds_and_come_back(seed: int) -> None:
    chance = random.Random(seed)
    random.seed(seed)  # the back-off's jitter
    fakes = {"sick0": sick(chance), "sick1": sick(chance), "healthy": FakeCamera(fps=1 / PERIOD_S)}
    with structlog.testing.capture_logs() as logs:
        week = Simulation(
            fakes,
            options={"backoff_max_s": CAP_S, "stall_timeout_s": PATIENCE_S, "frozen_timeout_s": 120.0},
            limits=QueueLimits(max_frames=2, max_staleness_ms=0),
            poll_s=PERIOD_S,
            keeps_frames=False,
        )
        week.run(WEEK_S, engine_s=PERIOD_S)
    for name in fakes:
        hold_to_its_counts(week, name)
    for name in ("sick0", "sick1"):
        for begin_s, end_s, kind in fakes[name].faults:
            hold_to_the_backoff(week.told[name], begin_s, end_s, kind)
        told_of = [one for one in logs if one.get("camera") == name and one["log_level"] in ("warning", "error")]
        assert len(told_of) <= 6 * len(fakes[name].faults), "a trouble that lasts is told once"
    assert week.told["healthy"].phases == [("connecting", None), ("running", None)]
    assert week.told["healthy"].count >= WEEK_S / PERIOD_S - 3


def hold_to_its_counts(week: Simulation, name: str) -> None:
    """Nothing that a camera sent went uncounted, and nothing piles up behind one."""
    camera, told = week.cameras[name], week.told[name]
    assert camera.quality.captured == told.count + sum(week.frames.drops(name).values()) + week.frames.waiting(name)
    assert camera.state.phase == "running"
    assert week.fakes[name].open_now == 1
    assert camera.hung == 0
    assert len(camera._abandoned) <= MAX_ABANDONED
    assert len(camera.quality._buckets) <= 60
    lost = times_of(told, "backoff")
    assert camera.quality.reconnects == len(lost)
    hour = camera.quality.last_hour().reconnects
    assert sum(at > WEEK_S - 59 * 60 for at in lost) <= hour <= sum(at > WEEK_S - 61 * 60 for at in lost)


def hold_to_the_backoff(told: Told, begin_s: float, end_s: float, kind: Fault) -> None:
    """Not too many attempts, not too few, and back soon after the fault is over."""
    during = [at for at in times_of(told, "connecting") if begin_s <= at < end_s]
    assert len(during) <= attempts_at_most(end_s - begin_s), (kind, end_s - begin_s)
    slowest_s = CAP_S if kind in ("gone", "raises") else CAP_S + 2 * PATIENCE_S + GRACE_S
    gaps = [after - before for before, after in pairwise(during)]
    if kind != "hung":  # then a driver may hold all the threads that it gets
        assert max(gaps, default=0.0) <= slowest_s + PERIOD_S + 1
    if kind in ("gone", "raises") and end_s - begin_s > HOUR_S:
        assert len(during) >= (end_s - begin_s) / (CAP_S / 2 + PERIOD_S) * 0.8, "it does not give up"
    if any(begin_s <= at <= end_s + PATIENCE_S for at in told.at_s):  # else it was too short to be noticed
        back_s = next((at for at in times_of(told, "running") if at >= end_s), math.inf)
        assert back_s - end_s <= slowest_s + 2 * PERIOD_S + 1, (kind, end_s - begin_s)


def times_of(told: Told, phase: str) -> list[float]:
    return [at for at, state in zip(told.at_s, told.states, strict=True) if state.phase == phase]


# The broker

TICK_S = 120.0


@dataclass
class Kept:
    """What the spool should hold: by its limits alone, the oldest goes."""

    options: SpoolOptions
    waiting: list[tuple[int, float, int]] = field(default_factory=list)
    dropped: Counter[str] = field(default_factory=Counter)
    lost: set[int] = field(default_factory=set)

    def prune(self, now_s: float) -> None:
        while self.waiting and self.waiting[0][1] <= now_s - self.options.max_age_s:
            self._drop("stale")
        while len(self.waiting) > self.options.max_messages or self.nbytes > self.options.max_mb * 1e6:
            self._drop("full")

    @property
    def nbytes(self) -> int:
        return sum(size for _, _, size in self.waiting)

    def _drop(self, cause: str) -> None:
        number, _, _ = self.waiting.pop(0)
        self.dropped[cause] += 1
        self.lost.add(number)


class Week:
    """An outbox with a spool on disk, and a broker that is away for hours at a time; now and then the process ends
    meanwhile. One event and one result each two minutes."""

    MOST_RESULTS = 50

    def __init__(self, path: Path, options: SpoolOptions, seed: int) -> None:
        self.chance = random.Random(seed)
        self.path, self.options = path, options
        self.now_s, self.made, self.results_made = 0.0, 0, 0
        self.expected = Kept(options)
        self.at_once: list[list[int]] = []  # in each session
        self.late: list[list[int]] = []
        self.dropped: Counter[str] = Counter()
        self.results: list[int] = []
        self.results_lost: Counter[str] = Counter()
        self.loop = asyncio.new_event_loop()
        self.largest_file = 0
        self.open()

    @property
    def arrived(self) -> list[int]:
        return [*chain(*self.at_once), *chain(*self.late)]

    def run(self) -> None:
        for begin_s, end_s in outages(self.chance, up_s=(1800, 8 * HOUR_S), down_s=(600, 20 * HOUR_S)):
            self.connects()
            self.until(begin_s)
            self.breaks()
            self.until(end_s)
            self.hold()
            if self.chance.random() < 0.3:
                self.close()
                self.open()
        self.connects()
        self.until(WEEK_S)
        while self.drain(100):
            pass
        self.hold()
        self.close()
        self.loop.close()

    def open(self) -> None:
        async def make() -> None:
            self.spool = DiskSpool(self.path, self.options, clock=lambda: NOON_S + self.now_s)
            self.outbox = Outbox(max_results=self.MOST_RESULTS, spool=self.spool, clock=lambda: self.now_s)

        self.loop.run_until_complete(make())

    def close(self) -> None:
        self.spool.close()
        self.dropped.update(self.spool.dropped)
        self.results_lost.update(self.outbox.dropped().get("results", {}))
        self.results_lost["ended"] += self.outbox.waiting()["results"]

    def connects(self) -> None:
        self.outbox.connected()
        self.at_once.append([])
        self.late.append([])
        self.send()

    def breaks(self) -> None:
        """With some messages under way, which nobody knows to have arrived, and one still in line."""
        self.happens()
        self.happens()
        under_way = [self.loop.run_until_complete(self.outbox.next()), *self.outbox.left_behind(3)]
        for message in under_way:
            assert message is not None and message.kind == "events"
            self.outbox.put_back(message)
        assert self.outbox.waiting()["events"] == 1
        self.outbox.disconnected()

    def until(self, at_s: float) -> None:
        while self.now_s < at_s:
            self.now_s += TICK_S
            self.tick()

    def tick(self) -> None:
        self.happens()
        self.outbox.put(Message("results", b"{}", "results", id=f"r{self.results_made}"))
        self.results_made += 1
        assert self.outbox.waiting()["results"] <= self.MOST_RESULTS
        if self.outbox.is_connected:
            self.send()
        self.spool.flush()
        self.expected.prune(NOON_S + self.now_s)
        if self.outbox.is_connected:
            self.drain(30)
        assert len(self.spool) <= self.options.max_messages
        assert self.spool.nbytes <= self.options.max_mb * 1e6
        self.largest_file = max(self.largest_file, self.path.stat().st_size)

    def happens(self) -> None:
        size = self.chance.randrange(100, 2000)
        self.outbox.put(Message("events", bytes(size), "events", id=f"e{self.made}"))
        self.expected.waiting.append((self.made, NOON_S + self.now_s, size))
        self.made += 1

    def send(self) -> None:
        """What is in line goes at once."""
        while len(self.outbox):
            message = self.loop.run_until_complete(self.outbox.next())
            assert message is not None
            self.outbox.done(message)
            if message.kind == "results":
                self.results.append(number(message))
            else:
                self.at_once[-1].append(self.takes(message))

    def drain(self, count: int) -> int:
        """What was left behind follows."""
        late = self.outbox.left_behind(count)
        for message in late:
            self.outbox.done(message)
            self.late[-1].append(self.takes(message))
        return len(late)

    def takes(self, message: Message) -> int:
        self.expected.waiting = [one for one in self.expected.waiting if one[0] != number(message)]
        return number(message)

    def hold(self) -> None:
        assert [number(one) for one in self.spool.oldest(10**6)] == [one for one, _, _ in self.expected.waiting]
        assert self.spool.nbytes == self.expected.nbytes


def number(message: Message) -> int:
    assert message.id is not None
    return int(message.id[1:])


@pytest.fixture
def quick_folder(tmp_path: Path) -> Iterator[Path]:
    """In memory where that is possible: each flush is synced."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else tmp_path) as name:
        yield Path(name)


@pytest.mark.parametrize(
    ("options", "cause"),
    [
        (SpoolOptions(max_messages=200), "full"),
        (SpoolOptions(max_mb=0.15), "full"),
        (SpoolOptions(max_age_s=5 * HOUR_S), "stale"),
        (SpoolOptions(), None),
    ],
    ids=["number", "bytes", "age", "ample"],
)
def test_a_broker_away_for_hours_at_a_time_costs_what_the_limits_say_and_no_more(
    options: SpoolOptions, cause: str | None, quick_folder: Path
) -> None:
    week = Week(quick_folder / "spool.db", options, seed=7)
    week.run()
    assert week.results_made == WEEK_S / TICK_S
    assert {key: count for key, count in week.dropped.items() if count} == week.expected.dropped
    assert set(week.expected.dropped) == ({cause} if cause else set())
    assert set(week.arrived) | week.expected.lost == set(range(week.made)), "what did not arrive was to go"
    assert len(week.arrived) == len(set(week.arrived)), "none came twice"
    assert not set(week.arrived) & week.expected.lost
    assert len(week.late) > 5 and sum(map(len, week.late)) > 500
    for session in (*week.at_once, *week.late):
        assert session == sorted(session)
    assert len(week.results) + week.results_lost.total() == week.results_made
    assert week.results == sorted(set(week.results))
    assert set(week.results_lost) <= {"away", "ended"}
    assert week.largest_file <= 2.5 * min(options.max_mb * 1e6, 1e6) + 1e5, "the file does not grow for ever"


# What is told of the last minute


def test_after_a_week_the_statistics_tell_of_the_last_minute_and_count_everything() -> None:
    clock, chance = Clock(), random.Random(3)
    stats = LineStats(clock=clock)
    began_s, made, looks = clock(), 0, 0
    recent: deque[tuple[float, float]] = deque()
    next_look_s = began_s
    while clock() < began_s + WEEK_S:
        is_quiet = (clock() // HOUR_S) % 3 == 0
        clock.now_s += 500.0 if is_quiet else chance.uniform(2, 10)
        took_ms = 10.0 + (clock() - began_s) / WEEK_S * 1000 * chance.uniform(0.9, 1.0)
        recent.append((clock(), took_ms))
        stats.record(result(made, total_ms=took_ms))
        stats.record_batch(1 + made % 4)
        made += 1
        assert stats.inferred["a"] == made
        if clock() < next_look_s:
            continue
        next_look_s, looks = clock() + 200, looks + 1
        while clock() - recent[0][0] >= WINDOW_S:
            recent.popleft()
        sure = [took for at, took in recent if clock() - at < WINDOW_S * 5 / 6]
        window = stats.stages["total"].recent(clock())
        assert len(sure) <= window.count <= len(recent)
        assert max(sure) <= window.max_ms <= max(took for _, took in recent)
        assert (percentiles(window).p50 or 0.0) >= min(took for _, took in recent) * 0.98, "the past is forgotten"
        assert sum(stats.batch_sizes().values()) == window.count
    assert looks > 1500
    assert stats.stages["total"].total().count == made
    assert len(stats.stages["total"]._kept[1]) <= 7
    clock.now_s += 2 * WINDOW_S
    assert percentiles(stats.stages["total"].recent(clock())).p50 is None
    assert stats.batch_sizes() == {}


def test_a_day_of_statistics_takes_no_more_memory_than_an_hour() -> None:
    clock = Clock()
    stats = LineStats(clock=clock)

    def pass_time(seconds: float) -> int:
        for count in range(int(seconds / 10)):
            clock.now_s += 10
            stats.record(result(count, total_ms=1.0 + count % 500))
            stats.record_batch(count % 8)
            stats.record_encoding(0.1)
        gc.collect()
        return tracemalloc.get_traced_memory()[0]

    tracemalloc.start()
    try:
        after_an_hour, after_a_day = pass_time(HOUR_S), pass_time(DAY_S)
    finally:
        tracemalloc.stop()
    assert after_a_day - after_an_hour < 50_000


# Health, and the watchdog


RECOVERY_S = 30.0
STEP_S = 10.0


@dataclass
class Flapping:
    """Something that is well first, then unwell and well in turns: for hours, or for seconds again and again."""

    chance: random.Random
    states: Sequence[Any]
    until_s: float = 600.0
    quickly_until_s: float = 0.0

    def __post_init__(self) -> None:
        self.state = self.states[0]

    def at(self, now_s: float) -> Any:
        if now_s >= self.until_s:
            if now_s >= self.quickly_until_s and self.chance.random() < 0.2:
                self.quickly_until_s = now_s + self.chance.uniform(600, 10 * HOUR_S)
            longest_s = RECOVERY_S if now_s < self.quickly_until_s else 6 * HOUR_S
            self.state = self.chance.choice([one for one in self.states if one != self.state])
            self.until_s = now_s + math.exp(self.chance.uniform(math.log(5), math.log(longest_s)))
        return self.state


@dataclass
class Followed:
    """A check as it was told, beside what was found in the last minute."""

    state: CheckState = "ok"
    found: deque[CheckState] = field(default_factory=lambda: deque(maxlen=int(2 * RECOVERY_S / STEP_S)))
    findings: int = 0
    changes: int = 0
    better_s: list[float] = field(default_factory=list)

    def follow(self, now_s: float, found: CheckState, told: CheckState) -> None:
        self.findings += bool(self.found) and found != self.found[-1]
        self.found.append(found)
        assert worst([told, found]) == told, "never better than what is found"
        if worst([told, self.state]) != told:
            lately = list(self.found)[-int(RECOVERY_S / STEP_S) :]
            assert worst([told, *lately]) == told, "better once that has lasted"
            self.better_s.append(now_s)
        if len(self.found) == self.found.maxlen:
            assert told == "ok" or set(self.found) != {"ok"}, "and not much later"
        self.changes += told != self.state
        self.state = told


def test_health_that_flaps_for_days_is_never_well_while_something_fails_and_changes_seldom() -> None:
    chance, clock = random.Random(11), Clock()
    clock.now_s = failing_looks = 0
    broker, phase = Flapping(chance, (True, False)), Flapping(chance, ("running", "backoff", "connecting"))
    monitor = Monitor(clock=clock, wall_ns=clock.ns)
    followed = {"broker": Followed(), "camera.a": Followed()}
    with structlog.testing.capture_logs() as logs:
        while clock() < WEEK_S:
            clock.now_s += STEP_S
            now = phase.at(clock())
            camera = CameraFacts(now, "timeout" if now == "backoff" else None, result_age_s=0.1)
            facts = Facts(broker.at(clock()), "refused", "ready", None, backend="fake", cameras={"a": camera})
            found = find(facts, HealthOptions(), monitor.states)
            overall, checks = monitor.follow(found, recovery_s=RECOVERY_S)
            for name, check in followed.items():
                check.follow(clock(), found[name].state, checks[name].state)
            failing = "failed" in [finding.state for finding in found.values()]
            assert not failing or overall == "failed"
            assert overall == worst([check.state for check in followed.values()])
            failing_looks += failing
    assert 0.2 < failing_looks / (WEEK_S / STEP_S) < 0.95
    for name, check in followed.items():
        assert 20 < check.changes < check.findings / 2
        assert all(after - one >= RECOVERY_S for one, after in pairwise(check.better_s))
        told = [one for one in logs if one["event"] == "health.changed" and one["check"] == name]
        assert len(told) == check.changes, "each is logged, and once"


def test_what_hangs_for_hours_is_logged_when_it_begins_and_ends_and_starves_the_watchdog() -> None:
    chance, fed = random.Random(5), Counter[str]()
    spells = {
        name: list(outages(chance, up_s=(60, 6 * HOUR_S), down_s=(1, 8 * HOUR_S))) for name in ("engine", "capture")
    }
    now_s = 0.0

    def silent_s(name: str) -> float:
        return max((now_s - begin for begin, end in spells[name] if begin <= now_s < end), default=0.0)

    watchdog = Watchdog(
        {name: lambda name=name: silent_s(name) for name in spells},  # type: ignore[misc]
        patience={"capture": 4.0},
        timeout_s=30.0,
        tell=lambda *states: bool(fed.update(states)) or True,
    )
    watchdog.ready()
    limits_s = {"engine": 15.0, "capture": 60.0}
    late_looks, looks = 0, 0
    with structlog.testing.capture_logs() as logs:
        while now_s < WEEK_S:
            now_s += STEP_S
            looks += 1
            late_looks += any(silent_s(name) > limits_s[name] for name in spells)
            watchdog.look()
    assert fed["WATCHDOG=1"] == looks - late_looks
    assert 0.1 < late_looks / looks < 0.9
    for name, limit_s in limits_s.items():
        hung = sum(
            any(begin <= at < end and at - begin > limit_s for at in looks_of(begin, end))
            for begin, end in spells[name]
        )
        told = Counter(one["event"] for one in logs if one["of"] == name)
        assert hung > 5
        assert told == {"watchdog.no_progress": hung, "watchdog.progress_again": hung}


def looks_of(begin_s: float, end_s: float) -> Iterator[float]:
    """The times at which the watchdog looked between these."""
    at_s = math.ceil(begin_s / STEP_S) * STEP_S
    while at_s < end_s:
        yield at_s
        at_s += STEP_S


# The latency ladder; a week of noise is in test_policy


def test_a_week_of_working_days_ends_each_night_on_the_best_model() -> None:
    """From eight to six the load is three times as high; on two of the days it is hot besides, and on one the first
    lower rung cannot be loaded."""
    board = Board(options=PolicyOptions(window_s=60), rate=0.5, every_s=6.0)
    for day in range(7):
        begin_s, before = board.now_s, len(board.changes)
        board.refuse = (1,) if day == 3 else ()
        board.run(8 * HOUR_S)
        assert board.at == 0, "nothing happened at night"
        board.run(10 * HOUR_S, 3.0, HOT if day in (1, 4) else NONE)
        assert board.at > 0
        downs = [change for change in board.changes[before:] if change.to > change.origin]
        assert downs[0].at_s - begin_s <= 8 * HOUR_S + 2 * 60
        assert downs[0].cause == ("thermal" if day in (1, 4) else "latency")
        board.run(6 * HOUR_S)
        assert board.at == 0, "back before midnight"
        assert len(board.changes) - before <= 4
        assert board.standing.changes_last_hour == 0
    assert most_in_an_hour(board.changes) <= board.options.max_changes_per_hour
    assert 1 <= len(board.refusals) <= 24, "what was refused is left out for an hour"
    assert len(board.ladder._window._slices) <= 20 and len(board.ladder._changes) <= 10
