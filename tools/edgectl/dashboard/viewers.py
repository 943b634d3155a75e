"""The browsers that look on: what is new for each, told in its own time.

What waits for a browser is which parts are new, not what they were: a slow one gets the newest of each, and costs no
more memory than there are parts.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import msgspec

from edgectl.dashboard.device import Device, Row, row
from edgectl.dashboard.fleet import Change, Fleet

_MOST_VIEWERS = 32


class Viewer:
    """One browser's page; `device` is the one it shows in detail."""

    def __init__(self, device: str) -> None:
        self.device = device
        self._changes: set[Change] = set()
        self._is_broker_new = False
        self._news = asyncio.Event()

    def note(self, change: Change) -> None:
        """Something is new; nothing happens where the page does not show it."""
        if change.is_in_row or change.device == self.device:
            self._changes.add(change)
            self._news.set()

    def note_broker(self) -> None:
        self._is_broker_new = True
        self._news.set()

    async def changes(self) -> tuple[set[Change], bool]:
        """What is new since the last call, at least one thing, and whether the broker came or went."""
        await self._news.wait()
        self._news.clear()
        changes, self._changes = self._changes, set()
        is_broker_new, self._is_broker_new = self._is_broker_new, False
        return changes, is_broker_new


class Viewers:
    """All of them."""

    def __init__(self) -> None:
        self._all: set[Viewer] = set()

    @property
    def is_full(self) -> bool:
        return len(self._all) >= _MOST_VIEWERS

    @contextmanager
    def looking(self, device: str) -> Iterator[Viewer]:
        """A browser looks on while this is entered."""
        viewer = Viewer(device)
        self._all.add(viewer)
        try:
            yield viewer
        finally:
            self._all.discard(viewer)

    def note(self, change: Change) -> None:
        for viewer in self._all:
            viewer.note(change)

    def note_broker(self) -> None:
        for viewer in self._all:
            viewer.note_broker()


def whole(fleet: Fleet, name: str) -> dict[str, Any]:
    """All that a page shows which has just been opened on this device."""
    told: dict[str, Any] = {"devices": {other: row(device) for other, device in fleet.devices.items()}}
    if (device := fleet.devices.get(name)) is not None:
        told["detail"] = {
            **_facts(device),
            "models": device.models,
            "cameras": dict(device.cameras),
            "pictures": {camera: _picture(device, camera) for camera in _pictured(device)},
            "jobs": dict(device.jobs),
            "history": list(device.history),
        }
    return told


def news(fleet: Fleet, name: str, changes: Iterable[Change]) -> dict[str, Any]:
    """The parts that changed, as they are now; None for what is gone."""
    rows: dict[str, Row | None] = {}
    detail: dict[str, Any] = {}
    for change in changes:
        device = fleet.devices.get(change.device)
        if change.is_in_row:
            rows[change.device] = row(device) if device else None
        if change.device == name and device is not None:
            _add(detail, device, change)
    return {"devices": rows, "detail": detail}


def _add(detail: dict[str, Any], device: Device, change: Change) -> None:
    if change.part == "camera":
        detail.setdefault("cameras", {})[change.name] = device.cameras.get(change.name)
    elif change.part == "picture":
        detail.setdefault("pictures", {})[change.name] = _picture(device, change.name)
    elif change.part == "job":
        detail.setdefault("jobs", {})[change.name] = device.jobs.get(change.name)
    elif change.part == "models":
        detail["models"] = device.models
    else:
        detail.update(_facts(device))
        if change.part == "stats" and device.history:
            detail["sample"] = device.history[-1]


def _facts(device: Device) -> dict[str, Any]:
    stats = device.stats
    return {
        "status": device.status,
        "health": device.health,
        "health_s": device.health_s,
        "cameras_stats": {
            camera: {"fps": told.inferred_fps, "objects": told.objects, "waiting": told.waiting, "drops": told.drops}
            for camera, told in (stats.cameras.items() if stats else ())
        },
    }


def _pictured(device: Device) -> set[str]:
    return {*device.pictures, *device.picture_troubles}


def _picture(device: Device, camera: str) -> dict[str, Any]:
    picture = device.pictures.get(camera)
    return {
        "number": picture.number if picture else None,
        "at_s": picture.at_s if picture else None,
        "trouble": device.picture_troubles.get(camera),
    }


def event(told: dict[str, Any]) -> bytes:
    """As a server-sent event."""
    return b"data: " + msgspec.json.encode(told) + b"\n\n"
