"""`agent.*` and `commands.list`: the agent itself."""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from edge_agent import __version__, messages
from edge_agent.commands._base import Call, NoArguments, command, registered
from edge_agent.config import Table


class LogLevel(Table):
    """`agent.log_level`"""

    level: Literal["debug", "info", "warning", "error"]


@command("agent.info", NoArguments)
async def info(arguments: NoArguments, call: Call) -> dict[str, Any]:
    """Version, device and what can be commanded."""
    return {
        "device": call.agent.topics.device,
        "version": __version__,
        "schema": messages.SCHEMA_VERSION,
        "commands": list(registered()),
        "cameras": call.agent.camera_names,
        "groups": call.agent.config.mqtt.groups,
    }


@command("commands.list", NoArguments)
async def list_commands(arguments: NoArguments, call: Call) -> dict[str, Any]:
    """Every command: what it does, and the JSON Schema of its arguments."""
    return {"commands": described()}


def described() -> dict[str, Any]:
    """Every command by its name, as `commands.list` tells it."""
    return {
        name: {
            "description": " ".join((entry.handler.__doc__ or "").split()),
            "is_long": entry.is_long,
            "arguments": _schema(entry.arguments),
        }
        for name, entry in registered().items()
    }


def _schema(arguments: type[Table]) -> Any:
    [schema], definitions = msgspec.json.schema_components([arguments], ref_template="#/$defs/{name}")
    own = definitions.pop(arguments.__name__, schema)
    return {**own, "$defs": definitions} if definitions else own


@command("agent.status", NoArguments)
async def status(arguments: NoArguments, call: Call) -> messages.Status:
    """The status topic's payload, now."""
    return call.agent.status()


@command("agent.reload", NoArguments)
async def reload(arguments: NoArguments, call: Call) -> messages.Changed:
    """Read the configuration file again and take over what can change in a running agent; the reply says what takes
    a restart."""
    return await call.agent.change(lambda settings: settings.reread())


@command("agent.restart", NoArguments)
async def restart(arguments: NoArguments, call: Call) -> dict[str, Any]:
    """End in order and start anew, with the configuration as it is then."""
    call.agent.restart()
    return {}


@command("agent.log_level", LogLevel)
async def log_level(arguments: LogLevel, call: Call) -> messages.Changed:
    """How much is logged."""
    changes = {"logging": {"level": arguments.level}}
    return await call.agent.change(lambda settings: settings.changed(changes))


@command("agent.reset_overrides", NoArguments)
async def reset_overrides(arguments: NoArguments, call: Call) -> messages.Changed:
    """Forget all that was changed by command; the configuration file alone holds again."""
    return await call.agent.change(lambda settings: settings.reset())
