"""What holds for the whole tree: imports, generated documents, logs, threads."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading

import generate_docs
import pytest
from generate_docs.edgectl import edgectl

from edge_agent._compat import errors_unwrapped
from edge_agent.backoff import backoff
from edge_agent.stats import Rate
from edge_agent.threads import OwnerThread, in_thread
from tests import schemas
from tests.rigs import ROOT

HEAVY = ("cv2", "onnxruntime", "tensorrt", "torch", "amqtt", "pynvml", "cuda")


def python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


@pytest.mark.parametrize("module", ["edge_agent", "edge_agent.cli", "edge_agent.agent", "edgectl.app"])
def test_nothing_heavy_is_imported_before_it_is_needed(module: str) -> None:
    loaded = python(f"import sys, {module}; print(*[m for m in {HEAVY!r} if m in sys.modules])")
    assert loaded == ""


def test_importing_the_package_takes_no_more_than_150_ms() -> None:
    clock = "time.process_time()"  # CPU: what else runs on the machine is not in it
    code = f"import time; t = {clock}; import edge_agent, edge_agent.cli; print({clock} - t)"
    assert min(float(python(code)) for _ in range(5)) <= 0.150


def test_the_package_imports_where_no_optional_library_is_installed() -> None:
    blocked = f"import sys; [sys.modules.__setitem__(name, None) for name in {HEAVY!r}];"
    code = f"{blocked} import edge_agent.agent, edge_agent.sources.rtsp, edge_agent.backends.onnx; print('fine')"
    assert python(code) == "fine"


@pytest.mark.parametrize(("library", "extra"), [("cv2", "opencv"), ("onnxruntime", "onnx")])
def test_check_says_how_to_install_what_is_missing(library: str, extra: str) -> None:
    code = (
        f"import sys; sys.modules[{library!r}] = None; from edge_agent.cli import main;"
        "main(['check', '--config', 'config.toml'])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 78
    assert f"'{library}', which is not installed: pip install 'edge-agent[{extra}]'" in done.stderr


def test_the_generated_documents_are_up_to_date() -> None:
    assert schemas.document() == generate_docs.asyncapi()
    assert (ROOT / "docs/edgectl.md").read_text() == edgectl()


def test_back_off_doubles_to_its_limit_and_never_knocks_in_step() -> None:
    waits = [wait for wait, _ in zip(backoff(first_s=1, most_s=8), range(50), strict=False)]
    for wait, ceiling in zip(waits, [1, 2, 4, 8, 8], strict=False):
        assert 0 < wait <= ceiling
    assert max(waits) <= 8
    assert len(set(waits)) > 40


def test_an_owner_thread_runs_calls_in_order_in_one_thread() -> None:
    async def test() -> None:
        seen: list[tuple[int, str]] = []
        with OwnerThread("owner") as owner:
            calls = [owner.call(lambda i=i: seen.append((i, threading.current_thread().name))) for i in range(20)]
            await asyncio.gather(*calls)
            with pytest.raises(ValueError, match="told"):
                await owner.call(int, "told")
        assert [i for i, _ in seen] == list(range(20))
        assert {name for _, name in seen} == {"owner_0"}

    asyncio.run(test())


def test_in_thread_hands_on_results_errors_and_cancellation() -> None:
    async def test() -> None:
        assert await in_thread("worker", lambda: threading.current_thread().name) == "worker"
        with pytest.raises(KeyError):
            await in_thread("worker", lambda: {}["x"])
        release = threading.Event()
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(in_thread("worker", release.wait), 0.01)
        release.set()

    asyncio.run(test())


def test_a_groups_only_error_is_raised_as_itself() -> None:
    import anyio

    async def fail() -> None:
        raise KeyError("only")

    async def test() -> None:
        with pytest.raises(KeyError, match="only"), errors_unwrapped():
            async with anyio.create_task_group() as outer, anyio.create_task_group() as inner:
                outer.start_soon(anyio.sleep, 5)
                inner.start_soon(fail)

    asyncio.run(test())


def test_a_rate_is_events_over_time() -> None:
    now = [100.0]
    rate = Rate(clock=lambda: now[0])
    assert rate.update(5) == 0.0
    now[0] += 2.0
    assert rate.update(65) == 30.0
