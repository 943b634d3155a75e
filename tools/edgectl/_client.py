"""The broker as edgectl sees it: the agent's own settings, a client of its own."""

from __future__ import annotations

import asyncio
import logging
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import aiomqtt

from edge_agent import config
from edge_agent._compat import end
from edge_agent.backoff import backoff
from edge_agent.config import Config, MqttOptions
from edge_agent.errors import ConfigError, EdgeAgentError
from edge_agent.messages import Topics
from edge_agent.mqtt_client import UNSUPPORTED_VERSION, HungUp, code_of, explain, login, tls
from edge_agent.mqtt_client import Client as LinkClient

_TIMEOUT_S = 5.0
_MOST_BACKOFF_S = 5.0
_REFUSED = 0x80

_silent = logging.getLogger("edgectl.mqtt")
_silent.addHandler(logging.NullHandler())
_silent.propagate = False


class BrokerError(EdgeAgentError):
    """The broker cannot be reached, or refuses us."""

    code = "broker"


class Client(LinkClient):
    """The agent's own client. `refused`: topics that the broker's ACL did not let us publish to, and why."""

    refused: dict[str, str]


def settings(path: Path | None, device: str) -> tuple[Config, Topics]:
    """The agent's configuration (the defaults without a file) and the topics of `device`: the configured one if empty,
    "+" for all. Raises `ConfigError`."""
    if device != "+" and set(device) & set("+#/\0"):
        raise ConfigError(f"{device!r} is no device's name; --all is for all of them")
    loaded = Config() if path is None else config.load(path)
    return loaded, Topics(loaded.mqtt.prefix, device or loaded.device)


@asynccontextmanager
async def connected(loaded: Config) -> AsyncIterator[Client]:
    """A client on the agent's broker, by the way that the agent takes. Raises `BrokerError` with what to do."""
    mqtt, where = loaded.mqtt, _where(loaded.mqtt)
    is_there = False
    try:
        async with AsyncExitStack() as stack:
            client = await _entered(stack, mqtt)
            is_there = True
            yield client
    except aiomqtt.MqttError as error:
        if is_there:
            raise BrokerError(f"the broker at {where} has gone ({error})") from error
        hint = "; start the agent first, its embedded broker runs inside it" if mqtt.embedded else ""
        raise BrokerError(f"no broker at {where} ({explain(error, mqtt)}){hint}") from error


async def subscribe(client: aiomqtt.Client, topics: Sequence[str], *, qos: int = 0) -> None:
    """Raises `BrokerError` where the broker's ACL denies it."""
    for topic in topics:
        granted = await client.subscribe(topic, qos=qos)
        if any((code if isinstance(code, int) else code.value) >= _REFUSED for code in granted):
            raise BrokerError(f"the broker does not let us subscribe to {topic}; see its ACL")


async def follow(
    loaded: Config,
    topics: Sequence[str],
    hear: Callable[[str, bytes], None],
    *,
    on_link: Callable[[str | None], None] = lambda trouble: None,
) -> None:
    """Hand every message on these topics to `hear`, for ever: a broker that goes is waited for, and `on_link` told
    why it is away, or None. One that is not there at first raises `BrokerError`."""
    was_there = False
    delays = backoff(most_s=_MOST_BACKOFF_S)
    while True:
        try:
            async with connected(loaded) as client:
                await subscribe(client, topics)
                was_there, delays = True, backoff(most_s=_MOST_BACKOFF_S)
                on_link(None)
                async for message in client.messages:
                    if isinstance(message.payload, bytes) and message.payload:
                        hear(str(message.topic), message.payload)
        except BrokerError as error:
            if not was_there:
                raise
            on_link(str(error))
        await asyncio.sleep(next(delays))


async def for_seconds(work: Awaitable[None], seconds: float) -> None:
    """Wait for `work`, but no longer than that; 0: as long as it takes."""
    task = asyncio.ensure_future(work)
    try:
        await asyncio.wait((task,), timeout=seconds or None)
        if task.done():
            task.result()
    finally:
        await end((task,))


async def _entered(stack: AsyncExitStack, mqtt: MqttOptions) -> Client:
    """A client that is connected; MQTT 3.1.1 is tried where the broker may want that."""
    is_old = mqtt.embedded or mqtt.protocol == "3.1.1"
    versions = [aiomqtt.ProtocolVersion.V311 if is_old else aiomqtt.ProtocolVersion.V5]
    if mqtt.protocol == "auto" and not is_old:
        versions.append(aiomqtt.ProtocolVersion.V311)
    for version in versions[:-1]:
        try:
            return await _connect(stack, mqtt, version)
        except aiomqtt.MqttError as error:
            if not isinstance(error, HungUp) and code_of(error) not in UNSUPPORTED_VERSION:
                raise
    return await _connect(stack, mqtt, versions[-1])


async def _connect(stack: AsyncExitStack, mqtt: MqttOptions, version: aiomqtt.ProtocolVersion) -> Client:
    try:
        username, password = await asyncio.to_thread(login, mqtt)
        context = await asyncio.to_thread(tls, mqtt)
    except (OSError, ssl.SSLError) as error:
        raise aiomqtt.MqttError(f"TLS: {error}") from error
    client = Client(
        mqtt.host,
        mqtt.port,
        transport=mqtt.transport,
        websocket_path=mqtt.websocket_path if mqtt.transport == "websockets" else None,
        username=username,
        password=password,
        protocol=version,
        tls_context=context,
        tls_insecure=mqtt.tls_insecure or None,
        timeout=_TIMEOUT_S,
        logger=_silent,
    )
    client.refused = {}
    client.on_refusal = client.refused.__setitem__
    client.pending_calls_threshold = 1000
    try:
        await stack.enter_async_context(client)
    except ValueError as error:
        raise aiomqtt.MqttError(f"{mqtt.host!r} cannot be a broker's address: {error}") from error
    except BaseException:
        client.abandon()
        raise
    return client


def _where(mqtt: MqttOptions) -> str:
    return f"unix:{mqtt.host}" if mqtt.transport == "unix" else f"{mqtt.host}:{mqtt.port}"
