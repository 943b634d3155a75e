"""Memory that was freed goes back to the system.

glibc keeps what a program frees, in an arena for every few threads, for the next that asks there. What a model held is
tens of megabytes that its successor, loaded by another thread and of other sizes, only partly fits into:
https://man7.org/linux/man-pages/man3/malloc_trim.3.html
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from functools import cache

_M_ARENA_MAX = -8
_ARENAS = 2


def share_arenas() -> bool:
    """Have all threads that begin from now on allocate from two arenas, where glibc has eight for each core: what one
    thread freed, another can then use. Whether that is so: https://man7.org/linux/man-pages/man3/mallopt.3.html"""
    if "MALLOC_ARENA_MAX" in os.environ or "arena_max" in os.environ.get("GLIBC_TUNABLES", ""):
        return False  # somebody has chosen
    try:
        return bool(ctypes.CDLL(None).mallopt(_M_ARENA_MAX, _ARENAS))
    except (OSError, AttributeError, TypeError):  # musl, macOS, Windows
        return False


def give_back() -> bool:
    """Whether anything went back. Milliseconds, and never anything where the C library has no `malloc_trim`."""
    trim = _trim()
    return trim is not None and bool(trim(0))


@cache
def _trim() -> Callable[[int], int] | None:
    try:
        trim = ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError, TypeError):  # musl, macOS, Windows
        return None
    trim.argtypes, trim.restype = (ctypes.c_size_t,), ctypes.c_int
    return trim
