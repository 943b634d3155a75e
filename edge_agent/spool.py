"""Messages that outlive a dead broker, and the agent: on disk, or in memory where there is no disk for them.

A message is kept from when it is made until the broker has it. What is on disk was committed at most
`fsync_interval_s` after it came; a kill loses no more than that.
"""

from __future__ import annotations

import contextlib
import math
import sqlite3
import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Literal, Protocol

import structlog

from edge_agent.config import SpoolOptions
from edge_agent.data import Message

log = structlog.get_logger()

SpoolDrop = Literal["full", "stale", "disk_full"]

_MOST_IN_MEMORY = 1000
_MOST_UNWRITTEN = 20_000  # between two flushes; more only where the disk hangs
_PRUNE_S = 60.0
_CLOCK_IS_SET = 1.6e9
_SCHEMA = """
CREATE TABLE IF NOT EXISTS messages (
    number INTEGER PRIMARY KEY, id TEXT UNIQUE NOT NULL, at REAL NOT NULL, kind TEXT NOT NULL, topic TEXT NOT NULL,
    payload BLOB NOT NULL
)
"""


class Spool(Protocol):
    """`append` and `remove` never block and are for any thread; the rest blocks and is for one."""

    dropped: Counter[SpoolDrop]
    trouble: str | None

    def __len__(self) -> int: ...

    @property
    def nbytes(self) -> int:
        """Of all payloads that wait."""

    def append(self, message: Message) -> None:
        """Keep a message, which has an `id`."""

    def remove(self, message_id: str) -> None:
        """The broker has it."""

    def oldest(self, count: int, *, but: Collection[str] = ()) -> Sequence[Message]:
        """The oldest that are kept, less those with these ids."""

    def flush(self) -> None:
        """Bring what came and went to the disk."""

    def close(self) -> None:
        """Flush, and let go."""


class MemorySpool:
    """Keeps the last messages, as long as the process lives."""

    trouble: str | None = None

    def __init__(self, most: int = _MOST_IN_MEMORY) -> None:
        self.dropped: Counter[SpoolDrop] = Counter()
        self._most = most
        self._kept: OrderedDict[str, Message] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._kept)

    @property
    def nbytes(self) -> int:
        with self._lock:
            return sum(len(message.payload) for message in self._kept.values())

    def append(self, message: Message) -> None:
        assert message.id is not None
        with self._lock:
            self._kept.setdefault(message.id, message)
            if len(self._kept) > self._most:
                self._kept.popitem(last=False)
                self.dropped["full"] += 1

    def remove(self, message_id: str) -> None:
        with self._lock:
            self._kept.pop(message_id, None)

    def oldest(self, count: int, *, but: Collection[str] = ()) -> Sequence[Message]:
        with self._lock:
            return [message for key, message in self._kept.items() if key not in but][:count]

    def flush(self) -> None:
        """Nothing is written."""

    def close(self) -> None:
        """Nothing to let go."""


class DiskSpool:
    """Keeps messages in an SQLite file, up to a size, a number and an age; what is beyond goes, the oldest first.

    Where the disk is full or fails, the last thousand wait in memory, `trouble` says so, and each `flush` tries again.
    A file that is damaged is put aside and a new one begun.
    """

    def __init__(self, path: Path, options: SpoolOptions, *, clock: Callable[[], float] = time.time) -> None:
        self.dropped: Counter[SpoolDrop] = Counter()
        self.trouble: str | None = None
        self._path = path
        self._options = options
        self._clock = clock
        self._lock = threading.Lock()
        self._new: OrderedDict[str, tuple[float, Message]] = OrderedDict()
        self._gone: set[str] = set()
        self._on_disk = (0, 0)
        self._pruned_at = -math.inf
        self._database: sqlite3.Connection | None = None
        self.flush()

    def __len__(self) -> int:
        return max(0, self._on_disk[0] + len(self._new) - len(self._gone))

    @property
    def nbytes(self) -> int:
        with self._lock:
            return self._on_disk[1] + sum(len(message.payload) for _, message in self._new.values())

    def append(self, message: Message) -> None:
        assert message.id is not None
        with self._lock:
            self._new.setdefault(message.id, (self._clock(), message))
            if self.trouble is not None or len(self._new) > _MOST_UNWRITTEN:
                self._shorten_memory()

    def remove(self, message_id: str) -> None:
        with self._lock:
            if self._new.pop(message_id, None) is None:
                self._gone.add(message_id)

    def oldest(self, count: int, *, but: Collection[str] = ()) -> Sequence[Message]:
        self.flush()
        found: list[Message] = []
        if self._database is not None:
            with contextlib.suppress(sqlite3.Error):
                rows = self._database.execute("SELECT id, kind, topic, payload FROM messages ORDER BY number")
                for key, kind, topic, payload in rows:
                    if key not in but:
                        found.append(Message(topic, payload, kind, id=key))
                    if len(found) == count:
                        return found
        with self._lock:  # what the disk would not take
            return found + [message for key, (_, message) in self._new.items() if key not in but][: count - len(found)]

    def flush(self) -> None:
        with self._lock:
            new, gone = dict(self._new), set(self._gone)
        if not (new or gone or self.trouble or self._clock() - self._pruned_at > _PRUNE_S):
            return
        try:
            with self._transaction() as database:
                rows = ((key, at, one.kind, one.topic, one.payload) for key, (at, one) in new.items())
                sql = "INSERT OR IGNORE INTO messages (id, at, kind, topic, payload) VALUES (?, ?, ?, ?, ?)"
                database.executemany(sql, rows)
                database.executemany("DELETE FROM messages WHERE id = ?", ((key,) for key in gone))
                dropped = self._prune(database)
                on_disk = _size(database)
        except (sqlite3.Error, OSError) as error:
            self._complain(error)
            return
        if self.trouble is not None:
            log.info("spool.recovered", path=str(self._path))
        self.trouble = None
        self.dropped.update(dropped)
        with self._lock:
            self._gone -= gone
            for key in new:
                if self._new.pop(key, None) is None:  # it went while it was being written
                    self._gone.add(key)
            self._on_disk = on_disk

    def close(self) -> None:
        self.flush()
        self._let_go()

    def _shorten_memory(self) -> None:
        while len(self._new) > _MOST_IN_MEMORY:
            self._new.popitem(last=False)
            self.dropped["disk_full"] += 1

    def _let_go(self) -> None:
        database, self._database = self._database, None
        if database is not None:
            with contextlib.suppress(sqlite3.Error):
                database.close()

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        if self._database is None:
            self._database = open_database(self._path, _SCHEMA)
        try:
            yield self._database
            self._database.commit()
        except BaseException:
            with contextlib.suppress(sqlite3.Error):
                self._database.rollback()
            raise

    def _prune(self, database: sqlite3.Connection) -> Counter[SpoolDrop]:
        oldest = self._clock() - self._options.max_age_s
        # What was kept before a clock was set has no age that is known.
        stale = database.execute("DELETE FROM messages WHERE at BETWEEN ? AND ?", (_CLOCK_IS_SET, oldest)).rowcount
        self._pruned_at, full = self._clock(), 0
        count, nbytes = _size(database)
        if count > self._options.max_messages or nbytes > self._options.max_mb * 1e6:
            full = self._shorten(database)
        return Counter({"stale": stale, "full": full})

    def _shorten(self, database: sqlite3.Connection) -> int:
        return database.execute(
            "DELETE FROM messages WHERE number <= (SELECT number FROM ("
            "SELECT number, row_number() OVER newest AS place, sum(length(payload)) OVER newest AS bytes FROM messages "
            "WINDOW newest AS (ORDER BY number DESC)) WHERE place > ? OR bytes > ? ORDER BY number DESC LIMIT 1)",
            (self._options.max_messages, int(self._options.max_mb * 1e6)),
        ).rowcount

    def _complain(self, error: Exception) -> None:
        if self.trouble is None:
            log.error("spool.failed", path=str(self._path), reason=str(error), next="messages wait in memory")
        self.trouble = f"{self._path}: {error}; the last {_MOST_IN_MEMORY} messages wait in memory"
        with self._lock:
            self._shorten_memory()
        if not isinstance(error, sqlite3.OperationalError):  # else it can still be read
            self._let_go()


def _size(database: sqlite3.Connection) -> tuple[int, int]:
    """How many messages there are, and the bytes of their payloads."""
    [(count, nbytes)] = database.execute("SELECT count(*), ifnull(sum(length(payload)), 0) FROM messages")
    return count, nbytes


def open_database(path: Path, schema: str) -> sqlite3.Connection:
    """An SQLite file in WAL mode whose commits are on the disk when they return; a damaged one is put aside.

    Raises `sqlite3.Error` and `OSError`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        return _opened(path, schema)
    except sqlite3.OperationalError:  # full, locked, read-only
        raise
    except sqlite3.DatabaseError as error:
        aside = path.with_name(f"{path.name}.damaged")
        log.error("database.damaged", path=str(path), reason=str(error), kept_as=str(aside))
        for suffix in ("-wal", "-shm"):
            path.with_name(f"{path.name}{suffix}").unlink(missing_ok=True)
        path.replace(aside)
        return _opened(path, schema)


def _opened(path: Path, schema: str) -> sqlite3.Connection:
    database = sqlite3.connect(path, check_same_thread=False, timeout=5.0)
    try:
        database.execute("PRAGMA journal_mode = WAL")
        database.execute("PRAGMA synchronous = FULL")
        database.executescript(schema)
        if database.execute("PRAGMA quick_check(1)").fetchone() != ("ok",):
            raise sqlite3.DatabaseError("it fails its own check")
    except BaseException:
        database.close()
        raise
    return database
