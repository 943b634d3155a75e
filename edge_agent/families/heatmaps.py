"""Keypoints from heatmaps: one map a keypoint, [B, K, H, W] or [B, H, W, K], highest where the keypoint is.

Peaks are refined below a pixel: by a quarter towards the higher neighbour (Newell et al., "Stacked Hourglass
Networks", arXiv 1603.06937), at the top of a parabola through the neighbours, or, `dark`, at that of the Gaussian
which a smoothed map is there (Zhang et al., "Distribution-Aware Coordinate Representation", arXiv 1910.06278). Of
several people the peaks go to the nearest pose that lacks the keypoint.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

import cv2
import numpy as np
from msgspec import Meta
from numpy.typing import NDArray

from edge_agent.config import Share, Table
from edge_agent.data import ModelFacts, Names, Poses, Tensors, TensorSpec
from edge_agent.errors import ModelError
from edge_agent.families import Guess, Meaning
from edge_agent.families._boxes import Floats, sigmoid
from edge_agent.families._keypoints import COCO_NAMES, KeypointOptions, keypoint_names, no_poses, of_keypoints
from edge_agent.families._metadata import require_real
from edge_agent.families._pictures import (
    NORMAL,
    are_channels_last,
    outputs_of,
    picture_spec,
    shown,
)
from edge_agent.geometry import Placement


class HeatmapOptions(KeypointOptions):
    """`[models.<name>.options]` of a heatmap model. `center`: where in a map's pixel its value lies, 0 at its upper
    left corner, as most are trained, or 0.5 in its middle; `aligned`: its last pixel lies at the input's edge, as in
    models trained without bias (UDP); `blur`: of `dark`, the deviation in pixels of the map; `max_distance`: of a
    keypoint from its pose, as a share of the map's diagonal, where `people` are several."""

    output: str | None = None
    channels: Literal["auto", "first", "last"] = "auto"
    people: Literal["one", "several"] = "one"
    refine: Literal["quarter", "parabola", "dark", "none"] = "quarter"
    scores: Literal["values", "logits"] = "values"
    center: Share = 0.0
    aligned: bool = False
    blur: Annotated[float, Meta(gt=0, le=10)] = 2.0
    max_distance: Share = 0.3
    normalize: Literal["none", "imagenet", "signed"] = "imagenet"


class HeatmapFamily:
    """Poses."""

    Options: ClassVar[type[Table]] = HeatmapOptions
    takes_batches = True
    task = "pose"
    reduction = None

    @staticmethod
    def recognise(facts: ModelFacts) -> Guess | None:
        try:
            spec, _, count = _output(facts, HeatmapOptions())
        except ModelError:
            return None
        told = facts.metadata.get("task") in ("pose", "keypoint-detection") or "heatmap" in spec.name.lower()
        if len(facts.outputs) > 1 or not (told or count == len(COCO_NAMES)):
            return None
        return Guess(3 if told else 2, [f"the output {spec.name!r} {shown(spec.shape)} is {count} maps of keypoints"])

    def __init__(self, meaning: Meaning) -> None:
        options = meaning.options
        assert isinstance(options, HeatmapOptions)
        spec, self._is_last, count = _output(meaning.facts, options)
        self._output = spec.name
        require_real(meaning.facts, spec.name)
        normal = NORMAL[options.normalize]
        self.preprocess = picture_spec(meaning, pad=0, **normal)
        points, skeleton = keypoint_names(options.keypoints, options.skeleton, meaning.facts, count)
        self.names = Names(tuple(meaning.labels or ("person",)), points, skeleton)
        self._options = options
        self._threshold = meaning.thresholds.score
        self._most = meaning.thresholds.max_detections

    def reduce(self, outputs: Tensors) -> Sequence[NDArray[Any]]:
        """[K, H, W] of each picture."""
        raw = outputs[self._output]
        return list(raw.transpose(0, 3, 1, 2) if self._is_last else raw)

    def decode(self, candidates: NDArray[Any], placement: Placement) -> Poses:
        maps = np.clip(np.nan_to_num(candidates.astype(np.float32), nan=-1e4), -1e4, 1e4)
        if self._options.scores == "logits":
            maps = sigmoid(maps)
        one = self._options.people == "one"
        keypoints = self._best(maps)[None] if one else self._grouped(maps)
        if not len(keypoints) or float(np.max(keypoints[..., 2])) < self._threshold:
            return no_poses(len(maps))
        _, height, width = maps.shape
        steps = np.array([width, height]) - int(self._options.aligned)
        scale = np.array([self.preprocess.width, self.preprocess.height], np.float32) / np.maximum(1, steps)
        keypoints[..., :2] = placement.to_source((keypoints[..., :2] + self._options.center) * scale)
        keypoints[..., 2] = np.clip(keypoints[..., 2], 0, 1)
        poses = of_keypoints(keypoints, keypoints[..., 2].mean(1), threshold=self._threshold)
        most = self._most
        return Poses(poses.keypoints[:most], poses.scores[:most], poses.boxes[:most], poses.class_ids[:most])

    def _best(self, maps: Floats) -> Floats:
        """[K, 3]: column, row and value of each map's highest place."""
        count, _, width = maps.shape
        places = maps.reshape(count, -1).argmax(1)
        rows, columns = places // width, places % width
        return np.stack([self._refined(heat, int(x), int(y)) for heat, x, y in zip(maps, columns, rows, strict=True)])

    def _refined(self, heat: Floats, column: int, row: int) -> Floats:
        value, place = heat[row, column], np.array([column, row], np.float32)
        height, width = heat.shape
        is_inside = 0 < column < width - 1 and 0 < row < height - 1
        if self._options.refine == "dark" and (is_inside or self._options.aligned):
            place += _newton(self._logarithms(heat, column, row))
        elif self._options.refine != "dark" and is_inside:
            place += _STEPS[self._options.refine](heat[row - 1 : row + 2, column - 1 : column + 2])
        return np.append(place, value).astype(np.float32)

    def _logarithms(self, heat: Floats, column: int, row: int) -> Floats:
        """[3, 3] logarithms around a place, of the map without its noise; the edge goes on beyond the map."""
        radius = round(2.5 * self._options.blur)
        reach = radius + 1
        padded = cv2.copyMakeBorder(heat, reach, reach, reach, reach, cv2.BORDER_REFLECT)
        part = padded[row : row + 2 * reach + 1, column : column + 2 * reach + 1]
        size = 2 * radius + 1
        smooth = cv2.GaussianBlur(part, (size, size), self._options.blur)
        rows = np.clip(np.arange(row - 1, row + 2), 0, heat.shape[0] - 1) - row + reach
        columns = np.clip(np.arange(column - 1, column + 2), 0, heat.shape[1] - 1) - column + reach
        around: Floats = np.log(np.maximum(smooth[rows[:, None], columns[None]], 1e-3))
        return around

    def _grouped(self, maps: Floats) -> Floats:
        """[N, K, 3]: all peaks, each with the nearest pose that has none of its kind yet."""
        count, height, width = maps.shape
        reach = self._options.max_distance * float(np.hypot(height, width))
        peaks = [(kind, self._refined(maps[kind], x, y)) for kind in range(count) for x, y in self._peaks(maps[kind])]
        peaks.sort(key=lambda peak: -float(peak[1][2]))
        poses: list[Floats] = []
        for kind, peak in peaks:
            near = [(self._distance(pose, peak), i) for i, pose in enumerate(poses) if pose[kind, 2] == 0]
            distance, index = min(near, default=(np.inf, -1))
            if distance > reach:
                poses.append(np.zeros((count, 3), np.float32))
                index = -1
            poses[index][kind] = peak
        return np.stack(poses) if poses else np.zeros((0, count, 3), np.float32)

    def _peaks(self, heat: Floats) -> list[tuple[int, int]]:
        """Column and row of the places that are higher than all around them."""
        higher = cv2.dilate(heat, np.ones((3, 3), np.uint8))
        rows, columns = np.nonzero((heat >= np.float32(self._threshold)) & (heat == higher))
        best = np.argsort(-heat[rows, columns], kind="stable")[: self._most]
        return list(zip(columns[best].tolist(), rows[best].tolist(), strict=True))

    @staticmethod
    def _distance(pose: Floats, peak: Floats) -> float:
        known = pose[pose[:, 2] > 0, :2]
        return float(np.hypot(*(known - peak[:2]).T).min())


Family = HeatmapFamily


def _quarter(around: Floats) -> Floats:
    """How far from the middle of [3, 3] values the top lies, in x and y."""
    higher = np.array([around[1, 2] - around[1, 0], around[2, 1] - around[0, 1]])
    return (np.sign(higher) / 4).astype(np.float32)


def _parabola(around: Floats) -> Floats:
    slope = np.array([around[1, 2] - around[1, 0], around[2, 1] - around[0, 1]], np.float32)
    bend = 2 * around[1, 1] - np.array([around[1, 0] + around[1, 2], around[0, 1] + around[2, 1]], np.float32)
    return np.clip(np.where(bend > 0, slope / np.maximum(2 * bend, 1e-12), 0), -0.5, 0.5).astype(np.float32)


def _newton(around: Floats) -> Floats:
    """At the top of a Gaussian whose logarithms these are."""
    slope = 0.5 * np.array([around[1, 2] - around[1, 0], around[2, 1] - around[0, 1]])
    mixed = 0.25 * (around[2, 2] - around[2, 0] - around[0, 2] + around[0, 0])
    bend = np.array([[around[1, 0] + around[1, 2], 0], [0, around[0, 1] + around[2, 1]]]) - 2 * around[1, 1] * np.eye(2)
    bend[0, 1] = bend[1, 0] = mixed
    if np.linalg.det(bend) <= 1e-9 or bend[0, 0] >= 0:
        return np.zeros(2, np.float32)  # no top
    return np.clip(-np.linalg.solve(bend, slope), -1.5, 1.5).astype(np.float32)


_STEPS: Mapping[str, Callable[[Floats], Floats]] = {
    "quarter": _quarter,
    "parabola": _parabola,
    "none": lambda around: np.zeros(2, np.float32),
}


def _output(facts: ModelFacts, options: HeatmapOptions) -> tuple[TensorSpec, bool, int]:
    """The maps, whether their keypoints' axis is last, and how many keypoints there are. Raises `ModelError`."""
    for spec in facts.outputs:
        if len(spec.shape) != 4 or options.output not in (None, spec.name):
            continue
        _, first, _, last = spec.shape
        is_last = bool(are_channels_last(spec, facts))
        if options.channels != "auto":
            is_last = options.channels == "last"
        count = last if is_last else first
        if count is not None:
            return spec, is_last, count
    raise ModelError(f"heatmaps are [batch, keypoints, height, width]; this model's outputs are {outputs_of(facts)}")
