"""What the board shows of throttling and of its power mode, read from trees like those of real boards."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edge_agent.sensors.throttling import Throttling, ThrottlingSensor

# As on an Orin Nano Super with JetPack 6: the modes' numbers are in no order of speed.
CONF = """\
# < POWER_MODEL ID=id_num NAME=mode_name >
# PARAM1_NAME ARG11_NAME ARG11_VAL
< PARAM TYPE=CLOCK NAME=GPU >
FREQ_TABLE /sys/devices/platform/17000000.gpu/devfreq_dev/available_frequencies
MAX_FREQ /sys/devices/platform/17000000.gpu/devfreq_dev/max_freq

< POWER_MODEL ID=0 NAME=15W >
CPU_ONLINE CORE_0 1
CPU_A78_0 MAX_FREQ 1497600
GPU MIN_FREQ 0
GPU MAX_FREQ 612000000
EMC MAX_FREQ 2133000000

< POWER_MODEL ID=1 NAME=25W >
GPU MAX_FREQ 918000000
EMC MAX_FREQ 3199000000

< POWER_MODEL ID=2 NAME=MAXN_SUPER >
CPU_A78_0 MAX_FREQ -1
GPU MIN_FREQ 0
GPU MAX_FREQ -1
EMC MAX_FREQ 0

< POWER_MODEL ID=3 NAME=7W >
GPU MAX_FREQ 408000000

< PM_CONFIG DEFAULT=1 >
"""
COOLING = {
    "pwm-fan": "2",
    "cpufreq-cpu0": "0",
    "cpufreq-cpu4": "0",
    "devfreq-17000000.gpu": "0",
    "cpu-throttle-alert": "0",
    "gpu-throttle-alert": "0",
    "soc0-throttle-alert": "0",
    "hot-surface-alert": "1",
}


def write(root: Path, name: str, text: str) -> None:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def board(root: Path, *, mode: int = 1, **states: str) -> ThrottlingSensor:
    """An Orin Nano Super; `states` of cooling devices by name, with `_` for `-`."""
    for number, (kind, state) in enumerate(COOLING.items()):
        write(root, f"sys/class/thermal/cooling_device{number}/type", f"{kind}\n")
        write(root, f"sys/class/thermal/cooling_device{number}/cur_state", states.get(kind.replace("-", "_"), state))
    write(root, "etc/nvpmodel.conf", CONF)
    set_mode(root, mode)
    return ThrottlingSensor(root)


def set_mode(root: Path, mode: int) -> None:
    write(root, "var/lib/nvpmodel/status", f"pmode:{mode:04}\n")


def test_a_cool_board_in_its_own_mode_has_nothing_to_say(tmp_path: Path) -> None:
    assert board(tmp_path).read() == Throttling(None, None)


def test_a_fan_and_a_hot_surface_slow_nothing(tmp_path: Path) -> None:
    assert board(tmp_path, pwm_fan="4", hot_surface_alert="1").read().throttling is None


def test_alerts_and_capped_clocks_are_named_with_their_state(tmp_path: Path) -> None:
    sensor = board(tmp_path, gpu_throttle_alert="1\n", cpufreq_cpu0="3\n")
    assert sensor.read().throttling == "thermal throttling: cpufreq-cpu0 3, gpu-throttle-alert 1"


def test_throttling_ends_when_the_board_has_cooled(tmp_path: Path) -> None:
    sensor = board(tmp_path, gpu_throttle_alert="1")
    assert sensor.read().throttling
    board(tmp_path)
    assert sensor.read().throttling is None


@pytest.mark.parametrize(
    "kind", ["devfreq-17000000.gpu", "thermal-devfreq-0", "thermal-cpufreq-1", "GPU-throttle-alert"]
)
def test_the_names_of_other_kernels_are_known_too(tmp_path: Path, kind: str) -> None:
    write(tmp_path, "sys/class/thermal/cooling_device0/type", kind)
    write(tmp_path, "sys/class/thermal/cooling_device0/cur_state", "2")
    assert ThrottlingSensor(tmp_path).read().throttling == f"thermal throttling: {kind} 2"


@pytest.mark.parametrize("kind", ["Processor", "intel_powerclamp", "LCD", "iwlwifi", "tegra-heavy", ""])
def test_cooling_devices_of_other_machines_are_left_alone(tmp_path: Path, kind: str) -> None:
    write(tmp_path, "sys/class/thermal/cooling_device0/type", kind)
    write(tmp_path, "sys/class/thermal/cooling_device0/cur_state", "5")
    assert ThrottlingSensor(tmp_path).read().throttling is None


def test_a_mode_slower_than_the_one_at_boot_is_lower_whatever_its_number(tmp_path: Path) -> None:
    assert board(tmp_path, mode=3).read().power_mode == "power mode 7W is lower than 25W: GPU at 408 MHz at most"
    assert board(tmp_path, mode=0).read().power_mode == "power mode 15W is lower than 25W: GPU at 612 MHz at most"
    assert board(tmp_path, mode=2).read().power_mode is None


def test_a_mode_slower_than_one_seen_before_is_lower(tmp_path: Path) -> None:
    sensor = board(tmp_path, mode=2)
    assert sensor.read().power_mode is None
    set_mode(tmp_path, 1)
    assert sensor.read().power_mode == "power mode 25W is lower than MAXN_SUPER: GPU at 918 MHz at most"
    set_mode(tmp_path, 2)
    assert sensor.read().power_mode is None


def test_the_mode_in_use_has_a_name_or_a_number(tmp_path: Path) -> None:
    assert board(tmp_path, mode=2).mode() == "MAXN_SUPER"
    assert board(tmp_path, mode=9).mode() == "9"
    assert ThrottlingSensor(tmp_path / "nowhere").mode() is None


@pytest.mark.parametrize("status", ["", "pmode:", "pmode:fan", "pmode:0009", "\xff\xfe", "pmode:99999999999999999999"])
def test_a_mode_that_is_not_known_is_not_judged(tmp_path: Path, status: str) -> None:
    sensor = board(tmp_path)
    write(tmp_path, "var/lib/nvpmodel/status", status)
    assert sensor.read().power_mode is None


@pytest.mark.parametrize(
    "conf",
    ["", "< POWER_MODEL ID=3 NAME=7W >", "< POWER_MODEL ID=3 NAME=7W >\nGPU MAX_FREQ fast\n< PM_CONFIG DEFAULT=1 >"],
)
def test_modes_without_a_clock_for_the_gpu_are_not_compared(tmp_path: Path, conf: str) -> None:
    sensor = board(tmp_path, mode=3)
    write(tmp_path, "etc/nvpmodel.conf", conf)
    assert sensor.read().power_mode is None


def test_the_keys_of_a_mode_may_come_in_any_order(tmp_path: Path) -> None:
    sensor = board(tmp_path, mode=1)
    write(
        tmp_path,
        "etc/nvpmodel.conf",
        "<POWER_MODEL NAME=MAXN ID=0>\nGPU MAX_FREQ -1\n"
        "<POWER_MODEL NAME=10W ID=1>\nGPU MAX_FREQ 5000000\n<PM_CONFIG DEFAULT=0>",
    )
    assert sensor.read().power_mode == "power mode 10W is lower than MAXN: GPU at 5 MHz at most"


def test_a_machine_that_is_no_jetson_has_nothing_to_say(tmp_path: Path) -> None:
    assert ThrottlingSensor(tmp_path).read() == Throttling(None, None)


def test_folders_where_files_belong_and_files_where_folders_belong_are_survived(tmp_path: Path) -> None:
    for name in ("type", "cur_state"):
        (tmp_path / "sys/class/thermal/cooling_device0" / name).mkdir(parents=True)
    write(tmp_path, "sys/class/thermal/cooling_device1", "a file")
    (tmp_path / "var/lib/nvpmodel/status").mkdir(parents=True)
    (tmp_path / "etc/nvpmodel.conf").mkdir(parents=True)
    assert ThrottlingSensor(tmp_path).read() == Throttling(None, None)
    other = tmp_path / "other"
    write(other, "sys/class/thermal", "a file")
    assert ThrottlingSensor(other).read() == Throttling(None, None)


def test_a_device_that_cannot_be_read_hides_no_other(tmp_path: Path) -> None:
    sensor = board(tmp_path, gpu_throttle_alert="1")
    (tmp_path / "sys/class/thermal/cooling_device0/type").unlink()
    (tmp_path / "sys/class/thermal/cooling_device0/type").symlink_to("type")  # ELOOP, as root reads all else
    (tmp_path / "sys/class/thermal/cooling_device1/cur_state").unlink()
    assert sensor.read().throttling == "thermal throttling: gpu-throttle-alert 1"


@given(kind=st.binary(max_size=40), state=st.binary(max_size=40), status=st.binary(max_size=40), conf=st.binary())
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_nonsense_in_any_file_raises_nothing(
    tmp_path: Path, kind: bytes, state: bytes, status: bytes, conf: bytes
) -> None:
    sensor = board(tmp_path)
    (tmp_path / "sys/class/thermal/cooling_device0/type").write_bytes(kind)
    (tmp_path / "sys/class/thermal/cooling_device3/cur_state").write_bytes(state)
    (tmp_path / "var/lib/nvpmodel/status").write_bytes(status)
    (tmp_path / "etc/nvpmodel.conf").write_bytes(conf)
    sensor.read()
    (tmp_path / "var/lib/nvpmodel/status").write_bytes(b"pmode:0003")
    (tmp_path / "etc/nvpmodel.conf").write_bytes(CONF.encode() + conf)
    sensor.read()
