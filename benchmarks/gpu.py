"""What the line on the GPU makes of an engine's own speed: frames a second beside the bare engine, in one run.

`python -m benchmarks.gpu [--repeats N] [--json FILE] [--folder DIR] [--level N] [--frames N]`. Needs a GPU, TensorRT,
onnxruntime and onnx. A detector of YOLOv8n's size (networks.py), FP16; 1920x1080 BGR frames in memory become `Result`s:
upload, letterbox, inference, reduction, download, NMS, decoding. The bare engine is its execution alone, captured as a
CUDA graph and replayed on one stream. All are in one process, as the GPU's memory is, and measured in turn in each
repeat.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from benchmarks._figures import Figure, Report, arguments, command, finish, machine
from benchmarks.networks import yolo_sized
from edge_agent import cuda
from edge_agent.backends import _trt
from edge_agent.backends.tensorrt import TensorRtEngine, TensorRtOptions
from edge_agent.config import InferenceOptions, ModelOptions
from edge_agent.data import Frame
from edge_agent.errors import EdgeAgentError
from edge_agent.frames import new_image
from edge_agent.models.engines import Engines
from edge_agent.models.loaded import LoadedModel, open_model
from edge_agent.models.store import StoredModel
from edge_agent.sources.world import World

WARM_UP = 30
RATIO_BAR, CPU_BAR_US, BATCH_BAR = 1.0, 300.0, 1.0


@dataclass
class Measured:
    """One way to run the line, and what it came to in each repeat."""

    name: str
    batch: int
    model: LoadedModel
    frames: Sequence[Frame]
    fps: list[float] = field(default_factory=list)
    ratio: list[float] = field(default_factory=list)
    cpu_us: list[float] = field(default_factory=list)
    results: int = 0
    detections: int = 0

    def run(self, count: int, bare_fps: float) -> None:
        self._pass(WARM_UP)
        cpu, began = time.process_time(), time.perf_counter()
        frames = self._pass(count)
        elapsed = time.perf_counter() - began
        self.cpu_us.append((time.process_time() - cpu) / frames * 1e6)
        self.fps.append(frames / elapsed)
        self.ratio.append(self.fps[-1] / bare_fps)

    def _pass(self, count: int) -> int:
        under_way: deque[Any] = deque()
        done = 0
        for turn in range(-(-count // self.batch)):
            batch = [self.frames[(turn * self.batch + i) % len(self.frames)] for i in range(self.batch)]
            under_way.append(self.model.submit(batch))
            if len(under_way) == self.model.depth:
                done += self._take(under_way.popleft())
        while under_way:
            done += self._take(under_way.popleft())
        return done

    def _take(self, pending: Any) -> int:
        results = self.model.collect(pending).results
        self.results += len(results)
        self.detections += sum(len(result.prediction) for result in results)
        return len(results)

    def line(self) -> str:
        ratio, fps, cpu = (statistics.median(values) for values in (self.ratio, self.fps, self.cpu_us))
        spread = max(self.ratio) - min(self.ratio)
        seen = self.detections / self.results
        return f"{self.name:42} {fps:8.0f} {ratio:7.2f} {spread:7.2f} {cpu:9.0f} {seen:8.1f}"


class BareEngine:
    """The engine's execution and nothing else, as a graph on one stream."""

    def __init__(self, path: Path, options: TensorRtOptions, batch: int) -> None:
        trt = _trt.library(options.library)
        self._gpu = cuda.open_gpu()
        self._held = [*_trt.deserialize(trt, path)]
        engine = self._held[1]
        self._context = engine.create_execution_context()
        self._stream = cuda.Stream()
        self._context.set_input_shape("images", (batch, 3, 640, 640))
        for name, nbytes in (("images", batch * 3 * 640 * 640 * 4), ("output0", batch * 84 * 8400 * 4)):
            memory = cuda.DeviceMemory(nbytes)
            self._stream.clear(memory.address, nbytes)
            self._held.append(memory)
            self._context.set_tensor_address(name, memory.address)
        self._work()
        self._stream.synchronize()
        self._graph = self._stream.capture(self._work)
        self._batch = batch

    def fps(self, count: int) -> float:
        for _ in range(WARM_UP):
            self._graph.launch(self._stream)
        self._stream.synchronize()
        began = time.perf_counter()
        for _ in range(-(-count // self._batch)):
            self._graph.launch(self._stream)
        self._stream.synchronize()
        return count / (time.perf_counter() - began)

    def _work(self) -> None:
        assert self._context.execute_async_v3(self._stream.address)


def frames(count: int, *, pinned: bool) -> Sequence[Frame]:
    world = World(width=1920, height=1080, seed=5)
    made = []
    for index in range(count):
        image = (TensorRtEngine.new_image if pinned else new_image)((1080, 1920, 3))
        world.draw(index, image)
        assert (cuda.pinned_memory(image) is not None) == pinned
        now = time.monotonic_ns()
        made.append(Frame("bench", index, image, time.time_ns(), now))
    return made


def compared(ways: Sequence[Measured], bare_fps: Sequence[float], bare_eight_fps: Sequence[float]) -> list[Figure]:
    """Each way beside the bare engine; the first is what the agent does unless told otherwise, and has the bars."""
    first, *others = ways
    figures = [
        Figure(first.name, "frames/s", first.fps, "bare engine", bare_fps, RATIO_BAR, "more"),
        Figure(f"{first.name}: CPU a frame", "µs", first.cpu_us, bar=CPU_BAR_US),
    ]
    figures += [Figure(way.name, "frames/s", way.fps, "bare engine", bare_fps, better="more") for way in others]
    for way in others:
        if way.batch > 1:
            figures += [
                Figure(way.name, "frames/s", way.fps, "batch 1", first.fps, BATCH_BAR, "more"),
                Figure(way.name, "frames/s", way.fps, "bare engine, batch 8", bare_eight_fps, better="more"),
            ]
    return figures


def main() -> None:
    parser = arguments(__doc__, repeats=5)
    parser.add_argument("--folder", type=Path, default=Path("benchmarks/out/gpu"))
    parser.add_argument("--level", type=int, default=0, help="builder_optimization_level")
    parser.add_argument("--frames", type=int, default=600)
    parser.add_argument("--batch-8", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--own-tactics", action="store_true", help="build without cuBLAS and cuDNN")
    options = parser.parse_args()
    if options.repeats < 1 or options.frames < 1:
        parser.error("--repeats and --frames must be more than 0")
    try:
        gpu, trt = cuda.open_gpu(), _trt.library()
    except EdgeAgentError as error:
        raise SystemExit(str(error)) from None
    about = machine("onnxruntime")
    folder: Path = options.folder
    folder.mkdir(parents=True, exist_ok=True)
    onnx = yolo_sized(folder / "yolo_sized.onnx")
    tactics = [name for name in dir(trt.TacticSource) if name.isupper() and not name.startswith("CU")]
    base = TensorRtOptions(
        engines=str(folder / "engines"),
        optimization_level=options.level,
        tactic_sources=tactics if options.own_tactics else [],
        agreement=0.0,
    )
    stored = StoredModel("yolo-sized", "config", ModelOptions(path=str(onnx), options={"head": "dense"}), None)
    one = InferenceOptions(max_batch=1, score_threshold=0.3)
    eight = InferenceOptions(max_batch=8, score_threshold=0.3)
    for_eight = msgspec.structs.replace(base, optimize_for_batch=8)

    def opened(inference: InferenceOptions, **changes: Any) -> LoadedModel:
        changed = msgspec.structs.replace(for_eight if inference is eight else base, **changes)
        return open_model(stored, backend="tensorrt", backends={"tensorrt": changed}, inference=inference)

    path = Engines(base).get(stored, one)
    bare = BareEngine(path, base, 1)
    bare_eight = BareEngine(Engines(for_eight).get(stored, eight), for_eight, 8) if options.batch_8 else None
    pinned, pageable = frames(8, pinned=True), frames(8, pinned=False)
    ways = [
        Measured("depth 3, graph, pinned, all on the GPU", 1, opened(one), pinned),
        Measured("depth 2", 1, opened(one, depth=2), pinned),
        Measured("depth 1", 1, opened(one, depth=1), pinned),
        Measured("depth 4", 1, opened(one, depth=4), pinned),
        Measured("no graph", 1, opened(one, graph=False), pinned),
        Measured("pageable frames (copied on the host)", 1, opened(one), pageable),
        Measured("mapped frames (no upload)", 1, opened(one, upload="mapped"), pinned),
        Measured("pre-processing on the CPU", 1, opened(one, preprocess="cpu"), pinned),
        Measured("reduction on the CPU", 1, opened(one, reduce="cpu"), pinned),
        Measured("both on the CPU, depth 1", 1, opened(one, preprocess="cpu", reduce="cpu", depth=1), pinned),
    ]
    if options.batch_8:
        ways.append(Measured("batch 8, depth 3", 8, opened(eight), pinned))
    bare_fps: list[float] = []
    bare_eight_fps: list[float] = []
    for _ in range(options.repeats):
        bare_fps.append(bare.fps(2 * options.frames))
        if bare_eight is not None:
            bare_eight_fps.append(bare_eight.fps(2 * options.frames))
        for way in ways:
            way.run(options.frames, bare_fps[-1])
    print(f"{'the line, 1920x1080 BGR to results':42} frames/s   ratio  spread  CPU us/f  boxes/f")
    for way in ways:
        print(way.line())
        way.model.close()
    about["gpu"] = f"{gpu.name}, driver {gpu.driver_version}, {_trt.name_of(trt)}"
    notes = [
        f"1920x1080 BGR to results; optimisation level {options.level}, {options.frames} frames a repeat; "
        f"agreement with the ONNX file: {Engines(base).sidecar(path).agreement}."
    ]
    series = {
        "ways": [way.name for way in ways],
        "fps": [way.fps for way in ways],
        "cpu_us": [way.cpu_us for way in ways],
        "boxes": [way.detections / way.results for way in ways],
        "bare_fps": bare_fps,
        "bare_batch_8_fps": bare_eight_fps,
    }
    figures = compared(ways, bare_fps, bare_eight_fps)
    report = Report("gpu", "The line on the GPU beside the bare engine", command("gpu"), about, figures, notes, series)
    raise SystemExit(finish(report, options))


if __name__ == "__main__":
    main()
