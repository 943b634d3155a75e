"""`edgectl models build|calibrate|bench|compare|export`, as people run them."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import msgspec
import numpy as np
import pytest

from edge_agent import backends
from edge_agent.models.engines import Sidecar
from edge_agent.models.pictures import bundled
from tests.e2e.test_edgectl import STORE, ZOO, edgectl

pytestmark = pytest.mark.slow

has_torch = all(importlib.util.find_spec(name) for name in ("torch", "onnx"))
needs_torch = pytest.mark.skipif(not has_torch, reason="not installed: pip install '.[export]'")
needs_rtx = pytest.mark.skipif(
    not importlib.util.find_spec("tensorrt_rtx_bindings"), reason="not installed: pip install '.[test-tensorrt]'"
)
BRIEFLY = ("--seconds", "0.5")


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder with a configuration whose store is beside it."""
    (tmp_path / "config.toml").write_text(STORE)
    return tmp_path


@pytest.fixture
def album(tmp_path: Path) -> Path:
    (tmp_path / "album").mkdir()
    for index, image in enumerate(bundled(10)):
        cv2.imwrite(str(tmp_path / "album" / f"{index}.png"), image)
    (tmp_path / "album" / "note.txt").write_text("no picture")
    return tmp_path / "album"


def told(done: subprocess.CompletedProcess[str]) -> Any:
    """The one JSON document of a command that did well."""
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def refusal(done: subprocess.CompletedProcess[str], status: int = 1) -> str:
    """The sentence of one that did not."""
    assert (done.returncode, done.stdout) == (status, ""), done.stderr
    assert "Traceback" not in done.stderr
    assert status == 2 or len(done.stderr.splitlines()) == 1, done.stderr
    return done.stderr


def test_what_bench_measures_is_printed_and_kept_in_the_registry(place: Path) -> None:
    briefly = ("--inferences", "20", *BRIEFLY)
    first = told(edgectl("models", "bench", "demo-160", *briefly, "--json", folder=place))
    latency, most = first["measured"]["latency_ms"], first["measured"]["throughput"]
    assert 0 < latency["p50"] <= latency["p95"] <= latency["p99"]
    assert 1 <= latency["n"] <= 20
    assert most["pictures_per_s"] == pytest.approx(most["pictures"] / most["seconds"], rel=0.01)
    assert most["pictures"] % most["batch"] == 0
    assert first["measured"]["memory_mb"]["rss_after"] > 0
    assert first["recorded"]
    [listed] = [one for one in told(edgectl("models", "list", "--json", folder=place)) if one["id"] == "demo-160"]
    assert listed["measured"] == [first["measured"]]
    again = edgectl("models", "bench", "demo-160", *briefly, folder=place)
    assert [line.split()[0] for line in again.stdout.splitlines()] == [
        "demo-160", "latency", "throughput", "memory", "recorded",
    ]  # fmt: skip
    assert again.stderr == "", "no bar where there is no terminal"


def test_a_file_of_no_store_is_measured_and_not_recorded(place: Path) -> None:
    file = ZOO / "demo-cls.onnx"
    done = told(edgectl("models", "bench", str(file), "--inferences", "5", *BRIEFLY, "--json", folder=place))
    assert (done["id"], done["recorded"]) == ("demo-cls", False)
    assert not (place / "store" / "registry.json").exists()


@pytest.mark.skipif(bool(backends.nvidia_devices()), reason="there is an NVIDIA GPU here")
def test_building_without_a_gpu_is_refused_in_a_sentence(place: Path, album: Path) -> None:
    built = refusal(edgectl("models", "build", "demo-320", folder=place))
    calibrated = refusal(edgectl("models", "calibrate", "demo-320", "--images", "album", folder=place))
    assert built.startswith("error: demo-320: no engine can be built for this machine: ")
    assert calibrated == built
    assert "one of fp32, fp16, int8" in refusal(
        edgectl("models", "build", "demo-320", "--precision", "fp8", folder=place), status=2
    )


@needs_rtx
def test_an_engine_for_another_gpu_is_built_into_a_file(place: Path, album: Path) -> None:
    elsewhere = ("--target", "8.6", "--out")
    built = edgectl("models", "build", "demo-160", "--precision", "fp32", *elsewhere, "plain.engine", folder=place)
    assert built.returncode == 0, built.stderr
    assert built.stdout.startswith("demo-160: fp32 engine plain.engine, ")
    assert "not compared with its ONNX file" in built.stdout
    small = told(
        edgectl(
            "models", "calibrate", "demo-160", "--images", "album", *elsewhere, "int8.engine", "--json", folder=place
        )
    )
    assert (small["precision"], small["compute_capability"], small["agreement"]) == ("int8", "8.6", None)
    assert small["size_bytes"] == (place / "int8.engine").stat().st_size
    kept = (place / "int8.json").read_bytes()
    sidecar = msgspec.json.decode(kept, type=Sidecar)
    assert sidecar.key.calibration_sha256
    assert sidecar.metadata["task"] == "detect"
    assert "cannot build for compute capability 99.9" in refusal(
        edgectl("models", "build", "demo-160", "--target", "99.9", "--out", "x.engine", folder=place)
    )


def test_two_models_are_compared_on_the_pictures_of_a_folder(place: Path, album: Path) -> None:
    by = ("--images", "album", *BRIEFLY)
    same = told(edgectl("models", "compare", "demo-320", "demo-320", *by, "--json", folder=place))
    assert (same["measure"], same["score"]) == ("detections", 1.0)
    assert [one["picture"] for one in same["pictures"]] == [f"{i}.png" for i in range(10)]
    assert same["compared"] == sum(one["compared"] for one in same["pictures"]) > 0
    smaller = edgectl("models", "compare", "demo-320", "demo-160", *by, "--plot", "seen.png", folder=place)
    assert smaller.returncode == 0, smaller.stderr
    a, b, agreement, *_ = smaller.stdout.splitlines()
    assert (a.split()[:3], b.split()[:3]) == (["A", "demo-320", "320x320"], ["B", "demo-160", "160x160"])
    assert 0.6 < float(agreement.split()[1]) < 1
    drawn = cv2.imread(str(place / "seen.png"))
    assert drawn.shape == (560, 1280, 3)
    for color in ((180, 110, 20), (30, 120, 230), (110, 160, 90)):  # A, B and the agreement's bars
        assert (drawn == color).all(2).sum() > 100


@pytest.mark.parametrize(
    ("model", "measure", "change"),
    [
        ("demo-seg", "pixels", "preprocess.scale=0.0001"),
        ("demo-cls", "classes", "preprocess.scale=0.0001"),
        ("demo-pose", "detections", "preprocess.scale=0.0001"),
        ("demo-160", "detections", 'labels=["star","disc","square","cross","triangle"]'),
    ],
)
def test_every_task_is_compared_in_its_own_way(place: Path, model: str, measure: str, change: str) -> None:
    done = told(edgectl("models", "compare", model, model, "--set-b", change, *BRIEFLY, "--json", folder=place))
    assert done["measure"] == measure
    assert done["score"] is not None
    assert done["score"] < 0.95


def test_classes_are_compared_by_their_names(place: Path) -> None:
    """A model whose classes have other names, common to none of the other's, is compared by their numbers."""
    strange = 'labels=["v","w","x","y","z"]'
    done = told(
        edgectl("models", "compare", "demo-160", "demo-160", "--set-b", strange, *BRIEFLY, "--json", folder=place)
    )
    assert done["score"] == 1.0


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (
            ("compare", "demo-320", "demo-seg", *BRIEFLY),
            "demo-320 does 'detect', demo-seg 'segment': nothing to compare",
        ),
        (("compare", "demo-320", "demo-160", "--images", "gone"), "--images gone: there is no such folder"),
        (("compare", "demo-320", "demo-321"), "there is no model 'demo-321'; did you mean 'demo-320'?"),
        (
            ("compare", "demo-cls", "demo-cls", "--plot", "x.nope", *BRIEFLY),
            "--plot x.nope: OpenCV writes no such picture",
        ),
        (("bench", "gone.onnx"), "No such file or directory"),
        (("bench", "demo-320", "--backend", "onx"), "unknown backend 'onx'; did you mean 'onnx'?"),
        (("remove", "demo-320"), "demo-320 is part of the package"),
    ],
)
def test_what_cannot_be_done_is_told_in_a_sentence(place: Path, arguments: Sequence[str], sentence: str) -> None:
    assert sentence in refusal(edgectl("models", *arguments, folder=place))


def test_everything_about_the_store_is_told_in_json_too(place: Path) -> None:
    added = told(edgectl("models", "add", str(ZOO / "demo-cls.onnx"), "--name", "mine", "--json", folder=place))
    assert added["id"] == "mine@1"
    assert told(edgectl("models", "show", "mine", "--json", folder=place))["labels"] == added["labels"]
    assert told(edgectl("models", "verify", "mine", "--json", folder=place))[0]["state"] == "ok"
    assert told(edgectl("models", "gc", "--json", folder=place))["removed"] == []
    assert told(edgectl("models", "remove", "mine", "--json", folder=place)) == {"removed": "mine@1"}


def test_what_only_the_service_may_read_keeps_nobody_from_its_models(place: Path) -> None:
    with (place / "config.toml").open("a") as file:
        file.write('[mqtt]\nprefix = "plant"\npassword = "${NOT_SET_HERE}"\n[cameras.b]\nsource = "rtsp"\nuri = "x"\n')
    assert told(edgectl("models", "list", "--json", folder=place))
    assert edgectl("infer", "a", "--model", "demo-160", "--limit", "1", folder=place).returncode == 0
    (place / "wrong.toml").write_text("[inference]\nmax_batch = 0\n")
    assert "inference.max_batch" in refusal(edgectl("models", "list", "--config", "wrong.toml", folder=place))


NETS = '''
import torch
from torch import nn


class Tiny(nn.Sequential):
    def __init__(self):
        torch.manual_seed(0)
        super().__init__(
            nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.5),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5),
        )


class Branching(nn.Module):
    def forward(self, images):
        return images.mean((2, 3)) + (1.0 if float(images.mean()) > 0.4 else 0.0)


class OneAtATime(nn.Module):
    def forward(self, images):
        return images.reshape(3, -1).mean(1)[None]


model = Tiny().eval()
if __name__ == "__main__":
    torch.jit.trace(model, torch.rand(1, 3, 96, 96)).save("traced.pt")
    torch.save(model.state_dict(), "weights.pt")
    import nets
    torch.save(nets.Tiny(), "pickled.pt")
'''  # fmt: skip


@pytest.mark.skipif(has_torch, reason="PyTorch is installed")
def test_exporting_without_pytorch_says_what_to_install(place: Path) -> None:
    told = refusal(edgectl("models", "export", "nets:Tiny", "--size", "96", "--out", "x.onnx", folder=place))
    assert "is not installed: pip install 'edge-agent[export]'" in told


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`nets.py`, and what PyTorch makes of it: traced, pickled, and weights alone."""
    folder = tmp_path_factory.mktemp("nets")
    (folder / "nets.py").write_text(NETS)
    subprocess.run([sys.executable, "nets.py"], cwd=folder, check=True, capture_output=True, timeout=300)
    return folder


@pytest.fixture
def nets(place: Path, made: Path) -> Path:
    for file in made.glob("*.p[ty]"):
        shutil.copy(file, place)
    return place


@needs_torch
def test_a_module_becomes_a_file_that_the_agent_understands(nets: Path) -> None:
    given = ("--weights", "weights.pt", "--labels", "disc,square,triangle,star,cross", "--fact", "task=classify")
    into = ("--size", "96", "--out", "tiny.onnx", "--json")
    done = told(edgectl("models", "export", "nets:Tiny", *given, *into, folder=nets))
    assert done["outputs"] == {"output0": [None, 5]}
    assert 0 <= done["difference"] < 1e-4
    assert (done["family"], done["task"]) == ("classification", "classify")
    shown = told(edgectl("models", "inspect", "tiny.onnx", "--json", folder=nets))
    assert shown["labels"] == ["disc", "square", "triangle", "star", "cross"]
    assert shown["inputs"][0]["shape"] == [None, 3, 96, 96]
    cv2.imwrite(str(nets / "grey.png"), np.full((96, 96, 3), 90, np.uint8))
    seen = edgectl("infer", "grey.png", "--model", "tiny.onnx", "--json", folder=nets)
    assert len(json.loads(seen.stdout)["classes"]) == 5


@needs_torch
def test_an_exported_model_is_registered_with_its_parent(nets: Path) -> None:
    into_store = ("--size", "96", "--name", "tiny", "--json")
    first = told(edgectl("models", "export", "traced.pt", *into_store, folder=nets))["registered"]
    other = told(edgectl("models", "export", "traced.pt", *into_store, "--fact", "round=2", folder=nets))["registered"]
    named = told(edgectl("models", "export", "nets:model", *into_store, "--parent", "tiny@1", folder=nets))[
        "registered"
    ]
    assert (first["id"], first["parent"], first["source"]) == ("tiny@1", None, str(nets / "traced.pt"))
    assert (other["id"], other["parent"]) == ("tiny@2", "tiny@1"), "the last one that came from the same file"
    assert (named["id"], named["parent"], named["source"]) == ("tiny@3", "tiny@1", "nets:model")


@needs_torch
def test_a_pickled_module_is_opened_only_if_it_is_trusted(nets: Path) -> None:
    out = ("--size", "96", "--out", "x.onnx")
    assert "if you trust whoever made it" in refusal(edgectl("models", "export", "pickled.pt", *out, folder=nets))
    assert not (nets / "x.onnx").exists()
    assert edgectl("models", "export", "pickled.pt", "--trust", *out, folder=nets).returncode == 0
    assert (nets / "x.onnx").is_file()


@needs_torch
@pytest.mark.parametrize(
    ("source", "sentence"),
    [
        ("nets:Branching", "the trace does not hold for any picture"),
        ("nets:OneAtATime", "--fixed-batch"),
        ("weights.pt", "--weights weights.pt"),
        ("nets:Gone", "nets has no 'Gone'"),
        ("gone:Net", "No module named 'gone'"),
        ("gone.pt", "there is no such file"),
    ],
)
def test_what_cannot_be_exported_is_told_in_a_sentence(nets: Path, source: str, sentence: str) -> None:
    assert sentence in refusal(edgectl("models", "export", source, "--size", "96", "--out", "x.onnx", folder=nets))
    assert not (nets / "x.onnx").exists()
