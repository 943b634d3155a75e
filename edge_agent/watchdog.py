"""Feeds systemd's watchdog while everything that has to make progress does, and never otherwise.

The event loop shows its progress by running this at all; the engine's thread and the cameras' by their signs.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping

import anyio
import structlog

from edge_agent.sdnotify import notify

log = structlog.get_logger()

DEFAULT_TIMEOUT_S = 30.0
"""Where systemd asks for none: then nobody ends the agent, but health tells."""

_MOST_BETWEEN_S = 1.0

Sign = Callable[[], float]
"""For how many seconds something has made no progress that it should have made."""


class Watchdog:
    """`signs` by name; one may be silent for half the time-out, times its `patience`, before nothing is fed."""

    def __init__(
        self,
        signs: Mapping[str, Sign],
        *,
        patience: Mapping[str, float] | None = None,
        timeout_s: float | None = None,
        tell: Callable[..., bool] = notify,
    ) -> None:
        self.is_ready = False
        self._signs = signs
        self._patience = patience or {}
        self._is_wanted = timeout_s is not None
        self._timeout_s = timeout_s or DEFAULT_TIMEOUT_S
        self._tell = tell
        self._told: set[str] = set()
        self._owed: tuple[str, ...] = ()

    def late(self) -> dict[str, float]:
        """What has been silent for too long, and how long."""
        silent = {name: sign() for name, sign in self._signs.items()}
        return {name: for_s for name, for_s in silent.items() if for_s > self.limit_s(name)}

    def limit_s(self, name: str) -> float:
        """How long this one may be silent."""
        return self._timeout_s / 2 * self._patience.get(name, 1.0)

    def ready(self, *states: str) -> None:
        """Tell systemd that the agent has started, or reloaded; told again should that get lost."""
        self.is_ready = True
        self._owed = () if self._tell("READY=1", *states) else ("READY=1", *states)

    def look(self) -> None:
        """Feed, if nothing is late. While the agent starts, the same signs buy it time."""
        late = self.late()
        if late.keys() != self._told:
            self._log(late)
        if self._owed and self._tell(*self._owed):
            self._owed = ()
        if late:
            return
        told = ["WATCHDOG=1"] if self._is_wanted else []
        if not self.is_ready:
            told.append(f"EXTEND_TIMEOUT_USEC={int(max(self._timeout_s, DEFAULT_TIMEOUT_S) * 1e6)}")
        if told:
            self._tell(*told)

    async def run(self) -> None:
        """Look again and again, until cancelled."""
        while True:
            self.look()
            await anyio.sleep(min(self._timeout_s / 8, _MOST_BETWEEN_S))

    def _log(self, late: Mapping[str, float]) -> None:
        for name in late.keys() - self._told:
            log.error("watchdog.no_progress", of=name, silent_s=round(late[name], 1), fed=False)
        for name in self._told - late.keys():
            log.warning("watchdog.progress_again", of=name)
        self._told = set(late)


def wanted_timeout_s(environ: Mapping[str, str] = os.environ) -> float | None:
    """How long systemd waits for a sign of life, as `sd_watchdog_enabled(3)` reads it; None where it does not."""
    try:
        usec, pid = int(environ["WATCHDOG_USEC"]), int(environ.get("WATCHDOG_PID", os.getpid()))
    except (KeyError, ValueError):
        return None
    return usec / 1e6 if usec > 0 and pid == os.getpid() else None
