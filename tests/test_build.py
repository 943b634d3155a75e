"""Building engines, for real and without a GPU: TensorRT-RTX parses and builds on a CPU for a named GPU."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import cv2
import hypothesis.strategies as st
import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from structlog.testing import capture_logs

from edge_agent.backends import _trt
from edge_agent.backends.onnx import OnnxEngine, OnnxOptions
from edge_agent.backends.tensorrt import TensorRtEngine, TensorRtOptions
from edge_agent.config import InferenceOptions, ModelOptions, PreprocessOptions, ShapeRange
from edge_agent.data import PreprocessSpec
from edge_agent.errors import GpuUnavailable, ModelError
from edge_agent.models.build import Phases, PlanBuilder
from edge_agent.models.engines import Engines, Platform
from edge_agent.models.loaded import open_model
from edge_agent.models.store import ModelStore, StoredModel
from tests.rigs import ROOT, wait_until

TARGET = "8.6"
HERE = Platform("TensorRT-RTX of the tests", "no GPU", TARGET, "no driver")
DEMO = ModelStore({}).get("demo-320")
INFERENCE = InferenceOptions(max_batch=4)


@pytest.fixture(scope="session")
def rtx() -> Any:
    """TensorRT-RTX, which builds anywhere."""
    return pytest.importorskip("tensorrt_rtx_bindings", reason="not installed: pip install '.[test-tensorrt]'")


@pytest.fixture(scope="session")
def networks(rtx: Any) -> Any:
    pytest.importorskip("onnx", reason="not installed: pip install '.[test-tensorrt]'")
    from tests import networks

    return networks


@pytest.fixture
def options(rtx: Any, tmp_path: Path) -> TensorRtOptions:
    return TensorRtOptions(engines=str(tmp_path / "engines"), precision="fp32")


def engines(options: TensorRtOptions, **changes: Any) -> Engines:
    return Engines(msgspec.structs.replace(options, **changes), platform=HERE, target=TARGET)


def entry(name: str, path: Path, **options: Any) -> StoredModel:
    return StoredModel(name, "config", ModelOptions(path=str(path), **options), None)


@pytest.fixture(scope="module")
def calibration(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("calibration")
    for index in range(6):
        noise = np.random.default_rng(index).integers(0, 255, (60, 80, 3), dtype=np.uint8)
        cv2.imwrite(str(folder / f"{index}.png"), noise)
    return folder


def test_an_engine_is_built_once_and_then_found(options: TensorRtOptions) -> None:
    told: list[tuple[str, float | None]] = []
    path = engines(options).get(DEMO, INFERENCE, lambda phase, percent: told.append((phase, percent)))
    sidecar = engines(options).sidecar(path)
    assert sidecar.key.platform == HERE
    assert sidecar.shapes["images"].max == [4, 3, 320, 320]
    assert sidecar.metadata["task"] == "detect"
    assert sidecar.engine_bytes == path.stat().st_size
    assert path.stat().st_mode & 0o777 == 0o600
    assert [phase for phase, _ in told[:3]] == ["reading", "parsing", "building"]
    percents = [percent for _, percent in told if percent is not None]
    assert percents == sorted(percents)
    assert percents[-1] == 100
    inode = path.stat().st_ino
    assert engines(options).find(DEMO, INFERENCE) == path
    assert engines(options).get(DEMO, INFERENCE).stat().st_ino == inode
    assert list(path.parent.glob(".building-*")) == []


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"options": {"precision": "fp16"}}, {"precision": "fp32 -> fp16"}),
        ({"options": {"optimization_level": 2}}, {"optimization_level": "3 -> 2"}),
        ({"inference": InferenceOptions(max_batch=2)}, {"max_batch": "4 -> 2"}),
        (
            {"platform": Platform("TensorRT 99", "no GPU", TARGET, "newer")},
            {"tensorrt": f"{HERE.tensorrt} -> TensorRT 99", "driver": "no driver -> newer"},
        ),
    ],
)
def test_what_does_not_fit_is_built_again_and_the_log_says_why(
    options: TensorRtOptions, changes: dict[str, Any], reason: dict[str, str]
) -> None:
    first = engines(options).get(DEMO, INFERENCE)
    other = Engines(
        msgspec.structs.replace(options, **changes.get("options", {})),
        platform=changes.get("platform", HERE),
        target=TARGET,
    )
    with capture_logs() as logs:
        second = other.get(DEMO, changes.get("inference", INFERENCE))
    assert second != first
    [told] = [line for line in logs if line["event"] == "engine.does_not_fit"]
    assert {key: told[key] for key in reason} == reason
    assert first.is_file()  # the other machine's may come back


def test_a_damaged_engine_is_built_again(options: TensorRtOptions) -> None:
    path = engines(options).get(DEMO, INFERENCE)
    sound = path.read_bytes()
    path.write_bytes(sound[:-10])
    with capture_logs() as logs:
        assert engines(options).get(DEMO, INFERENCE) == path
    assert next(line["event"] for line in logs) == "engine.damaged"
    assert path.stat().st_size == len(sound)


@pytest.mark.parametrize("left", ["engine", "json"])
def test_a_process_killed_in_between_leaves_nothing_that_counts(options: TensorRtOptions, left: str) -> None:
    path = engines(options).get(DEMO, INFERENCE)
    path.with_suffix(".json" if left == "engine" else ".engine").unlink()
    assert engines(options).find(DEMO, INFERENCE) is None
    assert engines(options).get(DEMO, INFERENCE) == path


def test_a_changed_onnx_file_is_another_model(options: TensorRtOptions, networks: Any, tmp_path: Path) -> None:
    onnx = networks.head(tmp_path / "a.onnx")
    path = engines(options).get(entry("a", onnx), INFERENCE)
    networks.head(onnx, operator="Tanh")
    assert engines(options).find(entry("a", onnx), INFERENCE) is None
    assert engines(options).get(entry("a", onnx), INFERENCE) != path


def test_weights_beside_the_file_are_part_of_the_model(options: TensorRtOptions, networks: Any, tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx", reason="not installed: pip install 'edge-agent[convert]'")
    path, whole = tmp_path / "a.onnx", networks.head(tmp_path / "whole.onnx")
    onnx.save(onnx.load(str(whole)), str(path), save_as_external_data=True, location="a.weights", size_threshold=0)
    keys = [engines(options).key(entry("a", onnx_file), INFERENCE).onnx_sha256 for onnx_file in (whole, path)]
    weights = path.with_name("a.weights")
    weights.write_bytes(bytes(weights.stat().st_size))
    keys.append(engines(options).key(entry("a", path), INFERENCE).onnx_sha256)
    assert len(set(keys)) == 3


def test_what_a_killed_build_left_is_removed_by_a_later_one(options: TensorRtOptions) -> None:
    folder = options.directory / DEMO.name
    old, young = folder / ".building-old", folder / ".building-young"
    for left in (old, young):
        left.mkdir(parents=True)
        (left / "plan").write_bytes(b"half")
    os.utime(old, (0, 0))
    engines(options).get(DEMO, INFERENCE)
    assert not old.exists()
    assert young.exists()  # another process may be at it


def test_precision_lives_in_the_network_where_tensorrt_wants_it_there(
    options: TensorRtOptions, calibration: Path
) -> None:
    sizes = {}
    for precision in ("fp32", "fp16", "int8"):
        path = engines(options, precision=precision, calibration=str(calibration)).get(DEMO, INFERENCE)
        sizes[precision] = path.stat().st_size
    assert sizes["fp16"] < 0.9 * sizes["fp32"]
    assert sizes["int8"] != sizes["fp16"]


def test_int8_without_pictures_is_refused_unless_the_file_brings_its_scales(
    options: TensorRtOptions, calibration: Path, tmp_path: Path, networks: Any
) -> None:
    from onnxruntime import quantization

    with pytest.raises(ModelError, match=r"demo-320: INT8 needs pictures to calibrate with: set `calibration`"):
        engines(options, precision="int8").get(DEMO, INFERENCE)
    with pytest.raises(ModelError, match=r"calibration: the folder .* holds no picture"):
        engines(options, precision="int8", calibration=str(tmp_path)).get(DEMO, INFERENCE)
    plain = networks.head(tmp_path / "plain.onnx")

    class Reader(quantization.CalibrationDataReader):  # type: ignore[misc]
        left = 2

        def get_next(self) -> Any:
            self.left -= 1
            return {"images": np.ones((1, 3, 16, 16), np.float32)} if self.left >= 0 else None

    quantization.quantize_static(
        str(plain), str(tmp_path / "scaled.onnx"), Reader(), extra_options={"ActivationSymmetric": True}
    )
    assert engines(options, precision="int8").get(entry("scaled", tmp_path / "scaled.onnx"), INFERENCE).is_file()


def test_other_calibration_pictures_make_another_engine(options: TensorRtOptions, calibration: Path) -> None:
    int8 = {"precision": "int8", "calibration": str(calibration)}
    before = engines(options, **int8).key(DEMO, INFERENCE)
    assert engines(options, **int8).key(DEMO, INFERENCE) == before
    picture = calibration / "0.png"
    kept = picture.read_bytes()
    picture.write_bytes(kept + b"\0")
    try:
        assert engines(options, **int8).key(DEMO, INFERENCE) != before
    finally:
        picture.write_bytes(kept)


def test_a_missing_converter_is_named(options: TensorRtOptions, tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules['onnx'] = None\n"
        "from pathlib import Path\n"
        "from edge_agent.backends.tensorrt import TensorRtOptions\n"
        "from edge_agent.config import ShapeRange\n"
        "from edge_agent.models.build import PlanBuilder\n"
        "shape = [1, 3, 320, 320]\n"
        f"PlanBuilder(Path({str(DEMO.path)!r}), shapes={{'images': ShapeRange(min=shape, opt=shape, max=shape)}},\n"
        "    precision='fp16', options=TensorRtOptions()).build(Path('.'))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert "needs the Python module 'onnx': pip install 'edge-agent[convert]'" in done.stderr.splitlines()[-1]


def test_what_tensorrt_cannot_take_is_told_by_node_and_operator(
    options: TensorRtOptions, networks: Any, tmp_path: Path
) -> None:
    onnx = networks.head(tmp_path / "odd.onnx", operator="Frobnicate")
    shape = ShapeRange(min=[1, 3, 16, 16], opt=[1, 3, 16, 16], max=[1, 3, 16, 16])
    builder = PlanBuilder(onnx, shapes={"images": shape}, precision="fp32", options=options, target=TARGET)
    with pytest.raises(ModelError) as caught:
        builder.build(tmp_path)
    sentence = str(caught.value)
    assert "odd.onnx: TensorRT-RTX" in sentence
    assert "cannot take node 'rate' (operator Frobnicate)" in sentence
    assert "\n" not in sentence


def test_what_is_no_onnx_file_is_refused_in_a_sentence(options: TensorRtOptions, tmp_path: Path) -> None:
    (tmp_path / "x.onnx").write_bytes(b"no model")
    with pytest.raises(ModelError, match=r"x\.onnx is no ONNX file"):
        engines(options).get(entry("x", tmp_path / "x.onnx"), INFERENCE)


@pytest.mark.parametrize(
    ("shapes", "sentence"),
    [
        ({"image": ([1, 3, 16, 16],) * 3}, "shapes: the model has no input image; it has images"),
        (
            {"images": ([1, 3, 16, 20],) * 3},
            r"shapes.images: \[1, 3, 16, 20\] does not fit the input \[None, 3, 16, 16\]",
        ),
        ({"images": ([2, 3, 16, 16], [1, 3, 16, 16], [4, 3, 16, 16])}, "min, opt and max must not shrink"),
    ],
)
def test_shapes_that_do_not_fit_are_named(
    options: TensorRtOptions, networks: Any, tmp_path: Path, shapes: dict[str, Any], sentence: str
) -> None:
    given = {name: ShapeRange(min=low, opt=best, max=high) for name, (low, best, high) in shapes.items()}
    model = entry("head", networks.head(tmp_path / "head.onnx"), shapes=given)
    with pytest.raises(ModelError, match=sentence):
        engines(options).get(model, INFERENCE)


def test_several_inputs_and_shapes_of_ones_own(options: TensorRtOptions, networks: Any, tmp_path: Path) -> None:
    onnx = networks.head(tmp_path / "head.onnx")
    shape = ShapeRange(min=[1, 3, 16, 16], opt=[2, 3, 16, 16], max=[3, 3, 16, 16])
    path = engines(options).get(entry("head", onnx, shapes={"images": shape}), INFERENCE)
    assert engines(options).sidecar(path).shapes == {"images": shape}
    constants = {"inputs": {"scale": [1, 2]}, "preprocess": PreprocessOptions(size=(48, 32))}
    many = entry("many", networks.many_types(tmp_path / "many.onnx"), **constants)
    assert engines(options).get(many, INFERENCE).is_file()  # nothing is known of its outputs: raw tensors


@pytest.mark.parametrize(
    ("family", "sentence"),
    [
        ("KilledFamily", r"the build process was ended by SIGKILL \(out of memory, perhaps\)"),
        ("BuggyFamily", "the build process ended with status 1: ZeroDivisionError: a bug in the build process"),
    ],
)
def test_a_build_process_that_dies_is_an_error_like_any_other(
    options: TensorRtOptions, family: str, sentence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(ROOT))
    model = entry("dying", DEMO.path, family=f"tests.crashing:{family}")
    with pytest.raises(ModelError, match=f"^dying: {sentence}"):
        engines(options).get(model, INFERENCE)


def test_a_build_can_be_cancelled_and_takes_no_longer_than_it_may(
    options: TensorRtOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(ROOT))
    model = entry("slow", DEMO.path, family="tests.crashing:SlowFamily")
    builder = engines(options)
    begun = threading.Event()

    def cancel() -> None:
        begun.wait(30)
        builder.cancel()

    canceller = threading.Thread(target=cancel)
    canceller.start()
    with pytest.raises(ModelError, match=r"^slow: the build was cancelled"):
        builder.get(model, INFERENCE, lambda phase, percent: begun.set())
    canceller.join()
    with pytest.raises(ModelError, match=r"^slow: the build was cancelled"):
        builder.get(model, INFERENCE)
    with pytest.raises(ModelError, match=r"^slow: the build took more than 1.5 s"):
        engines(options, build_timeout_s=1.5).get(model, INFERENCE)


def test_a_build_ends_with_the_process_that_wanted_it(options: TensorRtOptions, tmp_path: Path) -> None:
    code = (
        "import msgspec, sys\n"
        "from tests.test_build import *\n"
        f"options = msgspec.json.decode({msgspec.json.encode(options)!r}, type=TensorRtOptions)\n"
        "model = entry('slow', DEMO.path, family='tests.crashing:SlowFamily')\n"
        "engines(options).get(model, INFERENCE, lambda phase, percent: print(phase, flush=True))\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    try:
        assert "reading\n" in iter(parent.stdout.readline, "")
        [child] = Path(f"/proc/{parent.pid}/task/{parent.pid}/children").read_text().split()
    finally:
        parent.kill()
        parent.wait()
        parent.stdout.close()
    wait_until(lambda: not _runs(child), what="the build process ends")


def _runs(pid: str) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    except OSError:
        return False


def test_a_folder_that_cannot_be_written_is_named(options: TensorRtOptions, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ModelError, match=r"file/demo-320: Not a directory"):
        engines(options, engines=str(tmp_path / "file")).get(DEMO, INFERENCE)


def test_an_engine_that_agrees_too_little_stays_rejected_with_its_figures(options: TensorRtOptions) -> None:
    path = engines(options).get(DEMO, INFERENCE)
    told = path.with_suffix(".json")
    sidecar = json.loads(told.read_text())
    sidecar["agreement"] = {"score": 0.91, "measure": "detections", "pictures": 16, "detections": 180, "cosine": 0.99}
    told.write_text(json.dumps(sidecar))
    for call in (engines(options).find, engines(options).get):
        with pytest.raises(
            ModelError, match=r"it agrees with its ONNX file to 0.910 \(detections, 16 pictures\), less"
        ):
            call(DEMO, INFERENCE)
    assert engines(options, agreement=0.9).get(DEMO, INFERENCE) == path


def test_timings_are_kept_for_the_next_build(options: TensorRtOptions) -> None:
    engines(options).get(DEMO, INFERENCE)
    [cache] = options.directory.glob("timing-*.cache")
    assert cache.stat().st_size > 0


def test_without_a_driver_an_engine_is_refused_with_tensorrts_own_words(options: TensorRtOptions) -> None:
    path = engines(options).get(DEMO, INFERENCE)
    trt = _trt.library("tensorrt_rtx")
    with pytest.raises(GpuUnavailable, match=r"the driver is too old for TensorRT-RTX .*cudaError 35"):
        _trt.deserialize(trt, path)
    with pytest.raises(ModelError, match=r"^demo-320: no NVIDIA driver that can be used"):
        open_model(DEMO, backend="tensorrt", backends={"tensorrt": options}, inference=INFERENCE)
    assert "no NVIDIA driver that can be used" in str(TensorRtEngine.unavailable(options))


def test_a_plan_that_is_none_is_refused_with_tensorrts_own_words(rtx: Any, tmp_path: Path) -> None:
    plan = tmp_path / "x.engine"
    plan.write_bytes(b"no plan" * 100)
    plan.chmod(0o600)
    with pytest.raises((ModelError, GpuUnavailable), match=r"TensorRT-RTX"):
        _trt.deserialize(_trt.library("tensorrt_rtx"), plan)


def test_only_a_file_that_nobody_else_can_write_is_run(rtx: Any, tmp_path: Path) -> None:
    plan = tmp_path / "x.engine"
    plan.write_bytes(b"plan")
    plan.chmod(0o666)
    trt = _trt.library("tensorrt_rtx")
    with pytest.raises(ModelError, match=r"can be changed by everybody; an engine is a program: chmod o-w"):
        _trt.deserialize(trt, plan)
    plan.chmod(0o600)
    open_folder = tmp_path / "open"
    open_folder.mkdir()
    open_folder.chmod(0o777)
    plan.rename(open_folder / "x.engine")
    with pytest.raises(ModelError, match=r"can be changed by everybody"):
        _trt.deserialize(trt, open_folder / "x.engine")
    if os.geteuid() == 0:
        open_folder.chmod(0o755)
        os.chown(open_folder / "x.engine", 12345, 0)
        with pytest.raises(ModelError, match=r"is another user's; an engine is a program: sudo chown 0 "):
            _trt.deserialize(trt, open_folder / "x.engine")


json_values = st.recursive(st.none() | st.integers() | st.text(), lambda inner: st.lists(inner, max_size=3))


@settings(max_examples=60, deadline=None)
@given(told=st.dictionaries(st.text(), json_values, max_size=4), plan=st.binary(max_size=100))
def test_the_header_of_ultralytics_is_told_from_the_plan(
    tmp_path_factory: pytest.TempPathFactory, told: dict[str, Any], plan: bytes
) -> None:
    path = tmp_path_factory.mktemp("plan") / "x.engine"
    header = json.dumps(told).encode()
    path.write_bytes(struct.pack("<I", len(header)) + header + plan)
    assert _trt.read_plan(path) == (plan, {key: str(value) for key, value in told.items()})


@settings(max_examples=100, deadline=None)
@given(content=st.binary(max_size=60) | st.binary(max_size=40).map(lambda rest: b"\x20\0\0\0{" + rest))
def test_whatever_a_plan_file_holds_it_is_read(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    path = tmp_path_factory.mktemp("plan") / "x.engine"
    path.write_bytes(content)
    plan, _ = _trt.read_plan(path)
    assert content.endswith(plan)


def test_class_names_of_a_header_come_out_as_the_families_read_them(tmp_path: Path) -> None:
    header = json.dumps({"task": "detect", "names": {"0": "cat", "1": "dog"}, "imgsz": [640, 640]}).encode()
    (tmp_path / "x.engine").write_bytes(struct.pack("<I", len(header)) + header + b"plan")
    _, told = _trt.read_plan(tmp_path / "x.engine")
    assert told == {"task": "detect", "names": "{0: 'cat', 1: 'dog'}", "imgsz": "[640, 640]"}


phase_names = st.sampled_from("abcdef")
changes = st.lists(
    st.tuples(st.just("start"), phase_names, st.none() | phase_names, st.integers(0, 5))
    | st.tuples(st.just("step"), phase_names, st.integers(0, 9))
    | st.tuples(st.just("finish"), phase_names),
    max_size=40,
)


@settings(max_examples=300, deadline=None)
@given(changes=changes)
def test_however_phases_come_the_percentage_is_one(changes: list[tuple[Any, ...]]) -> None:
    phases, before = Phases(), {}
    for kind, *arguments in changes:
        if kind == "start" and arguments[1] == arguments[0]:
            continue
        news = getattr(phases, kind)(*arguments)
        if news is not None:
            name, percent = news
            assert 0 <= percent <= 100
            before[name] = percent


def test_progress_of_a_nested_build_grows_to_100() -> None:
    phases, told = Phases(), []
    told.append(phases.start("build", None, 2))
    told.append(phases.start("tactics", "build", 4))
    told += [phases.step("tactics", step) for step in range(4)]
    told += [phases.finish("tactics"), phases.step("build", 0), phases.step("build", 1), phases.finish("build")]
    percents = [news[1] for news in told if news]
    assert percents == [0, 12, 25, 38, 50, 100]


def test_constants_reach_the_inputs_that_take_no_picture(networks: Any, tmp_path: Path) -> None:
    """Of the CPU engine; `tests/gpu` shows the same of TensorRT's."""

    engine = OnnxEngine(networks.many_types(tmp_path / "many.onnx"), OnnxOptions())
    spec = PreprocessSpec(48, 32, resize="stretch")
    with pytest.raises(
        ModelError, match=r"one input takes the picture, here 2 would \(images, scale\); give the others'"
    ):
        engine.prepare(spec, max_batch=2)
    with pytest.raises(ModelError, match=r"inputs: the model has no input 'scal'; did you mean 'scale'"):
        engine.prepare(spec, max_batch=2, constants={"scal": np.ones(2)})
    engine.prepare(spec, max_batch=2, constants={"scale": np.array([2, 5])})
    white = np.full((10, 10, 3), 255, np.uint8)
    outcome = engine.collect(engine.submit([white, white]))
    assert outcome.tensors["scaled"].tolist() == [[7.0, 7.0, 7.0]] * 2
    assert outcome.tensors["bright"].all()
    engine.prepare(spec, max_batch=2, constants={"scale": np.ones((3, 7))})
    with pytest.raises(
        ModelError, match=r"inputs.scale: the input is \[None, 2\], values of shape \[3, 7\] do not fit"
    ):
        engine.collect(engine.submit([white]))


def test_an_output_without_a_batch_axis_comes_out_whole(networks: Any, tmp_path: Path) -> None:
    """Of the CPU engine; `tests/gpu` shows the same of TensorRT's."""
    engine = OnnxEngine(networks.moving_shape(tmp_path / "moving.onnx"), OnnxOptions())
    engine.prepare(PreprocessSpec(24, 24, resize="stretch"), max_batch=1)
    image = np.zeros((24, 24, 3), np.uint8)
    image[3:7, 5:9] = 255
    outcome = engine.collect(engine.submit([image]))
    assert outcome.tensors["places"].shape == (4, 48)
    assert outcome.tensors["mean"].shape == (1, 3)
