"""What is read of each Jetson, from trees like those of real boards, whole and damaged."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edge_agent.readings import BoardReadings, RailReadings
from edge_agent.sensors.jetson import JetsonSensor, is_jetson
from edge_agent.sensors.throttling import ThrottlingSensor
from tests.jetson_trees import BOARDS, OFF, Tree, planted

SEEN = {
    "nano_jetpack_4": BoardReadings(
        model="NVIDIA Jetson Nano Developer Kit",
        l4t="32.7.1",
        jetpack="4.6.1",
        power_mode="5W",
        gpu_percent=43.7,
        gpu_mhz=921.6,
        temperatures_c={  # PMIC-Die says 100 whatever it is
            "AO-therm": 29.5,
            "CPU-therm": 24.5,
            "GPU-therm": 21.0,
            "PLL-therm": 20.5,
            "thermal-fan-est": 22.25,
        },
        rails={
            "POM_5V_IN": RailReadings(voltage_v=5.032, current_a=0.562, power_w=2.83),
            "POM_5V_GPU": RailReadings(voltage_v=5.032, current_a=0.008, power_w=0.041),
            "POM_5V_CPU": RailReadings(voltage_v=5.032, current_a=0.187, power_w=0.943),
        },
        power_w=2.83,
        fan_percent=40.0,
    ),
    "xavier_nx_jetpack_5": BoardReadings(
        model="NVIDIA Jetson Xavier NX Developer Kit",
        l4t="35.4.1",
        jetpack="5.1.2",
        power_mode="MODE_15W_2CORE",
        gpu_percent=100.0,
        gpu_mhz=1109.25,
        temperatures_c={"CPU-therm": 45.5, "GPU-therm": 44.0, "AO-therm": 43.5},
        rails={
            "VDD_IN": RailReadings(voltage_v=4.984, current_a=1.128, power_w=5.622),
            "VDD_CPU_GPU_CV": RailReadings(voltage_v=4.984, current_a=0.248, power_w=1.236),
            "VDD_SOC": RailReadings(voltage_v=4.976, current_a=0.296, power_w=1.473),
        },
        power_w=5.622,
        fan_percent=100.0,
        fan_rpm=6214,
        throttling=["gpu-throttle-alert 1"],
    ),
    "agx_orin_jetpack_5": BoardReadings(
        model="Jetson AGX Orin",
        l4t="35.1.0",
        jetpack="5.0.2",
        power_mode="MAXN",
        gpu_percent=0.0,
        gpu_mhz=306.0,
        nvdec_mhz=115.2,
        nvenc_mhz=115.2,
        temperatures_c={
            "cpu-thermal": 47.5,
            "gpu-thermal": 42.0,
            "soc0-thermal": 46.0,
            "tj-thermal": 47.5,
            "tboard-thermal": 37.5,
            "tdiode-thermal": 39.75,
        },
        rails={
            "VDD_GPU_SOC": RailReadings(voltage_v=0.843, current_a=6.17, power_w=5.201),
            "VDD_CPU_CV": RailReadings(voltage_v=0.78, current_a=3.437, power_w=2.681),
            "VIN_SYS_5V0": RailReadings(voltage_v=4.968, current_a=0.953, power_w=4.735),
            "VDDQ_VDD2_1V8AO": RailReadings(voltage_v=1.8, current_a=0.341, power_w=0.614),
        },
        power_w=None,  # no rail measures what goes in
        fan_percent=20.0,
        fan_rpm=1390,
        throttling=[],
    ),
    "orin_nano_jetpack_6": BoardReadings(
        model="NVIDIA Jetson Orin Nano Engineering Reference Developer Kit Super",
        l4t="36.4.3",
        jetpack="6.2",
        power_mode="MAXN_SUPER",
        gpu_percent=99.6,
        gpu_mhz=1020.0,
        nvdec_mhz=1011.2,
        temperatures_c={"cpu-thermal": 52.125, "gpu-thermal": 53.218, "tj-thermal": 53.218},
        rails={
            "VDD_IN": RailReadings(voltage_v=5.064, current_a=2.6, power_w=13.166),
            "VDD_CPU_GPU_CV": RailReadings(voltage_v=5.056, current_a=1.016, power_w=5.137),
            "VDD_SOC": RailReadings(voltage_v=5.056, current_a=0.352, power_w=1.78),
        },
        power_w=13.166,
        fan_percent=60.0,
        fan_rpm=2905,
        throttling=["cpufreq-cpu0 2"],
    ),
    "agx_thor_jetpack_7": BoardReadings(
        model="NVIDIA Jetson AGX Thor Developer Kit",
        l4t="38.4.0",
        jetpack="7.1",
        power_mode="120W",
        gpu_percent=None,  # NVML's
        gpu_mhz=1575.0,
        nvdec_mhz=1692.0,
        emc_mhz=4266.0,
        temperatures_c={"cpu-thermal": 41.125, "gpu-thermal": 39.875, "tj-thermal": 41.125},
        rails={
            "VDD_GPU": RailReadings(voltage_v=8.1, current_a=0.682, power_w=5.524),
            "VIN": RailReadings(voltage_v=19.88, current_a=1.79, power_w=35.585),
        },
        power_w=35.585,
        fan_percent=28.6,
    ),
}
DAMAGES = [None, b"", b"\n", b"N/A\n", b"\xff\x00\xfe", b"9" * 400, b"-256000\n", b"1e3\n", b"0x10\n"]
NAMES = ("model", "power_mode")  # any text may be one


def read(root: Path) -> BoardReadings:
    readings = JetsonSensor(root).read()
    assert readings.board is not None
    return readings.board


def damage(root: Path, name: str, content: bytes | None) -> None:
    path = root / name
    if path.is_fifo():
        return
    path.unlink()
    if content is not None:
        path.write_bytes(content)


def numbers(value: Any) -> list[float]:
    if isinstance(value, dict):
        return [number for part in value.values() for number in numbers(part)]
    return [] if value is None else [value]


@pytest.mark.parametrize("board", BOARDS)
def test_all_that_a_board_shows_is_read_in_its_units(tmp_path: Path, board: str) -> None:
    with planted(tmp_path, BOARDS[board]):
        assert read(tmp_path) == SEEN[board]


@pytest.mark.parametrize("board", BOARDS)
def test_a_board_is_known_by_its_device_tree(tmp_path: Path, board: str) -> None:
    assert not is_jetson(tmp_path)
    with planted(tmp_path, BOARDS[board]):
        assert is_jetson(tmp_path)


def test_another_board_with_a_device_tree_is_no_jetson(tmp_path: Path) -> None:
    with planted(tmp_path, {"proc/device-tree/compatible": "raspberrypi,5-model-b\0brcm,bcm2712\0"}):
        assert not is_jetson(tmp_path)


def test_where_there_is_nothing_all_is_absent(tmp_path: Path) -> None:
    assert read(tmp_path) == BoardReadings()


@pytest.mark.parametrize(
    ("release", "l4t", "jetpack"),
    [
        ("# R36 (release), REVISION: 4.4, GCID: 41062509, BOARD: generic", "36.4.4", "6.2.1"),
        ("# R39 (release), REVISION: 2.0, GCID: 1, BOARD: generic", "39.2.0", "7.2"),
        ("# R77 (release), REVISION: 1.2, GCID: 1", "77.1.2", None),
        ("R36 release 4.4", None, None),
        ("", None, None),
    ],
)
def test_the_release_of_l4t_tells_the_jetpack_that_it_came_with(
    tmp_path: Path, release: str, l4t: str | None, jetpack: str | None
) -> None:
    with planted(tmp_path, {"etc/nv_tegra_release": release + "\n# KERNEL_VARIANT: oot\n"}):
        assert (read(tmp_path).l4t, read(tmp_path).jetpack) == (l4t, jetpack)


def test_of_two_zones_with_one_name_both_are_there(tmp_path: Path) -> None:
    tree: Tree = {}
    for number, temperature in ((0, "30000"), (1, "-256000"), (10, "50000"), (2, "40000")):
        tree[f"sys/class/thermal/thermal_zone{number}/type"] = "soc-thermal\n"
        tree[f"sys/class/thermal/thermal_zone{number}/temp"] = temperature
    with planted(tmp_path, tree):
        assert read(tmp_path).temperatures_c == {"soc-thermal": 30.0, "soc-thermal 2": 40.0, "soc-thermal 10": 50.0}


def test_a_rail_that_is_switched_off_is_absent_and_its_neighbour_is_not(tmp_path: Path) -> None:
    tree = BOARDS["orin_nano_jetpack_6"] | {
        "sys/class/hwmon/hwmon1/in1_input": OFF,
        "sys/class/hwmon/hwmon1/curr1_input": OFF,
        "sys/class/hwmon/hwmon1/curr2_input": OFF,
    }
    with planted(tmp_path, tree):
        board = read(tmp_path)
    assert board.rails is not None
    assert board.power_w is None
    assert list(board.rails) == ["VDD_CPU_GPU_CV", "VDD_SOC"]
    assert board.rails["VDD_CPU_GPU_CV"] == RailReadings(voltage_v=5.056)


def test_of_several_decoders_the_fastest_is_told(tmp_path: Path) -> None:
    clocks = {"15480000.nvdec": "115200000", "15140000.nvdec1": "1164800000", "154c0000.nvenc": "0"}
    with planted(tmp_path, {f"sys/class/devfreq/{name}/cur_freq": hz for name, hz in clocks.items()}):
        board = read(tmp_path)
    assert (board.nvdec_mhz, board.nvenc_mhz, board.gpu_mhz) == (1164.8, 0.0, None)


def test_a_label_of_the_device_tree_names_an_ina238(tmp_path: Path) -> None:
    files = {"name": "ina238", "label": "VDD_12V", "power1_input": "1500000"}
    with planted(tmp_path, {f"sys/class/hwmon/hwmon0/{name}": content for name, content in files.items()}):
        board = read(tmp_path)
    assert board.rails == {"VDD_12V": RailReadings(power_w=1.5)}
    assert board.power_w is None


def test_a_cooling_device_that_is_switched_off_is_left_out_of_the_throttling(tmp_path: Path) -> None:
    tree = BOARDS["orin_nano_jetpack_6"] | {"sys/class/thermal/cooling_device2/cur_state": OFF}
    with planted(tmp_path, tree):
        assert read(tmp_path).throttling == []
        assert ThrottlingSensor(tmp_path).read().throttling is None


@pytest.mark.parametrize("board", BOARDS)
@given(data=st.data())
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_a_damaged_file_is_absent_and_nothing_is_made_up(board: str, data: st.DataObject) -> None:
    tree = BOARDS[board]
    harm = data.draw(st.dictionaries(st.sampled_from(sorted(tree)), st.sampled_from(DAMAGES), min_size=1))
    with tempfile.TemporaryDirectory() as folder, planted(Path(folder), tree) as root:
        for name, content in harm.items():
            damage(root, name, content)
        found = msgspec.to_builtins(read(root))
    whole = msgspec.to_builtins(SEEN[board])
    for key, value in found.items():
        if isinstance(value, list):
            assert set(value) <= set(whole[key] or [])
        elif isinstance(value, dict):  # a name may be damaged too, so that it is PMIC-Die's no more
            assert set(numbers(value)) <= {*numbers(whole[key]), 100.0}
        elif key not in NAMES:
            assert value in (None, whole[key]), key


@pytest.mark.parametrize("board", BOARDS)
@given(data=st.data())
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_whatever_a_file_holds_nothing_is_raised(board: str, data: st.DataObject) -> None:
    tree = BOARDS[board]
    content = st.binary(max_size=40) | st.integers().map(lambda number: b"%d\n" % number)
    harm = data.draw(st.dictionaries(st.sampled_from(sorted(tree)), content, min_size=1))
    with tempfile.TemporaryDirectory() as folder, planted(Path(folder), tree) as root:
        for name, harmful in harm.items():
            damage(root, name, harmful)
        found = read(root)
    assert msgspec.json.decode(msgspec.json.encode(found), type=BoardReadings) == found


def test_folders_where_files_should_be_are_absent(tmp_path: Path) -> None:
    for name in BOARDS["orin_nano_jetpack_6"]:
        (tmp_path / name).mkdir(parents=True)
    assert read(tmp_path) == BoardReadings()
