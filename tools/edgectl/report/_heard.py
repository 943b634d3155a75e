"""What an agent said while it was listened to: its state, its statistics, how long each frame took; no pictures."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

import msgspec

from edge_agent.config import Config
from edge_agent.messages import CameraStatus, Health, Models, ResultMessage, Stats, Status, Topics
from edgectl._client import BrokerError, follow
from edgectl._progress import Tell

_LEAVES = ("available", "status", "health", "stats", "models", "cameras/+/status", "cameras/+/results")
_KINDS = {"status": Status, "health": Health, "models": Models}
_MOST_FRAMES = 200_000
_RETAINED_S = 1.0  # what a broker keeps comes at once


@dataclass(frozen=True, slots=True)
class FrameTimes:
    """How long a frame took, in milliseconds by stage, and when it was captured, in seconds since 1970."""

    camera: str
    seq: int
    captured_at: float
    queue: float
    preprocess: float
    inference: float
    postprocess: float
    total: float


STAGES = ("queue", "preprocess", "inference", "postprocess", "total")


@dataclass(frozen=True, slots=True)
class Told:
    """Statistics as they came, and when they were made, in seconds since 1970."""

    at: float
    stats: dict[str, Any]


@dataclass
class Heard:
    """`last`: of every topic but results and statistics the last message; `listened_s`: for how long; `troubles`: what
    kept us from hearing more, or from understanding it."""

    last: dict[str, Any] = field(default_factory=dict)
    stats: list[Told] = field(default_factory=list)
    frames: list[FrameTimes] = field(default_factory=list)
    messages: Counter[str] = field(default_factory=Counter)
    listened_s: float = 0.0
    troubles: list[str] = field(default_factory=list)

    def take(self, name: str, payload: bytes) -> None:
        """A message on the topic `name`, below the device. Raises `ValueError` or `MsgspecError` for one that is not as
        docs/mqtt.md says."""
        self.messages[name] += 1
        if name == "available":
            self.last[name] = payload.decode()
        elif name.endswith("/results"):
            self._frame(msgspec.json.decode(payload, type=ResultMessage))
        elif name == "stats":
            at = _seconds(msgspec.json.decode(payload, type=Stats).at)
            self.stats.append(Told(at, msgspec.json.decode(payload)))
        else:
            msgspec.json.decode(payload, type=_KINDS.get(name, CameraStatus))
            self.last[name] = msgspec.json.decode(payload)

    def _frame(self, result: ResultMessage) -> None:
        if len(self.frames) < _MOST_FRAMES:
            stages = msgspec.structs.asdict(result.latency_ms)
            self.frames.append(FrameTimes(result.camera, result.seq, _seconds(result.captured_at), **stages))


def _seconds(timestamp: str) -> float:
    return datetime.fromisoformat(timestamp.replace("Z", "+00:00")).timestamp()


def listen(loaded: Config, topics: Topics, seconds: float, tell: Tell) -> Heard:
    """What is said within so many seconds; a broker that is away is among the troubles."""
    heard = Heard()
    asyncio.run(_listen(loaded, topics, max(seconds, _RETAINED_S), heard, tell))
    if not heard.messages and not heard.troubles:
        heard.troubles.append(f"{topics.device} said nothing: it does not run, or has another name or prefix")
    elif heard.last.get("available") == "offline":
        heard.troubles.append(f"{topics.device} is offline: what is told of it is old")
    return heard


async def _listen(loaded: Config, topics: Topics, seconds: float, heard: Heard, tell: Tell) -> None:
    odd: set[str] = set()

    def hear(topic: str, payload: bytes) -> None:
        name = topic[len(topics.root) + 1 :]
        try:
            heard.take(name, payload)
        except (msgspec.MsgspecError, ValueError) as error:
            if name not in odd:
                odd.add(name)
                heard.troubles.append(f"A message on {topic} was not understood, of another version perhaps: {error}")

    def on_link(trouble: str | None) -> None:
        if trouble:
            heard.troubles.append(trouble)

    began = time.monotonic()
    work = follow(loaded, [f"{topics.root}/{leaf}" for leaf in _LEAVES], hear, on_link=on_link)
    following = asyncio.ensure_future(work)
    try:
        while not following.done() and (passed := time.monotonic() - began) < seconds:
            tell(f"listening to {topics.device}", 100 * passed / seconds)
            await asyncio.wait((following,), timeout=min(0.25, seconds - passed))
        if following.done():
            following.result()
    except BrokerError as error:
        heard.troubles.append(str(error))
        return
    finally:
        following.cancel()
        await asyncio.gather(following, return_exceptions=True)
    heard.listened_s = round(time.monotonic() - began, 1)
