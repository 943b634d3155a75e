"""What goes past the log to stderr, without credentials: last sentences, and the errors that nobody caught."""

from __future__ import annotations

import contextlib
import os
import select
import sys
import threading
import traceback
from types import TracebackType
from typing import TYPE_CHECKING

from edge_agent.logs.redaction import redacted_text

if TYPE_CHECKING:
    from sys import UnraisableHookArgs


def say(text: str) -> None:
    """On stderr; not if nobody takes it, for the process must come to its end."""
    if sys.stderr is None:
        return
    data = f"{redacted_text(text)}\n".encode(errors="replace")
    stderr = select.poll()
    stderr.register(2, select.POLLOUT)
    with contextlib.suppress(OSError):
        while data and stderr.poll(0):
            data = data[os.write(2, data[: select.PIPE_BUF]) :]  # for so much a pipe has room that can be written to


def hide_in_tracebacks() -> None:
    """Have the interpreter show what nobody caught as `say` does, of whatever thread it is."""
    sys.excepthook = _show
    threading.excepthook = _show_of_thread
    sys.unraisablehook = _show_unraisable


def _show(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    say("".join(traceback.format_exception(kind, error, trace)).rstrip("\n"))


def _show_of_thread(what: threading.ExceptHookArgs) -> None:
    if what.exc_value is None or issubclass(what.exc_type, SystemExit):
        return
    say(f"Exception in thread {what.thread.name if what.thread else 'that has ended'}:")
    _show(what.exc_type, what.exc_value, what.exc_traceback)


def _show_unraisable(what: UnraisableHookArgs) -> None:
    say(f"{what.err_msg or 'Exception ignored in'}: {what.object!r}")
    if what.exc_value is not None:
        _show(what.exc_type, what.exc_value, what.exc_traceback)
