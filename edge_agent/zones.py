"""Parts of a camera's picture that matter: how many objects are in a zone, and who enters, leaves or crosses a line.

An object is where it stands: at the middle of its box's lower side. Zones and lines are in shares of the picture.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from edge_agent.config import CameraOptions
from edge_agent.data import Crossing, Detections, Event, ModelRef, Poses, Result, TrackState
from edge_agent.predictions import label

Point: TypeAlias = tuple[float, float]


class Watch:
    """Counts and events of all cameras that have zones or lines. `lost_frames`: how many results an object may be
    missing from before it counts as gone."""

    def __init__(self, cameras: Mapping[str, CameraOptions], *, lost_frames: int) -> None:
        self._lost_frames = lost_frames
        self._cameras: dict[str, _CameraWatch] = {}
        for name, options in cameras.items():
            self.follow(name, options)

    def __call__(self, result: Result) -> tuple[Result, Sequence[Event]]:
        """The result with its zones' counts, and what happened since the camera's last one."""
        camera = self._cameras.get(result.frame.camera)
        return camera(result) if camera is not None else (result, ())

    def follow(self, name: str, options: CameraOptions) -> None:
        """A camera is there, or has other zones and lines."""
        if options.zones or options.lines:
            self._cameras[name] = _CameraWatch(_polygons(options), options.lines, self._lost_frames)
        else:
            self.forget(name)

    def forget(self, name: str) -> None:
        """A camera is gone."""
        self._cameras.pop(name, None)


_LAST = np.nextafter(1.0, 0.0)


@dataclass(slots=True)
class _Object:
    state: TrackState
    place: Point
    model: ModelRef
    missing: int = 0


@dataclass(slots=True)
class _CameraWatch:
    """One camera's zones and lines, and the objects that it follows."""

    zones: Mapping[str, NDArray[np.float64]]
    lines: Mapping[str, tuple[Point, Point]]
    lost_frames: int
    _objects: dict[int, _Object] = field(default_factory=dict)
    _model: object = None

    def __call__(self, result: Result) -> tuple[Result, Sequence[Event]]:
        events = list(self._ended(result, all_of_them=self._model is not result.model))
        self._model = result.model
        seen = result.prediction
        if not isinstance(seen, (Detections, Poses)):
            return result, events
        places = _standing(seen.boxes, result)
        inside = {name: _inside(places, polygon) for name, polygon in self.zones.items()}
        labels = [label(result.model.names, class_id) for class_id in seen.class_ids.tolist()]
        counts = {
            name: dict(Counter(one for one, is_in in zip(labels, where, strict=True) if is_in))
            for name, where in inside.items()
        }
        track_ids = [] if seen.track_ids is None else seen.track_ids.tolist()
        for index, track_id in enumerate(track_ids):
            if track_id >= 0:
                zones = tuple(name for name, where in inside.items() if where[index])
                box = tuple(seen.boxes[index].tolist())
                state = TrackState(int(seen.class_ids[index]), float(seen.scores[index]), box, zones)
                events += self._moved(result, track_id, state, (float(places[index, 0]), float(places[index, 1])))
        events += self._missed(result, set(track_ids))
        return dataclasses.replace(result, zone_counts=counts), events

    def _moved(self, result: Result, track_id: int, state: TrackState, place: Point) -> Iterator[Event]:
        known = self._objects.get(track_id)
        self._objects[track_id] = _Object(state, place, result.model)
        if known is None:
            yield Event(result, "new", track_id, None, state, entered=state.zones)
            return
        entered = tuple(name for name in state.zones if name not in known.state.zones)
        left = tuple(name for name in known.state.zones if name not in state.zones)
        crossed = tuple(self._crossed(known.place, place))
        if entered or left or crossed:
            yield Event(result, "update", track_id, known.state, state, entered, left, crossed)

    def _crossed(self, before: Point, after: Point) -> Iterator[Crossing]:
        for name, (start, end) in self.lines.items():
            sides = _side(start, end, before), _side(start, end, after)
            ends = _side(before, after, start), _side(before, after, end)
            if (sides[0] < 0) != (sides[1] < 0) and (ends[0] < 0) != (ends[1] < 0):
                yield Crossing(name, "forward" if sides[1] >= 0 else "backward")

    def _missed(self, result: Result, seen: set[int]) -> Iterator[Event]:
        """Objects that were not seen for too long have gone."""
        for track_id, known in list(self._objects.items()):
            if track_id in seen:
                continue
            known.missing += 1
            if known.missing > self.lost_frames:
                del self._objects[track_id]
                yield Event(result, "end", track_id, known.state, None, left=known.state.zones)

    def _ended(self, result: Result, *, all_of_them: bool) -> Iterator[Event]:
        """Another model begins with objects of its own."""
        if all_of_them:
            for track_id, known in self._objects.items():
                yield Event(
                    dataclasses.replace(result, model=known.model),
                    "end",
                    track_id,
                    known.state,
                    None,
                    left=known.state.zones,
                )
            self._objects.clear()


def _polygons(options: CameraOptions) -> Mapping[str, NDArray[np.float64]]:
    return {name: np.array(corners, np.float64) for name, corners in options.zones.items()}


def _standing(boxes: NDArray[np.float32], result: Result) -> NDArray[np.float64]:
    """[N, 2]: the middle of each box's lower side, in shares of the picture."""
    height, width = result.frame.image.shape[:2]
    middle = (boxes[:, 0] + boxes[:, 2]) / 2 / width
    return np.stack((middle, boxes[:, 3] / height), 1).astype(np.float64)


def _inside(places: NDArray[np.float64], polygon: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Which places lie in a polygon: a ray from there crosses its sides an odd number of times. What stands on the
    lower or right edge of the picture stands in it."""
    ends = np.roll(polygon, -1, 0)
    places = np.minimum(places, _LAST)
    x, y = places[:, :1], places[:, 1:]
    passes = (polygon[:, 1] > y) != (ends[:, 1] > y)
    rise = np.where(ends[:, 1] == polygon[:, 1], 1.0, ends[:, 1] - polygon[:, 1])
    at = polygon[:, 0] + (y - polygon[:, 1]) * (ends[:, 0] - polygon[:, 0]) / rise
    odd: NDArray[np.bool_] = (passes & (x < at)).sum(1) % 2 == 1
    return odd


def _side(start: Point, end: Point, place: Point) -> float:
    """Positive to the right of a line, as one looks along it on the picture."""
    return (end[0] - start[0]) * (place[1] - start[1]) - (end[1] - start[1]) * (place[0] - start[0])
