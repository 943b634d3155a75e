"""Keypoints of bodies and other things: their names, what joins them, and poses made of them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from edge_agent.config import Table
from edge_agent.data import Detections, ModelFacts, Poses
from edge_agent.errors import ModelError
from edge_agent.families._boxes import Floats
from edge_agent.families._metadata import literal
from edge_agent.geometry import Placement

COCO_NAMES = (
    "nose",
    "left_eye",
    "right_eye",
    "left_ear",
    "right_ear",
    "left_shoulder",
    "right_shoulder",
    "left_elbow",
    "right_elbow",
    "left_wrist",
    "right_wrist",
    "left_hip",
    "right_hip",
    "left_knee",
    "right_knee",
    "left_ankle",
    "right_ankle",
)
COCO_SKELETON = (
    (15, 13),
    (13, 11),
    (16, 14),
    (14, 12),
    (11, 12),
    (5, 11),
    (6, 12),
    (5, 6),
    (5, 7),
    (6, 8),
    (7, 9),
    (8, 10),
    (1, 2),
    (0, 1),
    (0, 2),
    (1, 3),
    (2, 4),
    (3, 5),
    (4, 6),
)


HALPE_NAMES = (
    *COCO_NAMES,
    "head",
    "neck",
    "hip",
    "left_big_toe",
    "right_big_toe",
    "left_small_toe",
    "right_small_toe",
    "left_heel",
    "right_heel",
)
"""Of the 26 keypoints that RTMPose's body models have."""
_HALPE_SKELETON = (
    *((15, 13), (13, 11), (11, 19), (16, 14), (14, 12), (12, 19), (17, 18), (18, 19), (18, 5), (5, 7), (7, 9)),
    *((18, 6), (6, 8), (8, 10), (15, 20), (15, 22), (15, 24), (16, 21), (16, 23), (16, 25)),
)
_KNOWN = {len(COCO_NAMES): (COCO_NAMES, COCO_SKELETON), len(HALPE_NAMES): (HALPE_NAMES, _HALPE_SKELETON)}


class KeypointOptions(Table):
    """What the `options` of every model with keypoints may say: names, and pairs of numbers that are joined."""

    keypoints: list[str] | None = None
    skeleton: list[tuple[int, int]] | None = None


def keypoint_names(
    given: Sequence[str] | None, joined: Sequence[tuple[int, int]] | None, facts: ModelFacts, count: int
) -> tuple[Sequence[str], Sequence[tuple[int, int]]]:
    """A name for each keypoint, and the pairs: the entry's, else the file's, else COCO's for 17 and Halpe's for 26,
    else numbers.

    Raises `ModelError` where they are too few or too many.
    """
    names = given or _told(facts, count)
    usual, skeleton = _KNOWN.get(count, ([f"keypoint_{i}" for i in range(count)], ()))
    default = names is None
    if names is None:
        names = usual
    if len(names) != count:
        raise ModelError(f"options.keypoints names {len(names)}, the model has {count} keypoints")
    pairs = skeleton if joined is None and default else tuple(joined or ())
    for pair in pairs:
        if not all(0 <= end < count for end in pair):
            raise ModelError(f"options.skeleton: {list(pair)} joins keypoints that are not there; there are {count}")
    return tuple(names), pairs


def posed(found: Detections, points: Floats, placement: Placement, scale: Floats | None = None) -> Poses:
    """Poses of detections in source pixels and keypoints [N, K, 2 or 3] in input pixels, or in shares of the
    input where a `scale` is given."""
    places = points[..., :2] if scale is None else points[..., :2] * scale[:2]
    keypoints = np.ones((*points.shape[:2], 3), np.float32)
    keypoints[..., :2] = placement.to_source(np.nan_to_num(places))
    if points.shape[2] > 2:
        keypoints[..., 2] = np.clip(np.nan_to_num(points[..., 2]), 0, 1)
    return Poses(keypoints, found.scores, found.boxes, found.class_ids)


def of_keypoints(keypoints: Floats, scores: Floats, *, threshold: float) -> Poses:
    """Poses of keypoints [N, K, 3] in source pixels alone, best first; a box encloses those at the threshold, or
    all of them where none is."""
    order = np.argsort(-scores, kind="stable")
    keypoints, scores = keypoints[order], scores[order]
    seen = keypoints[..., 2] >= threshold
    seen |= ~seen.any(1, keepdims=True)
    low = np.where(seen[..., None], keypoints[..., :2], np.inf).min(1)
    high = np.where(seen[..., None], keypoints[..., :2], -np.inf).max(1)
    boxes = np.concatenate((low, high), 1).astype(np.float32).reshape(-1, 4)
    return Poses(keypoints, scores, boxes, np.zeros(len(scores), np.int64))


def no_poses(count: int) -> Poses:
    return Poses(
        np.zeros((0, count, 3), np.float32),
        np.zeros(0, np.float32),
        np.zeros((0, 4), np.float32),
        np.zeros(0, np.int64),
    )


def _told(facts: ModelFacts, count: int) -> Sequence[str] | None:
    """Ultralytics' `kpt_names`: {0: ['nose', …]}."""
    if not (text := facts.metadata.get("kpt_names")):
        return None
    names = literal("kpt_names", text)
    if isinstance(names, dict) and names:
        names = next(iter(names.values()))
    return [str(name) for name in names] if isinstance(names, (list, tuple)) and len(names) == count else None
