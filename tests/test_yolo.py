"""The YOLO family: heads, thresholds, NMS, labels, and outputs that make no sense."""

from __future__ import annotations

from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis.extra import numpy as npst

from edge_agent.config import PreprocessOptions
from edge_agent.data import Detections, ModelFacts, TensorSpec
from edge_agent.errors import EngineError, ModelError
from edge_agent.families import Meaning, Thresholds
from edge_agent.families.yolo import YoloFamily, YoloOptions
from edge_agent.geometry import place


def family(
    output: tuple[int | None, ...],
    *,
    size: int | None = 64,
    head: Any = "auto",
    labels: list[str] | None = None,
    metadata: dict[str, str] | None = None,
    score: float = 0.4,
    preprocess: PreprocessOptions | None = None,
) -> YoloFamily:
    facts = ModelFacts(
        inputs=(TensorSpec("images", (1, 3, size, size), "float32"),),
        outputs=(TensorSpec("out", output, "float32"),),
        metadata=metadata or {},
    )
    thresholds = Thresholds(score=score, iou=0.5, max_detections=50)
    return YoloFamily(Meaning(facts, YoloOptions(head=head), labels, preprocess or PreprocessOptions(), thresholds))


def decode(family: YoloFamily, output: Any, *, width: int = 64, height: int = 64) -> list[Detections]:
    placement = place(width, height, family.preprocess)
    return [family.decode(found, placement) for found in family.reduce({"out": output})]


def test_dense_head_gives_boxes_in_source_pixels() -> None:
    output = np.zeros((1, 6, 84), np.float32)
    output[0, :, 10] = 32, 32, 16, 8, 0.1, 0.9
    [found] = decode(family((1, 6, 84)), output, width=128, height=96)
    assert found.boxes.tolist() == [[48.0, 40.0, 80.0, 56.0]]
    assert found.class_ids.tolist() == [1]
    assert found.scores.tolist() == pytest.approx([0.9])


def test_yolox_head_decodes_its_grid() -> None:
    cells = 8 * 8 + 4 * 4 + 2 * 2
    output = np.zeros((1, cells, 5 + 3), np.float32)
    cell = 64 + 4 * 2 + 1  # stride 16, row 2, column 1
    output[0, cell] = [0.5, 0.25, np.log(2.0), np.log(1.5), 0.8, 0.1, 0.9, 0.2]
    [found] = decode(family((1, cells, 8), head="yolox"), output)
    assert found.boxes[0].tolist() == pytest.approx([24 - 16, 36 - 12, 24 + 16, 36 + 12])
    assert found.scores.tolist() == pytest.approx([0.72])
    assert found.class_ids.tolist() == [1]


@pytest.mark.parametrize(
    ("shape", "labels", "kind"),
    [
        ((1, 84, 84), 80, "dense"),
        ((1, 7, 84), None, "dense"),
        ((1, 84, 7), 3, "dense"),  # the same, transposed
        ((1, 84, 7), 2, "yolox"),
        ((1, 30, 7), 3, "queries"),
        ((1, 84, 7), None, "yolox"),
        ((1, 252, 7), None, "objectness"),
        ((1, 300, 6), None, "end_to_end"),
    ],
)
def test_a_head_is_told_by_its_shape_and_its_labels(shape: Any, labels: int | None, kind: str) -> None:
    named = {"names": str([f"label {i}" for i in range(labels)])} if labels else {}
    assert family(shape, metadata=named)._head.kind == kind


def test_each_picture_of_a_batch_keeps_its_own_boxes() -> None:
    output = np.zeros((3, 5, 84), np.float32)
    output[0, :, 3] = 10, 10, 4, 4, 0.9
    output[2, :, 5] = 50, 50, 4, 4, 0.8
    found = decode(family((None, 5, 84)), output)
    assert [len(picture) for picture in found] == [1, 0, 1]
    assert found[2].boxes[0].tolist() == [48, 48, 52, 52]


def test_nms_keeps_the_better_of_two_in_a_class_and_both_of_two_classes() -> None:
    output = np.zeros((1, 6, 84), np.float32)
    output[0, :, 0] = 32, 32, 20, 20, 0.6, 0
    output[0, :, 1] = 33, 32, 20, 20, 0.9, 0
    output[0, :, 2] = 32, 33, 20, 20, 0, 0.7
    [found] = decode(family((1, 6, 84)), output)
    assert found.scores.tolist() == pytest.approx([0.9, 0.7])
    assert found.class_ids.tolist() == [0, 1]


@settings(max_examples=150, deadline=None)
@given(
    output=npst.arrays(
        np.float32, (2, 7, 84), elements=st.floats(width=32, allow_nan=True, allow_infinity=True), fill=st.just(0.875)
    ),
    head=st.sampled_from(("dense", "yolox")),
)
def test_no_output_whatever_makes_it_fail_or_report_nonsense(output: Any, head: str) -> None:
    raw = output if head == "dense" else np.ascontiguousarray(output.transpose(0, 2, 1))
    with np.errstate(all="ignore"):
        pictures = decode(family(raw.shape, head=head), raw, width=200, height=100)
    for found in pictures:
        assert len(found) <= 50
        assert np.isfinite(found.boxes).all()
        assert np.isfinite(found.scores).all()
        assert (found.boxes >= 0).all()
        assert (found.boxes <= np.array([200, 100, 200, 100])).all()
        assert found.scores.tolist() == sorted(found.scores.tolist(), reverse=True)


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_the_order_of_cells_does_not_matter(seed: int) -> None:
    rng = np.random.default_rng(seed)
    output = np.zeros((1, 7, 84), np.float32)
    output[0, :4] = rng.uniform(0, 64, (4, 84))
    output[0, 4:] = rng.permutation(3 * 84).reshape(3, 84) / (3 * 84)  # no two scores alike
    shuffled = output[:, :, rng.permutation(84)]
    [a], [b] = decode(family((1, 7, 84)), output), decode(family((1, 7, 84)), shuffled)
    assert np.array_equal(a.boxes, b.boxes)
    assert np.array_equal(a.class_ids, b.class_ids)


def test_labels_come_from_the_entry_then_the_file_then_the_ids() -> None:
    names = {"names": "{1: 'dog', 0: 'cat'}"}
    assert family((1, 6, 84), metadata=names).names.labels == ("cat", "dog")
    assert family((1, 6, 84), metadata=names, labels=["x", "y"]).names.labels == ("x", "y")
    assert family((1, 6, 84)).names.labels == ("class_0", "class_1")


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: family((1, 6, 84), labels=["one"]), "the entry names 1 labels, the model's output has 2 classes"),
        (lambda: family((1, 86, 8)), "does not tell its head"),
        (lambda: family((1, 80, 8), head="yolox"), "the model gives 80 cells, but strides"),
        (lambda: family((1, 100, 7), head="end_to_end"), "has 7 values a box, a detect head of this kind 6"),
        (lambda: family((1, 84)), "a YOLO head is one output"),
        (lambda: family((1, 4, 84)), "leaves no room for classes"),
        (lambda: family((1, None, None), head="dense"), "does not say how many classes"),
        (lambda: family((1, 6, 84), size=None), "set preprocess.size"),
        (lambda: family((1, 6, 84), metadata={"names": "oops("}), "cannot be read"),
        (lambda: family((1, 6, 84), metadata={"names": "5"}), "neither a table by number nor a list"),
        (lambda: family((1, 6, 84), size=None, metadata={"imgsz": "640x640"}), "cannot be read"),
        (lambda: family((1, 6, 84), size=None, metadata={"imgsz": "[1, 2, 3]"}), "set preprocess.size"),
    ],
)
def test_what_cannot_fit_together_is_refused_in_a_sentence(make: Any, sentence: str) -> None:
    with pytest.raises(ModelError, match="(?i)" + sentence.replace("[", r"\[")):
        make()


def test_the_files_own_size_counts_where_the_input_has_none() -> None:
    for text, size in (("640", (640, 640)), ("[480, 640]", (640, 480))):
        spec = family((1, 6, 84), size=None, metadata={"imgsz": text}).preprocess
        assert (spec.width, spec.height) == size


def test_an_output_of_another_size_than_its_strides_make_is_an_engine_error() -> None:
    with pytest.raises(EngineError, match="gave 80 cells where its strides make 84"):
        decode(family((1, None, 8), head="yolox"), np.zeros((1, 80, 8), np.float32))


def test_the_entry_can_change_the_preprocessing() -> None:
    options = PreprocessOptions(size=(96, 64), resize="stretch", color="bgr", mean=(1.0, 2.0, 3.0))
    spec = family((1, 6, 84), size=None, preprocess=options).preprocess
    assert (spec.width, spec.height, spec.resize, spec.color, spec.mean) == (96, 64, "stretch", "bgr", (1.0, 2.0, 3.0))
    assert spec.scale == pytest.approx(1 / 255)
