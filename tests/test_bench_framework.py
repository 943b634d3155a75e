"""The instruments of `benchmarks.framework`: what they count and time is what there was."""

import json
import os
import subprocess
import sys
import textwrap
import threading
import time
from argparse import ArgumentTypeError

import pytest

from benchmarks import _threads, framework
from benchmarks._counting import CannotCount, Counter
from benchmarks._figures import Runs
from tests.rigs import need_program

MIB = 1 << 20


@pytest.fixture
def counter(tmp_path):
    try:
        return Counter(tmp_path)
    except CannotCount as error:
        pytest.skip(str(error))


def counted(counter, tmp_path, script):
    """What a part of a program, between two lines that it prints, has allocated and copied."""
    program = tmp_path / "program.py"
    program.write_text(textwrap.dedent(script))
    environ = {**os.environ, **counter.environ}
    with subprocess.Popen(
        [sys.executable, str(program)], env=environ, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as running:
        running.stdout.readline()
        before = counter.read()
        running.stdin.write(b"go\n")
        running.stdin.flush()
        running.stdout.readline()
        large = counter.read() - before
        running.communicate(b"end\n")
    assert running.returncode == 0
    return large


PICTURES = """
    import sys
    import numpy as np
    picture, other = np.zeros((720, 1280, 3), np.uint8), np.zeros((720, 1280, 3), np.uint8)
    print("ready", flush=True)
    sys.stdin.readline()
    for _ in range(10):
        {}
    print("done", flush=True)
    sys.stdin.readline()
"""


def test_a_deliberate_copy_of_a_picture_is_counted_as_one_allocation_and_its_bytes(counter, tmp_path):
    large = counted(counter, tmp_path, PICTURES.format("other = picture.copy()"))
    assert large.heap == 10
    assert large.heap_bytes == 10 * 1280 * 720 * 3
    assert large.copied_bytes >= 10 * 1280 * 720 * 3


def test_a_copy_into_a_buffer_that_is_there_counts_as_copied_alone(counter, tmp_path):
    large = counted(counter, tmp_path, PICTURES.format("np.copyto(other, picture)"))
    assert large.allocations == 0
    assert large.copied_bytes >= 10 * 1280 * 720 * 3


def test_small_things_are_not_counted(counter, tmp_path):
    large = counted(counter, tmp_path, PICTURES.format("small = bytes(bytearray(2000))"))
    assert (large.allocations, large.copies) == (0, 0)


def test_every_way_to_ask_for_memory_is_counted(counter, tmp_path):
    script = """
        import ctypes, mmap, sys
        c = ctypes.CDLL(None)
        for name in ("malloc", "calloc", "realloc", "aligned_alloc", "memalign"):
            getattr(c, name).restype = ctypes.c_void_p
        size, kept = ctypes.c_size_t(1 << 20), ctypes.c_void_p()
        print("ready", flush=True)
        sys.stdin.readline()
        c.malloc(size)
        c.calloc(ctypes.c_size_t(2), ctypes.c_size_t(1 << 19))
        c.realloc(None, size)
        c.aligned_alloc(ctypes.c_size_t(64), size)
        c.memalign(ctypes.c_size_t(64), size)
        assert c.posix_memalign(ctypes.byref(kept), ctypes.c_size_t(64), size) == 0
        assert kept.value % 64 == 0
        assert c.posix_memalign(ctypes.byref(kept), ctypes.c_size_t(3), size) != 0
        pages = mmap.mmap(-1, 1 << 20)
        print("done", flush=True)
        sys.stdin.readline()
    """
    large = counted(counter, tmp_path, script)
    assert (large.heap, large.heap_bytes) == (6, 6 * MIB)
    assert (large.maps, large.mapped_bytes) == (1, MIB)


def test_a_move_over_itself_is_done_right_and_counted(counter, tmp_path):
    script = """
        import ctypes, sys
        whole = bytes(range(256)) * 64
        data = ctypes.create_string_buffer(whole, len(whole))
        start = ctypes.addressof(data)
        print("ready", flush=True)
        sys.stdin.readline()
        ctypes.memmove(start + 100, start, 8192)
        assert data.raw[100:8292] == whole[:8192]
        ctypes.memmove(start, start + 100, 8192)
        assert data.raw[:8192] == whole[:8192]
        print("done", flush=True)
        sys.stdin.readline()
    """
    assert counted(counter, tmp_path, script).copied_bytes >= 2 * 8192


def test_without_the_library_nothing_is_told(counter):
    with pytest.raises(CannotCount, match="was not loaded"):
        counter.read()


def test_a_missing_compiler_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(CannotCount, match="cc is not installed: apt-get install gcc libc6-dev"):
        Counter(tmp_path)


@pytest.mark.parametrize(
    ("name", "is_main", "stage"),
    [
        ("python", True, "event loop"),
        ("capture:front", False, "capture"),
        ("engine", False, "engine"),
        ("spool_0", False, "others"),
    ],
)
def test_threads_are_told_apart_by_their_names(name, is_main, stage):
    assert _threads.stage(name, is_main=is_main) == stage


def test_the_cpu_of_a_thread_is_its_stage_s_and_that_of_one_which_ended_is_of_others():
    script = """
        import sys, threading, time
        from benchmarks import _threads
        _threads.tell_the_kernel()
        def burn(seconds, then):
            until = time.thread_time() + seconds
            while time.thread_time() < until:
                pass
            then()
        go, done, stop = threading.Event(), threading.Event(), threading.Event()
        def engine():
            go.wait()
            burn(0.3, lambda: (done.set(), stop.wait()))
        threading.Thread(target=engine, name="engine").start()
        print("ready", flush=True)
        sys.stdin.readline()
        short = threading.Thread(target=burn, args=(0.2, int), name="capture:short")
        short.start()
        short.join()
        go.set()
        done.wait()
        print("done", flush=True)
        sys.stdin.readline()
        stop.set()
    """
    with subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=framework.__file__.rsplit("/", 2)[0],
    ) as running:
        running.stdout.readline()
        before = _threads.read(running.pid)
        running.stdin.write(b"go\n")
        running.stdin.flush()
        running.stdout.readline()
        time.sleep(0.05)  # the kernel counts what a thread has taken when it lets go of it
        spent = _threads.read(running.pid).since(before)
        running.communicate(b"end\n")
    assert spent["engine"] == pytest.approx(300, rel=0.15)
    assert spent["others"] == pytest.approx(200, rel=0.15)
    assert spent["capture"] == 0


def test_added_latency_is_from_capture_to_arrival_less_the_engine_s_own_time():
    result = {"captured_at": "2026-01-31T12:00:00.250000Z", "latency_ms": {"inference": 2.5}}
    at_s, added_ms = framework.added_latency(f"1769860800.256000000 {json.dumps(result)}")
    assert at_s == pytest.approx(1769860800.256)
    assert added_ms == pytest.approx(3.5, abs=0.01)


def test_cameras_are_a_list_of_different_numbers():
    assert framework.numbers_of("1,4,16") == [1, 4, 16]
    for wrong in ("", "0", "1,1", "one"):
        with pytest.raises(ArgumentTypeError, match="not a list of numbers of cameras"):
            framework.numbers_of(wrong)


def test_the_cost_with_many_cameras_is_judged_beside_that_with_the_first_in_the_same_repeat():
    runs = Runs()
    for one, many in ((0.5, 0.54), (0.6, 0.66)):
        runs.add("even 1", {"cpu_ms": one})
        runs.add("even 16", {"cpu_ms": many})
        for number in (1, 16):
            runs.add(f"cameras {number}", {"even": 0.1})
    whole, less = framework.flatness(runs, [1, 16])
    assert whole.ratios == pytest.approx([1.08, 1.1])
    assert (whole.bar, whole.better) == (1.10, "less")
    assert less.ratios == pytest.approx([1.1, 1.12])


@pytest.mark.slow
def test_an_agent_under_load_is_measured_from_outside(tmp_path):
    for name, package in framework.PROGRAMS.items():
        need_program(name, package)
    found = framework.paced(tmp_path, framework.Load(2, 50.0), 1.5)
    assert found["fps"] == pytest.approx(50, rel=0.3)
    assert 0 < found["added_p50_ms"] <= found["added_p99_ms"]
    by_stage = [found[stage] for stage in _threads.STAGES]
    assert min(by_stage[:3]) > 0
    assert sum(by_stage) == pytest.approx(found["cpu_ms"], rel=0.2)
    assert threading.active_count() == 1
