"""Tasks that end together, and are seen to their end."""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Coroutine
from typing import Any

_PATIENCE_S = 1.0


async def first_to_end(*work: Coroutine[Any, Any, None]) -> None:
    """Run all until one ends; raise what it raised."""
    tasks = [asyncio.ensure_future(one) for one in work]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
    finally:
        await end(tasks)


async def end(tasks: Collection[asyncio.Future[Any]], *, patience_s: float = _PATIENCE_S) -> None:
    """Cancel them until they have ended. Once is not enough: before Python 3.12 `asyncio.wait_for` may swallow it
    (https://github.com/python/cpython/issues/86296), in a library's code too."""
    while pending := {task for task in tasks if not task.done()}:
        for task in pending:
            task.cancel()
        await asyncio.wait(pending, timeout=patience_s)
