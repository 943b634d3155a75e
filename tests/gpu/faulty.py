"""A YOLO family that plants a fault: its hundredth picture lets a kernel write where nothing is."""

from __future__ import annotations

import ctypes
import time
from typing import Any

import structlog

from edge_agent import cuda
from edge_agent.families.yolo import YoloFamily

_SOURCE = 'extern "C" __global__ void fault(int* nowhere) { *nowhere = 1; }'
_AFTER = 100

log = structlog.get_logger()


def fault() -> None:
    """Start a kernel that writes to address 64."""
    gpu = cuda.open_gpu()
    gpu.enter()
    kernels = cuda.Kernels(gpu, "fault", _SOURCE, cache=None)
    kernels.launch("fault", cuda.Stream(), (1, 1, 1), (1, 1, 1), (ctypes.c_uint64(64),))


class FaultyFamily(YoloFamily):
    seen = 0

    def decode(self, candidates: Any, placement: Any) -> Any:
        FaultyFamily.seen += 1
        if FaultyFamily.seen == _AFTER:
            fault()
            log.warning("gpu.fault_planted", monotonic_s=time.monotonic())
        return super().decode(candidates, placement)
