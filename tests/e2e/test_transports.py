"""Every way to a broker, and what an operator is told where there is none."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import paho.mqtt.client as paho
import pytest

from tests import brokers
from tests.brokers import RabbitMq, certificates, login
from tests.rigs import AgentProcess, Probe, Server, config, free_port, wait_until

pytestmark = [pytest.mark.slow, pytest.mark.soak]

CAMERA = '[cameras.a]\nsource = "synthetic"\n'


@dataclass(frozen=True)
class Way:
    """To a broker that runs: an agent's, and beside it a plain one for a `Probe`."""

    port: int
    mqtt: str
    plain_port: int
    version: int = paho.MQTTv5


MOSQUITTO: Mapping[str, Callable[[Path], Server]] = {
    "plain": brokers.plain,
    "password": brokers.passwords,
    "acl-file": brokers.acl_file,
    "acl": brokers.acl,
    "tls": lambda folder: brokers.tls(folder, certificates(folder)),
    "mutual-tls": lambda folder: brokers.mutual_tls(folder, certificates(folder)),
    "websockets": brokers.websockets,
    "websockets-tls": lambda folder: brokers.websockets(folder, certificates(folder)),
    "unix": brokers.unix_socket,
}
RABBITMQ = ("rabbitmq", "rabbitmq-websockets")


@pytest.fixture(params=[*MOSQUITTO, *RABBITMQ])
def way(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Way]:
    if request.param in RABBITMQ:
        broker: RabbitMq = request.getfixturevalue("rabbitmq")
        port, mqtt = (broker.port, "") if request.param == "rabbitmq" else (broker.web_port, broker.web_mqtt)
        with brokers.swept(broker):
            yield Way(port, mqtt, broker.plain_port, broker.version)
    else:
        with MOSQUITTO[request.param](tmp_path) as broker:
            yield Way(broker.port, broker.mqtt, broker.plain_port)


def test_results_come_commands_are_answered_and_an_end_in_order_is_told(tmp_path: Path, way: Way) -> None:
    with (
        Probe(way.plain_port, version=way.version) as probe,
        AgentProcess(tmp_path, config(way.port, CAMERA, mqtt=way.mqtt)) as agent,
    ):
        probe.wait("available", lambda text: text == "online")
        probe.wait("cameras/a/results", n=3)
        assert probe.command("agent.info")["status"] == "ok"
        assert agent.stop() == 0
        probe.wait("available", lambda text: text == "offline")
    assert len(agent.events("mqtt.connected")) == 1
    assert not agent.events("mqtt.disconnected")
    assert not agent.events("mqtt.refused")
    assert brokers.PASSWORD not in agent.text()


def test_other_clients_are_told_of_an_agent_that_was_killed(tmp_path: Path, way: Way) -> None:
    with (
        Probe(way.plain_port, version=way.version) as probe,
        AgentProcess(tmp_path, config(way.port, CAMERA, mqtt=way.mqtt)) as agent,
    ):
        probe.wait("available", lambda text: text == "online")
        probe.wait("cameras/a/results")
        assert [message.payload for message in probe.on("available")] == [b"online"]
        agent.process.kill()
        probe.wait("available", lambda text: text == "offline")


@pytest.mark.parametrize("protocol", ["auto", "5", "3.1.1"])
def test_the_protocol_is_the_one_that_was_asked_for_and_5_where_it_may_choose(tmp_path: Path, protocol: str) -> None:
    with brokers.plain(tmp_path) as broker, Probe(broker.plain_port) as probe:
        text = config(broker.port, CAMERA, mqtt=f'protocol = "{protocol}"')
        with AgentProcess(tmp_path, text) as agent:
            probe.wait("cameras/a/results")
            assert probe.command("agent.info")["status"] == "ok"
        [event] = agent.events("mqtt.connected")
    assert event["protocol"] == ("5" if protocol == "auto" else protocol)


def test_a_broker_that_knows_3_1_1_alone_and_hangs_up_on_5_gets_it(tmp_path: Path, rabbitmq: RabbitMq) -> None:
    with AgentProcess(tmp_path, config(rabbitmq.plain_port, CAMERA)) as agent:
        [event] = wait_until(lambda: agent.events("mqtt.connected"))
        assert event["protocol"] == "3.1.1"


def test_an_agent_that_may_speak_5_alone_says_what_to_set(tmp_path: Path, rabbitmq: RabbitMq) -> None:
    with AgentProcess(tmp_path, config(rabbitmq.plain_port, CAMERA, mqtt='protocol = "5"')) as agent:
        assert "mqtt.protocol" in refusals(agent)


def refusals(agent: AgentProcess, *, n: int = 2) -> str:
    """The reason the agent gives for not being connected, once it has tried `n` times."""
    wait_until(lambda: len(agent.events("mqtt.disconnected")) >= n, timeout_s=30, what=f"{n} attempts")
    assert agent.process.poll() is None
    assert not agent.events("mqtt.connected")
    assert brokers.PASSWORD not in agent.text()
    return str(agent.events("mqtt.disconnected")[-1]["reason"])


@pytest.mark.parametrize(("user", "password"), [("agent", "wrong"), ("nobody", brokers.PASSWORD), ("", "")])
def test_a_login_that_the_broker_does_not_take_is_told_as_such(tmp_path: Path, user: str, password: str) -> None:
    mqtt = login(tmp_path, user, password) if user else ""
    with (
        brokers.passwords(tmp_path) as broker,
        AgentProcess(tmp_path, config(broker.port, CAMERA, mqtt=mqtt)) as agent,
    ):
        reason = refusals(agent)
    assert "mqtt.username" in reason
    assert "mqtt.password" in reason


def test_a_login_that_rabbitmq_does_not_take_is_told_as_such(tmp_path: Path, rabbitmq: RabbitMq) -> None:
    mqtt = login(tmp_path, "guest", "wrong")
    with AgentProcess(tmp_path, config(rabbitmq.port, CAMERA, mqtt=mqtt)) as agent:
        assert "mqtt.password" in refusals(agent)


@pytest.mark.parametrize("transport", ["tcp", "websockets"])
def test_a_broker_of_an_unknown_ca_is_not_spoken_to(tmp_path: Path, transport: str) -> None:
    made = certificates(tmp_path)
    broker = brokers.tls(tmp_path, made) if transport == "tcp" else brokers.websockets(tmp_path, made)
    mqtt = broker.mqtt.replace(str(made.ca), str(made.stranger_ca))
    with broker, AgentProcess(tmp_path, config(broker.port, CAMERA, mqtt=mqtt)) as agent:
        assert "mqtt.tls_ca" in refusals(agent)


def test_without_a_ca_of_its_own_the_agent_trusts_those_of_the_system_alone(tmp_path: Path) -> None:
    with (
        brokers.tls(tmp_path, certificates(tmp_path)) as broker,
        AgentProcess(tmp_path, config(broker.port, CAMERA, mqtt="tls = true")) as agent,
    ):
        assert "mqtt.tls_ca" in refusals(agent)


def test_a_certificate_for_another_host_is_told_as_such(tmp_path: Path) -> None:
    with (
        brokers.tls(tmp_path, certificates(tmp_path, hosts=["elsewhere.example"])) as broker,
        AgentProcess(tmp_path, config(broker.port, CAMERA, mqtt=broker.mqtt)) as agent,
    ):
        reason = refusals(agent)
    assert "not valid for '127.0.0.1'" in reason
    assert "mqtt.host" in reason
    assert "set mqtt.tls_ca" not in reason


@pytest.mark.parametrize("hosts", [["localhost", "127.0.0.1"], ["elsewhere.example"]])
def test_whoever_turns_the_check_off_is_warned_and_connected(tmp_path: Path, hosts: list[str]) -> None:
    mqtt = "tls = true\ntls_insecure = true"
    with (
        brokers.tls(tmp_path, certificates(tmp_path, hosts=hosts)) as broker,
        Probe(broker.plain_port) as probe,
        AgentProcess(tmp_path, config(broker.port, CAMERA, mqtt=mqtt)) as agent,
    ):
        probe.wait("cameras/a/results")
        assert agent.events("mqtt.tls_insecure")


@pytest.mark.parametrize("client", [None, "expired", "not_yet", "stranger"])
def test_a_client_certificate_that_the_broker_does_not_take_is_told_as_such(tmp_path: Path, client: str | None) -> None:
    made = certificates(tmp_path)
    mqtt = made.client_lines(client) if client else f'tls = true\ntls_ca = "{made.ca}"'
    with (
        brokers.mutual_tls(tmp_path, made) as broker,
        AgentProcess(tmp_path, config(broker.port, CAMERA, mqtt=mqtt)) as agent,
    ):
        assert "mqtt.tls_cert" in refusals(agent)


def test_an_agent_without_tls_at_a_port_with_tls_is_told_to_try_it(tmp_path: Path) -> None:
    with (
        brokers.tls(tmp_path, certificates(tmp_path)) as broker,
        AgentProcess(tmp_path, config(broker.port, CAMERA)) as agent,
    ):
        assert "mqtt.tls" in refusals(agent)


def test_an_agent_with_tls_at_a_port_without_is_told_to_try_without(tmp_path: Path) -> None:
    made = certificates(tmp_path)
    mqtt = f'tls = true\ntls_ca = "{made.ca}"'
    with brokers.plain(tmp_path) as broker, AgentProcess(tmp_path, config(broker.port, CAMERA, mqtt=mqtt)) as agent:
        assert "tls" in refusals(agent).lower().replace("tls_ca", "")


def test_websockets_at_a_port_of_plain_mqtt_are_told_as_such(tmp_path: Path) -> None:
    mqtt = 'transport = "websockets"'
    with brokers.plain(tmp_path) as broker, AgentProcess(tmp_path, config(broker.port, CAMERA, mqtt=mqtt)) as agent:
        assert "mqtt.transport" in refusals(agent)


def test_a_wrong_path_of_websockets_is_told_as_such(tmp_path: Path, rabbitmq: RabbitMq) -> None:
    mqtt = rabbitmq.web_mqtt.replace("/ws", "/nowhere")
    with AgentProcess(tmp_path, config(rabbitmq.web_port, CAMERA, mqtt=mqtt)) as agent:
        assert "mqtt.websocket_path" in refusals(agent)


def test_a_port_where_nothing_listens_is_told_as_such(tmp_path: Path) -> None:
    with AgentProcess(tmp_path, config(free_port(), CAMERA)) as agent:
        assert "mqtt.port" in refusals(agent)


def test_a_name_that_nobody_knows_is_told_as_such(tmp_path: Path) -> None:
    with AgentProcess(tmp_path, config(1883, CAMERA, mqtt='host = "broker.invalid"')) as agent:
        reason = refusals(agent)
    assert "mqtt.host" in reason


def test_a_socket_that_is_not_there_is_told_as_such_and_found_when_it_is(tmp_path: Path) -> None:
    broker = brokers.unix_socket(tmp_path)
    with AgentProcess(tmp_path, config(broker.port, CAMERA, mqtt=broker.mqtt)) as agent:
        reason = refusals(agent)
        with broker, Probe(broker.plain_port) as probe:
            probe.wait("cameras/a/results")
    assert "mqtt.host" in reason


def test_a_path_that_is_no_socket_is_told_as_such(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("")
    mqtt = f'transport = "unix"\nhost = "{path}"'
    with AgentProcess(tmp_path, config(1883, CAMERA, mqtt=mqtt)) as agent:
        assert "mqtt.host" in refusals(agent)


@pytest.mark.parametrize("broker", [brokers.acl, brokers.acl_file])
@pytest.mark.parametrize("protocol", ["5", "3.1.1"])
def test_an_agent_that_may_not_publish_results_stays_connected_and_answers(
    tmp_path: Path, broker: Callable[[Path], Server], protocol: str
) -> None:
    with broker(tmp_path) as server, Probe(server.plain_port) as probe:
        mqtt = f'{login(tmp_path, "mute")}\nprotocol = "{protocol}"\n[mqtt.qos]\nresults = 1'
        with AgentProcess(tmp_path, config(server.port, CAMERA, mqtt=mqtt)) as agent:
            if protocol == "5":  # 3.1.1 has no word for it
                event = wait_until(lambda: agent.events("mqtt.refused"))[0]
                assert event["topic"].endswith("/cameras/a/results")
            probe.wait("available", lambda text: text == "online")
            assert probe.command("agent.info")["status"] == "ok"
            probe.wait("stats", n=2)
            assert probe.on("cameras/a/results") == []
            assert len(agent.events("mqtt.connected")) == 1
            assert len(agent.events("mqtt.refused")) <= 1
            assert agent.stop() == 0


@pytest.mark.parametrize("protocol", ["5", "3.1.1"])
def test_an_agent_that_may_not_subscribe_says_so_and_publishes(tmp_path: Path, protocol: str) -> None:
    with brokers.acl(tmp_path) as broker, Probe(broker.plain_port) as probe:
        mqtt = f'{login(tmp_path, "deaf")}\nprotocol = "{protocol}"'
        with AgentProcess(tmp_path, config(broker.port, CAMERA, mqtt=mqtt)) as agent:
            probe.wait("cameras/a/results", n=3)
            assert "edge/rig/cmd" in {event["topic"] for event in agent.events("mqtt.refused")}
            assert agent.stop() == 0
