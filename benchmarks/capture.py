"""What reading a camera costs: CPU a picture, memory and the time to the first one, beside a bare OpenCV loop.

`python benchmarks/capture.py [--seconds S] [--repeats N] [--json PATH]`. Needs GStreamer's RTSP server.
Cameras are read at their own pace, so that CPU a picture is compared and not pictures a second. Ours are the real
sources, session, queue and pool. The two loops of a comparison run at the same time, each in a fresh process: on a
virtual machine one and the same loop takes 20 % more or less from one minute to the next, and so do both.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import cv2
import numpy as np

# All else is imported where it is needed: a loop's process holds what that loop needs, so that memory compares.
if TYPE_CHECKING:
    from edge_agent.config import CameraOptions
    from edge_agent.data import Image

WIDTH, HEIGHT, FPS = 1280, 720, 30
WARM_UP = 75  # pictures; FFmpeg hands out those of its 2 s of probing at once
FIRST_PICTURES = 5
BARE_OPTIONS = {"OPENCV_FFMPEG_CAPTURE_OPTIONS": "rtsp_transport;tcp"}  # as our source's, less how long it probes


@dataclass(frozen=True, slots=True)
class Loop:
    """`options` are those of our source; None is a bare loop."""

    what: str
    stream: Literal["rtsp", "http"]
    options: Mapping[str, object] | None = field(default_factory=dict)


LOOPS = {
    "bare": Loop("H.264: bare loop", "rtsp", None),
    "rtsp": Loop("H.264: ours", "rtsp"),
    "rtsp-5fps": Loop("H.264: ours, fps = 5", "rtsp", {"fps": 5.0}),
    "rtsp-process": Loop("H.264: ours, own process", "rtsp", {"isolation": "process"}),
    "http": Loop("MJPEG: ours", "http"),
    "http-5fps": Loop("MJPEG: ours, fps = 5", "http", {"fps": 5.0}),
}


@dataclass(frozen=True, slots=True)
class Comparison:
    """One loop and what it is compared with; `bar` is the most that the ratio should be, `known` why it may be more."""

    loop: str
    beside: str
    figure: Literal["cpu_ms", "first_ms"] = "cpu_ms"
    bar: float | None = None
    known: str = ""


COMPARISONS = (
    Comparison("rtsp", "bare", bar=1.1),
    Comparison(
        "rtsp-5fps",
        "rtsp",
        bar=0.5,
        known="all pictures are decoded, since they build on one another; the more bits, the less is saved",
    ),
    Comparison("http-5fps", "http", bar=0.5),
    Comparison("rtsp-process", "rtsp"),
    Comparison("rtsp", "bare", "first_ms"),
)


@dataclass(frozen=True, slots=True)
class Compared:
    """What both loops printed, by repeat."""

    comparison: Comparison
    ours: list[dict[str, float]] = field(default_factory=list)
    beside: list[dict[str, float]] = field(default_factory=list)

    @property
    def ratios(self) -> list[float]:
        figure = self.comparison.figure
        return [ours[figure] / beside[figure] for ours, beside in zip(self.ours, self.beside, strict=True)]

    @property
    def ratio(self) -> float:
        return statistics.median(self.ratios)

    @property
    def is_missed(self) -> bool:
        return self.comparison.bar is not None and self.ratio > self.comparison.bar


# A loop, in a process of its own


class Meter:
    """CPU, time and memory of this process and its children, from the warm-up's end to the last picture."""

    def __init__(self, pictures: int) -> None:
        self._wanted = pictures
        self._began_s = time.perf_counter()
        self._first_ms: float | None = None
        self._start: tuple[int, int, float, float] | None = None
        self._children: Sequence[int] = ()
        self.answer: dict[str, float] | None = None

    def on_picture(self, sent: int, delivered: int) -> None:
        """So many pictures came off the camera, and so many of them were delivered; `answer` is there at the end."""
        if self._first_ms is None:
            self._first_ms = (time.perf_counter() - self._began_s) * 1e3
            if not self._wanted:
                self.answer = {"first_ms": self._first_ms}
        elif self._start is None and sent >= WARM_UP:
            self._children = _children()
            self._start = sent, delivered, time.perf_counter(), _cpu_s(self._children)
        elif self._start is not None and self.answer is None and sent >= self._start[0] + self._wanted:
            cpu_s, now_s = _cpu_s(self._children), time.perf_counter()
            pictures = sent - self._start[0]
            self.answer = {
                "pictures": pictures,
                "delivered": delivered - self._start[1],
                "cpu_ms": (cpu_s - self._start[3]) / pictures * 1e3,
                "fps": pictures / (now_s - self._start[2]),
                "rss_mb": _peak_mb("self") + sum(_peak_mb(str(pid)) for pid in self._children),
                "first_ms": self._first_ms,
            }


def read_bare(url: str, pictures: int) -> dict[str, float] | None:
    """The least that reading a stream takes. What was measured; None if the stream ended before."""
    meter = Meter(pictures)
    capture = cv2.VideoCapture(url, cv2.CAP_FFMPEG, [cv2.CAP_PROP_N_THREADS, 1])
    frame, count = np.empty((HEIGHT, WIDTH, 3), np.uint8), 0
    while meter.answer is None:
        ok, _ = capture.read(frame)
        if not ok:
            break
        count += 1
        meter.on_picture(count, count)
    capture.release()
    return meter.answer


def read_ours(options: CameraOptions, pictures: int) -> dict[str, float] | None:
    """The same by a capture thread as in the agent; this thread takes and releases frames in the engine's place."""
    from edge_agent import sources
    from edge_agent.connection import ConnectionQuality
    from edge_agent.frames import FramePool
    from edge_agent.queue import FrameQueue, QueueLimits
    from edge_agent.session import Session, StillPicture
    from edge_agent.sources import LiveOptions

    assert isinstance(options, LiveOptions)
    pool, quality = FramePool(), ConnectionQuality()
    frames = FrameQueue(release=lambda frame: pool.give(frame.image))
    frames.add_camera("bench", QueueLimits())
    session = Session(
        "bench",
        lambda: sources.make(options),
        frames=frames,
        pool=pool,
        quality=quality,
        still=StillPicture(options.frozen_timeout_s),
        fps=options.fps,
    )

    def capture() -> None:
        session.run()
        frames.close()

    thread = threading.Thread(target=capture, name="capture:bench")
    meter, delivered = Meter(pictures), 0
    thread.start()
    while not frames.is_closed:
        for frame in frames.take():
            delivered += 1
            meter.on_picture(quality.captured + quality.skipped, delivered)
            pool.give(frame.image)
        if meter.answer is not None:
            session.cancel()
    thread.join()
    if session.error is not None:
        raise session.error
    return meter.answer


def run_loop(name: str, url: str, pictures: int) -> None:
    """Print one line of JSON; 0 `pictures`: how long the first takes, and no more."""
    loop = LOOPS[name]
    answer = read_bare(url, pictures) if loop.options is None else read_ours(_options(loop, url), pictures)
    if answer is None:
        sys.exit("the stream ended too early")
    print(json.dumps(answer))


def _options(loop: Loop, url: str) -> CameraOptions:
    import msgspec

    from edge_agent.sources.http import HttpOptions
    from edge_agent.sources.rtsp import RtspOptions

    kind: type[CameraOptions] = RtspOptions if loop.stream == "rtsp" else HttpOptions
    return msgspec.convert({"source": loop.stream, "url": url, **(loop.options or {})}, kind)


def _children() -> Sequence[int]:
    import psutil

    return [child.pid for child in psutil.Process().children(recursive=True)]


def _cpu_s(children: Sequence[int]) -> float:
    """User and system time. Of a child that still runs its CPU clock tells it, finer than /proc does."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return (
        usage.ru_utime + usage.ru_stime + sum(time.clock_gettime(~pid << 3 | 2) for pid in children)
    )  # as clock_getcpuclockid(3)


def _peak_mb(process: str) -> float:
    """Not getrusage's: a process inherits that peak from the one that started it."""
    [peak] = [line for line in Path(f"/proc/{process}/status").read_text().splitlines() if line.startswith("VmHWM")]
    return int(peak.split()[1]) * 1024 / 1e6


# All of them, from outside


def film(count: int) -> Iterator[Image]:
    """The synthetic world, as `count` pictures in the same buffer."""
    from edge_agent.sources.world import World

    world, frame = World(width=WIDTH, height=HEIGHT, seed=11), np.empty((HEIGHT, WIDTH, 3), np.uint8)
    for index in range(count):
        world.draw(index, frame)
        yield frame


def start(name: str, url: str, pictures: int) -> dict[str, float]:
    """What a loop printed."""
    done = subprocess.run(
        [sys.executable, __file__, "--loop", name, url, str(pictures)],
        capture_output=True,
        text=True,
        timeout=60 + 2 * pictures / FPS,
        env={**os.environ, **(BARE_OPTIONS if LOOPS[name].options is None else {})},
    )
    if done.returncode:
        sys.exit(f"{LOOPS[name].what}: {done.stderr[-2000:]}")
    answer: dict[str, float] = json.loads(done.stdout)
    return answer


def measure(comparison: Comparison, urls: Mapping[str, str], pictures: int) -> tuple[dict[str, float], ...]:
    """What both loops printed: side by side, or in turn where it is time that counts."""
    in_turn = comparison.figure == "first_ms"
    with ThreadPoolExecutor(1 if in_turn else 2) as threads:
        return tuple(
            threads.map(
                lambda name: start(name, urls[LOOPS[name].stream], 0 if in_turn else pictures),
                (comparison.loop, comparison.beside),
            )
        )


def machine() -> dict[str, Any]:
    facts = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.partition(":")[2].strip() for line in facts if line.startswith("model name")), "")
    return {
        "cpu": model or platform.machine(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "opencv": cv2.__version__,
        "load": os.getloadavg()[0],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=5.0, help="length of a repeat after its warm-up")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path, metavar="PATH", help="also write all figures here")
    parser.add_argument("--loop", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.loop:
        name, url, pictures = arguments.loop
        run_loop(name, url, int(pictures))
    else:
        sys.exit(report(arguments.seconds, arguments.repeats, arguments.json))


def report(seconds: float, repeats: int, path: Path | None) -> int:
    """Measure and tell; the exit status: 1 if a bar is missed that should not be."""
    from tests.network_cameras import MjpegServer
    from tests.rigs import RtspServer, encode_h264

    about, pictures = machine(), max(1, round(seconds * FPS))
    length = WARM_UP + pictures + 2 * FPS
    compared = [Compared(comparison) for comparison in COMPARISONS]
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        video = encode_h264(film(length), folder / "film.mp4", fps=FPS)
        quality = [cv2.IMWRITE_JPEG_QUALITY, 80]
        jpegs = tuple(cv2.imencode(".jpg", frame, quality)[1].tobytes() for frame in film(2 * FPS))
        about["h264_mbit_s"] = video.stat().st_size * 8 / 1e6 / (length / FPS)
        about["jpeg_kb"] = statistics.mean(map(len, jpegs)) / 1e3
        rtsp, http = stack.enter_context(RtspServer(video)), stack.enter_context(MjpegServer(jpegs))
        for repeat in range(max(repeats, FIRST_PICTURES)):
            for each in compared:
                if repeat < (FIRST_PICTURES if each.comparison.figure == "first_ms" else repeats):
                    ours, beside = measure(each.comparison, {"rtsp": rtsp.url, "http": http.url}, pictures)
                    each.ours.append(ours)
                    each.beside.append(beside)
    show(about, compared)
    if path is not None:
        path.write_text(json.dumps({"machine": about, "comparisons": [_as_json(each) for each in compared]}, indent=1))
    return int(any(each.is_missed and not each.comparison.known for each in compared))


def show(about: Mapping[str, Any], compared: Sequence[Compared]) -> None:
    from rich.console import Console
    from rich.table import Column, Table

    console = Console(width=None if sys.stdout.isatty() else 120, highlight=False)
    console.print(
        f"{about['cpu']}, {about['cores']} cores (load {about['load']:.1f}), Python {about['python']}, "
        f"OpenCV {about['opencv']}\n{WIDTH}x{HEIGHT} at {FPS}: H.264 of {about['h264_mbit_s']:.1f} Mbit/s by RTSP "
        f"over TCP, Motion-JPEG of {about['jpeg_kb']:.0f} kB a picture by HTTP\n"
        "medians, and what the repeats lay between"
    )
    table = Table(Column("", no_wrap=True))
    for title in ("", "peak MB", "sent/s", "delivered", "ratio", "bar"):
        table.add_column(title, justify="right")
    told = ""
    for each in compared:
        c = each.comparison
        if told != (told := _TITLES[c.figure]):
            table.add_row(f"[bold]{told}")
        bar = "" if c.bar is None else f"{c.bar:g}, {'missed' if each.is_missed else 'met'}"
        table.add_row(*_facts(c.loop, c.figure, each.ours), f"[bold]{_middle(each.ratios, 3)}", bar)
        table.add_row(*_facts(c.beside, c.figure, each.beside), end_section=True)
    console.print(table)
    for each in compared:
        if each.comparison.known:
            console.print(f"{LOOPS[each.comparison.loop].what}: {each.comparison.known}")


_TITLES = {"cpu_ms": "CPU a picture sent, ms", "first_ms": "first picture after, ms"}


def _facts(name: str, figure: str, runs: Sequence[Mapping[str, float]]) -> list[str]:
    figures = {key: [run[key] for run in runs] for key in runs[0]}
    facts = [LOOPS[name].what, _middle(figures[figure], 2 if figure == "cpu_ms" else 0)]
    if figure == "first_ms":
        return [*facts, "", "", ""]
    delivered = sum(figures["delivered"]) / sum(figures["pictures"])
    peak_mb, fps = (statistics.median(figures[key]) for key in ("rss_mb", "fps"))
    return [*facts, f"{peak_mb:.0f}", f"{fps:.1f}", f"{delivered:.0%}"]


def _middle(figures: Sequence[float], digits: int) -> str:
    return f"{statistics.median(figures):.{digits}f} ({min(figures):.{digits}f} to {max(figures):.{digits}f})"


def _as_json(compared: Compared) -> dict[str, Any]:
    facts = {"ratio": compared.ratio, "ratios": compared.ratios, "is_missed": compared.is_missed}
    return {**asdict(compared.comparison), **facts, "runs": {"loop": compared.ours, "beside": compared.beside}}


if __name__ == "__main__":
    main()
