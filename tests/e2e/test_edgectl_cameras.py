"""`edgectl cameras`, as people run it: against a real RTSP server, files, the synthetic world, and nothing at all."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from edgectl._reading import timing
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.rigs import RtspServer, free_port

pytestmark = pytest.mark.slow


def edgectl(*arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "from edgectl.app import main; main()", "cameras", *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=60, check=False)


def told(done: subprocess.CompletedProcess[str], status: int = 0) -> Any:
    assert done.returncode == status, done.stderr
    assert "Traceback" not in done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def server() -> Iterator[RtspServer]:
    with RtspServer(live="320x240", login="viewer:s3cret") as server:
        yield server


@pytest.fixture
def film(tmp_path: Path) -> Path:
    """Twelve different pictures in Motion-JPEG, of which ten go into a second."""
    path = tmp_path / "film.avi"
    video = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"MJPG"), 10, (160, 120))
    for index in range(12):
        video.write(np.full((120, 160, 3), 20 * index, np.uint8))
    video.release()
    return path


@pytest.fixture
def album(tmp_path: Path) -> Path:
    (tmp_path / "album").mkdir()
    for index in range(4):
        cv2.imwrite(str(tmp_path / "album" / f"{index}.png"), np.full((48, 64, 3), 50 * index, np.uint8))
    return tmp_path / "album"


def test_the_cameras_of_the_machine_are_listed_with_and_without_list(tmp_path: Path) -> None:
    plain, named = edgectl("--json", folder=tmp_path), edgectl("list", "--json", folder=tmp_path)
    assert told(plain) == told(named)
    assert all(camera["path"].startswith("/dev/video") and "modes" in camera for camera in told(plain))


def test_people_read_that_there_is_no_camera_or_which_there_are(tmp_path: Path) -> None:
    done = edgectl(folder=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert "no V4L2 camera can be opened here" in done.stdout or "/dev/video" in done.stdout


def test_a_stream_is_measured_and_its_password_kept(tmp_path: Path, server: RtspServer) -> None:
    url = server.url.replace("//", "//viewer:s3cret@")
    done = edgectl("probe", url, "--seconds", "1", "--json", folder=tmp_path)
    found = told(done)
    assert (found["ok"], found["reason"], found["codec"]) == (True, None, "H264")
    assert (found["width"], found["height"], found["nominal_fps"]) == (320, 240, 15.0)
    assert found["frames"] > 2
    assert 1 < found["fps"] < 60
    assert 0 < found["interval_ms"] <= found["longest_ms"]
    assert found["first_frame_ms"] > 0
    assert found["jitter_ms"] >= 0
    assert "s3cret" not in done.stdout + done.stderr


def test_people_read_it_line_by_line(tmp_path: Path, film: Path) -> None:
    done = edgectl("probe", film.name, "--seconds", "20", folder=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    lines = dict(line.split(maxsplit=1) for line in done.stdout.splitlines() if not line.startswith("first"))
    assert (lines["codec"], lines["size"], lines["frames"]) == ("MJPG", "160x120", "12; then it ended")
    assert lines["dropped"] == "none"
    assert lines["rate"].endswith("(it says 10)")


def test_a_file_that_ends_was_read_whole(tmp_path: Path, film: Path) -> None:
    found = told(edgectl("probe", film.name, "--seconds", "20", "--json", folder=tmp_path))
    assert (found["ok"], found["has_ended"], found["frames"], found["drops"]) == (True, True, 12, {})
    assert 1 < found["fps"] < 20


def test_a_configured_camera_is_read_by_its_name(tmp_path: Path, server: RtspServer) -> None:
    (tmp_path / "secret").write_text("s3cret")
    (tmp_path / "agent.toml").write_text(
        f'[cameras.gate]\nsource = "rtsp"\nurl = "{server.url}"\nusername = "viewer"\npassword_file = "secret"\n'
        '[cameras.yard]\nsource = "synthetic"\nwidth = 96\nheight = 64\nenabled = false\n'
    )
    config = ("--config", "agent.toml", "--json", "--seconds", "0.3")
    gate, yard = (told(edgectl("probe", name, *config, folder=tmp_path)) for name in ("gate", "yard"))
    assert (gate["codec"], gate["width"]) == ("H264", 320)
    assert (yard["codec"], yard["width"], yard["height"]) == (None, 96, 64)
    misspelt = edgectl("probe", "gat", *config, folder=tmp_path)
    assert "did you mean 'gate'?" in told(misspelt, 1)["message"]


def test_a_frozen_server_is_given_up_in_time(tmp_path: Path) -> None:
    with RtspServer(live="320x240") as server:
        (tmp_path / "config.toml").write_text(
            f'[cameras.gate]\nsource = "rtsp"\nurl = "{server.url}"\nopen_timeout_s = 1.0\n'
        )
        server.freeze()
        found = told(edgectl("probe", "gate", "--json", folder=tmp_path), 1)
    assert (found["ok"], found["reason"], found["frames"], found["fps"]) == (False, "timeout", 0, None)


def test_why_a_camera_does_not_deliver_has_a_name(tmp_path: Path, server: RtspServer) -> None:
    (tmp_path / "notes.txt").write_text("no video")
    attempts = {
        server.url.replace("//", "//viewer:wrong@"): "auth_failed",
        f"{server.url}s".replace("//", "//viewer:s3cret@"): "not_found",
        f"rtsp://127.0.0.1:{free_port()}/x": "refused",
        f"http://127.0.0.1:{free_port()}/x.mjpg": "refused",
        "/dev/video99": "device_not_found",
        "usb:dead:beef": "device_not_found",
        "notes.txt": "unsupported",
        "gone.mp4": "not_found",
        "videotestsrc ! fakesink": "unsupported",
    }
    with ThreadPoolExecutor(2) as at_once:
        everything = list(at_once.map(lambda source: edgectl("probe", source, "--json", folder=tmp_path), attempts))
    for done, (source, reason) in zip(everything, attempts.items(), strict=True):
        found = told(done, 1)
        assert (found["ok"], found["reason"], found["frames"]) == (False, reason, 0), source
        assert done.stderr == f"error: {reason}: {found['message']}\n"
        assert "wrong@" not in done.stdout + done.stderr


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("probe", "usb:nonsense"), "cameras.input.device"),
        (("probe", "synthetic", "--config", "gone.toml"), "gone.toml"),
        (("snapshot", "synthetic", "a.xyz"), "a.xyz: no .xyz can be written"),
        (("snapshot", "synthetic", "/proc/none/a.png"), "/proc/none/a.png cannot be written"),
        (("snapshot", "album", "a.png", "--skip", "4"), "end_of_stream: it has only 4 frames"),
        (("snapshot", "/dev/video99", "a.png"), "device_not_found: /dev/video99"),
        (("bench", "synthetic", "gone.mp4"), "gone.mp4: there is no such file, folder or camera"),
    ],
)
def test_what_cannot_be_done_is_told_in_a_sentence(
    tmp_path: Path, album: Path, arguments: Sequence[str], sentence: str
) -> None:
    done = edgectl(*arguments, folder=tmp_path)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("error: ")
    assert sentence in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_snapshot_is_the_picture_that_was_asked_for(tmp_path: Path, album: Path) -> None:
    taken = told(edgectl("snapshot", "album", "out/third.png", "--skip", "2", "--json", folder=tmp_path))
    picture = tmp_path / "out" / "third.png"
    assert (cv2.imread(str(picture)) == 100).all()
    assert (taken["width"], taken["height"], taken["bytes"]) == (64, 48, picture.stat().st_size)
    again = edgectl("snapshot", "album", "out/third.png", folder=tmp_path)
    assert again.stdout == f"written: out/third.png, 64x48, {picture.stat().st_size} bytes\n"
    assert (cv2.imread(str(picture)) == 0).all()
    assert [path.name for path in picture.parent.iterdir()] == ["third.png"], "nothing half-written is left"


def test_several_sources_are_read_at_once_at_full_pace(tmp_path: Path, film: Path) -> None:
    found = told(edgectl("bench", "synthetic", film.name, "synthetic", "--seconds", "1", "--json", folder=tmp_path))
    rows = found["sources"]
    assert [row["source"] for row in rows] == ["synthetic", "film.avi", "synthetic"]
    assert all(row["ok"] and row["frames"] > 12 and not row["dropped"] and not row["is_live"] for row in rows)
    assert all(row["cpu_ms_per_frame"] > 0 for row in rows)
    assert found["frames"] == sum(row["frames"] for row in rows)
    of_threads = sum(row["cpu_ms_per_frame"] * row["frames"] for row in rows)
    assert of_threads <= 1.1 * found["cpu_ms_per_frame"] * found["frames"], "the threads are a part of the process"


def test_a_bench_tells_who_failed_beside_those_who_did_not(tmp_path: Path) -> None:
    done = edgectl("bench", "synthetic", f"rtsp://127.0.0.1:{free_port()}/x", "--seconds", "0.5", folder=tmp_path)
    assert done.returncode == 1
    assert "refused: 127.0.0.1:" in done.stderr
    _, good, bad, total = done.stdout.splitlines()
    assert float(good.split()[3]) > 30
    assert bad.split()[1:] == ["-", "0", "0", "-", "0"]
    assert total.startswith("in all: ")


@settings(deadline=None)
@given(
    st.integers(1_000_000, 1_000_000_000),
    st.lists(st.tuples(st.integers(1, 5), st.booleans()), min_size=3, max_size=50),
)
def test_frames_that_never_came_are_counted_and_those_that_were_dropped_are_not(
    period_ns: int, steps: list[tuple[int, bool]]
) -> None:
    """A camera of an even rate; at each step some periods pass, and our own side dropped what came in them, or not."""
    seq, at = 0, 0
    stamps = [(0, 0)]
    for _ in range(3 * len(steps)):  # so that the usual interval is the period
        seq, at = seq + 1, at + period_ns
        stamps.append((seq, at))
    missing = gaps = 0
    for periods, is_our_drop in steps:
        seq, at = seq + (periods if is_our_drop else 1), at + periods * period_ns
        stamps.append((seq, at))
        if not is_our_drop:
            missing, gaps = missing + periods - 1, gaps + (periods > 1)
    found = timing(stamps)
    assert (found.gaps, found.missing) == (gaps, missing)
    assert found.interval_ms == pytest.approx(period_ns / 1e6, abs=1e-3)
    assert found.longest_ms == pytest.approx(
        max(b[1] - a[1] for a, b in pairwise(stamps) if b[0] == a[0] + 1) / 1e6, abs=1e-3
    )
    assert (found.jitter_ms == 0) == (gaps == 0)
    assert found.fps == pytest.approx(1e9 * seq / at, abs=0.01)


def test_nothing_is_made_up_of_too_few_frames() -> None:
    for stamps in ((), ((0, 5),), ((0, 5), (2, 9))):
        assert set(vars_of(timing(stamps))) == {None}


def vars_of(value: Any) -> list[Any]:
    return [getattr(value, name) for name in value.__slots__]
