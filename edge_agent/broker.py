"""An MQTT broker inside the agent, for a first run on a machine without one. Never for production."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import structlog

from edge_agent import plugins
from edge_agent.errors import ConfigError
from edge_agent.threads import in_thread

log = structlog.get_logger()

_SHUTDOWN_S = 1.0


@asynccontextmanager
async def embedded_broker(host: str, port: int) -> AsyncIterator[None]:
    """A broker on a loopback address, MQTT 3.1.1, in a thread and event loop of its own.

    Raises `ConfigError` where the port is taken or the `demo` extra is not installed.
    """
    _require_free(host, port)
    try:
        import amqtt.broker  # noqa: F401
    except ImportError as error:
        raise ConfigError(plugins.missing(error, needed_by="[mqtt] embedded = true")) from error
    stop, started = threading.Event(), threading.Event()
    serving = asyncio.ensure_future(in_thread("broker", lambda: asyncio.run(_serve(host, port, started, stop))))
    while not started.is_set():
        await asyncio.wait((serving,), timeout=0.01)
        if serving.done():
            serving.result()
    log.info("broker.started", host=host, port=port, note="embedded, for a first run; configure your own in [mqtt]")
    try:
        yield
    finally:
        stop.set()
        await serving


def _require_free(host: str, port: int) -> None:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ConfigError(
                f"mqtt.port: the embedded broker cannot listen on {host}:{port} ({error.strerror}). If a broker of "
                "yours runs there, set `embedded = false` in [mqtt] to use it; otherwise choose another `port`"
            ) from error


async def _serve(host: str, port: int, started: threading.Event, stop: threading.Event) -> None:
    from amqtt.broker import Broker

    address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    settings: dict[str, Any] = {
        "listeners": {"default": {"type": "tcp", "bind": address}},
        "plugins": {"amqtt.plugins.authentication.AnonymousAuthPlugin": {"allow_anonymous": True}},
    }
    broker = Broker(settings)
    await broker.start()
    started.set()
    await asyncio.get_running_loop().run_in_executor(None, stop.wait)
    with contextlib.suppress(asyncio.TimeoutError):  # it waits for clients that connected and said nothing
        await asyncio.wait_for(broker.shutdown(), _SHUTDOWN_S)
