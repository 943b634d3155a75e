"""Facts of NVIDIA's GPUs, by NVML: the library that comes with the driver, through its own Python module.

`pynvml` (the package nvidia-ml-py) is imported when a sensor is made, and nowhere else.
"""

from __future__ import annotations

import ctypes
import time
from typing import Any

from msgspec.structs import replace

from edge_agent.errors import GpuUnavailable
from edge_agent.readings import GpuReadings, Readings

_ABSENT = frozenset({2**32 - 1, 2**64 - 1})  # NVML_VALUE_NOT_AVAILABLE, as the unsigned numbers that it comes in
_MOST_EVENTS = 100

# nvmlClocksEventReasons; 0x1, that the GPU is idle, holds nothing back.
_REASONS = {
    0x2: "applications_clocks_setting",
    0x4: "sw_power_cap",
    0x8: "hw_slowdown",
    0x10: "sync_boost",
    0x20: "sw_thermal_slowdown",
    0x40: "hw_thermal_slowdown",
    0x80: "hw_power_brake_slowdown",
    0x100: "display_clock_setting",
}


class _Lost(Exception):
    """A GPU, or all of NVML, is gone until NVML is opened anew."""


class NvmlSensor:
    """All GPUs that NVML sees. Each call may answer Not Supported by itself; that fact is then None.

    A GPU that was lost (fell off the bus, wants a reset) is left out, with the reason in `troubles`; NVML is opened
    anew for the next reading. The GPU of a Jetson up to Orin has a name in NVML and little else: its driver, nvgpu,
    answers Not Supported or zeros, so that only the name is taken; `JetsonSensor` has the rest. On Thor NVML answers
    half.
    https://github.com/nicolargo/glances/pull/3580, https://github.com/wentbackward/nv-monitor/pull/17,
    https://docs.nvidia.com/jetson/archives/r38.2/DeveloperGuide/SD/PlatformPowerAndPerformance/JetsonThor.html#gpu-management-tool

    Raises `GpuUnavailable` where there is no NVML.
    """

    def __init__(self) -> None:
        self._nvml = _module()
        self._events: Any = None
        self._devices: list[Any] | None = None
        self._xids: dict[int, tuple[int, float]] = {}
        try:
            self._nvml.nvmlInit()
        except self._nvml.NVMLError as error:
            if error.value == self._nvml.NVML_ERROR_LIBRARY_NOT_FOUND:
                raise GpuUnavailable("there is no libnvidia-ml.so.1 here: install NVIDIA's driver") from error
            return  # the driver may come yet: `read` tries again
        self._opened()

    def read(self) -> Readings:
        """Some twenty calls a GPU into the driver: not on the event loop."""
        gpus, lost = [], []
        for index, device in enumerate(self._open()):
            try:
                gpus.append(self._gpu(index, device))
            except _Lost as error:
                lost.append(self._told(index, error))
        if lost or not gpus:
            self.close()
        if not gpus:
            raise GpuUnavailable("; ".join(lost) or "NVML sees no GPU")
        return Readings(gpus=gpus, troubles={"nvml": "; ".join(lost)} if lost else {})

    def close(self) -> None:
        if self._devices is None:
            return
        self._devices = None
        events, self._events = self._events, None
        for call, arguments in (("nvmlEventSetFree", (events,)), ("nvmlShutdown", ())):
            if arguments != (None,):
                self._quietly(call, *arguments)

    def _open(self) -> list[Any]:
        if self._devices is None:
            try:
                self._nvml.nvmlInit()
            except self._nvml.NVMLError as error:
                raise GpuUnavailable(f"NVML cannot be opened: {error}; `nvidia-smi` may tell why") from error
            self._opened()
        self._hear_events()
        return self._devices or []

    def _opened(self) -> None:
        count = self._quietly("nvmlDeviceGetCount") or 0
        self._devices = [self._quietly("nvmlDeviceGetHandleByIndex", index) for index in range(count)]
        self._events = self._quietly("nvmlEventSetCreate")
        for device in self._devices:
            if device is not None and self._events is not None:
                self._quietly(
                    "nvmlDeviceRegisterEvents", device, self._nvml.nvmlEventTypeXidCriticalError, self._events
                )

    def _hear_events(self) -> None:
        """Take what the driver said since: the last critical error (XID) of each GPU."""
        indices = {_address(device): index for index, device in enumerate(self._devices or []) if device is not None}
        for _ in range(_MOST_EVENTS):
            event = self._quietly("nvmlEventSetWait_v2", self._events, 0) if self._events is not None else None
            if event is None:
                return
            index = indices.get(_address(event.device))
            if index is not None and event.eventType == self._nvml.nvmlEventTypeXidCriticalError:
                self._xids[index] = int(event.eventData), time.monotonic()

    def _gpu(self, index: int, device: Any) -> GpuReadings:
        if device is None:
            raise _Lost(self._why_not(index))
        xid, at = self._xids.get(index, (None, 0.0))
        known = GpuReadings(
            index=index,
            name=self._ask("nvmlDeviceGetName", device),
            uuid=self._ask("nvmlDeviceGetUUID", device),
            driver=self._ask("nvmlSystemGetDriverVersion"),
            last_xid=xid,
            last_xid_age_s=None if xid is None else round(time.monotonic() - at, 1),
        )
        return known if "nvgpu" in (known.name or "") else self._measured(known, device)

    def _measured(self, known: GpuReadings, device: Any) -> GpuReadings:
        nvml = self._nvml
        busy = self._ask("nvmlDeviceGetUtilizationRates", device)
        memory = self._ask("nvmlDeviceGetMemoryInfo", device)
        total = _number(memory.total if memory else None) or None  # 0 where the GPU has none of its own
        ecc = self._ask(
            "nvmlDeviceGetTotalEccErrors", device, nvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED, nvml.NVML_VOLATILE_ECC
        )
        return replace(
            known,
            utilisation_percent=_number(busy.gpu if busy else None),
            encoder_percent=self._share("nvmlDeviceGetEncoderUtilization", device),
            decoder_percent=self._share("nvmlDeviceGetDecoderUtilization", device),
            memory_total_mb=_scaled(total, 1e-6),
            memory_used_mb=_scaled(memory.used if memory and total else None, 1e-6),
            temperature_c=_number(self._ask("nvmlDeviceGetTemperature", device, nvml.NVML_TEMPERATURE_GPU)),
            power_w=_scaled(self._ask("nvmlDeviceGetPowerUsage", device), 1e-3),
            power_limit_w=_scaled(self._ask("nvmlDeviceGetEnforcedPowerLimit", device), 1e-3),
            sm_mhz=_number(self._ask("nvmlDeviceGetClockInfo", device, nvml.NVML_CLOCK_SM)),
            memory_mhz=_number(self._ask("nvmlDeviceGetClockInfo", device, nvml.NVML_CLOCK_MEM)),
            throttle_reasons=self._throttle_reasons(device),
            ecc_uncorrected=_number(ecc),
        )

    def _share(self, call: str, device: Any) -> int | None:
        answer = self._ask(call, device)  # and how long it was measured
        return _number(answer[0]) if answer else None

    def _throttle_reasons(self, device: Any) -> list[str] | None:
        mask = self._ask("nvmlDeviceGetCurrentClocksEventReasons", device)
        if mask is None:  # a driver before 535
            mask = self._ask("nvmlDeviceGetCurrentClocksThrottleReasons", device)
        return None if mask is None else [name for bit, name in _REASONS.items() if mask & bit]

    def _ask(self, call: str, *arguments: Any) -> Any:
        """The answer; None where it is not to be had. Raises `_Lost`."""
        nvml = self._nvml
        try:
            return getattr(nvml, call)(*arguments)
        except nvml.NVMLError as error:
            if error.value in (
                nvml.NVML_ERROR_GPU_IS_LOST,
                nvml.NVML_ERROR_RESET_REQUIRED,
                nvml.NVML_ERROR_UNINITIALIZED,
                nvml.NVML_ERROR_DRIVER_NOT_LOADED,
                nvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH,
            ):
                raise _Lost(str(error)) from error
            return None
        except (AttributeError, UnicodeDecodeError):  # a module too old to know it; a name that is none
            return None

    def _quietly(self, call: str, *arguments: Any) -> Any:
        try:
            return self._ask(call, *arguments)
        except _Lost:
            return None

    def _why_not(self, index: int) -> str:
        """Why a GPU could not be opened."""
        try:
            self._nvml.nvmlDeviceGetHandleByIndex(index)
        except self._nvml.NVMLError as error:
            return str(error)
        return "it could not be opened"

    def _told(self, index: int, error: _Lost) -> str:
        xid = f" (XID {self._xids[index][0]})" if index in self._xids else ""
        return f"GPU {index}: {error}{xid}"


def _module() -> Any:
    try:
        import pynvml
    except ImportError as error:
        raise GpuUnavailable("NVML needs the Python module 'pynvml': pip install 'edge-agent[nvml]'") from error
    return pynvml


def _address(device: Any) -> int | None:
    return ctypes.cast(device, ctypes.c_void_p).value


def _number(value: Any) -> int | None:
    return None if value is None or value in _ABSENT else int(value)


def _scaled(value: Any, scale: float) -> float | None:
    number = _number(value)
    return None if number is None else round(number * scale, 2)


Sensor = NvmlSensor
