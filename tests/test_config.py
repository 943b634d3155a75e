"""The configuration: every mistake named, secrets kept, and the shipped file complete."""

from __future__ import annotations

import re
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import msgspec
import pytest
from hypothesis import given, settings

from edge_agent import config, migrations, plugins
from edge_agent._compat import tomllib
from edge_agent.config import Config, parse
from edge_agent.errors import ConfigError
from edge_agent.sources.rtsp import RtspOptions
from tests.rigs import ROOT

CAMERAS = {"cameras": {"a": {"source": "synthetic"}}}


def problems(raw: dict[str, Any], **options: Any) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        parse({**CAMERAS, **raw}, **options)
    return list(caught.value.problems)


def test_the_least_configuration_is_one_camera() -> None:
    loaded = parse(CAMERAS)
    assert loaded.model.active == "demo-320"
    assert loaded.cameras["a"].enabled


@pytest.mark.parametrize(
    ("raw", "problem"),
    [
        ({"mqqt": {}}, "mqqt: unknown key; did you mean 'mqtt'?"),
        ({"mqtt": {"port": 0}}, "mqtt.port: expected `int` >= 1; it is 0"),
        ({"mqtt": {"port": "1883"}}, "mqtt.port: expected `int`, got `str`; it is '1883'"),
        ({"mqtt": {"protocol": "4"}}, "mqtt.protocol: '4' is not one of auto, 5, 3.1.1"),
        ({"mqtt": 3}, "mqtt: expected a table, got a number"),
        ({"cameras": {}}, "cameras: there is none; add a table such as [cameras.front] with its source"),
        ({"cameras": {"a": {}}}, "cameras.a: the key 'source' is missing"),
        ({"cameras": {"a/b": {"source": "file"}}}, "cameras.a/b: a name has 1 to 64 of A-Z a-z 0-9 . _ -"),
        ({"cameras": {"a": {"source": "fil"}}}, "cameras.a.source: unknown source 'fil'; did you mean 'file'?"),
        ({"backends": {"onx": {}}}, "backends.onx: unknown backend 'onx'; did you mean 'onnx'?"),
        ({"backends": {"onnx": {"thread": 1}}}, "backends.onnx.thread: unknown key; did you mean 'threads'?"),
        ({"models": {"m": {}}}, "models.m: the key 'path' is missing"),
        ({"models": {"m": {"path": "x", "preprocess": {"sise": [1, 2]}}}}, "models.m.preprocess.sise: unknown key"),
        ({"models": {"m": {"path": "x", "preprocess": {"size": [1]}}}}, "models.m.preprocess.size: expected `array`"),
        ({"agent": {"device": "a/b"}}, "agent.device: 'a/b' is no name"),
        ({"mqtt": {"prefix": "a/#"}}, "mqtt.prefix: expected `str` matching regex"),
        ({"mqtt": {"embedded": True, "host": "10.0.0.1"}}, "mqtt.host: the embedded broker listens on loopback only"),
        ({"cameras": {"a": {"source": ":X"}}}, "cameras.a.source: ':X' names no source"),
        ({"cameras": {"a\n": {"source": "file"}}}, "cameras.a\n: a name has 1 to 64"),
        ({"mqtt": {"host": ""}}, "mqtt.host: expected `str` matching regex"),
        (
            {"config_version": 3},
            "config_version: 3 was written for a newer edge_agent; this one reads versions up to 2",
        ),
        ({"config_version": 0}, "config_version: expected `int` >= 1; it is 0"),
        ({"config_version": "1"}, "config_version: expected `int`, got `str`; it is '1'"),
        ({"config_version": True}, "config_version: expected `int`, got `bool`; it is True"),
        ({"mqtt": {"host": "${NOT_SET}"}}, "mqtt.host: the environment variable NOT_SET is not set"),
    ],
)
def test_a_mistake_is_named_with_its_path(raw: dict[str, Any], problem: str) -> None:
    [found] = problems(raw, environ={})
    assert found.startswith(problem)


def test_all_mistakes_are_named_at_once() -> None:
    raw = {"mqtt": {"port": -1, "hots": ""}, "queue": {"max_frames": 0}, "stats": {"interval_s": "x"}}
    assert [problem.split(":")[0] for problem in problems(raw)] == [
        "mqtt.port",
        "mqtt.hots",
        "queue.max_frames",
        "stats.interval_s",
    ]


def test_a_source_may_come_from_the_environment_and_a_backend_from_outside() -> None:
    raw = {
        "cameras": {"a": {"source": "${SOURCE}"}},
        "backends": {"edge_agent.backends.fake:FakeEngine": {"detections": 5}},
    }
    loaded = parse(raw, environ={"SOURCE": "synthetic"})
    assert type(loaded.cameras["a"]).__name__ == "SyntheticOptions"
    assert loaded.backends["edge_agent.backends.fake:FakeEngine"].detections == 5  # type: ignore[attr-defined]


def test_paths_are_taken_from_the_files_folder(tmp_path: Path) -> None:
    (tmp_path / "names.txt").write_text("a\nb")
    raw = {
        "cameras": {"a": {"source": "file", "path": "film.mp4"}, "b": {"source": "file", "path": "/abs.mp4"}},
        "models": {"m": {"path": "m.onnx", "labels": "names.txt"}, "n": {"path": "n.onnx", "labels": "coco80"}},
    }
    loaded = parse(raw, folder=tmp_path)
    assert [camera.path for camera in loaded.cameras.values()] == [str(tmp_path / "film.mp4"), "/abs.mp4"]  # type: ignore[attr-defined]
    assert loaded.models.entries["m"].path == str(tmp_path / "m.onnx")
    assert [model.labels for model in loaded.models.entries.values()] == [str(tmp_path / "names.txt"), "coco80"]


def test_strings_take_values_from_the_environment() -> None:
    environ = {"BROKER": "broker.lan"}
    raw = {**CAMERAS, "mqtt": {"host": "${BROKER}", "username": "${WHO:-agent}-1"}}
    loaded = parse(raw, environ=environ)
    assert (loaded.mqtt.host, loaded.mqtt.username) == ("broker.lan", "agent-1")


def test_secrets_come_from_files_and_show_themselves_to_nobody(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("hunter2\n")
    raw = {
        "mqtt": {"password_file": "secret"},
        "cameras": {"a": {"source": "rtsp", "url": "rtsp://x/", "password": "${P}"}},
    }
    loaded = parse(raw, folder=tmp_path, environ={"P": "s3cret"})
    camera = loaded.cameras["a"]
    assert isinstance(camera, RtspOptions)
    assert loaded.mqtt.password is not None
    assert camera.password is not None
    assert (loaded.mqtt.password.reveal(), camera.password.reveal()) == ("hunter2", "s3cret")
    assert "hunter2" not in repr(loaded)
    assert "s3cret" not in repr(loaded)


def test_a_secret_is_given_once_and_its_file_must_be_there(tmp_path: Path) -> None:
    assert problems({"mqtt": {"password": "x", "password_file": "y"}}) == [
        "mqtt.password_file: give either 'password' or 'password_file', not both"
    ]
    assert problems({"mqtt": {"password_file": "y"}}, folder=tmp_path) == [
        "mqtt.password_file: cannot read the secret: No such file or directory"
    ]


def test_a_secret_may_be_a_credential_of_systemd(tmp_path: Path) -> None:
    shown = re.search(r'password_file = ("\$\{CREDENTIALS_DIRECTORY\}/([\w-]+)")', (ROOT / "config.toml").read_text())
    assert shown is not None
    (tmp_path / shown[2]).write_text("hunter2\n")
    raw = tomllib.loads(f'[cameras.gate]\nsource = "rtsp"\nurl = "rtsp://x/"\npassword_file = {shown[1]}\n')
    loaded = parse(raw, folder=Path("/etc/edge-agent"), environ={"CREDENTIALS_DIRECTORY": str(tmp_path)})
    assert loaded.cameras["gate"].password.reveal() == "hunter2"  # type: ignore[attr-defined]
    [problem] = problems(raw, environ={})
    assert "the environment variable CREDENTIALS_DIRECTORY is not set" in problem


def test_a_mistyped_secret_is_not_shown() -> None:
    [found] = problems({"mqtt": {"password": 12345}})
    assert found == "mqtt.password: expected `str`, got `int`"


def test_the_device_name_is_stable_and_fit_for_a_topic() -> None:
    assert parse(CAMERAS).device == parse(CAMERAS).device
    assert re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", parse(CAMERAS).device)
    assert parse({**CAMERAS, "agent": {"device": "jetson-7"}}).device == "jetson-7"


@pytest.mark.parametrize("text", ["not = [valid", "\x00"])
def test_a_file_that_is_no_toml(tmp_path: Path, text: str) -> None:
    (tmp_path / "c.toml").write_text(text)
    with pytest.raises(ConfigError, match="not valid TOML"):
        config.load(tmp_path / "c.toml")


json_like = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 5) | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
keys = st.sampled_from(
    ["agent", "mqtt", "model", "models", "cameras", "backends", "queue", "port", "source", "path", "onnx", "a"]
)


@settings(max_examples=150, deadline=None)
@given(raw=st.dictionaries(keys, st.dictionaries(keys, json_like | st.dictionaries(keys, json_like)) | json_like))
def test_whatever_the_file_holds_the_answer_is_a_config_or_a_config_error(raw: dict[str, Any]) -> None:
    try:
        assert isinstance(parse(raw, environ={}), Config)
    except ConfigError as error:
        assert error.problems
        assert all(": " in problem for problem in error.problems)


def test_the_shipped_file_shows_and_explains_every_key() -> None:
    text = (ROOT / "config.toml").read_text()
    tables = _tables(text)
    for path, kind in _structs():
        shown = tables[path]
        for field in msgspec.structs.fields(kind):
            named = field.name in shown or f"{field.name}_file" in shown
            assert named or field.name in tables, f"[{path}] does not show {field.name}"
    for line in text.splitlines():
        if re.match(r"[a-z_]+ = ", line):
            assert "  # " in line, f"no comment: {line}"


def test_the_shipped_files_active_values_are_the_defaults_where_it_says_so() -> None:
    loaded = config.load(ROOT / "config.toml")
    for table in ("inference", "queue", "snapshots", "logging", "agent"):
        assert getattr(loaded, table) == type(getattr(loaded, table))(), table


def _tables(text: str) -> dict[str, set[str]]:
    """Keys by table, of live and of commented lines."""
    tables: dict[str, set[str]] = {"": set()}
    current = ""
    for line in text.splitlines():
        bare = line.removeprefix("# ")
        if match := re.match(r"\[([\w.-]+)\]", bare):
            current = match.group(1)
            tables.setdefault(current, set())
        elif match := re.match(r"(\w+) = ", bare):
            tables[current].add(match.group(1))
    tables["models.yolox-nano"] |= {"preprocess"}
    return tables


def _structs() -> list[tuple[str, type[msgspec.Struct]]]:
    hints = typing.get_type_hints(Config)
    found = [
        (name, kind) for name, kind in hints.items() if isinstance(kind, type) and issubclass(kind, msgspec.Struct)
    ]
    found = [(name, kind) for name, kind in found if name != "models"]
    found += [("models", msgspec.defstruct("Own", ["dir"])), ("models.yolox-nano", config.ModelOptions)]
    found += [(f"backends.{name}", plugins.load("backends", name).Options) for name in plugins.names("backends")]
    by_source = {
        "synthetic": "demo",
        "v4l2": "front",
        "rtsp": "gate",
        "http": "door",
        "gstreamer": "csi",
        "file": "recording",
        "folder": "pictures",
    }
    common = set(config.CameraOptions.__struct_fields__)
    for name in plugins.names("sources"):
        options = plugins.load("sources", name).Options
        own = [field for field in options.__struct_fields__ if field not in common or name == "synthetic"]
        fields = [(field, typing.Any, None) for field in own]
        found.append((f"cameras.{by_source[name]}", msgspec.defstruct("Own", fields)))
    return found


def test_the_shipped_file_is_valid_toml_when_its_examples_are_uncommented() -> None:
    text = (ROOT / "config.toml").read_text()
    examples = re.sub(r"(?m)^# (?=\[|\w+ = )", "", text.split("\n\n", 1)[1])
    raw = tomllib.loads(examples)
    raw["mqtt"].pop("password")
    for name in ("gate", "door"):
        raw["cameras"][name].pop("password_file")
    raw["tracking"]["enabled"] = True  # which lines want
    assert parse(raw, environ={}).models.entries["yolox-nano"].labels == "coco80"


RTSP = {"source": "rtsp", "url": "rtsp://x/"}


def test_a_file_of_version_1_is_read_as_it_was_meant() -> None:
    told: list[str] = []
    cameras = {
        "lost": {**RTSP, "read_timeout_s": 3.0},
        "both": {**RTSP, "read_timeout_s": 3.0, "stall_timeout_s": 4.0},
        "plain": RTSP,
    }
    raw = {"cameras": cameras}
    loaded = parse(raw, tell=told.append)
    assert [camera.stall_timeout_s for camera in loaded.cameras.values()] == [1.5, 4.0, 5.0]
    assert loaded.config_version == migrations.VERSION == 2
    assert told == [
        "cameras.lost.read_timeout_s is cameras.lost.stall_timeout_s now, and half as long, since a stream is lost "
        "after twice that time: write stall_timeout_s = 1.5",
        "cameras.both.read_timeout_s is no key any more, and stall_timeout_s is there: take it out",
    ]
    assert raw == {"cameras": cameras}, "what was given stays as it is"
    assert "read_timeout_s" in cameras["lost"]
    assert parse({"config_version": 1, **raw}) == loaded


def test_what_moved_is_unknown_where_the_file_says_that_it_is_new() -> None:
    [problem] = problems({"config_version": 2, "cameras": {"a": {**RTSP, "read_timeout_s": 3.0}}})
    assert problem.startswith("cameras.a.read_timeout_s: unknown key; did you mean")


def test_a_moved_value_that_is_wrong_is_named_by_its_new_key() -> None:
    found = problems({"cameras": {"a": {**RTSP, "read_timeout_s": "3"}, "b": 4}})
    assert [problem.split(":")[0] for problem in found] == ["cameras.a.stall_timeout_s", "cameras.b"]
    [problem] = problems({"cameras": {"a": {"source": "file", "path": "x", "read_timeout_s": 3}}})
    assert problem.startswith("cameras.a.read_timeout_s: unknown key"), "another source never had it"


@given(version=st.integers(1, 4), newest=st.integers(1, 4))
def test_each_step_is_taken_once_and_in_order(version: int, newest: int) -> None:
    def step(number: int) -> migrations.Step:
        def go(tables: dict[str, Any]) -> Iterator[str]:
            tables["a"]["was"].append(number)
            yield f"step {number}"

        return go

    steps = [step(number) for number in range(1, newest)]
    raw = {"config_version": version, "a": {"was": []}}
    if version > newest:
        with pytest.raises(ConfigError, match=f"config_version: {version} was written for a newer edge_agent"):
            migrations.migrated(raw, steps=steps)
        return
    tables, moved = migrations.migrated(raw, steps=steps)
    taken = list(range(version, newest))
    assert tables == {"config_version": newest, "a": {"was": taken}}
    assert moved == [f"step {number}" for number in taken]
    assert migrations.migrated(tables, steps=steps) == (tables, [])
    assert raw == {"config_version": version, "a": {"was": []}}


def test_the_shipped_file_is_of_this_version_and_nothing_in_it_moved() -> None:
    raw = config.read(ROOT / "config.toml")
    assert raw["config_version"] == migrations.VERSION
    assert migrations.migrated({**raw, "config_version": 1}) == (raw, [])
