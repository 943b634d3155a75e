"""Letterbox, stretch and crop: there and back again, and what the pictures really show."""

from __future__ import annotations

from typing import Any

import cv2
import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

from edge_agent.data import PreprocessSpec
from edge_agent.geometry import place
from edge_agent.imaging import Preprocessor

sides = st.integers(1, 7680)
inputs = st.integers(16, 1280)
resizes = st.sampled_from(("letterbox", "stretch", "crop"))
anchors = st.sampled_from(("center", "top-left"))


@settings(max_examples=500, deadline=None)
@given(w=sides, h=sides, iw=inputs, ih=inputs, resize=resizes, anchor=anchors, fx=st.floats(0, 1), fy=st.floats(0, 1))
def test_to_input_and_back_is_the_identity_within_half_a_pixel(
    w: int, h: int, iw: int, ih: int, resize: Any, anchor: Any, fx: float, fy: float
) -> None:
    placement = place(w, h, PreprocessSpec(iw, ih, resize=resize, anchor=anchor))
    point = np.array([[fx * w, fy * h]], np.float32)
    back = placement.to_source(placement.to_input(point))
    assert np.abs(back - point).max() <= 0.5
    box = np.array([[0, 0, fx * w, fy * h]], np.float32)
    assert np.abs(placement.to_source(placement.to_input(box)) - box).max() <= 0.5


@settings(max_examples=300, deadline=None)
@given(w=sides, h=sides, iw=inputs, ih=inputs, anchor=anchors)
def test_a_letterboxed_picture_lies_inside_and_touches_two_sides(w: int, h: int, iw: int, ih: int, anchor: Any) -> None:
    p = place(w, h, PreprocessSpec(iw, ih, anchor=anchor))
    assert 0 <= p.left <= p.left + p.width <= iw
    assert 0 <= p.top <= p.top + p.height <= ih
    assert p.width == iw or p.height == ih
    assert abs(p.scale_x * h - p.height) <= 1 + h / w or abs(p.scale_y * w - p.width) <= 1 + w / h


@settings(max_examples=200, deadline=None)
@given(w=sides, h=sides, resize=resizes, boxes=st.lists(st.tuples(*[st.floats(-1e6, 1e6, width=32)] * 4), max_size=5))
def test_boxes_brought_back_lie_in_the_frame(w: int, h: int, resize: Any, boxes: list[Any]) -> None:
    placement = place(w, h, PreprocessSpec(320, 320, resize=resize))
    back = placement.to_source(np.array(boxes, np.float32).reshape(-1, 4))
    assert back.dtype == np.float32
    assert (back >= 0).all()
    assert (back <= np.array([w, h, w, h])).all()


@pytest.mark.parametrize("resize", ["letterbox", "stretch", "crop"])
@pytest.mark.parametrize("size", [(640, 480), (480, 640), (333, 777), (320, 320), (97, 53)])
def test_a_mark_in_the_picture_appears_where_the_geometry_says(resize: Any, size: tuple[int, int]) -> None:
    width, height = size
    spec = PreprocessSpec(320, 256, resize=resize, color="bgr", scale=1.0)
    at = np.array([[int(width * 0.45) + 0.5, int(height * 0.55) + 0.5]], np.float32)
    image = np.zeros((height, width, 3), np.uint8)
    cv2.circle(image, (int(at[0, 0]), int(at[0, 1])), max(3, min(size) // 20), (255, 255, 255), -1)
    out = np.empty((3, 256, 320), np.float32)
    placement = Preprocessor(spec)(image, out)
    bright = out[0] > 160
    rows, columns = np.nonzero(bright)
    center = np.array([columns.mean() + 0.5, rows.mean() + 0.5])
    assert np.abs(center - placement.to_input(at)[0]).max() < 1.6


@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.parametrize("color", ["rgb", "bgr"])
@pytest.mark.parametrize("dtype", ["float32", "float16", "uint8"])
@pytest.mark.parametrize("normalize", [False, True])
def test_the_preprocessor_keeps_to_the_formula(layout: Any, color: Any, dtype: Any, normalize: bool) -> None:
    extra: dict[str, Any] = {"scale": 1.0}
    if normalize and dtype != "uint8":
        extra = {"scale": 1 / 255, "mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
    spec = PreprocessSpec(40, 30, layout=layout, color=color, dtype=dtype, pad=114, **extra)
    image = np.random.default_rng(1).integers(0, 256, (30, 30, 3), dtype=np.uint8)
    shape = (3, 30, 40) if layout == "nchw" else (30, 40, 3)
    out = np.empty(shape, dtype)
    placement = Preprocessor(spec)(image, out)
    assert (placement.left, placement.top, placement.width, placement.height) == (5, 0, 30, 30)
    canvas = np.full((30, 40, 3), 114, np.float64)
    canvas[:, 5:35] = image
    if color == "rgb":
        canvas = canvas[..., ::-1]
    wanted = (canvas * spec.scale - np.array(spec.mean)) / np.array(spec.std)
    got = out if layout == "nhwc" else out.transpose(1, 2, 0)
    assert np.allclose(got, wanted, atol=5e-3 if dtype == "float16" else 1e-5)


def test_a_preprocessor_leaves_no_trace_of_a_picture_of_another_shape() -> None:
    preprocess = Preprocessor(PreprocessSpec(64, 64, scale=1.0))
    out, fresh = np.empty((3, 64, 64), np.float32), np.empty((3, 64, 64), np.float32)
    preprocess(np.full((64, 64, 3), 255, np.uint8), out)
    wide = np.full((20, 64, 3), 7, np.uint8)
    preprocess(wide, out)
    Preprocessor(PreprocessSpec(64, 64, scale=1.0))(wide, fresh)
    assert np.array_equal(out, fresh)
