"""All that was measured, as `docs/performance.md` tells it.

`python -m benchmarks.report` writes the tables and plots of that page from `benchmarks/results/*.json`.
`--release` adds a line with this version's ratios to `benchmarks/history.jsonl`; `--check` only says whether the
tables are those of the results. The words between the tables are written by hand. Exit status 1: a bar is missed.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import edge_agent
from benchmarks._figures import HEADINGS, RESULTS, Report, read, row

PAGE = Path(__file__).parent.parent / "docs" / "performance.md"
PLOTS = PAGE.parent / "performance"
HISTORY = Path(__file__).parent / "history.jsonl"

_SECTION = re.compile(r"(<!-- results: (?P<name>[\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def reports() -> Mapping[str, Report]:
    """What was published, by benchmark. Raises SystemExit naming a file that is none."""
    found = {}
    for path in sorted(RESULTS.glob("*.json")):
        try:
            found[path.stem] = read(path)
        except ValueError as error:
            raise SystemExit(
                f"{path}: {error}; measure again: python -m benchmarks.{path.stem} --json {path}"
            ) from None
    return found


def page(text: str, found: Mapping[str, Report]) -> str:
    """The page with its tables made anew. Raises SystemExit where it and the results do not name the same."""
    named = [match["name"] for match in _SECTION.finditer(text)]
    if missing := set(found) - set(named):
        raise SystemExit(f"{PAGE.name} shows nothing of {', '.join(sorted(missing))}: add <!-- results: NAME -->")
    if unknown := set(named) - set(found):
        raise SystemExit(f"no results of {', '.join(sorted(unknown))} in benchmarks/results")
    return _SECTION.sub(lambda match: match[1] + section(found[match["name"]]) + match[3], text)


def section(report: Report) -> str:
    """A report as Markdown: what was typed where, the table, its notes."""
    lines = [f"`{report.command}`: {', '.join(_told(report.machine))}", ""]
    lines += [f"| {' | '.join(HEADINGS)} |", f"| {' | '.join('---' for _ in HEADINGS)} |"]
    lines += [f"| {' | '.join(_marked(row(figure)))} |" for figure in report.figures]
    if report.notes:
        lines += ["", *(f"- {note}" for note in report.notes)]
    return "\n".join(lines) + "\n"


def _told(machine: Mapping[str, str]) -> Sequence[str]:
    bare = ("cpu", "memory", "system", "date")
    return [value if name in bare else f"{name} {value}" for name, value in machine.items()]


def _marked(cells: Sequence[str]) -> Sequence[str]:
    cells = [cell.replace("|", "\\|") for cell in cells]
    return [*cells[:-1], f"**{cells[-1]}**" if cells[-1] == "missed" else cells[-1]]


def release(found: Mapping[str, Report], version: str, before: Sequence[str]) -> Sequence[str]:
    """The history's lines with that of this version, which takes the place of an earlier one."""
    ratios: dict[str, dict[str, float]] = {}
    for name, report in found.items():
        kept = {
            f"{figure.name} / {figure.reference}": round(figure.median, 4) for figure in report.figures if figure.beside
        }
        if kept:
            ratios[name] = kept
    line: dict[str, Any] = {"version": version, "date": max(one.machine["date"] for one in found.values())}
    others = [one for one in before if json.loads(one)["version"] != version]
    return [*others, json.dumps({**line, "ratios": ratios}, ensure_ascii=False)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--release", action="store_true", help="and a line in the history")
    parser.add_argument("--check", action="store_true", help="write nothing; 1 if the page is not that of the results")
    options = parser.parse_args()
    found, text = reports(), PAGE.read_text()
    made = page(text, found)
    if options.check:
        if made != text:
            print(f"{PAGE.name} is out of date: run `python -m benchmarks.report`", file=sys.stderr)
        sys.exit(int(made != text))
    PAGE.write_text(made)
    from benchmarks import _plots  # needs matplotlib, which a check does without

    for old in PLOTS.glob("*.svg"):
        old.unlink()
    drawn = [path for report in found.values() for path in _plots.draw(report, PLOTS)]
    print(f"{PAGE.name}: {len(found)} tables; {len(drawn)} plots in {PLOTS.name}/")
    if options.release:
        before = HISTORY.read_text().splitlines() if HISTORY.exists() else []
        HISTORY.write_text("\n".join(release(found, edge_agent.__version__, before)) + "\n")
        print(f"{HISTORY.name}: a line for {edge_agent.__version__}")
    missed = [f"{name}: {figure.name}" for name, report in found.items() for figure in report.missed]
    for one in missed:
        print(f"missed  {one}", file=sys.stderr)
    sys.exit(int(bool(missed)))


if __name__ == "__main__":
    main()
