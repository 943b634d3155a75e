"""The list of public models: what it says is of use, and is the truth as far as can be told without the network."""

from __future__ import annotations

import re

import msgspec
import pytest

from edge_agent import plugins
from edge_agent.config import ModelOptions
from edge_agent.errors import ModelError
from edge_agent.models.catalogue import CatalogueEntry, catalogue, find
from edge_agent.models.store import ModelStore

NAMES = list(catalogue())


def test_the_catalogue_has_models_by_name() -> None:
    assert NAMES
    for name in NAMES:
        assert re.fullmatch(r"[a-z0-9][a-z0-9._-]{0,63}", name)
        assert find(name) is catalogue()[name]


def test_an_unknown_name_is_told_with_the_nearest() -> None:
    with pytest.raises(ModelError, match=r"no model 'yolox-nan'; did you mean 'yolox-nano'\?") as caught:
        find("yolox-nan")
    assert caught.value.code == "model_not_found"
    with pytest.raises(ModelError, match=f"known: {', '.join(NAMES)}"):
        find("?")


def test_the_catalogue_cannot_be_changed_by_a_reader() -> None:
    with pytest.raises(TypeError):
        catalogue()["mine"] = find(NAMES[0])  # type: ignore[index]


@pytest.mark.parametrize("name", NAMES)
def test_an_entry_is_one_of_the_configurations(name: str) -> None:
    entry = find(name)
    assert not {"path", "version"} & set(entry.entry)
    options = msgspec.convert({**entry.entry, "path": f"{name}.onnx", "version": entry.version}, ModelOptions)
    family = plugins.load("families", options.family)
    msgspec.convert(options.options, family.Options)
    stored = next(model for model in ModelStore({name: options}) if model.name == name)
    labels = stored.labels()
    assert labels is None or len(labels) > 1


@pytest.mark.parametrize("name", NAMES)
def test_an_entry_says_where_it_comes_from_for_good(name: str) -> None:
    entry = find(name)
    assert entry.description.endswith(".")
    assert entry.licence_source
    assert entry.homepage.startswith("https://")
    if (wheel := entry.source.pypi) is not None:
        assert wheel.package == re.sub(r"[-_.]+", "-", wheel.package).lower(), "as a simple index spells it (PEP 503)"
        assert wheel.file.startswith(f"{wheel.package.replace('-', '_')}-")
        assert wheel.file.endswith("-none-any.whl")
        assert wheel.member.endswith(".onnx")
    assert entry.needs is None or entry.needs in NAMES


@pytest.mark.parametrize(
    "change",
    [
        {"sha256": "abc"},
        {"licence": "AGPL-3.0-only"},
        {"size_bytes": 0},
        {"source": {}},
        {"source": {"url": "https://a/", "pypi": {"package": "a", "version": "1", "member": "m"}}},
        {"surplus": 1},
    ],
)
def test_an_entry_that_makes_no_sense_is_not_read(change: dict[str, object]) -> None:
    raw = {**msgspec.to_builtins(find(NAMES[0])), **change}
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert(raw, CatalogueEntry)
