"""`model.*`: what runs, and what the store keeps."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from typing import Any, Literal

import msgspec

from edge_agent import messages, plugins
from edge_agent.commands._base import Call, NoArguments, command
from edge_agent.config import Precision, Table
from edge_agent.errors import CommandError
from edge_agent.model_slot import Activation
from edge_agent.models.library import Download, Library, Tidied
from edge_agent.models.loading import Wanted
from edge_agent.models.store import NewModel


class ModelActivate(Table):
    """`model.activate`: `name` may be `name@version`; `swap`: None for the configured way, `backend` likewise."""

    name: str
    swap: Literal["beside", "replace"] | None = None
    backend: str | None = None


class ModelNamed(Table):
    """`model.show`, `model.remove`: `name` may be `name@version`."""

    name: str


class ModelVerify(Table):
    """`model.verify`: without a name, all of them."""

    name: str | None = None


class ModelRegister(Table):
    """`model.register`: `file` and `signature_file` are plain names in the store's uploads folder; `entry` holds keys
    of `[models.<name>]`, less `path`; `sha256` is what the file must have, if given."""

    file: str
    name: str
    version: str | None = None
    entry: dict[str, Any] = msgspec.field(default_factory=dict)
    sha256: str | None = None
    signature_file: str | None = None


class ModelFetch(Table):
    """`model.fetch`: a model of the catalogue by `name` alone; from anywhere else by `url` and `sha256`, both."""

    name: str
    url: str | None = None
    sha256: str | None = None
    version: str | None = None
    entry: dict[str, Any] = msgspec.field(default_factory=dict)
    signature_url: str | None = None


@command("model.list", NoArguments)
async def list_model(arguments: NoArguments, call: Call) -> messages.Models:
    """The models topic's payload, now."""
    return await call.agent.models()


@command("model.show", ModelNamed)
async def show_model(arguments: ModelNamed, call: Call) -> dict[str, Any]:
    """All that the registry knows of a model: files, inputs and outputs, engines, what was measured."""
    return await call.agent.look(lambda library: library.show(arguments.name))


@command("model.activate", ModelActivate, is_long=True)
async def activate_model(arguments: ModelActivate, call: Call) -> dict[str, Any]:
    """Put another model to work; the old one runs until the new one is warm, and again if that fails at once."""
    _require_known_backend(call, arguments.backend)
    return await _activated(call, Wanted(arguments.name, arguments.backend), arguments.swap)


@command("model.rollback", NoArguments, is_long=True)
async def rollback_model(arguments: NoArguments, call: Call) -> dict[str, Any]:
    """Activate the model that ran before the present one."""
    before = await call.agent.look(lambda library: library.fallback())
    return await _activated(call, Wanted(before), None)


@command("model.deactivate", NoArguments)
async def deactivate_model(arguments: NoArguments, call: Call) -> dict[str, Any]:
    """Close the model: no frame is inferred until another one is activated, or the agent starts again."""
    return {"previous": await call.agent.slot.deactivate()}


async def _activated(call: Call, wanted: Wanted, swap: Literal["beside", "replace"] | None) -> dict[str, Any]:
    def progress(phase: str, percent: float | None) -> None:
        call.on_cancel = call.agent.slot.abort  # from now on it is this one that builds
        call.progress(phase, percent)

    done: Activation = await call.agent.slot.activate(wanted, swap=swap, progress=progress)
    return {
        "id": done.id,
        "model": messages.model_of(done.model),
        "previous": done.previous,
        "load_ms": round(done.load_ms, 1),
        "warm_up_ms": round(done.warm_up_ms, 1),
        "swap_ms": round(done.swap_ms, 1),
        "pause_ms": round(done.pause_ms, 1) if done.pause_ms is not None else None,
        "probation_frames": done.probation_frames,
        "measured": done.measured,
    }


@command("model.register", ModelRegister, is_long=True)
async def register_model(arguments: ModelRegister, call: Call) -> dict[str, Any]:
    """Take a file from the uploads folder into the store."""

    _require_harmless(call, arguments.entry)

    def register(library: Library) -> dict[str, Any]:
        new = NewModel(
            library.upload(arguments.file),
            arguments.name,
            version=arguments.version,
            entry=arguments.entry,
            source=arguments.file,
            sha256=arguments.sha256,
        )
        signature = arguments.signature_file
        return library.show(library.register(new, library.upload(signature) if signature else None).id)

    return await call.agent.in_library(register)


@command("model.fetch", ModelFetch, is_long=True)
async def fetch_model(arguments: ModelFetch, call: Call) -> dict[str, Any]:
    """Download a model into the store."""
    _require_harmless(call, arguments.entry)
    wanted = Download(**msgspec.structs.asdict(arguments))

    def fetch(library: Library) -> dict[str, Any]:
        return library.show(library.fetch(wanted, call.progress, lambda: call.is_cancelled).id)

    try:
        return await call.agent.in_library(fetch)
    except asyncio.CancelledError:
        call.is_cancelled = True
        raise


@command("model.remove", ModelNamed)
async def remove_model(arguments: ModelNamed, call: Call) -> dict[str, Any]:
    """Delete a model of the store, with its engines; never the active one or its fallback."""
    return {"removed": await call.agent.in_library(lambda library: library.remove(arguments.name))}


@command("model.verify", ModelVerify, is_long=True)
async def verify_model(arguments: ModelVerify, call: Call) -> dict[str, Any]:
    """Whether each stored file is still what it was."""
    verdicts = await call.agent.in_library(lambda library: library.verify(arguments.name, call.progress))
    return {"files": verdicts, "sound": all(verdict.state == "ok" for verdict in verdicts)}


@command("model.gc", NoArguments, is_long=True)
async def gc_model(arguments: NoArguments, call: Call) -> Tidied:
    """Remove engines that fit nothing here, and what killed processes left behind."""
    return await call.agent.in_library(lambda library: library.tidy())


class ModelBuild(Table):
    """`model.build`: `precision`: None for the model's own or `[backends.tensorrt]`'s."""

    name: str
    precision: Precision | None = None


class ModelCalibrate(Table):
    """`model.calibrate`: `pictures` is a folder in the store's uploads folder, with some hundred that are like the
    camera's."""

    name: str
    pictures: str


class ModelBenchmark(Table):
    """`model.benchmark`: `inferences` of one picture, `seconds` at most."""

    name: str
    inferences: int = 200
    seconds: float = 20.0
    backend: str | None = None


@command("model.build", ModelBuild, is_long=True)
async def build_model(arguments: ModelBuild, call: Call) -> dict[str, Any]:
    """Have the engine of a model ready, so that activating it takes no building."""
    return await _built(call, arguments.name, precision=arguments.precision)


@command("model.calibrate", ModelCalibrate, is_long=True)
async def calibrate_model(arguments: ModelCalibrate, call: Call) -> dict[str, Any]:
    """Build the INT8 engine of a model with these pictures; its agreement with the ONNX file is in the reply."""
    return await _built(call, arguments.name, precision="int8", pictures=arguments.pictures)


async def _built(call: Call, name: str, *, precision: Precision | None, pictures: str | None = None) -> dict[str, Any]:
    def on_begin(abort: Callable[[], None]) -> None:
        call.on_cancel = abort
        call.progress("build", None)

    return await call.agent.in_library(
        lambda library: library.build(
            name,
            call.progress,
            precision=precision,
            pictures=library.uploaded_folder(pictures) if pictures is not None else None,
            on_begin=on_begin,
        )
    )


@command("model.benchmark", ModelBenchmark, is_long=True)
async def benchmark_model(arguments: ModelBenchmark, call: Call) -> messages.Measurement:
    """Load a model beside the running one and measure it; kept in the registry. What runs meanwhile slows it."""
    if not (1 <= arguments.inferences <= 100_000 and 0 < arguments.seconds <= 600):
        raise CommandError("1 to 100000 inferences, and 600 seconds at most", code="bad_arguments")
    _require_known_backend(call, arguments.backend)
    return await call.agent.slot.measure(
        Wanted(arguments.name, arguments.backend),
        inferences=arguments.inferences,
        within_s=arguments.seconds,
        progress=call.progress,
    )


def _require_known_backend(call: Call, name: str | None) -> None:
    """A command may not have a module imported that the configuration does not name."""
    config = call.agent.config
    known = {*plugins.names("backends"), *config.backends, config.inference.backend, config.inference.fallback}
    if name is not None and name not in known:
        raise CommandError(f"backend {name!r}: a command may name {', '.join(sorted(known - {''}))}", code="forbidden")


def _require_harmless(call: Call, entry: Mapping[str, Any]) -> None:
    """Of an entry that came over the network: it names no folder of this machine, and no module."""
    if "calibration" in entry:
        raise CommandError("calibration: a command names pictures by model.calibrate", code="forbidden")
    family = str(entry.get("family", "auto"))
    known = {"auto", *plugins.names("families"), *(one.family for one in call.agent.config.models.entries.values())}
    if family not in known:
        raise CommandError(f"family {family!r}: a command may name {', '.join(sorted(known))}", code="forbidden")
