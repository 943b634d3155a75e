"""The link that can be made bad is good until then, and bad in the way that was asked for."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Iterator

import pytest

from tests.fault_proxy import FaultProxy
from tests.network_cameras import TcpServer
from tests.rigs import free_port, wait_until

BIG = bytes(range(256)) * 8192  # 2 MiB


def echo(link: socket.socket) -> None:
    while data := link.recv(65536):
        link.sendall(data)
    link.shutdown(socket.SHUT_WR)


@pytest.fixture
def proxy() -> Iterator[FaultProxy]:
    with TcpServer(echo) as server, FaultProxy(server.port) as proxy:
        yield proxy


@pytest.fixture
def link(proxy: FaultProxy) -> Iterator[socket.socket]:
    with dial(proxy) as link:
        yield link


def dial(proxy: FaultProxy) -> socket.socket:
    return socket.create_connection(("127.0.0.1", proxy.port), timeout=10)


def read(link: socket.socket, count: int) -> bytes:
    data = b""
    while len(data) < count and (more := link.recv(count - len(data))):
        data += more
    return data


def is_silent(link: socket.socket, *, for_s: float = 0.15) -> bool:
    link.settimeout(for_s)
    try:
        return link.recv(1) == b"?"  # it never says that
    except TimeoutError:
        return True
    finally:
        link.settimeout(10)


def test_what_goes_in_comes_out_and_is_counted(proxy: FaultProxy, link: socket.socket) -> None:
    sender = threading.Thread(target=lambda: (link.sendall(BIG), link.shutdown(socket.SHUT_WR)))
    sender.start()
    assert read(link, len(BIG)) == BIG
    assert link.recv(1) == b""
    sender.join()
    wait_until(lambda: proxy.open == 0)
    assert (proxy.connections, proxy.bytes_up, proxy.bytes_down) == (1, len(BIG), len(BIG))


def test_refused_connections_are_refused_and_open_ones_stay(proxy: FaultProxy, link: socket.socket) -> None:
    link.sendall(b"a")
    assert read(link, 1) == b"a"
    proxy.refuse()
    proxy.refuse()
    with pytest.raises(ConnectionRefusedError):
        dial(proxy)
    link.sendall(b"b")
    assert read(link, 1) == b"b"
    proxy.heal()
    dial(proxy).close()


@pytest.mark.parametrize("direction", ["up", "down"])
def test_a_reset_comes_after_just_so_many_bytes_and_once(proxy: FaultProxy, direction: str) -> None:
    proxy.reset(after=1000, direction=direction)  # type: ignore[arg-type]
    with dial(proxy) as link:
        with pytest.raises(OSError, match=r"reset|Broken pipe"):
            while True:
                link.sendall(bytes(700))
                read(link, 700)
        assert (proxy.bytes_up if direction == "up" else proxy.bytes_down) == 1000
    with dial(proxy) as link:
        link.sendall(bytes(5000))
        assert len(read(link, 5000)) == 5000


def test_a_reset_at_once_takes_the_connection_that_is_open(proxy: FaultProxy, link: socket.socket) -> None:
    link.sendall(bytes(5000))
    assert len(read(link, 5000)) == 5000
    proxy.reset(after=0, direction="up")
    link.sendall(b"x")
    with pytest.raises(ConnectionResetError):
        link.recv(1)


@pytest.mark.parametrize("direction", ["up", "down", "both"])
def test_a_black_hole_lets_nothing_out_until_it_is_healed(proxy: FaultProxy, direction: str) -> None:
    with dial(proxy) as before:
        before.sendall(b"a")
        assert read(before, 1) == b"a"
        proxy.black_hole(direction)  # type: ignore[arg-type]
        with dial(proxy) as after:
            for link in (before, after):
                link.sendall(b"bc")
            assert is_silent(before)
            assert is_silent(after)
            proxy.heal()
            assert read(before, 2) == read(after, 2) == b"bc"


def test_a_black_hole_stops_a_sender_once_the_buffers_are_full() -> None:
    with TcpServer(echo) as server, FaultProxy(server.port, buffer=4096) as proxy, dial(proxy) as link:
        proxy.black_hole()
        link.settimeout(0.3)
        with pytest.raises(TimeoutError):
            link.sendall(bytes(20_000_000))


def test_a_throttled_link_takes_its_time_in_its_direction_alone(proxy: FaultProxy, link: socket.socket) -> None:
    proxy.throttle(10_000, "down")
    began = time.monotonic()
    link.sendall(bytes(3000))
    wait_until(lambda: proxy.bytes_up == 3000)
    assert time.monotonic() - began < 0.2
    assert len(read(link, 3000)) == 3000
    assert 0.2 < time.monotonic() - began < 1.5


def test_one_byte_at_a_time_arrives_whole(proxy: FaultProxy, link: socket.socket) -> None:
    proxy.drip()
    link.sendall(BIG[:2000])
    first = link.recv(2000)
    assert 0 < len(first) < 2000
    assert first + read(link, 2000 - len(first)) == BIG[:2000]


def test_latency_is_added_each_way_and_costs_no_throughput(proxy: FaultProxy, link: socket.socket) -> None:
    proxy.latency(50)
    began = time.monotonic()
    sender = threading.Thread(target=link.sendall, args=(BIG,))
    sender.start()
    assert read(link, len(BIG)) == BIG
    sender.join()
    assert 0.1 <= time.monotonic() - began < 1.5


@pytest.mark.parametrize("reset", [False, True])
def test_a_cut_ends_every_connection_now(proxy: FaultProxy, reset: bool) -> None:
    with dial(proxy) as first, dial(proxy) as second:
        wait_until(lambda: proxy.open == 2)
        proxy.cut(reset=reset)
        for link in (first, second):
            with pytest.raises(ConnectionResetError) if reset else contextlib.nullcontext():
                assert link.recv(1) == b""
        wait_until(lambda: proxy.open == 0)
    with dial(proxy) as link:
        link.sendall(b"a")
        assert read(link, 1) == b"a"


def test_a_target_that_is_not_there_resets_and_is_tried_again() -> None:
    port = free_port()
    with FaultProxy(port) as proxy:
        with pytest.raises(ConnectionResetError), dial(proxy) as link:  # which may be reset before it is told of it
            link.recv(1)
        assert proxy.connections == 1
        wait_until(lambda: proxy.open == 0)
