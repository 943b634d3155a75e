"""What the tests on a real GPU share: it, TensorRT, and engines that are built once and kept in `.gpu/engines`."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import cv2
import msgspec
import numpy as np
import pytest
from numpy.typing import NDArray

from edge_agent import cuda
from edge_agent.backends import _trt
from edge_agent.backends.tensorrt import TensorRtEngine, TensorRtOptions
from edge_agent.config import InferenceOptions, ModelOptions
from edge_agent.models.engines import Engines
from edge_agent.models.store import ModelStore, StoredModel
from edge_agent.sources.world import World

ROOT = Path(__file__).parent.parent.parent
KEPT = Path(os.environ.get("EDGE_AGENT_GPU_ENGINES", ROOT / ".gpu" / "engines"))
MODELS = (ROOT / ".gpu" / "models", ROOT.parent / "shared" / "models")
INFERENCE = InferenceOptions(max_batch=4)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.gpu)


@pytest.fixture(scope="session")
def options() -> TensorRtOptions:
    """Quick builds. Without cuBLAS and cuDNN, which TensorRT 8 also builds without."""
    settings = TensorRtOptions(engines=str(KEPT), optimization_level=0, agreement=0.9)
    if reason := TensorRtEngine.unavailable(settings):
        pytest.skip(reason)
    sources = [name for name in dir(_trt.library().TacticSource) if name.isupper() and not name.startswith("CU")]
    return msgspec.structs.replace(settings, tactic_sources=sources)


@pytest.fixture(scope="session")
def gpu(options: TensorRtOptions) -> cuda.Gpu:
    return cuda.open_gpu()


@pytest.fixture(scope="session")
def stored(tmp_path_factory: pytest.TempPathFactory) -> dict[str, StoredModel]:
    """The models of these tests by name."""
    pytest.importorskip("onnx", reason="not installed: pip install onnx")
    from tests import networks

    folder = tmp_path_factory.mktemp("networks")
    models = {model.name: model for model in ModelStore({})}
    models["demo-fp32"] = _renamed(models["demo-320"], "demo-fp32", precision="fp32")
    calibration = tmp_path_factory.mktemp("calibration")
    for index, image in enumerate(scenes(48, seed=21)):
        cv2.imwrite(str(calibration / f"{index:02}.png"), image)
    models["demo-int8"] = _renamed(models["demo-320"], "demo-int8", precision="int8", calibration=str(calibration))
    for name in ("seg_deeplabv3_mnv2_257_voc21", "pose_posenet_mnv1_337_heatmap"):
        for place in MODELS:
            if (place / f"{name}.onnx").is_file():
                entry = ModelOptions(path=str(place / f"{name}.onnx"), precision="fp32")
                models[name.partition("_")[0]] = StoredModel(name.partition("_")[0], "config", entry, None)
    for network in (networks.many_types, networks.moving_shape, networks.half_head):
        path = network(folder / f"{network.__name__}.onnx")
        entry = ModelOptions(path=str(path), precision="fp32")
        models[network.__name__] = StoredModel(network.__name__, "config", entry, None)
    return models


def _renamed(model: StoredModel, name: str, **changes: Any) -> StoredModel:
    return StoredModel(name, "config", msgspec.structs.replace(model.options, **changes), None)


@pytest.fixture(scope="session")
def plans(options: TensorRtOptions, stored: dict[str, StoredModel]) -> dict[str, Path | Exception]:
    """The engines of the detectors, built side by side."""

    def get(model: StoredModel) -> Path | Exception:
        try:
            return Engines(options).get(model, INFERENCE)
        except Exception as error:  # noqa: BLE001  told by the test that wants it
            return error

    names = [name for name in stored if name.startswith("demo")]
    with ThreadPoolExecutor(len(names)) as pool:
        return dict(zip(names, pool.map(get, (stored[name] for name in names)), strict=True))


def scenes(count: int, *, seed: int, width: int = 640, height: int = 480) -> list[NDArray[np.uint8]]:
    world = World(width=width, height=height, seed=seed)
    images = [np.empty((height, width, 3), np.uint8) for _ in range(count)]
    for index, image in enumerate(images):
        world.draw(index * 29, image)
    return images
