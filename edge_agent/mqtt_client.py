"""One connection to the broker: where it is, how it is secured, who logs in, and what a refusal means.

With `mqtt`, which keeps such connections for ever, the only file that imports aiomqtt.
"""

from __future__ import annotations

import hashlib
import os
import socket
import ssl
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import aiomqtt
from paho.mqtt.enums import LogLevel
from paho.mqtt.reasoncodes import ReasonCode

from edge_agent.config import MqttOptions, machine_id
from edge_agent.errors import ConfigError
from edge_agent.messages import Topics

CALL_TIMEOUT_S = 5.0
"""How long the broker has for an answer."""
_UNSPECIFIED = 0x80
"""What paho says of a connection that ended without a word."""
UNSUPPORTED_VERSION = (1, 0x84)
"""What CONNACK says to a version that a broker does not speak: MQTT 3.1.1, and 5."""


class Client(aiomqtt.Client):
    """aiomqtt's, which also says what the broker refuses: MQTT 5 answers a publish that its ACL denies with a reason
    code, and that looks like success else; and why a broker hung up before it answered, which it waits out else. Holds
    on to private names of aiomqtt 2.x and paho 2."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.on_refusal: Callable[[str, str], None] = lambda topic, reason: None
        self.on_acceptance: Callable[[str], None] = lambda topic: None
        self._topics_by_mid: dict[int, str] = {}
        self._complaint = ""
        publish = self._client.publish

        def noted(topic: str, *rest: Any, **more: Any) -> Any:
            client = self._client
            waits, client._registered_write = client._registered_write, True  # it asks for no turn of the loop yet
            try:
                info = publish(topic, *rest, **more)
            finally:
                client._registered_write = waits
            self._topics_by_mid[info.mid] = topic
            if not waits:
                self._write()
            return info

        self._client.publish = noted  # type: ignore[method-assign]
        self._client.on_log = self._note_complaint

    def _note_complaint(self, client: Any, userdata: Any, level: int, text: str) -> None:
        if level == LogLevel.MQTT_LOG_ERR:
            self._complaint = text.removeprefix("failed to receive on socket: ")

    def _write(self) -> None:
        """What is to be sent goes at once, as far as the socket takes it; the rest when the loop finds that it does."""
        try:
            self._client.loop_write()
        except Exception as error:  # noqa: BLE001  as aiomqtt does where the loop calls it
            if not self._disconnected.done():
                self._disconnected.set_exception(error)

    def abandon(self) -> None:
        """Drop the connection, with what it was still to send. aiomqtt leaves that of a connect that failed open: once
        the broker wakes up, it would take the session over from the one that works."""
        connection = self._client.socket()
        if isinstance(connection, socket.socket):
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._client._sock_close()
        if not self._disconnected.done():
            self._disconnected.set_result(None)

    def _on_socket_open(self, client: Any, userdata: Any, opened: Any) -> None:
        connection = getattr(opened, "_socket", opened)  # paho wraps that of a WebSocket
        if connection is not opened:
            opened.send = partial(_sent_whole, opened.send)
        if connection.family != socket.AF_UNIX:
            # Else the kernel holds a result back until the broker has acknowledged the one before: up to 40 ms.
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        super()._on_socket_open(client, userdata, opened)

    def _on_disconnect(self, *arguments: Any) -> None:
        if not self._connected.done():
            self._connected.set_exception(HungUp(self._complaint or "the broker hung up before it answered"))
            self._connected.exception()  # it is looked at, whoever else may not come to it
        super()._on_disconnect(*arguments)

    def _on_publish(self, client: Any, userdata: Any, mid: int, reason_code: ReasonCode, properties: Any) -> None:
        topic = self._topics_by_mid.pop(mid, "?")
        if is_refusal(reason_code):
            self.on_refusal(topic, str(reason_code))
        else:
            self.on_acceptance(topic)
        super()._on_publish(client, userdata, mid, reason_code, properties)


def _sent_whole(send: Callable[[Any], int], data: Any) -> int:
    """Paho's WebSocket says 0 where part of a frame went, and paho then forgets the packet: as if the socket were full,
    it asks again with the same packet, and the rest goes."""
    sent = send(data)
    if not sent:
        raise BlockingIOError
    return sent


class HungUp(aiomqtt.MqttError):
    """The broker closed the connection instead of answering CONNECT."""


@dataclass(frozen=True, slots=True)
class Identity:
    """Who this is to the broker, and whom it trusts."""

    client_id: str
    username: str | None
    password: str | None
    tls: ssl.SSLContext | None


def identity(options: MqttOptions, topics: Topics) -> Identity:
    """Read each time, since certificates and passwords are renewed. Raises `OSError`."""
    username, password = login(options)
    return Identity(client_id(options, topics), username, password, tls(options))


def client_id(options: MqttOptions, topics: Topics) -> str:
    """One of this machine's own, so that two of the same `device` do not throw each other out in turns."""
    if options.client_id:
        return options.client_id
    mark = hashlib.sha256(f"{machine_id()}{topics.root}".encode()).hexdigest()[:8]
    return f"edge-agent-{topics.device}-{mark}"


def check(options: MqttOptions) -> None:
    """Raises `ConfigError` where files that the link needs are missing or make no sense."""
    try:
        tls(options)
    except (OSError, ssl.SSLError) as error:
        raise ConfigError(f"mqtt.tls_ca, tls_cert, tls_key: {error}") from error


def login(options: MqttOptions, environ: Mapping[str, str] = os.environ) -> tuple[str | None, str | None]:
    """User and password: of the configuration, else systemd's credentials `mqtt-username` and `mqtt-password`."""
    username = options.username or _credential("mqtt-username", environ)
    password = options.password.reveal() if options.password else _credential("mqtt-password", environ)
    return username or None, password


def _credential(name: str, environ: Mapping[str, str]) -> str | None:
    folder = environ.get("CREDENTIALS_DIRECTORY")
    if not folder:
        return None
    try:
        return (Path(folder) / name).read_text(encoding="utf-8").strip()
    except (OSError, ValueError):
        return None


def tls(options: MqttOptions) -> ssl.SSLContext | None:
    if not (options.tls or options.tls_ca or options.tls_cert):
        return None
    context = ssl.create_default_context(cafile=options.tls_ca)
    if options.tls_cert:
        context.load_cert_chain(options.tls_cert, options.tls_key)
    if options.tls_insecure:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return context


def address(options: MqttOptions) -> str:
    if options.transport == "unix":
        return f"unix:{options.host}"
    return f"{options.host}:{options.port}"


def is_refusal(code: int | ReasonCode) -> bool:
    return (code if isinstance(code, int) else code.value) >= 0x80


def code_of(error: aiomqtt.MqttError) -> int | None:
    """The number by which the broker says why."""
    code = getattr(error, "rc", None)
    if isinstance(code, ReasonCode):
        return int(code.value)
    return code if isinstance(code, int) else None


_HINTS: Mapping[str, str] = {
    "connection was lost": "the broker ended, or the way to it broke, or another client has the same client id",
    "operation timed out": f"the broker did not answer for {CALL_TIMEOUT_S:g} s; it hangs, or nothing gets through",
    "not authori": "the broker knows nobody of this name, or its ACL denies it; check mqtt.username and mqtt.password",
    "bad user name": "check mqtt.username and mqtt.password",
    "bad username": "check mqtt.username and mqtt.password",
    "session taken over": "another client has the same client id; give this device a name of its own (agent.device)",
    "server busy": "the broker takes no more clients now",
    "server unavailable": "the broker is there and takes no clients now",
    "quota": "the broker's limit for this client is reached",
    "banned": "the broker has banned this client",
    "client identifier": "the broker does not take this client id; set mqtt.client_id",
    "certificate required": "the broker wants a client's certificate; set mqtt.tls_cert and mqtt.tls_key",
    "certificate_required": "the broker wants a client's certificate; set mqtt.tls_cert and mqtt.tls_key",
    "alert certificate expired": "this device's own certificate has expired; renew mqtt.tls_cert",
    "alert bad certificate": "the broker does not take this device's certificate; check mqtt.tls_cert",
    "alert unknown ca": "the broker does not know who signed this device's certificate; check mqtt.tls_cert",
    "is not valid for": "the broker's certificate is for another name; check mqtt.host",
    "hostname mismatch": "the broker's certificate is for another name; check mqtt.host",
    "ip address mismatch": "the broker's certificate is for another name; check mqtt.host",
    "certificate verify failed": "the broker's certificate is not trusted; set mqtt.tls_ca to the CA that signed it",
    "wrong version number": "there is no TLS on this port; try another mqtt.port, or tls = false",
    "websocket handshake": "no WebSockets there; check mqtt.port, mqtt.transport and mqtt.websocket_path",
    "name or service not known": "nobody knows this name; check mqtt.host",
    "no such file": "there is no such socket; check mqtt.host",
}


def explain(error: aiomqtt.MqttError, options: MqttOptions) -> str:
    """The broker's reason in a sentence, with what to do where we know it."""
    cause = error.__cause__ or error.__context__
    text = str(error)
    if isinstance(cause, aiomqtt.MqttCodeError) and code_of(cause) == _UNSPECIFIED:
        text = "the connection was lost"
    elif isinstance(cause, (OSError, aiomqtt.MqttCodeError)) and str(cause) not in text:
        text = f"{text}: {cause}"
    hint = next((hint for sign, hint in _HINTS.items() if sign in text.lower()), None) or _guess(error, text, options)
    return f"{text}; {hint}" if hint else text  # no colon: what stands behind "password:" is hidden in the log


def _guess(error: aiomqtt.MqttError, text: str, options: MqttOptions) -> str | None:
    """What may be wrong where the broker does not say."""
    if "protocol version" in text.lower() or code_of(error) == 0x84:
        return f"the broker does not speak MQTT {options.protocol}; set mqtt.protocol"
    if "connection refused" in text.lower():
        if options.transport == "unix":
            return "no broker listens on this socket; check mqtt.host"
        return "no broker listens there; is it running, and are mqtt.host and mqtt.port right?"
    if "connection reset" in text.lower() and options.tls:
        return "there may be no TLS on this port; try another mqtt.port, or tls = false"
    if isinstance(error, HungUp):
        wants_tls = "" if options.tls else ", or whether it wants TLS (mqtt.tls)"
        version = "5 or 3.1.1" if options.protocol == "auto" else options.protocol
        return f"check whether it speaks MQTT {version} (mqtt.protocol){wants_tls}"
    return None
