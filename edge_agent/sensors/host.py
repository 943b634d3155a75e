"""Facts of the machine and of the agent's own process, by psutil and the kernel."""

from __future__ import annotations

import ctypes
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import psutil

from edge_agent.readings import HostReadings, ProcessReadings, Readings

_STA_UNSYNC = 0x40

Fact = TypeVar("Fact")


class MachineSensor:
    """The machine and the agent's process; `state_directory` is where the disk is looked at. Each fact that cannot be
    had (a container may hide any of them) is None by itself.

    `interfaces` tells which of the network's are physical; `timesync` is what systemd-timesyncd(8) keeps; `groups` is
    where control groups (version 2) are, and `own_group` says which one is the process's.
    """

    def __init__(
        self,
        state_directory: Path | None = None,
        *,
        interfaces: Path = Path("/sys/class/net"),
        timesync: Path = Path("/run/systemd/timesync"),
        groups: Path = Path("/sys/fs/cgroup"),
        own_group: Path = Path("/proc/self/cgroup"),
    ) -> None:
        self._state_directory = state_directory
        self._interfaces = interfaces
        self._timesync = timesync
        self._groups, self._own_group = groups, own_group
        self._process = psutil.Process()
        self._spent = _spent()
        self._cores = _known(_busy_and_total) or []

    def read(self) -> Readings:
        """Some ten files of /proc: not on the event loop."""
        return Readings(host=self._host(), process=self._own())

    def close(self) -> None:
        """There is nothing to let go of."""

    def _host(self) -> HostReadings:
        memory = _known(psutil.virtual_memory)
        swap = _known(psutil.swap_memory)
        disk = _known(self._disk)
        load = _known(os.getloadavg) or (None, None, None)
        whole, cores = self._cpu()
        received, sent = _known(self._network) or (None, None)
        limit, used = _known(lambda: _group_memory(self._groups, self._own_group)) or (None, None)
        return HostReadings(
            cpu_percent=whole,
            core_percent=cores,
            load_1m=_rounded(load[0]),
            load_5m=_rounded(load[1]),
            load_15m=_rounded(load[2]),
            memory_total_mb=_mb(memory.total) if memory else None,
            memory_available_mb=_mb(memory.available) if memory else None,
            memory_used_mb=_mb(memory.total - memory.available) if memory else None,
            memory_limit_mb=None if limit is None else _mb(limit),
            memory_limit_used_mb=None if used is None else _mb(used),
            swap_total_mb=_mb(swap.total) if swap else None,
            swap_used_mb=_mb(swap.used) if swap else None,
            disk_total_mb=_mb(disk.total) if disk else None,
            disk_free_mb=_mb(disk.free) if disk else None,
            network_rx_bytes=received,
            network_tx_bytes=sent,
            uptime_s=_rounded(_known(lambda: time.clock_gettime(time.CLOCK_BOOTTIME))),
            clock_synchronised=_known(lambda: _clock_synchronised(self._timesync)),
        )

    def _disk(self) -> Any:
        return psutil.disk_usage(str(_existing(self._state_directory))) if self._state_directory else None

    def _network(self) -> tuple[int, int]:
        counters = psutil.net_io_counters(pernic=True)
        physical = [name for name in counters if (self._interfaces / name / "device").exists()]
        wanted = physical or [name for name in counters if name != "lo"]
        return sum(counters[name].bytes_recv for name in wanted), sum(counters[name].bytes_sent for name in wanted)

    def _own(self) -> ProcessReadings:
        process = self._process
        memory = _known(process.memory_info)
        (busy0, at0), self._spent = self._spent, _spent()
        busy, at = self._spent
        return ProcessReadings(
            cpu_percent=round(100 * (busy - busy0) / (at - at0), 1) if at > at0 else None,
            rss_mb=_mb(memory.rss) if memory else None,
            threads=_known(process.num_threads),
            open_files=_known(process.num_fds),
        )

    def _cpu(self) -> tuple[float | None, list[float] | None]:
        """The shares since the last call, of all cores together and of each."""
        before, self._cores = self._cores, _known(_busy_and_total) or []
        if len(before) != len(self._cores):  # nvpmodel switches cores on and off
            return None, None
        spent = [
            (busy - busy0, total - total0) for (busy0, total0), (busy, total) in zip(before, self._cores, strict=True)
        ]
        shares = [_share(busy, total) for busy, total in spent]
        known = [share for share in shares if share is not None]
        whole = _share(sum(busy for busy, _ in spent), sum(total for _, total in spent))
        return whole, known if known and len(known) == len(shares) else None


def _known(ask: Callable[[], Fact]) -> Fact | None:
    try:
        return ask()
    except (psutil.Error, OSError, ValueError, LookupError, AttributeError, NotImplementedError, RuntimeWarning):
        return None


def _spent() -> tuple[float, float]:
    """CPU seconds of this process, and when that was asked."""
    return time.process_time(), time.monotonic()


def _busy_and_total() -> list[tuple[float, float]]:
    """Seconds since boot, by core. Time as a guest is in `user` already."""
    return [_times(times) for times in psutil.cpu_times(percpu=True)]


def _times(times: Any) -> tuple[float, float]:
    total = sum(times) - getattr(times, "guest", 0.0) - getattr(times, "guest_nice", 0.0)
    return total - times.idle - getattr(times, "iowait", 0.0), total


def _share(busy: float, total: float) -> float | None:
    return round(min(100.0, max(0.0, 100 * busy / total)), 1) if total > 0 else None


class _Timex(ctypes.Structure):
    """The head of `struct timex`, adjtimex(2), and room for the rest."""

    _fields_: ClassVar[Sequence[tuple[str, type[Any]]]] = [
        ("modes", ctypes.c_uint),
        ("offset", ctypes.c_long),
        ("freq", ctypes.c_long),
        ("maxerror", ctypes.c_long),
        ("esterror", ctypes.c_long),
        ("status", ctypes.c_int),
        ("rest", ctypes.c_char * 256),
    ]


def _clock_synchronised(timesync: Path) -> bool | None:
    """By the kernel's own word, which any time service sets; asking (`modes` 0) needs no right. Where systemd keeps a
    service from it (ProtectClock=), by systemd-timesyncd's, if that is what sets the clock."""
    timex = _Timex()
    if ctypes.CDLL(None).adjtimex(ctypes.byref(timex)) >= 0:
        return not timex.status & _STA_UNSYNC
    return (timesync / "synchronized").exists() if timesync.exists() else None


def _existing(path: Path) -> Path:
    """The folder, or what of its path is there already."""
    return next((part for part in (path, *path.absolute().parents) if part.exists()), path)


def _mb(size: float) -> float:
    return round(size / 1e6, 1)


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 2)


Sensor = MachineSensor


def _group_memory(groups: Path, own_group: Path) -> tuple[int, int] | None:
    """Bytes that the process's control group may have, and those that it could not give back; None without a limit.
    https://docs.kernel.org/admin-guide/cgroup-v2.html#memory"""
    [path] = [line[3:] for line in own_group.read_text().splitlines() if line.startswith("0::")]
    folder = groups / path.lstrip("/")
    limits = [(folder / name).read_text().strip() for name in ("memory.max", "memory.high")]
    known = [int(limit) for limit in limits if limit != "max"]
    if not known:
        return None
    stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    used = int((folder / "memory.current").read_text()) - int(stat["inactive_file"])
    return min(known), max(0, used)
