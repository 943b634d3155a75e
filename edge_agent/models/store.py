"""Which models there are: those that come with the package and those of the config."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from edge_agent import plugins
from edge_agent.config import ModelOptions
from edge_agent.errors import ModelError

_HERE = Path(__file__).parent
_BUNDLED = _HERE / "zoo"
_PRESETS = _HERE / "labels"


@dataclass(frozen=True, slots=True)
class StoredModel:
    """A model's file and what its entry says about it; `size_bytes` is None where there is no file."""

    name: str
    origin: Literal["bundled", "config"]
    options: ModelOptions
    size_bytes: int | None

    @property
    def path(self) -> Path:
        return Path(self.options.path)

    def labels(self) -> Sequence[str] | None:
        """The entry's labels: a list, a preset's name (`coco80`) or a file with one a line."""
        given = self.options.labels
        if given is None or isinstance(given, list):
            return given
        presets = {path.stem: path for path in sorted(_PRESETS.glob("*.txt"))}
        path = presets.get(given, Path(given))
        try:
            return [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        except FileNotFoundError as error:
            raise ModelError(f"labels {given!r} is neither a file nor one of {', '.join(presets)}") from error
        except (OSError, UnicodeDecodeError) as error:
            raise ModelError(f"labels {given!r} cannot be read: {error}") from error


class ModelStore:
    """Models by name; an entry of the config hides a bundled model of the same name. Reads the disk."""

    def __init__(self, entries: Mapping[str, ModelOptions]) -> None:
        bundled = {path.stem: ModelOptions(path=str(path)) for path in sorted(_BUNDLED.glob("*.onnx"))}
        self._models = {name: _stored(name, "bundled", options) for name, options in bundled.items()}
        self._models |= {name: _stored(name, "config", options) for name, options in entries.items()}

    def __iter__(self) -> Iterator[StoredModel]:
        return iter(self._models.values())

    def get(self, name: str) -> StoredModel:
        """The model of this name. Raises `ModelError` (`model_not_found`), also where its file is missing."""
        model = self._models.get(name)
        if model is None:
            raise ModelError(
                f"there is no model {name!r}{plugins.nearest(name, list(self._models))}", code="model_not_found"
            )
        try:
            model.path.open("rb").close()
        except OSError as error:
            raise ModelError(f"{name}: its file {model.path}: {error.strerror}", code="model_not_found") from error
        return model


def _stored(name: str, origin: Literal["bundled", "config"], options: ModelOptions) -> StoredModel:
    try:
        size = Path(options.path).stat().st_size
    except OSError:
        size = None
    return StoredModel(name, origin, options, size)
