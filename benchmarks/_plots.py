"""What `docs/performance.md` shows of a report: its ratios with their bars, and what its `series` hold.

`series` is told apart by its keys: `stages` are stacked, for the cases on the other axis; `over_time` are lines.
The files are the same for the same report, so that they can be kept with the code.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas

from benchmarks._figures import Figure, Report, interval

INK, QUIET, MISSED = "#1f4e79", "#9aa5b1", "#b3261e"
STAGES = ("#1f4e79", "#4f8fc4", "#9cc3e6", "#e0a458", "#c8553d", "#7a9e7e", "#5c5c8a", "#b8b8b8")

matplotlib.rcParams.update(
    {
        "svg.hashsalt": "edge_agent",
        "svg.fonttype": "none",
        "font.size": 9,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.titlelocation": "left",
        "axes.titlesize": 10,
        "figure.facecolor": "white",
    }
)


def draw(report: Report, folder: Path) -> Sequence[Path]:
    """Write what there is to be drawn of it, as SVG."""
    folder.mkdir(parents=True, exist_ok=True)
    made = []
    compared = [figure for figure in report.figures if figure.beside]
    if compared:
        made.append(_save(ratios(report.title, compared), folder / f"{report.benchmark}.svg"))
    if "stages" in report.series:
        made.append(_save(stacked(report.title, report.series), folder / f"{report.benchmark}-stages.svg"))
    if "over_time" in report.series:
        made.append(_save(over_time(report.title, report.series), folder / f"{report.benchmark}-time.svg"))
    return made


def ratios(title: str, figures: Sequence[Figure]) -> Canvas:
    """A line each: every repeat a dot, the median and its interval, and the bar."""
    canvas = Canvas(figsize=(8.5, 0.8 + 0.34 * len(figures)), layout="constrained")
    axes: Axes = canvas.subplots()
    for place, figure in enumerate(figures):
        colour = MISSED if figure.verdict == "missed" else INK
        low, high = interval(figure.ratios)
        axes.plot(figure.ratios, [place] * len(figure.ratios), ".", color=QUIET, markersize=4)
        axes.plot([low, high], [place, place], color=colour, linewidth=1.5)
        axes.plot(figure.median, place, "o", color=colour, markersize=5)
        axes.annotate(f"{figure.median:.2f}", (figure.median, place), (0, 5), textcoords="offset points", ha="center")
        if figure.bar is not None:
            axes.plot([figure.bar] * 2, [place - 0.35, place + 0.35], color="black", linewidth=1.2)
    axes.axvline(1, color=QUIET, linewidth=0.8, linestyle=":")
    axes.set_yticks(
        range(len(figures)), [f"{figure.name}\nbeside {figure.reference}" for figure in figures], fontsize=8
    )
    axes.set_ylim(len(figures) - 0.5, -0.6)
    if max(figure.median for figure in figures) > 6 * min(figure.median for figure in figures) > 0:
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_formatter("{x:g}")
        axes.tick_params(which="both", labelsize=7)
    axes.set_xlabel("ratio to the reference (dots: repeats; stroke: the bar)", loc="right")
    axes.set_title(title)
    return canvas


def stacked(title: str, series: Mapping[str, Any]) -> Canvas:
    """Bars of `series["stages"]`, {name: [a value for each case]}, for `series["cases"]`; of milliseconds, unless
    `series["unit"]` says otherwise."""
    cases, stages = [str(case) for case in series["cases"]], series["stages"]
    canvas = Canvas(figsize=(8.5, 1.2 + 0.45 * len(cases)), layout="constrained")
    axes: Axes = canvas.subplots()
    done = [0.0] * len(cases)
    for colour, (name, values) in zip(STAGES, stages.items(), strict=False):
        axes.barh(cases, values, left=done, color=colour, height=0.6, label=name)
        done = [before + value for before, value in zip(done, values, strict=True)]
    axes.invert_yaxis()
    axes.set_xlabel(series.get("unit", "ms"))
    axes.set_title(title)
    canvas.legend(loc="outside lower left", ncols=4, frameon=False, fontsize=8)
    return canvas


def over_time(title: str, series: Mapping[str, Any]) -> Canvas:
    """A strip for each of `series["over_time"]`, {name: [a value or None at each time]}, at `series["minutes"]`."""
    strips = series["over_time"]
    canvas = Canvas(figsize=(8.5, 0.6 + 0.9 * len(strips)), layout="constrained")
    for axes, (name, values) in zip(
        canvas.subplots(len(strips), sharex=True, squeeze=False)[:, 0], strips.items(), strict=True
    ):
        axes.plot(series["minutes"], [float("nan") if one is None else one for one in values], ".", markersize=2.5)
        axes.set_title(name, fontsize=8)
        axes.tick_params(labelsize=7)
    axes.set_xlabel("minutes")
    canvas.suptitle(title, x=0.02, ha="left", fontsize=10)
    return canvas


def _save(canvas: Canvas, path: Path) -> Path:
    canvas.savefig(path, metadata={"Date": None})
    path.write_text("\n".join(line.rstrip() for line in path.read_text().splitlines()) + "\n")
    return path
