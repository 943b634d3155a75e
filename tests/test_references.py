"""Our decoders beside somebody else's, on the same raw outputs. `tests/references/README.md` says whose."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from edge_agent.config import InferenceOptions, ModelOptions
from edge_agent.data import Classes, DepthMap, Detections, Mask, ModelFacts, Poses, Segmentation, TensorSpec
from edge_agent.families import Family
from edge_agent.geometry import place
from edge_agent.models.inspect import make_family

HERE = Path(__file__).parent / "references"


@dataclass(frozen=True)
class Case:
    """How a case is told to the agent. `family`: what its shapes are to be taken for; `says`: whether the entry has
    to name it; `score`: the threshold, where the reference had none or meant another."""

    family: str
    options: dict[str, Any] = field(default_factory=dict)
    says: bool = False
    labels: int | None = None
    metadata: dict[str, str] = field(default_factory=dict)
    score: float | None = None
    iou: float = 0.5
    layout: str = "nchw"
    pixels: float = 1.0


V3 = {"style": "v3"}
POSE = {"task": "pose", "kpt_shape": "[17, 3]"}
CASES = {
    "yolov8_detect": Case("yolo", labels=80),
    "yolov8_detect_agnostic": Case("yolo", {"nms": "agnostic"}),
    "yolov8_detect_odd_padding": Case("yolo"),
    "yolov8_seg": Case("yolo"),
    "yolov8_pose": Case("yolo"),
    "yolov8_obb": Case("yolo", metadata={"task": "obb"}),
    "yolov8_obb_probiou": Case("yolo", {"task": "obb"}),
    "yolo26_detect_end2end": Case("yolo", labels=80),
    "yolo26_seg_end2end": Case("yolo", labels=80),
    "yolo26_pose_end2end": Case("yolo", labels=1, metadata=POSE),
    "yolo26_obb_end2end": Case("yolo", labels=15, metadata={"task": "obb"}),
    "yolox_grid": Case("yolo", labels=80),
    "yolox_nano_vtest100": Case("yolo"),
    "yolov5_decoded": Case("yolo"),
    "yolov5_decoded_agnostic": Case("yolo", {"nms": "agnostic"}),
    "yolov7_decoded": Case("yolo", labels=6),
    "rtdetr_ultralytics": Case("yolo", metadata={"names": str([f"label {i}" for i in range(80)])}),
    "yolov5_seg": Case("yolo"),
    "yolov5_raw": Case("yolo_grids"),
    "yolov5_raw_5d": Case("yolo_grids", labels=6),
    "yolov7_raw": Case("yolo_grids"),
    "yolov3_raw": Case("yolo_grids", V3),
    "yolov4_raw": Case("yolo_grids", {**V3, "center_scale": [1.2, 1.1, 1.05]}),
    "detr": Case("detr"),
    "rtdetr": Case("detr", labels=80),
    "rfdetr": Case("detr", labels=5),
    "yunet": Case("yunet"),
    "yunet_low_threshold": Case("yunet"),
    "nanodet_g_vtest100": Case("nanodet"),
    "nanodet_opencv_zoo": Case("nanodet", {"nms": "agnostic"}),
    "nanodet_plus": Case("nanodet", says=True, labels=12),
    "efficient_nms": Case("ssd", labels=80, score=0.25),
    "tf_detection": Case("ssd", {"first_class": 0}),
    "ssd_dense": Case("ssd"),
    "mmdeploy_dets": Case("ssd", labels=80),
    "movenet": Case("movenet", score=0.1),
    "classify_softmax": Case("classification"),
    "depth": Case("depth"),
    "heatmap_parabola": Case("heatmaps", {"refine": "parabola"}, score=0.1),
    "simcc": Case("simcc", score=0.1),
    "heatmap_quarter": Case("heatmaps", score=0.1),
    "heatmap_dark": Case("heatmaps", {"refine": "dark"}, score=0.1),
    "heatmap_udp": Case("heatmaps", {"refine": "dark", "aligned": True, "blur": 0.8}, score=0.1),
    "posenet_single_astronaut": Case("posenet", {"people": "one"}, score=0.1, layout="nhwc"),
    "posenet_single_vtest100_crop": Case("posenet", {"people": "one"}, score=0.1, layout="nhwc"),
    "posenet_multi_astronaut": Case("posenet", layout="nhwc"),
    "posenet_multi_vtest100": Case("posenet", layout="nhwc"),
    "posenet_multi_vtest100_crop": Case("posenet", layout="nhwc"),
    "semantic_segformer": Case("segmentation", {"resolution": "source"}, labels=21),
}


class Reference:
    """A file of raw outputs and what they mean."""

    def __init__(self, name: str) -> None:
        with np.load(HERE / f"{name}.npz") as file:
            self.arrays = {key: file[key] for key in file.files if key != "meta"}
            self.meta: dict[str, Any] = json.loads(str(file["meta"]))
        self.outputs = {key.partition(".")[2]: v for key, v in self.arrays.items() if key.startswith("output.")}
        for key, value in self.outputs.items():
            if value.dtype == np.float16:
                self.outputs[key] = value.astype(np.float32)

    def family(self, case: Case) -> Family:
        width, height = self.meta["input_size"]
        shape = (1, 3, height, width) if case.layout == "nchw" else (1, height, width, 3)
        facts = ModelFacts(
            (TensorSpec("images", shape, "float32"),),
            tuple(TensorSpec(name, value.shape, str(value.dtype)) for name, value in self.outputs.items()),
            case.metadata,
        )
        entry = ModelOptions(path="model.onnx", family=case.family if case.says else "auto", options=case.options)
        entry.preprocess.resize = self.meta["resize"]
        entry.preprocess.anchor = self.meta["anchor"]
        thresholds = InferenceOptions(
            score_threshold=self.meta["score_threshold"] if case.score is None else case.score,
            iou_threshold=self.meta["iou_threshold"] or case.iou,
            max_detections=self.meta["max_detections"] or 300,
        )
        labels = None if case.labels is None else [f"label {i}" for i in range(case.labels)]
        family, proposal = make_family(facts, entry, labels, thresholds)
        assert proposal.family == case.family, proposal
        return family

    def decoded(self, case: Case) -> Any:
        family = self.family(case)
        [candidates] = family.reduce(self.outputs)
        width, height = self.meta["source_size"]
        return family.decode(candidates, place(width, height, family.preprocess))

    def inside(self, points: NDArray[Any]) -> NDArray[Any]:
        """Kept in the picture, as all of ours are."""
        limits = np.resize(np.array(self.meta["source_size"], float), points.shape[-1])
        return np.clip(points.astype(float), 0, limits)

    def masks(self) -> NDArray[np.bool_]:
        shape = self.meta["mask_shape"]
        return np.unpackbits(self.arrays["masks"], axis=-1, count=shape[-1]).astype(bool).reshape(shape)


def test_every_reference_is_used() -> None:
    there = {path.stem for path in HERE.glob("*.npz") if not path.stem.startswith("bytetrack")}
    assert there == set(CASES)


@pytest.mark.parametrize("name", CASES)
def test_what_is_decoded_is_what_somebody_else_decodes(name: str) -> None:
    reference, case = Reference(name), CASES[name]
    found = reference.decoded(case)
    wanted = reference.arrays
    if isinstance(found, Segmentation):
        same = found.class_map == wanted["class_map"]
        assert same.mean() > 0.995  # some logits are as good as equal
        return
    if isinstance(found, DepthMap):
        assert np.allclose(found.values, wanted["values"], rtol=1e-5)
        return
    if "scores" in wanted:
        assert np.allclose(found.scores, wanted["scores"], atol=0.005), (found.scores, wanted["scores"])
        assert found.class_ids.tolist() == wanted["class_ids"].tolist()
    if "boxes" in wanted:
        assert np.abs(found.boxes - reference.inside(wanted["boxes"])).max() <= case.pixels
    if "keypoints" in wanted:
        sure = wanted["keypoints"][..., 2] > 0.01
        places = np.abs(found.keypoints[..., :2] - reference.inside(wanted["keypoints"][..., :2]))
        assert places[sure].max() <= case.pixels
        assert np.allclose(found.keypoints[..., 2], np.clip(wanted["keypoints"][..., 2], 0, 1), atol=0.005)
    if "corners" in wanted:
        assert isinstance(found, Detections)
        assert found.corners is not None
        for ours, theirs in zip(found.corners, wanted["corners"], strict=True):
            assert min(np.abs(np.roll(ours, turn, 0) - theirs).max() for turn in range(4)) <= case.pixels
    if "masks" in wanted:
        assert isinstance(found, Detections)
        assert found.masks is not None
        for ours, theirs in zip(found.masks, reference.masks(), strict=True):
            whole = drawn(ours, theirs.shape)
            assert (whole & theirs).sum() / (whole | theirs).sum() >= 0.98
    assert isinstance(found, Detections | Poses | Classes)


def drawn(mask: Mask, shape: tuple[int, ...]) -> NDArray[np.bool_]:
    whole = np.zeros(shape, bool)
    rows, columns = mask.bits.shape
    whole[mask.top : mask.top + rows, mask.left : mask.left + columns] = mask.bits
    return whole
