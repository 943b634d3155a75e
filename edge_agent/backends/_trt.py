"""TensorRT itself, of whatever generation is installed: its module, its log, its plan files.

Generations are told apart by what they have, not by their numbers.
"""

from __future__ import annotations

import ctypes
import functools
import importlib
import json
import os
import re
import stat
import struct
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import structlog

from edge_agent.errors import GpuUnavailable, ModelError

log = structlog.get_logger()

Generation = Literal["auto", "tensorrt", "tensorrt_rtx", "tensorrt_lean"]

_MODULES: Mapping[str, Sequence[str]] = {
    "tensorrt": ("tensorrt", "tensorrt_bindings"),
    "tensorrt_rtx": ("tensorrt_rtx", "tensorrt_rtx_bindings"),
    "tensorrt_lean": ("tensorrt_lean", "tensorrt_lean_bindings"),  # runs engines, builds none
}
_DTYPES = {
    "FLOAT": "float32",
    "HALF": "float16",
    "INT8": "int8",
    "UINT8": "uint8",
    "INT32": "int32",
    "INT64": "int64",
    "BOOL": "bool",
}
_MAX_HEADER = 1 << 20
_ERROR, _WARNING = 1, 2  # of ILogger.Severity; 0 is an internal error
_NO_MEMORY = re.compile(r"(?i)out of memory|outofmemory")
_DRIVER_TOO_OLD = "driver version is insufficient"


def library(generation: Generation = "auto") -> Any:
    """TensorRT's Python module. Raises `GpuUnavailable` where there is none that can be imported."""
    complaints = []
    for wanted in _MODULES if generation == "auto" else (generation,):
        for name in _MODULES[wanted]:
            try:
                return importlib.import_module(name)
            except ModuleNotFoundError as error:
                if error.name != name:
                    complaints.append(f"{name}: {error}")
            except (ImportError, OSError) as error:  # the module is there, its libraries are not
                complaints.append(f"{name}: {error}")
    hint = (
        "on a Jetson it comes with JetPack, and an environment made with --system-site-packages sees it; "
        "elsewhere: pip install tensorrt"
    )
    found = f"TensorRT cannot be imported: {'; '.join(complaints)}" if complaints else "TensorRT is not installed"
    raise GpuUnavailable(f"{found} ({hint})")


def name_of(trt: Any) -> str:
    """Which TensorRT this is, such as `TensorRT 8.6.0` or `TensorRT-RTX 1.7.1.116`."""
    kind = {"tensorrt_rtx": "TensorRT-RTX", "tensorrt_lean": "TensorRT lean"}
    module = trt.__name__.removesuffix("_bindings")
    return f"{kind.get(module, 'TensorRT')} {trt.__version__}"


@functools.cache
def logger(trt: Any) -> Any:
    """The one log that TensorRT has in a process: `errors()` are its lines since the last call, or that there are
    none; `is_clean` says so without taking them."""

    class Log(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self._errors: deque[str] = deque(maxlen=10)

        def log(self, severity: Any, message: str) -> None:
            if int(severity) <= _ERROR:
                self._errors.append(message.strip())
            if int(severity) <= _WARNING:
                log.debug("tensorrt.says", message=message.strip(), severity=severity.name.lower())

        @property
        def is_clean(self) -> bool:
            return not self._errors

        def errors(self) -> str:
            told = " | ".join(self._errors)
            self._errors.clear()
            return told or "TensorRT gave no reason"

    return Log()


def dtype(data_type: Any) -> str:
    """A tensor's type by numpy's name; a type that numpy has not keeps TensorRT's."""
    name: str = data_type.name
    return _DTYPES.get(name, name.lower())


def start(trt: Any) -> Any:
    """TensorRT's runtime. Raises `GpuUnavailable` where it does not start, as with a driver that is too old: what it
    gives then looks like a runtime, and crashes the process when it is used, or freed."""
    told = logger(trt)
    told.errors()
    try:
        runtime = trt.Runtime(told)
    except TypeError:  # pybind's word for a constructor that gave nothing
        runtime = None
    if runtime is None or not told.is_clean:
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(runtime))  # so that nobody frees it, not even the interpreter
        raise GpuUnavailable(f"{name_of(trt)} does not start here; does the driver fit it? ({told.errors()})")
    return runtime


def deserialize(trt: Any, path: Path) -> tuple[Any, Any, Mapping[str, str]]:
    """The runtime, the engine in a file, and what the file tells of the model.

    An engine is a program that runs with the agent's rights: only a file that nobody else can write is opened,
    and host code in it stays off. Raises `ModelError`, `GpuUnavailable` where the driver is too old.
    """
    _must_be_ours(path)
    plan, metadata = read_plan(path)
    told, runtime = logger(trt), start(trt)
    runtime.engine_host_code_allowed = False
    engine = runtime.deserialize_cuda_engine(plan)
    if engine is None:
        reason = told.errors()
        if _DRIVER_TOO_OLD in reason:
            raise GpuUnavailable(f"the driver is too old for {name_of(trt)}: {reason}")
        if _NO_MEMORY.search(reason):
            raise ModelError(f"{path}: there is not enough GPU memory left for it ({reason})")
        raise ModelError(
            f"{path} is no engine that {name_of(trt)} can run on this GPU; engines fit the TensorRT version and the "
            f"GPU they were built for, so give the ONNX file and it is built here ({reason})"
        )
    return runtime, engine, metadata


def read_plan(path: Path) -> tuple[bytes, Mapping[str, str]]:
    """A plan file's plan, and the metadata of a sidecar or of a header as Ultralytics writes it (the length in
    four bytes, JSON, then the plan). Raises `ModelError`."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ModelError(f"{path}: {error.strerror}", code="model_not_found") from error
    header = _header(content)
    length, told = header or (-4, {})
    plan = content[4 + length :]
    sidecar = path.with_suffix(".json")
    if sidecar.is_file():
        try:
            told = {str(key): str(value) for key, value in json.loads(sidecar.read_text())["metadata"].items()}
        except (OSError, ValueError, KeyError, AttributeError, TypeError):
            log.warning("tensorrt.sidecar_unreadable", path=str(sidecar))
    return plan, told


def _header(content: bytes) -> tuple[int, Mapping[str, str]] | None:
    if len(content) < 6 or content[4:5] != b"{":
        return None
    [length] = struct.unpack("<I", content[:4])
    if not 2 <= length <= min(_MAX_HEADER, len(content) - 4):
        return None
    try:
        told = json.loads(content[4 : 4 + length])
    except ValueError:
        return None
    if not isinstance(told, dict):
        return None
    names = told.get("names")
    if isinstance(names, dict) and all(key.isdecimal() for key in names):  # JSON has no numbers as keys
        told["names"] = {int(key): value for key, value in names.items()}
    return length, {key: str(value) for key, value in told.items()}


def _must_be_ours(path: Path) -> None:
    try:
        resolved = path.resolve(strict=True)
        file, folder = resolved.stat(), resolved.parent.stat()
    except OSError as error:
        raise ModelError(f"{path}: {error.strerror}", code="model_not_found") from error
    if file.st_uid not in (0, os.geteuid()):
        raise ModelError(f"{path} is another user's; an engine is a program: sudo chown {os.geteuid()} {resolved}")
    if file.st_mode & stat.S_IWOTH or (folder.st_mode & stat.S_IWOTH and not folder.st_mode & stat.S_ISVTX):
        raise ModelError(
            f"{path} can be changed by everybody; an engine is a program: chmod o-w the file and its folder"
        )
