"""Task-aligned assignment and the losses of the bundled detector.

Assignment: C. Feng et al., "TOOD: Task-aligned One-stage Object Detection", ICCV 2021, section 3.2.
Box loss: H. Rezatofighi et al., "Generalized Intersection over Union", CVPR 2019.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

_TOP_K = 9
_ALPHA, _BETA = 0.5, 5.0


def detection_loss(corners: Tensor, logits: Tensor, centers: Tensor, truths: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Mean loss of a batch.

    corners [B, 4, N] and logits [B, C, N] are predictions, centers [2, N] the cells' centres, all in
    input pixels; truths hold boxes [M, 4] and class ids [M] a picture.
    """
    targets = torch.zeros_like(logits)
    box_losses, weights = [], []
    for i, (boxes, class_ids) in enumerate(truths):
        if len(boxes) == 0:
            continue
        owner, quality = _assign(corners[i].detach(), logits[i].detach(), centers, boxes, class_ids)
        cells = (owner >= 0).nonzero()[:, 0]
        targets[i, class_ids[owner[cells]], cells] = quality[cells]
        box_losses.append(1 - giou(corners[i].T[cells], boxes[owner[cells]]))
        weights.append(quality[cells])
    total = targets.sum().clamp(min=1)
    score_loss = binary_cross_entropy_with_logits(logits, targets, reduction="sum") / total
    if not box_losses:
        return score_loss
    return score_loss + 4.0 * (torch.cat(box_losses) * torch.cat(weights)).sum() / total


@torch.no_grad()
def _assign(
    corners: Tensor, logits: Tensor, centers: Tensor, boxes: Tensor, class_ids: Tensor
) -> tuple[Tensor, Tensor]:
    """For each cell the index of the truth it answers for (-1: none) and the score it should give."""
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
    return owner, quality


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
