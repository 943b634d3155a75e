"""The store of models: what it takes and keeps, what it refuses, and what is left of it after a kill."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import itertools
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import msgspec
import pytest
from hypothesis import HealthCheck, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from structlog.testing import capture_logs

from edge_agent.config import InferenceOptions, ModelOptions
from edge_agent.errors import ModelError
from edge_agent.messages import InferenceLatency, MeasuredOn, Measurement, MemoryUse, Throughput
from edge_agent.models.registry import EngineRecord
from edge_agent.models.store import ModelStore, NewModel, StoredModel
from tests.rigs import ROOT

pytestmark = pytest.mark.slow

INFERENCE = InferenceOptions()


# A network of one node, by its bytes: onnx is not needed where only onnxruntime is


def varint(value: int) -> bytes:
    return bytes([value]) if value < 128 else bytes([value & 127 | 128]) + varint(value >> 7)


def message(*fields: tuple[int, int | str | bytes]) -> bytes:
    parts = []
    for number, value in fields:
        if isinstance(value, int):
            parts.append(varint(number << 3) + varint(value))
        else:
            content = value.encode() if isinstance(value, str) else value
            parts.append(varint(number << 3 | 2) + varint(len(content)) + content)
    return b"".join(parts)


def tensor_info(name: str) -> bytes:
    shape = message(*((1, message((1, size))) for size in (1, 3, 8, 8)))
    return message((1, name), (2, message((1, message((1, 1), (2, shape))))))


def network(mark: object = "", *, weights_in: str | None = None, weight: bytes = b"\0\0\0\0") -> bytes:
    """ONNX of y = x + w. `mark` makes it another file; `weights_in`: the file beside it that holds w."""
    tensor: list[tuple[int, int | str | bytes]] = [(1, 1), (2, 1), (8, "w")]
    if weights_in is None:
        tensor.append((9, weight))
    else:
        tensor += [(13, message((1, "location"), (2, weights_in))), (14, 1)]
    node = message((1, "x"), (1, "w"), (2, "y"), (3, "add"), (4, "Add"))
    graph = message((1, node), (2, "tiny"), (5, message(*tensor)), (11, tensor_info("x")), (12, tensor_info("y")))
    return message((1, 8), (2, f"tests {mark}"), (7, graph), (8, message((1, ""), (2, 17))))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "store"


@pytest.fixture
def store(folder: Path) -> ModelStore:
    return ModelStore({}, folder)


@pytest.fixture
def inbox(tmp_path: Path) -> Path:
    path = tmp_path / "inbox"
    path.mkdir()
    return path


Given = Callable[..., StoredModel]


@pytest.fixture
def given(store: ModelStore, inbox: Path) -> Given:
    """Registers a small network; `mark` makes it another one."""

    def register(name: str = "m", mark: object = "", **said: Any) -> StoredModel:
        file = inbox / "net.onnx"
        file.write_bytes(network(mark))
        return store.register(NewModel(file, name, **{"entry": {"family": "raw"}, **said}), INFERENCE)

    return register


def refused(store: ModelStore, new: NewModel, code: str = "model_rejected") -> str:
    """The sentence; nothing is kept."""
    before = tree(store.folder)
    with pytest.raises(ModelError) as caught:
        store.register(new, INFERENCE)
    assert caught.value.code == code, caught.value
    assert tree(store.folder) == before
    return str(caught.value)


def tree(folder: Path | None) -> dict[str, bytes | None]:
    """Everything in the store's folder but its lock."""
    assert folder is not None
    paths = sorted(folder.rglob("*")) if folder.exists() else []
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in paths
        if path.name != ".lock"
    }


def ids(store: ModelStore) -> list[str]:
    return [entry.id for entry in store.registry().models if entry.is_kept]


def reopened(folder: Path) -> ModelStore:
    return ModelStore({}, folder)


def states(store: ModelStore) -> set[str]:
    return {verdict.state for model in store for verdict in store.verify(model)}


def edit(path: Path, change: Callable[[Any], None]) -> None:
    said = json.loads(path.read_text())
    change(said)
    path.write_text(json.dumps(said))


# Registering


def test_a_model_is_copied_and_looked_at(store: ModelStore, folder: Path, inbox: Path, given: Given) -> None:
    model = given(source="a drawer", licence="MIT")
    assert (model.id, model.name, model.options.version, model.is_kept) == ("m@1", "m", "1", True)
    assert model.path == folder / "m" / "1" / "model.onnx"
    assert model.path.read_bytes() == (inbox / "net.onnx").read_bytes()
    entry = store.registry().models[0]
    assert (entry.origin, entry.source, entry.licence) == ("registered", "a drawer", "MIT")
    assert (entry.task, entry.family) == ("raw", "raw")
    assert entry.inputs is not None
    assert [(one.name, one.shape, one.dtype) for one in entry.inputs] == [("x", [1, 3, 8, 8], "float32")]
    assert entry.sha256 == hashlib.sha256(model.path.read_bytes()).hexdigest()
    assert model.size_bytes == entry.size_bytes == model.path.stat().st_size
    assert json.loads((folder / "registry.json").read_text())["schema"] == 1
    assert not list(folder.glob(".staging-*"))
    assert states(store) == {"ok"}


def test_the_same_again_changes_nothing(folder: Path, given: Given) -> None:
    first = given(entry={"family": "raw", "dequantize": {"y": (0.5, 3)}})
    before = tree(folder)
    assert given(entry={"family": "raw", "dequantize": {"y": (0.5, 3)}}).id == first.id
    assert given(version="1", entry={"family": "raw", "dequantize": {"y": [0.5, 3]}}).id == first.id
    assert tree(folder) == before


def test_another_file_or_entry_is_the_next_version(store: ModelStore, given: Given) -> None:
    assert given().id == "m@1"
    assert given(mark=2).id == "m@2"
    assert given(mark=2, entry={"family": "raw", "max_latency_ms": 9.0}).id == "m@3"
    assert given().id == "m@4"  # the first came back, and is the last again
    assert given(version="2024-05").id == "m@2024-05"
    assert given(mark=3).id == "m@5"
    assert given(mark=4, version="41").id == "m@41"
    assert given(mark=5).id == "m@42"
    assert store.get("m").id == "m@42"
    assert given("other").id == "other@1"


def test_a_version_is_given_once(store: ModelStore, given: Given, inbox: Path) -> None:
    given(version="v1")
    (inbox / "other.onnx").write_bytes(network("other"))
    other = NewModel(inbox / "other.onnx", "m", version="v1", entry={"family": "raw"})
    assert "leave the version out" in refused(store, other, "model_exists")


def test_the_longest_number_has_a_next_version(given: Given, folder: Path) -> None:
    for version in ("9" * 63, "9" * 64):
        given(mark=version, version=version)
    assert given(mark="next").id == f"m@1{'0' * 63}"
    assert len(ids(reopened(folder))) == 3


@pytest.mark.parametrize(
    "name",
    [
        *("", "../x", "..", ".", "a/b", "/etc", ".hidden", "-x", "_x", "Upper", "with space", "a\0b", "a\nb", "a\n"),
        *("a" * 65, "ü", "a\\b", "a@1", "²"),
    ],
)
def test_names_and_versions_that_are_no_folder_are_refused(store: ModelStore, inbox: Path, name: str) -> None:
    file = inbox / "net.onnx"
    file.write_bytes(network())
    assert refused(store, NewModel(file, name)).startswith("name ")
    assert refused(store, NewModel(file, "m", version=name)).startswith("version ")
    assert [path.name for path in inbox.parent.iterdir()] == ["inbox"]


@pytest.mark.parametrize("name", ["uploads", "demo-320", "registry.json", "registry.json.bak"])
def test_names_that_are_taken_are_refused(store: ModelStore, inbox: Path, name: str) -> None:
    (inbox / "net.onnx").write_bytes(network())
    assert "give it another" in refused(store, NewModel(inbox / "net.onnx", name), "model_exists")


@pytest.mark.parametrize("name", ["a", "0", "a" * 64, "a..b", "entry.json", "model.onnx", "engines", "x.bak"])
def test_odd_names_that_are_folders_will_do(store: ModelStore, given: Given, name: str) -> None:
    assert given(name, version=name).id == f"{name}@{name}"
    assert store.remove(name) == f"{name}@{name}"
    assert tree(store.folder).keys() <= {"registry.json", "registry.json.bak"}


@pytest.mark.parametrize(
    ("entry", "sentence"),
    [
        ({"familly": "raw"}, "familly"),
        ({"path": "/etc/passwd"}, "leave path and version out"),
        ({"version": "3"}, "leave path and version out"),
        ({"preprocess": {"size": "big"}}, "preprocess"),
        ({"max_latency_ms": float("nan"), "shapes": None}, "entry:"),
        ({"family": "yolo9000"}, "yolo9000"),
        ({"options": {"inlin": 3}, "family": "raw"}, "inlin"),
    ],
)
def test_an_entry_that_does_not_fit_is_refused_by_its_key(
    store: ModelStore, inbox: Path, entry: dict[str, Any], sentence: str
) -> None:
    (inbox / "net.onnx").write_bytes(network())
    assert sentence in refused(store, NewModel(inbox / "net.onnx", "m", entry=entry))


def test_what_json_cannot_say_does_not_make_a_registry_that_cannot_be_read(store: ModelStore, inbox: Path) -> None:
    (inbox / "net.onnx").write_bytes(network())
    entry = {"family": "raw", "dequantize": {"y": [float("inf"), 0.0]}}
    assert "dequantize" in refused(store, NewModel(inbox / "net.onnx", "m", entry=entry))


# Its labels and its weights


def test_labels_are_a_list_a_preset_or_a_file_beside_it(
    store: ModelStore, folder: Path, inbox: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edge_agent.models.store.OnnxEngine.unavailable", lambda options: "not looked at")
    (inbox / "net.onnx").write_bytes(network())
    (inbox / "names.txt").write_text("cat\n\ndog\n")
    listed = store.register(NewModel(inbox / "net.onnx", "a", entry={"labels": ["one", "two"]}), INFERENCE)
    preset = store.register(NewModel(inbox / "net.onnx", "b", entry={"labels": "coco80"}), INFERENCE)
    beside = store.register(NewModel(inbox / "net.onnx", "c", entry={"labels": "names.txt"}), INFERENCE)
    (inbox / "names.txt").unlink()
    assert listed.labels() == ["one", "two"]
    assert len(preset.labels() or ()) == 80
    assert beside.labels() == ["cat", "dog"]
    assert (folder / "c" / "1" / "labels.txt").is_file()
    assert not (folder / "a" / "1" / "labels.txt").exists()
    (folder / "c" / "1" / "labels.txt").write_text("cat\ncat\n\n")
    assert [one.state for one in store.verify(beside)] == ["ok", "damaged"]


@pytest.mark.parametrize(
    "labels", ["../secret.txt", "/etc/hostname", "sub/names.txt", "link.txt", "none.txt", "..", "", "a\0b", "x" * 300]
)
def test_labels_elsewhere_are_refused(store: ModelStore, inbox: Path, labels: str) -> None:
    (inbox / "net.onnx").write_bytes(network())
    (inbox.parent / "secret.txt").write_text("cat")
    (inbox / "sub").mkdir()
    (inbox / "sub" / "names.txt").write_text("cat")
    (inbox / "link.txt").symlink_to(inbox.parent / "secret.txt")
    sentence = refused(store, NewModel(inbox / "net.onnx", "m", entry={"labels": labels}))
    assert "give a list, a file beside the model, or one of" in sentence


def test_weights_beside_the_file_come_along(store: ModelStore, folder: Path, inbox: Path) -> None:
    (inbox / "net.onnx").write_bytes(network(weights_in="net.weights"))
    (inbox / "net.weights").write_bytes(b"\0\0\x80?")
    model = store.register(NewModel(inbox / "net.onnx", "m", entry={"family": "raw"}), INFERENCE)
    shutil.rmtree(inbox)
    assert model.entry is not None
    assert set(model.entry.files) == {"model.onnx", "net.weights"}
    assert model.size_bytes == model.path.stat().st_size + 4
    (folder / "m" / "1" / "net.weights").write_bytes(b"\0\0\x80@")
    assert {one.file: one.state for one in store.verify(model)} == {"model.onnx": "ok", "net.weights": "damaged"}


@pytest.mark.parametrize(
    "location", ["../w", "/etc/passwd", "sub/w", "link", "none", "folder", ".", "..", "", "a\\b", "a\0b", "x" * 300]
)
def test_weights_elsewhere_are_refused(store: ModelStore, inbox: Path, location: str) -> None:
    for path in (inbox / "w", inbox.parent / "w", inbox / "sub" / "w"):
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"1234")
    (inbox / "folder").mkdir()
    (inbox / "link").symlink_to(inbox / "w")
    (inbox / "net.onnx").write_bytes(network(weights_in=location))
    refused(store, NewModel(inbox / "net.onnx", "m"), "external_data")


@pytest.mark.parametrize("location", ["model.onnx", "labels.txt", "entry.json", "engines"])
def test_weights_do_not_take_the_place_of_the_stores_own_files(store: ModelStore, inbox: Path, location: str) -> None:
    (inbox / "net.onnx").write_bytes(network(weights_in=location))
    (inbox / location).write_bytes(b"1234")
    (inbox / "names.txt").write_text("cat")
    for entry in ({}, {"labels": "names.txt"}):
        assert "rename it" in refused(store, NewModel(inbox / "net.onnx", "m", entry=entry))


# Files that are no model


def test_another_checksum_is_told(store: ModelStore, inbox: Path, given: Given) -> None:
    file = inbox / "net.onnx"
    file.write_bytes(network())
    refused(store, NewModel(file, "m", sha256="0" * 64), "checksum_mismatch")
    right = hashlib.sha256(file.read_bytes()).hexdigest().upper()
    assert given(sha256=right).id == "m@1"


@pytest.mark.parametrize(
    ("content", "code"),
    [
        (network(weight=b"\0\0\xc0\x7f"), "model_not_finite"),
        (network()[:-20], "model_truncated"),
        (b"", "model_truncated"),
        (b"no model", "model_rejected"),
        (b"\x00" * 100, "model_rejected"),
    ],
)
def test_a_file_that_is_no_sound_model_is_refused(store: ModelStore, inbox: Path, content: bytes, code: str) -> None:
    (inbox / "net.onnx").write_bytes(content)
    assert "net.onnx" in refused(store, NewModel(inbox / "net.onnx", "m", entry={"family": "raw"}), code) or code == (
        "model_not_finite"
    )


def test_only_onnx_files_that_are_there_and_are_files_come_in(store: ModelStore, inbox: Path) -> None:
    (inbox / "net.engine").write_bytes(network())
    assert "only ONNX" in refused(store, NewModel(inbox / "net.engine", "m"))
    (inbox / "folder.onnx").mkdir()
    os.mkfifo(inbox / "pipe.onnx")
    for name in ("none.onnx", "folder.onnx", "pipe.onnx"):
        assert name in refused(store, NewModel(inbox / name, "m"), "model_not_found")


def test_a_file_that_may_not_be_read_is_told(store: ModelStore, inbox: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (inbox / "net.onnx").write_bytes(network())
    opened = Path.open

    def forbidding(path: Path, *args: Any, **more: Any) -> Any:
        if path == inbox / "net.onnx":
            raise PermissionError(errno.EACCES, "Permission denied")
        return opened(path, *args, **more)

    monkeypatch.setattr(Path, "open", forbidding)  # for root, chmod forbids nothing
    sentence = refused(store, NewModel(inbox / "net.onnx", "m"), "model_not_found")
    assert sentence.endswith("net.onnx: Permission denied")


# Finding


def test_the_config_comes_before_the_store_and_that_before_the_package(folder: Path, inbox: Path, given: Given) -> None:
    given("m"), given("m", mark=2), given("k")
    (inbox / "mine.onnx").write_bytes(network("mine"))
    mine = ModelOptions(path=str(inbox / "mine.onnx"))
    store = ModelStore({"m": mine, "demo-320": mine}, folder)
    assert (store.get("m").origin, store.get("m").path) == ("config", inbox / "mine.onnx")
    assert store.get("demo-320").origin == "config"
    assert store.get("demo-160").origin == "bundled"
    assert (store.get("m@1").origin, store.get("m@1").id) == ("registered", "m@1")
    assert store.get("m@2").options.version == "2"
    assert store.get("k").id == "k@1"
    assert {model.id for model in store} >= {"m", "m@1", "m@2", "k@1", "demo-320", "demo-160"}
    with pytest.raises(ModelError, match=r"there is no model 'm@3'; did you mean") as caught:
        store.get("m@3")
    assert caught.value.code == "model_not_found"


def test_a_model_whose_file_is_gone_is_not_found(store: ModelStore, given: Given) -> None:
    given().path.unlink()
    with pytest.raises(ModelError, match="No such file") as caught:
        store.get("m")
    assert caught.value.code == "model_not_found"


def test_without_a_folder_there_are_the_bundled_ones() -> None:
    store = ModelStore({})
    assert store.get("demo-320").is_kept is False
    assert (store.signature(), store.registry().models) == (None, [])
    store.choose("demo-320", "demo-320")
    assert store.preferred("demo-320") == ["demo-320"]


def test_the_signature_tells_of_changes_by_others(store: ModelStore, folder: Path, given: Given) -> None:
    seen = [store.signature()]
    for change in (given, lambda: reopened(folder).choose("m@1", "m"), lambda: given(mark=2)):
        change()
        seen.append(store.signature())
    given(mark=2)
    assert store.signature() == seen[-1]
    assert len(set(seen)) == 4
    assert store.registry().active is not None


def test_a_relative_folder_will_do(tmp_path: Path, inbox: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (inbox / "net.onnx").write_bytes(network())
    store = ModelStore({}, Path("store"))
    model = store.register(NewModel(Path("inbox/net.onnx"), "m", entry={"family": "raw"}), INFERENCE)
    engine_of(model, "old")
    assert store.collect_garbage(lambda model, path: False) == ["m/1/engines/old.engine"]
    assert store.remove("m") == "m@1"


def test_an_entry_of_another_release_spoils_no_other(store: ModelStore, folder: Path, given: Given) -> None:
    given("m"), given("n")
    edit(folder / "registry.json", lambda said: said["models"][0]["entry"].update(of_tomorrow=1))
    with capture_logs() as logs:
        assert {model.id for model in store if model.is_kept} == {"n@1"}
    assert [line["event"] for line in logs] == ["model.unusable"]
    with pytest.raises(ModelError, match="of_tomorrow"):
        store.get("m")
    assert store.remove("m") == "m@1"


# Removing


def test_a_removed_model_goes_with_its_engines(store: ModelStore, folder: Path, given: Given) -> None:
    model = given()
    given(mark=2)
    engine_of(model, "a")
    assert store.remove("m@1") == "m@1"
    assert not (folder / "m" / "1").exists()
    assert ids(store) == ["m@2"]
    assert store.remove("m") == "m@2"
    assert tree(folder).keys() == {"registry.json", "registry.json.bak"}


def test_what_runs_or_ran_before_it_is_not_removed(store: ModelStore, given: Given) -> None:
    for mark in range(4):
        given(mark=mark)
    store.choose("m@1", "m")
    store.choose("m@2", "m")
    for name, role in (("m@1", "fallback"), ("m@2", "active"), ("m@3", "in use"), ("m@4", "in use")):
        with pytest.raises(ModelError, match=f"{name} is {role}; activate another one first") as caught:
            store.remove(name, in_use=["m@3", "m"])
        assert caught.value.code == "model_in_use"
    assert store.remove("m@3") == "m@3"
    assert states(store) == {"ok"}


def test_a_remove_has_to_say_which(folder: Path, given: Given) -> None:
    given("m"), given("m", mark=2), given("k")
    store = ModelStore({"k": ModelOptions(path=str(folder / "gone.onnx"))}, folder)
    for name, sentence, code in (
        ("m", "m has the versions 1, 2; say which: m@1", "model_rejected"),
        ("demo-320", "demo-320 is part of the package", "model_rejected"),
        ("k", "k is of the configuration", "model_rejected"),
        ("m@3", "there is no model 'm@3'", "model_not_found"),
        ("../m", "there is no model '../m'", "model_not_found"),
    ):
        with pytest.raises(ModelError, match=sentence) as caught:
            store.remove(name)
        assert caught.value.code == code
    assert store.remove("k@1") == "k@1"


def test_a_model_whose_files_are_lost_can_be_removed(store: ModelStore, folder: Path, given: Given) -> None:
    given()
    shutil.rmtree(folder / "m")
    assert store.remove("m") == "m@1"
    assert ids(store) == []


# Verifying


@pytest.mark.parametrize(
    ("harm", "state", "code"),
    [
        (lambda path: path.unlink(), "missing", "model_not_found"),
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), "truncated", "model_truncated"),
        (lambda path: path.write_bytes(b"X" + path.read_bytes()[1:]), "damaged", "model_damaged"),
        (lambda path: path.write_bytes(path.read_bytes() + b"X"), "damaged", "model_damaged"),
    ],
)
def test_harm_is_found(store: ModelStore, given: Given, harm: Callable[[Path], None], state: str, code: str) -> None:
    model = given()
    store.require_sound(model)
    harm(model.path)
    assert [(one.model, one.file, one.state) for one in store.verify(model)] == [("m@1", "model.onnx", state)]
    with pytest.raises(ModelError, match="register it again") as caught:
        store.require_sound(model)
    assert caught.value.code == code


@pytest.mark.parametrize("part", ["m/1/model.onnx", "m/1", "m"])
def test_a_link_in_the_store_is_no_sound_model_and_leads_nowhere(
    store: ModelStore, folder: Path, tmp_path: Path, given: Given, part: str
) -> None:
    model = given()
    elsewhere = tmp_path / "elsewhere"
    (folder / part).rename(elsewhere)
    (folder / part).symlink_to(elsewhere)
    assert [one.state for one in store.verify(model)] == ["damaged"]
    before = sorted(elsewhere.rglob("*"))
    forget(folder)
    store = reopened(folder)
    if part != "m/1/model.onnx":
        assert ids(store) == []
    assert store.collect_garbage(lambda model, path: True) == []
    assert elsewhere.exists()
    assert sorted(elsewhere.rglob("*")) == before


def test_nothing_is_registered_through_a_link(store: ModelStore, folder: Path, tmp_path: Path, inbox: Path) -> None:
    (tmp_path / "elsewhere" / "1").mkdir(parents=True)
    folder.mkdir()
    (folder / "m").symlink_to(tmp_path / "elsewhere")
    (inbox / "net.onnx").write_bytes(network())
    with pytest.raises(ModelError, match="is a link"):
        store.register(NewModel(inbox / "net.onnx", "m", entry={"family": "raw"}), INFERENCE)
    assert list((tmp_path / "elsewhere").iterdir()) == [tmp_path / "elsewhere" / "1"]
    assert ids(store) == []


@pytest.mark.parametrize("part", ["m/1", "m"])
def test_a_removed_link_takes_nothing_else_along(
    store: ModelStore, folder: Path, tmp_path: Path, given: Given, part: str
) -> None:
    given()
    (folder / part).rename(tmp_path / "elsewhere")
    (folder / part).symlink_to(tmp_path / "elsewhere")
    store.remove("m")
    assert len(list((tmp_path / "elsewhere").rglob("model.onnx"))) == 1
    assert ids(store) == []


def test_a_file_whose_name_is_no_text_can_be_registered(store: ModelStore, folder: Path, inbox: Path) -> None:
    file = inbox / os.fsdecode(b"\xff.onnx")
    file.write_bytes(network())
    assert store.register(NewModel(file, "m", entry={"family": "raw"}), INFERENCE).id == "m@1"
    assert ids(reopened(folder)) == ["m@1"]


def test_a_file_of_the_configs_may_change(folder: Path, inbox: Path) -> None:
    (inbox / "mine.onnx").write_bytes(network())
    store = ModelStore({"mine": ModelOptions(path=str(inbox / "mine.onnx"))}, folder)
    assert store.verify(store.get("mine")) == []
    store.record(store.get("mine"), measured(), [])
    assert [one.state for one in store.verify(store.get("mine"))] == ["ok"]
    (inbox / "mine.onnx").write_bytes(network("new"))
    assert [one.state for one in store.verify(store.get("mine"))] == ["damaged"]
    store.require_sound(store.get("mine"))


# What was measured


def measured(p50: float = 1.0, **where: Any) -> Measurement:
    on = {"device": "d", "backend": "onnx", "runtime": "r", "precision": None, "size": (8, 8), "power_mode": None}
    return Measurement(
        "2026-01-01T00:00:00.000Z",
        MeasuredOn(**{**on, **where}),
        InferenceLatency(p50, p50, p50, 10, 1),
        MemoryUse(None, None, 1.0, 2.0),
    )


def test_a_measurement_replaces_the_one_made_in_the_same_way(store: ModelStore, folder: Path, given: Given) -> None:
    model = given()
    record = EngineRecord("a.engine", "fp16", "TRT", "GPU", 3, "now", 1.0, True)
    store.record(model, measured(1.0), [record])
    store.record(model, measured(2.0, size=(16, 16)), [record])
    store.record(model, measured(3.0), [])
    entry = reopened(folder).get("m").entry
    assert entry is not None
    assert [one.latency_ms.p50 for one in entry.measured] == [3.0, 2.0]
    assert entry.engines == []
    for side in range(20):
        store.record(model, measured(float(side), size=(side, side)), [])
    entry = reopened(folder).get("m").entry
    assert entry is not None
    assert [one.latency_ms.p50 for one in entry.measured] == [float(side) for side in range(19, 11, -1)]


def test_throughput_stays_until_it_is_measured_again(store: ModelStore) -> None:
    """Bringing a model up measures latency and memory alone."""
    demo = store.get("demo-160")
    most = Throughput(100.0, batch=8, in_flight=1, pictures=50, seconds=0.5)
    store.record(demo, msgspec.structs.replace(measured(), throughput=most), [])
    store.record(demo, measured(2.0), [])
    store.record(demo, measured(3.0, size=(16, 16)), [])
    entry = store.get("demo-160").entry
    assert entry is not None
    assert [(one.latency_ms.p50, one.throughput) for one in entry.measured] == [(3.0, None), (2.0, most)]


def test_a_bundled_model_gets_an_entry_when_it_is_measured(store: ModelStore, folder: Path) -> None:
    store.record(store.get("demo-160"), measured(), [])
    entry = reopened(folder).get("demo-160").entry
    assert entry is not None
    assert (entry.id, entry.origin, len(entry.measured)) == ("demo-160", "bundled", 1)
    assert ids(store) == []
    store.collect_garbage(lambda model, path: False)
    assert store.get("demo-160").path.is_file()


def test_another_file_under_the_same_name_begins_anew(folder: Path, inbox: Path) -> None:
    (inbox / "mine.onnx").write_bytes(network())
    store = ModelStore({"mine": ModelOptions(path=str(inbox / "mine.onnx"))}, folder)
    for size in ((8, 8), (9, 9)):
        store.record(store.get("mine"), measured(size=size), [])
    (inbox / "mine.onnx").write_bytes(network("new"))
    store.record(store.get("mine"), measured(7.0), [])
    entry = store.get("mine").entry
    assert entry is not None
    assert [one.latency_ms.p50 for one in entry.measured] == [7.0]
    assert entry.sha256 == hashlib.sha256(network("new")).hexdigest()


def test_what_is_measured_of_a_removed_model_is_no_news_of_its_successor(store: ModelStore, given: Given) -> None:
    old = given()
    store.remove("m")
    store.record(old, measured(), [])
    assert ids(store) == []
    new = given(mark="another")
    assert new.id == old.id
    store.record(old, measured(), [])
    assert store.registry().models[0].measured == []


# What runs


def test_the_fallback_is_the_one_before(store: ModelStore, folder: Path, given: Given) -> None:
    given("a"), given("b"), given("c")
    assert store.preferred("demo-320") == ["demo-320"]
    for name in ("a@1", "b@1", "b@1"):
        store.choose(name, "demo-320")
    assert reopened(folder).preferred("demo-320") == ["b@1", "a@1", "demo-320"]
    store.choose("c@1", "demo-320")
    assert store.preferred("demo-320") == ["c@1", "b@1", "demo-320"]
    store.choose("demo-320", "demo-320")
    assert store.preferred("demo-320") == ["demo-320", "c@1"]


def test_another_configured_model_begins_anew(store: ModelStore, given: Given) -> None:
    given("a"), given("b")
    store.choose("a@1", "demo-320")
    assert store.preferred("b") == ["b"]
    store.choose("b@1", "b")
    assert store.preferred("b") == ["b@1", "b"]
    assert store.preferred("demo-320") == ["a@1", "demo-320"]


def test_a_model_that_is_no_longer_there_is_not_preferred(store: ModelStore, folder: Path, given: Given) -> None:
    given("a"), given("b")
    store.choose("a@1", "gone")
    store.choose("b@1", "gone")
    edit(folder / "registry.json", lambda said: said["models"].pop())
    assert reopened(folder).preferred("gone") == ["a@1", "gone"]


def test_a_model_that_was_removed_on_probation_does_not_become_the_active_one(
    store: ModelStore, folder: Path, given: Given
) -> None:
    given("a"), given("b")
    store.choose("a@1", "a")
    reopened(folder).remove("b")  # by edgectl, which does not know what the agent tries out
    store.choose("b@1", "a")
    assert given("b", mark="another").id == "b@1"
    assert store.preferred("a") == ["a@1", "a"]


# Tidying


def engine_of(model: StoredModel, name: str) -> Path:
    engines = model.path.parent / "engines"
    engines.mkdir(exist_ok=True)
    (engines / f"{name}.json").write_text("{}")
    path = engines / f"{name}.engine"
    path.write_bytes(b"engine")
    return path


def test_gc_removes_the_engines_that_are_of_no_use(store: ModelStore, folder: Path, given: Given) -> None:
    model, other = given("a"), given("b")
    kept, old, older = engine_of(model, "kept"), engine_of(model, "old"), engine_of(other, "older")
    asked: list[tuple[str, Path]] = []

    def is_useful(model: StoredModel, path: Path) -> bool:
        asked.append((model.id, path))
        return path == kept

    assert store.collect_garbage(is_useful) == ["a/1/engines/old.engine", "b/1/engines/older.engine"]
    assert asked == [("a@1", kept), ("a@1", old), ("b@1", older)]
    assert sorted(path.name for path in kept.parent.iterdir()) == ["kept.engine", "kept.json"]
    assert list(older.parent.iterdir()) == []
    assert states(store) == {"ok"}
    assert store.collect_garbage(is_useful) == []


def test_gc_removes_what_killed_processes_left_and_nothing_else(
    store: ModelStore, folder: Path, tmp_path: Path, given: Given
) -> None:
    given("m"), given("m", mark=2)
    shutil.copytree(folder / "m" / "2", tmp_path / "orphan")
    store.remove("m@2")
    (tmp_path / "orphan").rename(folder / "m" / "2")  # as by a kill before the registry was written
    (folder / ".staging-dead" / "model").mkdir(parents=True)
    (folder / ".staging-dead" / ".in-use").touch()
    (folder / ".staging-newborn").mkdir()
    for foreign in ("uploads/model.onnx", "uploads/x/model.onnx", "uploads/x/1/model.onnx", "my/own/model.onnx", "n"):
        (folder / foreign).parent.mkdir(parents=True, exist_ok=True)
        (folder / foreign).write_bytes(b"mine")
    before = tree(folder)
    gone = store.collect_garbage(lambda model, path: True)
    assert sorted(gone) == [".staging-dead", ".staging-newborn", "m/2"]
    assert before.keys() - tree(folder).keys() == {
        *(".staging-dead", ".staging-dead/.in-use", ".staging-dead/model", ".staging-newborn"),
        *("m/2", "m/2/entry.json", "m/2/model.onnx"),
    }
    assert ids(store) == ["m@1"]
    assert states(store) == {"ok"}


def test_gc_leaves_alone_what_another_is_about_to_store(store: ModelStore, folder: Path) -> None:
    with store.scratch() as staging:
        (staging / "model").mkdir()
        (staging / "model" / "model.onnx").write_bytes(network())
        os.utime(staging, (0, 0))  # a download of hours
        assert reopened(folder).collect_garbage(lambda model, path: False) == []
        assert (staging / "model" / "model.onnx").is_file()
    assert list(folder.glob(".staging-*")) == []


def test_gc_in_one_thread_and_registering_in_another_lose_nothing(
    store: ModelStore, folder: Path, given: Given
) -> None:
    done = threading.Event()

    def tidy() -> None:
        while not done.is_set():
            reopened(folder).collect_garbage(lambda model, path: False)

    tidying = threading.Thread(target=tidy)
    tidying.start()
    try:
        for mark in range(12):
            given(mark=mark)
    finally:
        done.set()
        tidying.join()
    assert len(ids(store)) == 12
    assert states(store) == {"ok"}


# Damage


def forget(folder: Path) -> None:
    """Neither the registry nor its backup can be read."""
    for name in ("registry.json", "registry.json.bak"):
        (folder / name).write_bytes(b"\0" * 40)


DAMAGES = (
    b"",
    b"\0" * 400,
    b"{",
    b'{"a":' * 100_000,
    b'{"schema": 1, "models": [{}]}',
    b"\xff\xfe",
    b"[" * 100_000,
    b"[]",
)


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_registry_is_restored_from_its_backup_and_the_folders(
    store: ModelStore, folder: Path, given: Given, damage: bytes
) -> None:
    given("a"), given("b")
    store.choose("a@1", "x")
    given("c")
    (folder / "registry.json").write_bytes(damage)
    with capture_logs() as logs:
        assert ids(store) == ["a@1", "b@1", "c@1"]
    assert [line["event"] for line in logs] == ["registry.damaged", "registry.restored"]
    assert store.preferred("x") == ["a@1", "x"]
    assert store.collect_garbage(lambda model, path: True) == []
    store.remove("b")
    assert ids(reopened(folder)) == ["a@1", "c@1"]
    assert states(store) == {"ok"}
    # The backup was sound and stays so.
    (folder / "registry.json").write_bytes(damage)
    assert ids(reopened(folder)) == ["a@1", "c@1"]


@pytest.mark.parametrize("damage", DAMAGES)
def test_where_the_backup_is_damaged_too_the_folders_tell(
    store: ModelStore, folder: Path, given: Given, damage: bytes
) -> None:
    given("b"), given("a"), given("a", mark=2), given("c")
    store.choose("a@1", "x")
    store.remove("c")
    before = [(entry.id, entry.files, entry.entry, entry.created) for entry in store.registry().models]
    for name in ("registry.json", "registry.json.bak"):
        (folder / name).write_bytes(damage)
    rebuilt = reopened(folder)
    assert [(entry.id, entry.files, entry.entry, entry.created) for entry in rebuilt.registry().models] == before
    assert rebuilt.registry().active is None
    assert states(rebuilt) == {"ok"}
    assert given("c", mark=3).id == "c@1"


def test_a_newer_registry_is_left_alone(store: ModelStore, folder: Path, given: Given) -> None:
    given()
    edit(folder / "registry.json", lambda said: said.update(schema=2))
    before = tree(folder)
    for attempt in (store.registry, lambda: store.get("m"), lambda: store.remove("m"), lambda: given(mark=2)):
        with pytest.raises(ModelError, match=r"written by a newer edge_agent \(schema 2, this one knows 1\)") as caught:
            attempt()
        assert caught.value.code == "registry_damaged"
    assert tree(folder) == before


@pytest.mark.parametrize(
    "astray",
    [
        {"path": "../../elsewhere/model.onnx"},
        {"path": "/etc/model.onnx"},
        {"name": "..", "version": "..", "path": "../../model.onnx"},
        {"name": "uploads", "path": "uploads/1/model.onnx"},
        {"files": {}},
        {"files": {"model.onnx": {"sha256": "", "size_bytes": 0}, "../x": {"sha256": "", "size_bytes": 0}}},
    ],
)
def test_an_entry_that_leads_out_of_its_folder_counts_as_damage(
    store: ModelStore, folder: Path, tmp_path: Path, given: Given, astray: dict[str, Any]
) -> None:
    given(), given(mark=2)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "model.onnx").write_bytes(network())
    (folder / "uploads" / "1").mkdir(parents=True)
    for path in ("registry.json", "registry.json.bak"):
        edit(folder / path, lambda said: said["models"][0].update(astray))
    shutil.copy(folder / "m" / "1" / "entry.json", folder / "uploads" / "1" / "entry.json")
    edit(folder / "uploads" / "1" / "entry.json", lambda said: said.update(astray))
    assert ids(reopened(folder)) == ["m@1", "m@2"]
    assert states(reopened(folder)) == {"ok"}
    assert (tmp_path / "elsewhere" / "model.onnx").is_file()


# A disk that refuses


def test_a_folder_that_cannot_be_written_is_told(tmp_path: Path, inbox: Path) -> None:
    (tmp_path / "file").touch()
    (inbox / "net.onnx").write_bytes(network())
    store = ModelStore({}, tmp_path / "file" / "store")
    for attempt in (
        lambda: store.register(NewModel(inbox / "net.onnx", "m"), INFERENCE),
        lambda: store.choose("demo-320", "demo-320"),
        lambda: store.collect_garbage(lambda model, path: True),
        lambda: store.record(ModelStore({}).get("demo-160"), measured(), []),
    ):
        with pytest.raises(ModelError, match="is it the agent's own folder"):
            attempt()


def test_gc_takes_no_room_on_a_full_disk(store: ModelStore, folder: Path, given: Given) -> None:
    engine_of(given(), "old")
    (folder / ".staging-dead").mkdir()
    with Disk(0, full, lets_go=True, reuses=True).in_place():
        gone = store.collect_garbage(lambda model, path: False)
    assert gone == [".staging-dead", "m/1/engines/old.engine"]


class Killed(BaseException):
    """No handler of the code's may take it for an error: the process is gone."""


@dataclass
class Disk:
    """Counts what is asked of the disk; from the call `at` on, it does nothing any more but raise `error`."""

    at: int | None
    error: Callable[[], BaseException]
    lets_go: bool = False  # a full disk still deletes and renames
    reuses: bool = False  # and opens what is there
    calls: int = 0
    seen: list[str] = field(default_factory=list)

    def step(self, call: str) -> None:
        self.seen.append(call)
        self.calls += 1
        if self.at is not None and self.calls > self.at:
            raise self.error()

    @contextlib.contextmanager
    def in_place(self) -> Iterator[Disk]:
        with pytest.MonkeyPatch.context() as patch:
            taken_away = () if self.lets_go else ("unlink", "rmdir", "rename", "replace")
            made = () if self.reuses else ("mkdir",)
            for name in (*made, *taken_away):
                for owner in (os, Path) if sys.version_info < (3, 11) else (os,):
                    patch.setattr(owner, name, self._stepping(name, getattr(owner, name)))
            patch.setattr(os, "fsync", lambda handle: self.step("fsync"))
            opened = Path.open

            def opening(path: Path, mode: str = "r", *args: Any, **more: Any) -> Any:
                if "w" not in mode:
                    return opened(path, mode, *args, **more)
                if not (self.reuses and path.exists()):
                    self.step("open")
                return Written(opened(path, mode, *args, **more), self)

            patch.setattr(Path, "open", opening)
            yield self

    def _stepping(self, name: str, call: Any) -> Any:
        def stepping(*args: Any, **more: Any) -> Any:
            self.step(name)
            return call(*args, **more)

        return stepping


class Written:
    """A file of which half is written when the disk stops."""

    def __init__(self, file: Any, disk: Disk) -> None:
        self._file, self._disk = file, disk

    def __enter__(self) -> Written:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()

    def fileno(self) -> int:
        number: int = self._file.fileno()
        return number

    def write(self, content: bytes) -> None:
        self._file.write(content[: len(content) // 2])
        self._file.flush()
        self._disk.step("write")
        self._file.write(content[len(content) // 2 :])


def full() -> OSError:
    return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("attempt", ["register", "again", "remove", "choose"])
def test_a_full_disk_leaves_the_store_as_it_was(folder: Path, inbox: Path, attempt: str) -> None:
    store = ModelStore({}, folder)
    (inbox / "net.onnx").write_bytes(network("first"))
    attempts: dict[str, Callable[[], object]] = {
        "register": lambda: store.register(NewModel(inbox / "net.onnx", "new", entry={"family": "raw"}), INFERENCE),
        "again": lambda: store.register(NewModel(inbox / "other.onnx", "m", entry={"family": "raw"}), INFERENCE),
        "remove": lambda: store.remove("m"),
        "choose": lambda: store.choose("m@1", "m"),
    }
    store.register(NewModel(inbox / "net.onnx", "m", entry={"family": "raw"}), INFERENCE)
    (inbox / "other.onnx").write_bytes(network("other"))
    before = tree(folder)
    del before["registry.json"]
    known = store.registry()
    for at in itertools.count():
        shutil.copytree(folder, kept := inbox / f"kept-{at}", ignore=shutil.ignore_patterns(".lock"))
        disk = Disk(at, full, lets_go=True)
        try:
            with disk.in_place():
                attempts[attempt]()
        except ModelError as error:
            assert error.code == "disk_full"
            assert "the disk is full; make room" in str(error)
        if disk.calls <= at:
            break
        assert states(reopened(folder)) <= {"ok"}
        after = reopened(folder).registry()
        if after == known:
            assert {path: was for path, was in tree(folder).items() if not path.startswith("registry.json")} == before
        else:  # it was in place, and only its durability is in doubt
            assert disk.seen[at] == "fsync"
            shutil.rmtree(folder)
            shutil.copytree(kept, folder)
    assert at > 3


# Killed processes, in the small


NAMES = ("a", "b")
MARKS = (0, 1, 2)
Kept = list[tuple[str, str, int]]  # name, version, mark


@dataclass
class Known:
    """What must hold: the kept models in the order in which they came, and what runs."""

    models: Kept = field(default_factory=list)
    active: str | None = None
    fallback: str | None = None

    def copy(self) -> Known:
        return Known(list(self.models), self.active, self.fallback)

    def ids(self) -> list[str]:
        return [f"{name}@{version}" for name, version, _ in self.models]

    def register(self, name: str, mark: int, version: str | None) -> str | None:
        others = [one for one in self.models if one[0] == name]
        if version is None:
            if others and others[-1][2] == mark:
                return None
            version = str(max((int(one[1]) for one in others if one[1].isdigit()), default=0) + 1)
        taken = next((one for one in others if one[1] == version), None)
        if taken is not None:
            return None if taken[2] == mark else "model_exists"
        self.models.append((name, version, mark))
        return None

    def remove(self, model_id: str) -> str | None:
        if model_id not in self.ids():
            return "model_not_found"
        if model_id in (self.active, self.fallback):
            return "model_in_use"
        self.models.pop(self.ids().index(model_id))
        return None

    def choose(self, model_id: str) -> str | None:
        if "@" in model_id and model_id not in self.ids():
            return None
        if self.active is not None and self.active != model_id:
            self.fallback = self.active
        self.active = model_id
        return None

    def tidy(self) -> str | None:
        return None


OPERATIONS = st.one_of(
    st.tuples(
        st.just("register"), st.sampled_from(NAMES), st.sampled_from(MARKS), st.sampled_from([None, None, "2", "x"])
    ),
    st.tuples(st.just("remove"), st.builds("{}@{}".format, st.sampled_from(NAMES), st.sampled_from(["1", "2", "x"]))),
    st.tuples(
        st.just("choose"),
        st.one_of(
            st.just("demo-320"), st.builds("{}@{}".format, st.sampled_from(NAMES), st.sampled_from(["1", "2", "x"]))
        ),
    ),
    st.tuples(st.just("tidy")),
)


class StoreMachine(RuleBasedStateMachine):
    @initialize()
    def begin(self) -> None:
        self.root = Path(tempfile.mkdtemp())
        self.folder = self.root / "store"
        self.store = ModelStore({}, self.folder)  # one that stays, and has seen earlier states
        self.known = Known()
        self.unsettled: set[str] = set()  # of which a kill may have left a whole folder
        for mark in MARKS:
            (self.root / f"{mark}.onnx").write_bytes(network(mark))

    def teardown(self) -> None:
        if hasattr(self, "root"):
            shutil.rmtree(self.root)

    def run(self, store: ModelStore, operation: Any) -> None:
        match operation:
            case ("register", name, mark, version):
                new = NewModel(self.root / f"{mark}.onnx", name, version=version, entry={"family": "raw"})
                store.register(new, INFERENCE)
            case ("remove", model_id):
                store.remove(model_id)
            case ("choose", model_id):
                store.choose(model_id, "demo-320")
            case _:
                store.collect_garbage(lambda model, path: True)

    def expect(self, operation: Any) -> tuple[Known, str | None]:
        known = self.known.copy()
        return known, getattr(known, operation[0])(*operation[1:])

    @rule(operation=OPERATIONS, is_old=st.booleans())
    def work(self, operation: Any, is_old: bool) -> None:
        after, code = self.expect(operation)
        store = self.store if is_old else reopened(self.folder)
        with Disk(None, Killed).in_place():
            if code is None:
                self.run(store, operation)
            else:
                with pytest.raises(ModelError) as caught:
                    self.run(store, operation)
                assert caught.value.code == code
        self.known = after
        if operation[0] == "tidy":
            self.unsettled.clear()
            left = {f"{path.parent.name}@{path.name}" for path in self.folder.glob("[!.]*/*") if path.is_dir()}
            assert left == set(after.ids())
            assert not list(self.folder.glob(".staging-*"))
        self.unsettled -= (
            {f"{operation[1]}@{version}" for version in ("1", "2", "x")} & set(after.ids())
            if (operation[0] == "register")
            else set()
        )

    @rule(operation=OPERATIONS, at=st.integers(0, 45))
    def killed_at_work(self, operation: Any, at: int) -> None:
        before = self.known
        after, _ = self.expect(operation)
        with contextlib.suppress(Killed, ModelError), Disk(at, Killed).in_place():
            self.run(reopened(self.folder), operation)
        found = self.found(reopened(self.folder))
        assert found in (before, after)
        self.known = found
        self.unsettled |= set(before.ids()) ^ set(after.ids())

    @precondition(lambda self: (self.folder / "registry.json").exists())
    @rule(damage=st.sampled_from([b"", b"\0" * 9, b"{"]), spares_backup=st.booleans())
    def damage(self, damage: bytes, spares_backup: bool) -> None:
        """What runs may be forgotten, models not; what a killed process left may come back."""
        (self.folder / "registry.json").write_bytes(damage)
        if not spares_backup:
            (self.folder / "registry.json.bak").write_bytes(damage)
        found = self.found(reopened(self.folder))
        assert set(found.models) >= set(self.known.models)
        assert set(found.ids()) - set(self.known.ids()) <= self.unsettled
        self.known = found

    @invariant()
    def it_opens_and_all_is_sound(self) -> None:
        if not hasattr(self, "store"):
            return
        for store in (self.store, reopened(self.folder)):
            assert self.found(store) == self.known
            assert states(store) <= {"ok"}
            for model_id in self.known.ids():
                assert store.get(model_id).id == model_id

    def found(self, store: ModelStore) -> Known:
        registry = store.registry()
        marks = {hashlib.sha256(network(mark)).hexdigest(): mark for mark in MARKS}
        models = [(entry.name, entry.version, marks[entry.sha256]) for entry in registry.models if entry.is_kept]
        active, fallback = (one.model if one else None for one in (registry.active, registry.fallback))
        return Known(models, active, fallback)


TestStoreMachine = StoreMachine.TestCase
TestStoreMachine.settings = settings(
    max_examples=40, stateful_step_count=20, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)


@pytest.mark.parametrize("operation", ["register", "next", "remove", "choose"])
def test_a_kill_at_any_point_leaves_the_old_or_the_new(folder: Path, inbox: Path, operation: str) -> None:
    """The machine above draws its points; here is each of them once."""
    (inbox / "net.onnx").write_bytes(network())
    (inbox / "next.onnx").write_bytes(network("next"))
    first = NewModel(inbox / "net.onnx", "m", entry={"family": "raw"})
    new = NewModel(inbox / ("next.onnx" if operation == "next" else "net.onnx"), "m", entry={"family": "raw"})
    work: dict[str, Callable[[ModelStore], object]] = {
        "remove": lambda store: store.remove("m"),
        "choose": lambda store: store.choose("m@1", "m"),
    }
    outcomes = set()
    for at in itertools.count():
        shutil.rmtree(folder, ignore_errors=True)
        store = ModelStore({}, folder)
        if operation != "register":
            store.register(first, INFERENCE)
        disk = Disk(at, Killed)
        with contextlib.suppress(Killed), disk.in_place():
            work.get(operation, lambda store: store.register(new, INFERENCE))(store)
        again = reopened(folder)
        outcomes.add((tuple(ids(again)), again.registry().active is not None))
        assert states(again) <= {"ok"}
        again.register(new, INFERENCE)
        again.collect_garbage(lambda model, path: True)
        assert states(again) == {"ok"}
        assert not list(folder.glob(".staging-*"))
        if disk.calls <= at:
            break
    assert len(outcomes) == 2
    assert at > 10 or operation == "choose"


def test_a_kill_while_a_damaged_registry_is_mended_costs_nothing_more(folder: Path, given: Given) -> None:
    given("a"), given("b")
    ModelStore({}, folder).choose("a@1", "x")
    ModelStore({}, folder).choose("b@1", "x")
    (folder / "registry.json").write_bytes(b"{")
    for at in itertools.count():
        disk = Disk(at, Killed)
        with contextlib.suppress(Killed), disk.in_place():
            reopened(folder).choose("a@1", "x")
        assert ids(reopened(folder)) == ["a@1", "b@1"]
        assert reopened(folder).preferred("x") == ["a@1", "x"]
        if disk.calls <= at:
            break
        (folder / "registry.json").write_bytes(b"{")
    assert at > 3


# Processes


WORKER = """
import os, random, signal, sys
from pathlib import Path
import structlog
from edge_agent.config import InferenceOptions
from edge_agent.errors import ModelError
from edge_agent.models.store import ModelStore, NewModel
structlog.configure(processors=[lambda *event: (_ for _ in ()).throw(structlog.DropEvent)])
folder, inbox, name = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
store, inference = ModelStore({}, folder), InferenceOptions()

def register(name, number, **more):
    return store.register(NewModel(inbox / f"{number}.onnx", name, entry={"family": "raw"}, **more), inference)
"""
BUSY = (
    WORKER
    + """
for number in range(6):
    last = register(name, number)
    register("shared", number, version=f"{name}-{number}")
    store.remove(last.id) if number % 2 else None
    register("fought-over", number)
    try:
        store.remove("fought-over@1")
    except ModelError as error:
        if error.code != "model_not_found":
            raise
    store.collect_garbage(lambda model, path: True)
"""
)
MORTAL = (
    WORKER
    + """
import time
register("a", 0)
for line in sys.stdin:
    child = os.fork()
    if child == 0:
        chance = random.Random(line)
        while True:
            try:
                register(chance.choice("ab"), chance.randrange(4))
                store.remove(chance.choice("ab") + f"@{chance.randrange(1, 9)}")
                store.choose(chance.choice("ab") + f"@{chance.randrange(1, 9)}", "a")
                store.collect_garbage(lambda model, path: True)
            except ModelError as error:
                if error.code not in ("model_not_found", "model_in_use"):
                    print(error, flush=True)
    time.sleep(float(line))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    print("killed", flush=True)
"""
)


def process(code: str, folder: Path, inbox: Path, name: str, **more: Any) -> subprocess.Popen[str]:
    command = [sys.executable, "-W", "ignore", "-c", code, str(folder), str(inbox), name]
    return subprocess.Popen(command, cwd=ROOT, text=True, stderr=subprocess.PIPE, **more)


@pytest.fixture
def numbered(inbox: Path) -> Path:
    for number in range(6):
        (inbox / f"{number}.onnx").write_bytes(network(number))
    return inbox


def test_processes_and_threads_at_once_lose_no_entry(folder: Path, numbered: Path) -> None:
    processes = [process(BUSY, folder, numbered, name) for name in ("a", "b", "c")]
    store = ModelStore({}, folder)

    def register() -> None:
        for number in range(6):
            version = f"{threading.current_thread().name}-{number}"
            new = NewModel(numbered / f"{number}.onnx", "threaded", version=version, entry={"family": "raw"})
            store.register(new, INFERENCE)

    threads = [threading.Thread(target=register, name=name) for name in ("x", "y")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for one in processes:
        _, complaints = one.communicate(timeout=60)
        assert (one.returncode, complaints) == (0, "")
    wanted = {f"{name}@{version}" for name in "abc" for version in (1, 2, 3)}
    wanted |= {f"shared@{name}-{number}" for name in "abc" for number in range(6)}
    wanted |= {f"threaded@{name}-{number}" for name in "xy" for number in range(6)}
    found = set(ids(reopened(folder)))
    assert {model_id for model_id in found if not model_id.startswith("fought-over@")} == wanted
    assert states(store) == {"ok"}
    assert list(folder.glob(".staging-*")) == []


def test_a_dead_process_lets_go_of_the_lock(folder: Path, store: ModelStore, given: Given) -> None:
    given()
    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        waiting = threading.Thread(target=lambda: store.choose("m@1", "m"))
        waiting.start()
        waiting.join(0.05)
        assert waiting.is_alive()
        assert ids(store) == ["m@1"]  # reading waits for nobody
    waiting.join()
    assert store.registry().active is not None


def test_a_killed_process_leaves_a_store_that_opens(folder: Path, numbered: Path) -> None:
    chance = random.Random(7)
    with process(MORTAL, folder, numbered, "", stdin=subprocess.PIPE, stdout=subprocess.PIPE) as killing:
        assert killing.stdin is not None
        assert killing.stdout is not None
        left = 0
        for _ in range(30):
            print(chance.uniform(0.01, 0.1), file=killing.stdin, flush=True)
            assert killing.stdout.readline() == "killed\n"
            left += len(list(folder.glob(".staging-*")))
            store = reopened(folder)
            assert states(store) <= {"ok"}
            assert all(store.get(model_id) for model_id in ids(store))
        killing.stdin.close()
        assert killing.stderr is not None
        assert killing.stderr.read() == ""
    assert left > 0  # some were killed in the middle
    with capture_logs():
        store.collect_garbage(lambda model, path: True)
    folders = {f"{path.parent.parent.name}@{path.parent.name}" for path in folder.glob("*/*/model.onnx")}
    assert folders == set(ids(store))
    assert msgspec.json.decode((folder / "registry.json").read_bytes())["schema"] == 1
