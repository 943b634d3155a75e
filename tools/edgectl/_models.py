"""A model as people name it to edgectl: one that is known, or a file, and what is set differently for it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from edge_agent import config
from edge_agent.check import store_of
from edge_agent.config import Config, ModelOptions, state_directory
from edge_agent.errors import ConfigError
from edge_agent.models.store import ModelStore

_FILES = (".onnx", ".engine", ".plan", ".trt")


def entry_of(
    model: str, settings: Sequence[str], raw: Mapping[str, Any], folder: Path
) -> tuple[str, Mapping[str, Any]]:
    """The model's name, and its entry as a configuration would have it. `raw`: the configuration's own tables, whose
    relative paths start at `folder`. Raises `ConfigError`."""
    path = Path(model)
    if path.suffix.lower() in _FILES:
        name, entry = _name(path.stem), {"path": str(path.absolute())}
    elif model in raw.get("models", {}):
        name, entry = model, dict(raw["models"][model])
    else:
        name, entry = _differing(ModelStore({}, _store(raw, folder)), model)
    for setting in settings:
        _set(entry, setting)
    return name, entry


def found(model: str, settings: Sequence[str], loaded: Config) -> tuple[ModelStore, str]:
    """The store of a configuration, and the model's name in it; a file, or a model of which something is set
    differently, is in it for this process alone. Raises `ConfigError` and `ModelError`."""
    store, path = store_of(loaded), Path(model)
    is_file = path.suffix.lower() in _FILES
    if not is_file and not settings:
        store.get(model)
        return store, model
    name, entry = (_name(path.stem), {"path": str(path.absolute())}) if is_file else _differing(store, model)
    for setting in settings:
        _set(entry, setting)
    options = config.parse({"models": {name: entry}, "cameras": {"none": {"source": "synthetic"}}}).models.entries
    changed = ModelStore({**loaded.models.entries, **options})
    changed.get(name)
    return changed, name


def settings_of(settings: Sequence[str]) -> dict[str, Any]:
    """`key=value`s as the tables that they make. Raises `ConfigError`."""
    entry: dict[str, Any] = {}
    for setting in settings:
        _set(entry, setting)
    return entry


def _store(raw: Mapping[str, Any], folder: Path) -> Path:
    given = raw.get("models", {}).get("dir")
    return folder / given if isinstance(given, str) else state_directory() / "models"


def _differing(store: ModelStore, model: str) -> tuple[str, dict[str, Any]]:
    stored = store.get(model)
    return stored.name, _given(stored.options)


def _given(options: ModelOptions) -> dict[str, Any]:
    """The keys of an entry that differ from what they are by themselves."""
    plain = msgspec.to_builtins(ModelOptions(path=""))
    return {key: value for key, value in msgspec.to_builtins(options).items() if value != plain[key]}


def _name(stem: str) -> str:
    kept = "".join(sign if (sign.isascii() and sign.isalnum()) or sign in "._-" else "-" for sign in stem)[:64]
    return kept if kept[:1].isalnum() else f"m{kept}"[:64]


def _set(entry: dict[str, Any], setting: str) -> None:
    """Set a dotted key to a value of JSON, or else to the text itself."""
    key, given, text = setting.partition("=")
    if not given or not key:
        raise ConfigError(f"--set {setting}: write key=value, such as family=yolo or preprocess.size=[320,320]")
    *parents, last = key.split(".")
    table = entry
    for parent in parents:
        inner = table.get(parent, {})
        if not isinstance(inner, dict):
            raise ConfigError(f"--set {setting}: {parent!r} is no table")
        table[parent] = dict(inner)
        table = table[parent]
    table[last] = _value(text)


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text
