"""`edgectl watch`: a live view of an agent or a fleet, fed from their topics alone."""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

from rich import box
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from edge_agent.config import Config
from edge_agent.messages import Stats, Topics
from edge_agent.readings import BoardReadings, GpuReadings
from edgectl._client import follow, for_seconds, settings
from edgectl._fleet import LEAVES, CameraView, DeviceView, FleetView, model_of, sparkline
from edgectl._seen import seen

_COLORS = {"running": "green", "online": "green", "ok": "green", "ready": "green", "done": "green"}
_PALE = {"degraded": "yellow", "connecting": "yellow", "loading": "yellow", "probation": "yellow", "starting": "yellow"}
_DRAW_S = 0.25
_TELL_S = 2.0
_JSON_S = 5.0


def watch(path: Path | None, *, device: str, is_fleet: bool, seconds: float, as_json: bool) -> int:
    """Show what happens until Ctrl-C, or for so many seconds; the process's exit status: 1 if nothing was heard."""
    loaded, topics = settings(path, "+" if is_fleet else device)
    seconds = seconds or (_JSON_S if as_json else 0.0)
    watching = _Watching(loaded, topics, as_json=as_json)
    try:
        asyncio.run(watching.run(seconds))
    except KeyboardInterrupt:
        return 0
    if as_json:
        print(json.dumps(watching.view.snapshot(time.monotonic()), indent=2, ensure_ascii=False))
    if not watching.view.devices:
        who = "anybody" if topics.device == "+" else topics.device
        print(f"error: nothing was heard of {who} within {seconds:g} s; is it online?", file=sys.stderr)
        return 1
    return 0


class _Watching:
    """Of one run; event loop only."""

    def __init__(self, loaded: Config, topics: Topics, *, as_json: bool) -> None:
        self.view = FleetView(topics.prefix)
        self._loaded = loaded
        self._topics = topics
        self._as_json = as_json
        self._console = Console(highlight=False, soft_wrap=True)
        self._trouble: str | None = None

    async def run(self, seconds: float) -> None:
        listened = [f"{self._topics.root}/{leaf}" for leaf in LEAVES]
        work = follow(self._loaded, listened, self._hear, on_link=self._link)
        if self._as_json:
            await for_seconds(work, seconds)
        elif self._console.is_terminal:
            with Live(console=Console(), auto_refresh=False) as live:
                await self._beside(work, lambda: live.update(self._drawn(), refresh=True), _DRAW_S, seconds)
        else:
            await self._beside(work, self._tell, _TELL_S, seconds)

    async def _beside(self, work: Awaitable[None], show: Callable[[], None], every_s: float, seconds: float) -> None:
        """Call `show` every so often while `work` goes on, and at the end."""
        task = asyncio.ensure_future(work)
        until = time.monotonic() + seconds if seconds else float("inf")
        try:
            while not task.done() and (left := until - time.monotonic()) > 0:
                await asyncio.wait((task,), timeout=min(every_s, left))
                self.view.roll(time.monotonic())
                if not task.done():
                    show()
            if task.done():
                task.result()
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    def _hear(self, topic: str, payload: bytes) -> None:
        news = self.view.take(topic, payload, time.monotonic())
        if not self._as_json and not self._console.is_terminal:
            for sentence in news:
                self._console.print(Text(f"{time.strftime('%H:%M:%S')}  {sentence}"))

    def _link(self, trouble: str | None) -> None:
        is_news = (trouble is None) != (self._trouble is None)
        self._trouble = trouble
        if is_news and (self._as_json or not self._console.is_terminal):
            print(trouble or "the broker is back", file=sys.stderr)

    def _tell(self) -> None:
        now = time.monotonic()
        for device, view in sorted(self.view.devices.items()):
            for camera, state in sorted(view.cameras.items()):
                cells = (device, camera, *(str(cell) for cell in _cells(view, camera, state, now)))
                self._console.print(Text(f"{time.strftime('%H:%M:%S')}  {' │ '.join(cells)}"))

    def _drawn(self) -> RenderableType:
        now = time.monotonic()
        parts: list[RenderableType] = [Text(self._trouble, style="red")] if self._trouble else []
        parts += [_device(name, view, now) for name, view in sorted(self.view.devices.items())]
        return Group(*parts) if parts else Text(f"waiting for {self._topics.root} …", style="dim")


def _device(name: str, view: DeviceView, now: float) -> Group:
    head = Text.assemble((name, "bold"), "  ", _colored(view.available or "?"))
    if view.health:
        head.append_text(Text.assemble("  health ", _colored(view.health.state)))
    if view.status:
        head.append(f"  {model_of(view.status)}  version {view.status.version}")
    parts: list[RenderableType] = [head]
    parts += [Text(f"  {line}", style="dim") for line in _machine(view.stats)]
    parts += list(_troubles(view, now))
    if view.status and view.status.policy.state not in ("off", "ok"):
        parts.append(Text(f"  latency ladder: {view.status.policy.detail}", style="yellow"))
    parts += list(_jobs(view))
    if view.cameras:
        parts.append(_table(view, now))
    return Group(*parts)


def _table(view: DeviceView, now: float) -> Table:
    table = Table("camera", "state", box=box.SIMPLE_HEAD, expand=True, pad_edge=False)
    table.add_column("fps", justify="right")
    table.add_column("p50/p95/p99 ms", justify="right", no_wrap=True)
    table.add_column("dropped", justify="right")
    table.add_column("sees", ratio=1)
    table.add_column("fps", no_wrap=True, max_width=20)
    table.add_column("p95", no_wrap=True, max_width=20)
    for camera, state in sorted(view.cameras.items()):
        curves = sparkline(list(state.rates)[-20:]), sparkline(list(state.p95s_ms)[-20:])
        table.add_row(camera, *_cells(view, camera, state, now), *(Text(curve, style="cyan") for curve in curves))
    return table


def _cells(view: DeviceView, camera: str, state: CameraView, now: float) -> tuple[Text, ...]:
    """State, results a second, latency, what was dropped, what was seen."""
    status, fps, latency = state.status, state.fps(now), state.latency()
    stats = view.stats.cameras.get(camera) if view.stats else None
    dropped = None if stats is None else sum(getattr(stats.drops, cause) for cause in stats.drops.__struct_fields__)
    return (
        _colored(status.state, status.reason) if status else Text("?"),
        Text("-" if fps is None else f"{fps:.1f}"),
        Text("-" if latency is None else f"{latency.p50:.1f}/{latency.p95:.1f}/{latency.p99:.1f}"),
        Text("-" if dropped is None else str(dropped)),
        _last(state),
    )


def _last(state: CameraView) -> Text:
    """What was seen last; of a camera that does not run, why."""
    if state.status and state.status.state != "running" and state.status.message:
        return Text(state.status.message, style="dim")
    return Text("-" if state.last is None else seen(state.last))


def _troubles(view: DeviceView, now: float) -> Iterator[Text]:
    for name, check in view.troubles().items():
        lasts_s = view.lasts_s(check, now)
        lasts = "" if lasts_s is None else f" for {_span(lasts_s)}"
        age = f"  (looked at {_span(view.age_s(check, now))} ago)"
        state = _colored(check.state)
        yield Text.assemble("  ", (name, "bold"), " ", state, f"{lasts}: {check.fact}", (age, "dim"))


def _jobs(view: DeviceView) -> Iterator[Text]:
    for job in view.jobs.values():
        percent = "" if job.percent is None else f"  {_bar(job.percent)} {job.percent:.0f} %"
        word = job.phase or "" if job.state == "running" else job.state
        why = f": {job.message}" if job.message else ""
        yield Text.assemble("  job ", (job.command, "bold"), " ", _colored(word), percent, why)


def _machine(stats: Stats | None) -> Iterator[str]:
    """The machine in a line or two, as far as its sensors see it."""
    if stats is None:
        return
    for gpu in stats.gpus or ():
        yield "  ".join(_gpu(gpu))
    if stats.board:
        yield "  ".join(_board(stats.board))
    host, process = stats.host, stats.process
    parts = [
        f"CPU {host.cpu_percent:.0f} %" if host and host.cpu_percent is not None else "",
        f"memory {host.memory_used_mb / 1e3:.1f}/{host.memory_total_mb / 1e3:.1f} GB"
        if host and host.memory_used_mb is not None and host.memory_total_mb is not None
        else "",
        f"agent {process.cpu_percent:.0f} % of a core" if process.cpu_percent is not None else "",
        f"{process.rss_mb:.0f} MB" if process.rss_mb is not None else "",
    ]
    if any(parts):
        yield "  ".join(part for part in parts if part)


def _gpu(gpu: GpuReadings) -> Iterator[str]:
    yield f"GPU {gpu.index} {gpu.name or ''}".rstrip()
    if gpu.utilisation_percent is not None:
        yield f"{gpu.utilisation_percent:.0f} %"
    if gpu.memory_used_mb is not None and gpu.memory_total_mb is not None:
        yield f"{gpu.memory_used_mb / 1e3:.1f}/{gpu.memory_total_mb / 1e3:.1f} GB"
    if gpu.temperature_c is not None:
        yield f"{gpu.temperature_c:.0f} °C"
    if gpu.power_w is not None:
        yield f"{gpu.power_w:.0f} W"
    if gpu.throttle_reasons:
        yield f"throttled: {', '.join(gpu.throttle_reasons)}"


def _board(board: BoardReadings) -> Iterator[str]:
    yield board.model or "Jetson"
    if board.gpu_percent is not None:
        yield f"GPU {board.gpu_percent:.0f} %"
    if board.temperatures_c:
        name, hottest = max(board.temperatures_c.items(), key=lambda item: item[1])
        yield f"{name} {hottest:.0f} °C"
    if board.power_w is not None:
        yield f"{board.power_w:.1f} W"
    if board.power_mode:
        yield board.power_mode
    if board.throttling:
        yield f"throttled: {', '.join(board.throttling)}"


def _bar(percent: float) -> str:
    filled = round(max(0.0, min(100.0, percent)) / 10)
    return "█" * filled + "░" * (10 - filled)


def _span(seconds: float) -> str:
    """A time span, in one unit."""
    for unit, length in (("d", 86_400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{max(0.0, seconds):.0f} s"


def _colored(state: str, reason: str | None = None) -> Text:
    text = f"{state} ({reason})" if reason else state
    return Text(text, style=_COLORS.get(state) or _PALE.get(state, "red"))
