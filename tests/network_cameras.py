"""Network cameras for tests: real servers in this process, well-behaved and otherwise. RTSP is in `rigs`."""

from __future__ import annotations

import contextlib
import hashlib
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from functools import cache
from http.server import BaseHTTPRequestHandler, SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import cv2
import numpy as np

from edge_agent.sources.world import World


@cache
def synthetic_jpegs(count: int = 20, width: int = 160, height: int = 120) -> tuple[bytes, ...]:
    """Pictures of the synthetic world."""
    world, frame = World(width=width, height=height, seed=1), np.empty((height, width, 3), np.uint8)
    jpegs = []
    for index in range(count):
        world.draw(index, frame)
        jpegs.append(cv2.imencode(".jpg", frame)[1].tobytes())
    return tuple(jpegs)


class MjpegServer:
    """Motion-JPEG over HTTP at `url`: 30 pictures a second, for ever unless `limit` ends it.

    `login` is asked for by Digest; `with_length` False leaves Content-Length out; `silent` (an event) holds
    the pictures back.
    """

    def __init__(
        self,
        jpegs: tuple[bytes, ...],
        *,
        fps: float = 30.0,
        login: tuple[str, str] | None = None,
        with_length: bool = True,
        limit: int | None = None,
        content_type: str = "multipart/x-mixed-replace; boundary=frame",
    ) -> None:
        self.silent = threading.Event()
        self.connections = 0
        camera = self

        class Answer(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                if self.path != "/video":
                    self.send_error(404)
                elif login and not _is_login(self.headers.get("Authorization", ""), login, self.path):
                    self.send_response(401)
                    self.send_header("WWW-Authenticate", 'Digest realm="camera", nonce="abc", qop="auth"')
                    self.send_header("Content-Length", "0")
                    self.end_headers()
                else:
                    camera.connections += 1
                    self.send_response(200)
                    self.send_header("Content-Type", content_type)
                    self.end_headers()
                    self._send_pictures()

            def _send_pictures(self) -> None:
                for number, jpeg in enumerate(jpegs[i % len(jpegs)] for i in range(limit or 10**9)):
                    while camera.silent.is_set() and not camera._closing.is_set():
                        time.sleep(0.02)
                    length = f"Content-Length: {len(jpeg)}\r\n" if with_length else ""
                    part = f"--frame\r\nContent-Type: image/jpeg\r\n{length}\r\n".encode() + jpeg + b"\r\n"
                    try:
                        self.wfile.write(part)
                    except OSError:
                        return
                    if camera._closing.wait(1 / fps if number else 0):
                        return

            def log_message(self, *args: Any) -> None:
                pass

        self._closing = threading.Event()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Answer)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}/video"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)

    def __enter__(self) -> MjpegServer:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._closing.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def use_tls(self, certificate: Path, key: Path) -> None:
        self.url = _use_tls(self._server, self.url, certificate, key)


def _use_tls(server: ThreadingHTTPServer, url: str, certificate: Path, key: Path) -> str:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    return url.replace("http:", "https:").replace("127.0.0.1", "localhost")


class TcpServer:
    """Accepts connections on `port` and hands each to `talk` in a thread of its own."""

    def __init__(self, talk: Callable[[socket.socket], None]) -> None:
        self._talk = talk
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._links: list[socket.socket] = []
        self._thread = threading.Thread(target=self._serve, daemon=True)

    def __enter__(self) -> TcpServer:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._thread.join()  # it may have taken one more
        self._listener.close()
        for link in self._links:
            link.close()

    def _serve(self) -> None:
        while True:
            try:
                link, _ = self._listener.accept()
            except OSError:
                return
            self._links.append(link)
            threading.Thread(target=self._answer, args=(link,), daemon=True).start()

    def _answer(self, link: socket.socket) -> None:
        try:
            self._talk(link)
        except OSError:
            link.close()


def say_garbage(link: socket.socket) -> None:
    """Bytes that mean nothing, at once and after each request."""
    noise = np.random.default_rng(0)
    while link.send(noise.bytes(500)):
        link.settimeout(0.2)
        try:
            if not link.recv(4096):
                return
        except TimeoutError:
            pass


def say_nothing(link: socket.socket) -> None:
    while link.recv(4096):
        pass


def _is_login(header: str, login: tuple[str, str], path: str) -> bool:
    """RFC 2617 with qop=auth, from the server's side."""
    scheme, _, rest = header.partition(" ")
    if scheme != "Digest":
        return False
    fields = dict(_fields(rest))
    first = _md5(f"{login[0]}:camera:{login[1]}")
    second = _md5(f"GET:{path}")
    expected = _md5(f"{first}:abc:{fields.get('nc')}:{fields.get('cnonce')}:auth:{second}")
    return fields.get("username") == login[0] and fields.get("response") == expected


def _fields(text: str) -> Iterator[tuple[str, str]]:
    for item in text.split(","):
        key, _, value = item.strip().partition("=")
        yield key, value.strip('"')


def _md5(text: str) -> str:
    return hashlib.md5(text.encode()).hexdigest()


class Link:
    """A TCP link to `target` on 127.0.0.1 that tests can cut, narrow (`bytes_per_s`) and restore."""

    def __init__(self, target: int) -> None:
        self._target = target
        self._pairs: list[tuple[socket.socket, socket.socket]] = []
        self.bytes_per_s: float | None = None
        self.is_down = False
        self._server = TcpServer(self._carry)
        self.port = self._server.port

    def __enter__(self) -> Link:
        self._server.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self.cut()
        self._server.__exit__(*error)

    def cut(self) -> None:
        """Break every connection."""
        for pair in self._pairs:
            for end in pair:
                with contextlib.suppress(OSError):
                    end.shutdown(socket.SHUT_RDWR)
        self._pairs.clear()

    def _carry(self, near: socket.socket) -> None:
        if self.is_down:
            near.close()
            return
        far = socket.create_connection(("127.0.0.1", self._target))
        self._pairs.append((near, far))
        back = threading.Thread(target=self._pump, args=(near, far), daemon=True)
        back.start()
        self._pump(far, near)
        back.join()
        near.close()
        far.close()

    def _pump(self, source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(4096 if self.bytes_per_s else 65536):
                if self.bytes_per_s:
                    time.sleep(len(data) / self.bytes_per_s)
                sink.sendall(data)
        for end in (source, sink):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)


class FileServer:
    """The files of a folder over HTTP, at `url`."""

    def __init__(self, folder: Path) -> None:
        class Answer(SimpleHTTPRequestHandler):
            extensions_map: ClassVar = {".m3u8": "application/vnd.apple.mpegurl", ".ts": "video/mp2t"}

            def __init__(self, *args: Any) -> None:
                super().__init__(*args, directory=str(folder))

            def log_message(self, *args: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Answer)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)

    def __enter__(self) -> FileServer:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def use_tls(self, certificate: Path, key: Path) -> None:
        self.url = _use_tls(self._server, self.url, certificate, key)
