"""Runs commands: whoever sends whatever, there is one last reply, and each is carried out at most once."""

from __future__ import annotations

import asyncio
import fnmatch
import random
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

import msgspec
import structlog

from edge_agent import messages, plugins
from edge_agent.commands._base import Call, Registered, Services, registered
from edge_agent.commands.ledger import Ledger
from edge_agent.data import Message
from edge_agent.errors import CommandError, EdgeAgentError
from edge_agent.messages import Reply
from edge_agent.mqtt import Inbound
from edge_agent.signing import Signatures
from edge_agent.threads import OwnerThread

log = structlog.get_logger()

_MAX_RUNNING = 16
_MOST_WAITING = 100
_MOST_SPREAD_S = 3600.0
_LONGEST = 1000


class Dispatcher:
    """`handle` is called for every message on a command topic; the work is done in tasks that `close` waits for.

    The ledger remembers ids and replies; it is read and written in the `keeping` thread.
    """

    def __init__(
        self,
        services: Services,
        *,
        ledger: Ledger,
        keeping: OwnerThread,
        signatures: Signatures,
        disabled: Sequence[str],
    ) -> None:
        self.counts: Counter[str] = Counter()
        self._services = services
        self._ledger = ledger
        self._keeping = keeping
        self._signatures = signatures
        self._disabled = disabled
        self._tasks: set[asyncio.Task[None]] = set()
        self._jobs: dict[str, Call] = {}
        self._seen: set[str] = set()
        self._begun: set[str] = set()
        self._waiting = 0

    def handle(self, inbound: Inbound) -> None:
        """Start on a command; never blocks and never raises."""
        task = asyncio.ensure_future(self._answer(inbound))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def close(self, *, timeout_s: float) -> None:
        """Wait for the commands that run, and give up on those that take longer."""
        for job in self._jobs.values():
            job.cancel()
        if self._tasks:
            _, late = await asyncio.wait(self._tasks, timeout=timeout_s)
            for task in late:
                task.cancel()
            if late:
                await asyncio.wait(late, timeout=timeout_s)

    async def _answer(self, inbound: Inbound) -> None:
        began = time.monotonic()
        command_id = messages.command_id(inbound.payload)
        if inbound.retain or command_id is None or not self._signatures.is_ours(inbound.payload):
            # Whatever its id, it is not the command of that id, and will be refused.
            self._reply(inbound, await self._finish(inbound, began, command_id), command_id)
            return
        if command_id in self._seen:  # it runs, and its one reply will come
            self.counts["repeated"] += 1
            log.info("command.repeated", id=command_id)
            return
        self._seen.add(command_id)
        try:
            if (earlier := await self._keeping.call(self._ledger.find, command_id)) is not None:
                self._reply(inbound, earlier, command_id)
                return
            reply = await self._finish(inbound, began, command_id)
            if command_id in self._begun:
                await self._keeping.call(self._ledger.end, command_id, reply)
            self._reply(inbound, reply, command_id)  # once it is kept: after a kill it must be the same
        finally:
            self._seen.discard(command_id)
            self._begun.discard(command_id)

    async def _finish(self, inbound: Inbound, began: float, command_id: str | None) -> bytes:
        """Carry it out; the reply that says what came of it."""
        outcome = await self._outcome(inbound)
        duration_ms = round((time.monotonic() - began) * 1e3, 1)
        reply = Reply(device=self._services.topics.device, id=command_id, duration_ms=duration_ms, **outcome)
        self.counts[reply.status if reply.status == "ok" else str(reply.code)] += 1
        return messages.encode(reply)

    async def _outcome(self, inbound: Inbound) -> dict[str, Any]:
        """The last reply's `status` and what belongs to it."""
        name = None
        try:
            request = self._read(inbound)
            name = request.command
            result = await self._run(request, inbound)
        except EdgeAgentError as error:
            log.warning("command.refused", command=_brief(name), code=error.code, reason=_brief(str(error)))
            return {"status": "error", "code": error.code, "message": _brief(str(error))}
        except asyncio.CancelledError:
            return {"status": "error", "code": "shutdown", "message": "the agent stopped before this was done"}
        except Exception as error:  # a handler's bug is answered, logged, and harms nobody else
            log.exception("command.failed", command=name)
            return {"status": "error", "code": "internal", "message": _brief(f"{type(error).__name__}: {error}")}
        log.info("command.done", command=name, id=request.id)
        return {"status": "ok", "result": result}

    def _read(self, inbound: Inbound) -> messages.Command:
        if inbound.retain:
            raise CommandError(
                "a retained command is ignored, since it would run at every connect; publish it without retain",
                code="retained",
            )
        payload = self._signatures.opened(inbound.payload)
        request = messages.decode_command(payload)
        device = self._services.topics.device
        if request.device is not None and request.device != device:
            raise CommandError(f"the command is for {request.device!r}, this is {device!r}", code="bad_arguments")
        if request.group is not None and request.group not in ("all", *self._services.config.mqtt.groups):
            raise CommandError(
                f"the command is for the group {request.group!r}, of which this is none", code="bad_arguments"
            )
        if self._signatures.are_wanted and request.device is None and request.group is None:
            raise CommandError("a signed command names its `device`, or its `group`, which may be all", code="unsigned")
        if any(fnmatch.fnmatchcase(request.command, pattern) for pattern in self._disabled):
            raise CommandError(f"{request.command} is switched off here (mqtt.disabled_commands)", code="forbidden")
        if self._signatures.are_wanted and request.expires_at is None:
            raise CommandError("a signed command says when it expires (expires_at)", code="unsigned")
        return request

    async def _run(self, request: messages.Command, inbound: Inbound) -> Any:
        entry, arguments = _found(request)
        await self._wait(request)
        if len(self._jobs) >= _MAX_RUNNING:
            raise CommandError(f"{_MAX_RUNNING} commands are running; try again", code="busy")
        call = self._jobs[request.id] = Call(self._services, request, self._jobs)
        try:
            await self._keeping.call(self._ledger.begin, request.id)
            self._begun.add(request.id)
            if entry.is_long:
                self._accept(request, inbound)
                call.progress("begun", None)
            result = await entry.handler(arguments, call)
        except EdgeAgentError as error:
            call.end(error.code, str(error))
            raise
        except BaseException as error:
            call.end("shutdown" if isinstance(error, asyncio.CancelledError) else "internal", "it was not done")
            raise
        finally:
            del self._jobs[request.id]
        call.end()
        return msgspec.to_builtins(result)

    async def _wait(self, request: messages.Command) -> None:
        """A command for many devices need not come to all of them at once."""
        if request.spread_s == 0:
            return
        if self._waiting >= _MOST_WAITING:
            raise CommandError(f"{_MOST_WAITING} commands wait for their time; try again", code="busy")
        self._waiting += 1
        try:
            await asyncio.sleep(random.uniform(0, min(request.spread_s, _MOST_SPREAD_S)))
        finally:
            self._waiting -= 1
        messages.require_fresh(request)

    def _accept(self, request: messages.Command, inbound: Inbound) -> None:
        topics = self._services.topics
        result = {"job": topics.job(request.id)}
        accepted = Reply(device=topics.device, id=request.id, status="accepted", duration_ms=0.0, result=result)
        self._reply(inbound, messages.encode(accepted), request.id)

    def _reply(self, inbound: Inbound, reply: bytes, command_id: str | None) -> None:
        if inbound.response_topic and messages.is_publishable(inbound.response_topic):
            topic = inbound.response_topic
        elif command_id is not None:
            topic = self._services.topics.reply(command_id)
        else:
            self.counts["unanswerable"] += 1
            log.warning("command.unanswerable", reply=reply.decode(errors="replace")[:200])
            return
        self._services.publish(Message(topic, reply, "replies", correlation=inbound.correlation))


def _brief(text: str | None) -> str | None:
    """What somebody sent may stand in it, of any length."""
    return text if text is None or len(text) <= _LONGEST else f"{text[:_LONGEST]}…"


def _found(request: messages.Command) -> tuple[Registered, Any]:
    """The command and its arguments. Raises `CommandError`."""
    entry = registered().get(request.command)
    if entry is None:
        known = list(registered())
        raise CommandError(
            f"unknown command {request.command!r}{plugins.nearest(request.command, known)}", code="unknown_command"
        )
    try:
        return entry, msgspec.convert(request.args, entry.arguments)
    except msgspec.ValidationError as error:
        raise CommandError(f"{request.command}: {error}", code="bad_arguments") from error
