"""What differs between the Python versions we support, in one place."""

from __future__ import annotations

import asyncio
import sys
from asyncio import CancelledError
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib
    from exceptiongroup import BaseExceptionGroup

__all__ = ["BaseExceptionGroup", "end", "errors_unwrapped", "tomllib"]

_CANCELLED_AGAIN_S = 1.0


@contextmanager
def errors_unwrapped() -> Iterator[None]:
    """Raise a task group's only error as itself, so that callers can name it in an `except`.

    Cancellation that travels beside it is not an error of its own. A group of several real errors
    stays a group.
    """
    try:
        yield
    except BaseExceptionGroup as group:
        errors = [error for error in _leaves(group) if not isinstance(error, CancelledError)]
        if len(errors) == 1:
            raise errors[0] from errors[0].__cause__
        raise


async def end(tasks: Collection[asyncio.Future[Any]], *, patience_s: float = _CANCELLED_AGAIN_S) -> None:
    """Cancel tasks until they have ended. Once is not enough: before Python 3.12 `asyncio.wait_for` may swallow it
    (https://github.com/python/cpython/issues/86296), in a library's code too. Whoever wants their errors has looked."""
    ending = list(tasks)
    while pending := {task for task in ending if not task.done()}:
        for task in pending:
            task.cancel()
        await asyncio.wait(pending, timeout=patience_s)
    for task in ending:
        if not task.cancelled():
            task.exception()


def _leaves(group: BaseExceptionGroup[BaseException]) -> Iterator[BaseException]:
    for error in group.exceptions:
        if isinstance(error, BaseExceptionGroup):
            yield from _leaves(error)
        else:
            yield error
