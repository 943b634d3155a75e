"""`edgectl infer` and `edgectl models`, as people run them."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import threading
from collections.abc import Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from edge_agent.messages import Topics
from edge_agent.models.store import ModelStore
from edge_agent.sources.world import CLASS_NAMES, World
from tests import schemas
from tests.accuracy import iou
from tests.rigs import Heard

pytestmark = pytest.mark.slow

ZOO = Path(ModelStore({}).get("demo-320").path).parent


def edgectl(*arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "from edgectl.app import main; main()", *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120, check=False)


@pytest.fixture
def world() -> World:
    return World(width=640, height=480, seed=11, objects=5)


@pytest.fixture
def scene(tmp_path: Path, world: World) -> Path:
    image = np.empty((480, 640, 3), np.uint8)
    world.draw(40, image)
    cv2.imwrite(str(tmp_path / "scene.png"), image)
    return tmp_path / "scene.png"


def messages(done: subprocess.CompletedProcess[str]) -> list[dict[str, Any]]:
    assert done.returncode == 0, done.stderr
    told = [json.loads(line) for line in done.stdout.splitlines()]
    for one in told:
        topic = Topics("edge", one["device"]).camera(one["camera"], "results")
        schemas.validate(Heard(topic, json.dumps(one).encode(), False, 0))
    return told


def test_a_picture_gives_the_result_message_that_the_agent_would_send(
    tmp_path: Path, scene: Path, world: World
) -> None:
    [told] = messages(edgectl("infer", scene.name, "--model", "demo-320", "--json", folder=tmp_path))
    truth = world.truth(40)
    visible = truth.boxes[truth.visibility > 0.9]
    found = np.array([one["box"] for one in told["detections"]])
    assert all(iou(box, found).max() > 0.6 for box in visible)
    assert (told["width"], told["height"], told["model"]["name"]) == (640, 480, "demo-320")


def test_people_read_what_was_seen_and_find_the_annotated_picture(tmp_path: Path, scene: Path) -> None:
    done = edgectl("infer", scene.name, "--model", "demo-160", "--out", "out/seen.jpg", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    head, *rows = done.stdout.splitlines()
    assert head.startswith("#0  640x480  demo-160")
    assert any(row.split()[0] in CLASS_NAMES for row in rows)
    drawn, plain = cv2.imread(str(tmp_path / "out" / "seen.jpg")), cv2.imread(str(scene))
    assert drawn.shape == plain.shape
    assert (np.abs(drawn.astype(int) - plain) > 60).any()


def test_a_file_of_ones_own_is_described_by_settings(tmp_path: Path, scene: Path) -> None:
    settings = ("--set", 'labels=["a","b","c","d","e"]', "--set", "preprocess.resize=stretch", "--score", "0.2")
    [told] = messages(
        edgectl("infer", str(scene), "--model", str(ZOO / "demo-320.onnx"), *settings, "--json", folder=tmp_path)
    )
    assert {one["label"] for one in told["detections"]} <= set("abcde")
    assert told["detections"]


def test_a_video_a_folder_and_a_camera_give_a_message_a_frame(tmp_path: Path, world: World) -> None:
    video = cv2.VideoWriter(str(tmp_path / "film.avi"), cv2.VideoWriter_fourcc(*"MJPG"), 10, (640, 480))
    image = np.empty((480, 640, 3), np.uint8)
    (tmp_path / "album").mkdir()
    for index in range(6):
        world.draw(index, image)
        video.write(image)
        if index < 3:
            cv2.imwrite(str(tmp_path / "album" / f"{index}.png"), image)
    video.release()
    for what, count, extra in (("film.avi", 6, ()), ("album", 3, ()), ("synthetic", 4, ("--limit", "4"))):
        told = messages(
            edgectl("infer", what, "--model", "demo-160", "--json", "--out", f"{what}.mp4", *extra, folder=tmp_path)
        )
        assert [one["seq"] for one in told] == list(range(count))
        written = cv2.VideoCapture(str(tmp_path / f"{what}.mp4"))
        assert int(written.get(cv2.CAP_PROP_FRAME_COUNT)) == count
        written.release()
    edgectl("infer", "film.avi", "--model", "demo-160", "--out", "pictures", folder=tmp_path)
    assert len(list((tmp_path / "pictures").iterdir())) == 6


def test_the_agents_own_file_brings_its_models_and_cameras(tmp_path: Path, scene: Path) -> None:
    (tmp_path / "config.toml").write_text(
        '[models.mine]\npath = "mine.onnx"\nlabels = ["v", "w", "x", "y", "z"]\n'
        '[inference]\nscore_threshold = 0.1\n[cameras.yard]\nsource = "synthetic"\nwidth = 320\nheight = 240\n'
    )
    (tmp_path / "mine.onnx").symlink_to(ZOO / "demo-160.onnx")
    [told] = messages(
        edgectl(
            "infer", "yard", "--model", "mine", "--config", "config.toml", "--limit", "1", "--json", folder=tmp_path
        )
    )
    assert (told["width"], told["model"]["name"]) == (320, "mine")
    assert {one["label"] for one in told["detections"]} <= set("vwxyz")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("gone.png", "--model", "demo-320"), "gone.png: there is no such file, folder or camera"),
        (("scene.png", "--model", "demo-321"), "there is no model 'demo-321'; did you mean 'demo-320'?"),
        (("scene.png", "--model", "gone.onnx"), "No such file or directory"),
        (("scene.png", "--model", "text.onnx"), "onnxruntime cannot load"),
        (("text.png", "--model", "demo-320"), "text.png is no picture that OpenCV can read"),
        (("scene.png", "--model", "demo-320", "--set", "family"), "--set family: write key=value"),
        (("scene.png", "--model", "demo-320", "--set", "famly=yolo"), "models.demo-320.famly: unknown key"),
        (("scene.png", "--model", "demo-320", "--set", "family=yollo"), "unknown family 'yollo'; did you mean 'yolo'?"),
        (("scene.png", "--model", "demo-320", "--set", "labels=coco80"), "names 80 labels, the model's output has 5"),
        (("scene.png", "--model", "demo-320", "--out", "/proc/x/y.png"), "cannot be written"),
        (("scene.png", "--model", "demo-320", "--config", "gone.toml"), "gone.toml"),
        (("scene.png", "--model", "demo-320", "--backend", "tensorrt"), None),
    ],
)
def test_what_cannot_be_done_is_told_in_a_sentence(
    tmp_path: Path, scene: Path, arguments: Sequence[str], sentence: str | None
) -> None:
    for name in ("text.onnx", "text.png"):
        (tmp_path / name).write_text("this is neither")
    done = edgectl("infer", *arguments, folder=tmp_path)
    assert "Traceback" not in done.stderr
    if sentence is None:  # the CPU takes over where there is no GPU
        assert done.returncode == 0
        return
    assert done.returncode == 1
    assert sentence in done.stderr
    assert done.stderr.count("\n") <= 2


def test_inspect_says_what_a_model_is_and_why(tmp_path: Path) -> None:
    done = edgectl("models", "inspect", "demo-320", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "family      yolo" in done.stdout
    assert "because     the output 'output0' [?, 9, 2100] is an anchor-free YOLO head" in done.stdout
    told = json.loads(edgectl("models", "inspect", str(ZOO / "demo-160.onnx"), "--json", folder=tmp_path).stdout)
    assert told["labels"] == list(CLASS_NAMES)
    assert told["preprocess"]["width"] == 160
    assert told["inputs"] == [{"name": "images", "shape": [None, 3, 160, 160], "dtype": "float32"}]


def test_inspect_refuses_what_cannot_fit_together(tmp_path: Path) -> None:
    done = edgectl("models", "inspect", "demo-320", "--set", "labels=coco80", folder=tmp_path)
    assert done.returncode == 1
    assert "problem     the entry names 80 labels, the model's output has 5 classes" in done.stdout


STORE = """
[models]
dir = "store"
[fetch]
hosts = ["127.0.0.1"]
allow_private = true
[cameras.a]
source = "synthetic"
"""


def test_the_store_is_kept_without_an_agent(tmp_path: Path, scene: Path) -> None:
    (tmp_path / "config.toml").write_text(STORE)
    (tmp_path / "names.txt").write_text("one\ntwo\nthree\nfour\nfive\n")
    file, by_name = str(ZOO / "demo-160.onnx"), ("--name", "mine", "--set", "labels=names.txt")
    added = edgectl("models", "add", file, *by_name, folder=tmp_path)
    again = json.loads(edgectl("models", "add", file, *by_name, "--json", folder=tmp_path).stdout)
    other = edgectl("models", "add", file, "--name", "mine", folder=tmp_path)
    listed = json.loads(edgectl("models", "list", "--json", folder=tmp_path).stdout)
    told = edgectl("models", "list", folder=tmp_path).stdout
    shown = json.loads(edgectl("models", "show", "mine@1", folder=tmp_path).stdout)
    [seen] = messages(
        edgectl("infer", scene.name, "--model", "mine@1", "--config", "config.toml", "--json", folder=tmp_path)
    )
    sound = edgectl("models", "verify", folder=tmp_path)
    (tmp_path / "store" / "mine" / "1" / "model.onnx").write_bytes(b"")
    spoilt = edgectl("models", "verify", "mine@1", folder=tmp_path)
    unsure = edgectl("models", "remove", "mine", folder=tmp_path)
    removed = edgectl("models", "remove", "mine@1", folder=tmp_path)
    tidied = edgectl("models", "gc", folder=tmp_path)
    assert added.returncode == 0, added.stderr
    assert "edgectl cmd model.activate name=mine" in added.stdout
    assert again["id"] == "mine@1", "the same again is the same"
    assert other.stdout.startswith("mine@2: detect")
    assert [model["id"] for model in listed if model["origin"] == "registered"] == ["mine@1", "mine@2"]
    assert "yolox-nano" in told, "what can be fetched"
    assert shown["labels"] == ["one", "two", "three", "four", "five"]
    assert {one["label"] for one in seen["detections"]} <= set(shown["labels"])
    assert seen["model"]["name"] == "mine"
    assert (sound.returncode, spoilt.returncode) == (0, 1)
    assert spoilt.stdout.startswith("truncated mine@1")
    assert "say which" in unsure.stderr
    assert (removed.returncode, removed.stdout) == (0, "removed mine@1\n")
    assert tidied.returncode == 0


def test_a_model_is_downloaded_by_its_checksum_alone(tmp_path: Path) -> None:
    content = (ZOO / "demo-160.onnx").read_bytes()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *arguments: object) -> None:
            """To nobody."""

    (tmp_path / "config.toml").write_text(STORE)
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        serving = threading.Thread(target=server.serve_forever)
        serving.start()
        try:
            url = f"http://127.0.0.1:{server.server_port}/m.onnx"
            good, wrong = hashlib.sha256(content).hexdigest(), hashlib.sha256(b"").hexdigest()
            fetched = edgectl("models", "fetch", "far", "--url", url, "--sha256", good, folder=tmp_path)
            another = edgectl("models", "fetch", "far", "--url", url, "--sha256", wrong, folder=tmp_path)
            unsure = edgectl("models", "fetch", "far", "--url", url, folder=tmp_path)
            elsewhere = url.replace("127.0.0.1", "127.0.0.2")
            stranger = edgectl("models", "fetch", "far", "--url", elsewhere, "--sha256", good, folder=tmp_path)
        finally:
            server.shutdown()
            serving.join()
    assert fetched.returncode == 0, fetched.stderr
    assert fetched.stdout.startswith("far@1: detect, 0.7 MB")
    assert "has the SHA-256" in another.stderr
    assert "give the file's sha256 too" in unsure.stderr
    assert "127.0.0.2" in stranger.stderr
    assert [another.returncode, unsure.returncode, stranger.returncode] == [1, 1, 1]
