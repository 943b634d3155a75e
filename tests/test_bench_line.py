"""How the line's benchmark tells whether two loops saw the same."""

from __future__ import annotations

import pytest

pytest.importorskip("onnx", reason="not installed: pip install onnx")
from benchmarks.line import agreement
from benchmarks.rivals import _loop

BOX = [10.0, 10.0, 110.0, 60.0, 0.8, 3.0]


def moved(**changes: float) -> list[float]:
    places = {"x1": 0, "y1": 1, "x2": 2, "y2": 3, "score": 4, "class_id": 5}
    row = list(BOX)
    for name, value in changes.items():
        row[places[name]] = value
    return row


def test_the_same_detections_agree_in_any_order() -> None:
    other = moved(x1=300.0, x2=400.0)
    assert agreement({0: [BOX, other]}, {0: [other, BOX]}) == 1.0


@pytest.mark.parametrize("change", [{"class_id": 4.0}, {"score": 0.75}, {"x1": 30.0}])
def test_another_class_score_or_place_is_another_detection(change: dict[str, float]) -> None:
    assert agreement({0: [BOX]}, {0: [moved(**change)]}) == 0.0


def test_what_only_one_saw_counts_against_both() -> None:
    assert agreement({0: [BOX, moved(x1=300.0, x2=400.0)]}, {0: [BOX]}) == 0.5
    assert agreement({0: [BOX], 1: [BOX]}, {0: [BOX], 1: []}) == 0.5


def test_one_detection_is_the_partner_of_one_other() -> None:
    assert agreement({0: [BOX, BOX]}, {0: [BOX]}) == 0.5


def test_boxes_without_extent_are_left_out() -> None:
    assert agreement({0: [BOX, moved(y2=10.0)]}, {0: [BOX]}) == 1.0


def test_nothing_seen_by_either_is_no_agreement() -> None:
    assert agreement({0: []}, {0: []}) == 0.0


def test_a_film_that_ends_too_early_is_told() -> None:
    meter = _loop.Meter(warm_up=1, frames=3)
    assert not meter.on_frame([BOX])
    with pytest.raises(SystemExit, match="1 frames that can be read; 4 are wanted"):
        meter.tell()
