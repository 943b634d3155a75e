"""The broker's side: hears all devices of the prefix, asks for pictures while somebody looks, sends commands.

Connects again for ever, and says why it is not connected.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import aiomqtt
import msgspec

from edge_agent.backoff import backoff
from edge_agent.config import Config
from edge_agent.errors import CommandError, EdgeAgentError
from edge_agent.messages import Command, Reply, Topics, encode
from edgectl._client import Client, connected, subscribe
from edgectl.dashboard.asking import NO_REPLY_S, Asking, CameraOf
from edgectl.dashboard.fleet import Change, Fleet
from edgectl.dashboard.tasks import first_to_end

_OF_ALL = ("available", "status", "health", "stats")
_OF_ONE = ("models", "cameras/+/status", "cameras/+/snapshot", "jobs/+", "reply/+")
_MOST_BACKOFF_S = 5.0
_TICK_S = 0.25
_PICTURE_KB = 300.0


class Feed:
    """`fleet` is kept up to date; `tell` hears of each change to it, `tell_broker` when the connection came or went.
    `picture_interval_s`: how often a picture of each camera is asked for; 0: never."""

    def __init__(
        self,
        loaded: Config,
        *,
        fleet: Fleet,
        tell: Callable[[Change], None],
        tell_broker: Callable[[], None],
        picture_interval_s: float,
    ) -> None:
        self.error: str | None = "connecting"
        self._loaded = loaded
        self._fleet = fleet
        self._tell = tell
        self._tell_broker = tell_broker
        self._asking = Asking(picture_interval_s) if picture_interval_s > 0 else None
        self._client: Client | None = None
        self._looked_at: Counter[str] = Counter()
        self._look_changed = asyncio.Event()
        self._run = secrets.token_hex(4)
        self._sent = 0

    @property
    def is_connected(self) -> bool:
        return self._client is not None

    @contextmanager
    def looking_at(self, device: str) -> Iterator[None]:
        """Somebody sees this device in detail while this is entered."""
        if not _is_one(device):
            yield
            return
        self._looked_at[device] += 1
        self._look_changed.set()
        try:
            yield
        finally:
            self._looked_at -= Counter((device,))
            self._look_changed.set()

    async def run(self) -> None:
        delays = backoff(most_s=_MOST_BACKOFF_S)
        while True:
            try:
                async with connected(self._loaded) as client:
                    delays = backoff(most_s=_MOST_BACKOFF_S)
                    await self._session(client)
            except EdgeAgentError as error:
                self._disconnected(str(error))
            await asyncio.sleep(next(delays))

    async def activate(self, device: str, model: str) -> str:
        """Send `model.activate`; the command's id. Raises `CommandError` where it would reach nobody."""
        known = self._fleet.devices.get(device)
        if self._client is None:
            raise CommandError(f"the broker is away: {self.error}", code="timeout")
        if known is None or known.available != "online":
            raise CommandError(f"{device} is not online, so the command would be lost", code="not_found")
        command = Command(id=self._next_id(), command="model.activate", args={"name": model})
        self._tell(self._fleet.sent(device, command.id, command.command, time.monotonic()))
        if (why := await self._publish(self._client, device, command)) is not None:
            if lost := self._fleet.answered(device, Reply(device, command.id, "error", 0.0, "timeout", why)):
                self._tell(lost)
            raise CommandError(why, code="timeout")
        return command.id

    async def _session(self, client: Client) -> None:
        """One connection. Raises `MqttError` when it is lost."""
        for change in self._fleet.doubt():
            self._tell(change)
        await subscribe(client, [f"{self._loaded.mqtt.prefix}/+/{leaf}" for leaf in _OF_ALL], qos=1)
        self._client, self.error = client, None
        self._tell_broker()
        try:
            work = [self._listen(client), self._follow_looks(client)]
            if self._asking:
                work.append(self._ask_for_pictures(client, self._asking))
            await first_to_end(*work)
        finally:
            self._client = None

    async def _listen(self, client: Client) -> None:
        async for message in client.messages:
            topic, now_s = str(message.topic), time.monotonic()
            payload = message.payload if isinstance(message.payload, bytes) else b""
            change = self._fleet.take(topic, payload, now_s, is_retained=message.retain) or self._take_reply(
                topic, payload, now_s
            )
            if change is not None:
                self._tell(change)

    async def _follow_looks(self, client: Client) -> None:
        """Hear the details of those devices that somebody looks at, and of no others."""
        heard: set[str] = set()
        while True:
            self._look_changed.clear()
            wanted = set(self._looked_at)
            for device in wanted - heard:
                await subscribe(client, [f"{self._root(device)}/{leaf}" for leaf in _OF_ONE], qos=1)
            for device in heard - wanted:
                await client.unsubscribe([f"{self._root(device)}/{leaf}" for leaf in _OF_ONE])
                if (known := self._fleet.devices.get(device)) is not None and device not in self._looked_at:
                    known.forget_details()
            heard = wanted
            await self._look_changed.wait()

    async def _ask_for_pictures(self, client: Client, asking: Asking) -> None:
        while True:
            for device in set(self._looked_at):
                known, now_s = self._fleet.devices.get(device), time.monotonic()
                if known and (camera := asking.due(device, known.running_cameras(), now_s)) is not None:
                    await self._ask(client, asking, CameraOf(device, camera))
            for of in asking.unanswered(time.monotonic()):
                self._no_picture(of, f"{of.device} did not answer within {NO_REPLY_S:g} s")
            asking.keep(self._looked_at, time.monotonic())
            await asyncio.sleep(_TICK_S)

    async def _ask(self, client: Client, asking: Asking, of: CameraOf) -> None:
        arguments = {"camera": of.camera, "max_kb": _PICTURE_KB}
        command = Command(id=self._next_id(), command="camera.snapshot", args=arguments)
        asking.ask(of, command.id, time.monotonic())
        if (why := await self._publish(client, of.device, command)) is not None:
            asking.refused(of, time.monotonic())
            self._no_picture(of, why)

    def _take_reply(self, topic: str, payload: bytes, now_s: float) -> Change | None:
        device, _, leaf = topic[len(self._loaded.mqtt.prefix) + 1 :].partition("/")
        if not leaf.startswith(f"reply/{self._run}-"):
            return None
        try:
            reply = msgspec.json.decode(payload, type=Reply)
        except msgspec.DecodeError:
            self._fleet.misread += 1
            return None
        of = self._asking.answered(device, reply.id) if self._asking else None
        if self._asking is None or of is None:
            return self._fleet.answered(device, reply)
        if reply.status == "error":
            self._asking.refused(of, now_s)
            return self._fleet.no_picture(device, of.camera, f"{reply.code}: {reply.message}")
        return None

    def _no_picture(self, of: CameraOf, why: str) -> None:
        if (change := self._fleet.no_picture(of.device, of.camera, why)) is not None:
            self._tell(change)

    def _disconnected(self, why: str) -> None:
        if self._asking:
            self._asking.clear()
        if why != self.error:
            self.error = why
            self._tell_broker()

    async def _publish(self, client: Client, device: str, command: Command) -> str | None:
        """Why the broker did not take it, if it did not."""
        topic = Topics(self._loaded.mqtt.prefix, device).command
        try:
            await client.publish(topic, encode(command), qos=1)
        except aiomqtt.MqttError as error:
            return f"the broker did not take the command ({error})"
        why = client.refused.get(topic)
        return f"the broker does not let us publish to {topic} ({why}); see its ACL" if why else None

    def _root(self, device: str) -> str:
        return Topics(self._loaded.mqtt.prefix, device).root

    def _next_id(self) -> str:
        self._sent += 1
        return f"{self._run}-{self._sent}"


def _is_one(device: str) -> bool:
    """Whether it is the name of one device, as a level of a topic."""
    return 0 < len(device) <= 128 and device.isprintable() and not set("+#/") & set(device)
