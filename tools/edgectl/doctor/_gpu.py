"""The GPU and what drives it: driver, CUDA for Python, TensorRT, NVRTC, NVML."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path

import msgspec
import numpy as np

from edge_agent import backends, cuda, gpu
from edge_agent.backends import _trt
from edge_agent.backends.tensorrt import TensorRtEngine
from edge_agent.errors import EdgeAgentError, GpuUnavailable
from edge_agent.readings import GpuReadings
from edge_agent.sensors.jetson import is_jetson
from edge_agent.sensors.nvml import NvmlSensor
from edgectl.doctor._subject import Subject
from edgectl.doctor._words import Finding

_RUNTIMES = ("libcudart.so.13", "libcudart.so.12", "libcudart.so.11.0", "libcudart.so")
_RUNTIME_PACKAGES = ("nvidia-cuda-runtime", "nvidia-cuda-runtime-cu12", "nvidia-cuda-runtime-cu13")
_MODULE = Path("/sys/module/nvidia/version")
_ALWAYS = {"index", "last_xid", "throttle_reasons"}
_INNOCENT = {"applications_clocks_setting", "sw_power_cap", "display_clock_setting"}
Version = tuple[int, int]


def driver(subject: Subject) -> Iterator[Finding]:
    """NVIDIA's driver, and the CUDA that it knows."""
    version = _driver_knows()
    if not _is_there():
        yield Finding("ok", "gpu", "no NVIDIA GPU here; models run on the CPU")
    elif version is None:
        fix = "install NVIDIA's driver; in a container, start it with --runtime nvidia or --gpus all"
        fact = f"{', '.join(backends.nvidia_devices())} there, but the driver's library libcuda.so.1 cannot be loaded"
        yield Finding(subject.without_gpu, "driver", fact, fix)
    else:
        yield Finding("ok", "driver", f"{_module_version()}knows CUDA up to {_text(version)}")


def runtime(subject: Subject) -> Iterator[Finding]:
    """The CUDA runtime, which a driver of an older generation does not run."""
    knows = _driver_knows()
    if not _is_there() or knows is None:
        return
    found = [(name, version) for name in _RUNTIMES if (version := _cuda_version(name, "cudaRuntimeGetVersion"))]
    packages = [(name, _numbers(text)) for name in _RUNTIME_PACKAGES if (text := _installed(name))]
    if not found and not packages:
        yield Finding("ok", "cuda runtime", "none of its own here: TensorRT brings what it needs, the agent needs none")
        return
    told = ", ".join(f"{_text(version)} ({name})" for name, version in [*found, *packages])
    newest = max(version for _, version in [*found, *packages])
    if newest[0] > knows[0]:
        fix = f"update the driver, or install CUDA {knows[0]}"
        fact = f"{told}: of a newer generation than the driver's CUDA {_text(knows)}"
        yield Finding("warn", "cuda runtime", fact, fix)
    else:
        yield Finding("ok", "cuda runtime", told)


def bindings(subject: Subject) -> Iterator[Finding]:
    """CUDA for Python, which must not be of a newer generation than the driver."""
    knows = _driver_knows()
    if not _is_there() or knows is None:
        return
    if lacks := cuda.missing():
        limit = "" if knows[0] >= 13 else f"; for this driver: pip install 'cuda-bindings<{knows[0] + 1}'"
        yield Finding(subject.without_gpu, "cuda python", lacks, f"pip install 'edge-agent[cuda]'{limit}")
        return
    installed = _installed("cuda-bindings") or _installed("cuda-python")
    if installed is None:
        yield Finding("ok", "cuda python", "cuda.bindings can be imported; its version is not told")
    elif _numbers(installed)[0] > knows[0]:
        fact = f"cuda-bindings {installed} is for CUDA {_numbers(installed)[0]}, the driver knows {_text(knows)}"
        fix = f"pip install 'cuda-bindings<{knows[0] + 1}', or update the driver"
        yield Finding(subject.without_gpu, "cuda python", fact, fix)
    else:
        yield Finding("ok", "cuda python", f"cuda-bindings {installed}, driver CUDA {_text(knows)}")


def tensorrt(subject: Subject) -> Iterator[Finding]:
    """Whether TensorRT is there, and can run engines."""
    try:
        trt = _trt.library(subject.tensorrt.library)
    except GpuUnavailable as error:
        if _is_there():
            yield Finding(subject.without_gpu, "tensorrt", str(error), "docs/tensorrt.md; models run on the CPU")
        return
    name = _trt.name_of(trt)
    if str(trt.__version__).startswith("8.") and int(np.__version__.split(".")[0]) >= 2:
        fact = f"{name} needs numpy 1, this is {np.__version__}"
        yield Finding(subject.without_gpu, "tensorrt", fact, "pip install 'numpy<2'")
    if not _is_there():
        yield Finding("ok", "tensorrt", f"{name} can be imported; there is no GPU to run it")
    elif reason := TensorRtEngine.unavailable(subject.tensorrt):
        fact = f"{name} cannot run engines: {reason}"
        yield Finding(subject.without_gpu, "tensorrt", fact, "docs/tensorrt.md; models run on the CPU")
    else:
        used = cuda.open_gpu()
        capability = ".".join(map(str, used.capability))
        yield Finding("ok", "tensorrt", f"{name} on {used.name} (sm {capability}), driver {used.driver_version}")


def nvrtc(subject: Subject) -> Iterator[Finding]:
    """Whether the agent's own kernels can be compiled for this GPU, and loaded."""
    if not _is_there() or cuda.missing():
        return
    try:
        used = cuda.open_gpu()
        gpu.kernels(used, None).close()
    except EdgeAgentError as error:
        fix = "without it pictures are prepared, and dense heads reduced, on the CPU; docs/tensorrt.md"
        yield Finding("warn", "nvrtc", str(error), fix)
        return
    yield Finding("ok", "nvrtc", f"compiles the agent's kernels for sm_{''.join(map(str, used.capability))}")


def nvml(subject: Subject) -> Iterator[Finding]:
    """What NVML tells of each GPU, fact by fact."""
    if not _is_there():
        return
    try:
        sensor = NvmlSensor()
    except GpuUnavailable as error:
        yield Finding("warn", "nvml", str(error), "statistics then tell less of the GPU")
        return
    try:
        seen = sensor.read()
    except GpuUnavailable as error:
        yield Finding("warn", "nvml", str(error), "`nvidia-smi` may tell more; a lost GPU wants a reboot")
        return
    finally:
        sensor.close()
    for trouble in seen.troubles.values():
        yield Finding("warn", "nvml", trouble, "`nvidia-smi` may tell more; a lost GPU wants a reboot")
    for one in seen.gpus or []:
        yield from _told_by_nvml(one)


def _told_by_nvml(one: GpuReadings) -> Iterator[Finding]:
    facts = {name: value for name, value in msgspec.structs.asdict(one).items() if name not in _ALWAYS}
    has = [name for name, value in facts.items() if value is not None]
    lacks = [name for name, value in facts.items() if value is None]
    name = f"GPU {one.index}, {one.name or 'which does not tell its name'}"
    fact = f"{name}: tells {', '.join(has)}" + (f"; does not tell {', '.join(lacks)}" if lacks else "")
    yield Finding("ok", "nvml", fact)
    if slowed := sorted(set(one.throttle_reasons or []) - _INNOCENT):
        fix = "look at its cooling and its power supply"
        yield Finding("warn", "nvml", f"{name}: its clocks are held back: {', '.join(slowed)}", fix)
    if one.ecc_uncorrected:
        fact = f"{name}: {one.ecc_uncorrected} uncorrected memory errors since the driver was loaded"
        yield Finding("warn", "nvml", fact, "sudo nvidia-smi -r, or reboot; if it comes back, the GPU is broken")


def _is_there() -> bool:
    return bool(backends.nvidia_devices()) or is_jetson() or bool(_driver_knows())


def _driver_knows() -> Version | None:
    return _cuda_version("libcuda.so.1", "cuDriverGetVersion")


def _cuda_version(library: str, function: str) -> Version | None:
    """What a library of CUDA says of its version: 12060 is 12.6."""
    number = ctypes.c_int()
    try:
        if getattr(ctypes.CDLL(library), function)(ctypes.byref(number)) != 0:
            return None
    except (OSError, AttributeError):
        return None
    return (number.value // 1000, number.value % 1000 // 10) if number.value else None


def _module_version() -> str:
    """The driver's own version, where its kernel module tells."""
    try:
        return f"{_MODULE.read_text().strip()}, "
    except OSError:
        return ""


def _installed(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _numbers(version: str) -> Version:
    parts = [int(part) for part in version.split(".")[:2] if part.isdecimal()]
    return (parts[0] if parts else 0, parts[1] if len(parts) > 1 else 0)


def _text(version: Sequence[int]) -> str:
    return ".".join(map(str, version))
