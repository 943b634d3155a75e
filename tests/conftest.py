"""Fixtures shared by all tests."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from tests.rigs import Broker, Probe


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
def shared_broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Broker]:
    with Broker(tmp_path_factory.mktemp("broker")) as broker:
        yield broker


@pytest.fixture
def broker(shared_broker: Broker) -> Iterator[Broker]:
    """The session's mosquitto; what is retained on it is cleared after the test."""
    yield shared_broker
    with Probe(shared_broker.port) as sweeper:
        sweeper.publish("edge/sweep", "done")
        sweeper.wait_topic("edge/sweep")
        for message in list(sweeper.heard):
            if message.retain:
                sweeper.publish(message.topic, b"", retain=True)


@pytest.fixture
def probe(broker: Broker) -> Iterator[Probe]:
    with Probe(broker.port) as probe:
        yield probe
