"""Trees of files like those of real boards, to read them as if one were there.

They are made from what others published of such boards (docs/jetson.md names them), not recorded on boards of ours.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

OFF = "switched off"
"""A sensor that has no power: reading it says EAGAIN."""

Tree = dict[str, str]

NVPMODEL = """\
< POWER_MODEL ID=0 NAME={0} >
GPU MAX_FREQ -1
< POWER_MODEL ID=1 NAME={1} >
GPU MAX_FREQ 408000000
< PM_CONFIG DEFAULT=0 >
"""


@contextmanager
def planted(root: Path, tree: Mapping[str, str]) -> Iterator[Path]:
    """The tree, below `root`."""
    with ExitStack() as stack:
        for name, content in tree.items():
            path = root / name
            path.parent.mkdir(parents=True, exist_ok=True)
            if content != OFF:
                path.write_text(content)
                continue
            os.mkfifo(path)  # a pipe that somebody could write into has nothing yet: EAGAIN
            stack.callback(os.close, os.open(path, os.O_RDWR | os.O_NONBLOCK))
        yield root


def _identity(model: str, compatible: str, release: str) -> Tree:
    return {
        "proc/device-tree/model": f"{model}\0",
        "proc/device-tree/compatible": "".join(f"{part}\0" for part in compatible.split()),
        "etc/nv_tegra_release": f"# {release}, GCID: 29818004, BOARD: generic, EABI: aarch64, DATE: Sat Feb 19\n",
    }


def _zones(**temperatures: str) -> Tree:
    tree = {}
    for number, (kind, temperature) in enumerate(temperatures.items()):
        tree[f"sys/class/thermal/thermal_zone{number}/type"] = kind.replace("_", "-") + "\n"
        tree[f"sys/class/thermal/thermal_zone{number}/temp"] = temperature
    return tree


def _cooling(**states: str) -> Tree:
    tree = {}
    for number, (kind, state) in enumerate(states.items()):
        tree[f"sys/class/thermal/cooling_device{number}/type"] = kind.replace("_", "-") + "\n"
        tree[f"sys/class/thermal/cooling_device{number}/cur_state"] = state
    return tree


def _hwmon(number: int, name: str, **files: str) -> Tree:
    return {
        f"sys/class/hwmon/hwmon{number}/{file}": f"{content}\n" for file, content in {"name": name, **files}.items()
    }


def _devfreq(**clocks: str) -> Tree:
    return {
        f"sys/class/devfreq/{name.removeprefix('at_').replace('__', '.').replace('_', '-')}/cur_freq": f"{hz}\n"
        for name, hz in clocks.items()
    }


def _power_mode(number: int, *names: str) -> Tree:
    return {"var/lib/nvpmodel/status": f"pmode:{number:04}\n", "etc/nvpmodel.conf": NVPMODEL.format(*names)}


NANO_JETPACK_4 = {
    **_identity(
        "NVIDIA Jetson Nano Developer Kit",
        "nvidia,p3449-0000-b00+p3448-0000-b00 nvidia,jetson-nano nvidia,tegra210",
        "R32 (release), REVISION: 7.1",
    ),
    **_devfreq(at_57000000__gpu="921600000"),
    "sys/devices/gpu.0/load": "437\n",
    **_zones(
        AO_therm="29500\n",
        CPU_therm="24500\n",
        GPU_therm="21000\n",
        PLL_therm="20500\n",
        PMIC_Die="100000\n",
        thermal_fan_est="22250\n",
    ),
    "sys/bus/i2c/drivers/ina3221x/6-0040/iio:device0/rail_name_0": "POM_5V_IN\n",
    "sys/bus/i2c/drivers/ina3221x/6-0040/iio:device0/in_voltage0_input": "5032\n",
    "sys/bus/i2c/drivers/ina3221x/6-0040/iio:device0/in_current0_input": "562\n",
    "sys/bus/i2c/drivers/ina3221x/6-0040/iio:device0/in_power0_input": "2830\n",
    "sys/bus/i2c/drivers/ina3221x/6-0040/iio:device0/rail_name_1": "POM_5V_GPU\n",
    "sys/bus/i2c/drivers/ina3221x/6-0040/iio:device0/in_voltage1_input": "5032\n",
    "sys/bus/i2c/drivers/ina3221x/6-0040/iio:device0/in_current1_input": "8\n",
    "sys/bus/i2c/drivers/ina3221x/6-0040/iio:device0/in_power1_input": "41\n",
    "sys/bus/i2c/drivers/ina3221x/6-0040/iio:device0/rail_name_2": "POM_5V_CPU\n",
    "sys/bus/i2c/drivers/ina3221x/6-0040/iio:device0/in_voltage2_input": "5032\n",
    "sys/bus/i2c/drivers/ina3221x/6-0040/iio:device0/in_current2_input": "187\n",
    "sys/bus/i2c/drivers/ina3221x/6-0040/iio:device0/in_power2_input": "943\n",
    "sys/devices/pwm-fan/cur_pwm": "102\n",
    "sys/devices/pwm-fan/target_pwm": "255\n",
    **_power_mode(1, "MAXN", "5W"),
}

XAVIER_NX_JETPACK_5 = {
    **_identity(
        "NVIDIA Jetson Xavier NX Developer Kit",
        "nvidia,p3509-0000+p3668-0000 nvidia,p3668 nvidia,tegra194",
        "R35 (release), REVISION: 4.1",
    ),
    **_devfreq(at_17000000__gv11b="1109250000", at_15340000__vic="115200000"),
    "sys/class/devfreq/17000000.gv11b/device/load": "1000\n",
    "sys/devices/platform/gpu.0/load": "1000\n",
    **_zones(CPU_therm="45500\n", GPU_therm="44000\n", AUX_therm="-256000\n", AO_therm="43500\n", PMIC_Die="100000\n"),
    **_cooling(pwm_fan="2", gpu_throttle_alert="1", cpufreq_cpu0="0"),
    **_hwmon(2, "pwm_tach", rpm="6214"),
    **_hwmon(4, "pwm-fan", pwm1="255"),
    **_hwmon(
        6,
        "ina3221",
        in1_label="VDD_IN",
        in1_input="4984",
        curr1_input="1128",
        in2_label="VDD_CPU_GPU_CV",
        in2_input="4984",
        curr2_input="248",
        in3_label="VDD_SOC",
        in3_input="4976",
        curr3_input="296",
        in7_label="sum of shunt voltages",
        in7_input="8360",
    ),
    **_power_mode(0, "MODE_15W_2CORE", "MODE_10W_DESKTOP"),
}

AGX_ORIN_JETPACK_5 = {
    **_identity(
        "Jetson AGX Orin",
        "nvidia,p3737-0000+p3701-0000 nvidia,tegra234",
        "R35 (release), REVISION: 1.0",
    ),
    **_devfreq(at_17000000__ga10b="306000000", at_15480000__nvdec="115200000", at_154c0000__nvenc="115200000"),
    "sys/devices/platform/gpu.0/load": "0\n",
    **_zones(
        cpu_thermal="47500\n",
        gpu_thermal="42000\n",
        cv0_thermal=OFF,
        cv1_thermal=OFF,
        cv2_thermal=OFF,
        soc0_thermal="46000\n",
        tj_thermal="47500\n",
        tboard_thermal="37500\n",
        tdiode_thermal="39750\n",
    ),
    **_cooling(pwm_fan="1", gpu_throttle_alert="0", cpu_throttle_alert="0"),
    **_hwmon(0, "pwm_tach", rpm="1390"),
    **_hwmon(2, "pwmfan", pwm1="51"),
    **_hwmon(
        3,
        "ina3221",
        in1_label="VDD_GPU_SOC",
        in1_input="843",
        curr1_input="6170",
        in2_label="VDD_CPU_CV",
        in2_input="780",
        curr2_input="3437",
        in3_label="VIN_SYS_5V0",
        in3_input="4968",
        curr3_input="953",
    ),
    **_hwmon(4, "ina3221", in1_label="NC", in2_label="VDDQ_VDD2_1V8AO", in2_input="1800", curr2_input="341"),
    **_power_mode(0, "MAXN", "MODE_15W"),
}

ORIN_NANO_JETPACK_6 = {
    **_identity(
        "NVIDIA Jetson Orin Nano Engineering Reference Developer Kit Super",
        "nvidia,p3768-0000+p3767-0005-super nvidia,p3767-0005 nvidia,tegra234",
        "R36 (release), REVISION: 4.3",
    ),
    **_devfreq(at_17000000__gpu="1020000000", at_15480000__nvdec="1011200000", at_15340000__vic="115200000"),
    "sys/class/devfreq/17000000.gpu/device/load": "996\n",
    **_zones(
        cpu_thermal="52125\n",
        gpu_thermal="53218\n",
        cv0_thermal=OFF,
        cv1_thermal=OFF,
        cv2_thermal=OFF,
        tj_thermal="53218\n",
    ),
    **_cooling(pwm_fan="3", gpu_throttle_alert="0", cpufreq_cpu0="2"),
    **_hwmon(0, "pwm_tach", rpm="2905"),
    **_hwmon(
        1,
        "ina3221",
        in1_label="VDD_IN",
        in1_input="5064",
        curr1_input="2600",
        in2_label="VDD_CPU_GPU_CV",
        in2_input="5056",
        curr2_input="1016",
        in3_label="VDD_SOC",
        in3_input="5056",
        curr3_input="352",
    ),
    **_hwmon(2, "pwmfan", pwm1="153"),
    **_power_mode(0, "MAXN_SUPER", "15W"),
}

AGX_THOR_JETPACK_7 = {
    **_identity(
        "NVIDIA Jetson AGX Thor Developer Kit",
        "nvidia,p4071-0000+p3834-0008 nvidia,p3834-0008 nvidia,tegra264",
        "R38 (release), REVISION: 4.0",
    ),
    **_devfreq(gpu_gpc_0="1575000000", gpu_nvd_0="1692000000", bwmgr="4266000000"),
    **_zones(cpu_thermal="41125\n", gpu_thermal="39875\n", tj_thermal="41125\n"),
    **_hwmon(1, "pwmfan", pwm1="73"),
    **_hwmon(3, "ina3221", in1_label="VDD_GPU", in1_input="8100", curr1_input="682"),
    **_hwmon(4, "ina238", in1_input="19880", curr1_input="1790", power1_input="35585200"),
    **_power_mode(1, "MAXN", "120W"),
}

BOARDS = {
    "nano_jetpack_4": NANO_JETPACK_4,
    "xavier_nx_jetpack_5": XAVIER_NX_JETPACK_5,
    "agx_orin_jetpack_5": AGX_ORIN_JETPACK_5,
    "orin_nano_jetpack_6": ORIN_NANO_JETPACK_6,
    "agx_thor_jetpack_7": AGX_THOR_JETPACK_7,
}
