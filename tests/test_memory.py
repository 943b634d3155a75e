"""What was freed goes back to the system, where the C library would keep it."""

from __future__ import annotations

import ctypes
import subprocess
import sys

import numpy as np
import psutil
import pytest

from edge_agent import memory
from edge_agent.config import InferenceOptions
from edge_agent.models.loaded import open_model
from edge_agent.models.store import ModelStore

BLOCK = 100_000  # below what glibc maps, and unmaps, one by one


def rss_mb() -> float:
    return psutil.Process().memory_info().rss / 1e6


def scattered() -> list[object]:
    """One block in twenty of 100 MB; the others were freed and stay in the heap between these."""
    return [np.ones(BLOCK, np.uint8) for _ in range(1000)][::20]


@pytest.fixture(autouse=True)
def _glibc() -> None:
    if not hasattr(ctypes.CDLL(None), "malloc_trim"):
        pytest.skip("the C library has no malloc_trim: it is not glibc")
    memory.give_back()


def test_what_was_freed_between_blocks_in_use_goes_back() -> None:
    before = rss_mb()
    kept = scattered()
    assert rss_mb() > before + 80, "it stays by itself"
    assert memory.give_back()
    assert rss_mb() < before + 20
    assert all(np.all(block == 1) for block in kept)


def test_a_model_that_is_closed_leaves_nothing_behind_that_was_freed() -> None:
    model = open_model(ModelStore({}).get("demo-160"), backend="onnx", backends={}, inference=InferenceOptions())
    model.warm_up()
    before = rss_mb()
    kept = scattered()
    assert rss_mb() > before + 80
    model.close()
    assert rss_mb() < before + 20
    assert len(kept) == 50


ARENAS = """
import ctypes, sys, threading, numpy as np
from edge_agent import memory
if sys.argv[1] == "shared":
    assert memory.share_arenas()
for _ in range(6):
    begun, go_on = threading.Event(), threading.Event()
    threading.Thread(target=lambda: (np.ones(1000), begun.set(), go_on.wait()), daemon=True).start()
    begun.wait()
info = ctypes.CDLL(None).malloc_info
libc = ctypes.CDLL(None)
libc.fopen.restype = ctypes.c_void_p
file = libc.fopen(b"/dev/stdout", b"w")
info(0, ctypes.c_void_p(file))
libc.fflush(ctypes.c_void_p(file))
"""


def test_threads_share_arenas() -> None:
    if not hasattr(ctypes.CDLL(None), "malloc_info"):
        pytest.skip("the C library has no arenas: it is not glibc")
    arenas = {}
    for how in ("shared", "own"):
        told = subprocess.run([sys.executable, "-c", ARENAS, how], capture_output=True, text=True, check=True).stdout
        arenas[how] = told.count("<heap nr=")
    assert arenas["shared"] == 2 < arenas["own"]
