"""The bundled detector with keypoints: the detector's network with one more branch, started from its weights.

Its exported output is the dense head that the field knows from YOLOv8-pose: the detector's rows, then for each
keypoint x and y in input pixels and the probability that it is visible.
"""

from __future__ import annotations

import re
from pathlib import Path

import onnx
import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, smooth_l1_loss

from train_demo.blocks import conv
from train_demo.detector import STRIDES, Detector, all_centers, cell_centers, rows
from train_demo.loss import Assignment, assign, detection_loss
from train_demo.scenes import Objects


class PoseDetector(Detector):
    """Pictures [B, 3, H, W] (RGB, 0..1; H and W multiples of 32) to dense predictions [B, 4 + C + 3 * K, N]."""

    def __init__(self, classes: int, keypoints: int, *, width: int = 40) -> None:
        super().__init__(classes, width=width)
        self.keypoints = keypoints
        self.point_tower = nn.Sequential(conv(width, width), conv(width, width))
        self.point = nn.Conv2d(width, 3 * keypoints, 1)

    def forward(self, x: Tensor) -> Tensor:
        corners, logits, points = self.dense_with_points(x)
        at, visible = points.split((2, 1), 2)
        return torch.cat((rows(corners, logits), torch.cat((at, visible.sigmoid()), 2).flatten(1, 2)), 1)

    def dense_with_points(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What `dense` gives, and keypoints [B, K, 3, N]: x and y in input pixels, the visibility's logit."""
        levels = self._features(x)
        points = [self._points(features, stride) for features, stride in zip(levels, STRIDES, strict=True)]
        return *self._heads(levels), torch.cat(points, 3)

    def _points(self, features: Tensor, stride: int) -> Tensor:
        height, width = int(features.shape[2]), int(features.shape[3])  # constants of the exported graph
        raw = self.point(self.point_tower(features)).reshape(-1, self.keypoints, 3, height * width)
        shift, visible = raw.split((2, 1), 2)
        return torch.cat((shift * stride + cell_centers(height, width, stride), visible), 2)


def start_from(model: Detector, path: Path) -> None:
    """Give `model` the weights of an exported detector.

    The export folded the batch norms into the convolutions before them, so here they go as well.
    """
    graph = onnx.load(path).graph
    weights = {i.name: torch.from_numpy(onnx.numpy_helper.to_array(i).copy()) for i in graph.initializer}
    modules = dict(model.named_modules())
    for node in graph.node:
        name = _module_name(node)
        if node.op_type != "Conv" or name not in modules:
            continue
        modules[name].weight, modules[name].bias = (nn.Parameter(weights[i]) for i in node.input[1:])
        parent = modules[name.rpartition(".")[0]]
        if isinstance(parent, nn.Sequential):
            parent[1] = nn.Identity()
    scales = [weights[n.input[1]] for n in graph.node if n.op_type == "Mul" and n.input[1] in weights]
    model.level_scale = nn.Parameter(torch.stack(scales))


def _module_name(node: onnx.NodeProto) -> str:
    """The convolution that a node comes from: `/stem/stem.0/stem.0.1/Conv` says the names of its parents as well.

    Later uses of a shared module are numbered, `/box_1/Conv`, and so name no module.
    """
    path = re.sub(r"/([^/]+)(?=/\1\.)", "", node.name)
    return path.removeprefix("/").removesuffix("/Conv").replace("/", ".")


def pose_loss(model: PoseDetector, pictures: Tensor, objects: list[Objects]) -> Tensor:
    corners, logits, points = model.dense_with_points(pictures)
    assignments = assign(corners, logits, all_centers(pictures), objects)
    return detection_loss(corners, logits, objects, assignments) + _keypoint_loss(points, objects, assignments)


def _keypoint_loss(points: Tensor, objects: list[Objects], assignments: list[Assignment]) -> Tensor:
    """Distance of the visible keypoints, in sizes of their object, and whether they are visible."""
    losses = []
    for found, (boxes, _, keypoints), (cells, owners, quality) in zip(points, objects, assignments, strict=True):
        at, logit = found[:, :, cells].permute(2, 0, 1).split((2, 1), 2)
        wanted_at, visible = keypoints[owners].split((2, 1), 2)
        size = (boxes[owners, 2:] - boxes[owners, :2]).prod(1).sqrt()[:, None, None]
        distance = smooth_l1_loss(at / size, wanted_at / size, reduction="none", beta=0.005).sum(2, keepdim=True)
        seen = binary_cross_entropy_with_logits(logit, visible, reduction="none")
        losses.append((10.0 * visible * distance + 0.5 * seen).sum((1, 2)) * quality)
    total = sum(a.quality.sum() for a in assignments)
    return torch.cat(losses).sum() / torch.as_tensor(total).clamp(min=1)
