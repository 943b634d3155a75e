"""The least that has to be done for each frame, written down as one loop: what the agent is compared with.

OpenCV read, letterbox into a preallocated canvas, onnxruntime, class maximum and threshold, batched NMS.
Run by `line.py` in a process of its own: VIDEO MODEL HEAD THREADS; prints one line of JSON.
"""

from __future__ import annotations

import json
import sys
import time

import cv2
import numpy as np
import onnxruntime
import psutil

WARM_UP = 30


def main() -> None:
    video, model, head, threads = sys.argv[1:]
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = int(threads)
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    [model_input] = session.get_inputs()
    side = model_input.shape[2]
    canvas = np.full((side, side, 3), 114, np.uint8)
    tensor = np.empty((1, 3, side, side), np.float32)
    planes = [np.empty((side, side), np.uint8) for _ in range(3)]
    strides = np.concatenate([np.full((side // s) ** 2, s, np.float32) for s in (8, 16, 32)])
    cells = np.concatenate([np.mgrid[0 : side // s, 0 : side // s][::-1].reshape(2, -1).T for s in (8, 16, 32)])
    capture = cv2.VideoCapture(video, cv2.CAP_FFMPEG)
    frame, frames, boxes, cpu = None, 0, 0, 0.0
    began = time.perf_counter()
    while True:
        ok, frame = capture.read(frame)
        if not ok:
            break
        height, width = frame.shape[:2]
        ratio = min(side / width, side / height)
        inner = round(width * ratio), round(height * ratio)
        left, top = ((side - inner[0]) // 2, (side - inner[1]) // 2) if head == "dense" else (0, 0)
        cv2.resize(frame, inner, dst=canvas[top : top + inner[1], left : left + inner[0]])
        cv2.split(canvas, planes)
        for plane, target in zip(planes[::-1] if head == "dense" else planes, tensor[0], strict=True):
            np.multiply(
                plane, np.float32(1 / 255 if head == "dense" else 1), out=target, dtype=np.float32, casting="unsafe"
            )
        [output] = session.run(None, {model_input.name: tensor})
        if head == "dense":
            best = output[0, 4:].max(0)
            kept = np.flatnonzero(best >= 0.4)
            class_ids = output[0, 4:, kept].argmax(1)
            scores, centered = best[kept], output[0, :4, kept]
        else:
            likely = np.flatnonzero(output[0, :, 4] >= 0.4)
            products = output[0, likely, 5:] * output[0, likely, 4:5]
            best = products.max(1) if len(likely) else np.zeros(0, np.float32)
            chosen = best >= 0.4
            kept, scores, class_ids = likely[chosen], best[chosen], products[chosen].argmax(1)
            centers = (output[0, kept, :2] + cells[kept]) * strides[kept, None]
            centered = np.concatenate((centers, np.exp(output[0, kept, 2:4]) * strides[kept, None]), 1)
        corner = np.concatenate((centered[:, :2] - centered[:, 2:] / 2, centered[:, 2:]), 1)
        if len(scores):
            boxes += len(cv2.dnn.NMSBoxesBatched(corner.tolist(), scores.tolist(), class_ids.tolist(), 0.4, 0.5))
        frames += 1
        if frames == WARM_UP:
            cpu, began = time.process_time(), time.perf_counter()
    measured = frames - WARM_UP
    answer = {
        "frames": measured,
        "cpu_ms": (time.process_time() - cpu) / measured * 1e3,
        "fps": measured / (time.perf_counter() - began),
        "rss_mb": psutil.Process().memory_info().rss / 1e6,
        "boxes": boxes,
    }
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
