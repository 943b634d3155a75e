"""Real things to test against: a mosquitto, an RTSP server, an agent in its own process, a client that listens.

Each is a context manager and leaves nothing behind.
"""

from __future__ import annotations

import functools
import itertools
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import paho.mqtt.client as paho
import pytest

ROOT = Path(__file__).parent.parent
SHARED = ROOT.parent / "shared"
SYSTEM_PYTHON = "/usr/bin/python3"
SYSTEM_PACKAGES = "/usr/lib/python3/dist-packages"
DEVICE = "rig"

_MOST_VALIDATED = 20  # of one topic
_PORTS = (20_000, 32_000)
_PORTS_A_PROCESS = 100


@functools.cache
def _ports_of_our_own() -> tuple[socket.socket, Iterator[int]]:
    """A hundred ports that no other process that tests is given, for as long as this one holds the first of them. They
    lie below those that Linux picks for clients (net.ipv4.ip_local_port_range)."""
    for first in range(*_PORTS, _PORTS_A_PROCESS):
        guard = socket.socket()
        try:
            guard.bind(("127.0.0.1", first))
        except OSError:
            guard.close()
        else:
            return guard, itertools.cycle(range(first + 1, first + _PORTS_A_PROCESS))
    raise OSError(f"each hundred of the ports {_PORTS} is taken")


def free_port() -> int:
    """A port that nobody has, and nobody is given but who asks here: a server may leave it and come back to it."""
    ports = itertools.islice(_ports_of_our_own()[1], _PORTS_A_PROCESS)
    return next(port for port in ports if _is_free(port))


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def need_program(name: str, package: str) -> str:
    """The program's path; skips the test, naming Debian's package, where it is missing."""
    path = shutil.which(name) or shutil.which(name, path="/usr/sbin:/sbin")
    if path is None:
        pytest.skip(f"{name} is not installed: apt-get install {package}")
    return path


def need_file(path: Path) -> Path:
    if not path.is_file():
        pytest.skip(f"{path.relative_to(ROOT.parent)} is not there")
    return path


def wait_until(condition: Callable[[], Any], *, timeout_s: float = 15.0, what: str = "") -> Any:
    """What `condition` gives once it is true; fails the test if that takes too long."""
    until = time.monotonic() + timeout_s
    while not (value := condition()):
        assert time.monotonic() < until, f"not within {timeout_s} s: {what or condition}"
        threading.Event().wait(0.02)
    return value


class Server:
    """A broker's process. `port` is where the agent goes, `plain_port` a plain way in for a `Probe`, `version` the
    newest MQTT it speaks; `mqtt` are the lines of `[mqtt]` besides the port."""

    keeps_for_wildcards = True
    """Whether a subscription with wildcards brings what is retained."""

    def __init__(
        self,
        command: Sequence[str],
        *,
        port: int,
        plain_port: int,
        log: Path,
        mqtt: str = "",
        version: int = paho.MQTTv5,
        environ: Mapping[str, str] | None = None,
        start_within_s: float = 10.0,
    ) -> None:
        self.port = port
        self.plain_port = plain_port
        self.mqtt = mqtt
        self.version = version
        self.log = log
        self._command = command
        self._environ = {**os.environ, **(environ or {})}
        self._start_within_s = start_within_s
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                self._command, env=self._environ, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT
            )
        try:
            wait_until(self._is_there, timeout_s=self._start_within_s, what=f"{self._command[0]} listens")
        except AssertionError:
            print(self.text()[-3000:])
            self.kill()
            raise

    def kill(self) -> None:
        """SIGKILL: nobody is told, nothing is written."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def freeze(self) -> None:
        """It holds its connections and says nothing."""
        self._signal(signal.SIGSTOP)

    def thaw(self) -> None:
        self._signal(signal.SIGCONT)

    def revive(self) -> None:
        """It runs, whatever was done to it."""
        if self._process is None:
            self.start()
        else:
            self.thaw()

    def text(self) -> str:
        return self.log.read_text(errors="replace")

    def __enter__(self) -> Server:
        self.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.kill()

    def _signal(self, number: signal.Signals) -> None:
        assert self._process is not None
        self._process.send_signal(number)

    def _is_there(self) -> bool:
        assert self._process is not None
        assert self._process.poll() is None, f"{self._command[0]} ended: {self.text()[-1000:]}"
        return accepts(self.plain_port) and accepts(self.port)


def accepts(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
    except OSError:
        return False
    return True


class Broker(Server):
    """A mosquitto on a port of its own, that can be killed and started again."""

    def __init__(self, folder: Path, *, config: str = "") -> None:
        port = free_port()
        file = folder / f"mosquitto-{port}.conf"
        rules = config or "allow_anonymous true"
        file.write_text(f"user root\nlistener {port} 127.0.0.1\n{rules}\n")
        program = need_program("mosquitto", "mosquitto")
        super().__init__([program, "-c", str(file)], port=port, plain_port=port, log=file.with_suffix(".log"))


@dataclass(frozen=True)
class Heard:
    topic: str
    payload: bytes
    retain: bool
    at: float
    properties: Any = None

    def json(self) -> Any:
        return json.loads(self.payload)


class Probe:
    """An MQTT client that keeps everything it hears; independent of the agent's own client code."""

    def __init__(self, port: int, topic: str = "#", *, version: int = paho.MQTTv5, qos: int = 1) -> None:
        self.heard: list[Heard] = []
        self._news = threading.Condition()
        self._ready = threading.Event()
        self._client = paho.Client(paho.CallbackAPIVersion.VERSION2, protocol=version)
        self._client.on_connect = lambda client, *rest: client.subscribe(topic, qos=qos)
        self._client.on_subscribe = lambda *rest: self._ready.set()
        self._client.on_message = self._on_message
        self._client.reconnect_delay_set(min_delay=1, max_delay=1)
        self._client.connect("127.0.0.1", port)
        self._client.loop_start()
        assert self._ready.wait(5), "the probe could not subscribe"

    def __enter__(self) -> Probe:
        return self

    def __exit__(self, *error: object) -> None:
        self._client.disconnect()
        self._client.loop_stop()
        if error[0] is None:
            self.hold_to_the_contract()

    def hold_to_the_contract(self) -> None:
        """Every kind of message that the agent sent is what docs/asyncapi.yaml says."""
        from tests import schemas

        seen: dict[str, int] = {}
        for message in self.heard:
            seen[message.topic] = seen.get(message.topic, 0) + 1
            is_ours = message.topic.startswith(f"edge/{DEVICE}/") and not message.topic.endswith("/cmd")
            if is_ours and seen[message.topic] <= _MOST_VALIDATED:
                schemas.validate(message)

    def is_connected(self) -> bool:
        return self._client.is_connected()

    def publish(self, topic: str, payload: bytes | str, *, retain: bool = False, properties: Any = None) -> None:
        self._client.publish(topic, payload, qos=1, retain=retain, properties=properties).wait_for_publish(5)

    def on(self, suffix: str) -> list[Heard]:
        """What was heard on the topic, or on all that match a `+`, below the device."""
        pattern = _pattern(suffix)
        return [message for message in list(self.heard) if pattern.match(message.topic)]

    def wait(
        self, suffix: str, accept: Callable[[Any], bool] = lambda message: True, *, timeout_s: float = 15.0, n: int = 1
    ) -> list[Heard]:
        """At least `n` messages on a topic that `accept` (given decoded JSON, else text) agrees to."""
        until = time.monotonic() + timeout_s
        pattern, found, seen = _pattern(suffix), [], 0
        while True:
            with self._news:
                if len(self.heard) == seen:
                    left = until - time.monotonic()
                    assert left > 0, f"only {len(found)} of {n} on {suffix} in {timeout_s} s; heard {self._topics()}"
                    self._news.wait(left)
                new, seen = self.heard[seen:], len(self.heard)
            found += [m for m in new if pattern.match(m.topic) and accept(_decoded(m.payload))]
            if len(found) >= n:
                return found

    def command(self, name: str, /, *, timeout_s: float = 15.0, **arguments: Any) -> Any:
        """Send a command and return its decoded reply."""
        command_id = f"{name.replace('.', '-')}-{time.monotonic_ns()}"  # RabbitMQ takes a dot for a slash
        self.publish(f"edge/{DEVICE}/cmd", json.dumps({"id": command_id, "command": name, "args": arguments}))
        is_last = lambda reply: reply["status"] != "accepted"  # noqa: E731
        return self.wait(f"reply/{command_id}", is_last, timeout_s=timeout_s)[0].json()

    def wait_topic(self, topic: str, *, timeout_s: float = 5.0) -> None:
        """Wait until something was heard on a full topic."""
        wait_until(lambda: any(message.topic == topic for message in list(self.heard)), timeout_s=timeout_s, what=topic)

    def _on_message(self, client: Any, userdata: Any, message: Any) -> None:
        with self._news:
            heard = Heard(message.topic, message.payload, message.retain, time.monotonic(), message.properties)
            self.heard.append(heard)
            self._news.notify_all()

    def _topics(self) -> dict[str, int]:
        counts: dict[str, int] = {}
        for message in self.heard:
            counts[message.topic] = counts.get(message.topic, 0) + 1
        return counts


def _pattern(suffix: str) -> re.Pattern[str]:
    return re.compile(re.escape(f"edge/{DEVICE}/{suffix}").replace(r"\+", "[^/]+") + "$")


def _decoded(payload: bytes) -> Any:
    try:
        return json.loads(payload)
    except ValueError:
        return payload.decode(errors="replace")


class AgentProcess:
    """`edge-agent run` with a configuration, in a process of its own. `command` takes its path."""

    command = (sys.executable, "-m", "edge_agent", "run", "--config")

    def __init__(self, folder: Path, config: str, *, environ: dict[str, str] | None = None) -> None:
        self.config = folder / "config.toml"
        self.config.write_text(config)
        self.log = folder / "agent.log"
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [*self.command, str(self.config)],
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=folder,
                env={**os.environ, "XDG_STATE_HOME": str(folder / "state"), **(environ or {})},
            )

    def __enter__(self) -> AgentProcess:
        return self

    def __exit__(self, *error: object) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(15)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
                raise
        if error[0] is not None:
            print(self.text()[-6000:])

    def text(self) -> str:
        return self.log.read_text(errors="replace")

    def events(self, name: str) -> list[dict[str, Any]]:
        """The log's events of this name."""
        lines = [line for line in self.text().splitlines() if line.startswith("{")]
        return [event for event in map(json.loads, lines) if event["event"] == name]

    def stop(self, *, timeout_s: float = 10.0) -> int:
        """SIGTERM; the exit status."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout_s)


def config(port: int, body: str, *, mqtt: str = "") -> str:
    """A configuration for `AgentProcess` on a broker's port."""
    return f"""
[agent]
device = "{DEVICE}"
[mqtt]
port = {port}
{mqtt}
[snapshots]
on_start = false
[stats]
interval_s = 1
{body}
"""


class RtspServer:
    """GStreamer's RTSP server at `url`: plays a file to each client from its start, or `live` ("WxH") a
    picture that all see. It can be killed, frozen and started again on its port."""

    def __init__(
        self,
        video: Path | None = None,
        *,
        live: str = "",
        codec: str = "h264",
        login: str = "",
        tls: tuple[Path, Path] | None = None,
        is_started: bool = True,
    ) -> None:
        need_gstreamer()
        self.port = free_port()
        self.url = f"rtsp{'s' if tls else ''}://127.0.0.1:{self.port}/stream"
        self._arguments = ["--codec", codec]
        for name, value in (("--video", video), ("--live", live), ("--login", login)):
            self._arguments += [name, str(value)] if value else []
        self._arguments += ["--tls", *map(str, tls)] if tls else []
        self._process: subprocess.Popen[bytes] | None = None
        if is_started:
            self.start()

    def start(self) -> None:
        self._process = subprocess.Popen(
            [SYSTEM_PYTHON, str(ROOT / "tests" / "rtsp_server.py"), str(self.port), *self._arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        assert self._said() == "ready", "the RTSP server did not start"

    def freeze(self) -> None:
        self._signal(signal.SIGSTOP)

    def thaw(self) -> None:
        self._signal(signal.SIGCONT)

    def resize(self, size: str) -> None:
        assert self._process is not None and self._process.stdin is not None
        self._process.stdin.write(f"resize {size}\n".encode())
        self._process.stdin.flush()
        assert self._said() == "done"

    def kill(self) -> None:
        if self._process is None:
            return
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            pipe.close()
        self._process = None

    def __enter__(self) -> RtspServer:
        return self

    def __exit__(self, *error: object) -> None:
        self.kill()

    def _said(self) -> str:
        assert self._process is not None and self._process.stdout is not None
        return self._process.stdout.readline().decode().strip()

    def _signal(self, number: signal.Signals) -> None:
        assert self._process is not None
        self._process.send_signal(number)


def need_gi() -> None:
    """Skips the test unless this Python can use GStreamer's bindings; those of the system are for its own Python."""
    need_gstreamer()
    system = subprocess.run(
        [SYSTEM_PYTHON, "-c", "import sys; print('%d.%d' % sys.version_info[:2])"], capture_output=True, text=True
    ).stdout.strip()
    if system != f"{sys.version_info.major}.{sys.version_info.minor}":
        pytest.skip(f"python3-gi is there for Python {system} only")
    if SYSTEM_PACKAGES not in sys.path:
        sys.path.append(SYSTEM_PACKAGES)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ImportWarning)  # of gi's own way to import
        import gi

        for name in ("Gst", "GstApp"):
            gi.require_version(name, "1.0")
        from gi.repository import Gst, GstApp  # noqa: F401


def need_gstreamer() -> None:
    need_program("gst-launch-1.0", "gstreamer1.0-tools gstreamer1.0-plugins-good gstreamer1.0-plugins-bad")
    script = (
        "import gi; gi.require_version('Gst', '1.0'); gi.require_version('GstRtspServer', '1.0');"
        "from gi.repository import Gst, GstRtspServer; Gst.init(None);"
        "missing = [name for name in ('x264enc', 'mp4mux', 'h264parse') if not Gst.ElementFactory.find(name)];"
        "raise SystemExit(' '.join(missing) or 0)"
    )
    found = subprocess.run([SYSTEM_PYTHON, "-c", script], capture_output=True, text=True, check=False)
    if found.returncode:
        pytest.skip(
            "the RTSP server needs gir1.2-gst-rtsp-server-1.0 python3-gi gstreamer1.0-plugins-base "
            f"gstreamer1.0-plugins-good gstreamer1.0-plugins-bad gstreamer1.0-plugins-ugly: {found.stderr[-200:]}"
        )


def encode_h264(frames: Iterator[Any], path: Path, *, fps: int) -> Path:
    """An MP4 of BGR frames, by GStreamer's x264enc."""
    need_gstreamer()
    first = next(frames)
    height, width = first.shape[:2]
    pipeline = (
        f"fdsrc ! rawvideoparse format=bgr width={width} height={height} framerate={fps}/1 ! videoconvert "
        f"! x264enc speed-preset=superfast pass=qual quantizer=18 key-int-max={fps} bframes=0 "
        f"! h264parse ! mp4mux ! filesink location={path}"
    )
    encoder = subprocess.Popen(["gst-launch-1.0", "-q", "-e", *pipeline.split()], stdin=subprocess.PIPE)
    assert encoder.stdin is not None
    with encoder.stdin as pipe:
        pipe.write(first.tobytes())
        for frame in frames:
            pipe.write(frame.tobytes())
    assert encoder.wait(60) == 0
    return path
