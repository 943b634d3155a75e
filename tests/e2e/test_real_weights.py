"""YOLOX-Nano, trained by others, on a real street scene, through the whole agent."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray

from tests import schemas
from tests.rigs import SHARED, AgentProcess, Broker, Probe, RtspServer, config, encode_h264, need_file

pytestmark = [pytest.mark.slow, pytest.mark.soak]

# People in frames 0, 10, …, 190 of vtest_200.avi, as counted with other code at a score of 0.5 or more.
PEOPLE = (4, 5, 5, 4, 7, 5, 5, 6, 6, 7, 7, 6, 8, 7, 7, 8, 7, 7, 8, 8)


@pytest.fixture
def model() -> str:
    path = need_file(SHARED / "models" / "det_yolox_nano_416.onnx")
    return f"""
[model]
active = "yolox-nano"
[models.yolox-nano]
path = "{path}"
labels = "coco80"
options = {{ head = "yolox" }}
[inference]
score_threshold = 0.5
"""


@pytest.fixture(scope="session")
def film() -> Path:
    return need_file(SHARED / "media" / "vtest_200.avi")


def frames(path: Path) -> Iterator[NDArray[np.uint8]]:
    capture = cv2.VideoCapture(str(path))
    while True:
        ok, frame = capture.read()
        if not ok:
            return
        yield frame


def people(result: dict[str, Any]) -> int:
    return sum(detection["label"] == "person" for detection in result["detections"])


def agreeing(results: dict[int, dict[str, Any]]) -> int:
    counts = [people(results[10 * i]) if 10 * i in results else -9 for i in range(20)]
    print("people", counts)
    return sum(abs(seen - counted) <= 1 for seen, counted in zip(counts, PEOPLE, strict=True))


def test_people_are_counted_in_a_file(tmp_path: Path, broker: Broker, probe: Probe, model: str, film: Path) -> None:
    body = f'{model}[cameras.street]\nsource = "file"\npath = "{film}"\npace = "fast"\n'
    with AgentProcess(tmp_path, config(broker.port, body)):
        heard = probe.wait("cameras/street/results", n=200, timeout_s=60)
    results = {message.json()["seq"]: message.json() for message in heard}
    for message in heard:
        schemas.validate(message)
    assert sorted(results) == list(range(200))
    assert agreeing(results) >= 18
    worst_first = reversed(results[100]["detections"])
    vehicles = {d["label"]: d["score"] for d in worst_first if d["label"] != "person"}
    assert vehicles["car"] == pytest.approx(0.797, abs=0.02)
    assert vehicles["truck"] == pytest.approx(0.760, abs=0.02)


def test_people_are_counted_in_an_rtsp_stream(
    tmp_path: Path, broker: Broker, probe: Probe, model: str, film: Path
) -> None:
    stream = encode_h264(frames(film), tmp_path / "street.mp4", fps=15)
    with RtspServer(stream) as server:
        body = f'{model}[cameras.street]\nsource = "rtsp"\nurl = "{server.url}"\nmax_frames = 60\n'
        with AgentProcess(tmp_path, config(broker.port, body)):
            probe.wait("cameras/street/results", lambda result: result["seq"] >= 195, timeout_s=60)
    results = {message.json()["seq"]: message.json() for message in probe.on("cameras/street/results")}
    assert agreeing(results) >= 18


@pytest.mark.parametrize(
    ("picture", "label", "score", "box"),
    [("astronaut.png", "person", 0.926, [11, 20, 369, 507]), ("chelsea.png", "cat", 0.621, None)],
)
def test_a_folder_of_pictures(
    tmp_path: Path,
    broker: Broker,
    probe: Probe,
    model: str,
    picture: str,
    label: str,
    score: float,
    box: list[int] | None,
) -> None:
    folder = tmp_path / "pictures"
    folder.mkdir()
    (folder / picture).symlink_to(need_file(SHARED / "media" / picture))
    body = f'{model}[cameras.album]\nsource = "file"\npath = "{folder}"\n'
    with AgentProcess(tmp_path, config(broker.port, body)):
        [heard] = probe.wait("cameras/album/results")
    best = heard.json()["detections"][0]
    assert best["label"] == label
    assert best["score"] == pytest.approx(score, abs=0.02)
    if box:
        assert best["box"] == pytest.approx(box, abs=4)
