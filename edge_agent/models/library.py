"""What people do to the store: register, fetch, remove, verify, tidy. Blocks; for commands and for edgectl."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec
from msgspec import Struct

from edge_agent.config import FetchOptions, InferenceOptions, Precision
from edge_agent.errors import GpuUnavailable, ModelError
from edge_agent.models import catalogue
from edge_agent.models.engines import Engines, Progress, is_built
from edge_agent.models.fetch import Source, fetch
from edge_agent.models.signatures import check_signature, require_signature_allowed
from edge_agent.models.store import UPLOADS, ModelStore, NewModel, StoredModel, Verdict, engine_files


class Tidied(Struct, frozen=True):
    """What `gc` removed, from the store's folder; `note` says what it could not judge."""

    removed: list[str]
    note: str | None = None


@dataclass(frozen=True, slots=True)
class Download:
    """A model to fetch: of the catalogue by `name` alone, or from a `url` with the file's `sha256`; `entry` as in
    `[models.<name>]`."""

    name: str
    url: str | None = None
    sha256: str | None = None
    version: str | None = None
    entry: Mapping[str, Any] | None = None
    signature_url: str | None = None


class Library:
    """For one thread at a time. `in_use`: models that may not be removed, besides the active one and its fallback."""

    def __init__(
        self,
        store: ModelStore,
        *,
        options: FetchOptions,
        inference: InferenceOptions,
        engines: Engines | None = None,
        in_use: Callable[[], Collection[str]] = tuple,
    ) -> None:
        self._store = store
        self._options = options
        self._inference = inference
        self._engines = engines
        self.in_use = in_use

    def register(self, new: NewModel, signature: Path | None = None) -> StoredModel:
        """Take a file of this machine into the store; `signature` is its detached Ed25519 one. Raises `ModelError`."""
        require_signature_allowed(self._options, is_signed=signature is not None)
        if signature is not None:
            try:
                signed = signature.read_bytes()
            except OSError as error:
                raise ModelError(f"{signature}: {error.strerror}", code="signature_missing") from error
            check_signature(new.file, signed, self._options)
        return self._store.register(new, self._inference)

    def upload(self, file: str) -> Path:
        """A file of the folder from which models may be registered by command. Raises `ModelError`."""
        assert self._store.folder is not None
        folder = self._store.folder / UPLOADS
        path = folder / file
        if file != Path(file).name or len(file.encode()) > 255 or path.is_symlink() or not path.is_file():
            raise ModelError(
                f"{file!r} is no file in {folder}; copy the model there and give its plain name", code="model_not_found"
            )
        return path

    def uploaded_folder(self, name: str) -> Path:
        """A folder in the one from which models may be registered by command. Raises `ModelError`."""
        assert self._store.folder is not None
        folder = self._store.folder / UPLOADS
        path = folder / name
        if (
            name != Path(name).name
            or name in ("", ".", "..")
            or len(name.encode()) > 255
            or path.is_symlink()
            or not path.is_dir()
        ):
            raise ModelError(
                f"{name!r} is no folder in {folder}; copy the pictures there and give its plain name",
                code="model_not_found",
            )
        return path

    def fetch(
        self,
        wanted: Download,
        progress: Progress = lambda phase, percent: None,
        cancelled: Callable[[], bool] = lambda: False,
    ) -> StoredModel:
        """Download a model into the store. Raises `ModelError`."""
        source, new = _planned(wanted)
        with self._store.scratch() as folder:
            file = folder / "fetched.onnx"
            fetch(
                source,
                file,
                sha256=new.sha256 or "",
                options=self._options,
                signature_url=wanted.signature_url,
                progress=progress,
                cancelled=cancelled,
            )
            progress("register", None)
            return self._store.register(replace(new, file=file), self._inference)

    def remove(self, name: str) -> str:
        """Delete a model of the store; its id. Raises `ModelError`."""
        return self._store.remove(name, in_use=self.in_use())

    def show(self, name: str) -> dict[str, Any]:
        """All that is known of a model, as the registry has it; `id` and `path` for one that it has not met yet.
        Raises `ModelError`."""
        model = self._store.get(name)
        known = msgspec.to_builtins(model.entry) if model.entry else {"name": model.name, "origin": model.origin}
        return {"id": model.id, **known, "path": str(model.path)}

    def fallback(self) -> str:
        """The model that ran before the active one. Raises `ModelError` where there was none."""
        before = self._store.registry().fallback
        if before is None:
            raise ModelError("no other model has run before this one", code="model_not_found")
        return before.model

    def build(
        self,
        name: str,
        progress: Progress,
        *,
        precision: Precision | None = None,
        pictures: Path | None = None,
        on_begin: Callable[[Callable[[], None]], object] = lambda abort: None,
    ) -> dict[str, Any]:
        """Have a model's engine ready; what there is to know of it. `pictures`: a folder to calibrate with. `on_begin`
        is given a way to end the build. Blocks for minutes; raises `ModelError`."""
        model = self._store.get(name)
        if self._engines is None or not is_built(model):
            raise ModelError(f"{name}: nothing is built for it here; the backend runs the file itself")
        options = model.options
        if precision is not None:
            options = msgspec.structs.replace(options, precision=precision)
        if pictures is not None:
            options = msgspec.structs.replace(options, calibration=str(pictures))
        on_begin(self._engines.abort)
        wanted = replace(model, options=options)
        try:
            path = self._engines.get(wanted, self._inference, progress)
        except GpuUnavailable as error:
            raise ModelError(f"{name}: {error}") from error
        sidecar = self._engines.sidecar(path)
        return {
            "id": model.id,
            "engine": path.name,
            "precision": sidecar.key.precision,
            "size_bytes": sidecar.engine_bytes,
            "build_s": sidecar.build_s,
            "built_at": sidecar.built_at,
            "agreement": msgspec.to_builtins(sidecar.agreement),
        }

    def verify(self, name: str | None = None, progress: Progress = lambda phase, percent: None) -> list[Verdict]:
        """Every file of one model, or of all, against what it was; damaged engines too. Raises `ModelError`."""
        models = [self._store.get(name)] if name is not None else list(self._store)
        verdicts: list[Verdict] = []
        for done, model in enumerate(models):
            progress(f"verify {model.id}", 100 * done / len(models))
            verdicts += self._store.verify(model)
            if self._engines is not None:
                verdicts += [self._engines.verify(model, path) for path in engine_files(model)]
        return verdicts

    def tidy(self) -> Tidied:
        """Remove engines that fit nothing here, and leavings. Raises `ModelError`."""
        note: str | None = None

        def is_useful(model: StoredModel, path: Path) -> bool:
            nonlocal note
            try:
                return self._engines is None or self._engines.is_useful(model, path, self._inference)
            except GpuUnavailable as error:
                note = f"engines were left alone: {error}"
                return True

        if self._engines is None:
            note = "engines were left alone: no backend here builds any"
        return Tidied(self._store.collect_garbage(is_useful), note)


def _planned(wanted: Download) -> tuple[Source, NewModel]:
    """Where the model comes from, and what it will be in the store; its file is still to come."""
    if wanted.url is None:
        found = catalogue.find(wanted.name)
        return found.source, NewModel(
            Path(),
            wanted.name,
            version=wanted.version or found.version,
            entry={**found.entry, **(wanted.entry or {})},
            origin="fetched",
            source=found.homepage,
            licence=found.licence,
            sha256=found.sha256,
        )
    if wanted.sha256 is None:
        raise ModelError(
            f"{wanted.name}: give the file's sha256 too; without it nothing is downloaded",
            code="fetch_forbidden",
        )
    return Source(url=wanted.url), NewModel(
        Path(),
        wanted.name,
        version=wanted.version,
        entry=wanted.entry or {},
        origin="fetched",
        source=wanted.url,
        sha256=wanted.sha256,
    )
