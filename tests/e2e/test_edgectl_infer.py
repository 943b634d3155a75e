"""What `edgectl infer` draws and tells beyond boxes: tracks, zones, masks, skeletons; and how it ends."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray

from edge_agent.sources.world import World
from tests.e2e.test_edgectl import edgectl, messages

pytestmark = pytest.mark.slow

YARD = """
[tracking]
enabled = true
[cameras.yard]
source = "synthetic"
width = 640
height = 480
pace = "fast"
[cameras.yard.zones]
left = [[0.0, 0.0], [0.5, 0.0], [0.5, 1.0], [0.0, 1.0]]
all = [[0.0, 0.0], [1.0, 0.0], [1.0, 1.0], [0.0, 1.0]]
[cameras.yard.lines]
door = [[0.75, 0.1], [0.75, 0.9]]
"""
COMMAND = (sys.executable, "-c", "from edgectl.app import main; main()", "infer")


@pytest.fixture
def scene(tmp_path: Path) -> NDArray[np.uint8]:
    """A picture of the synthetic world, in scene.png."""
    image = np.empty((480, 640, 3), np.uint8)
    World(width=640, height=480, seed=11, objects=5).draw(40, image)
    cv2.imwrite(str(tmp_path / "scene.png"), image)
    return image


def drawn(folder: Path, model: str, *arguments: str) -> NDArray[Any]:
    done = edgectl("infer", "scene.png", "--model", model, "--out", "seen.png", *arguments, folder=folder)
    assert done.returncode == 0, done.stderr
    image = cv2.imread(str(folder / "seen.png"))
    assert image is not None
    return image


def tracks(told: list[dict[str, Any]]) -> list[set[int]]:
    return [{one["track_id"] for one in frame["detections"] if "track_id" in one} for frame in told]


def test_objects_are_followed_from_frame_to_frame_if_that_is_asked_for(tmp_path: Path) -> None:
    by = ("infer", "synthetic", "--model", "demo-160", "--limit", "12", "--json")
    followed = tracks(messages(edgectl(*by, "--track", folder=tmp_path)))
    assert followed[0]
    assert followed[0] & followed[-1], "an object that is there all the time keeps its number"
    assert not any(tracks(messages(edgectl(*by, folder=tmp_path))))


def test_the_configuration_that_lies_here_brings_zones_lines_and_tracks(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text(YARD)
    told = messages(
        edgectl("infer", "yard", "--model", "demo-160", "--limit", "5", "--json", "--out", "seen", folder=tmp_path)
    )
    assert tracks(told)[-1]
    counts = [{zone: sum(by_label.values()) for zone, by_label in frame["zones"].items()} for frame in told]
    whole = [len(frame["detections"]) for frame in told]  # they all stand in the picture, on its edge too
    assert all(whole)
    assert [count["all"] for count in counts] == whole
    assert all(count["left"] <= count["all"] for count in counts)
    pictures = sorted((tmp_path / "seen").iterdir())
    assert [path.name for path in pictures] == [f"yard-{seq:05}.jpg" for seq in range(5)]
    last = cv2.imread(str(pictures[-1])).astype(int)
    zone, line = last[150:330, 318:323], last[150:330, 478:483]
    for border in (zone, line):  # a white line all the way down, give or take what JPEG makes of it
        assert (border.min(2).max(1) > 180).mean() > 0.8
    refused = edgectl("infer", "yard", "--model", "demo-160", "--no-track", folder=tmp_path)
    assert "crossing a line takes tracking" in refused.stderr


def test_masks_cover_what_was_segmented_and_nothing_else(tmp_path: Path, scene: NDArray[np.uint8]) -> None:
    image = drawn(tmp_path, "demo-seg")
    [told] = messages(edgectl("infer", "scene.png", "--model", "demo-seg", "--json", folder=tmp_path))
    changed = np.abs(image.astype(int) - scene).max(2) > 8
    largest = told["segmentation"]["regions"][0]
    inside = np.zeros(scene.shape[:2], np.uint8)
    cv2.fillPoly(inside, [np.array(largest["outline"], np.int32)], 1)
    assert changed[inside.astype(bool)].mean() > 0.8
    objects = sum(one["ratio"] for one in told["segmentation"]["classes"] if one["label"] != "background")
    assert changed.mean() < objects + 0.15, "the background stays as it is, but for captions"


def test_a_skeleton_joins_the_keypoints_that_it_names(tmp_path: Path, scene: NDArray[np.uint8]) -> None:
    joined = "options.skeleton=[[0,1]]"
    plain, with_bones = drawn(tmp_path, "demo-pose"), drawn(tmp_path, "demo-pose", "--set", joined)
    [told] = messages(edgectl("infer", "scene.png", "--model", "demo-pose", "--json", folder=tmp_path))
    sure = [one["keypoints"] for one in told["poses"] if min(point["score"] for point in one["keypoints"]) > 0.5]
    assert sure
    differs = np.abs(plain.astype(int) - with_bones).max(2) > 20
    for center, tip in sure:
        x, y = round((center["x"] + tip["x"]) / 2), round((center["y"] + tip["y"]) / 2)
        assert differs[y - 2 : y + 3, x - 2 : x + 3].any()
    assert not differs[:, :5].all(1).any()


def test_poses_that_are_followed_carry_their_numbers(tmp_path: Path) -> None:
    by = ("infer", "synthetic", "--model", "demo-pose", "--limit", "2")
    for flag, out in (("--track", "with"), ("--no-track", "without")):
        assert edgectl(*by, flag, "--out", out, folder=tmp_path).returncode == 0
    [told, *_] = messages(edgectl(*by, "--track", "--json", folder=tmp_path))
    pictures = [cv2.imread(str(tmp_path / out / "synthetic-00000.jpg")).astype(int) for out in ("with", "without")]
    differs = np.abs(pictures[0] - pictures[1]).max(2) > 60
    followed = [one["box"] for one in told["poses"] if "track_id" in one and 30 < one["box"][1] < 400]
    assert followed
    for x1, y1, *_ in followed:  # in the caption, above the box
        x, y = round(x1), round(y1)
        assert differs[max(0, y - 18) : y, max(0, x) : x + 80].any()


def test_a_camera_is_ended_by_ctrl_c_and_its_video_is_complete(tmp_path: Path) -> None:
    arguments = ("synthetic", "--model", "demo-160", "--json", "--out", "film.avi")
    with subprocess.Popen((*COMMAND, *arguments), cwd=tmp_path, stdout=-1, stderr=-1, text=True) as running:
        assert running.stdout is not None
        lines = [running.stdout.readline() for _ in range(3)]
        running.send_signal(signal.SIGINT)
        rest, complaints = running.communicate(timeout=60)
    assert running.returncode == 0, complaints
    assert complaints == "written: film.avi\n"
    told = [json.loads(line) for line in (*lines, *rest.splitlines())]
    film = cv2.VideoCapture(str(tmp_path / "film.avi"))
    frames = int(film.get(cv2.CAP_PROP_FRAME_COUNT))
    film.release()
    assert len(told) - 1 <= frames <= len(told)  # the last may have been told and not yet written


def test_a_bar_shows_on_a_terminal_alone(tmp_path: Path, scene: NDArray[np.uint8]) -> None:
    ours, theirs = pty.openpty()
    environ = {**os.environ, "TERM": "xterm", "COLUMNS": "80"}
    arguments = (*COMMAND, "scene.png", "--model", "demo-160", "--json")
    try:
        with (tmp_path / "told").open("w") as told:
            subprocess.run(arguments, cwd=tmp_path, stdout=told, stderr=theirs, env=environ, timeout=60, check=True)
        shown = os.read(ours, 1 << 16).decode()
    finally:
        os.close(ours)
        os.close(theirs)
    assert "1 frames" in shown
    assert "100%" in shown
    json.loads((tmp_path / "told").read_text())
    assert edgectl("infer", "scene.png", "--model", "demo-160", "--json", folder=tmp_path).stderr == ""
