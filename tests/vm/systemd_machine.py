"""Run `systemd_camera.py` in a virtual machine that systemd runs: what the container of `systemd.py` cannot show, which
is devices and limits. The package is the one that `systemd.py` has made."""

from __future__ import annotations

import shutil
import subprocess
import sys
import time

from run import CACHE, INITRAMFS, REPOSITORY, alone, give_up, install_on_host, make, only, politely, say

from systemd import PACKAGE, PACKAGES, SCENARIO, SUITE

ROOT = CACHE / "machine-root"
RESULTS = ROOT / "results"
UNIT = SCENARIO.replace("systemd_scenario", "systemd_camera").replace("[Service]\n", "[Service]\nTimeoutStartSec=400\n")
KERNEL = "kmod,linux-image-amd64"
LIMIT_S = 500.0


def main() -> int:
    install_on_host()
    packages = list(PACKAGE.glob("*.deb"))
    if not packages:
        give_up("there is no package yet; tests/vm/systemd.py makes it")
    with alone(CACHE / "machine-lock"):
        make("machine", ROOT, f"{SUITE} {PACKAGES} {KERNEL} {INITRAMFS} {UNIT}", build_root)
        shutil.rmtree(RESULTS, ignore_errors=True)
        RESULTS.mkdir()
        shutil.copytree(REPOSITORY / "tests/vm", ROOT / "vm", dirs_exist_ok=True)
        shutil.copy(packages[0], ROOT / "edge-agent.deb")
        with (CACHE / "machine.log").open("w") as log:
            politely(["chroot", str(ROOT), "dpkg", "--purge", "edge-agent"], log)
            politely(["chroot", str(ROOT), "dpkg", "--install", "/edge-agent.deb"], log)
            politely(["chroot", str(ROOT), "systemctl", "disable", "edge-agent"], log)  # the scenario starts it
        return boot()


def build_root() -> None:
    """A Debian with kernel, systemd and a broker; its root comes by 9p."""
    options = ["--variant=minbase", f"--include={PACKAGES},{KERNEL}"]
    with (CACHE / "machine-root.log").open("w") as log:
        politely(["debootstrap", *options, SUITE, str(ROOT)], log)
        for name, text in INITRAMFS.items():
            (ROOT / "etc/initramfs-tools" / name).write_text(text)
        politely(["chroot", str(ROOT), "update-initramfs", "-u"], log)
        (ROOT / "etc/systemd/system/scenario.service").write_text(UNIT)
        politely(["chroot", str(ROOT), "systemctl", "enable", "scenario.service"], log)


def boot() -> int:
    """Boot, and wait until the machine has powered itself off; whatever happens, none is left running."""
    started = time.monotonic()
    with (CACHE / "machine-console.log").open("w") as console:
        machine = subprocess.Popen(qemu(), stdin=subprocess.DEVNULL, stdout=console, stderr=subprocess.STDOUT)
        try:
            machine.wait(LIMIT_S)
        except subprocess.TimeoutExpired:
            say(f"killed: not done within {LIMIT_S:.0f} s")
        finally:
            machine.kill()
            machine.wait()
    say(f"the machine ran for {time.monotonic() - started:.0f} s")
    for name in ("output.txt", "errors.txt"):
        if (RESULTS / name).exists():
            print((RESULTS / name).read_text(), end="", flush=True)
    if not (RESULTS / "status").exists():
        say(f"the scenario did not come to its end; {CACHE / 'machine-console.log'} may say why")
        return 1
    return int((RESULTS / "status").read_text())


def qemu() -> list[str]:
    """As in run.py, but systemd is what the kernel starts."""
    share = f"local,path={ROOT},mount_tag=root,security_model=none,multidevs=remap"
    mount = "root=root rootfstype=9p rootflags=trans=virtio,version=9p2000.L,msize=512000,cache=loose rw"
    return [
        *("qemu-system-x86_64", "-accel", "tcg,thread=multi", "-cpu", "max", "-smp", "2", "-m", "2G"),
        *("-no-reboot", "-nodefaults", "-display", "none", "-vga", "none", "-serial", "stdio", "-virtfs", share),
        *("-kernel", str(only(ROOT / "boot", "vmlinuz-*")), "-initrd", str(only(ROOT / "boot", "initrd.img-*"))),
        *("-append", f"console=ttyS0 quiet loglevel=3 panic=-1 {mount}"),
    ]


if __name__ == "__main__":
    sys.exit(main())
