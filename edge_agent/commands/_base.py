"""What a command is to its handler: its arguments, the agent, and a way to tell how it goes."""

from __future__ import annotations

import math
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeVar

from edge_agent import messages
from edge_agent.config import Config, Table
from edge_agent.data import Message
from edge_agent.errors import ModelError
from edge_agent.messages import Topics
from edge_agent.model_slot import ModelSlot
from edge_agent.models.library import Library
from edge_agent.settings import Settings
from edge_agent.snapshots import Snapshots

R = TypeVar("R")

_TELL_S = 0.5


class Services(Protocol):
    """What handlers may use of the agent."""

    @property
    def topics(self) -> Topics: ...
    @property
    def slot(self) -> ModelSlot: ...
    @property
    def snapshots(self) -> Snapshots: ...
    @property
    def config(self) -> Config: ...
    @property
    def camera_names(self) -> list[str]: ...
    def publish(self, message: Message) -> None: ...
    def status(self) -> messages.Status: ...
    def stats(self) -> messages.Stats: ...
    def reset_stats(self) -> None: ...
    def restart(self) -> None:
        """End in order, and start anew."""

    async def models(self) -> messages.Models: ...
    async def look(self, work: Callable[[Library], R]) -> R:
        """What `work`, which only looks, comes to: at once, whatever else is done with models."""

    async def in_library(self, work: Callable[[Library], R]) -> R:
        """What `work` comes to, in the thread that does what takes its time with models."""

    async def change(self, work: Callable[[Settings], Config]) -> messages.Changed:
        """Take over the configuration that `work` makes, in a thread; what has changed by that."""


class Call:
    """A command that runs, as its handler sees it; `progress` may be called from any thread. `jobs`: all that run."""

    def __init__(self, agent: Services, command: messages.Command, jobs: Mapping[str, Call]) -> None:
        self.agent = agent
        self.id = command.id
        self.name = command.command
        self.jobs = jobs
        self.started_at = messages.timestamp(time.time_ns())
        self.is_cancelled = False
        self.on_cancel: Callable[[], object] = lambda: None
        self.phase: str | None = None
        self.percent: float | None = None
        self._told_s = -math.inf

    def cancel(self) -> None:
        """Ask it to end soon; what it is in the middle of may go on."""
        self.is_cancelled = True
        self.on_cancel()

    def progress(self, phase: str, percent: float | None) -> None:
        """Tell how it goes, on `jobs/<id>`; twice a second at most while it is in one phase. Raises `ModelError`
        (`cancelled`) once the job was cancelled."""
        if self.is_cancelled:
            raise ModelError(f"{self.name} was cancelled", code="cancelled")
        is_news = phase != self.phase or time.monotonic() - self._told_s >= _TELL_S
        self.phase, self.percent = phase, round(percent, 1) if percent is not None else None
        if is_news:
            self._told_s = time.monotonic()
            self._publish("running")

    def end(self, code: str | None = None, message: str | None = None) -> None:
        """The last word, where there was one before; with a `code` it failed."""
        if self.phase is not None:
            self._publish("failed" if code else "done", code=code, message=message)

    def job(
        self, state: Literal["running", "done", "failed"], *, code: str | None = None, message: str | None = None
    ) -> messages.Job:
        return messages.Job(
            schema=messages.SCHEMA_VERSION,
            device=self.agent.topics.device,
            id=self.id,
            command=self.name,
            state=state,
            phase=self.phase,
            percent=self.percent if state == "running" else None,
            started_at=self.started_at,
            at=messages.timestamp(time.time_ns()),
            code=code,
            message=message,
        )

    def _publish(self, state: Literal["running", "done", "failed"], **why: str | None) -> None:
        topic = self.agent.topics.job(self.id)
        self.agent.publish(Message(topic, messages.encode(self.job(state, **why)), "status"))


Handler = Callable[[Any, Call], Awaitable[Any]]


@dataclass(frozen=True, slots=True)
class Registered:
    """A command: what it takes, what it does, and whether that takes its time."""

    arguments: type[Table]
    handler: Handler
    is_long: bool


_commands: dict[str, Registered] = {}


def command(name: str, arguments: type[Table], *, is_long: bool = False) -> Callable[[Handler], Handler]:
    """Register a handler under a command's name. A long one is answered `accepted` at once, and again at its end."""

    def register(handler: Handler) -> Handler:
        _commands[name] = Registered(arguments, handler, is_long)
        return handler

    return register


def registered() -> Mapping[str, Registered]:
    """Every command by its name."""
    return dict(sorted(_commands.items()))


class NoArguments(Table):
    """The command takes none."""
