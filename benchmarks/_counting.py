"""What a process allocates and copies in large pieces, counted by a small library that is preloaded into it.

The library is `counting.c`, compiled where and when it is needed.
"""

from __future__ import annotations

import os
import shutil
import struct
import subprocess
from collections.abc import Mapping
from dataclasses import astuple, dataclass
from pathlib import Path

SOURCE = Path(__file__).with_name("counting.c")

_LAYOUT = struct.Struct("@7Q")


class CannotCount(Exception):
    """Why nothing can be counted here, and what to install."""


@dataclass(frozen=True, slots=True)
class Counts:
    """Since the process began. `allocations`: of 1 MiB or more from the C library's heap, or mapped by somebody else
    (Python's small objects lie in maps of 1 MiB). `copies`: of 4 KiB or more through memcpy and memmove."""

    heap: int
    heap_bytes: int
    maps: int
    mapped_bytes: int
    copies: int
    copied_bytes: int

    @property
    def allocations(self) -> int:
        return self.heap + self.maps

    def __sub__(self, before: Counts) -> Counts:
        return Counts(*(now - then for now, then in zip(astuple(self), astuple(before), strict=True)))


class Counter:
    """Counts in the processes that are started with its `environ`. Its files lie in `folder`.

    Raises `CannotCount` where the library cannot be made.
    """

    def __init__(self, folder: Path) -> None:
        self._library = compiled(folder)
        self._counters = folder / "counters"
        self._counters.write_bytes(bytes(_LAYOUT.size))

    @property
    def environ(self) -> Mapping[str, str]:
        others = os.environ.get("LD_PRELOAD", "")
        return {"LD_PRELOAD": f"{self._library} {others}".strip(), "EDGE_COUNTERS": str(self._counters)}

    def read(self) -> Counts:
        """What was counted so far. Raises `CannotCount` if nobody counts."""
        is_counting, *counted = _LAYOUT.unpack(self._counters.read_bytes())
        if not is_counting:
            raise CannotCount("the counting library was not loaded; it is for programs that link glibc dynamically")
        return Counts(*counted)


def compiled(folder: Path) -> Path:
    """The library, made of `counting.c` in this folder."""
    compiler = shutil.which("cc")
    if compiler is None:
        raise CannotCount("cc is not installed: apt-get install gcc libc6-dev")
    library = folder / "counting.so"
    options = ["-O2", "-fPIC", "-shared", "-fno-builtin", "-Wall", "-Wextra"]
    made = subprocess.run(
        [compiler, *options, "-o", str(library), str(SOURCE), "-ldl"], capture_output=True, text=True, check=False
    )
    if made.returncode:
        raise CannotCount(f"cc cannot compile counting.c (apt-get install libc6-dev): {made.stderr.strip()[-300:]}")
    return library
