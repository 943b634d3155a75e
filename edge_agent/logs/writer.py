"""Lines on their way out, which nobody waits for: a bounded queue, and a thread that writes.

When whoever reads them stands still, the queue fills; what comes then is dropped and counted, and the count is told
in its place among the lines. A closed output drops them all, and is tried again with each.
"""

from __future__ import annotations

import os
import queue
import select
import threading
from collections.abc import Callable
from typing import TextIO

MAX_BYTES = 1 << 20
"""Of lines that wait: some thousands."""

_MAX_LINES = 10_000


class StraightWriter:
    """Writes each line at once, for a program that people look at; None: there is no output."""

    def __init__(self, stream: TextIO | None) -> None:
        self.stream = stream
        self.dropped = 0

    def put(self, line: str) -> None:
        try:
            if self.stream is not None:
                self.stream.write(f"{line}\n")
                self.stream.flush()
                return
        except (OSError, ValueError):  # ValueError: it was closed in this process
            pass
        self.dropped += 1

    def flush(self, timeout_s: float) -> bool:
        return True

    def close(self) -> None:
        pass


class QueuedWriter:
    """Writes to the file descriptor of `stream`, in a thread of its own; every method is for any thread, and none but
    `flush` waits.

    `notice` makes the line that tells how many were dropped. `idle` is called by the thread when it has nothing to
    do, and says for how many seconds it need not be called again (None: until there is something to write). What
    it raises counts as a dropped line; neither of the two ends the thread.
    """

    def __init__(
        self,
        stream: TextIO,
        *,
        notice: Callable[[int], str],
        idle: Callable[[], float | None] = lambda: None,
        max_bytes: int = MAX_BYTES,
        max_lines: int = _MAX_LINES,
    ) -> None:
        self.stream = stream
        self.dropped = 0
        self._fd = stream.fileno()
        self._notice = notice
        self._idle = idle
        self._max_bytes = max_bytes
        self._max_lines = max_lines
        # Both may be entered again by the thread that is in them: what an object logs as memory is collected.
        self._items: queue.SimpleQueue[bytes | int | threading.Event | None] = queue.SimpleQueue()
        self._lock = threading.RLock()
        self._bytes = self._lines = 0  # that wait
        self._lost = 0  # lines whose number is not told yet
        self._is_broken = False
        self._unmet: threading.Event | None = None
        threading.Thread(target=self._run, name="logs", daemon=True).start()

    def put(self, line: str) -> None:
        data = f"{line}\n".encode(errors="replace")
        with self._lock:
            if not self._has_room(len(data)):
                self._count_lost()
                return
            lost, self._lost = self._lost, 0
            self._bytes += len(data)
            self._lines += 1
        if lost:
            self._items.put(lost)
        self._items.put(data)

    def wake(self) -> None:
        """Have `idle` called soon."""
        self._items.put(0)

    def flush(self, timeout_s: float) -> bool:
        """Whether all that waits was written in time. Who waited in vain does not wait again for the same."""
        if self._unmet is not None and not self._unmet.is_set():
            return False
        mark = self._unmet = threading.Event()
        self._items.put(mark)
        return mark.wait(timeout_s)

    def close(self) -> None:
        """Write what waits, and end the thread."""
        self._items.put(None)

    def _has_room(self, size: int) -> bool:
        """Once lines were dropped, half of the queue must be free, so that their number is told in one place."""
        share = 2 if self._lost and not self._is_broken else 1
        return self._bytes + size <= self._max_bytes // share and self._lines < self._max_lines // share

    def _count_lost(self) -> None:
        self._lost += 1
        self.dropped += 1

    def _run(self) -> None:
        while True:
            wait_s = self._idled()
            try:
                item = self._items.get(timeout=wait_s)
            except queue.Empty:
                continue
            if item is None:
                self._tell(self._taken())
                return
            self._do(item)
            if self._items.empty() and not self._is_broken:
                self._tell(self._taken())

    def _idled(self) -> float | None:
        try:
            return self._idle()
        except Exception:  # noqa: BLE001  whatever it is: without this thread nothing is written any more
            with self._lock:
                self._count_lost()
            return None

    def _do(self, item: bytes | int | threading.Event) -> None:
        if isinstance(item, threading.Event):
            self._tell(self._taken())
            item.set()
        elif isinstance(item, int):
            self._tell(item)
        else:
            self._is_broken = not self._write(item)
            with self._lock:
                self._bytes -= len(item)
                self._lines -= 1
                if self._is_broken:
                    self._count_lost()

    def _taken(self) -> int:
        with self._lock:
            lost, self._lost = self._lost, 0
            return lost

    def _tell(self, lost: int) -> None:
        if lost and not self._noticed(lost):
            with self._lock:
                self._lost += lost

    def _noticed(self, lost: int) -> bool:
        try:
            line = self._notice(lost)
        except Exception:  # noqa: BLE001  as above; the number is told with the next
            return False
        return self._write(f"{line}\n".encode(errors="replace"))

    def _write(self, data: bytes) -> bool:
        while data:
            try:
                data = data[os.write(self._fd, data) :]
            except BlockingIOError:
                _wait_writable(self._fd)
            except OSError:  # closed at the other end, or its disk is full
                return False
        return True


def _wait_writable(fd: int) -> None:
    poll = select.poll()
    poll.register(fd, select.POLLOUT)
    poll.poll()
