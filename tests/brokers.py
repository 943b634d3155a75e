"""Real brokers in the variants that people run: mosquitto by every way in, and a RabbitMQ, which is another broker.

Each is a context manager that leaves nothing behind. `config(broker.port, CAMERA, mqtt=broker.mqtt)` is what an agent
needs, and `Probe(broker.plain_port)` sees what it says: mosquitto has a second, open way in for that.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import subprocess
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from datetime import datetime, timedelta, timezone
from ipaddress import IPv4Address
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import paho.mqtt.client as paho
import pytest

from tests.rigs import Probe, Server, accepts, free_port, need_program, wait_until

PASSWORD = "hunter22"
RABBITMQ = "usr/lib/rabbitmq/bin/rabbitmq-server"
RABBITMQ_4 = "EDGE_AGENT_RABBITMQ_4"
DYNAMIC_SECURITY = "mosquitto_dynamic_security.so"

_OTHERS_OF_MQTT_5 = ["rabbitmq_4"] if RABBITMQ_4 in os.environ else []
OTHERS = ["rabbitmq", *_OTHERS_OF_MQTT_5]
"""The brokers besides mosquitto that the fixture `broker` can be."""


def _on(others: Iterable[str]) -> pytest.MarkDecorator:
    long = (pytest.mark.slow, pytest.mark.soak)
    names = ["mosquitto", *(pytest.param(name, marks=long) for name in others)]
    return pytest.mark.parametrize("broker", names, indirect=True)


on_all_brokers = _on(OTHERS)
"""For a test of what the agent says to a broker, which uses the fixture `broker`."""
on_brokers_of_mqtt_5 = _on(_OTHERS_OF_MQTT_5)
"""The same, for what there is in MQTT 5 alone: response topics, correlation data, reason codes."""


def plain(folder: Path) -> Server:
    """mosquitto, MQTT 5 and 3.1.1, open to all."""
    return _mosquitto(folder)


def passwords(folder: Path) -> Server:
    """mosquitto that knows one user, `agent`."""
    file = folder / "passwords"
    program = need_program("mosquitto_passwd", "mosquitto")
    subprocess.run([program, "-b", "-c", str(file), "agent", PASSWORD], check=True, capture_output=True)
    return _mosquitto(folder, f"allow_anonymous false\npassword_file {file}", mqtt=login(folder, "agent"))


def login(folder: Path, user: str, password: str = PASSWORD) -> str:
    """The lines of `[mqtt]` for a user, with the password in a file."""
    file = folder / f"password-{hashlib.sha256(password.encode()).hexdigest()[:8]}"
    file.write_text(password)
    return f'username = "{user}"\npassword_file = "{file}"'


def acl_file(folder: Path) -> Server:
    """mosquitto with an `acl_file`, as most have it. `agent` may do all; `mute` may not publish results and events (an
    MQTT 5 client is told, a 3.1.1 one is not); `deaf` may not read `cmd`: it may subscribe, and nothing ever comes."""
    rules = folder / "acl"
    rules.write_text(
        "user agent\ntopic readwrite #\n"
        "user mute\ntopic deny edge/+/cameras/+/results\ntopic deny edge/+/cameras/+/events\ntopic readwrite #\n"
        "user deaf\ntopic write #\n"
    )
    users = folder / "users"
    program = need_program("mosquitto_passwd", "mosquitto")
    users.write_text("".join(f"{name}:{PASSWORD}\n" for name in ("agent", "mute", "deaf")))
    users.chmod(0o600)
    subprocess.run([program, "-U", str(users)], check=True, capture_output=True)
    secured = f"allow_anonymous false\npassword_file {users}\nacl_file {rules}"
    return _mosquitto(folder, secured, mqtt=login(folder, "agent"))


def acl(folder: Path) -> Server:
    """mosquitto with its dynamic-security plug-in, which unlike an `acl_file` refuses subscriptions too. `agent` may do
    all, `mute` may not publish results and events, `deaf` may not subscribe to `cmd`."""
    denied = {
        "agent": [],
        "mute": [
            _rule("publishClientSend", f"edge/+/cameras/+/{leaf}", allow=False, priority=1)
            for leaf in ("results", "events")
        ],
        "deaf": [_rule("subscribePattern", "edge/+/cmd", allow=False, priority=1)],
    }
    allowed = [_rule(kind, "#") for kind in ("publishClientSend", "publishClientReceive", "subscribePattern")]
    state = {
        "defaultACLAccess": dict.fromkeys(
            ("publishClientSend", "publishClientReceive", "subscribe", "unsubscribe"), False
        )
        | {"publishClientReceive": True, "unsubscribe": True},
        "clients": [{"username": name, "roles": [{"rolename": name}], **_hashed(PASSWORD)} for name in denied],
        "groups": [],
        "roles": [{"rolename": name, "acls": [*rules, *allowed]} for name, rules in denied.items()],
    }
    file = folder / "dynamic-security.json"
    file.write_text(json.dumps(state))
    plugin = next((path for path in Path("/usr/lib").glob(f"*/{DYNAMIC_SECURITY}")), None)
    if plugin is None:
        pytest.skip(f"{DYNAMIC_SECURITY} is not installed: apt-get install mosquitto")
    secured = f"allow_anonymous false\nplugin {plugin}\nplugin_opt_config_file {file}"
    return _mosquitto(folder, secured, mqtt=login(folder, "agent"))


def _rule(kind: str, topic: str, *, allow: bool = True, priority: int = 0) -> dict[str, Any]:
    return {"acltype": kind, "topic": topic, "priority": priority, "allow": allow}


def _hashed(password: str) -> dict[str, Any]:
    salt, iterations = b"twelve bytes", 101
    hashed = hashlib.pbkdf2_hmac("sha512", password.encode(), salt, iterations)
    return {
        "password": base64.b64encode(hashed).decode(),
        "salt": base64.b64encode(salt).decode(),
        "iterations": iterations,
    }


def tls(folder: Path, certificates: Certificates) -> Server:
    """mosquitto with TLS, by a CA of its own."""
    return _mosquitto(folder, _server_side(certificates), mqtt=f'tls = true\ntls_ca = "{certificates.ca}"')


def mutual_tls(folder: Path, certificates: Certificates) -> Server:
    """mosquitto that asks clients for a certificate of its CA, and takes the common name for the user."""
    rules = f"{_server_side(certificates)}\nrequire_certificate true\nuse_identity_as_username true"
    return _mosquitto(folder, rules, mqtt=certificates.client_lines("client"))


def websockets(folder: Path, certificates: Certificates | None = None) -> Server:
    """mosquitto over WebSockets (it takes any path), with TLS if there are certificates."""
    rules = "protocol websockets\nallow_anonymous true"
    mqtt = 'transport = "websockets"\nwebsocket_path = "/mqtt"'
    if certificates is not None:
        rules = f"{rules}\n{_server_side(certificates)}"
        mqtt = f'{mqtt}\ntls = true\ntls_ca = "{certificates.ca}"'
    return _mosquitto(folder, rules, mqtt=mqtt)


def unix_socket(folder: Path) -> Server:
    """mosquitto at the socket `folder`/mqtt.sock."""
    path = folder / "mqtt.sock"
    mqtt = f'host = "{path}"\ntransport = "unix"'
    return _mosquitto(folder, listener=f"listener 0 {path}", mqtt=mqtt)


class RabbitMq(Server):
    """A RabbitMQ of its own: node, ports, files, loopback only. What it does differently: what it keeps of a topic
    reaches subscriptions without wildcards only, a dot in a topic is a slash, and QoS 2 is 1.

    Bookworm's, 3.10, speaks MQTT 3.1.1 alone. `root` is that of the Debian it is installed in.
    """

    keeps_for_wildcards = False

    def __init__(self, folder: Path, *, version: int = paho.MQTTv311, root: Path = Path("/")) -> None:
        if not (root / RABBITMQ).exists():
            pytest.skip(f"/{RABBITMQ} is not installed in {root}: apt-get install rabbitmq-server")
        mqtt_port, self.web_port, self._epmd_port = free_port(), free_port(), free_port()
        home = folder / f"rabbitmq-{mqtt_port}"
        home.mkdir()
        (home / "rabbitmq.conf").write_text(
            f"""listeners.tcp = none
mqtt.listeners.tcp.1 = 127.0.0.1:{mqtt_port}
mqtt.allow_anonymous = true
web_mqtt.tcp.ip = 127.0.0.1
web_mqtt.tcp.port = {self.web_port}
web_mqtt.ws_path = /ws
log.console = true
log.console.level = warning
log.file = false
"""
        )
        (home / "enabled_plugins").write_text("[rabbitmq_mqtt,rabbitmq_web_mqtt].")
        (home / ".erlang.cookie").write_text("edge-agent-tests")
        (home / ".erlang.cookie").chmod(0o400)
        self._within = [] if root == Path("/") else [need_program("chroot", "coreutils"), str(root)]
        seen = "/" / home.relative_to(root)
        super().__init__(
            [*self._within, f"/{RABBITMQ}"],
            port=mqtt_port,
            plain_port=mqtt_port,
            log=home / "log.txt",
            version=version,
            environ={
                "HOME": str(seen),
                "ERL_EPMD_PORT": str(self._epmd_port),
                "ERL_EPMD_ADDRESS": "127.0.0.1",
                "RABBITMQ_CONF_ENV_FILE": "/dev/null",
                "RABBITMQ_CONFIG_FILE": str(seen / "rabbitmq.conf"),
                "RABBITMQ_DIST_PORT": str(free_port()),
                "RABBITMQ_ENABLED_PLUGINS_FILE": str(seen / "enabled_plugins"),
                "RABBITMQ_LOG_BASE": str(seen / "log"),
                "RABBITMQ_MNESIA_BASE": str(seen / "mnesia"),
                "RABBITMQ_NODENAME": f"tests-{mqtt_port}@localhost",
                "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": "-kernel inet_dist_use_interface {127,0,0,1}",
                "RUNNING_UNDER_SYSTEMD": "true",  # the script then becomes the node, which signals reach
            },
            start_within_s=60.0,
        )
        self.web_mqtt = 'transport = "websockets"\nwebsocket_path = "/ws"'
        self._epmd: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Nodes find each other through epmd, which a node would start and leave running: here it has an owner."""
        if self._epmd is None:
            command = [*self._within, "/usr/bin/epmd", "-address", "127.0.0.1", "-relaxed_command_check"]
            self._epmd = subprocess.Popen([*command, "-port", str(self._epmd_port)], stderr=subprocess.DEVNULL)
            wait_until(lambda: accepts(self._epmd_port), what="epmd listens")
        super().start()

    def __enter__(self) -> RabbitMq:
        try:
            self.start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)
        if self._epmd is not None:
            self._epmd.kill()
            self._epmd.wait()

    def _is_there(self) -> bool:
        return super()._is_there() and accepts(self.web_port)


@contextmanager
def rabbitmq_4() -> Iterator[RabbitMq]:
    """RabbitMQ 4, which speaks MQTT 5, from a Debian 13 in the folder EDGE_AGENT_RABBITMQ_4; as root, made with
    `debootstrap --variant=minbase --include=rabbitmq-server trixie FOLDER http://deb.debian.org/debian`."""
    root = Path(os.environ[RABBITMQ_4])
    with TemporaryDirectory(dir=root / "tmp") as home, RabbitMq(Path(home), version=paho.MQTTv5, root=root) as broker:
        yield broker


class Sweeper(Probe):
    """Clears what a broker has kept."""

    def sweep(self, topics: Iterable[str]) -> None:
        for topic in set(topics):
            self.publish(topic, b"", retain=True)

    def hold_to_the_contract(self) -> None:
        """That is for those who listen for its sake."""


@contextmanager
def swept(broker: Server) -> Iterator[None]:
    """Afterwards the broker runs, whatever was done to it, and keeps nothing of what was said meanwhile."""
    with ExitStack() as stack:
        listener = None
        if not broker.keeps_for_wildcards:
            listener = stack.enter_context(Sweeper(broker.plain_port, version=broker.version))
        try:
            yield
        finally:
            broker.revive()
        if listener is not None:
            wait_until(listener.is_connected, what="the sweeper is back")
            listener.sweep(message.topic for message in list(listener.heard))
            return
        with Sweeper(broker.plain_port, version=broker.version) as sweeper:
            sweeper.publish("edge/sweep", "done")
            sweeper.wait_topic("edge/sweep")
            sweeper.sweep(message.topic for message in list(sweeper.heard) if message.retain)


def _mosquitto(folder: Path, rules: str = "allow_anonymous true", *, mqtt: str = "", listener: str = "") -> Server:
    """One with two ways in: `rules` hold for the agent's; the other is open. `listener`: instead of a TCP port."""
    program = need_program("mosquitto", "mosquitto")
    plain_port = free_port()
    port = plain_port if listener else free_port()
    file = folder / f"mosquitto-{plain_port}.conf"
    file.write_text(
        f"""user root
per_listener_settings true
log_type all
listener {plain_port} 127.0.0.1
allow_anonymous true
{listener or f"listener {port} 127.0.0.1"}
{rules}
"""
    )
    return Server([program, "-c", str(file)], port=port, plain_port=plain_port, log=file.with_suffix(".log"), mqtt=mqtt)


def _server_side(certificates: Certificates) -> str:
    pair = certificates.server
    return f"allow_anonymous true\ncafile {certificates.ca}\ncertfile {pair.certificate}\nkeyfile {pair.key}"


@dataclass(frozen=True)
class Pair:
    certificate: Path
    key: Path


@dataclass(frozen=True)
class Certificates:
    """A CA and what it has signed: `server` for localhost and 127.0.0.1, `clients` `client`, `expired` and
    `not_yet`; the client `stranger` is of another CA, `stranger_ca`."""

    ca: Path
    server: Pair
    stranger_ca: Path
    clients: Mapping[str, Pair] = field(default_factory=dict)

    def client_lines(self, name: str) -> str:
        """The lines of `[mqtt]` for a client's certificate."""
        pair = self.clients[name]
        return f'tls = true\ntls_ca = "{self.ca}"\ntls_cert = "{pair.certificate}"\ntls_key = "{pair.key}"'


def certificates(folder: Path, *, hosts: Sequence[str] = ("localhost", "127.0.0.1")) -> Certificates:
    """New ones, good for a day; `hosts` are the names and addresses of the server."""
    pytest.importorskip("cryptography", reason="cryptography is not installed: pip install 'edge-agent[signed]'")
    ours, theirs = _Authority(folder, "ca"), _Authority(folder, "stranger-ca")
    now, day = datetime.now(timezone.utc), timedelta(days=1)
    return Certificates(
        ca=ours.pair.certificate,
        server=ours.sign("server", hosts=hosts),
        stranger_ca=theirs.pair.certificate,
        clients={
            "client": ours.sign("client"),
            "expired": ours.sign("expired", until=now - day),
            "not_yet": ours.sign("not_yet", since=now + day, until=now + 2 * day),
            "stranger": theirs.sign("stranger"),
        },
    )


class _Authority:
    def __init__(self, folder: Path, name: str) -> None:
        self._folder = folder
        self._subject = _common_name(name)
        self._key, self.pair = self._write(name, self._subject, is_ca=True)

    def sign(
        self, name: str, *, hosts: Sequence[str] = (), since: datetime | None = None, until: datetime | None = None
    ) -> Pair:
        return self._write(name, _common_name(name), hosts=hosts, since=since, until=until)[1]

    def _write(
        self,
        name: str,
        subject: Any,
        *,
        hosts: Sequence[str] = (),
        is_ca: bool = False,
        since: datetime | None = None,
        until: datetime | None = None,
    ) -> tuple[Any, Pair]:
        from cryptography import x509
        from cryptography.hazmat.primitives import hashes, serialization
        from cryptography.hazmat.primitives.asymmetric import ec

        now, day = datetime.now(timezone.utc), timedelta(days=1)
        key = ec.generate_private_key(ec.SECP256R1())
        signer = key if is_ca else self._key
        builder = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self._subject)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(since or now - 7 * day)
            .not_valid_after(until or now + day)
            .add_extension(x509.BasicConstraints(ca=is_ca, path_length=None), critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key()), critical=False)
            .add_extension(_usage(is_ca), critical=True)
        )
        if hosts:
            names = [_general_name(host) for host in hosts]
            builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
        pair = Pair(self._folder / f"{name}.pem", self._folder / f"{name}.key")
        signed = builder.sign(signer, hashes.SHA256())
        pair.certificate.write_bytes(signed.public_bytes(serialization.Encoding.PEM))
        pair.key.write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            )
        )
        return key, pair


def _common_name(name: str) -> Any:
    from cryptography import x509
    from cryptography.x509.oid import NameOID

    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])


def _general_name(host: str) -> Any:
    from cryptography import x509

    return x509.IPAddress(IPv4Address(host)) if host[0].isdigit() else x509.DNSName(host)


def _usage(is_ca: bool) -> Any:
    from cryptography import x509

    uses = ("digital_signature", "content_commitment", "key_encipherment", "data_encipherment", "key_agreement")
    more = ("key_cert_sign", "crl_sign", "encipher_only", "decipher_only")
    granted = {"key_cert_sign", "crl_sign"} if is_ca else {"digital_signature"}
    return x509.KeyUsage(**{use: use in granted for use in (*uses, *more)})
