"""The link to the broker: one session at a time, for ever.

Owns reconnection, the will, and the sending of the outbox.
"""

from __future__ import annotations

import asyncio
import math
import ssl
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Literal

import aiomqtt
import anyio
import structlog
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties

from edge_agent._compat import end
from edge_agent.backoff import backoff
from edge_agent.config import MqttOptions, SpoolOptions
from edge_agent.data import Message
from edge_agent.messages import Topics, availability
from edge_agent.mqtt_client import (
    CALL_TIMEOUT_S,
    UNSUPPORTED_VERSION,
    Client,
    HungUp,
    address,
    code_of,
    explain,
    identity,
    is_refusal,
)
from edge_agent.outbox import Outbox
from edge_agent.threads import OwnerThread

log = structlog.get_logger()

Version = Literal["5", "3.1.1"]

_MOST_BACKOFF_S = 60.0
_MAX_BREAKS = 3
_AT_ONCE_S = 2.0
_LAST_WORD_S = 1.0
_TRUSTED_AFTER = 50
_DRAINED_AT_ONCE = 50
_SENT_AT_ONCE = 8


@dataclass(frozen=True, slots=True)
class Inbound:
    """A message that came in on a topic that is listened to."""

    topic: str
    payload: bytes
    retain: bool
    response_topic: str | None = None
    correlation: bytes | None = None


class Link:
    """Sends what the outbox holds and hands on what comes in, through whatever the broker does.

    `listens`: the topics to subscribe to. `on_message` and `on_connect` (what is retained is sent after it) are called
    on the event loop and must not block. The spool is read and written in its own thread, `spooling`.
    """

    def __init__(
        self,
        options: MqttOptions,
        *,
        topics: Topics,
        outbox: Outbox,
        spool: SpoolOptions,
        spooling: OwnerThread,
        listens: Sequence[str],
        on_message: Callable[[Inbound], None],
        on_connect: Callable[[], None] = lambda: None,
    ) -> None:
        self._options = options
        self._topics = topics
        self._outbox = outbox
        self._spool = spool
        self._spooling = spooling
        self._listens = listens
        self._on_message = on_message
        self._on_connect = on_connect
        self._client: Client | None = None
        self._version: Version = "3.1.1" if options.embedded or options.protocol == "3.1.1" else "5"
        self._speaks_5 = self._is_guess = False
        self._suspects = Suspects()
        self._under_way: set[asyncio.Future[None]] = set()
        self._in_flight: dict[int, tuple[Message, float]] = {}
        self._broken: asyncio.Future[None]
        self._is_blamed = False
        self._given_up: Message | None = None
        self.sent: Counter[str] = Counter()
        self.refused: Counter[str] = Counter()
        self.refusal: str | None = None
        self._denied: set[str] = set()
        self.error: str | None = None
        self.connects = 0

    @property
    def is_connected(self) -> bool:
        return self._client is not None

    async def run(self) -> None:
        """Connect, and connect again, until the outbox is closed and sent."""
        if self._options.tls_insecure:
            log.warning("mqtt.tls_insecure", note="the broker's certificate is not checked: anybody may be it")
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self._flush_regularly)
            await self._run()
            tasks.cancel_scope.cancel()
        await self._spooling.call(self._outbox.spool.flush)

    async def _run(self) -> None:
        delays = backoff(most_s=_MOST_BACKOFF_S)
        while not self._outbox.closed:
            connected = False
            try:
                async with self._connected() as client:
                    connected = True
                    self.connects += 1
                    self._speaks_5 = self._speaks_5 or self._version == "5"
                    self.error = None
                    delays = backoff(most_s=_MOST_BACKOFF_S)
                    log.info("mqtt.connected", broker=address(self._options), protocol=self._version)
                    await self._session(client)
                    return
            except aiomqtt.MqttError as error:
                self.error = explain(error, self._options)
                if not connected:
                    self._suspects.clear()
                if self._take_other_version(error):
                    continue
            delay_s = next(delays)
            log.warning(
                "mqtt.disconnected", broker=address(self._options), reason=self.error, retry_in_s=round(delay_s, 1)
            )
            with anyio.move_on_after(delay_s):
                await self._outbox.wait_closed()

    def _take_other_version(self, error: aiomqtt.MqttError) -> bool:
        """Whether the broker may want MQTT 3.1.1, and may have it: it says so, or hangs up on 5 without a word."""
        if self._options.protocol != "auto" or self._options.embedded:
            return False
        is_guess = isinstance(error, HungUp) and not self._speaks_5
        if self._version == "5" and (code_of(error) in UNSUPPORTED_VERSION or is_guess):
            log.info("mqtt.older_protocol", reason=self.error, protocol="3.1.1")
            self._version, self._is_guess = "3.1.1", is_guess
            return True
        if self._is_guess:  # who hung up may have had other reasons: 5 comes first at each connect
            self._version, self._is_guess = "5", False
        return False

    async def _flush_regularly(self) -> None:
        while True:
            await anyio.sleep(self._spool.fsync_interval_s)
            await self._spooling.call(self._outbox.spool.flush)

    async def _session(self, client: Client) -> None:
        """One connection, from subscribing to the outbox's end. Raises `MqttError` when it is lost."""
        self.refusal = None
        self._denied.clear()
        for topic in self._listens:
            granted = await client.subscribe(topic, qos=1)
            if any(is_refusal(code) for code in granted):
                self._note_refusal(topic, "subscribing is not authorised")
                self._denied.discard(topic)
        self._client = client
        client.on_refusal, client.on_acceptance = self._note_refusal, self._note_acceptance
        self._on_connect()
        self._broken = asyncio.get_running_loop().create_future()
        self._is_blamed, self._given_up = False, None
        tasks: list[asyncio.Future[None]] = [self._broken]
        try:
            await self._publish(client, availability(self._topics, "online"))
            self._outbox.connected()
            tasks += [asyncio.ensure_future(work(client)) for work in (self._receive, self._send, self._drain)]
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        except aiomqtt.MqttError as error:
            self._blame(error)
            raise
        finally:
            self._client = None
            with anyio.CancelScope(shield=True):
                await end(tasks)  # nothing more is sent, and what was to be sent last has begun
                await end(self._under_way)
                self._outbox.disconnected()
                await self._leave(client)

    async def _leave(self, client: Client) -> None:
        """Say `offline`: an end in order sends DISCONNECT, and the broker then keeps the will to itself. Where it does
        not confirm that, the connection is dropped, for the will."""
        with anyio.move_on_after(_LAST_WORD_S), suppress(aiomqtt.MqttError):
            await self._publish(client, availability(self._topics, "offline"))
            return
        client.abandon()

    async def _receive(self, client: Client) -> None:
        async for message in client.messages:
            properties = message.properties
            self._on_message(
                Inbound(
                    topic=str(message.topic),
                    payload=bytes(message.payload) if isinstance(message.payload, (bytes, bytearray)) else b"",
                    retain=message.retain,
                    response_topic=getattr(properties, "ResponseTopic", None),
                    correlation=getattr(properties, "CorrelationData", None),
                )
            )

    async def _send(self, client: Client) -> None:
        """All that comes out of the outbox, in order; of what the broker has to confirm, `max_pending` at a time."""
        sent = 0
        while (message := await self._outbox.next()) is not None:
            is_surely = self._qos(message) > 0
            while len(self._under_way) >= self._most_under_way(is_surely):
                await self._one_less(message)
            if not is_surely:
                await self._deliver(client, message)
                sent += 1
                if sent % _SENT_AT_ONCE == 0:
                    await asyncio.sleep(0)  # one that the socket takes at once gives nobody else a turn
                continue
            self._begin(client, message)
        if self._under_way:
            await asyncio.wait(self._under_way)

    def _most_under_way(self, is_surely: bool) -> float:
        """How many may be so that one more may go; one that needs no word from the broker waits for none of them."""
        if self._suspects.is_careful:
            return 1
        return self._options.max_pending if is_surely else math.inf

    async def _one_less(self, message: Message) -> None:
        """Wait until one of those under way has arrived; `message` waits with it."""
        try:
            await asyncio.wait(self._under_way, return_when=asyncio.FIRST_COMPLETED)
        except asyncio.CancelledError:
            self._outbox.put_back(message)
            raise

    def _ended(self, task: asyncio.Future[None]) -> None:
        self._under_way.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None and not self._broken.done():
            self._broken.set_exception(error)

    async def _drain(self, client: Client) -> None:
        """What an outage has left in the spool, the oldest first, no faster than it may, and behind what is live."""
        pause_s = 1.0 / self._spool.drain_per_s
        while True:
            some = await self._spooling.call(self._outbox.left_behind, _DRAINED_AT_ONCE)
            for message in some:
                while self._must_wait:  # noqa: ASYNC110  many things end that
                    await anyio.sleep(pause_s)
                self._begin(client, message, qos=max(1, self._qos(message)))
                await anyio.sleep(pause_s)
            if len(some) < _DRAINED_AT_ONCE:
                await anyio.sleep(max(pause_s, self._spool.fsync_interval_s))

    @property
    def _must_wait(self) -> bool:
        """Whether what is live comes before more of the spool, or as much is on its way as may be."""
        most = 0 if self._suspects.is_careful else self._options.max_pending
        return len(self._outbox) > self._options.max_pending or len(self._in_flight) > most

    def _begin(self, client: Client, message: Message, *, qos: int | None = None) -> None:
        """Send what the broker has to confirm; how that ended is looked at when it has."""
        task = asyncio.ensure_future(self._deliver(client, message, qos=qos))
        self._under_way.add(task)
        task.add_done_callback(self._ended)

    async def _deliver(self, client: Client, message: Message, *, qos: int | None = None) -> None:
        self._in_flight[id(message)] = message, time.monotonic()
        try:
            await self._publish(client, message, qos=qos)
        except ValueError as error:  # paho's word for what MQTT cannot carry
            log.error("mqtt.unsendable", topic=message.topic, reason=str(error))
            self._outbox.drop(message, "unsendable")
        except BaseException as error:
            self._blame(error)
            if message is self._given_up:
                self._outbox.drop(message, "given_up")
            else:
                self._outbox.put_back(message)
            raise
        else:
            self._suspects.arrived(message)
            if message.topic in self._denied:
                self._denied.discard(message.topic)
                self._outbox.drop(message, "refused")
                return
            if message.kind == "results":
                self.sent[message.topic] += 1
            self._outbox.done(message)
        finally:
            del self._in_flight[id(message)]

    def _blame(self, error: BaseException) -> None:
        """The session breaks: was it a message? Once a session."""
        if self._is_blamed or not isinstance(error, aiomqtt.MqttError):
            return
        self._is_blamed = True
        if (message := self._suspects.broke(list(self._in_flight.values()), error)) is not None:
            self._given_up = message
            log.error("mqtt.given_up", topic=message.topic, bytes=len(message.payload), attempts=_MAX_BREAKS)

    async def _publish(self, client: Client, message: Message, *, qos: int | None = None) -> None:
        properties = None
        if message.correlation is not None and self._version == "5":
            properties = Properties(PacketTypes.PUBLISH)  # type: ignore[no-untyped-call]
            properties.CorrelationData = message.correlation
        qos = self._qos(message) if qos is None else qos
        # QoS 0 waits for the socket alone, and a dead one ends the session by itself: a time-out only costs.
        timeout_s = None if qos else math.inf
        await client.publish(
            message.topic, message.payload, qos, message.retain, properties=properties, timeout=timeout_s
        )

    def _qos(self, message: Message) -> int:
        return int(getattr(self._options.qos, message.kind))

    def _note_refusal(self, topic: str, reason: str) -> None:
        """The broker's ACL, or a quota, denies something: count it, and say it once."""
        self.refused[reason] += 1
        self._denied.add(topic)
        told = f"{topic}: {reason}"
        if self.refusal != told:
            log.error("mqtt.refused", topic=topic, reason=reason, hint="see the broker's ACL")
        self.refusal = told

    def _note_acceptance(self, topic: str) -> None:
        """The broker took what it denied before."""
        if self.refusal is not None and self.refusal.startswith(f"{topic}: "):
            log.info("mqtt.accepted_again", topic=topic)
            self.refusal = None

    @asynccontextmanager
    async def _connected(self) -> AsyncIterator[Client]:
        """A fresh client, connected, with the will set. Raises `MqttError`.

        Fresh, since a client whose connect was cancelled cannot be used again.
        """
        options, will = self._options, availability(self._topics, "offline")
        try:
            who = await self._spooling.call(identity, options, self._topics)  # reads files
            client = Client(
                options.host,
                options.port,
                transport=options.transport,
                websocket_path=options.websocket_path if options.transport == "websockets" else None,
                identifier=who.client_id,
                username=who.username,
                password=who.password,
                protocol=aiomqtt.ProtocolVersion.V5 if self._version == "5" else aiomqtt.ProtocolVersion.V311,
                keepalive=options.keepalive_s,
                tls_context=who.tls,
                tls_insecure=options.tls_insecure or None,
                will=aiomqtt.Will(will.topic, will.payload, self._qos(will), will.retain),
                timeout=CALL_TIMEOUT_S,
            )
        except (OSError, ssl.SSLError) as error:  # a certificate that was taken away meanwhile
            raise aiomqtt.MqttError(f"TLS: {error}") from error
        client.pending_calls_threshold = options.max_pending + 1  # below it is no news
        async with AsyncExitStack() as stack:
            try:
                await stack.enter_async_context(client)
            except ValueError as error:  # a host name with an empty or over-long part
                raise aiomqtt.MqttError(f"{options.host!r} cannot be a broker's address: {error}") from error
            except BaseException:
                client.abandon()
                raise
            yield client


class Suspects:
    """Messages that a session may have broken of: a broker that closes the connection over one (too large for it, say)
    would do so for ever. One that was alone on its way each of three times when the broker hung up at once, and let us
    in again at once, is given up. Time-outs and brokers that are away are no message's fault."""

    def __init__(self) -> None:
        self.is_careful = False
        self._breaks: Counter[str] = Counter()
        self._arrived = 0

    def broke(self, in_flight: Sequence[tuple[Message, float]], error: Exception) -> Message | None:
        """The message to give up, if one is to be. From now on messages go one at a time."""
        recent = [message for message, since in in_flight if time.monotonic() - since < _AT_ONCE_S]
        if not recent or "timed out" in str(error):
            return None
        self.is_careful, self._arrived = True, 0
        if len(in_flight) > 1:
            return None
        key = _name(recent[0])
        self._breaks[key] += 1
        return recent[0] if self._breaks[key] >= _MAX_BREAKS else None

    def arrived(self, message: Message) -> None:
        self._breaks.pop(_name(message), None)
        self._arrived += 1
        if self._arrived >= _TRUSTED_AFTER:
            self.is_careful = False

    def clear(self) -> None:
        """The broker is away: whatever broke, it was not a message."""
        self._breaks.clear()


def _name(message: Message) -> str:
    return message.id or message.topic
