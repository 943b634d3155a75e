"""Boxes that are turned: their corners, and which of them show the same object."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from edge_agent.families._boxes import Floats

_TINY = 1e-7


def turned_corners(boxes: Floats, angles: Floats) -> Floats:
    """[N, 4, 2] corners of boxes cx cy w h that are turned by angles in radians, clockwise on the screen."""
    cos, sin = np.cos(angles), np.sin(angles)
    across = np.stack((cos, sin), 1) * boxes[:, 2:3] / 2
    along = np.stack((-sin, cos), 1) * boxes[:, 3:4] / 2
    center = boxes[:, :2]
    corners = (center + across + along, center + across - along, center - across - along, center - across + along)
    return np.stack(corners, 1).astype(np.float32)


def fast_nms(boxes: Floats, angles: Floats, class_ids: NDArray[np.int64], most: float) -> NDArray[np.intp]:
    """The places of those that no better one of their class overlaps by `most` or more; best first, as they come.

    Fast NMS (Bolya et al., "YOLACT", arXiv 1904.02689) on probabilistic IoU.
    """
    overlap = probabilistic_iou(boxes, angles)
    overlap *= class_ids[:, None] == class_ids[None]
    return np.flatnonzero(~(np.triu(overlap, 1) >= most).any(0))


def probabilistic_iou(boxes: Floats, angles: Floats) -> NDArray[np.float64]:
    """[N, N]: how far boxes cx cy w h, seen as Gaussians, overlap (Llerena et al., "Gaussian Bounding Boxes and
    Probabilistic Intersection-over-Union", arXiv 2106.06072)."""
    x, y, w, h = boxes.astype(np.float64).T
    variance_w, variance_h = w**2 / 12, h**2 / 12
    cos, sin = np.cos(angles.astype(np.float64)), np.sin(angles.astype(np.float64))
    a = variance_w * cos**2 + variance_h * sin**2
    b = variance_w * sin**2 + variance_h * cos**2
    c = (variance_w - variance_h) * cos * sin
    sum_a, sum_b, sum_c = (v[:, None] + v[None] for v in (a, b, c))
    dx, dy = x[:, None] - x[None], y[:, None] - y[None]
    determinant = sum_a * sum_b - sum_c**2
    distance = (sum_a * dy**2 + sum_b * dx**2 - 2 * sum_c * dx * dy) / (determinant + _TINY) * 0.25
    own = np.clip(a * b - c**2, 0, None)
    distance += 0.5 * np.log(determinant / (4 * np.sqrt(own[:, None] * own[None]) + _TINY) + _TINY)
    apart = np.sqrt(1.0 - np.exp(-np.clip(distance, _TINY, 100.0)) + _TINY)
    overlap: NDArray[np.float64] = 1.0 - apart
    return overlap
