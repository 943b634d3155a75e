"""`edgectl cameras`: the V4L2 cameras here and what they offer, by the kernel's own listing."""

from __future__ import annotations

import dataclasses
import json
from collections import defaultdict
from collections.abc import Sequence

from rich.console import Console

from edge_agent.sources import _pixels
from edge_agent.sources._v4l2 import Device, Found, Mode, devices


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
