"""The watchdog is fed by progress alone."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
from hypothesis import given

from edge_agent.pulse import Pulse
from edge_agent.watchdog import Watchdog, wanted_timeout_s


class Told(list[str]):
    def __call__(self, *states: str) -> bool:
        self.extend(states)
        return True


def test_what_rests_is_not_silent_and_what_works_is_from_its_last_beat_on() -> None:
    now = [10.0]
    pulse = Pulse(clock=lambda: now[0])
    now[0] = 100.0
    assert pulse.silent_s() == 0.0
    pulse.beat()
    now[0] = 103.0
    assert pulse.silent_s() == 3.0
    pulse.rest()
    now[0] = 200.0
    assert pulse.silent_s() == 0.0
    assert pulse.silent_s(has_work=True) == 0.0  # that has only come
    now[0] = 207.0
    assert pulse.silent_s(has_work=True) == 7.0
    assert pulse.silent_s() == 0.0
    now[0] = 300.0
    assert pulse.silent_s(has_work=True) == 0.0
    pulse.beat()
    pulse.rest()
    now[0] = 310.0
    assert pulse.silent_s(has_work=True) == 0.0


def test_nothing_is_fed_while_one_of_them_is_late_and_that_is_logged_once(capsys: pytest.CaptureFixture[str]) -> None:
    silent, told = {"engine": 0.0, "capture": 0.0}, Told()
    watchdog = Watchdog(
        {name: lambda name=name: silent[name] for name in silent},  # type: ignore[misc]
        patience={"capture": 4.0},
        timeout_s=10.0,
        tell=told,
    )
    watchdog.ready()
    told.clear()
    watchdog.look()
    assert told == ["WATCHDOG=1"]
    silent["engine"] = 5.1
    watchdog.look()
    watchdog.look()
    assert told == ["WATCHDOG=1"]
    assert watchdog.late() == {"engine": 5.1}
    silent.update(engine=0.0, capture=19.9)
    watchdog.look()
    assert told == ["WATCHDOG=1"] * 2
    silent["capture"] = 20.1
    watchdog.look()
    assert told == ["WATCHDOG=1"] * 2


def test_a_start_that_makes_progress_has_the_time_it_takes() -> None:
    told = Told()
    silent = [0.0]
    watchdog = Watchdog({"loader": lambda: silent[0]}, patience={"loader": 40.0}, timeout_s=None, tell=told)
    watchdog.look()
    assert told == ["EXTEND_TIMEOUT_USEC=30000000"]
    silent[0] = 601.0
    watchdog.look()
    assert told == ["EXTEND_TIMEOUT_USEC=30000000"], "what hangs has not"
    silent[0] = 0.0
    watchdog.ready()
    watchdog.look()
    assert told == ["EXTEND_TIMEOUT_USEC=30000000", "READY=1"]


def test_what_systemd_did_not_take_is_told_again() -> None:
    told, takes = [], [False]

    def tell(*states: str) -> bool:
        told.append(states)
        return takes[0]

    watchdog = Watchdog({}, timeout_s=10.0, tell=tell)
    watchdog.ready("STATUS=runs")
    watchdog.look()
    takes[0] = True
    watchdog.look()
    watchdog.look()
    assert told.count(("READY=1", "STATUS=runs")) == 3
    assert told[-1] == ("WATCHDOG=1",)


@given(silences=st.dictionaries(st.sampled_from("abc"), st.floats(0, 100)), timeout_s=st.floats(0.5, 60))
def test_it_is_fed_exactly_when_nothing_is_late(silences: dict[str, float], timeout_s: float) -> None:
    told = Told()
    watchdog = Watchdog(
        {name: lambda s=s: s for name, s in silences.items()},  # type: ignore[misc]
        timeout_s=timeout_s,
        tell=told,
    )
    watchdog.ready()
    told.clear()
    watchdog.look()
    assert told == (["WATCHDOG=1"] if all(s <= timeout_s / 2 for s in silences.values()) else [])


@pytest.mark.parametrize(
    ("environ", "timeout_s"),
    [
        ({}, None),
        ({"WATCHDOG_USEC": "2000000"}, 2.0),
        ({"WATCHDOG_USEC": "2000000", "WATCHDOG_PID": "1"}, None),
        ({"WATCHDOG_USEC": "0"}, None),
        ({"WATCHDOG_USEC": "soon"}, None),
    ],
)
def test_systemds_wish_is_read_as_its_manual_says(environ: dict[str, str], timeout_s: float | None) -> None:
    assert wanted_timeout_s(environ) == timeout_s
