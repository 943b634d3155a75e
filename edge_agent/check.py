"""What would keep a configuration from working, found without starting anything."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from edge_agent import backends, plugins
from edge_agent.config import Config
from edge_agent.errors import ConfigError, ModelError
from edge_agent.models.loaded import open_model
from edge_agent.models.store import ModelStore
from edge_agent.sources import Source


@dataclass(frozen=True)
class Parts:
    """What an agent is made from."""

    device: str
    store: ModelStore
    backend: str
    backend_reason: str
    sources: Mapping[str, Source]


def gather(config: Config) -> Parts:
    """Find every part by its name. Imports modules and reads the disk; raises `ConfigError`."""
    backend, reason = _backend(config)
    store = ModelStore(config.models)
    _require_active(store, config)
    return Parts(config.device, store, backend, reason, _sources(config))


def check(config: Config) -> Iterator[str]:
    """One sentence for each thing that would not work; loads every model of the configuration once."""
    for name, source in _sources(config).items():
        if config.cameras[name].enabled:
            yield from (f"cameras.{name}: {problem}" for problem in source.check())
    store = ModelStore(config.models)
    try:
        _require_active(store, config)
    except ConfigError as error:
        yield str(error)
    try:
        backend, _ = _backend(config)
    except ConfigError as error:
        yield str(error)
        return
    wanted = [stored.name for stored in store if stored.origin == "config" or stored.name == config.model.active]
    for name in wanted:
        yield from _model_problems(store, name, backend, config)


def _model_problems(store: ModelStore, name: str, backend: str, config: Config) -> Iterator[str]:
    try:
        model = open_model(store.get(name), backend=backend, backends=config.backends, inference=config.inference)
    except ModelError as error:
        yield f"models.{name}: {error}"
        return
    except ConfigError as error:  # of the backend's own options, or what it needs installed
        yield str(error)
        return
    try:
        model.warm_up()
    except ModelError as error:
        yield f"models.{name}: {error}"
    finally:
        model.close()


def _sources(config: Config) -> dict[str, Source]:
    return {name: plugins.load("sources", camera.source)(camera) for name, camera in config.cameras.items()}


def _backend(config: Config) -> tuple[str, str]:
    name, reason = backends.choose(config.inference.backend)
    try:
        plugins.load("backends", name)
    except ConfigError as error:
        raise ConfigError(f"inference.backend: {error}") from error
    return name, reason


def _require_active(store: ModelStore, config: Config) -> None:
    try:
        store.get(config.model.active)
    except ModelError as error:
        raise ConfigError(f"model.active: {error}") from error
