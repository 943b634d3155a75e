"""Fixtures shared by all tests."""

from __future__ import annotations

import ctypes
import functools
import gc
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests import brokers
from tests.brokers import RabbitMq
from tests.rigs import Broker, Probe, Server, free_port, need_program

if TYPE_CHECKING:
    from tests.fake_gpu import FakeTensorRt

SPREAD = ("tests/e2e/test_cameras.py", "tests/e2e/test_faults.py")
"""Files whose tests share little and take long: with `pytest -n`, any worker takes the next one."""


if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as in the background of a script: programs would inherit that
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """With `pytest -n`, the tests of a file stay together, for they share what was made for it."""
    from xdist.scheduler import LoadScopeScheduling

    class Files(LoadScopeScheduling):  # type: ignore[misc]
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            return nodeid if file in SPREAD else file

    config.option.loadscopereorder = False  # by how many tests there are in a file
    return Files(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with long tests come first, so that at the end no worker is waited for."""
    long = {item.path for item in items if item.get_closest_marker("soak")}
    items.sort(key=lambda item: item.path not in long)


@pytest.fixture(autouse=True, scope="session")
def ports_of_our_own() -> None:
    """They are taken before a test counts which files are open."""
    free_port()


@pytest.fixture(autouse=True, scope="session")
def state_of_our_own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """No test reads or writes the models and engines of whoever runs it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_STATE_HOME", str(tmp_path_factory.mktemp("state")))
        yield


@pytest.fixture(autouse=True)
def no_thread_left_behind() -> Iterator[None]:
    """A test that leaves a thread of ours running has a bug, or has found one."""
    before = set(threading.enumerate())
    yield
    left = [thread for thread in threading.enumerate() if thread not in before and not thread.daemon]
    for thread in left:
        thread.join(2.0)
    assert not [thread.name for thread in left if thread.is_alive()]


@pytest.fixture(scope="session")
def kernels_on_cpu(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """The CUDA kernels, compiled for the CPU."""
    from tests.fake_gpu import compile_for_cpu

    return compile_for_cpu(need_program("g++", "g++"), tmp_path_factory.mktemp("kernels") / "kernels.so")


@pytest.fixture
def fake_gpu(kernels_on_cpu: ctypes.CDLL, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeTensorRt]:
    """A fake driver and a fake TensorRT in the places of real ones; all that was allocated must be freed."""
    from edge_agent import cuda
    from edge_agent.backends import _trt
    from tests.fake_gpu import FakeDriver, FakeTensorRt

    driver = FakeDriver(kernels_on_cpu)
    trt = FakeTensorRt(driver)
    monkeypatch.setattr(cuda, "_driver", lambda: driver)
    monkeypatch.setattr(cuda, "_lost", threading.Event())
    monkeypatch.setattr(cuda, "open_gpu", functools.cache(lambda index=0: cuda.Gpu(index)))
    monkeypatch.setattr(cuda, "compile_kernels", lambda source, name, architecture: b"cubin")
    monkeypatch.setattr(_trt, "library", lambda generation="auto": trt)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    yield trt
    gc.collect()
    if not driver.lost:
        assert not driver.device, "device memory was not freed"
        assert not driver.pinned, "pinned memory was not freed"
        assert not driver.streams, "a stream was not closed"


@pytest.fixture(scope="session")
def mosquitto(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with Broker(tmp_path_factory.mktemp("broker")) as broker:
        yield broker


@pytest.fixture(scope="session")
def rabbitmq(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RabbitMq]:
    with RabbitMq(tmp_path_factory.mktemp("rabbitmq")) as broker:
        yield broker


@pytest.fixture(scope="session")
def rabbitmq_4() -> Iterator[RabbitMq]:
    with brokers.rabbitmq_4() as broker:
        yield broker


@pytest.fixture
def broker(request: pytest.FixtureRequest) -> Iterator[Server]:
    """The session's mosquitto, or each of `on_all_brokers`. A test may kill it; what it keeps is cleared afterwards."""
    broker: Server = request.getfixturevalue(getattr(request, "param", "mosquitto"))
    with brokers.swept(broker):
        yield broker


@pytest.fixture
def probe(broker: Server) -> Iterator[Probe]:
    with Probe(broker.plain_port, version=broker.version) as probe:
        yield probe
