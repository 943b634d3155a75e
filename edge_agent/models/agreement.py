"""How far an engine agrees with the ONNX file it was built from, on the same pictures."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Literal

import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

from edge_agent.backends import Engine
from edge_agent.data import Detections, Image, Poses, Prediction, Tensors
from edge_agent.families import Family
from edge_agent.geometry import iou

_LONGEST_LIST, _WIDEST_ROW = 1000, 64
_SAME = 0.5  # IoU of two boxes that are one
SLACK = 0.75
"""A detection is confirmed by one with this share of the threshold: what is just above it here may be just below
it there."""


class Agreement(Struct):
    """1 is perfect. By `detections`: the share of both models' detections that the other confirms, in class and
    place; by `cosine`: the least similar raw output, where neither model found anything to compare."""

    score: float
    measure: Literal["detections", "cosine"]
    pictures: int
    detections: int
    cosine: float


def measure(
    reference: Engine, built: Engine, family: Family, images: Iterable[Image], *, threshold: float
) -> Agreement:
    """Run both on every picture. Both engines give raw outputs; `family` was made with `SLACK` times `threshold`."""
    confirmed = total = pictures = 0
    cosines: dict[str, list[float]] = {}
    for image in images:
        pictures += 1
        wanted, one = _outputs(reference, image, family)
        got, other = _outputs(built, image, family)
        for name, similarity in _cosines(wanted, got):
            cosines.setdefault(name, []).append(similarity)
        for left, right in ((one, other), (other, one)):
            hits = confirmed_by(left, right, threshold)
            confirmed, total = confirmed + int(hits.sum()), total + len(hits)
    cosine = min((float(np.mean(values)) for values in cosines.values()), default=0.0)
    score = confirmed / total if total else cosine
    return Agreement(round(score, 4), "detections" if total else "cosine", pictures, total, round(cosine, 5))


def _outputs(engine: Engine, image: Image, family: Family) -> tuple[Tensors, Detections]:
    ticket = engine.submit([image])
    tensors = {name: np.array(value) for name, value in engine.collect(ticket).tensors.items()}
    [candidates] = family.reduce(tensors)
    return tensors, boxed(family.decode(candidates, ticket.placements[0]))


def boxed(seen: Prediction) -> Detections:
    """What of a prediction can be matched by place and class; nothing of maps, vectors and the like."""
    if isinstance(seen, Detections):
        return seen
    if isinstance(seen, Poses):
        return Detections(seen.boxes, seen.scores, seen.class_ids)
    return Detections(np.zeros((0, 4), np.float32), np.zeros(0, np.float32), np.zeros(0, np.int64))


def _cosines(wanted: Tensors, got: Tensors) -> Iterator[tuple[str, float]]:
    for name, value in wanted.items():
        a, b = (_ordered(one.astype(np.float64)).ravel() for one in (value, got[name]))
        if a.size != b.size:
            yield name, 0.0
            continue
        norm = float(np.linalg.norm(a) * np.linalg.norm(b))
        similarity = float(a @ b / norm) if norm else float(np.array_equal(a, b))
        yield name, similarity if np.isfinite(similarity) else 0.0


def _ordered(value: NDArray[np.float64]) -> NDArray[np.float64]:
    """Of a list of the best by score, whose order a little noise changes, the values of each column in order."""
    is_list = value.ndim == 3 and value.shape[1] <= _LONGEST_LIST and value.shape[2] <= _WIDEST_ROW
    return np.sort(value, axis=1) if is_list else value


def confirmed_by(found: Detections, by: Detections, threshold: float) -> NDArray[np.bool_]:
    """Which of the detections at the threshold or above the other model has too, each counted once."""
    hits, free = [], np.ones(len(by), bool)
    for box, class_id, score in zip(found.boxes, found.class_ids, found.scores, strict=True):
        if score < threshold:
            continue
        overlap = iou(box[None], by.boxes)[0] * (by.class_ids == class_id) * free
        best = int(overlap.argmax()) if len(overlap) else -1
        hits.append(best >= 0 and overlap[best] >= _SAME)
        if hits[-1]:
            free[best] = False
    return np.array(hits, bool)
