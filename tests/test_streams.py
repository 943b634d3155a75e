"""What network sources are made of: clocks, multipart bodies, raw pictures, and what servers answer."""

from __future__ import annotations

import io
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import psutil
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from edge_agent import config, sources
from edge_agent.errors import SourceError
from edge_agent.sources import Source, _mjpeg, _opencv, _pixels, _rtsp
from edge_agent.sources._clock import MediaClock
from tests.network_cameras import FileServer, MjpegServer, TcpServer, say_garbage, say_nothing, synthetic_jpegs
from tests.rigs import RtspServer, need_gstreamer, need_program

SECOND = 1_000_000_000


def make(kind: str, **options: Any) -> Source:
    return sources.make(config.parse({"cameras": {"c": {"source": kind, **options}}}).cameras["c"])


def pictures(source: Source, count: int) -> list[np.ndarray]:
    """The first pictures of a source, which is closed then."""
    try:
        opened = source.open()
        into, found = np.empty((opened.height, opened.width, 3), np.uint8), []
        until = time.monotonic() + 15
        while len(found) < count:
            assert time.monotonic() < until
            if source.grab() is not None and (image := source.retrieve(into)) is not None:
                found.append(image.copy())
        return found
    finally:
        source.close()


# Time stamps


@settings(max_examples=60, deadline=None)
@given(
    drift_ppm=st.floats(-200, 200),
    delay_ms=st.lists(st.floats(0, 80), min_size=50, max_size=50),
    zero_s=st.floats(0, 1e6),
)
@example(drift_ppm=0.0, delay_ms=[9.0, 42.0] + [0.0, 42.0] * 22 + [75.0, 0.0, 0.0, 75.0], zero_s=0.0)
def test_stamps_are_put_on_our_clock_whatever_the_jitter_and_the_drift(
    drift_ppm: float, delay_ms: list[float], zero_s: float
) -> None:
    clock, told, arrived, delays_ns = MediaClock(), -1, 0, []
    for index in range(3000):  # 100 s at 30 fps
        true_ns = index * SECOND // 30
        # A picture that is held up holds up those behind it, so the least delay drawn may never be met.
        arrived = max(arrived + 1, true_ns + int(delay_ms[index % 50] * 1e6) + 5 * SECOND // 100)
        delays_ns.append(arrived - true_ns)
        stamp_s = zero_s + true_ns / 1e9 * (1 + drift_ppm * 1e-6)
        captured = clock.captured_ns(stamp_s, arrived)
        assert told <= captured <= arrived
        told = captured
        if index > 100:
            late_ns, drifted_ns = captured - true_ns, (30 * 0.2 + 2) * 1e6  # away in a window, and no more
            assert min(delays_ns) - drifted_ns <= late_ns <= min(delays_ns[-50:]) + drifted_ns, index


def test_pictures_that_were_held_up_are_known_by_their_age() -> None:
    clock = MediaClock()
    for index in range(300):
        clock.captured_ns(7 + index / 30, SECOND * (100 + index / 30).__floor__() + index % 30 * SECOND // 30)
    held = [clock.captured_ns(7 + (300 + index) / 30, 113 * SECOND + index) for index in range(60)]
    ages_s = [(113 * SECOND - captured) / SECOND for captured in held]
    assert ages_s[0] == pytest.approx(3.0, abs=0.05)
    assert ages_s == sorted(ages_s, reverse=True)


@pytest.mark.parametrize(
    "stamps",
    [
        [None] * 10,
        [5.0] * 10,
        [float(10 - index) for index in range(10)],
        [0.0, 1.0, 2.0, 1e6, 1e6 + 1, 1e6 + 2, 3.0, 4.0, 5.0, 6.0],
    ],
)
def test_a_clock_that_is_none_stands_or_jumps_gives_times_near_the_arrival(stamps: list[float | None]) -> None:
    clock = MediaClock()
    for index, stamp in enumerate(stamps):
        arrived = (1000 + index) * SECOND
        assert arrived - SECOND * 3.1 <= clock.captured_ns(stamp, arrived) <= arrived


# Motion-JPEG

Jpegs = st.lists(st.binary(max_size=300).map(lambda data: b"\xff\xd8" + data + b"\xff\xd9"), min_size=1, max_size=6)


@settings(max_examples=200, deadline=None)
@given(jpegs=Jpegs, newline=st.sampled_from((b"\r\n", b"\n")), preamble=st.sampled_from((b"", b"\r\n", b"\r\n\r\n")))
def test_parts_with_a_length_come_back_as_they_were(jpegs: list[bytes], newline: bytes, preamble: bytes) -> None:
    body = preamble + b"".join(
        b"--b" + newline + b"Content-Length: %d" % len(jpeg) + newline * 2 + jpeg + newline for jpeg in jpegs
    )
    stream = io.BytesIO(body + b"--b--" + newline)
    found = [_mjpeg.next_part(stream, b"--b") for _ in jpegs]
    assert [part.jpeg for part in found if part] == jpegs
    assert _mjpeg.next_part(stream, b"--b") is None


def test_parts_without_a_length_end_with_their_picture() -> None:
    jpegs = synthetic_jpegs()[:3]
    body = b"".join(b"--b\r\nContent-Type: image/jpeg\r\nX-Timestamp: 12.5\r\n\r\n" + jpeg + b"\r\n" for jpeg in jpegs)
    stream = io.BytesIO(body)
    for jpeg in jpegs:
        part = _mjpeg.next_part(stream, b"--b")
        assert part is not None and part.stamp_s == 12.5
        assert cv2.imdecode(np.frombuffer(part.jpeg, np.uint8), cv2.IMREAD_COLOR).shape == (120, 160, 3)
        assert part.jpeg == jpeg


@settings(max_examples=300, deadline=None)
@given(body=st.binary(max_size=400), boundary=st.sampled_from((b"--b", b"--frame")))
def test_whatever_a_server_sends_is_a_part_the_end_or_a_value_error(body: bytes, boundary: bytes) -> None:
    stream = io.BytesIO(boundary + b"\r\n" + body if len(body) % 2 else body)
    try:
        while _mjpeg.next_part(stream, boundary) is not None:
            pass
    except (ValueError, _mjpeg.http.client.HTTPException):
        pass


@pytest.mark.parametrize(
    ("content_type", "expected"),
    [
        ("multipart/x-mixed-replace; boundary=frame", b"--frame"),
        ('multipart/x-mixed-replace;boundary="--a b"', b"--a b"),
        ("multipart/x-mixed-replace", None),
        ("image/jpeg", None),
        ("", None),
    ],
)
def test_the_boundary_is_found(content_type: str, expected: bytes | None) -> None:
    assert _mjpeg.boundary_of(content_type) == expected


def test_a_motion_jpeg_camera_without_lengths_plays() -> None:
    with MjpegServer(synthetic_jpegs(), with_length=False) as server:
        assert pictures(make("http", url=server.url), 5)[4].shape == (120, 160, 3)


# Raw pictures


@pytest.mark.parametrize("size", [(64, 48), (38, 22), (640, 360)])
@pytest.mark.parametrize("format", ["BGR3", "BGRx", "RGB3", "YUYV", "UYVY", "NV12", "NV21", "YU12", "GREY", "MJPG"])
def test_each_raw_format_becomes_the_picture_it_was(format: str, size: tuple[int, int]) -> None:
    width, height = size
    rows, columns = np.mgrid[0:height, 0:width]
    picture = np.stack((columns * 200 // width, rows * 200 // height, (rows + columns) * 100 // (width + height)), 2)
    picture = picture.astype(np.uint8)
    raw = encoded(format, picture)
    into = np.empty_like(picture)
    for stride in (0,) if format in ("MJPG", "NV12", "NV21", "YU12") else (0, raw.size // height + 16):
        padded = raw
        if stride:
            padded = np.zeros((height, stride), np.uint8)
            padded[:, : raw.size // height] = raw.reshape(height, -1)
            padded = padded.reshape(-1)
        image = _pixels.to_bgr(format, padded, width, height, stride, into)
        assert image is not None and (image is into or format == "MJPG")
        wanted = picture if format != "GREY" else np.repeat(cv2.cvtColor(picture, cv2.COLOR_BGR2GRAY)[:, :, None], 3, 2)
        assert np.abs(image.astype(int) - wanted).mean() < 4
    assert _pixels.to_bgr(format, raw[: raw.size // 4], width, height, 0, into) is None or format == "MJPG"


def encoded(format: str, picture: np.ndarray) -> np.ndarray:
    """`picture` (BGR) in a raw format, by formulas of the test's own where OpenCV has none."""
    if format == "MJPG":
        return cv2.imencode(".jpg", picture, [cv2.IMWRITE_JPEG_QUALITY, 98])[1].reshape(-1)
    if format == "GREY":
        return cv2.cvtColor(picture, cv2.COLOR_BGR2GRAY).reshape(-1)
    if format in ("BGR3", "RGB3", "BGRx"):
        order = {"BGR3": picture, "RGB3": picture[:, :, ::-1], "BGRx": cv2.cvtColor(picture, cv2.COLOR_BGR2BGRA)}
        return np.ascontiguousarray(order[format]).reshape(-1)
    height, width = picture.shape[:2]
    planar = cv2.cvtColor(picture, cv2.COLOR_BGR2YUV_I420).reshape(-1)
    y = planar[: width * height].reshape(height, width)
    u, v = planar[width * height :].reshape(2, height // 2, width // 2)
    if format == "YU12":
        return planar
    if format in ("NV12", "NV21"):
        pair = (u, v) if format == "NV12" else (v, u)
        return np.concatenate((y.reshape(-1), np.stack(pair, 2).reshape(-1)))
    packed = np.empty((height, width, 2), np.uint8)
    colour = np.empty((height, width), np.uint8)
    colour[:, 0::2], colour[:, 1::2] = np.repeat(u, 2, 0), np.repeat(v, 2, 0)
    packed[:, :, 0], packed[:, :, 1] = (y, colour) if format == "YUYV" else (colour, y)
    return packed.reshape(-1)


# What servers answer


@pytest.fixture(scope="module")
def rtsp_with_login() -> Iterator[RtspServer]:
    with RtspServer(live="320x240", login="viewer:secret") as server:
        yield server


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"username": "viewer", "password": "wrong"}, "auth_failed"),
        ({}, "auth_failed"),
        ({"username": "viewer", "password": "secret", "path": "/other"}, "not_found"),
    ],
)
def test_an_rtsp_server_that_refuses_says_why(
    rtsp_with_login: RtspServer, options: dict[str, str], reason: str
) -> None:
    url = rtsp_with_login.url.replace("/stream", options.pop("path", "/stream"))
    source = make("rtsp", url=url, **options)
    with pytest.raises(SourceError) as caught:
        source.open()
    assert caught.value.reason == reason
    assert "secret" not in str(caught.value)


def test_rtsp_with_a_login_plays(rtsp_with_login: RtspServer) -> None:
    for url, options in (
        (rtsp_with_login.url, {"username": "viewer", "password": "secret"}),
        (rtsp_with_login.url.replace("rtsp://", "rtsp://viewer:secret@"), {}),
    ):
        assert pictures(make("rtsp", url=url, **options), 3)[2].std() > 1


@pytest.mark.parametrize("codec", ["h265", "jpeg"])
@pytest.mark.parametrize("transport", ["tcp", "udp", "auto"])
def test_rtsp_plays_other_codecs_by_every_transport(codec: str, transport: str) -> None:
    if codec == "h265" and transport != "tcp":
        pytest.skip("once is enough")
    with RtspServer(live="320x240", codec=codec) as server:
        assert pictures(make("rtsp", url=server.url, transport=transport), 3)[2].shape == (240, 320, 3)


def test_a_codec_that_cannot_be_decoded_is_told_apart() -> None:
    with RtspServer(live="320x240", codec="theora") as server, pytest.raises(SourceError, match="THEORA") as caught:
        make("rtsp", url=server.url).open()
    assert caught.value.reason == "unsupported_codec"


@pytest.mark.parametrize(
    ("talk", "reason"), [(say_garbage, "error"), (say_nothing, "timeout"), (lambda link: link.close(), "disconnected")]
)
@pytest.mark.parametrize("kind", ["rtsp", "http"])
def test_servers_of_something_else_are_told_apart(kind: str, talk: Callable[[Any], None], reason: str) -> None:
    with TcpServer(talk) as server, pytest.raises(SourceError) as caught:
        make(kind, url=f"{kind}://127.0.0.1:{server.port}/x", open_timeout_s=1.0).open()
    assert caught.value.reason == reason


def test_http_refusals_are_told_apart() -> None:
    with MjpegServer(synthetic_jpegs(), login=("viewer", "secret")) as server:
        for options, reason in (
            ({"url": server.url}, "auth_failed"),
            ({"url": server.url, "username": "viewer", "password": "wrong"}, "auth_failed"),
            ({"url": server.url + "x"}, "not_found"),
        ):
            with pytest.raises(SourceError) as caught:
                make("http", **options).open()
            assert caught.value.reason == reason
        with_login = server.url.replace("http://", "http://viewer:secret@")
        assert pictures(make("http", url=with_login), 2)[1].shape == (120, 160, 3)


def test_a_page_is_no_camera() -> None:
    with MjpegServer(synthetic_jpegs(), content_type="text/html") as server, pytest.raises(SourceError) as caught:
        make("http", url=server.url).open()
    assert caught.value.reason == "unsupported"


# TLS


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A self-signed certificate for localhost and its key."""
    folder = tmp_path_factory.mktemp("tls")
    command = f"""{need_program("openssl", "openssl")} req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=localhost
        -addext subjectAltName=DNS:localhost,IP:127.0.0.1 -keyout {folder}/key.pem -out {folder}/cert.pem"""
    subprocess.run(command.split(), check=True, capture_output=True)
    return folder / "cert.pem", folder / "key.pem"


def test_rtsps_is_trusted_only_with_its_authority(certificate: tuple[Path, Path]) -> None:
    with RtspServer(live="320x240", tls=certificate) as server:
        with pytest.raises(SourceError) as caught:
            make("rtsp", url=server.url).open()
        assert caught.value.reason == "tls"
        assert pictures(make("rtsp", url=server.url, tls_insecure=True), 2)[1].shape == (240, 320, 3)
        trusting = make("rtsp", url=server.url, tls_ca=str(certificate[0]))
        if _opencv.verifies_tls():
            assert pictures(trusting, 2)[1].shape == (240, 320, 3)
        else:
            with pytest.raises(SourceError, match=r"4\.13"):
                trusting.open()


def test_https_is_trusted_only_with_its_authority(certificate: tuple[Path, Path]) -> None:
    server = MjpegServer(synthetic_jpegs())
    server.use_tls(*certificate)
    with server:
        with pytest.raises(SourceError) as caught:
            make("http", url=server.url).open()
        assert caught.value.reason == "tls"
        assert pictures(make("http", url=server.url, tls_ca=str(certificate[0])), 2)[1].shape == (120, 160, 3)
        assert pictures(make("http", url=server.url, tls_insecure=True), 2)[1].shape == (120, 160, 3)
        wrong_name = make("http", url=server.url.replace("localhost", "127.0.0.2"), tls_ca=str(certificate[0]))
        with pytest.raises(SourceError):
            wrong_name.open()


def test_hls_is_played_at_its_own_pace(tmp_path: Path) -> None:
    need_gstreamer()
    pipeline = (
        "videotestsrc pattern=ball num-buffers=150 ! video/x-raw,width=320,height=240,framerate=30/1 "
        "! x264enc key-int-max=30 tune=zerolatency ! h264parse ! mpegtsmux "
        f"! hlssink target-duration=1 max-files=0 playlist-length=0 location={tmp_path}/s%03d.ts "
        f"playlist-location={tmp_path}/live.m3u8"
    )
    subprocess.run(["gst-launch-1.0", "-q", *pipeline.split()], check=True, capture_output=True)
    with FileServer(tmp_path) as server:
        source = make("http", url=f"{server.url}/live.m3u8")
        began = time.monotonic()
        found = pictures(source, 30)
        assert time.monotonic() - began > 0.9, "a second of pictures takes a second"
    assert found[0].shape == (240, 320, 3)
    assert np.abs(found[0].astype(int) - found[29]).max() > 50, "the ball has moved"


def test_hls_over_https_is_refused_unless_nobody_is_to_be_trusted(
    tmp_path: Path, certificate: tuple[Path, Path]
) -> None:
    (tmp_path / "live.m3u8").write_text("#EXTM3U\n")
    server = FileServer(tmp_path)
    server.use_tls(*certificate)
    with server, pytest.raises(SourceError, match="segments") as caught:
        make("http", url=f"{server.url}/live.m3u8", tls_ca=str(certificate[0])).open()
    assert caught.value.reason == "tls"


def test_a_silence_longer_than_opening_may_take_is_no_loss() -> None:
    with MjpegServer(synthetic_jpegs()) as server:
        source = make("http", url=server.url, open_timeout_s=0.5, stall_timeout_s=5.0)
        source.open()
        server.silent.set()
        threading.Timer(1.0, server.silent.clear).start()
        for _ in range(60):
            assert source.grab() is not None
        source.close()


CHALLENGE = 'Digest realm="cam", nonce="n", algorithm={}'


@pytest.mark.parametrize(
    ("challenges", "starts"),
    [
        ([CHALLENGE.format("SHA-256"), CHALLENGE.format("MD5")], "Digest"),
        ([CHALLENGE.format("SHA-512-256"), 'Basic realm="cam"'], "Basic YWRtaW46cEBzcw=="),
        (['digest realm="cam", nonce="n"'], "Digest"),
    ],
)
def test_a_login_is_answered_in_the_best_known_way(challenges: list[str], starts: str) -> None:
    assert _rtsp._authorisation(challenges, "admin", "p@ss", "rtsp://cam/x").startswith(starts)


def test_an_unknown_kind_of_login_is_auth_failed() -> None:
    with pytest.raises(SourceError) as caught:
        _rtsp._authorisation([CHALLENGE.format("SHA-256")], "admin", "p@ss", "rtsp://cam/x")
    assert caught.value.reason == "auth_failed"


def test_a_login_in_the_url_is_decoded() -> None:
    asked: list[bytes] = []

    def answer(link: socket.socket) -> None:
        while request := link.recv(4096):
            asked.append(request)
            link.sendall(b'RTSP/1.0 401 Unauthorized\r\nCSeq: 1\r\nWWW-Authenticate: Basic realm="cam"\r\n\r\n')

    with TcpServer(answer) as server, pytest.raises(SourceError) as caught:
        make("rtsp", url=f"rtsp://admin:p%40ss@127.0.0.1:{server.port}/x").open()
    assert caught.value.reason == "auth_failed"
    assert b"Basic YWRtaW46cEBzcw==" in asked[1]


# What is shared by sources


def test_streams_with_other_options_take_turns_and_none_is_starved() -> None:
    options = _opencv._OptionsInEnvironment()
    stop, entered = threading.Event(), threading.Event()

    def keep_opening() -> None:
        while not stop.is_set():
            with options("a", 5.0):
                time.sleep(0.02)

    threads = [threading.Thread(target=keep_opening) for _ in range(3)]
    for thread in threads:
        thread.start()
    try:
        with options("b", 5.0):
            entered.set()
            assert os.environ[_opencv._FFMPEG_OPTIONS] == "b"
            assert _opencv._FFMPEG_OPTIONS not in options.environment()
            with pytest.raises(SourceError) as caught, options("c", 0.1):
                pass
            assert caught.value.reason == "timeout"
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert entered.is_set()
    assert _opencv._FFMPEG_OPTIONS not in os.environ


def test_what_is_no_v4l2_device_leaves_no_file_open() -> None:
    before = psutil.Process().num_fds()
    for _ in range(20):
        with pytest.raises(SourceError) as caught:
            make("v4l2", device="/dev/null").open()
        assert caught.value.reason == "unsupported"
    assert psutil.Process().num_fds() == before


def test_a_camera_in_a_process_imports_what_the_agent_would(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("numpy", "pickle"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('imported from the working directory')\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [path for path in sys.path if path])
    source = make("synthetic", isolation="process", width=64, height=48)
    assert pictures(source, 2)[1].shape == (48, 64, 3)


_KILLED_BEFORE_IT_READS = """
import os, select, signal
from edge_agent import config, sources
cameras = config.parse({"cameras": {"here": {"source": "synthetic", "isolation": "process"}}}).cameras
source = sources.make(cameras["here"])
source.open()
source._child._send(("grab",))
assert select.select([source._child._socket], [], [], 10)[0]
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_process_of_its_own_ends_without_a_word_when_the_agent_was_killed_before_it_read_the_answer() -> None:
    agent = subprocess.run(  # returns once the camera's process, which writes there too, has ended
        [sys.executable, "-c", _KILLED_BEFORE_IT_READS], capture_output=True, text=True, timeout=20
    )
    assert (agent.returncode, agent.stderr) == (-signal.SIGKILL, "")
