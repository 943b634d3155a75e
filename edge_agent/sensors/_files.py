"""The small files in which a kernel tells facts, read without an error: what cannot be read is absent."""

from __future__ import annotations

import os
import re
from pathlib import Path

_MOST_BYTES = 1 << 20
_NUMBER = re.compile(r"-?\d{1,18}")


def text(path: Path) -> str:
    """What the file says, stripped; nothing where it cannot be read.

    Not by `open`: sensors that are switched off answer EAGAIN, of which its buffer makes a None. Files that would
    block are absent too.
    """
    try:
        file = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return ""
    try:
        return _content(file).decode("utf-8", "replace").strip("\0 \t\r\n")
    except OSError:
        return ""
    finally:
        os.close(file)


def number(path: Path) -> int | None:
    """The whole number that the file holds."""
    found = _NUMBER.fullmatch(text(path))
    return int(found[0]) if found else None


def scaled(path: Path, scale: float, *, most: float, least: float = 0.0) -> float | None:
    """The number times `scale`; None outside of what is possible, such as a sentinel."""
    found = number(path)
    if found is None or not least <= found * scale <= most:
        return None
    return round(found * scale, 3)


def names(folder: Path, prefix: str = "") -> list[str]:
    """What is in the folder, `thermal_zone2` before `thermal_zone10`."""
    try:
        found = [path.name for path in folder.iterdir() if path.name.startswith(prefix)]
    except OSError:
        return []
    return sorted(found, key=lambda name: [(len(part), part) for part in re.split(r"(\d+)", name)])


def _content(file: int) -> bytes:
    content = b""
    while len(content) < _MOST_BYTES and (more := os.read(file, _MOST_BYTES - len(content))):
        content += more
    return content
