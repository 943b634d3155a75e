"""What the sensors saw of the machine at one moment. Units are in the names; absent is None, never 0."""

from __future__ import annotations

from msgspec import Struct


class HostReadings(Struct, frozen=True, kw_only=True):
    """The machine, whatever its maker. Shares of CPU are since the last reading; `core_percent` is None where cores
    came or went since. `memory_used_mb` is what programs cannot have. `memory_limit_mb` is what the agent's own control
    group may have, where that has a limit, and `memory_limit_used_mb` what it cannot give back of that. `disk_*` is the
    file system of the agent's state; `network_*` counts since boot, over the physical interfaces, or over all but
    loopback where none is physical. `clock_synchronised`: whether the kernel was told that its clock is right (NTP,
    PTP)."""

    cpu_percent: float | None = None
    core_percent: list[float] | None = None
    load_1m: float | None = None
    load_5m: float | None = None
    load_15m: float | None = None
    memory_total_mb: float | None = None
    memory_available_mb: float | None = None
    memory_used_mb: float | None = None
    memory_limit_mb: float | None = None
    memory_limit_used_mb: float | None = None
    swap_total_mb: float | None = None
    swap_used_mb: float | None = None
    disk_total_mb: float | None = None
    disk_free_mb: float | None = None
    network_rx_bytes: int | None = None
    network_tx_bytes: int | None = None
    uptime_s: float | None = None
    clock_synchronised: bool | None = None


class ProcessReadings(Struct, frozen=True, kw_only=True):
    """The agent's own process; its share of one core is since the last reading."""

    cpu_percent: float | None = None
    rss_mb: float | None = None
    threads: int | None = None
    open_files: int | None = None


class GpuReadings(Struct, frozen=True, kw_only=True):
    """A GPU, as NVML tells of it. `memory_used_mb` is what programs cannot have: the driver's reserve, which nvidia-smi
    leaves out, is in it. `throttle_reasons`: what holds its clocks back now; empty is nothing. `ecc_uncorrected` counts
    since the driver was loaded; `last_xid` is the last of the driver's critical errors since the sensor began,
    https://docs.nvidia.com/deploy/xid-errors/."""

    index: int
    name: str | None = None
    uuid: str | None = None
    driver: str | None = None
    utilisation_percent: float | None = None
    encoder_percent: float | None = None
    decoder_percent: float | None = None
    memory_total_mb: float | None = None
    memory_used_mb: float | None = None
    temperature_c: float | None = None
    power_w: float | None = None
    power_limit_w: float | None = None
    sm_mhz: float | None = None
    memory_mhz: float | None = None
    throttle_reasons: list[str] | None = None
    ecc_uncorrected: int | None = None
    last_xid: int | None = None
    last_xid_age_s: float | None = None


class RailReadings(Struct, frozen=True, kw_only=True):
    """A power rail that the board measures."""

    voltage_v: float | None = None
    current_a: float | None = None
    power_w: float | None = None


class BoardReadings(Struct, frozen=True, kw_only=True):
    """A Jetson, as its kernel tells of it. `rails` and `temperatures_c` go by the kernel's names; `power_w` is what
    goes into the module or the board, where a rail measures that. `nvdec_mhz` and `nvenc_mhz` are of the fastest one.
    `throttling`: what slows clocks because of heat, each with its step; empty is nothing."""

    model: str | None = None
    l4t: str | None = None
    jetpack: str | None = None
    power_mode: str | None = None
    gpu_percent: float | None = None
    gpu_mhz: float | None = None
    nvdec_mhz: float | None = None
    nvenc_mhz: float | None = None
    emc_mhz: float | None = None
    temperatures_c: dict[str, float] | None = None
    rails: dict[str, RailReadings] | None = None
    power_w: float | None = None
    fan_percent: float | None = None
    fan_rpm: float | None = None
    throttling: list[str] | None = None


class Readings(Struct, frozen=True, kw_only=True):
    """All of it. `troubles`: why a sensor that is here has nothing to say now, by its name."""

    host: HostReadings | None = None
    process: ProcessReadings | None = None
    gpus: list[GpuReadings] | None = None
    board: BoardReadings | None = None
    troubles: dict[str, str] = {}
