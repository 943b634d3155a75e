"""Models of every kind on the GPU: they see what the CPU sees."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from edge_agent.backends.onnx import OnnxOptions
from edge_agent.backends.tensorrt import TensorRtOptions
from edge_agent.data import Classes, Detections, Frame, Poses, Segmentation
from edge_agent.models.loaded import open_model
from edge_agent.models.store import StoredModel
from tests.accuracy import iou
from tests.gpu.conftest import INFERENCE, scenes


def seen(model: StoredModel, backend: str, options: Any, images: list[NDArray[np.uint8]]) -> list[Any]:
    running = open_model(model, backend=backend, backends={backend: options}, inference=INFERENCE)
    try:
        predictions = []
        for index, image in enumerate(images):
            frame = Frame("a", index, image, time.time_ns(), time.monotonic_ns())
            [result] = running.collect(running.submit([frame])).results
            predictions.append(result.prediction)
        return predictions
    finally:
        running.close()


@pytest.mark.parametrize("name", ["demo-320", "demo-pose", "demo-seg", "demo-cls"])
def test_a_model_sees_on_the_gpu_what_it_sees_on_the_cpu(
    plans: Any, stored: dict[str, StoredModel], options: TensorRtOptions, name: str
) -> None:
    if name not in stored:
        pytest.skip(f"{name} is not bundled")
    assert isinstance(plans[name], Path), plans[name]
    images = scenes(12, seed=77)
    pairs = list(
        zip(
            seen(stored[name], "tensorrt", options, images),
            seen(stored[name], "onnx", OnnxOptions(), images),
            strict=True,
        )
    )
    for gpu, cpu in pairs:
        assert type(gpu) is type(cpu)
        if isinstance(cpu, (Detections, Poses)):
            sure = cpu.scores >= 0.5
            assert sure.any()
            for box, class_id in zip(cpu.boxes[sure], cpu.class_ids[sure], strict=True):
                overlap = iou(box, gpu.boxes) * (gpu.class_ids == class_id)
                assert overlap.max() >= 0.8  # half precision, and kernels that round as they do
        if isinstance(cpu, Poses) and len(gpu) == len(cpu):
            nearest = [int(iou(box, gpu.boxes).argmax()) for box in cpu.boxes]
            away = np.abs(gpu.keypoints[nearest, :, :2] - cpu.keypoints[..., :2])
            assert np.median(away) <= 1.0
        if isinstance(cpu, Segmentation):
            assert (gpu.class_map == cpu.class_map).mean() >= 0.98
        if isinstance(cpu, Classes):
            assert gpu.class_ids[0] == cpu.class_ids[0]
            assert gpu.scores[0] == pytest.approx(cpu.scores[0], abs=0.03)
