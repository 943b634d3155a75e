"""The configuration, and the models and engines that it names."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from edge_agent import backends
from edge_agent.check import check, engines_of, store_of
from edge_agent.config import Config
from edge_agent.errors import ConfigError, EdgeAgentError, ModelError
from edge_agent.models.engines import Engines, is_built
from edge_agent.models.store import ModelStore, StoredModel
from edgectl._config import SERVICE
from edgectl.doctor._subject import Subject
from edgectl.doctor._words import Finding

_SAME = "`edge-agent check` shows the same"


def file(subject: Subject) -> Iterator[Finding]:
    """Every mistake in the file."""
    if subject.path is None:
        fact = f"neither config.toml here nor {SERVICE}: the built-in defaults are looked at"
        yield Finding("warn", "config", fact, "give the agent's own file with --config")
        return
    for sentence in subject.reading.moved:
        yield Finding("warn", "config", sentence, f"correct {subject.path}")
    for problem in subject.reading.problems:
        yield Finding("fail", "config", problem, f"correct {subject.path}; {_SAME}")
    if not subject.reading.problems:
        yield Finding("ok", "config", str(subject.path))


def models(subject: Subject) -> Iterator[Finding]:
    """Each camera's settings, each model of the configuration run once, and the engines that are there."""
    loaded = subject.config
    if loaded is None:
        return
    problems = list(check(loaded))
    for problem in problems:
        what = problem.split(".")[0].rstrip("s") if problem.startswith(("cameras.", "models.")) else "config"
        yield Finding("fail", what, problem, _SAME)
    for name, camera in loaded.cameras.items():
        if subject.path is not None and camera.enabled and not _is_blamed(f"cameras.{name}", problems):
            yield Finding("ok", "camera", f"{name}: its settings fit together ({camera.source}; it was not opened)")
    try:
        yield from _stored(loaded, problems)
    except EdgeAgentError as error:
        yield Finding("fail", "model", str(error), "edgectl models verify")


def _stored(loaded: Config, problems: Sequence[str]) -> Iterator[Finding]:
    store, engines = store_of(loaded), _engines(loaded)
    named = [model.name for model in store if model.origin == "config"]
    for name in dict.fromkeys([loaded.model.active, *loaded.policy.ladder, *named]):
        if _is_blamed(f"models.{name}", problems):
            continue
        if (model := _found(store, name)) is None:
            continue  # it is among the problems already
        was_run = name == loaded.model.active or name in named
        yield Finding("ok", "model", f"{model.id}: {'ran once here' if was_run else 'is there'}")
        if engines is not None and is_built(model):
            yield _engine(model, engines, loaded)


def _engine(model: StoredModel, engines: Engines, loaded: Config) -> Finding:
    records = engines.records(model, loaded.inference)
    fitting = [record for record in records if record.fits]
    if fitting:
        told = ", ".join(f"{record.precision} of {record.tensorrt}" for record in fitting)
        return Finding("ok", "engine", f"{model.id}: {told}")
    fact = (
        f"{model.id}: none of {len(records)} engines is for this machine" if records else f"{model.id}: none built yet"
    )
    fix = f"edgectl cmd model.build name={model.id}, or let the agent build it; until then the CPU runs the model"
    return Finding("warn", "engine", fact, fix)


def _engines(loaded: Config) -> Engines | None:
    options = loaded.inference
    try:
        chosen = backends.choose(options.backend, fallback=options.fallback, options=loaded.backends)
        return engines_of(chosen.name, loaded)
    except ConfigError:  # `check` has told
        return None


def _found(store: ModelStore, name: str) -> StoredModel | None:
    try:
        return store.get(name)
    except ModelError:
        return None


def _is_blamed(key: str, problems: Sequence[str]) -> bool:
    return any(problem.startswith((f"{key}:", f"{key}.")) for problem in problems)
