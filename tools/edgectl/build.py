"""`edgectl models build|calibrate`: an ONNX file becomes a TensorRT engine, for this machine or for another."""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import msgspec
import typer

from edge_agent import logs
from edge_agent.backends import _trt
from edge_agent.backends.tensorrt import TensorRtEngine, TensorRtOptions
from edge_agent.check import engines_of, library_of
from edge_agent.config import Config, ModelOptions, Precision
from edge_agent.errors import ConfigError, ModelError
from edge_agent.models.engines import Engines, Platform, Sidecar, is_built
from edge_agent.models.store import StoredModel
from edgectl._config import models_configuration
from edgectl._models import found
from edgectl._progress import Tell, progress


def build(
    name: str,
    settings: Sequence[str],
    path: Path | None,
    *,
    precision: str | None,
    images: Path | None,
    target: str | None,
    out: Path | None,
    as_json: bool,
) -> None:
    """Have the engine ready and say what it is. Raises `EdgeAgentError` with a sentence."""
    logs.configure(level="error", format="console", stream=sys.stderr)
    if precision is not None and precision not in get_args(Precision):
        raise typer.BadParameter(f"--precision {precision}: one of {', '.join(get_args(Precision))}")
    if (target is None) != (out is None):
        raise typer.BadParameter("--target and --out go together: an engine for another GPU goes into a file")
    loaded = models_configuration(path)
    store, model = found(name, settings, loaded)
    chosen: Precision | None = msgspec.convert(precision, Precision | None)
    with progress("build") as tell:
        if target is not None and out is not None:
            told = _for_another(_changed(store.get(model), chosen, images), loaded, target, out, tell)
        else:
            if lacks := TensorRtEngine.unavailable(_options(loaded)):
                raise ModelError(f"{model}: no engine can be built for this machine: {lacks}")
            library = library_of(loaded, store, engines_of("tensorrt", loaded))
            told = library.build(model, tell, precision=chosen, pictures=images)
    typer.echo(json.dumps(told, indent=2) if as_json else "\n".join(_lines(told, images, is_elsewhere=bool(target))))


def _for_another(stored: StoredModel, loaded: Config, target: str, out: Path, tell: Tell) -> Mapping[str, Any]:
    """Build for a GPU that is not here, known by its compute capability, into a file with its facts beside it."""
    if not is_built(stored):
        raise ModelError(f"{stored.name}: {stored.path.name} is an engine already; engines are built from ONNX files")
    if not out.parent.is_dir():  # minutes before it would be missed
        raise ConfigError(f"--out {out}: there is no folder {out.parent}")
    options = _options(loaded)
    runtime = _trt.name_of(_trt.library(options.library))
    platform = Platform(runtime, f"any of compute capability {target}", target, "unknown")
    with tempfile.TemporaryDirectory(prefix="edgectl-") as scratch:
        engines = Engines(msgspec.structs.replace(options, engines=scratch), platform=platform, target=target)
        built = engines.get(dataclasses.replace(stored, origin="config"), loaded.inference, tell)
        sidecar = engines.sidecar(built)
        try:
            shutil.copyfile(built, out)
            shutil.copyfile(built.with_suffix(".json"), out.with_suffix(".json"))
        except OSError as error:
            raise ConfigError(f"--out {out}: {error.strerror}") from error
    return {"id": stored.id, "engine": str(out), **_facts(sidecar)}


def _options(loaded: Config) -> TensorRtOptions:
    options = loaded.backends.get("tensorrt") or TensorRtOptions()
    assert isinstance(options, TensorRtOptions)
    return options


def _changed(stored: StoredModel, precision: Precision | None, images: Path | None) -> StoredModel:
    options: ModelOptions = stored.options
    if precision is not None:
        options = msgspec.structs.replace(options, precision=precision)
    if images is not None:
        options = msgspec.structs.replace(options, calibration=str(images))
    return dataclasses.replace(stored, options=options)


def _facts(sidecar: Sidecar) -> Mapping[str, Any]:
    return {
        "precision": sidecar.key.precision,
        "size_bytes": sidecar.engine_bytes,
        "build_s": sidecar.build_s,
        "built_at": sidecar.built_at,
        "tensorrt": sidecar.key.platform.tensorrt,
        "compute_capability": sidecar.key.platform.compute_capability,
        "agreement": msgspec.to_builtins(sidecar.agreement),
    }


def _lines(told: Mapping[str, Any], images: Path | None, *, is_elsewhere: bool) -> Sequence[str]:
    size, agreement = told["size_bytes"] / 1e6, told["agreement"]
    lines = [
        f"{told['id']}: {told['precision']} engine {told['engine']}, {size:.1f} MB, "
        f"built at {told['built_at']} in {told['build_s']:g} s"
    ]
    if agreement is not None:
        by = f"{agreement['measure']}, {agreement['pictures']} pictures"
        lines.append(f"  agrees with its ONNX file to {agreement['score']:.3f} ({by})")
    if is_elsewhere:
        lines.append(f"  for {told['tensorrt']} on GPUs of compute capability {told['compute_capability']}")
        lines.append("  not compared with its ONNX file: it does not run here")
    elif images is not None:
        lines.append(f'  to run it: precision = "{told["precision"]}" and calibration = "{images}" in its entry')
    return lines
