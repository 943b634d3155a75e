"""docs/performance.md: its tables are those of the results, its plots are there, and the history is of ratios."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from benchmarks import report
from benchmarks._figures import Figure, Report

MACHINE = {"cpu": "some, 2 cores", "date": "2026-01-02"}


def found(**reports: list[Figure]) -> dict[str, Report]:
    return {
        name: Report(name, name, f"python -m benchmarks.{name}", MACHINE, figures) for name, figures in reports.items()
    }


FIGURES = [
    Figure("CPU a frame", "ms", [2.2, 2.1, 2.3], "bare loop", [2.0, 2.0, 2.0], bar=1.05),
    Figure("memory | peak", "MB", [200.0, 210.0, 205.0], bar=250),
]


def test_the_page_shows_what_was_measured() -> None:
    text = report.PAGE.read_text()
    assert report.page(text, report.reports()) == text, "run `python -m benchmarks.report`"
    for picture in re.findall(r"!\[[^]]*\]\(([^)]+)\)", text):
        assert (report.PAGE.parent / picture).is_file(), picture


def test_a_section_is_made_anew_between_its_marks() -> None:
    text = "before\n<!-- results: line -->\nold\n<!-- end -->\nafter\n"
    made = report.page(text, found(line=FIGURES))
    assert made.startswith("before\n<!-- results: line -->\n`python -m benchmarks.line`: some, 2 cores, 2026-01-02\n")
    assert made.endswith("<!-- end -->\nafter\n") and "old" not in made
    assert "| 1.100 | 1.050 to 1.150 | ≤ 1.05 | within the noise |" in made
    assert "| memory \\| peak | 205 MB |" in made
    assert report.page(made, found(line=FIGURES)) == made


def test_results_without_a_place_and_places_without_results_are_named() -> None:
    with pytest.raises(SystemExit, match="shows nothing of line"):
        report.page("no marks\n", found(line=FIGURES))
    with pytest.raises(SystemExit, match="no results of capture"):
        report.page("<!-- results: capture -->\n<!-- end -->\n", {})


def test_a_file_that_is_no_report_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "line.json").write_text('{"benchmark": 1}')
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    with pytest.raises(SystemExit, match=r"line\.json.*measure again"):
        report.reports()


def test_the_history_has_a_line_a_version_and_ratios_only() -> None:
    first = report.release(found(line=FIGURES), "1.0.0", [])
    again = report.release(found(line=FIGURES, decode=FIGURES[1:]), "1.0.0", first)
    both = report.release(found(line=FIGURES), "1.1.0", again)
    assert [json.loads(line)["version"] for line in both] == ["1.0.0", "1.1.0"]
    assert json.loads(again[0]) == {
        "version": "1.0.0",
        "date": "2026-01-02",
        "ratios": {"line": {"CPU a frame / bare loop": 1.1}},
    }
