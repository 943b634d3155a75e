"""The rigs of the tests in a program: what they lack ends it with their own sentence, where a test would be skipped."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest


@contextmanager
def rigs_or_exit() -> Iterator[None]:
    """Raises SystemExit naming a program that is missing, and what to install."""
    try:
        yield
    except pytest.skip.Exception as missing:
        raise SystemExit(str(missing)) from None
