"""`edgectl cmd`: one command, checked before it is sent, and the reply of one agent or of many."""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
from rich.console import Console
from rich.table import Table
from rich.text import Text

from edge_agent.config import Config
from edge_agent.errors import CommandError
from edge_agent.messages import Job, Reply
from edgectl import _schema
from edgectl._client import connected, settings
from edgectl._progress import Tell, progress
from edgectl._talk import Catalogue, Talk, Target, silence, unknown

REFUSED, NOT_SENT = 1, 2  # exit statuses

_ASKED, _ASK_S = 3, 2.0  # of many, so many are asked what can be commanded, each for so long
_WINDOW_S = 5.0  # for members of a group, which nobody can count, to answer


@dataclass(frozen=True, slots=True)
class Gathering:
    """Replies of many: who is to answer (`expected`: by name; `count`: so many), and until when (0: see `_gather`)."""

    expected: Sequence[str]
    count: int
    seconds: float


@dataclass(slots=True)
class Gathered:
    """The last replies by device, and who began and has not ended."""

    replies: dict[str, Reply] = field(default_factory=dict)
    pending: set[str] = field(default_factory=set)

    def missing(self, gathering: Gathering) -> list[str]:
        """The devices that were to answer and did not; as far as they have a name."""
        return sorted((self.pending | set(gathering.expected if not gathering.count else ())) - set(self.replies))

    def is_complete(self, gathering: Gathering) -> bool:
        """Whether nobody else is waited for."""
        if gathering.count:
            return len(self.replies) >= gathering.count
        return bool(gathering.expected) and not self.missing(gathering)


def cmd(
    name: str,
    arguments: Sequence[str],
    path: Path | None,
    *,
    device: str,
    group: str,
    expect: int,
    seconds: float,
    timeout_s: float,
    key: Path | None,
    as_json: bool,
) -> int:
    """Send the command, signed with the key in a PEM file if one is given, and print what comes back; the process's
    exit status. `group`: the replies of all its members instead of those of one device; "all": of everybody."""
    pairs = [_pair(text) for text in arguments]
    if None in pairs:
        wrong = next(text for text, pair in zip(arguments, pairs, strict=True) if pair is None)
        return _not_sent([f"{wrong!r} is no key=value"])
    for one in (device, group):
        if set(one) & set("+#/"):
            return _not_sent([f"a command goes to one device or one group, not to {one!r}"])
    loaded, topics = settings(path, device)
    target = Target(topics.prefix, group=group) if group else Target(topics.prefix, device=topics.device)
    sending = _Sending(name, [pair for pair in pairs if pair], target, key, timeout_s)
    if group:
        return asyncio.run(_ask_many(loaded, sending, expect, seconds, as_json=as_json))
    return asyncio.run(_ask_one(loaded, sending, as_json=as_json))


@dataclass(frozen=True, slots=True)
class _Sending:
    name: str
    pairs: Sequence[tuple[str, str]]
    target: Target
    key: Path | None
    timeout_s: float

    def talk(self, client: Any) -> Talk:
        return Talk(client, timeout_s=self.timeout_s, key=self.key)


async def _ask_one(loaded: Config, sending: _Sending, *, as_json: bool) -> int:
    async with connected(loaded) as client:
        talk, target = sending.talk(client), sending.target
        try:
            catalogue = await talk.catalogue(target)
        except CommandError as error:
            return _failed(str(error) if error.code == "timeout" else f"{error.code}: {error}")
        values = _typed(sending, catalogue)
        if troubles := _troubles(sending.name, values, catalogue):
            return _not_sent(troubles)
        with progress(sending.name) as tell:
            command_id = await talk.send(sending.name, values, target)
            reply = await _last(talk, command_id, sending, tell)
    if reply is None:
        message = silence(str(target.device), sending.timeout_s)
        if as_json:
            _print_json({"device": target.device, "id": command_id, "status": None, "message": message})
        return _failed(message)
    if as_json:
        _print_json(msgspec.to_builtins(reply))
    elif reply.status == "ok":
        _print_json(_result(reply))
    return _failed(f"{reply.code}: {reply.message}") if reply.status == "error" else 0


async def _last(talk: Talk, command_id: str, sending: _Sending, tell: Tell) -> Reply | None:
    """What takes its time tells how it goes, and is waited for as long as it does."""
    while (word := await talk.word(command_id, sending.timeout_s)) is not None:
        if isinstance(word, Job):
            tell(f"{sending.name}: {word.phase or word.state}", word.percent)
        elif word.status != "accepted":
            return word
    return None


async def _ask_many(loaded: Config, sending: _Sending, expect: int, seconds: float, *, as_json: bool) -> int:
    target = sending.target
    async with connected(loaded) as client:
        talk = sending.talk(client)
        online = await talk.online(target.prefix)
        catalogue = await _catalogue_of_any(talk, online, target)
        values = _typed(sending, catalogue)
        if troubles := _troubles(sending.name, values, catalogue):
            return _not_sent(troubles)
        gathering = Gathering(online if target.group == "all" else (), expect, seconds)
        with progress(sending.name) as tell:
            command_id = await talk.send(sending.name, values, target)
            gathered = await _gather(talk, command_id, sending, gathering, tell)
    _show(sending, command_id, gathered, gathering, as_json=as_json)
    return _verdict(sending, gathered, gathering)


async def _catalogue_of_any(talk: Talk, online: Sequence[str], target: Target) -> Catalogue | None:
    """Of one who is there; the others check for themselves, and so does everybody if nobody tells."""
    for device in online[:_ASKED]:
        try:
            return await talk.catalogue(Target(target.prefix, device=device), timeout_s=_ASK_S)
        except CommandError:
            continue
    return None


async def _gather(talk: Talk, command_id: str, sending: _Sending, gathering: Gathering, tell: Tell) -> Gathered:
    """Until all have answered; where nobody knows who they are, for a while, and until whoever began has ended."""
    gathered = Gathered()
    began = time.monotonic()
    is_counted = bool(gathering.count or gathering.expected)
    while not gathered.is_complete(gathering):
        quiet_s = sending.timeout_s if is_counted or gathered.pending else _WINDOW_S
        if gathering.seconds:
            quiet_s = began + gathering.seconds - time.monotonic()
        word = await talk.word(command_id, quiet_s) if quiet_s > 0 else None
        if word is None:
            break
        if isinstance(word, Job):
            tell(f"{word.device}: {word.phase or word.state}", word.percent)
        elif word.status == "accepted":
            gathered.pending.add(word.device)
        else:
            gathered.pending.discard(word.device)
            gathered.replies[word.device] = word
            tell(f"{len(gathered.replies)} of {gathering.count or len(gathering.expected) or '?'} have answered", None)
    return gathered


def _show(sending: _Sending, command_id: str, gathered: Gathered, gathering: Gathering, *, as_json: bool) -> None:
    replies, missing = dict(sorted(gathered.replies.items())), gathered.missing(gathering)
    if as_json:
        shown = {"command": sending.name, "id": command_id, "replies": list(map(msgspec.to_builtins, replies.values()))}
        _print_json({**shown, "missing": missing})
        return
    rows = [_row(device, reply) for device, reply in replies.items()]
    rows += [
        (device, "-", "-", "began, and has not ended" if device in gathered.pending else "did not answer")
        for device in missing
    ]
    if rows:
        _print_table(("device", "status", "ms", "result"), rows)


def _row(device: str, reply: Reply) -> tuple[str, ...]:
    told = json.dumps(_result(reply), ensure_ascii=False) if reply.status == "ok" else str(reply.message)
    return device, "ok" if reply.status == "ok" else str(reply.code), f"{reply.duration_ms:.0f}", told


def _print_table(heading: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> None:
    """Wrapped on a terminal; elsewhere a line each, however long."""
    console = Console(highlight=False)
    if console.is_terminal:
        table = Table(*heading, box=None, pad_edge=False)
        for row in rows:
            table.add_row(*(Text(cell, style=_style(cell) if at == 1 else "") for at, cell in enumerate(row)))
        console.print(table)
        return
    widths = [max(map(len, column)) for column in zip(heading, *rows, strict=True)]
    for row in (heading, *rows):
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def _style(status: str) -> str:
    return "green" if status == "ok" else "red"


def _verdict(sending: _Sending, gathered: Gathered, gathering: Gathering) -> int:
    refused = sum(reply.status == "error" for reply in gathered.replies.values())
    missing = len(gathered.missing(gathering))
    if not gathered.replies:
        return _failed(f"nobody answered {sending.name}; is anybody of {sending.target.topic} online?")
    if gathering.count > len(gathered.replies):
        return _failed(f"only {len(gathered.replies)} of {gathering.count} answered")
    if refused or missing:
        return _failed(f"of {len(gathered.replies) + missing} devices {refused} refused and {missing} did not answer")
    return 0


def _pair(text: str) -> tuple[str, str] | None:
    key, separator, value = text.partition("=")
    return (key, value) if separator and key else None


def _typed(sending: _Sending, catalogue: Catalogue | None) -> dict[str, Any]:
    return _schema.typed(sending.pairs, _arguments(sending.name, catalogue))


def _arguments(name: str, catalogue: Catalogue | None) -> Mapping[str, Any] | None:
    entry = (catalogue or {}).get(name)
    return entry.get("arguments") if isinstance(entry, dict) else None


def _troubles(name: str, values: Mapping[str, Any], catalogue: Catalogue | None) -> list[str]:
    """What the agent would refuse, as far as its own list tells."""
    if catalogue is None:
        return []
    schema = _arguments(name, catalogue)
    return [*unknown(name, catalogue), *(_schema.problems(values, schema) if schema else ())]


def _result(reply: Reply) -> Any:
    return None if reply.result is msgspec.UNSET else msgspec.to_builtins(reply.result)


def _print_json(value: Any) -> None:
    print(json.dumps(value, indent=2, ensure_ascii=False))


def _not_sent(sentences: Sequence[str]) -> int:
    print(f"error: {'; '.join(sentences)}", file=sys.stderr)
    return NOT_SENT


def _failed(sentence: str) -> int:
    print(f"error: {sentence}", file=sys.stderr)
    return REFUSED
