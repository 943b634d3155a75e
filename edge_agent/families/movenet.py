"""MoveNet: keypoints of one person [B, 1, 17, 3] or of six [B, 6, 56], as y, x, score in shares of the input.

Several: 17 triples, then the box ymin, xmin, ymax, xmax and the person's score.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from edge_agent.config import Table
from edge_agent.data import ModelFacts, Names, Poses, Tensors
from edge_agent.errors import ModelError
from edge_agent.families import Guess, Meaning
from edge_agent.families._boxes import Floats
from edge_agent.families._keypoints import KeypointOptions, keypoint_names, no_poses, of_keypoints
from edge_agent.families._metadata import require_real
from edge_agent.families._pictures import outputs_of, picture_spec, shown
from edge_agent.geometry import Placement

_POINTS = 17
_SEVERAL = 3 * _POINTS + 5


class MoveNetOptions(KeypointOptions):
    """`[models.<name>.options]` of a MoveNet model."""


class MoveNetFamily:
    """Poses."""

    Options: ClassVar[type[Table]] = MoveNetOptions
    takes_batches = True
    task = "pose"
    reduction = None

    @staticmethod
    def recognise(facts: ModelFacts) -> Guess | None:
        if not _fits(facts):
            return None
        [output] = facts.outputs
        return Guess(2, [f"the output {output.name!r} {shown(output.shape)} is MoveNet's: 17 points as y, x, score"])

    def __init__(self, meaning: Meaning) -> None:
        options = meaning.options
        assert isinstance(options, MoveNetOptions)
        if not _fits(meaning.facts):
            raise ModelError(
                "a MoveNet model gives [batch, 1, 17, 3] or [batch, 6, 56]; "
                f"this one's outputs are {outputs_of(meaning.facts)}"
            )
        # Trained on pictures that keep their ratio, on black, with values of 0..255 whatever the input's type.
        self.preprocess = picture_spec(meaning, pad=0, scale=1.0)
        points, skeleton = keypoint_names(options.keypoints, options.skeleton, meaning.facts, _POINTS)
        self.names = Names(tuple(meaning.labels or ("person",)), points, skeleton)
        self._output = meaning.facts.outputs[0].name
        require_real(meaning.facts, self._output)
        self._threshold = meaning.thresholds.score
        self._scale = np.array([self.preprocess.height, self.preprocess.width, 1], np.float32)

    def reduce(self, outputs: Tensors) -> Sequence[NDArray[Any]]:
        return list(outputs[self._output])

    def decode(self, candidates: NDArray[Any], placement: Placement) -> Poses:
        raw = np.clip(np.nan_to_num(candidates.astype(np.float32), posinf=0.0, neginf=0.0), -1e4, 1e4)
        if raw.shape[-1] == 3:
            points = raw.reshape(-1, _POINTS, 3)
            scores = points[..., 2].mean(1)
            seen = points[..., 2].max(1) >= self._threshold
        else:
            people = raw.reshape(-1, _SEVERAL)
            points, scores = people[:, : 3 * _POINTS].reshape(-1, _POINTS, 3), people[:, -1]
            seen = scores >= self._threshold
        if not seen.any():
            return no_poses(_POINTS)
        return of_keypoints(
            self._placed(points[seen], placement), np.clip(scores[seen], 0, 1), threshold=self._threshold
        )

    def _placed(self, points: Floats, placement: Placement) -> Floats:
        """X, y and score in source pixels."""
        placed = (points * self._scale)[..., [1, 0, 2]]
        placed[..., :2] = placement.to_source(placed[..., :2])
        placed[..., 2] = np.clip(placed[..., 2], 0, 1)
        return placed


Family = MoveNetFamily


def _fits(facts: ModelFacts) -> bool:
    if len(facts.outputs) != 1:
        return False
    shape = facts.outputs[0].shape[1:]
    return shape == (1, _POINTS, 3) or (len(shape) == 2 and shape[1] == _SEVERAL)
