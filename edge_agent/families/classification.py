"""Classification: which classes a picture shows, [B, C] or [B, C, 1, 1]."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from edge_agent.config import Count, Positive, Table
from edge_agent.data import Classes, ModelFacts, Names, Tensors, TensorSpec
from edge_agent.errors import ModelError
from edge_agent.families import Guess, Meaning
from edge_agent.families._boxes import Floats, sigmoid, softmax
from edge_agent.families._metadata import file_labels, labels_of
from edge_agent.families._pictures import (
    IMAGENET,
    NORMAL,
    RGB_0_1,
    RGB_SIGNED,
    is_interleaved,
    outputs_of,
    picture_spec,
    shown,
)
from edge_agent.geometry import Placement


class ClassificationOptions(Table):
    """`[models.<name>.options]` of a classifier. `activation`: what makes scores of its values; `auto` is softmax,
    unless they are probabilities already. `output_scale`: of outputs in whole numbers, 1/256 if not given."""

    output: str | None = None
    top_k: Count = 5
    activation: Literal["auto", "softmax", "sigmoid", "none"] = "auto"
    output_scale: Positive | None = None
    normalize: Literal["auto", "none", "imagenet", "signed"] = "auto"


class ClassificationFamily:
    """The likeliest classes."""

    Options: ClassVar[type[Table]] = ClassificationOptions
    takes_batches = True
    task = "classify"
    reduction = None

    @staticmethod
    def recognise(facts: ModelFacts) -> Guess | None:
        told = facts.metadata.get("task") in ("classify", "image-classification")
        try:
            spec = _output(facts, None)
        except ModelError:
            return None
        labels = file_labels(facts)
        fits = labels is not None and _count(spec) == len(labels)
        if len(facts.outputs) > 1 and not told:
            return None
        because = [f"the output {spec.name!r} {shown(spec.shape)} is one value a class"]
        if told:
            because.append(f"the file says its task is {facts.metadata['task']!r}")
        common = _count(spec) in (1000, 1001, 21841)
        return Guess(3 if told else 2 if fits or common else 1, because)

    def __init__(self, meaning: Meaning) -> None:
        options = meaning.options
        assert isinstance(options, ClassificationOptions)
        spec = _output(meaning.facts, options.output)
        self._output = spec.name
        self.preprocess = picture_spec(meaning, **_preparation(meaning, options))
        self.names = Names(labels_of(meaning.labels, meaning.facts, _count(spec)))
        self._options = options
        self._is_multiple = options.activation == "sigmoid"
        self._threshold = meaning.thresholds.score

    def reduce(self, outputs: Tensors) -> Sequence[NDArray[Any]]:
        raw = outputs[self._output]
        return list(raw.reshape(len(raw), -1))

    def decode(self, candidates: NDArray[Any], placement: Placement) -> Classes:
        scores = self._scores(candidates)
        if self._is_multiple:  # any number of them, none included
            scores = np.where(scores >= self._threshold, scores, -1)
        best = np.argsort(-scores, kind="stable")[: self._options.top_k]
        best = best[scores[best] >= 0]
        return Classes(best.astype(np.int64), scores[best])

    def _scores(self, raw: NDArray[Any]) -> Floats:
        is_whole = raw.dtype.kind in "iu"
        if is_whole:
            raw = raw.astype(np.float32) * np.float32(self._options.output_scale or 1 / 256)
        values = np.nan_to_num(raw.astype(np.float32), nan=-1e4, posinf=1e4, neginf=-1e4)
        kind = self._options.activation
        if kind == "auto":
            # Rounded to a 256th, a thousand small probabilities may vanish.
            are_probabilities = float(np.min(values)) >= 0 and (is_whole or abs(float(values.sum()) - 1) < 0.05)
            kind = "none" if are_probabilities else "softmax"
        if kind == "softmax":
            return softmax(values)
        return sigmoid(values) if kind == "sigmoid" else np.clip(values, 0, 1)


Family = ClassificationFamily


def _output(facts: ModelFacts, wanted: str | None) -> TensorSpec:
    for spec in facts.outputs:
        if wanted in (None, spec.name) and len(spec.shape) >= 2 and _count(spec) > 1:
            return spec
    raise ModelError(f"a classifier gives [batch, classes]; this model's outputs are {outputs_of(facts)}")


def _count(spec: TensorSpec) -> int:
    """How many classes an output can be of; 0 where it is none."""
    sides = spec.shape[1:]
    large = [side for side in sides if side != 1]
    return large[0] if len(large) == 1 and large[0] is not None else 0


def _preparation(meaning: Meaning, options: ClassificationOptions) -> dict[str, Any]:
    """Centre crop as classifiers are trained; Ultralytics' take 0..1, TensorFlow's -1..1, others ImageNet's mean."""
    normal = NORMAL.get(options.normalize)
    if normal is None:
        told = meaning.facts.metadata.get("task") == "classify"
        normal = RGB_0_1 if told else RGB_SIGNED if is_interleaved(meaning.facts) else IMAGENET
    return {"resize": "crop", **normal}
