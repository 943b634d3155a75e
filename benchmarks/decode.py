"""What decoding costs: raw output of a dense head to detections in source pixels, on one core.

`python -m benchmarks.decode [--repeats N] [--json FILE]`. [1, 84, 8400] with 100 candidates above the threshold, as a
YOLOv8 gives for a busy picture of 1920x1080. In the same run two public post-processors get the same numbers: rtmlib's
`multiclass_nms` (Apache-2.0) and supervision's `Detections.with_nms` (MIT), where they are installed (`make
bench`). Each decodes in a fresh process, in turn.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import cv2
import numpy as np
from numpy.typing import NDArray

from benchmarks._figures import Figure, Report, Runs, arguments, command, finish, machine
from edge_agent.config import InferenceOptions, ModelOptions
from edge_agent.data import ModelFacts, TensorSpec
from edge_agent.geometry import place
from edge_agent.models.inspect import make_family

CLASSES, CELLS, SIZE = 80, 8400, 640
OBJECTS, NEIGHBOURS = 20, 5
SCORE, IOU = 0.4, 0.5
BAR_MS = 1.0
WARM_UP, PICTURES = 20, 200

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


DECODERS: dict[str, Callable[[], Decode]] = {"edge_agent": ours, "rtmlib": rtmlib, "supervision": supervision}
RIVALS = ("rtmlib", "supervision")


def measure(name: str) -> dict[str, float]:
    """Milliseconds of CPU a picture, and the objects found, in this process."""
    cv2.setNumThreads(1)
    decode, output = DECODERS[name](), raw_output()
    for _ in range(WARM_UP):
        objects = decode(output)
    began = time.process_time()
    for _ in range(PICTURES):
        decode(output)
    return {"ms": (time.process_time() - began) / PICTURES * 1e3, "objects": objects}


def in_a_process(name: str) -> dict[str, float]:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.decode", "--decoder", name], check=True, stdout=subprocess.PIPE
    )
    figures: dict[str, float] = json.loads(done.stdout)
    return figures


def main() -> None:
    parser = arguments(__doc__, repeats=9)
    parser.add_argument("--decoder", choices=DECODERS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.repeats < 1:
        parser.error("--repeats must be more than 0")
    if options.decoder:
        print(json.dumps(measure(options.decoder)))
        return
    here = [name for name in DECODERS if find_spec(name)]
    runs, about = Runs(), machine("numpy", "opencv-python-headless", *(name for name in here if name in RIVALS))
    for _ in range(options.repeats):
        for name in here:
            runs.add(name, in_a_process(name))
    spent = runs["edge_agent"]["ms"]
    figures = [Figure("a picture decoded", "ms CPU", spent, bar=BAR_MS, quick=True)]
    figures += [Figure("a picture decoded", "ms CPU", spent, name, runs[name]["ms"]) for name in here if name in RIVALS]
    found = ", ".join(f"{name} {runs[name]['objects'][0]:.0f}" for name in here)
    notes = [
        f"[1, {4 + CLASSES}, {CELLS}], {OBJECTS * NEIGHBOURS} candidates of {OBJECTS} objects; objects found: {found}.",
        *(f"{name} is not installed: make bench" for name in RIVALS if name not in here),
    ]
    report = Report("decode", "From raw output to detections, on one core", command("decode"), about, figures, notes)
    sys.exit(finish(report, options))


if __name__ == "__main__":
    main()
