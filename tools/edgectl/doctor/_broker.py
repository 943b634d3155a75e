"""The broker, as the agent meets it: reached, logged in to, listened to and published to.

The test message is a reply to a command that nobody sent, on `<prefix>/<device>/reply/doctor-…`: agents do not listen
there, and it is what docs/mqtt.md says of replies.
"""

from __future__ import annotations

import asyncio
import secrets
import socket
import time

import aiomqtt
import paho.mqtt.client as paho

from edge_agent import mqtt_client as link
from edge_agent.config import Config, MqttOptions
from edge_agent.messages import Reply, Topics, encode
from edgectl._client import BrokerError, Client, connected
from edgectl.doctor._subject import Subject
from edgectl.doctor._words import Finding

_REACH_S, _RETURN_S = 5.0, 3.0
_START_IT = "start the broker, or correct host and port in [mqtt]"


def broker(subject: Subject) -> list[Finding]:
    """All that can be said of it."""
    if subject.config is None:
        return [Finding("warn", "broker", "not looked at: the configuration cannot be read", "correct it first")]
    return asyncio.run(_Visit(subject.config, acl=subject.acl).findings())


class _Visit:
    """One look at a broker."""

    def __init__(self, config: Config, *, acl: bool) -> None:
        self._config = config
        self._options = config.mqtt
        self._topics = Topics(config.mqtt.prefix, config.device)
        self._acl = acl
        self._speaks_5 = False

    async def findings(self) -> list[Finding]:
        options, address = self._options, link.address(self._options)
        if (reason := await asyncio.to_thread(_unreachable, options)) is not None:
            if options.embedded:
                return [Finding("ok", "broker", f"embedded: the agent will open {address} when it runs")]
            return [Finding("fail", "broker", f"no broker at {address}: {reason}", _START_IT)]
        whose = ": the running agent's own, or `run` will refuse" if options.embedded else ""
        found = [Finding("ok", "broker", f"{address} accepts connections{whose}")]
        try:
            async with connected(self._config) as client:
                found.append(self._logged_in(client))
                found.append(await self._subscribed(client))
                found += await self._published(client)
        except (BrokerError, aiomqtt.MqttError) as error:
            cause = error.__cause__ if isinstance(error.__cause__, aiomqtt.MqttError) else error
            reason = link.explain(cause, options) if isinstance(cause, aiomqtt.MqttError) else str(error)
            fix = "correct [mqtt] as it says, or the users and rights that the broker knows"
            found.append(Finding("fail", "login" if len(found) == 1 else "acl", reason, fix))
        return found

    def _logged_in(self, client: Client) -> Finding:
        self._speaks_5 = client._client._protocol == paho.MQTTv5
        username, _ = link.login(self._options)
        user = f"user {username!r}" if username else "no user name"
        secured = ", over TLS" if link.tls(self._options) else ""
        return Finding("ok", "login", f"MQTT {'5' if self._speaks_5 else '3.1.1'} with {user}{secured}")

    async def _subscribed(self, client: Client) -> Finding:
        wanted = self._topics.listened(self._options.groups)
        refused = [topic for topic in wanted if any(map(link.is_refusal, await client.subscribe(topic, qos=1)))]
        if refused:
            fix = "let this user subscribe there, in the broker's ACL; commands do not arrive else"
            return Finding("fail", "acl", f"subscribing is refused: {', '.join(refused)}", fix)
        return Finding("ok", "acl", f"may subscribe to {', '.join(wanted)}")

    async def _published(self, client: Client) -> list[Finding]:
        found = [await self._round_trip(client)]
        for leaf in ("results", "events") if self._acl else ():
            topic = f"{self._topics.root}/cameras/edgectl-doctor/{leaf}"
            await client.publish(topic, b"", qos=1)
            found.append(self._may_publish(client, topic))
        return found

    async def _round_trip(self, client: Client) -> Finding:
        began = time.monotonic()
        test = f"doctor-{secrets.token_hex(8)}"
        topic = self._topics.reply(test)
        granted = await client.subscribe(topic, qos=1)
        message = Reply(
            device=self._topics.device,
            id=test,
            status="ok",
            duration_ms=round(1e3 * (time.monotonic() - began), 3),
            message="a test message of edgectl doctor",
        )
        began = time.monotonic()
        await client.publish(topic, encode(message), qos=1)
        verdict = self._may_publish(client, topic)
        if verdict.state == "fail":
            return verdict
        if not any(map(link.is_refusal, granted)) and await _arrives(client, topic):
            took_ms = 1e3 * (time.monotonic() - began)
            return Finding("ok", "acl", f"a message came back on {topic} after {took_ms:.1f} ms")
        return self._one_way(topic)

    def _may_publish(self, client: Client, topic: str) -> Finding:
        if reason := client.refused.get(topic):
            fix = f"let this user publish to {self._topics.root}/#, in the broker's ACL"
            return Finding("fail", "acl", f"publishing to {topic} is refused: {reason}", fix)
        if self._speaks_5:
            return Finding("ok", "acl", f"may publish to {topic}")
        return Finding("warn", "acl", f"sent to {topic}; MQTT 3.1.1 does not tell whether that is allowed")

    def _one_way(self, topic: str) -> Finding:
        """It was sent and did not come back."""
        root = self._topics.root
        if self._speaks_5:
            fact = f"a message to {topic} was taken and did not come back: this user may write there, and not read"
            fix = f"the agent itself reads {self._topics.command} alone: see that the ACL lets it"
        else:
            fact = f"a message to {topic} did not come back within {_RETURN_S:g} s; MQTT 3.1.1 does not tell why"
            fix = f"see that the broker's ACL lets this user write to {root}/# and read {self._topics.command}"
        return Finding("warn", "acl", fact, fix)


async def _arrives(client: Client, topic: str) -> bool:
    async def wait() -> None:
        async for message in client.messages:  # commands for the agent come in here too
            if str(message.topic) == topic:
                return

    try:
        await asyncio.wait_for(wait(), _RETURN_S)
    except asyncio.TimeoutError:
        return False
    return True


def _unreachable(options: MqttOptions) -> str | None:
    """Why nobody can be reached there."""
    try:
        if options.transport == "unix":
            with socket.socket(socket.AF_UNIX) as probe:
                probe.settimeout(_REACH_S)
                probe.connect(options.host)
        else:
            socket.create_connection((options.host, options.port), timeout=_REACH_S).close()
    except (OSError, UnicodeError) as error:  # a host name with an empty or over-long part
        return getattr(error, "strerror", None) or str(error)
    return None
