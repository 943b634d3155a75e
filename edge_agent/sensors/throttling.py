"""Whether the board holds its clocks back, and why: what Jetson Linux shows of it without root.

Only reads files; NVML's reasons are not asked. Over-current events (`oc<n>_event_cnt` of the hwmon device
`soctherm_oc`) are left out: they are counts, not a state, and boards in MAXN modes count several a second while their
clocks hardly drop.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path

from edge_agent.sensors._files import names, number, text

_COOLING = re.compile(r"[\w.-]*-throttle-alert|(?:thermal-)?(?:devfreq|cpufreq)-[\w.-]+")
_STATUS = re.compile(r"pmode:(\d{1,9})")
_HEAD = re.compile(r"<\s*(POWER_MODEL|PM_CONFIG)\s+([^>]*)>")
_GPU = re.compile(r"GPU\s+MAX_FREQ\s+(-?\d{1,19})\b")


@dataclass(frozen=True, slots=True)
class Throttling:
    """`throttling`: what slows the clocks because of heat. `power_mode`: that it is a lower one than before, and which.
    None: nothing of the kind, or not known here."""

    throttling: str | None = None
    power_mode: str | None = None


@dataclass(frozen=True, slots=True)
class PowerMode:
    """A mode of nvpmodel; `gpu_hz` is the most that the GPU may run at, infinite where the mode sets no bound, None
    where the file does not say."""

    name: str
    gpu_hz: float | None = None


@dataclass(frozen=True, slots=True)
class PowerModes:
    """`/etc/nvpmodel.conf`: the modes by their number, and the one at boot."""

    modes: dict[int, PowerMode] = field(default_factory=dict)
    default: int | None = None


class ThrottlingSensor:
    """Reads below `root`; any file may be missing or hold nonsense, which then counts as not known.

    - `/sys/class/thermal/cooling_device*/{type,cur_state}`: a `*-throttle-alert` (`gpu-throttle-alert`, …) is above 0
      while its zone is over a passive trip point, `devfreq-*` and `cpufreq-*` while the kernel caps these clocks.
      `hot-surface-alert` and the fan slow nothing. https://docs.kernel.org/driver-api/thermal/sysfs-api.html and
      "Thermal Management" in the Jetson Linux Developer Guide:
      https://docs.nvidia.com/jetson/archives/r36.3/DeveloperGuide/SD/PlatformPowerAndPerformance/JetsonOrinNanoSeriesJetsonOrinNxSeriesAndJetsonAgxOrinSeries.html
    - `/var/lib/nvpmodel/status`: `pmode:0002`, the mode in use, as nvpmodel keeps it over a reboot; and
      `/etc/nvpmodel.conf`: what each mode allows ("Power Mode Controls" in the same guide; the head of the file is its
      reference). Modes are compared by the GPU's highest clock, as their numbers have no order: an Orin Nano Super has
      15W=0, 25W=1, MAXN_SUPER=2, 7W=3. "Lower" is lower than the mode at boot, or than any seen since the start.
    """

    def __init__(self, root: Path = Path("/")) -> None:
        self._root = root
        self._best: PowerMode | None = None

    def read(self) -> Throttling:
        """Some twenty small files: not on the event loop."""
        return Throttling(self._throttling(), self._power_mode())

    def mode(self) -> str | None:
        """The name of the power mode in use (`MAXN`, `15W`), its number where that has no name; None off a Jetson."""
        status = _STATUS.search(text(self._root / "var/lib/nvpmodel/status"))
        if status is None:
            return None
        known = _power_modes(text(self._root / "etc/nvpmodel.conf")).modes.get(int(status[1]))
        return known.name if known else str(int(status[1]))

    def _throttling(self) -> str | None:
        active = [f"{kind} {state}" for kind, state in cooling(self._root / "sys/class/thermal") if state > 0]
        return f"thermal throttling: {', '.join(active)}" if active else None

    def _power_mode(self) -> str | None:
        status = _STATUS.search(text(self._root / "var/lib/nvpmodel/status"))
        if status is None:
            return None
        known = _power_modes(text(self._root / "etc/nvpmodel.conf"))
        here = known.modes.get(int(status[1]))
        self._best = _faster(self._best, known.modes.get(known.default) if known.default is not None else None)
        self._best = _faster(self._best, here)
        if here is None or here.gpu_hz is None or self._best is None or here.gpu_hz >= (self._best.gpu_hz or 0):
            return None
        return f"power mode {here.name} is lower than {self._best.name}: GPU at {here.gpu_hz / 1e6:.0f} MHz at most"


def cooling(folder: Path) -> list[tuple[str, int]]:
    """The devices that slow clocks, each with its state: 0 where it does not now."""
    found = []
    for name in names(folder, "cooling_device"):
        kind, state = text(folder / name / "type"), number(folder / name / "cur_state")
        if _COOLING.fullmatch(kind) and state is not None and state >= 0:
            found.append((kind, state))
    return found


def _power_modes(text: str) -> PowerModes:
    modes: dict[int, PowerMode] = {}
    default: int | None = None
    current: int | None = None
    for line in map(str.strip, text.splitlines()):
        head, gpu = _HEAD.match(line), _GPU.match(line)
        if head:
            keys = dict(re.findall(r"(\w+)=(\S+)", head[2]))
            current = _number(keys.get("ID"))
            default = _number(keys.get("DEFAULT")) if head[1] == "PM_CONFIG" else default
            if current is not None:
                modes[current] = PowerMode(keys.get("NAME", str(current)))
        elif gpu and current is not None:
            hz = float(gpu[1])
            modes[current] = PowerMode(modes[current].name, hz if hz > 0 else float("inf"))  # -1: no bound
    return PowerModes(modes, default)


def _faster(one: PowerMode | None, other: PowerMode | None) -> PowerMode | None:
    known = [mode for mode in (one, other) if mode and mode.gpu_hz is not None]
    return max(known, key=lambda mode: mode.gpu_hz or 0, default=None)


def _number(text: str | None) -> int | None:
    return int(text) if text and re.fullmatch(r"\d{1,9}", text) else None


Sensor = ThrottlingSensor
