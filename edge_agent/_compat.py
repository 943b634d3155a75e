"""What differs between the Python versions we support, in one place."""

from __future__ import annotations

import sys
from asyncio import CancelledError
from collections.abc import Iterator
from contextlib import contextmanager

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib
    from exceptiongroup import BaseExceptionGroup

__all__ = ["BaseExceptionGroup", "errors_unwrapped", "tomllib"]


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


def _leaves(group: BaseExceptionGroup[BaseException]) -> Iterator[BaseException]:
    for error in group.exceptions:
        if isinstance(error, BaseExceptionGroup):
            yield from _leaves(error)
        else:
            yield error
