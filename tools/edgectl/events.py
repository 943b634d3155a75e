"""`edgectl events`: results and events as they come, those that are wanted."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import msgspec
from rich.console import Console
from rich.text import Text

from edge_agent.config import Config
from edge_agent.errors import EdgeAgentError
from edge_agent.messages import EventMessage, ResultMessage, Topics
from edgectl._client import follow, for_seconds, settings
from edgectl._seen import happened, seen

Heard = ResultMessage | EventMessage

_STYLES = {"result": "dim", "new": "green", "update": "cyan", "end": "yellow"}
_result = msgspec.json.Decoder(ResultMessage)
_event = msgspec.json.Decoder(EventMessage)


@dataclass(frozen=True, slots=True)
class Wanted:
    """Which messages: of one of these cameras and kinds (`result`, or an event's type), and with at least one object
    that has one of the labels, the score and stands in one of the zones, all at once. What is empty admits all."""

    cameras: Sequence[str] = ()
    kinds: Sequence[str] = ()
    labels: Sequence[str] = ()
    zones: Sequence[str] = ()
    score: float = 0.0

    def admits(self, heard: Heard) -> bool:
        if self.cameras and heard.camera not in self.cameras:
            return False
        if self.kinds and kind(heard) not in self.kinds:
            return False
        if not (self.labels or self.zones or self.score > 0):
            return True
        return self._admits_event(heard) if isinstance(heard, EventMessage) else self._admits_result(heard)

    def _admits_event(self, event: EventMessage) -> bool:
        """Zones that it has just left count too: that is what is told of them."""
        return any(
            self._is_wanted(state.label, state.score)
            and (not self.zones or bool({*state.zones, *event.entered, *event.left} & {*self.zones}))
            for state in (event.before, event.after)
            if state is not None
        )

    def _admits_result(self, result: ResultMessage) -> bool:
        """Of zones a result has only how many of each label are in them."""
        found = {label for label, score in _objects(result) if self._is_wanted(label, score)}
        if not self.zones:
            return bool(found)
        counts = result.zones or {}
        return any(counts.get(zone, {}).get(label, 0) > 0 for zone in self.zones for label in found)

    def _is_wanted(self, label: str, score: float | None) -> bool:
        is_sure = score is None or score >= self.score
        return is_sure and (not self.labels or label in self.labels)


def kind(heard: Heard) -> str:
    """`result`, or the type of an event."""
    return heard.type if isinstance(heard, EventMessage) else "result"


def events(
    path: Path | None, *, device: str, is_fleet: bool, wanted: Wanted, count: int, seconds: float, as_json: bool
) -> int:
    """Print what comes, until there were `count` or `seconds` have passed (0: for ever); the process's exit status: 1
    where there were fewer than `count`."""
    loaded, topics = settings(path, "+" if is_fleet else device)
    shown = _Shown(wanted, count, as_json=as_json)
    try:
        asyncio.run(_follow(loaded, topics, shown, seconds))
    except _Enough:
        return 0
    except KeyboardInterrupt:
        return 0
    if shown.count < count:
        print(f"error: only {shown.count} of {count} came within {seconds:g} s", file=sys.stderr)
        return 1
    return 0


async def _follow(loaded: Config, topics: Topics, shown: _Shown, seconds: float) -> None:
    wanted = shown.wanted.kinds
    leaves = [
        leaf
        for leaf, is_wanted in (
            ("results", not wanted or "result" in wanted),
            ("events", not wanted or bool({*wanted} - {"result"})),
        )
        if is_wanted
    ]
    names = shown.wanted.cameras or ["+"]
    listened = [f"{topics.root}/cameras/{name}/{leaf}" for name in names for leaf in leaves]
    await for_seconds(follow(loaded, listened, shown.hear, on_link=shown.link), seconds)


class _Enough(EdgeAgentError):
    """As many were printed as were asked for."""


class _Shown:
    """What was printed."""

    def __init__(self, wanted: Wanted, most: int, *, as_json: bool) -> None:
        self.wanted = wanted
        self.count = 0
        self._most = most
        self._as_json = as_json
        self._console = Console(highlight=False, soft_wrap=True)
        self._is_away = False

    def hear(self, topic: str, payload: bytes) -> None:
        try:
            heard: Heard = _result.decode(payload) if topic.endswith("/results") else _event.decode(payload)
        except msgspec.DecodeError:
            return  # another version's
        if not self.wanted.admits(heard):
            return
        if self._as_json:
            print(payload.decode(), flush=True)
        else:
            self._console.print(Text.assemble(*_line(heard)))
        self.count += 1
        if self._most and self.count >= self._most:
            raise _Enough

    def link(self, trouble: str | None) -> None:
        if trouble or self._is_away:
            print(trouble or "the broker is back", file=sys.stderr)
        self._is_away = trouble is not None


def _objects(result: ResultMessage) -> Iterator[tuple[str, float | None]]:
    """All that has a label; the classes of a segmentation have no score."""
    yield from ((one.label, one.score) for one in result.detections or ())
    yield from ((one.label, one.score) for one in result.poses or ())
    yield from ((one.label, one.score) for one in result.classes or ())
    if result.segmentation:
        yield from ((one.label, None) for one in result.segmentation.classes)


def _line(heard: Heard) -> Iterator[str | tuple[str, str]]:
    yield f"{_clock(heard.captured_at)}  "
    yield f"{heard.device}/{heard.camera}", "bold"
    yield f"  {kind(heard):<6}", _STYLES.get(kind(heard), "")
    if isinstance(heard, EventMessage):
        yield f"  {happened(heard)}"
        return
    yield f"  #{heard.seq}  {seen(heard)}  "
    yield f"{heard.latency_ms.total:.1f} ms", "dim"


def _clock(captured_at: str) -> str:
    """The time of day here, to the millisecond."""
    try:
        at = datetime.fromisoformat(captured_at.replace("Z", "+00:00")).astimezone()
    except ValueError:
        return captured_at
    return at.strftime("%H:%M:%S.") + f"{at.microsecond // 1000:03}"
