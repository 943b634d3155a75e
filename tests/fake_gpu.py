"""A fake GPU: the driver's calls on the host's memory, the kernels compiled for the CPU, engines by onnxruntime.

What it shows is that our code makes the right calls in the right order with the right addresses. It is as fast as
nothing, and knows nothing of what a real driver does on its own; `tests/gpu` asks a real one. A plan is an ONNX file.
"""

from __future__ import annotations

import ctypes
import enum
import itertools
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from edge_agent import gpu
from edge_agent.backends.onnx import OnnxEngine, OnnxOptions

_ONE_KERNEL_AT_A_TIME = threading.Lock()
"""Whoever launches it: the built-in variables of the kernels are the library's own."""


def compile_for_cpu(compiler: str, target: Path) -> ctypes.CDLL:
    """The kernels of gpu.cu as a library."""
    source = Path(__file__).with_name("kernels_on_cpu.cpp")
    options = ["-std=c++20", "-O2", "-ffp-contract=off", "-shared", "-fPIC", "-pthread", f'-DGPU_CU="{gpu.SOURCE}"']
    subprocess.run([compiler, *options, str(source), "-o", str(target)], check=True)
    return ctypes.CDLL(str(target))


class Index(ctypes.Structure):
    _fields_ = (("x", ctypes.c_uint), ("y", ctypes.c_uint), ("z", ctypes.c_uint))


class Result(enum.IntEnum):
    SUCCESS = 0
    OUT_OF_MEMORY = 2
    CAPTURE_INVALIDATED = 901
    ILLEGAL_ADDRESS = 700


class Kind(enum.Enum):
    CU_GRAPH_NODE_TYPE_KERNEL = 0
    CU_GRAPH_NODE_TYPE_MEMCPY = 1


@dataclass
class Node:
    """A step of a graph; `copy` if it brings something from the host."""

    run: Callable[[], None]
    copy: Any = None

    def __int__(self) -> int:
        return id(self)


@dataclass
class Handle:
    """A stream, an event, a graph: something with a number."""

    number: int
    nodes: list[Node] | None = None
    at: float | None = None
    flags: int = 0
    is_open: bool = True

    def __int__(self) -> int:
        return self.number


@dataclass
class FakeDriver:
    """The calls of `cuda.bindings.driver` that edge_agent makes. `lost`: every call fails from now on."""

    library: ctypes.CDLL
    total: int = 1 << 30
    is_integrated: bool = False
    lost: bool = False
    refuses_capture: bool = False
    device: dict[int, Any] = field(default_factory=dict)
    pinned: dict[int, Any] = field(default_factory=dict)
    streams: dict[int, Handle] = field(default_factory=dict)
    launches: list[str] = field(default_factory=list)
    captures: int = 0
    replays: int = 0

    def __post_init__(self) -> None:
        self._numbers = itertools.count(1)
        self.CUstreamCaptureMode = SimpleNamespace(CU_STREAM_CAPTURE_MODE_THREAD_LOCAL=1)
        self.CUgraphNodeType = Kind
        self.CUmemorytype = SimpleNamespace(CU_MEMORYTYPE_HOST=1, CU_MEMORYTYPE_DEVICE=2)
        names = ("COMPUTE_CAPABILITY_MAJOR", "COMPUTE_CAPABILITY_MINOR", "INTEGRATED")
        self.CUdevice_attribute = SimpleNamespace(**{f"CU_DEVICE_ATTRIBUTE_{name}": name for name in names})

    def __getattribute__(self, name: str) -> Any:
        value = object.__getattribute__(self, name)
        if not name.startswith("cu") or name.startswith("cuGetError"):
            return value

        def call(*arguments: Any) -> Any:
            if object.__getattribute__(self, "lost"):
                return (Result.ILLEGAL_ADDRESS,)
            answer = value(*arguments)
            return answer if isinstance(answer, tuple) else (Result.SUCCESS, answer)

        call.__name__ = name
        return call

    # The device

    def cuInit(self, flags: int) -> Any:
        return (Result.SUCCESS,)

    def cuDeviceGetCount(self) -> Any:
        return 1

    def cuDeviceGet(self, index: int) -> Any:
        return index

    def cuDeviceGetName(self, length: int, device: int) -> Any:
        return b"Fake GPU\0".ljust(length)

    def cuDeviceGetAttribute(self, name: str, device: int) -> Any:
        return {"COMPUTE_CAPABILITY_MAJOR": 8, "COMPUTE_CAPABILITY_MINOR": 7}.get(name, int(self.is_integrated))

    def cuDriverGetVersion(self) -> Any:
        return 13000

    def cuDevicePrimaryCtxRetain(self, device: int) -> Any:
        return "context"

    def cuCtxSetCurrent(self, context: str) -> Any:
        return (Result.SUCCESS,)

    def cuCtxSynchronize(self) -> Any:
        return (Result.SUCCESS,)

    def cuGetErrorName(self, error: Result) -> Any:
        return Result.SUCCESS, f"CUDA_ERROR_{error.name}".encode()

    def cuGetErrorString(self, error: Result) -> Any:
        return Result.SUCCESS, b"as told"

    # Memory

    def cuMemGetInfo(self) -> Any:
        return Result.SUCCESS, self.total - sum(len(memory) for memory in self.device.values()), self.total

    def cuMemAlloc(self, nbytes: int) -> Any:
        if nbytes > self.cuMemGetInfo()[1]:
            return (Result.OUT_OF_MEMORY,)
        return self._allocated(self.device, nbytes)

    def cuMemFree(self, address: int) -> Any:
        del self.device[address]
        return (Result.SUCCESS,)

    def cuMemHostAlloc(self, nbytes: int, flags: int) -> Any:
        assert flags == 3, "portable and mapped"
        return self._allocated(self.pinned, nbytes)

    def cuMemFreeHost(self, address: int) -> Any:
        del self.pinned[address]
        return (Result.SUCCESS,)

    def cuMemHostGetDevicePointer(self, address: int, flags: int) -> Any:
        return address

    @staticmethod
    def _allocated(where: dict[int, Any], nbytes: int) -> int:
        memory = (ctypes.c_char * nbytes)()
        ctypes.memset(memory, 0xAB, nbytes)
        address = ctypes.addressof(memory)
        where[address] = memory
        return address

    def require(self, where: dict[int, Any], address: int, nbytes: int) -> None:
        """Fail where this is no memory of that kind, or goes beyond it."""
        inside = any(start <= address and address + nbytes <= start + len(held) for start, held in where.items())
        assert inside, f"{nbytes} bytes at {address:#x} are nobody's, or were freed"

    # Streams and events

    def cuStreamCreate(self, flags: int) -> Any:
        assert flags == 1, "not ordered with the default stream"
        handle = Handle(next(self._numbers))
        self.streams[handle.number] = handle
        return handle

    def cuStreamDestroy(self, stream: Handle) -> Any:
        del self.streams[stream.number]
        return (Result.SUCCESS,)

    def cuStreamSynchronize(self, stream: Handle) -> Any:
        assert stream.nodes is None, "a stream that is captured cannot be waited for"
        return (Result.SUCCESS,)

    def cuStreamBeginCapture(self, stream: Handle, mode: int) -> Any:
        stream.nodes = []
        return (Result.SUCCESS,)

    def cuStreamEndCapture(self, stream: Handle) -> Any:
        nodes, stream.nodes = stream.nodes, None
        if self.refuses_capture:
            return Result.CAPTURE_INVALIDATED, None
        self.captures += 1
        return Handle(next(self._numbers), nodes=nodes)

    def do(self, stream: Handle, run: Callable[[], None], copy: Any = None) -> None:
        """Run a step now, or keep it for the graph that is being captured."""
        node = Node(run, copy)
        if stream.nodes is not None:
            stream.nodes.append(node)
        else:
            run()

    def cuMemcpyHtoDAsync(self, device: int, host: int, nbytes: int, stream: Handle) -> Any:
        copy = SimpleNamespace(srcHost=host, dstDevice=device, WidthInBytes=nbytes)
        self.do(stream, lambda: self._upload(copy), copy)
        return (Result.SUCCESS,)

    def _upload(self, copy: Any) -> None:
        self.require(self.pinned, copy.srcHost, copy.WidthInBytes)
        self.require(self.device, copy.dstDevice, copy.WidthInBytes)
        ctypes.memmove(copy.dstDevice, copy.srcHost, copy.WidthInBytes)

    def cuMemcpyDtoHAsync(self, host: int, device: int, nbytes: int, stream: Handle) -> Any:
        def download() -> None:
            self.require(self.pinned, host, nbytes)
            self.require(self.device, device, nbytes)
            ctypes.memmove(host, device, nbytes)

        self.do(stream, download)
        return (Result.SUCCESS,)

    def cuMemsetD8Async(self, device: int, value: int, nbytes: int, stream: Handle) -> Any:
        def fill() -> None:
            self.require(self.device, device, nbytes)
            ctypes.memset(device, value, nbytes)

        self.do(stream, fill)
        return (Result.SUCCESS,)

    def cuEventCreate(self, flags: int) -> Any:
        return Handle(next(self._numbers), flags=flags)

    def cuEventDestroy(self, event: Handle) -> Any:
        assert event.is_open
        event.is_open = False
        return (Result.SUCCESS,)

    def cuEventRecordWithFlags(self, event: Handle, stream: Handle, flags: int) -> Any:
        assert bool(flags) == (stream.nodes is not None), "external while a stream is captured, and only then"

        def mark() -> None:
            event.at = time.perf_counter()

        self.do(stream, mark)
        return (Result.SUCCESS,)

    def cuEventSynchronize(self, event: Handle) -> Any:
        assert event.at is not None, "nobody recorded it"
        return (Result.SUCCESS,)

    def cuEventElapsedTime(self, start: Handle, end: Handle) -> Any:
        assert start.at is not None
        assert end.at is not None
        assert not (start.flags | end.flags) & 2, "made without timing"
        return (end.at - start.at) * 1e3

    # Graphs and kernels

    def cuGraphInstantiate(self, graph: Handle, flags: int) -> Any:
        return graph

    def cuGraphGetNodes(self, graph: Handle, count: int) -> Any:
        nodes = graph.nodes or []
        return Result.SUCCESS, nodes[:count], len(nodes)

    def cuGraphNodeGetType(self, node: Node) -> Any:
        return Kind.CU_GRAPH_NODE_TYPE_MEMCPY if node.copy else Kind.CU_GRAPH_NODE_TYPE_KERNEL

    def cuGraphMemcpyNodeGetParams(self, node: Node) -> Any:
        return SimpleNamespace(**vars(node.copy))

    def cuGraphExecMemcpyNodeSetParams(self, graph: Handle, node: Node, copy: Any, context: str) -> Any:
        vars(node.copy).update(vars(copy))
        return (Result.SUCCESS,)

    def cuGraphLaunch(self, graph: Handle, stream: Handle) -> Any:
        assert graph.is_open
        self.replays += 1
        for node in graph.nodes or ():
            node.run()
        return (Result.SUCCESS,)

    def cuGraphExecDestroy(self, graph: Handle) -> Any:
        graph.is_open = False
        return (Result.SUCCESS,)

    def cuGraphDestroy(self, graph: Handle) -> Any:
        return (Result.SUCCESS,)

    def cuModuleLoadData(self, cubin: bytes) -> Any:
        return "module"

    def cuModuleGetFunction(self, module: str, name: bytes) -> Any:
        return name

    def cuModuleUnload(self, module: str) -> Any:
        return (Result.SUCCESS,)

    def cuLaunchKernel(self, name: bytes, *shape: Any) -> Any:
        grid, block, (stream, pointers) = Index(*shape[:3]), Index(*shape[3:6]), shape[7:9]
        known = {"letterbox": 3, "score_cells": 5, "gather": 8}
        count = known[name.decode().rpartition("_")[0]]
        at = ctypes.cast(pointers, ctypes.POINTER(ctypes.c_void_p))
        sizes = [gpu_argument_size(name.decode(), index) for index in range(count)]
        held = [
            ctypes.create_string_buffer(ctypes.string_at(at[index], size), size) for index, size in enumerate(sizes)
        ]
        copied = (ctypes.c_void_p * count)(*(ctypes.addressof(value) for value in held))

        def run() -> None:
            assert held
            self.launches.append(name.decode())
            with _ONE_KERNEL_AT_A_TIME:
                assert self.library.run_kernel(name, ctypes.byref(grid), ctypes.byref(block), copied)

        self.do(stream, run)
        return (Result.SUCCESS,)


def gpu_argument_size(name: str, index: int) -> int:
    """Bytes of a kernel's argument: a pointer, or one of the structures."""
    if name.startswith("letterbox"):
        return ctypes.sizeof(gpu.Style) if index == 2 else 8
    if name.startswith("gather") and index == 7:
        return ctypes.sizeof(gpu.Places)
    return ctypes.sizeof(gpu.Head) if index == 1 else 8


class Severity(enum.IntEnum):
    ERROR = 1


class FakeTensorRt:
    """A module like `tensorrt`, whose engines run in onnxruntime on a `FakeDriver`'s memory; `most`: the largest
    batch of an engine's profile."""

    __name__ = "tensorrt"
    __version__ = "0.0.fake"

    def __init__(self, driver: FakeDriver, *, most: int = 4) -> None:
        self.driver, self.most = driver, most
        self.TensorIOMode = SimpleNamespace(INPUT="input", OUTPUT="output")
        self.fails = False

    class ILogger:
        """As TensorRT's."""

    class IOutputAllocator:
        """As TensorRT's."""

    def Runtime(self, log: Any) -> Any:
        self.log = log
        return SimpleNamespace(deserialize_cuda_engine=self._engine, engine_host_code_allowed=True)

    def _engine(self, plan: bytes) -> Any:
        with tempfile.NamedTemporaryFile(suffix=".onnx") as file:
            file.write(plan)
            file.flush()
            return _FakeEngine(self, OnnxEngine(Path(file.name), OnnxOptions()))


class _FakeEngine:
    def __init__(self, trt: FakeTensorRt, onnx: OnnxEngine) -> None:
        self.trt, self.onnx = trt, onnx
        self.tensors = {tensor.name: tensor for tensor in (*onnx.facts.inputs, *onnx.facts.outputs)}
        self.names = list(self.tensors)
        self.inputs = [tensor.name for tensor in onnx.facts.inputs]
        self.num_io_tensors = len(self.names)
        self.num_optimization_profiles = 1

    def get_tensor_name(self, index: int) -> str:
        return self.names[index]

    def get_tensor_mode(self, name: str) -> str:
        return "input" if name in self.inputs else "output"

    def get_tensor_shape(self, name: str) -> Sequence[int]:
        return [-1 if side is None else side for side in self.tensors[name].shape]

    def get_tensor_dtype(self, name: str) -> Any:
        names = {"float32": "FLOAT", "float16": "HALF"}
        dtype = self.tensors[name].dtype
        return SimpleNamespace(name=names.get(dtype, dtype.upper()))

    def get_tensor_components_per_element(self, name: str) -> int:
        return -1

    def get_tensor_profile_shape(self, name: str, profile: int) -> Any:
        shape = self.tensors[name].shape
        return [[batch if side is None else side for side in shape] for batch in (1, 1, self.trt.most)]

    def create_execution_context(self) -> _FakeContext:
        return _FakeContext(self)


class _FakeContext:
    def __init__(self, engine: _FakeEngine) -> None:
        self.engine = engine
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}
        self.allocators: dict[str, Any] = {}

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self.shapes[name] = shape
        return shape[0] <= self.engine.trt.most

    def get_tensor_shape(self, name: str) -> Sequence[int]:
        batch = next((shape[0] for shape in self.shapes.values()), 1)
        sides = self.engine.tensors[name].shape
        moving = [index for index, side in enumerate(sides) if side is None and index]
        return [-1 if index in moving else batch if side is None else side for index, side in enumerate(sides)]

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.addresses[name] = address
        return True

    def set_output_allocator(self, name: str, allocator: Any) -> bool:
        self.allocators[name] = allocator
        return True

    def get_max_output_size(self, name: str) -> int:
        return 1 << 16

    def execute_async_v3(self, stream: int) -> bool:
        trt = self.engine.trt
        if trt.fails:
            trt.log.log(Severity.ERROR, "it cannot, as told")
            return False
        shapes, addresses = dict(self.shapes), dict(self.addresses)
        trt.driver.do(trt.driver.streams[stream], lambda: self._run(shapes, addresses))
        return True

    def _run(self, shapes: dict[str, tuple[int, ...]], addresses: dict[str, int]) -> None:
        tensors, session = self.engine.tensors, self.engine.onnx._session
        feeds = {}
        for name in self.engine.inputs:
            fixed = tuple(1 if side is None else side for side in tensors[name].shape)
            feeds[name] = _memory(addresses[name], shapes.get(name, fixed), tensors[name].dtype)
        outputs = [name for name in self.engine.names if name not in self.engine.inputs]
        for name, value in zip(outputs, session.run(outputs, feeds), strict=True):
            if allocator := self.allocators.get(name):
                assert allocator.reallocate_output(name, 0, value.nbytes, 256) == addresses[name]
                allocator.notify_shape(name, value.shape)
            self.engine.trt.driver.require(self.engine.trt.driver.device, addresses[name], value.nbytes)
            ctypes.memmove(addresses[name], np.ascontiguousarray(value).ctypes.data, value.nbytes)


def _memory(address: int, shape: tuple[int, ...], dtype: str) -> Any:
    kind = np.dtype(dtype)
    nbytes = int(np.prod(shape)) * kind.itemsize
    return np.frombuffer((ctypes.c_char * nbytes).from_address(address), kind).reshape(shape)
