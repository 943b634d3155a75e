"""The broker, and the way to it, fail in every way; what is promised of events, commands and frames is kept."""

from __future__ import annotations

import collections
import itertools
import json
import random
import re
import sqlite3
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import paho.mqtt.client as paho
import psutil
import pytest

from tests import brokers
from tests.brokers import OTHERS, on_all_brokers, on_brokers_of_mqtt_5
from tests.fault_proxy import FaultProxy
from tests.rigs import DEVICE, AgentProcess, Heard, Probe, Server, config, wait_until

pytestmark = [pytest.mark.slow, pytest.mark.soak]

pytest.importorskip("scipy", reason="scipy is not installed: pip install 'edge-agent[tracking]'")

FPS = 10.0
SHUTDOWN_S = 4.0
SPOKEN = {paho.MQTTv5: "5", paho.MQTTv311: "3.1.1"}
NOTED = """
import dataclasses, os, sys, time
from edge_agent import cli
from edge_agent.commands import _base
from edge_agent.outbox import Outbox

told = os.open(sys.argv[1] + ".noted", os.O_WRONLY | os.O_CREAT | os.O_APPEND)

def note(kind, key):
    os.write(told, f"{kind} {time.time()} {key}\\n".encode())

put = Outbox.put

def noted_put(self, message):
    put(self, message)
    if message.kind == "events":
        note("event", message.id)

def noting(handler):
    async def handle(arguments, call):
        note("command", call.id)
        return await handler(arguments, call)
    return handle

Outbox.put = noted_put
for name, entry in _base._commands.items():
    _base._commands[name] = dataclasses.replace(entry, handler=noting(entry.handler))
sys.exit(cli.main(["run", "--config", sys.argv[1]]))
"""


@dataclass(frozen=True)
class Note:
    kind: str
    at: float
    key: str


class Noted(AgentProcess):
    """An agent that writes down, past all that it sends, which events it put out and which commands it began."""

    command = (sys.executable, "-c", NOTED)

    def notes(self, kind: str) -> list[Note]:
        noted = self.config.with_suffix(".toml.noted")
        lines = noted.read_text().splitlines() if noted.exists() else []
        split = (line.split(" ", 2) for line in lines)
        return [Note(kind, float(at), key) for found, at, key in split if found == kind]


class Listener(Probe):
    """A probe that has the broker's word on nothing it hears, so that what a broker gave out before it died is heard
    all the same; `subscribed` counts how often it has come back."""

    def __init__(self, broker: Server) -> None:
        super().__init__(broker.plain_port, version=broker.version, qos=0)
        self.subscribed = 1
        self._client.on_subscribe = self._count

    def _count(self, *rest: Any) -> None:
        self.subscribed += 1


def cameras(*names: str, fps: float = FPS, zones: bool = True) -> str:
    """Small synthetic ones in whose pictures something happens all the time."""
    edges = [share / 8 for share in range(9)]
    strips = [
        f'"strip-{left}" = [[{left}, 0.0], [{right}, 0.0], [{right}, 1.0], [{left}, 1.0]]'
        for left, right in itertools.pairwise(edges)
    ]
    lines = [f'"line-{y}" = [[0.0, {y}], [1.0, {y}]]' for y in edges[1:-1]]
    places = f"zones = {{ {', '.join(strips)} }}\nlines = {{ {', '.join(lines)} }}\n" if zones else ""
    return "".join(
        f'[cameras.{name}]\nsource = "synthetic"\nwidth = 320\nheight = 240\nfps = {fps}\nseed = {seed}\n{places}'
        for seed, name in enumerate(names)
    )


TRACKED = '[model]\nactive = "demo-160"\n[tracking]\nenabled = true\nlost_frames = 5\n'


# Each fault alone


@dataclass
class Way:
    """To a broker, through a proxy, both of which can be hurt."""

    broker: Server
    proxy: FaultProxy

    def connections_of(self, agent: AgentProcess) -> int:
        """How many the agent holds."""
        held = psutil.Process(agent.process.pid).net_connections("tcp")
        return len([one for one in held if one.raddr and one.raddr.port == self.proxy.port])

    def hurt(self, fault: str) -> None:
        FAULTS[fault].begin(self)

    def heal(self) -> None:
        self.broker.revive()
        self.proxy.heal()


@dataclass(frozen=True)
class Fault:
    begin: Callable[[Way], None]
    breaks: bool = True
    """Whether the link is lost over it."""


def _refuse(way: Way) -> None:
    way.proxy.refuse()
    way.proxy.cut()


FAULTS: Mapping[str, Fault] = {
    "refuse": Fault(_refuse),
    "cut": Fault(lambda way: way.proxy.cut()),
    "reset": Fault(lambda way: way.proxy.reset(after=2000, direction="up", times=2)),
    "black-hole": Fault(lambda way: way.proxy.black_hole()),
    "1-kB/s": Fault(lambda way: way.proxy.throttle(1000), breaks=False),
    "byte-by-byte": Fault(lambda way: way.proxy.drip(), breaks=False),
    "latency": Fault(lambda way: way.proxy.latency(200), breaks=False),
    "freeze": Fault(lambda way: way.broker.freeze()),
    "kill": Fault(lambda way: way.broker.kill()),
}


@pytest.fixture
def way(broker: Server) -> Iterator[Way]:
    with FaultProxy(broker.port, buffer=8192) as proxy:
        yield Way(broker, proxy)


@pytest.fixture
def listener(broker: Server) -> Iterator[Listener]:
    with Listener(broker) as listener:
        yield listener


def short_config(way: Way, body: str, *, keepalive_s: int = 5) -> str:
    """A configuration for the way, and little time for an end."""
    text = config(way.proxy.port, body, mqtt=f"keepalive_s = {keepalive_s}")
    return text.replace("[agent]\n", f"[agent]\nshutdown_timeout_s = {SHUTDOWN_S}\n", 1)


def answered(probe: Probe, name: str = "agent.info", *, timeout_s: float = 10.0) -> Any:
    """The reply to a command that is sent until it is answered, under one id."""
    command_id = f"sure-{time.monotonic_ns()}"
    command = json.dumps({"id": command_id, "command": name, "args": {}})

    def replies() -> list[Heard]:
        if not (found := probe.on(f"reply/{command_id}")):
            probe._client.publish(f"edge/{DEVICE}/cmd", command)
            threading.Event().wait(0.2)
        return found

    return wait_until(replies, timeout_s=timeout_s, what=f"{name} is answered")[0].json()


def rates(agent: AgentProcess, camera: str = "a") -> list[float]:
    """Frames a second of every interval, by the log."""
    return [event["inferred_fps"] for event in agent.events("camera.frames") if event["camera"] == camera]


def assert_frames_went_on(agent: AgentProcess, *names: str) -> None:
    """At the camera's rate, but for a moment in which the machine did something else; in no second were there none."""
    for name in names:
        told = rates(agent, name)[1:]
        assert statistics.median(told) > 0.9 * FPS, told
        assert min(told) > 0.2 * FPS, told


def assert_sentences(agent: AgentProcess) -> None:
    for event in agent.events("mqtt.disconnected"):
        reason = event["reason"]
        assert len(reason.split()) >= 3, reason
        assert not re.search(r"Traceback|Error\(|<.*>|None|iteration", reason), reason


OF_BROKERS = ("black-hole", "freeze")
"""The faults after which a broker finds two sessions of one client, and has to end the right one."""


@pytest.mark.parametrize(
    ("broker", "fault"),
    [("mosquitto", fault) for fault in FAULTS] + [(other, fault) for other in OTHERS for fault in OF_BROKERS],
    indirect=["broker"],
)
def test_frames_go_on_through_a_fault_and_all_is_well_after_it(
    tmp_path: Path, way: Way, probe: Probe, fault: str
) -> None:
    body = TRACKED + cameras("a")
    with AgentProcess(tmp_path, short_config(way, body)) as agent:
        probe.wait("cameras/a/results", n=5)
        way.hurt(fault)
        intervals = len(rates(agent))
        if FAULTS[fault].breaks:
            wait_until(lambda: agent.events("mqtt.disconnected"))
        wait_until(lambda: len(rates(agent)) >= intervals + 2)
        way.heal()
        wait_until(probe.is_connected)
        assert answered(probe)["status"] == "ok"
        probe.wait("cameras/a/results", n=len(probe.on("cameras/a/results")) + 3)
        wait_until(lambda: probe.on("available")[-1].payload == b"online", what="the new session has the last word")
        way.hurt(fault)
        began = time.monotonic()
        assert agent.stop(timeout_s=30) == 0
        assert time.monotonic() - began < SHUTDOWN_S
        way.heal()
        if fault != "kill":  # its memory went with it
            wait_until(lambda: probe.on("available")[-1].payload == b"offline", what="the agent's end is told")
    assert {event["protocol"] for event in agent.events("mqtt.connected")} == {SPOKEN[way.broker.version]}
    assert not agent.events("mqtt.given_up")
    assert_frames_went_on(agent, "a")
    assert_sentences(agent)


@on_brokers_of_mqtt_5
def test_an_answer_to_connect_that_is_lost_leaves_the_agent_with_the_protocol_it_had(tmp_path: Path, way: Way) -> None:
    with AgentProcess(tmp_path, short_config(way, cameras("a", zones=False))) as agent:
        wait_until(lambda: agent.events("mqtt.connected"))
        way.proxy.reset(after=0, times=2)  # the session, and the answer to the next CONNECT
        wait_until(lambda: len(agent.events("mqtt.connected")) > 1)
        assert agent.stop() == 0
    assert [event["protocol"] for event in agent.events("mqtt.connected")] == ["5", "5"]


@pytest.mark.soak
def test_a_connect_that_nobody_answered_leaves_no_connection_behind(tmp_path: Path, way: Way) -> None:
    with AgentProcess(tmp_path, short_config(way, cameras("a", zones=False), keepalive_s=60)) as agent:
        wait_until(lambda: agent.events("mqtt.connected"))
        way.proxy.black_hole()
        way.proxy.cut()
        wait_until(lambda: len(agent.events("mqtt.disconnected")) > 2, timeout_s=25)
        assert way.connections_of(agent) <= 1
        way.heal()


# Many faults, one after the other

SEED = 20240607


@dataclass
class Commander:
    """Sends commands straight to the broker, each id again and again until it is answered, and now and then after
    that; a command that was lost over an outage is what a real client would repeat too."""

    probe: Listener
    sent: dict[str, str] = field(default_factory=dict)
    repeats: int = 0
    _end: threading.Event = field(default_factory=threading.Event)

    def __enter__(self) -> Commander:
        self._thread = threading.Thread(target=self._run, name="commander")
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()

    def stop(self) -> None:
        """No new ones; those that were sent are sent until they are answered, by `settle`."""
        self._end.set()
        self._thread.join()

    def replies(self) -> dict[str, list[bytes]]:
        """The last word on each id, as often as it was said."""
        found: dict[str, list[bytes]] = {}
        for message in self.probe.on("reply/+"):
            if (reply := message.json())["status"] != "accepted":
                found.setdefault(reply["id"], []).append(message.payload)
        return found

    def unanswered(self) -> list[str]:
        replies = self.replies()
        return [key for key in self.sent if key not in replies]

    def settle(self) -> None:
        def again() -> bool:
            for key in (left := self.unanswered()):
                self._send(key)
            threading.Event().wait(0.3)
            return not left

        wait_until(again, timeout_s=20, what="all commands are answered")

    def repeat_all(self) -> None:
        """Every one once more, though it was answered."""
        counts = {key: len(replies) for key, replies in self.replies().items()}
        for key in self.sent:
            self._send(key)
        wait_until(
            lambda: all(len(replies) > counts[key] for key, replies in self.replies().items()),
            timeout_s=20,
            what="all commands are answered again",
        )

    def _run(self) -> None:
        number = 0
        while not self._end.wait(0.15):
            waiting = self.unanswered()
            if len(waiting) < 4:
                self._begin(f"c-{number}", number)
                number += 1
            for key in waiting[:4]:
                self._send(key)

    def _begin(self, key: str, number: int) -> None:
        name, arguments = (
            ("camera.set", {"camera": "spare", "options": {"fps": 2 + number / 1000}}),
            ("inference.set", {"max_results_per_s": 1000 + number}),
            ("agent.info", {}),
            ("agent.log_level", {"level": "info"}),
        )[number % 4]
        self.sent[key] = json.dumps({"id": key, "command": name, "args": arguments})
        self._send(key)

    def _send(self, key: str) -> None:
        self.repeats += 1
        self.probe._client.publish(f"edge/{DEVICE}/cmd", self.sent[key], qos=self.repeats % 2)


Trouble: TypeAlias = "Callable[[Way, Callable[[], None], Listener], None]"


def _freeze(way: Way, hold: Callable[[], None], listener: Listener) -> None:
    way.broker.freeze()
    hold()
    way.broker.thaw()


def _kill_and_start(way: Way, hold: Callable[[], None], listener: Listener) -> None:
    """The listener is there before the agent, so that it hears all that a broker without a memory is given."""
    subscribed = listener.subscribed
    way.broker.kill()
    hold()
    way.proxy.refuse()
    way.broker.start()
    wait_until(lambda: listener.subscribed > subscribed, what="the listener is back")
    way.proxy.heal()


def _cut(way: Way, hold: Callable[[], None], listener: Listener) -> None:
    way.proxy.refuse()
    way.proxy.cut(reset=True)
    hold()
    way.proxy.heal()


def _cut_once(way: Way, hold: Callable[[], None], listener: Listener) -> None:
    way.proxy.cut()
    hold()


OF_ANY_BROKER = (_freeze, _cut, _cut_once)
TROUBLES = (_kill_and_start, *OF_ANY_BROKER)
"""A RabbitMQ that is killed may have confirmed what it has not yet handed on."""


@pytest.mark.parametrize(
    ("broker", "cycles", "among"),
    [("mosquitto", 50, TROUBLES), *((other, 15, OF_ANY_BROKER) for other in OTHERS)],
    indirect=["broker"],
)
def test_outages_lose_no_event_do_no_command_twice_and_leave_nothing_behind(
    tmp_path: Path, way: Way, listener: Listener, cycles: int, among: Sequence[Trouble]
) -> None:
    dice = random.Random(SEED)
    troubles = [dice.choice(among) for _ in range(cycles)]
    holds = [dice.uniform(6.0, 7.0) if i % 20 == 10 else dice.uniform(0.05, 0.5) for i in range(cycles)]
    waits = [dice.random() < 0.7 for _ in range(cycles)]
    pauses = [dice.uniform(0.0, 0.2) for _ in range(cycles)]
    body = TRACKED + cameras("a", "b") + cameras("spare", fps=2.0, zones=False)
    resident: list[float] = []
    with Noted(tmp_path, config(way.proxy.port, body, mqtt="keepalive_s = 5")) as agent:
        process = psutil.Process(agent.process.pid)
        for name in "ab":
            listener.wait(f"cameras/{name}/results", n=5)
        with Commander(listener) as commander:
            for trouble, hold_s, is_waited_for, pause_s in zip(troubles, holds, waits, pauses, strict=True):
                seen = len(listener.on("available"))
                trouble(way, lambda hold_s=hold_s: threading.Event().wait(hold_s), listener)
                if is_waited_for:
                    back_within(1.2, listener, seen, was_away=trouble is not _freeze)
                threading.Event().wait(pause_s)
                resident.append(process.memory_info().rss / 1e6)
            commander.stop()
            healed_at = time.time()
            commander.settle()
            commander.repeat_all()
            wait_until(lambda: missing(agent, listener, before=healed_at) == set(), timeout_s=40)
            wait_until(lambda: stats_of(listener)["outbox"]["spool"]["messages"] == 0, timeout_s=10)
            stats = stats_of(listener)
        assert agent.stop() == 0
        wait_until(lambda: listener.heard[-1].at < time.monotonic() - 0.3)
    replies = commander.replies()
    made, heard = agent.notes("event"), events_heard(listener)
    effects = collections.Counter(note.key for note in agent.notes("command"))
    early, late = (statistics.median(some) for some in (resident[: cycles // 3], resident[-cycles // 3 :]))
    connects = len(agent.events("mqtt.connected"))
    print(
        f"{cycles} outages ({collections.Counter(t.__name__ for t in troubles)}), {connects} sessions; "
        f"{len(made)} events made, {len(heard)} heard, {sum(map(len, heard.values())) - len(heard)} of them again; "
        f"{len(commander.sent)} commands sent {commander.repeats} times, {len(effects)} done, "
        f"{sum(map(len, replies.values()))} replies; RSS {early:.1f} -> {late:.1f} MB; "
        f"slowest interval {min(rates(agent)[1:])} {min(rates(agent, 'b')[1:])} fps"
    )
    print(stats["outbox"], collections.Counter(e["reason"] for e in agent.events("mqtt.disconnected")))
    print(agent.events("mqtt.given_up"), collections.Counter(e["protocol"] for e in agent.events("mqtt.connected")))
    left = spooled(tmp_path)
    assert {note.key for note in made} <= set(heard) | left
    assert set(heard) <= {note.key for note in made}
    assert all(len(set(payloads)) == 1 for payloads in heard.values()), "an id is one event"
    assert set(effects.values()) == {1}
    assert set(effects) == set(commander.sent)
    assert {key: len(set(answers)) for key, answers in replies.items()} == dict.fromkeys(commander.sent, 1)
    assert_frames_went_on(agent, "a", "b")
    assert late <= 1.1 * early
    assert_sentences(agent)


def events_heard(probe: Probe) -> dict[str, list[bytes]]:
    heard: dict[str, list[bytes]] = {}
    for message in probe.on("cameras/+/events"):
        heard.setdefault(message.json()["id"], []).append(message.payload)
    return heard


def missing(agent: Noted, probe: Probe, *, before: float) -> set[str]:
    return {note.key for note in agent.notes("event") if note.at < before} - set(events_heard(probe))


def stats_of(probe: Probe) -> Any:
    """The next statistics."""
    return probe.wait("stats", n=len(probe.on("stats")) + 1)[-1].json()


def back_within(longest_s: float, probe: Probe, seen: int, *, was_away: bool) -> None:
    """Wait until the agent's last word on the matter is that it is online, though no longer than that."""

    def is_back() -> bool:
        told = probe.on("available")[seen:]
        return told[-1].payload == b"online" if told else not was_away

    until = time.monotonic() + longest_s
    while time.monotonic() < until and not is_back():
        threading.Event().wait(0.05)


def spooled(folder: Path) -> set[str]:
    """What waits on the disk."""
    [path] = (folder / "state" / "edge-agent").glob("spool-*.db")
    with closing(sqlite3.connect(path)) as database:
        return {key for (key,) in database.execute("SELECT id FROM messages")}


# Kills

FSYNC_S = 0.3
GRACE_S = 0.2
"""For the writing itself."""


@pytest.mark.parametrize(
    ("broker", "kills"), [("mosquitto", 10), *((other, 3) for other in OTHERS)], indirect=["broker"]
)
def test_events_of_an_outage_outlive_kills_of_the_agent(
    tmp_path: Path, way: Way, listener: Listener, kills: int
) -> None:
    dice = random.Random(SEED)
    body = f"{TRACKED}{cameras('a', 'b')}[spool]\nfsync_interval_s = {FSYNC_S}\n"
    killed_at: list[float] = []
    text = config(way.proxy.port, body, mqtt="keepalive_s = 5")
    way.hurt("refuse")
    for number in range(kills):
        with Noted(tmp_path, text) as agent:
            begun = len(agent.notes("event"))
            wait_until(lambda agent=agent, begun=begun: len(agent.notes("event")) > begun + 5, timeout_s=20)
            if number % 3 == 2:  # some of it is sent, and in the middle of that
                way.heal()
                wait_until(lambda agent=agent: agent.events("mqtt.connected"), timeout_s=20)
            threading.Event().wait(dice.uniform(0.0, 0.8))
            agent.process.kill()
            killed_at.append(time.time())
            agent.process.wait()
        way.hurt("refuse")
    way.heal()
    with Noted(tmp_path, text) as agent:
        notes = agent.notes("event")
        must = {
            note.key
            for note in notes
            if not any(0 <= at - note.at <= FSYNC_S + GRACE_S for at in killed_at) and note.at < killed_at[-1]
        }
        wait_until(lambda: must <= set(events_heard(listener)), timeout_s=20)
        wait_until(lambda: stats_of(listener)["outbox"]["spool"]["messages"] == 0, timeout_s=10)
        heard = events_heard(listener)
        assert agent.stop() == 0
    made = {note.key: note.at for note in notes if note.at < killed_at[-1]}
    lost = [min(at - made[key] for at in killed_at if at >= made[key]) for key in set(made) - set(heard)]
    assert max(lost, default=0.0) <= FSYNC_S + GRACE_S
    print(
        f"{kills} kills; {len(made)} events made in the outage, {len(lost)} lost, the oldest of them "
        f"{max(lost, default=0.0):.2f} s before a kill; {sum(map(len, heard.values())) - len(heard)} came again"
    )
    assert all(len(set(payloads)) == 1 for payloads in heard.values())


@on_all_brokers
def test_a_command_has_one_reply_though_the_agent_is_killed_over_it(tmp_path: Path, way: Way, probe: Probe) -> None:
    text = short_config(way, cameras("a", zones=False))
    answers: dict[str, set[bytes]] = {}
    for number in range(3):
        with Noted(tmp_path, text) as agent:
            wait_until(lambda agent=agent: agent.events("agent.running"), timeout_s=20)
            for key in answers:
                probe.publish(f"edge/{DEVICE}/cmd", info(key))
            probe.publish(f"edge/{DEVICE}/cmd", info(f"k-{number}"))
            probe.wait(f"reply/k-{number}")
            agent.process.kill()
            agent.process.wait()
        answers[f"k-{number}"] = set()
    with Noted(tmp_path, text) as agent:
        wait_until(lambda: agent.events("agent.running"), timeout_s=20)
        for key in answers:
            probe.publish(f"edge/{DEVICE}/cmd", info(key))
            probe.wait(f"reply/{key}", n=2)
            assert len({message.payload for message in probe.on(f"reply/{key}")}) == 1
        done = collections.Counter(note.key for note in agent.notes("command"))
    assert done == dict.fromkeys(answers, 1)


def info(command_id: str) -> str:
    return json.dumps({"id": command_id, "command": "agent.info", "args": {}})


# Results of an outage

OUTAGE_S = 2.5
DRAIN_PER_S = 20.0


@pytest.mark.parametrize(
    ("broker", "are_kept"),
    [("mosquitto", True), ("mosquitto", False), *((other, True) for other in OTHERS)],
    indirect=["broker"],
)
def test_results_of_an_outage_come_afterwards_if_they_are_to_be_kept(
    tmp_path: Path, way: Way, probe: Probe, are_kept: bool
) -> None:
    body = (
        f'[model]\nactive = "demo-160"\n{cameras("a", zones=False)}'
        f"[spool]\nresults = {str(are_kept).lower()}\ndrain_per_s = {DRAIN_PER_S}\nfsync_interval_s = 0.2\n"
    )
    text = config(way.proxy.port, body, mqtt="max_queued_results = 3")
    with AgentProcess(tmp_path, text) as agent:
        probe.wait("cameras/a/results", n=5)
        way.hurt("refuse")
        threading.Event().wait(0.2)
        from_seq = probe.on("cameras/a/results")[-1].json()["seq"] + 3
        threading.Event().wait(OUTAGE_S)
        way.heal()
        live = probe.wait("cameras/a/results", lambda result: result["seq"] > from_seq + OUTAGE_S * FPS, n=20)
        if are_kept:
            wait_until(lambda: stats_of(probe)["outbox"]["spool"]["messages"] == 0)
        stats = stats_of(probe)
        assert agent.stop() == 0
    heard = [(message.json()["seq"], message.at) for message in probe.on("cameras/a/results")]
    latest = itertools.accumulate((seq for seq, _ in heard), max)
    late = [(seq, at) for (seq, at), most in zip(heard, latest, strict=True) if seq < most]
    missed = set(range(from_seq, live[-1].json()["seq"])) - {seq for seq, _ in heard}
    dropped = stats["outbox"]["dropped"].get("results", {}).get("away", 0)
    print(f"kept: {are_kept}; {len(late)} late, {len(missed)} missed, {dropped} dropped; {stats['outbox']}")
    if are_kept:
        assert len(late) >= 0.8 * OUTAGE_S * FPS
        assert [seq for seq, _ in late] == sorted(seq for seq, _ in late), "the oldest first"
        assert (len(late) - 1) / (late[-1][1] - late[0][1]) <= 1.1 * DRAIN_PER_S
        assert any(late[0][1] < message.at < late[-1][1] for message in live), "what is live does not wait for it"
        assert not missed
        assert dropped <= 3
    else:
        assert not late
        assert len(missed) - 5 <= dropped <= len(missed) + 8
        assert dropped >= 0.5 * OUTAGE_S * FPS


# A broker that denies


def test_what_an_acl_denies_is_counted_and_told_in_health(tmp_path: Path) -> None:
    with brokers.acl(tmp_path) as broker, Probe(broker.plain_port) as probe:
        mqtt = brokers.login(tmp_path, "mute")
        with AgentProcess(tmp_path, config(broker.port, TRACKED + cameras("a"), mqtt=mqtt)) as agent:
            health = probe.wait("health", lambda health: health["checks"]["broker"]["state"] == "degraded")[-1].json()
            stats = probe.wait("stats", lambda stats: stats["outbox"]["refused"])[-1].json()
            assert agent.stop() == 0
    [(reason, count)] = stats["outbox"]["refused"].items()
    assert "authori" in reason.lower()
    assert count > 0
    assert health["checks"]["broker"]["fact"].startswith(f"the broker refuses edge/{DEVICE}/cameras/a/events: {reason}")
    assert probe.on("cameras/a/events") == []


def test_health_forgets_a_refusal_once_the_broker_has_changed_its_mind(tmp_path: Path) -> None:
    with brokers.acl(tmp_path) as broker, FaultProxy(broker.port) as proxy, Probe(broker.plain_port) as probe:
        mqtt = brokers.login(tmp_path, "mute")
        with AgentProcess(tmp_path, config(proxy.port, TRACKED + cameras("a"), mqtt=mqtt)):
            probe.wait("health", lambda health: health["checks"]["broker"]["state"] == "degraded")
            broker.kill()
            rules = tmp_path / "dynamic-security.json"
            rules.write_text(rules.read_text().replace('"allow": false', '"allow": true'))
            broker.start()
            wait_until(lambda: probe.on("cameras/a/events"))
            wait_until(lambda: probe.on("health")[-1].json()["checks"]["broker"]["state"] == "ok", timeout_s=30)
