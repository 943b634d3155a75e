"""Runs inside the virtual machine, as root: the service and a camera of the kernel's, with real devices and limits."""

from __future__ import annotations

import sys
from pathlib import Path

import systemd_scenario as scenario
from systemd_scenario import CONFIG, UNIT, heard, main_pid, ok, run, show, until

GROUP = Path("/sys/fs/cgroup/system.slice") / UNIT
CAMERA = "/dev/video0"
DRIVER = Path("/sys/bus/platform/drivers/vivid")
OTHERS = ("/dev/kmsg", "/dev/rtc0", "/dev/hpet", "/dev/port", "/dev/tty0", "/dev/net/tun")
RESULTS = "edge/+/cameras/front/results"

SETTINGS = """
[model]
active = "demo-160"
[inference]
backend = "fake"
[cameras.front]
source = "v4l2"
"""

OPEN = """
import os, sys
open(sys.argv[1] + "/cgroup.procs", "w").write("0")
os.close(os.open(sys.argv[2], os.O_RDWR | os.O_NONBLOCK))
"""


def main() -> int:
    CONFIG.write_text(SETTINGS)
    done = run("systemctl", "start", UNIT)
    ok("it starts without a camera", done.returncode == 0, show("StatusText")[0])
    known = "81 video4linux" in Path("/proc/devices").read_text() and not Path(CAMERA).exists()
    ok("the driver is loaded before there is one, so that it is let through", known, "81 video4linux")
    limited()
    pid = main_pid()
    run("modprobe", "vivid", "n_devs=1", "node_types=0x1")
    ok("one that is plugged in is opened", heard(RESULTS, lambda one: True) is not None, status_with("1 of 1 cameras"))
    may_open()
    (DRIVER / "unbind").write_text("vivid.0")
    gone = status_with("0 of 1 cameras")
    ok("unplugged: it is told", "failed: camera.front" in gone, gone)
    (DRIVER / "bind").write_text("vivid.0")
    back = status_with("all is well")
    ok("plugged in again: it is back, and nothing was restarted", "1 of 1 cameras" in back and main_pid() == pid, back)
    scenario.say(f"{scenario.failed} failed")
    return 1 if scenario.failed else 0


def status_with(text: str) -> str:
    """What systemd shows of it, once it has this in it."""
    until(lambda: text in show("StatusText")[0], within_s=scenario.START_S)
    return show("StatusText")[0]


def limited() -> None:
    total = int(Path("/proc/meminfo").read_text().split()[1]) * 1024
    high, most, tasks = (int((GROUP / name).read_text()) for name in ("memory.high", "memory.max", "pids.max"))
    shares = f"{high / total:.2f} and {most / total:.2f} of {total >> 20} MiB, {tasks} tasks"
    as_set = abs(high / total - 0.75) < 0.01 and abs(most / total - 0.85) < 0.01 and tasks == 512
    ok("memory and tasks are limited", as_set, shares)


def may_open() -> None:
    """Root in the service's control group: what it may not open there, nobody may."""
    there = [node for node in (CAMERA, "/dev/null", *OTHERS) if Path(node).exists()]
    opened = [node for node in there if run("python3", "-c", OPEN, str(GROUP), node).returncode == 0]
    denied = [node for node in there if node not in opened]
    ok(
        "it opens cameras, and no other devices",
        opened == [CAMERA, "/dev/null"] and len(denied) > 2,
        f"not {' '.join(denied)}",
    )


if __name__ == "__main__":
    sys.exit(main())
