"""Plots as SVG, to stand in a page: lines over time, and how often which value came."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from html import escape

Points = Sequence[tuple[float, float]]

_WIDTH, _HEIGHT = 640, 240
_LEFT, _RIGHT, _TOP, _BOTTOM = 56, 12, 28, 34
_LEAST = 1e-6  # what is less is drawn as nothing
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#555555", "#882255")
"""Such as the colour-blind can tell apart: Okabe and Ito's, https://jfly.uni-koeln.de/color/, and two darker ones."""


def lines(title: str, series: Mapping[str, Points], *, x: str = "s", y: str = "") -> str:
    """A line for each name; a single point is a dot. `x` and `y` are units. Empty where there is nothing to draw."""
    shown = {name: points for name, points in series.items() if points}
    if not shown:
        return ""
    xs = [at for points in shown.values() for at, _ in points]
    frame = _Frame((min(0.0, min(xs)), max(xs)), (0.0, max(value for points in shown.values() for _, value in points)))
    drawn = [*frame.axes(title, x, y)]
    for index, (name, points) in enumerate(shown.items()):
        colour = _COLOURS[index % len(_COLOURS)]
        path = " ".join(f"{frame.x(at):.1f},{frame.y(value):.1f}" for at, value in points)
        drawn.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.6"/>')
        if len(points) <= 30:
            drawn += [
                f'<circle cx="{frame.x(at):.1f}" cy="{frame.y(value):.1f}" r="2.4" fill="{colour}"/>'
                for at, value in points
            ]
        drawn.append(_key(index, name, colour))
    return _svg(title, drawn, keys=len(shown))


def histogram(title: str, values: Mapping[str, Sequence[float]], *, x: str) -> str:
    """How many of the values lie in each of up to 40 equal steps, a colour a name; the longest hundredth is the last
    step's."""
    every = sorted(value for some in values.values() for value in some)
    if not every:
        return ""
    most = max(_LEAST, every[math.ceil(0.99 * len(every)) - 1])
    steps = max(5, min(40, len(every) // 5))
    counts = {name: _counted(some, most, steps) for name, some in values.items() if some}
    frame = _Frame((0.0, most), (0.0, float(max(max(count) for count in counts.values()))))
    drawn = [*frame.axes(title, x, "frames")]
    for index, (name, count) in enumerate(counts.items()):
        colour = _COLOURS[index % len(_COLOURS)]
        drawn += [frame.bar(most * i / steps, most * (i + 1) / steps, n, colour) for i, n in enumerate(count) if n]
        drawn.append(_key(index, f"{name} ({sum(count)})", colour))
    return _svg(title, drawn, keys=len(counts))


def ticks(most: float, wanted: int = 5) -> list[float]:
    """Round numbers from 0 to about `most`: 1, 2 or 5 times a power of ten apart."""
    if most < _LEAST:
        return [0.0]
    rough = most / wanted
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * 0.999)
    return [round(step * i, 10) for i in range(int(most / step * 1.0001) + 1)]


class _Frame:
    """Where values lie in the picture."""

    def __init__(self, xs: tuple[float, float], ys: tuple[float, float]) -> None:
        self._x0, self._x1 = xs if xs[1] > xs[0] else (xs[0], xs[0] + 1.0)
        self._y1 = max(_LEAST, ys[1]) * 1.05

    def x(self, value: float) -> float:
        return _LEFT + (value - self._x0) / (self._x1 - self._x0) * (_WIDTH - _LEFT - _RIGHT)

    def y(self, value: float) -> float:
        return _HEIGHT - _BOTTOM - value / self._y1 * (_HEIGHT - _TOP - _BOTTOM)

    def bar(self, start: float, end: float, count: float, colour: str) -> str:
        left, top = self.x(start), self.y(count)
        return (
            f'<rect x="{left:.1f}" y="{top:.1f}" width="{max(1.0, self.x(end) - left - 1):.1f}" '
            f'height="{_HEIGHT - _BOTTOM - top:.1f}" fill="{colour}" fill-opacity="0.6"/>'
        )

    def axes(self, title: str, x: str, y: str) -> Iterator[str]:
        heading = escape(f"{title}, {y}" if y else title)
        yield f'<text x="{_LEFT}" y="16" class="title">{heading}</text>'
        for value in ticks(self._y1):
            at = self.y(value)
            yield f'<line x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{at:.1f}" y2="{at:.1f}" class="grid"/>'
            yield f'<text x="{_LEFT - 6}" y="{at + 4:.1f}" class="y">{value:g}</text>'
        for value in ticks(self._x1 - self._x0):
            at = self.x(self._x0 + value)
            yield f'<text x="{at:.1f}" y="{_HEIGHT - _BOTTOM + 16}" class="x">{self._x0 + value:g}</text>'
        yield f'<text x="{_WIDTH - _RIGHT}" y="{_HEIGHT - 4}" class="y">{escape(x)}</text>'


def _counted(values: Sequence[float], most: float, steps: int) -> list[int]:
    counts = [0] * steps
    for value in values:
        counts[min(steps - 1, int(value / most * steps))] += 1
    return counts


def _key(index: int, name: str, colour: str) -> str:
    x, y = _LEFT + 190 * (index % 3), _HEIGHT + 10 + 16 * (index // 3)
    box = f'<rect x="{x}" y="{y - 8}" width="10" height="10" fill="{colour}"/>'
    return f'{box}<text x="{x + 15}" y="{y + 1}">{escape(name)}</text>'


def _svg(title: str, drawn: Sequence[str], *, keys: int) -> str:
    height = _HEIGHT + 16 * math.ceil(keys / 3) + 6
    content = "\n".join(drawn)
    return f'<svg viewBox="0 0 {_WIDTH} {height}" role="img" aria-label="{escape(title)}">\n{content}\n</svg>'
