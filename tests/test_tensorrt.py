"""The TensorRT engine's own doing, on a fake GPU that checks every address: graphs, slots, memory, faults.

What a real GPU and a real TensorRT make of the same calls is shown in `tests/gpu`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from structlog.testing import capture_logs

from edge_agent.backends import Engine
from edge_agent.backends.onnx import OnnxEngine, OnnxOptions
from edge_agent.backends.tensorrt import TensorRtEngine, TensorRtOptions
from edge_agent.config import InferenceOptions, ModelOptions
from edge_agent.data import PreprocessSpec, Reduction
from edge_agent.errors import CudaError, EngineError, GpuLost, GpuOutOfMemory, ModelError
from edge_agent.families import _dense
from edge_agent.models.loaded import open_model
from edge_agent.models.store import ModelStore, StoredModel
from edge_agent.sources.world import World
from tests.fake_gpu import FakeTensorRt

MODEL = ModelStore({}).get("demo-160").path
SPEC = PreprocessSpec(160, 160)
HEAD = Reduction("output0", rows_first=True, has_objectness=False, threshold=0.4, max_candidates=1000)
SCORES_OFF = 0.05
"""Most that a score may differ: some builds of OpenCV round halves down, the kernel up. What that may amount to in the
picture itself, one level of 255, is held by `twins.py`."""
SIZES = ((96, 128), (270, 480), (160, 160), (33, 57))


def pictures(sizes: Sequence[tuple[int, int]] = SIZES, *, pinned: bool = True) -> list[NDArray[np.uint8]]:
    made = []
    for index, (height, width) in enumerate(sizes):
        image = TensorRtEngine.new_image((height, width, 3)) if pinned else np.empty((height, width, 3), np.uint8)
        World(width=width, height=height, seed=index).draw(5, image)
        made.append(image)
    return made


@contextmanager
def opened(
    plan: Path = MODEL, spec: PreprocessSpec = SPEC, *, max_batch: int = 4, **options: Any
) -> Iterator[TensorRtEngine]:
    prepared = {name: options.pop(name) for name in ("reduction", "constants") if name in options}
    engine = TensorRtEngine(plan, TensorRtOptions(**options))
    try:
        engine.prepare(spec, max_batch=max_batch, **prepared)
        yield engine
    finally:
        engine.close()


def run(engine: Engine, images: Sequence[NDArray[np.uint8]], output: str = "output0") -> NDArray[Any]:
    return np.array(engine.collect(engine.submit(images)).tensors[output])


@pytest.fixture
def cpu() -> OnnxEngine:
    engine = OnnxEngine(MODEL, OnnxOptions())
    engine.prepare(SPEC, max_batch=4)
    return engine


@pytest.mark.parametrize("pinned", [True, False], ids=["pinned", "pageable"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"depth": 1},
        {"graph": False},
        {"upload": "mapped"},
        {"preprocess": "cpu"},
        {"preprocess": "cpu", "graph": False},
    ],
)
def test_however_it_is_run_it_gives_what_the_cpu_gives(
    fake_gpu: FakeTensorRt, cpu: OnnxEngine, options: dict[str, Any], pinned: bool
) -> None:
    with opened(**options) as engine:
        images = pictures(pinned=pinned)
        for batch in (*([image] for image in (*images, *images)), images[:3], images, images[1:3], images[:1]):
            assert np.abs(run(engine, batch) - run(cpu, batch))[:, 4:].max() < SCORES_OFF
        del images, batch


def test_one_graph_serves_pictures_of_all_sizes_and_each_batch_size_has_its_own(fake_gpu: FakeTensorRt) -> None:
    driver = fake_gpu.driver
    with opened(depth=1) as engine:
        for _ in range(3):
            for image in pictures():
                run(engine, [image])
        assert (driver.captures, driver.replays) == (1, 11)
        run(engine, pictures()[:2])
        run(engine, pictures()[2:])
        assert (driver.captures, driver.replays) == (2, 12)
        run(engine, pictures()[:1])
        assert driver.captures == 2


def test_a_frame_in_pinned_memory_is_uploaded_from_where_it_lies(fake_gpu: FakeTensorRt) -> None:
    with opened(depth=1) as engine:
        run(engine, pictures())
        before = set(fake_gpu.driver.pinned)
        frames = pictures()
        own = set(fake_gpu.driver.pinned) - before
        run(engine, frames)
        assert len(own) == len(frames)
        assert set(fake_gpu.driver.pinned) - before == own, "no other pinned memory was needed"
        del frames


def test_on_an_integrated_gpu_nothing_is_uploaded(fake_gpu: FakeTensorRt, cpu: OnnxEngine) -> None:
    fake_gpu.driver.is_integrated = True
    with opened(depth=1) as engine:
        image = pictures()[1]
        before = fake_gpu.driver.cuMemGetInfo()[1]
        assert np.abs(run(engine, [image]) - run(cpu, [image]))[:, 4:].max() < SCORES_OFF
        assert fake_gpu.driver.cuMemGetInfo()[1] == before, "no memory on the device for the picture"
        del image


def test_memory_that_a_graph_names_stays_until_it_names_another(fake_gpu: FakeTensorRt) -> None:
    """Freed and pinned again at the same address, it once crashed the driver."""
    with opened(depth=1) as engine:
        for image in pictures():
            ticket = engine.submit([image])
            address = image.ctypes.data
            del image
            assert address in fake_gpu.driver.pinned
            engine.collect(ticket)


def test_the_gpus_reduction_leaves_what_numpy_leaves_of_the_same_outputs(fake_gpu: FakeTensorRt) -> None:
    with opened() as raw, opened(reduction=HEAD) as reducing, opened(reduction=HEAD, reduce="cpu") as unreduced:
        for count in (1, 3, 4, 2):
            images = pictures()[:count]
            wanted = _dense.reduce(run(raw, images), HEAD)
            outcome = reducing.collect(reducing.submit(images))
            assert outcome.candidates is not None
            assert sum(len(found) for found in wanted) > 0
            for a, b in zip(outcome.candidates, wanted, strict=True):
                assert np.array_equal(a.cells, b.cells)
                assert np.array_equal(a.boxes, b.boxes)
                assert np.array_equal(a.scores, b.scores)
                assert np.array_equal(a.class_ids, b.class_ids)
            assert unreduced.collect(unreduced.submit(images)).candidates is None
            del images


def test_batches_in_flight_do_not_touch_each_other(fake_gpu: FakeTensorRt) -> None:
    images = pictures()
    with opened(depth=3) as engine:
        alone = [run(engine, [image]) for image in images]
        tickets = [engine.submit([image]) for image in images[:3]]
        together = [np.array(engine.collect(ticket).tensors["output0"]) for ticket in tickets]
        assert engine.depth == 3
    assert all(np.array_equal(a, b) for a, b in zip(alone, together, strict=False))
    del images


def test_several_inputs_and_all_types(fake_gpu: FakeTensorRt, tmp_path: Path) -> None:
    pytest.importorskip("onnx", reason="not installed: pip install '.[test-tensorrt]'")
    from tests import networks

    plan = networks.many_types(tmp_path / "many.onnx")
    spec, constants = PreprocessSpec(48, 32, resize="stretch"), {"scale": np.array([2, 5])}
    cpu = OnnxEngine(plan, OnnxOptions())
    cpu.prepare(spec, max_batch=4, constants=constants)
    with opened(plan, spec, constants=constants) as engine:
        for count in (3, 1, 2):
            images = pictures()[:count]
            wanted, got = (one.collect(one.submit(images)).tensors for one in (cpu, engine))
            assert {name: value.dtype for name, value in got.items()} == {n: v.dtype for n, v in wanted.items()}
            assert np.allclose(got["scaled"], wanted["scaled"], rtol=0.02)
            assert np.array_equal(got["bright"], wanted["bright"])
            del images


def test_outputs_whose_shape_only_the_run_knows_are_not_captured_and_that_is_said_once(
    fake_gpu: FakeTensorRt, tmp_path: Path
) -> None:
    pytest.importorskip("onnx", reason="not installed: pip install '.[test-tensorrt]'")
    from tests import networks

    plan = networks.moving_shape(tmp_path / "moving.onnx")
    with capture_logs() as logs, opened(plan, PreprocessSpec(24, 24, resize="stretch"), depth=1) as engine:
        for level, found in ((255, 48), (0, 0), (240, 48)):
            image = np.full((24, 24, 3), 10, np.uint8)
            image[3:7, 5:9] = level
            assert run(engine, [image], "places").shape == (4, found)
    told = [line for line in logs if line["event"] == "tensorrt.not_captured"]
    assert [line["reason"] for line in told] == ["its outputs' shapes depend on the picture"]
    assert fake_gpu.driver.captures == 0


def test_an_engine_that_cannot_be_captured_runs_step_by_step_and_says_so_once(
    fake_gpu: FakeTensorRt, cpu: OnnxEngine
) -> None:
    fake_gpu.driver.refuses_capture = True
    with capture_logs() as logs, opened(depth=1) as engine:
        for image in pictures():
            assert np.abs(run(engine, [image]) - run(cpu, [image]))[:, 4:].max() < SCORES_OFF
        del image
    [told] = [line for line in logs if line["event"] == "tensorrt.not_captured"]
    assert "CUDA_ERROR_CAPTURE_INVALIDATED (901)" in told["reason"]


def test_a_batch_larger_than_the_engine_takes_is_never_asked_of_it(fake_gpu: FakeTensorRt) -> None:
    with opened(max_batch=32) as engine:
        assert engine.max_batch == fake_gpu.most == 4
    with opened(max_batch=2) as engine:
        assert engine.max_batch == 2


def test_pictures_of_another_size_than_the_engine_takes_are_refused(fake_gpu: FakeTensorRt) -> None:
    with (
        pytest.raises(ModelError, match=r"which pictures of \[3, 320, 320\] do not fit"),
        opened(spec=PreprocessSpec(320, 320)),
    ):
        pass


def test_without_memory_for_all_slots_there_are_fewer_and_for_none_a_refusal(
    fake_gpu: FakeTensorRt, tmp_path: Path
) -> None:
    driver = fake_gpu.driver
    with opened(depth=1):
        needed = sum(len(memory) for memory in driver.device.values())
    driver.total = int(2.5 * needed)
    with capture_logs() as logs, opened(depth=3) as engine:
        assert engine.depth == 2
    [told] = [line for line in logs if line["event"] == "tensorrt.fewer_slots"]
    assert "CUDA_ERROR_OUT_OF_MEMORY (2)" in told["reason"]
    driver.total = needed // 2
    with pytest.raises(CudaError) as caught, opened(depth=3):
        pass
    assert isinstance(caught.value, GpuOutOfMemory)
    assert not driver.device
    plan = tmp_path / "demo.engine"  # no ONNX file by its name, and so run as it is
    plan.write_bytes(MODEL.read_bytes())
    stored = StoredModel("mine", "config", ModelOptions(path=str(plan)), None)
    with pytest.raises(ModelError, match=r"^mine: no memory for it: cuMemAlloc: CUDA_ERROR_OUT_OF_MEMORY \(2\)"):
        open_model(stored, backend="tensorrt", backends={}, inference=InferenceOptions())


def test_what_tensorrt_cannot_run_is_an_error_in_its_own_words(fake_gpu: FakeTensorRt) -> None:
    with opened(depth=1, graph=False) as engine:
        [image] = pictures(SIZES[:1])
        run(engine, [image])
        fake_gpu.fails = True
        with pytest.raises(EngineError, match="TensorRT could not run the engine: it cannot, as told"):
            engine.submit([image])
        del image


def test_a_lost_gpu_is_told_and_nothing_is_touched_any_more(fake_gpu: FakeTensorRt) -> None:
    with opened() as engine:
        [image] = pictures(SIZES[:1])
        run(engine, [image])
        fake_gpu.driver.lost = True
        with pytest.raises(GpuLost, match=r"CUDA_ERROR_ILLEGAL_ADDRESS \(700\)"):
            engine.submit([image])
        launched = len(fake_gpu.driver.launches)
        engine.close()
        assert len(fake_gpu.driver.launches) == launched
        del image


def test_times_come_from_the_events_around_each_part(fake_gpu: FakeTensorRt) -> None:
    with opened(depth=1, reduction=HEAD) as engine:
        for image in pictures():
            outcome = engine.collect(engine.submit([image]))
            assert outcome.preprocess_ms > 0
            assert outcome.inference_ms > 0
            assert outcome.reduce_ms > 0
        del image
