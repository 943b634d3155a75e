"""`edgectl watch`: a live table, fed from the agent's topics alone."""

from __future__ import annotations

import asyncio
import time
from collections import Counter, deque
from dataclasses import dataclass, field
from pathlib import Path

import aiomqtt
import msgspec
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from edge_agent.config import Config
from edge_agent.messages import CameraStatus, Health, ResultMessage, Status, Topics
from edgectl._client import connected, settings

_WINDOW_S = 5.0
_COLORS = {"running": "green", "online": "green", "ok": "green", "degraded": "yellow", "connecting": "yellow"}


@dataclass
class CameraView:
    """What one camera's topics said lately."""

    status: CameraStatus | None = None
    last: ResultMessage | None = None
    arrivals: deque[tuple[float, float]] = field(default_factory=deque)

    def arrived(self, result: ResultMessage, now: float) -> None:
        self.last = result
        self.arrivals.append((now, result.latency_ms.total))
        while self.arrivals[0][0] < now - _WINDOW_S:
            self.arrivals.popleft()

    def fps(self, now: float) -> float:
        recent = [at for at, _ in self.arrivals if at >= now - _WINDOW_S]
        return (len(recent) - 1) / (recent[-1] - recent[0]) if len(recent) > 1 else 0.0

    def p50_ms(self) -> float | None:
        ordered = sorted(total for _, total in self.arrivals)
        return ordered[len(ordered) // 2] if ordered else None


@dataclass
class DeviceView:
    """What one agent's topics said lately."""

    available: str = "unknown"
    status: Status | None = None
    health: Health | None = None
    cameras: dict[str, CameraView] = field(default_factory=dict)


class FleetView:
    """Everything seen on the subscribed topics; `take` reads a message, `render` draws the tables."""

    def __init__(self, prefix: str) -> None:
        self._prefix = prefix
        self.devices: dict[str, DeviceView] = {}

    def take(self, topic: str, payload: bytes, now: float) -> None:
        parts = topic[len(self._prefix) + 1 :].split("/")
        device = self.devices.setdefault(parts[0], DeviceView())
        match parts[1:]:
            case ["available"]:
                device.available = payload.decode()
            case ["status"]:
                device.status = msgspec.json.decode(payload, type=Status)
            case ["health"]:
                device.health = msgspec.json.decode(payload, type=Health)
            case ["cameras", name, "status"]:
                device.cameras.setdefault(name, CameraView()).status = msgspec.json.decode(payload, type=CameraStatus)
            case ["cameras", name, "results"]:
                camera = device.cameras.setdefault(name, CameraView())
                camera.arrived(msgspec.json.decode(payload, type=ResultMessage), now)

    def render(self, now: float) -> Group:
        return Group(*(self._device(name, view, now) for name, view in sorted(self.devices.items())))

    def _device(self, name: str, view: DeviceView, now: float) -> Group:
        head = Text.assemble(
            (name, "bold"),
            "  ",
            _colored(view.available),
            "  health ",
            _colored(view.health.state if view.health else "?"),
        )
        if view.status:
            model = view.status.model
            head.append(f"  model {model.name or '-'} ({model.state})  backend {view.status.backend or '-'}")
        table = Table("camera", "state", "fps", "latency p50", "frame", "sees", expand=True)
        for camera, state in sorted(view.cameras.items()):
            table.add_row(camera, *_row(state, now))
        return Group(head, table)


def watch(path: Path, *, device: str, seconds: float) -> None:
    """Draw until Ctrl-C, or for so many seconds."""
    loaded, topics = settings(path, device)
    try:
        asyncio.run(_watch(loaded, topics, seconds))
    except KeyboardInterrupt:
        return


async def _watch(loaded: Config, topics: Topics, seconds: float) -> None:
    view = FleetView(topics.prefix)
    until = time.monotonic() + seconds if seconds else None
    console = Console()
    async with connected(loaded) as client:
        await client.subscribe(f"{topics.root}/#")
        with Live(console=console, auto_refresh=False, transient=False) as live:
            reading = asyncio.ensure_future(_read(client, view))
            try:
                while not reading.done() and (until is None or time.monotonic() < until):
                    live.update(view.render(time.monotonic()) if view.devices else _waiting(topics), refresh=True)
                    await asyncio.wait((reading,), timeout=0.25)
                if reading.done():
                    reading.result()
            finally:
                reading.cancel()


async def _read(client: aiomqtt.Client, view: FleetView) -> None:
    async for message in client.messages:
        payload = message.payload if isinstance(message.payload, bytes) else b""
        try:
            view.take(str(message.topic), payload, time.monotonic())
        except msgspec.DecodeError:
            continue  # another version's message: what is understood is shown


def _waiting(topics: Topics) -> Text:
    return Text(f"waiting for {topics.root} …", style="dim")


def _row(view: CameraView, now: float) -> tuple[str | Text, ...]:
    state = view.status.state if view.status else "?"
    p50_ms = view.p50_ms()
    return (
        _colored(state, view.status.reason if view.status else None),
        f"{view.fps(now):.1f}",
        "-" if p50_ms is None else f"{p50_ms:.1f} ms",
        "-" if view.last is None else str(view.last.seq),
        "-" if view.last is None else _seen(view.last),
    )


def _seen(result: ResultMessage) -> str:
    """In a few words, whatever the kind of model."""
    if objects := result.detections or result.poses:
        counts = Counter(one.label for one in objects)
        return ", ".join(f"{count} {label}" for label, count in counts.most_common())
    if result.classes:
        return ", ".join(f"{one.label} {one.score:.2f}" for one in result.classes[:2])
    if result.segmentation:
        return ", ".join(f"{one.label} {100 * one.ratio:.0f} %" for one in result.segmentation.classes[:3])
    if result.depth and result.depth.min is not None:
        return f"depths {result.depth.min:.3g} to {result.depth.max:.3g}"
    if result.embedding:
        return f"a vector of {result.embedding.size}"
    if result.tensors:
        return ", ".join(result.tensors)
    return "nothing"


def _colored(state: str, reason: str | None = None) -> Text:
    text = f"{state} ({reason})" if reason else state
    return Text(text, style=_COLORS.get(state, "red"))
