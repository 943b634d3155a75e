"""The same film and model by Roboflow's `inference-models`, fed by OpenCV as its own documentation does.

`python -m benchmarks.rivals.inference_models_loop VIDEO MODEL [--threads N]`, in an environment with
inference-models, which `line --rivals` makes; prints one line of JSON. The model is laid out as a package of its own
kind, as `AutoModel.from_pretrained` wants it.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import cv2
import onnxruntime
import torch

from benchmarks.rivals import _loop


def lay_out(folder: Path, model: Path) -> str:
    """A model package in this folder, of an ONNX file of YOLOv8's kind."""
    session = onnxruntime.InferenceSession(str(model), providers=["CPUExecutionProvider"])
    batch, channels, height, width = session.get_inputs()[0].shape
    classes = session.get_outputs()[0].shape[1] - 4
    kind = {"model_architecture": "yolov8", "task_type": "object-detection", "backend_type": "onnx"}
    config: dict[str, Any] = {
        "network_input": {
            "training_input_size": {"height": height, "width": width},
            "dynamic_spatial_size_supported": False,
            "color_mode": "rgb",
            "resize_mode": "letterbox",
            "padding_value": 114,
            "input_channels": channels,
            "scaling_factor": 255,
        },
        "forward_pass": {"static_batch_size": batch},
        "post_processing": {"type": "nms", "fused": False},
    }
    (folder / "model_config.json").write_text(json.dumps(kind))
    (folder / "inference_config.json").write_text(json.dumps(config))
    (folder / "class_names.txt").write_text("\n".join(f"class_{number}" for number in range(classes)))
    (folder / "weights.onnx").symlink_to(model.resolve())
    return str(folder)


def main() -> None:
    told = _loop.arguments(__doc__).parse_args()
    if told.threads:
        _loop.limit_sessions(told.threads)
        torch.set_num_threads(told.threads)
    from inference_models import AutoModel  # type: ignore[import-not-found,unused-ignore]

    with tempfile.TemporaryDirectory() as name:
        model = AutoModel.from_pretrained(
            lay_out(Path(name), told.model),
            device=torch.device("cpu"),
            onnx_execution_providers=["CPUExecutionProvider"],
        )
    meter = _loop.Meter(warm_up=told.warm_up, frames=told.frames)
    capture = cv2.VideoCapture(str(told.video), cv2.CAP_FFMPEG)
    while True:
        ok, frame = capture.read()
        if not ok:
            break
        [found] = model(
            frame,
            input_color_format="bgr",
            confidence=_loop.SCORE,
            iou_threshold=_loop.IOU,
            max_detections=_loop.MOST,
        )
        columns = (found.xyxy, found.confidence[:, None], found.class_id[:, None])
        if meter.on_frame(torch.cat(columns, 1).numpy()):
            break
    meter.tell("inference-models", "torch", "onnxruntime", "opencv-python")


if __name__ == "__main__":
    main()
