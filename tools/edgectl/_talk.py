"""Commands sent and their replies heard, from one agent or from many."""

from __future__ import annotations

import asyncio
import base64
import time
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from edge_agent import plugins
from edge_agent.errors import CommandError, ConfigError
from edge_agent.messages import Command, Job, Reply, SignedCommand, Topics, encode, timestamp
from edgectl._client import BrokerError, Client, subscribe

_SILENCE_S = 0.5  # what a broker keeps comes at once

Catalogue = Mapping[str, Any]
"""What `commands.list` says: of each command its description, and its arguments' schema."""


@dataclass(frozen=True, slots=True)
class Target:
    """Whom a command is for: one device, or a group of them, which may be "all"."""

    prefix: str
    device: str | None = None
    group: str | None = None

    @property
    def topic(self) -> str:
        if self.device is not None:
            return f"{self.prefix}/{self.device}/cmd"
        return f"{self.prefix}/all/cmd" if self.group == "all" else f"{self.prefix}/group/{self.group}/cmd"

    @property
    def heard(self) -> Topics:
        """The topics on which it answers, with a wildcard for many."""
        return Topics(self.prefix, self.device or "+")


class Talk:
    """Of one client; for one task at a time."""

    def __init__(self, client: Client, *, timeout_s: float, key: Path | None = None) -> None:
        self._client = client
        self._messages = aiter(client.messages)
        self._timeout_s = timeout_s
        self._key = key

    async def online(self, prefix: str) -> list[str]:
        """The devices that are there, as far as the broker keeps that."""
        await subscribe(self._client, [f"{prefix}/+/available"], qos=1)
        found: dict[str, bool] = {}
        while (message := await self._next(_SILENCE_S)) is not None:
            topic, payload = message
            if topic.endswith("/available"):
                found[topic[len(prefix) + 1 :].partition("/")[0]] = payload == b"online"
        return sorted(device for device, is_there in found.items() if is_there)

    async def catalogue(self, target: Target, *, timeout_s: float | None = None) -> Catalogue | None:
        """What can be commanded there; None where it does not tell that. Raises `CommandError`."""
        timeout_s = self._timeout_s if timeout_s is None else min(timeout_s, self._timeout_s)
        reply = await self.ask("commands.list", {}, target, timeout_s=timeout_s)
        if reply is None:
            raise CommandError(silence(str(target.device), timeout_s), code="timeout")
        if reply.status == "error":
            if reply.code in ("forbidden", "unknown_command"):
                return None
            raise CommandError(str(reply.message), code=reply.code)  # type: ignore[arg-type]
        listed = reply.result.get("commands") if isinstance(reply.result, dict) else None
        return listed if isinstance(listed, dict) else None

    async def ask(self, name: str, arguments: Mapping[str, Any], target: Target, *, timeout_s: float) -> Reply | None:
        """The last reply of one device; None if it stays silent for so long."""
        command_id = await self.send(name, arguments, target)
        while (word := await self.word(command_id, timeout_s)) is not None:
            if isinstance(word, Reply) and word.status != "accepted":
                return word
        return None

    async def send(self, name: str, arguments: Mapping[str, Any], target: Target) -> str:
        """The command's id. Raises `BrokerError` where the broker does not let it through."""
        command = Command(id=uuid.uuid4().hex, command=name, args=dict(arguments))
        payload = encode(command) if self._key is None else _signed(command, target, self._key, self._timeout_s)
        await subscribe(self._client, [target.heard.reply(command.id), target.heard.job(command.id)], qos=1)
        await self._client.publish(target.topic, payload, qos=1)
        if why := self._client.refused.get(target.topic):
            raise BrokerError(f"the broker does not let us publish to {target.topic} ({why}); see its ACL")
        return command.id

    async def word(self, command_id: str, timeout_s: float) -> Reply | Job | None:
        """The next reply to a command, or word on how it goes; None if there is none in time."""
        until = time.monotonic() + timeout_s
        while (message := await self._next(until - time.monotonic())) is not None:
            topic, payload = message  # an embedded broker sends retained ones that nobody wanted
            try:
                if topic.endswith(f"/reply/{command_id}"):
                    return msgspec.json.decode(payload, type=Reply)
                if topic.endswith(f"/jobs/{command_id}"):
                    return msgspec.json.decode(payload, type=Job)
            except msgspec.DecodeError:
                continue  # another version's, or nobody's
        return None

    async def _next(self, timeout_s: float) -> tuple[str, bytes] | None:
        try:
            message = await asyncio.wait_for(anext(self._messages), max(0.0, timeout_s))
        except asyncio.TimeoutError:
            return None
        return str(message.topic), message.payload if isinstance(message.payload, bytes) else b""


def silence(device: str, timeout_s: float) -> str:
    """What is said of a device that does not answer."""
    return f"{device} did not answer within {timeout_s:g} s; is it online?"


def unknown(name: str, catalogue: Catalogue) -> Iterator[str]:
    """A sentence where there is no such command."""
    if name not in catalogue:
        hint = plugins.nearest(name, list(catalogue), listing=False)
        yield f"there is no command {name!r}{hint or '; `edgectl cmd commands.list` names them'}"


def _signed(command: Command, target: Target, key_file: Path, timeout_s: float) -> bytes:
    """The command in the operator's envelope, for whom it is, until nobody waits for its reply any more."""
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
    text = encode(msgspec.structs.replace(command, device=target.device, group=target.group, expires_at=expires_at))
    return encode(SignedCommand(text.decode(), base64.b64encode(key.sign(text)).decode()))
