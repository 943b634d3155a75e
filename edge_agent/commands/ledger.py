"""Which commands were carried out, and what was replied: on disk, so that one that comes again is not done again."""

from __future__ import annotations

import contextlib
import sqlite3
import time
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path

import structlog

from edge_agent import messages
from edge_agent.messages import Reply
from edge_agent.spool import open_database

log = structlog.get_logger()

_MOST = 10_000
_SCHEMA = """
CREATE TABLE IF NOT EXISTS commands (number INTEGER PRIMARY KEY, id TEXT UNIQUE NOT NULL, at REAL, reply BLOB)
"""
_FORGET = "DELETE FROM commands WHERE number <= (SELECT max(number) - ? FROM commands)"


class Ledger:
    """The last ten thousand ids. Blocks; for one thread. Where there is no disk for it, memory has to do.

    A command is written down before it is done. One that was begun and not ended, because the agent died over it, is
    answered `interrupted`: nobody knows how far it came.
    """

    def __init__(self, path: Path | None, device: str) -> None:
        self._path = path
        self._device = device
        self._memory: OrderedDict[str, bytes | None] = OrderedDict()
        self._database: sqlite3.Connection | None = None
        if path is not None:
            with self._trouble_told():
                self._database = open_database(path, _SCHEMA)

    def find(self, command_id: str) -> bytes | None:
        """The reply to a command that came before; None if it never did."""
        if command_id in self._memory:
            return self._memory[command_id] or self._interrupted(command_id)
        row = None
        if self._database is not None:
            with self._trouble_told():
                found = self._database.execute("SELECT reply FROM commands WHERE id = ?", (command_id,))
                row = found.fetchone()
        return None if row is None else row[0] or self._interrupted(command_id)

    def begin(self, command_id: str) -> None:
        """It is about to be done."""
        self._write(
            "INSERT OR IGNORE INTO commands (id, at) VALUES (?, ?)", (command_id, time.time()), command_id, None
        )

    def end(self, command_id: str, reply: bytes) -> None:
        """It was done, or refused, with this reply."""
        sql = "INSERT INTO commands (id, at, reply) VALUES (?, ?, ?) ON CONFLICT (id) DO UPDATE SET reply = ?"
        self._write(sql, (command_id, time.time(), reply, reply), command_id, reply)

    def close(self) -> None:
        database, self._database = self._database, None
        if database is not None:
            with contextlib.suppress(sqlite3.Error):
                database.close()

    def _write(self, sql: str, values: tuple[object, ...], command_id: str, reply: bytes | None) -> None:
        if self._database is not None:
            with self._trouble_told(), self._database:
                self._database.execute(sql, values)
                self._database.execute(_FORGET, (_MOST,))
                self._memory.pop(command_id, None)
                return
        self._memory[command_id] = reply
        while len(self._memory) > _MOST:
            self._memory.popitem(last=False)

    def _interrupted(self, command_id: str) -> bytes:
        return messages.encode(
            Reply(
                device=self._device,
                id=command_id,
                status="error",
                duration_ms=0.0,
                code="interrupted",
                message="the agent ended while it did this; see its status for how far it came",
            )
        )

    @contextlib.contextmanager
    def _trouble_told(self) -> Iterator[None]:
        try:
            yield
        except (sqlite3.Error, OSError) as error:
            log.error("commands.not_kept", path=str(self._path), reason=str(error), next="memory has to do")
