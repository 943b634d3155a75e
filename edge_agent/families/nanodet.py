"""NanoDet and other heads that give each side of a box as a distribution (generalised focal loss).

One pair of tensors a level, [B, cells, C] class probabilities and [B, cells, 4 * bins] distances, or all in one
[B, cells of all levels, C + 4 * bins]. A side lies at the expected bin times the stride from the cell's centre
(Li et al., "Generalized Focal Loss", arXiv 2006.04388).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
from msgspec import Meta
from numpy.typing import NDArray

from edge_agent.config import Count, Table
from edge_agent.data import Candidates, Detections, ModelFacts, Names, PreprocessSpec, Tensors, TensorSpec
from edge_agent.errors import EngineError, ModelError
from edge_agent.families import Guess, Meaning
from edge_agent.families._boxes import BoxOptions, Floats, Selection, decoded, sigmoid, softmax
from edge_agent.families._metadata import file_labels, labels_of, require_real
from edge_agent.families._pictures import picture_spec, shown
from edge_agent.geometry import Placement

_SIDES = 4
_COMMON_BINS = (8, 11, 16, 17)
_MEAN_BGR = (103.53, 116.28, 123.675)
_STD_BGR = (57.375, 57.12, 58.395)


class NanoDetOptions(BoxOptions):
    """`[models.<name>.options]` of a NanoDet model. `center`: where a cell's centre lies in it, 0.5 in NanoDet, 0 in
    NanoDet-Plus; `bins`: of each side, where classes and distances share a tensor."""

    strides: Annotated[tuple[Count, ...], Meta(min_length=1)] | None = None
    center: float | None = None
    bins: Count | None = None
    scores: Literal["probabilities", "logits"] = "probabilities"


class NanoDetFamily:
    """Boxes with classes and scores."""

    Options: ClassVar[type[Table]] = NanoDetOptions
    takes_batches = True
    task = "detect"
    reduction = None

    @staticmethod
    def recognise(facts: ModelFacts) -> Guess | None:
        pairs = _pairs(facts)
        if pairs is None:
            return None
        bins = pairs[0][1].shape[2]
        assert bins is not None
        cells = ", ".join(str(classes.shape[1]) for classes, _ in pairs)
        because = [f"{len(pairs)} pairs of class scores and of 4 x {bins // _SIDES} bins, for {cells} cells"]
        return Guess(2, because)

    def __init__(self, meaning: Meaning) -> None:
        options = meaning.options
        assert isinstance(options, NanoDetOptions)
        # Trained without keeping the ratio, NanoDet takes the whole picture stretched.
        self.preprocess = picture_spec(meaning, color="bgr", scale=1.0, mean=_MEAN_BGR, std=_STD_BGR, resize="stretch")
        self._options = options
        require_real(meaning.facts, *(spec.name for spec in meaning.facts.outputs))
        pairs = _pairs(meaning.facts)
        self._pairs = None if pairs is None else [(classes.name, sides.name) for classes, sides in pairs]
        if pairs is None:
            classes, self._bins, self._output = self._shared(meaning, options)
            strides = options.strides or (8, 16, 32, 64)
        else:
            first_classes, first_sides = pairs[0]
            assert first_classes.shape[2] is not None
            assert first_sides.shape[2] is not None
            classes, self._bins, self._output = first_classes.shape[2], first_sides.shape[2] // _SIDES, ""
            strides = options.strides or (8, 16, 32, 64)[: len(pairs)]
            if len(strides) != len(pairs):
                raise ModelError(f"options.strides has {len(strides)} numbers, the model {len(pairs)} levels")
        center = options.center if options.center is not None else 0.5 if pairs else 0.0
        counts = [classes.shape[1] for classes, _ in pairs] if pairs else [None] * len(strides)
        self._centers, self._strides = _grid(self.preprocess, strides, center, counts)
        self.names = Names(labels_of(meaning.labels, meaning.facts, classes))
        self._selection = Selection(options, meaning.thresholds, self.names.labels)

    def reduce(self, outputs: Tensors) -> Sequence[Candidates]:
        if self._pairs is None:
            whole = outputs[self._output]
            scores, sides = whole[..., : len(self.names.labels)], whole[..., len(self.names.labels) :]
        else:
            scores = np.concatenate([outputs[classes] for classes, _ in self._pairs], 1)
            sides = np.concatenate([outputs[distances] for _, distances in self._pairs], 1)
        if scores.shape[1] != len(self._strides):
            raise EngineError(f"the model gave {scores.shape[1]} cells where its strides make {len(self._strides)}")
        return [self._reduce(*picture) for picture in zip(scores, sides, strict=True)]

    def decode(self, candidates: Candidates, placement: Placement) -> Detections:
        return decoded(candidates, self._selection, placement)

    def _reduce(self, raw: NDArray[Any], sides: NDArray[Any]) -> Candidates:
        with np.errstate(invalid="ignore"):
            scores = sigmoid(raw) if self._options.scores == "logits" else raw.astype(np.float32, copy=False)
            best = scores.max(1)
            cells = np.flatnonzero(best >= np.float32(self._selection.threshold))
        if len(cells) > self._options.top_k:
            cells = cells[np.argsort(-best[cells], kind="stable")[: self._options.top_k]]
        with np.errstate(invalid="ignore", over="ignore"):
            likely = softmax(sides[cells].reshape(len(cells), _SIDES, self._bins))
            distances = likely @ np.arange(self._bins, dtype=np.float32) * self._strides[cells, None]
        centers = self._centers[cells]
        corners = np.concatenate((centers - distances[:, :2], centers + distances[:, 2:]), 1)
        return Candidates(cells, corners.astype(np.float32), best[cells], scores[cells].argmax(1))

    def _shared(self, meaning: Meaning, options: NanoDetOptions) -> tuple[int, int, str]:
        """Classes, bins and the output, where one tensor holds all."""
        [*outputs] = meaning.facts.outputs
        if len(outputs) != 1 or len(outputs[0].shape) != 3 or outputs[0].shape[2] is None:
            listed = ", ".join(f"{spec.name} {shown(spec.shape)}" for spec in outputs)
            raise ModelError(
                "a NanoDet head is pairs of [batch, cells, classes] and [batch, cells, 4 * bins], or one tensor "
                f"[batch, cells, classes + 4 * bins]; this model's outputs are {listed}"
            )
        values = outputs[0].shape[2]
        labels = meaning.labels if meaning.labels is not None else file_labels(meaning.facts)
        bins = options.bins or ((values - len(labels)) // _SIDES if labels is not None else 8)
        if values - _SIDES * bins < 1:
            raise ModelError(f"{values} values a cell leave no room for classes beside 4 x {bins} bins")
        return values - _SIDES * bins, bins, outputs[0].name


Family = NanoDetFamily


def _pairs(facts: ModelFacts) -> list[tuple[TensorSpec, TensorSpec]] | None:
    """Class scores and distances by level, finest first; None where the outputs do not pair so."""
    by_cells: dict[int, list[TensorSpec]] = {}
    for spec in facts.outputs:
        if len(spec.shape) != 3 or spec.shape[1] is None or spec.shape[2] is None:
            return None
        by_cells.setdefault(spec.shape[1], []).append(spec)
    if len(by_cells) < 2 or any(len(specs) != 2 for specs in by_cells.values()):
        return None
    widths = {spec.shape[2] for spec in facts.outputs if spec.shape[2] is not None}
    sided = [width for width in widths if width % _SIDES == 0 and width // _SIDES in _COMMON_BINS]
    if len(widths) != 2 or not sided:
        return None
    labels = file_labels(facts)
    if len(sided) == 2 and labels is not None:
        sided = [width for width in sided if width != len(labels)]
    wide = min(sided)
    pairs = []
    for cells in sorted(by_cells, reverse=True):
        one, other = by_cells[cells]
        if {one.shape[2], other.shape[2]} != widths:
            return None
        pairs.append((other, one) if one.shape[2] == wide else (one, other))
    return pairs


def _grid(
    spec: PreprocessSpec, strides: Sequence[int], center: float, counts: Sequence[int | None]
) -> tuple[Floats, Floats]:
    """Each cell's centre in input pixels [N, 2], and its stride [N]. A cell that lies in the input in part counts
    unless the level has fewer."""
    centers, sizes = [], []
    for stride, count in zip(strides, counts, strict=True):
        height, width = math.ceil(spec.height / stride), math.ceil(spec.width / stride)
        if count == (spec.height // stride) * (spec.width // stride):
            height, width = spec.height // stride, spec.width // stride
        rows, columns = np.mgrid[0:height, 0:width]
        centers.append((np.stack((columns.ravel(), rows.ravel()), 1) + center) * stride)
        sizes.append(np.full(rows.size, stride))
    return np.concatenate(centers).astype(np.float32), np.concatenate(sizes).astype(np.float32)
