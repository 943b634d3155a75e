"""`edgectl doctor`: what will and will not work here, each line with its fix.

The checks run in a process of their own, so that one that crashes or hangs in somebody's driver is a line too.
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Generator, Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
from rich.console import Console
from rich.text import Text

from edgectl._config import config_file
from edgectl.doctor._words import Began, Done, Finding, Task, Word

_START_PATIENCE = 10.0  # of the process itself, which has much to import
_BROKEN = "what this check looks at crashes or hangs: install it anew, or give it longer with --timeout"
_STYLES = {"ok": "green", "warn": "yellow", "fail": "red"}
_words: msgspec.json.Decoder[Word] = msgspec.json.Decoder(Word)


def doctor(given: Path | None, *, as_json: bool, timeout_s: float, acl: bool) -> int:
    """Print the findings; 1 if any fails, else 0."""
    path = config_file(given)
    console, found = Console(), []
    with Console(stderr=True).status("looking …") as shown:
        for one in look(path, timeout_s=timeout_s, acl=acl):
            if isinstance(one, Began):
                shown.update(f"{one.name} …")
                continue
            found.append(one)
            if not as_json:
                shown.stop()  # or the line would begin behind it
                console.print(line(one), soft_wrap=True)
                shown.start()
    if as_json:
        print(json.dumps(document(found), indent=2, ensure_ascii=False))
    else:
        console.print(summary(found), soft_wrap=True, highlight=False)
    return int(any(one.state == "fail" for one in found))


def document(found: Sequence[Finding]) -> dict[str, Any]:
    """The findings as `--json` has them; `state` is the worst."""
    states = {one.state for one in found}
    worst = next((state for state in ("fail", "warn") if state in states), "ok")
    shown = [{name: getattr(one, name) for name in ("state", "what", "fact", "fix")} for one in found]
    return {"state": worst, "findings": shown}


def line(one: Finding) -> Text:
    """A finding as people read it."""
    text = Text.assemble((f"{one.state:>4}", _STYLES[one.state]), "  ", (f"{one.what:<12}", "bold"), " ", one.fact)
    return text.append(f"\n      → {one.fix}", style="dim") if one.fix else text


def summary(found: Sequence[Finding]) -> str:
    """All of it in a sentence."""
    named = {state: list(dict.fromkeys(one.what for one in found if one.state == state)) for state in ("fail", "warn")}
    if not any(named.values()):
        return "\nall is well"
    fails = f"will not work: {', '.join(named['fail'])}" if named["fail"] else "nothing fails"
    return f"\n{fails}" + (f"; worth a look: {', '.join(named['warn'])}" if named["warn"] else "")


def look(path: Path | None, *, timeout_s: float, acl: bool = False) -> Iterator[Finding | Began]:
    """Every finding, and each check that begins. A check that says nothing for `timeout_s`, or whose process ends, is a
    finding; the next ones then run in a new process."""
    first: int | None = 0
    while first is not None:
        first = yield from _looked(path, timeout_s, acl, first)


def _looked(path: Path | None, timeout_s: float, acl: bool, first: int) -> Generator[Finding | Began, None, int | None]:
    """The findings of one process; returns the check to go on with, None after the last."""
    began: Began | None = None
    with tempfile.TemporaryFile() as complaints, _Process(path, acl, first, complaints) as process:
        while True:
            try:
                word = process.next_word(timeout_s * (began.patience if began else _START_PATIENCE))
            except _Silent as error:
                what = began.name if began else "doctor"
                yield Finding("fail", what, f"{error}{_last_line(complaints)}", _BROKEN)
                return began.index + 1 if began else None
            if isinstance(word, Done):
                return None
            if isinstance(word, Began):
                began = word
            yield word


class _Silent(Exception):
    """The process of the checks has crashed, or hangs."""


class _Process:
    """The checks at work; what libraries print goes nowhere, or among the complaints."""

    def __init__(self, path: Path | None, acl: bool, first: int, complaints: Any) -> None:
        self._answers, theirs = os.pipe()
        self._rest = b""
        task = msgspec.json.encode(Task(theirs, first, str(path) if path else None, acl)).decode()
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-c", "from edgectl.doctor._child import main; main()", task],
                pass_fds=(theirs,),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=complaints,
                env={**os.environ, "PYTHONSAFEPATH": "1"},
            )
        finally:
            os.close(theirs)

    def next_word(self, timeout_s: float) -> Word:
        """What it says next. Raises `_Silent`."""
        until = time.monotonic() + timeout_s
        while b"\n" not in self._rest:
            if not select.select([self._answers], [], [], max(0.0, until - time.monotonic()))[0]:
                raise _Silent(f"said nothing for {timeout_s:g} s, and was left")
            content = os.read(self._answers, 65536)
            if not content:
                raise _Silent(_ending(self._process.wait()))
            self._rest += content
        word, _, self._rest = self._rest.partition(b"\n")
        return _words.decode(word)

    def __enter__(self) -> _Process:
        return self

    def __exit__(self, *error: object) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._answers)


def _ending(status: int) -> str:
    if status < 0:
        return f"the check crashed: {signal.Signals(-status).name}"
    return f"the check ended its process with status {status}"


def _last_line(complaints: Any) -> str:
    complaints.seek(0)
    lines = complaints.read().decode(errors="replace").strip().splitlines()
    return f" ({lines[-1].strip()})" if lines else ""
