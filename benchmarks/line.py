"""What the line costs: CPU a frame and memory, from a 1080p H.264 film to results on MQTT, beside a bare loop.

`python -m benchmarks.line [--repeats N] [--frames N] [--only DETECTOR] [--rivals] [--json FILE]`, or with a model and
a film of yours: `--model ONNX --head dense|yolox --video FILE`. Needs mosquitto, and GStreamer's x264enc for the film.

Two detectors: one of YOLOv8n's size (random weights, 640x640), and the bundled demo-320, which is so cheap that the
agent's own share shows. The loop and the agent run in turn, each in a fresh process, with as many threads of
onnxruntime, of OpenCV and of the decoder. The agent's figures include capture, queue, inference, JSON and its side of
MQTT; broker and subscriber are other processes. `--rivals` measures ultralytics and Roboflow's inference-models too, on
the same model and film, in environments of their own that are made on first use (some gigabytes; from PyPI, or where
pip's own settings point, such as PIP_EXTRA_INDEX_URL to builds of PyTorch without CUDA, which take less memory).
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import cv2
import numpy as np
import onnx
from numpy.typing import NDArray

from benchmarks import _figures
from benchmarks._figures import Figure, Report, Runs
from benchmarks._rigs import rigs_or_exit
from benchmarks.networks import yolo_sized
from benchmarks.rivals._environments import RIVALS, ROOT, NotInstalled, Rival
from benchmarks.rivals._loop import IOU, SCORE, peak_mb
from edge_agent.data import Image
from edge_agent.geometry import iou
from edge_agent.models.store import ModelStore
from edge_agent.sources.world import World
from tests.rigs import DEVICE, AgentProcess, Broker, Probe, encode_h264

WIDTH, HEIGHT, FPS = 1920, 1080, 30
WARM_UP = 30
SPARE = 15  # frames after the measured ones, so that the agent's queue is as full at the end as at the beginning
RIVALS_FRAMES = 120  # at most
LONGEST_S = 300.0  # of a run

CPU_BAR, SMALL_CPU_BAR, MEMORY_BAR_MB, AGREE_BAR = 1.05, 1.15, 250.0, 0.98

SAME_IOU, SAME_SCORE = 0.9, 0.02

Frames = Mapping[int, Sequence[Sequence[float]]]
"""By frame its detections: x1 y1 x2 y2 score class."""


@dataclass(frozen=True, slots=True)
class Detector:
    """A model, how it is read, and the most CPU beside the bare loop's that it should take in the agent."""

    name: str
    path: Path
    head: Literal["dense", "yolox"]
    cpu_bar: float | None
    has_rivals: bool = False
    quick: bool = False


@dataclass(frozen=True, slots=True)
class Measured:
    """What one process came to, and what it saw."""

    figures: Mapping[str, float]
    seen: Frames


@dataclass(slots=True)
class Found:
    """All repeats of a detector: the figures of each subject, and how far what it saw is what the bare loop saw."""

    runs: Runs = field(default_factory=Runs)
    versions: dict[str, Mapping[str, str]] = field(default_factory=dict)

    def add(self, subject: str, measured: Measured, bare: Measured) -> None:
        boxes = statistics.mean(len(extended(rows)) for rows in measured.seen.values())
        self.runs.add(subject, {**measured.figures, "boxes": boxes, "agree": agreement(bare.seen, measured.seen)})

    def forget(self, subject: str) -> None:
        """It did not come to the end of all repeats."""
        for name in (subject, f"{subject} as it comes"):
            self.runs.by_subject.pop(name, None)
        self.versions.pop(subject, None)


AS_IT_COMES = (
    "rivals have as many threads as the others, which do not spin; as it comes: with the sessions and threads that the "
    "library makes by itself, where onnxruntime's threads spin while they wait"
)

# The film and the model


def film(path: Path, frames: int) -> Path:
    """The synthetic world, as H.264."""
    return encode_h264(pictures(frames), path, fps=FPS)


def pictures(count: int) -> Iterator[Image]:
    """The frames of the film, in the same buffer."""
    world, frame = World(width=WIDTH, height=HEIGHT, seed=11), np.empty((HEIGHT, WIDTH, 3), np.uint8)
    for index in range(count):
        world.draw(index, frame)
        yield frame


def yolo_file(path: Path) -> Path:
    """A detector of YOLOv8n's size for one picture at a time, with what its exporter writes into the file.

    Random weights find nothing in one picture and thousands in the next, which is not what is to be compared:
    the scores of each class are put to one mean and deviation in each picture, so that some fifty cells are sure of it.
    """
    model = onnx.load(str(yolo_sized(path, seed=1)))
    graph = model.graph
    place, rated = [(place, node) for place, node in enumerate(graph.node) if node.op_type == "Sigmoid"][-1]
    for name, value in (("deviation", 1.0), ("mean", SCORES_MEAN)):
        graph.initializer.append(onnx.numpy_helper.from_array(np.full(CLASSES, value, np.float32), name))
    inputs = [rated.input[0], "deviation", "mean"]
    graph.node.insert(
        place, onnx.helper.make_node("InstanceNormalization", inputs, ["even_scores"], name="even_scores")
    )
    rated.input[0] = "even_scores"
    for tensor in (*graph.input, *graph.output):
        tensor.type.tensor_type.shape.dim[0].dim_value = 1
    names = {number: f"class_{number}" for number in range(CLASSES)}
    about = {"task": "detect", "stride": "32", "imgsz": "[640, 640]", "batch": "1", "names": str(names)}
    onnx.helper.set_model_props(model, about)
    onnx.checker.check_model(model)
    onnx.save(model, str(path))
    return path


CLASSES = 80
SCORES_MEAN = -5.3
"""Of the logarithm of the odds; the score of 0.4 lies five deviations above it."""


# One run each


def run_loop(module: str, python: Path | str, arguments: Sequence[str], environ: Mapping[str, str] | None) -> Any:
    """What a loop's process printed. Raises `LoopFailed`."""
    command = [str(python), "-m", module, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environ, timeout=900)
    if done.returncode:
        raise LoopFailed(f"{module}: {done.stderr.strip()[-1500:]}")
    return json.loads(done.stdout.splitlines()[-1])


class LoopFailed(Exception):
    """A loop's process ended without figures; the text is the end of what it said."""


def bare_loop(detector: Detector, video: Path, options: argparse.Namespace) -> Measured:
    arguments = [*common(detector, video, options.threads, options.frames), "--head", detector.head]
    try:
        told = run_loop("benchmarks.bare_loop", sys.executable, arguments, None)
    except LoopFailed as failed:
        raise SystemExit(str(failed)) from None
    return Measured(told["figures"], dict(enumerate(told["detections"])))


def rival_loop(
    rival: Rival, detector: Detector, video: Path, options: argparse.Namespace, *, threads: int
) -> tuple[Measured, Mapping[str, str]]:
    """What it came to, and the versions of what it is made of. Raises `NotInstalled`, `LoopFailed`."""
    python = rival.python()
    arguments = common(detector, video, threads, min(RIVALS_FRAMES, options.frames))
    told = run_loop(rival.module, python, arguments, rival.surroundings())
    return Measured(told["figures"], dict(enumerate(told["detections"]))), told["versions"]


def common(detector: Detector, video: Path, threads: int, frames: int) -> Sequence[str]:
    limits = ["--threads", str(threads), "--warm-up", str(WARM_UP), "--frames", str(frames)]
    return [str(video.resolve()), str(detector.path.resolve()), *limits]


def agent(detector: Detector, video: Path, options: argparse.Namespace) -> Measured:
    """The agent as it is, with one camera that is the film, and a broker and a subscriber beside it."""
    with tempfile.TemporaryDirectory() as name, Broker(Path(name)) as broker:
        body = configuration(broker.port, detector, video, options.threads)
        with Probe(broker.port, f"edge/{DEVICE}/#") as probe, AgentProcess(Path(name), body) as running:
            start = reached(WARM_UP - 1, probe, running)
            end = reached(start.seq + options.frames, probe, running)
            rss_mb = peak_mb(str(running.process.pid))
        heard = [message.json() for message in probe.on("cameras/film/results")]
    frames = end.seq - start.seq
    seen = {
        result["seq"]: [[*one["box"], one["score"], one["class_id"]] for one in result["detections"]]
        for result in heard
        if result["seq"] < WARM_UP + options.frames
    }
    figures = {
        "cpu_ms": (end.cpu_s - start.cpu_s) / frames * 1e3,
        "fps": frames / (end.at_s - start.at_s),
        "peak_rss_mb": rss_mb,
    }
    return Measured(figures, {index: seen.get(index, []) for index in range(WARM_UP + options.frames)})


def configuration(port: int, detector: Detector, video: Path, threads: int) -> str:
    """What a user would write, but for the number of threads and the film's pace."""
    labels = 'labels = "coco80"' if detector.head == "yolox" else ""
    return f"""
[agent]
device = "{DEVICE}"
[mqtt]
port = {port}
[model]
active = "bench"
[models.bench]
path = "{detector.path.resolve()}"
options = {{ head = "{detector.head}" }}
{labels}
[inference]
backend = "onnx"
max_batch = 1
score_threshold = {SCORE}
iou_threshold = {IOU}
[backends.onnx]
threads = {threads}
[snapshots]
on_start = false
[cameras.film]
source = "file"
path = "{video.resolve()}"
pace = "fast"
"""


@dataclass(frozen=True, slots=True)
class Mark:
    """The last frame whose result was heard, and what the agent had taken by then."""

    seq: int
    cpu_s: float
    at_s: float


def reached(seq: int, probe: Probe, running: AgentProcess) -> Mark:
    """Once the result of this frame was heard."""
    until = time.monotonic() + LONGEST_S
    while not (heard := probe.on("cameras/film/results")) or heard[-1].json()["seq"] < seq:
        if running.process.poll() is not None or time.monotonic() > until:
            raise SystemExit(f"the agent gave too few results; the end of its log:\n{running.text()[-1500:]}")
        time.sleep(0.05)
    clock = ~running.process.pid << 3 | 2  # as clock_getcpuclockid(3)
    mark = time.clock_gettime(clock), time.perf_counter()
    return Mark(probe.on("cameras/film/results")[-1].json()["seq"], *mark)


# What comes of it


def agreement(ones: Frames, others: Frames) -> float:
    """The share of all detections of either, in frames of both, that the other has too."""
    same = several = 0
    for index in ones.keys() & others.keys():
        ours, theirs = extended(ones[index]), extended(others[index])
        common = matched(ours, theirs)
        same += common
        several += len(ours) + len(theirs) - common
    return same / several if several else 0.0


def extended(rows: Sequence[Sequence[float]]) -> NDArray[Any]:
    """Those with some extent: the agent leaves out what lies beside the picture, and no place is the same as none."""
    found = np.array(rows, float).reshape(-1, 6)
    shown: NDArray[Any] = found[(found[:, 2:4] > found[:, :2]).all(1)]
    return shown


def matched(ours: NDArray[Any], theirs: NDArray[Any]) -> int:
    """How many pairs there are of one class, place and score; each detection is in one pair at most."""
    overlap = iou(ours[:, :4], theirs[:, :4])
    is_same = (
        (overlap >= SAME_IOU)
        & (ours[:, None, 5] == theirs[None, :, 5])
        & (np.abs(ours[:, None, 4] - theirs[None, :, 4]) <= SAME_SCORE)
    )
    overlap[~is_same] = 0
    pairs = 0
    while overlap.size and np.max(overlap) > 0:
        row, column = np.unravel_index(np.argmax(overlap), overlap.shape)
        overlap[row], overlap[:, column] = 0, 0
        pairs += 1
    return pairs


def measure(detector: Detector, video: Path, options: argparse.Namespace, notes: list[str]) -> Found:
    """The loop, the agent and the rivals in turn, in each repeat; in every other one the agent comes first."""
    found = Found()
    rivals = [rival for rival in RIVALS if options.rivals and detector.has_rivals]
    for repeat in range(options.repeats):
        runs = {"bare loop": bare_loop, "agent": agent}
        order = list(runs) if repeat % 2 == 0 else list(runs)[::-1]
        measured = {name: runs[name](detector, video, options) for name in order}
        for name in runs:
            found.add(name, measured[name], measured["bare loop"])
        for rival in list(rivals):
            for subject, threads in ((rival.name, options.threads), (f"{rival.name} as it comes", 0)):
                try:
                    theirs, found.versions[rival.name] = rival_loop(rival, detector, video, options, threads=threads)
                except (NotInstalled, LoopFailed, subprocess.TimeoutExpired) as failed:
                    notes.append(f"{rival.name} was not measured: {failed}")
                    rivals.remove(rival)
                    found.forget(rival.name)
                    break
                found.add(subject, theirs, measured["bare loop"])
    return found


def figures(detector: Detector, found: Found) -> Iterator[Figure]:
    """What is told of a detector: the agent with its bars, then the others."""
    bare = found.runs["bare loop"]
    for subject, values in found.runs.by_subject.items():
        if subject == "bare loop":
            continue
        is_ours = subject == "agent"
        told = partial(Figure, quick=is_ours and detector.quick)
        beside = partial(told, reference="bare loop")
        name = f"{detector.name}, {subject}"
        cpu_bar = detector.cpu_bar if is_ours else None
        yield beside(f"{name}: CPU a frame", "ms", values["cpu_ms"], beside=bare["cpu_ms"], bar=cpu_bar)
        yield beside(f"{name}: frames a second", "", values["fps"], beside=bare["fps"], better="more")
        yield beside(f"{name}: peak memory beside", "MB", values["peak_rss_mb"], beside=bare["peak_rss_mb"])
        if is_ours:
            yield told(f"{name}: peak memory", "MB", values["peak_rss_mb"], bar=MEMORY_BAR_MB)
        agree_bar = AGREE_BAR if is_ours else None
        yield told(f"{name}: detections that agree", "", values["agree"], bar=agree_bar, better="more")
        yield beside(f"{name}: detections a frame", "", values["boxes"], beside=bare["boxes"])


def detectors(options: argparse.Namespace, folder: Path) -> Sequence[Detector]:
    """Those that are wanted; the large one is made here."""
    if options.model is not None:
        if not options.model.is_file():
            raise SystemExit(f"--model: there is no file {options.model}")
        return [Detector(options.model.stem, options.model, options.head, None)]
    chosen = [
        Detector("YOLO 640", folder / "yolo.onnx", "dense", CPU_BAR, has_rivals=True),
        Detector("demo-320", ModelStore({}).get("demo-320").path, "dense", SMALL_CPU_BAR, quick=True),
    ]
    wanted = [one for one in chosen if options.only in (None, one.name)]
    if any(one.has_rivals for one in wanted):
        yolo_file(folder / "yolo.onnx")
    return wanted


def main() -> None:
    parser = _figures.arguments(__doc__, repeats=5)
    parser.add_argument("--frames", type=int, default=300, help="frames that are measured, after 30 of warm-up")
    parser.add_argument("--threads", type=int, default=1, help="of onnxruntime, for all")
    parser.add_argument("--only", choices=("YOLO 640", "demo-320"), help="one of the two detectors")
    parser.add_argument("--rivals", action="store_true", help="measure ultralytics and inference-models too")
    parser.add_argument("--model", type=Path, help="a detector of yours in their place")
    parser.add_argument("--head", choices=("dense", "yolox"), default="dense", help="of --model")
    parser.add_argument("--video", type=Path, help="a film of yours")
    options = parser.parse_args()
    if min(options.repeats, options.frames, options.threads) < 1:
        parser.error("--repeats, --frames and --threads are at least 1")
    if options.video is not None and not options.video.is_file():
        parser.error(f"--video: there is no file {options.video}")
    with tempfile.TemporaryDirectory() as name:
        with rigs_or_exit():
            found = report(options, Path(name))
        sys.exit(_figures.finish(found, options))


def report(options: argparse.Namespace, folder: Path) -> Report:
    """Measure all that is wanted."""
    machine = _figures.machine("onnxruntime", "opencv-python-headless", "numpy")
    wanted = detectors(options, folder)
    length = WARM_UP + options.frames + SPARE
    video = options.video or film(folder / "film.mp4", length)
    notes = [told_of(video, length, options)]
    all_found = {detector.name: measure(detector, video, options, notes) for detector in wanted}
    for found in all_found.values():
        notes += [AS_IT_COMES] if found.versions else []
        notes += [
            f"{name}: " + ", ".join(f"{k} {v}" for k, v in parts.items()) for name, parts in found.versions.items()
        ]
    return Report(
        "line",
        "The CPU line: from a film to results, beside a bare loop",
        _figures.command("line"),
        machine,
        [figure for detector in wanted for figure in figures(detector, all_found[detector.name])],
        notes,
    )


def told_of(video: Path, length: int, options: argparse.Namespace) -> str:
    """A sentence on the film and on what all loops have in common."""
    capture = cv2.VideoCapture(str(video), cv2.CAP_FFMPEG)
    width, height = (int(capture.get(key)) for key in (cv2.CAP_PROP_FRAME_WIDTH, cv2.CAP_PROP_FRAME_HEIGHT))
    count, fps = int(capture.get(cv2.CAP_PROP_FRAME_COUNT)), capture.get(cv2.CAP_PROP_FPS)
    decoders = int(capture.get(cv2.CAP_PROP_N_THREADS))
    capture.release()
    if not (width and fps):
        raise SystemExit(f"{video} is no film that OpenCV can read")
    if 0 < count < length:
        raise SystemExit(f"{video} has {count} frames; with --frames {options.frames} at least {length} are wanted")
    mbit_s = video.stat().st_size * 8 / 1e6 / max(1, count) * fps
    return (
        f"{width}x{height}, {mbit_s:.1f} Mbit/s; {options.frames} frames after {WARM_UP}, for rivals "
        f"{min(RIVALS_FRAMES, options.frames)}; onnxruntime with {options.threads} thread(s) that do not spin; "
        f"the decoder with OpenCV's own number for a file, in all of them ({decoders})"
    )


if __name__ == "__main__":
    main()
