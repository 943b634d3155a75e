"""NVIDIA's GPUs through the real `pynvml`, on a libnvidia-ml of our own that answers or refuses as it is told."""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from edge_agent.errors import GpuUnavailable
from edge_agent.readings import GpuReadings
from edge_agent.sensors import detect
from edge_agent.sensors.nvml import NvmlSensor
from tests.rigs import ROOT, need_program

pynvml = pytest.importorskip("pynvml", reason="nvidia-ml-py is not installed: pip install nvidia-ml-py")

NOT_SUPPORTED, NO_PERMISSION, DRIVER_NOT_LOADED = 3, 4, 9
FUNCTION_NOT_FOUND, LOST, RESET_REQUIRED = 13, 15, 16
UNKNOWN = 999

SOURCE = r"""
#include <stdio.h>
#include <string.h>

typedef struct { unsigned index; } Device;
typedef struct { unsigned gpu, memory; } Utilization;
typedef struct { unsigned long long total, free, used; } Memory;
typedef struct { Device *device; unsigned long long type, data; unsigned gi, ci; } Event;

static Device devices[4] = {{0}, {1}, {2}, {3}};
static struct { char call[64]; int error; } refusals[64];
static int refused, lost[4], opened, sets, registered;
static unsigned count = 1;
static unsigned long long memory_total = 85520809984ull, reasons;
static char name[96] = "NVIDIA H100 80GB HBM3";
static Event events[16];
static int heard;

void fake_reset(void) {
    refused = opened = sets = registered = heard = 0;
    count = 1; memory_total = 85520809984ull; reasons = 0;
    memset(lost, 0, sizeof lost);
    strcpy(name, "NVIDIA H100 80GB HBM3");
}
void fake_refuse(const char *call, int error) {
    strcpy(refusals[refused].call, call);
    refusals[refused++].error = error;
}
void fake_relent(void) { refused = 0; }
void fake_count(unsigned n) { count = n; }
void fake_lose(unsigned index, int error) { lost[index] = error; }
void fake_name(const char *to) { strcpy(name, to); }
void fake_memory(unsigned long long total) { memory_total = total; }
void fake_reasons(unsigned long long mask) { reasons = mask; }
void fake_event(unsigned index, unsigned long long type, unsigned long long data) {
    events[heard++] = (Event){&devices[index], type, data, 0xffffffff, 0xffffffff};
}
int fake_opened(void) { return opened; }
int fake_sets(void) { return sets; }
int fake_registered(void) { return registered; }

static int answer(const char *call, Device *device) {
    if (!opened && strcmp(call, "nvmlInitWithFlags")) return 1;
    if (device && lost[device->index]) return lost[device->index];
    for (int i = 0; i < refused; i++)
        if (!strcmp(refusals[i].call, call)) return refusals[i].error;
    return 0;
}
#define ASK(device) do { int error = answer(__func__, device); if (error) return error; } while (0)

int nvmlInitWithFlags(unsigned flags) { ASK(0); opened++; return 0; }
int nvmlShutdown(void) { ASK(0); opened--; return 0; }
const char *nvmlErrorString(int error) { return "told by the library"; }
int nvmlSystemGetDriverVersion(char *to, unsigned size) { ASK(0); snprintf(to, size, "580.159.04"); return 0; }
int nvmlDeviceGetCount_v2(unsigned *to) { ASK(0); *to = count; return 0; }
int nvmlDeviceGetHandleByIndex_v2(unsigned index, Device **to) {
    if (index >= count) return 2;
    ASK(&devices[index]); *to = &devices[index]; return 0;
}
int nvmlDeviceGetName(Device *d, char *to, unsigned size) { ASK(d); snprintf(to, size, "%s", name); return 0; }
int nvmlDeviceGetUUID(Device *d, char *to, unsigned size) { ASK(d); snprintf(to, size, "GPU-%u", d->index); return 0; }
int nvmlDeviceGetUtilizationRates(Device *d, Utilization *to) { ASK(d); *to = (Utilization){37, 12}; return 0; }
int nvmlDeviceGetEncoderUtilization(Device *d, unsigned *to, unsigned *us) { ASK(d); *to = 5; *us = 167000; return 0; }
int nvmlDeviceGetDecoderUtilization(Device *d, unsigned *to, unsigned *us) { ASK(d); *to = 64; *us = 167000; return 0; }
int nvmlDeviceGetMemoryInfo(Device *d, Memory *to) {
    ASK(d); *to = (Memory){memory_total, memory_total / 4 * 3, memory_total / 4}; return 0;
}
int nvmlDeviceGetTemperature(Device *d, unsigned sensor, unsigned *to) { ASK(d); *to = sensor ? 0 : 41; return 0; }
int nvmlDeviceGetPowerUsage(Device *d, unsigned *to) { ASK(d); *to = 118250; return 0; }
int nvmlDeviceGetEnforcedPowerLimit(Device *d, unsigned *to) { ASK(d); *to = 700000; return 0; }
int nvmlDeviceGetClockInfo(Device *d, unsigned type, unsigned *to) { ASK(d); *to = type == 1 ? 1980 : 2619; return 0; }
int nvmlDeviceGetTotalEccErrors(Device *d, unsigned kind, unsigned counter, unsigned long long *to) {
    ASK(d); *to = kind == 1 && counter == 0 ? 2 : 77; return 0;
}
int nvmlDeviceGetCurrentClocksEventReasons(Device *d, unsigned long long *to) { ASK(d); *to = reasons; return 0; }
int nvmlDeviceGetCurrentClocksThrottleReasons(Device *d, unsigned long long *to) { ASK(d); *to = reasons; return 0; }
int nvmlEventSetCreate(void **to) { ASK(0); sets++; *to = events; return 0; }
int nvmlEventSetFree(void *set) { ASK(0); sets--; return 0; }
int nvmlDeviceRegisterEvents(Device *d, unsigned long long types, void *set) {
    ASK(d); if (types != 8 || set != events) return 2; registered++; return 0;
}
int nvmlEventSetWait_v2(void *set, Event *to, unsigned ms) {
    ASK(0); if (ms || set != events) return 2;
    if (!heard) return 10;
    *to = events[0];
    memmove(events, events + 1, sizeof(Event) * --heard);
    return 0;
}
"""

WHOLE = GpuReadings(
    index=0,
    name="NVIDIA H100 80GB HBM3",
    uuid="GPU-0",
    driver="580.159.04",
    utilisation_percent=37,
    encoder_percent=5,
    decoder_percent=64,
    memory_total_mb=85520.81,
    memory_used_mb=21380.2,
    temperature_c=41,
    power_w=118.25,
    power_limit_w=700.0,
    sm_mhz=1980,
    memory_mhz=2619,
    throttle_reasons=[],
    ecc_uncorrected=2,
    last_xid=None,
)
FACTS = {
    "nvmlDeviceGetName": ("name",),
    "nvmlDeviceGetUUID": ("uuid",),
    "nvmlSystemGetDriverVersion": ("driver",),
    "nvmlDeviceGetUtilizationRates": ("utilisation_percent",),
    "nvmlDeviceGetEncoderUtilization": ("encoder_percent",),
    "nvmlDeviceGetDecoderUtilization": ("decoder_percent",),
    "nvmlDeviceGetMemoryInfo": ("memory_total_mb", "memory_used_mb"),
    "nvmlDeviceGetTemperature": ("temperature_c",),
    "nvmlDeviceGetPowerUsage": ("power_w",),
    "nvmlDeviceGetEnforcedPowerLimit": ("power_limit_w",),
    "nvmlDeviceGetClockInfo": ("sm_mhz", "memory_mhz"),
    "nvmlDeviceGetTotalEccErrors": ("ecc_uncorrected",),
    "nvmlDeviceGetCurrentClocksEventReasons": (),  # ThrottleReasons are asked instead
    "nvmlEventSetCreate": (),
    "nvmlDeviceRegisterEvents": (),
    "nvmlEventSetWait_v2": (),
}


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A libnvidia-ml.so.1 that does as it is told."""
    compiler = need_program("gcc", "gcc")
    folder = tmp_path_factory.mktemp("nvml")
    (folder / "nvml.c").write_text(SOURCE)
    subprocess.run(
        [compiler, "-shared", "-fPIC", "-O1", "-o", str(folder / "libnvidia-ml.so.1"), str(folder / "nvml.c")],
        check=True,
    )
    return folder / "libnvidia-ml.so.1"


@pytest.fixture
def loader(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """`pynvml` as just imported, that finds no library."""

    def missing(name: str) -> Any:
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(pynvml, "nvmlLib", None)
    monkeypatch.setattr(pynvml, "_nvmlLib_refcount", 0)
    monkeypatch.setattr(pynvml, "_nvmlGetFunctionPointer_cache", {})
    monkeypatch.setattr(pynvml, "CDLL", missing)
    yield monkeypatch


@pytest.fixture
def driver(library: Path, loader: pytest.MonkeyPatch) -> Iterator[ctypes.CDLL]:
    """The library, in the place of the driver's; whatever a test opened, it must close."""
    fake = ctypes.CDLL(str(library))
    fake.fake_event.argtypes = [ctypes.c_uint, ctypes.c_ulonglong, ctypes.c_ulonglong]
    fake.fake_memory.argtypes = fake.fake_reasons.argtypes = [ctypes.c_ulonglong]
    fake.fake_reset()
    loader.setattr(pynvml, "CDLL", {"libnvidia-ml.so.1": fake}.__getitem__)
    yield fake
    assert (fake.fake_opened(), fake.fake_sets()) == (0, 0), "NVML was not closed"


@pytest.fixture
def sensor(driver: ctypes.CDLL) -> Iterator[NvmlSensor]:
    made = NvmlSensor()
    yield made
    made.close()


def only(sensor: NvmlSensor) -> GpuReadings:
    readings = sensor.read()
    assert readings.gpus is not None
    assert readings.troubles == {}
    (gpu,) = readings.gpus
    return gpu


def test_all_that_nvml_tells_is_read_in_its_units(sensor: NvmlSensor) -> None:
    assert only(sensor) == WHOLE


@pytest.mark.parametrize("error", [NOT_SUPPORTED, NO_PERMISSION, FUNCTION_NOT_FOUND, UNKNOWN, 4242])
@pytest.mark.parametrize("call", FACTS)
def test_what_one_call_refuses_is_absent_and_the_others_are_there(driver: ctypes.CDLL, call: str, error: int) -> None:
    driver.fake_refuse(call.encode(), error)
    sensor = NvmlSensor()
    assert only(sensor) == msgspec.structs.replace(WHOLE, **dict.fromkeys(FACTS[call]))
    sensor.close()


def test_no_call_is_left_out_of_those_that_are_refused(sensor: NvmlSensor) -> None:
    only(sensor)
    opening = {"nvmlInitWithFlags", "nvmlDeviceGetCount_v2", "nvmlDeviceGetHandleByIndex_v2"}
    assert set(pynvml._nvmlGetFunctionPointer_cache) - opening == set(FACTS)


def test_a_gpu_that_may_not_be_opened_says_why(driver: ctypes.CDLL) -> None:
    driver.fake_refuse(b"nvmlDeviceGetHandleByIndex_v2", NO_PERMISSION)
    sensor = NvmlSensor()
    with pytest.raises(GpuUnavailable, match=r"^GPU 0: Insufficient Permissions$"):
        sensor.read()
    driver.fake_relent()
    assert only(sensor) == WHOLE
    sensor.close()


def test_a_tegra_that_answers_half_has_that_half(driver: ctypes.CDLL, sensor: NvmlSensor) -> None:
    """As on Thor: there is no memory of its own, no limit and no ECC, but load, codecs and a name."""
    driver.fake_name(b"NVIDIA Thor")
    refused = ["MemoryInfo", "EnforcedPowerLimit", "TotalEccErrors", "PowerUsage", "ClockInfo", "Temperature"]
    refused += ["CurrentClocksEventReasons", "CurrentClocksThrottleReasons"]
    for name in refused:
        driver.fake_refuse(f"nvmlDeviceGet{name}".encode(), NOT_SUPPORTED)
    assert only(sensor) == GpuReadings(
        index=0,
        name="NVIDIA Thor",
        uuid="GPU-0",
        driver="580.159.04",
        utilisation_percent=37,
        encoder_percent=5,
        decoder_percent=64,
    )


def test_of_nvgpu_only_the_name_is_believed(driver: ctypes.CDLL, sensor: NvmlSensor) -> None:
    driver.fake_name(b"Orin (nvgpu)")
    assert only(sensor) == GpuReadings(index=0, name="Orin (nvgpu)", uuid="GPU-0", driver="580.159.04")


def test_a_gpu_that_has_no_memory_of_its_own_has_none_used(driver: ctypes.CDLL, sensor: NvmlSensor) -> None:
    driver.fake_memory(0)
    gpu = only(sensor)
    assert (gpu.memory_total_mb, gpu.memory_used_mb, gpu.temperature_c) == (None, None, 41)


def test_a_value_that_nvml_calls_not_available_is_absent(driver: ctypes.CDLL, sensor: NvmlSensor) -> None:
    driver.fake_memory(2**64 - 1)
    assert only(sensor).memory_total_mb is None


@pytest.mark.parametrize(
    ("mask", "reasons"),
    [
        (0x1, []),  # idle
        (0x4 | 0x20, ["sw_power_cap", "sw_thermal_slowdown"]),
        (0x1 | 0x8 | 0x40, ["hw_slowdown", "hw_thermal_slowdown"]),
        (0x2 | 0x10 | 0x80 | 0x100, None),
    ],
)
def test_what_holds_the_clocks_back_is_named(
    driver: ctypes.CDLL, sensor: NvmlSensor, mask: int, reasons: list[str] | None
) -> None:
    driver.fake_reasons(mask)
    if reasons is None:
        reasons = ["applications_clocks_setting", "sync_boost", "hw_power_brake_slowdown", "display_clock_setting"]
    assert only(sensor).throttle_reasons == reasons


def test_a_driver_too_old_for_the_new_question_is_asked_the_old_one(driver: ctypes.CDLL, sensor: NvmlSensor) -> None:
    driver.fake_refuse(b"nvmlDeviceGetCurrentClocksEventReasons", FUNCTION_NOT_FOUND)
    driver.fake_reasons(0x40)
    assert only(sensor).throttle_reasons == ["hw_thermal_slowdown"]


def test_the_last_critical_error_of_a_gpu_is_kept(driver: ctypes.CDLL) -> None:
    driver.fake_count(2)
    sensor = NvmlSensor()
    driver.fake_event(1, 8, 31)
    driver.fake_event(0, 4, 99)  # a change of the performance state, which nobody asked for
    driver.fake_event(1, 8, 79)
    for _ in range(2):
        assert [gpu.last_xid for gpu in sensor.read().gpus or []] == [None, 79]
    sensor.close()


@pytest.mark.parametrize("error", [LOST, RESET_REQUIRED])
def test_a_lost_gpu_is_left_out_with_the_reason_and_the_others_are_read(driver: ctypes.CDLL, error: int) -> None:
    driver.fake_count(3)
    sensor = NvmlSensor()
    driver.fake_event(1, 8, 79)
    driver.fake_lose(1, error)
    readings = sensor.read()
    assert [gpu.uuid for gpu in readings.gpus or []] == ["GPU-0", "GPU-2"]
    reason = {LOST: "GPU is lost", RESET_REQUIRED: "GPU requires restart"}[error]
    assert readings.troubles == {"nvml": f"GPU 1: {reason} (XID 79)"}
    sensor.close()


def test_a_gpu_that_comes_back_is_read_again(driver: ctypes.CDLL) -> None:
    sensor = NvmlSensor()
    driver.fake_lose(0, LOST)
    for _ in range(2):
        with pytest.raises(GpuUnavailable, match=r"^GPU 0: GPU is lost$"):
            sensor.read()
        assert driver.fake_opened() == 0
    driver.fake_lose(0, 0)
    assert only(sensor) == WHOLE
    sensor.close()


def test_a_gpu_that_is_lost_in_the_middle_of_a_reading_is_absent_as_a_whole(driver: ctypes.CDLL) -> None:
    sensor = NvmlSensor()
    driver.fake_refuse(b"nvmlDeviceGetPowerUsage", LOST)
    with pytest.raises(GpuUnavailable, match="GPU is lost"):
        sensor.read()
    driver.fake_relent()
    assert only(sensor) == WHOLE
    sensor.close()


def test_a_driver_that_comes_later_is_found(driver: ctypes.CDLL) -> None:
    driver.fake_refuse(b"nvmlInitWithFlags", DRIVER_NOT_LOADED)
    sensor = NvmlSensor()
    for _ in range(2):
        with pytest.raises(GpuUnavailable, match="Driver Not Loaded"):
            sensor.read()
    driver.fake_relent()
    assert only(sensor) == WHOLE
    sensor.close()


def test_a_driver_without_a_gpu_says_so_and_is_asked_again(driver: ctypes.CDLL) -> None:
    driver.fake_count(0)
    sensor = NvmlSensor()
    with pytest.raises(GpuUnavailable, match="NVML sees no GPU"):
        sensor.read()
    driver.fake_count(1)
    assert only(sensor) == WHOLE
    sensor.close()


def test_events_are_asked_of_every_gpu_once(driver: ctypes.CDLL) -> None:
    driver.fake_count(4)
    sensor = NvmlSensor()
    for _ in range(3):
        sensor.read()
    assert driver.fake_registered() == 4
    sensor.close()


def test_closing_twice_closes_once(driver: ctypes.CDLL) -> None:
    sensor = NvmlSensor()
    for _ in range(2):
        sensor.close()
        assert driver.fake_opened() == 0


def test_without_the_library_the_reason_says_what_to_install(loader: pytest.MonkeyPatch) -> None:
    with pytest.raises(GpuUnavailable, match=r"no libnvidia-ml\.so\.1 here: install NVIDIA's driver"):
        NvmlSensor()


def test_without_the_python_module_the_reason_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    with pytest.raises(GpuUnavailable, match=r"pip install 'edge-agent\[nvml\]'"):
        NvmlSensor()


def test_a_machine_without_nvml_is_read_without_it(tmp_path: Path, loader: pytest.MonkeyPatch) -> None:
    sensors = detect(root=tmp_path)
    readings = sensors.read()
    assert sensors.names == ["host"]
    assert (readings.gpus, readings.troubles) == (None, {})
    assert readings.host is not None
    sensors.close()


def test_a_lost_gpu_does_not_keep_the_host_from_being_read(tmp_path: Path, driver: ctypes.CDLL) -> None:
    sensors = detect(root=tmp_path)
    assert [gpu.uuid for gpu in sensors.read().gpus or []] == ["GPU-0"]
    driver.fake_lose(0, LOST)
    readings = sensors.read()
    assert readings.gpus is None
    assert readings.troubles == {"nvml": "GPU 0: GPU is lost"}
    assert readings.host is not None
    sensors.close()


def test_the_library_is_found_where_the_system_looks_for_it(library: Path) -> None:
    code = (
        "import msgspec; from edge_agent.sensors.nvml import NvmlSensor; sensor = NvmlSensor();"
        "print(msgspec.json.encode(sensor.read().gpus).decode()); sensor.close()"
    )
    environment = os.environ | {"LD_LIBRARY_PATH": str(library.parent)}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )
    assert json.loads(done.stdout) == [msgspec.to_builtins(WHOLE)]
