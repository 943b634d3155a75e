"""`edgectl cmd`: one command, one reply."""

from __future__ import annotations

import asyncio
import json
import sys
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import aiomqtt
import msgspec

from edge_agent.config import Config
from edge_agent.errors import CommandError
from edge_agent.messages import Command, Reply, Topics, encode
from edgectl._client import connected, settings


def cmd(name: str, arguments: Sequence[str], path: Path, *, device: str, timeout_s: float) -> int:
    """Send the command, print the reply's result as JSON; the process's exit status."""
    if set(device) & set("+#/"):
        raise CommandError(f"a command goes to one device, not to {device!r}", code="bad_arguments")
    values = dict(_argument(text) for text in arguments)
    loaded, topics = settings(path, device)
    reply = asyncio.run(_ask(loaded, topics, name, values, timeout_s))
    if reply is None:
        print(f"error: {topics.device} did not answer within {timeout_s:g} s; is it online?", file=sys.stderr)
        return 1
    if reply.status == "error":
        print(f"error: {reply.code}: {reply.message}", file=sys.stderr)
        return 1
    print(json.dumps(msgspec.to_builtins(reply.result), indent=2, ensure_ascii=False))
    return 0


async def _ask(loaded: Config, topics: Topics, name: str, values: dict[str, Any], timeout_s: float) -> Reply | None:
    command = Command(id=uuid.uuid4().hex, command=name, args=values)
    async with connected(loaded) as client:
        await client.subscribe(topics.reply(command.id), qos=1)
        await client.publish(topics.command, encode(command), qos=1)
        try:
            return await asyncio.wait_for(_reply_on(topics.reply(command.id), client), timeout_s)
        except asyncio.TimeoutError:
            return None


async def _reply_on(topic: str, client: aiomqtt.Client) -> Reply:
    async for message in client.messages:
        if str(message.topic) == topic:  # the embedded broker sends retained messages that nobody asked for
            return msgspec.json.decode(bytes(message.payload or b""), type=Reply)
    raise AssertionError("aiomqtt's messages never end, they raise")


def _argument(text: str) -> tuple[str, Any]:
    key, separator, value = text.partition("=")
    if not separator:
        raise SystemExit(f"error: {text!r} is no key=value")
    try:
        return key, json.loads(value)
    except json.JSONDecodeError:
        return key, value
