"""The same film and model by ultralytics' `predict(stream=True)`.

`python -m benchmarks.rivals.ultralytics_loop VIDEO MODEL [--threads N]`, in an environment with ultralytics, which
`line --rivals` makes; prints one line of JSON.
"""

from __future__ import annotations

import torch

from benchmarks.rivals import _loop


def main() -> None:
    told = _loop.arguments(__doc__).parse_args()
    if told.threads:
        _loop.limit_sessions(told.threads)
        torch.set_num_threads(told.threads)
    from ultralytics import YOLO, settings  # type: ignore[import-not-found,unused-ignore]

    settings.update({"sync": False})
    model = YOLO(str(told.model), task="detect")
    meter = _loop.Meter(warm_up=told.warm_up, frames=told.frames)
    found = model.predict(
        str(told.video), stream=True, conf=_loop.SCORE, iou=_loop.IOU, max_det=_loop.MOST, device="cpu", verbose=False
    )
    for result in found:
        if meter.on_frame(result.boxes.data.numpy()):
            break
    meter.tell("ultralytics-opencv-headless", "torch", "onnxruntime", "opencv-python-headless")


if __name__ == "__main__":
    main()
