"""`edgectl cmd`: one command, one reply."""

from __future__ import annotations

import asyncio
import base64
import json
import sys
import time
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
from rich.console import Console

from edge_agent import plugins
from edge_agent.config import Config
from edge_agent.errors import CommandError, ConfigError
from edge_agent.messages import Command, Job, Reply, SignedCommand, Topics, encode, timestamp
from edgectl._client import connected, settings


def cmd(
    name: str, arguments: Sequence[str], path: Path, *, device: str, timeout_s: float, key: Path | None = None
) -> int:
    """Send the command, signed with the key in a PEM file if one is given, and print the reply's result as JSON; the
    process's exit status."""
    if set(device) & set("+#/"):
        raise CommandError(f"a command goes to one device, not to {device!r}", code="bad_arguments")
    values = dict(_argument(text) for text in arguments)
    loaded, topics = settings(path, device)
    reply = asyncio.run(_ask(loaded, topics, name, values, timeout_s, key))
    if reply is None:
        print(f"error: {topics.device} did not answer within {timeout_s:g} s; is it online?", file=sys.stderr)
        return 1
    if reply.status == "error":
        print(f"error: {reply.code}: {reply.message}", file=sys.stderr)
        return 1
    print(json.dumps(msgspec.to_builtins(reply.result), indent=2, ensure_ascii=False))
    return 0


async def _ask(
    loaded: Config, topics: Topics, name: str, values: dict[str, Any], timeout_s: float, key: Path | None
) -> Reply | None:
    """The last reply. What takes its time tells how it goes, and is waited for as long as it does."""
    command = Command(id=uuid.uuid4().hex, command=name, args=values)
    payload = encode(command) if key is None else _signed(command, topics.device, key, timeout_s)
    reply_topic, job_topic = topics.reply(command.id), topics.job(command.id)
    async with connected(loaded) as client:
        for topic in (reply_topic, job_topic):
            await client.subscribe(topic, qos=1)
        await client.publish(topics.command, payload, qos=1)
        messages = aiter(client.messages)
        with Console(stderr=True).status(f"{name} …") as shown:
            while True:
                try:
                    message = await asyncio.wait_for(anext(messages), timeout_s)
                except asyncio.TimeoutError:
                    return None
                payload = bytes(message.payload or b"")
                if str(message.topic) == job_topic:
                    job = msgspec.json.decode(payload, type=Job)
                    percent = f" {job.percent:.0f} %" if job.percent is not None else ""
                    shown.update(f"{name}: {job.phase}{percent}")
                elif str(message.topic) == reply_topic:  # the embedded broker sends retained ones that nobody wanted
                    reply = msgspec.json.decode(payload, type=Reply)
                    if reply.status != "accepted":
                        return reply


def _argument(text: str) -> tuple[str, Any]:
    key, separator, value = text.partition("=")
    if not separator:
        raise SystemExit(f"error: {text!r} is no key=value")
    try:
        return key, json.loads(value)
    except json.JSONDecodeError:
        return key, value


def _signed(command: Command, device: str, key_file: Path, timeout_s: float) -> bytes:
    """The command in the operator's envelope, for this device, until nobody waits for its reply any more."""
    try:
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
        from cryptography.hazmat.primitives.serialization import load_pem_private_key
    except ImportError as error:
        raise ConfigError(plugins.missing(error, needed_by="--key")) from error
    try:
        key = load_pem_private_key(key_file.read_bytes(), password=None)
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(f"{key_file}: no private key in PEM form without a password ({error})") from error
    if not isinstance(key, Ed25519PrivateKey):
        raise ConfigError(f"{key_file} holds a private key, but not of Ed25519")
    expires_at = timestamp(time.time_ns() + int(timeout_s * 1e9))
    text = encode(msgspec.structs.replace(command, device=device, expires_at=expires_at))
    return encode(SignedCommand(text.decode(), base64.b64encode(key.sign(text)).decode()))
