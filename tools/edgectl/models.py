"""`edgectl models`: what a model's file is, and why one may think so."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import typer

from edge_agent import logs
from edge_agent.config import InferenceOptions
from edge_agent.data import ModelFacts, TensorSpec
from edge_agent.errors import ModelError
from edge_agent.models.inspect import facts_of, make_family, propose
from edgectl._config import models_configuration
from edgectl._models import found

_LONGEST = 200  # of metadata that is shown
_CERTAINTY = ("nothing fits better", "a guess", "likely", "sure")
_PRESETS = {
    80: "coco80",
    90: "coco90",
    91: "coco91",
    21: "voc21",
    19: "cityscapes19",
    150: "ade150",
    1000: "imagenet1000",
}


def inspect(model: str, settings: Sequence[str], path: Path | None, *, as_json: bool) -> int:
    """Print what a model's file says and what it is taken for; 1 where nothing fits together, else 0."""
    logs.configure(level="warning", format="console", stream=sys.stderr)
    store, name = found(model, settings, models_configuration(path))
    stored = store.get(name)
    facts = facts_of(stored.path)
    told = _facts(facts)
    try:
        family, proposal = make_family(facts, stored.options, stored.labels(), InferenceOptions())
    except ModelError as error:
        told["family"] = propose(facts, stored.options.family, stored.options.options).family
        told["problem"] = str(error)
    else:
        told["family"] = proposal.family
        told["task"] = family.task
        told["certainty"] = _CERTAINTY[proposal.confidence]
        told["because"] = list(proposal.because)
        told["others"] = list(proposal.others)
        told["labels"] = list(family.names.labels)
        told["keypoints"] = list(family.names.keypoints)
        told["preprocess"] = {
            field.name: getattr(family.preprocess, field.name) for field in dataclasses.fields(family.preprocess)
        }
    typer.echo(json.dumps(told, indent=2) if as_json else "\n".join(_lines(told)))
    return int("problem" in told)


def _facts(facts: ModelFacts) -> dict[str, Any]:
    return {
        "inputs": [_tensor(spec) for spec in facts.inputs],
        "outputs": [_tensor(spec) for spec in facts.outputs],
        "metadata": dict(facts.metadata),
    }


def _tensor(spec: TensorSpec) -> dict[str, Any]:
    return {"name": spec.name, "shape": list(spec.shape), "dtype": spec.dtype}


def _lines(told: dict[str, Any]) -> Iterator[str]:
    for side in ("inputs", "outputs"):
        for spec in told[side]:
            shape = ", ".join("?" if size is None else str(size) for size in spec["shape"])
            yield f"{side[:-1]:<11} {_printable(spec['name'])}  [{shape}]  {spec['dtype']}"
    for key, value in told["metadata"].items():
        yield f"metadata    {_printable(key)} = {_printable(value[:_LONGEST])}{'…' if len(value) > _LONGEST else ''}"
    certainty = f"  ({told['certainty']})" if "certainty" in told else ""
    yield f"family      {told['family']}{certainty}"
    if "problem" in told:
        yield f"problem     {told['problem']}"
        return
    yield f"task        {told['task']}"
    yield from (f"because     {reason}" for reason in told["because"])
    if told["others"]:
        yield f"or perhaps  {', '.join(told['others'])}"
    if told["labels"]:
        labels = told["labels"]
        yield f"labels      {len(labels)}: {_some(labels)}"
        fits = told["task"] == "classify" or len(labels) != 1000  # detectors may not say how many they have
        if fits and labels[0] == "class_0" and (preset := _PRESETS.get(len(labels))):
            yield f"            nothing names them; {len(labels)} are often {preset}: --set labels={preset}"
    if told["keypoints"]:
        yield f"keypoints   {len(told['keypoints'])}: {_some(told['keypoints'])}"
    spec = told["preprocess"]
    size = f"{spec['width']}x{spec['height']}"
    where = f", {spec['anchor']}, pad {spec['pad']}" if spec["resize"] == "letterbox" else ""
    yield f"picture     {size} {spec['layout']} {spec['dtype']}, {spec['color']}, {spec['resize']}{where}"
    yield f"pixels      (value * {spec['scale']:.6g} - {spec['mean']}) / {spec['std']}"
    yield "            colour and pixels are what such models usually take: the file does not say"


def _some(names: Sequence[str]) -> str:
    """The first of them, on one line."""
    return f"{', '.join(_printable(name) for name in names[:6])}{', …' if len(names) > 6 else ''}"


def _printable(text: str) -> str:
    """Text from a file, with nothing in it that a terminal would obey."""
    return "".join(sign if sign.isprintable() else "\N{REPLACEMENT CHARACTER}" for sign in text)
