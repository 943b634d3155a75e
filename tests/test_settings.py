"""What commands change is laid over the file, kept, and checked like the file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from structlog.testing import capture_logs

from edge_agent import migrations
from edge_agent.config import state_directory
from edge_agent.errors import CommandError, ConfigError
from edge_agent.settings import Settings, _keys, _laid_over, _without

TEXT = """
[agent]
device = "{device}"
[cameras.a]
source = "synthetic"
[cameras.b]
source = "synthetic"
fps = 10.0
"""


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    path = tmp_path / "config.toml"
    path.write_text(TEXT.format(device=f"d{abs(hash(tmp_path)) % 10**8}"))
    return Settings(path)


def kept(settings: Settings) -> Path:
    return state_directory() / f"changes-{settings.load().device}.json"


def test_changes_are_laid_over_the_file_and_kept(settings: Settings) -> None:
    plain = settings.load()
    loaded = settings.changed({"cameras": {"b": {"fps": 5.0}, "c": {"source": "synthetic"}, "a": None}})
    assert list(loaded.cameras) == ["b", "c"]
    assert loaded.cameras["b"].fps == 5.0  # type: ignore[attr-defined]
    assert settings.changed_keys == ["cameras.a", "cameras.b.fps", "cameras.c.source"]
    again = Settings(settings._file)
    assert again.load() == loaded
    assert again.reset() == plain
    assert Settings(settings._file).load() == plain
    assert kept(settings).stat().st_mode & 0o777 == 0o600


def test_a_change_that_cannot_be_is_named_and_changes_nothing(settings: Settings) -> None:
    settings.load()
    settings.changed({"policy": {"max_latency_ms": 20}})
    for wrong, told in (
        ({"inference": {"score_threshold": 7}}, "inference.score_threshold"),
        ({"cameras": {"a": {"fsp": 1}}}, "cameras.a.fsp: unknown key"),
        ({"cameras": {"a": None, "b": None}}, "cameras: there is none"),
    ):
        with pytest.raises(CommandError, match=told) as caught:
            settings.changed(wrong)
        assert caught.value.code == "bad_arguments"
    assert settings.changed_keys == ["policy.max_latency_ms"]


def test_changes_that_do_not_go_with_the_file_any_more_are_left_out(settings: Settings) -> None:
    settings.load()
    settings.changed({"cameras": {"b": {"fps": 5.0}}})
    assert settings._file is not None
    settings._file.write_text(settings._file.read_text().partition("[cameras.b]")[0])
    fresh = Settings(settings._file)
    assert list(fresh.load().cameras) == ["a"]
    assert fresh.changed_keys == []


def keep(settings: Settings, changes: dict[str, Any], **version: int) -> None:
    """What an agent, this one if it has no `config_version` of its own, left beside its state."""
    path = kept(settings)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"schema": 1, "config_version": migrations.VERSION, **version, "changes": changes}))


def test_what_fits_is_kept_where_something_else_does_not(settings: Settings) -> None:
    cameras = {
        "a": {"nonsense": 1},
        "b": {"fps": 5.0, "zones": {"yard": [[0, 0], [1, 2], [1, 1]]}},
        "gone": {"fps": 3.0},
        "new": {"source": "synthetic"},
    }
    keep(settings, {"cameras": cameras, "stats": {"interval_s": 2.0}, "logging": {"level": "loud"}})
    with capture_logs() as logged:
        loaded = settings.load()
    [event] = logged
    assert event["event"] == "settings.changes_left_out"
    assert event["keys"] == ["cameras.a.nonsense", "cameras.b.zones.yard", "cameras.gone.fps", "logging.level"]
    assert len(event["problems"]) == 5
    assert settings.changed_keys == ["cameras.b.fps", "cameras.new.source", "stats.interval_s"]
    assert (list(loaded.cameras), loaded.cameras["b"].fps) == (["a", "b", "new"], 5.0)  # type: ignore[attr-defined]
    assert (loaded.stats.interval_s, loaded.logging.level) == (2.0, "info")


def test_changes_that_go_with_the_file_no_more_and_are_not_named_are_all_left_out(settings: Settings) -> None:
    assert settings._file is not None
    line = "lines.gate = [[0.0, 0.5], [1.0, 0.5]]\n[tracking]\nenabled = true\n"
    settings._file.write_text(settings._file.read_text() + line)
    keep(settings, {"tracking": {"enabled": False}, "cameras": {"a": {"fps": 5.0}}})
    with capture_logs() as logged:
        loaded = settings.load()
    assert loaded.tracking.enabled
    assert settings.changed_keys == []
    assert {key for event in logged for key in event["keys"]} == {"tracking.enabled", "cameras.a.fps"}


@pytest.mark.parametrize(
    "content", ["", "{", "[]", '{"schema": 2, "changes": {}}', '{"schema": 1, "changes": []}', "\x00"]
)
def test_a_file_of_changes_that_cannot_be_read_is_passed_over(settings: Settings, content: str) -> None:
    path = kept(settings)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)
    assert list(settings.load().cameras) == ["a", "b"]


def test_mistakes_in_the_file_itself_are_not_hidden(settings: Settings) -> None:
    settings.load()
    assert settings._file is not None
    settings._file.write_text("[cameras\n")
    with pytest.raises(ConfigError):
        settings.load()
    with pytest.raises(CommandError, match="not valid TOML"):
        settings.reread()


@pytest.mark.parametrize(
    "changes",
    [
        {"cameras": {"x": {"source": "file", "path": "/etc/passwd"}}},
        {"cameras": {"x": {"source": "rtsp", "url": "rtsp://x/", "password_file": "/etc/shadow"}}},
        {"cameras": {"x": {"source": "rtsp", "url": "rtsp://${HOME}/"}}},
        {"cameras": {"x": {"source": "gstreamer", "pipeline": "fakesrc ! fakesink"}}},
        {"cameras": {"x": {"source": "os:system"}}},
        {"cameras": {"a": {"zones": {"z": ["${PATH}"]}}}},
    ],
)
def test_what_comes_over_a_network_reads_nothing_of_this_machine(settings: Settings, changes: dict[str, Any]) -> None:
    settings.load()
    with pytest.raises(CommandError) as caught:
        settings.changed(changes)
    assert caught.value.code == "forbidden"


def test_a_camera_s_login_goes_nowhere_else(settings: Settings) -> None:
    assert settings._file is not None
    login = '[cameras.gate]\nsource = "rtsp"\nurl = "rtsp://192.0.2.1/"\nusername = "u"\npassword = "p"\n'
    settings._file.write_text(settings._file.read_text() + login)
    settings.load()
    with pytest.raises(CommandError) as caught:
        settings.changed({"cameras": {"gate": {"url": "rtsp://elsewhere/"}}})
    assert caught.value.code == "forbidden"
    settings.changed({"cameras": {"gate": {"stall_timeout_s": 9}}})
    settings.changed({"cameras": {"gate": {"url": "rtsp://elsewhere/", "username": "v", "password": "q"}}})
    settings.changed({"cameras": {"gate": None}})
    loaded = settings.changed({"cameras": {"gate": {"source": "rtsp", "url": "rtsp://anew/"}}})
    assert loaded.cameras["gate"].password is None  # type: ignore[attr-defined]
    assert Settings(settings._file).load() == loaded
    assert "cameras.gate.url" in settings.changed_keys
    assert not [key for key in settings.changed_keys if "_anew" in key]


@pytest.mark.parametrize(
    ("device", "is_taken"), [("/dev/video0", True), ("usb:046d:0825", True), ("/dev/watchdog", False)]
)
def test_a_command_names_cameras_among_devices_alone(settings: Settings, device: str, is_taken: bool) -> None:
    settings.load()
    change = {"cameras": {"x": {"source": "v4l2", "device": device}}}
    if is_taken:
        settings.changed(change)
    else:
        with pytest.raises(CommandError, match="/dev/video"):
            settings.changed(change)


def test_tables_in_tables_without_end_are_refused(settings: Settings) -> None:
    settings.load()
    endless: Any = 1
    for _ in range(900):
        endless = {"x": endless}
    with pytest.raises(CommandError, match="without end"):
        settings.changed({"cameras": {"x": endless}})


def test_an_agent_without_a_file_takes_no_changes(settings: Settings) -> None:
    fixed = Settings(fixed=settings.load())
    assert fixed.load() == settings.load()
    with pytest.raises(CommandError) as caught:
        fixed.changed({"policy": {"max_latency_ms": 20}})
    assert caught.value.code == "forbidden"


TABLES = st.recursive(
    st.one_of(st.none(), st.integers(), st.text(max_size=3)),
    lambda inner: st.dictionaries(st.sampled_from("abc"), inner, max_size=3),
    max_leaves=12,
)


@given(below=st.dictionaries(st.sampled_from("abc"), TABLES), above=st.dictionaries(st.sampled_from("abc"), TABLES))
def test_laying_over_is_stable_and_touches_neither(below: dict[str, Any], above: dict[str, Any]) -> None:
    before = json.dumps([below, above])
    once = _laid_over(below, above)
    assert _laid_over(once, above) == once, "the same change again changes nothing"
    assert _laid_over(below, {}) == below
    assert json.dumps([below, above]) == before
    for key, value in above.items():
        if not isinstance(value, dict):
            assert once[key] == value


@given(tables=st.dictionaries(st.sampled_from(["a", "b", "a.b"]), TABLES, max_size=3), data=st.data())
def test_without_a_path_all_others_are_there(tables: dict[str, Any], data: st.DataObject) -> None:
    paths = list(_keys(tables))
    assert _without(tables, "c.d") == tables
    if paths:
        path = data.draw(st.sampled_from(paths))
        left = list(_keys(_without(tables, path)))
        assert len(left) < len(paths)
        assert set(left) <= set(paths)


RTSP = '[cameras.gate]\nsource = "rtsp"\nurl = "rtsp://x/"\nread_timeout_s = 3.0\n'


def test_an_older_file_takes_changes_and_is_told_once_for_each_time_it_is_read(settings: Settings) -> None:
    assert settings._file is not None
    settings._file.write_text(settings._file.read_text() + RTSP)
    with capture_logs() as logged:
        settings.load()
    [event] = logged
    assert (event["event"], event["log_level"]) == ("config.moved", "warning")
    assert "cameras.gate.stall_timeout_s now" in event["what"]
    with capture_logs() as logged:
        loaded = settings.changed({"cameras": {"b": {"fps": 5.0}}})
        again = settings.changed({"cameras": {"gate": {"stall_timeout_s": 2.0}}})
    assert logged == []
    assert (loaded.cameras["gate"].stall_timeout_s, again.cameras["gate"].stall_timeout_s) == (1.5, 2.0)
    assert json.loads(kept(settings).read_text())["config_version"] == migrations.VERSION


@pytest.mark.parametrize("version", [{}, {"config_version": 1}])
def test_changes_that_an_older_agent_kept_move_as_the_file_does(settings: Settings, version: dict[str, int]) -> None:
    gate = {"source": "rtsp", "url": "rtsp://x/", "read_timeout_s": 3.0}
    path = kept(settings)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"schema": 1, **version, "changes": {"cameras": {"gate": gate}}}))
    with capture_logs() as logged:
        loaded = settings.load()
    assert loaded.cameras["gate"].stall_timeout_s == 1.5
    assert [event["event"] for event in logged] == ["settings.moved"]
    assert settings.changed_keys == ["cameras.gate.source", "cameras.gate.stall_timeout_s", "cameras.gate.url"]
    settings.changed({"cameras": {"b": {"fps": 5.0}}})
    written = json.loads(path.read_text())
    assert "read_timeout_s" not in written["changes"]["cameras"]["gate"]
    assert Settings(settings._file).load().cameras["gate"].stall_timeout_s == 1.5


@pytest.mark.parametrize("file_version", ["", "config_version = 1\n", f"config_version = {migrations.VERSION}\n"])
def test_a_change_moves_though_the_file_alone_says_what_the_camera_is(settings: Settings, file_version: str) -> None:
    assert settings._file is not None
    gate = RTSP if migrations.VERSION != 2 or "2" not in file_version else RTSP.partition("read_timeout_s")[0]
    settings._file.write_text(file_version + settings._file.read_text() + gate)
    keep(
        settings,
        {"cameras": {"gate": {"read_timeout_s": 4}, "a": None}, "logging": {"level": "debug"}},
        config_version=1,
    )
    with capture_logs() as logged:
        loaded = settings.load()
    assert (loaded.cameras["gate"].stall_timeout_s, loaded.logging.level) == (2.0, "debug")
    assert settings.changed_keys == ["cameras.a", "cameras.gate.stall_timeout_s", "logging.level"]
    assert "settings.changes_left_out" not in [event["event"] for event in logged]


def test_changes_that_a_newer_agent_kept_are_passed_over_and_told(settings: Settings) -> None:
    path = kept(settings)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"schema": 1, "config_version": 99, "changes": {"stats": {"interval_s": 1.0}}}))
    with capture_logs() as logged:
        assert settings.load().stats.interval_s == 10.0
    [event] = logged
    assert (event["event"], "newer edge_agent" in event["reason"]) == ("settings.unreadable", True)
