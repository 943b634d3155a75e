"""An agent's troubles, for `soak.py`: what happens to it once a cycle, and a client that hears what it says; and the
broker that it needs."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import paho.mqtt.client as paho
from paho.mqtt.enums import CallbackAPIVersion

from benchmarks._rigs import rigs_or_exit
from tests.network_cameras import Link
from tests.rigs import DEVICE, Broker, need_program

MODELS = ("demo-320", "demo-160")
FEEDS = ("lobby", "gate")  # over HTTP; `gate` is read by a process of its own
COMMANDS: Sequence[tuple[str, dict[str, Any], str]] = (
    ("agent.status", {}, "ok"),
    ("agent.reload", {}, "ok"),
    ("camera.snapshot", {"camera": "hall0"}, "ok"),
    ("camera.snapshot", {"camera": "nowhere"}, "not_found"),
    ("model.activate", {"name": "nothing"}, "model_not_found"),
)
FRESH_S = 5.0
ANSWER_S = 30.0


def need_mosquitto() -> None:
    """Ends the program with a sentence where there is none."""
    with rigs_or_exit():
        need_program("mosquitto", "mosquitto")


class Listener:
    """Hears the agent as any client does, and asks it. Keeps the last of everything, so that it may run for days."""

    def __init__(self, port: int) -> None:
        self.results: Counter[str] = Counter()
        self.replies: Counter[str] = Counter()
        self.wrong: list[str] = []
        self._asked: dict[str, tuple[str, float]] = {}
        self._stats: tuple[float, dict[str, Any]] = (-FRESH_S, {})
        self._number = 0
        self._client = paho.Client(CallbackAPIVersion.VERSION2, protocol=paho.MQTTv5)
        self._client.on_connect = self._begin
        self._client.on_message = self._hear
        self._client.reconnect_delay_set(min_delay=1, max_delay=1)
        self._client.connect("127.0.0.1", port)
        self._client.loop_start()

    def __enter__(self) -> Listener:
        return self

    def __exit__(self, *error: object) -> None:
        self._client.disconnect()
        self._client.loop_stop()

    @property
    def stats(self) -> dict[str, Any] | None:
        """The last statistics, unless they are old: the agent is not heard then."""
        at_s, stats = self._stats
        return stats if time.monotonic() - at_s < FRESH_S else None

    def ask(self, name: str, arguments: Mapping[str, Any], *, expected: str = "ok") -> None:
        """Send a command, whose reply should have this status, or this code."""
        self._number += 1
        key = f"soak-{self._number}"
        self._asked[key] = (expected, time.monotonic())
        command = {"id": key, "command": name, "args": arguments}
        self._client.publish(f"edge/{DEVICE}/cmd", json.dumps(command), qos=1)

    def is_heard(self) -> bool:
        """Whether the agent is, since the broker was there last."""
        return self._client.is_connected() and self.stats is not None

    def is_answered(self) -> bool:
        """Whether no reply is waited for; one that has not come in time is not waited for any longer."""
        for key, (expected, at_s) in list(self._asked.items()):
            if time.monotonic() - at_s > ANSWER_S:
                self._asked.pop(key, None)
                self.wrong.append(f"{key}: no reply within {ANSWER_S:g} s instead of {expected}")
        return not self._asked

    def _begin(self, client: paho.Client, *rest: Any) -> None:
        self._stats = -FRESH_S, {}
        client.subscribe(f"edge/{DEVICE}/#")

    def _hear(self, client: Any, userdata: Any, message: Any) -> None:
        _, _, topic = message.topic.split("/", 2)
        if topic == "stats":
            self._stats = time.monotonic(), json.loads(message.payload)
        elif topic.endswith("/results"):
            self.results[topic.split("/")[1]] += 1
        elif topic.startswith("reply/"):
            self._answered(json.loads(message.payload))

    def _answered(self, reply: dict[str, Any]) -> None:
        if reply["status"] == "accepted" or reply["id"] not in self._asked:
            return
        expected, _ = self._asked.pop(reply["id"])
        said = reply["code"] if reply["status"] == "error" else reply["status"]
        self.replies[said] += 1
        if said != expected:
            self.wrong.append(f"{reply['id']}: {said} instead of {expected}: {reply.get('message')}")


class Disturbances:
    """What happens once a cycle, each at its share of it, or later: commands once the agent is heard, and the broker is
    killed once all of them are answered, since a reply to nobody is lost."""

    def __init__(self, broker: Broker, feeds: Link, listener: Listener, *, cycle_s: float) -> None:
        self.done: Counter[str] = Counter()
        self._broker, self._feeds, self._listener = broker, feeds, listener
        self._cycle_s = cycle_s
        self._steps: Sequence[tuple[float, Callable[[], bool], Callable[[], None]]] = (
            (0.10, lambda: True, self._lose_cameras),
            (0.30, lambda: True, lambda: setattr(feeds, "is_down", False)),
            (0.35, listener.is_answered, self._kill_broker),
            (0.50, lambda: True, broker.start),
            (0.60, listener.is_heard, lambda: self._swap(MODELS[1])),
            (0.75, listener.is_answered, lambda: self._swap(MODELS[0])),
            (0.90, listener.is_answered, self._command),
        )
        self._next = 0

    def step(self, elapsed_s: float) -> None:
        """Do what is due."""
        while True:
            cycle, place = divmod(self._next, len(self._steps))
            share, is_time, act = self._steps[place]
            if elapsed_s < (cycle + share) * self._cycle_s or not is_time():
                return
            act()
            self._next += 1

    def end(self) -> None:
        """All is there again."""
        self._feeds.is_down = False
        self._broker.revive()

    def _lose_cameras(self) -> None:
        self.done["cameras lost"] += len(FEEDS)
        self._feeds.is_down = True
        self._feeds.cut()

    def _kill_broker(self) -> None:
        self.done["broker killed"] += 1
        self._broker.kill()

    def _swap(self, model: str) -> None:
        self.done["models swapped"] += 1
        self._listener.ask("model.activate", {"name": model})

    def _command(self) -> None:
        name, arguments, expected = COMMANDS[self.done["commands"] % len(COMMANDS)]
        self.done["commands"] += 1
        self._listener.ask(name, arguments, expected=expected)


def configuration(cameras: int, fps: float, feed: str, backend: str) -> str:
    """The agent's configuration: everything on that is there on any machine."""
    halls = "".join(
        f'[cameras.hall{index}]\nsource = "synthetic"\nseed = {index}\nfps = {fps}\n'
        "zones = { left = [[0.0, 0.0], [0.5, 0.0], [0.5, 1.0], [0.0, 1.0]] }\n"
        for index in range(cameras - len(FEEDS))
    )
    feeds = "".join(
        f'[cameras.{name}]\nsource = "http"\nurl = "{feed}"\nfps = {fps}\n'
        f'isolation = "{isolation}"\nbackoff_max_s = 2.0\n'
        for name, isolation in zip(FEEDS, ("thread", "process"), strict=True)
    )
    return f"""
[model]
active = "{MODELS[0]}"
[inference]
backend = "{backend}"
[spool]
results = true
[homeassistant]
enabled = true
[tracking]
enabled = true
{halls}{feeds}"""
