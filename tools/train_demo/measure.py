"""How good the bundled models are on worlds that the training never saw: `python -m train_demo.measure`.

Needs ONNX Runtime, and the repository's root as the working folder for `tests.accuracy`.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import onnxruntime
from numpy.typing import NDArray

from edge_agent.data import PreprocessSpec
from edge_agent.geometry import Placement
from edge_agent.imaging import Preprocessor
from edge_agent.sources.world import CLASS_NAMES, Truth, World
from tests.accuracy import MIN_VISIBILITY, Scored, iou, mean_average_precision
from train_demo.classifier import only_shape
from train_demo.segmenter import class_map

_FIRST_SEED = 7_000
_CLASSES = len(CLASS_NAMES)


def seen(model: Path, *, worlds: int, frames: int, objects: int) -> Iterator[tuple[Truth, Placement, NDArray[Any]]]:
    """The truth of each frame, where it lies in the model's input, and the model's output for it."""
    session = onnxruntime.InferenceSession(model)
    picture = np.empty((1, *session.get_inputs()[0].shape[1:]), np.float32)
    fit = Preprocessor(PreprocessSpec(width=picture.shape[3], height=picture.shape[2]))
    frame = np.empty((480, 640, 3), np.uint8)
    for seed in range(_FIRST_SEED, _FIRST_SEED + worlds):
        world = World(width=640, height=480, seed=seed, objects=objects)
        for index in range(0, 20 * frames, 20):
            world.draw(index, frame)
            at = fit(frame, picture[0])
            yield world.truth(index), at, session.run(None, {"images": picture})[0][0]


def measure_classifier(model: Path) -> None:
    right = []
    for truth, at, logits in seen(model, worlds=500, frames=5, objects=1):
        shape = only_shape(truth, at)
        if shape is not None:
            right.append(np.argmax(logits) == shape.class_id)
    print(f"{model.name}: accuracy {np.mean(right):.3f} over {len(right)} pictures")


def measure_segmenter(model: Path) -> None:
    confusion = np.zeros((1 + _CLASSES, 1 + _CLASSES), np.int64)
    for truth, at, logits in seen(model, worlds=50, frames=20, objects=7):
        inside = np.s_[at.top // 2 : (at.top + at.height) // 2, at.left // 2 : (at.left + at.width) // 2]
        wanted, found = class_map(truth, at).numpy()[inside], logits.argmax(0)[inside]
        confusion += np.bincount((wanted * (1 + _CLASSES) + found).ravel(), minlength=confusion.size).reshape(6, 6)
    same = confusion.diagonal()
    shares = same / (confusion.sum(0) + confusion.sum(1) - same)
    print(f"{model.name}: mean IoU {shares.mean():.3f}, by class {shares.round(3).tolist()}")


def measure_pose(model: Path) -> None:
    scored: list[Scored] = []
    errors: list[NDArray[Any]] = []
    told: list[NDArray[Any]] = []
    for truth, at, output in seen(model, worlds=20, frames=20, objects=7):
        boxes, scores, class_ids, keypoints = _decode(output, at)
        found = zip(scores.tolist(), class_ids.tolist(), boxes, strict=True)
        scored.append(Scored([{"score": s, "class_id": c, "box": box} for s, c, box in found], truth))
        for i in np.flatnonzero(truth.visibility >= MIN_VISIBILITY):
            overlap = iou(truth.boxes[i], boxes) * (class_ids == truth.class_ids[i]) * (scores >= 0.25)
            if overlap.max(initial=0) < 0.5:
                continue
            points, wanted = keypoints[overlap.argmax()], truth.keypoints[i]
            distance = np.hypot(*(points - wanted)[:, :2].T)
            errors.append(np.where(wanted[:, 2] > 0, distance, np.nan))
            told.append((points[:, 2] >= 0.5) == (wanted[:, 2] > 0))
    print(
        f"{model.name}: mAP@0.5 {mean_average_precision(scored):.3f} over {len(scored)} frames; keypoints (centre, tip)"
        f" off by {np.nanmedian(errors, 0).round(2).tolist()} px in the median,"
        f" {np.nanpercentile(errors, 90, 0).round(2).tolist()} px at the 90th percentile;"
        f" visibility right for {np.mean(told, 0).round(3).tolist()}"
    )


def _decode(output: NDArray[Any], at: Placement) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any], NDArray[Any]]:
    """Boxes [N, 4] and keypoints [N, K, 3] in source pixels, scores and class ids, after NMS by class."""
    centers, sizes, classes = output[:2].T, output[2:4].T, output[4 : 4 + _CLASSES].T
    scores, class_ids = classes.max(1), classes.argmax(1)
    corners = np.concatenate((centers - sizes / 2, sizes), 1).tolist()
    keep = np.array(cv2.dnn.NMSBoxesBatched(corners, scores.tolist(), class_ids.tolist(), 0.03, 0.5), np.int64)
    boxes = at.to_source(np.concatenate((centers - sizes / 2, centers + sizes / 2), 1)[keep])
    keypoints = output[4 + _CLASSES :].T[keep].reshape(len(keep), -1, 3)
    keypoints[..., :2] = at.to_source(keypoints[..., :2])
    return boxes, scores[keep], class_ids[keep], keypoints


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--zoo", type=Path, default=Path("edge_agent/models/zoo"))
    zoo = parser.parse_args().zoo
    measure_classifier(zoo / "demo-cls.onnx")
    measure_pose(zoo / "demo-pose.onnx")
    measure_segmenter(zoo / "demo-seg.onnx")


if __name__ == "__main__":
    main()
