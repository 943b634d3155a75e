"""Public models that can be fetched by name, and what the agent must be told for each to work.

A list that comes with the package; it asks nobody, and says nothing of what is on this machine.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, Struct

from edge_agent import plugins
from edge_agent._compat import tomllib
from edge_agent.errors import ModelError
from edge_agent.models.fetch import Source

_FILE = Path(__file__).with_name("catalogue.toml")

CatalogueName = Annotated[str, Meta(pattern=r"^[a-z0-9][a-z0-9._-]{0,63}\Z")]


class CatalogueEntry(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A model. `licence` (SPDX) is that of its weights, as `licence_source` says; `entry` holds the keys of
    `[models.<name>]` besides `path` and `version`; `needs` names another model that is of use with it alone."""

    description: str
    task: Literal["detect", "classify", "segment", "pose", "depth", "embed"]
    version: str
    licence: Literal["Apache-2.0", "MIT", "BSD-2-Clause", "BSD-3-Clause"]
    licence_source: str
    homepage: str
    sha256: Annotated[str, Meta(pattern=r"^[0-9a-f]{64}\Z")]
    size_bytes: Annotated[int, Meta(gt=0)]
    source: Source
    entry: dict[str, Any]
    needs: CatalogueName | None = None


@cache
def catalogue() -> Mapping[str, CatalogueEntry]:
    """All of them by name."""
    raw = tomllib.loads(_FILE.read_text(encoding="utf-8"))
    return MappingProxyType(msgspec.convert(raw, dict[CatalogueName, CatalogueEntry]))


def find(name: str) -> CatalogueEntry:
    """The model of this name. Raises `ModelError` (`model_not_found`) with the nearest name there is."""
    known = catalogue()
    if name not in known:
        raise ModelError(
            f"the catalogue has no model {name!r}{plugins.nearest(name, list(known))}", code="model_not_found"
        )
    return known[name]
