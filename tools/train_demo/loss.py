"""Task-aligned assignment and the losses of the bundled detector.

Assignment: C. Feng et al., "TOOD: Task-aligned One-stage Object Detection", ICCV 2021, section 3.2.
Box loss: H. Rezatofighi et al., "Generalized Intersection over Union", CVPR 2019.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from train_demo.scenes import Objects

_TOP_K = 9
_ALPHA, _BETA = 0.5, 5.0


class Assignment(NamedTuple):
    """The cells of a picture that answer for an object: their indices, whose they are, the scores they should give."""

    cells: Tensor
    owners: Tensor
    quality: Tensor


def detection_loss(corners: Tensor, logits: Tensor, objects: list[Objects], assignments: list[Assignment]) -> Tensor:
    """Mean loss of a batch; corners [B, 4, N] and logits [B, C, N] are predictions."""
    targets = torch.zeros_like(logits)
    box_losses = []
    for i, ((boxes, class_ids, _), (cells, owners, quality)) in enumerate(zip(objects, assignments, strict=True)):
        targets[i, class_ids[owners], cells] = quality
        box_losses.append((1 - giou(corners[i].T[cells], boxes[owners])) * quality)
    total = targets.sum().clamp(min=1)
    score_loss = binary_cross_entropy_with_logits(logits, targets, reduction="sum") / total
    return score_loss + 4.0 * torch.cat(box_losses).sum() / total


@torch.no_grad()
def assign(corners: Tensor, logits: Tensor, centers: Tensor, objects: list[Objects]) -> list[Assignment]:
    """For each picture the cells that answer for its objects; centers [2, N] are the cells' centres."""
    return [_assign(*it[:2], centers, it[2]) for it in zip(corners, logits, objects, strict=True)]


def _assign(corners: Tensor, logits: Tensor, centers: Tensor, objects: Objects) -> Assignment:
    boxes, class_ids, _ = objects
    if len(boxes) == 0:
        return Assignment(class_ids, class_ids, boxes[:, 0])
    overlap = iou(boxes[:, None], corners.T[None]).clamp(min=0)  # [M, N]
    x, y = centers
    inside = (x > boxes[:, :1]) & (y > boxes[:, 1:2]) & (x < boxes[:, 2:3]) & (y < boxes[:, 3:4])
    aligned = logits.sigmoid()[class_ids] ** _ALPHA * overlap**_BETA * inside + 1e-9 * inside
    chosen = torch.zeros_like(inside)
    chosen.scatter_(1, aligned.topk(min(_TOP_K, aligned.shape[1]), 1).indices, True)
    chosen &= inside
    best = (aligned * chosen).max(0)
    owner = torch.where(chosen.any(0), best.indices, -1)
    aligned = aligned * chosen
    peak = aligned.max(1, keepdim=True).values.clamp(min=1e-9)
    reach = (overlap * chosen).max(1, keepdim=True).values
    quality = (aligned / peak * reach).gather(0, owner.clamp(min=0)[None])[0]
    cells = (owner >= 0).nonzero()[:, 0]
    return Assignment(cells, owner[cells], quality[cells])


def iou(a: Tensor, b: Tensor) -> Tensor:
    """Intersection over union of boxes [..., 4] that broadcast against each other."""
    intersection, union, _ = _areas(a, b)
    return intersection / union


def giou(a: Tensor, b: Tensor) -> Tensor:
    """Generalized IoU of boxes [..., 4]."""
    intersection, union, hull = _areas(a, b)
    return intersection / union - (hull - union) / hull


def _areas(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    low, high = torch.maximum(a[..., :2], b[..., :2]), torch.minimum(a[..., 2:], b[..., 2:])
    intersection = (high - low).clamp(min=0).prod(-1)
    size_a, size_b = (a[..., 2:] - a[..., :2]).clamp(min=0), (b[..., 2:] - b[..., :2]).clamp(min=0)
    union = size_a.prod(-1) + size_b.prod(-1) - intersection + 1e-6
    hull = (torch.maximum(a[..., 2:], b[..., 2:]) - torch.minimum(a[..., :2], b[..., :2])).clamp(min=0).prod(-1)
    return intersection, union, hull + 1e-6
