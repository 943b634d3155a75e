"""`edgectl cameras`: what is plugged in here, by the kernel's own listing, and how well anything delivers."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from edge_agent import logs
from edge_agent.data import Frame, Image
from edge_agent.errors import EdgeAgentError, SourceError
from edge_agent.logs.redaction import redacted_text
from edge_agent.messages import timestamp
from edge_agent.sources import _pixels
from edge_agent.sources._v4l2 import Device, Found, Mode, devices
from edgectl._config import config_file
from edgectl._progress import Tell, progress
from edgectl._reading import Failure, Follower, Timing, reading, timing
from edgectl._sources import at_full_pace, codec_of, options_of, unthinned, without_end

_PICTURES = (".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")


class SnapshotError(EdgeAgentError):
    """A picture cannot be written."""

    code = "snapshot"


def cameras(*, as_json: bool) -> None:
    """Print every camera with its modes."""
    found = [(camera, _modes(camera)) for camera in devices()]
    if as_json:
        shown = [
            {**dataclasses.asdict(camera), "modes": list(map(dataclasses.asdict, modes))} for camera, modes in found
        ]
        print(json.dumps(shown, indent=2))
        return
    console = Console()
    for camera, modes in found:
        names = [name for name in (camera.by_id, camera.usb and f"usb:{camera.usb}") if name]
        console.print(f"[bold]{camera.path}[/]  {camera.card}  [dim]{camera.bus}[/]", highlight=False, soft_wrap=True)
        for name in names:
            console.print(f'    device = "{name}"', style="cyan", highlight=False, soft_wrap=True)
        for line in _lines(modes):
            console.print(f"    {line}", highlight=False, soft_wrap=True)
    if not found:
        console.print("no V4L2 camera can be opened here; is one plugged in, and this user in the group 'video'?")


def probe(source: str, path: Path | None, *, seconds: float, as_json: bool) -> int:
    """Read a camera for so long after its first frame, and print what was measured; the process's exit status."""
    _quiet()
    shown = redacted_text(source)
    try:
        options = unthinned(options_of(source, config_file(path)))
    except SourceError as error:
        return _tell_probe(Probed(shown, failure=Failure(error.reason, str(error))), as_json=as_json)
    with reading({"probe": options}, keeps_stamps=True) as running, progress("connecting") as tell:
        [follower] = running.followers.values()
        first_s: float | None = None
        while not follower.is_over and (first_s is None or time.monotonic() - first_s < seconds):
            running.step()
            if first_s is None and follower.frames:
                first_s = time.monotonic()
            _tell_time(tell, first_s, seconds)
        stamps = list(follower.stamps)
        drops = follower.drops
    return _tell_probe(
        Probed(
            shown,
            failure=follower.failure,
            first_frame_ms=follower.camera.quality.first_frame_ms,
            codec=codec_of(options) if follower.format else None,
            width=follower.format.width if follower.format else None,
            height=follower.format.height if follower.format else None,
            nominal_fps=follower.format.fps if follower.format else None,
            frames=len(stamps),
            timing=timing(stamps),
            stalls=follower.stalls,
            drops=drops,
            has_ended=follower.has_ended,
        ),
        as_json=as_json,
    )


def snapshot(source: str, file: Path, path: Path | None, *, skip: int, as_json: bool) -> int:
    """Write the camera's first picture, or the one after `skip` others; the process's exit status."""
    _quiet()
    if file.suffix.lower() not in _PICTURES:
        raise SnapshotError(f"{file}: no {file.suffix or 'such file'} can be written; one of {', '.join(_PICTURES)}")
    taken: list[tuple[Image, int]] = []

    def take(follower: Follower, frame: Frame) -> None:
        if not taken and follower.frames > skip:
            taken.append((np.array(frame.image), frame.captured_at_ns))

    options = at_full_pace(unthinned(options_of(source, config_file(path))))
    with reading({"snapshot": options}, take) as running:
        [follower] = running.followers.values()
        while not taken and not follower.is_over:
            running.step()
    if not taken:
        failure = follower.failure or Failure("end_of_stream", f"it has only {follower.frames} frames")
        return _failed(f"{failure.reason}: {failure.message}")
    [(image, captured_at_ns)] = taken
    size = _write(file, image)
    told = {
        "file": str(file),
        "bytes": size,
        "width": image.shape[1],
        "height": image.shape[0],
        "captured_at": timestamp(captured_at_ns),
        "first_frame_ms": follower.camera.quality.first_frame_ms,
    }
    print(json.dumps(told) if as_json else f"written: {file}, {image.shape[1]}x{image.shape[0]}, {size} bytes")
    return 0


def bench(names: Sequence[str], path: Path | None, *, seconds: float, as_json: bool) -> int:
    """Read all at once, and print what that costs; the process's exit status: 1 if one of them does not deliver."""
    _quiet()
    found = config_file(path)
    options = {
        str(index): without_end(at_full_pace(unthinned(options_of(name, found)))) for index, name in enumerate(names)
    }
    with reading(options) as running, progress("connecting") as tell:
        followers = list(running.followers.values())
        while not all(follower.frames or follower.is_over for follower in followers):
            running.step()
        before, began_s = _marks(followers), time.monotonic()
        while time.monotonic() - began_s < seconds and not all(follower.is_over for follower in followers):
            running.step()
            _tell_time(tell, began_s, seconds)
        after, took_s = _marks(followers), time.monotonic() - began_s
    rows = [
        _row(redacted_text(name), follower, before, after, took_s)
        for name, follower in zip(names, followers, strict=True)
    ]
    frames = sum(row["frames"] for row in rows)
    cpu_s = after.cpu_s - before.cpu_s
    told = {
        "seconds": round(took_s, 3),
        "frames": frames,
        "fps": round(frames / took_s, 2),
        "cpu_ms_per_frame": round(1e3 * cpu_s / frames, 3) if frames else None,
        "cpu_percent": round(100 * cpu_s / took_s, 1),
        "sources": rows,
    }
    _tell_bench(told, as_json=as_json)
    failed = [f"{row['source']}: {row['reason']}: {row['message']}" for row in rows if not row["ok"]]
    return _failed("; ".join(failed)) if failed else 0


@dataclass(frozen=True, slots=True)
class Probed:
    """What was measured of a camera. None: was not, or nobody says."""

    source: str
    failure: Failure | None = None
    first_frame_ms: float | None = None
    codec: str | None = None
    width: int | None = None
    height: int | None = None
    nominal_fps: float | None = None
    frames: int = 0
    timing: Timing | None = None
    stalls: int = 0
    drops: Mapping[str, int] = dataclasses.field(default_factory=dict)
    has_ended: bool = False


@dataclass(frozen=True, slots=True)
class _Marks:
    """Counters at one moment, by camera; `cpu_s` is of the whole process."""

    cpu_s: float
    frames: Mapping[str, int]
    dropped: Mapping[str, int]
    thread_s: Mapping[str, float | None]


def _tell_time(tell: Tell, since_s: float | None, seconds: float) -> None:
    if since_s is not None:
        tell("reading", min(100.0, 100 * (time.monotonic() - since_s) / seconds))


def _marks(followers: Sequence[Follower]) -> _Marks:
    return _Marks(
        time.process_time(),
        {follower.name: follower.frames for follower in followers},
        {follower.name: sum(follower.drops.values()) for follower in followers},
        {follower.name: follower.cpu_s for follower in followers},
    )


def _row(source: str, follower: Follower, before: _Marks, after: _Marks, took_s: float) -> dict[str, Any]:
    name = follower.name
    frames = after.frames[name] - before.frames[name]
    began_s, ended_s = before.thread_s[name], after.thread_s[name]
    cpu_s = None if began_s is None or ended_s is None or ended_s < began_s else ended_s - began_s
    return {
        "source": source,
        "ok": follower.failure is None,
        "reason": follower.failure.reason if follower.failure else None,
        "message": follower.failure.message if follower.failure else None,
        "is_live": follower.is_live,
        "width": follower.format.width if follower.format else None,
        "height": follower.format.height if follower.format else None,
        "frames": frames,
        "fps": round(frames / took_s, 2),
        "cpu_ms_per_frame": round(1e3 * cpu_s / frames, 3) if frames and cpu_s is not None else None,
        "dropped": after.dropped[name] - before.dropped[name],
    }


def _tell_probe(found: Probed, *, as_json: bool) -> int:
    if as_json:
        plain = dataclasses.asdict(found)
        failure, even = plain.pop("failure") or {"reason": None, "message": None}, plain.pop("timing") or {}
        source = plain.pop("source")
        print(json.dumps({"source": source, "ok": found.failure is None, **failure, **plain, **even}, indent=2))
    elif found.frames:
        for name, fact in _facts(found):
            print(f"{name:<12}{fact}")
    return _failed(f"{found.failure.reason}: {found.failure.message}") if found.failure else 0


def _facts(found: Probed) -> Sequence[tuple[str, str]]:
    even = found.timing or timing(())
    dropped = ", ".join(f"{count} {cause}" for cause, count in found.drops.items()) or "none"
    ended = "; then it ended" if found.has_ended else ""
    facts = [
        ("first frame", f"after {_number(found.first_frame_ms)} ms"),
        ("codec", found.codec or "-"),
        ("size", f"{found.width}x{found.height}"),
        ("frames", f"{found.frames}{ended}"),
        ("rate", f"{_number(even.fps)} fps (it says {_number(found.nominal_fps)})"),
        ("interval", f"{_number(even.interval_ms)} ms, jitter {_number(even.jitter_ms)} ms"),
        (
            "gaps",
            f"{_number(even.gaps)}, {_number(even.missing)} frames; longest interval {_number(even.longest_ms)} ms",
        ),
        ("dropped", dropped),
    ]
    return [*facts, ("stalls", str(found.stalls))] if found.stalls else facts


def _tell_bench(told: Mapping[str, Any], *, as_json: bool) -> None:
    if as_json:
        print(json.dumps(told, indent=2))
        return
    table = Table("source", box=None, pad_edge=False)
    for heading in ("size", "frames", "fps", "CPU ms/frame", "dropped"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in told["sources"]:
        size = f"{row['width']}x{row['height']}" if row["width"] else "-"
        cpu = _number(row["cpu_ms_per_frame"])
        table.add_row(row["source"], size, str(row["frames"]), _number(row["fps"]), cpu, str(row["dropped"]))
    console = Console(highlight=False)
    console.print(table)
    print(
        f"in all: {_number(told['fps'])} fps, {_number(told['cpu_ms_per_frame'])} ms of CPU a frame, "
        f"{told['cpu_percent']:.0f} % of a core, in {told['seconds']:.1f} s"
    )


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}" if value < 1000 else f"{value:.0f}"


def _write(file: Path, image: Image) -> int:
    """Its size. The file is there whole, or as it was."""
    import cv2

    part = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        ok, encoded = cv2.imencode(file.suffix.lower(), image)
        if not ok:
            raise SnapshotError(f"{file}: OpenCV cannot write such a picture")
        file.parent.mkdir(parents=True, exist_ok=True)
        part.write_bytes(encoded.tobytes())
        part.replace(file)
    except (OSError, cv2.error) as error:
        part.unlink(missing_ok=True)
        raise SnapshotError(f"{file} cannot be written: {getattr(error, 'strerror', None) or error}") from error
    return len(encoded)


def _quiet() -> None:
    """Failures are told once, by us, and stdout is for what was measured."""
    logs.configure(level="error", format="console", stream=sys.stderr)


def _failed(sentence: str) -> int:
    print(f"error: {sentence}", file=sys.stderr)
    return 1


def _modes(camera: Found) -> Sequence[Mode]:
    """The modes that can be read here."""
    device = Device(camera.path)
    try:
        return [mode for mode in device.modes() if mode.format in _pixels.FORMATS]
    finally:
        device.close()


def _lines(modes: Sequence[Mode]) -> Sequence[str]:
    sizes: dict[str, list[str]] = defaultdict(list)
    for mode in modes:
        sizes[mode.format].append(f"{mode.width}x{mode.height}" + (f"@{mode.fps:g}" if mode.fps else ""))
    return [f"{format}  {'  '.join(listed)}" for format, listed in sizes.items()]
