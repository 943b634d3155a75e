"""What people can tell the agent over MQTT: one handler a command, one reply a command.

A handler is an async function decorated with `@command(name)`; its first parameter's type, a struct,
says what arguments there are. It returns what goes into the reply, or raises an `EdgeAgentError`.
"""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import msgspec
import structlog

from edge_agent import __version__, messages, plugins
from edge_agent.config import Table
from edge_agent.data import Message
from edge_agent.errors import CommandError, EdgeAgentError
from edge_agent.messages import Reply, Topics
from edge_agent.model_slot import ModelSlot
from edge_agent.mqtt import Inbound
from edge_agent.snapshots import Snapshots

log = structlog.get_logger()

_MAX_RUNNING = 16
_MAX_REMEMBERED = 1000


class Services(Protocol):
    """What handlers may use of the agent."""

    @property
    def topics(self) -> Topics: ...
    @property
    def slot(self) -> ModelSlot: ...
    @property
    def snapshots(self) -> Snapshots: ...
    @property
    def camera_names(self) -> list[str]: ...
    def publish(self, message: Message) -> None: ...
    def status(self) -> messages.Status: ...
    def models(self) -> messages.Models: ...


Handler = Callable[[Any, Services], Awaitable[Any]]


@dataclass(frozen=True, slots=True)
class _Registered:
    arguments: type[Table]
    handler: Handler


_commands: dict[str, _Registered] = {}


def command(name: str, arguments: type[Table]) -> Callable[[Handler], Handler]:
    """Register a handler under a command's name."""

    def register(handler: Handler) -> Handler:
        _commands[name] = _Registered(arguments, handler)
        return handler

    return register


def registered() -> Mapping[str, type[Table]]:
    """Every command's name and the struct of its arguments."""
    return {name: entry.arguments for name, entry in sorted(_commands.items())}


class NoArguments(Table):
    """The command takes none."""


class ModelActivate(Table):
    """`model.activate`"""

    name: str


class CameraSnapshot(Table):
    """`camera.snapshot`"""

    camera: str
    annotated: bool = True
    timeout_s: float = 5.0


@command("agent.info", NoArguments)
async def agent_info(arguments: NoArguments, services: Services) -> dict[str, Any]:
    """Version, device and what can be commanded."""
    return {
        "device": services.topics.device,
        "version": __version__,
        "schema": messages.SCHEMA_VERSION,
        "commands": list(registered()),
        "cameras": services.camera_names,
    }


@command("agent.status", NoArguments)
async def agent_status(arguments: NoArguments, services: Services) -> messages.Status:
    """The status topic's payload, now."""
    return services.status()


@command("model.list", NoArguments)
async def model_list(arguments: NoArguments, services: Services) -> messages.Models:
    """The models topic's payload, now."""
    return services.models()


@command("model.activate", ModelActivate)
async def model_activate(arguments: ModelActivate, services: Services) -> dict[str, Any]:
    """Put another model to work; the old one runs until the new one is warm."""
    done = await services.slot.activate(arguments.name)
    return {
        "model": messages.model_of(done.model),
        "previous": done.previous,
        "load_ms": round(done.load_ms, 1),
        "warm_up_ms": round(done.warm_up_ms, 1),
        "swap_ms": round(done.swap_ms, 1),
    }


@command("camera.snapshot", CameraSnapshot)
async def camera_snapshot(arguments: CameraSnapshot, services: Services) -> dict[str, Any]:
    """Publish a JPEG of the camera's next frame on its snapshot topic."""
    names = services.camera_names
    if arguments.camera not in names:
        raise CommandError(
            f"there is no camera {arguments.camera!r}{plugins.nearest(arguments.camera, names)}", code="not_found"
        )
    timeout_s = min(max(arguments.timeout_s, 0.1), 60.0)
    shot = await services.snapshots.take(arguments.camera, annotated=arguments.annotated, timeout_s=timeout_s)
    topic = services.topics.camera(arguments.camera, "snapshot")
    services.publish(Message(topic, shot.jpeg, qos=1))
    height, width = shot.result.frame.image.shape[:2]
    return {"topic": topic, "bytes": len(shot.jpeg), "width": width, "height": height, "seq": shot.result.frame.seq}


class Dispatcher:
    """Runs commands and replies to each exactly once.

    `handle` is called for every message on the command topic; the work is done in tasks that
    `close` waits for.
    """

    def __init__(self, services: Services) -> None:
        self._services = services
        self._running: set[asyncio.Task[None]] = set()
        self._replies: OrderedDict[str, Reply | None] = OrderedDict()

    def handle(self, inbound: Inbound) -> None:
        """Start on a command; never blocks and never raises."""
        task = asyncio.ensure_future(self._answer(inbound))
        self._running.add(task)
        task.add_done_callback(self._running.discard)

    async def close(self, *, timeout_s: float) -> None:
        """Wait for the commands that run, and give up on those that take longer."""
        if self._running:
            _, late = await asyncio.wait(self._running, timeout=timeout_s)
            for task in late:
                task.cancel()
            if late:
                await asyncio.wait(late, timeout=timeout_s)

    async def _answer(self, inbound: Inbound) -> None:
        began = time.monotonic()
        command_id = messages.command_id(inbound.payload)
        if command_id is not None and command_id in self._replies:
            earlier = self._replies[command_id]
            if earlier is not None:  # else it still runs, and its one reply will come
                self._reply(inbound, earlier)
            return
        outcome = await self._outcome(inbound)
        reply = Reply(id=command_id, duration_ms=round((time.monotonic() - began) * 1e3, 1), **outcome)
        if command_id is not None and command_id in self._replies:
            self._replies[command_id] = reply
        self._reply(inbound, reply)

    async def _outcome(self, inbound: Inbound) -> dict[str, Any]:
        """The reply's `status` and what belongs to it."""
        name = None
        try:
            if inbound.retain:
                raise CommandError(
                    "a retained command is ignored, since it would run at every connect; publish it without retain",
                    code="retained",
                )
            request = messages.decode_command(inbound.payload)
            name = request.command
            if len(self._running) > _MAX_RUNNING:
                raise CommandError(f"{_MAX_RUNNING} commands are running; try again", code="busy")
            self._remember(request.id)
            result = await self._run(request)
        except EdgeAgentError as error:
            log.warning("command.refused", command=name, code=error.code, reason=str(error))
            return {"status": "error", "code": error.code, "message": str(error)}
        except asyncio.CancelledError:
            return {"status": "error", "code": "shutdown", "message": "the agent stopped before this was done"}
        except Exception as error:  # a handler's bug is answered, logged, and harms nobody else
            log.exception("command.failed", command=name)
            return {"status": "error", "code": "internal", "message": f"{type(error).__name__}: {error}"}
        log.info("command.done", command=name, id=request.id)
        return {"status": "ok", "result": result}

    async def _run(self, request: messages.Command) -> Any:
        entry = _commands.get(request.command)
        if entry is None:
            known = list(registered())
            raise CommandError(
                f"unknown command {request.command!r}{plugins.nearest(request.command, known)}", code="unknown_command"
            )
        try:
            arguments = msgspec.convert(request.args, entry.arguments)
        except msgspec.ValidationError as error:
            raise CommandError(f"{request.command}: {error}", code="bad_arguments") from error
        return await entry.handler(arguments, self._services)

    def _remember(self, command_id: str) -> None:
        self._replies[command_id] = None
        while len(self._replies) > _MAX_REMEMBERED:
            self._replies.popitem(last=False)

    def _reply(self, inbound: Inbound, reply: Reply) -> None:
        if inbound.response_topic and messages.is_publishable(inbound.response_topic):
            topic = inbound.response_topic
        elif reply.id is not None:
            topic = self._services.topics.reply(reply.id)
        else:
            log.warning("command.unanswerable", message=reply.message)
            return
        self._services.publish(Message(topic, messages.encode(reply), qos=1, correlation=inbound.correlation))
