"""The line with several batches on their way at once, and the buffers that travel along it."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from structlog.testing import capture_logs

from edge_agent.backends.fake import FakeOptions
from edge_agent.backends.onnx import OnnxEngine
from edge_agent.config import InferenceOptions
from edge_agent.data import Detections, Frame, ModelRef, Names, Result, Timings
from edge_agent.errors import EngineError, GpuOutOfMemory
from edge_agent.frames import FramePool
from edge_agent.messages import Topics
from edge_agent.models.loaded import Inferred, LoadedModel, open_model
from edge_agent.models.store import ModelStore
from edge_agent.pipeline import Reporter, infer
from edge_agent.pulse import Pulse
from edge_agent.queue import FrameQueue, QueueLimits
from edge_agent.stats import LineStats
from edge_agent.zones import Watch

STORE = ModelStore({})


def model(name: str = "demo-320", **options: Any) -> LoadedModel:
    backends = {"fake": FakeOptions(**options)}
    return open_model(STORE.get(name), backend="fake", backends=backends, inference=InferenceOptions(max_batch=2))


class Slot:
    """`ModelSlot` as the line sees it, with a change of models at a time of the test's choosing."""

    def __init__(self, *models: LoadedModel) -> None:
        self.models = list(models)
        self.swapped_with: list[int] = []
        self.is_wanted = False
        self.in_flight = lambda: 0

    @property
    def has_news(self) -> bool:
        return self.is_wanted

    def current(self) -> LoadedModel:
        if self.is_wanted:
            self.is_wanted = False
            self.swapped_with.append(self.in_flight())
            self.models.pop(0)
        return self.models[0]

    def judge(self, inferred: Inferred) -> None:
        """Every model is trusted."""

    def give_up(self, error: EngineError) -> bool:
        return False

    def close(self) -> None:
        """Nothing to free."""


def frame(index: int, camera: str = "a") -> Frame:
    return Frame(camera, index, np.zeros((4, 4, 3), np.uint8), time.time_ns(), time.monotonic_ns())


class Line:
    """`infer` over frames that wait already."""

    def __init__(self, slot: Slot, frames: Sequence[Frame]) -> None:
        self.released: list[int] = []
        self.results: list[Result] = []
        self.queue = FrameQueue()
        self.queue.add_camera("a", QueueLimits(max_frames=len(frames), max_staleness_ms=0))
        for one in frames:
            self.queue.put(one)
        self.slot = slot

    def report(self, results: Sequence[Result]) -> None:
        self.results += results
        if len(self.results) == 10:
            self.slot.is_wanted = len(self.slot.models) > 1

    def run(self) -> float:
        self.queue.close()
        began = time.monotonic()
        infer(self.queue, self.slot, self.report, release=lambda frame: self.released.append(frame.seq), pulse=Pulse())  # type: ignore[arg-type]
        return time.monotonic() - began


@pytest.mark.parametrize("depth", [1, 3])
def test_every_frame_comes_out_once_in_order_and_is_released(depth: int) -> None:
    line = Line(Slot(model(depth=depth)), [frame(i) for i in range(25)])
    line.run()
    assert [result.frame.seq for result in line.results] == list(range(25))
    assert line.released == list(range(25))


def test_batches_on_their_way_at_once_take_the_time_of_one() -> None:
    one = Line(Slot(model(depth=1, latency_ms=20)), [frame(i) for i in range(24)]).run()
    three = Line(Slot(model(depth=3, latency_ms=20)), [frame(i) for i in range(24)]).run()
    assert three < 0.6 * one


def test_models_change_only_when_no_batch_is_on_its_way() -> None:
    first, second = model(depth=3), model("demo-160", depth=3)
    slot = Slot(first, second)
    line = Line(slot, [frame(i) for i in range(40)])
    submitted, collected = 0, 0

    def counting(model: LoadedModel) -> None:
        submit, collect = model.submit, model.collect

        def counted_submit(batch: Any) -> Any:
            nonlocal submitted
            submitted += 1
            return submit(batch)

        def counted_collect(pending: Any) -> Any:
            nonlocal collected
            collected += 1
            return collect(pending)

        model.submit, model.collect = counted_submit, counted_collect  # type: ignore[method-assign]

    counting(first)
    counting(second)
    slot.in_flight = lambda: submitted - collected
    line.run()
    assert slot.swapped_with == [0]
    names = [result.model.name for result in line.results]
    assert names == sorted(names, reverse=True)  # demo-320, then demo-160
    assert set(names) == {"demo-320", "demo-160"}
    assert [result.frame.seq for result in line.results] == list(range(40))


def test_a_lone_frame_does_not_wait_for_others() -> None:
    slot, queue, results = Slot(model(depth=3)), FrameQueue(), []
    queue.add_camera("a", QueueLimits())
    came = threading.Event()

    def report(found: Sequence[Result]) -> None:
        results.extend(found)
        came.set()

    thread = threading.Thread(
        target=infer, args=(queue, slot, report), kwargs={"release": lambda frame: None, "pulse": Pulse()}
    )
    thread.start()
    try:
        queue.put(frame(0))
        assert came.wait(5)
    finally:
        queue.close()
        thread.join()
    assert len(results) == 1


def test_a_batch_without_gpu_memory_is_dropped_counted_and_told_once() -> None:
    full = model(depth=2)
    submit, tries = full.submit, iter(range(100))

    def submit_now_and_then(batch: Any) -> Any:
        if 2 <= next(tries) < 5:
            raise GpuOutOfMemory("cuMemAlloc", 2, "CUDA_ERROR_OUT_OF_MEMORY", "out of memory")
        return submit(batch)

    full.submit = submit_now_and_then  # type: ignore[method-assign]
    line = Line(Slot(full), [frame(i) for i in range(20)])
    with capture_logs() as logs:
        line.run()
    assert line.queue.drops("a") == {"no_memory": 6}
    assert [result.frame.seq for result in line.results] == [*range(4), *range(10, 20)]
    assert sorted(line.released) == list(range(20))
    assert [told["event"] for told in logs] == ["engine.out_of_memory"]


class Special(np.ndarray[Any, Any]):
    """An array of a kind of its own, as pinned memory is."""


def special(shape: tuple[int, ...]) -> Any:
    return np.empty(shape, np.uint8).view(Special)


def test_a_pool_lends_what_its_allocator_makes_and_lends_it_again() -> None:
    pool = FramePool(allocate=special)
    buffer = pool.take((4, 6, 3))
    assert isinstance(buffer, Special)
    pool.give(buffer)
    assert pool.take((4, 6, 3)) is buffer


def test_a_picture_from_elsewhere_ends_in_a_buffer_of_that_kind() -> None:
    pool = FramePool(allocate=special)
    for shape in ((4, 6, 3), (8, 2, 3)):  # as large as expected, and not
        buffer = pool.take((4, 6, 3))
        picture = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
        kept = pool.exchange(buffer, picture)
        assert isinstance(kept, Special)
        assert np.array_equal(kept, picture)
        pool.give(kept)


def test_the_cpu_engines_pool_copies_nothing() -> None:
    pool = FramePool(allocate=OnnxEngine.new_image)
    buffer, picture = pool.take((4, 6, 3)), np.zeros((4, 6, 3), np.uint8)
    assert pool.exchange(buffer, picture) is picture
    assert pool.take((4, 6, 3)) is buffer


def reporter(**options: Any) -> tuple[Reporter, list[dict[str, Any]]]:
    """A reporter, and the results that it publishes."""
    told: list[dict[str, Any]] = []

    class Shots:
        def offer(self, result: Result) -> None:
            """Nobody waits."""

    return Reporter(
        topics=Topics("edge", "rig"),
        publish=lambda message: told.append(json.loads(message.payload)),
        stats=LineStats(),
        snapshots=Shots(),  # type: ignore[arg-type]
        tracks=None,
        watch=Watch({}, lost_frames=1),
        inference=InferenceOptions(**options),
    ), told


def seen(at_s: float, camera: str = "a") -> Result:
    found = Detections(np.zeros((3, 4), np.float32), np.full(3, 0.9, np.float32), np.array([0, 1, 2]))
    shot = Frame(camera, 0, np.zeros((4, 4, 3), np.uint8), 0, int(at_s * 1e9))
    return Result(shot, ModelRef("m", "1", "detect", Names(("cat", "dog"))), found, Timings(0, 0, 0, 0, 0))


def test_only_the_classes_that_are_wanted_are_told() -> None:
    report, told = reporter(classes=["dog", "class_2", "nothing"])
    report([seen(0)])
    assert [one["label"] for one in told[0]["detections"]] == ["dog", "class_2"]


@pytest.mark.parametrize("fps", [7.0, 29.97, 240.0])
def test_results_come_no_faster_than_they_are_wanted_and_not_much_slower(fps: float) -> None:
    report, told = reporter(max_results_per_s=5.0)
    for number in range(int(20 * fps)):
        report([seen(number / fps), seen(number / fps, "b")])
    assert 2 * 20 * 5 * 0.93 <= len(told) <= 2 * (20 * 5 + 1)


def test_a_pool_keeps_no_more_idle_buffers_than_it_is_told() -> None:
    made: list[Any] = []

    def allocate(shape: tuple[int, ...]) -> Any:
        made.append(np.empty(shape, np.uint8))
        return made[-1]

    pool = FramePool(keep=lambda: 3, allocate=allocate)
    for _ in range(2):
        for buffer in [pool.take((2, 2, 3)) for _ in range(10)]:
            pool.give(buffer)
    assert len(made) == 10 + 7
