"""How good detections are against the synthetic world's truth: mean average precision."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_agent.sources.world import CLASS_NAMES, Truth

MIN_VISIBILITY = 0.25  # what is hidden more than this neither has to be found nor counts as false


@dataclass
class Scored:
    """The detections of one frame, from a result message, and the truth of that frame."""

    detections: Sequence[Any]
    truth: Truth


def iou(box: NDArray[Any], boxes: NDArray[Any]) -> NDArray[Any]:
    low, high = np.maximum(box[:2], boxes[:, :2]), np.minimum(box[2:], boxes[:, 2:])
    intersection = np.clip(high - low, 0, None).prod(1)
    area = (box[2:] - box[:2]).prod() + (boxes[:, 2:] - boxes[:, :2]).prod(1)
    return intersection / np.maximum(area - intersection, 1e-9)


def mean_average_precision(frames: Sequence[Scored], *, at_iou: float = 0.5) -> float:
    """mAP over the classes, area under the monotone precision-recall curve (as in VOC 2010 and later)."""
    return float(np.mean([average_precision(frames, class_id, at_iou) for class_id in range(len(CLASS_NAMES))]))


def average_precision(frames: Sequence[Scored], class_id: int, at_iou: float) -> float:
    wanted = sum(int(((f.truth.class_ids == class_id) & (f.truth.visibility >= MIN_VISIBILITY)).sum()) for f in frames)
    found = [
        (d["score"], i, np.array(d["box"]))
        for i, f in enumerate(frames)
        for d in f.detections
        if d["class_id"] == class_id
    ]
    taken: dict[int, set[int]] = {}
    hits = []
    for _, i, box in sorted(found, key=lambda item: -item[0]):
        truth = frames[i].truth
        overlap = iou(box, truth.boxes) * (truth.class_ids == class_id)
        overlap[list(taken.setdefault(i, set()))] = 0
        best = int(overlap.argmax())
        if overlap[best] < at_iou:
            hits.append(False)
            continue
        taken[i].add(best)
        if truth.visibility[best] >= MIN_VISIBILITY:
            hits.append(True)
    if not hits or not wanted:
        return 0.0
    true = np.cumsum(hits)
    recall, precision = true / wanted, true / np.arange(1, len(hits) + 1)
    monotone = np.maximum.accumulate(precision[::-1])[::-1]
    return float(np.sum(np.diff(np.concatenate(([0.0], recall))) * monotone))
