"""The CUDA driver as owned objects: every return code is checked, every handle closed by who opened it.

The only module that imports `cuda.bindings`, and it does so when a GPU is asked for. Knows nothing of models
and pictures.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import structlog
from numpy.typing import DTypeLike, NDArray

from edge_agent import caching
from edge_agent.errors import CudaError, GpuLost, GpuOutOfMemory, GpuUnavailable

log = structlog.get_logger()

_OUT_OF_MEMORY = 2
_STICKY = frozenset((214, 220, 226, 700, 702, 709, 710, 714, 715, 716, 717, 718, 719, 721, 810))
"""Errors that leave the context dead: memory faults, traps, time-outs, uncorrectable ECC and NVLink errors."""
_BAD_IMAGE = (200, 201, 209, 218, 222, 300)  # of a module: not for this GPU or this driver, or damaged

_EVENT_BLOCKING_SYNC, _RECORD_EXTERNAL = 1, 1
_MODULE_VERSION = Path("/sys/module/nvidia/version")
_HOST_ALLOC_PORTABLE, _HOST_ALLOC_DEVICEMAP = 1, 2
_STREAM_NON_BLOCKING = 1


_lost = threading.Event()  # the context is the process's, and so is its end


class Gpu:
    """A GPU and the one context that this process has on it. Get it from `open_gpu`.

    The context is TensorRT's too, and lives as long as the process: frames in pinned memory outlive engines.
    """

    def __init__(self, index: int) -> None:
        driver = _driver()
        _call(driver.cuInit, 0)
        count = _call(driver.cuDeviceGetCount)
        if index >= count:
            raise GpuUnavailable(f"there is no GPU {index}; the driver sees {count}")
        device = _call(driver.cuDeviceGet, index)
        attribute = functools.partial(_attribute, device)
        name: bytes = _call(driver.cuDeviceGetName, 128, device)
        self.name = name.partition(b"\0")[0].decode()
        self.capability = (
            attribute("COMPUTE_CAPABILITY_MAJOR"),
            attribute("COMPUTE_CAPABILITY_MINOR"),
        )
        self.is_integrated = bool(attribute("INTEGRATED"))
        version = _call(driver.cuDriverGetVersion)
        self.driver_version = _driver_version(f"CUDA {version // 1000}.{version % 1000 // 10}")
        self._context = _call(driver.cuDevicePrimaryCtxRetain, device)
        self._entered = threading.local()
        self.enter()

    def enter(self) -> None:
        """Make this GPU the calling thread's own, which every thread that uses it must; once is enough."""
        if not hasattr(self._entered, "by_this_thread"):
            _call(_driver().cuCtxSetCurrent, self._context)
            self._entered.by_this_thread = True

    @property
    def context(self) -> Any:
        return self._context

    def memory(self) -> tuple[int, int]:
        """Bytes that are free, and bytes in all."""
        free, total = _call(_driver().cuMemGetInfo)
        return int(free), int(total)

    def synchronize(self) -> None:
        """Wait for all work on it. Raises `CudaError` where some of it failed."""
        _call(_driver().cuCtxSynchronize)


@functools.cache
def open_gpu(index: int = 0) -> Gpu:
    """The GPU of this number. Raises `GpuUnavailable` with the reason and what to do about it."""
    try:
        return Gpu(index)
    except CudaError as error:
        raise GpuUnavailable(f"the GPU cannot be used: {error}") from error
    except RuntimeError as error:  # of cuda.bindings: no libcuda, or one that lacks what is asked for
        first = str(error).strip().partition("\n")[0]
        raise GpuUnavailable(f"no NVIDIA driver that can be used: {first}") from error


def missing() -> str | None:
    """Why `cuda.bindings` cannot be imported here, if so."""
    try:
        _driver()
    except ImportError as error:
        return f"the Python module 'cuda.bindings' is not there ({error}): pip install 'edge-agent[cuda]'"
    return None


class Stream:
    """An ordered line of work on the GPU; never the default stream."""

    def __init__(self) -> None:
        self.handle: Any = _call(_driver().cuStreamCreate, _STREAM_NON_BLOCKING)

    @property
    def address(self) -> int:
        """The handle as a number, for libraries that want it so."""
        return int(self.handle)

    def copy_in(self, device: int, host: int, nbytes: int) -> None:
        """Copy from pinned host memory."""
        _call(_driver().cuMemcpyHtoDAsync, device, host, nbytes, self.handle)

    def copy_out(self, host: int, device: int, nbytes: int) -> None:
        """Copy to pinned host memory."""
        _call(_driver().cuMemcpyDtoHAsync, host, device, nbytes, self.handle)

    def clear(self, device: int, nbytes: int) -> None:
        """Fill with zeros."""
        _call(_driver().cuMemsetD8Async, device, 0, nbytes, self.handle)

    def synchronize(self) -> None:
        _call(_driver().cuStreamSynchronize, self.handle)

    def capture(self, work: Callable[[], object]) -> Graph:
        """The GPU work that `work` asks of this stream, as a graph; nothing of it runs now.

        Other threads may go on using the GPU. Raises what `work` raises, and `CudaError` where it did
        something that cannot be captured; the stream can be used again in any case.
        """
        driver = _driver()
        _call(driver.cuStreamBeginCapture, self.handle, driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL)
        try:
            work()
        except BaseException:
            _, graph = driver.cuStreamEndCapture(self.handle)  # whatever it says, the capture is over
            if graph is not None and int(graph):
                _quietly(driver.cuGraphDestroy, graph)
            raise
        return Graph(_call(driver.cuStreamEndCapture, self.handle))

    def close(self) -> None:
        handle, self.handle = self.handle, None
        if handle is not None:
            _quietly(_driver().cuStreamDestroy, handle)


class Event:
    """A mark in a stream, with its time. Those that are `awaited` are waited for without spinning."""

    def __init__(self, *, awaited: bool = False) -> None:
        self._handle: Any = _call(_driver().cuEventCreate, _EVENT_BLOCKING_SYNC if awaited else 0)

    def record(self, stream: Stream, *, capturing: bool = False) -> None:
        """Set the mark behind all that the stream was given so far."""
        flags = _RECORD_EXTERNAL if capturing else 0
        _call(_driver().cuEventRecordWithFlags, self._handle, stream.handle, flags)

    def synchronize(self) -> None:
        """Wait until the mark is reached; other threads run meanwhile."""
        _call(_driver().cuEventSynchronize, self._handle)

    def ms_since(self, earlier: Event) -> float:
        """Milliseconds from an earlier mark to this one; both have been reached."""
        function = _driver().cuEventElapsedTime
        error, elapsed = function(earlier._handle, self._handle)
        if error:
            raise _error(function.__name__, error)
        return float(elapsed)

    def close(self) -> None:
        handle, self._handle = self._handle, None
        if handle is not None:
            _quietly(_driver().cuEventDestroy, handle)


class Graph:
    """Captured work that is launched as one; its copies from the host can be pointed elsewhere in between."""

    def __init__(self, graph: Any) -> None:
        driver = _driver()
        self._graph = graph
        self._executable: Any = None
        try:
            self._executable = _call(driver.cuGraphInstantiate, graph, 0)
        except CudaError:
            self.close()
            raise

    def uploads(self) -> Mapping[int, Any]:
        """Its copies from the host, by the device address they go to, as `redirect` wants them."""
        driver = _driver()
        types = driver.CUmemorytype
        _, count = _call(driver.cuGraphGetNodes, self._graph, 0)
        nodes, _ = _call(driver.cuGraphGetNodes, self._graph, count)
        found = {}
        for node in nodes:
            if _call(driver.cuGraphNodeGetType, node) == driver.CUgraphNodeType.CU_GRAPH_NODE_TYPE_MEMCPY:
                copy = _call(driver.cuGraphMemcpyNodeGetParams, node)
                copy.srcMemoryType, copy.dstMemoryType = types.CU_MEMORYTYPE_HOST, types.CU_MEMORYTYPE_DEVICE
                copy.Height = copy.Depth = copy.srcHeight = copy.dstHeight = 1
                found[int(copy.dstDevice)] = node, copy
        return found

    def redirect(self, upload: Any, gpu: Gpu, *, device: int, host: int, nbytes: int) -> None:
        """Let a copy bring other bytes, from the next launch on."""
        node, copy = upload
        copy.srcHost = host
        if copy.WidthInBytes != nbytes or int(copy.dstDevice) != device:
            copy.dstDevice = device
            copy.WidthInBytes = copy.srcPitch = copy.dstPitch = nbytes
        _call(_driver().cuGraphExecMemcpyNodeSetParams, self._executable, node, copy, gpu.context)

    def launch(self, stream: Stream) -> None:
        _call(_driver().cuGraphLaunch, self._executable, stream.handle)

    def close(self) -> None:
        driver = _driver()
        executable, self._executable = self._executable, None
        graph, self._graph = self._graph, None
        if executable is not None:
            _quietly(driver.cuGraphExecDestroy, executable)
        if graph is not None:
            _quietly(driver.cuGraphDestroy, graph)


class DeviceMemory:
    """Bytes on the GPU; `address` is None once closed."""

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes
        self._pointer: Any = _call(_driver().cuMemAlloc, max(1, nbytes))
        self.address = int(self._pointer)

    def close(self) -> None:
        pointer, self._pointer = self._pointer, None
        if pointer is not None:
            _quietly(_driver().cuMemFree, pointer)


class PinnedMemory:
    """Host memory that the GPU reads and writes by itself, as the base of a numpy array.

    It is freed when the last array on it is gone, in whatever thread that happens: a frame may be anywhere.
    `device_address` is where kernels find it without a copy.
    """

    def __init__(self, gpu: Gpu, shape: tuple[int, ...], dtype: DTypeLike) -> None:
        kind = np.dtype(dtype)
        self.nbytes = int(np.prod(shape, dtype=np.int64)) * kind.itemsize
        driver = _driver()
        gpu.enter()
        pointer = _call(driver.cuMemHostAlloc, max(1, self.nbytes), _HOST_ALLOC_PORTABLE | _HOST_ALLOC_DEVICEMAP)
        self.address = int(pointer)
        weakref.finalize(self, _free_host, gpu, self.address).atexit = False
        self.device_address = int(_call(driver.cuMemHostGetDevicePointer, pointer, 0))
        self.__array_interface__ = {
            "version": 3,
            "shape": shape,
            "typestr": kind.str,
            "descr": kind.descr,
            "data": (self.address, False),
            "strides": None,
        }


def pinned_array(gpu: Gpu, shape: tuple[int, ...], dtype: DTypeLike) -> NDArray[Any]:
    """An array in pinned memory; what it holds is left over. Raises `CudaError`."""
    return np.asarray(PinnedMemory(gpu, shape, dtype))


def pinned_memory(array: NDArray[Any]) -> PinnedMemory | None:
    """The pinned memory that a whole array lies in; None for others, and for parts of one."""
    memory = array.base
    if isinstance(memory, PinnedMemory) and memory.nbytes == array.nbytes and array.flags.c_contiguous:
        return memory
    return None


class Kernels:
    """The kernels of a CUDA source, compiled for a GPU; compiled before, they are read from `cache`.

    Raises `GpuUnavailable` where they have to be compiled and NVRTC is not there.
    """

    def __init__(self, gpu: Gpu, name: str, source: str, *, cache: Path | None) -> None:
        architecture = f"sm_{gpu.capability[0]}{gpu.capability[1]}"
        digest = hashlib.sha256(f"{architecture}\n{source}".encode()).hexdigest()[:16]
        path = cache / f"{name}-{architecture}-{digest}.cubin" if cache else None
        self._module = self._load(path) if path else None
        if self._module is None:
            cubin = compile_kernels(source, name, architecture)
            if path:
                caching.keep(path, cubin)
            self._module = _call(_driver().cuModuleLoadData, cubin)
        self._functions: dict[str, Any] = {}

    def launch(
        self,
        name: str,
        stream: Stream,
        grid: tuple[int, int, int],
        block: tuple[int, int, int],
        arguments: Sequence[Any],
    ) -> None:
        """Start a kernel; `arguments` are ctypes values and structures, as its parameters want them."""
        function = self._functions.get(name)
        if function is None:
            function = self._functions[name] = _call(_driver().cuModuleGetFunction, self._module, name.encode())
        pointers = (ctypes.c_void_p * len(arguments))(*(ctypes.addressof(argument) for argument in arguments))
        _call(_driver().cuLaunchKernel, function, *grid, *block, 0, stream.handle, ctypes.addressof(pointers), 0)

    def close(self) -> None:
        module, self._module = self._module, None
        if module is not None:
            _quietly(_driver().cuModuleUnload, module)

    @staticmethod
    def _load(path: Path) -> Any:
        try:
            cubin = path.read_bytes()
        except OSError:
            return None
        try:
            return _call(_driver().cuModuleLoadData, cubin)
        except CudaError as error:
            if error.number not in _BAD_IMAGE:
                raise
            log.warning("cuda.kernels_damaged", path=str(path), reason=str(error))
            return None


def compile_kernels(source: str, name: str, architecture: str) -> bytes:
    """A cubin of a CUDA source for an architecture such as sm_87. Needs no GPU.

    Raises `GpuUnavailable` where NVRTC is missing or does not know the architecture.
    """
    try:
        from cuda.bindings import nvrtc

        error, program = nvrtc.nvrtcCreateProgram(source.encode(), f"{name}.cu".encode(), 0, [], [])
    except (ImportError, RuntimeError) as error:
        raise GpuUnavailable(
            f"NVRTC, which compiles the kernels for this GPU, is not there: pip install nvidia-cuda-nvrtc, "
            f"or nvidia-cuda-nvrtc-cu12 with CUDA 12 ({str(error).strip().partition(chr(10))[0]})"
        ) from error
    try:
        options = [f"--gpu-architecture={architecture}".encode(), b"--std=c++17"]
        [status] = nvrtc.nvrtcCompileProgram(program, len(options), options)
        if int(status):
            _, size = nvrtc.nvrtcGetProgramLogSize(program)
            text = b" " * size
            nvrtc.nvrtcGetProgramLog(program, text)
            told = text.rstrip(b"\0 ").decode(errors="replace").strip()
            raise GpuUnavailable(f"NVRTC cannot compile the kernels for {architecture}: {status.name}: {told[:1000]}")
        _, size = nvrtc.nvrtcGetCUBINSize(program)
        cubin: bytes = b" " * size
        nvrtc.nvrtcGetCUBIN(program, cubin)
        return cubin
    finally:
        nvrtc.nvrtcDestroyProgram(program)


def is_lost() -> bool:
    """Whether this process has lost the GPU: then nothing can be freed, and libraries that try end in an abort."""
    return _lost.is_set()


@functools.cache
def _driver() -> Any:
    from cuda.bindings import driver

    return driver


def _call(function: Callable[..., Any], *arguments: Any) -> Any:
    """What a driver function returns besides its code. Raises `CudaError`, or `GpuLost` for good."""
    error, *values = function(*arguments)
    if error:
        raise _error(function.__name__, error)
    if not values:
        return None
    return values[0] if len(values) == 1 else values


def _quietly(function: Callable[..., Any], *arguments: Any) -> None:
    """As `_call`, for freeing: after a fault there is nothing left to be freed, and the fault is known."""
    try:
        _call(function, *arguments)
    except GpuLost:
        pass
    except CudaError as error:
        log.warning("cuda.not_freed", reason=str(error))


def _error(call: str, error: Any) -> CudaError:
    driver = _driver()
    number = int(error)
    kind = GpuLost if number in _STICKY else GpuOutOfMemory if number == _OUT_OF_MEMORY else CudaError
    if number in _STICKY:
        _lost.set()
    return kind(call, number, _text(driver.cuGetErrorName(error)), _text(driver.cuGetErrorString(error)))


def _text(answer: tuple[Any, bytes | None]) -> str:
    return answer[1].decode() if answer[1] else "unknown"


def _driver_version(cuda_version: str) -> str:
    """The kernel module's own version before what it says of CUDA, which many drivers share."""
    try:
        return f"{_MODULE_VERSION.read_text().strip()} ({cuda_version})"
    except OSError:
        return cuda_version


def _attribute(device: Any, name: str) -> int:
    driver = _driver()
    wanted = getattr(driver.CUdevice_attribute, f"CU_DEVICE_ATTRIBUTE_{name}")
    return int(_call(driver.cuDeviceGetAttribute, wanted, device))


def _free_host(gpu: Gpu, address: int) -> None:
    try:
        gpu.enter()
        _quietly(_driver().cuMemFreeHost, address)
    except CudaError as error:
        log.debug("cuda.not_freed", reason=str(error))
