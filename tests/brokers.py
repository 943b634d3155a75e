"""Real brokers in the variants that people run: mosquitto by every way in, and a RabbitMQ, which is another broker.

Each is a context manager that leaves nothing behind. `config(broker.port, CAMERA, mqtt=broker.mqtt)` is what an agent
needs, and `Probe(broker.plain_port)` sees what it says: mosquitto has a second, open way in for that.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import signal
import socket
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta, timezone
from ipaddress import IPv4Address
from pathlib import Path
from typing import Any

import pytest

from tests.rigs import free_port, need_program, wait_until

PASSWORD = "hunter22"
RABBITMQ = Path("/usr/lib/rabbitmq/bin/rabbitmq-server")
DYNAMIC_SECURITY = "mosquitto_dynamic_security.so"


class Server:
    """A broker's process. `port` is where the agent goes, `plain_port` a plain way in for a `Probe`; `mqtt` are the
    lines of `[mqtt]` besides the port."""

    def __init__(
        self,
        command: Sequence[str],
        *,
        port: int,
        plain_port: int,
        log: Path,
        mqtt: str = "",
        environ: Mapping[str, str] | None = None,
        start_within_s: float = 10.0,
    ) -> None:
        self.port = port
        self.plain_port = plain_port
        self.mqtt = mqtt
        self.log = log
        self._command = command
        self._environ = {**os.environ, **(environ or {})}
        self._start_within_s = start_within_s
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                self._command, env=self._environ, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT
            )
        try:
            wait_until(self._is_there, timeout_s=self._start_within_s, what=f"{self._command[0]} listens")
        except AssertionError:
            print(self.text()[-3000:])
            self.kill()
            raise

    def kill(self) -> None:
        """SIGKILL: nobody is told, nothing is written."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def freeze(self) -> None:
        """It holds its connections and says nothing."""
        self._signal(signal.SIGSTOP)

    def thaw(self) -> None:
        self._signal(signal.SIGCONT)

    def text(self) -> str:
        return self.log.read_text(errors="replace")

    def __enter__(self) -> Server:
        self.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.kill()

    def _signal(self, number: signal.Signals) -> None:
        assert self._process is not None
        self._process.send_signal(number)

    def _is_there(self) -> bool:
        assert self._process is not None
        assert self._process.poll() is None, f"{self._command[0]} ended: {self.text()[-1000:]}"
        return _accepts(self.plain_port) and _accepts(self.port)


def _accepts(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
    except OSError:
        return False
    return True


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


def rabbitmq(folder: Path, *, transport: str = "tcp") -> Server:
    """A RabbitMQ of its own: node, ports, files, loopback only. Bookworm's 3.10 speaks MQTT 3.1.1 alone. What it does
    differently: retained messages reach subscriptions without wildcards only, and QoS 2 becomes 1."""
    if not RABBITMQ.exists():
        pytest.skip(f"{RABBITMQ} is not installed: apt-get install rabbitmq-server")
    mqtt_port, web_port, node_port = free_port(), free_port(), free_port()
    home = folder / f"rabbitmq-{mqtt_port}"
    home.mkdir()
    (home / "rabbitmq.conf").write_text(
        f"""listeners.tcp = none
mqtt.listeners.tcp.1 = 127.0.0.1:{mqtt_port}
mqtt.allow_anonymous = true
web_mqtt.tcp.ip = 127.0.0.1
web_mqtt.tcp.port = {web_port}
web_mqtt.ws_path = /ws
log.console = true
log.console.level = warning
log.file = false
"""
    )
    (home / "enabled_plugins").write_text("[rabbitmq_mqtt,rabbitmq_web_mqtt].")
    (home / ".erlang.cookie").write_text("edge-agent-tests")
    (home / ".erlang.cookie").chmod(0o400)
    is_web = transport == "websockets"
    return _RabbitMq(
        [str(RABBITMQ)],
        port=web_port if is_web else mqtt_port,
        plain_port=mqtt_port,
        log=home / "log.txt",
        mqtt='transport = "websockets"\nwebsocket_path = "/ws"' if is_web else "",
        environ={
            "HOME": str(home),
            "ERL_EPMD_PORT": str(free_port()),
            "ERL_EPMD_ADDRESS": "127.0.0.1",
            "RABBITMQ_CONF_ENV_FILE": "/dev/null",
            "RABBITMQ_CONFIG_FILE": str(home / "rabbitmq.conf"),
            "RABBITMQ_DIST_PORT": str(node_port),
            "RABBITMQ_ENABLED_PLUGINS_FILE": str(home / "enabled_plugins"),
            "RABBITMQ_LOG_BASE": str(home / "log"),
            "RABBITMQ_MNESIA_BASE": str(home / "mnesia"),
            "RABBITMQ_NODENAME": f"tests-{mqtt_port}@localhost",
            "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": "-kernel inet_dist_use_interface {127,0,0,1}",
            "RUNNING_UNDER_SYSTEMD": "true",  # the script then becomes the node, which signals reach
        },
        start_within_s=60.0,
    )


class _RabbitMq(Server):
    """Nodes find each other through epmd, which a node would start and leave running: here it has an owner."""

    _epmd: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        if self._epmd is None:
            command = [need_program("epmd", "erlang-base"), "-address", "127.0.0.1", "-relaxed_command_check"]
            self._epmd = subprocess.Popen(
                [*command, "-port", self._environ["ERL_EPMD_PORT"]], stderr=subprocess.DEVNULL
            )
            wait_until(lambda: _accepts(int(self._environ["ERL_EPMD_PORT"])), what="epmd listens")
        super().start()

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)
        if self._epmd is not None:
            self._epmd.kill()
            self._epmd.wait()


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
