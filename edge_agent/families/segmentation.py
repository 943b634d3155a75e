"""Semantic segmentation: a class for every pixel, and the regions that are of one.

Outputs: one value a class, [B, C, H, W] or [B, H, W, C] (C = 1: one logit, of what is not background), or the classes
themselves, [B, H, W] or [B, 1, H, W] whole numbers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, Literal

import cv2
import numpy as np
from numpy.typing import NDArray

from edge_agent.config import Share, Table
from edge_agent.data import ModelFacts, Names, Region, Segmentation, Tensors, TensorSpec
from edge_agent.errors import ModelError
from edge_agent.families import Guess, Meaning
from edge_agent.families._boxes import Floats, sigmoid
from edge_agent.families._metadata import file_labels, labels_of
from edge_agent.families._palettes import palette
from edge_agent.families._pictures import (
    IMAGENET,
    NORMAL,
    RGB_0_1,
    RGB_SIGNED,
    are_channels_last,
    is_interleaved,
    outputs_of,
    picture_spec,
    shown,
)
from edge_agent.geometry import Placement

_MOST_CLASSES = 65_535
_LARGEST = 1e4  # of a logit; e to the difference of two is 0 or 1 long before
_BACKGROUND = ("background", "__background__", "unlabeled", "void")


class SegmentationOptions(Table):
    """`[models.<name>.options]` of a segmentation model. `min_area`: of a region, as a share of the picture;
    `background`: labels of which no regions are made; `resolution`: of the class map; `mask`: whether messages carry
    it; `normalize`: what pixels become, where the entry's `preprocess` does not say."""

    output: str | None = None
    channels: Literal["auto", "first", "last"] = "auto"
    classes: int | None = None
    min_area: Share = 0.001
    background: list[str] | None = None
    resolution: Literal["model", "source"] = "model"
    palette: str | list[tuple[int, int, int]] = "auto"
    mask: bool = False
    normalize: Literal["auto", "none", "imagenet", "signed"] = "auto"


class SegmentationFamily:
    """A class map, each class's share, and regions."""

    Options: ClassVar[type[Table]] = SegmentationOptions
    takes_batches = True
    task = "segment"
    reduction = None

    @staticmethod
    def recognise(facts: ModelFacts) -> Guess | None:
        told = facts.metadata.get("task") in ("semantic", "semantic-segmentation")
        try:
            spec = _output(facts, None)
            channels, count = _channels(spec, "auto", facts)
        except ModelError:
            return None
        if not told and any(other.shape != spec.shape for other in facts.outputs):
            return None  # others of the same shape are of auxiliary heads
        what = f"{count} values" if channels else "a class"
        because = [f"the output {spec.name!r} {shown(spec.shape)} is {what} a pixel"]
        if told:
            because.append(f"the file says its task is {facts.metadata['task']!r}")
        labels = file_labels(facts)
        fits = labels is not None and count == len(labels)
        sides = [side for side in spec.shape[1:] if side is not None]
        is_large = len(sides) < 2 or sorted(sides)[-2] >= 8
        return Guess(3 if told else 2 if fits else 1, because) if is_large else None

    def __init__(self, meaning: Meaning) -> None:
        options = meaning.options
        assert isinstance(options, SegmentationOptions)
        spec = _output(meaning.facts, options.output)
        self._output = spec.name
        self._channels, count = _channels(spec, options.channels, meaning.facts)
        self._is_binary = self._channels is not None and count == 1
        labels = meaning.labels if meaning.labels is not None else file_labels(meaning.facts)
        classes = 2 if self._is_binary else count or options.classes or (len(labels) if labels is not None else 256)
        if classes > _MOST_CLASSES:
            raise ModelError(f"{classes} classes are more than {_MOST_CLASSES}")
        named = labels_of(meaning.labels, meaning.facts, classes)
        if labels is None and self._is_binary:
            named = ("background", "foreground")
        normal = NORMAL.get(options.normalize)
        if normal is None:
            own = meaning.facts.metadata.get("task") == "semantic"
            normal = RGB_0_1 if own else RGB_SIGNED if is_interleaved(meaning.facts) else IMAGENET
        self.preprocess = picture_spec(meaning, resize="stretch", **normal)
        self.names = Names(named, colors=palette(options.palette, named))
        self._options = options
        background = options.background
        self._grounds = {
            i for i, label in enumerate(named) if label in (_BACKGROUND if background is None else background)
        }
        self._most = meaning.thresholds.max_detections

    def reduce(self, outputs: Tensors) -> Sequence[NDArray[Any]]:
        """Channels first, or the classes themselves."""
        raw = outputs[self._output]
        if self._channels == "last":
            raw = raw.transpose(0, 3, 1, 2)
        elif self._channels is None and raw.ndim == 4:
            raw = raw[:, 0] if raw.shape[1] == 1 else raw[..., 0]
        return list(raw)

    def decode(self, candidates: NDArray[Any], placement: Placement) -> Segmentation:
        class_map, scores = self._classes(self._seen(candidates, placement), placement)
        count = len(self.names.labels)
        ratios = np.bincount(class_map.ravel(), minlength=count)[:count] / max(1, class_map.size)
        regions = sorted(self._regions(class_map, scores, ratios, placement), key=lambda region: -region.area)
        return Segmentation(class_map, ratios, regions[: self._most], carries_map=self._options.mask)

    def _seen(self, picture: NDArray[Any], at: Placement) -> NDArray[Any]:
        """The part of the output that shows the source picture; what a crop left out repeats its edge."""
        height, width = picture.shape[-2:]
        x, y = width / self.preprocess.width, height / self.preprocess.height
        left, top = round(at.left * x), round(at.top * y)
        right, bottom = max(left + 1, round((at.left + at.width) * x)), max(top + 1, round((at.top + at.height) * y))
        if left >= 0 and top >= 0 and right <= width and bottom <= height:
            return picture[..., top:bottom, left:right]
        columns = np.clip(np.arange(left, right), 0, width - 1)
        rows = np.clip(np.arange(top, bottom), 0, height - 1)
        return picture[..., rows[:, None], columns[None]]

    def _classes(self, seen: NDArray[Any], at: Placement) -> tuple[NDArray[Any], Floats | None]:
        """The class of each pixel, and how likely it is where the model tells."""
        kind = np.uint8 if len(self.names.labels) <= 256 else np.uint16
        size = (at.source_width, at.source_height) if self._options.resolution == "source" else seen.shape[:-3:-1]
        if self._channels is None:
            with np.errstate(invalid="ignore"):
                numbers = np.nan_to_num(seen.astype(np.float32)) if seen.dtype.kind == "f" else seen
            classes = np.clip(numbers, 0, len(self.names.labels) - 1).astype(kind)
            return cv2.resize(classes, size, interpolation=cv2.INTER_NEAREST), None
        values = seen.astype(np.float32, copy=False)
        low, high = float(np.min(values)), float(np.max(values))
        if not (low >= -_LARGEST and high <= _LARGEST):  # NaN is in no range
            values = np.clip(np.nan_to_num(values, nan=-_LARGEST), -_LARGEST, _LARGEST)
        if self._is_binary:
            there = values[0] if low >= 0 and high <= 1 else sigmoid(values[0])
            likely = cv2.resize(there, size)
            is_there = likely >= 0.5
            return is_there.astype(kind), np.where(is_there, likely, 1 - likely)
        class_map, best = _strongest(values, size, kind)
        if low >= 0 and np.allclose(values[:, :1].sum(0), 1, atol=1e-2):  # probabilities already
            return class_map, best
        return class_map, self._likelihood(values, class_map, best)

    def _likelihood(self, values: Floats, class_map: NDArray[Any], best: Floats) -> Floats:
        """Softmax of the strongest class of each pixel; of the background, which no region asks about, 1."""
        likely = np.ones(best.shape, np.float32)
        told = ~np.isin(class_map, list(self._grounds))
        strongest, total = best[told], np.zeros(int(told.sum()), np.float32)
        for plane in values:
            total += np.exp(_sampled(plane, (best.shape[1], best.shape[0]))[told] - strongest)
        likely[told] = 1.0 / total
        return likely

    def _regions(
        self, class_map: NDArray[Any], scores: Floats | None, ratios: NDArray[np.float64], placement: Placement
    ) -> Iterator[Region]:
        least = self._options.min_area * class_map.size
        height, width = class_map.shape
        scale = np.array([placement.source_width / width, placement.source_height / height], np.float32)
        for class_id in np.flatnonzero(ratios > 0).tolist():
            if class_id in self._grounds or ratios[class_id] * class_map.size < least:
                continue
            parts, numbers, facts, centers = cv2.connectedComponentsWithStats(
                (class_map == class_id).view(np.uint8), connectivity=8
            )
            means = None
            if scores is not None:
                means = np.bincount(numbers.ravel(), weights=scores.ravel(), minlength=parts) / np.maximum(
                    1, facts[:, 4]
                )
            for part in range(1, parts):
                left, top, across, down, area = facts[part].tolist()
                if area < least:
                    continue
                outline = _outline(numbers[top : top + down, left : left + across] == part) + np.array((left, top))
                corners = np.array([[left, top], [left + across, top + down]]) * scale
                x1, y1, x2, y2 = corners.ravel().tolist()
                center = ((centers[part] + 0.5) * scale).tolist()
                yield Region(
                    class_id=class_id,
                    area=float(area * scale[0] * scale[1]),
                    box=(x1, y1, x2, y2),
                    centroid=(center[0], center[1]),
                    score=None if means is None else float(means[part]),
                    outline=(outline * scale).astype(np.float32),
                )


Family = SegmentationFamily


def _output(facts: ModelFacts, wanted: str | None) -> TensorSpec:
    fitting = [spec for spec in facts.outputs if len(spec.shape) in (3, 4)]
    if wanted is not None:
        fitting = [spec for spec in fitting if spec.name == wanted]
    if not fitting:
        raise ModelError(
            f"segmentation wants an output with a value or values a pixel; this model's are {outputs_of(facts)}"
        )
    return fitting[0]  # others, as of auxiliary heads, come after it


def _channels(
    spec: TensorSpec, wanted: Literal["auto", "first", "last"], facts: ModelFacts
) -> tuple[Literal["first", "last"] | None, int | None]:
    """Where the classes' axis is and how long; None, None for an output of classes."""
    if len(spec.shape) == 3:
        if spec.dtype.startswith("float") and not facts.metadata.get("task", "").startswith("semantic"):
            raise ModelError(f"{spec.name} {shown(spec.shape)} is no map of classes: it holds {spec.dtype}")
        return None, None
    _, first, _, last = spec.shape
    if spec.dtype.startswith(("int", "uint8")) and 1 in (first, last):
        return None, None
    is_last = are_channels_last(spec, facts) if wanted == "auto" else wanted == "last"
    if is_last is not None:
        return ("last", last) if is_last else ("first", first)
    raise ModelError(f"{spec.name} {shown(spec.shape)} does not tell its classes; set options.channels")


def _strongest(values: Floats, size: tuple[int, int], kind: Any) -> tuple[NDArray[Any], Floats]:
    """The strongest class of each pixel and its value, with all values sampled linearly at this size; a class at a
    time, since all of them at the source's size may be gigabytes."""
    class_map = np.zeros(size[::-1], kind)
    best = np.full(size[::-1], -np.inf, np.float32)
    for class_id, plane in enumerate(values):
        sampled = _sampled(plane, size)
        class_map[sampled > best] = class_id
        np.maximum(best, sampled, out=best)
    return class_map, best


def _sampled(plane: Floats, size: tuple[int, int]) -> Floats:
    if plane.shape == size[::-1]:
        return plane
    sampled: Any = cv2.resize(plane, size)
    return np.asarray(sampled, np.float32)


def _outline(part: NDArray[np.bool_]) -> NDArray[Any]:
    """The outer contour of a connected part, [P, 2], at the pixels' centres."""
    contours, _ = cv2.findContours(part.astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)
    longest = max(contours, key=len)
    points: NDArray[Any] = longest.reshape(-1, 2) + 0.5
    return points
