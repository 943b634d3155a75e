"""The bundled classifier: which shape a picture shows. Output: logits [batch, classes]."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from edge_agent.geometry import Placement
from edge_agent.sources.world import Truth
from train_demo.blocks import Residual, conv

STRIDE = 8
_MIN_VISIBILITY = 0.6


class Shape(NamedTuple):
    """The only shape of a picture: its class id and its centre, [2] x y in input pixels."""

    class_id: int
    center: Tensor


class Classifier(nn.Module):
    """Pictures [B, 3, H, W] (RGB, 0..1; H and W multiples of 8) to class logits [B, C]: the best of all cells."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            conv(3, 12),  # a shape may be 8 pixels wide
            *(conv(12, 24, stride=2), Residual(24)),
            *(conv(24, 40, stride=2), Residual(40), Residual(40)),
            *(conv(40, 64, stride=2), Residual(64)),
        )
        self.score = nn.Conv2d(64, classes, 1)
        self.best = nn.AdaptiveMaxPool2d(1)

    def forward(self, x: Tensor) -> Tensor:
        return self.best(self.by_cell(x)).flatten(1)

    def by_cell(self, x: Tensor) -> Tensor:
        """Class logits of each cell, [B, C, H / 8, W / 8]."""
        return self.score(self.body(x))


def only_shape(truth: Truth, at: Placement) -> Shape | None:
    """A world's only object, None where too little of it is seen."""
    if truth.visibility[0] < _MIN_VISIBILITY:
        return None
    return Shape(int(truth.class_ids[0]), torch.from_numpy(at.to_input(truth.keypoints[0, 0, :2])))


def classifier_loss(model: Classifier, pictures: Tensor, shapes: list[Shape]) -> Tensor:
    """Which cell and class together, since a small shape is hardly found by its class alone; and which class."""
    logits = model.by_cell(pictures)
    height, width = logits.shape[2:]
    class_ids = torch.tensor([shape.class_id for shape in shapes])
    column, row = (torch.stack([shape.center for shape in shapes]) / STRIDE).long().unbind(1)
    cell = row.clamp(max=height - 1) * width + column.clamp(max=width - 1)
    return cross_entropy(logits.flatten(1), class_ids * height * width + cell) + cross_entropy(
        model.best(logits).flatten(1), class_ids
    )
