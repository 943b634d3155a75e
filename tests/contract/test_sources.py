"""One suite for every source that can run here: the protocol of `edge_agent.sources.Source`."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from edge_agent import config, sources
from edge_agent.data import Image
from edge_agent.errors import EndOfStream, SourceError
from edge_agent.sources import Source
from edge_agent.sources.world import World
from tests.network_cameras import MjpegServer, synthetic_jpegs
from tests.rigs import need_gi

Make = Callable[[], Source]


def make(kind: str, **options: Any) -> Source:
    return sources.make(config.parse({"cameras": {"c": {"source": kind, **options}}}).cameras["c"])


def next_picture(source: Source, into: Image, *, timeout_s: float = 10.0) -> Image:
    """The next picture a source has, like the session that reads it."""
    until = time.monotonic() + timeout_s
    while source.grab() is None:
        assert time.monotonic() < until, "no picture came"
    image = source.retrieve(into)
    assert image is not None
    return image


@pytest.fixture(params=["synthetic", "video", "folder", "isolated", "mjpeg", "gstreamer"])
def source(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Source]:
    if request.param == "mjpeg":
        with MjpegServer(synthetic_jpegs()) as server:
            yield make("http", url=server.url)
        return
    made = _made(request.param, tmp_path)
    yield made
    made.close()


def _made(kind: str, tmp_path: Path) -> Source:
    if kind == "synthetic":
        return make("synthetic", width=160, height=120, pace="fast")
    if kind == "isolated":
        return make("synthetic", width=160, height=120, pace="fast", isolation="process")
    if kind == "gstreamer":
        need_gi()
        return make("gstreamer", pipeline="videotestsrc pattern=ball ! video/x-raw,width=160,height=120 ! appsink")
    world = World(width=160, height=120, seed=1)
    frame = np.empty((120, 160, 3), np.uint8)
    video = cv2.VideoWriter(str(tmp_path / "v.avi"), cv2.VideoWriter_fourcc(*"MJPG"), 10, (160, 120))
    (tmp_path / "pictures").mkdir()
    for index in range(5):
        world.draw(index, frame)
        video.write(frame)
        cv2.imwrite(str(tmp_path / "pictures" / f"{index}.png"), frame)
    video.release()
    if kind == "video":
        return make("file", path=str(tmp_path / "v.avi"), pace="fast", loop=True)
    return make("folder", path=str(tmp_path / "pictures"), pace="fast", loop=True)


def test_it_opens_reads_and_closes(source: Source) -> None:
    assert source.check() == []
    source.close()
    opened = source.open()
    assert (opened.width, opened.height) == (160, 120)
    buffer = np.zeros((120, 160, 3), np.uint8)
    times = []
    for _ in range(12):
        captured_ns = None
        while captured_ns is None:
            captured_ns = source.grab()
        image = source.retrieve(buffer)
        assert image is not None
        assert image.shape == (120, 160, 3)
        assert image.dtype == np.uint8
        assert image.std() > 5
        assert image is buffer or not np.shares_memory(image, buffer)
        times.append(captured_ns)
    assert times == sorted(times)
    assert 0 <= time.monotonic_ns() - times[-1] < 5e9, "on the monotonic clock"
    source.close()
    source.close()


def test_it_can_be_opened_again(source: Source) -> None:
    for _ in range(2):
        opened = source.open()
        next_picture(source, np.zeros((opened.height, opened.width, 3), np.uint8))
        source.close()


def test_a_picture_may_be_passed_over(source: Source) -> None:
    opened = source.open()
    for _ in range(3):
        source.grab()
    next_picture(source, np.zeros((opened.height, opened.width, 3), np.uint8))
    source.close()


def test_a_buffer_of_another_shape_does_no_harm(source: Source) -> None:
    source.open()
    assert next_picture(source, np.zeros((7, 9, 3), np.uint8)).shape == (120, 160, 3)
    source.close()


def test_a_file_ends_where_it_does_not_loop(tmp_path: Path) -> None:
    frame = np.full((20, 30, 3), 9, np.uint8)
    for name in ("b.png", "a.png"):
        cv2.imwrite(str(tmp_path / name), frame + (name == "b.png"))
    (tmp_path / "notes.txt").write_text("no picture")
    source = make("file", path=str(tmp_path), pace="fast")
    source.open()
    shades = [next_picture(source, frame)[0, 0, 0] for _ in range(2)]
    assert shades == [9, 10], "in the order of the names"
    with pytest.raises(EndOfStream, match="set loop = true"):
        source.grab()


def test_a_picture_that_cannot_be_read_is_passed_over(tmp_path: Path) -> None:
    for name, shade in (("b.png", 10), ("d.png", 20)):
        cv2.imwrite(str(tmp_path / name), np.full((20, 30, 3), shade, np.uint8))
    for name in ("a.png", "c.png"):
        (tmp_path / name).write_bytes(b"no picture")
    source = make("file", path=str(tmp_path), pace="fast")
    buffer = np.zeros((20, 30, 3), np.uint8)
    assert (source.open().width, source.open().height) == (30, 20)
    assert [next_picture(source, buffer)[0, 0, 0] for _ in range(2)] == [10, 20]
    with pytest.raises(EndOfStream):
        source.grab()


def test_a_slow_pace_does_not_hold_up_a_read() -> None:
    source = make("synthetic", fps=0.1)
    source.open()
    assert source.grab() is not None
    began = time.monotonic()
    assert source.grab() is None
    assert time.monotonic() - began < 2.0
    source.close()


@pytest.mark.parametrize(
    ("kind", "options", "reason"),
    [
        ("file", {"path": "nowhere.mp4"}, "not_found"),
        ("file", {"path": __file__}, "unsupported"),
        ("v4l2", {"device": "/dev/video99"}, "device_not_found"),
        ("v4l2", {"device": __file__}, "unsupported"),
        ("v4l2", {"device": "usb:dead:beef"}, "device_not_found"),
        ("folder", {"path": __file__}, "not_found"),
        ("http", {"url": "http://127.0.0.1:1/x", "open_timeout_s": 1.0}, "refused"),
        ("http", {"url": "http://no.such.host.invalid/x", "open_timeout_s": 1.0}, "not_found"),
        ("http", {"url": "rtsp://127.0.0.1/"}, "unsupported"),
        ("gstreamer", {"pipeline": "videotestsrc ! fakesink"}, "unsupported"),
        ("rtsp", {"url": "rtsp://127.0.0.1:1/x", "open_timeout_s": 1.0}, "refused"),
        ("rtsp", {"url": "rtsp://no.such.host.invalid/x", "open_timeout_s": 1.0}, "not_found"),
        ("rtsp", {"url": "rtsp://cam..lan/x", "open_timeout_s": 1.0}, "not_found"),
        ("rtsp", {"url": "http://127.0.0.1/"}, "unsupported"),
    ],
)
def test_what_cannot_open_says_why(kind: str, options: dict[str, Any], reason: str) -> None:
    source = make(kind, **options)
    with pytest.raises(SourceError) as caught:
        source.open()
    assert caught.value.reason == reason
    source.close()


@pytest.mark.parametrize(
    ("pipeline", "reason"),
    [
        ("videotestsrc num-buffers=3 ! appsink", "disconnected"),
        ("nosuchelement ! appsink", "unsupported"),
        ("v4l2src device=/dev/video99 ! appsink", "not_found"),
        ("videotestsrc ! video/x-raw,format=AYUV64 ! appsink caps=video/x-raw", "unsupported"),
    ],
)
def test_a_pipeline_that_fails_says_why(pipeline: str, reason: str) -> None:
    need_gi()
    source = make("gstreamer", pipeline=pipeline, open_timeout_s=3.0)
    with pytest.raises(SourceError) as caught:
        source.open()
        for _ in range(9):
            next_picture(source, np.empty((240, 320, 3), np.uint8))
    assert caught.value.reason == reason
    source.close()


def test_rtsp_never_shows_its_login() -> None:
    url = "rtsp://me:topsecret@127.0.0.1:1/user=admin&password=topsecret?token=topsecret"
    source = make("rtsp", url=url, username="u", password="topsecret")
    with pytest.raises(SourceError) as caught:
        source.open()
    assert "topsecret" not in str(caught.value)
    assert "topsecret" not in repr(source)


def test_rtsp_puts_the_login_into_the_url_escaped() -> None:
    source = make("rtsp", url="rtsp://cam.lan:8554/a?b=c", username="u@x", password="p:/?#")
    assert source._url_with_credentials() == "rtsp://u%40x:p%3A%2F%3F%23@cam.lan:8554/a?b=c"
