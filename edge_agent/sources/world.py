"""The synthetic world: moving shapes on a textured ground, and the truth of every frame.

It is demo, test double and ground truth in one; `tools/train_demo` trains the bundled models on it.
Frame `n` of a world depends on its arguments and `n` alone, so that anybody can ask for the truth of
a frame seen elsewhere.
"""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from edge_agent.data import Image

CLASS_NAMES = ("disc", "square", "triangle", "star", "cross")
KEYPOINT_NAMES = ("center", "tip")

_SUBPIXEL_BITS = 4
_TIP = 0.55  # distance of the tip's dot from the centre, in radii
_NOISE_MARGIN = 64


@dataclass(frozen=True)
class Truth:
    """What frame `index` really shows, rear objects first.

    boxes: [N, 4] float32, x1 y1 x2 y2 around the visible pixels; class_ids: [N] int64 into
    `CLASS_NAMES`; visibility: [N] float32, visible share of the whole shape, 0 where hidden;
    masks: [N, H, W] bool, visible pixels; keypoints: [N, 2, 3] float32, x y visible, named by
    `KEYPOINT_NAMES`.
    """

    index: int
    boxes: NDArray[np.float32]
    class_ids: NDArray[np.int64]
    visibility: NDArray[np.float32]
    masks: NDArray[np.bool_]
    keypoints: NDArray[np.float32]


class World:
    """Shapes that drift, turn, pulse, bounce and hide each other before a textured background.

    The same arguments give the same pictures on every machine with the same OpenCV. `noise` is the
    most that is added to a pixel (0..255), `lighting` the relative swing of the brightness (0..1).
    """

    FPS = 30.0

    def __init__(
        self, *, width: int, height: int, objects: int = 6, seed: int = 0, noise: int = 8, lighting: float = 0.25
    ) -> None:
        if objects > 255:
            raise ValueError(f"a world holds at most 255 objects, not {objects}")
        if width < 32 or height < 32:
            raise ValueError(f"a world needs at least 32x32 pixels, not {width}x{height}")
        self.width, self.height = width, height
        self._lighting = lighting
        rng = np.random.default_rng(seed)
        self.class_ids = rng.integers(0, len(CLASS_NAMES), objects)
        self._radius = rng.uniform(0.06, 0.17, objects) * height
        self._start = rng.uniform(0.0, 1.0, (objects, 2)) * (width, height)
        self._velocity = rng.uniform(-0.25, 0.25, (objects, 2)) * height
        self._angle = rng.uniform(0, 2 * np.pi, objects)
        self._spin = rng.uniform(-1.2, 1.2, objects)
        self._stretch = rng.uniform(0.8, 1.2, objects)
        self._pulse = rng.uniform(0.0, 0.15, objects)
        self._phase = rng.uniform(0, 2 * np.pi, objects)
        self._fill = _vivid_colors(rng, objects)
        self._background = _textured_background(rng, width, height)
        self._light_phase = rng.uniform(0, 2 * np.pi)
        tile = (height + _NOISE_MARGIN, width + _NOISE_MARGIN, 3)
        self._noise = rng.integers(0, noise + 1, tile, dtype=np.uint8) if noise else None
        self._noise_seed = seed

    def draw(self, index: int, out: Image) -> None:
        """Draw frame `index` into `out`, [height, width, 3] uint8 BGR."""
        gain = 1.0 + self._lighting * float(np.sin(0.9 * index / self.FPS + self._light_phase))
        cv2.convertScaleAbs(self._background, dst=out, alpha=gain)
        outlines, keypoints = self._geometry(index)
        for outline, (_, tip), fill, radius in zip(outlines, keypoints, self._fill, self._radius, strict=True):
            color = np.minimum(fill * gain, 255)
            dark, bright = (color * 0.35).tolist(), np.minimum(color * 0.4 + 150 * gain, 255).tolist()
            points = _fixed_point(outline)
            cv2.fillPoly(out, [points], color.tolist(), cv2.LINE_AA, _SUBPIXEL_BITS)
            cv2.polylines(out, [points], True, dark, max(1, int(radius / 12)), cv2.LINE_AA, _SUBPIXEL_BITS)
            center = _fixed_point(tip)
            cv2.circle(out, center.tolist(), int(radius * 0.16 * 16), bright, -1, cv2.LINE_AA, _SUBPIXEL_BITS)
        if self._noise is not None:
            self._add_noise(index, out)

    def truth(self, index: int) -> Truth:
        """What frame `index` shows; see `Truth` for shapes and units."""
        outlines, keypoints = self._geometry(index)
        count = len(outlines)
        owner = np.zeros((self.height, self.width), np.uint8)  # 1 + the foremost shape at each pixel
        for i, outline in enumerate(outlines):
            cv2.fillPoly(owner, [_fixed_point(outline)], i + 1, cv2.LINE_8, _SUBPIXEL_BITS)
        masks = owner[None] == np.arange(1, count + 1, dtype=np.uint8)[:, None, None]
        boxes = np.zeros((count, 4), np.float32)
        visibility = np.zeros(count, np.float32)
        for i, (mask, outline) in enumerate(zip(masks, outlines, strict=True)):
            if mask.any():
                x, y, w, h = cv2.boundingRect(mask.view(np.uint8))
                boxes[i] = x, y, x + w, y + h
                visibility[i] = min(1.0, mask.sum() / max(1.0, cv2.contourArea(outline.astype(np.float32))))
        return Truth(index, boxes, self.class_ids, visibility, masks, self._visible_keypoints(keypoints, masks))

    def _geometry(self, index: int) -> tuple[list[NDArray[np.float64]], NDArray[np.float64]]:
        t = index / self.FPS
        centers = _bounce(self._start + self._velocity * t, np.array([self.width, self.height], float))
        angles = self._angle + self._spin * t
        radii = self._radius * (1 + self._pulse * np.sin(2.0 * t + self._phase))
        cos, sin = np.cos(angles), np.sin(angles)
        turn = np.stack([np.stack([cos, -sin], -1), np.stack([sin, cos], -1)], -2) * radii[:, None, None]
        stretch = np.stack([self._stretch, 1 / self._stretch], -1)[:, None, :]
        turn = turn * stretch
        outlines = [
            _SHAPES[kind] @ matrix.T + center
            for kind, matrix, center in zip(self.class_ids, turn, centers, strict=True)
        ]
        tips = centers + turn @ np.array([0.0, -_TIP])
        return outlines, np.stack([centers, tips], 1)

    def _visible_keypoints(self, keypoints: NDArray[np.float64], masks: NDArray[np.bool_]) -> NDArray[np.float32]:
        out = np.zeros((*keypoints.shape[:2], 3), np.float32)
        out[..., :2] = keypoints
        for i, points in enumerate(np.floor(keypoints).astype(int)):
            for k, (x, y) in enumerate(points):
                out[i, k, 2] = 0 <= x < self.width and 0 <= y < self.height and masks[i, y, x]
        return out

    def _add_noise(self, index: int, out: Image) -> None:
        assert self._noise is not None
        dy, dx = np.random.default_rng((self._noise_seed, index)).integers(0, _NOISE_MARGIN, 2)
        tile = self._noise[dy : dy + self.height, dx : dx + self.width]
        cv2.add(out, tile, dst=out)


def _bounce(position: NDArray[np.float64], size: NDArray[np.float64]) -> NDArray[np.float64]:
    """Positions reflected into 0..size: the closed form of a ball between walls."""
    folded = np.mod(position, 2 * size)
    return np.minimum(folded, 2 * size - folded)


def _fixed_point(points: NDArray[np.float64]) -> NDArray[np.int32]:
    # OpenCV's pixel (0, 0) has its centre at (0, 0); ours, as in boxes, at (0.5, 0.5).
    return np.round((points - 0.5) * (1 << _SUBPIXEL_BITS)).astype(np.int32)


def _regular(corners: int, *, inner: float = 1.0) -> NDArray[np.float64]:
    """A regular polygon pointing up, or a star whose inner corners lie at `inner` radii."""
    count = corners * 2 if inner != 1.0 else corners
    angles = np.arange(count) * 2 * np.pi / count - np.pi / 2
    radii = np.where(np.arange(count) % 2 == 0, 1.0, inner)
    return np.stack([np.cos(angles), np.sin(angles)], -1) * radii[:, None]


def _plus() -> NDArray[np.float64]:
    a = 0.33
    quadrant = np.array([[a, -1.0], [a, -a], [1.0, -a]])
    turn = np.array([[0.0, -1.0], [1.0, 0.0]])
    parts = [quadrant]
    for _ in range(3):
        parts.append(parts[-1] @ turn.T)
    return np.concatenate(parts)


def _square() -> NDArray[np.float64]:
    a = 0.85
    return np.array([[-a, -a], [a, -a], [a, a], [-a, a]])


_SHAPES: tuple[NDArray[np.float64], ...] = (
    _regular(40),
    _square(),
    _regular(3),
    _regular(5, inner=0.45),
    _plus(),
)


def _vivid_colors(rng: np.random.Generator, count: int) -> NDArray[np.float64]:
    hsv = np.stack([rng.integers(0, 180, count), rng.integers(120, 256, count), rng.integers(110, 256, count)], -1)
    if count == 0:
        return np.zeros((0, 3))
    bgr: NDArray[np.float64] = cv2.cvtColor(hsv[None].astype(np.uint8), cv2.COLOR_HSV2BGR)[0].astype(float)
    return bgr


def _textured_background(rng: np.random.Generator, width: int, height: int) -> Image:
    """Clouds in several octaves, with thin lines across: nothing in it looks like a shape of ours."""
    picture = np.full((height, width, 3), rng.uniform(60, 140, 3), np.float32)
    for octave, strength in ((3, 50), (8, 30), (24, 18), (64, 10)):
        coarse = rng.normal(0, strength, (octave, max(2, octave * width // height), 3)).astype(np.float32)
        picture += cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)
    image = np.clip(picture, 0, 255).astype(np.uint8)
    for _ in range(10):
        a, b = (rng.uniform(-0.1, 1.1, 2) * (width, height) for _ in range(2))
        color = rng.integers(0, 256, 3).tolist()
        cv2.line(image, a.astype(int).tolist(), b.astype(int).tolist(), color, int(rng.integers(1, 4)), cv2.LINE_AA)
    return image
