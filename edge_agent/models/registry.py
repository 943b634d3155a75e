"""`registry.json`: what is known of each model, on disk, for the agent and for `edgectl` at once.

A change is read, made and written under one lock between processes; the file is replaced whole, and what it said
before is kept. Whatever happens in between, the file that is there opens, with the old or the new entries.
"""

from __future__ import annotations

import contextlib
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import msgspec
import structlog
from msgspec import Struct, field

from edge_agent.data import ModelFacts
from edge_agent.errors import ModelError
from edge_agent.messages import Measurement
from edge_agent.models.agreement import Agreement
from edge_agent.models.files import held, make_folder, storing, write_whole

log = structlog.get_logger()

SCHEMA = 1
MODEL_FILE = "model.onnx"
UPLOADS = "uploads"
"""The folder in the store from which models may be registered by command."""
RESERVED = (UPLOADS, "registry.json", "registry.json.bak")
"""Names in the store's folder that are no model's."""
NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}\Z")
Origin = Literal["bundled", "config", "registered", "fetched"]


class TensorFacts(Struct, frozen=True):
    """An input or output; sizes that may vary are null."""

    name: str
    shape: list[int | None]
    dtype: str


class StoredFile(Struct, frozen=True):
    """A file of a model, as it was when it came."""

    sha256: str
    size_bytes: int


class EngineRecord(Struct, frozen=True):
    """An engine built from a model; `fits`: whether it is one for this machine and the way engines are built now."""

    file: str
    precision: str
    tensorrt: str
    gpu: str
    size_bytes: int
    built_at: str
    build_s: float
    fits: bool
    agreement: Agreement | None = None


class Entry(Struct, kw_only=True):
    """A model. `entry` holds the keys of `[models.<name>]` that were given, less `path`, which is a file in the
    model's own folder for one of the store; null is what is not known."""

    name: str
    version: str
    origin: Origin
    source: str | None = None
    parent: str | None = None
    licence: str | None = None
    created: str
    path: str
    files: dict[str, StoredFile]
    entry: dict[str, Any] = field(default_factory=dict)
    task: str | None = None
    family: str | None = None
    labels: list[str] | None = None
    inputs: list[TensorFacts] | None = None
    outputs: list[TensorFacts] | None = None
    precision: str | None = None
    engines: list[EngineRecord] = field(default_factory=list)
    measured: list[Measurement] = field(default_factory=list)

    @property
    def id(self) -> str:
        return f"{self.name}@{self.version}" if self.is_kept else self.name

    @property
    def is_kept(self) -> bool:
        """Whether the store holds its files, rather than the package or whoever wrote the configuration."""
        return self.origin in ("registered", "fetched")

    @property
    def is_in_place(self) -> bool:
        """Whether a kept model's files are in its own folder; whatever else a file says leads out of the store."""
        has_folder = NAME.match(self.name) and self.name not in RESERVED and NAME.match(self.version)
        is_there = self.path == f"{self.name}/{self.version}/{MODEL_FILE}" and MODEL_FILE in self.files
        are_plain = all(name == Path(name).name and name not in ("", "..") for name in self.files)
        return bool(has_folder and is_there and are_plain)

    @property
    def sha256(self) -> str:
        return self.files[Path(self.path).name].sha256

    @property
    def size_bytes(self) -> int:
        return sum(kept.size_bytes for kept in self.files.values())


class Chosen(Struct, frozen=True):
    """A model that passed its probation, and what the configuration named at the time."""

    model: str
    configured: str


class Registry(Struct, kw_only=True):
    """The whole file."""

    schema: Literal[1] = 1
    models: list[Entry] = field(default_factory=list)
    active: Chosen | None = None
    fallback: Chosen | None = None

    def find(self, model_id: str) -> Entry | None:
        return next((entry for entry in self.models if entry.id == model_id), None)


class RegistryFile:
    """The file in a folder. Any thread and any process may `read` and `change` it."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "registry.json"
        self._folder = folder
        self._seen: tuple[tuple[int, int, int], Registry] | None = None
        self._seen_lock = threading.Lock()
        self._turn = threading.RLock()
        self._depth = 0

    def read(self) -> Registry:
        """What it says now; not to be changed by the caller. Raises `ModelError` (`registry_damaged`)."""
        signature = self.signature()
        with self._seen_lock:
            if self._seen is not None and self._seen[0] == signature:
                return self._seen[1]
            registry, is_sound = self._read()
            if is_sound and signature is not None:  # else what it says depends on more than this file
                self._seen = (signature, registry)
            return registry

    def signature(self) -> tuple[int, int, int] | None:
        """Another one after each change, whoever made it."""
        try:
            facts = self.path.stat()
        except OSError:
            return None
        return facts.st_ino, facts.st_mtime_ns, facts.st_size

    @contextlib.contextmanager
    def change(self) -> Iterator[Registry]:
        """The registry, to be changed in place; written when the block ends well.

        One process and thread at a time. Raises `ModelError` where it cannot be written (`disk_full`, say).
        """
        with self.locked():
            registry, is_sound = self._read()
            before = _text(registry)
            yield registry
            after = _text(registry)
            is_there = self.path.exists()
            if after != before or (is_there and not is_sound):
                if is_there:
                    write_whole(self._backup, before)
                write_whole(self.path, after)

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Nobody else changes the folder meanwhile. The thread that has it may take it again."""
        with storing(self.path), self._turn, contextlib.ExitStack() as stack:
            if self._depth == 0:
                make_folder(self._folder)
                stack.enter_context(held(self._folder / ".lock"))
            self._depth += 1
            try:
                yield
            finally:
                self._depth -= 1

    def _read(self) -> tuple[Registry, bool]:
        """And whether it is the file that says so."""
        registry = self._opened(self.path)
        if registry is not None:
            return registry, True
        kept = sorted(self.kept(), key=lambda entry: entry.created)
        registry = self._opened(self._backup)
        if registry is None:
            return Registry(models=kept), False
        log.warning("registry.restored", path=str(self._backup), note="of the last change only the files are known")
        known = {entry.id for entry in registry.models}
        there = [one for one in registry.models if not one.is_kept or (self._folder / one.path).parent.is_dir()]
        registry.models = [*there, *(entry for entry in kept if entry.id not in known)]
        return registry, False

    def _opened(self, path: Path) -> Registry | None:
        """None where there is none, or a damaged one."""
        try:
            registry = msgspec.json.decode(path.read_bytes(), type=Registry)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise ModelError(f"{path}: {error.strerror}", code="registry_damaged") from error
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            self._require_known_schema(path)
            log.error("registry.damaged", path=str(path), reason=str(error), next="the backup, then the folders")
            return None
        astray = [entry.id for entry in registry.models if entry.is_kept and not entry.is_in_place]
        if astray:
            log.error("registry.damaged", path=str(path), reason=f"{astray[0]} is not in its own folder")
            return None
        return registry

    def _require_known_schema(self, path: Path) -> None:
        with contextlib.suppress(msgspec.MsgspecError, UnicodeDecodeError, RecursionError, OSError):
            schema = msgspec.json.decode(path.read_bytes(), type=dict).get("schema")
            if isinstance(schema, int) and schema > SCHEMA:
                raise ModelError(
                    f"{path} was written by a newer edge_agent (schema {schema}, this one knows {SCHEMA}); "
                    "update this one, or give it another [models] dir",
                    code="registry_damaged",
                )

    def kept(self) -> Iterator[Entry]:
        """The entries as they stand in the models' own folders, from when they came."""
        for path in _entry_files(self._folder):
            try:
                entry = msgspec.json.decode(path.read_bytes(), type=Entry)
            except (OSError, msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
                continue
            is_its_own = entry.is_kept and entry.is_in_place and self._folder / entry.path == path.with_name(MODEL_FILE)
            if is_its_own and not path.parent.is_symlink() and not path.parent.parent.is_symlink():
                yield entry

    @property
    def _backup(self) -> Path:
        return self.path.with_name("registry.json.bak")


def _text(registry: Registry) -> bytes:
    return msgspec.json.format(msgspec.json.encode(registry), indent=1)


def _entry_files(folder: Path) -> Iterator[Path]:
    """Of all models in the store; not of those on their way in, whose folders come and go (and a glob would trip)."""
    for name in _listed(folder):
        if not name.startswith("."):
            yield from (folder / name / version / "entry.json" for version in _listed(folder / name))


def _listed(folder: Path) -> list[str]:
    try:
        return sorted(path.name for path in folder.iterdir())
    except OSError:
        return []


def facts_told(facts: ModelFacts) -> tuple[list[TensorFacts], list[TensorFacts]]:
    """Inputs and outputs as an entry has them."""
    inputs, outputs = (
        [TensorFacts(spec.name, list(spec.shape), spec.dtype) for spec in specs]
        for specs in (facts.inputs, facts.outputs)
    )
    return inputs, outputs
