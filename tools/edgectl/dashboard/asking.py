"""When the next picture of a camera is asked for, and what became of those that were. No input or output."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

BETWEEN_S = 0.5
"""Between two pictures of one device, whatever its number of cameras."""
NO_REPLY_S = 10.0
"""After so long without an answer it is asked again."""
AFTER_REFUSAL_S = 10.0


class CameraOf(NamedTuple):
    """A camera of a device."""

    device: str
    camera: str


@dataclass(slots=True)
class _Asked:
    """`id` of the command, until there is a reply."""

    id: str | None
    at_s: float
    again_s: float


class Asking:
    """One picture of each camera every `interval_s` at most, the oldest first, and never a second before the first has
    come or was given up."""

    def __init__(self, interval_s: float) -> None:
        self._interval_s = interval_s
        self._asked: dict[CameraOf, _Asked] = {}

    def due(self, device: str, cameras: Iterable[str], now_s: float) -> str | None:
        """The camera of which a picture is to be asked for now, if any is."""
        asked = {camera: self._asked.get(CameraOf(device, camera)) for camera in cameras}
        if any(one is not None and one.at_s + BETWEEN_S > now_s for one in asked.values()):
            return None
        free = [camera for camera, one in asked.items() if one is None or (one.id is None and one.again_s <= now_s)]
        return min(free, key=lambda camera: one.at_s if (one := asked[camera]) else -1.0, default=None)

    def ask(self, of: CameraOf, command_id: str, now_s: float) -> None:
        """The command is on its way."""
        self._asked[of] = _Asked(command_id, now_s, now_s + self._interval_s)

    def answered(self, device: str, command_id: str | None) -> CameraOf | None:
        """The camera that a reply is about; None if no picture was asked for by this id."""
        for of, asked in self._asked.items():
            if of.device == device and asked.id is not None and asked.id == command_id:
                asked.id = None
                return of
        return None

    def refused(self, of: CameraOf, now_s: float) -> None:
        """There will be no picture; it is not asked again for a while."""
        self._asked[of] = _Asked(None, now_s, now_s + AFTER_REFUSAL_S)

    def unanswered(self, now_s: float) -> Iterator[CameraOf]:
        """Those that are given up now; they may be asked again."""
        for of, asked in self._asked.items():
            if asked.id is not None and asked.at_s + NO_REPLY_S <= now_s:
                asked.id, asked.again_s = None, now_s
                yield of

    def keep(self, devices: Collection[str], now_s: float) -> None:
        """Nobody looks at others: forget them, once they may be asked again."""
        for of in [of for of, asked in self._asked.items() if of.device not in devices and asked.again_s <= now_s]:
            del self._asked[of]

    def clear(self) -> None:
        """The broker was away, and what was asked is lost."""
        self._asked.clear()
