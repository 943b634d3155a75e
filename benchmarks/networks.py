"""Networks made on the spot: a detector of YOLOv8n's size and shape, with random weights.

3 million parameters and 9 GFLOP at 640x640, built from its published table of layers; the output is the dense
head [B, 84, 8400]. It sees nothing of use, but a few dozen cells a picture score 0.3 or more, as with a trained one.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper


class _Graph:
    """Nodes and weights as they are added; every method takes and gives names of tensors."""

    def __init__(self, seed: int) -> None:
        self.nodes: list[Any] = []
        self.weights: list[Any] = []
        self._rng = np.random.default_rng(seed)
        self._names = 0

    def add(self, operator: str, *inputs: str, outputs: int = 1, **attributes: Any) -> Any:
        self._names += 1
        names = [f"{operator}_{self._names}_{i}" for i in range(outputs)]
        self.nodes.append(
            helper.make_node(operator, list(inputs), names, name=f"{operator}_{self._names}", **attributes)
        )
        return names[0] if outputs == 1 else names

    def constant(self, value: Any, dtype: Any) -> str:
        self._names += 1
        name = f"constant_{self._names}"
        self.weights.append(numpy_helper.from_array(np.asarray(value, dtype), name))
        return name

    def plain(
        self, x: str, into: int, out: int, kernel: int = 1, stride: int = 1, bias: float = 0.0, gain: float = 1.0
    ) -> str:
        scale = gain * np.sqrt(2.5 / (into * kernel * kernel))  # keeps values in range through all layers
        weight = self.constant(self._rng.normal(0, scale, (out, into, kernel, kernel)), np.float32)
        offset = self.constant(np.full(out, bias), np.float32)
        pads = [kernel // 2] * 4
        return str(self.add("Conv", x, weight, offset, kernel_shape=[kernel] * 2, strides=[stride] * 2, pads=pads))

    def conv(self, x: str, into: int, out: int, kernel: int = 1, stride: int = 1) -> str:
        y = self.plain(x, into, out, kernel, stride)
        return str(self.add("Mul", y, self.add("Sigmoid", y)))

    def block(self, x: str, into: int, out: int, repeats: int, *, shortcut: bool) -> str:
        """Split, a chain of bottlenecks on one half, all of it joined again."""
        half = out // 2
        y = self.conv(x, into, out)
        parts = list(self.add("Split", y, self.constant([half, half], np.int64), outputs=2, axis=1))
        for _ in range(repeats):
            inner = self.conv(self.conv(parts[-1], half, half, 3), half, half, 3)
            parts.append(self.add("Add", parts[-1], inner) if shortcut else inner)
        return self.conv(self.add("Concat", *parts, axis=1), half * (2 + repeats), out)

    def pooled(self, x: str, channels: int) -> str:
        half = channels // 2
        parts = [self.conv(x, channels, half)]
        for _ in range(3):
            parts.append(self.add("MaxPool", parts[-1], kernel_shape=[5, 5], strides=[1, 1], pads=[2, 2, 2, 2]))
        return self.conv(self.add("Concat", *parts, axis=1), half * 4, channels)

    def doubled(self, x: str) -> str:
        scales = self.constant([1, 1, 2, 2], np.float32)
        return str(
            self.add(
                "Resize",
                x,
                "",
                scales,
                mode="nearest",
                nearest_mode="floor",
                coordinate_transformation_mode="asymmetric",
            )
        )


def yolo_sized(path: Path, *, side: int = 640, classes: int = 80, seed: int = 0) -> Path:
    """Write the network; its input is `images` [batch, 3, side, side] float32, batch dynamic."""
    g = _Graph(seed)
    x = g.conv("images", 3, 16, 3, 2)
    x = g.block(g.conv(x, 16, 32, 3, 2), 32, 32, 1, shortcut=True)
    p3 = g.block(g.conv(x, 32, 64, 3, 2), 64, 64, 2, shortcut=True)
    p4 = g.block(g.conv(p3, 64, 128, 3, 2), 128, 128, 2, shortcut=True)
    p5 = g.pooled(g.block(g.conv(p4, 128, 256, 3, 2), 256, 256, 1, shortcut=True), 256)
    up4 = g.block(g.add("Concat", g.doubled(p5), p4, axis=1), 384, 128, 1, shortcut=False)
    out3 = g.block(g.add("Concat", g.doubled(up4), p3, axis=1), 192, 64, 1, shortcut=False)
    out4 = g.block(g.add("Concat", g.conv(out3, 64, 64, 3, 2), up4, axis=1), 192, 128, 1, shortcut=False)
    out5 = g.block(g.add("Concat", g.conv(out4, 128, 128, 3, 2), p5, axis=1), 384, 256, 1, shortcut=False)
    boxes, scores = [], []
    for x, channels in ((out3, 64), (out4, 128), (out5, 256)):
        box = g.plain(g.conv(g.conv(x, channels, 64, 3), 64, 64, 3), 64, 64, bias=1.0)
        score = g.plain(
            g.conv(g.conv(x, channels, classes, 3), classes, classes, 3), classes, classes, bias=-4.0, gain=15.0
        )
        boxes.append(g.add("Reshape", box, g.constant([0, 64, -1], np.int64)))
        scores.append(g.add("Reshape", score, g.constant([0, classes, -1], np.int64)))
    cells = sum((side // stride) ** 2 for stride in (8, 16, 32))
    raw = g.add("Reshape", g.add("Concat", *boxes, axis=2), g.constant([0, 4, 16, cells], np.int64))
    likely = g.add("Softmax", g.add("Transpose", raw, perm=[0, 2, 1, 3]), axis=1)
    bins = g.constant(np.arange(16).reshape(1, 16, 1, 1), np.float32)
    sides = g.add("Conv", likely, bins, kernel_shape=[1, 1])
    distances = g.add("Reshape", sides, g.constant([0, 4, cells], np.int64))
    near, far = g.add("Split", distances, g.constant([2, 2], np.int64), outputs=2, axis=1)
    strides = np.concatenate([np.full((side // s) ** 2, s) for s in (8, 16, 32)])
    centers = np.concatenate([np.mgrid[: side // s, : side // s][::-1].reshape(2, -1) + 0.5 for s in (8, 16, 32)], 1)
    anchors = g.constant(centers[None], np.float32)
    low, high = g.add("Sub", anchors, near), g.add("Add", anchors, far)
    middle = g.add("Div", g.add("Add", low, high), g.constant(2, np.float32))
    placed = g.add("Concat", middle, g.add("Sub", high, low), axis=1)
    boxed = g.add("Mul", placed, g.constant(strides[None, None], np.float32))
    rated = g.add("Sigmoid", g.add("Concat", *scores, axis=2))
    g.nodes.append(helper.make_node("Concat", [boxed, rated], ["output0"], axis=1))
    graph = helper.make_graph(
        g.nodes,
        "yolo_sized",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, ["batch", 3, side, side])],
        [helper.make_tensor_value_info("output0", TensorProto.FLOAT, ["batch", 4 + classes, cells])],
        g.weights,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model)
    onnx.save(model, str(path))
    return path
