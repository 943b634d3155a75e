"""Pictures: OpenCV as it was built, and the cameras of this machine."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator
from importlib import metadata
from importlib.machinery import PathFinder
from pathlib import Path

from edge_agent.sources import _v4l2
from edgectl.doctor._subject import Subject
from edgectl.doctor._words import Finding

_PARTS = {"FFmpeg": "FFMPEG", "V4L2": "v4l/v4l2", "GStreamer": "GStreamer"}
_WHEELS = ("opencv-python", "opencv-python-headless", "opencv-contrib-python", "opencv-contrib-python-headless")


def onnxruntime(subject: Subject) -> Iterator[Finding]:
    """The engine for the CPU."""
    try:
        import onnxruntime as ort
    except ImportError as error:
        yield Finding("fail", "onnxruntime", str(error), "pip install 'edge-agent[onnx]'")
        return
    providers = ", ".join(name.removesuffix("ExecutionProvider") for name in ort.get_available_providers())
    yield Finding("ok", "onnxruntime", f"{ort.__version__} ({providers})")


def opencv(subject: Subject) -> Iterator[Finding]:
    """Which OpenCV this is, and what it can open."""
    try:
        import cv2
    except ImportError as error:
        yield Finding("fail", "opencv", str(error), "pip install 'edge-agent[opencv]', or JetPack's python3-opencv")
        return
    build = cv2.getBuildInformation()
    has = [name for name, key in _PARTS.items() if re.search(rf"{key}:\s+YES", build)]
    lacks = [name for name in _PARTS if name not in has]
    fact = f"{cv2.__version__} with {', '.join(has) or 'no video support'}"
    fact += f", without {', '.join(lacks)}" if lacks else ""
    if "FFmpeg" in lacks:
        yield Finding("warn", "opencv", fact, "rtsp cameras and videos need FFmpeg: pip install 'edge-agent[opencv]'")
    else:
        yield Finding("ok", "opencv", fact)
    yield from _several(Path(cv2.__file__))


def _several(loaded: Path) -> Iterator[Finding]:
    wheels = [name for name in _WHEELS if _is_installed(name)]
    if len(wheels) > 1:
        fact = f"{' and '.join(wheels)} are installed and write over each other"
        yield Finding("warn", "opencv", fact, f"pip uninstall {' '.join(wheels)}; then install one of them")
    for other in _hidden(loaded):
        own = f"pip uninstall {wheels[0]}" if wheels else f"remove {loaded.parent}"
        fact = f"{loaded.parent} hides another OpenCV, {other}; JetPack's own has GStreamer"
        yield Finding("warn", "opencv", fact, f"to use the other one: {own}")


def _hidden(loaded: Path) -> Iterator[str]:
    """Where else Python would find a cv2, were this one not there."""
    seen = {loaded.resolve()}
    for entry in sys.path:
        spec = PathFinder.find_spec("cv2", [entry])
        if spec is None or spec.origin is None or Path(spec.origin).resolve() in seen:
            continue
        seen.add(Path(spec.origin).resolve())
        yield spec.origin


def _is_installed(package: str) -> bool:
    try:
        metadata.version(package)
    except metadata.PackageNotFoundError:
        return False
    return True


def cameras(subject: Subject) -> Iterator[Finding]:
    """The V4L2 devices here, and whether they may be opened."""
    nodes = sorted(Path("/dev").glob("video*"))
    if not nodes:
        fix = "plug one in, or use an rtsp, file or synthetic source"
        yield Finding("warn", "cameras", "no camera here: there is no /dev/video*", fix)
        return
    closed = [node for node in nodes if not os.access(node, os.R_OK | os.W_OK)]
    if closed:
        fact = f"may not open {', '.join(map(str, closed))}: they are {_owner(closed[0])}'s"
        fix = f"sudo usermod -aG {_owner(closed[0])} $USER; log in again"
        yield Finding("fail", "cameras", fact, fix)
    found = list(_v4l2.devices())
    for camera in found:
        name = f"; lasting name {camera.by_id}" if camera.by_id else ""
        yield Finding("ok", "cameras", f"{camera.path}: {camera.card} ({camera.bus}){name}")
    if not found and not closed:
        fact = f"{', '.join(map(str, nodes))} there, and none can be opened as a camera"
        yield Finding("warn", "cameras", fact, "another program may hold it, or it only converts pictures")


def _owner(node: Path) -> str:
    try:
        return node.group()
    except KeyError:
        return f"group {node.stat().st_gid}"
