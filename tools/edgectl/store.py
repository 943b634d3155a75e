"""`edgectl models list|show|add|fetch|remove|verify|gc`: the store, beside a running agent or without one."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import typer
from rich.console import Console
from rich.table import Table

from edge_agent import backends, logs
from edge_agent.check import engines_of, library_of, store_of
from edge_agent.config import Config
from edge_agent.errors import ConfigError
from edge_agent.messages import Measurement
from edge_agent.models.library import Download, Library
from edge_agent.models.store import ModelStore, NewModel, StoredModel
from edgectl._config import models_configuration
from edgectl._models import settings_of
from edgectl._progress import progress


class Shelf:
    """The store of a configuration, as edgectl uses it; the default one's where there is no such file."""

    def __init__(self, path: Path | None) -> None:
        logs.configure(level="warning", format="console", stream=sys.stderr)
        self.config = models_configuration(path)
        self.store: ModelStore = store_of(self.config)
        self.library: Library = library_of(self.config, self.store, _engines(self.config))


def listing(path: Path | None, *, as_json: bool) -> None:
    """All models, the catalogue's among them that are not here yet."""
    shelf = Shelf(path)
    models = list(shelf.store)
    if as_json:
        typer.echo(json.dumps([_told(model) for model in models], indent=2))
        return
    active = shelf.store.registry().active
    table = Table(
        "model", "task", "from", "size", "latency (p95) and where it was measured", box=None, header_style="bold"
    )
    for model in models:
        runs = " *" if active and active.model == model.id else ""
        task = (model.entry.task if model.entry else None) or ""
        measured = model.entry.measured[:1] if model.entry else []
        size = f"{model.size_bytes / 1e6:.1f} MB" if model.size_bytes is not None else "no file"
        table.add_row(model.id + runs, task, model.origin, size, "".join(map(_figures, measured)))
    Console().print(table)
    typer.echo(f"\nstore: {shelf.store.folder}" + ("   * was activated last" if active else ""))
    if more := _not_here(models):
        typer.echo(f"to fetch (edgectl models fetch NAME): {', '.join(more)}")


def show(name: str, path: Path | None) -> None:
    """All that is known of a model, as JSON."""
    typer.echo(json.dumps(Shelf(path).library.show(name), indent=2))


def add(
    file: Path,
    name: str,
    path: Path | None,
    *,
    version: str | None,
    settings: Sequence[str],
    sha256: str | None,
    signature: Path | None,
    as_json: bool,
) -> None:
    """Copy a model into the store."""
    shelf, entry = Shelf(path), entry_from(settings)
    new = NewModel(file, name, version=version, entry=entry, source=str(file.absolute()), sha256=sha256)
    with progress(f"looking at {file.name}"):
        model = shelf.library.register(new, signature)
    introduce(shelf, model, as_json=as_json)


def fetch(
    name: str,
    path: Path | None,
    *,
    url: str | None,
    sha256: str | None,
    version: str | None,
    settings: Sequence[str],
    signature_url: str | None,
    allow_private: bool,
    as_json: bool,
) -> None:
    """Download a model into the store."""
    shelf = Shelf(path)
    shelf.config.fetch.allow_private |= allow_private
    wanted = Download(name, url, sha256, version, entry_from(settings), signature_url)
    with progress(f"asking for {name}") as tell:
        model = shelf.library.fetch(wanted, tell)
    introduce(shelf, model, as_json=as_json)


def remove(name: str, path: Path | None, *, as_json: bool) -> None:
    """Delete a model of the store."""
    removed = Shelf(path).library.remove(name)
    typer.echo(json.dumps({"removed": removed}) if as_json else f"removed {removed}")


def verify(name: str | None, path: Path | None, *, as_json: bool) -> int:
    """Each stored file against what it was; 1 where one is not."""
    with progress("verify") as tell:
        verdicts = Shelf(path).library.verify(name, tell)
    if as_json:
        typer.echo(json.dumps(msgspec.to_builtins(verdicts), indent=2))
    else:
        for verdict in verdicts:
            typer.echo(f"{verdict.state:<9} {verdict.model}  {verdict.file}")
    return int(any(verdict.state != "ok" for verdict in verdicts))


def gc(path: Path | None, *, as_json: bool) -> None:
    """Remove engines that fit nothing here, and leavings."""
    with progress("looking at engines"):
        done = Shelf(path).library.tidy()
    if as_json:
        typer.echo(json.dumps(msgspec.to_builtins(done), indent=2))
        return
    for removed in done.removed:
        typer.echo(f"removed {removed}")
    typer.echo(f"{len(done.removed)} removed" + (f"; {done.note}" if done.note else ""))


def _engines(loaded: Config) -> Any:
    try:
        options = loaded.inference
        chosen = backends.choose(options.backend, fallback=options.fallback, options=loaded.backends)
        return engines_of(chosen.name, loaded)
    except ConfigError:  # of no backend here; the store can be looked after all the same
        return None


def entry_from(settings: Sequence[str]) -> dict[str, Any]:
    """What `--set` says of a model to register; a file of labels is read, since it may lie anywhere."""
    entry = settings_of(settings)
    labels = entry.get("labels")
    if isinstance(labels, str) and Path(labels).is_file():
        entry["labels"] = [
            line.strip() for line in Path(labels).read_text(encoding="utf-8").splitlines() if line.strip()
        ]
    return entry


def introduce(shelf: Shelf, model: StoredModel, *, as_json: bool) -> None:
    """Say what came into the store, and what to do with it."""
    if as_json:
        typer.echo(json.dumps(shelf.library.show(model.id), indent=2))
        return
    entry = model.entry
    assert entry is not None
    licence = f", licence {entry.licence}" if entry.licence else ""
    typer.echo(f"{model.id}: {entry.task or 'task not known yet'}, {entry.size_bytes / 1e6:.1f} MB{licence}")
    typer.echo(f"  in {model.path.parent}")
    typer.echo(f"  look:  edgectl infer PICTURE --model {model.name}")
    typer.echo(f"  run:   edgectl cmd model.activate name={model.name}")


def _told(model: StoredModel) -> dict[str, Any]:
    return {
        "id": model.id,
        "name": model.name,
        "version": model.options.version,
        "origin": model.origin,
        "path": str(model.path),
        "size_bytes": model.size_bytes,
        "task": model.entry.task if model.entry else None,
        "measured": msgspec.to_builtins(model.entry.measured) if model.entry else [],
    }


def _figures(measured: Measurement) -> str:
    where = measured.where
    return f"{measured.latency_ms.p95:.1f} ms  {where.runtime}, {where.device}"


def _not_here(models: Sequence[StoredModel]) -> list[str]:
    from edge_agent.models.catalogue import catalogue

    here = {model.name for model in models}
    return [name for name in catalogue() if name not in here]
