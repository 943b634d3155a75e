"""The machine itself: Python, board, rights, clock, disk."""

from __future__ import annotations

import grp
import os
import platform
import pwd
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import edge_agent
from edge_agent.config import HealthOptions, models_directory, state_directory
from edge_agent.readings import BoardReadings
from edge_agent.sensors.host import MachineSensor
from edge_agent.sensors.jetson import JetsonSensor, is_jetson
from edgectl.doctor._subject import Subject
from edgectl.doctor._words import Finding

_NEWEST = (3, 13)
_FAILED_SHARE = 0.2  # of min_disk_mb, as health has it


def python(subject: Subject) -> Iterator[Finding]:
    """The interpreter and the agent's own version."""
    version = platform.python_version()
    fact = f"{version} at {sys.executable}, edge-agent {edge_agent.__version__}"
    if sys.version_info[:2] > _NEWEST:
        newest = ".".join(map(str, _NEWEST))
        yield Finding("warn", "python", fact, f"newer than what the agent is tested with; take Python 3.10 to {newest}")
    else:
        yield Finding("ok", "python", fact)


def board(subject: Subject) -> Iterator[Finding]:
    """Which machine this is."""
    if not is_jetson():
        yield Finding("ok", "platform", f"{_system()}, {platform.machine()}, no Jetson")
        return
    seen = JetsonSensor().read().board or BoardReadings()
    l4t = f"L4T {seen.l4t}" if seen.l4t else "L4T unknown: /etc/nv_tegra_release does not tell"
    jetpack = f"JetPack {seen.jetpack} ({l4t})" if seen.jetpack else f"JetPack unknown ({l4t})"
    mode = f", power mode {seen.power_mode}" if seen.power_mode else ""
    fact = f"{seen.model or 'a Jetson that does not tell its name'}; {jetpack}{mode}"
    yield Finding("ok", "platform", fact)
    if seen.throttling:
        slowed = ", ".join(seen.throttling)
        yield Finding("warn", "platform", f"heat holds the clocks back: {slowed}", "look at the fan and the heat sink")


def groups(subject: Subject) -> Iterator[Finding]:
    """Whether this user belongs to the groups that own cameras and GPUs."""
    if os.geteuid() == 0:
        yield Finding("ok", "groups", "root may open every camera and GPU")
        return
    known = {entry.gr_name: entry for entry in grp.getgrall()}
    wanted = [name for name in ("video", "render") if name in known]
    mine, user = set(os.getgroups()), _user()
    missing = [name for name in wanted if known[name].gr_gid not in mine]
    if not missing:
        yield Finding(
            "ok", "groups", f"{user} is in {' and '.join(wanted) or 'no group of cameras: there is none here'}"
        )
        return
    is_told = all(user in known[name].gr_mem for name in missing)
    again = "log in again: the groups were given after this login"
    fix = again if is_told else f"sudo usermod -aG {','.join(missing)} {user}; log in again"
    yield Finding("warn", "groups", f"{user} is not in {' and '.join(missing)}, which own cameras and GPUs", fix)


def clock(subject: Subject) -> Iterator[Finding]:
    """Whether time stamps and certificates can be relied on."""
    installed = Path(edge_agent.__file__).stat().st_mtime
    if time.time() < installed:
        fact = f"it is {time.strftime('%Y-%m-%d', time.gmtime())} by this clock, before the agent was installed"
        yield Finding("fail", "clock", fact, "sudo timedatectl set-ntp true; certificates seem invalid until then")
        return
    host = MachineSensor().read().host
    synchronised = host.clock_synchronised if host else None
    if synchronised:
        yield Finding("ok", "clock", "synchronised")
        return
    fact = "not synchronised" if synchronised is False else "nobody tells whether it is synchronised"
    yield Finding("warn", "clock", fact, "sudo timedatectl set-ntp true; time stamps in results may be wrong")


def disk(subject: Subject) -> Iterator[Finding]:
    """Whether what the agent keeps has a place: state, models, snapshots."""
    folders = {"state": state_directory()}
    if subject.config is not None:
        folders["models"] = models_directory(subject.config)
        folders["snapshots"] = Path(subject.config.snapshots.directory)
    options = subject.config.health if subject.config else HealthOptions()
    for what, folder in folders.items():
        yield _folder(what, folder, options.min_disk_mb)


def _folder(what: str, folder: Path, min_mb: float) -> Finding:
    there = next(part for part in (folder, *folder.absolute().parents) if part.exists())
    if (reason := _not_writable(there)) is not None:
        who = _user()
        fix = f"make it {who}'s, or run this as the agent's user: sudo -u edge-agent edgectl doctor"
        return Finding("fail", what, f"{folder}: {who} may not write there ({reason})", fix)
    free_mb = shutil.disk_usage(there).free / 1e6
    fact = f"{folder}: {'writable' if there == folder else 'can be made'}, {free_mb / 1000:.1f} GB free"
    if free_mb >= min_mb:
        return Finding("ok", what, fact)
    fix = f"make room: less than health.min_disk_mb = {min_mb:g} is free"
    return Finding("fail" if free_mb < _FAILED_SHARE * min_mb else "warn", what, fact, fix)


def _not_writable(folder: Path) -> str | None:
    """Why nothing can be written there; found by writing."""
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"edgectl doctor")
            file.flush()
    except OSError as error:
        return error.strerror or str(error)
    return None


def _user() -> str:
    try:
        return pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:
        return f"user {os.geteuid()}"


def _system() -> str:
    try:
        return platform.freedesktop_os_release()["PRETTY_NAME"]
    except (OSError, KeyError):
        return platform.system()
