"""The broker goes and comes back; commands are answered."""

from __future__ import annotations

import json
import time
from pathlib import Path

import paho.mqtt.client as paho
import pytest
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties

from tests import schemas
from tests.brokers import on_all_brokers, on_brokers_of_mqtt_5
from tests.rigs import DEVICE, AgentProcess, Broker, Probe, Server, config, free_port, wait_until

pytestmark = pytest.mark.slow

CAMERA = '[cameras.a]\nsource = "synthetic"\n'


@on_all_brokers
def test_all_is_back_within_five_seconds_of_the_brokers_return(tmp_path: Path, broker: Server) -> None:
    with AgentProcess(tmp_path, config(broker.port, f"{CAMERA}[health]\nrecovery_s = 1.0\n")) as agent:
        with Probe(broker.plain_port, version=broker.version) as before:
            before.wait("cameras/a/results")
        killed = time.monotonic()
        broker.kill()
        wait_until(lambda: agent.events("mqtt.disconnected"))
        broker.start()
        began = time.monotonic()
        within_s = 5.0 if began - killed < 2.0 else 60.0  # RabbitMQ takes its time, and attempts become rare meanwhile
        with Probe(broker.plain_port, version=broker.version) as probe:
            probe.wait("available", lambda text: text == "online", timeout_s=within_s)
            probe.wait("health", lambda health: health["checks"]["broker"]["state"] == "ok", timeout_s=5)
            probe.wait("status", lambda status: "broker" not in status["degraded"], timeout_s=5)
            probe.wait("models", timeout_s=5)
            probe.wait("cameras/a/status", timeout_s=5)
            probe.wait("cameras/a/results", n=5, timeout_s=5)
            assert probe.command("agent.info", timeout_s=5)["status"] == "ok"
        assert time.monotonic() - began < within_s
        assert agent.stop() == 0


def test_an_agent_started_before_its_broker_finds_it(tmp_path: Path) -> None:
    broker = Broker(tmp_path)
    with AgentProcess(tmp_path, config(broker.port, CAMERA)) as agent:
        wait_until(lambda: agent.events("mqtt.disconnected"))
        with broker, Probe(broker.port) as probe:
            probe.wait("available", lambda text: text == "online", timeout_s=8)
            probe.wait("cameras/a/results")
            assert agent.stop() == 0


def test_results_beyond_the_outbox_push_out_the_oldest_and_are_counted(tmp_path: Path) -> None:
    broker = Broker(tmp_path)
    text = config(broker.port, CAMERA, mqtt="max_queued_results = 10")
    with AgentProcess(tmp_path, text) as agent:
        wait_until(lambda: len(agent.events("camera.frames")) >= 2, timeout_s=20)
        with broker, Probe(broker.port) as probe:
            results = probe.wait("cameras/a/results", n=15)
            stats = probe.wait("stats")[0].json()
            assert agent.stop() == 0
    assert results[0].json()["seq"] > 10
    assert stats["outbox"]["dropped"]["results"]["away"] > 10


def test_an_agent_that_never_had_a_broker_still_stops_at_once(tmp_path: Path) -> None:
    with AgentProcess(tmp_path, config(free_port(), CAMERA)) as agent:
        wait_until(lambda: agent.events("mqtt.disconnected") and agent.events("camera.running"))
        assert agent.stop(timeout_s=5) == 0


def test_a_wrong_password_is_told_as_such(tmp_path: Path) -> None:
    (tmp_path / "passwords").write_text("")
    rules = f"allow_anonymous false\npassword_file {tmp_path / 'passwords'}"
    mqtt = 'username = "agent"\npassword = "hunter22"'
    with (
        Broker(tmp_path, config=rules) as broker,
        AgentProcess(tmp_path, config(broker.port, CAMERA, mqtt=mqtt)) as agent,
    ):
        event = wait_until(lambda: agent.events("mqtt.disconnected"))[0]
    assert "check mqtt.username and mqtt.password" in event["reason"]
    assert "hunter22" not in agent.text()


@pytest.fixture
def agent(tmp_path: Path, broker: Server, probe: Probe) -> AgentProcess:
    with AgentProcess(tmp_path, config(broker.port, CAMERA)) as agent:
        probe.wait("cameras/a/results")
        yield agent


@on_all_brokers
def test_commands_are_answered_and_hold_the_contract(agent: AgentProcess, probe: Probe) -> None:
    info = probe.command("agent.info")
    status = probe.command("agent.status")
    models = probe.command("model.list")
    assert info["status"] == status["status"] == models["status"] == "ok"
    assert info["result"]["device"] == DEVICE
    assert set(info["result"]["commands"]) == set(schemas.document()["x-commands"])
    assert status["result"]["state"] == "running"
    assert status["result"]["backend"] == "onnx"
    assert {model["name"] for model in models["result"]["models"]} >= {"demo-320", "demo-160"}
    for message in probe.heard:
        if not message.topic.endswith("/cmd"):
            schemas.validate(message)


REFUSED = {
    '{"id": "x1", "command": "model.activat", "args": {}}': "unknown_command",
    '{"id": "x2", "command": "model.activate", "args": {}}': "bad_arguments",
    '{"id": "x3", "command": "model.activate", "args": {"name": 3}}': "bad_arguments",
    '{"id": "x4", "command": "agent.info", "args": {"x": 1}}': "bad_arguments",
    '{"id": "x5", "command": "camera.snapshot", "args": {"camera": "b"}}': "not_found",
    '{"id": "x6", "command": "agent.info", "expires_at": "2020-01-01T00:00:00Z"}': "expired",
    '{"id": "x7", "command": "agent.info", "expires_at": "soon"}': "bad_arguments",
    '{"id": "x8"}': "bad_arguments",
}


@on_all_brokers
def test_a_refused_command_is_answered_with_its_code(agent: AgentProcess, probe: Probe) -> None:
    for payload in REFUSED:
        probe.publish(f"edge/{DEVICE}/cmd", payload)
    replies = {payload: probe.wait(f"reply/{json.loads(payload)['id']}")[0].json() for payload in REFUSED}
    assert {payload: reply["code"] for payload, reply in replies.items()} == REFUSED
    assert {reply["status"] for reply in replies.values()} == {"error"}
    assert min(len(reply["message"]) for reply in replies.values()) > 10


@on_all_brokers
def test_garbage_on_the_command_topic_harms_nobody(agent: AgentProcess, probe: Probe) -> None:
    for payload in (b"", b"\xff\xfe", b"[" * 50_000, b"{}", b'"text"', b"x" * 100_000, b'{"id": 3}'):
        probe.publish(f"edge/{DEVICE}/cmd", payload)
    assert probe.command("agent.info")["status"] == "ok"


@on_brokers_of_mqtt_5
def test_a_response_topic_that_nobody_may_publish_to_is_passed_over(agent: AgentProcess, probe: Probe) -> None:
    for number, topic in enumerate(("a/#", "+/b")):
        properties = Properties(PacketTypes.PUBLISH)
        properties.ResponseTopic = topic
        command = json.dumps({"id": f"wild-{number}", "command": "agent.info"})
        probe.publish(f"edge/{DEVICE}/cmd", command, properties=properties)
        assert probe.wait(f"reply/wild-{number}")[0].json()["status"] == "ok"
    assert len(agent.events("mqtt.connected")) == 1


@on_all_brokers
def test_an_id_of_odd_signs_is_answered_on_a_topic_without_them(agent: AgentProcess, probe: Probe) -> None:
    command_id = "a\u0001+#/\u00e9"
    probe.publish(f"edge/{DEVICE}/cmd", json.dumps({"id": command_id, "command": "agent.info"}))
    assert probe.wait("reply/a____\u00e9")[0].json()["id"] == command_id
    assert len(agent.events("mqtt.connected")) == 1


def test_a_message_that_the_broker_never_takes_is_given_up(tmp_path: Path) -> None:
    with (
        Broker(tmp_path, config="allow_anonymous true\nmax_packet_size 20000") as broker,
        Probe(broker.port) as probe,
        AgentProcess(tmp_path, config(broker.port, CAMERA)) as agent,
    ):
        probe.wait("cameras/a/results")
        probe.publish(f"edge/{DEVICE}/cmd", '{"id": "s", "command": "camera.snapshot", "args": {"camera": "a"}}')
        [event] = wait_until(lambda: agent.events("mqtt.given_up"), timeout_s=20)
        given_up_at = event["timestamp"]
        wait_until(lambda: agent.events("mqtt.connected")[-1]["timestamp"] > given_up_at, what="the session after it")
        assert probe.command("agent.info")["status"] == "ok"
        assert agent.stop() == 0
    assert event["topic"].endswith("/cameras/a/snapshot")


@on_all_brokers
def test_the_same_id_gives_the_same_reply_and_is_done_once(agent: AgentProcess, probe: Probe) -> None:
    command = '{"id": "twice", "command": "model.activate", "args": {"name": "demo-160"}}'
    for _ in range(3):
        probe.publish(f"edge/{DEVICE}/cmd", command)
    is_last = lambda reply: reply["status"] != "accepted"  # noqa: E731
    first = probe.wait("reply/twice", is_last)[0].payload
    probe.publish(f"edge/{DEVICE}/cmd", command)
    assert {message.payload for message in probe.wait("reply/twice", is_last, n=2)} == {first}
    assert [message.json()["status"] for message in probe.on("reply/twice")] == ["accepted", "ok", "ok"]
    assert len([event for event in agent.events("model.activated") if event["model"] == "demo-160"]) == 1


@on_all_brokers
def test_a_retained_command_is_ignored_and_said_so(tmp_path: Path, broker: Server, probe: Probe) -> None:
    command = '{"id": "old", "command": "model.activate", "args": {"name": "demo-160"}}'
    probe.publish(f"edge/{DEVICE}/cmd", command, retain=True)
    with AgentProcess(tmp_path, config(broker.port, CAMERA)):
        reply = probe.wait("reply/old")[0].json()
        results = probe.wait("cameras/a/results", n=5)
    assert (reply["status"], reply["code"]) == ("error", "retained")
    assert {message.json()["model"]["name"] for message in results} == {"demo-320"}


@on_brokers_of_mqtt_5
def test_an_mqtt5_request_is_answered_where_it_asks(agent: AgentProcess, probe: Probe) -> None:
    properties = Properties(PacketTypes.PUBLISH)
    properties.ResponseTopic = "operators/inbox"
    properties.CorrelationData = b"\x01\x02"
    probe.publish(f"edge/{DEVICE}/cmd", '{"id": "r", "command": "agent.info"}', properties=properties)
    probe.wait_topic("operators/inbox")
    [message] = [message for message in probe.heard if message.topic == "operators/inbox"]
    assert message.json()["status"] == "ok"
    assert message.properties.CorrelationData == b"\x01\x02"
    assert probe.on("reply/r") == []


@on_brokers_of_mqtt_5
def test_the_agent_speaks_mqtt_3_too(tmp_path: Path, broker: Server) -> None:
    with Probe(broker.port, version=paho.MQTTv311) as probe:
        with AgentProcess(tmp_path, config(broker.port, CAMERA, mqtt='protocol = "3.1.1"')) as agent:
            probe.wait("cameras/a/results", n=3)
            assert probe.command("agent.info")["status"] == "ok"
            assert agent.stop() == 0
        probe.wait("available", lambda text: text == "offline")
