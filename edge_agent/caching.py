"""Files that only save time: written whole or not at all, and done without where they cannot be written."""

from __future__ import annotations

import tempfile
from pathlib import Path

import structlog

log = structlog.get_logger()


def keep(path: Path, content: bytes) -> None:
    """Put `content` there atomically, making the folder if need be."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
            file.write(content)
        Path(file.name).replace(path)
    except OSError as error:
        log.warning("cache.not_kept", path=str(path), reason=error.strerror)
