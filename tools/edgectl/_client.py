"""The broker as edgectl sees it: the agent's own settings, a client of its own."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import aiomqtt

from edge_agent import config
from edge_agent.config import Config
from edge_agent.errors import EdgeAgentError
from edge_agent.messages import Topics


class BrokerError(EdgeAgentError):
    """The broker cannot be reached, or refuses us."""

    code = "broker"


def settings(path: Path, device: str) -> tuple[Config, Topics]:
    """The agent's configuration and the topics of `device` (the configured one if empty)."""
    loaded = config.load(path)
    return loaded, Topics(loaded.mqtt.prefix, device or loaded.device)


@asynccontextmanager
async def connected(loaded: Config) -> AsyncIterator[aiomqtt.Client]:
    """A client on the agent's broker. Raises `BrokerError` with what to do."""
    mqtt = loaded.mqtt
    client = aiomqtt.Client(
        mqtt.host,
        mqtt.port,
        username=mqtt.username or None,
        password=mqtt.password.reveal() if mqtt.password else None,
        timeout=5.0,
    )
    try:
        async with client:
            yield client
    except aiomqtt.MqttError as error:
        hint = "start the agent first, its embedded broker runs inside it" if mqtt.embedded else "check [mqtt]"
        raise BrokerError(f"no broker at {mqtt.host}:{mqtt.port} ({error}); {hint}") from error
