"""Runs inside the machine: the agent on vivid and v4l2loopback cameras, through everything that befalls a camera.

Every step prints `ok` or `FAIL` with what was measured, and is written to results.jsonl in the folder given.
"""

from __future__ import annotations

import fcntl
import itertools
import json
import os
import queue
import socket
import statistics
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import paho.mqtt.client as mqtt

RESULTS = Path(sys.argv[1])
PORT = 1883
NODE = "/dev/video0"
BY_PATH = "/dev/v4l/by-path/platform-vivid.0-video-index0"
BY_ID = "/dev/v4l/by-id/usb-vivid_test_camera-video-index0"
LOOPBACK = "/dev/video9"
DRIVER = Path("/sys/bus/platform/drivers/vivid")
RULE = 'SUBSYSTEM=="video4linux", ATTR{name}=="vivid*", SYMLINK+="v4l/by-id/usb-vivid_test_camera-video-index0"\n'

STALL_TIMEOUT_S = 2.0
START_S = 60.0
CHANGE_S = 30.0
UNPLUGGED_S = 8.0  # long enough that back-off alone would miss the next limit
REPLUG_S = 5.0
END_S = 20.0
FRESH_S = 0.5
BARS = ["bfbfbf", "bfbf00", "00bfbf", "00bf00", "bf00bf", "bf0000", "0000bf", "000000"]  # vivid's picture, as RGB
LUMA = (0.114, 0.587, 0.299)  # of B, G, R
COLOUR_TOLERANCE = 40
COUNTERS_ONLY = 1  # of vivid's osd_text_mode: leaves the bars free

CONFIG = """
[agent]
device = "{device}"
[mqtt]
port = {port}
[model]
active = "demo-160"
[inference]
backend = "fake"
[backends.fake]
detections = 0
[stats]
interval_s = 1.0
[snapshots]
directory = "/tmp/{device}"
[cameras.cam]
source = "v4l2"
{camera}
"""


class Failed(Exception):
    """A step did not see what it should have."""


def need(fact: object, otherwise: str) -> None:
    if not fact:
        raise Failed(otherwise)


# ------------------------------------------------------------------------------------------ the agent


class Agent:
    """An agent with one camera, `cam`, in a process of its own, and what it says over MQTT."""

    _numbers = itertools.count(1)

    def __init__(self, **camera: object) -> None:
        self._device = f"vm-{next(self._numbers)}"
        lines = [f"{key} = {toml(value)}" for key, value in camera.items()]
        self.snapshot = Path(f"/tmp/{self._device}/cam.jpg")
        self._config = Path(f"/tmp/{self._device}.toml")
        self._config.write_text(CONFIG.format(device=self._device, port=PORT, camera="\n".join(lines)))
        self._states: queue.Queue[dict[str, Any]] = queue.Queue()
        self._frames: queue.Queue[tuple[float, dict[str, Any]]] = queue.Queue()
        self._client = mqtt.Client(mqtt.CallbackAPIVersion.VERSION2)
        self._client.on_message = self._on_message

    def __enter__(self) -> Agent:
        self._client.connect("127.0.0.1", PORT)
        self._client.subscribe(f"edge/{self._device}/cameras/cam/#", qos=1)
        self._client.loop_start()
        command = [sys.executable, "-m", "edge_agent", "run", "--config", str(self._config)]
        with (RESULTS / f"{self._device}.log").open("w") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        return self

    def __exit__(self, *exc: object) -> None:
        self._process.terminate()
        try:
            self._process.wait(END_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
        self._client.disconnect()
        self._client.loop_stop()

    def stop(self) -> str:
        """End it in order, as a service manager does."""
        self._need_alive()
        started = time.monotonic()
        self._process.terminate()
        try:
            status = self._process.wait(END_S)
        except subprocess.TimeoutExpired:
            raise Failed(f"the agent does not end within {END_S:g} s of SIGTERM") from None
        need(status == 0, f"exit status {status} after SIGTERM")
        return f"exit status 0, {time.monotonic() - started:.1f} s after SIGTERM"

    def state(self, wanted: str, *, reason: str | None = None, within_s: float = CHANGE_S) -> dict[str, Any]:
        """The next status with this state and, if given, this reason."""
        until, seen = time.monotonic() + within_s, []
        while time.monotonic() < until:
            self._need_alive()
            try:
                status = self._states.get(timeout=0.2)
            except queue.Empty:
                continue
            if status["state"] == wanted and reason in (None, status["reason"]):
                return status
            seen.append(f"{status['state']} {status['reason'] or ''}".strip())
        raise Failed(f"no {wanted} {reason or ''} in {within_s:g} s, but {', '.join(seen) or 'no word'}")

    def frames(self, count: int, *, within_s: float = CHANGE_S) -> list[tuple[float, dict[str, Any]]]:
        """The next results, each with the time at which it came."""
        self._need_alive()
        empty(self._frames)
        try:
            return [self._frames.get(timeout=within_s) for _ in range(count)]
        except queue.Empty:
            raise Failed(f"no result in {within_s:g} s") from None

    def forget(self) -> None:
        """Hear only what is said from now on."""
        self._need_alive()
        empty(self._states)

    def _need_alive(self) -> None:
        if self._process.poll() is not None:
            last = (RESULTS / f"{self._device}.log").read_text().splitlines()[-1:]
            raise Failed(f"the agent's process ended with {self._process.returncode}: {' '.join(last)}")

    def _on_message(self, client: mqtt.Client, userdata: object, message: mqtt.MQTTMessage) -> None:
        now = time.time()
        if message.topic.endswith("/status"):
            self._states.put(json.loads(message.payload))
        elif message.topic.endswith("/results"):
            self._frames.put((now, json.loads(message.payload)))


def empty(messages: queue.Queue[Any]) -> None:
    while not messages.empty():
        messages.get()


def toml(value: object) -> str:
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{key} = {toml(item)}" for key, item in value.items()) + " }"
    return json.dumps(value)


def check_frames(agent: Agent, status: dict[str, Any], count: int = 40) -> str:
    """Sizes as the status says, capture times that are fresh and only grow."""
    frames = agent.frames(count)
    size = (status["width"], status["height"])
    need({(m["width"], m["height"]) for _, m in frames} == {size}, f"results are not {size} as the status says")
    captured = [datetime.fromisoformat(message["captured_at"]).timestamp() for _, message in frames]
    need(all(a < b for a, b in itertools.pairwise(captured)), "captured_at does not grow strictly")
    ages = [received - at for (received, _), at in zip(frames, captured, strict=True)]
    facts = f"age {min(ages) * 1e3:.0f} to {max(ages) * 1e3:.0f} ms"
    need(
        min(ages) >= 0 and statistics.median(ages) <= FRESH_S, f"captured_at and the clock at receipt disagree: {facts}"
    )
    fps = (count - 1) / (captured[-1] - captured[0])
    return f"{size[0]}x{size[1]}, {fps:.1f} fps of {status['fps']}, {facts}"


def check_colours(agent: Agent, *, grey: bool) -> str:
    """The agent's first snapshot shows the eight bars."""
    wait_until(agent.snapshot.exists, "no snapshot")
    picture = cv2.imread(str(agent.snapshot)).astype(int)
    height, width = picture.shape[:2]
    seen = picture[height * 3 // 4, width // 16 :: width // 8][:8]
    wanted = np.repeat(bars() @ LUMA, 3).reshape(8, 3) if grey else bars()
    off = int(abs(seen - wanted).max())
    need(off <= COLOUR_TOLERANCE, f"colours are off by {off}: {seen.tolist()}")
    return f"colours within {off}"


def bars() -> np.ndarray:
    """The eight colours, as BGR."""
    return np.array([list(bytes.fromhex(colour))[::-1] for colour in BARS])


# ----------------------------------------------------------------------------------------- the cameras


def set_control(**controls: int) -> None:
    pairs = ",".join(f"{name}={value}" for name, value in controls.items())
    subprocess.run(["v4l2-ctl", "-d", NODE, "--set-ctrl", pairs], check=True)


def get_control(name: str) -> int:
    said = subprocess.run(["v4l2-ctl", "-d", NODE, "--get-ctrl", name], check=True, capture_output=True, text=True)
    return int(said.stdout.split(":")[1])


def unplug() -> None:
    (DRIVER / "unbind").write_text("vivid.0")


def plug_in() -> float:
    """Bind the driver; when that was done, on the monotonic clock."""
    (DRIVER / "bind").write_text("vivid.0")
    return time.monotonic()


def reset_camera() -> None:
    """Whatever the last step did to it, the camera is there and sends."""
    if not (DRIVER / "vivid.0").exists():
        plug_in()
    subprocess.run(["udevadm", "settle"], check=True)
    set_control(percentage_of_dropped_buffers=0, osd_text_mode=COUNTERS_ONLY)


@contextmanager
def other_program() -> Iterator[None]:
    """Another program that has the camera and streams."""
    command = ["v4l2-ctl", "-d", NODE, "-v", "width=640,height=360", "--stream-mmap", "--stream-count=0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as program:
        try:
            assert program.stdout is not None
            need(program.stdout.read(1) == b"<", "v4l2-ctl does not stream")
            yield
        finally:
            program.kill()


@contextmanager
def mjpg_camera(width: int, height: int) -> Iterator[None]:
    """v4l2loopback, fed with JPEG pictures by a thread: vivid has no MJPG."""
    subprocess.run(["modprobe", "v4l2loopback", "video_nr=9", "card_label=mjpg", "exclusive_caps=1"], check=True)
    subprocess.run(["udevadm", "settle"], check=True)
    done = threading.Event()
    output = open_output(width, height)
    feeder = threading.Thread(target=feed, args=(output, jpegs(width, height), done))
    feeder.start()
    try:
        yield
    finally:
        done.set()
        feeder.join()
        os.close(output)


def open_output(width: int, height: int) -> int:
    """The loopback's writing end, set to MJPG by VIDIOC_S_FMT with a `struct v4l2_format`."""
    video_output, any_field, srgb = 2, 1, 8
    fourcc = int.from_bytes(b"MJPG", "little")
    pix = (width, height, fourcc, any_field, 0, width * height * 2, srgb)
    output = os.open(LOOPBACK, os.O_RDWR)
    fcntl.ioctl(output, 0xC0D05605, struct.pack("=I4x7I172x", video_output, *pix))
    return output


def jpegs(width: int, height: int) -> list[bytes]:
    """Vivid's bars, and above them one that moves."""
    still = np.repeat(bars().astype(np.uint8), width // 8, axis=0)[None].repeat(height, axis=0)
    pictures = [still.copy() for _ in range(16)]
    for i, picture in enumerate(pictures):
        picture[: height // 4, i * width // 16 : (i + 1) * width // 16] = 255
    return [cv2.imencode(".jpg", picture)[1].tobytes() for picture in pictures]


def feed(output: int, pictures: list[bytes], done: threading.Event) -> None:
    for picture in itertools.cycle(pictures):
        if done.wait(1 / 20):
            return
        os.write(output, picture)


# ---------------------------------------------------------- steps: an agent each, for what is configured


def udev_makes_links() -> str:
    """links"""
    made = [link for link in (BY_PATH, BY_ID) if Path(link).resolve() == Path(NODE)]
    need(made == [BY_PATH, BY_ID], f"only {made}")
    return "by-path is Debian's own rule's, by-id a rule of this test's: vivid is no USB device"


def captures(**camera: object) -> str:
    """The agent runs with this configuration; what it gets."""
    started = time.monotonic()
    with Agent(**camera) as agent:
        status = agent.state("running", within_s=START_S)
        took_s = time.monotonic() - started
        colours = check_colours(agent, grey=camera.get("format") == "GREY")
        facts = f"{check_frames(agent, status)}, {colours}, running {took_s:.1f} s after the start"
        agent.stop()
        return facts


def by_node() -> str:
    """/dev/video0, YUYV 640x360 at 25 fps"""
    return captures(device=NODE, format="YUYV", width=640, height=360, fps=25.0)


def by_path() -> str:
    """by-path, YUYV 1280x720 at 10 fps"""
    return captures(device=BY_PATH, format="YUYV", width=1280, height=720, fps=10.0)


def by_id() -> str:
    """by-id, YUYV 320x180 at 15 fps"""
    return captures(device=BY_ID, format="YUYV", width=320, height=180, fps=15.0)


def left_to_the_driver() -> str:
    """nothing but the device"""
    return captures(device=NODE)


def odd_size() -> str:
    """a size the camera has not, 650x370"""
    return captures(device=NODE, format="YUYV", width=650, height=370, fps=25.0)


def other_formats() -> str:
    """NV12, GREY, UYVY 640x360"""
    size = {"width": 640, "height": 360, "fps": 25.0}
    return "; ".join(f"{name}: {captures(device=NODE, format=name, **size)}" for name in ("NV12", "GREY", "UYVY"))


def refused_format() -> str:
    """a format the camera has not, MJPG"""
    with Agent(device=NODE, format="MJPG", width=640, height=360) as agent:
        return agent.state("backoff", reason="unsupported", within_s=START_S)["message"]


def controls_are_set() -> str:
    """controls"""
    set_control(brightness=128)
    with Agent(device=NODE, controls={"brightness": 77}) as agent:
        agent.state("running", within_s=START_S)
        need(get_control("brightness") == 77, f"brightness is {get_control('brightness')}, not 77")
    return "brightness 128 -> 77"


def unknown_control() -> str:
    """a control the camera has not"""
    with Agent(device=NODE, controls={"brightnes": 77}) as agent:
        return agent.state("backoff", reason="unsupported", within_s=START_S)["message"]


def mjpg() -> str:
    """MJPG 640x480 from v4l2loopback"""
    with mjpg_camera(640, 480):
        return captures(device=LOOPBACK, format="MJPG", width=640, height=480)


def absent_at_start() -> str:
    """no camera at the start"""
    unplug()
    with Agent(device=BY_ID) as agent:
        message = agent.state("backoff", reason="device_not_found", within_s=START_S)["message"]
        return f"{message}; {runs_again(agent, plug_in(), within_s=REPLUG_S)} plugging in"


def busy_at_start() -> str:
    """busy"""
    with Agent(device=NODE) as agent:
        with other_program():
            message = agent.state("backoff", reason="device_busy", within_s=START_S)["message"]
        return f"{message}; {runs_again(agent, time.monotonic())} the other let go"


def runs_again(agent: Agent, since: float, *, within_s: float = CHANGE_S) -> str:
    agent.state("running", within_s=within_s)
    took_s = time.monotonic() - since
    agent.frames(3)
    return f"running {took_s:.1f} s after"


# --------------------------------------------------------------- steps: one agent lives through them all


def survives_stall(agent: Agent) -> str:
    """stall"""
    set_control(percentage_of_dropped_buffers=100)
    stopped = time.monotonic()
    status = agent.state("stalled")
    after_s = time.monotonic() - stopped
    set_control(percentage_of_dropped_buffers=0)
    return f"{status['message']}; stalled after {after_s:.1f} s, {runs_again(agent, time.monotonic())} frames came back"


def survives_long_stall(agent: Agent) -> str:
    """long stall"""
    set_control(percentage_of_dropped_buffers=100)
    stopped = time.monotonic()
    agent.state("backoff", reason="stalled")
    after_s = time.monotonic() - stopped
    set_control(percentage_of_dropped_buffers=0)
    return f"given up after {after_s:.1f} s, {runs_again(agent, time.monotonic())} frames came back"


def survives_streaming_error(agent: Agent) -> str:
    """fatal streaming error"""
    set_control(inject_fatal_streaming_error=1)
    message = agent.state("backoff")["message"]
    return f"{message}; {runs_again(agent, time.monotonic())}"


def survives_damaged_frame(agent: Agent) -> str:
    """damaged frames"""
    for _ in range(5):
        set_control(inject_v4l2_buf_flag_error=1)
    agent.frames(10)
    return "five, and it goes on"


def survives_disconnect(agent: Agent) -> str:
    """disconnect, which vivid takes back once the device is closed"""
    set_control(disconnect=1)
    message = agent.state("backoff", reason="disconnected")["message"]
    return f"{message}; {runs_again(agent, time.monotonic())}"


def survives_unplug(agent: Agent) -> str:
    """unplug and replug"""
    unplug()
    lost = agent.state("backoff", reason="disconnected")["message"]
    missing = agent.state("backoff", reason="device_not_found")["message"]
    time.sleep(UNPLUGGED_S)
    agent.forget()
    return f"{lost}; {missing}; {runs_again(agent, plug_in(), within_s=REPLUG_S)} plugging in"


def ends_on_sigterm(agent: Agent) -> str:
    """SIGTERM after all that, to the same process"""
    return agent.stop()


EACH = (
    udev_makes_links, by_node, by_path, by_id, left_to_the_driver, odd_size, other_formats, refused_format,
    controls_are_set, unknown_control, mjpg, absent_at_start, busy_at_start,
)  # fmt: skip
ONE_LIFE = (
    survives_stall, survives_long_stall, survives_damaged_frame, survives_streaming_error, survives_disconnect,
    survives_unplug, ends_on_sigterm,
)  # fmt: skip


def main() -> int:
    with broker():
        load_driver()
        passed = [tried(step) for step in EACH]
        with Agent(device=BY_ID, format="YUYV", width=640, height=360, stall_timeout_s=STALL_TIMEOUT_S) as agent:
            passed += [tried(step, agent) for step in ONE_LIFE]
    print(f"{sum(passed)} ok, {len(passed) - sum(passed)} failed")
    return 0 if all(passed) else 1


@contextmanager
def broker() -> Iterator[None]:
    config = Path("/tmp/mosquitto.conf")
    config.write_text(f"user root\nlistener {PORT} 127.0.0.1\nallow_anonymous true\n")
    with subprocess.Popen(["mosquitto", "-c", config], stderr=subprocess.DEVNULL) as process:
        try:
            wait_until(accepts, "mosquitto does not listen")
            yield
        finally:
            process.kill()


def accepts() -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", PORT)) == 0


def wait_until(condition: Callable[[], bool], otherwise: str) -> None:
    until = time.monotonic() + CHANGE_S
    while not condition():
        need(time.monotonic() < until, otherwise)
        time.sleep(0.1)


def load_driver() -> None:
    rules = Path("/run/udev/rules.d")
    rules.mkdir(parents=True, exist_ok=True)
    (rules / "99-vivid.rules").write_text(RULE)
    subprocess.run(["udevadm", "control", "--reload"], check=True)
    subprocess.run(["modprobe", "vivid", "n_devs=1", "node_types=0x1"], check=True)
    subprocess.run(["udevadm", "settle"], check=True)


def tried(step: Callable[..., str], *agents: Agent) -> bool:
    """Run a step, print and write down what came of it."""
    started, name = time.monotonic(), str(step.__doc__)
    try:
        reset_camera()
        for agent in agents:
            agent.frames(3, within_s=START_S)
            agent.forget()
        passed, facts = True, step(*agents)
    except (Failed, OSError, subprocess.CalledProcessError) as error:
        passed, facts = False, f"{type(error).__name__}: {error}"
    took_s = round(time.monotonic() - started, 1)
    print(f"{'ok  ' if passed else 'FAIL'}  {took_s:5.1f} s  {name}: {facts}")
    with (RESULTS / "results.jsonl").open("a") as results:
        results.write(json.dumps({"step": name, "ok": passed, "took_s": took_s, "facts": facts}) + "\n")
    return passed


if __name__ == "__main__":
    sys.exit(main())
