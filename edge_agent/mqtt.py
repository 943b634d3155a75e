"""The link to the broker: one session at a time, for ever.

Owns reconnection, the will, and the sending of the outbox. The only file that imports aiomqtt.
"""

from __future__ import annotations

import asyncio
import math
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass

import aiomqtt
import anyio
import structlog
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from paho.mqtt.reasoncodes import ReasonCode

from edge_agent.backoff import backoff
from edge_agent.config import MqttOptions
from edge_agent.data import Message
from edge_agent.messages import Topics, availability
from edge_agent.queue import Outbox

log = structlog.get_logger()

_MOST_BACKOFF_S = 60.0
_CALL_TIMEOUT_S = 5.0
_MAX_BREAKS = 3


@dataclass(frozen=True, slots=True)
class Inbound:
    """A message that came in on the command topic."""

    payload: bytes
    retain: bool
    response_topic: str | None = None
    correlation: bytes | None = None


class Link:
    """Sends what the outbox holds and hands on what comes in, through whatever the broker does.

    `on_command` and `on_connect` (what is retained is sent after it) are called on the event loop and
    must not block.
    """

    def __init__(
        self,
        options: MqttOptions,
        *,
        topics: Topics,
        outbox: Outbox,
        on_command: Callable[[Inbound], None],
        on_connect: Callable[[], None] = lambda: None,
    ) -> None:
        self._options = options
        self._topics = topics
        self._outbox = outbox
        self._on_command = on_command
        self._on_connect = on_connect
        self._client: aiomqtt.Client | None = None
        self._suspect: Message | None = None
        self._breaks = 0
        self.sent: Counter[str] = Counter()
        self.error: str | None = None
        self.connects = 0

    @property
    def is_connected(self) -> bool:
        return self._client is not None

    async def run(self) -> None:
        """Connect, and connect again, until the outbox is closed and sent."""
        address = f"{self._options.host}:{self._options.port}"
        delays = backoff(most_s=_MOST_BACKOFF_S)
        while not self._outbox.closed:
            try:
                async with _connected(self._options, self._topics) as client:
                    self.connects += 1
                    self.error = None
                    delays = backoff(most_s=_MOST_BACKOFF_S)
                    log.info("mqtt.connected", broker=address)
                    await self._session(client)
                    return
            except aiomqtt.MqttError as error:
                self.error = _explain(error, self._options)
            delay_s = next(delays)
            log.warning("mqtt.disconnected", broker=address, reason=self.error, retry_in_s=round(delay_s, 1))
            with anyio.move_on_after(delay_s):
                await self._outbox.wait_closed()

    async def _session(self, client: aiomqtt.Client) -> None:
        """One connection, from subscribing to the outbox's end. Raises `MqttError` when it is lost."""
        granted = await client.subscribe(self._topics.command, qos=1)
        if any(_is_refusal(code) for code in granted):
            log.error("mqtt.commands_refused", topic=self._topics.command, hint="the broker's ACL denies subscribing")
        self._client = client
        self._on_connect()
        tasks: list[asyncio.Future[None]] = []
        try:
            await _publish(client, availability(self._topics, "online"))
            self._outbox.resend_retained()
            tasks += asyncio.ensure_future(self._receive(client)), asyncio.ensure_future(self._send(client))
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        finally:
            self._client = None
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            # Leaving in order sends DISCONNECT, and the broker then keeps the will to itself.
            with anyio.CancelScope(shield=True), anyio.move_on_after(2.0), suppress(aiomqtt.MqttError):
                await _publish(client, availability(self._topics, "offline"))

    async def _receive(self, client: aiomqtt.Client) -> None:
        async for message in client.messages:
            properties = message.properties
            self._on_command(
                Inbound(
                    payload=bytes(message.payload) if isinstance(message.payload, (bytes, bytearray)) else b"",
                    retain=message.retain,
                    response_topic=getattr(properties, "ResponseTopic", None),
                    correlation=getattr(properties, "CorrelationData", None),
                )
            )

    async def _send(self, client: aiomqtt.Client) -> None:
        while (message := await self._outbox.next()) is not None:
            try:
                await _publish(client, message)
            except ValueError as error:  # paho's word for what MQTT cannot carry
                log.error("mqtt.unsendable", topic=message.topic, reason=str(error))
                self._outbox.dropped += 1
            except BaseException:
                self._put_back(message)
                raise
            else:
                self.sent[message.topic] += 1

    def _put_back(self, message: Message) -> None:
        """Try again in the next session, unless this message was there each time a session broke."""
        again = self._suspect is message
        self._suspect, self._breaks = message, self._breaks + 1 if again else 1
        if self._breaks < _MAX_BREAKS:
            self._outbox.put_back(message)
        else:
            log.error("mqtt.given_up", topic=message.topic, bytes=len(message.payload), attempts=self._breaks)
            self._outbox.dropped += 1


@asynccontextmanager
async def _connected(options: MqttOptions, topics: Topics) -> AsyncIterator[aiomqtt.Client]:
    """A fresh client, connected, with the will set. Raises `MqttError`.

    Fresh, since a client whose connect was cancelled cannot be used again.
    """
    will = availability(topics, "offline")
    version = "3.1.1" if options.embedded else options.protocol  # the embedded broker knows no other
    protocol = aiomqtt.ProtocolVersion.V5 if version == "5" else aiomqtt.ProtocolVersion.V311
    client = aiomqtt.Client(
        options.host,
        options.port,
        identifier=f"edge_agent-{topics.device}",
        username=options.username or None,
        password=options.password.reveal() if options.password else None,
        protocol=protocol,
        keepalive=options.keepalive_s,
        will=aiomqtt.Will(will.topic, will.payload, will.qos, will.retain),
        timeout=_CALL_TIMEOUT_S,
    )
    async with AsyncExitStack() as stack:
        try:
            await stack.enter_async_context(client)
        except ValueError as error:  # a host name with an empty or over-long part
            raise aiomqtt.MqttError(f"{options.host!r} cannot be a broker's address: {error}") from error
        yield client


async def _publish(client: aiomqtt.Client, message: Message) -> None:
    properties = None
    if message.correlation is not None:
        properties = Properties(PacketTypes.PUBLISH)  # type: ignore[no-untyped-call]
        properties.CorrelationData = message.correlation
    # QoS 0 waits for the socket alone, and a dead one ends the session by itself: a time-out only costs.
    timeout_s = None if message.qos else math.inf
    await client.publish(
        message.topic, message.payload, message.qos, message.retain, properties=properties, timeout=timeout_s
    )


def _is_refusal(code: int | ReasonCode) -> bool:
    return (code if isinstance(code, int) else code.value) >= 0x80


def _explain(error: aiomqtt.MqttError, options: MqttOptions) -> str:
    """The broker's reason in a sentence, with what to do where we know it."""
    text = str(error)
    if "protocol version" in text.lower():
        return f"{text}: the broker does not speak MQTT {options.protocol}; set mqtt.protocol"
    if "authori" in text.lower() or "user name" in text.lower():
        return f"{text}: check mqtt.username and mqtt.password"
    return text
