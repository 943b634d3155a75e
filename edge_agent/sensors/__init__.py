"""What the machine says of itself. Absent is None, never 0. One module a kind of sensor; each has `Sensor`."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Protocol

import structlog

from edge_agent.errors import EdgeAgentError, GpuUnavailable
from edge_agent.readings import Readings
from edge_agent.sensors.host import MachineSensor
from edge_agent.sensors.jetson import JetsonSensor, is_jetson
from edge_agent.sensors.nvml import NvmlSensor

RETRY_S = 60.0

log = structlog.get_logger()


class Sensor(Protocol):
    """A part of the machine, driven by the one thread that owns it."""

    def read(self) -> Readings:
        """What it sees now; the rest is None. Asks files and drivers: not on the event loop. Raises an
        `EdgeAgentError` where it can see nothing at all; it may be asked again later."""

    def close(self) -> None:
        """Let go of what it holds; may be called twice."""


class Sensors:
    """Several sensors as one. One that fails is left out, told of in `troubles`, and asked again after `retry_s`."""

    def __init__(
        self,
        sensors: Mapping[str, Sensor],
        *,
        retry_s: float = RETRY_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._sensors = sensors
        self._retry_s = retry_s
        self._clock = clock
        self._failed: dict[str, tuple[float, str]] = {}

    @property
    def names(self) -> list[str]:
        return list(self._sensors)

    def read(self) -> Readings:
        """What all of them see."""
        return _together([self._read(name, sensor) for name, sensor in self._sensors.items()])

    def close(self) -> None:
        for sensor in self._sensors.values():
            sensor.close()

    def _read(self, name: str, sensor: Sensor) -> Readings:
        again_at, known = self._failed.get(name, (0.0, ""))
        if known and self._clock() < again_at:
            return Readings(troubles={name: known})
        try:
            readings = sensor.read()
        except (EdgeAgentError, OSError, ValueError, LookupError) as error:
            return self._left_out(name, str(error) or type(error).__name__)
        if self._failed.pop(name, None):
            log.info("sensor.back", sensor=name)
        return readings

    def _left_out(self, name: str, reason: str) -> Readings:
        _, known = self._failed.get(name, (0.0, ""))
        if reason != known:
            log.warning("sensor.failed", sensor=name, reason=reason, retry_s=self._retry_s)
        self._failed[name] = self._clock() + self._retry_s, reason
        return Readings(troubles={name: reason})


def detect(*, state_directory: Path | None = None, root: Path = Path("/")) -> Sensors:
    """The sensors of this machine: the host's always, the Jetson's where the device tree says Tegra, NVML's where
    its library is. Loads NVIDIA's library: not on the event loop."""
    found: dict[str, Sensor] = {"host": MachineSensor(state_directory)}
    if is_jetson(root):
        found["jetson"] = JetsonSensor(root)
    try:
        found["nvml"] = NvmlSensor()
    except GpuUnavailable as absent:
        log.debug("sensor.absent", sensor="nvml", reason=str(absent))
    return Sensors(found)


def _together(parts: Iterable[Readings]) -> Readings:
    """Of each fact the first that is there; the troubles of all."""
    whole = Readings()
    for part in parts:
        whole = Readings(
            host=whole.host or part.host,
            process=whole.process or part.process,
            gpus=whole.gpus or part.gpus,
            board=whole.board or part.board,
            troubles=whole.troubles | part.troubles,
        )
    return whole
