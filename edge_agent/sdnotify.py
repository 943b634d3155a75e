"""What the agent tells systemd: `sd_notify(3)` on NOTIFY_SOCKET, and nothing where there is none."""

from __future__ import annotations

import os
import socket

import structlog

log = structlog.get_logger()


def notify(*states: str) -> bool:
    """Send lines such as `READY=1` or `STATUS=…`; says whether a service manager was told."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address:
        return False
    if address.startswith("@"):  # an abstract socket, as sd_notify(3) writes it
        address = "\0" + address[1:]
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as notifier:
            notifier.setblocking(False)
            notifier.sendto("\n".join(" ".join(state.split()) for state in states).encode(), address)
    except OSError as error:
        log.warning("systemd.not_notified", error=str(error))
        return False
    return True
