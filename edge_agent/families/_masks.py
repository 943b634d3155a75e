"""Masks of instances: mixed of prototypes, cut to their boxes, in source pixels."""

from __future__ import annotations

import cv2
import numpy as np

from edge_agent.data import Detections, Mask, PreprocessSpec
from edge_agent.families._boxes import Floats, visible
from edge_agent.geometry import Placement


def masks_of(
    found: Detections, coefficients: Floats, prototypes: Floats, placement: Placement, spec: PreprocessSpec
) -> Detections:
    """`found` with masks. coefficients: [N, M]; prototypes: [M, h, w], which cover the whole input.

    A pixel belongs to the object where the mixture, sampled linearly at its centre, is positive, and where it
    lies in the box (Bolya et al., "YOLACT", arXiv 1904.02689).
    """
    parts, height, width = prototypes.shape
    mixed = (coefficients @ prototypes.reshape(parts, -1)).reshape(-1, height, width)
    np.nan_to_num(mixed, copy=False, nan=-1.0, posinf=1.0, neginf=-1.0)
    scale = np.array([width / spec.width, height / spec.height])
    step = scale * (placement.scale_x, placement.scale_y)
    start = scale * (placement.left, placement.top)
    masks = []
    for box, mask in zip(found.boxes, mixed, strict=True):
        left, top, right, bottom = np.ceil(box).astype(int).tolist()
        if right <= left or bottom <= top:
            masks.append(Mask(left, top, np.zeros((max(0, bottom - top), max(0, right - left)), bool)))
            continue
        at = start + (np.array([left, top]) + 0.5) * step - 0.5
        matrix = np.array([[step[0], 0, at[0]], [0, step[1], at[1]]])
        sampled = cv2.warpAffine(
            mask,
            matrix,
            (right - left, bottom - top),
            flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP,
            borderMode=cv2.BORDER_REPLICATE,
        )
        masks.append(Mask(left, top, sampled > 0))
    return visible(Detections(found.boxes, found.scores, found.class_ids, masks=masks))
