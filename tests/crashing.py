"""Families that take down or hold up the process that makes them: stand-ins for a TensorRT that does so."""

from __future__ import annotations

import os
import signal
import time
from typing import Any

from edge_agent.families.yolo import YoloFamily


class KilledFamily(YoloFamily):
    def __init__(self, meaning: Any) -> None:
        os.kill(os.getpid(), signal.SIGKILL)


class BuggyFamily(YoloFamily):
    def __init__(self, meaning: Any) -> None:
        raise ZeroDivisionError("a bug in the build process")


class SlowFamily(YoloFamily):
    def __init__(self, meaning: Any) -> None:
        time.sleep(600)
