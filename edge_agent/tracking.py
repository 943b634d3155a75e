"""Which detections of a camera show the same object from frame to frame: a track id for each.

`ByteTracker` follows Zhang et al., "ByteTrack: Multi-Object Tracking by Associating Every Detection Box", arXiv
2110.06864: sure detections are matched first, then those that are not, with boxes that a Kalman filter predicts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from edge_agent import plugins
from edge_agent.config import Config, TrackingOptions
from edge_agent.data import Detections, Poses, Result
from edge_agent.errors import ConfigError
from edge_agent.geometry import iou
from edge_agent.predictions import chosen

Floats = NDArray[np.float64]

_DUPLICATE = 0.15  # distance of a track and a lost one that are the same
_SECOND, _UNCONFIRMED = 0.5, 0.7  # the largest distances of these rounds


class Tracker(Protocol):
    """Follows the objects of one camera."""

    def update(self, boxes: NDArray[np.float32], scores: NDArray[np.float32]) -> NDArray[np.int64]:
        """The track id of each detection of the next frame, -1 where it has none yet."""


class Tracks:
    """Gives results track ids, each camera's its own; a swap of models begins anew.

    `threshold`: detections below it are told only where they belong to a track.
    """

    def __init__(self, make: Callable[[], Tracker], *, threshold: float) -> None:
        self._make = make
        self._threshold = threshold
        self._cameras: dict[str, tuple[object, Tracker]] = {}

    def __call__(self, result: Result) -> Result:
        """The result with track ids; as it is where it holds nothing that could be followed."""
        seen = result.prediction
        if not isinstance(seen, (Detections, Poses)):
            return result
        camera = result.frame.camera
        model, tracker = self._cameras.get(camera, (None, None))
        if tracker is None or model is not result.model:
            tracker = self._make()
            self._cameras[camera] = result.model, tracker
        least = np.full(len(seen), self._threshold, np.float32)
        for class_id, threshold in result.model.thresholds.items():
            least[seen.class_ids == class_id] = threshold
        told = _told(seen, tracker.update(seen.boxes, seen.scores), least)
        return dataclasses.replace(result, prediction=told)

    def forget(self, camera: str) -> None:
        """A camera is gone, or begins anew."""
        self._cameras.pop(camera, None)


def _told(seen: Detections | Poses, track_ids: NDArray[np.int64], least: NDArray[np.float32]) -> Detections | Poses:
    """What reaches its threshold, and what belongs to a track."""
    kept = (seen.scores >= least) | (track_ids >= 0)
    tracked = dataclasses.replace(seen, track_ids=track_ids)
    return tracked if kept.all() else chosen(tracked, np.flatnonzero(kept))


def tracks_of(config: Config) -> Tracks | None:
    """As the configuration wants objects followed, if it does. Raises `ConfigError` where SciPy is missing."""
    if not config.tracking.enabled:
        return None
    ByteTracker(config.tracking)  # whether what it needs is there
    return Tracks(partial(ByteTracker, config.tracking), threshold=config.inference.score_threshold)


class ByteTracker:
    """One camera's tracks. Ids count from 1 and are never given twice."""

    def __init__(self, options: TrackingOptions) -> None:
        self._options = options
        self._assign = _assignment()
        self._frame = 0
        self._last_id = 0
        self._tracked: list[_Track] = []
        self._lost: list[_Track] = []

    def update(self, boxes: NDArray[np.float32], scores: NDArray[np.float32]) -> NDArray[np.int64]:
        self._frame += 1
        options = self._options
        measured = _centered(boxes.astype(np.float64))
        sure = np.flatnonzero(scores > options.high)
        unsure = np.flatnonzero((scores > options.low) & (scores < options.high))
        confirmed = [track for track in self._tracked if track.is_confirmed]
        fresh = [track for track in self._tracked if not track.is_confirmed]
        pool = [*confirmed, *self._lost]
        _predict(pool, {id(track) for track in self._lost})
        owners: list[_Track | None] = [None] * len(scores)

        def match(tracks: Sequence[_Track], places: NDArray[np.intp], most: float, *, fused: bool) -> Any:
            distance = 1.0 - _overlap(tracks, boxes[places])
            if fused:
                distance = 1.0 - (1.0 - distance) * scores[places][None]
            pairs = self._matched(distance, most)
            _correct([tracks[one] for one, _ in pairs], measured[places[[other for _, other in pairs]]])
            for track_at, place_at in pairs:
                tracks[track_at].seen(self._frame)
                owners[int(places[place_at])] = tracks[track_at]
            taken = {track_at for track_at, _ in pairs}
            left = [track for i, track in enumerate(tracks) if i not in taken]
            rest = np.delete(places, [place_at for _, place_at in pairs])
            return left, rest

        left, sure = match(pool, sure, options.match, fused=True)
        still = [track for track in left if track not in self._lost]
        gone, _ = match(still, unsure, _SECOND, fused=False)
        dropped, sure = match(fresh, sure, _UNCONFIRMED, fused=True)
        for place in sure.tolist():
            if scores[place] >= options.new:
                owners[place] = self._begun(measured[place])
        self._sort_out(owners, gone, dropped)
        return np.array(
            [track.number if track is not None and track.is_confirmed else -1 for track in owners], np.int64
        )

    def _matched(self, distance: Floats, most: float) -> list[tuple[int, int]]:
        if not distance.size:
            return []
        rows, columns = self._assign(np.where(distance <= most, distance, most + 1e3))
        return [(int(r), int(c)) for r, c in zip(rows, columns, strict=True) if distance[r, c] <= most]

    def _begun(self, measured: Floats) -> _Track:
        """A track that its second frame will confirm; those of the very first frame need no second."""
        return _Track(measured, self._frame, is_confirmed=self._frame == 1, take_number=self._next_number)

    def _next_number(self) -> int:
        self._last_id += 1
        return self._last_id

    def _sort_out(self, owners: Sequence[_Track | None], gone: Sequence[_Track], dropped: Sequence[_Track]) -> None:
        alive = [track for track in owners if track is not None]
        seen = {id(track) for track in alive}
        lost = [track for track in [*self._lost, *gone] if id(track) not in seen]
        lost = [track for track in lost if self._frame - track.last_frame <= self._options.lost_frames]
        self._tracked, self._lost = _without_duplicates(alive, lost)


class _Track:
    """An object: mean and covariance of cx, cy, aspect, height and their velocities."""

    def __init__(self, measured: Floats, frame: int, *, is_confirmed: bool, take_number: Callable[[], int]) -> None:
        self.mean = np.concatenate((measured, np.zeros(4)))
        height = measured[3]
        deviations = np.array([2 / 20, 2 / 20, 0, 2 / 20, 10 / 160, 10 / 160, 0, 10 / 160]) * height
        deviations[[2, 6]] = 1e-2, 1e-5
        self.covariance = np.diag(deviations**2)
        self.first_frame = self.last_frame = frame
        self.is_confirmed = is_confirmed
        self._take_number = take_number
        self.number = take_number() if is_confirmed else -1

    def seen(self, frame: int) -> None:
        """A detection was this object's; the second one confirms it."""
        self.last_frame = frame
        if not self.is_confirmed:
            self.is_confirmed = True
            self.number = self._take_number()

    @property
    def box(self) -> Floats:
        x, y, aspect, height = self.mean[:4]
        width = aspect * height
        return np.array([x - width / 2, y - height / 2, x + width / 2, y + height / 2])


_MOTION = np.eye(8) + np.eye(8, k=4)


def _predict(tracks: Sequence[_Track], lost: set[int]) -> None:
    """Move tracks to where they will be in the next frame; what is lost keeps its height."""
    if not tracks:
        return
    for track in tracks:
        if id(track) in lost:
            track.mean[7] = 0.0
    means = np.stack([track.mean for track in tracks])
    covariances = np.stack([track.covariance for track in tracks])
    deviations = means[:, 3:4] * np.array([1 / 20, 1 / 20, 0, 1 / 20, 1 / 160, 1 / 160, 0, 1 / 160])
    deviations[:, [2, 6]] = 1e-2, 1e-5
    means = means @ _MOTION.T
    covariances = _MOTION @ covariances @ _MOTION.T + _diagonals(deviations**2)
    for track, mean, covariance in zip(tracks, means, covariances, strict=True):
        track.mean, track.covariance = mean, covariance


def _correct(tracks: Sequence[_Track], measured: Floats) -> None:
    """Move tracks towards where they were seen: measured [N, 4], cx, cy, aspect, height."""
    if not tracks:
        return
    means = np.stack([track.mean for track in tracks])
    covariances = np.stack([track.covariance for track in tracks])
    deviations = np.repeat(means[:, 3:4] / 20, 4, axis=1)
    deviations[:, 2] = 1e-1
    projected = covariances[:, :4, :4] + _diagonals(deviations**2)
    gains = np.linalg.solve(projected, covariances[:, :4]).transpose(0, 2, 1)
    means = means + (gains @ (measured - means[:, :4])[..., None])[..., 0]
    covariances = covariances - gains @ projected @ gains.transpose(0, 2, 1)
    for track, mean, covariance in zip(tracks, means, covariances, strict=True):
        track.mean, track.covariance = mean, covariance


def _diagonals(values: Floats) -> Floats:
    """[N, K, K] of the diagonals [N, K]."""
    matrices: Floats = values[:, :, None] * np.eye(values.shape[1])
    return matrices


def _without_duplicates(tracked: list[_Track], lost: list[_Track]) -> tuple[list[_Track], list[_Track]]:
    """Of a track and a lost one in the same place the one that lived longer stays."""
    if not tracked or not lost:
        return tracked, lost
    boxes = np.stack([track.box for track in lost]).astype(np.float32)
    pairs = np.argwhere(1.0 - _overlap(tracked, boxes) < _DUPLICATE)
    doubled: set[int] = set()
    for one, other in pairs.tolist():
        here, there = tracked[one], lost[other]
        longer = here.last_frame - here.first_frame > there.last_frame - there.first_frame
        doubled.add(id(there if longer else here))
    return (
        [track for track in tracked if id(track) not in doubled],
        [track for track in lost if id(track) not in doubled],
    )


def _overlap(tracks: Sequence[_Track], boxes: NDArray[np.float32]) -> Floats:
    """[tracks, boxes]: intersection over union."""
    if not tracks or not len(boxes):
        return np.zeros((len(tracks), len(boxes)))
    return iou(np.stack([track.box for track in tracks]), boxes)


def _centered(boxes: Floats) -> Floats:
    """Cx, cy, aspect and height of boxes x1 y1 x2 y2."""
    sizes = np.maximum(boxes[:, 2:] - boxes[:, :2], 1e-3)
    centers = boxes[:, :2] + sizes / 2
    return np.stack((centers[:, 0], centers[:, 1], sizes[:, 0] / sizes[:, 1], sizes[:, 1]), 1)


def _assignment() -> Callable[[Floats], tuple[Any, Any]]:
    try:
        from scipy.optimize import linear_sum_assignment
    except ImportError as error:
        raise ConfigError(plugins.missing(error, needed_by="tracking")) from error
    solve: Callable[[Floats], tuple[Any, Any]] = linear_sum_assignment
    return solve
