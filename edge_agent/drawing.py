"""Draws what a model saw onto the picture in which it saw it.

Imported only by those who have pictures to work on, since importing OpenCV is slow.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from edge_agent.config import CameraOptions
from edge_agent.data import (
    Classes,
    DepthMap,
    Detections,
    Embedding,
    Image,
    Mask,
    Names,
    Poses,
    Prediction,
    RawTensors,
    Result,
    Segmentation,
)
from edge_agent.predictions import label

Color = tuple[int, int, int]

_COLORS = ((60, 180, 75), (75, 25, 230), (25, 225, 255), (200, 130, 0), (48, 130, 245), (180, 30, 145), (240, 240, 70))
_DARK = (40, 40, 40)
_BRIGHT = (255, 255, 255)
_SURE = 0.3
"""The least score of a keypoint that is drawn."""


def annotated(result: Result, camera: CameraOptions | None = None) -> Image:
    """A copy of a result's picture with all that was seen in it, its camera's zones and lines, and a line that says
    by what model."""
    image: Image = result.frame.image.copy()
    if camera is not None:
        _zones(_Pen(image), camera, result.zone_counts or {})
    title = f"{result.frame.camera}  #{result.frame.seq}  {result.model.name}  {result.timings.inference_ms:.1f} ms"
    draw(image, result.prediction, result.model.names, title=title)
    return image


def draw(image: Image, prediction: Prediction, names: Names, *, title: str = "") -> None:
    """Draw onto `image`, [h, w, 3] uint8 BGR: boxes, masks, skeletons, colour maps, by the kind of prediction."""
    pen = _Pen(image)
    _KINDS[type(prediction)](pen, prediction, names)
    if title:
        pen.caption(title, (0, image.shape[0]), _DARK)


class _Pen:
    """Lines and letters of a size that suits the picture."""

    def __init__(self, image: Image) -> None:
        self.image = image
        self.size = max(0.4, min(image.shape[:2]) / 1000)
        self.thick = max(1, round(self.size * 2))

    def box(self, box: NDArray[np.float32], color: Color, *, thick: int | None = None) -> None:
        x1, y1, x2, y2 = np.round(box).astype(int).tolist()
        cv2.rectangle(self.image, (x1, y1), (x2, y2), color, thick or self.thick)

    def polygon(self, points: NDArray[Any], color: Color) -> None:
        cv2.polylines(self.image, [np.round(points).astype(np.int32)], True, color, self.thick, cv2.LINE_AA)

    def line(self, a: Sequence[float], b: Sequence[float], color: Color) -> None:
        start, end = ((round(x), round(y)) for x, y in (a, b))
        cv2.line(self.image, start, end, color, self.thick, cv2.LINE_AA)

    def dot(self, at: Sequence[float], color: Color) -> None:
        cv2.circle(self.image, (round(at[0]), round(at[1])), self.thick + 2, color, -1, cv2.LINE_AA)

    def mask(self, mask: Mask, color: Color) -> None:
        rows, columns = mask.bits.shape
        part = self.image[mask.top : mask.top + rows, mask.left : mask.left + columns]
        bits = mask.bits[: part.shape[0], : part.shape[1]]
        part[bits] = (part[bits] * 0.5 + np.array(color) * 0.5).astype(np.uint8)

    def blend(self, overlay: Image, share: float, *, where: NDArray[np.bool_] | None = None) -> None:
        size = self.image.shape[1], self.image.shape[0]
        whole = cv2.resize(overlay, size, interpolation=cv2.INTER_NEAREST)
        mixed = cv2.addWeighted(whole, share, self.image, 1 - share, 0)
        if where is None:
            self.image[:] = mixed
            return
        chosen = cv2.resize(where.astype(np.uint8), size, interpolation=cv2.INTER_NEAREST).astype(bool)
        self.image[chosen] = mixed[chosen]

    def caption(self, text: str, at: tuple[int, int], color: Color) -> None:
        (width, height), base = cv2.getTextSize(text, cv2.FONT_HERSHEY_SIMPLEX, self.size, 1)
        x = min(max(0, at[0]), max(0, self.image.shape[1] - width - 4))
        y = min(max(height + base + 2, at[1]), self.image.shape[0])
        cv2.rectangle(self.image, (x, y - height - base - 2), (x + width + 4, y), color, -1)
        ink = (0, 0, 0) if sum(color) > 380 else (255, 255, 255)
        cv2.putText(self.image, text, (x + 2, y - base), cv2.FONT_HERSHEY_SIMPLEX, self.size, ink, 1, cv2.LINE_AA)

    def lines(self, texts: Sequence[str]) -> None:
        """Text from the top of the picture downwards."""
        for index, text in enumerate(texts, 1):
            self.caption(text, (0, round(index * (self.size * 34 + 8))), _DARK)


def _zones(pen: _Pen, camera: CameraOptions, counts: Mapping[str, Mapping[str, int]]) -> None:
    size = np.array(pen.image.shape[1::-1])
    for name, polygon in camera.zones.items():
        points = np.array(polygon) * size
        pen.polygon(points, _BRIGHT)
        corner = points[points[:, 1].argmin()].astype(int).tolist()
        pen.caption(f"{name}: {sum(counts.get(name, {}).values())}", (corner[0], corner[1]), _BRIGHT)
    for name, ends in camera.lines.items():
        start, end = (np.array(ends) * size).tolist()
        pen.line(start, end, _BRIGHT)
        pen.caption(name, (int(end[0]), int(end[1])), _BRIGHT)


def _detections(pen: _Pen, found: Detections, names: Names) -> None:
    for index in reversed(range(len(found))):  # the surest on top
        class_id = int(found.class_ids[index])
        track = -1 if found.track_ids is None else int(found.track_ids[index])
        color = _color(class_id if track < 0 else track)
        if found.masks is not None:
            pen.mask(found.masks[index], color)
        if found.corners is not None:
            pen.polygon(found.corners[index], color)
        else:
            pen.box(found.boxes[index], color)
        if found.keypoints is not None:
            for point in found.keypoints[index].tolist():
                pen.dot(point[:2], color)
        _title(pen, found, index, names, color)


def _poses(pen: _Pen, found: Poses, names: Names) -> None:
    for index in reversed(range(len(found))):
        track = -1 if found.track_ids is None else int(found.track_ids[index])
        color = _color(index if track < 0 else track)
        points = found.keypoints[index].tolist()
        pen.box(found.boxes[index], color, thick=1)
        for a, b in names.skeleton:
            if min(points[a][2], points[b][2]) >= _SURE:
                pen.line(points[a][:2], points[b][:2], color)
        for point in points:
            if point[2] >= _SURE:
                pen.dot(point[:2], color)
        _title(pen, found, index, names, color)


def _title(pen: _Pen, found: Detections | Poses, index: int, names: Names, color: Color) -> None:
    """What an object is, at its corner, with its track's number if it has one."""
    track = -1 if found.track_ids is None else int(found.track_ids[index])
    number = f"#{track} " if track >= 0 else ""
    corner = found.boxes[index, :2].astype(int).tolist()
    text = f"{number}{label(names, int(found.class_ids[index]))} {found.scores[index]:.2f}"
    pen.caption(text, (corner[0], corner[1]), color)


def _classes(pen: _Pen, found: Classes, names: Names) -> None:
    pairs = zip(found.class_ids.tolist(), found.scores.tolist(), strict=True)
    pen.lines([f"{label(names, class_id)} {score:.2f}" for class_id, score in pairs])


def _segmentation(pen: _Pen, found: Segmentation, names: Names) -> None:
    colors = np.array([_blue_first(color) for color in names.colors] or _COLORS, np.uint8)
    shown = colors[found.class_map % len(colors)]
    pen.blend(shown, 0.5, where=shown.any(2))  # black is the background's colour: left as it is
    for region in reversed(found.regions):
        blue, green, red = colors[region.class_id % len(colors)].tolist()
        color = blue, green, red
        pen.polygon(region.outline, color)
        score = "" if region.score is None else f" {region.score:.2f}"
        center = (round(region.centroid[0]), round(region.centroid[1]))
        pen.caption(f"{label(names, region.class_id)}{score}", center, color)


def _depth(pen: _Pen, found: DepthMap, names: Names) -> None:
    known = np.isfinite(found.values)
    low, high = (float(np.min(found.values[known])), float(np.max(found.values[known]))) if known.any() else (0.0, 1.0)
    levels = (np.nan_to_num(found.values) - low) / ((high - low) or 1.0) * 255
    pen.blend(cv2.applyColorMap(np.clip(levels, 0, 255).astype(np.uint8), cv2.COLORMAP_INFERNO), 0.8)
    pen.lines([f"{low:.3g} to {high:.3g}"])


def _embedding(pen: _Pen, found: Embedding, names: Names) -> None:
    pen.lines([f"a vector of {len(found.vector)} numbers"])


def _raw(pen: _Pen, found: RawTensors, names: Names) -> None:
    pen.lines([f"{name} {list(tensor.shape)} {tensor.dtype}" for name, tensor in found.tensors.items()])


def _color(number: int) -> Color:
    return _COLORS[number % len(_COLORS)]


def _blue_first(color: Color) -> Color:
    return color[2], color[1], color[0]


_KINDS: Mapping[type, Callable[[_Pen, Any, Names], None]] = {
    Detections: _detections,
    Poses: _poses,
    Classes: _classes,
    Segmentation: _segmentation,
    DepthMap: _depth,
    Embedding: _embedding,
    RawTensors: _raw,
}
