"""The build process: an ONNX file in, a TensorRT plan out. Run by `engines.Engines`, never imported by the agent.

Reads one request (JSON) from stdin and ends when stdin does. Answers on stdout, a JSON object a line: `phase` and
`percent` on the way, at last `built` or `error`.
"""

from __future__ import annotations

import functools
import json
import os
import re
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from edge_agent import caching, cuda
from edge_agent.backends import _trt, fitted_constants, picture_input
from edge_agent.backends.onnx import OnnxEngine, OnnxOptions
from edge_agent.backends.tensorrt import TensorRtEngine, TensorRtOptions
from edge_agent.config import InferenceOptions, Precision, ShapeRange
from edge_agent.data import ModelFacts, PreprocessSpec, TensorSpec
from edge_agent.errors import EdgeAgentError, ModelError
from edge_agent.families import Family
from edge_agent.models import agreement, pictures
from edge_agent.models.engines import BuildRequest, Built, Progress
from edge_agent.models.inspect import make_family
from edge_agent.models.loaded import constants_of
from edge_agent.models.store import StoredModel

Shapes = Mapping[str, ShapeRange]

_NO_CALIBRATION = (
    "INT8 needs pictures to calibrate with: set `calibration` of the model's entry or of [backends.tensorrt] to a "
    "folder of a few hundred that are like the camera's; or use a model with Q/DQ nodes, or fp16"
)
_COMPARED = 16  # bundled pictures
_NICE = 10  # what runs meanwhile comes first


def main() -> None:
    """The process: status 0 if it has answered."""
    os.nice(_NICE)
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print is no answer
    request = msgspec.json.decode(sys.stdin.buffer.readline(), type=BuildRequest)
    threading.Thread(target=_end_with_parent, daemon=True).start()

    def tell(word: Mapping[str, Any]) -> None:
        print(json.dumps(word), file=answers, flush=True)

    try:
        built = build(request, lambda phase, percent: tell({"phase": phase, "percent": percent}))
        tell({"built": msgspec.to_builtins(built)})
    except EdgeAgentError as error:
        tell({"error": str(error)})
    except BaseException:  # noqa: BLE001  the top of a process
        traceback.print_exc()
        os._exit(1)
    os._exit(0)  # libraries' own endings take long, or crash, when all is said


def build(request: BuildRequest, progress: Progress = lambda phase, percent: None) -> Built:
    """Write the plan that is asked for, and measure its agreement. Raises `ModelError`, `GpuUnavailable`."""
    stored = StoredModel(request.name, "config", request.model, None)
    if problem := OnnxEngine.unavailable(OnnxOptions()):
        raise ModelError(f"building an engine needs the CPU engine, which the result is compared with: {problem}")
    progress("reading", None)
    reference = OnnxEngine(stored.path, OnnxOptions())
    facts = reference.facts
    family, _ = make_family(facts, stored.options, stored.labels(), _lenient(request))
    constants = constants_of(stored)
    shapes = resolve_shapes(request, facts, family.preprocess, constants)
    builder = PlanBuilder(
        stored.path,
        shapes=shapes,
        precision=request.precision,
        options=request.backend,
        batches=lambda: Batches(_calibration(request), facts, family.preprocess, constants, shapes),
        timing_cache=Path(request.timing_cache),
        calibration_cache=Path(request.calibration_cache),
        target=request.target,
    )
    with tempfile.TemporaryDirectory(dir=Path(request.plan).parent) as scratch:
        plan = builder.build(Path(scratch), progress)
    Path(request.plan).write_bytes(plan)
    agreed = None
    if request.checks_agreement:
        progress("comparing with the ONNX file", None)
        agreed = _compare(request, reference, family)
    return Built(dict(shapes), dict(facts.metadata), agreed)


def resolve_shapes(
    request: BuildRequest, facts: ModelFacts, spec: PreprocessSpec, constants: Mapping[str, NDArray[Any]]
) -> Shapes:
    """Least, best and largest shape of each input: what the entry says, else one picture to `max_batch`."""
    picture, fixed = picture_input(facts, spec, constants)
    most = fixed or request.inference.max_batch
    batches = (fixed or 1, min(most, fixed or request.backend.optimize_for_batch), most)
    shapes = {}
    for tensor in facts.inputs:
        if given := request.model.shapes.get(tensor.name):
            shapes[tensor.name] = _given(tensor, given)
            continue
        rest = spec.shape if tensor.name == picture.name else tensor.shape[1:]
        whole = (*tensor.shape[:1], *rest)  # a constant may be a scalar
        sides = ([batch if side is None else side for side in whole] for batch in batches)
        shapes[tensor.name] = ShapeRange(**dict(zip(("min", "opt", "max"), sides, strict=True)))
    if unknown := set(request.model.shapes) - set(shapes):
        raise ModelError(f"shapes: the model has no input {', '.join(sorted(unknown))}; it has {', '.join(shapes)}")
    return shapes


class PlanBuilder:
    """One build: the network, its configuration, the plan. In the process it is called in.

    `shapes` names every input; `batches` gives the calibration pictures where INT8 needs them.
    """

    def __init__(
        self,
        onnx: Path,
        *,
        shapes: Shapes,
        precision: Precision,
        options: TensorRtOptions,
        batches: Callable[[], Batches] | None = None,
        timing_cache: Path | None = None,
        calibration_cache: Path | None = None,
        target: str | None = None,
    ) -> None:
        self._trt = builder_library(options)
        self._onnx = onnx
        self._shapes = shapes
        self._precision = precision
        self._options = options
        self._batches = batches
        self._timing_cache = timing_cache
        self._calibration_cache = calibration_cache
        self._target = target
        self._log = _trt.logger(self._trt)

    def build(self, scratch: Path, progress: Progress = lambda phase, percent: None) -> bytes:
        """The serialised engine; `scratch` is a folder for what is needed on the way. Raises `ModelError`."""
        trt = self._trt
        is_strong = not hasattr(trt.BuilderFlag, "FP16")  # precision is the network's own business then
        onnx = self._onnx
        if is_strong and self._precision != "fp32":
            progress(f"converting to {self._precision}", None)
            onnx = self._converted(scratch)
        _trt.start(trt)
        builder = trt.Builder(self._log)
        network = builder.create_network(_network_flags(trt))
        progress("parsing", None)
        parse(trt, network, onnx)
        config = builder.create_builder_config()
        keep = self._configure(builder, network, config, is_strong, progress)
        self._log.errors()
        progress("building", None)
        serialized = builder.build_serialized_network(network, config)
        if serialized is None:
            raise ModelError(f"{_trt.name_of(trt)} cannot build {onnx.name}: {self._log.errors()}")
        self._keep_timings(config)
        del keep
        return bytes(memoryview(serialized))

    def _configure(self, builder: Any, network: Any, config: Any, is_strong: bool, progress: Progress) -> Sequence[Any]:
        """Set everything; what is returned must live as long as the build."""
        trt, options = self._trt, self._options
        config.builder_optimization_level = options.optimization_level
        if options.workspace_mb:
            config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, options.workspace_mb << 20)
        if options.tactic_sources:
            config.set_tactic_sources(_tactic_sources(trt, options.tactic_sources))
        if hasattr(trt, "PreviewFeature") and hasattr(trt.PreviewFeature, "PROFILE_SHARING_0806"):
            # Several contexts share one profile; without it each needs its own. The rule since TensorRT 10.
            config.set_preview_feature(trt.PreviewFeature.PROFILE_SHARING_0806, True)
        if target := self._target:
            config.num_compute_capabilities = 1
            config.set_compute_capability(_capability(trt, target), 0)
        profile = builder.create_optimization_profile()
        for name, shape in self._shapes.items():
            profile.set_shape(name, tuple(shape.min), tuple(shape.opt), tuple(shape.max))
        config.add_optimization_profile(profile)
        keep: list[Any] = [profile]
        self._use_timings(config)
        if hasattr(trt, "IProgressMonitor") and hasattr(config, "progress_monitor"):
            config.progress_monitor = monitor = _monitor(trt, progress)
            keep.append(monitor)
        if not is_strong:
            keep += self._weak_precision(network, config, profile)
        return keep

    def _weak_precision(self, network: Any, config: Any, profile: Any) -> Sequence[Any]:
        """Precision by the builder's flags, for TensorRT up to 10."""
        trt, precision = self._trt, self._precision
        if precision in ("fp16", "int8"):
            config.set_flag(trt.BuilderFlag.FP16)
        if precision != "int8":
            return ()
        config.set_flag(trt.BuilderFlag.INT8)
        if any(network.get_layer(i).type == trt.LayerType.QUANTIZE for i in range(network.num_layers)):
            return ()  # the file brings its own scales
        calibrator = _calibrator(trt, self._need_batches(), self._calibration_cache)
        config.int8_calibrator = calibrator
        config.set_calibration_profile(profile)
        return (calibrator,)

    def _need_batches(self) -> Batches:
        if self._batches is None:
            raise ModelError(_NO_CALIBRATION)
        return self._batches()

    def _converted(self, scratch: Path) -> Path:
        """The ONNX file in another precision, for a TensorRT that takes precision from the file."""
        try:
            import onnx
        except ImportError as error:
            raise ModelError(
                f"{_trt.name_of(self._trt)} takes precision from the ONNX file: {self._precision} means converting it, "
                "which needs the Python module 'onnx': pip install 'edge-agent[convert]'"
            ) from error
        model = onnx.load(str(self._onnx))
        target = scratch / "converted.onnx"
        if self._precision == "fp16":
            from onnxruntime.transformers.float16 import convert_float_to_float16

            onnx.save(convert_float_to_float16(model, keep_io_types=True), str(target))
        elif any(node.op_type == "QuantizeLinear" for node in model.graph.node):
            return self._onnx  # the file brings its own scales
        else:
            self._quantize(target)
        return target

    def _quantize(self, target: Path) -> None:
        """Q/DQ nodes by onnxruntime's static quantisation: symmetric, weights by channel, as TensorRT wants them."""
        from onnxruntime import quantization

        batches = self._need_batches()

        class Reader(quantization.CalibrationDataReader):  # type: ignore[misc]
            def get_next(self) -> dict[str, NDArray[Any]] | None:
                return batches.next()

        quantization.quantize_static(
            str(self._onnx),
            str(target),
            Reader(),
            quant_format=quantization.QuantFormat.QDQ,
            activation_type=quantization.QuantType.QInt8,
            weight_type=quantization.QuantType.QInt8,
            per_channel=True,
            calibrate_method=quantization.CalibrationMethod.Entropy,
            extra_options={
                "ActivationSymmetric": True,
                "WeightSymmetric": True,
                "AddQDQPairToWeight": True,
                "QuantizeBias": False,
            },
        )

    def _use_timings(self, config: Any) -> None:
        if self._timing_cache is None:
            return
        try:
            known = self._timing_cache.read_bytes()
        except OSError:
            known = b""
        cache = config.create_timing_cache(known) or config.create_timing_cache(b"")
        if cache is not None:
            config.set_timing_cache(cache, False)

    def _keep_timings(self, config: Any) -> None:
        cache = config.get_timing_cache()
        if cache is not None and self._timing_cache is not None:
            caching.keep(self._timing_cache, bytes(memoryview(cache.serialize())))


def parse(trt: Any, network: Any, path: Path) -> None:
    """Read an ONNX file into a network. Raises `ModelError` with one sentence that names node and operator."""
    log = _trt.logger(trt)
    log.errors()
    parser = trt.OnnxParser(network, log)
    if parser.parse_from_file(str(path)):
        return
    told = log.errors()
    if not parser.num_errors:
        raise ModelError(f"{path.name} cannot be parsed: {told}")
    error = parser.get_error(0)
    node = getattr(error, "node_name", str)() or _first(r'name: "([^"]+)"', told) or f"number {error.node()}"
    operator = getattr(error, "node_operator", str)() or _first(r'op_type: "([^"]+)"', told) or "unknown"
    if operator == "unknown" and "deserialize" in error.desc().lower():
        raise ModelError(f"{path.name} is no ONNX file: {error.desc()}")
    raise ModelError(
        f"{path.name}: {_trt.name_of(trt)} cannot take node {node!r} (operator {operator}): {error.desc().strip()}"
    )


class Batches:
    """Calibration pictures as the model's inputs, a batch of the best size at a time."""

    def __init__(
        self,
        paths: Sequence[Path],
        facts: ModelFacts,
        spec: PreprocessSpec,
        constants: Mapping[str, NDArray[Any]],
        shapes: Shapes,
    ) -> None:
        from edge_agent.imaging import Preprocessor

        picture, _ = picture_input(facts, spec, constants)
        self.batch = shapes[picture.name].opt[0]
        self._name = picture.name
        self._prepare = Preprocessor(spec)
        self._pictures = pictures.read(paths)
        self._input = np.zeros(tuple(shapes[picture.name].opt), picture.dtype)
        self._constants = fitted_constants(facts, constants, self.batch)

    def next(self) -> dict[str, NDArray[Any]] | None:
        """The inputs by name; None at the end. The last batch may hold some pictures of the one before."""
        filled = 0
        for image, slot in zip(self._pictures, self._input, strict=False):
            self._prepare(image, slot)
            filled += 1
            if filled == self.batch:
                break
        return {self._name: self._input, **self._constants} if filled else None


def _calibrator(trt: Any, batches: Batches, cache: Path | None) -> Any:
    """Entropy calibration, for TensorRT up to 10; scales that were found before are read from `cache`."""

    class Calibrator(trt.IInt8EntropyCalibrator2):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IInt8EntropyCalibrator2.__init__(self)
            self._stream = cuda.Stream()
            self._memory: dict[str, cuda.DeviceMemory] = {}

        def get_batch_size(self) -> int:
            return batches.batch

        def get_batch(self, names: Sequence[str]) -> list[int] | None:
            inputs = batches.next()
            if inputs is None:
                return None
            for name, value in inputs.items():
                if name not in self._memory:
                    self._memory[name] = cuda.DeviceMemory(value.nbytes)
                self._stream.copy_in(self._memory[name].address, value.ctypes.data, value.nbytes)
            self._stream.synchronize()
            return [self._memory[name].address for name in names]

        def read_calibration_cache(self) -> bytes | None:
            return cache.read_bytes() if cache and cache.is_file() else None

        def write_calibration_cache(self, scales: Any) -> None:
            if cache:
                caching.keep(cache, bytes(memoryview(scales)))

    cuda.open_gpu().enter()
    return Calibrator()


def _monitor(trt: Any, progress: Progress) -> Any:
    """Hands on TensorRT's progress: the outermost phase, and how much of it is done."""

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self._phases = Phases()

        def phase_start(self, name: str, parent: str | None, steps: int) -> None:
            self._tell(self._phases.start, name, parent, steps)

        def step_complete(self, name: str, step: int) -> bool:
            self._tell(self._phases.step, name, step)
            return True

        def phase_finish(self, name: str) -> None:
            self._tell(self._phases.finish, name)

        def _tell(self, change: Callable[..., tuple[str, float] | None], *arguments: Any) -> None:
            if news := change(*arguments):
                progress(*news)

    return Monitor()


class Phases:
    """Nested phases as TensorRT reports them, in any thread; each method gives the outermost phase and its percent
    if that has grown by one or more."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._parents: dict[str, str | None] = {}
        self._steps: dict[str, int] = {}
        self._done: dict[str, int] = {}
        self._told: tuple[str, float] = ("", -1.0)

    def start(self, name: str, parent: str | None, steps: int) -> tuple[str, float] | None:
        with self._lock:
            if parent not in self._steps or name in self._line(parent):
                parent = None  # unknown, or a name that came back below itself
            self._parents[name], self._steps[name], self._done[name] = parent, max(1, steps), 0
            return self._news(name)

    def step(self, name: str, step: int) -> tuple[str, float] | None:
        with self._lock:
            if name in self._steps:
                self._done[name] = min(self._steps[name], max(self._done[name], step + 1))
            return self._news(name)

    def finish(self, name: str) -> tuple[str, float] | None:
        with self._lock:
            self._done[name] = self._steps.get(name, 1)
            news = self._news(name)
            for kept in (self._parents, self._steps, self._done):
                kept.pop(name, None)
            self._parents = {child: None if parent == name else parent for child, parent in self._parents.items()}
            return news

    def _news(self, name: str) -> tuple[str, float] | None:
        root = self._line(name)[-1]
        percent = round(100 * self._share(root), 0)
        if root == self._told[0] and percent < self._told[1] + 1:
            return None
        self._told = root, percent
        return self._told

    def _line(self, name: str) -> Sequence[str]:
        """A phase and those it is part of, the outermost last."""
        line = [name]
        while (parent := self._parents.get(line[-1])) is not None:
            line.append(parent)
        return line

    def _share(self, name: str) -> float:
        """How much of a phase is done, the part of its running step that its children have done included."""
        inner = max((self._share(child) for child, parent in self._parents.items() if parent == name), default=0.0)
        steps = self._steps.get(name, 1)
        return min(1.0, (self._done.get(name, steps) + inner) / steps)


def _compare(request: BuildRequest, reference: OnnxEngine, family: Family) -> agreement.Agreement:
    stored = StoredModel(request.name, "config", request.model, None)
    constants = constants_of(stored)
    built = TensorRtEngine(Path(request.plan), msgspec.structs.replace(request.backend, depth=1, graph=False))
    try:
        for engine in (reference, built):
            engine.prepare(family.preprocess, max_batch=request.inference.max_batch, constants=constants)
        images = (
            pictures.read(pictures.listed(Path(request.calibration)))
            if request.calibration
            else pictures.bundled(_COMPARED)
        )
        threshold = request.inference.score_threshold
        return agreement.measure(reference, built, family, images, threshold=threshold)
    finally:
        built.close()
        reference.close()


def _lenient(request: BuildRequest) -> InferenceOptions:
    """Thresholds for the comparison: see `agreement.SLACK`."""
    lower = request.inference.score_threshold * agreement.SLACK
    return msgspec.structs.replace(request.inference, score_threshold=lower)


def _given(tensor: TensorSpec, given: ShapeRange) -> ShapeRange:
    for shape in (given.min, given.opt, given.max):
        fits = len(shape) == len(tensor.shape) and all(a in (None, b) for a, b in zip(tensor.shape, shape, strict=True))
        if not fits:
            raise ModelError(f"shapes.{tensor.name}: {list(shape)} does not fit the input {list(tensor.shape)}")
    if not all(a <= b <= c for a, b, c in zip(given.min, given.opt, given.max, strict=True)):
        raise ModelError(
            f"shapes.{tensor.name}: min, opt and max must not shrink: {given.min}, {given.opt}, {given.max}"
        )
    return given


def builder_library(options: TensorRtOptions) -> Any:
    """A TensorRT that builds. Raises `ModelError`."""
    trt = _trt.library(options.library)
    if not hasattr(trt, "OnnxParser"):
        raise ModelError(f"{_trt.name_of(trt)} runs engines but builds none; install the full TensorRT")
    return trt


def _calibration(request: BuildRequest) -> Sequence[Path]:
    if not request.calibration:
        raise ModelError(_NO_CALIBRATION)
    return pictures.listed(Path(request.calibration))


def _network_flags(trt: Any) -> int:
    flags = trt.NetworkDefinitionCreationFlag
    wanted = "EXPLICIT_BATCH" if hasattr(flags, "EXPLICIT_BATCH") else "STRONGLY_TYPED"
    return 1 << int(getattr(flags, wanted)) if hasattr(flags, wanted) else 0


def _tactic_sources(trt: Any, names: Sequence[str]) -> int:
    known = [name for name in dir(trt.TacticSource) if name.isupper()]
    for name in names:
        if name not in known:
            raise ModelError(f"backends.tensorrt.tactic_sources: {name!r} is none of {', '.join(known)}")
    return functools.reduce(int.__or__, (1 << int(getattr(trt.TacticSource, name)) for name in names))


def _capability(trt: Any, target: str) -> Any:
    name = f"SM{target.replace('.', '')}"
    capability = getattr(getattr(trt, "ComputeCapability", None), name, None)
    if capability is None:
        raise ModelError(f"{_trt.name_of(trt)} cannot build for compute capability {target} from here")
    return capability


def _first(pattern: str, text: str) -> str | None:
    found = re.search(pattern, text)
    return found.group(1) if found else None


def _end_with_parent() -> None:
    while os.read(0, 4096):
        pass
    os._exit(1)


if __name__ == "__main__":
    main()
