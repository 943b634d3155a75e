"""`edgectl models bench`: what a model takes here, measured and kept in the registry."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path

import msgspec
import typer

from edge_agent import logs
from edge_agent.messages import Measurement, Throughput
from edge_agent.models.loading import Wanted
from edge_agent.models.store import ModelStore
from edgectl._bench import loader, throughput
from edgectl._config import models_configuration
from edgectl._models import found
from edgectl._progress import progress

_SHARE = 0.25  # of the seconds, for throughput


def bench(
    model: str,
    settings: Sequence[str],
    path: Path | None,
    *,
    backend: str,
    inferences: int,
    seconds: float,
    as_json: bool,
) -> None:
    """Measure and print. Raises `EdgeAgentError` with a sentence."""
    logs.configure(level="error", format="console", stream=sys.stderr)
    loaded = models_configuration(path)
    store, name = found(model, settings, loaded)
    wanted = Wanted(name, purpose="relief")
    with progress("load") as tell:
        line = loader(store, loaded, backend=backend)
        measured = line.measure(wanted, inferences=inferences, within_s=seconds * (1 - _SHARE), progress=tell)
        with closing(line.prepare(wanted, tell).model) as running:
            tell("throughput", None)
            most = throughput(running, within_s=seconds * _SHARE)
    measured = msgspec.structs.replace(measured, throughput=most)
    stored = store.get(name)
    store.record(stored, measured, stored.entry.engines if stored.entry else ())
    is_kept = _is_recorded(store, name, measured)
    if as_json:
        told = {"id": stored.id, "measured": measured, "recorded": is_kept}
        typer.echo(json.dumps(msgspec.to_builtins(told), indent=2))
        return
    typer.echo("\n".join(_lines(stored.id, measured, most)))
    typer.echo(
        f"recorded in {store.folder}" if is_kept else "not recorded: a file, or a model with --set, is in no registry"
    )


def _is_recorded(store: ModelStore, name: str, measured: Measurement) -> bool:
    entry = store.get(name).entry
    return entry is not None and measured in entry.measured


def _lines(model: str, measured: Measurement, most: Throughput) -> Iterator[str]:
    where, latency, memory = measured.where, measured.latency_ms, measured.memory_mb
    way = [f"{where.size[0]}x{where.size[1]}", where.precision, where.power_mode]
    yield f"{model}  {where.runtime} on {where.device}  {' '.join(filter(None, way))}"
    figures = f"p50 {latency.p50:.2f} ms   p95 {latency.p95:.2f} ms   p99 {latency.p99:.2f} ms"
    yield f"latency     {figures}   of {latency.n} inferences of one picture"
    how = f"batches of {most.batch}, {most.in_flight} in flight, {most.pictures} pictures"
    yield f"throughput  {most.pictures_per_s:.1f} pictures/s   {how}"
    yield f"memory      process {memory.rss_before:.0f} -> {memory.rss_after:.0f} MB{_of_gpu(measured)}"


def _of_gpu(measured: Measurement) -> str:
    memory = measured.memory_mb
    if memory.gpu_before is None or memory.gpu_after is None:
        return ""
    return f"   GPU {memory.gpu_before:.0f} -> {memory.gpu_after:.0f} MB"
