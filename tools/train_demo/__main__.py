"""Train the bundled models on the synthetic world and export them: `python -m train_demo`.

Seeded; about two hours on two cores. `demo-160` and `demo-pose` start from the weights of `demo-320`.
"""

from __future__ import annotations

import argparse
import copy
from pathlib import Path

import torch

from edge_agent.sources.world import CLASS_NAMES, KEYPOINT_NAMES
from train_demo import classifier, detector, pose, segmenter
from train_demo.scenes import SEED, Scenes, visible_objects
from train_demo.training import export, train

_NAMES = dict(enumerate(CLASS_NAMES))


def train_detectors(out: Path, effort: float) -> None:
    facts = {"task": "detect", "names": str(_NAMES), "stride": str(max(detector.STRIDES))}
    model = detector.Detector(len(CLASS_NAMES))
    for size, steps, batch, rate in ((320, 3000, 16, 3e-3), (160, 4500, 32, 2e-3)):
        scenes = Scenes(size, visible_objects)
        name = f"demo-{size}"
        trained = train(
            copy.deepcopy(model),
            scenes,
            detector.detector_loss,
            name=name,
            steps=round(steps * effort),
            batch=batch,
            rate=rate,
        )
        export(trained, out / f"{name}.onnx", size=size, output="output0", facts=facts)
        model = trained


def train_pose(out: Path, effort: float) -> None:
    facts = {
        "task": "pose",
        "names": str(_NAMES),
        "stride": str(max(detector.STRIDES)),
        "kpt_shape": str([len(KEYPOINT_NAMES), 3]),
        "kpt_names": str({0: list(KEYPOINT_NAMES)}),
    }
    model = pose.PoseDetector(len(CLASS_NAMES), len(KEYPOINT_NAMES))
    pose.start_from(model, out / "demo-320.onnx")
    scenes = Scenes(320, visible_objects)
    trained = train(model, scenes, pose.pose_loss, name="demo-pose", steps=round(2000 * effort), batch=16, rate=1e-3)
    export(trained, out / "demo-pose.onnx", size=320, output="output0", facts=facts)


def train_segmenter(out: Path, effort: float) -> None:
    names = dict(enumerate(("background", *CLASS_NAMES)))
    facts = {"task": "semantic", "names": str(names), "stride": str(segmenter.STRIDE), "resize": "letterbox"}
    model = segmenter.Segmenter(len(names))
    scenes = Scenes(segmenter.SIZE, segmenter.class_map)
    trained = train(
        model, scenes, segmenter.segmenter_loss, name="demo-seg", steps=round(2500 * effort), batch=16, rate=4e-3
    )
    export(trained, out / "demo-seg.onnx", size=segmenter.SIZE, output="logits", facts=facts)


def train_classifier(out: Path, effort: float) -> None:
    facts = {"task": "classify", "names": str(_NAMES), "stride": str(classifier.STRIDE), "resize": "letterbox"}
    model = classifier.Classifier(len(CLASS_NAMES))
    scenes = Scenes(96, classifier.only_shape, objects=(1, 1), frames_per_world=3)
    trained = train(
        model, scenes, classifier.classifier_loss, name="demo-cls", steps=round(1500 * effort), batch=64, rate=4e-3
    )
    export(trained, out / "demo-cls.onnx", size=96, output="logits", facts=facts)


_TRAIN = {"detect": train_detectors, "pose": train_pose, "seg": train_segmenter, "cls": train_classifier}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("edge_agent/models/zoo"))
    parser.add_argument("--only", choices=_TRAIN, nargs="+", default=list(_TRAIN), help="pose needs demo-320 in --out")
    parser.add_argument("--effort", type=float, default=1.0, help="a factor on all numbers of steps")
    args = parser.parse_args()
    for task in args.only:
        torch.manual_seed(SEED)
        _TRAIN[task](args.out, args.effort)


if __name__ == "__main__":
    main()
