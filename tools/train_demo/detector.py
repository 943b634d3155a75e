"""The bundled detector's network: small, anchor-free, ReLU only, three strides.

Its exported output is the dense head that the field knows from YOLOv8: [batch, 4 + classes, cells],
rows centre x, centre y, width, height in input pixels, then one probability a class.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from train_demo.blocks import Residual, conv
from train_demo.loss import assign, detection_loss
from train_demo.scenes import Objects

STRIDES = (8, 16, 32)
_MAX_LOG = 8.0


class Detector(nn.Module):
    """Pictures [B, 3, H, W] (RGB, 0..1; H and W multiples of 32) to dense predictions [B, 4 + C, N]."""

    def __init__(self, classes: int, *, width: int = 40) -> None:
        super().__init__()
        self.classes = classes
        self.stem = nn.Sequential(conv(3, 12, stride=2), conv(12, 24, stride=2))
        self.stage8 = nn.Sequential(conv(24, 40, stride=2), Residual(40), Residual(40))
        self.stage16 = nn.Sequential(conv(40, 56, stride=2), Residual(56), Residual(56))
        self.stage32 = nn.Sequential(conv(56, 80, stride=2), Residual(80))
        self.lateral = nn.ModuleList(conv(c, width, size=1) for c in (40, 56, 80))
        self.smooth = nn.ModuleList(conv(width, width, groups=width) for _ in range(3))
        self.tower = nn.Sequential(conv(width, width), conv(width, width, groups=width), conv(width, width, size=1))
        self.box = nn.Conv2d(width, 4, 1)
        self.score = nn.Conv2d(width, classes, 1)
        self.level_scale = nn.Parameter(torch.full((3,), 1.0))
        nn.init.constant_(self.score.bias, -4.6)  # a prior of 1 %, so that the first steps are calm

    def forward(self, x: Tensor) -> Tensor:
        return rows(*self.dense(x))

    def dense(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Corners [B, 4, N] in input pixels and class logits [B, C, N]."""
        return self._heads(self._features(x))

    def _heads(self, levels: list[Tensor]) -> tuple[Tensor, Tensor]:
        corners, logits = [], []
        for level, (features, stride) in enumerate(zip(levels, STRIDES, strict=True)):
            features = self.tower(features)
            sides = torch.exp((self.box(features) * self.level_scale[level]).clamp(-_MAX_LOG, _MAX_LOG)) * stride
            height, width = int(features.shape[2]), int(features.shape[3])  # constants of the exported graph
            centers = cell_centers(height, width, stride).to(sides.dtype)
            left_top, right_bottom = sides.flatten(2).split(2, 1)
            corners.append(torch.cat((centers - left_top, centers + right_bottom), 1))
            logits.append(self.score(features).flatten(2))
        return torch.cat(corners, 2), torch.cat(logits, 2)

    def _features(self, x: Tensor) -> list[Tensor]:
        c8 = self.stage8(self.stem(x))
        c16 = self.stage16(c8)
        p32 = self.lateral[2](self.stage32(c16))
        p16 = self.lateral[1](c16) + nn.functional.interpolate(p32, scale_factor=2.0)
        p8 = self.lateral[0](c8) + nn.functional.interpolate(p16, scale_factor=2.0)
        return [smooth(p) for smooth, p in zip(self.smooth, (p8, p16, p32), strict=True)]


def rows(corners: Tensor, logits: Tensor) -> Tensor:
    """The head's rows [B, 4 + C, N] of what `dense` gives."""
    x1, y1, x2, y2 = corners.unbind(1)
    centered = torch.stack(((x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1), 1)
    return torch.cat((centered, logits.sigmoid()), 1)


def cell_centers(height: int, width: int, stride: int) -> Tensor:
    """Centres of a level's cells, [1, 2, height * width] in input pixels, row by row."""
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return ((torch.stack((x, y)).flatten(1) + 0.5) * stride)[None]


def all_centers(pictures: Tensor) -> Tensor:
    """Centres of the cells of all levels, [2, N] in input pixels."""
    height, width = pictures.shape[2:]
    return torch.cat([cell_centers(height // s, width // s, s)[0] for s in STRIDES], 1)


def detector_loss(model: Detector, pictures: Tensor, objects: list[Objects]) -> Tensor:
    corners, logits = model.dense(pictures)
    return detection_loss(corners, logits, objects, assign(corners, logits, all_centers(pictures), objects))
