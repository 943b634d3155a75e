"""What the agent is set to: the configuration's file, and what commands have changed since.

Changes by command are tables like those of the file, laid over them: `{"cameras": {"front": {"fps": 5}, "old": null}}`.
They are kept beside the state and outlive a restart, until `reset`; the file itself is never written.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import structlog

from edge_agent import config, migrations
from edge_agent.config import Config, state_directory
from edge_agent.errors import CommandError, ConfigError, ModelError
from edge_agent.models.files import storing, write_whole

log = structlog.get_logger()

Tables = dict[str, Any]

_SAFE_SOURCES = ("v4l2", "rtsp", "http", "synthetic")
_LOCAL = ("path", "pipeline", "directory", "tls_ca", "tls_cert", "tls_key", "calibration")
_DEEPEST = 16
_DEVICES = re.compile(r"/dev/(video\d+|v4l/[\w./:-]+)|usb:.*")
_ANEW = "_anew"
"""In the table of a camera: it is not laid over the one of its name in the file."""


class Settings:
    """Blocks; for one thread at a time. `file`: None where the agent was given its configuration otherwise; then
    nothing can be changed."""

    def __init__(self, file: Path | None = None, fixed: Config | None = None) -> None:
        self._file = file
        self._fixed = fixed
        self.changes: Tables = {}

    @property
    def changed_keys(self) -> list[str]:
        """The keys that commands have changed, dotted."""
        return sorted(_keys(self.changes))

    def load(self) -> Config:
        """The file with what was changed laid over it. Raises `ConfigError` for the file; each change that does not go
        with it any more is told and left out."""
        if self._file is None:
            assert self._fixed is not None
            return self._fixed
        plain = config.load(self._file, tell=_tell)
        self.changes = _read(_path(plain), below=self._plain())
        while self.changes:
            try:
                return self._with(self.changes)
            except ConfigError as error:
                self._leave_out(error.problems, path=_path(plain))
        return plain

    def _leave_out(self, problems: Sequence[str], *, path: Path) -> None:
        """The changes that the problems name, or else what is around them; all, if there is none."""
        before, fitting = set(self.changed_keys), self.changes
        paths = [problem.partition(": ")[0] for problem in problems]
        while fitting == self.changes and any(paths):
            for at in paths:
                fitting = _without(fitting, at)
            paths = [at.rpartition(".")[0] for at in paths]
        self.changes = fitting if fitting != self.changes else {}
        keys = sorted(before - set(self.changed_keys))
        log.error("settings.changes_left_out", path=str(path), keys=keys, problems=list(problems))

    def changed(self, changes: Mapping[str, Any]) -> Config:
        """The configuration as it would be with these changes too, which are kept. Raises `CommandError`
        (`bad_arguments`) with what is wrong with them, by which nothing is changed."""
        if self._file is None:
            raise CommandError("this agent has no configuration file, and takes no changes", code="forbidden")
        _require_harmless(changes)
        self._require_logins(changes)
        wanted = _laid_over(self.changes, self._anew(changes))
        try:
            loaded = self._with(wanted)
        except ConfigError as error:
            raise CommandError("; ".join(error.problems), code="bad_arguments") from error
        self._keep(loaded, wanted)
        return loaded

    def _anew(self, changes: Mapping[str, Any]) -> Mapping[str, Any]:
        """With a camera that comes after one of its name was removed marked as another one."""
        gone = [name for name, table in self.changes.get("cameras", {}).items() if table is None]
        cameras = {
            name: {**table, _ANEW: True} if name in gone and table is not None else table
            for name, table in changes.get("cameras", {}).items()
        }
        return {**changes, "cameras": cameras} if cameras else changes

    def _require_logins(self, changes: Mapping[str, Any]) -> None:
        """A camera's login goes to no other place by command. Raises `CommandError` (`forbidden`)."""
        assert self._file is not None
        there = _laid_over(self._plain(), self.changes).get("cameras", {})
        for name, table in changes.get("cameras", {}).items():
            has_login = isinstance(there.get(name), Mapping) and {"password", "password_file"} & set(there[name])
            if has_login and table and {"url", "source"} & set(table) and "password" not in table:
                raise CommandError(
                    f"cameras.{name}: it has a login; another url or source takes username and password with it",
                    code="forbidden",
                )

    def reset(self) -> Config:
        """The file alone; what was changed is forgotten. Raises `ConfigError`."""
        if self._file is None:
            return self.load()
        plain = config.load(self._file)
        self._keep(plain, {})
        return plain

    def reread(self) -> Config:
        """The file as it is now, with what was changed. Raises `CommandError` naming each mistake in it."""
        try:
            return self.load()
        except ConfigError as error:
            raise CommandError("; ".join(error.problems), code="bad_arguments") from error

    def _plain(self) -> Tables:
        """The file's tables in this version's layout, which is that of the changes. Raises `ConfigError`."""
        assert self._file is not None
        return migrations.migrated(config.read(self._file))[0]

    def _with(self, changes: Tables) -> Config:
        assert self._file is not None
        raw = _laid_over(self._plain(), changes)
        raw["cameras"] = {
            name: {key: value for key, value in table.items() if key != _ANEW} if isinstance(table, Mapping) else table
            for name, table in raw.get("cameras", {}).items()
            if table is not None
        }
        return config.parse(raw, folder=self._file.parent)

    def _keep(self, loaded: Config, changes: Tables) -> None:
        path = _path(loaded)
        try:
            with storing(path):
                path.parent.mkdir(parents=True, exist_ok=True)
                kept = {"schema": 1, "config_version": migrations.VERSION, "changes": changes}
                text = json.dumps(kept, indent=1)
                write_whole(path, text.encode(), mode=0o600)  # a camera's password may be in it
        except ModelError as error:  # it holds all the same, until the agent ends
            log.error("settings.not_kept", path=str(path), reason=str(error))
        self.changes = changes


def _require_harmless(changes: Mapping[str, Any]) -> None:
    """A command comes over the network: it may not read this machine's files and environment into the settings, nor
    have programs run. Raises `CommandError` (`forbidden`, `bad_arguments`)."""
    try:
        for path, value in _items(changes):
            key = path.rpartition(".")[2]
            if key.endswith("_file") or key in _LOCAL:
                raise CommandError(f"{path}: this is named in the configuration alone", code="forbidden")
            if key == "device" and not _DEVICES.fullmatch(str(value)):
                raise CommandError(f"{path}: a command may name /dev/video…, /dev/v4l/… and usb:…", code="forbidden")
            if isinstance(value, str) and "${" in value:
                raise CommandError(f"{path}: variables are named in the configuration alone", code="forbidden")
            if key == "source" and value not in _SAFE_SOURCES:
                safe = ", ".join(_SAFE_SOURCES)
                raise CommandError(f"{path}: a command may set {safe}; others in the configuration", code="forbidden")
    except RecursionError as error:
        raise CommandError("tables in tables without end", code="bad_arguments") from error


def _items(value: Any, path: str = "", depth: int = 0) -> Iterator[tuple[str, Any]]:
    """Everything in tables and lists that is neither, with its dotted path."""
    if depth > _DEEPEST:
        raise RecursionError
    inner: Iterable[tuple[object, Any]] = ()
    if isinstance(value, Mapping):
        inner = value.items()
    elif isinstance(value, list):
        inner = ((index, one) for index, one in enumerate(value))
    else:
        yield path, value
    for key, one in inner:
        yield from _items(one, f"{path}.{key}" if path else str(key), depth + 1)


def _path(loaded: Config) -> Path:
    return state_directory() / f"changes-{loaded.device}.json"


def _read(path: Path, *, below: Mapping[str, Any]) -> Tables:
    """The changes that were kept, in this version's layout, for a file with the tables `below`."""
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
        changes = kept["changes"] if kept["schema"] == 1 else None
        if not isinstance(changes, dict):
            raise ValueError("it is of another schema")
        changes, moved = _migrated(changes, kept.get("config_version", 1), below=below)
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError, ConfigError) as error:
        log.error("settings.unreadable", path=str(path), reason=str(error))
        return {}
    for sentence in moved:
        log.info("settings.moved", path=str(path), what=sentence, next="it is kept so with the next change")
    return changes


def _migrated(changes: Tables, version: Any, *, below: Mapping[str, Any]) -> tuple[Tables, list[str]]:
    """As `migrations.migrated`, which looks at what a camera's source is: that may be in the file alone."""
    tables = {**changes, "config_version": version}
    lent = dict(_lent(changes.get("cameras"), below.get("cameras")))
    if lent:
        tables["cameras"] = {**changes["cameras"], **lent}
    tables, moved = migrations.migrated(tables)
    for name in lent:
        del tables["cameras"][name]["source"]
    del tables["config_version"]
    return tables, moved


def _lent(cameras: object, below: object) -> Iterator[tuple[str, Tables]]:
    """Cameras that say nothing of their source, with that of their name's in the file."""
    if isinstance(cameras, Mapping) and isinstance(below, Mapping):
        for name, table in cameras.items():
            there = below.get(name)
            if isinstance(table, Mapping) and isinstance(there, Mapping) and "source" in {*there} - {*table}:
                yield name, {**table, "source": there["source"]}


def _tell(sentence: str) -> None:
    log.warning("config.moved", what=sentence)


def _keys(tables: Mapping[str, Any], path: str = "") -> Iterator[str]:
    for key, value in tables.items():
        if key == _ANEW:
            continue
        if isinstance(value, Mapping) and value:
            yield from _keys(value, f"{path}{key}.")
        else:
            yield f"{path}{key}"


def _without(tables: Mapping[str, Any], path: str) -> Tables:
    """Tables without what is at the dotted path, and without those that are empty then."""
    rest = dict(tables)
    for key in sorted(tables, key=len, reverse=True):  # a name may hold dots
        inner = tables[key]
        is_below = path.startswith(f"{key}.")
        if path == key or path.startswith(f"{key}[") or (is_below and not isinstance(inner, Mapping)):
            del rest[key]
            return rest
        if is_below and (less := _without(inner, path[len(key) + 1 :])) != inner:
            return {**rest, key: less} if less else _without(tables, key)
    return rest


def _laid_over(below: Mapping[str, Any], above: Mapping[str, Any]) -> Tables:
    """Tables of `above` in those of `below`, key by key; None takes a camera, and any other table, away."""
    merged: Tables = copy.deepcopy(dict(below))
    for key, value in above.items():
        there = merged.get(key)
        if isinstance(value, Mapping) and isinstance(there, Mapping) and _ANEW not in value:
            merged[key] = _laid_over(there, value)
        else:
            merged[key] = copy.deepcopy(value)
    return merged
