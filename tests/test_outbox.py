"""Messages that wait for the broker: order, bounds, honest counts, and nothing lost that was to be kept."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from edge_agent import spool as spool_module
from edge_agent.config import SpoolOptions
from edge_agent.data import Message, MessageClass
from edge_agent.outbox import Outbox
from edge_agent.spool import DiskSpool, MemorySpool, Spool
from tests.rigs import ROOT


def run(test: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(test())  # type: ignore[arg-type]


def message(topic: str, payload: bytes = b"", kind: MessageClass = "results", **more: Any) -> Message:
    return Message(topic, payload, kind, **more)


def event(number: int, size: int = 10) -> Message:
    return Message("events", b"%d " % number + bytes(size), "events", id=f"e{number}")


def connected(**options: Any) -> Outbox:
    outbox = Outbox(**options)
    outbox.connected()
    return outbox


async def take(outbox: Outbox, count: int) -> list[Message]:
    found = [await asyncio.wait_for(outbox.next(), 1) for _ in range(count)]
    return [one for one in found if one is not None]


def test_the_oldest_result_goes_and_is_counted_with_its_cause() -> None:
    async def test() -> None:
        outbox = Outbox(max_results=3)
        for i in range(4):
            outbox.put(message("results", b"%d" % i))
        outbox.connected()
        outbox.put(message("results", b"4"))
        assert [one.payload for one in await take(outbox, 3)] == [b"2", b"3", b"4"]
        assert outbox.dropped() == {"results": {"away": 1, "full": 1}}
        outbox.close()
        assert await outbox.next() is None

    run(test)


def test_status_goes_first_then_replies_then_events_then_results() -> None:
    async def test() -> None:
        outbox = connected()
        outbox.put(message("results"))
        outbox.put(event(1))
        outbox.put(message("reply", kind="replies"))
        outbox.put(message("status", b"old", "status", retain=True))
        outbox.put(message("status", b"new", "status", retain=True))
        sent = await take(outbox, 4)
        assert [one.topic for one in sent] == ["status", "reply", "events", "results"]
        assert sent[0].payload == b"new"

    run(test)


def test_what_is_retained_goes_again_with_each_session_and_what_is_not_does_not() -> None:
    async def test() -> None:
        outbox = connected()
        outbox.put(message("status", b"state", "status", retain=True))
        outbox.put(message("cameras/gone/status", b"", "status", retain=True))
        outbox.put(message("jobs/1", b"50 %", "status"))
        await take(outbox, 3)
        outbox.disconnected()
        outbox.put(message("stats", b"1", "status"))
        outbox.put(message("stats", b"2", "status"))
        outbox.connected()
        assert [(one.topic, one.payload) for one in await take(outbox, 2)] == [("status", b"state"), ("stats", b"2")]
        assert len(outbox) == 0

    run(test)


@pytest.mark.parametrize(("kind", "kept"), [("results", False), ("replies", True), ("status", True)])
def test_what_may_not_have_arrived_is_sent_again_unless_it_is_a_result(kind: MessageClass, kept: bool) -> None:
    async def test() -> None:
        outbox = connected()
        outbox.put(message("first", kind=kind))
        outbox.put(message("second", kind=kind))
        [first] = await take(outbox, 1)
        outbox.put_back(first)
        following = {one.topic for one in await take(outbox, 1 + kept)}
        assert following == ({"first", "second"} if kept else {"second"})
        assert outbox.dropped() == ({} if kept else {"results": {"away": 1}})

    run(test)


def test_next_waits_for_a_message() -> None:
    async def test() -> None:
        outbox = Outbox()
        waiting = asyncio.ensure_future(outbox.next())
        await asyncio.sleep(0)
        assert not waiting.done()
        outbox.put(message("results"))
        assert await waiting is not None

    run(test)


def test_an_event_is_kept_until_the_broker_has_it() -> None:
    async def test() -> None:
        outbox = Outbox()
        outbox.put(event(1))
        assert (len(outbox), len(outbox.spool)) == (0, 1), "while nobody is there it waits in the spool alone"
        outbox.connected()
        [old] = outbox.left_behind(10)
        outbox.put(event(2))
        [live] = await take(outbox, 1)
        assert (old.id, live.id) == ("e1", "e2")
        assert outbox.left_behind(10) == [], "both are on their way"
        outbox.done(live)
        outbox.put_back(old)
        assert [one.id for one in outbox.left_behind(10)] == ["e1"], "under the same id"
        outbox.disconnected()
        outbox.connected()
        assert [one.id for one in outbox.left_behind(10)] == ["e1"]
        outbox.done(old)
        assert len(outbox.spool) == 0

    run(test)


def test_results_are_kept_too_where_that_is_wanted() -> None:
    async def test() -> None:
        outbox = connected(spools_results=True)
        outbox.put(message("r", b"1", id="r1"))
        outbox.put(message("r", b"2", id="r2"))
        [first] = await take(outbox, 1)
        outbox.put_back(first)
        outbox.disconnected()
        outbox.put(message("r", b"3", id="r3"))
        outbox.connected()
        outbox.put(message("r", b"4", id="r4"))
        assert [one.id for one in await take(outbox, 1)] == ["r4"]
        left = outbox.left_behind(10)
        assert {one.id for one in left} == {"r1", "r2", "r3"}
        for one in left:
            outbox.done(one)
        assert len(outbox.spool) == 0
        assert outbox.dropped() == {}

    run(test)


@pytest.fixture(params=["disk", "memory"])
def spool(request: pytest.FixtureRequest, tmp_path: Path) -> Spool:
    return DiskSpool(tmp_path / "spool.db", SpoolOptions()) if request.param == "disk" else MemorySpool()


def test_a_spool_gives_the_oldest_first_and_forgets_what_arrived(spool: Spool) -> None:
    for number in range(5):
        spool.append(event(number))
    spool.append(event(0))
    assert len(spool) == 5
    assert spool.nbytes == sum(len(event(number).payload) for number in range(5))
    assert [one.id for one in spool.oldest(2)] == ["e0", "e1"]
    assert list(spool.oldest(2, but={"e0"})) == [event(1), event(2)]
    spool.remove("e0")
    spool.remove("e3")
    spool.remove("never there")
    spool.flush()
    spool.append(event(5))
    assert [one.id for one in spool.oldest(9)] == ["e1", "e2", "e4", "e5"]
    spool.close()


def test_what_was_flushed_is_there_again_after_a_restart(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "spool.db"
    first = DiskSpool(path, SpoolOptions())
    for number in range(3):
        first.append(event(number))
    first.remove("e1")
    first.close()
    second = DiskSpool(path, SpoolOptions())
    assert len(second) == 2
    assert list(second.oldest(9)) == [event(0), event(2)]
    second.close()


def test_limits_let_the_oldest_go_and_count_why(tmp_path: Path) -> None:
    now = [1.7e9]
    options = SpoolOptions(max_messages=10, max_mb=0.005, max_age_s=100)
    spool = DiskSpool(tmp_path / "spool.db", options, clock=lambda: now[0])
    for number in range(12):
        spool.append(event(number))
    spool.flush()
    assert [one.id for one in spool.oldest(99)] == [f"e{number}" for number in range(2, 12)]
    assert spool.dropped["full"] == 2
    now[0] += 90
    spool.append(event(12, size=4000))
    spool.append(event(13, size=900))
    spool.flush()
    assert spool.nbytes <= 5000
    assert [one.id for one in spool.oldest(99)][-2:] == ["e12", "e13"]
    kept = len(spool)
    now[0] += 50
    spool.append(event(14))
    spool.flush()
    assert {one.id for one in spool.oldest(99)} <= {"e12", "e13", "e14"}
    assert spool.dropped["stale"] == kept - 2
    spool.close()


def test_an_event_that_arrives_while_it_is_written_is_not_sent_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spool = DiskSpool(tmp_path / "spool.db", SpoolOptions())
    spool.append(event(1))
    size = spool_module._size

    def meanwhile(database: Any) -> tuple[int, int]:
        spool.remove("e1")
        return size(database)

    monkeypatch.setattr(spool_module, "_size", meanwhile)
    spool.flush()
    monkeypatch.undo()
    assert spool.oldest(9) == []
    spool.close()


def test_what_was_kept_before_the_clock_was_set_is_not_old(tmp_path: Path) -> None:
    now = [1000.0]
    spool = DiskSpool(tmp_path / "spool.db", SpoolOptions(max_age_s=100), clock=lambda: now[0])
    spool.append(event(1))
    spool.flush()
    now[0] = 1.7e9
    spool.append(event(2))
    assert [one.id for one in spool.oldest(9)] == ["e1", "e2"]
    spool.close()


def test_a_damaged_file_is_put_aside(tmp_path: Path) -> None:
    path = tmp_path / "spool.db"
    path.write_bytes(b"no database at all, but long enough to be read as one" * 100)
    spool = DiskSpool(path, SpoolOptions())
    spool.append(event(1))
    assert [one.id for one in spool.oldest(9)] == ["e1"]
    assert spool.trouble is None
    assert path.with_name("spool.db.damaged").is_file()
    spool.close()


def test_a_full_disk_is_said_and_memory_takes_over_until_there_is_room(tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("mounting a small disk takes root")
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", disk], capture_output=True, check=False
    )
    if mounted.returncode != 0:
        pytest.skip(f"a tmpfs cannot be mounted: {mounted.stderr.decode().strip()}")
    try:
        spool = DiskSpool(disk / "spool.db", SpoolOptions())
        spool.append(event(0))
        spool.flush()
        assert spool.trouble is None
        (disk / "filler").write_bytes(bytes(200_000))
        for number in range(1, 1500):
            spool.append(event(number, size=1000))
        spool.flush()
        assert spool.trouble is not None
        assert "full" in spool.trouble
        spool.append(event(1500))
        assert [one.id for one in spool.oldest(1)] == ["e0"]
        assert [one.id for one in spool.oldest(2000)][-1] == "e1500"
        assert len(spool) == 1001
        assert spool.dropped["disk_full"] == 500
        for number in range(600, 1501):
            spool.remove(f"e{number}")
        (disk / "filler").unlink()
        spool.flush()
        assert spool.trouble is None
        assert [one.id for one in spool.oldest(2000)] == ["e0", *(f"e{number}" for number in range(501, 600))]
        spool.close()
    finally:
        subprocess.run(["umount", disk], check=True)


def test_a_kill_loses_no_more_than_what_was_not_yet_flushed(tmp_path: Path) -> None:
    code = (
        "import sys, itertools\n"
        "from pathlib import Path\n"
        "from edge_agent.config import SpoolOptions\n"
        "from edge_agent.spool import DiskSpool\n"
        "from tests.test_outbox import event\n"
        f"spool = DiskSpool(Path({str(tmp_path / 'spool.db')!r}), SpoolOptions())\n"
        "for number in itertools.count():\n"
        "    spool.append(event(number))\n"
        "    if number % 7 == 0:\n"
        "        spool.flush()\n"
        "        print(number, flush=True)\n"
    )
    for kill_after in (1, 40, 150):
        for path in tmp_path.glob("spool*"):
            path.unlink()
        process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        flushed = [int(process.stdout.readline()) for _ in range(kill_after)][-1]
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        spool = DiskSpool(tmp_path / "spool.db", SpoolOptions())
        found = [one.id for one in spool.oldest(100_000)]
        spool.close()
        assert found == [f"e{number}" for number in range(len(found))]
        assert len(found) > flushed


@settings(max_examples=60, stateful_step_count=40, deadline=None)
class EventsArrive(RuleBasedStateMachine):
    """Whatever the link, the process and the order of things: an event is in the spool until the broker has it."""

    @initialize()
    def begin(self) -> None:
        self.loop = asyncio.new_event_loop()
        self.path = Path(f"/dev/shm/spool-{os.getpid()}-{id(self)}.db")
        self.made, self.arrived, self.under_way = 0, set[str](), list[Message]()
        self.open()

    def open(self) -> None:
        async def make() -> None:
            self.spool = DiskSpool(self.path, SpoolOptions())
            self.outbox = Outbox(spool=self.spool)

        self.loop.run_until_complete(make())

    @rule()
    def happens(self) -> None:
        self.outbox.put(event(self.made))
        self.made += 1

    @rule()
    def connects(self) -> None:
        if not self.outbox.is_connected:
            self.outbox.connected()

    @precondition(lambda self: self.outbox.is_connected)
    @rule()
    def sends(self) -> None:
        if self.outbox.waiting()["events"]:
            self.under_way.append(self.loop.run_until_complete(self.outbox.next()))

    @precondition(lambda self: self.outbox.is_connected)
    @rule(count=st.integers(1, 5))
    def drains(self, count: int) -> None:
        found = self.outbox.left_behind(count)
        going = {one.id for one in self.under_way}
        assert not going & {one.id for one in found}, "none is on its way twice at once"
        self.under_way += found

    @precondition(lambda self: self.under_way)
    @rule(which=st.integers(0, 99))
    def arrives(self, which: int) -> None:
        one = self.under_way.pop(which % len(self.under_way))
        self.arrived.add(one.id)
        self.outbox.done(one)

    @rule()
    def breaks(self) -> None:
        for one in self.under_way:
            self.outbox.put_back(one)
        self.under_way.clear()
        self.outbox.disconnected()

    @rule()
    def restarts_in_order(self) -> None:
        self.breaks()
        self.spool.close()
        self.open()

    @invariant()
    def nothing_is_lost(self) -> None:
        kept = {one.id for one in self.spool.oldest(10_000)}
        assert kept == {f"e{number}" for number in range(self.made)} - self.arrived

    def teardown(self) -> None:
        self.spool.close()
        self.loop.close()
        for path in self.path.parent.glob(f"{self.path.name}*"):
            path.unlink()


TestEventsArrive = EventsArrive.TestCase


def test_the_file_is_in_wal_mode_and_every_commit_is_synced(tmp_path: Path) -> None:
    spool = DiskSpool(tmp_path / "spool.db", SpoolOptions())
    assert spool._database is not None
    assert spool._database.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    assert spool._database.execute("PRAGMA synchronous").fetchone() == (2,)
    spool.close()
