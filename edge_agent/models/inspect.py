"""What a model's file is: its family, what its numbers mean, and why one may think so.

Reads what the file says of itself; runs nothing. What the entry says comes first.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from edge_agent import plugins
from edge_agent.config import InferenceOptions, ModelOptions
from edge_agent.data import ModelFacts, Tensors
from edge_agent.errors import ConfigError, ModelError
from edge_agent.families import Family, Guess, Meaning, Thresholds
from edge_agent.families._metadata import file_labels

AUTO = "auto"


@dataclass(frozen=True, slots=True)
class Proposal:
    """A family for a model, and why, a sentence each; `others` might fit too. `confidence`: see `Guess`."""

    family: str
    because: Sequence[str]
    confidence: int = 3
    others: Sequence[str] = ()


def propose(facts: ModelFacts, family: str = AUTO, options: Collection[str] = ()) -> Proposal:
    """The family that fits a model best and knows all these options, or what the named one makes of it.

    Raises `ModelError`.
    """
    if family != AUTO:
        guess = _class_of(family).recognise(facts)
        because = [f"the entry says that its family is {family!r}"]
        return Proposal(family, [*because, *(guess.because if guess else ())])
    facts = _with_readable_labels(facts)
    knowing = [name for name in plugins.names("families") if set(options) <= _options_of(name)]
    guesses = {name: guess for name in knowing if (guess := _guess(name, facts))}
    if len(knowing) == 1 and not guesses:
        return Proposal(knowing[0], [f"options {', '.join(sorted(options))} are of no other family"])
    if not guesses:
        raise ModelError(_unknown(options))
    best = max(guesses, key=lambda name: (guesses[name].confidence, name))
    guess = guesses[best]
    others = [name for name in guesses if name != best and 0 < guesses[name].confidence == guess.confidence]
    return Proposal(best, guess.because, guess.confidence, others)


def make_family(
    facts: ModelFacts,
    entry: ModelOptions,
    labels: Sequence[str] | None,
    inference: InferenceOptions,
    tracked_from: float | None = None,
) -> tuple[Family, Proposal]:
    """The family that understands a model, as its file and its entry have it. Raises `ModelError` with a sentence
    where shapes, labels and options do not fit together."""
    facts = _as_the_entry_has_it(facts, entry)
    proposal = propose(facts, entry.family, entry.options)
    family_class = _class_of(proposal.family)
    try:
        options = msgspec.convert(entry.options, family_class.Options)
    except msgspec.ValidationError as error:
        raise ModelError(f"options: {error}{_of_family(entry, proposal)}") from error
    thresholds = Thresholds(inference.score_threshold, inference.iou_threshold, inference.max_detections, tracked_from)
    try:
        family = family_class(Meaning(facts, options, labels, entry.preprocess, thresholds))
    except ModelError as error:
        raise ModelError(f"{error}{_of_family(entry, proposal)}") from error
    if labels is not None and not family.names.labels:
        raise ModelError(f"the entry names {len(labels)} labels, the family {proposal.family!r} has no classes")
    if entry.dequantize:
        family = _dequantizing(family, entry.dequantize)
    return family, proposal


def _dequantizing(family: Any, by: Mapping[str, tuple[float, float]]) -> Family:
    """A family that gets real numbers, (value - zero point) * scale, of outputs in whole ones."""

    class Dequantizing(type(family)):  # type: ignore[misc]
        reduction = None

        def __init__(self) -> None:
            self.__dict__.update(vars(family))

        def reduce(self, outputs: Tensors) -> Sequence[Any]:
            real = dict(outputs)
            for name, (scale, zero_point) in by.items():
                real[name] = (outputs[name].astype(np.float32) - np.float32(zero_point)) * np.float32(scale)
            return super().reduce(real)  # type: ignore[no-any-return]

    return Dequantizing()


def _as_the_entry_has_it(facts: ModelFacts, entry: ModelOptions) -> ModelFacts:
    """Without the inputs that the entry gives values, and with the outputs that it makes real numbers of."""
    known = [tensor.name for tensor in facts.outputs]
    for name in entry.dequantize:
        if name not in known:
            raise ModelError(f"dequantize: the model has no output {name!r}{plugins.nearest(name, known)}")
    free = tuple(tensor for tensor in facts.inputs if tensor.name not in entry.inputs)
    outputs = tuple(
        dataclasses.replace(tensor, dtype="float32") if tensor.name in entry.dequantize else tensor
        for tensor in facts.outputs
    )
    return ModelFacts(free, outputs, facts.metadata)


def facts_of(path: Path) -> ModelFacts:
    """What an ONNX file or an engine says of itself, as the backend that runs it reads it. Raises `ModelError`,
    and `GpuUnavailable` for an engine where no GPU can be used."""
    name = "onnx" if path.suffix.lower() == ".onnx" else "tensorrt"
    try:
        engine_class = plugins.load("backends", name)
    except ConfigError as error:
        raise ModelError(str(error)) from error
    engine = engine_class(path, engine_class.Options())
    try:
        facts: ModelFacts = engine.facts
    finally:
        engine.close()
    return facts


def _with_readable_labels(facts: ModelFacts) -> ModelFacts:
    """For guessing alone: names that cannot be read are told when the family is made, and do not make it another."""
    try:
        file_labels(facts)
    except ModelError:
        readable = {key: value for key, value in facts.metadata.items() if key not in ("names", "id2label")}
        return dataclasses.replace(facts, metadata=readable)
    return facts


def _guess(name: str, facts: ModelFacts) -> Guess | None:
    try:
        guess: Guess | None = _class_of(name).recognise(facts)
    except ModelError:  # its metadata cannot be read, say; whoever is chosen will tell
        return None
    return guess


def _options_of(name: str) -> set[str]:
    return {field.encode_name for field in msgspec.structs.fields(_class_of(name).Options)}


def _unknown(options: Collection[str]) -> str:
    """Why no family has these options."""
    known = sorted(set().union(*(_options_of(name) for name in plugins.names("families"))))
    for option in options:
        if option not in known:
            return f"options: no family knows {option!r}{plugins.nearest(option, known, listing=False)}"
    return f"options: {', '.join(sorted(options))} are not of one family; set family"


def _class_of(name: str) -> Any:
    try:
        return plugins.load("families", name)
    except ConfigError as error:
        raise ModelError(str(error)) from error


def _of_family(entry: ModelOptions, proposal: Proposal) -> str:
    """Whose complaint it is, where nobody named the family."""
    return "" if entry.family != AUTO else f" (taken for the family {proposal.family!r}; set family if it is another)"
