"""Run `systemd_scenario.py` under a real systemd: the Debian package, in a container that systemd-nspawn boots.

The root is made once in EDGE_AGENT_VM_DIR (default: .venv-vm/ in the repository), the package at every run; what the
container writes is on a tmpfs over the root and goes with it. The exit status is the scenario's.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from run import CACHE, REPOSITORY, alone, give_up, make, politely, say

SUITE = "bookworm"
PACKAGES = "systemd,systemd-sysv,dbus,udev,procps,python3,mosquitto,mosquitto-clients"
ROOT = CACHE / "systemd-root"
PACKAGE = CACHE / "package"
RESULTS = CACHE / "systemd-results"
SCENARIO = """[Unit]
After=multi-user.target
[Service]
Type=oneshot
ExecStart=/usr/bin/python3 -u /vm/systemd_scenario.py /package /results
ExecStopPost=/bin/sh -c 'echo $EXIT_STATUS >/results/status; systemctl --no-block poweroff'
StandardOutput=file:/results/output.txt
StandardError=file:/results/errors.txt
[Install]
WantedBy=default.target
"""
HOST_PROGRAMS = {
    "debootstrap": "debootstrap",
    "systemd-nspawn": "systemd-container",
    "dpkg-deb": "dpkg",
    "/usr/share/keyrings/debian-archive-keyring.gpg": "debian-archive-keyring",
}
LIMIT_S = 600.0


def main() -> int:
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # so that `finally` is heard
    if os.geteuid() != 0:
        give_up("this must run as root: it makes a Debian root and boots it")
    install_on_host()
    CACHE.mkdir(parents=True, exist_ok=True)
    with alone(CACHE / "systemd-lock"):
        make("root", ROOT, f"{SUITE} {PACKAGES} {SCENARIO}", build_root)
        build_package()
        return boot()


def install_on_host() -> None:
    """Install what is missing here, or exit naming it."""
    missing = [package for name, package in HOST_PROGRAMS.items() if not shutil.which(name) and not Path(name).exists()]
    if not missing:
        return
    say(f"installing {' '.join(missing)}")
    apt_get = ("env", "DEBIAN_FRONTEND=noninteractive", "apt-get", "-qq")
    try:
        subprocess.run([*apt_get, "update"], check=True)
        subprocess.run([*apt_get, "install", "-y", "--no-install-recommends", *missing], check=True)
    except (OSError, subprocess.CalledProcessError):
        give_up(f"not installed, and apt-get cannot: {' '.join(missing)}")


def build_root() -> None:
    """A small Debian with systemd and a broker, which runs the scenario when it has booted."""
    with (CACHE / "systemd-root.log").open("w") as log:
        politely(["debootstrap", "--variant=minbase", f"--include={PACKAGES}", SUITE, str(ROOT)], log)
        (ROOT / "etc/systemd/system/scenario.service").write_text(SCENARIO)
        politely(["chroot", str(ROOT), "systemctl", "enable", "scenario.service"], log)


def build_package() -> None:
    """The package with this tree in it, for the root's Python, which must be this machine's too."""
    shutil.rmtree(PACKAGE, ignore_errors=True)
    started = time.monotonic()
    environ = {**os.environ, "OUT": str(PACKAGE), "COMPRESS": "gzip"}
    with (CACHE / "package.log").open("w") as log:
        command = ["nice", "-n", "10", str(REPOSITORY / "tools/build_deb.sh")]
        if subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, env=environ).returncode:
            give_up(f"no package was made; {log.name} says why")
    say(f"made the package in {time.monotonic() - started:.0f} s")


def boot() -> int:
    """Boot, and wait until the container has switched itself off; whatever happens, none is left running."""
    shutil.rmtree(RESULTS, ignore_errors=True)
    RESULTS.mkdir()
    started = time.monotonic()
    with cgroup() as join, (CACHE / "systemd-console.log").open("w") as console:
        container = subprocess.Popen(
            [*join, *nspawn()],
            stdin=subprocess.DEVNULL,
            stdout=console,
            stderr=subprocess.STDOUT,
            env={**os.environ, "SYSTEMD_NSPAWN_UNIFIED_HIERARCHY": "1"},
        )
        try:
            container.wait(LIMIT_S)
        except subprocess.TimeoutExpired:
            say(f"killed: not done within {LIMIT_S:.0f} s")
        finally:
            container.terminate()  # it ends what runs in it
            try:
                container.wait(10)
            except subprocess.TimeoutExpired:
                container.kill()
                container.wait()
    say(f"the container ran for {time.monotonic() - started:.0f} s")
    return report()


def nspawn() -> list[str]:
    """The container: no network but loopback, and a root that forgets."""
    return [
        *("systemd-nspawn", "--quiet", "--register=no", "--keep-unit", "--private-network", "--console=pipe"),
        *("--directory", str(ROOT), "--volatile=overlay", "--hostname=vm", "--boot"),
        *(f"--bind-ro={REPOSITORY / 'tests/vm'}:/vm", f"--bind-ro={PACKAGE}:/package", f"--bind={RESULTS}:/results"),
    ]


@contextmanager
def cgroup() -> Iterator[list[str]]:
    """A control group of its own, which the container's systemd rules; the command that starts another one in there."""
    mounts = [line.split() for line in Path("/proc/mounts").read_text().splitlines()]
    hierarchy = next((Path(where) for _, where, kind, *_ in mounts if kind == "cgroup2"), None)
    if hierarchy is None:
        give_up("no cgroup2 is mounted here, and systemd needs one")
    group = hierarchy / f"edge-agent-vm-{os.getpid()}"
    group.mkdir()
    try:
        yield ["sh", "-c", f'echo $$ >"{group}/cgroup.procs" && exec "$@"', "sh"]
    finally:
        for folder in sorted(group.rglob("*/"), reverse=True):
            folder.rmdir()
        group.rmdir()


def report() -> int:
    """Print what the scenario found; its exit status, or 1 where it did not get that far."""
    for name in ("output.txt", "errors.txt"):
        if (RESULTS / name).exists():
            print((RESULTS / name).read_text(), end="", flush=True)
    status = RESULTS / "status"
    if not status.exists():
        say(f"the scenario did not come to its end; {CACHE / 'systemd-console.log'} may say why")
        return 1
    return int(status.read_text())


if __name__ == "__main__":
    sys.exit(main())
