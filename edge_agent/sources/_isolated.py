"""A source in a process of its own, which can be killed when a driver hangs in it.

The child opens, grabs and retrieves as it is told over a socket, and leaves pictures in shared memory. It
ends when the socket closes, so that it does not outlive the agent, however that ends.
"""

from __future__ import annotations

import contextlib
import importlib
import mmap
import os
import pickle
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from edge_agent.config import CameraOptions
from edge_agent.data import Image, VideoFormat
from edge_agent.errors import EndOfStream, SourceError
from edge_agent.sources import _opencv

if TYPE_CHECKING:
    from edge_agent.sources import Source

# The child looks for modules where its parent does, and not, as `python -m` would, in the working directory first.
_CHILD = """
import pickle, socket, sys
link = socket.socket(fileno=int(sys.argv[1]))
sys.path[:] = pickle.loads(link.recv(1 << 16))
from edge_agent.sources._isolated import main
main(link, int(sys.argv[2]))
"""
_POLL_S = 0.5
_GOODBYE_S = 1.0  # a network camera wants to be told that we go
_MESSAGE_BYTES = 1 << 16
_MOST_PICTURE_BYTES = 8192 * 8192 * 3  # of address space; memory is taken only where it is written


class IsolatedSource:
    """Keeps to the protocol of the source that it holds in a child process; `close` ends the child."""

    Options: ClassVar[type[CameraOptions]] = CameraOptions  # the source's own, in fact

    def __init__(self, source_class: Callable[[CameraOptions], Source], options: CameraOptions) -> None:
        self._options = options
        self._class = source_class
        self._like = source_class(options)
        self.is_live = self._like.is_live
        self.hotplug: str = getattr(self._like, "hotplug", "")
        self._child: _Child | None = None

    def check(self) -> Sequence[str]:
        return self._like.check()

    def open(self) -> VideoFormat:
        self.close()
        self._child = _Child()
        self._child.load(self._class, self._options)
        opened: VideoFormat | None = self._child.ask("open", timeout_s=self._options.open_timeout_s)
        if opened is None:
            raise SourceError("it does not open in time", reason="timeout")
        return opened

    def grab(self) -> int | None:
        assert self._child is not None, "open() comes first"
        captured_ns: int | None = self._child.ask("grab", timeout_s=_POLL_S)
        return captured_ns

    def retrieve(self, into: Image) -> Image | None:
        assert self._child is not None, "grab() comes first"
        return self._child.retrieve(into, timeout_s=self._options.stall_timeout_s)

    def close(self) -> None:
        child, self._child = self._child, None
        if child is not None:
            child.close()


class _Child:
    """The agent's end of a child process."""

    def __init__(self) -> None:
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        memory = os.memfd_create("pictures", os.MFD_CLOEXEC)
        try:
            os.ftruncate(memory, _MOST_PICTURE_BYTES)
            self._memory = mmap.mmap(memory, _MOST_PICTURE_BYTES)
            self._process = subprocess.Popen(
                [sys.executable, "-I", "-c", _CHILD, str(theirs.fileno()), str(memory)],
                pass_fds=(theirs.fileno(), memory),
                stdin=subprocess.DEVNULL,
                env=_opencv.environment(),
            )
        except OSError as error:
            self._socket.close()
            raise SourceError(f"no process for the camera: {error.strerror}") from error
        finally:
            theirs.close()
            os.close(memory)
        self._pending: object = None

    def load(self, source_class: Callable[[CameraOptions], Source], options: CameraOptions) -> None:
        """Tell the child where modules are, and which source to make."""
        self._send(sys.path)
        self._send((source_class.__module__, getattr(source_class, "__qualname__", ""), options))

    def ask(self, *question: object, timeout_s: float) -> Any:
        """The child's answer, or None if it does not come in time; asking the same again then goes on waiting.

        Raises what the source raised there, and `SourceError` if the child is gone.
        """
        if self._pending != question:
            self._send(question)
            self._pending = question
        self._socket.settimeout(timeout_s)
        try:
            answer = self._socket.recv(_MESSAGE_BYTES)
        except TimeoutError:
            return None
        except OSError as error:
            raise SourceError(f"the camera's process is gone: {error}", reason="disconnected") from error
        self._pending = None
        if not answer:
            status = self._process.wait()
            raise SourceError(f"the camera's process ended with status {status}", reason="disconnected")
        kind, value = pickle.loads(answer)
        if kind == "failed":
            raise value
        return value

    def retrieve(self, into: Image, *, timeout_s: float) -> Image | None:
        shape = self.ask("retrieve", into.shape, timeout_s=timeout_s)
        if self._pending is not None:
            raise SourceError("a picture is not decoded in time", reason="stalled")
        if shape is None:
            return None
        picture = _picture(self._memory, tuple(shape))
        if picture.shape != into.shape:
            return np.array(picture)
        np.copyto(into, picture)
        return into

    def close(self) -> None:
        """Ask the child to let go of the camera and end; kill it if it does not."""
        try:
            self._socket.setblocking(False)
            self._send(("close",))
            self._process.wait(_GOODBYE_S)
        except (OSError, SourceError, subprocess.TimeoutExpired):
            self._process.kill()
            self._process.wait()
        self._socket.close()
        self._memory.close()

    def _send(self, message: object) -> None:
        try:
            self._socket.send(pickle.dumps(message))
        except OSError as error:
            raise SourceError(f"the camera's process is gone: {error}", reason="disconnected") from error


def _picture(memory: mmap.mmap, shape: tuple[int, ...]) -> Image:
    nbytes = int(np.prod(shape))
    if nbytes > _MOST_PICTURE_BYTES:
        raise SourceError(f"a picture of {shape} is too large for a process of its own", reason="unsupported")
    return np.frombuffer(memory, np.uint8, nbytes).reshape(shape)


# The child


def main(link: socket.socket, memory_fd: int) -> None:
    """Answer until told to close, or until nobody is there to tell."""
    from edge_agent import logs

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # meant for the agent, which will tell us
    logs.configure(level="info", format="auto")
    threading.Thread(target=_end_with, args=(link,), daemon=True).start()
    memory = mmap.mmap(memory_fd, _MOST_PICTURE_BYTES)
    module, name, options = pickle.loads(link.recv(_MESSAGE_BYTES))
    source: Source = getattr(importlib.import_module(module), name)(options)
    with contextlib.suppress(ConnectionError):  # an agent that was killed with an answer unread
        while (message := link.recv(_MESSAGE_BYTES)) and (question := pickle.loads(message))[0] != "close":
            link.send(pickle.dumps(_answer(source, memory, *question)))
    source.close()


def _answer(source: Source, memory: mmap.mmap, what: str, *arguments: Any) -> tuple[str, object]:
    try:
        if what == "open":
            return "done", source.open()
        return "done", source.grab() if what == "grab" else _retrieve(source, memory, *arguments)
    except EndOfStream as error:
        return "failed", EndOfStream(str(error))
    except SourceError as error:
        return "failed", SourceError(str(error), reason=error.reason)
    except BaseException as error:  # noqa: BLE001  told to the agent, which knows what to do with a bug
        return "failed", RuntimeError(f"{type(error).__name__}: {error}")


def _retrieve(source: Source, memory: mmap.mmap, shape: tuple[int, ...]) -> tuple[int, ...] | None:
    shared = _picture(memory, shape)
    image = source.retrieve(shared)
    if image is None:
        return None
    if image is not shared:
        np.copyto(_picture(memory, image.shape), image)
    return image.shape


def _end_with(link: socket.socket) -> None:
    """End this process when the agent's end of the link is closed, even while a driver hangs."""
    hang_up = select.poll()
    hang_up.register(link, 0)
    hang_up.poll()
    time.sleep(_GOODBYE_S)  # for an orderly end, if the main thread can
    os._exit(0)
