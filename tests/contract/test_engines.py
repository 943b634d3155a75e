"""One suite for every engine: the protocol of `edge_agent.backends.Engine`, and its fit to the bundled models."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import numpy as np
import pytest

from edge_agent import plugins
from edge_agent.backends import Choice, Engine, choose
from edge_agent.backends.onnx import OnnxEngine, OnnxOptions
from edge_agent.config import InferenceOptions, ModelOptions
from edge_agent.data import PreprocessSpec
from edge_agent.errors import ConfigError, EngineError, ModelError
from edge_agent.models.loaded import open_model
from edge_agent.models.store import ModelStore, StoredModel

MODEL = ModelStore({}).get("demo-320").path
SPEC = PreprocessSpec(320, 320)


@pytest.fixture(params=["onnx", "fake", "tensorrt"])
def engine(request: pytest.FixtureRequest, tmp_path: Path) -> Engine:
    path = MODEL
    if request.param == "tensorrt":  # on a fake GPU, whose plans are ONNX files; `tests/gpu` has a real one
        request.getfixturevalue("fake_gpu")
        header = json.dumps(OnnxEngine(MODEL, OnnxOptions()).facts.metadata).encode()
        path = tmp_path / "demo.engine"
        path.write_bytes(struct.pack("<I", len(header)) + header + MODEL.read_bytes())
    engine_class = plugins.load("backends", request.param)
    made: Engine = engine_class(path, engine_class.Options())
    request.addfinalizer(made.close)
    return made


def images(*shapes: tuple[int, int]) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, (*shape, 3), dtype=np.uint8) for shape in shapes]


def test_facts_describe_the_model(engine: Engine) -> None:
    [model_input], [output] = engine.facts.inputs, engine.facts.outputs
    assert model_input.shape == (None, 3, 320, 320)
    assert output.shape[:2] == (None, 9)
    assert engine.facts.metadata["task"] == "detect"


def test_a_batch_of_pictures_of_any_size_gives_outputs_batch_first(engine: Engine) -> None:
    engine.prepare(SPEC, max_batch=4)
    assert engine.max_batch == 4
    for shapes in ([(480, 640)], [(480, 640), (720, 1280), (33, 57), (320, 320)]):
        ticket = engine.submit(images(*shapes))
        assert [(p.source_height, p.source_width) for p in ticket.placements] == shapes
        outputs = engine.collect(ticket).tensors
        assert list(outputs) == ["output0"]
        assert outputs["output0"].shape[:2] == (len(shapes), 9)
        assert outputs["output0"].dtype == np.float32


def test_a_picture_gets_the_same_answer_alone_and_in_a_batch(engine: Engine) -> None:
    engine.prepare(SPEC, max_batch=3)
    pictures = images((480, 640), (200, 100), (320, 320))
    together = np.array(engine.collect(engine.submit(pictures)).tensors["output0"])
    for picture, answer in zip(pictures, together, strict=True):
        alone = engine.collect(engine.submit([picture])).tensors["output0"][0]
        assert np.allclose(alone, answer, atol=1e-3)


def test_closing_twice_is_fine(engine: Engine) -> None:
    engine.close()
    engine.close()


def test_onnx_refuses_what_does_not_fit(tmp_path: Path) -> None:
    engine_class = plugins.load("backends", "onnx")
    with pytest.raises(ModelError, match=r"set preprocess\.size"):
        engine_class(MODEL, engine_class.Options()).prepare(PreprocessSpec(64, 64), max_batch=1)
    with pytest.raises(ModelError, match="the model wants float32 pictures, the family gives uint8"):
        engine_class(MODEL, engine_class.Options()).prepare(PreprocessSpec(320, 320, dtype="uint8"), max_batch=1)
    (tmp_path / "x.onnx").write_bytes(b"\x00\x01")
    with pytest.raises(ModelError, match="onnxruntime cannot load"):
        engine_class(tmp_path / "x.onnx", engine_class.Options())


def test_a_provider_that_is_not_there_is_no_silent_cpu() -> None:
    engine_class = plugins.load("backends", "onnx")
    with pytest.raises(ConfigError, match="has no 'CPUExecutionProvdr'; did you mean 'CPUExecutionProvider'"):
        engine_class(MODEL, engine_class.Options(providers=["CPUExecutionProvdr"]))


def test_the_fake_engine_fails_when_told() -> None:
    engine_class = plugins.load("backends", "fake")
    engine = engine_class(MODEL, engine_class.Options(fail_after=1))
    engine.prepare(SPEC, max_batch=1)
    engine.collect(engine.submit(images((10, 10))))
    with pytest.raises(EngineError, match="as told"):
        engine.collect(engine.submit(images((10, 10))))


def test_auto_says_why_it_chose_the_cpu() -> None:
    choice = choose("auto", fallback="onnx", options={})
    assert choice.name == "onnx"
    assert "no NVIDIA GPU here" in choice.because
    assert choice.trouble is None
    assert choose("fake", fallback="onnx", options={}) == Choice("fake", "configured")


def stored(**options: object) -> StoredModel:
    return StoredModel("mine", "config", ModelOptions(path=str(MODEL), **options), None)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"family": "yollo"}, "mine: unknown family 'yollo'; did you mean 'yolo'?"),
        ({"options": {"head": "v99"}}, "mine: options: Invalid enum value 'v99'"),
        ({"options": {"heat": 1}}, "mine: options: no family knows 'heat'; did you mean 'head'?"),
        ({"labels": "coco80"}, "mine: the entry names 80 labels, the model's output has 5 classes"),
        ({"labels": "coco81"}, "mine: labels 'coco81' is neither a file nor one of ade150, cityscapes19, coco80"),
    ],
)
def test_an_entry_that_does_not_fit_its_model_is_refused_in_a_sentence(
    options: dict[str, object], sentence: str
) -> None:
    with pytest.raises(ModelError) as caught:
        open_model(stored(**options), backend="onnx", backends={}, inference=InferenceOptions())
    assert str(caught.value).startswith(sentence)
