"""The line itself: frames from the queue through the model into results."""

from __future__ import annotations

import dataclasses
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence

import numpy as np
import structlog

from edge_agent.config import InferenceOptions
from edge_agent.data import Batch, Detections, Frame, Message, Poses, Result
from edge_agent.errors import EngineError, GpuLost, GpuOutOfMemory
from edge_agent.messages import Topics, encode_event, encode_result
from edge_agent.model_slot import ModelSlot
from edge_agent.models.loaded import LoadedModel, Pending
from edge_agent.predictions import chosen, label
from edge_agent.pulse import Pulse
from edge_agent.queue import DropCause, FrameQueue
from edge_agent.snapshots import Snapshots
from edge_agent.stats import LineStats
from edge_agent.tracking import Tracks
from edge_agent.zones import Watch

log = structlog.get_logger()


def infer(
    frames: FrameQueue,
    slot: ModelSlot,
    report: Callable[[Sequence[Result]], None],
    *,
    release: Callable[[Frame], None],
    pulse: Pulse,
    window_s: float = 0.0,
) -> None:
    """The engine's thread: batches from the queue through the model, until the queue is closed and empty.

    As many batches as the model allows are on their way at once. Models change when none is; the last one is
    closed here, in the thread that ran it. `pulse` shows that the work goes on. What a model on probation failed in
    goes through the one before it. A batch for which the GPU has no memory is dropped and counted.
    """
    under_way: deque[Pending] = deque()
    again: deque[Frame] = deque()
    model: LoadedModel | None = None
    has_memory = True
    try:
        while True:
            if not under_way:
                model = slot.current()
            wanted = model.max_batch if model and not slot.has_news else 0
            batch: Batch = [again.popleft() for _ in range(min(wanted, len(again)))]
            if not batch:
                pulse.beat() if under_way else pulse.rest()
                free = model.depth - len(under_way) if model else 1
                batch = frames.take(wanted, window_s=window_s, wait=not under_way, batches=free)
            pulse.beat()
            if model and batch:
                try:
                    under_way.append(model.submit(batch))
                    has_memory = True
                except EngineError as error:
                    if _is_taken_back(error, slot):
                        _again(again, under_way, batch)
                        continue
                    if not isinstance(error, GpuOutOfMemory):
                        raise
                    if has_memory:
                        log.error(
                            "engine.out_of_memory", reason=str(error), note="frames are dropped until it has some"
                        )
                    has_memory = False
                    _drop(batch, "no_memory", frames, release)
            if model and under_way and (not batch or len(under_way) >= model.depth):
                try:
                    inferred = model.collect(under_way[0])
                except EngineError as error:
                    if not _is_taken_back(error, slot):
                        raise
                    _again(again, under_way)
                    continue
                slot.judge(inferred)
                report(inferred.results)
                for frame in under_way.popleft().batch:
                    release(frame)
            elif not batch and frames.is_closed:
                return
    finally:
        _drop(again, "shutdown", frames, release)
        for frame in (frame for pending in under_way for frame in pending.batch):
            frames.count_drop(frame.camera, "shutdown")  # not released: a GPU that is lost may still read it
        slot.close()


def _is_taken_back(error: EngineError, slot: ModelSlot) -> bool:
    """Whether the model before takes over what this one has failed in."""
    return not isinstance(error, GpuLost) and slot.give_up(error)


def _again(again: deque[Frame], under_way: deque[Pending], batch: Batch = ()) -> None:
    """What was on its way, and `batch` after it, goes through another model, before what waits for that already."""
    again.extendleft(reversed([*(frame for pending in under_way for frame in pending.batch), *batch]))
    under_way.clear()


def _drop(batch: Iterable[Frame], cause: DropCause, frames: FrameQueue, release: Callable[[Frame], None]) -> None:
    for frame in batch:
        frames.count_drop(frame.camera, cause)
        release(frame)


class Reporter:
    """Follows what results show, counts and publishes them, and shows them to those who wait for a picture.

    In the engine's thread.
    """

    def __init__(
        self,
        *,
        topics: Topics,
        publish: Callable[[Message], None],
        stats: LineStats,
        snapshots: Snapshots,
        tracks: Tracks | None,
        watch: Watch,
        inference: InferenceOptions,
    ) -> None:
        self._topics = topics
        self._publish = publish
        self._stats = stats
        self._snapshots = snapshots
        self._tracks = tracks
        self._watch = watch
        self._due: dict[str, float] = {}
        self.inference = inference
        """What is told, and how often; may be replaced at any time."""

    def __call__(self, results: Sequence[Result]) -> None:
        self._stats.record_batch(len(results))
        for one in results:
            seen = self._of_wanted_classes(one)
            tracked = self._tracks(seen) if self._tracks is not None else seen
            result, events = self._watch(tracked)
            self._stats.record(result)
            self._snapshots.offer(result)
            if self._is_due(result):
                self._publish(self._encoded(result))
            for event in events:
                self._publish(encode_event(event, self._topics))

    def _encoded(self, result: Result) -> Message:
        began_ns = time.monotonic_ns()
        message = encode_result(result, self._topics)
        self._stats.record_encoding((time.monotonic_ns() - began_ns) / 1e6)
        return message

    def _of_wanted_classes(self, result: Result) -> Result:
        wanted, seen = self.inference.classes, result.prediction
        if not wanted or not isinstance(seen, (Detections, Poses)):
            return result
        names = result.model.names
        places = [i for i, class_id in enumerate(seen.class_ids.tolist()) if label(names, class_id) in wanted]
        return dataclasses.replace(result, prediction=chosen(seen, np.array(places, np.intp)))

    def _is_due(self, result: Result) -> bool:
        """Whether as much time has passed since the camera's last result as its rate wants, by the frames' own."""
        rate, camera, at_s = self.inference.max_results_per_s, result.frame.camera, result.frame.captured_mono_ns / 1e9
        due = self._due.get(camera, at_s)
        if rate == 0:
            return True
        if at_s < due:
            return False
        self._due[camera] = max(due, at_s - 1 / rate) + 1 / rate  # one that is late makes the next come early, no more
        return True
