"""What a benchmark found: figures, each beside its reference of the same run, the table of them, and the JSON.

Every benchmark measures its subject and its reference in turn, `repeats` times, and hands both here. A ratio is made
in each repeat, so that what both saw alike falls out of it; told are the median of these and the interval in which
the true median lies with 95 % (of the order statistics; of fewer than six repeats all that was seen). A bar is missed
when even the better end of that interval is beyond it.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from math import comb
from pathlib import Path
from typing import Any, Literal

import msgspec
import psutil
from rich.console import Console
from rich.markup import escape
from rich.table import Table

RESULTS = Path(__file__).parent / "results"
"""What was published: `docs/performance.md` is made of it."""

CONFIDENCE = 0.95

Verdict = Literal["met", "within the noise", "missed"]


class Figure(msgspec.Struct, frozen=True, omit_defaults=True, forbid_unknown_fields=True):
    """One quantity, a value for each repeat. With `beside`, the reference's values in the same repeats, it is their
    ratio that counts. `bar` is the most (`better = "less"`) or the least (`"more"`) it should be; None: only told."""

    name: str
    unit: str
    values: Sequence[float]
    reference: str = ""
    beside: Sequence[float] = ()
    bar: float | None = None
    better: Literal["less", "more"] = "less"
    quick: bool = False
    """Counts in `make bench-quick` too."""

    def __post_init__(self) -> None:
        if not self.values:
            raise ValueError(f"{self.name}: no values")
        if self.beside and len(self.beside) != len(self.values):
            raise ValueError(f"{self.name}: {len(self.values)} values beside {len(self.beside)} of {self.reference}")
        if 0 in self.beside:
            raise ValueError(f"{self.name}: {self.reference} came to 0, which nothing can be compared with")

    @property
    def ratios(self) -> Sequence[float]:
        """One for each repeat; empty without a reference."""
        return [ours / theirs for ours, theirs in zip(self.values, self.beside, strict=True)] if self.beside else []

    @property
    def judged(self) -> Sequence[float]:
        """What the bar is for: the ratios, or else the values."""
        return self.ratios or self.values

    @property
    def median(self) -> float:
        return statistics.median(self.judged)

    @property
    def interval(self) -> tuple[float, float]:
        return interval(self.judged)

    @property
    def verdict(self) -> Verdict | None:
        if self.bar is None:
            return None
        sign = 1 if self.better == "less" else -1
        if sign * self.median <= sign * self.bar:
            return "met"
        low, high = self.interval
        best = low if self.better == "less" else high
        return "within the noise" if sign * best <= sign * self.bar else "missed"


class Report(msgspec.Struct, omit_defaults=True, forbid_unknown_fields=True):
    """All that one benchmark found, as its JSON has it. `notes` are sentences below its table; `series` what its own
    plot draws (see `_plots.py`)."""

    benchmark: str
    title: str
    command: str
    machine: Mapping[str, str]
    figures: Sequence[Figure]
    notes: Sequence[str] = ()
    series: Mapping[str, Any] = {}

    @property
    def missed(self) -> Sequence[Figure]:
        return [figure for figure in self.figures if figure.verdict == "missed"]


def interval(values: Sequence[float], confidence: float = CONFIDENCE) -> tuple[float, float]:
    """Where the median of what these were drawn from lies: order statistics, as many left out at each end as the
    binomial distribution allows (W. R. Thompson, Ann. Math. Stat. 1936)."""
    ordered, count = sorted(values), len(values)
    outside, left_out = 0.0, 0
    while (outside := outside + 2 * comb(count, left_out) / 2**count) <= 1 - confidence:
        left_out += 1
    left_out = max(0, left_out - 1)
    return ordered[left_out], ordered[-1 - left_out]


def machine(*packages: str) -> dict[str, str]:
    """What a figure depends on: processor, system, Python, these packages, and the day."""
    facts = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.partition(":")[2].strip() for line in facts if line.startswith("model name")), "")
    about = {
        "cpu": f"{model or platform.machine()}, {psutil.cpu_count()} cores",
        "memory": f"{psutil.virtual_memory().total / 2**30:.0f} GiB",
        "system": f"{platform.system()} {platform.release()}, load {os.getloadavg()[0]:.1f} at the start",
        "python": platform.python_version(),
    }
    for name in packages:
        try:
            about[name] = version(name)
        except PackageNotFoundError:
            about[name] = "not installed"
    return {**about, "date": datetime.date.today().isoformat()}


@dataclass(slots=True)
class Runs:
    """Values of several quantities, gathered repeat by repeat: `runs["agent"]["cpu_ms"]`."""

    by_subject: dict[str, dict[str, list[float]]] = field(default_factory=dict)

    def add(self, subject: str, values: Mapping[str, float]) -> None:
        """What one repeat of a subject came to."""
        kept = self.by_subject.setdefault(subject, {})
        for name, value in values.items():
            kept.setdefault(name, []).append(float(value))

    def __getitem__(self, subject: str) -> Mapping[str, list[float]]:
        return self.by_subject[subject]


def arguments(doc: str | None, *, repeats: int) -> argparse.ArgumentParser:
    """A parser with what all benchmarks have: `--repeats` and `--json`."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=repeats, help=f"{repeats} unless told")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there too")
    return parser


def command(module: str) -> str:
    """What was typed, less where the JSON goes."""
    left, words = [], iter(sys.argv[1:])
    for word in words:
        if word == "--json":
            next(words, None)
        elif not word.startswith("--json="):
            left.append(word)
    return " ".join(["python -m", f"benchmarks.{module}", *left])


def show(report: Report) -> None:
    """The table, as text."""
    console = Console(width=None if sys.stdout.isatty() else 140, highlight=False)
    console.print(report.title, style="bold", markup=False)
    console.print(", ".join(f"{name} {value}" for name, value in report.machine.items()), markup=False)
    table = Table(box=None, padding=(0, 1, 0, 0))
    for title in HEADINGS:
        table.add_column(title, justify="left" if title in ("", "reference") else "right", overflow="fold")
    for figure in report.figures:
        table.add_row(*map(escape, row(figure)))
    console.print(table)
    for note in report.notes:
        console.print(note, markup=False)


HEADINGS = ("", "median", "lies between", "reference", "its median", "ratio", "lies between", "bar", "")


def row(figure: Figure) -> Sequence[str]:
    """A figure as the table has it, in the order of HEADINGS."""
    cells = [figure.name, f"{number(statistics.median(figure.values))} {figure.unit}".strip(), _ends(figure.values)]
    if figure.beside:
        beside = f"{number(statistics.median(figure.beside))} {figure.unit}".strip()
        cells += [figure.reference, beside, f"{figure.median:.3f}", _ends(figure.ratios, ".3f")]
    else:
        cells += ["", "", "", ""]
    if figure.bar is None:
        return [*cells, "", ""]
    return [*cells, f"{'≤' if figure.better == 'less' else '≥'} {figure.bar:g}", figure.verdict or ""]


def number(value: float) -> str:
    """With three or four figures that count."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}" if abs(value) >= 100 else f"{value:.3g}"


def _ends(values: Sequence[float], form: str = "") -> str:
    if len(values) < 2:
        return ""
    low, high = interval(values)
    return f"{low:{form}} to {high:{form}}" if form else f"{number(low)} to {number(high)}"


def write(report: Report, path: Path) -> None:
    """As JSON, one figure a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(msgspec.to_builtins(report), indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def read(path: Path) -> Report:
    """What `write` wrote. Raises msgspec.ValidationError naming what is wrong, OSError."""
    return msgspec.json.decode(path.read_bytes(), type=Report)


def finish(report: Report, options: argparse.Namespace) -> int:
    """Show it, write it where that is wanted, and the exit status: 1 if a bar is missed by more than the noise."""
    if options.json:
        write(report, options.json)
    show(report)
    return int(bool(report.missed))
