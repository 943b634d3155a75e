"""What `edgectl dashboard` makes of messages and requests, whoever sends them."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import socket

import pytest
from edgectl.dashboard.asking import BETWEEN_S, Asking, CameraOf
from edgectl.dashboard.device import row
from edgectl.dashboard.fleet import Fleet
from edgectl.dashboard.tasks import end, first_to_end
from edgectl.dashboard.viewers import Viewer, news, whole
from edgectl.dashboard.web import HEAD_BYTES, Hosts, Refused, parse_head, read_request
from hypothesis import given
from hypothesis import strategies as st

from edge_agent import messages
from edge_agent.messages import Health, Job, Reply, Topics

TOPICS = Topics("site/a", "line-3")
LEAVES = st.sampled_from(
    ["available", "status", "health", "stats", "models", "cameras/c/status", "cameras/c/snapshot", "jobs/1", "reply/1"]
)


def health(state: str, **facts: str) -> Health:
    checks = {name: messages.Check(state, fact, "2026-11-26T14:40:47Z", 0.0) for name, fact in facts.items()}  # type: ignore[arg-type]
    return Health(1, "line-3", "2026-11-26T14:40:48Z", state, checks)  # type: ignore[arg-type]


def job(state: str, percent: float | None) -> bytes:
    at = "2026-11-26T14:40:47Z"
    return messages.encode(Job(1, "line-3", "7", "model.activate", state, "warm up", percent, at, at))  # type: ignore[arg-type]


def test_what_a_device_says_is_in_its_row_and_in_the_news_of_who_looks_at_it() -> None:
    fleet, viewer, other = Fleet("site/a"), Viewer("line-3"), Viewer("line-4")
    for topic, payload in (
        (TOPICS.available, b"online"),
        (TOPICS.health, messages.encode(health("failed", camera="refused"))),
        (TOPICS.camera("gate", "snapshot"), b"\xff\xd8\xff picture"),
    ):
        change = fleet.take(topic, payload, 5.0)
        assert change is not None
        viewer.note(change)
        other.note(change)
    assert (row(fleet.devices["line-3"]).unwell, row(fleet.devices["line-3"]).heard_s) == ("camera: refused", 5.0)
    told = news(fleet, "line-3", asyncio.run(viewer.changes())[0])
    assert told["detail"]["pictures"]["gate"]["at_s"] == 5.0
    elsewhere = news(fleet, "line-4", asyncio.run(other.changes())[0])
    assert (list(elsewhere["devices"]), elsewhere["detail"]) == (["line-3"], {})


def test_unknown_is_null_and_what_the_broker_kept_is_not_taken_for_fresh() -> None:
    fleet = Fleet("edge")
    fleet.take("edge/a/available", b"online", 5.0, is_retained=True)
    fleet.take("edge/a/health", messages.encode(health("ok")), 5.0, is_retained=True)
    shown = row(fleet.devices["a"])
    assert (shown.fps, shown.p95_ms, shown.gpu_percent, shown.cameras, shown.heard_s) == (None,) * 5
    assert whole(fleet, "a")["detail"]["health_s"] is None


def test_a_device_that_the_broker_forgot_is_gone() -> None:
    fleet = Fleet("edge")
    fleet.take("edge/a/available", b"offline", 0.0)
    change = fleet.take("edge/a/available", b"", 1.0)
    assert change is not None
    assert news(fleet, "a", [change]) == {"devices": {"a": None}, "detail": {}}


def test_a_job_goes_on_until_its_reply_and_no_further() -> None:
    fleet = Fleet("site/a")
    fleet.sent("line-3", "7", "model.activate", 1.0)
    states = []
    for step in (
        lambda: fleet.answered("line-3", Reply("line-3", "7", "accepted", 0.0)),
        lambda: fleet.take(TOPICS.job("7"), job("running", 40.0), 2.0),
        lambda: fleet.answered("line-3", Reply("line-3", "7", "error", 12.0, "model_rejected", "it does not fit")),
        lambda: fleet.take(TOPICS.job("7"), job("running", 50.0), 3.0),
    ):
        step()
        states.append(fleet.devices["line-3"].jobs["7"])
    assert [one.state for one in states] == ["accepted", "running", "failed", "failed"]
    assert (states[1].percent, states[-1].message, states[-1].began_s) == (40.0, "it does not fit", 1.0)


def test_what_is_kept_has_a_limit() -> None:
    fleet = Fleet("edge")
    for number in range(10_050):
        fleet.take(f"edge/d{number}/available", b"online", 0.0)
    assert (len(fleet.devices), fleet.ignored) == (10_000, 50)
    for number in range(300):
        fleet.take(f"edge/d1/cameras/c{number}/snapshot", b"\xff\xd8\xff", 0.0)
        fleet.sent("d1", str(number), "model.activate", 0.0)
    assert (len(fleet.devices["d1"].pictures), len(fleet.devices["d1"].jobs)) == (256, 20)
    assert "299" in fleet.devices["d1"].jobs


@given(st.lists(st.tuples(st.text(max_size=5), LEAVES, st.binary(max_size=40) | st.just(b"{}"), st.booleans())))
def test_no_message_is_the_end_of_it(heard: list[tuple[str, str, bytes, bool]]) -> None:
    fleet = Fleet("edge")
    for device, leaf, payload, is_retained in heard:
        fleet.take(f"edge/{device}/{leaf}", payload, 1.0, is_retained=is_retained)
    for name, device in fleet.devices.items():
        row(device)
        json.dumps(sorted(whole(fleet, name)["detail"]))


def test_a_slow_browser_costs_no_more_than_there_are_parts() -> None:
    fleet, viewer = Fleet("edge"), Viewer("a")
    for second in range(1000):
        change = fleet.take("edge/a/available", b"online" if second % 2 else b"offline", float(second))
        assert change is not None
        viewer.note(change)
    changes, _ = asyncio.run(viewer.changes())
    assert len(changes) == 1
    assert news(fleet, "a", changes)["devices"]["a"].available == "online"


@pytest.mark.parametrize(
    "host", ["127.0.0.1:8080", "localhost:8080", "LOCALHOST:8080", "[::1]:8080", "192.168.1.7:8080"]
)
def test_a_browser_may_call_the_server_by_its_addresses(host: str) -> None:
    assert host in Hosts("127.0.0.1", port=8080)


@pytest.mark.parametrize(
    "host", [None, "", "evil.example:8080", "localhost", "localhost:80", "127.0.0.1.evil.example:8080", "[::1", ":8080"]
)
def test_and_by_no_strangers_name(host: str | None) -> None:
    assert host not in Hosts("127.0.0.1", port=8080)
    assert not Hosts("127.0.0.1", port=8080).allows_origin(f"http://{host}")


@given(st.from_regex(r"[a-z0-9-]{0,9}[a-z](\.[a-z]{1,9}){0,3}", fullmatch=True), st.integers(0, 70_000))
def test_no_name_but_those_that_are_known_is_taken(name: str, port: int) -> None:
    is_known = name in {"localhost", "wall", socket.gethostname().lower()} and port == 8080
    assert (f"{name}:{port}" in Hosts("wall", port=8080)) == is_known


@given(st.binary(max_size=200))
def test_a_head_is_understood_or_refused(head: bytes) -> None:
    try:
        method, target, _ = parse_head(head + b"\r\n\r\n")
    except Refused:
        return
    assert target.startswith("/")
    assert " " not in method


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (b"GET / HTTP/1.1\r\nHost: a\r\nhost: b\r\n\r\n", 400),
        (b"GET http://elsewhere/ HTTP/1.1\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost : a\r\n\r\n", 400),
        (b"POST / HTTP/1.1\r\nContent-Length: -1\r\n\r\n", 400),
        (b"POST / HTTP/1.1\r\nContent-Length: 99999999999999\r\n\r\n", 413),
        (b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n", 411),
        (b"POST / HTTP/1.1\r\nContent-Length: 9\r\n\r\nshort", 400),
        (b"GET /" + b"a" * 2 * HEAD_BYTES, 431),
        (b"half a line", 400),
    ],
)
def test_what_is_no_request_gets_a_status_and_a_sentence(sent: bytes, status: int) -> None:
    async def read() -> None:
        reader = asyncio.StreamReader(limit=HEAD_BYTES)
        reader.feed_data(sent)
        reader.feed_eof()
        await read_request(reader)

    with pytest.raises(Refused) as refused:
        asyncio.run(read())
    assert refused.value.status == status


@given(
    st.integers(1, 6),
    st.floats(0.5, 5.0),
    st.lists(st.tuples(st.floats(0.01, 3.0), st.sampled_from(["answer", "refuse", "silence"])), max_size=60),
)
def test_pictures_are_asked_for_modestly_and_of_each_camera(
    count: int, interval_s: float, steps: list[tuple[float, str]]
) -> None:
    asking, now_s = Asking(interval_s), 100.0
    cameras = [f"c{number}" for number in range(count)]
    asked: list[tuple[float, str]] = []
    for number, (later_s, then) in enumerate(steps):
        now_s += later_s
        list(asking.unanswered(now_s))
        camera = asking.due("a", cameras, now_s)
        if camera is None:
            continue
        of = CameraOf("a", camera)
        asking.ask(of, str(number), now_s)
        asked.append((now_s, camera))
        if then != "silence":
            assert asking.answered("b", str(number)) is None
            assert asking.answered("a", str(number)) == of
        if then == "refuse":
            asking.refused(of, now_s)
    for (before_s, _), (after_s, _) in itertools.pairwise(asked):
        assert after_s - before_s >= BETWEEN_S - 1e-9
    for camera in cameras:
        of_one = [at_s for at_s, name in asked if name == camera]
        assert all(after_s - before_s >= interval_s - 1e-9 for before_s, after_s in itertools.pairwise(of_one))
    assert {name for _, name in asked[:count]} == set(cameras[: len(asked)])


def test_a_camera_that_does_not_answer_is_given_up_and_asked_again() -> None:
    asking, of = Asking(2.0), CameraOf("a", "gate")
    asking.ask(of, "1", 0.0)
    assert (list(asking.unanswered(9.9)), asking.due("a", ["gate"], 9.9)) == ([], None)
    assert (list(asking.unanswered(10.0)), asking.due("a", ["gate"], 10.0)) == ([of], "gate")
    assert asking.answered("a", "1") is None
    asking.refused(of, 10.0)
    assert (asking.due("a", ["gate"], 19.9), asking.due("a", ["gate"], 20.0)) == (None, "gate")


def test_tasks_end_even_if_a_library_swallows_the_first_cancellation() -> None:
    async def deaf() -> None:
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.Event().wait()
        await asyncio.Event().wait()

    async def fails() -> None:
        raise ConnectionError("gone")

    async def both() -> None:
        task = asyncio.ensure_future(deaf())
        await asyncio.sleep(0)
        await end((task,), patience_s=0.01)
        assert task.cancelled()
        await first_to_end(deaf(), fails())

    with pytest.raises(ConnectionError, match="gone"):
        asyncio.run(both())
