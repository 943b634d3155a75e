"""Tasks that end together, and are seen to their end."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

from edge_agent._compat import end

__all__ = ["end", "first_to_end"]


async def first_to_end(*work: Coroutine[Any, Any, None]) -> None:
    """Run all until one ends; raise what it raised."""
    tasks = [asyncio.ensure_future(one) for one in work]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
    finally:
        await end(tasks)
