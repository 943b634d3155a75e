"""`edgectl dashboard`: a small web page on this machine, fed from the broker."""

from __future__ import annotations

import asyncio
import errno
import json
import secrets
import signal
import socket
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

from edge_agent.config import Config
from edge_agent.errors import ConfigError, EdgeAgentError
from edgectl._config import configuration
from edgectl.dashboard.feed import Feed
from edgectl.dashboard.fleet import Fleet
from edgectl.dashboard.server import Page, Server
from edgectl.dashboard.tasks import end
from edgectl.dashboard.viewers import Viewers
from edgectl.dashboard.web import HEAD_BYTES, Hosts, is_loopback


class DashboardError(EdgeAgentError):
    """The page cannot be served."""

    code = "dashboard"


def dashboard(
    path: Path | None,
    *,
    listen: str,
    port: int,
    allow_commands: bool,
    picture_interval_s: float,
    as_json: bool,
) -> None:
    """Serve until Ctrl-C or SIGTERM. Raises `DashboardError` where the address cannot be listened on, `ConfigError`."""
    loaded = _configuration(path)
    token = secrets.token_urlsafe(24) if allow_commands else None
    with _listening(listen, port) as door:
        port = int(door.getsockname()[1])
        hosts, say = Hosts(listen, port=port), partial(_say, listen, port, token, as_json=as_json)
        asyncio.run(_serve(loaded, door, hosts=hosts, token=token, picture_interval_s=picture_interval_s, ready=say))


async def _serve(
    loaded: Config,
    door: socket.socket,
    *,
    hosts: Hosts,
    token: str | None,
    picture_interval_s: float,
    ready: Callable[[], None],
) -> None:
    stop = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    fleet, viewers = Fleet(loaded.mqtt.prefix), Viewers()
    feed = Feed(
        loaded,
        fleet=fleet,
        tell=viewers.note,
        tell_broker=viewers.note_broker,
        picture_interval_s=picture_interval_s,
    )
    server = Server(Page.of(loaded.mqtt, token), fleet=fleet, feed=feed, viewers=viewers, hosts=hosts)
    async with await asyncio.start_server(server.handle, sock=door, limit=HEAD_BYTES) as listening:
        ready()
        feeding = asyncio.ensure_future(feed.run())
        stopping = asyncio.ensure_future(stop.wait())
        await asyncio.wait((feeding, stopping), return_when=asyncio.FIRST_COMPLETED)
        listening.close()
        await server.close()
        await end((feeding, stopping))
        if not feeding.cancelled():
            feeding.result()


def _configuration(path: Path | None) -> Config:
    """Where the broker is. A machine that only looks on has no cameras, or cannot play those in the file."""
    try:
        return configuration(path)
    except ConfigError as error:
        if isinstance(error.usable, Config) and all(problem.startswith("cameras") for problem in error.problems):
            return error.usable
        raise


def _listening(listen: str, port: int) -> socket.socket:
    """Raises `DashboardError`."""
    try:
        [(family, *_, address), *_] = socket.getaddrinfo(listen, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        return socket.create_server(address[:2], family=family)
    except (OSError, UnicodeError) as error:
        raise DashboardError(_why_not(error, listen, port)) from error


def _why_not(error: OSError | UnicodeError, listen: str, port: int) -> str:
    number = getattr(error, "errno", None)
    if number == errno.EADDRINUSE:
        return f"port {port} of {listen} is taken; choose another with --port, or 0 for any that is free"
    if number == errno.EACCES:
        return f"port {port} takes root to listen on; choose one from 1024 on with --port"
    if isinstance(error, (socket.gaierror, UnicodeError)) or number == errno.EADDRNOTAVAIL:
        return f"--listen {listen}: this machine has no such address"
    return f"{listen}:{port} cannot be listened on: {error}"


def _say(listen: str, port: int, token: str | None, *, as_json: bool) -> None:
    url = f"http://{f'[{listen}]' if ':' in listen else listen}:{port}/"
    if as_json:
        print(json.dumps({"url": url, "allow_commands": token is not None}), flush=True)
    else:
        print(f"{url} ({'may activate models' if token else 'read-only'}; Ctrl-C ends it)", flush=True)
    if not is_loopback(listen):
        what = "see the cameras and change models" if token else "see the cameras"
        print(f"warning: whoever reaches {listen}:{port} can {what}; there is no login", file=sys.stderr)
