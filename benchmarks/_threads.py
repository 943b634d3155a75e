"""The CPU of an agent by what its threads do.

`python -m benchmarks._threads run --config FILE` is `edge-agent run` whose threads bear their names in the kernel too,
as Python's own do from 3.14 on.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import psutil

STAGES = ("capture", "engine", "event loop", "others")

_LONGEST = 15  # of a thread's name in Linux


@dataclass(frozen=True, slots=True)
class Cpu:
    """What a process has taken so far: milliseconds by thread id, each thread's stage, and of all threads together,
    those that have ended too (in steps of 10 ms)."""

    by_thread: Mapping[int, float]
    stages: Mapping[int, str]
    whole_ms: float

    def since(self, before: Cpu) -> dict[str, float]:
        """Milliseconds by stage since then. What no thread that is left has taken is of `others`."""
        spent = dict.fromkeys(STAGES, 0.0)
        for thread, taken_ms in self.by_thread.items():
            spent[self.stages[thread]] += taken_ms - before.by_thread.get(thread, 0.0)
        ended = self.whole_ms - before.whole_ms - sum(spent.values())
        spent["others"] += max(0.0, ended)
        return spent


def read(pid: int) -> Cpu:
    """What a process has taken until now."""
    threads = list(_threads(pid))
    times = psutil.Process(pid).cpu_times()
    return Cpu(
        by_thread={thread: taken_ms for thread, _, taken_ms in threads},
        stages={thread: stage(name, is_main=thread == pid) for thread, name, _ in threads},
        whole_ms=(times.user + times.system) * 1e3,
    )


def stage(name: str, *, is_main: bool) -> str:
    """What a thread of this name does. Those that a library starts have the name of the thread that called it."""
    if is_main:
        return "event loop"
    if name.startswith("capture:"):
        return "capture"
    return "engine" if name == "engine" else "others"


def _threads(pid: int) -> Iterator[tuple[int, str, float]]:
    """Id, name and milliseconds of CPU of each thread that is there."""
    for folder in Path(f"/proc/{pid}/task").iterdir():
        try:
            taken_ns = int((folder / "schedstat").read_text().split()[0])
            yield int(folder.name), (folder / "comm").read_text().strip(), taken_ns / 1e6
        except (FileNotFoundError, ProcessLookupError):  # it has ended meanwhile
            continue


def tell_the_kernel() -> None:
    """From now on each thread that Python starts has its name in `/proc` too."""
    run = threading.Thread.run

    def named(thread: threading.Thread) -> None:
        Path(f"/proc/self/task/{threading.get_native_id()}/comm").write_text(thread.name[:_LONGEST])
        run(thread)

    threading.Thread.run = named  # type: ignore[assignment, method-assign]


def main() -> None:
    from edge_agent import cli

    tell_the_kernel()
    cli.main()


if __name__ == "__main__":
    main()
