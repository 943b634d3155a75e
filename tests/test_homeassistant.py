"""What Home Assistant would make of discovery: its rules for the payload, and its templates on real messages."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import jinja2
import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jinja2.sandbox import ImmutableSandboxedEnvironment

from edge_agent import messages
from edge_agent.config import HomeAssistantOptions
from edge_agent.data import Message
from edge_agent.homeassistant import CONTROLS, Announced, Presence, birth_topic, discovery, removal
from edge_agent.messages import Topics
from edge_agent.readings import BoardReadings, GpuReadings, HostReadings

TOPICS = Topics("edge", "rig-1")
OPTIONS = HomeAssistantOptions(enabled=True)
CAMERAS = ("front", "back.door")
MODELS = ("demo-320", "yolo@2")

# https://www.home-assistant.io/integrations/mqtt/ and each platform's page, as of 2026.11
DISCOVERY_TOPIC = re.compile(r"homeassistant/device/([a-zA-Z0-9_-]+/)?[a-zA-Z0-9_-]+/config")
ENTITY_ID = re.compile(r"[a-z_]+\.[a-z0-9]+(_[a-z0-9]+)*")
OF_ALL = {
    "availability", "default_entity_id", "entity_category", "icon", "json_attributes_template", "json_attributes_topic",
    "name", "p", "qos", "unique_id",
}  # fmt: skip
READS = {"state_topic", "value_template"}
SENDS = {"command_topic", "command_template"}
MUST_HAVE = {
    "binary_sensor": {"state_topic"},
    "button": {"command_topic"},
    "image": {"image_topic"},
    "select": {"command_topic", "options"},
    "sensor": {"state_topic"},
    "switch": {"command_topic"},
}
MAY_HAVE = {
    "binary_sensor": READS | {"device_class"},
    "button": SENDS | {"device_class"},
    "image": {"image_topic", "content_type"},
    "select": SENDS | READS | {"options"},
    "sensor": READS | {"device_class", "state_class", "suggested_display_precision", "unit_of_measurement"},
    "switch": SENDS | READS | {"payload_on", "payload_off", "state_on", "state_off"},
}
DEVICE_CLASSES = {
    "binary_sensor": {"connectivity", "problem"},
    "button": {"restart"},
    "sensor": {"duration", "temperature"},
}


def payload(
    cameras: Sequence[str] = CAMERAS,
    models: Sequence[str] = MODELS,
    *,
    topics: Topics = TOPICS,
    version: str = "1.2.3",
    commands: Collection[str] = CONTROLS,
    before: bytes = b"",
) -> dict[str, Any]:
    message = discovery(
        topics=topics,
        options=OPTIONS,
        cameras=cameras,
        models=models,
        version=version,
        commands=commands,
        before=before,
    )
    decoded: dict[str, Any] = json.loads(message.payload)
    return decoded


def components(*args: Any, **more: Any) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = payload(*args, **more)["cmps"]
    return found


def render(template: str, **variables: Any) -> str:
    """As Home Assistant does it, but an undefined name fails."""
    environment = ImmutableSandboxedEnvironment(undefined=jinja2.StrictUndefined)
    environment.globals["now"] = lambda: datetime.now(timezone.utc)
    return environment.from_string(template).render(**variables)


def shown(component: Mapping[str, Any], message: msgspec.Struct | Mapping[str, Any]) -> str:
    """The state that an entity has after a message on its topic."""
    return render(component["value_template"], value_json=json.loads(msgspec.json.encode(message)))


def attributes(component: Mapping[str, Any], message: msgspec.Struct | Mapping[str, Any]) -> Any:
    value = json.loads(msgspec.json.encode(message))
    return json.loads(render(component["json_attributes_template"], value_json=value))


def sent(component: Mapping[str, Any], value: str = "PRESS") -> messages.Command:
    """The command that the agent gets when somebody uses an entity."""
    return messages.decode_command(render(component["command_template"], value=value).encode())


def camera_status(state: messages.CameraPhase = "running") -> messages.CameraStatus:
    return messages.CameraStatus(1, "front", state, "2026-01-31T12:00:00.000000Z", message="gone" if state else None)


def stats(objects: Mapping[str, int] | None, *, p95: float | None = 41.5, name: str = "front") -> dict[str, Any]:
    """Statistics of one camera; of an agent that counts no objects, if `objects` is None."""
    camera = {
        "captured": 9,
        "inferred": 8,
        "published": 8,
        "drops": {},
        "skipped": 0,
        "waiting": 0,
        "captured_fps": 10.0,
        "inferred_fps": 9.5,
        "connection": dict.fromkeys(messages.Connection.__struct_fields__),
    }
    return {
        "at": "2026-01-31T12:00:00.000000Z",
        "cameras": {name: camera | ({} if objects is None else {"objects": objects})},
        "stages_ms": {"total": msgspec.to_builtins(messages.Percentiles(20.0, p95, 60.0, 80.0))},
    }


def seen(
    *,
    host: HostReadings | None = None,
    gpus: Sequence[GpuReadings] | None = None,
    board: BoardReadings | None = None,
) -> dict[str, Any]:
    """Statistics of a machine of which the sensors saw this."""
    return stats({}) | {"host": host, "gpus": gpus, "board": board}


def health(**checks: messages.Check) -> messages.Health:
    state: messages.CheckState = "ok" if all(check.state == "ok" for check in checks.values()) else "degraded"
    return messages.Health(1, "rig-1", "2026-01-31T12:00:00.000000Z", state, checks)


def check(state: messages.CheckState, fact: str, *, age_s: float = 0.0) -> messages.Check:
    return messages.Check(state, fact, since="2026-01-31T12:00:00.000000Z", age_s=age_s)


def models(active: str | None) -> messages.Models:
    entries = [
        messages.ModelEntry(name, name, "1", "yolo", "detect", "/m", 1, None, "config", name == active)
        for name in MODELS
    ]
    return messages.Models(1, "rig-1", active, entries)


def test_the_payload_is_what_home_assistant_takes() -> None:
    message = discovery(topics=TOPICS, options=OPTIONS, cameras=CAMERAS, models=MODELS, version="1.2.3")
    device = json.loads(message.payload)

    assert DISCOVERY_TOPIC.fullmatch(message.topic)
    assert message.retain and message.kind == "status"
    assert device["dev"]["ids"] and device["dev"]["sw"] == "1.2.3"
    assert device["o"]["name"]
    assert device["avty"] == [{"t": "edge/rig-1/available"}]
    assert device["avty_mode"] == "all"
    for name, component in device["cmps"].items():
        platform = component["p"]
        assert re.fullmatch(r"[a-zA-Z0-9_-]+", name)
        assert set(component) >= MUST_HAVE[platform] | {"unique_id"}
        assert set(component) <= MAY_HAVE[platform] | OF_ALL
        assert ENTITY_ID.fullmatch(component["default_entity_id"])
        assert component["default_entity_id"].startswith(f"{platform}.")
        assert component.get("device_class") in {None, *DEVICE_CLASSES.get(platform, ())}
        allowed = {None, "diagnostic"} if platform in ("sensor", "binary_sensor") else {None, "diagnostic", "config"}
        assert component.get("entity_category") in allowed
        for key in ("state_topic", "command_topic", "image_topic", "json_attributes_topic"):
            assert messages.is_publishable(component.get(key, "edge"))


def test_every_topic_is_one_that_the_agent_has() -> None:
    known = {TOPICS.status, TOPICS.health, TOPICS.stats, TOPICS.models, TOPICS.command, TOPICS.available}
    known |= {TOPICS.camera(camera, leaf) for camera in CAMERAS for leaf in ("status", "snapshot")}
    used = {
        value
        for component in components().values()
        for key, value in component.items()
        if key.endswith("_topic")
    }  # fmt: skip
    used |= {topic["t"] for component in components().values() for topic in component.get("availability", ())}

    assert used <= known
    assert not any(topic.endswith("/results") for topic in used), "thirty state changes a second"


def test_ids_stay_when_version_and_models_change() -> None:
    old, new = components(version="1.0.0"), components(models=["other"], version="2.0.0")

    assert [(name, part["unique_id"]) for name, part in old.items()] == [
        (name, part["unique_id"]) for name, part in new.items()
    ]


@given(st.lists(st.text(min_size=1, max_size=20), min_size=1, max_size=4, unique=True))
def test_names_with_any_signs_are_told_apart(names: list[str]) -> None:
    told = components(names)
    ids = [component["unique_id"] for component in told.values()]

    assert len(told) == 7 + 6 * len(names)
    assert len(set(ids)) == len(ids)
    assert all(re.fullmatch(r"[a-zA-Z0-9_-]+", name) for name in told)
    assert all(ENTITY_ID.fullmatch(component["default_entity_id"]) for component in told.values())


@given(st.text(min_size=1, max_size=20))
def test_a_template_finds_a_camera_of_any_name(name: str) -> None:
    told = components([name]).values()
    fps = next(part for part in told if part.get("unit_of_measurement") == "fps")
    toggle = next(part for part in told if part["p"] == "switch")

    assert shown(fps, stats({}, name=name)) == "9.5"
    assert sent(toggle, toggle["payload_on"]).args == {"camera": name}


def test_devices_with_odd_names_have_topics_of_their_own() -> None:
    names = [("edge", "a.b"), ("edge", "a_b"), ("site/edge", "a_b"), ("edge", "a b")]
    found = {
        discovery(topics=Topics(*name), options=OPTIONS, cameras=[], models=[], version="1").topic for name in names
    }

    assert len(found) == len(names)
    assert all(DISCOVERY_TOPIC.fullmatch(topic) for topic in found)


@pytest.mark.parametrize("phase", ["connecting", "running", "stalled", "backoff", "disabled"])
def test_a_camera_is_connected_while_it_runs_and_on_unless_it_is_disabled(phase: messages.CameraPhase) -> None:
    told, status = components(), camera_status(phase)

    assert shown(told["camera_front_connection"], status) == ("ON" if phase == "running" else "OFF")
    assert shown(told["camera_front_enabled"], status) == ("off" if phase == "disabled" else "on")
    assert attributes(told["camera_front_connection"], status)["message"] == "gone"


def test_a_camera_that_does_not_run_has_no_objects_and_takes_no_snapshot() -> None:
    for name in ("camera_front_objects", "camera_front_take_snapshot"):
        agent, camera = components()[name]["availability"]
        assert agent["t"] == TOPICS.available
        assert render(camera["val_tpl"], value_json={"state": "running"}) == "online"
        assert render(camera["val_tpl"], value_json={"state": "backoff"}) == "offline"


def test_objects_are_counted_in_all_and_by_label() -> None:
    objects = components()["camera_front_objects"]

    assert shown(objects, stats({"person": 2, "car": 1})) == "3"
    assert attributes(objects, stats({"person": 2, "car": 1})) == {"person": 2, "car": 1}
    assert shown(objects, stats({})) == "0"


def test_what_is_not_known_is_none() -> None:
    told = components()

    assert shown(told["camera_front_objects"], stats(None)) == "None"
    assert shown(told["camera_front_objects"], stats({}, name="other")) == "None"
    assert attributes(told["camera_front_objects"], stats({}, name="other")) == {}
    assert shown(told["camera_front_fps"], stats({}, name="other")) == "None"
    assert shown(told["latency"], stats({}, p95=None)) == "None"
    assert shown(told["model"], models(None)) == "None"


def test_rate_and_latency_are_those_of_the_statistics() -> None:
    told = components()

    assert shown(told["camera_front_fps"], stats({})) == "9.5"
    assert shown(told["latency"], stats({})) == "41.5"
    assert told["latency"]["unit_of_measurement"] == "ms"


def test_the_temperature_is_that_of_the_hottest_part() -> None:
    sensor = components()["temperature"]
    gpus = [GpuReadings(index=0, temperature_c=41), GpuReadings(index=1, temperature_c=67.5), GpuReadings(index=2)]
    board = BoardReadings(temperatures_c={"cpu-thermal": 71.25, "gpu-thermal": 43.0})

    assert (sensor["device_class"], sensor["unit_of_measurement"]) == ("temperature", "°C")
    assert shown(sensor, seen(gpus=gpus)) == "67.5"
    assert shown(sensor, seen(board=board)) == "71.25"
    assert shown(sensor, seen(gpus=[*gpus, GpuReadings(index=3, temperature_c=80.5)], board=board)) == "80.5"
    assert shown(sensor, seen(gpus=[GpuReadings(index=0, temperature_c=-5.5)])) == "-5.5"


def test_load_and_memory_are_shares_of_what_there_is() -> None:
    told = components()
    gpus = [GpuReadings(index=0, utilisation_percent=0.0), GpuReadings(index=1)]
    host = HostReadings(memory_total_mb=8000.0, memory_used_mb=2001.0)

    assert shown(told["gpu_load"], seen(gpus=gpus)) == "0.0"
    assert shown(told["gpu_load"], seen(gpus=gpus, board=BoardReadings(gpu_percent=99.6))) == "99.6"
    assert shown(told["memory"], seen(host=host)) == "25.0"


@pytest.mark.parametrize("name", ["temperature", "gpu_load", "memory"])
def test_what_no_sensor_sees_is_unknown(name: str) -> None:
    sensor = components()[name]
    blind = seen(host=HostReadings(), gpus=[GpuReadings(index=0)], board=BoardReadings())

    assert [shown(sensor, told) for told in (seen(), blind, stats({}))] == ["None"] * 3


def test_health_is_a_problem_and_tells_which() -> None:
    fine = health(broker=check("ok", "connected"))
    ill = health(broker=check("ok", "connected"), **{"camera.front": check("degraded", 'no "result" yet')})
    sensor = components()["health"]

    assert (shown(sensor, fine), shown(sensor, ill)) == ("OFF", "ON")
    assert attributes(sensor, fine) == {"broker": "ok"}
    assert attributes(sensor, ill) == {"broker": "ok", "camera.front": 'degraded: no "result" yet'}


def test_the_facts_of_a_healthy_agent_change_no_attribute() -> None:
    sensor = components()["health"]
    ages = [health(camera=check("ok", f"last result {age} s ago", age_s=age)) for age in (0.1, 0.2)]

    assert attributes(sensor, ages[0]) == attributes(sensor, ages[1])


def test_the_model_is_chosen_from_those_that_there_are() -> None:
    select = components()["model"]

    assert select["options"] == list(MODELS)
    assert shown(select, models("yolo@2")) == "yolo@2"
    assert shown(select, models("a rung of the ladder")) == "None"
    assert sent(select, "yolo@2").command == "model.activate"
    assert sent(select, 'a "quoted" name').args == {"name": 'a "quoted" name'}


def test_without_models_there_is_nothing_to_choose() -> None:
    assert "model" not in components(models=[])


def test_controls_send_commands_that_the_agent_understands() -> None:
    told = components()

    assert sent(told["restart"]).command == "agent.restart"
    assert sent(told["camera_front_enabled"], "camera.disable").command == "camera.disable"
    assert sent(told["camera_front_enabled"], told["camera_front_enabled"]["payload_on"]).command == "camera.enable"
    snapshot = sent(told["camera_front_take_snapshot"])
    assert (snapshot.command, snapshot.args) == ("camera.snapshot", {"camera": "front"})


def test_no_two_commands_have_one_id() -> None:
    told = components()
    buttons = [part for part in told.values() if part["p"] == "button"] * 5
    ids = [sent(button).id for button in buttons]

    assert len(set(ids)) == len(ids)
    assert all(len(command_id) <= 128 for command_id in ids)


def test_what_the_agent_refuses_is_not_offered() -> None:
    told = components(["front"], commands={"camera.snapshot", "camera.enable"})

    assert {part["p"] for part in told.values()} == {"binary_sensor", "sensor", "image", "button"}
    assert [name for name, part in told.items() if part["p"] == "button"] == ["camera_front_take_snapshot"]


def test_a_camera_that_is_gone_is_removed_by_its_platform_alone() -> None:
    before = discovery(topics=TOPICS, options=OPTIONS, cameras=["front", "back"], models=MODELS, version="1")
    after = discovery(
        topics=TOPICS, options=OPTIONS, cameras=["front"], models=MODELS, version="1", before=before.payload
    )
    gone = {name: part for name, part in json.loads(after.payload)["cmps"].items() if "camera_back" in name}

    assert gone == {
        "camera_back_connection": {"p": "binary_sensor"},
        "camera_back_fps": {"p": "sensor"},
        "camera_back_objects": {"p": "sensor"},
        "camera_back_enabled": {"p": "switch"},
        "camera_back_snapshot": {"p": "image"},
        "camera_back_take_snapshot": {"p": "button"},
    }
    assert list(json.loads(after.payload)["cmps"])[:6] == list(gone)

    last = components(["front"], before=after.payload)
    assert not any("camera_back" in name for name in last)


def test_a_camera_that_comes_back_is_whole_again() -> None:
    first = json.dumps(payload(["front"])).encode()
    without = json.dumps(payload([], before=first)).encode()

    assert components(["front"], before=without) == components(["front"])


@pytest.mark.parametrize(
    "junk", [b"", b"{", b"[]", b"null", b"\xff", b'{"cmps": 1}', b'{"cmps": {"a": {"b": 1, "c": 2}}}']
)
def test_a_payload_of_somebody_else_removes_nothing(junk: bytes) -> None:
    assert components(before=junk) == components()


def test_the_device_goes_with_an_empty_retained_payload_on_its_topic() -> None:
    message = removal(topics=TOPICS, options=OPTIONS)

    assert message.payload == b"" and message.retain
    assert message.topic == "homeassistant/device/edge_rig-1/config"


def test_the_birth_topic_follows_the_prefix() -> None:
    assert birth_topic(HomeAssistantOptions(prefix="ha")) == "ha/status"
    assert discovery(
        topics=TOPICS, options=HomeAssistantOptions(prefix="ha"), cameras=[], models=[], version="1"
    ).topic.startswith("ha/device/")


OFF = HomeAssistantOptions(enabled=False)
OURS = removal(topics=TOPICS, options=OPTIONS).topic


def presence(
    options: HomeAssistantOptions = OPTIONS, announced: Announced | None = None
) -> tuple[Presence, list[Message]]:
    published: list[Message] = []
    made = Presence(
        options, topics=TOPICS, version="1", commands=CONTROLS, publish=published.append, announced=announced
    )
    return made, published


def test_a_device_that_left_takes_nothing_that_it_hears_for_a_command() -> None:
    ours, published = presence()
    ours.leave()

    assert ours.hear(OURS, b"", is_retained=False)
    assert ours.hear(birth_topic(OPTIONS), b"online", is_retained=False)
    assert [(message.topic, message.payload) for message in published] == [(OURS, b"")]


def test_where_the_device_was_announced_is_known_to_the_next_run_until_it_has_gone(tmp_path: Path) -> None:
    path = tmp_path / "state" / "homeassistant.txt"
    assert Announced(path, TOPICS, OPTIONS).earlier == []  # and that run is killed
    assert Announced(path, TOPICS, OPTIONS).earlier == []
    announced = Announced(path, TOPICS, OFF)
    ours, published = presence(OFF, announced)
    ours.connected()

    assert announced.earlier == list(ours.listens) == [OURS]
    assert published == [removal(topics=TOPICS, options=OPTIONS)]
    assert ours.hear(OURS, b"what the broker kept", is_retained=True)
    announced.close()
    assert Announced(path, TOPICS, OFF).earlier == [OURS], "the broker has not confirmed that it is gone"
    assert ours.hear(OURS, b"", is_retained=False)
    announced.close()
    assert Announced(path, TOPICS, OFF).earlier == []
    ours.connected()
    assert len(published) == 1


def test_another_prefix_is_announced_beside_the_one_that_goes(tmp_path: Path) -> None:
    path, other = tmp_path / "homeassistant.txt", HomeAssistantOptions(enabled=True, prefix="ha")
    Announced(path, TOPICS, OPTIONS)

    assert Announced(path, TOPICS, other).earlier == [OURS]
    assert Announced(path, TOPICS, OFF).earlier == [removal(topics=TOPICS, options=other).topic, OURS]


@pytest.mark.parametrize("content", [b"\xff\xfe", b"a/#\n+\n\n", b""])
def test_a_file_that_makes_no_sense_takes_nothing_away(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "homeassistant.txt"
    path.write_bytes(content)

    assert Announced(path, TOPICS, OFF).earlier == []


def test_a_device_is_announced_though_nothing_can_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    ours, published = presence(OPTIONS, Announced(tmp_path / "file" / "homeassistant.txt", TOPICS, OPTIONS))
    ours.tell(["front"], MODELS)

    assert [message.topic for message in published] == [OURS]


def test_a_start_removes_nothing_of_what_is_still_there() -> None:
    kept = json.dumps(payload(["front", "back"])).encode()
    ours, published = presence()
    assert ours.hear(OURS, kept, is_retained=True)  # the broker is faster than cameras and models are
    ours.hear(birth_topic(OPTIONS), b"online", is_retained=False)
    ours.tell(["front"], [])
    assert published == []

    ours.tell(["front"], MODELS)
    [message] = published
    bare = {name for name, part in json.loads(message.payload)["cmps"].items() if len(part) == 1}
    assert {name.rpartition("camera_back_")[0] for name in bare} == {""}
    assert len(bare) == 6
