"""The sensors of this very machine, and several of them as one."""

from __future__ import annotations

import gc
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections import namedtuple
from collections.abc import Iterator
from pathlib import Path

import msgspec
import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st
from structlog.testing import capture_logs

from edge_agent import plugins
from edge_agent.errors import GpuUnavailable
from edge_agent.readings import BoardReadings, GpuReadings, HostReadings, ProcessReadings, Readings
from edge_agent.sensors import Sensor, Sensors, detect
from edge_agent.sensors._files import names, number, scaled, text
from edge_agent.sensors.host import MachineSensor
from edge_agent.sensors.jetson import JetsonSensor
from edge_agent.sensors.null import NullSensor
from tests.jetson_trees import BOARDS, OFF, planted
from tests.rigs import ROOT, need_program

snetio = namedtuple(
    "snetio", "bytes_sent bytes_recv packets_sent packets_recv errin errout dropin dropout"
)  # as psutil's own, which lies elsewhere in every version
BOARD = Readings(board=BoardReadings(model="board"))
GPU = Readings(gpus=[GpuReadings(index=0)])

# prctl(2), seccomp(2): load the call's number; if it is one of the two, EPERM; else go on.
FILTERED = """
import ctypes, struct
from pathlib import Path
from edge_agent.sensors.host import MachineSensor
sensor = MachineSensor(timesync=Path({timesync!r}))
first, second = {calls}
steps = [(0x20, 0, 0, 0), (0x15, 1, 0, first), (0x15, 0, 1, second), (6, 0, 0, 0x50001), (6, 0, 0, 0x7FFF0000)]
code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *step) for step in steps))
program = ctypes.create_string_buffer(struct.pack("HxxxxxxQ", len(steps), ctypes.addressof(code)))
libc = ctypes.CDLL(None, use_errno=True)
assert libc.prctl(38, 1, 0, 0, 0) == 0, "PR_SET_NO_NEW_PRIVS"
assert libc.prctl(22, 2, program, 0, 0) == 0, f"PR_SET_SECCOMP: {{ctypes.get_errno()}}"
print(sensor.read().host.clock_synchronised)
"""


class Scripted:
    """A sensor that does what its script says: readings, or an error to raise."""

    def __init__(self, *script: Readings | Exception) -> None:
        self._script = iter(script)
        self.asked = 0
        self.closed = 0

    def read(self) -> Readings:
        self.asked += 1
        step = next(self._script)
        if isinstance(step, Exception):
            raise step
        return step

    def close(self) -> None:
        self.closed += 1


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[MachineSensor]:
    sensor = MachineSensor(tmp_path)
    yield sensor
    sensor.close()


def host(sensor: MachineSensor) -> HostReadings:
    readings = sensor.read()
    assert readings.host is not None
    return readings.host


def process(sensor: MachineSensor) -> ProcessReadings:
    readings = sensor.read()
    assert readings.process is not None
    return readings.process


MAY_BE_ABSENT = ("clock_synchronised", "memory_limit_mb", "memory_limit_used_mb")  # forbidden to ask, or no limit


def work(seconds: float) -> None:
    """Use this much CPU, as the kernel counts it."""
    until = time.process_time() + seconds
    while time.process_time() < until:
        sum(range(1000))


def test_all_that_linux_tells_is_read(machine: MachineSensor) -> None:
    work(0.1)
    seen = msgspec.structs.asdict(host(machine))
    for name in MAY_BE_ABSENT:
        seen.pop(name)
    assert [name for name, value in seen.items() if value is None] == []


def test_memory_is_that_of_the_kernel(machine: MachineSensor) -> None:
    lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    total_mb = int(lines["MemTotal"].split()[0]) * 1024 / 1e6
    seen = host(machine)
    assert seen.memory_total_mb == pytest.approx(total_mb, abs=0.1)
    assert seen.memory_total_mb is not None
    assert seen.memory_available_mb is not None
    assert seen.memory_used_mb == pytest.approx(seen.memory_total_mb - seen.memory_available_mb, abs=0.2)
    assert 0 < seen.memory_available_mb < seen.memory_total_mb


def test_the_disk_is_that_of_the_state_directory_before_it_is_made(tmp_path: Path) -> None:
    seen = host(MachineSensor(tmp_path / "not" / "yet"))
    facts = os.statvfs(tmp_path)
    assert seen.disk_total_mb == pytest.approx(facts.f_blocks * facts.f_frsize / 1e6, abs=0.1)
    assert seen.disk_free_mb is not None
    assert 0 < seen.disk_free_mb <= facts.f_blocks * facts.f_frsize / 1e6


def test_without_a_state_directory_there_is_no_disk() -> None:
    seen = host(MachineSensor())
    assert (seen.disk_total_mb, seen.disk_free_mb) == (None, None)


def test_work_is_seen_in_the_process_and_on_every_core_there_is(machine: MachineSensor) -> None:
    work(0.3)
    readings = machine.read()
    assert readings.process is not None
    assert readings.process.cpu_percent is not None
    assert readings.process.cpu_percent > 0
    assert readings.host is not None
    assert readings.host.cpu_percent is not None
    assert 0 < readings.host.cpu_percent <= 100
    assert len(readings.host.core_percent or []) == psutil.cpu_count()
    assert all(0 <= share <= 100 for share in readings.host.core_percent or [])


def test_the_process_is_this_one(machine: MachineSensor) -> None:
    gc.collect()  # it may close files
    before = process(machine)
    opened = [os.open("/dev/null", os.O_RDONLY) for _ in range(5)]
    after = process(machine)
    for file in opened:
        os.close(file)
    assert before.open_files is not None
    assert after.open_files == before.open_files + 5
    assert before.rss_mb == pytest.approx(psutil.Process().memory_info().rss / 1e6, rel=0.2)
    assert before.threads == psutil.Process().num_threads()


def test_cores_that_were_switched_off_since_leave_the_shares_unknown_once(
    machine: MachineSensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = psutil.cpu_times
    with monkeypatch.context() as patch:
        patch.setattr(psutil, "cpu_times", lambda percpu: [*real(percpu=percpu), real()])
        seen = host(machine)
        assert (seen.cpu_percent, seen.core_percent) == (None, None)
    assert host(machine).cpu_percent is None
    work(0.1)
    assert host(machine).cpu_percent is not None


@pytest.mark.parametrize(
    ("call", "fields"),
    [
        ("virtual_memory", ("memory_total_mb", "memory_available_mb", "memory_used_mb")),
        ("swap_memory", ("swap_total_mb", "swap_used_mb")),
        ("disk_usage", ("disk_total_mb", "disk_free_mb")),
        ("cpu_times", ("cpu_percent", "core_percent")),
        ("net_io_counters", ("network_rx_bytes", "network_tx_bytes")),
    ],
)
@pytest.mark.parametrize("error", [PermissionError("hidden"), psutil.AccessDenied(1), ValueError("no such line")])
def test_what_a_container_hides_is_absent_and_the_rest_is_there(
    machine: MachineSensor, monkeypatch: pytest.MonkeyPatch, call: str, fields: tuple[str, ...], error: Exception
) -> None:
    def hidden(*_: object, **__: object) -> None:
        raise error

    work(0.1)
    monkeypatch.setattr(psutil, call, hidden)
    seen = msgspec.structs.asdict(host(machine))
    for name in MAY_BE_ABSENT:
        seen.pop(name)
    assert {name for name, value in seen.items() if value is None} == set(fields)


def test_the_clock_is_judged_as_the_kernel_does(machine: MachineSensor, tmp_path: Path) -> None:
    source = tmp_path / "clock.c"
    source.write_text(
        "#include <stdio.h>\n#include <sys/timex.h>\n"
        "int main(void) { struct timex clock = {0}; int state = adjtimex(&clock);"
        'printf("%s", state < 0 ? "None" : clock.status & STA_UNSYNC ? "False" : "True"); return 0; }'
    )
    subprocess.run([need_program("gcc", "gcc"), "-o", str(tmp_path / "clock"), str(source)], check=True)
    told = subprocess.run([str(tmp_path / "clock")], capture_output=True, text=True, check=True).stdout
    assert str(host(machine).clock_synchronised) == told


@pytest.mark.parametrize(("files", "told"), [(["synchronized"], "True"), ([], "False"), (None, "None")])
def test_a_clock_that_may_not_be_asked_is_judged_as_timesyncd_does(
    tmp_path: Path, files: list[str] | None, told: str
) -> None:
    """As under systemd's ProtectClock=, by the same means: a filter that refuses the system calls."""
    calls = {"x86_64": (159, 305), "aarch64": (171, 266)}.get(platform.machine())  # adjtimex, clock_adjtime
    if calls is None:
        pytest.skip(f"the numbers of adjtimex and clock_adjtime on {platform.machine()} are not known here")
    if files is not None:
        (tmp_path / "timesync").mkdir()
        for name in files:
            (tmp_path / "timesync" / name).touch()
    code = FILTERED.format(calls=calls, timesync=str(tmp_path / "timesync"))
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == told


@pytest.mark.parametrize(
    ("physical", "received", "sent"), [(("end0", "wlan0"), 110, 11), ((), 1110, 111)], ids=["board", "container"]
)
def test_traffic_is_counted_once_and_without_loopback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, physical: tuple[str, ...], received: int, sent: int
) -> None:
    counters = {
        "lo": snetio(90_000, 90_000, 0, 0, 0, 0, 0, 0),
        "end0": snetio(1, 10, 0, 0, 0, 0, 0, 0),
        "wlan0": snetio(10, 100, 0, 0, 0, 0, 0, 0),
        "docker0": snetio(100, 1000, 0, 0, 0, 0, 0, 0),
    }
    for name in physical:
        (tmp_path / name / "device").mkdir(parents=True)
    monkeypatch.setattr(psutil, "net_io_counters", lambda pernic: counters)
    seen = host(MachineSensor(interfaces=tmp_path))
    assert (seen.network_rx_bytes, seen.network_tx_bytes) == (received, sent)


def test_the_network_is_counted_on_this_machine(machine: MachineSensor) -> None:
    before = host(machine).network_rx_bytes
    most = sum(one.bytes_recv for one in psutil.net_io_counters(pernic=True).values())
    assert before is not None
    assert 0 <= before <= most


def test_what_several_sensors_see_is_put_together() -> None:
    readings = Sensors({"board": Scripted(BOARD), "gpu": Scripted(GPU), "null": NullSensor()}).read()
    assert readings == Readings(board=BOARD.board, gpus=GPU.gpus)


@pytest.mark.parametrize(
    "error", [GpuUnavailable("gone"), OSError("gone"), ValueError("gone"), KeyError("gone"), FileNotFoundError("gone")]
)
def test_a_sensor_that_fails_is_left_out_and_the_others_are_read(error: Exception) -> None:
    readings = Sensors({"gpu": Scripted(error), "board": Scripted(BOARD)}).read()
    assert readings == Readings(board=BOARD.board, troubles={"gpu": str(error)})


def test_a_failure_without_a_word_is_called_by_its_kind() -> None:
    assert Sensors({"gpu": Scripted(TimeoutError())}).read().troubles == {"gpu": "TimeoutError"}


def test_a_bug_in_a_sensor_is_not_hidden() -> None:
    with pytest.raises(ZeroDivisionError):
        Sensors({"gpu": Scripted(ZeroDivisionError())}).read()


def test_a_failed_sensor_is_asked_again_after_a_while_and_told_of_once() -> None:
    clock = Clock()
    gpu = Scripted(GpuUnavailable("gone"), GpuUnavailable("gone"), GPU, GPU)
    sensors = Sensors({"gpu": gpu}, retry_s=60.0, clock=clock)
    with capture_logs() as logs:
        for _ in range(3):
            assert sensors.read().troubles == {"gpu": "gone"}
        assert gpu.asked == 1
        clock.now += 60.0
        assert sensors.read().troubles == {"gpu": "gone"}
        clock.now += 59.0
        assert sensors.read().troubles == {"gpu": "gone"}
        assert gpu.asked == 2
        clock.now += 1.0
        assert sensors.read() == GPU
        assert sensors.read() == GPU
    assert [log["event"] for log in logs] == ["sensor.failed", "sensor.back"]
    assert logs[0]["reason"] == "gone"


def test_another_reason_is_told_of_too() -> None:
    clock = Clock()
    sensors = Sensors({"gpu": Scripted(OSError("gone"), OSError("locked"))}, retry_s=1.0, clock=clock)
    with capture_logs() as logs:
        sensors.read()
        clock.now += 1.0
        sensors.read()
    assert [log["reason"] for log in logs] == ["gone", "locked"]


def test_closing_closes_every_sensor() -> None:
    parts = {"board": Scripted(), "gpu": Scripted()}
    Sensors(parts).close()
    assert [part.closed for part in parts.values()] == [1, 1]


def test_a_jetson_is_found_by_its_device_tree(tmp_path: Path) -> None:
    with planted(tmp_path, BOARDS["orin_nano_jetpack_6"]):
        sensors = detect(state_directory=tmp_path, root=tmp_path)
        readings = sensors.read()
        sensors.close()
    assert "jetson" in sensors.names
    assert readings.board is not None
    assert readings.board.jetpack == "6.2"
    assert readings.host is not None
    assert readings.host.disk_total_mb is not None


@pytest.mark.parametrize("name", ["host", "jetson", "null"])
def test_a_sensor_has_a_name_reads_and_closes_twice(name: str) -> None:
    sensor: Sensor = plugins.load("sensors", name)()
    assert isinstance(sensor.read(), Readings)
    sensor.close()
    sensor.close()


def test_readings_survive_the_way_through_json(tmp_path: Path) -> None:
    with planted(tmp_path, BOARDS["xavier_nx_jetpack_5"]):
        seen = Sensors({"host": MachineSensor(tmp_path), "jetson": JetsonSensor(tmp_path), "gpu": Scripted(GPU)}).read()
    assert msgspec.json.decode(msgspec.json.encode(seen), type=Readings) == seen


@given(st.integers())
def test_a_number_in_a_file_is_that_number_unless_it_is_absurd(value: int) -> None:
    with tempfile.NamedTemporaryFile("w") as file:
        file.write(f" {value}\n")
        file.flush()
        assert number(Path(file.name)) == (value if len(str(abs(value))) <= 18 else None)


@pytest.mark.parametrize(
    ("content", "value"),
    [("1500\n", 1.5), ("-256000\n", None), ("0", 0.0), ("250000", 250.0), ("250001", None), ("", None), ("1.5", None)],
)
def test_a_number_out_of_bounds_is_absent(tmp_path: Path, content: str, value: float | None) -> None:
    (tmp_path / "temp").write_text(content)
    assert scaled(tmp_path / "temp", 1e-3, most=250) == value


def test_a_file_that_has_nothing_to_say_yet_is_absent_and_does_not_block(tmp_path: Path) -> None:
    with planted(tmp_path, {"off": OFF}):
        assert text(tmp_path / "off") == ""


def test_the_tenth_comes_after_the_second(tmp_path: Path) -> None:
    for name in ("zone10", "zone2", "zone1", "device3"):
        (tmp_path / name).touch()
    assert names(tmp_path, "zone") == ["zone1", "zone2", "zone10"]
    assert names(tmp_path / "nowhere") == []


@pytest.mark.parametrize(
    ("most", "high", "told"),
    [
        ("2000000000", "1500000000", (1500.0, 700.0)),
        ("2000000000", "max", (2000.0, 700.0)),
        ("max", "max", (None, None)),
    ],
)
def test_the_limit_of_the_services_own_control_group_is_read(
    tmp_path: Path, most: str, high: str, told: tuple[float | None, float | None]
) -> None:
    folder = tmp_path / "system.slice" / "edge-agent.service"
    folder.mkdir(parents=True)
    (tmp_path / "own").write_text("1:name=systemd:/x\n0::/system.slice/edge-agent.service\n")
    files = {
        "memory.max": most,
        "memory.high": high,
        "memory.current": "900000000",
        "memory.stat": "inactive_file 200000000\nanon 1",
    }
    for name, content in files.items():
        (folder / name).write_text(f"{content}\n")
    seen = host(MachineSensor(tmp_path, groups=tmp_path, own_group=tmp_path / "own"))
    assert (seen.memory_limit_mb, seen.memory_limit_used_mb) == told
