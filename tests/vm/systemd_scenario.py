"""Runs inside the container, as root: the Debian package from its installation to its purge.

Every step prints `ok` or `FAIL` with what was measured; what systemd says of it is printed between.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

PACKAGE, RESULTS = Path(sys.argv[1]), Path(sys.argv[2])
UNIT = "edge-agent.service"
CONFIG = Path("/etc/edge-agent/config.toml")
DROP_IN = Path("/etc/systemd/system/edge-agent.service.d/scenario.conf")
PASSWORDS = Path("/etc/mosquitto/passwords")

START_S = 60.0
CHANGE_S = 20.0
STOP_S = 5.0
WATCHDOG_S = 8.0  # of the scenario; the unit's own is longer, and so would this be
CALM_S = 2 * WATCHDOG_S

BROKEN_CAMERAS = """
[cameras.gone]
source = "v4l2"
device = "/dev/video9"
[cameras.refusing]
source = "rtsp"
url = "rtsp://127.0.0.1:9/stream"
"""

failed = 0


def main() -> int:
    package = next(PACKAGE.glob("*.deb"))
    run("systemctl", "start", "mosquitto")
    installed(package)
    told_in_status()
    confined()
    fed = feeds_the_watchdog()
    DROP_IN.parent.mkdir(exist_ok=True)
    DROP_IN.write_text(f"[Service]\nWatchdogSec={WATCHDOG_S if fed else 0}\n")
    anew()
    reloaded()
    faults_do_not_restart()
    comes_back_from(signal.SIGKILL, "killed")
    stopped_process_is_restarted(fed)
    wrong_configuration_is_not_restarted()
    credentials_are_taken()
    instances_run_beside()
    installed_again(package)
    installed_while_no_model_loads(package)
    stops_in_order()
    removed_and_purged()
    say(f"{failed} failed")
    return 1 if failed else 0


def installed(package: Path) -> None:
    """Without network, on a machine that never saw it."""
    started = time.monotonic()
    done = run("dpkg", "--install", str(package))
    took_s = time.monotonic() - started
    print_below(*(line for line in done.stdout.splitlines() if "Reading database" not in line))
    running = done.returncode == 0 and until(lambda: state() == ("active", "enabled"), within_s=START_S)
    ready_s = time.monotonic() - started
    ok("dpkg -i: installed, enabled and started", running, f"{took_s:.0f} s, ready after {ready_s:.0f} s")
    groups = run("id", "--name", "--groups", "edge-agent").stdout.split()
    ok("the user is in video and render", {"video", "render"} <= set(groups), " ".join(groups))
    mode = oct(CONFIG.stat().st_mode & 0o777), CONFIG.group()
    ok("only root and the agent read the configuration", mode == ("0o640", "edge-agent"), " ".join(mode))
    ok("READY=1 was seen", show("Result", "Type") == ["success", "notify"], show("StatusText")[0])
    result = heard("+/+/cameras/demo/results", lambda one: bool(one["detections"]))
    found = ", ".join(one["label"] for one in result["detections"]) if result else "nothing"
    ok("onnxruntime and OpenCV work in there: results of the drawn camera", result is not None, found)


def told_in_status() -> None:
    text = run("systemctl", "status", "--no-pager", "--lines=3", UNIT).stdout
    print_below(*(line[:150] for line in text.splitlines()))
    status = show("StatusText")[0]
    ok("systemctl status says in a line how it is", bool(status), status)


def confined() -> None:
    pid = main_pid()
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    facts = {key: value.strip() for key, _, value in (line.partition(":") for line in lines)}
    seen = {key: facts[key] for key in ("CapEff", "NoNewPrivs", "Seccomp")}
    as_wanted = seen == {"CapEff": "0" * 16, "NoNewPrivs": "1", "Seccomp": "2"}
    ok("no capabilities, no new privileges, system calls filtered", as_wanted, str(seen))
    inside = ["nsenter", f"--target={pid}", "--mount", "setpriv", "--reuid=edge-agent", "--regid=edge-agent"]
    own = [f"/{where}/edge-agent/x" for where in ("var/lib", "var/cache", "run")]
    others = ["/usr/lib/edge-agent/x", "/etc/edge-agent/x", "/var/lib/x", "/root/x"]
    writable = [place for place in [*own, *others] if run(*inside, "--init-groups", "touch", place).returncode == 0]
    ok("it writes to its own folders and no others", writable == own, " ".join(writable))
    exposure = run("systemd-analyze", "security", "--no-pager", UNIT).stdout.strip().splitlines()[-1]
    number = re.search(r"([\d.]+) [A-Z]", exposure)
    ok("exposure at most 2.0", number is not None and float(number[1]) <= 2.0, exposure.strip("→ "))


def feeds_the_watchdog() -> bool:
    """Whether it was told more than once within the unit's own time, by one and the same process."""
    pid, first = main_pid(), int(show("WatchdogTimestampMonotonic")[0])
    until(
        lambda: int(show("WatchdogTimestampMonotonic")[0]) > first, within_s=float(show("WatchdogUSec")[0].rstrip("s"))
    )
    last = int(show("WatchdogTimestampMonotonic")[0])
    fed = last > first and main_pid() == pid
    ok("WATCHDOG=1 comes", fed, f"after {(last - first) / 1e6:.1f} s" if fed else "never; the steps below run without")
    return fed


def reloaded() -> None:
    pid = main_pid()
    with configured(lambda text: text.replace("interval_s = 5.0 ", "interval_s = 1.0 ")):
        since = now()
        done = run("systemctl", "reload", UNIT)
        line = journal(since, "agent.reloaded")
        same = done.returncode == 0 and main_pid() == pid
        ok("systemctl reload: the file is read again", same and line is not None, str(line))
        active = until(is_active, within_s=CHANGE_S)
        ok("and it is active again", active, show("StatusText")[0])
    with configured(lambda text: text + "\n[nonsense]\n"):
        since = now()
        run("systemctl", "reload", UNIT)
        line = journal(since, "agent.not_reloaded")
        ok("a file with a mistake leaves the old one running", line is not None and main_pid() == pid, str(line))
    run("systemctl", "reload", UNIT)


def faults_do_not_restart() -> None:
    pid, since = main_pid(), now()
    with configured(lambda text: text + BROKEN_CAMERAS):
        run("systemctl", "reload", UNIT)
        ok("two cameras that are not there are added", journal(since, '["gone", "refusing"]') is not None, "")
        run("systemctl", "stop", "mosquitto")
        time.sleep(CALM_S)  # what is shown is that nothing happens for so long
        what = f"{CALM_S:.0f} s without broker and with two broken cameras do not restart it"
        ok(what, main_pid() == pid and is_active(), show("StatusText")[0])
        run("systemctl", "start", "mosquitto")
        ok("and the broker has it back", heard("+/+/available", lambda one: one == "online") is not None, "online")
    run("systemctl", "reload", UNIT)


def comes_back_from(number: int, how: str) -> None:
    pid, before = main_pid(), restarts()
    started = time.monotonic()
    os.kill(pid, number)
    came = until(lambda: restarts() > before and is_active() and main_pid() != pid, within_s=START_S)
    ok(f"{how}: started again", came, f"ready after {time.monotonic() - started:.1f} s")


def stopped_process_is_restarted(fed: bool) -> None:
    if not fed:
        ok("kill -STOP: the watchdog restarts it", False, "the agent feeds no watchdog: nothing to show")
        return
    since = now()
    comes_back_from(signal.SIGSTOP, "kill -STOP")
    for what in ("Watchdog timeout", "Fatal Python error: Aborted"):
        line = journal(since, what)
        ok(f"the journal has: {what}", line is not None, str(line))


def wrong_configuration_is_not_restarted() -> None:
    with configured(lambda text: text + "\n[nonsense]\n"):
        run("systemctl", "restart", UNIT)
        until(lambda: show("ActiveState")[0] == "failed", within_s=START_S)
        time.sleep(2 * float(show("RestartUSec")[0].rstrip("s")))  # again, that nothing happens
        active, code, restarted = show("ActiveState", "ExecMainStatus", "NRestarts")
        facts = f"status {code}, restarts {restarted}"
        ok("exit status 78 is not restarted", (active, code, restarted) == ("failed", "78", "0"), facts)
    run("systemctl", "start", UNIT)
    ok("and with a right one it starts", is_active(), show("StatusText")[0])


def credentials_are_taken() -> None:
    run("mosquitto_passwd", "-b", "-c", str(PASSWORDS), "agent", "secret")
    run("chown", "mosquitto", str(PASSWORDS))
    listener = Path("/etc/mosquitto/conf.d/scenario.conf")
    listener.write_text(f"listener 1884 127.0.0.1\npassword_file {PASSWORDS}\n")
    run("systemctl", "restart", "mosquitto")
    drop_in = DROP_IN.read_text()
    for name, value in (("username", "agent"), ("password", "secret")):
        file = Path(f"/etc/edge-agent/mqtt-{name}")
        file.write_text(value)
        file.chmod(0o600)
        DROP_IN.write_text(f"{DROP_IN.read_text()}LoadCredential=mqtt-{name}:{file}\n")
    with configured(lambda text: text.replace("port = 1883 ", "port = 1884 ")):
        anew()
        online = heard("+/+/available", lambda one: one == "online", "-p", "1884", "-u", "agent", "-P", "secret")
        ok("LoadCredential: its login is in files that only root reads", online is not None, "online")
    DROP_IN.write_text(drop_in)
    listener.unlink()
    run("systemctl", "restart", "mosquitto")
    anew()


def instances_run_beside() -> None:
    names = ("left", "right")
    for name in names:
        text = CONFIG.read_text().replace("[agent]\n", f'[agent]\ndevice = "{name}"\n')
        Path(f"/etc/edge-agent/{name}.toml").write_text(text)
    units = [f"edge-agent@{name}.service" for name in names]
    done = run("systemctl", "enable", "--now", *units)
    alive = [heard(f"+/{name}/available", lambda one: one == "online") for name in names]
    folders = sorted(path.name for path in Path("/var/lib/edge-agents").iterdir())
    beside = done.returncode == 0 and all(alive) and is_active()
    ok("two instances beside it", beside, f"state of {' and '.join(folders)}")
    run("systemctl", "stop", units[1])
    ok("one stops, the other stays", run("systemctl", "is-active", units[0]).stdout.strip() == "active", units[0])


def installed_again(package: Path) -> None:
    CONFIG.write_text(CONFIG.read_text() + "# mine\n")
    pid = main_pid()
    done = run("dpkg", "--install", "--force-confold", str(package))
    came = until(lambda: is_active() and main_pid() != pid, within_s=START_S)
    ok("installed over itself: started again", done.returncode == 0 and came, f"process {pid}, then {main_pid()}")
    kept = CONFIG.read_text().splitlines()[-1]
    ok("and the configuration is as it was edited", kept == "# mine", kept)


def installed_while_no_model_loads(package: Path) -> None:
    """The service is not ready then, which dpkg does not wait for."""
    broken = '\n[models.broken]\npath = "config.toml"\n'
    with configured(lambda text: text.replace('active = "demo-320" ', 'active = "broken" ') + broken):
        started = time.monotonic()
        done = run("timeout", str(START_S), "dpkg", "--install", "--force-confold", str(package))
        took_s = time.monotonic() - started
        seen = until(lambda: "no model (broken" in show("StatusText")[0], within_s=START_S)
        as_wanted = done.returncode == 0 and seen and show("ActiveState")[0] == "activating"
        ok("installed while no model loads: dpkg does not wait for one", as_wanted, f"{took_s:.0f} s")
    anew()
    ok("and with one it is ready", is_active(), show("StatusText")[0])


def stops_in_order() -> None:
    run("systemctl", "stop", "edge-agent@left.service")
    own = ("edge/+/available", "-W", "2", "-v", "--retained-only")
    heard("+/+/available", lambda one: one == "online")
    started = time.monotonic()
    run("systemctl", "stop", UNIT)
    took_s = time.monotonic() - started
    in_time = took_s < STOP_S and show("Result")[0] == "success"
    ok(f"systemctl stop in less than {STOP_S:.0f} s", in_time, f"{took_s:.1f} s")
    last = [line.split() for line in run("mosquitto_sub", "-h", "127.0.0.1", "-t", *own).stdout.splitlines()]
    all_offline = len(last) == 3 and {state for _, state in last} == {"offline"}
    ok(
        "`offline` is retained on the broker, of the instances too",
        all_offline,
        ", ".join(" ".join(one) for one in last),
    )


def removed_and_purged() -> None:
    run("systemctl", "start", UNIT)
    done = run("dpkg", "--remove", "edge-agent")
    looked_at = ("/usr/lib/edge-agent", "/usr/bin/edge-agent", "/etc/edge-agent", "/var/lib/edge-agent")
    left = [name for name in looked_at if Path(name).exists()]
    running = run("pgrep", "--full", "bin/edge-agent run").stdout.split()
    gone = done.returncode == 0 and left == ["/etc/edge-agent", "/var/lib/edge-agent"] and not running
    ok("dpkg -r: stopped and gone, configuration and state are kept", gone, " ".join(left))
    run("rm", "-r", str(DROP_IN.parent))  # the scenario's own
    done = run("dpkg", "--purge", "edge-agent")
    print_below(*(line for line in done.stdout.splitlines() if line.startswith("edge-agent:")))
    found = run("find", "/", "-xdev", "-name", "*edge-agent*").stdout.split()
    users = run("getent", "passwd", "edge-agent").stdout + run("getent", "group", "edge-agent").stdout
    ok(
        "dpkg -P: no file of it is left, nor its user",
        done.returncode == 0 and not found and not users,
        " ".join(found),
    )


# What is asked of systemd, the journal and the broker


@contextmanager
def configured(edit: Callable[[str], str]) -> Iterator[None]:
    """While inside, the configuration is another one."""
    text = CONFIG.read_text()
    CONFIG.write_text(edit(text))
    try:
        yield
    finally:
        CONFIG.write_text(text)


def anew() -> None:
    run("systemctl", "daemon-reload")
    run("systemctl", "restart", UNIT)


def state() -> tuple[str, str]:
    return show("ActiveState")[0], run("systemctl", "is-enabled", UNIT).stdout.strip()


def is_active() -> bool:
    return show("ActiveState")[0] == "active"


def main_pid() -> int:
    return int(show("MainPID")[0])


def restarts() -> int:
    return int(show("NRestarts")[0])


def show(*properties: str) -> list[str]:
    """The unit's properties, in the order in which they are named."""
    done = run("systemctl", "show", UNIT, *(f"--property={name}" for name in properties))
    values = dict(line.split("=", 1) for line in done.stdout.splitlines())
    return [values[name] for name in properties]


def now() -> float:
    return time.time()


def journal(since: float, text: str) -> str | None:
    """The first line of the unit's journal from then on that has this in it, once it is there."""
    found: list[str] = []

    def looked() -> bool:
        lines = run("journalctl", f"--unit={UNIT}", f"--since=@{since:.6f}", "--output=cat", "--no-pager").stdout
        found[:] = [line for line in lines.splitlines() if text in line]
        return bool(found)

    return found[0][:200] if until(looked, within_s=CHANGE_S) else None


def heard(topic: str, wanted: Callable[[Any], bool], *login: str) -> Any:
    """The first message on this topic that is wanted, from JSON if it is such; None where none comes in time."""
    with listening(topic, *login) as lines:
        for line in lines:
            try:
                message = json.loads(line)
            except ValueError:
                message = line.strip()
            if wanted(message):
                return message
    return None


@contextmanager
def listening(topic: str, *login: str) -> Iterator[Iterator[str]]:
    again = ["timeout", str(START_S), "sh", "-c", 'until "$@"; do sleep 0.2; done', "sh"]  # the broker may come later
    command = [*again, "mosquitto_sub", "-h", "127.0.0.1", "-t", topic, *login]
    quiet = subprocess.DEVNULL
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=quiet, text=True, start_new_session=True)
    try:
        assert process.stdout is not None
        yield iter(process.stdout)
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait()


def until(condition: Callable[[], bool], *, within_s: float) -> bool:
    end = time.monotonic() + within_s
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.1)
    return condition()


def run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False)


def ok(what: str, is_so: bool, fact: str) -> None:
    global failed
    failed += not is_so
    say(f"{'ok  ' if is_so else 'FAIL'} {what}{f' ({fact})' if fact else ''}")


def print_below(*lines: str) -> None:
    say("\n".join(f"    {line}" for line in lines))


def say(text: str) -> None:
    print(text, flush=True)


if __name__ == "__main__":
    status = 1
    try:
        status = main()
    finally:
        journal_text = run("journalctl", "--no-pager", "--output=short-precise").stdout
        (RESULTS / "journal.txt").write_text(journal_text)
    sys.exit(status)
