"""What the shell offers after Tab: the agent's own commands if it answers at once, else those of this version."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edge_agent.errors import EdgeAgentError
from edgectl import _schema
from edgectl._client import connected, settings
from edgectl._config import config_file
from edgectl._talk import Catalogue, Talk, Target

_PATIENCE_S = 1.0


def commands(parameters: Mapping[str, Any], begun: str) -> list[tuple[str, str]]:
    """Names of commands that begin so, each with what it does."""
    return [(name, entry["description"]) for name, entry in _catalogue(parameters).items() if name.startswith(begun)]


def arguments(parameters: Mapping[str, Any], begun: str) -> list[str]:
    """`key=` for the arguments of the command, or `key=value` where the values can be counted."""
    schema = _catalogue(parameters).get(str(parameters.get("name")), {}).get("arguments")
    key, separator, value = begun.partition("=")
    if separator:
        return [f"{key}={one}" for one in _schema.choices(schema, key) if one.startswith(value)]
    return [f"{one}=" for one in _schema.names(schema) if one.startswith(key)]


def _catalogue(parameters: Mapping[str, Any]) -> Catalogue:
    try:
        return asyncio.run(asyncio.wait_for(_asked(parameters), _PATIENCE_S)) or _own()
    except (EdgeAgentError, asyncio.TimeoutError, OSError):
        return _own()


async def _asked(parameters: Mapping[str, Any]) -> Catalogue | None:
    config, key = parameters.get("config"), parameters.get("key")
    loaded, topics = settings(config_file(Path(config) if config else None), parameters.get("device") or "")
    async with connected(loaded) as client:
        talk = Talk(client, timeout_s=_PATIENCE_S, key=Path(key) if key else None)
        return await talk.catalogue(Target(topics.prefix, device=topics.device))


def _own() -> Catalogue:
    from edge_agent.commands import described

    return described()
