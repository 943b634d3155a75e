"""`edge-agent run | check | version`."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import faulthandler
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from edge_agent import __version__, logs, memory
from edge_agent.errors import ConfigError, EdgeAgentError, GpuLost

if TYPE_CHECKING:
    from types import FrameType

    from edge_agent.config import Config
    from edge_agent.settings import Settings

EX_OK, EX_FAILED, EX_GPU_LOST, EX_CONFIG = 0, 1, 75, 78
"""Exit statuses. 75 is EX_TEMPFAIL of sysexits.h: the GPU failed for this process, and a new one may use it;
78 is EX_CONFIG: systemd does not restart it."""

EX_RESTART = -1
"""No exit status: the agent was told to start anew."""

_OUR_THREADS = ("capture:", "engine", "loader", "library", "chores", "spool", "sensors")
_GRACE_S = 1.0
_LAST_WORDS_S = 0.3
_ONE_SIGNAL_S = 0.25  # timeout(1) and some supervisors signal a process and its group: that is one wish


def main(argv: list[str] | None = None) -> NoReturn:
    """The process's exit status is the answer: 0 done, 1 failed, 75 the GPU is lost, 78 the configuration is wrong."""
    arguments = _parser().parse_args(argv)
    status = arguments.act(arguments)
    if status == EX_RESTART:  # in the same process, so that whoever watches it goes on watching
        logs.flush()
        _leave_nothing_open()
        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # until the next one listens, which reads the file anyway
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
    if status == EX_GPU_LOST:  # the libraries' own endings would trip over it
        logs.flush()
        os._exit(status)
    threads = [thread for thread in threading.enumerate() if thread.name.startswith(_OUR_THREADS)]
    for thread in threads:
        thread.join(_GRACE_S / len(threads))
    if left := [thread.name for thread in threads if thread.is_alive()]:
        # A thread stuck in a driver would hold up the interpreter's end, or crash it by coming back in it.
        _say(f"warning: left behind: {', '.join(left)}")
        os._exit(status)
    sys.exit(status)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="edge-agent", description="Camera frames in, model results out over MQTT.")
    parser.add_argument("--version", action="version", version=__version__)
    acts = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, act, text in (
        ("run", _run, "run until SIGTERM or Ctrl-C"),
        ("check", _check, "check the configuration, the models and the sources, and start nothing"),
    ):
        sub = acts.add_parser(name, help=text, description=text)
        sub.add_argument("--config", type=Path, default=Path("config.toml"), help="default: config.toml")
        sub.set_defaults(act=act)
    acts.add_parser("version", help="print the version").set_defaults(act=_version)
    return parser


def _version(arguments: argparse.Namespace) -> int:
    print(__version__)
    return EX_OK


def _check(arguments: argparse.Namespace) -> int:
    from edge_agent import config
    from edge_agent.check import check
    from edge_agent.logs.redaction import redacted_text

    problems: list[str] = []
    moved: list[str] = []
    try:
        loaded = config.load(arguments.config, tell=moved.append)
    except ConfigError as error:
        problems += error.problems
        loaded = error.usable
    if loaded is not None:
        problems += check(loaded)
    for sentence in moved:
        print(f"warning: {redacted_text(sentence)}", file=sys.stderr)
    for problem in problems:
        print(f"error: {redacted_text(problem)}", file=sys.stderr)
    if problems:
        print(f"{arguments.config}: {len(problems)} problem(s)", file=sys.stderr)
        return EX_CONFIG
    print(f"{arguments.config}: ok")
    return EX_OK


def _run(arguments: argparse.Namespace) -> int:
    hangup = _Hangup()
    memory.share_arenas()
    from edge_agent.settings import Settings

    faulthandler.enable()  # systemd's watchdog ends what hangs with SIGABRT: let it say where it hung
    settings = Settings(arguments.config)
    logs.configure()
    try:
        loaded = settings.load()
        logs.configure(level=loaded.logging.level, format=loaded.logging.format)
        return EX_RESTART if asyncio.run(_serve(loaded, settings, hangup)) else EX_OK
    except ConfigError as error:
        for problem in error.problems:
            _say(f"error: {problem}")
        return EX_CONFIG
    except GpuLost as error:
        _say(f"error: the GPU is lost to this process: {error}")
        return EX_GPU_LOST
    except EdgeAgentError as error:
        _say(f"error: {error}")
        return EX_FAILED
    except Exception:  # noqa: BLE001  a bug is told whole, and the process ends in order all the same
        _say(traceback.format_exc().rstrip("\n"))
        return EX_FAILED
    finally:
        logs.flush()


async def _serve(loaded: Config, settings: Settings, hangup: _Hangup) -> bool:
    """Whether the agent is to start anew."""
    from edge_agent import agent

    end = _End(loaded.agent.shutdown_timeout_s)
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, end.on_signal, number)
    deadline = asyncio.ensure_future(end.keep_deadline())
    try:
        with hangup.heard_by(loop):
            wants_restart = await agent.run(loaded, end.stop, settings=settings, reload=hangup.asked)
        return wants_restart and not end.was_signalled
    finally:
        deadline.cancel()


class _Hangup:
    """SIGHUP asks to read the configuration again. One that comes before the loop runs waits for it, one that comes
    after it counts for nothing; none ends the process, as it does where nobody listens."""

    def __init__(self) -> None:
        self.asked = asyncio.Event()
        self._loop: asyncio.AbstractEventLoop | None = None
        signal.signal(signal.SIGHUP, self._on_signal)

    @contextlib.contextmanager
    def heard_by(self, loop: asyncio.AbstractEventLoop) -> Iterator[None]:
        self._loop = loop
        try:
            yield
        finally:
            self._loop = None

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self._loop is None:
            self.asked.set()
        else:
            self._loop.call_soon_threadsafe(self.asked.set)


class _End:
    """The first signal asks for an orderly end, the second ends at once. However an end came to be asked for, it is
    kept to the time-out."""

    def __init__(self, timeout_s: float) -> None:
        self.stop = asyncio.Event()
        self._timeout_s = timeout_s
        self._asked_at: float | None = None

    def on_signal(self, number: signal.Signals) -> None:
        now = time.monotonic()
        if self._asked_at is None:
            self._asked_at = now
            self.stop.set()
        elif now - self._asked_at > _ONE_SIGNAL_S:
            logs.flush(_LAST_WORDS_S)
            os._exit(128 + number)

    @property
    def was_signalled(self) -> bool:
        return self._asked_at is not None

    async def keep_deadline(self) -> None:
        await self.stop.wait()
        timer = threading.Timer(self._timeout_s, _give_up, (self._timeout_s,))
        timer.daemon = True
        timer.start()


def _give_up(timeout_s: float) -> None:
    _say(f"error: not stopped within {timeout_s:g} s (agent.shutdown_timeout_s); exiting")
    os._exit(EX_FAILED)


def _leave_nothing_open() -> None:
    """To the program that comes next: OpenCV opens cameras without O_CLOEXEC, and a thread of it may hold one yet."""
    for fd in [int(path.name) for path in Path("/proc/self/fd").iterdir()]:
        if fd > 2:
            with contextlib.suppress(OSError):  # the one that listed them is closed by now
                os.set_inheritable(fd, False)


def _say(sentence: str) -> None:
    """On stderr, after what was logged."""
    logs.flush(_LAST_WORDS_S)
    logs.say(sentence)
