"""`edgectl report`: what a bug report needs, in one folder, without secrets."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import typer

from edge_agent import config as configuration
from edge_agent.config import Config
from edge_agent.errors import ConfigError
from edge_agent.messages import Topics, timestamp
from edgectl._config import config_file
from edgectl._progress import Tell, progress
from edgectl.report import _collect, _secrets
from edgectl.report._collect import ReportError
from edgectl.report._heard import FrameTimes, Heard, listen
from edgectl.report._page import Collected, page
from edgectl.report._secrets import Secrets

_FILES = {
    "index.html": "this page",
    "agent.json": "what the agent said last on each topic: status, health, models, cameras",
    "stats.jsonl": "each of its statistics",
    "latency.csv": "how long each frame took, by stage, in ms; nothing of what was seen",
    "doctor.json": "what edgectl doctor found",
    "config.json": "the configuration, without passwords",
    "models.json": "models on this machine",
    "log.txt": "the agent's log",
    "versions.txt": "system, Python and its packages",
}


class _Folder:
    """Where the report is put; whatever is written has been cleared of secrets."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
            if any(path.iterdir()):
                raise ReportError(f"{path} is not empty; give the name of a new folder")
        except FileExistsError as error:
            raise ReportError(f"{path} is a file; give the name of a new folder") from error
        except OSError as error:
            raise ReportError(f"{path} cannot be made: {error.strerror or error}") from error

    def write(self, name: str, text: str) -> None:
        try:
            (self.path / name).write_text(text, encoding="utf-8")
        except OSError as error:
            raise ReportError(f"{self.path / name} cannot be written: {error.strerror or error}") from error


def report(
    folder: Path, given: Path | None, *, device: str, seconds: float, log: Path | None, unit: str, as_json: bool
) -> None:
    """Collect, write, and say what was collected. Raises `ReportError`, `ConfigError`."""
    path = config_file(given)
    loaded, raw, notes = _configuration(path)
    name = device or (loaded.device if loaded else "unknown device")
    secrets = _secrets.of(raw, loaded, path.parent if path else Path())
    log_text, log_source = _collect.log_file(log) if log else ("", "")
    into = _Folder(folder)
    with progress() as tell:
        found = list(_collect.findings(path, tell))
        heard = _heard(loaded, name, seconds, tell)
        if log is None:
            tell("reading the journal", None)
            log_text, log_source = _collect.journal(unit)
    models, trouble = _collect.models(loaded)
    notes += [*heard.troubles, *([trouble] if trouble else [])]
    collected = Collected(
        device=name,
        at=timestamp(time.time_ns()),
        versions=_collect.versions(),
        heard=_without(heard, secrets),
        findings=secrets.value(found),
        config=secrets.value(raw),
        models=secrets.value(models),
        log=secrets.text(log_text),
        log_source=secrets.text(log_source),
        notes=[secrets.text(note) for note in notes],
        files=_FILES,
    )
    _write(into, collected)
    _tell(folder, collected, as_json=as_json)


def _configuration(path: Path | None) -> tuple[Config | None, Mapping[str, Any], list[str]]:
    """What could be read of the file, its tables as they are, and what is wrong with it."""
    if path is None:
        return Config(), {}, ["There is no configuration file: the built-in defaults were taken."]
    try:
        raw = configuration.read(path)
    except ConfigError as error:
        return None, {}, [str(error)]
    try:
        return configuration.parse(raw, folder=path.parent), raw, []
    except ConfigError as error:
        return error.usable, raw, list(error.problems)


def _heard(loaded: Config | None, device: str, seconds: float, tell: Tell) -> Heard:
    if loaded is None:
        return Heard(troubles=["The agent was not listened to: without its configuration nobody knows where it is."])
    return listen(loaded, Topics(loaded.mqtt.prefix, device), seconds, tell)


def _without(heard: Heard, secrets: Secrets) -> Heard:
    stats = [dataclasses.replace(one, stats=secrets.value(one.stats)) for one in heard.stats]
    return dataclasses.replace(heard, last=secrets.value(heard.last), stats=stats)


def _write(into: _Folder, of: Collected) -> None:
    into.write("agent.json", _json(of.heard.last))
    into.write("stats.jsonl", "".join(f"{json.dumps(one.stats, ensure_ascii=False)}\n" for one in of.heard.stats))
    into.write("latency.csv", _csv(of.heard))
    into.write("doctor.json", _json(of.findings))
    into.write("config.json", _json(of.config))
    into.write("models.json", _json(of.models))
    into.write("log.txt", of.log or f"{of.log_source}\n")
    into.write("versions.txt", "".join(f"{f'{name} {version}'.strip()}\n" for name, version in of.versions.items()))
    into.write("index.html", page(of))


def _csv(heard: Heard) -> str:
    out = io.StringIO()
    names = [field.name for field in dataclasses.fields(FrameTimes)]
    rows = csv.DictWriter(out, names, lineterminator="\n")
    rows.writeheader()
    rows.writerows(dataclasses.asdict(frame) for frame in heard.frames)
    return out.getvalue()


def _json(value: Any) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


def _tell(folder: Path, of: Collected, *, as_json: bool) -> None:
    heard = of.heard
    if as_json:
        told = {
            "folder": str(folder),
            "files": list(of.files),
            "device": of.device,
            "listened_s": heard.listened_s,
            "stats": len(heard.stats),
            "results": len(heard.frames),
            "log_lines": len(of.log.splitlines()),
            "notes": list(of.notes),
        }
        typer.echo(_json(told), nl=False)
        return
    for note in of.notes:
        typer.echo(f"note: {note}", err=True)
    told_of = f"{len(heard.stats)} statistics and {len(heard.frames)} results of {heard.listened_s:g} s"
    typer.echo(f"{folder / 'index.html'}: {told_of}, {len(of.log.splitlines())} lines of log")
    typer.echo("No passwords are in it; look through it for names and addresses before you attach it.")
