"""How long `edgectl --help` and `edge-agent --version` take beside `python -c pass`, in turns, in one run.

`python -m benchmarks.startup [--repeats N] [--json FILE]`. Wall time in milliseconds.
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

from benchmarks._figures import Figure, Report, Runs, arguments, command, finish, machine

BARE, HELP, VERSION = "python -c pass", "edgectl --help", "edge-agent --version"
HELP_BAR_MS = 300.0


def took_ms(words: list[str]) -> float:
    began = time.perf_counter()
    subprocess.run(words, stdout=subprocess.DEVNULL, check=True)
    return (time.perf_counter() - began) * 1e3


def main() -> None:
    parser = arguments(__doc__, repeats=15)
    options = parser.parse_args()
    if options.repeats < 1:
        parser.error("--repeats must be more than 0")
    beside = Path(sys.executable).parent
    programs = {
        BARE: [sys.executable, "-c", "pass"],
        HELP: [str(beside / "edgectl"), "--help"],
        VERSION: [str(beside / "edge-agent"), "--version"],
    }
    for words in programs.values():
        if not Path(words[0]).exists():
            sys.exit(f"{words[0]} is not there: install edge-agent into this environment (pip install -e .)")
    runs, about = Runs(), machine("typer", "rich")
    for _ in range(options.repeats):
        for name, words in programs.items():
            runs.add(name, {"ms": took_ms(words)})
    bare = runs[BARE]["ms"]
    figures = [
        Figure(HELP, "ms", runs[HELP]["ms"], bar=HELP_BAR_MS, quick=True),
        *(Figure(f"{name}, wall time", "ms", runs[name]["ms"], BARE, bare) for name in (HELP, VERSION)),
    ]
    sys.exit(
        finish(Report("startup", "From the command line to an answer", command("startup"), about, figures), options)
    )


if __name__ == "__main__":
    main()
