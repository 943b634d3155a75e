"""What is logged again and again: a few are shown, the others counted, and the count is told.

The same are events of one level and name all of whose words (texts and truths, in lists and tables too) are the same;
numbers may differ, since an attempt or a delay makes no other event. A different reason, camera or topic does, so one
error never hides another. Only warnings and worse are held back: what is information tells of a change or is asked
for by its interval, and who asks for debugging wants it all.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

Event = dict[str, Any]

LIMIT = 5
WINDOW_S = 60.0
_LEVELS = ("warning", "error", "critical")
_MOST_KINDS = 1000


@dataclass(slots=True)
class _Window:
    since_s: float
    shown: int = 0
    held: int = 0
    last: Event | None = None


class Repeats:
    """Shows `limit` of the same events in `window_s`; for any thread.

    An event that comes out with `repeated=N` stands for itself and for N like it that were held back before it: so the
    events shown and their `repeated` add up to all there were. `on_first` is called when there is a count to be told
    later (by `due`).
    """

    def __init__(
        self,
        *,
        limit: int = LIMIT,
        window_s: float = WINDOW_S,
        clock: Callable[[], float] = time.monotonic,
        on_first: Callable[[], None] = lambda: None,
    ) -> None:
        self._limit = limit
        self._window_s = window_s
        self._clock = clock
        self._on_first = on_first
        self._windows: dict[Hashable, _Window] = {}  # the oldest first, which is the first to end
        self._lock = threading.RLock()  # what is logged while memory is collected comes in here again

    def admit(self, event: Event) -> Event | None:
        """The event as it is to be shown, or None: it is held back, and counted."""
        if event.get("level") not in _LEVELS:
            return event
        kind = _kind(event)
        with self._lock:
            now_s = self._clock()
            window = self._windows.get(kind)
            if window is None or now_s - window.since_s >= self._window_s:
                return self._show_first(kind, event, now_s)
            if window.shown < self._limit:
                window.shown += 1
                return event
            window.held += 1
            window.last = event
        if window.held == 1:
            self._on_first()
        return None

    def due(self) -> list[Event]:
        """The last of each kind that was held back in a window that has ended, with the count of those before it."""
        with self._lock:
            now_s = self._clock()
            ended = [kind for kind, window in self._until(now_s)]
            return [event for kind in ended if (event := _summed(self._windows.pop(kind)))]

    def rest(self) -> list[Event]:
        """The same of all windows, ended or not: nobody will ask again."""
        with self._lock:
            windows, self._windows = self._windows, {}
            return [event for window in windows.values() if (event := _summed(window))]

    def next_due_s(self) -> float | None:
        """Seconds until `due` has something to tell, or None as long as nothing is held back."""
        with self._lock:
            first = next((window.since_s for window in self._windows.values() if window.held), None)
            return None if first is None else max(0.0, first + self._window_s - self._clock())

    def _show_first(self, kind: Hashable, event: Event, now_s: float) -> Event:
        before = self._windows.pop(kind, None)
        for old, window in list(self._until(now_s)):
            if not window.held:
                del self._windows[old]
        if len(self._windows) < _MOST_KINDS:  # more kinds than that are all shown
            self._windows[kind] = _Window(now_s, shown=1)
        return {**event, "repeated": before.held} if before and before.held else event

    def _until(self, now_s: float) -> Iterator[tuple[Hashable, _Window]]:
        for kind, window in self._windows.items():
            if now_s - window.since_s < self._window_s:
                return
            yield kind, window


def _summed(window: _Window) -> Event | None:
    if window.last is None:
        return None
    return {**window.last, "repeated": window.held - 1} if window.held > 1 else window.last


def _kind(event: Mapping[str, Any]) -> Hashable:
    return tuple((key, _words(value)) for key, value in sorted(event.items()) if key != "timestamp")


def _words(value: Any) -> Hashable:
    if value is None or isinstance(value, (str, bool)):
        return value
    if isinstance(value, Mapping):
        return tuple((str(key), _words(inner)) for key, inner in value.items())
    if isinstance(value, (list, tuple)):
        return tuple(map(_words, value))
    return "a number" if isinstance(value, (int, float)) else type(value).__name__
