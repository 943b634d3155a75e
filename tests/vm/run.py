"""Run `scenario.py` against a real V4L2 driver: in QEMU, with Debian's kernel and a root of our own.

The root is made once in EDGE_AGENT_VM_DIR (default: .venv-vm/ in the repository) and made again when what it
is made of changes; the source tree is copied into it at every run. The exit status is the scenario's.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn, TextIO

REPOSITORY = Path(__file__).resolve().parents[2]
COPIED = ("edge_agent", "tools", "tests/vm")
CACHE = Path(os.environ.get("EDGE_AGENT_VM_DIR") or REPOSITORY / ".venv-vm").resolve()
ROOT = CACHE / "root"
SITE = ROOT / "opt/site-packages"
SOURCE = ROOT / "opt/edge-agent"
RESULTS = ROOT / "results"

SUITE, SUITES_PYTHON = "bookworm", "3.11"
PACKAGES = (
    "python3,mosquitto,v4l-utils,udev,kmod,procps,iproute2,"
    "linux-image-amd64,linux-headers-amd64,v4l2loopback-dkms"  # the last builds its module for that kernel
)
INITRAMFS = {
    "modules": "virtio_pci\n9pnet_virtio\n9p\n",
    "conf.d/vm": "MODULES=list\nBUSYBOX=n\nCOMPRESS=gzip\nFSTYPE=9p\n",
}
PLATFORMS = ("manylinux2014_x86_64", "manylinux_2_28_x86_64")
HOST_PROGRAMS = {"qemu-system-x86_64": "qemu-system-x86", "debootstrap": "debootstrap"}
HOST_MODULES = {"pip": "python3-pip"}
HOST_FILES = {"/usr/share/keyrings/debian-archive-keyring.gpg": "debian-archive-keyring"}
LIMIT_S = 600.0


def main() -> int:
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # so that `finally` is heard
    if os.geteuid() != 0:
        give_up("this must run as root: it makes a Debian root with its owners and devices")
    install_on_host()
    CACHE.mkdir(parents=True, exist_ok=True)
    with alone(CACHE / "lock"):
        make("root", ROOT, f"{SUITE} {PACKAGES} {INITRAMFS}", build_root)
        make("packages", SITE, (REPOSITORY / "pyproject.toml").read_text(), build_site)
        copy_source()
        return boot()


def install_on_host() -> None:
    """Install what is missing here, or exit naming it."""
    missing = [package for program, package in HOST_PROGRAMS.items() if not shutil.which(program)]
    missing += [package for module, package in HOST_MODULES.items() if not importlib.util.find_spec(module)]
    missing += [package for file, package in HOST_FILES.items() if not Path(file).exists()]
    if not missing:
        return
    say(f"installing {' '.join(missing)}")
    apt_get = ("env", "DEBIAN_FRONTEND=noninteractive", "apt-get", "-qq")
    try:
        subprocess.run([*apt_get, "update"], check=True)
        subprocess.run([*apt_get, "install", "-y", "--no-install-recommends", *missing], check=True)
    except (OSError, subprocess.CalledProcessError):
        give_up(f"not installed, and apt-get cannot: {' '.join(missing)}")


@contextmanager
def alone(lock: Path) -> Iterator[None]:
    """Two machines on one root would write over each other."""
    with lock.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            give_up("another run is using this root; set EDGE_AGENT_VM_DIR to have one of your own")
        yield


def make(what: str, folder: Path, recipe: str, build: Callable[[], None]) -> None:
    """Build a folder, unless it was built by this very recipe."""
    stamp = folder / ".recipe"
    digest = hashlib.sha256(recipe.encode()).hexdigest()
    if stamp.exists() and stamp.read_text() == digest:
        return
    say(f"making the {what}: once, this takes a while")
    started = time.monotonic()
    shutil.rmtree(folder, ignore_errors=True)
    build()
    stamp.write_text(digest)
    say(f"made the {what} in {time.monotonic() - started:.0f} s")


def build_root() -> None:
    """A Debian with kernel, modules and an initramfs that mounts its root by 9p."""
    options = ["--variant=minbase", f"--include={PACKAGES}"]
    with (CACHE / "root.log").open("w") as log:
        politely(["debootstrap", *options, SUITE, str(ROOT)], log)
        for name, text in INITRAMFS.items():
            (ROOT / "etc/initramfs-tools" / name).write_text(text)
        politely(["chroot", str(ROOT), "update-initramfs", "-u"], log)


def build_site() -> None:
    """The project's dependencies, for the root's Python and not this one."""
    platforms = [option for platform in PLATFORMS for option in ("--platform", platform)]
    target = ["--target", str(SITE), "--python-version", SUITES_PYTHON, "--only-binary=:all:", *platforms]
    quiet = ["--root-user-action=ignore", "--no-warn-conflicts", "--disable-pip-version-check"]
    with (CACHE / "site-packages.log").open("w") as log:
        politely([sys.executable, "-m", "pip", "install", *quiet, *target, f"{REPOSITORY}[onnx,opencv]"], log)


def politely(command: list[str], log: TextIO) -> None:
    """Run it beside other work, in namespaces of its own: its mounts and processes end with it."""
    own = ["nice", "-n", "10", "unshare", "--mount", "--pid", "--fork", "--kill-child"]
    if subprocess.run([*own, *command], stdout=log, stderr=subprocess.STDOUT).returncode:
        last = Path(log.name).read_text(errors="replace").splitlines()[-5:]
        give_up("\n".join([f"{command[0]} failed; its last words:", *last]))


def copy_source() -> None:
    shutil.rmtree(SOURCE, ignore_errors=True)
    shutil.rmtree(RESULTS, ignore_errors=True)
    RESULTS.mkdir()
    for name in COPIED:
        shutil.copytree(REPOSITORY / name, SOURCE / name, ignore=shutil.ignore_patterns("__pycache__"))


def boot() -> int:
    """Boot, and wait until the machine has powered itself off; whatever happens, none is left running."""
    started = time.monotonic()
    machine = subprocess.Popen(qemu(), stdin=subprocess.DEVNULL)
    try:
        machine.wait(LIMIT_S)
    except subprocess.TimeoutExpired:
        say(f"killed: not done within {LIMIT_S:.0f} s")
    finally:
        machine.kill()
        machine.wait()
    say(f"the machine ran for {time.monotonic() - started:.0f} s")
    return report()


def qemu() -> list[str]:
    """The machine: TCG, so that it runs where there is no KVM; the serial line is our standard output."""
    share = f"local,path={ROOT},mount_tag=root,security_model=none,multidevs=remap"
    mount = "root=root rootfstype=9p rootflags=trans=virtio,version=9p2000.L,msize=512000,cache=loose rw"
    return [
        *("qemu-system-x86_64", "-accel", "tcg,thread=multi", "-smp", "2", "-m", "2G"),
        *("-cpu", "max"),  # numpy's wheels need more than the default's SSE2
        *("-no-reboot", "-nodefaults", "-display", "none", "-vga", "none", "-serial", "stdio", "-virtfs", share),
        *("-kernel", str(only(ROOT / "boot", "vmlinuz-*")), "-initrd", str(only(ROOT / "boot", "initrd.img-*"))),
        *("-append", f"console=ttyS0 quiet loglevel=3 panic=-1 {mount} init=/opt/edge-agent/tests/vm/init"),
    ]


def only(folder: Path, pattern: str) -> Path:
    (found,) = folder.glob(pattern)
    return found


def report() -> int:
    """Print what the scenario measured; its exit status, or 1 where it did not get that far."""
    for results in RESULTS.glob("results.jsonl"):
        print(results.read_text(), end="", flush=True)
    status = RESULTS / "status"
    if not status.exists():
        say("the scenario did not come to its end")
        return 1
    return int(status.read_text())


def say(text: str) -> None:
    print(f"vm: {text}", flush=True)


def give_up(text: str) -> NoReturn:
    sys.exit(f"vm: error: {text}")


if __name__ == "__main__":
    sys.exit(main())
