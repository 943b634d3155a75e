"""How long `edgectl --help` and `edge-agent --version` take beside `python -c pass`, in turns, in one run.

`python benchmarks/startup.py [--repeats N]`. Wall time in milliseconds: medians, and the median of the differences.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from pathlib import Path

BAR_MS = 300.0
"""For `edgectl --help`, median."""


def took_ms(command: list[str]) -> float:
    began = time.perf_counter()
    subprocess.run(command, stdout=subprocess.DEVNULL, check=True)
    return (time.perf_counter() - began) * 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=15)
    repeats = parser.parse_args().repeats
    beside = Path(sys.executable).parent
    commands = {
        "python -c pass": [sys.executable, "-c", "pass"],
        "edgectl --help": [str(beside / "edgectl"), "--help"],
        "edge-agent --version": [str(beside / "edge-agent"), "--version"],
    }
    took: dict[str, list[float]] = {name: [] for name in commands}
    for _ in range(repeats):
        for name, command in commands.items():
            took[name].append(took_ms(command))
    bare = took["python -c pass"]
    print(f"{'':24} {'median ms':>10} {'spread':>8} {'more than bare':>15}")
    for name, values in took.items():
        more = statistics.median(one - other for one, other in zip(values, bare, strict=True))
        print(f"{name:24} {statistics.median(values):10.0f} {max(values) - min(values):8.0f} {more:15.0f}")
    median = statistics.median(took["edgectl --help"])
    print(f"edgectl --help: {median:.0f} ms (bar {BAR_MS:.0f})")


if __name__ == "__main__":
    main()
