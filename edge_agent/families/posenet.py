"""PoseNet: heatmaps with offsets, and displacements that lead from one keypoint of a person to the next.

Outputs, channels last: heatmaps [B, h, w, 17] (logits), offsets [B, h, w, 34] and displacements forward and
backward [B, h, w, 32], in input pixels, first all of y, then all of x. A keypoint lies at its cell times the stride
plus the offset there. People are found from the surest keypoints outwards, along the tree of the body's joints
(Papandreou et al.,
"PersonLab", arXiv 1803.08225).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import cv2
import msgspec
import numpy as np

from edge_agent import plugins
from edge_agent.config import Positive, Share, Table
from edge_agent.data import ModelFacts, Names, Poses, Tensors, TensorSpec
from edge_agent.errors import ModelError
from edge_agent.families import Guess, Meaning
from edge_agent.families._boxes import Floats, sigmoid
from edge_agent.families._keypoints import COCO_NAMES, KeypointOptions, keypoint_names, no_poses, of_keypoints
from edge_agent.families._metadata import require_real
from edge_agent.families._pictures import RGB_SIGNED, outputs_of, picture_spec
from edge_agent.geometry import Placement

_POINTS = len(COCO_NAMES)
_PARENT_OF = (
    ("nose", "left_eye"),
    ("left_eye", "left_ear"),
    ("nose", "right_eye"),
    ("right_eye", "right_ear"),
    ("nose", "left_shoulder"),
    ("left_shoulder", "left_elbow"),
    ("left_elbow", "left_wrist"),
    ("left_shoulder", "left_hip"),
    ("left_hip", "left_knee"),
    ("left_knee", "left_ankle"),
    ("nose", "right_shoulder"),
    ("right_shoulder", "right_elbow"),
    ("right_elbow", "right_wrist"),
    ("right_shoulder", "right_hip"),
    ("right_hip", "right_knee"),
    ("right_knee", "right_ankle"),
)
_EDGES = tuple((COCO_NAMES.index(parent), COCO_NAMES.index(child)) for parent, child in _PARENT_OF)
_REFINEMENTS = 2  # looks at the offsets, on the way along an edge


class PoseNetOptions(KeypointOptions):
    """`[models.<name>.options]` of a PoseNet model. `nms_radius`: in input pixels, within which two keypoints of a kind
    are one; `min_pose_score`: of a person, the mean over all 17; `outputs`: the tensors, where they are not told by
    shape and order."""

    people: Literal["one", "several"] = "several"
    nms_radius: Positive = 20.0
    min_pose_score: Share = 0.1
    scores: Literal["logits", "values"] = "logits"
    outputs: dict[Literal["heatmaps", "offsets", "forward", "backward"], str] = msgspec.field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class _Maps:
    """Of one picture: scores [h, w, 17]; offsets [h, w, 17, 2] as y x; forward and backward [h, w, 16, 2]."""

    scores: Floats
    offsets: Floats
    forward: Floats | None
    backward: Floats | None


class PoseNetFamily:
    """Poses."""

    Options: ClassVar[type[Table]] = PoseNetOptions
    takes_batches = True
    task = "pose"
    reduction = None

    @staticmethod
    def recognise(facts: ModelFacts) -> Guess | None:
        try:
            names = _outputs(facts, PoseNetOptions())
        except ModelError:
            return None
        because = [f"{names['heatmaps']!r} and {names['offsets']!r} are PoseNet's heatmaps and offsets"]
        return Guess(3, because)

    def __init__(self, meaning: Meaning) -> None:
        options = meaning.options
        assert isinstance(options, PoseNetOptions)
        self._outputs = _outputs(meaning.facts, options)
        require_real(meaning.facts, *self._outputs.values())
        self.preprocess = picture_spec(meaning, resize="stretch", **RGB_SIGNED)
        points, skeleton = keypoint_names(options.keypoints, options.skeleton, meaning.facts, _POINTS)
        self.names = Names(tuple(meaning.labels or ("person",)), points, skeleton)
        self._options = options
        self._threshold = meaning.thresholds.score
        self._most = meaning.thresholds.max_detections

    def reduce(self, outputs: Tensors) -> Sequence[_Maps]:
        named = {role: outputs[name] for role, name in self._outputs.items()}
        return [self._maps({role: value[i] for role, value in named.items()}) for i in range(len(named["heatmaps"]))]

    def decode(self, candidates: _Maps, placement: Placement) -> Poses:
        maps = candidates
        height, width, _ = maps.scores.shape
        stride = np.array(
            [(self.preprocess.height - 1) / max(1, height - 1), (self.preprocess.width - 1) / max(1, width - 1)],
            np.float32,
        )
        one = self._options.people == "one" or maps.forward is None or maps.backward is None
        people = [self._single(maps, stride)] if one else self._several(maps, stride)
        scores = self._pose_scores(people)
        least = self._options.min_pose_score
        kept = [
            i
            for i, person in enumerate(people)
            if float(np.max(person[:, 2])) >= self._threshold and scores[i] >= least
        ]
        if not kept:
            return no_poses(_POINTS)
        keypoints = np.stack([people[i] for i in kept])[..., [1, 0, 2]]
        keypoints[..., :2] = placement.to_source(keypoints[..., :2])
        return of_keypoints(keypoints, np.array([scores[i] for i in kept], np.float32), threshold=self._threshold)

    def _maps(self, picture: Tensors) -> _Maps:
        def pairs(role: str) -> Floats | None:
            if role not in picture:
                return None
            raw = np.clip(np.nan_to_num(picture[role].astype(np.float32), posinf=0.0, neginf=0.0), -1e6, 1e6)
            height, width, count = raw.shape
            points: Floats = raw.reshape(height, width, 2, count // 2).transpose(0, 1, 3, 2)
            return points

        raw = np.nan_to_num(picture["heatmaps"].astype(np.float32), nan=-1e4)
        offsets = pairs("offsets")
        assert offsets is not None
        scores = sigmoid(raw) if self._options.scores == "logits" else np.clip(raw, 0, 1)
        return _Maps(scores, offsets, pairs("forward"), pairs("backward"))

    def _pose_scores(self, people: Sequence[Floats]) -> list[float]:
        """The mean over the keypoints, where those that a surer person has already count nothing."""
        scores = []
        for index, person in enumerate(people):
            own = np.ones(_POINTS, bool)
            for surer in people[:index]:
                own &= np.hypot(*(person[:, :2] - surer[:, :2]).T) > self._options.nms_radius
            scores.append(float(person[own, 2].sum()) / _POINTS)
        return scores

    def _single(self, maps: _Maps, stride: Floats) -> Floats:
        """[17, 3]: y, x and score of each keypoint's best place."""
        width = maps.scores.shape[1]
        best = maps.scores.reshape(-1, _POINTS).argmax(0)
        cells = np.stack((best // width, best % width), 1)
        kinds = np.arange(_POINTS)
        places = cells * stride + maps.offsets[cells[:, 0], cells[:, 1], kinds]
        scores = maps.scores[cells[:, 0], cells[:, 1], kinds]
        return np.concatenate((places, scores[:, None]), 1).astype(np.float32)

    def _several(self, maps: _Maps, stride: Floats) -> list[Floats]:
        """The people, each grown from the surest keypoint that belongs to none yet."""
        people: list[Floats] = []
        radius = self._options.nms_radius
        for row, column, kind in self._roots(maps.scores):
            place = np.array([row, column]) * stride + maps.offsets[row, column, kind]
            if any(np.hypot(*(person[kind, :2] - place)) <= radius for person in people):
                continue
            people.append(self._grown(maps, stride, kind, place, float(maps.scores[row, column, kind])))
            if len(people) >= self._most:
                break
        return people

    def _roots(self, scores: Floats) -> list[tuple[int, int, int]]:
        """Row, column and kind of the places higher than all around them, the surest first."""
        kernel = np.ones((3, 3), np.uint8)
        higher = np.stack([cv2.dilate(np.ascontiguousarray(scores[..., k]), kernel) for k in range(_POINTS)], -1)
        rows, columns, kinds = np.nonzero((scores >= np.float32(self._threshold)) & (scores == higher))
        best = np.argsort(-scores[rows, columns, kinds], kind="stable")
        return list(zip(rows[best].tolist(), columns[best].tolist(), kinds[best].tolist(), strict=True))

    def _grown(self, maps: _Maps, stride: Floats, kind: int, place: Any, score: float) -> Floats:
        assert maps.forward is not None
        assert maps.backward is not None
        person = np.zeros((_POINTS, 3), np.float32)
        person[kind] = (*place, score)
        for edge in range(len(_EDGES) - 1, -1, -1):
            parent, child = _EDGES[edge]
            if person[child, 2] > 0 and person[parent, 2] == 0:
                person[parent] = self._next(maps, stride, person[child], parent, maps.backward[:, :, edge])
        for edge, (parent, child) in enumerate(_EDGES):
            if person[parent, 2] > 0 and person[child, 2] == 0:
                person[child] = self._next(maps, stride, person[parent], child, maps.forward[:, :, edge])
        return person

    def _next(self, maps: _Maps, stride: Floats, start: Floats, kind: int, displacement: Floats) -> Floats:
        """The keypoint at the other end of an edge: y, x and score."""
        row, column = self._cell(maps, stride, start[:2])
        place = start[:2] + displacement[row, column]
        for _ in range(_REFINEMENTS):
            row, column = self._cell(maps, stride, place)
            place = np.array([row, column]) * stride + maps.offsets[row, column, kind]
        row, column = self._cell(maps, stride, place)
        return np.array((*place, maps.scores[row, column, kind]), np.float32)

    @staticmethod
    def _cell(maps: _Maps, stride: Floats, place: Any) -> tuple[int, int]:
        limits = np.array(maps.scores.shape[:2]) - 1
        row, column = np.clip(np.round(place / stride), 0, limits).astype(int)
        return int(row), int(column)


Family = PoseNetFamily


def _outputs(facts: ModelFacts, options: PoseNetOptions) -> dict[str, str]:
    """The outputs' names by role. Raises `ModelError`."""
    found: dict[str, str] = {str(role): name for role, name in options.outputs.items()}
    known = [spec.name for spec in facts.outputs]
    for name in found.values():
        if name not in known:
            raise ModelError(f"options.outputs: there is no output {name!r}{plugins.nearest(name, known)}")

    def of_width(width: int) -> list[TensorSpec]:
        return [spec for spec in facts.outputs if len(spec.shape) == 4 and spec.shape[3] == width]

    maps, offsets, displacements = of_width(_POINTS), of_width(2 * _POINTS), of_width(2 * len(_EDGES))
    if len(maps) == 1:
        found.setdefault("heatmaps", maps[0].name)
    if len(offsets) == 1:
        found.setdefault("offsets", offsets[0].name)
    if len(displacements) == 2:
        forward, backward = sorted(displacements, key=lambda spec: "bwd" in spec.name or "backward" in spec.name)
        found.setdefault("forward", forward.name)
        found.setdefault("backward", backward.name)
    if not {"heatmaps", "offsets"} <= set(found):
        raise ModelError(
            f"PoseNet gives [batch, h, w, 17] and [batch, h, w, 34]; this model's outputs are {outputs_of(facts)}"
        )
    return found
