"""What reading a camera costs beside a bare OpenCV loop and a bare PyAV loop: CPU a picture, memory, the time to the
first picture, and how long it takes to come back after each fault.

`python -m benchmarks.capture [--streams 1,2,4] [--seconds S] [--repeats N] [--no-faults] [--json FILE]`. Needs
GStreamer's RTSP server and PyAV, for the faults a mosquitto too. Pictures of 1920x1080, 30 a second, are read at the
camera's own pace, so that CPU a picture is compared and not pictures a second. Ours are the real sources, session,
queue and pool. The two loops of a comparison run at the same time, each in a fresh process: on a virtual machine one
and the same loop takes 20 % more or less from one minute to the next, and so do both. Of more streams than there are
cores they run in turn.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

# All else is imported where it is needed: a loop's process holds what that loop needs, so that memory compares.
if TYPE_CHECKING:
    from benchmarks._figures import Figure, Runs
    from edge_agent.config import CameraOptions
    from edge_agent.data import Image

ROOT = Path(__file__).parent.parent
WIDTH, HEIGHT, FPS = 1920, 1080, 30
SCENE = 5 * FPS  # pictures that differ; a film is this scene again and again
WARM_UP = 75  # pictures; FFmpeg hands out those of its 2 s of probing at once
LEAST_SHARE = 0.97  # of the pictures sent that a loop must get for its repeat to count
TRANSPORT = {"rtsp_transport": "tcp"}  # as our source's, less how long it probes
V4L2_FORMATS = ("YUYV", "UYVY", "NV12", "MJPG", "GREY")  # that our source can be told


@dataclass(frozen=True, slots=True)
class Loop:
    """`options` are those of our source."""

    what: str
    reader: Literal["ours", "cv2", "av"]
    stream: Literal["rtsp", "http", "v4l2"]
    options: Mapping[str, object] = field(default_factory=dict)


LOOPS = {
    "cv2": Loop("bare cv2", "cv2", "rtsp"),
    "av": Loop("bare PyAV", "av", "rtsp"),
    "rtsp": Loop("H.264", "ours", "rtsp"),
    "rtsp-5fps": Loop("H.264, fps = 5", "ours", "rtsp", {"fps": 5.0}),
    "rtsp-process": Loop("H.264, own process", "ours", "rtsp", {"isolation": "process"}),
    "http": Loop("MJPEG", "ours", "http"),
    "http-5fps": Loop("MJPEG, fps = 5", "ours", "http", {"fps": 5.0}),
    "v4l2": Loop("V4L2", "ours", "v4l2"),
    "v4l2-cv2": Loop("bare cv2", "cv2", "v4l2"),
}


@dataclass(frozen=True, slots=True)
class Comparison:
    """A loop, what it is beside, and which of their figures are told; `bar` is the most that the ratio of the first
    should be."""

    loop: str
    beside: str
    figures: Sequence[Literal["cpu_ms", "peak_mb", "first_ms"]]
    bar: float | None = None
    streams: int = 1
    quick: bool = False

    @property
    def is_first_picture(self) -> bool:
        return "first_ms" in self.figures

    @property
    def what(self) -> str:
        other = " beside PyAV" if LOOPS[self.beside].reader == "av" else ""
        return _times(self.streams, LOOPS[self.loop].what) + other


TITLES = {"cpu_ms": ("CPU a picture", "ms"), "peak_mb": ("peak memory", "MB"), "first_ms": ("first picture", "ms")}
SINGLE = (
    Comparison("rtsp-5fps", "rtsp", ("cpu_ms",), bar=0.5),
    Comparison("http-5fps", "http", ("cpu_ms",), bar=0.5, quick=True),
    Comparison("rtsp-process", "rtsp", ("cpu_ms", "peak_mb")),
    Comparison("rtsp", "cv2", ("first_ms",)),
    Comparison("rtsp", "av", ("first_ms",)),
)
V4L2 = Comparison("v4l2", "v4l2-cv2", ("cpu_ms", "peak_mb"))
KNOWN = (
    "H.264, fps = 5: all pictures are decoded, since they build on one another; the more bits, the less is saved.",
    "First picture: FFmpeg probes a stream for up to 5 s unless told otherwise, as both bare loops do; ours tells it "
    "0.1 s, and asks the server first what it would play.",
)


def comparisons(streams: Sequence[int]) -> Sequence[Comparison]:
    """All that need no camera of this machine."""
    several = []
    for count in streams:
        several.append(Comparison("rtsp", "cv2", ("cpu_ms", "peak_mb"), bar=1.1, streams=count, quick=count == 1))
        several.append(Comparison("rtsp", "av", ("cpu_ms", "peak_mb"), streams=count))
    return [*several, *SINGLE]


def _times(streams: int, what: str) -> str:
    return f"{streams} x {what}" if streams > 1 else what


# A loop, in a process of its own


@dataclass(frozen=True, slots=True)
class Task:
    """What a loop's process is told. 0 `pictures`: how long the first takes, and no more; `mode`: of a V4L2 device."""

    loop: str
    url: str
    pictures: int
    streams: int = 1
    mode: Mapping[str, Any] = field(default_factory=dict)


class Meter:
    """CPU, time and memory of this process and its children, from the moment every stream is warm to the last picture;
    `answer` is there at the end. Safe to use from every thread."""

    def __init__(self, task: Task) -> None:
        self._wanted = task.pictures * task.streams
        self._counts = [0] * task.streams
        self._lock = threading.Lock()
        self._began_s = time.perf_counter()
        self._first_ms: float | None = None
        self._start: tuple[int, int, float, float] | None = None
        self._children: Sequence[int] = ()
        self._streams = task.streams
        self.answer: dict[str, float] | None = None

    def count(self, stream: int) -> None:
        """Another picture of a stream came, and was delivered."""
        with self._lock:
            self._counts[stream] += 1
            self.on_pictures(self._counts, sum(self._counts))

    def on_pictures(self, read: Sequence[int], delivered: int) -> None:
        """So many pictures came off each camera, and so many of all were delivered."""
        if self._first_ms is None:
            self._first_ms = (time.perf_counter() - self._began_s) * 1e3
            if not self._wanted:
                self.answer = {"first_ms": self._first_ms}
        elif self._start is None and min(read) >= WARM_UP:
            self._children = _children()
            self._start = sum(read), delivered, time.perf_counter(), _cpu_s(self._children)
        elif self._start is not None and self.answer is None and sum(read) >= self._start[0] + self._wanted:
            self.answer = self._measured(sum(read), delivered, self._start)

    def _measured(self, read: int, delivered: int, start: tuple[int, int, float, float]) -> dict[str, float]:
        cpu_s, now_s, pictures = _cpu_s(self._children), time.perf_counter(), read - start[0]
        return {
            "cpu_ms": (cpu_s - start[3]) / pictures * 1e3,
            "peak_mb": _peak_mb("self") + sum(_peak_mb(str(pid)) for pid in self._children),
            "fps": pictures / (now_s - start[2]) / self._streams,
            "delivered": (delivered - start[1]) / pictures,
        }


def read_bare(task: Task, meter: Meter) -> None:
    """The least that reading takes: a thread a stream."""
    read: Callable[[Task, Meter, int], None] = read_av if LOOPS[task.loop].reader == "av" else read_cv2
    threads = [threading.Thread(target=read, args=(task, meter, stream)) for stream in range(task.streams)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def read_cv2(task: Task, meter: Meter, stream: int) -> None:
    """`cv2.VideoCapture`, with one thread that decodes."""
    import cv2

    if task.mode:
        capture = cv2.VideoCapture(task.url, cv2.CAP_V4L2)
        capture.set(cv2.CAP_PROP_FOURCC, cv2.VideoWriter.fourcc(*task.mode["format"]))
        capture.set(cv2.CAP_PROP_FRAME_WIDTH, task.mode["width"])
        capture.set(cv2.CAP_PROP_FRAME_HEIGHT, task.mode["height"])
        capture.set(cv2.CAP_PROP_FPS, FPS)
    else:
        capture = cv2.VideoCapture(task.url, cv2.CAP_FFMPEG, [cv2.CAP_PROP_N_THREADS, 1])
    frame = np.empty((task.mode.get("height", HEIGHT), task.mode.get("width", WIDTH), 3), np.uint8)
    while meter.answer is None and capture.read(frame)[0]:
        meter.count(stream)
    capture.release()


def read_av(task: Task, meter: Meter, stream: int) -> None:
    """PyAV, with one thread that decodes, and BGR arrays as from the others."""
    import av

    with av.open(task.url, options=TRANSPORT) as container:
        video = container.streams.video[0]
        video.codec_context.thread_count = 1
        for frame in container.decode(video):
            frame.reformat(format="bgr24").to_ndarray()
            meter.count(stream)
            if meter.answer is not None:
                break


def read_ours(task: Task, meter: Meter) -> None:
    """The same by capture threads as in the agent; this thread takes and releases frames in the engine's place."""
    from edge_agent import sources
    from edge_agent.connection import ConnectionQuality
    from edge_agent.frames import FramePool
    from edge_agent.queue import FrameQueue, QueueLimits
    from edge_agent.session import Session, StillPicture
    from edge_agent.sources import LiveOptions

    options = _options(task)
    assert isinstance(options, LiveOptions)
    pool, qualities = FramePool(), [ConnectionQuality() for _ in range(task.streams)]
    frames = FrameQueue(release=lambda frame: pool.give(frame.image))
    sessions = [
        Session(
            f"bench{stream}",
            lambda: sources.make(options),
            frames=frames,
            pool=pool,
            quality=quality,
            still=StillPicture(options.frozen_timeout_s),
            fps=options.fps,
        )
        for stream, quality in enumerate(qualities)
    ]

    def capture(session: Session) -> None:
        session.run()
        frames.close()

    threads = [threading.Thread(target=capture, args=(each,), name=f"capture:{each.camera}") for each in sessions]
    for session, thread in zip(sessions, threads, strict=True):
        frames.add_camera(session.camera, QueueLimits())
        thread.start()
    delivered = 0
    while not frames.is_closed:
        for frame in frames.take():
            delivered += 1
            meter.on_pictures([quality.captured + quality.skipped for quality in qualities], delivered)
            pool.give(frame.image)
        if meter.answer is not None:
            break
    for session in sessions:
        session.cancel()
    frames.close()
    for thread in threads:
        thread.join()
    for session in sessions:
        if session.error is not None:
            raise session.error


def run_loop(task: Task) -> None:
    """Print one line of JSON."""
    import_module("av" if LOOPS[task.loop].reader == "av" else "cv2")  # not part of the first picture's time
    meter = Meter(task)
    if LOOPS[task.loop].reader == "ours":
        read_ours(task, meter)
    else:
        read_bare(task, meter)
    if meter.answer is None:
        sys.exit("the stream ended too early")
    print(json.dumps(meter.answer))


def _options(task: Task) -> CameraOptions:
    import msgspec

    loop = LOOPS[task.loop]
    kind: type[CameraOptions] = import_module(f"edge_agent.sources.{loop.stream}").Source.Options
    where = {"device": task.url, **task.mode} if loop.stream == "v4l2" else {"url": task.url}
    return msgspec.convert({"source": loop.stream, **where, **loop.options}, kind)


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


def repeated(scene: Path, longer: Path, *, pictures: int) -> Path:
    """A film of so many pictures or more: the scene, which begins with a key picture, again and again."""
    import av

    with av.open(scene) as source, av.open(longer, "w") as sink:
        video = source.streams.video[0]
        packets = [packet for packet in source.demux(video) if packet.pts is not None]
        copy = sink.add_stream_from_template(video)
        length = round(SCENE / FPS / video.time_base) if video.time_base else 0
        times = [(packet.pts or 0, packet.dts or 0) for packet in packets]
        for again in range(-(-pictures // SCENE)):
            for packet, (pts, dts) in zip(packets, times, strict=True):
                packet.stream, packet.time_base = copy, video.time_base
                packet.pts, packet.dts = pts + again * length, dts + again * length
                sink.mux(packet)
    return longer


class LoopFailed(Exception):
    """A loop's process ended without an answer."""


def start(task: Task) -> dict[str, float]:
    """What a loop printed. Raises LoopFailed."""
    loop = LOOPS[task.loop]
    bare = {"OPENCV_FFMPEG_CAPTURE_OPTIONS": "|".join(f"{k};{v}" for k, v in TRANSPORT.items())}
    try:
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks.capture", "--loop", json.dumps(_as_json(task))],
            capture_output=True,
            text=True,
            timeout=60 + 4 * (WARM_UP + task.pictures) / FPS,
            cwd=ROOT,
            env={**os.environ, **({} if loop.reader == "ours" else bare)},
        )
    except subprocess.TimeoutExpired as late:
        raise LoopFailed(f"{loop.what}: no answer within {late.timeout:.0f} s") from late
    if done.returncode:
        raise LoopFailed(f"{loop.what}: {done.stderr[-1000:].strip()}")
    answer: dict[str, float] = json.loads(done.stdout)
    return {**answer, "share": share(task.loop, answer)} if task.pictures else answer


def share(name: str, answer: Mapping[str, float]) -> float:
    """Of the pictures that were sent meanwhile, how many a loop delivered; of one that thins them, how many it read."""
    read = min(1.0, answer["fps"] / FPS) if LOOPS[name].stream == "rtsp" else 1.0  # of others the rate is not known
    return read if "fps" in LOOPS[name].options else read * answer["delivered"]


def measure(tasks: tuple[Task, Task], *, is_in_turn: bool, turn: int) -> list[dict[str, float]]:
    """What both loops printed: side by side, or in turn, each the first every other time."""
    step = -1 if turn % 2 else 1
    with ThreadPoolExecutor(1 if is_in_turn else 2) as threads:
        return list(threads.map(start, tasks[::step]))[::step]


def _as_json(task: Task) -> dict[str, object]:
    return {name: getattr(task, name) for name in Task.__dataclass_fields__}


def _gather(runs: Runs, comparison: Comparison, urls: Mapping[str, str], pictures: int, turn: int) -> None:
    """One repeat of a comparison."""
    count = 0 if comparison.is_first_picture else pictures
    ours, beside = (
        Task(name, urls[LOOPS[name].stream], count, comparison.streams) for name in (comparison.loop, comparison.beside)
    )
    is_in_turn = comparison.is_first_picture or comparison.streams > (os.cpu_count() or 1)
    _add(runs, comparison, measure((ours, beside), is_in_turn=is_in_turn, turn=turn))


def _add(runs: Runs, comparison: Comparison, answers: Sequence[Mapping[str, float]]) -> None:
    for side, answer in zip(("ours", "beside"), answers, strict=True):
        runs.add(_key(comparison, side), answer)


def _key(comparison: Comparison, side: str) -> str:
    return f"{comparison.loop}|{comparison.beside}|{comparison.streams}|{comparison.figures[0]}|{side}"


def shares(runs: Runs, comparison: Comparison) -> Sequence[tuple[float, float]]:
    """Both loops' share of each repeat; empty where it is not pictures that count."""
    if comparison.is_first_picture:
        return []
    ours, beside = (runs[_key(comparison, side)]["share"] for side in ("ours", "beside"))
    return list(zip(ours, beside, strict=True))


def kept(runs: Runs, comparison: Comparison, side: str, name: str) -> Sequence[float]:
    """The values of those repeats in which both loops kept up with their cameras: a picture that is dropped, being too
    old, takes less CPU than one that is delivered."""
    values = runs[_key(comparison, side)][name]
    both = shares(runs, comparison)
    return [value for value, each in zip(values, both, strict=True) if min(each) >= LEAST_SHARE] if both else values


def figures(runs: Runs, comparison: Comparison) -> Iterator[Figure]:
    """What a comparison came to; nothing if the machine was too small for it."""
    from benchmarks._figures import Figure

    for place, name in enumerate(comparison.figures):
        title, unit = TITLES[name]
        if ours := kept(runs, comparison, "ours", name):
            yield Figure(
                f"{comparison.what}: {title}",
                unit,
                ours,
                LOOPS[comparison.beside].what,
                kept(runs, comparison, "beside", name),
                bar=None if place else comparison.bar,
                quick=comparison.quick and not place,
            )


def overloads(runs: Runs, comparison: Comparison) -> Iterator[str]:
    """A sentence if the loops did not keep up with their cameras."""
    both = shares(runs, comparison)
    if late := [each for each in both if min(each) < LEAST_SHARE]:
        ours, beside = (statistics.median(side) for side in zip(*late, strict=True))
        yield (
            f"{comparison.what}: left out are {len(late)} of {len(both)} repeats, in which a loop got less than "
            f"{LEAST_SHARE:.0%} of the pictures (ours {ours:.0%}, {LOOPS[comparison.beside].what} {beside:.0%}): "
            "the machine was too busy. Ours then drops what is a second old; a bare loop hands it out late."
        )


def v4l2(runs: Runs, *, pictures: int, repeats: int) -> tuple[Sequence[Figure], str]:
    """The first local camera by ours and by `cv2.VideoCapture`, in turn and in the same mode; and a sentence of it."""
    from edge_agent.sources import _v4l2

    found = next(_v4l2.devices(), None)
    if found is None:
        return [], "No V4L2 camera here; `make test-vm` reads one of a real driver, in a virtual machine."
    try:
        mode = v4l2_mode(found.path)
        tasks = Task("v4l2", found.path, pictures, mode=mode), Task("v4l2-cv2", found.path, pictures, mode=mode)
        for repeat in range(repeats):
            _add(runs, V4L2, measure(tasks, is_in_turn=True, turn=repeat))
    except (OSError, LoopFailed) as error:
        return [], f"V4L2: {found.path} ({found.card}) could not be read: {error}"
    return list(figures(runs, V4L2)), f"V4L2: {found.card}, {mode['width']}x{mode['height']} {mode['format']}."


def v4l2_mode(path: str) -> Mapping[str, Any]:
    """What the device is set to, in a format that both loops can be told."""
    from edge_agent.sources import _v4l2

    device = _v4l2.Device(path)
    try:
        now, offered = device.current(), device.formats()
    finally:
        device.close()
    usable = [format for format in (now.format, *V4L2_FORMATS) if format in V4L2_FORMATS and format in offered]
    if not usable:
        raise LoopFailed(f"it offers only {', '.join(offered[:8])}")
    return {"format": usable[0], "width": now.width, "height": now.height}


def need(options: argparse.Namespace) -> None:
    """Exits naming what is not installed."""
    from tests import rigs

    if find_spec("av") is None:
        sys.exit("PyAV is not installed: pip install 'edge-agent[bench]'")
    rigs.need_gstreamer()
    if options.faults:
        rigs.need_program("mosquitto", "mosquitto")


def benchmark(options: argparse.Namespace) -> int:
    """Measure and tell; the exit status."""
    import cv2

    from benchmarks import _capture_faults, _figures
    from tests.network_cameras import MjpegServer
    from tests.rigs import RtspServer, encode_h264

    need(options)
    about, runs = _figures.machine("opencv-python-headless", "av"), _figures.Runs()
    pictures = round(options.seconds * FPS)
    compared = comparisons(options.streams)
    found: list[Figure] = []
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        scene = encode_h264(film(SCENE), folder / "scene.mp4", fps=FPS)
        length = max(WARM_UP + pictures + 6 * FPS, _capture_faults.LONGEST_S * FPS)
        video = repeated(scene, folder / "film.mp4", pictures=length)
        quality = [cv2.IMWRITE_JPEG_QUALITY, 80]
        jpegs = tuple(cv2.imencode(".jpg", frame, quality)[1].tobytes() for frame in film(2 * FPS))
        rtsp, http = stack.enter_context(RtspServer(video)), stack.enter_context(MjpegServer(jpegs, fps=FPS))
        for repeat in range(options.repeats):
            for each in compared:
                _gather(runs, each, {"rtsp": rtsp.url, "http": http.url}, pictures, repeat)
        local, told = v4l2(runs, pictures=pictures, repeats=options.repeats)
        mbit_s, jpeg_kb = scene.stat().st_size * 8e-6 / (SCENE / FPS), sum(map(len, jpegs)) / len(jpegs) / 1e3
        found += [figure for each in compared for figure in figures(runs, each)] + list(local)
        notes = [f"H.264 of {mbit_s:.1f} Mbit/s by RTSP over TCP, Motion-JPEG of {jpeg_kb:.0f} kB a picture by HTTP."]
        notes += [*KNOWN, told, *(note for each in compared for note in overloads(runs, each))]
        series: dict[str, Any] = {"cpu_ms_by_streams": by_streams(runs, options.streams)}
        if options.faults:
            faults = _capture_faults.measure(video, folder, repeats=options.repeats)
            found += faults.figures
            notes += faults.notes
            series["faults"] = faults.series
    title = f"Reading cameras: {WIDTH}x{HEIGHT} at {FPS} pictures a second"
    report = _figures.Report("capture", title, _figures.command("capture"), about, found, notes, series)
    return _figures.finish(report, options)


def by_streams(runs: Runs, streams: Sequence[int]) -> Sequence[Mapping[str, float]]:
    """The median CPU a picture of each loop by the number of streams; ours as beside cv2. What is missing there was no
    time for."""
    points = []
    for count in streams:
        cv2, av = (Comparison("rtsp", beside, ("cpu_ms",), streams=count) for beside in ("cv2", "av"))
        sides = {"ours": (cv2, "ours"), "cv2": (cv2, "beside"), "av": (av, "beside")}
        values = {name: kept(runs, comparison, side, "cpu_ms") for name, (comparison, side) in sides.items()}
        points.append({"streams": count} | {name: statistics.median(each) for name, each in values.items() if each})
    return points


def _counts(text: str) -> Sequence[int]:
    counts = sorted({int(count) if count.strip().isdecimal() else 0 for count in text.split(",")})
    if counts[0] < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of numbers from 1, such as 1,2,4")
    return counts


def main() -> int:
    if sys.argv[1:2] == ["--loop"]:
        run_loop(Task(**json.loads(sys.argv[2])))
        return 0
    import pytest

    from benchmarks import _figures

    parser = _figures.arguments(__doc__, repeats=6)
    parser.add_argument("--streams", type=_counts, default=(1, 2, 4), help="so many cameras at once; 1,2,4 unless told")
    parser.add_argument(
        "--seconds", type=float, default=5.0, help="length of a repeat after its warm-up; 5 unless told"
    )
    parser.add_argument("--no-faults", dest="faults", action="store_false", help="leave the faults out")
    options = parser.parse_args()
    if options.repeats < 1 or options.seconds < 1:
        parser.error("--repeats and --seconds must be 1 or more")
    try:
        return benchmark(options)
    except (pytest.skip.Exception, LoopFailed) as missing:
        sys.exit(str(missing))


if __name__ == "__main__":
    sys.exit(main())
