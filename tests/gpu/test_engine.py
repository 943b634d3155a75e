"""TensorRT engines on the GPU, beside the CPU engine."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from numpy.typing import NDArray

from edge_agent import cuda
from edge_agent.backends import Engine
from edge_agent.backends.onnx import OnnxEngine, OnnxOptions
from edge_agent.backends.tensorrt import TensorRtEngine, TensorRtOptions
from edge_agent.config import ShapeRange
from edge_agent.data import Candidates, PreprocessSpec, Reduction
from edge_agent.errors import GpuOutOfMemory, ModelError
from edge_agent.families import _dense
from edge_agent.models.build import PlanBuilder
from edge_agent.models.engines import Engines
from edge_agent.models.loaded import LoadedModel, open_model
from edge_agent.models.store import StoredModel
from tests.gpu.conftest import INFERENCE, scenes

SPEC = PreprocessSpec(320, 320)
HEAD = Reduction("output0", rows_first=True, has_objectness=False, threshold=0.4, max_candidates=1000)
SIZES = ((640, 480), (1920, 1080), (321, 777), (320, 320), (64, 33))
Models = dict[str, StoredModel]


@contextmanager
def opened(
    plan: Path | Exception, options: TensorRtOptions, spec: PreprocessSpec = SPEC, **prepared: Any
) -> Iterator[TensorRtEngine]:
    if isinstance(plan, Exception):
        raise plan
    engine = TensorRtEngine(plan, options)
    try:
        engine.prepare(spec, max_batch=4, **prepared)
        yield engine
    finally:
        engine.close()


@contextmanager
def on_cpu(model: StoredModel, spec: PreprocessSpec = SPEC, **prepared: Any) -> Iterator[OnnxEngine]:
    engine = OnnxEngine(model.path, OnnxOptions())
    engine.prepare(spec, max_batch=4, **prepared)
    yield engine
    engine.close()


def run(engine: Engine, images: Sequence[NDArray[np.uint8]]) -> dict[str, NDArray[Any]]:
    return {name: np.array(value) for name, value in engine.collect(engine.submit(images)).tensors.items()}


def pinned(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    copy: NDArray[np.uint8] = TensorRtEngine.new_image(image.shape)
    assert cuda.pinned_memory(copy) is not None
    np.copyto(copy, image)
    return copy


def mixed() -> list[NDArray[np.uint8]]:
    return [scenes(1, seed=index, width=width, height=height)[0] for index, (width, height) in enumerate(SIZES)]


VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "one slot": {"depth": 1},
    "step by step": {"graph": False},
    "mapped": {"upload": "mapped"},
    "CPU pre-processing": {"preprocess": "cpu"},
    "CPU pre-processing, step by step": {"preprocess": "cpu", "graph": False},
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("kind", [pinned, np.array], ids=["pinned", "pageable"])
def test_a_detector_gives_what_the_cpu_gives_however_it_is_run(
    plans: Any, stored: Models, options: TensorRtOptions, variant: str, kind: Callable[..., Any]
) -> None:
    settings = msgspec.structs.replace(options, **VARIANTS[variant])
    with opened(plans["demo-fp32"], settings) as engine, on_cpu(stored["demo-320"]) as cpu:
        pictures = [kind(image) for image in mixed()]
        for image in [*pictures, *pictures[::-1]]:  # sizes change from one to the next, under the same graph
            wanted, got = run(cpu, [image])["output0"], run(engine, [image])["output0"]
            assert got.shape == wanted.shape
            assert np.abs(got[:, 4:] - wanted[:, 4:]).max() < 0.05
            sure = wanted[0, 4:].max(0) > 0.3
            assert np.abs(got[0, :4, sure] - wanted[0, :4, sure]).max(initial=0) < 2.0
        batch = pictures[:3]
        wanted, got = run(cpu, batch)["output0"], run(engine, batch)["output0"]
        assert got.shape == wanted.shape
        assert np.abs(got[:, 4:] - wanted[:, 4:]).max() < 0.05


@pytest.mark.parametrize(
    ("name", "layout", "size"), [("seg", "nhwc", 257), ("pose", "nhwc", 337)], ids=["segmentation", "pose"]
)
def test_segmentation_and_pose_give_what_the_cpu_gives(
    stored: Models, options: TensorRtOptions, name: str, layout: Any, size: int, astronaut: NDArray[np.uint8]
) -> None:
    if name not in stored:
        pytest.skip(f"the {name} model is not there")
    model = stored[name]
    spec = PreprocessSpec(size, size, resize="stretch", scale=1 / 127.5, mean=(1.0, 1.0, 1.0), layout=layout)
    plan = built(options, model)
    with on_cpu(model, spec) as cpu, opened(plan, options, spec) as engine:
        wanted, got = run(cpu, [astronaut]), run(engine, [astronaut])
        assert set(wanted) == set(got)
        for tensor, value in wanted.items():
            a, b = value.ravel().astype(float), got[tensor].ravel().astype(float)
            assert a @ b / np.linalg.norm(a) / np.linalg.norm(b) > 0.999, tensor
        if name == "seg":
            [logits] = wanted.values()
            [ours] = got.values()
            assert (logits.argmax(-1) == ours.argmax(-1)).mean() > 0.995
        else:
            for k in range(17):
                heat, ours = wanted["heatmap_2"][0, ..., k], got["heatmap_2"][0, ..., k]
                assert np.abs(np.subtract(_peak(heat), _peak(ours))).max() <= 1 or heat.max() < 0


def _peak(heat: NDArray[Any]) -> tuple[int, int]:
    return divmod(int(heat.argmax()), heat.shape[1])


def built(options: TensorRtOptions, model: StoredModel) -> Path:
    """An engine of a model that no family here understands yet, for one picture to four."""
    path = options.directory / f"{model.name}.plan"
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        shapes = {}
        for tensor in OnnxEngine(model.path, OnnxOptions()).facts.inputs:
            sides = [[batch if side is None else side for side in tensor.shape] for batch in (1, 1, 4)]
            shapes[tensor.name] = ShapeRange(min=sides[0], opt=sides[1], max=sides[2])
        builder = PlanBuilder(model.path, shapes=shapes, precision="fp32", options=options)
        path.write_bytes(builder.build(path.parent))
    return path


@pytest.fixture(scope="session")
def astronaut() -> NDArray[np.uint8]:
    [image] = scenes(1, seed=4)
    return image


def test_the_gpus_own_reduction_leaves_what_numpy_leaves_of_the_same_outputs(
    plans: Any, options: TensorRtOptions
) -> None:
    with opened(plans["demo-320"], options) as raw, opened(plans["demo-320"], options, reduction=HEAD) as reducing:
        for count in (1, 2, 3, 4, 1):
            images = [pinned(image) for image in mixed()[:count]]
            wanted = _dense.reduce(run(raw, images)["output0"], HEAD)
            outcome = reducing.collect(reducing.submit(images))
            assert not outcome.tensors
            assert outcome.candidates is not None
            assert sum(len(found) for found in wanted) > 0
            for a, b in zip(outcome.candidates, wanted, strict=True):
                assert same(a, b)


FIELDS = ("cells", "boxes", "scores", "class_ids")


def same(a: Candidates, b: Candidates) -> bool:
    return all(np.array_equal(getattr(a, name), getattr(b, name)) for name in FIELDS)


def owned(found: Sequence[Candidates] | None) -> list[Candidates]:
    """Copies, which stay as they are when the engine's slot is used again."""
    return [Candidates(*(getattr(one, name).copy() for name in FIELDS)) for one in found or ()]


def test_three_slots_in_flight_give_what_one_gives(plans: Any, options: TensorRtOptions) -> None:
    images = [pinned(image) for image in scenes(30, seed=9)]
    one_slot = msgspec.structs.replace(options, depth=1)
    with opened(plans["demo-320"], one_slot, reduction=HEAD) as one:
        wanted = [owned(one.collect(one.submit([image])).candidates)[0] for image in images]
    with opened(plans["demo-320"], options, reduction=HEAD) as three:
        assert three.depth == 3
        got, tickets = [], []
        for image in images:
            tickets.append(three.submit([image]))
            if len(tickets) == 3:
                got += owned(three.collect(tickets.pop(0)).candidates)
        for ticket in tickets:
            got += owned(three.collect(ticket).candidates)
    assert all(same(a, b) for a, b in zip(got, wanted, strict=True))


def test_times_are_the_gpus_own(plans: Any, options: TensorRtOptions) -> None:
    [image] = scenes(1, seed=1, width=1920, height=1080)
    with opened(plans["demo-320"], options, reduction=HEAD) as engine:
        for _ in range(5):
            outcome = engine.collect(engine.submit([pinned(image)]))
        assert 0.01 < outcome.preprocess_ms < 5  # 6 MB over PCIe alone take 0.1 ms
        assert 0.01 < outcome.inference_ms < 20
        assert 0.0 < outcome.reduce_ms < 5


def test_a_half_precision_head_is_reduced_too(stored: Models, options: TensorRtOptions) -> None:
    plan = built(options, stored["half_head"])
    spec = PreprocessSpec(16, 16, dtype="float16")
    head = Reduction("output0", rows_first=True, has_objectness=False, threshold=0.7, max_candidates=20)
    images = mixed()[:2]
    with opened(plan, options, spec) as raw, opened(plan, options, spec, reduction=head) as reducing:
        outputs = run(raw, images)["output0"]
        assert outputs.dtype == np.float16
        found = reducing.collect(reducing.submit(images)).candidates
        assert found is not None
        assert all(same(a, b) for a, b in zip(found, _dense.reduce(outputs, head), strict=True))


def test_several_inputs_and_all_types(stored: Models, options: TensorRtOptions) -> None:
    plan = built(options, stored["many_types"])
    spec = PreprocessSpec(48, 32, resize="stretch")
    constants = {"scale": np.array([2, 5])}
    images = mixed()[:3]
    with (
        on_cpu(stored["many_types"], spec, constants=constants) as cpu,
        opened(plan, options, spec, constants=constants) as engine,
    ):
        for count in (3, 1, 2):
            wanted, got = run(cpu, images[:count]), run(engine, images[:count])
            assert {name: value.dtype for name, value in got.items()} == {n: v.dtype for n, v in wanted.items()}
            assert np.allclose(got["scaled"], wanted["scaled"], rtol=0.01)
            assert np.allclose(got["halved"], wanted["halved"], rtol=0.01)
            assert np.abs(got["counted"] - wanted["counted"]).max() <= 4
            assert np.array_equal(got["bright"], wanted["bright"])


def test_outputs_whose_shape_only_the_run_knows(stored: Models, options: TensorRtOptions) -> None:
    plan = built(options, stored["moving_shape"])
    spec = PreprocessSpec(24, 24, resize="stretch")
    with on_cpu(stored["moving_shape"], spec) as cpu, opened(plan, options, spec) as engine:
        for level in (255, 0, 240):
            image = np.full((24, 24, 3), 10, np.uint8)
            image[3:7, 5:9] = level
            wanted, got = run(cpu, [image]), run(engine, [image])
            assert wanted["places"].shape == got["places"].shape
            assert sorted(wanted["places"].T.tolist()) == sorted(got["places"].T.tolist())  # in what order is its own
            assert np.allclose(wanted["mean"], got["mean"], atol=1e-3)


def model_of(stored: Models, options: TensorRtOptions, name: str) -> LoadedModel:
    return open_model(stored[name], backend="tensorrt", backends={"tensorrt": options}, inference=INFERENCE)


@pytest.mark.parametrize("name", ["demo-fp32", "demo-320", "demo-int8"])
def test_what_was_built_agrees_with_its_onnx_file(plans: Any, options: TensorRtOptions, name: str) -> None:
    plan = plans[name]
    assert isinstance(plan, Path), plan
    sidecar = Engines(options).sidecar(plan)
    print(name, sidecar.agreement, sidecar.build_s, "s")
    assert sidecar.agreement is not None
    assert sidecar.agreement.measure == "detections"
    assert sidecar.agreement.detections > 50
    assert sidecar.agreement.score >= (0.9 if name == "demo-int8" else 0.95)
    assert sidecar.key.platform.gpu == cuda.open_gpu().name


def test_a_hit_builds_nothing_and_a_damaged_engine_is_built_again(
    plans: Any, stored: Models, options: TensorRtOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    engines = Engines(options)
    monkeypatch.setattr(engines, "_build", lambda *arguments: pytest.fail("built again"))
    assert engines.get(stored["demo-320"], INFERENCE) == plans["demo-320"]
    sound = plans["demo-320"].read_bytes()
    try:
        plans["demo-320"].write_bytes(sound[:-1] + bytes([sound[-1] ^ 1]))
        assert Engines(options).find(stored["demo-320"], INFERENCE) is None
    finally:
        plans["demo-320"].write_bytes(sound)


def test_a_damaged_plan_is_refused_with_tensorrts_own_words(
    plans: Any, options: TensorRtOptions, tmp_path: Path
) -> None:
    (tmp_path / "x.engine").write_bytes(plans["demo-320"].read_bytes()[:1000])
    with pytest.raises(ModelError, match=r"is no engine that TensorRT .* can run on this GPU.*\("):
        TensorRtEngine(tmp_path / "x.engine", options)


def test_500_loads_and_unloads_leave_no_gpu_memory_behind(
    plans: Any, stored: Models, options: TensorRtOptions, gpu: cuda.Gpu
) -> None:
    frees = []
    for turn in range(500):
        model = model_of(stored, options, ("demo-160", "demo-320")[turn % 2])
        model.warm_up()
        model.close()
        frees.append(gpu.memory()[0])
    print(
        f"free after 2: {frees[1] / 1e6:.1f} MB, after 500: {frees[-1] / 1e6:.1f} MB, least {min(frees) / 1e6:.1f} MB"
    )
    assert frees[-1] >= frees[1]


def test_without_memory_a_model_is_refused_and_nothing_is_lost(
    plans: Any, stored: Models, options: TensorRtOptions, gpu: cuda.Gpu
) -> None:
    model_of(stored, options, "demo-320").close()
    before = gpu.memory()[0]
    hogs = []
    size = before
    while size > 1 << 16:
        try:
            hogs.append(cuda.DeviceMemory(size))
        except cuda.CudaError as error:
            assert isinstance(error, GpuOutOfMemory)
            size //= 2
    with pytest.raises(ModelError, match=r"(?i)memory"):
        model_of(stored, options, "demo-320")
    for hog in hogs:
        hog.close()
    assert gpu.memory()[0] >= before - (4 << 20)
    model_of(stored, options, "demo-320").close()


def test_a_picture_that_finds_no_memory_is_an_error_of_its_own_and_the_next_one_runs(
    plans: Any, options: TensorRtOptions
) -> None:
    small, large = TensorRtEngine.new_image((320, 320, 3)), TensorRtEngine.new_image((4320, 7680, 3))
    with opened(plans["demo-320"], options) as engine:
        before = run(engine, [small])
        hogs, size = [], 1 << 40
        while size > 1 << 16:
            try:
                hogs.append(cuda.DeviceMemory(size))
            except GpuOutOfMemory:
                size //= 2
        for _ in range(engine.depth):
            with pytest.raises(GpuOutOfMemory, match="cuMemAlloc"):
                engine.submit([large])
        for name, value in run(engine, [small]).items():
            assert np.array_equal(value, before[name])
        for hog in hogs:
            hog.close()
        run(engine, [large])


def test_a_model_loads_beside_one_that_runs(plans: Any, stored: Models, options: TensorRtOptions) -> None:
    """Capture, launch and allocation in two threads at once."""
    images = [pinned(image) for image in scenes(4, seed=3)]
    problems: list[BaseException] = []
    stop = threading.Event()

    def load() -> None:
        try:
            while not stop.is_set():
                model = model_of(stored, options, "demo-160")
                model.warm_up()
                model.close()
        except BaseException as error:  # noqa: BLE001  told by the other thread
            problems.append(error)

    with opened(plans["demo-320"], options, reduction=HEAD) as engine:
        wanted = [owned(engine.collect(engine.submit([image])).candidates)[0] for image in images]
        loader = threading.Thread(target=load)
        loader.start()
        try:
            for _ in range(300):
                for image, expected in zip(images, wanted, strict=True):
                    [found] = engine.collect(engine.submit([image])).candidates or ()
                    assert same(found, expected)
        finally:
            stop.set()
            loader.join()
    assert not problems
