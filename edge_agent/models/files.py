"""Files that must be whole: written beside and put in place, hashed, and what a disk that refuses says."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import stat
from collections.abc import Iterator
from pathlib import Path

from edge_agent.errors import ModelError


def sha256(path: Path) -> str:
    """Raises `ModelError` (`model_not_found`) where it cannot be read."""
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    except OSError as error:
        raise ModelError(f"{path}: {error.strerror}", code="model_not_found") from error
    return digest.hexdigest()


def write_whole(path: Path, content: bytes, *, mode: int = 0o644) -> None:
    """Replace a file so that after a power cut it is there as it was or as it is to be."""
    scratch = path.with_name(f".{path.name}.new")
    try:
        scratch.unlink(missing_ok=True)
        with open(os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:  # noqa: PTH123
            file.write(content)
        replace(scratch, path)
    except OSError:
        with contextlib.suppress(OSError):
            scratch.unlink()
        raise


def replace(source: Path, target: Path) -> None:
    """Put a whole file or folder in place; it is on the disk when this returns."""
    sync(source)
    source.replace(target)
    sync(target.parent)


def sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def require_file(path: Path) -> None:
    """Raises `OSError` where there is none, and `ModelError` (`model_not_found`) where it is something else: to open a
    pipe may take for ever."""
    if not stat.S_ISREG(path.stat().st_mode):
        raise ModelError(f"{path} is no file", code="model_not_found")


def is_plain_file(path: Path) -> bool:
    """Whether it is a file, and no link to one."""
    try:
        return stat.S_ISREG(path.lstat().st_mode)
    except (OSError, ValueError):  # a name with a NUL, or longer than any
        return False


def make_folder(path: Path) -> None:
    """Raises `ModelError` with what to do where it cannot be made."""
    with storing(path):
        path.mkdir(parents=True, exist_ok=True, mode=0o755)


@contextlib.contextmanager
def held(path: Path) -> Iterator[None]:
    """A lock between threads and processes; one that dies lets go."""
    with path.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def is_held(path: Path) -> bool:
    """Whether somebody alive has this lock."""
    try:
        with path.open("r+") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except FileNotFoundError:
        return False
    return False


@contextlib.contextmanager
def storing(path: Path) -> Iterator[None]:
    """What the disk says to writing, as `ModelError`s."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise ModelError(
                f"{path}: the disk is full; make room (edgectl models gc, edgectl models remove)", code="disk_full"
            ) from error
        raise ModelError(f"{path}: {error.strerror}: is it the agent's own folder?") from error
