"""Tells of devices that come: a camera that was plugged in again is opened at once, not after its back-off."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import structlog
from inotify_simple import INotify, flags

log = structlog.get_logger()

DEVICES = "/dev"


@contextmanager
def watch_devices(
    loop: asyncio.AbstractEventLoop, on_device: Callable[[str], None], *, folder: str = DEVICES
) -> Iterator[None]:
    """While inside, `on_device` hears (in the loop) the names in /dev that appear or become accessible.

    The kernel makes a device with root's permissions and udev changes them a little later: both are told.
    """
    try:
        inotify = INotify(nonblocking=True)
        inotify.add_watch(folder, flags.CREATE | flags.ATTRIB | flags.MOVED_TO)
    except OSError as error:  # no inotify in some sandboxes, or too many watches: back-off alone must do
        log.warning("hotplug.off", reason=error.strerror)
        yield
        return

    def on_readable() -> None:
        for name in {event.name for event in inotify.read(timeout=0)}:
            on_device(name)

    loop.add_reader(inotify.fileno(), on_readable)
    try:
        yield
    finally:
        loop.remove_reader(inotify.fileno())
        inotify.close()
