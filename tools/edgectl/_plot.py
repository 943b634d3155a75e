"""Draws what `edgectl models compare` found: how long both models take, and on which pictures they agree."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import cv2
import numpy as np

from edge_agent.data import Image
from edge_agent.errors import ConfigError

if TYPE_CHECKING:
    from edgectl.compare import Compared, Side

Color = tuple[int, int, int]

_WIDTH, _HEIGHT, _TOP, _BOTTOM = 1280, 560, 110, 490
_LEFT, _RIGHT = (70, 610), (700, 1250)
_INK, _PALE, _PAPER = (40, 40, 40), (225, 225, 225), (255, 255, 255)
_COLORS: tuple[Color, Color] = ((180, 110, 20), (30, 120, 230))
_BINS = 40


def draw(path: Path, compared: Compared, took: Sequence[Sequence[float]]) -> None:
    """Write the picture; `took`: milliseconds of A's and of B's inferences. Raises `ConfigError`."""
    image = np.full((_HEIGHT, _WIDTH, 3), _PAPER, np.uint8)
    _latencies(image, compared, took)
    _pictures(image, compared)
    try:
        written = cv2.imwrite(str(path), image)
    except cv2.error as error:
        raise ConfigError(f"--plot {path}: OpenCV writes no such picture; name it .png") from error
    if not written:
        raise ConfigError(f"--plot {path} cannot be written")


def _latencies(image: Image, compared: Compared, took: Sequence[Sequence[float]]) -> None:
    """Histograms of both on one scale, which ends beyond both 95th percentiles; a line at each median."""
    left, right = _LEFT
    most = max(compared.a.latency_ms.p95, compared.b.latency_ms.p95) * 1.25
    counts = [np.histogram(ms, _BINS, (0, most))[0] / len(ms) for ms in took]
    highest = max(float(np.max(count)) for count in counts) or 1.0
    _title(image, "inference of one picture, share of all", left)
    for ms in _ticks(most):
        x = round(left + (right - left) * ms / most)
        cv2.line(image, (x, _TOP), (x, _BOTTOM), _PALE, 1)
        _text(image, f"{ms:g}", (x - 8, _BOTTOM + 24))
    _text(image, "ms", (right - 10, _BOTTOM + 46))
    for side, count, color in zip((compared.a, compared.b), counts, _COLORS, strict=True):
        heights = _BOTTOM - (_BOTTOM - _TOP) * count / highest
        xs = left + (right - left) * np.arange(_BINS + 1) / _BINS
        steps = np.stack((np.repeat(xs, 2)[1:-1], np.repeat(heights, 2)), 1)
        cv2.polylines(image, [np.round(steps).astype(np.int32)], False, color, 2, cv2.LINE_AA)
        x = round(left + (right - left) * side.latency_ms.p50 / most)
        cv2.line(image, (x, _TOP), (x, _BOTTOM), color, 1)
    cv2.line(image, (left, _BOTTOM), (right, _BOTTOM), _INK, 1)
    for row, (letter, side, color) in enumerate(zip("AB", (compared.a, compared.b), _COLORS, strict=True)):
        _text(image, f"{letter}: {_legend(side)}", (left, 30 + 26 * row), color)


def _pictures(image: Image, compared: Compared) -> None:
    """A bar a picture, the least agreement first; what had nothing to compare has none."""
    left, right = _RIGHT
    scores = sorted(one.score for one in compared.pictures if one.score is not None)
    whole = "nothing to compare" if compared.score is None else f"{compared.score:.4f}"
    _text(image, f"agreement: {whole} ({compared.measure}, {len(compared.pictures)} pictures)", (left, 30))
    _title(image, "agreement by picture, the least first", left)
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        y = round(_BOTTOM - (_BOTTOM - _TOP) * share)
        cv2.line(image, (left, y), (right, y), _PALE, 1)
        _text(image, f"{share:g}", (left - 42, y + 5))
    step = (right - left) / max(1, len(compared.pictures))
    for index, score in enumerate(scores):
        x1, x2 = round(left + step * index), max(round(left + step * (index + 0.85)), round(left + step * index) + 1)
        y = round(_BOTTOM - (_BOTTOM - _TOP) * min(1.0, max(0.0, score)))
        cv2.rectangle(image, (x1, y), (x2, _BOTTOM), (110, 160, 90), -1)
    cv2.line(image, (left, _BOTTOM), (right, _BOTTOM), _INK, 1)


def _legend(side: Side) -> str:
    latency = side.latency_ms
    return f"{side.id} {side.size[0]}x{side.size[1]}, p50 {latency.p50:.2f} ms, p95 {latency.p95:.2f} ms"


def _ticks(most: float) -> Sequence[float]:
    """Round numbers from 0, six at most."""
    rough = most / 5
    power = 10.0 ** np.floor(np.log10(rough))
    step = next(float(power * factor) for factor in (1, 2, 5, 10) if power * factor >= rough)
    return [round(step * index, 10) for index in range(int(most / step) + 1)]


def _title(image: Image, text: str, left: int) -> None:
    _text(image, text, (left, _TOP - 14))


def _text(image: Image, text: str, at: tuple[int, int], color: Color = _INK) -> None:
    cv2.putText(image, text, at, cv2.FONT_HERSHEY_SIMPLEX, 0.5, color, 1, cv2.LINE_AA)
