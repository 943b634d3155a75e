"""Downloads against a real HTTPS server on this machine, well-behaved and otherwise."""

from __future__ import annotations

import base64
import contextlib
import gzip
import hashlib
import io
import ipaddress
import json
import socket
import ssl
import struct
import subprocess
import sys
import tarfile
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from edge_agent.config import FetchOptions
from edge_agent.errors import ModelError
from edge_agent.models.fetch import NpmMember, PypiMember, Source, fetch
from edge_agent.models.signatures import check_signature, require_signature_allowed
from tests.rigs import need_program

pytestmark = pytest.mark.slow

MODEL = bytes(range(256)) * 1200  # 307 kB: several blocks
SHA256 = hashlib.sha256(MODEL).hexdigest()
PUBLIC = "93.184.216.34"

Page = Callable[[BaseHTTPRequestHandler], None]


class Server:
    """Serves `pages`, each of which is bytes, or a function that answers by itself."""

    def __init__(self, certificate: tuple[Path, Path] | None) -> None:
        self.pages: dict[str, bytes | Page] = {}
        self.asked: list[tuple[str, Any]] = []
        self.closing = threading.Event()
        server = self

        class Answer(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                server.asked.append((self.path, self.headers))
                page = server.pages.get(self.path.partition("?")[0])
                with contextlib.suppress(OSError):
                    if page is None:
                        self.send_error(404)
                    elif isinstance(page, bytes):
                        head(self, 200, {"Content-Length": str(len(page))})
                        self.wfile.write(page)
                    else:
                        page(self)

            def log_message(self, *args: Any) -> None:
                pass

        class Quiet(ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, *args: Any) -> None:  # a client that hangs up is what is tested
                pass

        self._server = Quiet(("127.0.0.1", 0), Answer)
        self.port = self._server.server_port
        if certificate:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(*certificate)
            self._server.socket = context.wrap_socket(self._server.socket, server_side=True)
        self.url = f"http{'s' if certificate else ''}://localhost:{self.port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)

    def __enter__(self) -> Server:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.closing.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def head(answer: BaseHTTPRequestHandler, status: int, headers: dict[str, str]) -> None:
    answer.send_response(status)
    for name, value in headers.items():
        answer.send_header(name, value)
    answer.end_headers()


def redirect(to: str, status: int = 302) -> Page:
    return lambda answer: head(answer, status, {"Location": to, "Content-Length": "0"})


def sends(body: bytes, **headers: str) -> Page:
    def page(answer: BaseHTTPRequestHandler) -> None:
        head(answer, 200, {name.replace("_", "-"): value for name, value in headers.items()})
        answer.wfile.write(body)

    return page


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A self-signed certificate for localhost and its key."""
    folder = tmp_path_factory.mktemp("tls")
    command = f"""{need_program("openssl", "openssl")} req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=localhost
        -addext subjectAltName=DNS:localhost,IP:127.0.0.1 -keyout {folder}/key.pem -out {folder}/cert.pem"""
    subprocess.run(command.split(), check=True, capture_output=True)
    return folder / "cert.pem", folder / "key.pem"


@pytest.fixture
def server(certificate: tuple[Path, Path]) -> Iterator[Server]:
    with Server(certificate) as server:
        server.pages["/model.onnx"] = MODEL
        yield server


@pytest.fixture
def plain_server() -> Iterator[Server]:
    with Server(None) as server:
        server.pages["/model.onnx"] = MODEL
        yield server


@pytest.fixture
def options(certificate: tuple[Path, Path]) -> FetchOptions:
    return FetchOptions(
        allow_private=True, ca_file=str(certificate[0]), max_mb=1.0, timeout_s=10.0, stall_timeout_s=5.0
    )


@pytest.fixture
def into(tmp_path: Path) -> Path:
    """Where the file is to be, in a folder where there must be nothing else afterwards."""
    folder = tmp_path / "scratch"
    folder.mkdir()
    return folder / "model.onnx"


@pytest.fixture(scope="module")
def anywhere(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same for all the examples of a test."""
    return tmp_path_factory.mktemp("anywhere") / "model.onnx"


def refused(source: Source | str, into: Path, options: FetchOptions, **more: Any) -> ModelError:
    """The error; there must be nothing left of the file."""
    source = source if isinstance(source, Source) else Source(url=source)
    with pytest.raises(ModelError) as caught:
        fetch(source, into, **{"sha256": SHA256, "options": options, **more})
    assert list(into.parent.iterdir()) == []
    return caught.value


@pytest.fixture
def internet(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """`localhost` is a public address for once, the connections to which lead to this machine; where they went."""
    went: list[Any] = []
    real = socket.getaddrinfo

    def resolve(host: str, port: int, **more: Any) -> Any:
        return real(PUBLIC if host == "localhost" else host, port, **more)

    class Diverted(socket.socket):
        def connect(self, address: Any) -> None:
            went.append(address)
            super().connect(("127.0.0.1", address[1]) if address[0] == PUBLIC else address)

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    monkeypatch.setattr(socket, "socket", Diverted)
    return went


# What comes


def test_a_file_is_fetched_and_checked(server: Server, options: FetchOptions, into: Path) -> None:
    told: list[tuple[str, float | None]] = []
    fetch(
        Source(url=f"{server.url}/model.onnx?token=1"),
        into,
        sha256=SHA256.upper(),
        options=options,
        progress=lambda *word: told.append(word),
    )
    assert into.read_bytes() == MODEL
    assert list(into.parent.iterdir()) == [into]
    assert told[0][0] == "download"
    assert told[0][1] == pytest.approx(100 * 65536 / len(MODEL))
    path, headers = server.asked[0]
    assert path == "/model.onnx?token=1"
    assert headers["Host"] == f"localhost:{server.port}"
    assert headers["User-Agent"].startswith("edge-agent/")


@pytest.mark.parametrize("chunked", [False, True])
def test_a_file_of_unknown_length_is_fetched_too(
    server: Server, options: FetchOptions, into: Path, chunked: bool
) -> None:
    def page(answer: BaseHTTPRequestHandler) -> None:
        answer.protocol_version = "HTTP/1.1"
        head(answer, 200, {"Transfer-Encoding": "chunked"} if chunked else {})
        half = len(MODEL) // 2
        for part in (MODEL[:half], MODEL[half:]):
            answer.wfile.write(b"%x\r\n%b\r\n" % (len(part), part) if chunked else part)
        answer.wfile.write(b"0\r\n\r\n" if chunked else b"")

    server.pages["/stream"] = page
    told: list[float | None] = []
    fetch(
        Source(url=f"{server.url}/stream"),
        into,
        sha256=SHA256,
        options=options,
        progress=lambda phase, percent: told.append(percent),
    )
    assert into.read_bytes() == MODEL
    assert told == [None]


def test_another_file_than_the_one_that_was_asked_for_is_refused(
    server: Server, options: FetchOptions, into: Path
) -> None:
    error = refused(f"{server.url}/model.onnx", into, options, sha256="0" * 64)
    assert error.code == "checksum_mismatch"
    assert SHA256 in str(error)


@pytest.mark.parametrize("sha256", ["", "abc", SHA256 + "0", f"{SHA256}\n", "sha256:" + SHA256])
def test_a_checksum_that_is_none_is_refused_before_anything_is_asked(
    server: Server, options: FetchOptions, into: Path, sha256: str
) -> None:
    error = refused(f"{server.url}/model.onnx", into, options, sha256=sha256)
    assert error.code == "checksum_mismatch"
    assert "64 hexadecimal digits" in str(error)
    assert server.asked == []


def test_a_body_that_breaks_off_is_refused(server: Server, options: FetchOptions, into: Path) -> None:
    server.pages["/short"] = sends(MODEL[:1000], Content_Length=str(len(MODEL)))
    error = refused(f"{server.url}/short", into, options)
    assert error.code == "fetch_failed"
    assert f"broke off after 1000 of {len(MODEL)} bytes" in str(error)


def test_a_length_that_lies_is_found_out(server: Server, options: FetchOptions, into: Path) -> None:
    server.pages["/long"] = sends(MODEL, Content_Length="1000")
    assert refused(f"{server.url}/long", into, options).code == "checksum_mismatch"


@pytest.mark.parametrize("length", ["nonsense", "-5", "99999999999999999999"])
def test_a_length_that_makes_no_sense_does_no_harm(
    server: Server, options: FetchOptions, into: Path, length: str
) -> None:
    server.pages["/odd"] = sends(MODEL, Content_Length=length)
    if length.startswith("9"):
        assert refused(f"{server.url}/odd", into, options).code == "too_large"
    else:
        fetch(Source(url=f"{server.url}/odd"), into, sha256=SHA256, options=options)


def test_a_file_that_says_that_it_is_too_large_is_not_begun(server: Server, options: FetchOptions, into: Path) -> None:
    server.pages["/large"] = sends(b"", Content_Length="1000001")
    error = refused(f"{server.url}/large", into, options)
    assert error.code == "too_large"
    assert "more than 1 MB; fetch.max_mb" in str(error)


def test_a_file_that_gets_too_large_is_given_up(server: Server, options: FetchOptions, into: Path) -> None:
    server.pages["/endless"] = sends(bytes(1_100_000))
    assert refused(f"{server.url}/endless", into, options).code == "too_large"


@pytest.mark.parametrize("status", [204, 206, 304, 401, 404, 500])
def test_an_answer_without_the_file_is_told(server: Server, options: FetchOptions, into: Path, status: int) -> None:
    server.pages["/no"] = lambda answer: head(answer, status, {})
    error = refused(f"{server.url}/no?secret=1", into, options)
    assert error.code == "fetch_failed"
    assert f"/no answers {status}" in str(error)
    assert "secret" not in str(error)


def test_what_is_not_http_is_told(server: Server, options: FetchOptions, into: Path) -> None:
    server.pages["/ssh"] = lambda answer: answer.wfile.write(b"SSH-2.0-OpenSSH\r\n\r\n") and None
    assert "not in HTTP" in str(refused(f"{server.url}/ssh", into, options))


def test_a_full_disk_is_told(server: Server, options: FetchOptions, into: Path) -> None:
    into.symlink_to("/dev/full")
    error = refused(f"{server.url}/model.onnx", into, options)
    assert error.code == "disk_full"
    assert Path("/dev/full").exists()


def test_a_folder_that_is_not_there_is_told(server: Server, options: FetchOptions, into: Path) -> None:
    with pytest.raises(ModelError, match="No such file"):
        fetch(Source(url=f"{server.url}/model.onnx"), into / "x", sha256=SHA256, options=options)


# How long it may take


def quickly(options: FetchOptions, **changes: float) -> FetchOptions:
    for name, value in changes.items():
        setattr(options, name, value)
    return options


def test_a_server_that_never_says_anything_is_given_up(options: FetchOptions, into: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:  # takes connections, and no more
        url = f"https://127.0.0.1:{silent.getsockname()[1]}/"
        error = refused(url, into, quickly(options, stall_timeout_s=0.2))
    assert error.code == "fetch_failed"
    assert "did nothing for 0.2 s" in str(error)


def test_a_server_that_stalls_before_its_headers_is_given_up(server: Server, options: FetchOptions, into: Path) -> None:
    server.pages["/stall"] = lambda answer: server.closing.wait(5.0) and None
    assert "did nothing" in str(refused(f"{server.url}/stall", into, quickly(options, stall_timeout_s=0.2)))


def test_a_server_that_stalls_in_the_body_is_given_up(server: Server, options: FetchOptions, into: Path) -> None:
    def page(answer: BaseHTTPRequestHandler) -> None:
        sends(MODEL[:1000], Content_Length=str(len(MODEL)))(answer)
        server.closing.wait(5.0)

    server.pages["/stall"] = page
    assert "did nothing" in str(refused(f"{server.url}/stall", into, quickly(options, stall_timeout_s=0.2)))


def drips(server: Server, first: bytes, drop: bytes) -> Page:
    """Never still for long, and never done."""

    def page(answer: BaseHTTPRequestHandler) -> None:
        answer.wfile.write(first)
        while not server.closing.wait(0.05):
            answer.wfile.write(drop)

    return page


@pytest.mark.parametrize(
    ("first", "drop"),
    [(b"HTTP/1.0 200 OK\r\n\r\n", b"x"), (b"HTTP/1.0 200 OK\r\n", b"X-More: 1\r\n"), (b"HTTP/1.0 200 ", b"O")],
    ids=["body", "headers", "status"],
)
def test_a_server_that_drips_ends_with_the_total_time(
    server: Server, options: FetchOptions, into: Path, first: bytes, drop: bytes
) -> None:
    server.pages["/drip"] = drips(server, first, drop)
    began_s = time.monotonic()
    error = refused(f"{server.url}/drip", into, quickly(options, stall_timeout_s=2.0, timeout_s=0.5))
    assert time.monotonic() - began_s < 1.5
    assert error.code == "fetch_failed"
    assert "fetch.timeout_s" in str(error)


@pytest.mark.parametrize("page", ["silent", "drip"])
def test_a_download_can_be_cancelled_while_it_waits(
    server: Server, options: FetchOptions, into: Path, page: str
) -> None:
    server.pages["/silent"] = lambda answer: server.closing.wait(5.0) and None
    server.pages["/drip"] = drips(server, b"HTTP/1.0 200 OK\r\n\r\n", b"x")
    began_s = time.monotonic()
    error = refused(f"{server.url}/{page}", into, options, cancelled=lambda: bool(server.asked))
    assert error.code == "cancelled"
    assert time.monotonic() - began_s < 2.0


def test_whatever_the_caller_raises_leaves_nothing_behind(server: Server, options: FetchOptions, into: Path) -> None:
    def stop(phase: str, percent: float | None) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fetch(Source(url=f"{server.url}/model.onnx"), into, sha256=SHA256, options=options, progress=stop)
    assert list(into.parent.iterdir()) == []


# From where it may come


@pytest.mark.parametrize(
    ("url", "why"),
    [
        ("http://localhost/model.onnx", "only https"),
        ("ftp://localhost/model.onnx", "not of the form"),
        ("file:///etc/passwd", "not of the form"),
        ("/etc/passwd", "not of the form"),
        ("https://", "not of the form"),
        ("https://localhost:0/", "not of the form"),
        ("https://localhost:99999/", "cannot be understood"),
        ("https://[::1/", "cannot be understood"),
        ("https://user:secret@localhost/", "names a user or a password"),
        ("https://user@localhost/", "names a user or a password"),
        ("https://local host/", "not ASCII"),
        ("https://localhost/a\r\nHost: other", "not ASCII"),
        ("https://löcalhost/", "not ASCII"),
        ("https://localhost\\@other/", "not ASCII"),
    ],
)
def test_a_url_that_may_not_be_asked_is_refused(options: FetchOptions, into: Path, url: str, why: str) -> None:
    error = refused(url, into, options)
    assert error.code == "fetch_forbidden"
    assert why in str(error)
    assert "secret" not in str(error)


LOCAL = [
    "127.0.0.1",
    "127.1",
    "2130706433",
    "0x7f000001",
    "0177.0.0.1",
    "0",
    "[::1]",
    "[::]",
    "[::ffff:127.0.0.1]",
    "[::127.0.0.1]",
    "localhost",
    "10.1.2.3",
    "172.16.0.1",
    "192.168.1.1",
    "100.64.0.1",
    "198.18.0.1",
    "[fd00::1]",
    "[fec0::1]",
    "[fe80::1]",
    "[64:ff9b::10.0.0.1]",
    "[2002:a00:1::]",
    "224.0.0.1",
    "[ff0e::1]",
    "240.0.0.1",
    "255.255.255.255",
    "169.254.1.1",
]
METADATA = [
    "169.254.169.254",
    "2852039166",
    "0xa9fea9fe",
    "0xA9.0xFE.0xA9.0xFE",
    "0251.0376.0251.0376",
    "169.254.43518",
    "169.254.169.254.",
    "[::ffff:169.254.169.254]",
    "[::ffff:a9fe:a9fe]",
    "[64:ff9b::a9fe:a9fe]",
    "[2002:a9fe:a9fe::1]",
    "[fd00:ec2::254]",
]


@pytest.mark.parametrize("host", LOCAL + METADATA)
def test_an_address_that_is_not_of_the_internet_is_refused(into: Path, host: str) -> None:
    error = refused(f"https://{host}/latest/meta-data/", into, FetchOptions())
    assert error.code == "fetch_forbidden"


@pytest.mark.parametrize("host", METADATA)
def test_where_clouds_keep_credentials_is_refused_whatever_is_allowed(into: Path, host: str) -> None:
    options = FetchOptions(allow_private=True, hosts=[host])
    error = refused(f"http://{host}/latest/meta-data/", into, options)
    assert error.code == "fetch_forbidden"
    assert "credentials" in str(error)


@settings(max_examples=60, deadline=None)
@given(
    address=st.integers(0, 2**32 - 1).map(ipaddress.IPv4Address).filter(lambda address: not address.is_global),
    spelling=st.sampled_from(["{}", "{:d}", "{:#x}", "{:#o}", "[::ffff:{}]", "[64:ff9b::{}]"]),
)
@example(address=ipaddress.IPv4Address("169.254.169.254"), spelling="{:#x}")
def test_no_spelling_of_a_private_address_gets_through(
    anywhere: Path, address: ipaddress.IPv4Address, spelling: str
) -> None:
    number = int(address)
    host = spelling.format(number) if ":d" in spelling or ":#" in spelling else spelling.format(address)
    host = host.replace("0o", "0")
    with pytest.raises(ModelError) as caught:
        fetch(Source(url=f"https://{host}/"), anywhere, sha256=SHA256, options=FetchOptions())
    assert caught.value.code == "fetch_forbidden", str(caught.value)


@settings(max_examples=100, deadline=None)
@given(
    st.one_of(
        st.text(max_size=40),
        st.from_regex(r"\A(https?|HTTPS|ftp)?:?//[\x20-\x7e]{0,30}\Z"),
        st.builds("https://{}{}".format, st.text(max_size=12), st.sampled_from(["", "/", ":443/", ":x", "?a", "#b"])),
    )
)
def test_no_text_is_more_than_refused(anywhere: Path, url: str) -> None:
    def nobody(host: str, *args: Any, **more: Any) -> Any:
        assert host
        raise socket.gaierror(socket.EAI_NONAME, "unknown")

    with pytest.MonkeyPatch.context() as patched, pytest.raises(ModelError) as caught:
        patched.setattr(socket, "getaddrinfo", nobody)
        fetch(Source(url=url), anywhere, sha256=SHA256, options=FetchOptions())
    assert caught.value.code in ("fetch_forbidden", "fetch_failed")


def test_a_name_that_leads_inside_too_is_refused(
    options: FetchOptions, into: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    both = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (host, 443)) for host in (PUBLIC, "10.0.0.1")]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **more: both)
    options.allow_private = False
    error = refused("https://models.example/", into, options)
    assert error.code == "fetch_forbidden"
    assert "models.example is 10.0.0.1" in str(error)


def test_the_address_that_was_checked_is_the_one_that_is_connected_to(
    server: Server, options: FetchOptions, into: Path, internet: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = [PUBLIC]  # and this machine's own afterwards

    def rebinding(host: str, port: int, **more: Any) -> Any:
        address = answers.pop() if answers else "127.0.0.1"
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port))]

    monkeypatch.setattr(socket, "getaddrinfo", rebinding)
    options.allow_private = False
    fetch(Source(url=f"{server.url}/model.onnx"), into, sha256=SHA256, options=options)
    assert set(internet) == {(PUBLIC, server.port)}
    into.unlink()
    assert refused(f"{server.url}/model.onnx", into, options).code == "fetch_forbidden"
    assert set(internet) == {(PUBLIC, server.port)}


def test_a_name_that_nobody_knows_is_told(options: FetchOptions, into: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def nobody(*args: Any, **more: Any) -> Any:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", nobody)
    error = refused("https://models.example/", into, options)
    assert error.code == "fetch_failed"
    assert "cannot be resolved: Name or service not known" in str(error)


def test_a_port_where_nobody_listens_is_told(options: FetchOptions, into: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    error = refused(f"https://127.0.0.1:{port}/", into, options)
    assert error.code == "fetch_failed"
    assert "Connection refused" in str(error)


def test_a_certificate_that_is_not_trusted_is_refused(server: Server, options: FetchOptions, into: Path) -> None:
    options.ca_file = None
    error = refused(f"{server.url}/model.onnx", into, options)
    assert error.code == "fetch_failed"
    assert "is not trusted" in str(error)
    assert "fetch.ca_file" in str(error)
    assert server.asked == []


def test_a_certificate_for_another_name_is_refused(
    server: Server, options: FetchOptions, into: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", server.port))]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **more: there)
    assert "is not trusted" in str(refused("https://models.example/model.onnx", into, options))


def test_a_file_of_authorities_that_is_none_is_told(options: FetchOptions, into: Path, tmp_path: Path) -> None:
    options.ca_file = str(tmp_path / "none.pem")
    assert "holds no certificates" in str(refused("https://localhost/", into, options))


def test_only_hosts_that_are_listed_are_asked(server: Server, options: FetchOptions, into: Path) -> None:
    options.hosts = ["LocalHost."]
    fetch(Source(url=f"{server.url}/model.onnx"), into, sha256=SHA256, options=options)
    into.unlink()
    error = refused(f"https://127.0.0.1:{server.port}/model.onnx", into, options)
    assert error.code == "fetch_forbidden"
    assert "127.0.0.1 is not one of fetch.hosts" in str(error)
    assert len(server.asked) == 1


def test_a_listed_host_may_speak_http(plain_server: Server, options: FetchOptions, into: Path) -> None:
    options.hosts = ["localhost"]
    fetch(Source(url=f"{plain_server.url}/model.onnx"), into, sha256=SHA256, options=options)
    assert into.read_bytes() == MODEL


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_redirects_are_followed(server: Server, options: FetchOptions, into: Path, status: int) -> None:
    for step in range(4):
        server.pages[f"/{step}"] = redirect(f"/{step + 1}", status)
    server.pages["/4"] = redirect("model.onnx", status)
    fetch(Source(url=f"{server.url}/0"), into, sha256=SHA256, options=options)
    assert [path for path, _ in server.asked] == ["/0", "/1", "/2", "/3", "/4", "/model.onnx"]


def test_a_sixth_redirect_is_one_too_many(server: Server, options: FetchOptions, into: Path) -> None:
    server.pages["/loop"] = redirect("/loop")
    error = refused(f"{server.url}/loop", into, options)
    assert error.code == "fetch_failed"
    assert "more than 5 times" in str(error)
    assert len(server.asked) == 6


@pytest.mark.parametrize(
    ("to", "why"),
    [
        ("http://localhost/", "only https"),
        ("https://127.0.0.1/", "no address of the Internet"),
        ("https://10.0.0.1/", "no address of the Internet"),
        ("https://[::ffff:127.0.0.1]/", "no address of the Internet"),
        ("https://2852039166/latest", "credentials"),
        ("file:///etc/passwd", "not of the form"),
        ("https://a:b@localhost/", "names a user or a password"),
        ("https://[::1/", "no URL"),
        ("/a b", "not ASCII"),
    ],
)
def test_a_redirect_is_checked_as_the_first_url_is(
    server: Server, options: FetchOptions, into: Path, internet: list[Any], to: str, why: str
) -> None:
    options.allow_private = False
    server.pages["/away"] = redirect(to)
    error = refused(f"{server.url}/away", into, options)
    assert error.code == "fetch_forbidden"
    assert why in str(error)
    assert set(internet) == {(PUBLIC, server.port)}


def test_a_redirect_to_a_host_that_is_not_listed_is_refused(server: Server, options: FetchOptions, into: Path) -> None:
    options.hosts = ["localhost"]
    server.pages["/away"] = redirect(f"https://127.0.0.1:{server.port}/model.onnx")
    assert "127.0.0.1 is not one of fetch.hosts" in str(refused(f"{server.url}/away", into, options))
    assert len(server.asked) == 1


# Signatures


class Signer:
    """An Ed25519 key, and where its public half lies."""

    def __init__(self, folder: Path) -> None:
        pytest.importorskip("cryptography", reason="cryptography is not installed: pip install 'edge-agent[signed]'")
        from cryptography.hazmat.primitives import serialization as s
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

        self._key = Ed25519PrivateKey.generate()
        public = self._key.public_key()
        self.pem = folder / "key.pem"
        self.pem.write_bytes(public.public_bytes(s.Encoding.PEM, s.PublicFormat.SubjectPublicKeyInfo))

    def sign(self, content: bytes) -> bytes:
        return self._key.sign(content)


@pytest.fixture
def signer(tmp_path: Path) -> Signer:
    return Signer(tmp_path)


def test_a_good_signature_is_accepted(server: Server, options: FetchOptions, into: Path, signer: Signer) -> None:
    server.pages["/model.sig"] = signer.sign(MODEL)
    options.public_key_file = str(signer.pem)
    options.require_signature = True
    fetch(
        Source(url=f"{server.url}/model.onnx"),
        into,
        sha256=SHA256,
        options=options,
        signature_url=f"{server.url}/model.sig",
    )
    assert into.read_bytes() == MODEL


@pytest.mark.parametrize(
    ("signature", "code"),
    [
        (bytes(64), "signature_invalid"),
        (b"not a signature", "signature_invalid"),
        (b"", "signature_invalid"),
        (bytes(5000), "too_large"),
        (None, "signature_missing"),
    ],
    ids=["zeros", "text", "empty", "large", "missing"],
)
def test_a_signature_that_is_none_is_refused(
    server: Server, options: FetchOptions, into: Path, signer: Signer, signature: bytes | None, code: str
) -> None:
    if signature is not None:
        server.pages["/model.sig"] = signature
    options.public_key_file = str(signer.pem)
    url = f"{server.url}/model.onnx"
    assert refused(url, into, options, signature_url=f"{server.url}/model.sig").code == code


def test_a_signature_of_another_file_or_by_another_key_is_refused(
    server: Server, options: FetchOptions, into: Path, signer: Signer, tmp_path: Path
) -> None:
    options.public_key_file = str(signer.pem)
    (tmp_path / "other").mkdir()
    url, signature_url = f"{server.url}/model.onnx", f"{server.url}/model.sig"
    for wrong in (signer.sign(MODEL + b"x"), Signer(tmp_path / "other").sign(MODEL)):
        server.pages["/model.sig"] = wrong
        error = refused(url, into, options, signature_url=signature_url)
        assert error.code == "signature_invalid"
        assert "is not signed by the owner of" in str(error)


def test_a_model_without_a_signature_is_refused_where_one_is_required(
    server: Server, options: FetchOptions, into: Path
) -> None:
    options.require_signature = True
    assert refused(f"{server.url}/model.onnx", into, options).code == "signature_missing"
    assert server.asked == []
    with pytest.raises(ModelError, match=r"fetch\.require_signature"):
        require_signature_allowed(options, is_signed=False)


def test_a_signature_without_a_key_to_check_it_with_is_refused(
    server: Server, options: FetchOptions, into: Path
) -> None:
    url = f"{server.url}/model.onnx"
    error = refused(url, into, options, signature_url=f"{server.url}/model.sig")
    assert error.code == "signature_invalid"
    assert "fetch.public_key_file" in str(error)
    assert server.asked == []


def test_a_file_from_the_disk_is_checked_by_the_same_rules(options: FetchOptions, signer: Signer, into: Path) -> None:
    require_signature_allowed(options, is_signed=False)
    options.public_key_file = str(signer.pem)
    into.write_bytes(MODEL)
    check_signature(into, signer.sign(MODEL), options)
    for wrong in (signer.sign(MODEL + b"x"), base64.b64encode(signer.sign(MODEL)), b""):
        with pytest.raises(ModelError, match="is not signed by"):
            check_signature(into, wrong, options)
    into.write_bytes(b"")
    with pytest.raises(ModelError, match="is empty"):
        check_signature(into, signer.sign(b""), options)
    with pytest.raises(ModelError, match="No such file"):
        check_signature(into.with_name("none"), bytes(64), options)


@pytest.mark.parametrize("text", [b"", b"nonsense", b"-----BEGIN PUBLIC KEY-----\nAAAA\n-----END PUBLIC KEY-----\n"])
def test_a_key_that_is_none_is_told(options: FetchOptions, signer: Signer, tmp_path: Path, text: bytes) -> None:
    key = tmp_path / "other.pem"
    options.public_key_file = str(key)
    with pytest.raises(ModelError, match="No such file"):
        require_signature_allowed(options, is_signed=True)
    key.write_bytes(text)
    with pytest.raises(ModelError, match="holds no public key in PEM form") as caught:
        require_signature_allowed(options, is_signed=True)
    assert caught.value.code == "signature_invalid"


def test_a_key_of_another_kind_is_told(options: FetchOptions, signer: Signer, tmp_path: Path) -> None:
    key = tmp_path / "rsa.pem"
    openssl = need_program("openssl", "openssl")
    private = subprocess.run([openssl, "genrsa", "2048"], check=True, capture_output=True).stdout
    subprocess.run([openssl, "rsa", "-pubout", "-out", str(key)], input=private, check=True, capture_output=True)
    options.public_key_file = str(key)
    with pytest.raises(ModelError, match="but not of Ed25519"):
        require_signature_allowed(options, is_signed=True)


def test_what_checks_signatures_is_named_where_it_is_missing(
    options: FetchOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("cryptography", "cryptography.exceptions"):
        monkeypatch.setitem(sys.modules, name, None)
    options.public_key_file = str(tmp_path / "key.pem")
    with pytest.raises(ModelError, match=r"pip install 'edge-agent\[signed\]'"):
        require_signature_allowed(options, is_signed=True)


# Packages

MEMBER = "demo/model.onnx"
WHEEL = "demo_model-1.0-py3-none-any.whl"


def wheel(name: str = MEMBER, content: bytes = MODEL, *, method: int = zipfile.ZIP_DEFLATED, mode: int = 0) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", method) as packed:
        packed.writestr("demo/__init__.py", "raise SystemExit('it was run')")
        info = zipfile.ZipInfo(name)
        info.external_attr = mode << 16
        packed.writestr(info, content, method)
    return file.getvalue()


def tarball(*members: tuple[str, bytes | str], pax: dict[str, str] | None = None) -> bytes:
    """`members`: a name, and a file's content or a link's target."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w:gz", format=tarfile.PAX_FORMAT, pax_headers=pax or {}) as packed:
        for name, content in members:
            info = tarfile.TarInfo(name)
            if isinstance(content, str):
                info.type, info.linkname = tarfile.SYMTYPE, content
                packed.addfile(info)
            else:
                info.size = len(content)
                packed.addfile(info, io.BytesIO(content))
    return file.getvalue()


@pytest.fixture
def pypi(server: Server, monkeypatch: pytest.MonkeyPatch) -> Server:
    monkeypatch.setenv("PIP_INDEX_URL", f"{server.url}/simple/")
    offer_wheel(server, wheel())
    return server


def offer_wheel(server: Server, content: bytes, *names: str, sha256: str | None = "right") -> None:
    found = hashlib.sha256(content).hexdigest() if sha256 == "right" else sha256
    hashes = {"sha256": found} if found else {}
    names = names or (WHEEL, "demo_model-1.0.tar.gz", "demo_model-2.0-py3-none-any.whl")
    files = [{"filename": name, "url": f"../../files/{name}", "hashes": hashes, "yanked": False} for name in names]
    page = {"meta": {"api-version": "1.1"}, "name": "demo-model", "files": files, "versions": ["1.0"]}
    server.pages["/simple/demo-model/"] = json.dumps(page).encode()
    for name in names:
        server.pages[f"/files/{name}"] = content


def offer_package(server: Server, content: bytes, *, integrity: str | None = "right") -> None:
    if integrity == "right":
        integrity = "sha512-" + base64.b64encode(hashlib.sha512(content).digest()).decode()
    dist = {"tarball": f"{server.url}/files/demo.tgz", "shasum": "-", **({"integrity": integrity} if integrity else {})}
    page = json.dumps({"name": "@us/demo", "version": "1.0.0", "dist": dist}).encode()
    server.pages["/@us%2Fdemo/1.0.0"] = page
    server.pages["/files/demo.tgz"] = content


@pytest.fixture
def npm(server: Server, monkeypatch: pytest.MonkeyPatch) -> Server:
    monkeypatch.setenv("npm_config_registry", f"{server.url}/")
    offer_package(server, tarball(("package/index.js", b"1"), ("package/model.onnx", MODEL)))
    return server


IN_WHEEL = Source(pypi=PypiMember("demo-model", WHEEL, MEMBER))
IN_PACKAGE = Source(npm=NpmMember("@us/demo", "1.0.0", "package/model.onnx"))


def test_a_source_is_one_place() -> None:
    with pytest.raises(ValueError, match="one of url, pypi and npm"):
        Source()
    with pytest.raises(ValueError, match="one of url, pypi and npm"):
        Source(url="https://localhost/", npm=IN_PACKAGE.npm)


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_a_wheels_member_is_fetched(pypi: Server, options: FetchOptions, into: Path, method: int) -> None:
    offer_wheel(pypi, wheel(method=method))
    told: list[str] = []
    fetch(IN_WHEEL, into, sha256=SHA256, options=options, progress=lambda phase, percent: told.append(phase))
    assert into.read_bytes() == MODEL
    assert list(into.parent.iterdir()) == [into]
    assert told == ["download", "extract"]
    assert pypi.asked[0][1]["Accept"] == "application/vnd.pypi.simple.v1+json"
    assert pypi.asked[1][0] == f"/files/{WHEEL}"


def test_a_wheel_whose_hash_the_index_does_not_tell_is_fetched_too(
    pypi: Server, options: FetchOptions, into: Path
) -> None:
    offer_wheel(pypi, wheel(), sha256=None)
    fetch(IN_WHEEL, into, sha256=SHA256, options=options)
    assert into.read_bytes() == MODEL


def test_a_wheel_that_is_not_the_indexs_is_refused(pypi: Server, options: FetchOptions, into: Path) -> None:
    offer_wheel(pypi, wheel(), sha256="0" * 64)
    error = refused(IN_WHEEL, into, options)
    assert error.code == "checksum_mismatch"
    assert "index" in str(error)


def test_the_members_checksum_counts_and_not_the_archives(pypi: Server, options: FetchOptions, into: Path) -> None:
    error = refused(IN_WHEEL, into, options, sha256=hashlib.sha256(wheel()).hexdigest())
    assert error.code == "checksum_mismatch"
    assert "demo/model.onnx of demo-model" in str(error)


def test_the_wheel_that_is_named_is_taken(pypi: Server, options: FetchOptions, into: Path) -> None:
    names = ("demo_model-1.0-cp312-cp312-linux_aarch64.whl", "demo_model-1.0-cp312-cp312-linux_x86_64.whl")
    offer_wheel(pypi, wheel(), *names)
    assert f"has no {WHEEL}" in str(refused(IN_WHEEL, into, options))
    fetch(Source(pypi=PypiMember("demo-model", names[1], MEMBER)), into, sha256=SHA256, options=options)
    assert pypi.asked[-1][0] == f"/files/{names[1]}"


@pytest.mark.parametrize(
    ("member", "why"),
    [
        (PypiMember("demo-model", "other.whl", MEMBER), "has no other.whl"),
        (PypiMember("nobodys", WHEEL, MEMBER), "answers 404"),
        (PypiMember("../secret", WHEEL, MEMBER), "answers 404"),
        (PypiMember("demo-model", WHEEL, "demo/other.onnx"), "not in the wheel"),
    ],
)
def test_what_is_not_on_the_index_is_told(
    pypi: Server, options: FetchOptions, into: Path, member: PypiMember, why: str
) -> None:
    error = refused(Source(pypi=member), into, options)
    assert error.code == "fetch_failed"
    assert why in str(error)
    assert not any("/secret" in path for path, _ in pypi.asked)


def test_an_index_that_speaks_no_json_is_told(pypi: Server, options: FetchOptions, into: Path) -> None:
    pypi.pages["/simple/demo-model/"] = b"<!DOCTYPE html><a href=x.whl>x.whl</a>"
    error = refused(IN_WHEEL, into, options)
    assert error.code == "fetch_failed"
    assert "no index in JSON" in str(error)


def test_the_hosts_of_an_index_and_of_its_files_must_be_listed(pypi: Server, options: FetchOptions, into: Path) -> None:
    page = bytes(pypi.pages["/simple/demo-model/"])  # type: ignore[arg-type]
    pypi.pages["/simple/demo-model/"] = page.replace(b"../..", f"https://127.0.0.1:{pypi.port}".encode())
    options.hosts = ["localhost"]
    error = refused(IN_WHEEL, into, options)
    assert error.code == "fetch_forbidden"
    assert "127.0.0.1 is not one of fetch.hosts" in str(error)
    assert "those of the index and of the files" in str(error)
    options.hosts = ["elsewhere.example"]
    assert refused(IN_WHEEL, into, options).code == "fetch_forbidden"
    options.hosts = ["localhost", "127.0.0.1"]
    fetch(IN_WHEEL, into, sha256=SHA256, options=options)


def test_an_index_that_leads_to_what_is_no_url_is_told(
    pypi: Server, npm: Server, options: FetchOptions, into: Path
) -> None:
    page = bytes(pypi.pages["/simple/demo-model/"])  # type: ignore[arg-type]
    pypi.pages["/simple/demo-model/"] = page.replace(b"../../files/", b"https://[::1/")
    npm.pages["/@us%2Fdemo/1.0.0"] = b'{"dist": {"tarball": "https://[::1/"}}'
    for source in (IN_WHEEL, IN_PACKAGE):
        error = refused(source, into, options)
        assert error.code == "fetch_forbidden"
        assert "leads to what is no URL" in str(error)


def test_an_index_whose_url_has_a_password_is_refused_without_telling_it(
    pypi: Server, options: FetchOptions, into: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_INDEX_URL", pypi.url.replace("//", "//us:secret@"))
    error = refused(IN_WHEEL, into, options)
    assert error.code == "fetch_forbidden"
    assert "secret" not in str(error)


def lying(content: bytes) -> bytes:
    """The same wheel, but it says that its member has 1000 bytes."""
    return content.replace(struct.pack("<L", len(MODEL)), struct.pack("<L", 1000))


@pytest.mark.parametrize(
    ("content", "code"),
    [
        (wheel(content=bytes(1_100_000)), "too_large"),  # a bomb: 1 kB
        (lying(wheel()), "fetch_failed"),
        (wheel(method=zipfile.ZIP_LZMA), "fetch_failed"),
        (wheel(method=zipfile.ZIP_BZIP2), "fetch_failed"),
        (wheel(content=b"../../etc/passwd", mode=0o120777), "fetch_failed"),  # a link
        (wheel(name=f"{MEMBER}/", content=b""), "fetch_failed"),
        (wheel()[:-100], "fetch_failed"),
        (wheel()[:200] + bytes(200) + wheel()[400:], "fetch_failed"),
        (b"", "fetch_failed"),
        (b"<html>", "fetch_failed"),
    ],
    ids=["bomb", "lies", "lzma", "bzip2", "link", "folder", "truncated", "damaged", "empty", "page"],
)
def test_a_wheel_that_is_not_sound_is_refused(
    pypi: Server, options: FetchOptions, into: Path, content: bytes, code: str
) -> None:
    offer_wheel(pypi, content)
    assert refused(IN_WHEEL, into, options).code == code


def test_an_npm_packages_member_is_fetched(npm: Server, options: FetchOptions, into: Path) -> None:
    told: list[str] = []
    fetch(IN_PACKAGE, into, sha256=SHA256, options=options, progress=lambda phase, percent: told.append(phase))
    assert into.read_bytes() == MODEL
    assert list(into.parent.iterdir()) == [into]
    assert told == ["download", "extract"]


def test_a_package_that_is_not_the_registrys_is_refused(npm: Server, options: FetchOptions, into: Path) -> None:
    content = tarball(("package/model.onnx", MODEL))
    offer_package(npm, content, integrity="sha512-" + base64.b64encode(bytes(64)).decode())
    assert refused(IN_PACKAGE, into, options).code == "checksum_mismatch"
    offer_package(npm, content, integrity=None)
    fetch(IN_PACKAGE, into, sha256=SHA256, options=options)


@pytest.mark.parametrize(
    ("content", "code"),
    [
        (tarball(("package/other.onnx", MODEL)), "fetch_failed"),
        (tarball(("package/model.onnx", "/etc/passwd")), "fetch_failed"),  # a link
        (tarball(("package/a", MODEL), ("package/model.onnx", "a")), "fetch_failed"),
        (tarball(("package/model.onnx", bytes(1_100_000))), "too_large"),
        (tarball(("package/a", bytes(1_100_000)), ("package/model.onnx", MODEL)), "too_large"),
        (tarball(("package/model.onnx", MODEL), pax={"comment": "x" * 3_000_000}), "fetch_failed"),
        (tarball(("package/model.onnx", MODEL))[:-100], "fetch_failed"),
        (gzip.compress(b"no archive" * 100), "fetch_failed"),
        (b"", "fetch_failed"),
        (wheel(), "fetch_failed"),
    ],
    ids=["missing", "link", "link inside", "bomb", "bomb before", "header", "truncated", "no tar", "empty", "zip"],
)
def test_a_package_that_is_not_sound_is_refused(
    npm: Server, options: FetchOptions, into: Path, content: bytes, code: str
) -> None:
    offer_package(npm, content)
    assert refused(IN_PACKAGE, into, options).code == code


@pytest.mark.parametrize("source", [IN_WHEEL, IN_PACKAGE], ids=["pypi", "npm"])
def test_an_archive_counts_as_a_download(
    pypi: Server, npm: Server, options: FetchOptions, into: Path, source: Source
) -> None:
    options.max_mb = 0.001
    assert refused(source, into, options).code == "too_large"


@pytest.mark.parametrize("source", [IN_WHEEL, IN_PACKAGE], ids=["pypi", "npm"])
def test_unpacking_can_be_cancelled(
    pypi: Server, npm: Server, options: FetchOptions, into: Path, source: Source
) -> None:
    told: list[str] = []
    error = refused(
        source,
        into,
        options,
        progress=lambda phase, percent: told.append(phase),
        cancelled=lambda: "extract" in told,
    )
    assert error.code == "cancelled"


@pytest.mark.parametrize("source", [IN_WHEEL, IN_PACKAGE], ids=["pypi", "npm"])
def test_a_disk_that_is_full_when_unpacking_is_told(
    pypi: Server, npm: Server, options: FetchOptions, into: Path, source: Source
) -> None:
    into.symlink_to("/dev/full")
    assert refused(source, into, options).code == "disk_full"
