"""`edgectl doctor`: what will and will not work here, each line with its fix."""

from __future__ import annotations

import importlib
import os
import platform
import re
import socket
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rich.console import Console
from rich.text import Text

from edge_agent import backends, cuda
from edge_agent import config as configuration
from edge_agent.backends import _trt
from edge_agent.backends.tensorrt import TensorRtEngine, TensorRtOptions
from edge_agent.check import check
from edge_agent.config import Config
from edge_agent.errors import ConfigError

_STYLES = {"ok": "green", "warn": "yellow", "fail": "red"}


@dataclass(frozen=True)
class Finding:
    """One line of the report; `fix` says what to do where something is to be done."""

    state: Literal["ok", "warn", "fail"]
    what: str
    fact: str
    fix: str = ""


def doctor(path: Path) -> int:
    """Print the findings; 1 if any fails, else 0."""
    console = Console()
    failed = False
    for finding in findings(path):
        failed |= finding.state == "fail"
        line = Text.assemble(
            (f"{finding.state:>4}", _STYLES[finding.state]), "  ", (f"{finding.what:<12}", "bold"), finding.fact
        )
        if finding.fix:
            line.append(f"\n      → {finding.fix}", style="dim")
        console.print(line, soft_wrap=True)
    return int(failed)


def findings(path: Path) -> Iterator[Finding]:
    """Every finding, in the order in which a first run would trip over it."""
    yield Finding("ok", "python", f"{platform.python_version()} at {sys.executable}")
    yield _board()
    yield from _packages()
    yield _video_devices()
    try:
        loaded = configuration.load(path)
    except ConfigError as error:
        for problem in error.problems:
            yield Finding("fail", "config", problem, f"correct {path}; `edge-agent check` shows the same")
        return
    yield Finding("ok", "config", str(path))
    for problem in check(loaded):
        yield Finding("fail", "config", problem, "`edge-agent check` shows the same")
    yield _broker(loaded)


def _board() -> Finding:
    try:
        model = Path("/proc/device-tree/model").read_text().rstrip("\0")
    except OSError:
        return Finding("ok", "board", f"{platform.machine()}, no Jetson")
    try:
        release = Path("/etc/nv_tegra_release").read_text().splitlines()[0]
    except OSError:
        return Finding("ok", "board", model)
    return Finding("ok", "board", f"{model}; L4T {release}")


def _packages() -> Iterator[Finding]:
    try:
        import cv2
    except ImportError as error:
        yield Finding("fail", "opencv", str(error), "pip install 'edge-agent[opencv]', or JetPack's python3-opencv")
    else:
        build = cv2.getBuildInformation()
        parts = {"FFmpeg": "FFMPEG", "V4L2": "v4l/v4l2", "GStreamer": "GStreamer"}
        has = [name for name, key in parts.items() if re.search(rf"{key}:\s+YES", build)]
        yield Finding("ok", "opencv", f"{cv2.__version__} with {', '.join(has) or 'no video support'}")
    yield _module("onnxruntime", "pip install 'edge-agent[onnx]'", "fail")
    yield _gpu()


def _gpu() -> Finding:
    """Whether TensorRT can run engines here, and on what."""
    if (reason := TensorRtEngine.unavailable(TensorRtOptions())) is None:
        gpu, trt = cuda.open_gpu(), _trt.name_of(_trt.library())
        capability = ".".join(str(part) for part in gpu.capability)
        return Finding("ok", "gpu", f"{gpu.name} (sm {capability}), driver {gpu.driver_version}, {trt}")
    if not backends.nvidia_devices():
        return Finding("ok", "gpu", "no NVIDIA GPU here; models run on the CPU")
    return Finding(
        "warn", "gpu", f"there is one, and it cannot be used: {reason}", "docs/tensorrt.md; models run on the CPU"
    )


def _module(name: str, fix: str, otherwise: Literal["warn", "fail"]) -> Finding:
    try:
        module = importlib.import_module(name)
    except ImportError as error:
        return Finding(otherwise, name, str(error), fix)
    return Finding("ok", name, str(getattr(module, "__version__", "version unknown")))


def _video_devices() -> Finding:
    devices = sorted(Path("/dev").glob("video*"))
    if not devices:
        return Finding("warn", "cameras", "no /dev/video*", "plug one in, or use an rtsp, file or synthetic source")
    closed = [device.name for device in devices if not os.access(device, os.R_OK | os.W_OK)]
    if closed:
        return Finding(
            "fail", "cameras", f"may not open {', '.join(closed)}", "sudo usermod -aG video $USER; log in again"
        )
    return Finding("ok", "cameras", ", ".join(str(device) for device in devices))


def _broker(loaded: Config) -> Finding:
    mqtt = loaded.mqtt
    address = f"{mqtt.host}:{mqtt.port}"
    try:
        socket.create_connection((mqtt.host, mqtt.port), timeout=3.0).close()
    except OSError as error:
        if mqtt.embedded:
            return Finding("ok", "broker", f"embedded: the agent will open {address} when it runs")
        return Finding("fail", "broker", f"{address}: {error}", "start the broker, or correct host and port in [mqtt]")
    if mqtt.embedded:
        return Finding("ok", "broker", f"{address} accepts connections: the running agent's own, or `run` will refuse")
    return Finding("ok", "broker", f"{address} accepts connections")
