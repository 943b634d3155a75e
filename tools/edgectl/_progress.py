"""How far something is that takes its time: a bar on stderr, where that is a terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

Tell = Callable[[str, float | None], None]
"""Hears the phase, and how much of it is done in percent; None where nothing says."""


@contextmanager
def progress(phase: str = "", *, shows: bool = True) -> Iterator[Tell]:
    """A bar until the block ends; nothing where there is no terminal, or `shows` is not set."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not (shows and console.is_terminal)) as bar:
        task = bar.add_task(phase, total=None)

        def tell(phase: str, percent: float | None) -> None:
            bar.update(task, description=phase, total=100 if percent is not None else None, completed=percent or 0)

        yield tell
