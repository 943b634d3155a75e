"""What would keep a configuration from working, found without starting anything."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from edge_agent import backends, mqtt_client, plugins
from edge_agent.backends import Choice
from edge_agent.config import Config, models_directory
from edge_agent.data import Image
from edge_agent.errors import ConfigError, GpuLost, GpuUnavailable, ModelError
from edge_agent.models.engines import Engines, is_built
from edge_agent.models.library import Library
from edge_agent.models.loaded import open_model
from edge_agent.models.loading import ModelLoader
from edge_agent.models.store import ModelStore
from edge_agent.sensors.throttling import ThrottlingSensor
from edge_agent.signing import Signatures
from edge_agent.sources import Source
from edge_agent.tracking import Tracks, tracks_of


@dataclass(frozen=True)
class Parts:
    """What an agent is made from. `depth`: how many batches the backend may have on their way at once."""

    device: str
    store: ModelStore
    library: Library
    loader: ModelLoader
    backend: Choice
    new_image: Callable[[tuple[int, ...]], Image]
    depth: int
    engines: Engines | None
    sources: Mapping[str, Source]
    signatures: Signatures
    tracks: Tracks | None


def gather(config: Config) -> Parts:
    """Find every part by its name. Imports modules and reads the disk; raises `ConfigError`."""
    choice = _choice(config)
    store = store_of(config)
    _require_active(store, config)
    engines, tracks = engines_of(choice.name, config), tracks_of(config)
    loader = ModelLoader(
        store,
        backend=choice.name,
        backends=config.backends,
        engines=engines,
        inference=config.inference,
        choice=config.model,
        policy=config.policy,
        tracked_from=config.tracking.low if tracks else None,
        power_mode=ThrottlingSensor().mode,
    )
    engine = plugins.load("backends", choice.name)
    depth = getattr(config.backends.get(choice.name) or engine.Options(), "depth", 1)
    signatures = Signatures(config.mqtt.command_public_key_file)
    library = library_of(config, store, engines_of(choice.name, config))
    return Parts(
        config.device,
        store,
        library,
        loader,
        choice,
        engine.new_image,
        depth,
        engines,
        _sources(config),
        signatures,
        tracks,
    )


def check(config: Config) -> Iterator[str]:
    """One sentence for each thing that would not work; loads every model of the configuration once."""
    for name, source in _sources(config).items():
        if config.cameras[name].enabled:
            yield from (f"cameras.{name}: {problem}" for problem in source.check())
    store = store_of(config)
    try:
        _require_active(store, config)
    except ConfigError as error:
        yield str(error)
    for find in (
        lambda: tracks_of(config),
        lambda: mqtt_client.check(config.mqtt),
        lambda: Signatures(config.mqtt.command_public_key_file),
    ):
        try:
            find()
        except ConfigError as error:
            yield str(error)
    try:
        backend = _choice(config).name
    except ConfigError as error:
        yield str(error)
        return
    for name in config.policy.ladder:
        try:
            store.get(name)
        except ModelError as error:
            yield f"policy.ladder: {error}"
    named = [stored.name for stored in store if stored.origin == "config"]
    for name in dict.fromkeys([*named, config.model.active]):
        yield from _model_problems(store, name, backend, config)


def _model_problems(store: ModelStore, name: str, backend: str, config: Config) -> Iterator[str]:
    try:
        stored = store.get(name)
        engines = engines_of(backend, config)
        if engines and is_built(stored) and engines.find(stored, config.inference) is None:
            backend = "onnx"  # building takes minutes; the file itself can be looked at now
        model = open_model(stored, backend=backend, backends=config.backends, inference=config.inference)
    except (ModelError, GpuUnavailable, GpuLost) as error:
        yield f"models.{name}: {error}"
        return
    except ConfigError as error:  # of the backend's own options, or what it needs installed
        yield str(error)
        return
    try:
        model.warm_up()
    except (ModelError, GpuLost) as error:
        yield f"models.{name}: {error}"
    finally:
        model.close()


def _sources(config: Config) -> dict[str, Source]:
    return {name: plugins.load("sources", camera.source)(camera) for name, camera in config.cameras.items()}


def _choice(config: Config) -> Choice:
    wanted, fallback = config.inference.backend, config.inference.fallback
    try:
        return backends.choose(wanted, fallback=fallback, options=config.backends)
    except ConfigError as error:
        raise ConfigError(f"inference.backend: {error}") from error


def engines_of(backend: str, config: Config) -> Engines | None:
    """The engines that a backend builds, if it builds any."""
    engine_class = plugins.load("backends", backend)
    return Engines(config.backends.get(backend) or engine_class.Options()) if engine_class.is_built else None


def store_of(config: Config) -> ModelStore:
    """The models of a configuration, and those of its store."""
    return ModelStore(config.models.entries, models_directory(config))


def library_of(config: Config, store: ModelStore, engines: Engines | None) -> Library:
    """What can be done to the store; the models that the configuration names are in use."""
    named = [config.model.active, *config.policy.ladder]
    return Library(store, options=config.fetch, inference=config.inference, engines=engines, in_use=lambda: named)


def _require_active(store: ModelStore, config: Config) -> None:
    try:
        store.get(config.model.active)
    except ModelError as error:
        raise ConfigError(f"model.active: {error}") from error
