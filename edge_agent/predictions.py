"""What a model saw, as a result message says it: one key by the kind of prediction, its structs and its rounding."""

from __future__ import annotations

import base64
import dataclasses
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
from msgspec import UNSET, Struct, UnsetType
from numpy.typing import NDArray

from edge_agent.data import (
    Classes,
    DepthMap,
    Detections,
    Embedding,
    Mask,
    Names,
    Poses,
    Prediction,
    RawTensors,
    Segmentation,
)

Size = tuple[int, int]
Seen = TypeVar("Seen", bound=Detections | Poses)
Box = tuple[float, float, float, float]
Point = tuple[float, float]


class Keypoint(Struct, frozen=True):
    """A named place in source pixels."""

    name: str
    x: float
    y: float
    score: float


class Rle(Struct, frozen=True):
    """A mask as COCO has it: `size` is height, width; `counts` its compressed run lengths, column by column."""

    size: tuple[int, int]
    counts: str


class Detection(Struct, frozen=True, omit_defaults=True):
    """An object: `box` is x1, y1, x2, y2 in source pixels; `corners` are there where boxes are turned."""

    label: str
    class_id: int
    score: float
    box: Box
    track_id: int | UnsetType = UNSET
    mask: Rle | UnsetType = UNSET
    keypoints: list[Keypoint] | UnsetType = UNSET
    corners: list[Point] | UnsetType = UNSET


class Pose(Struct, frozen=True, omit_defaults=True):
    """Someone's or something's keypoints; `box` is the detector's, or encloses the sure ones."""

    label: str
    class_id: int
    score: float
    box: Box
    keypoints: list[Keypoint]
    track_id: int | UnsetType = UNSET


class ClassScore(Struct, frozen=True):
    """A class that the picture shows."""

    label: str
    class_id: int
    score: float


class ClassShare(Struct, frozen=True, omit_defaults=True):
    """How much of the picture a class covers, 0..1; `mask` lies over the whole picture at the model's resolution."""

    label: str
    class_id: int
    ratio: float
    mask: Rle | UnsetType = UNSET


class RegionMessage(Struct, frozen=True):
    """A connected part of the picture that is of one class, in source pixels; `score` is the mean over it."""

    label: str
    class_id: int
    score: float | None
    area: float
    box: Box
    centroid: Point
    outline: list[Point]


class SegmentationMessage(Struct, frozen=True):
    """Classes that are there, the largest first, and regions, the largest first."""

    classes: list[ClassShare]
    regions: list[RegionMessage]


class DepthMessage(Struct, frozen=True, omit_defaults=True):
    """In the model's own unit; null where it gave no number. `png`: base64 of 16-bit PNG, 1 the least value, 65535
    the largest, 0 unknown."""

    min: float | None
    max: float | None
    p5: float | None
    p50: float | None
    p95: float | None
    png: str | UnsetType = UNSET


class EmbeddingMessage(Struct, frozen=True):
    """A vector of length 1."""

    size: int
    vector: list[float]


class TensorMessage(Struct, frozen=True, omit_defaults=True):
    """An output as it is: `data` in the order of memory, or `base64` of it (little-endian), or, of one that is
    larger than may be sent, what its finite values are like."""

    shape: list[int]
    dtype: str
    data: list[float | None] | UnsetType = UNSET
    base64: str | UnsetType = UNSET
    min: float | UnsetType | None = UNSET
    max: float | UnsetType | None = UNSET
    mean: float | UnsetType | None = UNSET


def described(prediction: Prediction, names: Names, size: Size) -> Mapping[str, Any]:
    """The key of a prediction and its value; `size` is the source picture's height and width."""
    key, describe = _KINDS[type(prediction)]
    return {key: describe(prediction, names, size)}


def chosen(seen: Seen, places: NDArray[np.intp]) -> Seen:
    """Some of the objects or poses, with all that belongs to each."""
    picked: dict[str, Any] = {}
    for one in dataclasses.fields(seen):
        value = getattr(seen, one.name)
        if isinstance(value, np.ndarray):
            picked[one.name] = value[places]
        elif value is not None:
            picked[one.name] = [value[place] for place in places]
    return dataclasses.replace(seen, **picked)


def rle(mask: Mask, size: Size) -> Rle:
    """The mask over the whole picture, in COCO's compressed run lengths.

    Runs of 0 and 1 in turn, column by column; each but the first three is given less the one two before it, five bits a
    character, the least first (the format of pycocotools' `maskApi`).
    """
    height, width = size
    rows, columns = mask.bits.shape
    padded = np.zeros((columns, rows + 2), np.int8)
    padded[:, 1:-1] = mask.bits.T
    changes = np.diff(padded, axis=1)
    column, begins = np.nonzero(changes == 1)
    _, ends = np.nonzero(changes == -1)
    offset = (mask.left + column) * height + mask.top
    borders = np.stack((offset + begins, offset + ends), 1).ravel()
    if len(borders):  # a run that ends at the foot of a column and one that begins at the head of the next are one
        joined = np.flatnonzero(borders[1:-1:2] == borders[2::2])
        borders = np.delete(borders, np.concatenate((2 * joined + 1, 2 * joined + 2)))
    runs = np.diff(borders, prepend=0, append=height * width).tolist()
    if runs[-1] == 0:
        runs.pop()
    return Rle((height, width), _compressed(runs))


def _compressed(runs: Sequence[int]) -> str:
    signs = []
    for index, run in enumerate(runs):
        value = run - runs[index - 2] if index > 2 else run
        more = True
        while more:
            sign = value & 31
            value >>= 5
            more = value != -1 if sign & 16 else value != 0
            signs.append(chr((sign | 32 if more else sign) + 48))
    return "".join(signs)


def _detections(found: Detections, names: Names, size: Size) -> list[Detection]:
    scores, boxes = _scores(found.scores), _boxes(found.boxes)
    plain = found.masks is None and found.keypoints is None and found.corners is None and found.track_ids is None
    told = [
        Detection(label(names, class_id), class_id, score, box)
        for box, score, class_id in zip(boxes, scores, found.class_ids.tolist(), strict=True)
    ]
    return told if plain else [_with_more(one, found, index, names, size) for index, one in enumerate(told)]


def _with_more(one: Detection, found: Detections, index: int, names: Names, size: Size) -> Detection:
    return Detection(
        one.label,
        one.class_id,
        one.score,
        one.box,
        track_id=_track(found.track_ids, index),
        mask=UNSET if found.masks is None else rle(found.masks[index], size),
        keypoints=UNSET if found.keypoints is None else _keypoints(found.keypoints[index], names),
        corners=UNSET if found.corners is None else _points(found.corners[index]),
    )


def _poses(found: Poses, names: Names, size: Size) -> list[Pose]:
    return [
        Pose(
            label(names, class_id),
            class_id,
            score,
            box,
            _keypoints(found.keypoints[index], names),
            track_id=_track(found.track_ids, index),
        )
        for index, (box, score, class_id) in enumerate(
            zip(_boxes(found.boxes), _scores(found.scores), found.class_ids.tolist(), strict=True)
        )
    ]


def _classes(found: Classes, names: Names, size: Size) -> list[ClassScore]:
    pairs = zip(found.class_ids.tolist(), _scores(found.scores), strict=True)
    return [ClassScore(label(names, class_id), class_id, score) for class_id, score in pairs]


def _segmentation(found: Segmentation, names: Names, size: Size) -> SegmentationMessage:
    order = np.argsort(-found.ratios, kind="stable")
    shares = [
        ClassShare(
            label(names, class_id),
            class_id,
            round(float(found.ratios[class_id]), 5),
            mask=_class_mask(found, class_id) if found.carries_map else UNSET,
        )
        for class_id in order.tolist()
        if found.ratios[class_id] > 0
    ]
    regions = [
        RegionMessage(
            label(names, region.class_id),
            region.class_id,
            None if region.score is None else round(region.score, 4),
            round(region.area, 1),
            _rounded(region.box),
            (round(region.centroid[0], 2), round(region.centroid[1], 2)),
            _points(region.outline),
        )
        for region in found.regions
    ]
    return SegmentationMessage(shares, regions)


def _class_mask(found: Segmentation, class_id: int) -> Rle:
    height, width = found.class_map.shape
    return rle(Mask(0, 0, found.class_map == class_id), (height, width))


def _depth(found: DepthMap, names: Names, size: Size) -> DepthMessage:
    known = found.values[np.isfinite(found.values)]
    if not known.size:
        return DepthMessage(None, None, None, None, None, png=_png(found))
    p5, p50, p95 = np.percentile(known, (5, 50, 95)).tolist()
    low, high = float(np.min(known)), float(np.max(known))
    low, high, p5, p50, p95 = (_significant(value) for value in (low, high, p5, p50, p95))
    return DepthMessage(low, high, p5, p50, p95, png=_png(found))


def _png(found: DepthMap) -> str | UnsetType:
    return UNSET if found.png is None else base64.b64encode(found.png).decode()


def _embedding(found: Embedding, names: Names, size: Size) -> EmbeddingMessage:
    return EmbeddingMessage(len(found.vector), [_significant(value) for value in found.vector.tolist()])


def _raw(found: RawTensors, names: Names, size: Size) -> dict[str, TensorMessage]:
    return {name: _tensor(tensor, found) for name, tensor in found.tensors.items()}


def _tensor(tensor: NDArray[Any], found: RawTensors) -> TensorMessage:
    shape, dtype = list(tensor.shape), str(tensor.dtype)
    if tensor.size <= found.inline:
        return TensorMessage(shape, dtype, data=list(_values(tensor)))
    if tensor.nbytes <= found.cap:
        little = tensor.astype(tensor.dtype.newbyteorder("<"), copy=False)
        return TensorMessage(shape, dtype, base64=base64.b64encode(np.ascontiguousarray(little).tobytes()).decode())
    known = tensor[np.isfinite(tensor)] if tensor.dtype.kind == "f" else tensor.ravel()
    if not known.size:
        return TensorMessage(shape, dtype, min=None, max=None, mean=None)
    figures = (_significant(float(value)) for value in (np.min(known), np.max(known), np.mean(known, dtype=np.float64)))
    low, high, mean = figures
    return TensorMessage(shape, dtype, min=low, max=high, mean=mean)


def _values(tensor: NDArray[Any]) -> Iterator[float | None]:
    """JSON knows no NaN and no infinity: null."""
    for value in tensor.ravel().tolist():
        yield (_significant(value) if np.isfinite(value) else None) if isinstance(value, float) else value


def counted(prediction: Prediction, names: Names) -> dict[str, int]:
    """How many of each label there are; nothing of predictions that are no objects."""
    if not isinstance(prediction, (Detections, Poses)):
        return {}
    return dict(Counter(label(names, int(class_id)) for class_id in prediction.class_ids))


def label(names: Names, class_id: int) -> str:
    """What a class is called; by its number where the model gives more than were named."""
    return names.labels[class_id] if 0 <= class_id < len(names.labels) else f"class_{class_id}"


def _keypoints(points: NDArray[np.float32], names: Names) -> list[Keypoint]:
    rows = points.astype(float).round(4).tolist()
    return [
        Keypoint(name, round(x, 2), round(y, 2), score)
        for name, (x, y, score) in zip(names.keypoints, rows, strict=True)
    ]


def _track(track_ids: NDArray[np.int64] | None, index: int) -> int | UnsetType:
    if track_ids is None or track_ids[index] < 0:
        return UNSET
    return int(track_ids[index])


def _points(points: NDArray[np.float32]) -> list[Point]:
    return [(x, y) for x, y in points.astype(float).round(2).tolist()]


def _boxes(boxes: NDArray[np.float32]) -> list[Box]:
    return [tuple(box) for box in boxes.astype(float).round(2).tolist()]


def _scores(scores: NDArray[np.float32]) -> list[float]:
    rounded: list[float] = scores.astype(float).round(4).tolist()
    return rounded


def _rounded(box: Box) -> Box:
    x1, y1, x2, y2 = (round(value, 2) for value in box)
    return x1, y1, x2, y2


def _significant(value: float) -> float:
    """Six significant digits."""
    return float(f"{value:.6g}")


_Describe = Callable[[Any, Names, Size], Any]
_KINDS: Mapping[type, tuple[str, _Describe]] = {
    Detections: ("detections", _detections),
    Poses: ("poses", _poses),
    Classes: ("classes", _classes),
    Segmentation: ("segmentation", _segmentation),
    DepthMap: ("depth", _depth),
    Embedding: ("embedding", _embedding),
    RawTensors: ("tensors", _raw),
}
