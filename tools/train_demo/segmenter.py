"""The bundled semantic segmenter, a small U-Net (O. Ronneberger et al., 2015) with the logits at half resolution.

Output: logits [batch, 1 + classes, height / 2, width / 2]; class 0 is the background, letterbox padding too.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, interpolate

from edge_agent.geometry import Placement
from edge_agent.sources.world import Truth
from train_demo.blocks import Residual, conv

STRIDE = 16
SIZE = 160
_CELL = 2  # input pixels a cell of the output, along a side


class Segmenter(nn.Module):
    """Pictures [B, 3, H, W] (RGB, 0..1; H and W multiples of 16) to class logits [B, C, H / 2, W / 2]."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.stage2 = nn.Sequential(conv(3, 16, stride=2), Residual(16))
        self.stage4 = nn.Sequential(conv(16, 32, stride=2), Residual(32))
        self.stage8 = nn.Sequential(conv(32, 48, stride=2), Residual(48), Residual(48))
        self.stage16 = nn.Sequential(conv(48, 64, stride=2), Residual(64), Residual(64))
        self.join8 = nn.Sequential(conv(64 + 48, 48, size=1), Residual(48))
        self.join4 = nn.Sequential(conv(48 + 32, 32, size=1), Residual(32))
        self.join2 = nn.Sequential(conv(32 + 16, 24, size=1), Residual(24))
        self.score = nn.Conv2d(24, classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        c2 = self.stage2(x)
        c4 = self.stage4(c2)
        c8 = self.stage8(c4)
        p8 = self.join8(_beside(self.stage16(c8), c8))
        p4 = self.join4(_beside(p8, c4))
        return self.score(self.join2(_beside(p4, c2)))


def _beside(deep: Tensor, skipped: Tensor) -> Tensor:
    return torch.cat((interpolate(deep, scale_factor=2.0), skipped), 1)


def class_map(truth: Truth, at: Placement, *, size: int = SIZE) -> Tensor:
    """[size / 2, size / 2] int64: 1 + the class id of what is seen at each cell's centre, 0 where nothing is."""
    labels = (truth.masks * (1 + truth.class_ids)[:, None, None]).max(0, initial=0)
    centers = np.arange(_CELL / 2, size, _CELL)
    columns = np.floor((centers - at.left) / at.scale_x).astype(int)
    rows = np.floor((centers - at.top) / at.scale_y).astype(int)
    across, down = (columns >= 0) & (columns < at.source_width), (rows >= 0) & (rows < at.source_height)
    cells = np.zeros((len(centers), len(centers)), np.int64)
    cells[np.ix_(down, across)] = labels[np.ix_(rows[down], columns[across])]
    return torch.from_numpy(cells)


def segmenter_loss(model: Segmenter, pictures: Tensor, class_maps: list[Tensor]) -> Tensor:
    return cross_entropy(model(pictures), torch.stack(class_maps))
