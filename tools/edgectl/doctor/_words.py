"""What the process of the checks is told, and what it says. Imports little, since the other side shows it at once."""

from __future__ import annotations

from typing import Literal

from msgspec import Struct

State = Literal["ok", "warn", "fail"]


class Finding(Struct, frozen=True, tag="finding"):
    """One line of the report; `fix` says what to do where something is to be done."""

    state: State
    what: str
    fact: str
    fix: str | None = None


class Task(Struct):
    """What the process is told: the descriptor to answer on, and the number of the check to begin with."""

    answers: int
    first: int
    path: str | None
    acl: bool


class Began(Struct, tag="began"):
    """A check begins. `patience`: how many times longer than others it may be silent."""

    index: int
    name: str
    patience: float


class Done(Struct, tag="done"):
    """All checks have ended."""


Word = Began | Finding | Done
