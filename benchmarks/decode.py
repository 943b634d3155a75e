"""What decoding costs: raw output of a dense head to detections in source pixels, on one core.

`python benchmarks/decode.py [--repeats N]`. [1, 84, 8400] with 100 candidates above the threshold, as a YOLOv8 gives
for a busy picture of 1920x1080. In the same run two public post-processors get the same numbers: rtmlib's
`multiclass_nms` (Apache-2.0) and supervision's `Detections.with_nms` (MIT), where they are installed.
"""

from __future__ import annotations

import argparse
import importlib
import os
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import cv2
import numpy as np
from numpy.typing import NDArray

from edge_agent.config import InferenceOptions, ModelOptions
from edge_agent.data import ModelFacts, TensorSpec
from edge_agent.geometry import place
from edge_agent.models.inspect import make_family

CLASSES, CELLS, SIZE = 80, 8400, 640
OBJECTS, NEIGHBOURS = 20, 5
SCORE, IOU = 0.4, 0.5
BAR_MS = 1.0

Decode = Callable[[NDArray[np.float32]], int]


def raw_output(seed: int = 0) -> NDArray[np.float32]:
    """Low scores everywhere, and 20 objects that five cells each have found."""
    rng = np.random.default_rng(seed)
    output = np.empty((1, 4 + CLASSES, CELLS), np.float32)
    output[0, :2] = rng.uniform(0, SIZE, (2, CELLS))
    output[0, 2:4] = rng.uniform(8, 200, (2, CELLS))
    output[0, 4:] = rng.beta(1, 200, (CLASSES, CELLS)).clip(0, 0.3)
    cells = rng.choice(CELLS, OBJECTS * NEIGHBOURS, replace=False).reshape(OBJECTS, NEIGHBOURS)
    for found in cells:
        box = np.concatenate((rng.uniform(200, 440, 2), rng.uniform(30, 120, 2)))
        output[0, :4, found] = box + rng.normal(0, 1.5, (NEIGHBOURS, 4))
        output[0, 4 + rng.integers(CLASSES), found] = rng.uniform(0.45, 0.95, NEIGHBOURS)
    return output


def ours() -> Decode:
    facts = ModelFacts(
        (TensorSpec("images", (1, 3, SIZE, SIZE), "float32"),),
        (TensorSpec("output0", (1, 4 + CLASSES, CELLS), "float32"),),
    )
    options = InferenceOptions(score_threshold=SCORE, iou_threshold=IOU)
    family, _ = make_family(facts, ModelOptions(path="yolov8.onnx"), None, options)
    at = place(1920, 1080, family.preprocess)

    def decode(output: NDArray[np.float32]) -> int:
        [candidates] = family.reduce({"output0": output})
        return len(family.decode(candidates, at))

    return decode


def rtmlib() -> Decode:
    nms = importlib.import_module("rtmlib.tools.object_detection.post_processings").multiclass_nms

    def decode(output: NDArray[np.float32]) -> int:
        rows = output[0].T
        found = nms(_corners(rows), rows[:, 4:], IOU, SCORE)
        return 0 if found[0] is None else len(_in_source(found[0][:, :4]))

    return decode


def supervision() -> Decode:
    detections: Any = importlib.import_module("supervision").Detections

    def decode(output: NDArray[np.float32]) -> int:
        rows = output[0].T
        scores, classes = rows[:, 4:].max(1), rows[:, 4:].argmax(1)
        kept = scores >= SCORE
        found = detections(xyxy=_corners(rows[kept]), confidence=scores[kept], class_id=classes[kept])
        return len(_in_source(found.with_nms(IOU).xyxy))

    return decode


def _corners(rows: NDArray[np.float32]) -> NDArray[np.float32]:
    corners = np.empty((len(rows), 4), np.float32)
    corners[:, :2] = rows[:, :2] - rows[:, 2:4] / 2
    corners[:, 2:] = rows[:, :2] + rows[:, 2:4] / 2
    return corners


def _in_source(boxes: NDArray[np.float32]) -> NDArray[np.float32]:
    """Out of a letterbox of 1920x1080 in 640x640."""
    return ((boxes - (0, 140, 0, 140)) * 3).clip(0, (1920, 1080, 1920, 1080))


def rivals() -> Iterator[tuple[str, Decode]]:
    for name, make in (("rtmlib", rtmlib), ("supervision", supervision)):
        try:
            yield name, make()
        except ImportError:
            print(f"{name} is not installed: make bench-decode")


def measure(decode: Decode, output: NDArray[np.float32], count: int) -> float:
    """Milliseconds of CPU a picture."""
    began = time.process_time()
    for _ in range(count):
        decode(output)
    return (time.process_time() - began) / count * 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=7)
    repeats = parser.parse_args().repeats
    cv2.setNumThreads(1)
    output = raw_output()
    decoders = {"edge_agent": ours(), **dict(rivals())}
    spent: dict[str, list[float]] = {name: [] for name in decoders}
    for decode in decoders.values():
        measure(decode, output, 20)
    for _ in range(repeats):  # in turn, so that all see the same noise
        for name, decode in decoders.items():
            spent[name].append(measure(decode, output, 50))
    base = statistics.median(spent["edge_agent"])
    print(f"[1, {4 + CLASSES}, {CELLS}], {OBJECTS * NEIGHBOURS} candidates of {OBJECTS} objects; {repeats} repeats")
    print("                        ms a picture   ratio   spread   objects")
    for name, times in spent.items():
        middle = statistics.median(times)
        spread = (max(times) - min(times)) / middle
        print(f"{name:24} {middle:11.3f} {middle / base:7.2f} {spread:8.2f} {decoders[name](output):9}")
    print(f"bar: {BAR_MS:g} ms, {'reached' if base <= BAR_MS else 'NOT reached'}")


if __name__ == "__main__":
    main()
