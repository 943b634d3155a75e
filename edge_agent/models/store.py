"""Which models there are: those that come with the package, those of the config, and those that the store keeps.

The store is a folder: `registry.json`, and `<name>/<version>/` with the ONNX file as it came, its labels and the
engines built from it. Nothing else is ever written there, and nothing outside of it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import msgspec
import structlog

from edge_agent import plugins
from edge_agent.backends.onnx import OnnxEngine, OnnxOptions
from edge_agent.config import Cheaper, InferenceOptions, ModelOptions
from edge_agent.errors import ModelError
from edge_agent.messages import Measurement, timestamp
from edge_agent.models import catalogue, onnx_file
from edge_agent.models.files import (
    held,
    is_held,
    is_plain_file,
    replace,
    require_file,
    storing,
    sync,
    write_whole,
)
from edge_agent.models.files import sha256 as sha256_of
from edge_agent.models.inspect import facts_of, make_family
from edge_agent.models.registry import MODEL_FILE as _FILE
from edge_agent.models.registry import (
    NAME,
    RESERVED,
    Chosen,
    EngineRecord,
    Entry,
    Origin,
    Registry,
    RegistryFile,
    StoredFile,
    facts_told,
)
from edge_agent.models.registry import UPLOADS as UPLOADS

log = structlog.get_logger()

_HERE = Path(__file__).parent
_BUNDLED = _HERE / "zoo"
_PRESETS = _HERE / "labels"
_STAGING, _IN_USE = ".staging-", ".in-use"
_LABELS, _ENTRY, _ENGINES = "labels.txt", "entry.json", "engines"
_KEPT_MEASUREMENTS = 8


@dataclass(frozen=True, slots=True)
class StoredModel:
    """A model's file and what its entry says about it; `size_bytes` is None where there is no file, `entry` where the
    registry has not met it."""

    name: str
    origin: Origin
    options: ModelOptions
    size_bytes: int | None
    entry: Entry | None = None

    @property
    def id(self) -> str:
        """`name@version` of a model of the store, else its name."""
        return f"{self.name}@{self.options.version}" if self.is_kept else self.name

    @property
    def is_kept(self) -> bool:
        """Whether the store holds its files."""
        return self.origin in ("registered", "fetched")

    @property
    def path(self) -> Path:
        return Path(self.options.path)

    def labels(self) -> Sequence[str] | None:
        """The entry's labels: a list, a preset's name (`coco80`) or a file with one a line."""
        given = self.options.labels
        if given is None or isinstance(given, list):
            return given
        presets = label_presets()
        path = presets.get(given, Path(given))
        try:
            return [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        except FileNotFoundError as error:
            raise ModelError(f"labels {given!r} is neither a file nor one of {', '.join(presets)}") from error
        except (OSError, UnicodeDecodeError) as error:
            raise ModelError(f"labels {given!r} cannot be read: {error}") from error


@dataclass(frozen=True, slots=True)
class Verdict:
    """What became of a stored file."""

    model: str
    file: str
    state: Literal["ok", "missing", "truncated", "damaged"]


@dataclass(frozen=True, slots=True)
class NewModel:
    """A file to register, and what is said of it. `entry`: keys of `[models.<name>]` less `path`; `version`: None for
    the next number; `sha256`: what the file must have, if that is known."""

    file: Path
    name: str
    version: str | None = None
    entry: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    origin: Literal["registered", "fetched"] = "registered"
    source: str | None = None
    parent: str | None = None
    licence: str | None = None
    sha256: str | None = None


class ModelStore:
    """Models by name, or `name@version`. Where names are the same, one of the config comes before one of the store,
    and that before a bundled one. Reads and writes the disk; any thread may use it, and other processes the same
    folder. Without a `folder` there is no store, only bundled and configured models."""

    def __init__(self, entries: Mapping[str, ModelOptions], folder: Path | None = None) -> None:
        self.folder = folder
        self._registry = RegistryFile(folder) if folder is not None else None
        bundled = {path.stem: ModelOptions(path=str(path)) for path in sorted(_BUNDLED.glob("*.onnx"))}
        self._bundled = {name: _stored(name, "bundled", options) for name, options in bundled.items()}
        self._configured = {name: _stored(name, "config", options) for name, options in entries.items()}

    def __iter__(self) -> Iterator[StoredModel]:
        registry = self.registry()
        for model in (self._bundled | self._configured).values():
            yield dataclasses.replace(model, entry=registry.find(model.id))
        for entry in registry.models:
            if entry.is_kept:
                try:
                    yield self._opened(entry)
                except ModelError as error:  # of another version of this package, say; the others can be used
                    log.warning("model.unusable", model=entry.id, reason=str(error))

    def get(self, name: str) -> StoredModel:
        """The model of this name, or `name@version`. Raises `ModelError` (`model_not_found`), also where its file is
        missing."""
        model = self._find(name)
        if model is None:
            known = sorted({found.name for found in self} | {found.id for found in self})
            hint = plugins.nearest(name, known)
            if name in catalogue.catalogue():
                hint = f"; fetch it first: edgectl models fetch {name}, or the command model.fetch"
            raise ModelError(f"there is no model {name!r}{hint}", code="model_not_found")
        try:
            model.path.open("rb").close()
        except OSError as error:
            raise ModelError(f"{name}: its file {model.path}: {error.strerror}", code="model_not_found") from error
        return model

    def registry(self) -> Registry:
        """What the registry says now, not to be changed. Raises `ModelError` (`registry_damaged`)."""
        return self._registry.read() if self._registry is not None else Registry()

    def signature(self) -> object:
        """Another one after each change of the registry, whoever made it."""
        return self._registry.signature() if self._registry is not None else None

    def register(self, new: NewModel, inference: InferenceOptions) -> StoredModel:
        """Copy a model into the store, looked at from all sides; the same file and entry again change nothing.

        Raises `ModelError`; nothing is kept then. Blocks for as long as it takes to read the file three times.
        """
        registry, folder = self._require_store()
        require_name(new.name, "name")
        if new.version is not None:
            require_name(new.version, "version")
        if new.name in self._bundled or new.name in RESERVED:
            raise ModelError(f"{new.name}: this name is taken; give it another", code="model_exists")
        new = dataclasses.replace(new, entry=_as_kept(new.entry))
        options = _options(new.entry)
        with self.scratch() as scratch:
            staged = scratch / "model"
            staged.mkdir(mode=0o755)
            entry = _copied(new, options, staged)
            _inspected(entry, _located(entry, staged), inference)
            with registry.locked(), contextlib.ExitStack() as undo, registry.change() as known:
                if there := self._same(known, entry, new.version):
                    return self._opened(there)
                entry.version = new.version or _next_version(known, new.name)
                entry.path = f"{entry.name}/{entry.version}/{_FILE}"
                write_whole(staged / _ENTRY, msgspec.json.format(msgspec.json.encode(entry), indent=1))
                undo.callback(self._take_away, entry, scratch)
                _put_in_place(staged, folder / entry.name / entry.version, scratch)
                known.models.append(entry)
        log.info("model.registered", model=entry.id, family=entry.family, task=entry.task, origin=entry.origin)
        return self.get(entry.id)

    def remove(self, name: str, *, in_use: Collection[str] = ()) -> str:
        """Delete a model of the store with all its engines; its id. Raises `ModelError`: `model_in_use` for the active
        one, its fallback and those `in_use`."""
        registry, _ = self._require_store()
        entries = _named(self.registry(), name)
        if name in self._configured or not entries:
            model = self._find(name) or self.get(name)
            raise ModelError(f"{name} is {_ORIGINS[model.origin]}; the store does not keep it")
        if len(entries) > 1:
            versions = ", ".join(entry.version for entry in entries)
            raise ModelError(f"{name} has the versions {versions}; say which: {entries[0].id}")
        [entry] = entries
        with self.scratch() as scratch, registry.locked():
            with registry.change() as known:
                used = {chosen.model: role for role in ("fallback", "active") if (chosen := getattr(known, role))}
                used |= {self._id(one): "in use" for one in in_use}
                if role := used.get(entry.id):
                    raise ModelError(f"{entry.id} is {role}; activate another one first", code="model_in_use")
                known.models = [one for one in known.models if one.id != entry.id]
            self._take_away(entry, scratch)
        log.info("model.removed", model=entry.id)
        return entry.id

    def verify(self, model: StoredModel) -> list[Verdict]:
        """Each of a model's files against what it was when it came, or was first used. Reads all of them."""
        if model.entry is None:
            return []
        folder = model.path.parent
        is_elsewhere = model.is_kept and (folder.is_symlink() or folder.parent.is_symlink())
        return [
            Verdict(model.id, name, "damaged" if is_elsewhere else _state(folder / name, kept, model.is_kept))
            for name, kept in model.entry.files.items()
        ]

    def require_sound(self, model: StoredModel) -> None:
        """Raises `ModelError` (`model_truncated`, `model_damaged`, `model_not_found`) where a file of a kept model is
        no longer what it was; a file of the config's may change."""
        if not model.is_kept:
            return
        for verdict in self.verify(model):
            if verdict.state != "ok":
                raise ModelError(
                    f"{model.id}: its file {verdict.file} is {verdict.state}; remove the model and register it again",
                    code=_CODES[verdict.state],
                )

    def record(self, model: StoredModel, measured: Measurement, engines: Sequence[EngineRecord]) -> None:
        """Keep what was measured of a model, in place of what was measured of it before in the same way."""
        if self._registry is None:
            return
        with self._registry.change() as known:
            entry = known.find(model.id)
            if model.is_kept and (entry is None or model.entry is None or entry.files != model.entry.files):
                return  # removed meanwhile
            if entry is None:
                entry = _met(model)
                known.models.append(entry)
            elif not model.is_kept and (now := _met(model)).files != entry.files:
                known.models[known.models.index(entry)] = entry = now  # another file under the same name
            others = [one for one in entry.measured if one.where != measured.where]
            before = next((one.throughput for one in entry.measured if one.where == measured.where), None)
            measured = msgspec.structs.replace(measured, throughput=measured.throughput or before)
            entry.measured = [measured, *others][:_KEPT_MEASUREMENTS]
            entry.engines = list(engines)

    def choose(self, model_id: str, configured: str, before: str | None = None) -> None:
        """Remember what runs now, and what ran before it (`before`, if nothing was remembered yet): an agent that
        starts again begins with it."""
        if self._registry is None:
            return
        with self._registry.change() as known:
            if "@" in model_id and known.find(model_id) is None:  # removed meanwhile; another may get its name
                return
            if known.active is None and before is not None:
                known.active = Chosen(self._id(before), configured)
            if known.active is not None and known.active.model != model_id:
                known.fallback = known.active
            known.active = Chosen(model_id, configured)

    def preferred(self, configured: str) -> list[str]:
        """What to begin with, the best first: what passed its probation last and what did before that, as long as the
        configuration names the same model as then; then that one."""
        registry = self.registry()
        chosen = [one.model for one in (registry.active, registry.fallback) if one and one.configured == configured]
        return list(dict.fromkeys(name for name in (*chosen, configured) if name == configured or self._find(name)))

    def collect_garbage(self, is_useful: Callable[[StoredModel, Path], bool]) -> list[str]:
        """Remove engines of which `is_useful` says that they fit nothing here, and what killed processes left
        behind; the paths, from the store's folder."""
        registry, folder = self._require_store()
        with storing(folder):
            with registry.locked():
                gone = [path for path in folder.glob(f"{_STAGING}*") if not is_held(path / _IN_USE)]
            for path in gone:
                shutil.rmtree(path, ignore_errors=True)
            for model in self:
                for engine in engine_files(model):
                    if not is_useful(model, engine):
                        engine.with_suffix(".json").unlink(missing_ok=True)  # first: without it the engine counts not
                        engine.unlink(missing_ok=True)
                        gone.append(engine)
        known = self.registry()
        if orphans := [entry for entry in registry.kept() if known.find(entry.id) is None]:
            with self.scratch() as scratch, registry.locked():  # last: on a full disk it takes some room
                gone += [taken for entry in orphans if (taken := self._take_away(entry, scratch))]
        return [str(path.relative_to(folder)) for path in gone if not path.exists()]

    def _require_store(self) -> tuple[RegistryFile, Path]:
        assert self._registry is not None
        assert self.folder is not None
        return self._registry, self.folder

    def _find(self, name: str) -> StoredModel | None:
        registry = self.registry()
        if name in self._configured:
            return dataclasses.replace(self._configured[name], entry=registry.find(name))
        if kept := _named(registry, name):
            return self._opened(kept[-1])
        if name in self._bundled:
            return dataclasses.replace(self._bundled[name], entry=registry.find(name))
        return None

    def _id(self, name: str) -> str:
        model = self._find(name)
        return model.id if model else name

    def _opened(self, entry: Entry) -> StoredModel:
        assert self.folder is not None
        path = self.folder / entry.path
        try:
            options = _located(entry, path.parent)
        except msgspec.ValidationError as error:
            raise ModelError(f"{entry.id}: its entry: {error}; remove it and register it again") from error
        return StoredModel(entry.name, entry.origin, options, entry.size_bytes, entry)

    def _same(self, known: Registry, entry: Entry, version: str | None) -> Entry | None:
        """The model that is the same already. Raises `ModelError` where the version is another's."""
        others = [one for one in known.models if one.is_kept and one.name == entry.name]
        same = [one for one in others if (one.files, one.entry) == (entry.files, entry.entry)]
        if version is None:
            return same[-1] if same and same[-1] is others[-1] else None
        taken = next((one for one in others if one.version == version), None)
        if taken is None or taken in same:
            return taken
        raise ModelError(
            f"{taken.id} is there already, with another file or entry; leave the version out for the next one",
            code="model_exists",
        )

    def _take_away(self, entry: Entry, scratch: Path) -> Path | None:
        """Under the registry's lock: a model's folder, out of the store unless the registry knows it. It goes in one
        step, so that a killed process leaves it whole or not at all, and is deleted with `scratch`."""
        registry, folder = self._require_store()
        with registry.change() as known:
            if known.find(entry.id) is not None:
                return None
        target = folder / entry.name / entry.version
        if target.parent.is_symlink():  # what it leads to is not the store's
            return None
        with contextlib.suppress(FileNotFoundError):
            target.rename(scratch / entry.id)
        with contextlib.suppress(OSError):  # other versions
            target.parent.rmdir()
        return target

    @contextlib.contextmanager
    def scratch(self) -> Iterator[Path]:
        """A folder on the store's own disk, gone when the block ends. What the disk says is a `ModelError`."""
        registry, folder = self._require_store()
        with storing(folder), contextlib.ExitStack() as stack:
            with registry.locked():  # nobody may find it before it is held
                made = tempfile.TemporaryDirectory(dir=folder, prefix=_STAGING, ignore_cleanup_errors=True)
                scratch = Path(stack.enter_context(made))
                stack.enter_context(held(scratch / _IN_USE))
            yield scratch


_ORIGINS = {"bundled": "part of the package", "config": "of the configuration"}
_CODES: Mapping[str, Any] = {"missing": "model_not_found", "truncated": "model_truncated", "damaged": "model_damaged"}


def variant(model: StoredModel, cheaper: Cheaper) -> StoredModel:
    """The same file, run for less."""
    options = model.options
    if cheaper.precision is not None:
        options = msgspec.structs.replace(options, precision=cheaper.precision)
    if cheaper.size is not None:
        preprocess = msgspec.structs.replace(options.preprocess, size=cheaper.size)
        options = msgspec.structs.replace(options, preprocess=preprocess)
    return dataclasses.replace(model, options=options)


def variants(model: StoredModel) -> list[StoredModel]:
    """A model as it is, and each of its cheaper ways."""
    return [model, *(variant(model, cheaper) for cheaper in model.options.cheaper)]


def require_name(name: str, what: str) -> None:
    """Raises `ModelError` unless it is one that can be a folder."""
    if not NAME.match(name):
        raise ModelError(f"{what} {name!r}: 1 to 64 of a-z 0-9 . _ -, and a letter or digit first")


def label_presets() -> Mapping[str, Path]:
    """The lists of labels that come with the package, by name."""
    return {path.stem: path for path in sorted(_PRESETS.glob("*.txt"))}


def engine_files(model: StoredModel) -> list[Path]:
    """The engines that stand in a kept model's own folder."""
    return sorted((model.path.parent / _ENGINES).glob("*.engine")) if model.is_kept else []


def _stored(name: str, origin: Origin, options: ModelOptions) -> StoredModel:
    try:
        size = Path(options.path).stat().st_size
    except OSError:
        size = None
    return StoredModel(name, origin, options, size)


def _named(registry: Registry, name: str) -> list[Entry]:
    """The store's models of a name, or the one of a `name@version`; the last that came is the last."""
    return [entry for entry in registry.models if entry.is_kept and name in (entry.name, entry.id)]


def _as_kept(entry: Mapping[str, Any]) -> dict[str, Any]:
    """What will be read back of an entry: JSON has no tuples, and no infinity."""
    kept: dict[str, Any] = msgspec.json.decode(msgspec.json.encode(dict(entry)))
    return kept


def _options(entry: Mapping[str, Any]) -> ModelOptions:
    """Raises `ModelError` naming the key that is wrong."""
    if "path" in entry or "version" in entry:
        raise ModelError("entry: leave path and version out; the store gives a model its place")
    try:
        return msgspec.convert({**entry, "path": _FILE}, ModelOptions)
    except msgspec.ValidationError as error:
        raise ModelError(f"entry: {error}") from error


def _located(entry: Entry, folder: Path) -> ModelOptions:
    """A kept model's options, with the files of its folder."""
    given = dict(entry.entry)
    if given.get("labels") == _LABELS:
        given["labels"] = str(folder / _LABELS)
    return msgspec.convert({**given, "path": str(folder / _FILE), "version": entry.version}, ModelOptions)


def _copied(new: NewModel, options: ModelOptions, staged: Path) -> Entry:
    """The files of a new model in a folder, and an entry for them."""
    if new.file.suffix.lower() != ".onnx":
        raise ModelError(f"{new.file.name}: only ONNX files are registered; engines are built from them here")
    copy = staged.parent / new.file.name  # looked at in place of the file, which may still be written to
    files = {_FILE: _copy(new.file, copy)}
    copies = {path.name: path for path in onnx_file.external_files(copy, beside=new.file.parent)}
    if not {_FILE, _LABELS, _ENTRY, _ENGINES}.isdisjoint(copies):
        raise ModelError(f"{new.file.name}: its weights lie in a file that is named like one of the store's; rename it")
    entry = dict(new.entry)
    if isinstance(options.labels, str) and options.labels not in label_presets():
        copies[_LABELS] = _labels_beside(new.file, options.labels)
        entry["labels"] = _LABELS
    copy.rename(staged / _FILE)
    files |= {name: _copy(source, staged / name) for name, source in copies.items()}
    if new.sha256 is not None and files[_FILE].sha256 != new.sha256.lower():
        raise ModelError(
            f"{new.file.name}: its SHA-256 is {files[_FILE].sha256}, not {new.sha256.lower()}", code="checksum_mismatch"
        )
    onnx_file.require_numbers(staged / _FILE)
    return Entry(
        name=new.name,
        version="",
        origin=new.origin,
        source=new.source or os.fsencode(new.file).decode(errors="replace"),
        parent=new.parent,
        licence=new.licence,
        created=timestamp(time.time_ns()),
        path=_FILE,
        files=files,
        entry=entry,
        precision=options.precision,
    )


def _labels_beside(file: Path, labels: str) -> Path:
    path = file.parent / labels
    if labels != Path(labels).name or not is_plain_file(path):
        presets = ", ".join(label_presets())
        raise ModelError(f"labels {labels!r}: give a list, a file beside the model, or one of {presets}")
    return path


def _copy(source: Path, target: Path) -> StoredFile:
    digest, size = hashlib.sha256(), 0
    try:
        require_file(source)
        reading = source.open("rb")
    except OSError as error:
        raise ModelError(f"{source}: {error.strerror}", code="model_not_found") from error
    with reading, target.open("wb") as writing:
        while block := reading.read(1 << 20):
            digest.update(block)
            size += len(block)
            writing.write(block)
    sync(target)
    return StoredFile(digest.hexdigest(), size)


def _inspected(entry: Entry, options: ModelOptions, inference: InferenceOptions) -> None:
    """Fill in what the model is, as it will be understood. Raises `ModelError` where it will not be."""
    if OnnxEngine.unavailable(OnnxOptions()) is not None:  # it will be looked at when its engine is built
        return
    stored = StoredModel(entry.name, entry.origin, options, None)
    facts = facts_of(stored.path)
    family, proposal = make_family(facts, options, stored.labels(), inference)
    entry.inputs, entry.outputs = facts_told(facts)
    entry.task, entry.family = family.task, proposal.family
    entry.labels = list(family.names.labels)


def _put_in_place(staged: Path, target: Path, scratch: Path) -> None:
    """Under the registry's lock. What is there is of no entry: a process was killed before it wrote one."""
    if target.parent.is_symlink():
        raise ModelError(f"{target.parent} is a link, and leads out of the store; remove it")
    target.parent.mkdir(exist_ok=True)
    sync(target.parent.parent)
    with contextlib.suppress(FileNotFoundError):
        target.rename(scratch / "before")
    replace(staged, target)


def _next_version(known: Registry, name: str) -> str:
    numbers = [int(one.version) for one in _named(known, name) if one.version.isdigit() and len(one.version) < 64]
    return str(max(numbers, default=0) + 1)


def _met(model: StoredModel) -> Entry:
    """An entry for a model that the store does not keep: to know its file by, and what was measured of it."""
    kept = StoredFile(sha256_of(model.path), model.path.stat().st_size)
    return Entry(
        name=model.name,
        version=model.options.version,
        origin=model.origin,
        created=timestamp(time.time_ns()),
        path=str(model.path),
        files={model.path.name: kept},
        precision=model.options.precision,
    )


def _state(path: Path, kept: StoredFile, is_ours: bool) -> Literal["ok", "missing", "truncated", "damaged"]:
    try:
        size = path.stat().st_size
    except OSError:
        return "missing"
    if is_ours and path.is_symlink():  # the store makes none
        return "damaged"
    if size < kept.size_bytes:
        return "truncated"
    return "ok" if size == kept.size_bytes and sha256_of(path) == kept.sha256 else "damaged"
