"""Engines built from ONNX files: which there are, what each was built from and for, and how a missing one is made.

An engine fits one TensorRT, one GPU, one driver and one way of building. All of that is its key: what matches is
used, what does not is built again, in a process of its own, while whatever runs goes on running.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec
import structlog
from msgspec import Struct

from edge_agent import cuda
from edge_agent.backends import _trt
from edge_agent.backends.tensorrt import TensorRtOptions
from edge_agent.config import InferenceOptions, ModelOptions, Precision, ShapeRange, Table
from edge_agent.errors import ModelError
from edge_agent.messages import timestamp
from edge_agent.models import onnx_file, pictures
from edge_agent.models.agreement import Agreement
from edge_agent.models.files import replace, sha256, storing
from edge_agent.models.registry import EngineRecord
from edge_agent.models.store import StoredModel, Verdict, variants

log = structlog.get_logger()

_SCRATCH = ".building-"

Progress = Callable[[str, float | None], None]
"""Hears how a build goes: the phase, and how much of it is done in percent, None where TensorRT does not tell."""


class Platform(Struct, frozen=True):
    """What an engine is built for, besides the model."""

    tensorrt: str
    gpu: str
    compute_capability: str
    driver: str

    @classmethod
    def here(cls, options: TensorRtOptions) -> Platform:
        """This machine's. Raises `GpuUnavailable`."""
        gpu = cuda.open_gpu()
        capability = ".".join(str(part) for part in gpu.capability)
        return cls(_trt.name_of(_trt.library(options.library)), gpu.name, capability, gpu.driver_version)


class Key(Struct, frozen=True):
    """Everything that makes an engine what it is."""

    onnx_sha256: str
    platform: Platform
    precision: Precision
    calibration_sha256: str | None
    meaning_sha256: str
    shapes: dict[str, ShapeRange]
    max_batch: int
    optimize_for_batch: int
    optimization_level: int
    workspace_mb: int
    tactic_sources: tuple[str, ...]

    @property
    def digest(self) -> str:
        return hashlib.sha256(msgspec.json.encode(self, order="sorted")).hexdigest()[:16]


class BuildRequest(Struct):
    """What the build process is told. `target`: a compute capability such as `8.7`, on a machine without a GPU."""

    name: str
    model: ModelOptions
    inference: InferenceOptions
    backend: TensorRtOptions
    precision: Precision
    calibration: str | None
    plan: str
    timing_cache: str
    calibration_cache: str
    checks_agreement: bool = True
    target: str | None = None


class Built(Struct):
    """What the build process answers: each input's least, best and largest shape, the ONNX file's own metadata."""

    shapes: dict[str, ShapeRange]
    metadata: dict[str, str]
    agreement: Agreement | None


class Sidecar(Struct):
    """`<engine>.json`, beside an engine."""

    key: Key
    engine_sha256: str
    engine_bytes: int
    built_at: str
    build_s: float
    shapes: dict[str, ShapeRange]
    metadata: dict[str, str]
    agreement: Agreement | None = None
    schema: int = 1


class Engines:
    """The engines in a directory, a folder a model. For one thread; `cancel` is for any other.

    `platform` and `target` are given where engines are built for another machine; their agreement with the ONNX
    file cannot be measured then.
    """

    def __init__(self, options: Table, *, platform: Platform | None = None, target: str | None = None) -> None:
        assert isinstance(options, TensorRtOptions)
        self._options = options
        self._platform = platform
        self._target = target
        self._process: subprocess.Popen[bytes] | None = None
        self._is_cancelled = False
        self._is_aborted = False

    def find(self, stored: StoredModel, inference: InferenceOptions) -> Path | None:
        """The engine for this model, this machine and these options, if it is built and sound.

        Raises `ModelError` where it is known to agree too little with the ONNX file.
        """
        return self._sound(stored, self.key(stored, inference))

    def get(
        self, stored: StoredModel, inference: InferenceOptions, progress: Progress = lambda phase, percent: None
    ) -> Path:
        """As `find`, and built if it is not there: that takes minutes. Raises `ModelError`."""
        key = self.key(stored, inference)
        if path := self._sound(stored, key):
            return path
        self._explain(stored, key)
        return self._build(stored, inference, key, progress)

    def key(self, stored: StoredModel, inference: InferenceOptions) -> Key:
        """Raises `ModelError` where the folder of calibration pictures is missing or empty."""
        options, entry = self._options, stored.options
        precision = entry.precision or options.precision
        folder = self._calibration(stored)
        return Key(
            onnx_sha256=_onnx_sha256(stored.path),
            platform=self._platform or Platform.here(options),
            precision=precision,
            calibration_sha256=_calibration_sha256(folder) if folder else None,
            meaning_sha256=_meaning_sha256(entry),
            shapes=entry.shapes,
            max_batch=inference.max_batch,
            optimize_for_batch=options.optimize_for_batch,
            optimization_level=options.optimization_level,
            workspace_mb=options.workspace_mb,
            tactic_sources=tuple(options.tactic_sources),
        )

    def sidecar(self, path: Path) -> Sidecar:
        """What stands beside an engine. Raises `OSError` and `msgspec.MsgspecError`."""
        return msgspec.json.decode(path.with_suffix(".json").read_bytes(), type=Sidecar)

    def cancel(self) -> None:
        """End the build that runs, and let none begin."""
        self._is_cancelled = True
        self.abort()

    def abort(self) -> None:
        """End the build that runs, if one does."""
        self._is_aborted = True
        if process := self._process:
            process.kill()

    def _calibration(self, stored: StoredModel) -> Path | None:
        folder = stored.options.calibration or self._options.calibration
        return Path(folder) if folder else None

    def records(self, stored: StoredModel, inference: InferenceOptions) -> list[EngineRecord]:
        """What engines of a model there are, and which of them fit here. Raises `GpuUnavailable`."""
        return [
            record
            for path in sorted(self._folder(stored).glob("*.engine"))
            if (record := self._record(path, stored, inference))
        ]

    def verify(self, stored: StoredModel, path: Path) -> Verdict:
        """Whether an engine's file is what was built."""
        name = f"{path.parent.name}/{path.name}"
        try:
            wanted = self.sidecar(path).engine_sha256
        except (OSError, msgspec.MsgspecError):
            return Verdict(stored.id, name, "damaged")
        return Verdict(stored.id, name, "ok" if sha256(path) == wanted else "damaged")

    def is_useful(self, stored: StoredModel, path: Path, inference: InferenceOptions) -> bool:
        """Whether an engine that is there fits this machine, this file and the options now, in whatever precision."""
        try:
            there = self.sidecar(path).key
            key = self.key(stored, inference)
        except (OSError, msgspec.MsgspecError, ModelError):
            return False
        same = {"precision": key.precision, "calibration_sha256": key.calibration_sha256}
        wanted = {_meaning_sha256(variant.options) for variant in variants(stored)}
        there = msgspec.structs.replace(there, **same)
        return any(there == msgspec.structs.replace(key, meaning_sha256=meaning) for meaning in wanted)

    def _record(self, path: Path, stored: StoredModel, inference: InferenceOptions) -> EngineRecord | None:
        try:
            sidecar = self.sidecar(path)
        except (OSError, msgspec.MsgspecError):
            return None
        return EngineRecord(
            file=path.name,
            precision=sidecar.key.precision,
            tensorrt=sidecar.key.platform.tensorrt,
            gpu=sidecar.key.platform.gpu,
            size_bytes=sidecar.engine_bytes,
            built_at=sidecar.built_at,
            build_s=sidecar.build_s,
            fits=self.is_useful(stored, path, inference),
            agreement=sidecar.agreement,
        )

    def _folder(self, stored: StoredModel) -> Path:
        """A kept model's own, so that they go with it."""
        return stored.path.parent / "engines" if stored.is_kept else self._options.directory / stored.name

    def _sound(self, stored: StoredModel, key: Key) -> Path | None:
        path = self._folder(stored) / f"{key.digest}.engine"
        try:
            sidecar = self.sidecar(path)
            found = sha256(path)
        except (OSError, ModelError, msgspec.MsgspecError):
            return None
        if found != sidecar.engine_sha256 or sidecar.key != key:
            log.warning("engine.damaged", model=stored.name, path=str(path))
            return None
        self._require_agreement(stored, sidecar.agreement)
        return path

    def _require_agreement(self, stored: StoredModel, agreement: Agreement | None) -> None:
        least = self._options.agreement
        if agreement is not None and agreement.score < least:
            raise ModelError(
                f"{stored.name}: the engine is rejected: it agrees with its ONNX file to {agreement.score:.3f} "
                f"({agreement.measure}, {agreement.pictures} pictures), less than {least:g}; try another precision or "
                "more calibration pictures, or lower backends.tensorrt.agreement"
            )

    def _explain(self, stored: StoredModel, key: Key) -> None:
        """Log what an engine that is there differs in."""
        others = []
        for path in self._folder(stored).glob("*.json"):
            try:
                others.append(self.sidecar(path).key)
            except (OSError, msgspec.MsgspecError):
                continue
        if not others:
            log.info("engine.missing", model=stored.name, precision=key.precision)
            return
        changes = min((_differences(other, key) for other in others), key=len)
        log.info("engine.does_not_fit", model=stored.name, **changes)

    def _build(self, stored: StoredModel, inference: InferenceOptions, key: Key, progress: Progress) -> Path:
        folder = self._folder(stored)
        path = folder / f"{key.digest}.engine"
        platform = hashlib.sha256(msgspec.json.encode(key.platform, order="sorted")).hexdigest()[:16]
        calibration = self._calibration(stored)
        began = time.monotonic()
        with storing(folder):
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            _sweep(folder, older_than_s=2 * self._options.build_timeout_s)
            with tempfile.TemporaryDirectory(dir=folder, prefix=_SCRATCH) as scratch:
                plan = Path(scratch) / "plan"
                request = BuildRequest(
                    name=stored.name,
                    model=stored.options,
                    inference=inference,
                    backend=self._options,
                    precision=key.precision,
                    calibration=str(calibration) if calibration else None,
                    plan=str(plan),
                    timing_cache=str(self._options.directory / f"timing-{platform}.cache"),
                    calibration_cache=str(folder / f"calibration-{key.onnx_sha256[:8]}-{key.calibration_sha256}.cache"),
                    checks_agreement=self._target is None,
                    target=self._target,
                )
                built = self._run(request, progress)
                sidecar = Sidecar(
                    key=key,
                    engine_sha256=sha256(plan),
                    engine_bytes=plan.stat().st_size,
                    built_at=timestamp(time.time_ns()),
                    build_s=round(time.monotonic() - began, 1),
                    shapes=built.shapes,
                    metadata=built.metadata,
                    agreement=built.agreement,
                )
                facts = plan.with_name("facts")
                facts.write_bytes(msgspec.json.format(msgspec.json.encode(sidecar), indent=2))
                for made in (plan, facts):
                    made.chmod(0o600)
                replace(plan, path)
                replace(facts, path.with_suffix(".json"))  # last: an engine counts once its sidecar is there
        log.info(
            "engine.built",
            model=stored.name,
            precision=key.precision,
            seconds=sidecar.build_s,
            mb=round(sidecar.engine_bytes / 1e6, 1),
            agreement=built.agreement.score if built.agreement else None,
        )
        self._require_agreement(stored, built.agreement)
        return path

    def _run(self, request: BuildRequest, progress: Progress) -> Built:
        """Build in another process, so that its memory comes back and a crash stays there."""
        command = [sys.executable, "-m", "edge_agent.models.build"]
        environ = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
        answer: Mapping[str, Any] = {}
        with tempfile.TemporaryFile() as complaints:
            # The request is a line; the end of stdin is the end of this process, whatever ends it, and of the build.
            with (
                contextlib.suppress(BrokenPipeError),
                subprocess.Popen(
                    command,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=complaints,
                    env=environ,
                    start_new_session=True,
                ) as process,
                _killed_after(self._options.build_timeout_s, process) as too_long,
            ):
                self._process, self._is_aborted = process, False
                if self._is_cancelled:
                    process.kill()
                assert process.stdin is not None
                assert process.stdout is not None
                process.stdin.write(msgspec.json.encode(request) + b"\n")
                process.stdin.flush()
                answer = _listen(process.stdout, request.name, progress)
            self._process = None
            if "built" in answer:
                return msgspec.convert(answer["built"], Built)
            if self._is_cancelled or self._is_aborted:
                raise ModelError(f"{request.name}: the build was cancelled", code="cancelled")
            if too_long.is_set():
                raise ModelError(
                    f"{request.name}: the build took more than {self._options.build_timeout_s:g} s", code="build_failed"
                )
            raise ModelError(
                f"{request.name}: {answer.get('error') or _crash(process.returncode, complaints)}", code="build_failed"
            )


@contextlib.contextmanager
def _killed_after(seconds: float, process: subprocess.Popen[bytes]) -> Iterator[threading.Event]:
    """Kills the process if this lasts longer; the event says whether it did."""
    did = threading.Event()

    def kill() -> None:
        did.set()
        process.kill()

    timer = threading.Timer(seconds, kill)
    timer.daemon = True
    timer.start()
    try:
        yield did
    finally:
        timer.cancel()


def _listen(lines: Any, name: str, progress: Progress) -> dict[str, Any]:
    """The last word of the build process; its progress is handed on and logged on the way."""
    told_s, answer = time.monotonic(), {}
    for line in lines:
        try:
            word = json.loads(line)
        except ValueError:  # a library that prints
            continue
        if not isinstance(word, dict):
            continue
        if "phase" not in word:
            answer = word
            continue
        progress(word["phase"], word["percent"])
        if time.monotonic() - told_s >= 10.0:
            told_s = time.monotonic()
            log.info("engine.building", model=name, phase=word["phase"], percent=word["percent"])
    return answer


def _crash(status: int, complaints: Any) -> str:
    complaints.seek(0)
    last = complaints.read()[-4000:].decode(errors="replace").strip().rpartition("\n")[2]
    if status < 0:
        how = f"was ended by {signal.Signals(-status).name}"
        how += " (out of memory, perhaps)" if -status == signal.SIGKILL else ""
    else:
        how = f"ended with status {status}"
    return f"the build process {how}{f': {last}' if last else ''}"


def _differences(old: Key, new: Key) -> Mapping[str, str]:
    def flat(key: Key) -> Iterator[tuple[str, Any]]:
        for name, value in msgspec.structs.asdict(key).items():
            yield from msgspec.structs.asdict(value).items() if isinstance(value, Platform) else ((name, value),)

    before = dict(flat(old))
    return {name: f"{before[name]} -> {value}" for name, value in flat(new) if before[name] != value}


def _meaning_sha256(entry: ModelOptions) -> str:
    """Of all that says how pictures are prepared and outputs understood: calibration and agreement rest on it."""
    return hashlib.sha256(
        msgspec.json.encode(
            [entry.preprocess, entry.family, entry.options, entry.inputs, entry.dequantize, entry.labels]
        )
    ).hexdigest()[:16]


def _calibration_sha256(folder: Path) -> str:
    """Of the pictures to calibrate with and to compare on."""
    digest = hashlib.sha256()
    for path in pictures.listed(folder):
        digest.update(path.name.encode() + b"\0" + sha256(path).encode())
    return digest.hexdigest()[:16]


def _onnx_sha256(path: Path) -> str:
    """Of the file, and of its weights where they are kept beside it."""
    outside = onnx_file.external_files(path)
    if not outside:
        return sha256(path)
    return hashlib.sha256("".join(sha256(part) for part in (path, *outside)).encode()).hexdigest()


def _sweep(folder: Path, *, older_than_s: float) -> None:
    """Remove what builds left behind whose process was killed; younger ones may be another process's."""
    for left in folder.glob(f"{_SCRATCH}*"):
        with contextlib.suppress(OSError):
            if time.time() - left.stat().st_mtime > older_than_s:
                shutil.rmtree(left)


def is_built(stored: StoredModel) -> bool:
    """Whether an engine is built from this model's file, rather than being one."""
    return stored.path.suffix.lower() == ".onnx"
