"""Facts of a Jetson that its kernel shows to anybody: files of /proc, /sys and /etc, no root, no tools."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from edge_agent.readings import BoardReadings, RailReadings, Readings
from edge_agent.sensors._files import names, number, scaled, text
from edge_agent.sensors.throttling import ThrottlingSensor, cooling

_RELEASE = re.compile(r"# R(\d{1,3}) \(release\), REVISION: (\d{1,3})\.(\d{1,3})")
_GPU = re.compile(r"[0-9a-f]+\.(?:gpu|gm20b|gp10b|gv11b|ga10b|gb10b)|gpu-gpc-0")
_NVDEC = re.compile(r"[0-9a-f]+\.nvdec\d?|gpu-nvd-0")
_NVENC = re.compile(r"[0-9a-f]+\.nvenc\d?")
_EMC = re.compile(r"bwmgr")
_LOADS = ("sys/devices/gpu.0/load", "sys/devices/platform/gpu.0/load")
_INPUT_RAILS = ("VDD_IN", "POM_5V_IN", "5V_IN", "VIN")
_FANS = ("pwmfan", "pwm-fan")
_NO_TEMPERATURE = "PMIC-Die"  # 100 °C always: https://github.com/balena-os/balena-jetson/issues/142

# Of each L4T its JetPack: developer.nvidia.com/embedded/jetpack-archive, and the pages of the single releases
# (/embedded/linux-tegra-r3272, /embedded/jetson-linux-r3564, /embedded/jetpack/downloads/archive-7.1.md, …).
_JETPACKS = {
    "32.4.3": "4.4",
    "32.4.4": "4.4.1",
    "32.5.0": "4.5",
    "32.5.1": "4.5.1",
    "32.6.1": "4.6",
    "32.7.1": "4.6.1",
    "32.7.2": "4.6.2",
    "32.7.3": "4.6.3",
    "32.7.6": "4.6.6",
    "35.1.0": "5.0.2",
    "35.2.1": "5.1",
    "35.3.1": "5.1.1",
    "35.4.1": "5.1.2",
    "35.5.0": "5.1.3",
    "35.6.0": "5.1.4",
    "35.6.1": "5.1.5",
    "35.6.2": "5.1.5",
    "35.6.4": "5.1.6",
    "36.3.0": "6.0",
    "36.4.0": "6.1",
    "36.4.3": "6.2",
    "36.4.4": "6.2.1",
    "36.4.7": "6.2.1",
    "38.2.0": "7.0",
    "38.2.1": "7.0",
    "38.4.0": "7.1",
    "39.2.0": "7.2",
    "39.2.1": "7.2.1",
}


def is_jetson(root: Path = Path("/")) -> bool:
    """Whether the device tree says that this is a Tegra."""
    return "nvidia,tegra" in text(root / "proc/device-tree/compatible")


class JetsonSensor:
    """Reads below `root`; any file may be missing or hold nonsense, which is then absent. docs/jetson.md says which
    board has which, and who saw it there.

    - GPU load: `load` of the device behind the GPU's devfreq (`57000000.gpu`, `17000000.gv11b`, `17000000.ga10b`,
      `17000000.gpu`), or of /sys/devices[/platform]/gpu.0, in thousandths:
      https://github.com/nicolargo/glances/pull/3580. On Thor there is none, but in NVML:
      https://github.com/rbonghi/jetson_stats/issues/885.
    - Clocks: `cur_freq` in Hz, https://docs.kernel.org/admin-guide/abi-testing.html (sysfs-class-devfreq); the memory's
      (EMC) is `bwmgr`, from JetPack 7 on: https://github.com/rbonghi/jetson_stats/pull/825. Elsewhere it wants root.
    - Temperatures: /sys/class/thermal/thermal_zone*/{type,temp} in thousandths of °C; engines that are off say EAGAIN
      (https://github.com/prometheus/node_exporter/issues/3071) or -256000.
    - Rails: hwmon `ina3221` (https://docs.kernel.org/hwmon/ina3221.html; mV and mA, labels by the device tree, `NC` is
      not connected) and `ina238` (https://docs.kernel.org/hwmon/ina238.html; µW); before JetPack 5 the driver ina3221x
      (https://github.com/energymon/energymon/tree/master/jetson).
    - Fan: hwmon `pwmfan` (https://docs.kernel.org/hwmon/pwm-fan.html) and the tachometer's `rpm`; before JetPack 5
      /sys/devices/pwm-fan. 255 is full speed.
    - /etc/nv_tegra_release, /proc/device-tree/model; the power mode by `ThrottlingSensor`.
    """

    def __init__(self, root: Path = Path("/")) -> None:
        self._root = root
        self._throttling = ThrottlingSensor(root)

    def read(self) -> Readings:
        """Some hundred small files; the rails go over I²C, 0.6 ms a number: not on the event loop."""
        root = self._root
        model = text(root / "proc/device-tree/model") or None
        l4t = _l4t(text(root / "etc/nv_tegra_release"))
        rails = _rails(root, model or "")
        board = BoardReadings(
            model=model,
            l4t=l4t,
            jetpack=_JETPACKS.get(l4t or ""),
            power_mode=self._throttling.mode(),
            gpu_percent=_gpu_percent(root),
            gpu_mhz=_clock(root, _GPU),
            nvdec_mhz=_clock(root, _NVDEC),
            nvenc_mhz=_clock(root, _NVENC),
            emc_mhz=_clock(root, _EMC),
            temperatures_c=_temperatures(root / "sys/class/thermal") or None,
            rails=rails or None,
            power_w=next((rails[name].power_w for name in _INPUT_RAILS if name in rails), None),
            fan_percent=_fan_percent(root),
            fan_rpm=_fan_rpm(root),
            throttling=_throttling(root / "sys/class/thermal"),
        )
        return Readings(board=board)

    def close(self) -> None:
        """There is nothing to let go of."""


def _l4t(release: str) -> str | None:
    found = _RELEASE.match(release)
    return ".".join(found.groups()) if found else None


def _devfreq(root: Path, wanted: re.Pattern[str]) -> list[Path]:
    folder = root / "sys/class/devfreq"
    return [folder / name for name in names(folder) if wanted.fullmatch(name)]


def _clock(root: Path, wanted: re.Pattern[str]) -> float | None:
    clocks = [scaled(device / "cur_freq", 1e-6, most=20_000) for device in _devfreq(root, wanted)]
    return max((clock for clock in clocks if clock is not None), default=None)


def _gpu_percent(root: Path) -> float | None:
    files = [*(device / "device/load" for device in _devfreq(root, _GPU)), *(root / load for load in _LOADS)]
    return _first(scaled(file, 0.1, most=100) for file in files)


def _temperatures(folder: Path) -> dict[str, float]:
    """By the zone's type; one that comes twice, with its number."""
    found: dict[str, float] = {}
    for zone in names(folder, "thermal_zone"):
        kind = text(folder / zone / "type")
        celsius = scaled(folder / zone / "temp", 1e-3, least=-100, most=250)
        if kind and kind != _NO_TEMPERATURE and celsius is not None:
            found[kind if kind not in found else f"{kind} {zone.removeprefix('thermal_zone')}"] = celsius
    return found


def _rails(root: Path, model: str) -> dict[str, RailReadings]:
    found: dict[str, RailReadings] = {}
    for chip in _hwmon(root, "ina3221"):
        found |= dict(_ina3221(chip))
    for chip in _hwmon(root, "ina238"):
        # The developer kit's measures what comes in: https://github.com/rbonghi/jetson_stats/pull/900
        name = text(chip / "label") or ("VIN" if "AGX Thor" in model else "ina238")
        volts, amperes = _milli(chip / "in1_input"), _milli(chip / "curr1_input")
        found |= _rail(name, volts, amperes, scaled(chip / "power1_input", 1e-6, most=10_000))
    drivers = root / "sys/bus/i2c/drivers/ina3221x"
    for address in names(drivers):
        for device in names(drivers / address, "iio:device"):
            found |= dict(_ina3221x(drivers / address / device))
    return found


def _ina3221(chip: Path) -> Iterator[tuple[str, RailReadings]]:
    """The three channels; what follows them are shunts and sums."""
    for channel in (1, 2, 3):
        name = text(chip / f"in{channel}_label")
        if name and name != "NC":
            volts, amperes = _milli(chip / f"in{channel}_input"), _milli(chip / f"curr{channel}_input")
            watts = None if volts is None or amperes is None else round(volts * amperes, 3)
            yield from _rail(name, volts, amperes, watts).items()


def _ina3221x(chip: Path) -> Iterator[tuple[str, RailReadings]]:
    for channel in (0, 1, 2):
        name = text(chip / f"rail_name_{channel}")
        if name and name != "NC":
            volts, amperes = _milli(chip / f"in_voltage{channel}_input"), _milli(chip / f"in_current{channel}_input")
            yield from _rail(name, volts, amperes, _milli(chip / f"in_power{channel}_input")).items()


def _rail(name: str, volts: float | None, amperes: float | None, watts: float | None) -> dict[str, RailReadings]:
    if volts is None and amperes is None and watts is None:
        return {}
    return {name: RailReadings(voltage_v=volts, current_a=amperes, power_w=watts)}


def _milli(file: Path) -> float | None:
    return scaled(file, 1e-3, most=10_000)


def _hwmon(root: Path, *wanted: str) -> list[Path]:
    folder = root / "sys/class/hwmon"
    return [folder / name for name in names(folder) if not wanted or text(folder / name / "name") in wanted]


def _fan_percent(root: Path) -> float | None:
    files = [*(fan / "pwm1" for fan in _hwmon(root, *_FANS)), root / "sys/devices/pwm-fan/cur_pwm"]
    steps = _first(number(file) for file in files)
    return round(100 * steps / 255, 1) if steps is not None and 0 <= steps <= 255 else None


def _fan_rpm(root: Path) -> float | None:
    files = [*(chip / "rpm" for chip in _hwmon(root)), *(fan / "fan1_input" for fan in _hwmon(root, *_FANS))]
    return _first(scaled(file, 1, most=100_000) for file in files)


def _throttling(folder: Path) -> list[str] | None:
    known = cooling(folder)
    return [f"{kind} {state}" for kind, state in known if state > 0] if known else None


def _first(values: Iterator[float | None]) -> float | None:
    return next((value for value in values if value is not None), None)


Sensor = JetsonSensor
