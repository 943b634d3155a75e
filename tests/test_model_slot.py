"""Models come and go in a running line: one at a time, on probation, beside the old one or in its place."""

from __future__ import annotations

import asyncio
import dataclasses
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import numpy as np
import pytest

from edge_agent.backends import Outcome, Ticket
from edge_agent.backends.fake import FakeEngine, FakeOptions
from edge_agent.config import InferenceOptions, ModelChoice, ModelOptions, PolicyOptions
from edge_agent.data import Frame, Image, Result
from edge_agent.errors import EngineError, GpuOutOfMemory, ModelError
from edge_agent.governor import Governor
from edge_agent.messages import ModelState
from edge_agent.model_slot import ModelSlot, Probation
from edge_agent.models import loading
from edge_agent.models.loaded import Inferred
from edge_agent.models.loading import ModelLoader, Wanted
from edge_agent.models.store import ModelStore
from edge_agent.pipeline import infer
from edge_agent.policy import Conditions
from edge_agent.pulse import Pulse
from edge_agent.queue import FrameQueue, QueueLimits
from edge_agent.threads import OwnerThread
from tests.fake_gpu import FakeTensorRt

FRAMES, SECONDS = 10, 5.0


class Line:
    """A slot, the thread that runs what is in it, and a camera of black pictures."""

    def __init__(self, folder: Path, loader: OwnerThread, **changes: Any) -> None:
        self.states: list[ModelState] = []
        self.results: list[Result] = []
        self.took: list[float] = []
        self.queue = FrameQueue()
        self.queue.add_camera("a", QueueLimits(max_frames=1000, max_staleness_ms=0))
        policy = PolicyOptions(**changes.pop("policy", {}))
        models, backend = changes.pop("models", {}), changes.pop("backend", "fake")
        fake = FakeOptions(**changes.pop("fake", {}))
        frames = changes.pop("probation", FRAMES)
        choice = ModelChoice(probation_frames=frames, probation_s=SECONDS, **changes)
        self.store = ModelStore(models, folder)
        self.loader = ModelLoader(
            self.store,
            backend=backend,
            backends={"fake": fake},
            engines=None,
            inference=InferenceOptions(max_batch=2),
            choice=choice,
            policy=policy,
        )
        self.slot = ModelSlot(
            self.loader,
            thread=loader,
            nudge=self.queue.nudge,
            choice=choice,
            on_change=lambda: self.states.append(self.slot.state),
            on_inferred=self.took.append,
        )
        self.policy = policy
        self._seq = 0
        self.released = 0

    def run(self) -> None:
        infer(self.queue, self.slot, self.results.extend, release=self._release, pulse=Pulse())

    def _release(self, frame: Frame) -> None:
        self.released += 1

    async def feed(self, count: int) -> None:
        """Frames, and their results."""
        before = len(self.results)
        for _ in range(count):
            image = np.zeros((8, 8, 3), np.uint8)
            self.queue.put(Frame("a", self._seq, image, time.time_ns(), time.monotonic_ns()))
            self._seq += 1
        await until(lambda: len(self.results) >= before + count)

    async def activate_while_fed(self, wanted: Wanted, **how: Any) -> Any:
        """The activation, with frames that keep coming."""
        task = asyncio.ensure_future(self.slot.activate(wanted, **how))
        while not task.done():
            if self.slot.active is not None and self.slot.state != "loading":
                await self.feed(1)
            await asyncio.sleep(0.002)
        return await task


async def until(condition: Callable[[], object]) -> None:
    with anyio.fail_after(10):
        while not condition():
            await asyncio.sleep(0.002)


@asynccontextmanager
async def running(folder: Path, **changes: Any) -> AsyncIterator[Line]:
    with OwnerThread("loader") as loader:
        line = Line(folder, loader, **changes)
        thread = threading.Thread(target=line.run)
        thread.start()
        try:
            yield line
        finally:
            line.queue.close()
            await asyncio.to_thread(thread.join)
            assert line.released == line._seq, "every frame comes back"


def with_line(folder: Path, test: Callable[[Line], Awaitable[None]], **changes: Any) -> None:
    async def main() -> None:
        async with running(folder, **changes) as line:
            await test(line)

    asyncio.run(main())


def names(line: Line) -> list[str]:
    return [result.model.name for result in line.results]


def test_a_first_model_runs_at_once_and_the_next_is_watched(tmp_path: Path) -> None:
    async def test(line: Line) -> None:
        first = await line.slot.activate(Wanted("demo-320"))
        assert (first.previous, first.probation_frames, first.pause_ms) == (None, 0, None)
        await line.feed(5)
        second = await line.activate_while_fed(Wanted("demo-160"))
        assert (second.previous, second.pause_ms) == ("demo-320", None)
        assert FRAMES <= second.probation_frames <= FRAMES + 2
        assert "probation" in line.states
        assert line.states[-1] == "ready"
        assert names(line) == sorted(names(line), reverse=True)
        assert len(line.results) / 2 <= len(line.took) <= len(line.results), (
            "each inference was told, of two frames at most"
        )

    with_line(tmp_path, test)


def test_without_frames_a_probation_ends_with_its_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.test_model_slot.SECONDS", 0.05)

    async def test(line: Line) -> None:
        await line.slot.activate(Wanted("demo-320"))
        done = await line.slot.activate(Wanted("demo-160"))
        assert done.probation_frames == 0
        assert line.slot.state == "ready"

    with_line(tmp_path, test)


def test_activations_run_one_after_the_other_and_the_last_one_stays(tmp_path: Path) -> None:
    async def test(line: Line) -> None:
        await line.slot.activate(Wanted("demo-320"))
        wanted = ["demo-160", "demo-320", "demo-160", "demo-pose"]
        tasks = [asyncio.ensure_future(line.slot.activate(Wanted(name))) for name in wanted]
        while not all(task.done() for task in tasks):
            await line.feed(1)
        done = [task.result() for task in tasks]
        assert [one.previous for one in done] == ["demo-320", "demo-160", "demo-320", "demo-160"]
        assert line.slot.active is not None
        assert line.slot.active.ref.name == "demo-pose"
        registry = line.store.registry()
        assert registry.active is not None
        assert registry.fallback is not None
        assert (registry.active.model, registry.fallback.model) == ("demo-pose", "demo-160")

    with_line(tmp_path, test)


def test_a_model_that_fails_on_probation_gives_its_frames_to_the_one_before(tmp_path: Path) -> None:
    async def test(line: Line) -> None:
        await line.slot.activate(Wanted("demo-320", "onnx"))
        await line.feed(3)
        with pytest.raises(
            ModelError, match=r"failed on probation, after \d frames: .*; demo-320 runs again"
        ) as caught:
            await line.activate_while_fed(Wanted("demo-160"))
        assert caught.value.code == "model_failed"
        await line.feed(3)
        seqs = [result.frame.seq for result in line.results]
        assert seqs == list(range(len(seqs))), "every frame once, in order"
        assert set(names(line)[-3:]) == {"demo-320"}
        assert "demo-160" in names(line)
        assert line.store.registry().active is not None
        assert line.store.registry().active.model == "demo-320"  # type: ignore[union-attr]

    with_line(tmp_path, test, fake={"fail_after": 1 + loading.MEASURED + 5})


@pytest.mark.parametrize("comes", [True, False])
def test_where_memory_is_short_the_old_model_is_closed_first_if_that_is_allowed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, comes: bool
) -> None:
    async def test(line: Line) -> None:
        await line.slot.activate(Wanted("demo-320"))

        def free(of_gpu: bool) -> loading._Free:
            return loading._Free(50.0, 1000.0 if comes and line.slot.active is None else 100.0)

        monkeypatch.setattr(loading, "_memory", free)
        with pytest.raises(ModelError, match=r"demo-160 needs .* MB \(estimated .*\), 100 MB are free") as caught:
            await line.slot.activate(Wanted("demo-160"))
        assert caught.value.code == "no_memory"
        await line.feed(2)
        assert set(names(line)) == {"demo-320"}
        if comes:
            done = await line.activate_while_fed(Wanted("demo-160"), swap="replace")
            assert done.pause_ms > 0
        else:
            with pytest.raises(ModelError, match="demo-160 needs"):
                await line.activate_while_fed(Wanted("demo-160"), swap="replace")
        await line.feed(2)
        assert names(line)[-1] == ("demo-160" if comes else "demo-320")
        assert line.slot.state == "ready"

    with_line(tmp_path, test, reserve_mb=500.0)


def test_a_model_that_cannot_be_loaded_leaves_the_old_one_and_is_told(tmp_path: Path) -> None:
    (tmp_path / "none.onnx").write_bytes(b"")

    async def test(line: Line) -> None:
        await line.slot.activate(Wanted("demo-320"))
        with pytest.raises(ModelError):
            await line.slot.activate(Wanted("empty"))
        assert line.slot.rejected is not None
        assert (line.slot.rejected.model, line.slot.rejected.code) == ("empty", "model_truncated")
        assert (line.slot.state, line.slot.next) == ("ready", None)
        await line.feed(2)

    with_line(tmp_path / "store", test, models={"empty": ModelOptions(path=str(tmp_path / "none.onnx"))})


def test_what_was_measured_is_kept_and_the_ladder_s_own_moves_replace_nothing(tmp_path: Path) -> None:
    async def test(line: Line) -> None:
        await line.slot.activate(Wanted("demo-320"))
        [first] = line.store.get("demo-320").entry.measured  # type: ignore[union-attr]
        assert first.where.backend == "fake"
        assert first.latency_ms.n == loading.MEASURED
        assert 0 < first.latency_ms.p50 <= first.latency_ms.p95 <= first.latency_ms.p99
        assert first.memory_mb.gpu_before is None
        assert first.memory_mb.rss_after > 0
        assert line.loader.measured_ms(Wanted("demo-320")) == first.latency_ms.p95
        assert line.loader.measured_ms(Wanted("demo-160")) is None
        await line.activate_while_fed(Wanted("demo-160"))
        await line.activate_while_fed(Wanted("demo-320", purpose="recovery"))
        assert line.store.get("demo-320").entry.measured == [first]  # type: ignore[union-attr]
        await line.activate_while_fed(Wanted("demo-160"))
        await line.activate_while_fed(Wanted("demo-320"))
        [now] = line.store.get("demo-320").entry.measured  # type: ignore[union-attr]
        assert now.at > first.at

    with_line(tmp_path, test)


def test_a_probation_ends_by_frames_by_time_and_by_slowness() -> None:
    now = [0.0]

    def inferred(ms: float, frames: int = 1) -> Inferred:
        return Inferred([None] * frames, ms)  # type: ignore[list-item]

    probation = Probation(frames=4, seconds=9, limit_ms=None, clock=lambda: now[0])
    probation.record(inferred(1e6, 2))
    assert not probation.is_over()
    probation.record(inferred(1e6, 2))
    assert probation.is_over()
    assert probation.failure is None

    probation = Probation(frames=4, seconds=9, limit_ms=None, clock=lambda: now[0])
    now[0] = 9.0
    assert probation.is_over()

    probation = Probation(frames=1000, seconds=9, limit_ms=50, clock=lambda: now[0])
    for ms in [49.0] * 30 + [60.0]:
        probation.record(inferred(ms))
        assert not probation.is_over()
    probation.record(inferred(60))
    probation.record(inferred(60))
    assert probation.failure is not None
    assert probation.failure.code == "model_too_slow"


async def a_second(line: Line, governor: Governor, now: list[float], latency_ms: float) -> None:
    """Ten inferences that took so long, by a clock in `now`, and a look of the governor."""
    for _ in range(10):
        now[0] += 0.1
        governor.record(latency_ms)
    step = asyncio.ensure_future(governor.step())
    while not step.done():
        if line.slot.state == "probation":
            await line.feed(1)
        await asyncio.sleep(0.001)
    await step


def test_the_governor_steps_down_and_up_again_and_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By its own clock; the models' latencies are what the test says they are."""
    now = [1000.0]
    seen = Conditions("thermal throttling: gpu-throttle-alert 1")

    async def test(line: Line) -> None:
        with OwnerThread("chores") as chores:
            changes: list[str] = []
            governor = Governor(
                line.slot,
                loader=line.loader,
                store=line.store,
                options=line.policy,
                chores=chores,
                conditions=lambda: seen,
                on_change=lambda: changes.append(governor.status.state),
                clock=lambda: now[0],
            )

            second = partial(a_second, line, governor, now)

            await line.slot.activate(Wanted("demo-320"))
            await second(10)
            assert governor.status.state == "ok"
            assert governor.status.models == ["demo-320", "demo-160"]
            for _ in range(20):
                await second(80)
            assert (governor.status.state, governor.status.rung, governor.status.cause) == (
                "stepped_down",
                1,
                "thermal",
            )
            assert "the limit is 50 ms; thermal throttling" in (governor.status.reason or "")
            assert line.slot.running == Wanted("demo-160", None, None, "relief")
            registry = line.store.registry()
            assert registry.active is not None
            assert registry.active.model == "demo-320", "the ladder's moves are not remembered"
            for _ in range(80):
                await second(1)
            assert governor.status.rung == 1, "not while it throttles"
            nonlocal seen
            seen = Conditions()
            for _ in range(80):
                await second(0.01)
            assert (governor.status.state, governor.status.rung) == ("ok", 0)
            assert governor.status.cause == "recovered"
            assert changes == ["ok", "stepped_down", "ok"]
            for _ in range(40):
                await second(80)
            assert governor.status.state == "floor"

    with_line(tmp_path, test, policy={"enabled": True, "ladder": ["demo-160"]})


def test_on_a_gpu_its_memory_is_measured_asked_for_and_given_back(fake_gpu: FakeTensorRt, tmp_path: Path) -> None:
    """By a fake GPU; `tests/gpu` does it on a real one."""
    plans = {name: tmp_path / f"{name}.engine" for name in ("demo-320", "demo-160")}  # run as they are
    for name, plan in plans.items():
        plan.write_bytes(ModelStore({}).get(name).path.read_bytes())
        plan.chmod(0o600)

    async def test(line: Line) -> None:
        def used() -> int:
            return sum(len(memory) for memory in fake_gpu.driver.device.values())

        await line.slot.activate(Wanted("demo-320"))
        await line.feed(4)
        first = used()
        for _ in range(5):
            done = await line.activate_while_fed(Wanted("demo-160"))
            assert done.measured.memory_mb.gpu > 0
            assert used() < first
            await line.activate_while_fed(Wanted("demo-320"))
            assert used() <= first
        free, total = fake_gpu.driver.cuMemGetInfo()[1:]
        fake_gpu.driver.total = int(total - free + 0.1 * first)
        with pytest.raises(ModelError, match=r"demo-160 needs .* MB \(measured here\)") as caught:
            await line.slot.activate(Wanted("demo-160"))
        assert caught.value.code == "no_memory"
        done = await line.activate_while_fed(Wanted("demo-160"), swap="replace")
        assert done.pause_ms > 0
        await line.feed(2)

    models = {name: ModelOptions(path=str(plan)) for name, plan in plans.items()}
    with_line(tmp_path / "store", test, models=models, backend="tensorrt", reserve_mb=0.0)


class Refusing(FakeEngine):
    """An engine that has no memory, or fails, when it is given its first batches after it was measured."""

    error: EngineError = GpuOutOfMemory("fake", 2, "CUDA_ERROR_OUT_OF_MEMORY", "as told")

    def submit(self, images: Sequence[Image]) -> Ticket:
        self._given = getattr(self, "_given", 0) + 1
        if self._given > 1 + loading.MEASURED + 3:
            raise self.error
        return super().submit(images)


class Breaking(Refusing):
    error = EngineError("it breaks, as told")


@pytest.mark.parametrize("engine", ["Refusing", "Breaking"])
def test_a_model_that_takes_no_batch_on_probation_is_taken_back_too(tmp_path: Path, engine: str) -> None:
    async def test(line: Line) -> None:
        await line.slot.activate(Wanted("demo-320"))
        with pytest.raises(ModelError, match="demo-320 runs again"):
            await line.activate_while_fed(Wanted("demo-160", f"tests.test_model_slot:{engine}"))
        await line.feed(3)
        seqs = [result.frame.seq for result in line.results]
        assert seqs == list(range(len(seqs)))

    with_line(tmp_path, test)


class Tired(FakeEngine):
    """An engine with several batches on their way: slow at work, and broken in the batch after its verdict."""

    def __init__(self, path: Path, options: FakeOptions) -> None:
        super().__init__(path, FakeOptions(depth=3))

    def collect(self, ticket: Ticket) -> Outcome:
        self._taken = getattr(self, "_taken", 0) + 1
        if self._taken > 3 + loading.MEASURED + 20:
            raise EngineError("broken, as told")
        outcome = super().collect(ticket)
        return dataclasses.replace(outcome, inference_ms=500.0 if self._taken > 3 + loading.MEASURED else 0.1)


def test_what_fails_after_the_verdict_is_taken_back_as_well(tmp_path: Path) -> None:
    async def test(line: Line) -> None:
        await line.slot.activate(Wanted("demo-320"))
        task = asyncio.ensure_future(line.slot.activate(Wanted("demo-160", "tests.test_model_slot:Tired")))
        await until(lambda: line.slot.state == "probation")
        await line.feed(60)
        with pytest.raises(ModelError, match="more than 75 ms; demo-320 runs again"):
            await task
        await line.feed(3)
        assert sorted(result.frame.seq for result in line.results) == list(range(63))

    with_line(tmp_path, test, policy={"enabled": True}, probation=1000)


def test_few_inferences_are_enough_to_see_that_a_model_is_slow() -> None:
    probation = Probation(frames=60, seconds=9, limit_ms=75)
    for _ in range(15):
        probation.record(Inferred([None] * 4, 500.0))  # type: ignore[list-item]
    assert probation.is_over()
    assert probation.failure is not None


def test_a_disk_that_is_full_keeps_no_model_from_running(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: object, **options: object) -> None:
        raise ModelError("the disk is full", code="disk_full")

    monkeypatch.setattr(ModelStore, "record", full)
    monkeypatch.setattr(ModelStore, "choose", full)

    async def test(line: Line) -> None:
        await line.slot.activate(Wanted("demo-320"))
        await line.activate_while_fed(Wanted("demo-160"))
        await line.feed(2)

    with_line(tmp_path, test)


def test_a_slow_model_may_start_but_not_take_over(tmp_path: Path) -> None:
    slow = {"slow": ModelOptions(path=str(ModelStore({}).get("demo-160").path), max_latency_ms=0.5)}

    async def test(line: Line) -> None:
        await line.slot.activate(Wanted("slow", purpose="start"))
        await line.activate_while_fed(Wanted("demo-320"))
        with pytest.raises(ModelError) as caught:
            await line.slot.activate(Wanted("slow"))
        assert caught.value.code == "model_too_slow"

    with_line(tmp_path, test, models=slow, fake={"latency_ms": 2.0})


def test_other_rules_leave_the_ladder_on_its_rung(tmp_path: Path) -> None:
    now = [1000.0]

    async def test(line: Line) -> None:
        with OwnerThread("chores") as chores:
            governor = Governor(
                line.slot,
                loader=line.loader,
                store=line.store,
                options=line.policy,
                chores=chores,
                conditions=Conditions,
                clock=lambda: now[0],
            )

            second = partial(a_second, line, governor, now)

            await line.slot.activate(Wanted("demo-320"))
            for _ in range(20):
                await second(80)
            assert governor.status.rung == 1
            governor.change(PolicyOptions(enabled=True, ladder=["demo-160", "demo-cls"], max_latency_ms=60))
            await second(1)
            assert governor.status.models == ["demo-320", "demo-160", "demo-cls"]
            assert governor.status.rung == 1
            await line.activate_while_fed(Wanted("demo-160", purpose="relief"), remember=False)  # loaded anew
            await second(1)
            assert (governor.status.rung, governor.status.models[0]) == (1, "demo-320")
            await line.activate_while_fed(Wanted("demo-cls"))
            await second(1)
            assert (governor.status.rung, governor.status.models) == (0, ["demo-cls"])

    with_line(tmp_path, test, policy={"enabled": True, "ladder": ["demo-160"]})
