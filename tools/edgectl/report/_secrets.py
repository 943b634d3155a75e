"""Credentials kept out of the report: by how they look, and every one that the configuration holds, wherever it is."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

import msgspec

from edge_agent.config import Config, Secret
from edge_agent.logs.redaction import HIDDEN, is_secret, redacted, redacted_text

_SHORTEST = 3  # a shorter one is in every other word; it is hidden where it looks like one


class Secrets:
    """What must not be told. `known` are hidden as they are, and as they stand in URLs."""

    def __init__(self, known: Iterable[str] = ()) -> None:
        forms = {form for one in known for form in (one, quote(one, safe=""), quote(one), unquote(one))}
        self._known = sorted((form for form in forms if len(form) >= _SHORTEST), key=len, reverse=True)

    def text(self, text: str) -> str:
        """`text` without any."""
        return self._without_known(redacted_text(text))

    def value(self, value: Any) -> Any:
        """JSON without any; the keys stay."""
        return self._strings(redacted(value))

    def _strings(self, value: Any) -> Any:
        if isinstance(value, str):
            return self._without_known(value)
        if isinstance(value, dict):
            return {key: self._strings(inner) for key, inner in value.items()}
        if isinstance(value, list):
            return [self._strings(inner) for inner in value]
        return value

    def _without_known(self, text: str) -> str:
        for one in self._known:
            text = text.replace(one, HIDDEN)
        return text


def of(raw: Mapping[str, Any], loaded: Config | None, folder: Path, environ: Mapping[str, str] = os.environ) -> Secrets:
    """The secrets of a configuration: its passwords, those in its URLs and in its files, and the environment's."""
    known = [*_in(raw), *(value for name, value in environ.items() if is_secret(name)), *_files(raw, folder)]
    if loaded is not None:
        known += _in(msgspec.to_builtins(loaded, enc_hook=_revealed))
    credentials = environ.get("CREDENTIALS_DIRECTORY")
    if credentials:
        known += [_content(path) for path in Path(credentials).glob("*")]
    return Secrets(known)


def _revealed(value: object) -> str:
    assert isinstance(value, Secret)
    return value.reveal()


def _in(value: Any, key: str = "") -> Iterator[str]:
    """The secrets in JSON: what stands under a telling key, and what is hidden of the rest."""
    if isinstance(value, str):
        yield from [value] if is_secret(key) else hidden(value)
    elif isinstance(value, Mapping):
        for name, inner in value.items():
            yield from _in(inner, str(name))
    elif isinstance(value, (list, tuple)):
        for inner in value:
            yield from _in(inner, key)


def hidden(text: str) -> Iterator[str]:
    """What `redacted_text` takes out of a text."""
    at = 0
    for index, part in enumerate(redacted_text(text).split(HIDDEN)):
        start = text.find(part, at) if part else at if index == 0 else len(text)
        if index and start > at:
            yield text[at:start].strip("\"'")
        at = max(at, start) + len(part)


def _files(value: Any, folder: Path) -> Iterator[str]:
    """What `password_file` and the like hold, where they can be read."""
    for key, inner in value.items() if isinstance(value, Mapping) else ():
        if isinstance(inner, str) and is_secret(key.removesuffix("_file")) and key.endswith("_file"):
            yield _content(folder / os.path.expandvars(inner))
        else:
            yield from _files(inner, folder)


def _content(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        return ""
