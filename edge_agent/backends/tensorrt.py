"""The GPU engine: a TensorRT plan, run on CUDA streams of our own.

What belongs to a batch (upload, letterbox, inference, reduction, download) is one CUDA graph; `depth` batches are
on their way at once, each in a slot of its own. Knows nothing of what a model means: pre-processing and reduction
come to it as data.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

import msgspec
import numpy as np
import structlog
from msgspec import Meta
from numpy.typing import NDArray

from edge_agent import cuda, gpu
from edge_agent.backends import Constants, Outcome, Ticket, _trt, fitted_constants, picture_input
from edge_agent.config import ConfigPath, Count, Positive, Precision, Share, Table, state_directory
from edge_agent.data import Image, ModelFacts, PreprocessSpec, Reduction, TensorSpec
from edge_agent.errors import CudaError, EngineError, GpuLost, GpuUnavailable, ModelError
from edge_agent.geometry import Placement, place

log = structlog.get_logger()

Where = Literal["gpu", "cpu"]


class TensorRtOptions(Table):
    """`[backends.tensorrt]`: how engines are run, and how they are built."""

    library: _trt.Generation = "auto"
    depth: Annotated[int, Meta(ge=1, le=16)] = 3
    graph: bool = True
    upload: Literal["auto", "copy", "mapped"] = "auto"
    preprocess: Where = "gpu"
    reduce: Where = "gpu"
    engines: ConfigPath | None = None
    precision: Precision = "fp16"
    optimize_for_batch: Count = 1
    optimization_level: Annotated[int, Meta(ge=0, le=5)] = 3
    workspace_mb: Annotated[int, Meta(ge=0)] = 0
    tactic_sources: list[str] = msgspec.field(default_factory=list)
    calibration: ConfigPath | None = None
    agreement: Share = 0.95
    build_timeout_s: Positive = 3600.0

    @property
    def directory(self) -> Path:
        """Where built engines are kept."""
        return Path(self.engines) if self.engines else state_directory() / "engines"


@dataclass(frozen=True, slots=True)
class _Plan:
    """What all slots of an engine have in common."""

    trt: Any
    engine: Any
    gpu: cuda.Gpu
    options: TensorRtOptions
    facts: ModelFacts
    spec: PreprocessSpec
    picture: TensorSpec
    max_batch: int
    min_batch: int
    reduction: Reduction | None
    constants: Constants
    kernels: cuda.Kernels | None
    complaints: set[str] = field(default_factory=set)

    @property
    def log(self) -> Any:
        return _trt.logger(self.trt)

    @property
    def is_mapped(self) -> bool:
        """Whether kernels read pictures where they lie in the host's memory."""
        return self.options.upload == "mapped" or (self.options.upload == "auto" and self.gpu.is_integrated)


class TensorRtEngine:
    """A deserialised plan; `prepare` makes its slots."""

    Options: ClassVar[type[Table]] = TensorRtOptions
    is_built: ClassVar[bool] = True
    inference_clock: ClassVar[Literal["gpu", "cpu"]] = "gpu"
    prepares_batches: ClassVar[bool] = True

    @staticmethod
    def unavailable(options: TensorRtOptions) -> str | None:
        try:
            if lacks := cuda.missing():
                return lacks
            trt = _trt.library(options.library)
            cuda.open_gpu()
            _trt.start(trt)
        except GpuUnavailable as error:
            return str(error)
        return None

    @staticmethod
    def new_image(shape: tuple[int, ...]) -> Image:
        """Pinned, so that it is uploaded from where the camera's decoder wrote it."""
        try:
            return cuda.pinned_array(cuda.open_gpu(), shape, np.uint8)
        except CudaError as error:
            log.warning("cuda.not_pinned", reason=str(error), shape=shape)
            return np.empty(shape, np.uint8)

    def __init__(self, path: Path, options: TensorRtOptions) -> None:
        self._options = options
        self._gpu = cuda.open_gpu()
        self._gpu.enter()
        self._gpu.memory()  # where the GPU is lost already CUDA says so; TensorRT would crash
        self._trt = _trt.library(options.library)
        self._runtime, self._engine, metadata = _trt.deserialize(self._trt, path)
        self._slots: list[_Slot] = []
        self._turn = 0
        self._kernels: cuda.Kernels | None = None
        self.facts = _facts(self._trt, self._engine, metadata)
        self.runtime = _trt.name_of(self._trt)
        self.max_batch = 1

    @property
    def depth(self) -> int:
        return max(1, len(self._slots))

    def prepare(
        self,
        spec: PreprocessSpec,
        *,
        max_batch: int,
        reduction: Reduction | None = None,
        constants: Constants | None = None,
    ) -> None:
        picture, fixed = picture_input(self.facts, spec, constants or {})
        low, high = self._batches(picture, spec)
        self.max_batch = fixed or min(max_batch, high)
        on_gpu = self._options.reduce == "gpu"
        if on_gpu or self._options.preprocess == "gpu":
            self._kernels = gpu.kernels(self._gpu, self._options.directory / ".kernels")
        plan = _Plan(
            trt=self._trt,
            engine=self._engine,
            gpu=self._gpu,
            options=self._options,
            facts=self.facts,
            spec=spec,
            picture=picture,
            max_batch=self.max_batch,
            min_batch=min(fixed or low, self.max_batch),
            reduction=reduction if on_gpu else None,
            constants=constants or {},
            kernels=self._kernels,
        )
        for index in range(self._options.depth):
            try:
                self._slots.append(_Slot(plan, index))
            except (ModelError, CudaError) as error:
                if not self._slots or isinstance(error, GpuLost):
                    raise
                log.warning(
                    "tensorrt.fewer_slots", slots=len(self._slots), wanted=self._options.depth, reason=str(error)
                )
                break

    def submit(self, images: Sequence[Image]) -> Ticket:
        slot = self._slots[self._turn]
        self._turn = (self._turn + 1) % len(self._slots)
        self._gpu.enter()
        return Ticket(slot.submit(images), held=slot)

    def collect(self, ticket: Ticket) -> Outcome:
        slot: _Slot = ticket.held
        self._gpu.enter()
        return slot.collect(len(ticket.placements))

    def close(self) -> None:
        if cuda.is_lost():
            return  # nothing can be freed any more, and TensorRT's own attempts would end in an abort
        self._gpu.enter()
        while self._slots:
            self._slots.pop().close()
        if self._kernels is not None:
            self._kernels.close()
        self._kernels = self._engine = self._runtime = None

    def _batches(self, picture: TensorSpec, spec: PreprocessSpec) -> tuple[int, int]:
        """The least and the most pictures that the engine's profile allows at once."""
        low, _, high = (tuple(shape) for shape in self._engine.get_tensor_profile_shape(picture.name, 0))
        wanted = spec.shape
        if not all(least <= size <= most for least, size, most in zip(low[1:], wanted, high[1:], strict=True)):
            raise ModelError(
                f"the engine takes pictures from {list(low[1:])} to {list(high[1:])}, not {list(wanted)}; "
                "set preprocess.size, or build it with other shapes"
            )
        return low[0], high[0]


Engine = TensorRtEngine


@dataclass(slots=True)
class _Output:
    """An output's memory on both sides, for the largest batch."""

    spec: TensorSpec
    device: cuda.DeviceMemory
    host: NDArray[np.uint8]
    allocator: Any = None

    def copy_out(self, stream: cuda.Stream, nbytes: int) -> None:
        if nbytes:
            stream.copy_out(_address(self.host), self.device.address, nbytes)

    def view(self, shape: tuple[int, ...]) -> NDArray[Any]:
        return self.host[: _nbytes(shape, self.spec.dtype)].view(self.spec.dtype).reshape(shape)


class _Copy(NamedTuple):
    """A picture's way to the GPU. It holds on to the host's memory, which the GPU may be reading or a graph may
    name: an address that was freed and given out again is not the same to CUDA."""

    device: int
    memory: cuda.PinnedMemory
    nbytes: int


@dataclass(slots=True)
class _Recipe:
    """How a batch of one size is run: as a graph, with its uploads in the order of the pictures; or step by step.

    `brought` is what the uploads name now, `captured_from` what they were captured with: both are kept alive.
    """

    shapes: Mapping[str, tuple[int, ...]]
    graph: cuda.Graph | None = None
    uploads: Sequence[Any] = ()
    brought: list[_Copy] = field(default_factory=list)
    captured_from: Sequence[_Copy] = ()


class _Slot:
    """One batch's way over the GPU: a context, a stream, memory, and a recipe for each batch size."""

    def __init__(self, plan: _Plan, index: int) -> None:
        self._plan = plan
        self._closers: list[Callable[[], None]] = []
        self._recipes: dict[int, _Recipe] = {}
        self._shaped = 0
        self._batch = 0
        try:
            self._open(index)
        except BaseException:
            self.close()
            raise

    def submit(self, images: Sequence[Image]) -> Sequence[Placement]:
        """Start on a batch; where each picture lies in the input."""
        plan = self._plan
        batch = self._batch = max(len(images), plan.min_batch)
        self._prepared_ms = 0.0
        placements = self._show(images, batch)
        recipe = self._recipes.get(batch)
        if recipe is None:
            recipe = _Recipe(self._shape(batch))
            self._run(recipe, batch)
            if plan.options.graph:
                self._capture(recipe, batch)
            self._recipes[batch] = recipe
        elif recipe.graph is not None:
            self._replay(recipe, batch)
        else:
            if self._shaped != batch:
                self._shape(batch)
            self._run(recipe, batch)
        return placements

    def collect(self, count: int) -> Outcome:
        """What came of the batch that was submitted last, `count` pictures of it."""
        self._done.synchronize()
        tensors, candidates = {}, None
        if self._reducer is not None:
            candidates = self._reducer.candidates(count)
        else:
            shapes = self._recipes[self._batch].shapes
            for name, output in self._outputs.items():
                shape = output.allocator.shape if output.allocator else shapes[name]
                view = output.view(shape)
                tensors[name] = view[:count] if shape and shape[0] == self._batch else view
        return Outcome(
            tensors,
            candidates,
            preprocess_ms=self._prepared_ms + self._ready.ms_since(self._begun),
            inference_ms=self._inferred.ms_since(self._ready),
            reduce_ms=self._done.ms_since(self._inferred),
        )

    def close(self) -> None:
        if cuda.is_lost():
            return
        if self._closers:
            self._drain()
        while self._closers:
            self._closers.pop()()

    # Opening

    def _open(self, index: int) -> None:
        plan = self._plan
        plan.log.errors()
        self._stream = self._owned(cuda.Stream())
        self._begun, self._ready, self._inferred = (self._owned(cuda.Event()) for _ in range(3))
        self._done = self._owned(cuda.Event(awaited=True))
        self._context = plan.engine.create_execution_context()
        if self._context is None:
            raise ModelError(f"TensorRT cannot make an execution context: {plan.log.errors()}")
        self._closers.append(self._drop_context)
        if 0 < index < plan.engine.num_optimization_profiles:  # older engines want one profile a context
            self._context.set_optimization_profile_async(index, self._stream.address)
            self._stream.synchronize()
        size = _nbytes((plan.max_batch, *plan.spec.shape), plan.picture.dtype)
        self._input = self._owned(cuda.DeviceMemory(size))
        self._pictures: list[cuda.DeviceMemory | None] = [None] * plan.max_batch
        self._staged: list[NDArray[np.uint8] | None] = [None] * plan.max_batch
        self._brought: list[_Copy] = []
        self._closers.append(self._free_pictures)
        self._open_preprocessing()
        self._open_constants()
        self._open_outputs()

    def _open_preprocessing(self) -> None:
        plan = self._plan
        self._letterbox: gpu.Letterbox | None = None
        if plan.options.preprocess == "gpu":
            assert plan.kernels is not None
            self._letterbox = self._owned(gpu.Letterbox(plan.gpu, plan.kernels, plan.spec, max_batch=plan.max_batch))
            return
        from edge_agent.imaging import Preprocessor

        self._canvas = cuda.pinned_array(plan.gpu, (plan.max_batch, *plan.spec.shape), plan.picture.dtype)
        self._canvas[:] = 0
        self._preprocessor = Preprocessor(plan.spec)

    def _open_constants(self) -> None:
        plan = self._plan
        self._constants: dict[str, NDArray[Any]] = {}
        for name, value in fitted_constants(plan.facts, plan.constants, plan.max_batch).items():
            host = self._constants[name] = cuda.pinned_array(plan.gpu, value.shape, value.dtype)
            np.copyto(host, value)
            # Pinned memory is where the GPU can read it; shape tensors are read by the host.
            self._set_address(name, _address(host))

    def _open_outputs(self) -> None:
        plan = self._plan
        shapes = self._shape(plan.max_batch)
        self._reducer: gpu.Reducer | None = None
        self._outputs: dict[str, _Output] = {}
        for tensor in plan.facts.outputs:
            shape = shapes[tensor.name]
            grows = -1 in shape
            is_head = plan.reduction is not None and tensor.name == plan.reduction.output and not grows
            nbytes = self._context.get_max_output_size(tensor.name) if grows else _nbytes(shape, tensor.dtype)
            device = self._owned(cuda.DeviceMemory(nbytes))
            host = np.empty(0, np.uint8) if is_head else cuda.pinned_array(plan.gpu, (nbytes,), np.uint8)
            output = self._outputs[tensor.name] = _Output(tensor, device, host)
            if grows:
                output.allocator = _allocator(plan.trt, device)
                self._context.set_output_allocator(tensor.name, output.allocator)
            self._set_address(tensor.name, device.address)
            if is_head and plan.reduction and plan.kernels:
                self._reducer = self._owned(_reducer(plan, plan.reduction, shape, tensor.dtype))
        self._grows = any(output.allocator for output in self._outputs.values())

    def _owned(self, thing: Any) -> Any:
        self._closers.append(thing.close)
        return thing

    def _set_address(self, name: str, address: int) -> None:
        if not self._context.set_tensor_address(name, address):
            raise ModelError(f"TensorRT does not take the memory of {name!r}: {self._plan.log.errors()}")

    # Running

    def _show(self, images: Sequence[Image], batch: int) -> Sequence[Placement]:
        """Make the pictures known to the letterbox kernel, or write the input on the CPU."""
        if self._letterbox is None:
            began = time.perf_counter()
            placements = [self._preprocessor(image, slot) for image, slot in zip(images, self._canvas, strict=False)]
            self._prepared_ms = (time.perf_counter() - began) * 1e3
            return placements
        placements = [place(image.shape[1], image.shape[0], self._plan.spec) for image in images]
        self._brought.clear()
        for index in range(batch):
            known = min(index, len(images) - 1)  # a fixed batch that is not full: its last picture again
            address = self._bring(index, images[known])
            self._letterbox.show(index, address, placements[known])
        return placements

    def _bring(self, index: int, image: Image) -> int:
        """The device address at which a picture will lie; `_brought` says what is to be copied for it."""
        plan = self._plan
        memory = cuda.pinned_memory(image)
        if memory is None:
            memory = cuda.pinned_memory(self._stage(index, image))
            assert memory is not None
        if plan.is_mapped:
            return memory.device_address
        held = self._pictures[index]
        if held is None or held.nbytes < image.nbytes:
            if held is not None:
                self._pictures[index] = None  # should there be no memory for a larger one
                held.close()
            held = self._pictures[index] = cuda.DeviceMemory(image.nbytes)
        self._brought.append(_Copy(held.address, memory, image.nbytes))
        return held.address

    def _stage(self, index: int, image: Image) -> NDArray[np.uint8]:
        """A picture from elsewhere, copied into pinned memory."""
        staged = self._staged[index]
        if staged is None or staged.shape != image.shape:
            staged = self._staged[index] = cuda.pinned_array(self._plan.gpu, image.shape, np.uint8)
        np.copyto(staged, image)
        return staged

    def _shape(self, batch: int) -> Mapping[str, tuple[int, ...]]:
        """Tell the context how large the batch is; the shapes of its outputs, -1 where only the run will tell."""
        plan = self._plan
        for tensor in plan.facts.inputs:
            if None not in tensor.shape:
                continue
            if tensor.name == plan.picture.name:
                shape: tuple[int, ...] = (batch, *plan.spec.shape)
            else:
                shape = tuple(batch if side is None else side for side in tensor.shape)
            if not self._context.set_input_shape(tensor.name, shape):
                raise ModelError(f"the engine does not take {tensor.name} {list(shape)}: {plan.log.errors()}")
        self._set_address(plan.picture.name, self._input.address)
        self._shaped = batch
        return {tensor.name: tuple(self._context.get_tensor_shape(tensor.name)) for tensor in plan.facts.outputs}

    def _work(self, recipe: _Recipe, batch: int, *, capturing: bool) -> None:
        """All that the GPU does for a batch, in its order."""
        stream, plan = self._stream, self._plan
        if self._letterbox is not None:
            for copy in self._brought:
                stream.copy_in(copy.device, copy.memory.address, copy.nbytes)
            self._letterbox.launch(stream, self._input.address, batch=batch)
        else:
            stream.copy_in(self._input.address, _address(self._canvas), self._canvas[:batch].nbytes)
        self._ready.record(stream, capturing=capturing)
        if not self._context.execute_async_v3(stream.address):
            raise EngineError(f"TensorRT could not run the engine: {plan.log.errors()}")
        self._inferred.record(stream, capturing=capturing)
        if self._reducer is not None and plan.reduction is not None:
            head = self._outputs[plan.reduction.output]
            self._reducer.launch(stream, head.device.address, batch=batch)
        else:
            if self._grows:
                stream.synchronize()  # only then are the shapes known
            for name, output in self._outputs.items():
                shape = output.allocator.shape if output.allocator else recipe.shapes[name]
                output.copy_out(stream, _nbytes(shape, output.spec.dtype))

    def _run(self, recipe: _Recipe, batch: int) -> None:
        self._begun.record(self._stream)
        try:
            self._work(recipe, batch, capturing=False)
        except EngineError:
            self._plan.gpu.synchronize()  # a fault of the GPU's own has precedence over what TensorRT makes of it
            raise
        self._done.record(self._stream)

    def _capture(self, recipe: _Recipe, batch: int) -> None:
        """Keep what was just run as a graph, for all batches of this size that follow."""
        reason = "its outputs' shapes depend on the picture" if self._grows else None
        if reason is None:
            try:
                graph = self._stream.capture(lambda: self._work(recipe, batch, capturing=True))
                self._closers.append(graph.close)
                nodes = graph.uploads()
                recipe.graph, recipe.uploads = graph, [nodes[copy.device] for copy in self._brought]
                recipe.brought, recipe.captured_from = list(self._brought), tuple(self._brought)
            except GpuLost:
                raise
            except (EngineError, KeyError) as error:
                reason = str(error)
        if reason is not None and reason not in self._plan.complaints:
            self._plan.complaints.add(reason)
            log.warning("tensorrt.not_captured", batch=batch, reason=reason, note="runs step by step, a little slower")

    def _replay(self, recipe: _Recipe, batch: int) -> None:
        graph, before = recipe.graph, recipe.brought
        assert graph is not None
        for index, (upload, copy) in enumerate(zip(recipe.uploads, self._brought, strict=True)):
            if copy != before[index]:
                graph.redirect(upload, self._plan.gpu, device=copy.device, host=copy.memory.address, nbytes=copy.nbytes)
                before[index] = copy
        self._begun.record(self._stream)
        graph.launch(self._stream)
        self._done.record(self._stream)

    # Closing

    def _drain(self) -> None:
        try:
            self._stream.synchronize()
        except CudaError as error:
            log.debug("cuda.not_drained", reason=str(error))

    def _drop_context(self) -> None:
        self._context = None

    def _free_pictures(self) -> None:
        for memory in self._pictures:
            if memory is not None:
                memory.close()


def _reducer(plan: _Plan, reduction: Reduction, shape: tuple[int, ...], dtype: str) -> gpu.Reducer:
    assert plan.kernels is not None
    if dtype not in ("float32", "float16") or len(shape) != 3:
        raise ModelError(
            f'the head {reduction.output!r} is {dtype} {list(shape)}; set backends.tensorrt.reduce = "cpu"'
        )
    cells = shape[2] if reduction.rows_first else shape[1]
    if reduction.cells not in (None, cells):
        raise ModelError(f"the model gives {cells} cells where its strides make {reduction.cells}")
    return gpu.Reducer(plan.gpu, plan.kernels, reduction, shape, dtype)


def _facts(trt: Any, engine: Any, metadata: Mapping[str, str]) -> ModelFacts:
    if getattr(engine, "has_implicit_batch_dimension", False):
        raise ModelError(
            "the engine has an implicit batch dimension, as TensorRT 7 built them; build it from ONNX again"
        )
    sides: dict[bool, list[TensorSpec]] = {True: [], False: []}
    for index in range(engine.num_io_tensors):
        name = engine.get_tensor_name(index)
        dtype = _trt.dtype(engine.get_tensor_dtype(name))
        try:
            np.dtype(dtype)
        except TypeError:
            raise ModelError(f"{name} is {dtype}, which has no counterpart here; export it as float32") from None
        if engine.get_tensor_components_per_element(name) > 1:
            raise ModelError(f"{name} has the vectorised format {engine.get_tensor_format_desc(name)}; build it linear")
        shape = tuple(side if side >= 0 else None for side in engine.get_tensor_shape(name))
        is_input = engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT
        sides[is_input].append(TensorSpec(name, shape, dtype))
    return ModelFacts(inputs=tuple(sides[True]), outputs=tuple(sides[False]), metadata=dict(metadata))


def _allocator(trt: Any, memory: cuda.DeviceMemory) -> Any:
    """Tells how large an output became whose size only the run decides; its memory is the largest it may need."""

    class Allocator(trt.IOutputAllocator):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IOutputAllocator.__init__(self)
            self.shape: tuple[int, ...] = ()

        def reallocate_output(self, name: str, address: int, size: int, alignment: int) -> int:
            return memory.address if size <= memory.nbytes else 0

        def reallocate_output_async(self, name: str, address: int, size: int, alignment: int, stream: int) -> int:
            return self.reallocate_output(name, address, size, alignment)

        def notify_shape(self, name: str, shape: Any) -> None:
            self.shape = tuple(shape)

    return Allocator()


def _address(array: NDArray[Any]) -> int:
    return int(array.ctypes.data)


def _nbytes(shape: Sequence[int], dtype: str) -> int:
    return int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
