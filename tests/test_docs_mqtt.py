"""docs/mqtt.md and docs/fleet.md: examples are real, tables complete, and the broker's rules do what is said."""

from __future__ import annotations

import json
import re
import subprocess
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, get_args

import msgspec
import paho.mqtt.client as paho
import pytest

from edge_agent import errors, health, messages, readings
from edge_agent.commands import described
from edge_agent.config import HealthOptions
from edge_agent.errors import CommandCode, EdgeAgentError, ModelCode
from edge_agent.metrics import Facts, families
from edge_agent.signing import Signatures
from tests import schemas
from tests.rigs import ROOT, Broker, Heard, Probe, need_program, wait_until

MQTT, FLEET = (ROOT / "docs" / name for name in ("mqtt.md", "fleet.md"))
PASSWORD = "hunter22"
NEVER_REPLIED = {"error", "source"}
"""Codes of classes that no command raises: the root's own, and what cameras tell in their status."""


def blocks(document: Path, language: str) -> list[tuple[str, str]]:
    """What is fenced as this language, each with the paragraph before it."""
    found, before, inside, opened = [], "", "", None
    for line in document.read_text().splitlines(keepends=True):
        if line.startswith("```"):
            if opened == language:
                found.append((before, inside))
            opened = line[3:].strip() if opened is None else None
            before, inside = ("", "") if opened is None else (before, "")
        elif opened is not None:
            inside += line
        else:
            before = before + line if line.strip() else ""
    assert found
    return found


def examples() -> list[tuple[str, str]]:
    """Topic and payload of each message that is shown."""
    return [(re.findall(r"`(edge/[^`]+)`", before)[-1], text.strip()) for before, text in blocks(MQTT, "json")]


def rows(document: Path, heading: str) -> list[list[str]]:
    """The cells of the table below a heading."""
    section = document.read_text().split(f"\n{heading}\n", 1)[1].split("\n#", 1)[0]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


@pytest.mark.parametrize(("topic", "text"), examples())
def test_an_example_is_what_its_topic_promises(topic: str, text: str) -> None:
    schemas.validate(Heard(topic, text.encode(), False, 0))
    kind = next((kind for kind in kinds() if kind[0].fullmatch(topic.split("/", 2)[2])), None)
    if kind is not None:  # a schema lets unknown keys pass
        again = json.loads(messages.encode(msgspec.json.decode(text, type=kind[1])))
        assert lies_in(json.loads(text), again)


def kinds() -> Iterator[tuple[re.Pattern[str], type[msgspec.Struct]]]:
    for address, kind in messages.contract().items():
        yield re.compile(re.sub(r"{\w+}", "[^/]+", address)), kind


def lies_in(less: Any, more: Any) -> bool:
    if isinstance(less, dict):
        return isinstance(more, dict) and all(key in more and lies_in(less[key], more[key]) for key in less)
    if isinstance(less, list):
        return len(less) == len(more) and all(map(lies_in, less, more))
    return bool(less == more)


def test_the_examples_show_every_kind_that_matters() -> None:
    shown = " ".join(topic for topic, _ in examples())
    parts = ("results", "events", "status", "health", "stats", "cmd", "reply/", "jobs/")
    assert all(part in shown for part in parts)
    replies = [json.loads(text)["status"] for topic, text in examples() if "/reply/" in topic]
    assert replies == ["accepted", "ok", "error"]


def test_the_examples_come_through_a_broker_as_they_are(broker: Broker, probe: Probe) -> None:
    for topic, text in examples():
        probe.publish(topic, text, retain=topic.endswith("line-3/status"))
    sent = [(topic, text.encode()) for topic, text in examples()]
    wait_until(lambda: len([one for one in list(probe.heard) if one.topic.startswith("edge/line-3/")]) == len(sent))
    assert [(one.topic, one.payload) for one in probe.heard] == sent
    with Probe(broker.port, "edge/+/status") as later:
        later.wait_topic("edge/line-3/status")
        assert [one.retain for one in later.heard] == [True]


def test_every_topic_is_listed() -> None:
    text = MQTT.read_text()
    for channel in schemas.document()["channels"].values():
        address = channel["address"].replace("{group}", "{name}").replace("{", "<").replace("}", ">")
        assert f"`{address}`" in text or f"`{address.removeprefix('<prefix>/<device>/')}`" in text, address


def test_what_is_said_to_be_retained_is_what_the_contract_says() -> None:
    told = {cells[0].strip("`"): cells[1] == "yes" for cells in rows(MQTT, "## Topics")}
    for channel in schemas.document()["channels"].values():
        if "bindings" in channel:
            name = channel["address"].removeprefix("{prefix}/{device}/").replace("{", "<").replace("}", ">")
            assert told.pop(name) == channel["bindings"]["mqtt"]["retain"], name
    assert told == {"available": True, "cameras/<camera>/snapshot": False}  # no JSON, so not in the contract


def test_every_command_is_there_as_it_describes_itself() -> None:
    told = [tuple(cells) for cells in rows(MQTT, "### What there is")]
    assert told == [
        (f"`{name}`", "yes" if one["is_long"] else "", one["description"]) for name, one in described().items()
    ]


def test_every_code_of_a_reply_is_explained_once() -> None:
    told = [code for cells in rows(MQTT, "### Errors") for code in re.findall(r"`(\w+)`", cells[0])]
    classes = {kind.code for kind in vars(errors).values() if is_error(kind)}
    known = {*get_args(CommandCode), *get_args(ModelCode), *classes, "internal", "shutdown"} - NEVER_REPLIED
    assert sorted(told) == sorted(known)


def test_every_check_of_health_is_explained() -> None:
    told = [cells[0].strip("`") for cells in rows(MQTT, "## Health")]
    facts = health.Facts(
        broker_connected=True,
        broker_error=None,
        model_state="ready",
        model_reason=None,
        cameras={"<name>": health.CameraFacts("running")},
    )
    assert sorted(told) == sorted(health.find(facts, HealthOptions()))


def test_what_is_well_is_what_the_configuration_says() -> None:
    told = {cells[0].strip("`"): float(cells[1]) for cells in rows(MQTT, "### What is well")}
    assert told == msgspec.structs.asdict(HealthOptions())


def test_each_thing_that_the_sensors_see_is_named() -> None:
    told = {cells[0].strip("`"): re.findall(r"`(\w+)`", cells[1]) for cells in rows(MQTT, "### The machine")}
    kinds = {
        "process": [readings.ProcessReadings],
        "host": [readings.HostReadings],
        "gpus": [readings.GpuReadings],
        "board": [readings.BoardReadings, readings.RailReadings],
    }
    assert {part: sorted(names) for part, names in told.items()} == {
        part: sorted(name for kind in parts for name in kind.__struct_fields__) for part, parts in kinds.items()
    }


def test_every_metric_is_told_and_each_that_is_told_is_there() -> None:
    pytest.importorskip("prometheus_client", reason="not installed: pip install 'edge-agent[prometheus]'")
    told = {name for cells in rows(MQTT, "### Prometheus") for name in re.findall(r"`([\w…]+)`", cells[0])}
    there = {family.name for family in families(everything())}
    matching = {name: [one for one in there if is_metric(one, name)] for name in told}
    assert all(matching.values()), matching
    assert there == {one for found in matching.values() for one in found}


def is_metric(full: str, told: str) -> bool:
    """Whether a metric is the one, or of the kind, that the table names."""
    name = full.removeprefix("edge_agent_")
    return (
        name.startswith(told[:-1]) if told.endswith("…") else name.removesuffix("_total") == told.removesuffix("_total")
    )


def everything() -> Facts:
    """The documented messages, of a machine with a GPU, on a board."""
    told = {kind: msgspec.json.decode(text, type=kind) for kind, text in documented()}
    seen = msgspec.structs.replace(
        told[messages.Stats], gpus=[readings.GpuReadings(index=0)], board=readings.BoardReadings()
    )
    return Facts(told[messages.Status], told[messages.Health], seen)


def documented() -> Iterator[tuple[Any, str]]:
    """What the device says of itself, with its type."""
    for topic, text in examples():
        kind = messages.contract().get(topic.removeprefix("edge/line-3/"))
        if kind is not None:
            yield kind, text


def is_error(kind: object) -> bool:
    return isinstance(kind, type) and issubclass(kind, EdgeAgentError) and "code" in vars(kind)


def test_a_command_is_signed_as_described(tmp_path: Path, broker: Broker, probe: Probe) -> None:
    pytest.importorskip("cryptography", reason="not installed: pip install 'edge-agent[signed]'")
    need_program("openssl", "openssl")
    need_program("mosquitto_pub", "mosquitto-clients")
    [(_, script)] = blocks(MQTT, "sh")
    script = script.replace("-h broker.example", f"-h 127.0.0.1 -p {broker.port}")
    subprocess.run(["bash", "-e", "-o", "pipefail", "-c", script], cwd=tmp_path, check=True, capture_output=True)
    probe.wait_topic("edge/line-3/cmd")
    text = Signatures(str(tmp_path / "operator.pem")).opened(probe.heard[-1].payload)
    assert msgspec.json.decode(text, type=messages.Command).device == "line-3"


def test_the_signed_example_is_signed_with_the_key_that_is_shown(tmp_path: Path) -> None:
    pytest.importorskip("cryptography", reason="not installed: pip install 'edge-agent[signed]'")
    [(_, key)] = [one for one in blocks(MQTT, "") if "PUBLIC KEY" in one[1]]
    (tmp_path / "operator.pem").write_text(key)
    [envelope] = [text for _, text in examples() if '"signed"' in text]
    assert json.loads(Signatures(str(tmp_path / "operator.pem")).opened(envelope.encode()))["id"] == "roll-1"


@pytest.mark.parametrize("document", sorted((ROOT / "docs").glob("*.md")), ids=lambda path: path.name)
def test_links_lead_somewhere(document: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", document.read_text()):
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        there = document.parent / path if path else document
        assert there.exists(), target
        headings = re.findall(r"^#+ (.*)$", there.read_text(), re.MULTILINE) if anchor else []
        assert not anchor or anchor in {heading.lower().replace(" ", "-").replace(",", "") for heading in headings}


class Client:
    """One user: what it hears of everything, and what the broker says to its publications."""

    def __init__(self, port: int, user: str) -> None:
        self.heard: list[str] = []
        self._answers: dict[int, Any] = {}
        self._ready = threading.Event()
        self._client = paho.Client(paho.CallbackAPIVersion.VERSION2, protocol=paho.MQTTv5)
        self._client.username_pw_set(user, PASSWORD)
        self._client.on_connect = lambda client, *rest: client.subscribe("#", qos=1)
        self._client.on_subscribe = lambda *rest: self._ready.set()
        self._client.on_message = lambda client, userdata, message: self.heard.append(message.topic)
        self._client.on_publish = lambda client, userdata, mid, code, *rest: self._answers.update({mid: code})
        self._client.connect("127.0.0.1", port)
        self._client.loop_start()
        assert self._ready.wait(5), f"{user} could not subscribe"

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *error: object) -> None:
        self._client.disconnect()
        self._client.loop_stop()

    def may_publish(self, topic: str) -> bool:
        """Publish, and say whether the broker took it."""
        number = self._client.publish(topic, "{}", qos=1).mid
        answer = wait_until(lambda: self._answers.get(number), what=f"PUBACK for {topic}")
        return not answer.is_failure


USERS = ("line-3", "line-4", "operator", "dashboard")


@pytest.fixture
def fleet(tmp_path: Path) -> Iterator[dict[str, Client]]:
    """Two devices, the operator and a dashboard at a mosquitto with the rules of docs/fleet.md."""
    [(_, rules)] = blocks(FLEET, "acl")
    users, acl = tmp_path / "users", tmp_path / "acl"
    acl.write_text(rules)
    users.write_text("".join(f"{name}:{PASSWORD}\n" for name in USERS))
    for file in (users, acl):
        file.chmod(0o600)
    subprocess.run([need_program("mosquitto_passwd", "mosquitto"), "-U", users], check=True, capture_output=True)
    config = f"allow_anonymous false\npassword_file {users}\nacl_file {acl}"
    with Broker(tmp_path, config=config) as broker, ExitStack() as stack:
        yield {name: stack.enter_context(Client(broker.port, name)) for name in USERS}


def test_a_device_publishes_below_its_own_name_alone(fleet: dict[str, Client]) -> None:
    line_3 = fleet["line-3"]
    assert line_3.may_publish("edge/line-3/status")
    assert line_3.may_publish("edge/line-3/cameras/gate/results")
    for topic in ("edge/line-4/status", "edge/line-4/cmd", "edge/all/cmd", "edge/group/north/cmd", "edge/x", "other"):
        assert not line_3.may_publish(topic), topic
    wait_until(lambda: len(fleet["dashboard"].heard) == 2)
    assert fleet["dashboard"].heard == ["edge/line-3/status", "edge/line-3/cameras/gate/results"]


def test_a_device_hears_its_own_commands_alone(fleet: dict[str, Client]) -> None:
    assert fleet["line-4"].may_publish("edge/line-4/status")
    for topic in ("edge/line-3/cmd", "edge/line-4/cmd", "edge/group/north/cmd", "edge/group/south/cmd", "edge/all/cmd"):
        assert fleet["operator"].may_publish(topic), topic
    for client in fleet.values():
        wait_until(lambda client=client: "edge/all/cmd" in client.heard)  # the last that was sent
    assert fleet["line-3"].heard == ["edge/line-3/cmd", "edge/group/north/cmd", "edge/all/cmd"]
    assert fleet["line-4"].heard == ["edge/line-4/cmd", "edge/all/cmd"]
    assert len(fleet["operator"].heard) == len(fleet["dashboard"].heard) == 6


def test_who_looks_commands_nobody_and_who_commands_does_not_speak_for_devices(fleet: dict[str, Client]) -> None:
    for topic in ("edge/line-3/cmd", "edge/all/cmd", "edge/line-3/status"):
        assert not fleet["dashboard"].may_publish(topic), topic
    assert not fleet["operator"].may_publish("edge/line-3/status")
