"""The least that has to be done for each frame, written down as one loop: what the agent is compared with.

OpenCV read, letterbox into a preallocated canvas, onnxruntime, class maximum and threshold, batched NMS, boxes in
pixels of the film. `python -m benchmarks.bare_loop VIDEO MODEL [--head dense|yolox --threads N]`, which `line` runs in
a process of its own; prints one line of JSON.
"""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np
import onnxruntime
from numpy.typing import NDArray

from benchmarks.rivals import _loop
from benchmarks.rivals._loop import IOU, MOST, SCORE


def main() -> None:
    parser = _loop.arguments(__doc__)
    parser.add_argument("--head", choices=("dense", "yolox"), default="dense")
    told = parser.parse_args()
    settings = _loop.session_options(told.threads)
    session = onnxruntime.InferenceSession(str(told.model), settings, providers=["CPUExecutionProvider"])
    [model_input] = session.get_inputs()
    side, is_dense = model_input.shape[2], told.head == "dense"
    canvas = np.full((side, side, 3), 114, np.uint8)
    tensor = np.empty((1, 3, side, side), np.float32)
    planes = [np.empty((side, side), np.uint8) for _ in range(3)]
    strides = np.concatenate([np.full((side // s) ** 2, s, np.float32) for s in (8, 16, 32)])
    cells = np.concatenate([np.mgrid[0 : side // s, 0 : side // s][::-1].reshape(2, -1).T for s in (8, 16, 32)])
    meter = _loop.Meter(warm_up=told.warm_up, frames=told.frames)
    capture = cv2.VideoCapture(str(told.video), cv2.CAP_FFMPEG)
    frame = None
    while True:
        ok, frame = capture.read(frame)
        if not ok:
            break
        height, width = frame.shape[:2]
        ratio = min(side / width, side / height)
        inner = round(width * ratio), round(height * ratio)
        left, top = ((side - inner[0]) // 2, (side - inner[1]) // 2) if is_dense else (0, 0)
        cv2.resize(frame, inner, dst=canvas[top : top + inner[1], left : left + inner[0]])
        cv2.split(canvas, planes)
        for plane, target in zip(planes[::-1] if is_dense else planes, tensor[0], strict=True):
            np.multiply(plane, np.float32(1 / 255 if is_dense else 1), out=target, dtype=np.float32, casting="unsafe")
        [output] = session.run(None, {model_input.name: tensor})
        if is_dense:
            best = output[0, 4:].max(0)
            kept = np.flatnonzero(best >= SCORE)
            class_ids = output[0, 4:, kept].argmax(1)
            scores, centered = best[kept], output[0, :4, kept]
        else:
            likely = np.flatnonzero(output[0, :, 4] >= SCORE)
            products = output[0, likely, 5:] * output[0, likely, 4:5]
            best = products.max(1) if len(likely) else np.zeros(0, np.float32)
            chosen = best >= SCORE
            kept, scores, class_ids = likely[chosen], best[chosen], products[chosen].argmax(1)
            centers = (output[0, kept, :2] + cells[kept]) * strides[kept, None]
            centered = np.concatenate((centers, np.exp(output[0, kept, 2:4]) * strides[kept, None]), 1)
        rows: NDArray[Any] = np.zeros((0, 6), np.float32)
        if len(scores):
            corner = np.concatenate((centered[:, :2] - centered[:, 2:] / 2, centered[:, 2:]), 1)
            order = cv2.dnn.NMSBoxesBatched(corner.tolist(), scores.tolist(), class_ids.tolist(), SCORE, IOU)[:MOST]
            x1, y1, w, h = corner[order].T
            xs = np.clip((np.stack((x1, x1 + w)) - left) * (width / inner[0]), 0, width)
            ys = np.clip((np.stack((y1, y1 + h)) - top) * (height / inner[1]), 0, height)
            rows = np.stack((xs[0], ys[0], xs[1], ys[1], scores[order], class_ids[order]), 1)
        if meter.on_frame(rows):
            break
    meter.tell()


if __name__ == "__main__":
    main()
