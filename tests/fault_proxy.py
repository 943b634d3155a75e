"""A TCP link that can be made bad while it is in use: refused, reset, silent, slow, late, cut.

Owns its listener, its connections and one thread; knows nothing of what is carried.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import socket
import struct
import threading
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any, Literal

from tests.rigs import free_port

Direction = Literal["up", "down", "both"]
"""`up` is from the client to the target."""

_CHUNK = 65536
_RESET = struct.pack("ii", 1, 0)  # SO_LINGER with no time to linger: close() sends RST


@dataclass
class _Flow:
    """What becomes of the bytes of one direction; `resets` connections break after `reset_after` of them."""

    bytes_per_s: float = math.inf
    chunk: int = _CHUNK
    latency_s: float = 0.0
    is_held: bool = False
    resets: float = 0
    reset_after: int = 0
    passed: int = 0


class FaultProxy:
    """Listens on `port` of 127.0.0.1 and carries to `target` there. Modes may be changed at any time, from any thread
    but the proxy's, and hold for connections that are open as for new ones. `buffer`: bytes that each kernel buffer
    may hold; small ones let the sender feel a slow link at once.

    `connections` counts those that came, `open` those that are there; `bytes_up` and `bytes_down` what was passed on.
    """

    def __init__(self, target: int, *, buffer: int | None = None) -> None:
        self.connections = 0
        self._target = target
        self._buffer = buffer
        self._up, self._down = _Flow(), _Flow()
        self._pairs: dict[asyncio.Task[None], _Pair] = {}
        self._changed = asyncio.Event()
        self._is_accepting = False
        self._listener = self._listen(free_port())  # to come back to
        self.port: int = self._listener.getsockname()[1]
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name=f"fault-proxy:{self.port}")

    def __enter__(self) -> FaultProxy:
        self._thread.start()
        self._in_loop(self._begin)
        return self

    def __exit__(self, *error: object) -> None:
        self._run(self._end())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    @property
    def open(self) -> int:
        return len(self._pairs)

    @property
    def bytes_up(self) -> int:
        return self._up.passed

    @property
    def bytes_down(self) -> int:
        return self._down.passed

    def heal(self) -> None:
        """All is passed on at once again, what was held back first; connections are taken."""
        self._in_loop(self._begin)
        self._change("both", lambda flow: self._replace(flow, _Flow(passed=flow.passed)))

    def refuse(self) -> None:
        """Close the listener, so that new connections are refused; those that are open stay."""
        self._in_loop(self._stop_listening)

    def cut(self, *, reset: bool = False) -> None:
        """End every connection now, by FIN or by RST."""
        self._run(self._cut(reset))

    def reset(self, *, after: int = 0, direction: Direction = "down", times: float = 1) -> None:
        """Break `times` connections by RST on both sides, each once `after` more bytes of it have passed."""

        def set_reset(flow: _Flow) -> None:
            flow.reset_after, flow.resets = after, times
            for pair in self._pairs.values():
                pair.since[flow is self._up] = 0

        self._change(direction, set_reset)

    def black_hole(self, direction: Direction = "both") -> None:
        """Take connections and pass nothing on; what comes meanwhile waits for `heal`, as TCP would send it again."""
        self._change(direction, lambda flow: setattr(flow, "is_held", True))

    def throttle(self, bytes_per_s: float, direction: Direction = "both") -> None:
        self._change(direction, lambda flow: setattr(flow, "bytes_per_s", bytes_per_s))

    def drip(self, direction: Direction = "both") -> None:
        """One byte a segment."""
        self._change(direction, lambda flow: setattr(flow, "chunk", 1))

    def latency(self, ms: float, direction: Direction = "both") -> None:
        """Each way, in order, at full throughput."""
        self._change(direction, lambda flow: setattr(flow, "latency_s", ms / 1000))

    # From here on: in the proxy's thread, but for `_run` and `_in_loop`.

    def _run(self, work: Coroutine[Any, Any, None]) -> None:
        asyncio.run_coroutine_threadsafe(work, self._loop).result(10)

    def _in_loop(self, work: Callable[[], None]) -> None:
        async def do() -> None:
            work()

        self._run(do())

    def _change(self, direction: Direction, change: Callable[[_Flow], None]) -> None:
        def apply() -> None:
            for name, flow in (("up", self._up), ("down", self._down)):
                if direction in (name, "both"):
                    change(flow)
            self._changed.set()
            self._changed = asyncio.Event()

        self._in_loop(apply)

    @staticmethod
    def _replace(flow: _Flow, new: _Flow) -> None:
        vars(flow).update(vars(new))

    def _listen(self, port: int) -> socket.socket:
        listener = socket.socket()
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._shrink(listener)  # those it accepts inherit it
        listener.bind(("127.0.0.1", port))
        listener.listen(100)
        listener.setblocking(False)
        return listener

    def _shrink(self, link: socket.socket) -> None:
        if self._buffer is not None:
            link.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, self._buffer)
            link.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, self._buffer)

    def _begin(self) -> None:
        if not self._is_accepting:
            if self._listener.fileno() < 0:
                self._listener = self._listen(self.port)
            self._loop.add_reader(self._listener, self._accept)
            self._is_accepting = True

    def _stop_listening(self) -> None:
        if self._is_accepting:
            self._loop.remove_reader(self._listener)
            self._listener.close()
            self._is_accepting = False

    async def _end(self) -> None:
        self._stop_listening()
        await self._cut(reset=False)

    async def _cut(self, reset: bool) -> None:
        tasks = dict(self._pairs)
        for task, pair in tasks.items():
            pair.is_reset = reset
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _accept(self) -> None:
        near, _ = self._listener.accept()
        self.connections += 1
        pair = _Pair(near, socket.socket())
        task = self._loop.create_task(self._carry(pair))
        self._pairs[task] = pair
        task.add_done_callback(lambda task: self._pairs.pop(task).close())  # even if it never began

    async def _carry(self, pair: _Pair) -> None:
        self._shrink(pair.far)
        for link in (pair.near, pair.far):
            link.setblocking(False)
            link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        pumps: list[asyncio.Task[None]] = []
        try:
            await self._loop.sock_connect(pair.far, ("127.0.0.1", self._target))
            pumps = [self._loop.create_task(work) for up in (True, False) for work in self._pump(pair, up)]
            await asyncio.gather(*pumps)
        except OSError:  # one end is gone, or was never there: so is the other
            pair.is_reset = True
        finally:
            for pump in pumps:
                pump.cancel()
            await asyncio.gather(*pumps, return_exceptions=True)

    def _pump(self, pair: _Pair, up: bool) -> tuple[Coroutine[Any, Any, None], ...]:
        """One direction: what reads and what writes, with what is under way between them."""
        source, sink = (pair.near, pair.far) if up else (pair.far, pair.near)
        under_way: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(maxsize=256)
        flow = self._up if up else self._down
        return self._read(source, flow, under_way), self._write(sink, flow, under_way, pair, up)

    async def _read(self, source: socket.socket, flow: _Flow, under_way: asyncio.Queue[tuple[float, bytes]]) -> None:
        while True:
            while flow.is_held:
                await self._changed.wait()
            data = await self._loop.sock_recv(source, _CHUNK)
            await under_way.put((self._loop.time(), data))
            if not data:
                return

    async def _write(
        self, sink: socket.socket, flow: _Flow, under_way: asyncio.Queue[tuple[float, bytes]], pair: _Pair, up: bool
    ) -> None:
        while True:
            came_at, data = await under_way.get()
            while (left_s := came_at + flow.latency_s - self._loop.time()) > 0:
                await self._pause(left_s)
            if not data:
                sink.shutdown(socket.SHUT_WR)
                return
            while data:
                data = await self._pass_some(data, sink, flow, pair, up)

    async def _pass_some(self, data: bytes, sink: socket.socket, flow: _Flow, pair: _Pair, up: bool) -> bytes:
        """Pass on what may pass now; what is left of `data`. Raises `ConnectionResetError` when it is time."""
        while flow.is_held:
            await self._changed.wait()
        allowed = flow.chunk
        if flow.bytes_per_s < math.inf:
            allowed = min(allowed, max(1, int(flow.bytes_per_s / 20)))
        if flow.resets > 0:
            allowed = min(allowed, flow.reset_after - pair.since[up])
        if allowed <= 0:
            flow.resets -= 1
            raise ConnectionResetError
        some = data[:allowed]
        await self._loop.sock_sendall(sink, some)
        flow.passed += len(some)
        pair.since[up] += len(some)
        await asyncio.sleep(len(some) / flow.bytes_per_s)
        return data[len(some) :]

    async def _pause(self, longest_s: float) -> None:
        """Wait, though no longer than until a mode changes."""
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self._changed.wait(), longest_s)


class _Pair:
    """The two sockets of a connection, and how many bytes passed each way (by `up`) since the last `reset`."""

    def __init__(self, near: socket.socket, far: socket.socket) -> None:
        self.near = near
        self.far = far
        self.since = {True: 0, False: 0}
        self.is_reset = False

    def close(self) -> None:
        for link in (self.near, self.far):
            if self.is_reset:
                link.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
            link.close()
