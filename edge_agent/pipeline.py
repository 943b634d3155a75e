"""The line itself: frames from the queue through the model into results."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence

import structlog

from edge_agent.data import Batch, Frame, Message, Result
from edge_agent.errors import GpuOutOfMemory
from edge_agent.messages import Topics, encode_event, encode_result
from edge_agent.model_slot import ModelSlot
from edge_agent.models.loaded import LoadedModel, Pending
from edge_agent.queue import FrameQueue
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
    window_s: float = 0.0,
) -> None:
    """The engine's thread: batches from the queue through the model, until the queue is closed and empty.

    As many batches as the model allows are on their way at once. Models change when none is; the last one is
    closed here, in the thread that ran it. A batch for which the GPU has no memory is dropped and counted.
    """
    under_way: deque[Pending] = deque()
    model: LoadedModel | None = None
    has_memory = True
    try:
        while True:
            if not under_way:
                model = slot.current()
            wanted = model.max_batch if model and not slot.has_news else 0
            batch = frames.take(wanted, window_s=window_s, wait=not under_way)
            if model and batch:
                try:
                    under_way.append(model.submit(batch))
                    has_memory = True
                except GpuOutOfMemory as error:
                    if has_memory:
                        log.error(
                            "engine.out_of_memory", reason=str(error), note="frames are dropped until it has some"
                        )
                    has_memory = False
                    _drop(batch, frames, release)
            if model and under_way and (not batch or len(under_way) >= model.depth):
                pending = under_way.popleft()
                report(model.collect(pending))
                for frame in pending.batch:
                    release(frame)
            elif not batch and frames.is_closed:
                return
    finally:
        slot.close()


def _drop(batch: Batch, frames: FrameQueue, release: Callable[[Frame], None]) -> None:
    for frame in batch:
        frames.count_drop(frame.camera, "no_memory")
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
    ) -> None:
        self._topics = topics
        self._publish = publish
        self._stats = stats
        self._snapshots = snapshots
        self._tracks = tracks
        self._watch = watch

    def __call__(self, results: Sequence[Result]) -> None:
        for seen in results:
            tracked = self._tracks(seen) if self._tracks is not None else seen
            result, events = self._watch(tracked)
            self._stats.record(result)
            self._snapshots.offer(result)
            self._publish(encode_result(result, self._topics))
            for event in events:
                self._publish(encode_event(event, self._topics))
