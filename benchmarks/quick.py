"""Whether a change made something slower: the short benchmarks, in less than two minutes.

`python -m benchmarks.quick` (`make bench-quick`). Ratios and bars are those of the long runs; with fewer and shorter
repeats the noise is larger, and a figure fails only where it is worse than its bar by more than that.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks import _figures
from benchmarks._figures import Report

SHORT = {
    "line": ["--only", "demo-320", "--repeats", "3", "--frames", "120"],
    "framework": ["--repeats", "2", "--seconds", "1", "--quick"],
    "latency": ["--repeats", "2", "--seconds", "3", "--quick"],
    "overload": ["--repeats", "1", "--seconds", "3", "--quick"],
    "decode": ["--repeats", "3"],
    "startup": ["--repeats", "5"],
}
"""What each is given. They run one after the other: side by side they would measure one another."""

MOST_S = 120.0


def measure(name: str, given: list[str], folder: Path) -> Report:
    """What one of them found. Raises SystemExit with the end of what it said if it did not come to an end."""
    path = folder / f"{name}.json"
    command = [sys.executable, "-m", f"benchmarks.{name}", *given, "--json", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent.parent)
    if not path.exists():
        raise SystemExit(
            f"{' '.join(command[1:])} ended with {done.returncode}:\n{(done.stdout + done.stderr)[-3000:]}"
        )
    return _figures.read(path)


def main() -> None:
    began, figures = time.monotonic(), []
    with tempfile.TemporaryDirectory() as folder:
        for name, given in SHORT.items():
            since = time.monotonic()
            report = measure(name, given, Path(folder))
            figures += [figure for figure in report.figures if figure.quick and figure.bar is not None]
            print(f"{name}: {time.monotonic() - since:.0f} s", file=sys.stderr, flush=True)
    took_s = time.monotonic() - began
    notes = [f"measured in {took_s:.0f} s" + (f", more than {MOST_S:g}: something waits" if took_s > MOST_S else "")]
    title = "The short benchmarks: what has a bar"
    whole = Report("quick", title, "python -m benchmarks.quick", _figures.machine(), figures, notes)
    _figures.show(whole)
    sys.exit(int(bool(whole.missed)))


if __name__ == "__main__":
    main()
