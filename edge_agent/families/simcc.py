"""Keypoints of one person as two rows of likelihoods each: SimCC, which RTMPose has.

Outputs `simcc_x` [B, K, width * split] and `simcc_y` [B, K, height * split]; a keypoint lies where its rows are
highest, and is as sure as their maxima on average (Li et al., "SimCC", arXiv 2107.03332; Jiang et al., "RTMPose", arXiv
2303.07399).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from edge_agent.config import Positive, Table
from edge_agent.data import ModelFacts, Names, Poses, Tensors
from edge_agent.errors import ModelError
from edge_agent.families import Guess, Meaning
from edge_agent.families._keypoints import KeypointOptions, keypoint_names, no_poses, of_keypoints
from edge_agent.families._metadata import require_real
from edge_agent.families._pictures import IMAGENET, output_of, outputs_of, picture_sides, picture_spec
from edge_agent.geometry import Placement

_MOST_POINTS = 300


class SimccOptions(KeypointOptions):
    """`[models.<name>.options]` of a SimCC model. `split`: bins a pixel, where the shapes do not tell."""

    split: Positive | None = None


class SimccFamily:
    """The pose of the person that the picture shows."""

    Options: ClassVar[type[Table]] = SimccOptions
    takes_batches = True
    task = "pose"
    reduction = None

    @staticmethod
    def recognise(facts: ModelFacts) -> Guess | None:
        try:
            x, y = _outputs(facts)
        except ModelError:
            return None
        told = "simcc" in x
        if not told and not _fits(facts, x, y):
            return None
        return Guess(3 if told else 1, [f"{x!r} and {y!r} are rows of likelihoods, columns and rows of each keypoint"])

    def __init__(self, meaning: Meaning) -> None:
        options = meaning.options
        assert isinstance(options, SimccOptions)
        self._x, self._y = _outputs(meaning.facts)
        require_real(meaning.facts, self._x, self._y)
        self.preprocess = picture_spec(meaning, pad=0, **IMAGENET)
        shape = output_of(meaning.facts, self._x).shape
        self._options, self._facts = options, meaning.facts
        self.names = Names(tuple(meaning.labels or ("person",)))
        count = len(options.keypoints) if shape[1] is None and options.keypoints else shape[1]
        if count is not None:  # else the first run tells
            self._name_keypoints(count)
        self._split = options.split
        self._threshold = meaning.thresholds.score

    def _name_keypoints(self, count: int) -> None:
        options = self._options
        points, skeleton = keypoint_names(options.keypoints, options.skeleton, self._facts, count)
        self.names = Names(self.names.labels, points, skeleton)

    def reduce(self, outputs: Tensors) -> Sequence[tuple[NDArray[Any], NDArray[Any]]]:
        return list(zip(outputs[self._x], outputs[self._y], strict=True))

    def decode(self, candidates: tuple[NDArray[Any], NDArray[Any]], placement: Placement) -> Poses:
        x, y = (
            np.clip(np.nan_to_num(rows.astype(np.float32), posinf=0.0, neginf=0.0), -1e4, 1e4) for rows in candidates
        )
        if len(x) != len(self.names.keypoints):
            self._name_keypoints(len(x))
        keypoints = np.empty((1, len(x), 3), np.float32)
        keypoints[0, :, 0] = x.argmax(1) / (self._split or x.shape[1] / self.preprocess.width)
        keypoints[0, :, 1] = y.argmax(1) / (self._split or y.shape[1] / self.preprocess.height)
        keypoints[0, :, 2] = np.clip((x.max(1) + y.max(1)) / 2, 0, 1)
        if float(np.max(keypoints[0, :, 2])) < self._threshold:
            return no_poses(len(x))
        keypoints[..., :2] = placement.to_source(keypoints[..., :2])
        return of_keypoints(keypoints, keypoints[..., 2].mean(1), threshold=self._threshold)


Family = SimccFamily


def _fits(facts: ModelFacts, x: str, y: str) -> bool:
    """Whether the rows are as long as the picture's sides, by one number of bins a pixel."""
    shapes = {spec.name: spec.shape for spec in facts.outputs}
    height, width = picture_sides(facts)
    across, down, points = shapes[x][2], shapes[y][2], shapes[x][1]
    if not (height and width and across and down):
        return False
    return across / width == down / height >= 1 and (points is None or points <= _MOST_POINTS)


def _outputs(facts: ModelFacts) -> tuple[str, str]:
    """The columns' output and the rows'. Raises `ModelError`."""
    flat = [spec for spec in facts.outputs if len(spec.shape) == 3]
    if len(flat) != 2 or flat[0].shape[1] != flat[1].shape[1] or 4 in (flat[0].shape[2], flat[1].shape[2]):
        raise ModelError(
            "a SimCC model gives [batch, keypoints, columns] and [batch, keypoints, rows]; "
            f"this one's outputs are {outputs_of(facts)}"
        )
    named = [spec.name for spec in flat]
    named.sort(key=lambda name: name.rstrip("0123456789").endswith("y"))
    return named[0], named[1]
