"""The page's server: its files, the stream of news, the pictures, and the one command that it may pass on."""

from __future__ import annotations

import asyncio
import hmac
import time
from collections.abc import Mapping
from dataclasses import dataclass
from http import HTTPStatus
from importlib import resources
from typing import Any

import msgspec
from msgspec import Struct

from edge_agent import __version__
from edge_agent.config import MqttOptions
from edge_agent.errors import CommandError
from edgectl.dashboard.feed import Feed
from edgectl.dashboard.fleet import Fleet
from edgectl.dashboard.tasks import end
from edgectl.dashboard.viewers import Viewers, event, news, whole
from edgectl.dashboard.web import Hosts, Refused, Request, Response, json_response, read_request

_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
_MOST_CONNECTIONS = 128
_BETWEEN_EVENTS_S = 0.2
_HEARTBEAT_S = 10.0
_SLOW_S = 20.0  # a browser that takes nothing for so long is let go


class Activate(Struct, forbid_unknown_fields=True):
    """The body of `POST /api/activate`."""

    device: str
    model: str


@dataclass(frozen=True, slots=True)
class Page:
    """What the page is told first; `token`: what a command must come with, None where none is taken."""

    prefix: str
    broker: str
    token: str | None
    version: str = __version__

    @classmethod
    def of(cls, mqtt: MqttOptions, token: str | None) -> Page:
        return cls(mqtt.prefix, mqtt.host if mqtt.transport == "unix" else f"{mqtt.host}:{mqtt.port}", token)


class Server:
    """Answers requests. `handle` is called for each connection; `close` ends those that last."""

    def __init__(self, page: Page, *, fleet: Fleet, feed: Feed, viewers: Viewers, hosts: Hosts) -> None:
        self._page = page
        self._fleet = fleet
        self._feed = feed
        self._viewers = viewers
        self._hosts = hosts
        self._files = files()
        self._connections: set[asyncio.Task[Any]] = set()

    async def handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._connections.add(task)
        try:
            await self._converse(reader, writer)
        except (ConnectionError, asyncio.CancelledError):
            pass  # the browser, or we, ended it: this task ends here in any case
        finally:
            self._connections.discard(task)
            await _closed(writer)

    async def close(self) -> None:
        await end(list(self._connections))

    async def _converse(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            if len(self._connections) > _MOST_CONNECTIONS:
                raise Refused(HTTPStatus.SERVICE_UNAVAILABLE, "too many connections; close other pages")
            request = await read_request(reader)
            if request is None:
                return
            self._require_ours(request)
            if (request.method, request.path) == ("GET", "/api/events"):
                await self._stream(request, writer)
                return
            response = await self._answer(request)
        except Refused as refusal:
            response = json_response({"error": str(refusal)}, refusal.status)
        writer.write(response.encoded())
        await asyncio.wait_for(writer.drain(), _SLOW_S)

    def _require_ours(self, request: Request) -> None:
        host, origin = request.headers.get("host"), request.headers.get("origin")
        if host not in self._hosts:
            raise Refused(HTTPStatus.MISDIRECTED_REQUEST, "this is no name of this server; use its address")
        if origin is not None and not self._hosts.allows_origin(origin):
            raise Refused(HTTPStatus.FORBIDDEN, "not from another site's page")

    async def _answer(self, request: Request) -> Response:
        if request.method == "POST" and request.path == "/api/activate":
            return await self._activate(request)
        if request.method != "GET":
            raise Refused(HTTPStatus.METHOD_NOT_ALLOWED, "this page is read with GET")
        if request.path == "/api/picture":
            return self._picture(request)
        if (file := self._files.get(request.path)) is None:
            raise Refused(HTTPStatus.NOT_FOUND, "there is nothing here")
        return file

    def _picture(self, request: Request) -> Response:
        device = self._fleet.devices.get(request.query.get("device", ""))
        picture = device.pictures.get(request.query.get("camera", "")) if device else None
        if picture is None:
            raise Refused(HTTPStatus.NOT_FOUND, "there is no picture of this camera yet")
        return Response(picture.jpeg, "image/jpeg")

    async def _activate(self, request: Request) -> Response:
        if self._page.token is None:
            raise Refused(HTTPStatus.FORBIDDEN, "commands are off; start the dashboard with --allow-commands")
        if not hmac.compare_digest(request.headers.get("x-edge-token", "").encode(), self._page.token.encode()):
            raise Refused(HTTPStatus.FORBIDDEN, "this page is of an earlier start; load it again")
        if request.headers.get("content-type") != "application/json":
            raise Refused(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "send JSON")
        try:
            wanted = msgspec.json.decode(request.body, type=Activate)
            job = await self._feed.activate(wanted.device, wanted.model)
        except msgspec.DecodeError as error:
            raise Refused(HTTPStatus.BAD_REQUEST, f"not understood: {error}") from error
        except CommandError as error:
            raise Refused(HTTPStatus.CONFLICT, str(error)) from error
        return json_response({"job": job}, HTTPStatus.ACCEPTED)

    async def _stream(self, request: Request, writer: asyncio.StreamWriter) -> None:
        """News until the browser leaves, or takes nothing for too long."""
        if self._viewers.is_full:
            raise Refused(HTTPStatus.SERVICE_UNAVAILABLE, "too many pages are open; close another")
        name = request.query.get("device", "")
        with self._viewers.looking(name) as viewer, self._feed.looking_at(name):
            writer.write(Response(b"", "text/event-stream").head())
            first = {"page": self._page, "broker": self._broker(), **whole(self._fleet, name)}
            await self._send(writer, first)
            while True:
                try:
                    changes, is_broker_new = await asyncio.wait_for(viewer.changes(), _HEARTBEAT_S)
                except asyncio.TimeoutError:
                    await self._send(writer, {})
                    continue
                told = news(self._fleet, name, changes)
                if is_broker_new:
                    told["broker"] = self._broker()
                await self._send(writer, told)
                await asyncio.sleep(_BETWEEN_EVENTS_S)

    async def _send(self, writer: asyncio.StreamWriter, told: Mapping[str, Any]) -> None:
        writer.write(event({"now_s": time.monotonic(), "misread": self._fleet.misread, **told}))
        try:
            await asyncio.wait_for(writer.drain(), _SLOW_S)
        except asyncio.TimeoutError:
            writer.transport.abort()
            raise ConnectionAbortedError("the browser takes nothing") from None

    def _broker(self) -> dict[str, Any]:
        return {"connected": self._feed.is_connected, "error": self._feed.error}


async def _closed(writer: asyncio.StreamWriter) -> None:
    """Ends the connection; what a browser does not take in time is lost."""
    writer.close()
    try:
        await asyncio.wait_for(writer.wait_closed(), _SLOW_S)
    except (OSError, asyncio.TimeoutError, asyncio.CancelledError):
        writer.transport.abort()


def files() -> Mapping[str, Response]:
    """The page's own files by their paths; `/` is `index.html`."""
    folder = resources.files("edgectl.dashboard") / "static"
    found = {}
    for file in folder.iterdir():
        suffix = "." + file.name.rpartition(".")[2]
        if suffix in _TYPES:
            found[f"/{file.name}"] = Response(file.read_bytes(), _TYPES[suffix])
    return {**found, "/": found["/index.html"]}
