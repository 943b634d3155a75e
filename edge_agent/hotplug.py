"""Tells of devices that come: a camera that was plugged in again is opened at once, not after its back-off."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import structlog
from inotify_simple import INotify, flags

log = structlog.get_logger()

DEVICES = "/dev"


class DeviceWatch:
    """Hears of names in /dev that appear or become accessible: the kernel makes a device with root's
    permissions, and udev changes them a little later.

    Making one blocks for a moment (it looks for the C library). Where the system gives no inotify it stays
    silent, and cameras come back with their back-off.
    """

    def __init__(self, folder: str = DEVICES) -> None:
        self._inotify: INotify | None = None
        try:
            self._inotify = INotify(nonblocking=True)
            self._inotify.add_watch(folder, flags.CREATE | flags.ATTRIB | flags.MOVED_TO)
        except OSError as error:
            self.close()
            log.warning("hotplug.off", reason=error.strerror)

    @contextmanager
    def telling(self, on_device: Callable[[str], None]) -> Iterator[None]:
        """While inside, `on_device` hears each name in the running event loop."""
        if self._inotify is None:
            yield
            return
        inotify, loop = self._inotify, asyncio.get_running_loop()

        def on_readable() -> None:
            for name in {event.name for event in inotify.read(timeout=0)}:
                on_device(name)

        loop.add_reader(inotify.fileno(), on_readable)
        try:
            yield
        finally:
            loop.remove_reader(inotify.fileno())

    def close(self) -> None:
        if self._inotify is not None:
            self._inotify.close()
            self._inotify = None
