"""What the loops that the agent is compared with have in common: arguments, what they count, and how many threads.

It runs in the environments of others too, and imports nothing that is not there.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

SCORE, IOU, MOST = 0.4, 0.5, 300
"""Detections below this score are not reported, of two that overlap more the better one stays, and so many at most."""

Row = Sequence[float]
"""A detection: x1 y1 x2 y2 in pixels of the film, score, class."""


def arguments(doc: str | None) -> argparse.ArgumentParser:
    """A parser with what all loops take."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("video", type=Path)
    parser.add_argument("model", type=Path)
    parser.add_argument("--threads", type=int, default=1, help="of one inference; 0: what the library takes")
    parser.add_argument("--warm-up", type=int, default=30, help="frames before the measured ones")
    parser.add_argument("--frames", type=int, default=300, help="frames that are measured")
    return parser


class Meter:
    """CPU and time of the frames after the warm-up, the process's peak memory, and what was seen in all of them."""

    def __init__(self, *, warm_up: int, frames: int) -> None:
        self._warm_up = warm_up
        self._frames = frames
        self._seen: list[Any] = []
        self._cpu_s = self._began_s = 0.0
        self._figures: dict[str, float] = {}

    def on_frame(self, rows: Any) -> bool:
        """The next frame is done, and this was in it (rows, or an array of them); whether it was the last one."""
        self._seen.append(rows)
        if len(self._seen) == self._warm_up:
            self._cpu_s, self._began_s = time.process_time(), time.perf_counter()
        if len(self._seen) < self._warm_up + self._frames:
            return False
        cpu_s, elapsed_s = time.process_time() - self._cpu_s, time.perf_counter() - self._began_s
        self._figures = {
            "cpu_ms": cpu_s / self._frames * 1e3,
            "fps": self._frames / elapsed_s,
            "peak_rss_mb": peak_mb("self"),
        }
        return True

    def tell(self, *packages: str) -> None:
        """Print one line of JSON, with the versions of these packages. Raises SystemExit if the film was too short."""
        if not self._figures:
            wanted = self._warm_up + self._frames
            raise SystemExit(f"the film has {len(self._seen)} frames that can be read; {wanted} are wanted")
        seen = [[[float(value) for value in row] for row in rows] for rows in self._seen]
        versions = {name: version(name) for name in packages}
        print(json.dumps({"figures": self._figures, "detections": seen, "versions": versions}))


def peak_mb(process: str) -> float:
    """The most memory a process had at once. Not getrusage's figure: that is inherited from whoever started it."""
    [peak] = [line for line in Path(f"/proc/{process}/status").read_text().splitlines() if line.startswith("VmHWM")]
    return int(peak.split()[1]) * 1024 / 1e6


def session_options(threads: int) -> Any:
    """onnxruntime's, with so many threads, which wait without spinning: as in the agent."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return options


def limit_sessions(threads: int) -> None:
    """Give the sessions that a library makes by itself these options; it has no other way to be told."""
    import onnxruntime

    class Session(onnxruntime.InferenceSession):  # type: ignore[misc]
        def __init__(self, path_or_bytes: Any, sess_options: Any = None, **more: Any) -> None:
            super().__init__(path_or_bytes, sess_options or session_options(threads), **more)

    onnxruntime.InferenceSession = Session
