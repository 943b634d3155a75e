"""All families, held to one contract: what is no sense in an output is none in a message."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

import hypothesis.strategies as st
import msgspec
import numpy as np
import pytest
from hypothesis import given, settings

from edge_agent import plugins
from edge_agent.config import InferenceOptions, ModelOptions, PreprocessOptions
from edge_agent.data import (
    Classes,
    DepthMap,
    Detections,
    Embedding,
    ModelFacts,
    Poses,
    RawTensors,
    Segmentation,
    TensorSpec,
)
from edge_agent.drawing import draw
from edge_agent.errors import EngineError, ModelError
from edge_agent.families import Family
from edge_agent.geometry import place
from edge_agent.models.inspect import make_family, propose
from edge_agent.predictions import described

LOW = InferenceOptions(score_threshold=0.25, max_detections=20)


@dataclass(frozen=True)
class Model:
    """A model by its shapes alone; the input is 64x64 unless told."""

    family: str
    outputs: dict[str, tuple[int, ...]]
    options: dict[str, Any] = field(default_factory=dict)
    labels: int | None = None
    metadata: dict[str, str] = field(default_factory=dict)
    input: tuple[int, ...] = (2, 3, 64, 64)
    dtype: str = "float32"

    @property
    def facts(self) -> ModelFacts:
        outputs = tuple(TensorSpec(name, shape, self.dtype) for name, shape in self.outputs.items())
        return ModelFacts((TensorSpec("images", self.input, "float32"),), outputs, self.metadata)

    def make(self, **preprocess: Any) -> Family:
        labels = None if self.labels is None else [f"label {i}" for i in range(self.labels)]
        entry = ModelOptions(path="m.onnx", family=self.family, options=self.options)
        entry.preprocess = PreprocessOptions(**preprocess)
        return make_family(self.facts, entry, labels, LOW)[0]


MODELS = {
    "dense": Model("yolo", {"out": (2, 7, 84)}),
    "objectness": Model("yolo", {"out": (2, 252, 8)}),
    "yolox": Model("yolo", {"out": (2, 84, 8)}),
    "end_to_end": Model("yolo", {"out": (2, 30, 6)}, labels=3),
    "segment": Model("yolo", {"out": (2, 4 + 2 + 8, 84), "protos": (2, 8, 16, 16)}),
    "pose": Model("yolo", {"out": (2, 4 + 1 + 6, 84)}, metadata={"task": "pose", "kpt_shape": "[2, 3]"}),
    "obb": Model("yolo", {"out": (2, 4 + 2 + 1, 84)}, metadata={"task": "obb"}),
    "grids": Model("yolo_grids", {"a": (2, 21, 8, 8), "b": (2, 21, 4, 4), "c": (2, 21, 2, 2)}),
    "grids v3": Model("yolo_grids", {"a": (2, 8, 8, 21), "b": (2, 4, 4, 21)}, {"style": "v3"}),
    "nanodet": Model("nanodet", {"c": (2, 64, 3), "d": (2, 64, 32), "e": (2, 16, 3), "f": (2, 16, 32)}),
    "detr": Model("detr", {"logits": (2, 20, 3), "pred_boxes": (2, 20, 4)}),
    "detr softmax": Model("detr", {"logits": (2, 20, 4), "pred_boxes": (2, 20, 4)}, labels=3),
    "ssd": Model("ssd", {"num": (2, 1), "boxes": (2, 20, 4), "scores": (2, 20), "classes": (2, 20)}, labels=3),
    "ssd dense": Model("ssd", {"boxes": (2, 40, 4), "scores": (2, 40, 3)}),
    "ssd scored": Model("ssd", {"dets": (2, 40, 5), "labels": (2, 40)}, labels=3),
    "ssd turned": Model("ssd", {"boxes": (2, 40, 4), "scores": (2, 3, 40)}),
    "ssd sigmoid": Model("ssd", {"boxes": (2, 40, 4), "scores": (2, 40, 3)}, {"activation": "sigmoid"}),
    "ssd softmax": Model("ssd", {"boxes": (2, 40, 4), "scores": (2, 40, 3)}, {"activation": "softmax"}),
    "yunet": Model(
        "yunet",
        {
            f"{part}_{stride}": (2, (64 // stride) ** 2, width)
            for stride in (8, 16, 32)
            for part, width in (("cls", 1), ("obj", 1), ("bbox", 4), ("kps", 10))
        },
    ),
    "segmentation": Model("segmentation", {"out": (2, 4, 16, 16)}),
    "segmentation last": Model("segmentation", {"out": (2, 16, 16, 3)}, {"mask": True, "resolution": "source"}),
    "segmentation binary": Model("segmentation", {"out": (2, 1, 16, 16)}),
    "movenet": Model("movenet", {"out": (2, 1, 17, 3)}),
    "movenet several": Model("movenet", {"out": (2, 6, 56)}),
    "simcc": Model("simcc", {"simcc_x": (2, 17, 128), "simcc_y": (2, 17, 128)}),
    "heatmaps": Model("heatmaps", {"out": (2, 17, 16, 16)}),
    "heatmaps several": Model("heatmaps", {"heatmaps": (2, 16, 16, 5)}, {"people": "several", "refine": "parabola"}),
    "heatmaps dark": Model("heatmaps", {"out": (2, 17, 16, 16)}, {"refine": "dark", "scores": "logits"}),
    "posenet": Model("posenet", {"h": (2, 5, 5, 17), "o": (2, 5, 5, 34), "f": (2, 5, 5, 32), "b": (2, 5, 5, 32)}),
    "classification": Model("classification", {"out": (2, 10)}),
    "multi-label": Model("classification", {"out": (2, 10)}, {"activation": "sigmoid"}),
    "depth": Model("depth", {"depth": (2, 1, 32, 32)}, {"png": True}),
    "embedding": Model("embedding", {"embedding": (2, 16)}),
    "raw": Model("raw", {"policy": (2, 7), "map": (2, 30, 30), "all": (2, 300, 300)}),
}
SPECIAL = (0.0, 1.0, -1.0, 0.5, np.nan, np.inf, -np.inf, 3e38, -3e38, 1e-38, 100.0, 65504.0)


def outputs_of(model: Model, seed: int, kind: str) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    made = {}
    for name, shape in model.outputs.items():
        values = rng.choice(np.array(SPECIAL, np.float32), shape) if kind == "special" else rng.normal(0, 3, shape)
        if kind == "some":
            values = np.where(rng.random(shape) < 0.05, rng.choice(np.array(SPECIAL, np.float32), shape), values)
        made[name] = {"zeros": np.zeros(shape), "nan": np.full(shape, np.nan)}.get(kind, values).astype(model.dtype)
    return made


def test_every_family_is_here() -> None:
    assert {model.family for model in MODELS.values()} == set(plugins.names("families"))


@pytest.mark.parametrize("name", MODELS)
def test_every_family_recognises_its_own(name: str) -> None:
    model = MODELS[name]
    assert plugins.load("families", model.family).recognise(model.facts) is not None


@pytest.mark.parametrize("name", MODELS)
@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    kind=st.sampled_from(("zeros", "nan", "special", "some", "normal")),
    size=st.tuples(st.integers(1, 700), st.integers(1, 700)),
    resize=st.sampled_from(("letterbox", "stretch", "crop")),
)
def test_no_output_whatever_makes_a_message_of_nonsense(
    name: str, seed: int, kind: str, size: tuple[int, int], resize: str
) -> None:
    model = MODELS[name]
    family = model.make(resize=resize)
    with np.errstate(all="ignore"):
        pictures = family.reduce(outputs_of(model, seed, kind))
        assert len(pictures) == 2
        for candidates in pictures:
            prediction = family.decode(candidates, place(*size, family.preprocess))
            [(key, told)] = described(prediction, family.names, size[::-1]).items()
            assert all(np.isfinite(number) for number in numbers(msgspec.to_builtins({key: told})))
            require_sense(prediction, size)


def numbers(value: Any) -> list[float]:
    if isinstance(value, dict):
        return [number for inner in value.values() for number in numbers(inner)]
    if isinstance(value, list):
        return [number for inner in value for number in numbers(inner)]
    return [value] if isinstance(value, (int, float)) else []


def require_sense(prediction: Any, size: tuple[int, int]) -> None:
    width, height = size
    if isinstance(prediction, (Detections, Poses)):
        assert len(prediction) <= 20
        assert (prediction.boxes >= 0).all()
        assert (prediction.boxes <= np.array([width, height, width, height])).all()
        assert prediction.scores.tolist() == sorted(prediction.scores.tolist(), reverse=True)
    if isinstance(prediction, Poses) or (isinstance(prediction, Detections) and prediction.keypoints is not None):
        assert prediction.keypoints is not None
        assert (prediction.keypoints[..., :2] >= 0).all()
        assert (prediction.keypoints[..., :2] <= np.array([width, height])).all()
    if isinstance(prediction, Detections) and prediction.masks is not None:
        for mask in prediction.masks:
            assert mask.left + mask.bits.shape[1] <= width
            assert mask.top + mask.bits.shape[0] <= height
    if isinstance(prediction, Segmentation):
        assert prediction.ratios.sum() == pytest.approx(1)
    if isinstance(prediction, Embedding):
        assert np.linalg.norm(prediction.vector) == pytest.approx(1, abs=1e-3) or not prediction.vector.any()
    if isinstance(prediction, Classes):
        assert len(prediction) <= 5


@pytest.mark.parametrize("name", MODELS)
def test_whatever_is_seen_can_be_drawn_on_any_picture(name: str) -> None:
    model = MODELS[name]
    family = model.make()
    with np.errstate(all="ignore"):
        for shape in ((1, 1, 3), (5, 300, 3), (480, 20, 3)):
            candidates = family.reduce(outputs_of(model, 1, "normal"))[0]
            prediction = family.decode(candidates, place(shape[1], shape[0], family.preprocess))
            image = np.zeros(shape, np.uint8)
            draw(image, prediction, family.names, title="title")
            assert image.any()


@pytest.mark.parametrize("name", ["dense", "objectness", "grids", "nanodet", "detr", "ssd", "ssd dense"])
@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_the_order_of_candidates_changes_nothing(name: str, seed: int) -> None:
    """NMS and sorting do not lean on the order in which candidates come, where no two are alike."""
    model = MODELS[name]
    family = model.make()
    rng = np.random.default_rng(seed)
    candidates = family.reduce(outputs_of(model, seed, "normal"))[0]
    if name in ("objectness", "grids", "ssd", "ssd dense", "nanodet"):
        candidates.scores[:] = rng.permutation(len(candidates)) / max(1, len(candidates)) * 0.7 + 0.26
    mixed = rng.permutation(len(candidates))
    shuffled = type(candidates)(
        candidates.cells[mixed], candidates.boxes[mixed], candidates.scores[mixed], candidates.class_ids[mixed]
    )
    at = place(300, 200, family.preprocess)
    one, other = family.decode(candidates, at), family.decode(shuffled, at)
    assert np.array_equal(one.boxes, other.boxes)
    assert np.array_equal(one.class_ids, other.class_ids)


def test_a_peak_off_the_diagonal_has_its_column_as_x() -> None:
    heat = np.zeros((2, 17, 16, 16), np.float32)
    heat[:, :, 3, 10] = 0.9  # row 3, column 10
    family = MODELS["heatmaps"].make()
    pose = family.decode(family.reduce({"out": heat})[0], place(64, 64, family.preprocess))
    assert pose.keypoints[0, 0].tolist() == pytest.approx([40, 12, 0.9], abs=0.01)
    points = np.zeros((2, 1, 17, 3), np.float32)
    points[..., :] = 0.25, 0.75, 0.9  # y, x, score
    family = MODELS["movenet"].make()
    pose = family.decode(family.reduce({"out": points})[0], place(64, 64, family.preprocess))
    assert pose.keypoints[0, 0].tolist() == pytest.approx([48, 16, 0.9], abs=0.01)


def test_heatmaps_of_several_people_are_told_apart() -> None:
    heat = np.zeros((2, 16, 16, 5), np.float32)
    for keypoint in range(5):
        heat[0, 2 + keypoint, 3, keypoint] = 0.9
        heat[0, 2 + keypoint, 12, keypoint] = 0.8
    family = MODELS["heatmaps several"].make()
    poses = family.decode(family.reduce({"heatmaps": heat})[0], place(64, 64, family.preprocess))
    assert len(poses) == 2
    assert poses.keypoints[0, :, 0].tolist() == pytest.approx([12] * 5)
    assert poses.keypoints[1, :, 0].tolist() == pytest.approx([48] * 5)
    assert poses.keypoints[1, :, 1].tolist() == pytest.approx([8, 12, 16, 20, 24])


def test_regions_have_box_area_centroid_and_score_in_source_pixels() -> None:
    logits = np.zeros((2, 4, 16, 16), np.float32)
    logits[:, 0] = 5
    logits[0, 2, 4:8, 2:10] = 9
    family = MODELS["segmentation"].make(resize="stretch")
    seen = family.decode(family.reduce({"out": logits})[0], place(160, 320, family.preprocess))
    [other, region] = sorted(seen.regions, key=lambda one: one.class_id)
    assert (other.class_id, region.class_id) == (0, 2)
    assert region.box == (20, 80, 100, 160)
    assert region.area == pytest.approx(4 * 8 * 10 * 20)
    assert region.centroid == pytest.approx((60, 120))
    assert region.score == pytest.approx(1 / (1 + np.exp(-4) + 2 * np.exp(-9)), abs=1e-4)
    assert seen.ratios.tolist() == pytest.approx([1 - 32 / 256, 0, 32 / 256, 0])


def test_letterboxed_maps_are_cut_to_the_picture() -> None:
    labels = np.zeros((2, 4, 16, 16), np.float32)
    labels[:, 1, :4] = 1  # the padding above a wide picture
    labels[:, 2, 4:12] = 1
    family = MODELS["segmentation"].make(resize="letterbox")
    seen = family.decode(family.reduce({"out": labels})[0], place(200, 100, family.preprocess))
    assert seen.class_map.shape == (8, 16)
    assert seen.ratios[2] == 1


def test_classes_of_softmax_probabilities_and_several_labels() -> None:
    logits = np.zeros((2, 10), np.float32)
    logits[0, 3], logits[0, 5] = 5, 4
    plain, several = MODELS["classification"].make(), MODELS["multi-label"].make()
    at = place(10, 10, plain.preprocess)
    seen = plain.decode(plain.reduce({"out": logits})[0], at)
    assert seen.class_ids[:2].tolist() == [3, 5]
    assert seen.scores[0] == pytest.approx(np.exp(5) / (np.exp(5) + np.exp(4) + 8))
    already = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    assert plain.decode(plain.reduce({"out": already})[0], at).scores == pytest.approx(seen.scores)
    logits[0] = -9
    assert len(several.decode(several.reduce({"out": logits})[0], at)) == 0
    logits[0, [1, 2]] = 2
    both = several.decode(several.reduce({"out": logits})[0], at)
    assert both.class_ids.tolist() == [1, 2]
    assert both.scores == pytest.approx([1 / (1 + np.exp(-2))] * 2)


def test_a_map_of_depths_keeps_its_unit_and_its_png_its_range() -> None:
    import cv2

    depths = np.tile(np.linspace(2, 10, 32, dtype=np.float32), (2, 1, 32, 1))
    family = MODELS["depth"].make(resize="stretch")
    seen = family.decode(family.reduce({"depth": depths})[0], place(64, 64, family.preprocess))
    assert isinstance(seen, DepthMap)
    assert (seen.values.min(), seen.values.max()) == (2, 10)
    assert seen.png is not None
    levels = cv2.imdecode(np.frombuffer(seen.png, np.uint8), cv2.IMREAD_UNCHANGED)
    assert levels.dtype == np.uint16
    assert (levels.min(), levels.max()) == (1, 65535)


def test_raw_tensors_are_listed_packed_or_summed_up_by_their_size() -> None:
    model = MODELS["raw"]
    family = model.make()
    outputs = outputs_of(model, 3, "normal")
    outputs["policy"][0, 0] = np.nan
    prediction = family.decode(family.reduce(outputs)[0], place(64, 64, family.preprocess))
    assert isinstance(prediction, RawTensors)
    told = msgspec.to_builtins(described(prediction, family.names, (64, 64))["tensors"])
    assert told["policy"]["data"][0] is None
    assert told["policy"]["data"][1:] == pytest.approx(outputs["policy"][0, 1:].tolist(), rel=1e-5)
    import base64

    assert base64.b64decode(told["map"]["base64"]) == outputs["map"][0].astype("<f4").tobytes()
    assert told["all"].keys() == {"shape", "dtype", "min", "max", "mean"}


def test_outputs_in_whole_numbers_are_made_real_where_the_entry_tells_their_scale() -> None:
    facts = ModelFacts((TensorSpec("images", (1, 64, 64, 3), "uint8"),), (TensorSpec("out", (1, 7, 84), "uint8"),), {})
    entry = ModelOptions(path="m.onnx", dequantize={"out": (0.5, 2.0)})
    family, proposal = make_family(facts, entry, None, InferenceOptions(score_threshold=2.0))
    assert proposal.family == "yolo"
    assert (family.reduction, family.preprocess.layout, family.preprocess.dtype) == (None, "nhwc", "uint8")
    output = np.full((1, 7, 84), 2, np.uint8)
    output[0, :, 3] = 66, 66, 42, 22, 2, 8, 2  # 32, 32, 20, 10, and a score of 3
    found = family.decode(family.reduce({"out": output})[0], place(64, 64, family.preprocess))
    assert found.boxes.tolist() == [[22, 27, 42, 37]]
    assert (found.class_ids.tolist(), found.scores.tolist()) == ([1], [3])
    with pytest.raises(ModelError, match="dequantize: the model has no output 'ou'; did you mean 'out'"):
        make_family(facts, ModelOptions(path="m.onnx", dequantize={"ou": (0.5, 2.0)}), None, LOW)


def test_thresholds_by_class_and_suppression_over_all_classes() -> None:
    outputs = np.zeros((2, 7, 84), np.float32)
    outputs[0, :, 0] = 32, 32, 20, 20, 0.5, 0, 0
    outputs[0, :, 1] = 33, 32, 20, 20, 0, 0.4, 0
    for options, seen in (
        ({}, [0, 1]),
        ({"nms": "agnostic"}, [0]),
        ({"class_thresholds": {"class_0": 0.6}}, [1]),
        ({"class_thresholds": {"class_1": 0.45}}, [0]),
        ({"nms": "none", "top_k": 1}, [0]),
    ):
        family = Model("yolo", {"out": (2, 7, 84)}, options).make()
        found = family.decode(family.reduce({"out": outputs})[0], place(64, 64, family.preprocess))
        assert found.class_ids.tolist() == seen, options


@pytest.mark.parametrize(
    ("model", "sentence"),
    [
        (Model("yolo", {"out": (2, 7, 84)}, labels=2), "the entry names 2 labels, the model's output has 3 classes"),
        (Model("yolo", {"out": (2, 7, 84)}, {"class_thresholds": {"x": 0.5}}), "class_thresholds: there is no label"),
        (Model("yolo_grids", {"a": (2, 20, 8, 8), "b": (2, 20, 4, 4)}), "is no grid with 3 anchors"),
        (Model("yolo_grids", {"a": (2, 21, 8, 8)}, {"anchors": []}), "options.anchors has 0 lists, the model 1 grids"),
        (Model("nanodet", {"a": (2, 64, 3)}), "leave no room for classes"),
        (Model("detr", {"a": (2, 20, 3)}), "a transformer has outputs"),
        (Model("ssd", {"a": (2, 20, 6)}), "no output holds boxes"),
        (Model("ssd", {"a": (2, 20, 5)}), "no outputs hold scores and classes"),
        (
            Model("ssd", {"a": (2, 20, 4), "b": (2, 20), "c": (2, 20, 9)}, {"outputs": {"classes": "c"}}),
            "is not one value",
        ),
        (Model("ssd", {"a": (20, 6)}, {"columns": ["x1", "score"]}), "options.columns wants x1, y1"),
        (Model("ssd", {"a": (2, 20, 4)}, {"outputs": {"boxes": "b"}}), "there is no output 'b'"),
        (Model("yunet", {"cls_8": (2, 64, 1)}), "a YuNet model has the outputs"),
        (Model("segmentation", {"a": (2, 20)}), "segmentation wants an output"),
        (Model("segmentation", {"a": (2, 4, 9, 9)}, labels=3), "names 3 labels, the model's output has 4"),
        (Model("segmentation", {"a": (2, 4, 9, 9)}, {"palette": "x"}), "is none of auto, voc"),
        (Model("movenet", {"a": (2, 20)}), "a MoveNet model gives"),
        (Model("simcc", {"a": (2, 20)}), "a SimCC model gives"),
        (Model("heatmaps", {"a": (2, 20)}), "heatmaps are"),
        (Model("heatmaps", {"a": (2, 4, 9, 9)}, {"keypoints": ["a"]}), "names 1, the model has 4 keypoints"),
        (Model("heatmaps", {"a": (2, 4, 9, 9)}, {"skeleton": [[0, 4]]}), "joins keypoints that are not there"),
        (Model("posenet", {"a": (2, 20)}), "PoseNet gives"),
        (Model("classification", {"a": (2, 3, 9)}), "a classifier gives"),
        (Model("depth", {"a": (2, 20)}), "a depth model gives one number a pixel"),
        (Model("embedding", {"a": (2, 3, 20)}), "an embedding is one vector"),
        (Model("raw", {"a": (2, 7)}, input=(2, 4, 64, 64)), "three channels, first or last"),
        (Model("raw", {"a": (2, 7)}, input=(2, 3)), "the model takes no picture"),
        (Model("raw", {"a": (2, 7)}, {"inlin": 3}), "unknown field `inlin`"),
    ],
)
def test_what_cannot_fit_together_is_refused_in_a_sentence(model: Model, sentence: str) -> None:
    with pytest.raises(ModelError) as caught:
        model.make()
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("model", "family"),
    [
        (Model("", {"out": (1, 84, 8400)}, input=(1, 3, 640, 640)), "yolo"),
        (Model("", {"out": (1, 25200, 85)}, input=(1, 3, 640, 640)), "yolo"),
        (Model("", {"out": (1, 300, 6)}, input=(1, 3, 640, 640)), "yolo"),
        (Model("", {"out": (1, 116, 8400), "p": (1, 32, 160, 160)}, input=(1, 3, 640, 640)), "yolo"),
        (Model("", {"a": (1, 255, 80, 80), "b": (1, 255, 40, 40), "c": (1, 255, 20, 20)}), "yolo_grids"),
        (Model("", {"logits": (1, 300, 80), "pred_boxes": (1, 300, 4)}), "detr"),
        (Model("", {"dets": (1, 300, 4), "labels": (1, 300, 91)}), "detr"),
        (Model("", {"num_dets": (1, 1), "det_boxes": (1, 9, 4), "det_scores": (1, 9), "det_classes": (1, 9)}), "ssd"),
        (Model("", {"scores": (1, 4420, 2), "boxes": (1, 4420, 4)}), "ssd"),
        (Model("", {"out": (1, 1000)}), "classification"),
        (Model("", {"logits": (1, 150, 128, 128)}), "segmentation"),
        (Model("", {"predicted_depth": (1, 64, 64)}), "depth"),
        (Model("", {"image_embeds": (1, 512)}), "embedding"),
        (Model("", {"heatmaps": (1, 17, 64, 48)}), "heatmaps"),
        (Model("", {"out": (1, 17, 64, 48)}, input=(1, 3, 256, 192)), "heatmaps"),
        (Model("", {"out": (1, 256, 384)}, input=(1, 3, 256, 384)), "depth"),
        (Model("", {"out": (1, 512, 1024)}, input=(1, 3, 512, 1024), dtype="int64"), "segmentation"),
        (Model("", {"out": (1, 1, 320, 320), "aux": (1, 1, 320, 320)}, input=(1, 3, 320, 320)), "segmentation"),
        (Model("", {"out": (1, 25500, 85)}, input=(1, 3, 640, 640)), "yolo"),
        (Model("", {"dets": (1, 300, 4), "labels": (1, 300, 4)}), "detr"),
        (Model("", {"action": (1, 100, 6)}), "raw"),
        (Model("", {"fc1": (1, 512)}, input=(1, 3, 112, 112)), "embedding"),
        (Model("", {"actions": (1, 5, 7, 3, 2)}), "raw"),
    ],
)
def test_models_are_told_by_their_outputs(model: Model, family: str) -> None:
    proposal = propose(model.facts)
    assert proposal.family == family
    assert proposal.because


def test_a_list_of_rows_is_read_by_its_columns_one_picture_at_a_time() -> None:
    facts = ModelFacts(
        (TensorSpec("images", (None, 3, 64, 64), "float32"),), (TensorSpec("out", (None, 7), "float32"),)
    )
    family, proposal = make_family(facts, ModelOptions(path="m.onnx"), ["a", "b"], LOW)
    assert (proposal.family, family.takes_batches) == ("ssd", False)
    rows = np.array([[0, 8, 16, 40, 48, 1, 0.9], [0, 8, 16, 40, 48, 5, 0.9], [0, 1, 2, 3, 4, 0, 0.1]], np.float32)
    [candidates] = family.reduce({"out": rows})
    found = family.decode(candidates, place(64, 64, family.preprocess))
    assert found.boxes.tolist() == [[8, 16, 40, 48]]
    assert found.class_ids.tolist() == [1]
    own = ModelOptions(path="m.onnx", options={"columns": ["class", "score", "y1", "x1", "y2", "x2", "batch"]})
    family, _ = make_family(facts, own, ["a", "b"], LOW)
    rows = np.array([[1, 0.8, 16, 8, 48, 40, 0]], np.float32)
    found = family.decode(family.reduce({"out": rows})[0], place(64, 64, family.preprocess))
    assert found.boxes.tolist() == [[8, 16, 40, 48]]


def test_a_class_beside_those_of_rf_detr_is_none() -> None:
    model = Model("detr", {"dets": (1, 5, 4), "labels": (1, 5, 3)}, labels=2, input=(1, 3, 64, 64))
    logits = np.full((1, 5, 3), -9, np.float32)
    logits[0, 1, 1], logits[..., 2] = 3, 3
    boxes = np.full((1, 5, 4), 0.5, np.float32)
    family = model.make()
    found = family.decode(family.reduce({"dets": boxes, "labels": logits})[0], place(64, 64, family.preprocess))
    assert found.class_ids.tolist() == [1]
    assert family.preprocess.scale == 1.0  # ImageNet's mean


@pytest.mark.parametrize("name", ["dense", "grids", "nanodet", "detr", "ssd", "heatmaps", "movenet", "simcc", "yunet"])
def test_quantised_numbers_are_refused_unless_the_entry_says_what_they_mean(name: str) -> None:
    model = dataclasses.replace(MODELS[name], dtype="uint8")
    with pytest.raises(ModelError, match="holds uint8; say what its numbers mean, such as dequantize"):
        model.make()


@pytest.mark.parametrize(
    "metadata",
    [
        {"names": "{0: 'cat', 1: 'dog', 2: 'cow'}"},
        {"names": "['cat', 'dog', 'cow']"},
        {"id2label": '{"0": "cat", "1": "dog", "2": "cow"}'},
        {"labels": "cat, dog,cow"},
        {"character": "cat\ndog\ncow\n"},
    ],
)
def test_labels_are_read_as_exporters_write_them(metadata: dict[str, str]) -> None:
    model = dataclasses.replace(MODELS["classification"], outputs={"out": (2, 3)}, metadata=metadata)
    assert model.make().names.labels == ("cat", "dog", "cow")


def test_labels_for_a_model_that_has_no_classes_are_refused() -> None:
    with pytest.raises(ModelError, match="the entry names 3 labels, the family 'depth' has no classes"):
        dataclasses.replace(MODELS["depth"], labels=3).make()


def test_an_output_that_changes_its_size_is_an_engine_error() -> None:
    for name, output, shape in (
        ("yolox", "out", (2, 80, 8)),
        ("grids", "a", (2, 21, 7, 7)),
        ("nanodet", "c", (2, 60, 3)),
        ("yunet", "cls_8", (2, 60, 1)),
    ):
        outputs = outputs_of(MODELS[name], 0, "zeros")
        outputs[output] = np.zeros(shape, np.float32)
        if name == "nanodet":
            outputs["d"] = np.zeros((2, 60, 32), np.float32)
        family = MODELS[name].make()
        with pytest.raises(EngineError):
            family.reduce(outputs)
