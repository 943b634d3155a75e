"""Logs are events: a dotted name and its facts, coloured on a terminal, JSON lines elsewhere.

No event waits for whoever reads them: they go through a queue that drops and counts what it cannot hold (`writer`).
None carries a credential (`redaction`), and a warning that comes again and again is counted (`repeats`). In systemd's
journal each line begins with its priority as sd-daemon(3) has it, so that `journalctl -p warning` works. What goes past
all this to stderr carries none either (`stderr`).
"""

from __future__ import annotations

import atexit
import io
import logging
import os
import sys
from collections.abc import Callable
from typing import Any, Literal, TextIO

import structlog
from structlog.typing import EventDict, Processor

from edge_agent.logs.redaction import redacted
from edge_agent.logs.repeats import Repeats
from edge_agent.logs.stderr import hide_in_tracebacks, say
from edge_agent.logs.writer import QueuedWriter, StraightWriter

__all__ = ["FLUSH_S", "Format", "Level", "close", "configure", "dropped", "flush", "say"]

Level = Literal["debug", "info", "warning", "error"]
Format = Literal["auto", "console", "json"]

FLUSH_S = 1.0
"""What the end of the process waits for lines to be written, where nobody reads them."""

_PRIORITIES = {"debug": 7, "info": 6, "warning": 4, "error": 3, "critical": 2}  # of syslog(3)


def configure(*, level: Level = "info", format: Format = "auto", stream: TextIO | None = None) -> None:
    """Send structlog's events, and the warnings of libraries that use `logging`, to stdout, and never wait for it; or
    to `stream`, each at once and even if it is a repeat. May be called again, for another level or format. To stdout
    is for a program that is a service: errors that nobody catches are then shown without credentials too."""
    global _output
    target = stream or sys.stdout
    if stream is None:
        hide_in_tracebacks()
    if _output is None or _output.writer.stream is not target or isinstance(_output.writer, StraightWriter):
        close()
        _output = _Output(target, is_queued=stream is None and _fd(target) is not None)
    _output.render = _renderer(target, format)
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            _redact,
            _output.show,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(getattr(logging, level.upper())),
        logger_factory=lambda *names: _Lines(_output.writer.put if _output else lambda line: None),
        cache_logger_on_first_use=False,
    )
    logging.basicConfig(handlers=[_Foreign()], level=logging.WARNING, force=True)
    for noisy in ("amqtt", "transitions", "mqtt"):
        logging.getLogger(noisy).setLevel(logging.CRITICAL)


def dropped() -> int:
    """Lines that were never written, since nobody took them."""
    return _output.writer.dropped if _output is not None else 0


def flush(timeout_s: float = FLUSH_S) -> bool:
    """Whether everything that was logged is written, in time; counts of repeats too."""
    if _output is None:
        return True
    _output.tell(_output.repeats.rest())
    return _output.writer.flush(timeout_s)


def close() -> None:
    """Write what waits, and end the thread; nothing is logged until `configure` is called again."""
    global _output
    if _output is not None:
        flush()
        _output.writer.close()
        _output = None


class _Output:
    """Where lines go, and what they look like."""

    def __init__(self, stream: TextIO | None, *, is_queued: bool) -> None:
        self.render: Callable[[EventDict], str] = str
        self.repeats = Repeats()
        self._holds_back = is_queued
        self.writer: QueuedWriter | StraightWriter
        if is_queued:
            assert stream is not None
            self.writer = writer = QueuedWriter(stream, notice=self._notice, idle=self._idle)
            self.repeats = Repeats(on_first=writer.wake)
        else:
            self.writer = StraightWriter(stream)

    def show(self, logger: object, method: str, event: EventDict) -> str:
        """The last of structlog's processors: the event's line. Raises `DropEvent` for one that is held back."""
        admitted = self.repeats.admit(dict(event)) if self._holds_back else dict(event)
        if admitted is None:
            raise structlog.DropEvent
        return self.render(admitted)

    def tell(self, events: list[dict[str, Any]]) -> None:
        for event in events:
            self.writer.put(self.render(event))

    def _idle(self) -> float | None:
        self.tell(self.repeats.due())
        return self.repeats.next_due_s()

    def _notice(self, lost: int) -> str:
        stamp = structlog.processors.TimeStamper(fmt="iso", utc=True)
        return self.render(stamp(None, "warning", {"event": "log.dropped", "level": "warning", "count": lost}))


_output: _Output | None = None
atexit.register(flush)


def _renderer(stream: TextIO | None, format: Format) -> Callable[[EventDict], str]:
    is_terminal = stream is not None and stream.isatty()
    if format == "console" or (format == "auto" and is_terminal):
        line = _console(colors=is_terminal)
    else:
        line = structlog.processors.JSONRenderer()

    def plain(event: EventDict) -> str:
        return str(line(None, str(event.get("level", "info")), dict(event)))

    def for_journal(event: EventDict) -> str:
        prefix = f"<{_PRIORITIES.get(str(event.get('level')), 6)}>"
        return "\n".join(prefix + part for part in plain(event).split("\n"))

    return for_journal if _is_journal(stream) else plain


def _console(*, colors: bool) -> Processor:
    render = structlog.dev.ConsoleRenderer(
        colors=colors,
        exception_formatter=structlog.dev.plain_traceback,  # the rich one shows local variables: passwords
    )

    def with_local_time(logger: Any, method: str, event: EventDict) -> str:
        return render(logger, method, structlog.processors.TimeStamper(fmt="%H:%M:%S", utc=False)(None, method, event))

    return with_local_time


def _is_journal(stream: TextIO | None) -> bool:
    """Whether this is what systemd calls the journal's: systemd.exec(5), JOURNAL_STREAM."""
    fd = _fd(stream)
    if fd is None:
        return False
    try:
        there = os.fstat(fd)
    except OSError:
        return False
    return os.environ.get("JOURNAL_STREAM") == f"{there.st_dev}:{there.st_ino}"


def _fd(stream: TextIO | None) -> int | None:
    try:
        return stream.fileno() if stream is not None else None
    except (AttributeError, io.UnsupportedOperation, ValueError):
        return None


def _redact(logger: object, method: str, event: EventDict) -> EventDict:
    cleaned: EventDict = redacted(event)
    return cleaned


class _Lines:
    """What structlog hands rendered lines to; every level the same way."""

    def __init__(self, put: Callable[[str], None]) -> None:
        self.debug = self.info = self.warning = self.error = self.critical = self.exception = self.msg = put


class _Foreign(logging.Handler):
    """A library's record as an event of ours: its text, and the name of its logger."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            number = max(10, min(50, record.levelno // 10 * 10))
            log = structlog.get_logger()
            log.log(number, record.getMessage(), logger=record.name, exc_info=record.exc_info)
        except Exception:  # noqa: BLE001  the contract of logging.Handler: a bad record is told, and no more
            self.handleError(record)
