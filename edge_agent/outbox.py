"""Messages that wait for the broker: what waits how, in what order it goes, and what is dropped and why.

Any thread puts, the event loop sends. Nothing here knows MQTT.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

from edge_agent.data import Message, MessageClass
from edge_agent.histogram import durations
from edge_agent.spool import MemorySpool, Spool

DropCause = Literal["full", "away", "refused", "unsendable", "given_up"]

_MOST = 1000


class Outbox:
    """Created on the event loop.

    - `status`: the latest of each topic waits; what is retained is queued again at each connect.
    - `replies`: in line, before results; beyond a thousand the oldest goes.
    - `events`, and `results` while the broker is away if they are `spooled`: kept in the spool until the broker has
      them. While it is there they go at once, and what an outage left follows behind.
    - `results`: in line; beyond `max_results` the oldest goes.

    `publishing`: how long results took from `put` to `done`; of those that came to the spool nobody knows.
    """

    def __init__(
        self,
        *,
        max_results: int = 1000,
        spool: Spool | None = None,
        spools_results: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.spool: Spool = spool if spool is not None else MemorySpool()
        self.is_connected = False
        self.publishing = durations()
        self._clock = clock
        self._put_at: dict[str, float] = {}
        self._loop = asyncio.get_running_loop()
        self._lock = threading.Lock()
        self._spools_results = spools_results
        self._latest: dict[str, Message] = {}
        self._unsent: dict[str, None] = {}
        self._lines: dict[MessageClass, deque[Message]] = {
            "replies": deque(maxlen=_MOST),
            "events": deque(maxlen=_MOST),
            "results": deque(maxlen=max_results),
        }
        self._going: set[str] = set()
        self._sessions = 0
        self._dropped: Counter[tuple[MessageClass, DropCause]] = Counter()
        self._waiter: asyncio.Future[None] | None = None
        self._closed = asyncio.Event()

    def __len__(self) -> int:
        """Messages in memory."""
        return sum(self.waiting().values())

    def waiting(self) -> Mapping[MessageClass, int]:
        return {"status": len(self._unsent), **{kind: len(line) for kind, line in self._lines.items()}}

    def dropped(self) -> Mapping[MessageClass, Mapping[DropCause, int]]:
        """How many of each class were dropped since the start, by cause."""
        with self._lock:
            causes: dict[MessageClass, dict[DropCause, int]] = {}
            for (kind, cause), count in self._dropped.items():
                causes.setdefault(kind, {})[cause] = count
            return causes

    def put(self, message: Message) -> None:
        """Queue a message in the class it belongs to."""
        with self._lock:
            if message.kind == "status":
                self._latest[message.topic] = message
                self._unsent[message.topic] = None
            elif self._keeps(message):
                self.spool.append(message)
                if self.is_connected:
                    self._queue_kept(message)
            else:
                self._queue(message)
            self._wake()

    def done(self, message: Message) -> None:
        """The broker has it."""
        if (put_at := self._forget_time(message)) is not None:
            now_s = self._clock()
            self.publishing.at(now_s).record((now_s - put_at) * 1e3)
        if message.id is not None and (message.kind == "events" or message.id in self._going):
            self.spool.remove(message.id)
            self._going.discard(message.id)

    def drop(self, message: Message, cause: DropCause) -> None:
        """It is not tried again."""
        with self._lock:
            self._forget_time(message)
            self._dropped[message.kind, cause] += 1
            if cause != "refused" and self._latest.get(message.topic) is message:
                del self._latest[message.topic]
        self.done(message)

    def put_back(self, message: Message) -> None:
        """Nobody knows whether the broker has it: queue it again, ahead of its class, unless a newer one took its
        place. It comes under the same id."""
        with self._lock:
            self._forget_time(message)
            if message.kind == "status":
                self._latest.setdefault(message.topic, message)
                self._unsent[message.topic] = None
            elif message.id is not None and self._is_kept_class(message):
                self.spool.append(message)
                self._going.discard(message.id)
            elif message.kind == "replies" and len(self._lines["replies"]) < _MOST:
                self._lines["replies"].appendleft(message)
            else:
                self._dropped[message.kind, "away"] += 1
            self._wake()

    def connected(self) -> None:
        """A session begins: all that is retained goes again, for a broker that may have forgotten it."""
        with self._lock:
            self.is_connected = True
            again = [topic for topic, message in self._latest.items() if message.retain and message.payload]
            self._unsent = {**dict.fromkeys(again), **self._unsent}
            self._wake()

    def disconnected(self) -> None:
        """A session has ended: what the spool keeps waits there."""
        with self._lock:
            self.is_connected = False
            if self._spools_results:
                for message in self._lines["results"]:
                    self.spool.append(message)
                    self._forget_time(message)
                self._lines["results"].clear()
            self._lines["events"].clear()
            self._going.clear()
            self._sessions += 1

    async def next(self) -> Message | None:
        """The next message to send, or None once the outbox is closed and empty."""
        while True:
            with self._lock:
                if message := self._pop():
                    return message
                if self.closed:
                    return None
                waiter = self._waiter = self._loop.create_future()
            await waiter

    def left_behind(self, count: int) -> Sequence[Message]:
        """The oldest messages of the spool that are not on their way; they are from now on. Blocks."""
        with self._lock:
            going, session = set(self._going), self._sessions
        found = self.spool.oldest(count, but=going)
        with self._lock:
            if session != self._sessions:  # it ended meanwhile: nobody sends them
                return ()
            late = [message for message in found if message.id not in self._going]  # others were sent meanwhile
            self._going.update(message.id for message in late if message.id is not None)
        return late

    @property
    def closed(self) -> bool:
        return self._closed.is_set()

    async def wait_closed(self) -> None:
        """Wait for `close`."""
        await self._closed.wait()

    def close(self) -> None:
        """Let `next` end when all is sent; messages are still accepted until then. On the event loop."""
        self._closed.set()
        with self._lock:
            self._wake()

    # Below, the lock is held.

    def _keeps(self, message: Message) -> bool:
        """Whether it goes into the spool as it comes."""
        if message.kind == "results":
            return self._spools_results and not self.is_connected
        return message.kind == "events"

    def _is_kept_class(self, message: Message) -> bool:
        return message.kind == "events" or (message.kind == "results" and self._spools_results)

    def _queue_kept(self, message: Message) -> None:
        line = self._lines[message.kind]
        if len(line) < (line.maxlen or 0):  # else it comes from the spool, by and by
            assert message.id is not None
            line.append(message)
            self._going.add(message.id)

    def _queue(self, message: Message) -> None:
        line = self._lines[message.kind]
        if message.kind == "results" and message.id is not None:
            self._put_at[message.id] = self._clock()
        if len(line) == line.maxlen:
            self._dropped[message.kind, "full" if self.is_connected else "away"] += 1
            self._forget_time(line[0] if line else message)
        line.append(message)

    def _forget_time(self, message: Message) -> float | None:
        """When it was put, for the last time; None where nobody noted that."""
        return self._put_at.pop(message.id, None) if message.id is not None else None

    def _pop(self) -> Message | None:
        if self._unsent:
            topic = next(iter(self._unsent))
            del self._unsent[topic]
            message = self._latest[topic]
            if not message.retain or not message.payload:  # nothing to say to a broker that comes back
                del self._latest[topic]
            return message
        line = next((line for line in self._lines.values() if line), None)
        return line.popleft() if line else None

    def _wake(self) -> None:
        waiter, self._waiter = self._waiter, None
        if waiter is not None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: nothing is sent any more
                self._loop.call_soon_threadsafe(_set, waiter)


def _set(waiter: asyncio.Future[None]) -> None:
    if not waiter.done():
        waiter.set_result(None)
