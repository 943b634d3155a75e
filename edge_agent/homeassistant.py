"""What Home Assistant is told, so that a device appears there by itself: MQTT device discovery, since its 2024.11.

Nothing here knows the broker. https://www.home-assistant.io/integrations/mqtt/#device-discovery-payload
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import TypeAlias

import structlog

from edge_agent.config import HomeAssistantOptions
from edge_agent.data import Message
from edge_agent.messages import Topics, is_publishable

log = structlog.get_logger()

Json: TypeAlias = "str | int | bool | Sequence[Json] | dict[str, Json]"
Component: TypeAlias = "dict[str, Json]"

CONTROLS = frozenset({"agent.restart", "camera.disable", "camera.enable", "camera.snapshot", "model.activate"})
"""The commands that Home Assistant sends."""

_MOST_BYTES = 1_000_000
"""Of a discovery message that is looked at."""

_ONLINE = '{{ "online" if value_json.state == "running" else "offline" }}'


class Announced:
    """Remembers over restarts on which topics this device was announced, so that it can be taken from there again.

    `earlier` are those of earlier runs that are not this one's. Opening and `close` block; `forget` does not. A run
    that was killed has forgotten nothing: the next takes away once more what is gone.
    """

    def __init__(self, path: Path | None, topics: Topics, options: HomeAssistantOptions) -> None:
        self._path = path
        self._kept = self._read()
        now = {_topic(topics, options)} if options.enabled else set()
        self.earlier = sorted(self._kept - now)
        self._topics = self._kept | now
        self.close()  # a run that is killed is remembered too

    def forget(self, topic: str) -> None:
        """Nothing of the device is there any more."""
        self._topics.discard(topic)

    def close(self) -> None:
        """Keep what is to be remembered."""
        if self._path is None or self._topics == self._kept:
            return
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._path.write_text("".join(f"{topic}\n" for topic in sorted(self._topics)), encoding="utf-8")
            self._kept = set(self._topics)
        except OSError as error:
            log.warning("homeassistant.not_remembered", path=str(self._path), reason=error.strerror)

    def _read(self) -> set[str]:
        try:
            text = self._path.read_text(encoding="utf-8") if self._path else ""
        except (OSError, ValueError):
            return set()
        return {topic for topic in text.splitlines() if is_publishable(topic)}


class Presence:
    """Keeps Home Assistant told of what there is. `commands`: those that the agent takes from it. `announced`: what
    earlier runs told it, and this one does not, goes."""

    def __init__(
        self,
        options: HomeAssistantOptions,
        *,
        topics: Topics,
        version: str,
        commands: Collection[str],
        publish: Callable[[Message], None],
        announced: Announced | None = None,
    ) -> None:
        self._options = options
        self._topics = topics
        self._version = version
        self._commands = commands
        self._publish = publish
        self._announced = announced or Announced(None, topics, options)
        self._leaving = set(self._announced.earlier)
        self._cameras: Sequence[str] = ()
        self._models: Sequence[str] = ()
        self._last = b""
        ours = [birth_topic(options), _topic(topics, options)] if options.enabled else []
        self.listens: Sequence[str] = [*ours, *self._announced.earlier]
        """The topics to hear: where Home Assistant says that it is there, and what the broker keeps of ours."""

    def connected(self) -> None:
        """There is a broker: the device goes from where it is to go, which the broker then confirms to `hear`."""
        for topic in self._leaving:
            self._publish(_empty(topic))

    def tell(self, cameras: Sequence[str], models: Sequence[str]) -> None:
        """These are there now; before anything else is told of them, or no more told. Until models are known nothing is
        announced: what a payload lacks is taken from Home Assistant, with all that people have made of it."""
        if models and (list(cameras), list(models)) != (self._cameras, self._models):
            self._cameras, self._models = list(cameras), list(models)
            self._tell(self._last)

    def leave(self) -> None:
        """The device goes from Home Assistant, with all its entities."""
        self._leaving.add(_topic(self._topics, self._options))
        self._publish(removal(topics=self._topics, options=self._options))
        self._options = HomeAssistantOptions(enabled=False)

    def hear(self, topic: str, payload: bytes, *, is_retained: bool) -> bool:
        """Whether a message was for this."""
        if topic not in self.listens:
            return False
        if topic in self._leaving:
            if not payload:
                self._leaving.discard(topic)
                self._announced.forget(topic)
        elif topic == birth_topic(self._options):
            if payload == b"online":
                self._tell(self._last)
        elif (
            is_retained and payload != self._last and len(payload) <= _MOST_BYTES
        ):  # of an earlier run, perhaps with cameras that are gone
            self._tell(payload)
        return True

    def _tell(self, before: bytes) -> None:
        if not self._options.enabled:
            return
        if not self._models:
            self._last = before
            return
        message = discovery(
            topics=self._topics,
            options=self._options,
            cameras=self._cameras,
            models=self._models,
            version=self._version,
            commands=self._commands,
            before=before,
        )
        self._last = message.payload
        self._publish(message)


def discovery(
    *,
    topics: Topics,
    options: HomeAssistantOptions,
    cameras: Sequence[str],
    models: Sequence[str],
    version: str,
    commands: Collection[str] = CONTROLS,
    before: bytes = b"",
) -> Message:
    """The device and its entities, to be kept by the broker.

    `models`: ids, as in the `models` topic. `commands`: those that the agent takes from Home Assistant; what sends
    others is left out. `before`: the payload that this one replaces, whichever process published it. What is in
    that one and no more in this one is removed by its bare platform, as Home Assistant wants it; the next payload is
    without it.
    """
    device = _object_id(topics)
    components = dict(_of_device(topics, models, commands))
    for camera in cameras:
        for name, component in _of_camera(topics, camera, commands):
            component["unique_id"] = f"{topics.root}/cameras/{camera}/{name}"
            components[f"camera_{_safe(camera)}_{name}"] = component
    for name, component in components.items():
        component["qos"] = 1
        component["default_entity_id"] = f"{component['p']}.{_slug(topics.device)}_{_slug(name)}"
    payload: dict[str, Json] = {
        "dev": {"ids": [device], "name": topics.device, "mf": "edge-agent", "mdl": "Edge AI agent", "sw": version},
        "o": {"name": "edge-agent", "sw": version},
        "avty": [{"t": topics.available}],
        "avty_mode": "all",
        # The removals come first: of a second payload in a row Home Assistant skips all from the first component on
        # that it still sets up.
        "cmps": {**_removals(before, components), **components},
    }
    return Message(_topic(topics, options), json.dumps(payload).encode(), "status", retain=True)


def removal(*, topics: Topics, options: HomeAssistantOptions) -> Message:
    """The device goes, with all its entities."""
    return _empty(_topic(topics, options))


def _empty(topic: str) -> Message:
    return Message(topic, b"", "status", retain=True)


def birth_topic(options: HomeAssistantOptions) -> str:
    """Where Home Assistant says `online` once it has started; discovery is then published again."""
    return f"{options.prefix}/status"


def _of_device(topics: Topics, models: Sequence[str], commands: Collection[str]) -> Iterator[tuple[str, Component]]:
    yield (
        "health",
        {
            "p": "binary_sensor",
            "name": "Health",
            "unique_id": f"{topics.root}/health",
            "device_class": "problem",
            "entity_category": "diagnostic",
            "state_topic": topics.health,
            "value_template": '{{ "OFF" if value_json.state == "ok" else "ON" }}',
            "json_attributes_topic": topics.health,
            "json_attributes_template": _CHECKS,
        },
    )
    yield (
        "latency",
        {
            "p": "sensor",
            "name": "Latency",
            "unique_id": f"{topics.root}/latency",
            "device_class": "duration",
            "state_class": "measurement",
            "unit_of_measurement": "ms",
            "suggested_display_precision": 1,
            "entity_category": "diagnostic",
            "state_topic": topics.stats,
            "value_template": '{{ (value_json.stages_ms.get("total") or {}).get("p95") }}',
        },
    )
    hot: Component = {"name": "Temperature", "device_class": "temperature", "unit_of_measurement": "°C"}
    load: Component = {"name": "GPU load", "icon": "mdi:expansion-card", "unit_of_measurement": "%"}
    used: Component = {"name": "Memory used", "icon": "mdi:memory", "unit_of_measurement": "%"}
    yield "temperature", _of_machine(topics, "temperature", hot, _TEMPERATURE)
    yield "gpu_load", _of_machine(topics, "gpu_load", load, _GPU_LOAD)
    yield "memory", _of_machine(topics, "memory", used, _MEMORY)
    if models and "model.activate" in commands:
        yield (
            "model",
            {
                "p": "select",
                "name": "Model",
                "unique_id": f"{topics.root}/model",
                "entity_category": "config",
                "options": list(models),
                "state_topic": topics.models,
                "value_template": _ACTIVE_MODEL,
                "command_topic": topics.command,
                "command_template": _command("model", '"model.activate"', '{"name": value}'),
            },
        )
    if "agent.restart" in commands:
        yield (
            "restart",
            {
                "p": "button",
                "name": "Restart",
                "unique_id": f"{topics.root}/restart",
                "device_class": "restart",
                "entity_category": "config",
                "command_topic": topics.command,
                "command_template": _command("restart", '"agent.restart"', "{}"),
            },
        )


def _of_machine(topics: Topics, key: str, component: Component, template: str) -> Component:
    """What the agent's sensors see; unknown where they see nothing of it."""
    return {
        "p": "sensor",
        **component,
        "unique_id": f"{topics.root}/{key}",
        "state_class": "measurement",
        "suggested_display_precision": 0,
        "entity_category": "diagnostic",
        "state_topic": topics.stats,
        "value_template": template,
    }


def _of_camera(topics: Topics, camera: str, commands: Collection[str]) -> Iterator[tuple[str, Component]]:
    status, key, safe = topics.camera(camera, "status"), _quoted(camera), _safe(camera)
    stats = f"(value_json.cameras.get({key}) or {{}})"
    while_running: Json = [{"t": topics.available}, {"t": status, "val_tpl": _ONLINE}]
    yield (
        "connection",
        {
            "p": "binary_sensor",
            "name": f"{camera} connection",
            "device_class": "connectivity",
            "entity_category": "diagnostic",
            "state_topic": status,
            "value_template": '{{ "ON" if value_json.state == "running" else "OFF" }}',
            "json_attributes_topic": status,
            "json_attributes_template": _WHY,
        },
    )
    yield (
        "fps",
        {
            "p": "sensor",
            "name": f"{camera} frame rate",
            "state_class": "measurement",
            "unit_of_measurement": "fps",
            "suggested_display_precision": 1,
            "entity_category": "diagnostic",
            "state_topic": topics.stats,
            "value_template": f'{{{{ {stats}.get("inferred_fps") }}}}',
        },
    )
    objects = f'{{% set objects = {stats}.get("objects") %}}'
    yield (
        "objects",
        {
            "p": "sensor",
            "name": f"{camera} objects",
            "icon": "mdi:shape-outline",
            "state_class": "measurement",
            "state_topic": topics.stats,
            "value_template": f"{objects}{{{{ objects.values() | sum if objects is mapping else None }}}}",
            "json_attributes_topic": topics.stats,
            "json_attributes_template": f"{objects}{{{{ (objects or {{}}) | tojson }}}}",
            "availability": while_running,
        },
    )
    if {"camera.enable", "camera.disable"} <= set(commands):
        yield (
            "enabled",
            {
                "p": "switch",
                "name": f"{camera} enabled",
                "entity_category": "config",
                "state_topic": status,
                "value_template": '{{ "off" if value_json.state == "disabled" else "on" }}',
                "state_on": "on",
                "state_off": "off",
                "payload_on": "camera.enable",
                "payload_off": "camera.disable",
                "command_topic": topics.command,
                "command_template": _command(f"{safe}-enabled", "value", f'{{"camera": {key}}}'),
            },
        )
    yield (
        "snapshot",
        {
            "p": "image",
            "name": f"{camera} snapshot",
            "image_topic": topics.camera(camera, "snapshot"),
            "content_type": "image/jpeg",
        },
    )
    if "camera.snapshot" in commands:
        yield (
            "take_snapshot",
            {
                "p": "button",
                "name": f"{camera} take snapshot",
                "icon": "mdi:camera",
                "command_topic": topics.command,
                "command_template": _command(f"{safe}-snapshot", '"camera.snapshot"', f'{{"camera": {key}}}'),
                "availability": while_running,
            },
        )


# Only what goes wrong is told in words: a fact such as an age differs in each message, and each would be recorded.
_CHECKS = (
    "{% set told = namespace(checks={}) %}{% for name, check in value_json.checks.items() %}"
    '{% set fact = check.state if check.state == "ok" else check.state ~ ": " ~ check.fact %}'
    "{% set told.checks = dict(told.checks, **{name: fact}) %}{% endfor %}{{ told.checks | tojson }}"
)
_WHY = '{{ {"state": value_json.state, "reason": value_json.reason, "message": value_json.message} | tojson }}'
_GPUS = '(value_json.get("gpus") or [])'
_BOARD = '(value_json.get("board") or {})'
_HIGHEST = "{% set known = seen | reject('none') | list %}{{ known | max if known else None }}"
_TEMPERATURE = (
    f'{{% set zones = ({_BOARD}.get("temperatures_c") or {{}}).values() | list %}}'
    f'{{% set seen = {_GPUS} | map(attribute="temperature_c") | list + zones %}}{_HIGHEST}'
)
_GPU_LOAD = (
    f'{{% set seen = {_GPUS} | map(attribute="utilisation_percent") | list %}}'
    f'{{% set seen = seen + [{_BOARD}.get("gpu_percent")] %}}{_HIGHEST}'
)
_MEMORY = (
    '{% set host = value_json.get("host") or {} %}'
    '{% set used, total = host.get("memory_used_mb"), host.get("memory_total_mb") %}'
    "{{ (100 * used / total) | round(1) if used is not none and total else None }}"
)
# A rung of the latency ladder is no option; that is unknown, and no error in Home Assistant's log at each message.
_ACTIVE_MODEL = (
    '{% set ids = value_json.models | map(attribute="id") | list %}'
    "{{ value_json.active if value_json.active in ids else None }}"
)


def _command(source: str, command: str, args: str) -> str:
    """A template of a command whose id is another each time; `command` and `args` are Jinja expressions."""
    return (
        f'{{{{ {{"id": "homeassistant-{source}-" ~ now().timestamp(), "command": {command}, "args": {args} }}'
        " | tojson }}"
    )


def _removals(before: bytes, components: Collection[str]) -> dict[str, Json]:
    """The platforms alone of components that were there and are not any more."""
    try:
        earlier = json.loads(before)["cmps"]
        platforms = {name: component["p"] for name, component in earlier.items() if len(component) > 1}
    except (RecursionError, ValueError, LookupError, TypeError, AttributeError):  # nothing, or no payload of ours
        return {}
    return {name: {"p": platform} for name, platform in platforms.items() if name not in components}


def _topic(topics: Topics, options: HomeAssistantOptions) -> str:
    return f"{options.prefix}/device/{_object_id(topics)}/config"


def _object_id(topics: Topics) -> str:
    return f"{_safe(topics.prefix)}_{_safe(topics.device)}"


def _safe(name: str) -> str:
    """A name in the signs that discovery takes; a changed one gets a part of its hash, so that no two become one."""
    safe = re.sub(r"[^a-zA-Z0-9_-]", "_", name)
    return safe if safe == name else f"{safe}_{hashlib.sha256(name.encode()).hexdigest()[:6]}"


def _slug(name: str) -> str:
    """A name as it may stand in an entity id; Home Assistant itself tells equal ones apart."""
    return re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_") or "unnamed"


def _quoted(text: str) -> str:
    """A string in a Jinja template, which has Python's escapes."""
    return '"' + text.encode("unicode_escape").decode().replace('"', '\\"') + '"'
