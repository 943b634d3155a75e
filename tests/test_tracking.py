"""Tracks, zones and lines: ours beside ByteTrack's own implementations, and what is told of objects that move."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

from edge_agent import zones
from edge_agent.config import CameraOptions, TrackingOptions
from edge_agent.data import Detections, Embedding, Event, Frame, Mask, ModelRef, Names, Result, Timings
from edge_agent.tracking import ByteTracker, Tracks
from edge_agent.zones import Watch

HERE = Path(__file__).parent / "references"


def rows(name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    with np.load(HERE / f"{name}.npz") as file:
        return {key: file[key] for key in file.files if key != "meta"}, json.loads(str(file["meta"]))


@pytest.mark.parametrize("name", ["bytetrack", "bytetrack_ultralytics"])
def test_tracks_are_those_of_somebody_elses_bytetrack(name: str) -> None:
    told, _ = rows(name)
    tracker = ByteTracker(TrackingOptions(enabled=True))
    ours = np.full(len(told["frame"]), -2)
    for frame in range(int(told["frame"].max()) + 1):
        here = np.flatnonzero(told["frame"] == frame)
        ours[here] = tracker.update(told["boxes"][here].astype(np.float32), told["scores"][here].astype(np.float32))
    theirs = told["track_ids"]
    assert ((ours < 0) == (theirs < 0)).mean() > 0.99
    both = (ours >= 0) & (theirs >= 0)
    pairs = set(zip(ours[both].tolist(), theirs[both].tolist(), strict=True))
    assert len(pairs) == len({one for one, _ in pairs}) == len({other for _, other in pairs})  # the same, renamed


MODEL = ModelRef("m", "1", "detect", Names(("person", "car")))


def seen(
    *boxes: tuple[float, float, float, float], scores: Sequence[float] | None = None, camera: str = "a", seq: int = 0
) -> Result:
    frame = Frame(camera, seq, np.zeros((100, 200, 3), np.uint8), 0, 0)
    found = Detections(
        np.array(boxes, np.float32).reshape(-1, 4),
        np.array(scores if scores is not None else [0.9] * len(boxes), np.float32),
        np.zeros(len(boxes), np.int64),
    )
    return Result(frame, MODEL, found, Timings(0, 0, 0, 0, 0))


def tracks(threshold: float = 0.4) -> Tracks:
    return Tracks(lambda: ByteTracker(TrackingOptions(enabled=True)), threshold=threshold)


def ids(result: Result) -> list[int]:
    assert isinstance(result.prediction, Detections)
    assert result.prediction.track_ids is not None
    return result.prediction.track_ids.tolist()


def test_a_camera_keeps_its_own_ids_and_another_model_begins_anew() -> None:
    follow = tracks()
    for _ in range(3):
        assert ids(follow(seen((10, 10, 30, 50), (100, 10, 120, 50)))) == [1, 2]
        assert ids(follow(seen((10, 10, 30, 50), camera="b"))) == [1]
    follow(seen((60, 10, 80, 50)))
    assert ids(follow(seen((60, 10, 80, 50)))) == [3]
    other = dataclasses.replace(seen((60, 10, 80, 50)), model=ModelRef("n", "1", "detect", MODEL.names))
    assert ids(follow(other)) == [1]


def test_an_object_that_grows_faint_keeps_its_track_and_what_is_faint_alone_is_not_told() -> None:
    follow = tracks()
    follow(seen((10, 10, 30, 50)))
    result = follow(seen((11, 10, 31, 50), (100, 10, 120, 50), scores=[0.2, 0.2]))
    assert ids(result) == [1]
    assert len(result.prediction) == 1


def test_a_class_has_its_own_threshold_when_followed_too() -> None:
    follow = tracks()
    model = dataclasses.replace(MODEL, thresholds={0: 0.2})
    result = dataclasses.replace(seen((10, 10, 30, 50), scores=[0.3]), model=model)
    assert len(follow(result).prediction) == 1
    assert len(tracks()(seen((10, 10, 30, 50), scores=[0.3])).prediction) == 0


def test_what_cannot_be_followed_goes_through_as_it_is() -> None:
    result = dataclasses.replace(seen(), prediction=Embedding(np.ones(1, np.float32)))
    assert tracks()(result) is result


def test_masks_and_keypoints_stay_with_their_object() -> None:
    follow = tracks()
    result = seen((10, 10, 30, 50), (100, 10, 120, 50), scores=[0.9, 0.2])
    masks = [Mask(10, 10, np.ones((40, 20), bool)), Mask(100, 10, np.ones((40, 20), bool))]
    points = np.arange(2 * 3 * 3, dtype=np.float32).reshape(2, 3, 3)
    result = dataclasses.replace(
        result, prediction=dataclasses.replace(result.prediction, masks=masks, keypoints=points)
    )
    found = follow(result).prediction
    assert isinstance(found, Detections)
    assert found.masks == masks[:1]
    assert found.keypoints is not None
    assert np.array_equal(found.keypoints, points[:1])


@settings(max_examples=50, deadline=None)
@given(
    st.lists(
        st.lists(
            st.tuples(*[st.floats(0, 200, width=32)] * 4, st.floats(0, 1, width=32)),
            max_size=6,
        ),
        max_size=12,
    )
)
def test_whatever_comes_no_id_is_given_twice_in_a_frame(frames: list[list[tuple[float, ...]]]) -> None:
    follow = ByteTracker(TrackingOptions(enabled=True))
    highest = 0
    for rows in frames:
        boxes = np.array([[min(a, c), min(b, d), max(a, c), max(b, d)] for a, b, c, d, _ in rows], np.float32)
        given_ids = follow.update(boxes.reshape(-1, 4), np.array([row[4] for row in rows], np.float32)).tolist()
        known = [one for one in given_ids if one >= 0]
        assert len(known) == len(set(known))
        assert len(given_ids) == len(rows)
        highest = max([highest, *known])


def walk(camera: CameraOptions, places: Sequence[tuple[float, float] | None], *, lost_frames: int = 2) -> list[Event]:
    """Somebody's way over the picture by the places of the feet, in shares of it."""
    watch = Watch({"a": camera}, lost_frames=lost_frames)
    events: list[Event] = []
    for place in places:
        result = seen()
        if place is not None:
            x, y = place[0] * 200, place[1] * 100
            result = seen((x - 5, y - 20, x + 5, y))
            result = dataclasses.replace(
                result, prediction=dataclasses.replace(result.prediction, track_ids=np.array([7]))
            )
        events += watch(result)[1]
    return events


def told(events: Sequence[Event]) -> list[tuple[Any, ...]]:
    return [
        (event.type, event.entered, event.left, tuple((one.line, one.direction) for one in event.crossed))
        for event in events
    ]


YARD = CameraOptions(source="x", zones={"yard": [(0.5, 0), (1, 0), (1, 1), (0.5, 1)]})
GATE = CameraOptions(source="x", lines={"gate": ((0.5, 0.0), (0.5, 1.0))})


def test_who_enters_and_leaves_a_zone_is_told_with_before_and_after() -> None:
    events = walk(YARD, [(0.2, 0.5), (0.4, 0.5), (0.6, 0.5), (0.7, 0.5), (0.3, 0.5), None, None, None])
    assert told(events) == [
        ("new", (), (), ()),
        ("update", ("yard",), (), ()),
        ("update", (), ("yard",), ()),
        ("end", (), (), ()),
    ]
    entered = events[1]
    assert entered.before is not None
    assert entered.after is not None
    assert (entered.before.zones, entered.after.zones) == ((), ("yard",))
    assert (entered.before.box[2], entered.after.box[2]) == pytest.approx((85, 125))


def test_a_line_is_crossed_forward_and_backward_and_not_beyond_its_ends() -> None:
    # From the top of the picture to its bottom: left of the line, as one looks along it, is the picture's right.
    assert told(walk(GATE, [(0.8, 0.5), (0.3, 0.5), (0.6, 0.5)])) == [
        ("new", (), (), ()),
        ("update", (), (), (("gate", "forward"),)),
        ("update", (), (), (("gate", "backward"),)),
    ]
    short = CameraOptions(source="x", lines={"gate": ((0.5, 0.0), (0.5, 0.4))})
    assert told(walk(short, [(0.8, 0.5), (0.3, 0.5)])) == [("new", (), (), ())]


def test_another_model_ends_all_that_was_followed() -> None:
    watch = Watch({"a": YARD}, lost_frames=30)
    first = seen((150, 10, 170, 50))
    first = dataclasses.replace(first, prediction=dataclasses.replace(first.prediction, track_ids=np.array([1])))
    assert told(watch(first)[1]) == [("new", ("yard",), (), ())]
    second = dataclasses.replace(first, model=ModelRef("n", "1", "detect", MODEL.names))
    events = watch(second)[1]
    assert told(events) == [("end", (), ("yard",), ()), ("new", ("yard",), (), ())]
    assert events[0].result.model is MODEL  # whose labels it had
    blind = dataclasses.replace(second, model=ModelRef("c", "1", "embed"), prediction=Embedding(np.ones(1, np.float32)))
    assert told(watch(blind)[1]) == [("end", (), ("yard",), ())]


@settings(max_examples=100, deadline=None)
@given(
    corners=st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=3, max_size=8),
    places=st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=1, max_size=10),
)
def test_what_is_inside_a_zone_is_what_opencv_finds_inside(
    corners: list[tuple[float, float]], places: list[tuple[float, float]]
) -> None:
    polygon = np.array(corners, np.float64).round(3)
    area = float(np.abs(cv2.contourArea(polygon.astype(np.float32))))
    hull = cv2.convexHull(polygon.astype(np.float32))[:, 0].astype(np.float64)
    if area < 1e-3 or len(hull) < 3:
        return
    ours = zones._inside(np.array(places), hull)
    for is_in, place in zip(ours.tolist(), places, strict=True):
        distance = cv2.pointPolygonTest(hull.astype(np.float32), place, True)
        if abs(distance) > 1e-3:
            assert is_in == (distance > 0)


def test_zones_are_counted_without_tracks() -> None:
    result, events = Watch({"a": YARD}, lost_frames=3)(seen((150, 10, 170, 50), (10, 10, 30, 50)))
    assert result.zone_counts == {"yard": {"person": 1}}
    assert events == []


def test_what_stands_on_the_lower_edge_of_the_picture_stands_in_a_zone_over_all_of_it() -> None:
    picture = np.array([(0, 0), (1, 0), (1, 1), (0, 1)], np.float64)
    assert zones._inside(np.array([(0.5, 1.0), (1.0, 0.5), (0.0, 0.0), (1.0, 1.0)]), picture).all()
