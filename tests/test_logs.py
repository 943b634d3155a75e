"""What is logged: nothing waits for its reader, no credential is in it, no flood drowns it."""

from __future__ import annotations

import io
import json
import logging
import os
import re
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import urllib.parse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
import structlog
from hypothesis import example, given, settings

from edge_agent import logs
from edge_agent.config import Secret
from edge_agent.logs.redaction import is_secret, redacted, redacted_text
from edge_agent.logs.repeats import Repeats
from edge_agent.logs.writer import QueuedWriter

MARK = "Zq7"


@pytest.fixture(autouse=True)
def within_a_minute() -> Iterator[None]:
    """Who waits for a line that does not come fails, and leaves no process."""

    def late(*signalled: object) -> None:
        raise AssertionError("it did not come within a minute")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)
    for process in _STARTED:
        process.kill()
        process.wait()
    _STARTED.clear()


_STARTED: list[subprocess.Popen[str]] = []


@pytest.fixture
def out() -> Iterator[io.StringIO]:
    """What is logged as JSON in this process."""
    stream = io.StringIO()
    logs.configure(level="debug", format="json", stream=stream)
    yield stream
    logs.close()
    structlog.reset_defaults()
    logging.getLogger().handlers.clear()


def lines(out: io.StringIO) -> list[dict[str, Any]]:
    return [json.loads(line) for line in out.getvalue().splitlines()]


# Levels, formats, libraries


def test_events_keep_their_fields_and_the_level_holds(out: io.StringIO) -> None:
    structlog.get_logger().info("camera.running", camera="a", fps=12.5, zones={"yard": [1, None]}, ok=True)
    logs.configure(level="warning", format="json", stream=out)
    structlog.get_logger().info("camera.quiet")
    structlog.get_logger().warning("camera.backoff")
    [running, backoff] = lines(out)
    assert running.pop("timestamp").endswith("Z")
    assert running == {
        "event": "camera.running",
        "level": "info",
        "camera": "a",
        "fps": 12.5,
        "zones": {"yard": [1, None]},
        "ok": True,
    }
    assert (backoff["event"], backoff["level"]) == ("camera.backoff", "warning")


def test_what_libraries_warn_of_comes_the_same_way(out: io.StringIO) -> None:
    logging.getLogger("some.library").info("not this")
    logging.getLogger("some.library").warning("cannot open %s", "rtsp://viewer:Zq7@cam/1")
    try:
        raise ValueError("token=Zq7")
    except ValueError:
        logging.getLogger("some.library").exception("bad")
    [warned, failed] = lines(out)
    assert (warned["event"], warned["level"]) == ("cannot open rtsp://viewer:***@cam/1", "warning")
    assert warned["logger"] == failed["logger"] == "some.library"
    assert failed["exception"].splitlines()[-1] == "ValueError: token=***"
    assert failed["level"] == "error"


def test_on_a_console_it_is_the_same_without_credentials() -> None:
    stream = io.StringIO()
    logs.configure(format="console", stream=stream)
    try:
        raise OSError("cannot open 'rtsp://viewer:Zq7@cam/1'")
    except OSError:
        structlog.get_logger().exception("camera.bug", camera="a", password=MARK)
    logs.close()
    text = stream.getvalue()
    assert "camera.bug" in text
    assert "Traceback" in text
    assert "rtsp://viewer:***@cam/1" in text
    assert MARK not in text


def test_an_output_that_was_closed_is_counted_and_no_more(out: io.StringIO) -> None:
    out.close()
    structlog.get_logger().info("nobody.hears")
    assert logs.dropped() == 1
    out.__init__()  # type: ignore[misc]  # for the fixture


# Credentials

odd = st.text(st.sampled_from("@:/?#%&=+ '\"\\[]{}()<>,;.|$!é0aZ") | st.characters(exclude_categories=["Cs", "Cc"]))
passwords = (
    st.tuples(odd, odd, odd)
    .map(MARK.join)
    .filter(lambda text: not re.match(r"\d[^@]*\W|\s", text) or "://" not in text)  # a port and another URL, as it were
)


@settings(max_examples=300, deadline=None)
@given(password=passwords, quoted=st.booleans(), scheme=st.sampled_from(["rtsp", "rtsps", "https", "mqtt+ssl"]))
@example(password=f"12/{MARK} x", quoted=False, scheme="rtsp")
@example(password=f"a@b {MARK}@", quoted=False, scheme="rtsp")
@example(password=f"12 {MARK}", quoted=False, scheme="rtsp")
@example(password=f'a"{MARK}://', quoted=False, scheme="rtsp")
@example(password=f"a@b http://{MARK}:y@ {MARK}", quoted=False, scheme="rtsp")
def test_a_password_in_a_url_is_never_in_what_is_logged(password: str, quoted: bool, scheme: str) -> None:
    shown = urllib.parse.quote(password, safe="") if quoted else password
    url = f"{scheme}://viewer:{shown}@192.0.2.1:8554/stream"
    stream = io.StringIO()
    logs.configure(format="json", stream=stream)
    log = structlog.get_logger()
    log.info(f"cannot open {url}: timeout", url=url, urls=[{"of": (url,)}, {url: 1}], what=OSError(url))
    log.info("x", said=f"GET {scheme}://[::1]/?user=viewer&password={urllib.parse.quote(password)}&n=1")
    log.info("x", password=password, nested={"Api-Key": password, "mqtt": [{"mqttPassword": password}]})
    log.info("x", head=f"Authorization: Basic {password}", options={"tls": {"password": Secret(password)}})
    try:
        raise RuntimeError(f"no stream at {url}")
    except RuntimeError:
        log.exception("camera.bug")
    logs.close()
    assert MARK not in stream.getvalue()
    assert MARK not in str([json.loads(line) for line in stream.getvalue().splitlines()])
    assert "192.0.2.1:8554" in stream.getvalue()


@pytest.mark.parametrize(
    "text",
    [
        "https://example.org:8443/models/yolo.onnx",
        "https://registry.example/@scope/name",
        "tcp://[::1]:1883, then http://[fe80::1%25eth0]/x",
        "url: not of the form rtsp://host[:port]/path or rtsps://…",
        "http://127.0.0.1:9090: in use; http://127.0.0.1:9091.",
        "tcp://broker.lan: refused",
        "mqtt.password: expected `str`, got `int`",
        "mqtt.password_file: cannot read the secret: No such file or directory",
        "yolo@1.2 is not demo-320@1",
        "the key 'path' is missing; max_batch=8, mode=auto",
        "check mqtt.username and mqtt.password",
        "Secret('***')",
        "token: unknown key; did you mean 'model'?",
        "bearer of bad news",
        "docs at https://example.org/token://x",
    ],
)
def test_what_holds_no_credential_stays_as_it_is(text: str) -> None:
    assert redacted_text(text) == text


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("rtsp://viewer:x@cam/1", "rtsp://viewer:***@cam/1"),
        ("first rtsp://a:x@b/1, rtsp://c:y@d/2\nthen", "first rtsp://a:***@d/2\nthen"),  # y@d may be of a's password
        ("at http://a:80/x, then rtsp://c:y@d/2", "at http://a:80/x, then rtsp://c:***@d/2"),
        ("https://ghp_x@example.org/a", "https://***@example.org/a"),
        ("https://ghp_x@example.org:8443/a", "https://***@example.org:8443/a"),
        ("https://ghp_x@example.org:8443/a@1", "https://***@example.org:8443/a@1"),
        ("rtsp://viewer:cut", "rtsp://viewer:***"),
        ("http://cam/?user=a&pwd=x&n=1", "http://cam/?user=a&pwd=***&n=1"),
        ("http://cam/?sig=x&key=y", "http://cam/?sig=***&key=***"),
        ("rtspsrc user-id=a user-pw=x ! appsink", "rtspsrc user-id=a user-pw=*** ! appsink"),
        (
            "{'username': 'a', 'password': 'x', \"api_key\": \"y\"}",
            "{'username': 'a', 'password': ***, \"api_key\": ***}",
        ),
        ("sent Bearer abcdefgh.ijk to it", "sent Bearer *** to it"),
        ("password: x y", "password: ***"),
        ("login failed, Password = x y", "login failed, Password = ***"),
        ("run --host a --mqtt-password x --verbose", "run --host a --mqtt-password *** --verbose"),
        ("X-Api-Key: x\nHost: a", "X-Api-Key: ***\nHost: a"),
        ("Cookie: session=x; theme=y\nHost: a", "Cookie: ***\nHost: a"),
        ("Bearer: x", "Bearer: ***"),
        (r"said {\"password\": \"x\\\"y\", \"n\": 1}", r"said {\"password\": ***, \"n\": 1}"),
        ("b'password': b'x y', b'n': 1", "b'password': ***, b'n': 1"),
        ("password=x y, host=a", "password=***, host=a"),
        ("rtspsrc user-pw=x y location=a", "rtspsrc user-pw=*** location=a"),
        ("http://cam/?loginuse=a&loginpas=x&n=1", "http://cam/?loginuse=a&loginpas=***&n=1"),
        ("http://cam/?usr=a&psw=x&n=1", "http://cam/?usr=a&psw=***&n=1"),
        ("no file /models/https:/a:x@example.org/m.onnx", "no file /models/https:/a:***@example.org/m.onnx"),
    ],
)
def test_the_rest_of_a_text_stays_where_a_credential_is_hidden(text: str, shown: str) -> None:
    assert redacted_text(text) == shown


lines_of_credentials = st.sampled_from(
    ["password: ", "Password:", "X-Api-Key: ", "Set-Cookie: id=", "bearer: ", "token : "]
)


@settings(max_examples=300, deadline=None)
@given(
    before=st.sampled_from(["", "a: 1, ", "> "]), name=lines_of_credentials, password=st.tuples(odd, odd).map(MARK.join)
)
def test_nothing_is_left_of_a_line_that_names_a_credential(before: str, name: str, password: str) -> None:
    shown = redacted_text(f"{before}{name}{password}\nnext line")
    assert MARK not in shown or password.startswith(("//", "unknown key"))
    assert shown.startswith(before)
    assert shown.endswith("\nnext line")


def test_fields_are_judged_by_their_whole_name() -> None:
    hidden = ["password", "mqtt_password", "mqttPassword", "Authorization", "api-key", "apiKey", "access_token", "pw"]
    shown = ["password_file", "public_key_file", "key", "token_count", "secrets_found", "passed", "monkey", "tokens"]
    assert [name for name in hidden + shown if is_secret(name)] == hidden
    assert redacted({"password": None, "token": "", "secret": 1}) == {"password": None, "token": "", "secret": "***"}


def test_tables_without_end_and_odd_objects_do_not_end_the_process(out: io.StringIO) -> None:
    endless: dict[Any, Any] = {(1, 2): b"\xff", None: float("inf")}
    endless["self"] = [endless]
    structlog.get_logger().info("odd", table=endless, set={1}, text="\ud800 \x00", error=KeyError("x"))
    [event] = lines(out)
    assert event["error"] == "KeyError('x')"
    assert event["table"]["(1, 2)"] == "b'\\xff'"


# Repeats

logged = st.lists(
    st.tuples(st.sampled_from(["a", "b", "c"]), st.sampled_from(["x", "y"]), st.floats(0, 40)), max_size=120
)


@settings(max_examples=200, deadline=None)
@given(logged=logged, asks=st.integers(1, 50))
def test_no_warning_is_lost_from_the_count(logged: list[tuple[str, str, float]], asks: int) -> None:
    now_s = 0.0
    repeats = Repeats(clock=lambda: now_s)
    shown: list[dict[str, Any]] = []
    for n, (camera, reason, wait_s) in enumerate(logged):
        now_s += wait_s
        if n % asks == 0:
            shown += repeats.due()
        before = len(shown)
        if admitted := repeats.admit({"event": "e", "level": "warning", "camera": camera, "reason": reason, "n": n}):
            shown.append(admitted)
        is_first = (camera, reason) not in [one[:2] for one in logged[:n]]
        assert len(shown) > before or not is_first, "the first of a kind is always shown"
        assert (repeats.next_due_s() or 0.0) <= 60.0
    shown += repeats.rest()
    for kind in {one[:2] for one in logged}:
        mine = [event for event in shown if (event["camera"], event["reason"]) == kind]
        assert sum(1 + event.get("repeated", 0) for event in mine) == sum(one[:2] == kind for one in logged)
    assert repeats.rest() == []


def test_a_flood_is_five_lines_and_a_count_a_minute() -> None:
    now_s, woken = 0.0, []
    repeats = Repeats(clock=lambda: now_s, on_first=lambda: woken.append(now_s))
    shown = []
    for n in range(3000):
        now_s = n / 10
        shown += [*repeats.due(), *filter(None, [repeats.admit({"event": "e", "level": "error", "n": n})])]
    assert [event["n"] for event in shown[:7]] == [0, 1, 2, 3, 4, 599, 600]
    assert [event.get("repeated") for event in shown[:7]] == [None] * 5 + [594, None]
    assert len(shown) == 5 * 5 + 4
    assert woken == [0.5, 60.5, 120.5, 180.5, 240.5]
    assert repeats.next_due_s() == pytest.approx(0.1)


def test_the_next_one_after_the_minute_tells_the_count_too() -> None:
    now_s = 0.0
    repeats = Repeats(clock=lambda: now_s)
    shown = [repeats.admit({"event": "e", "level": "error"}) for _ in range(8)]
    now_s = 61.0
    shown += [repeats.admit({"event": "e", "level": "error"}), *repeats.due()]
    assert [event and event.get("repeated", 0) for event in shown] == [0] * 5 + [None] * 3 + [3]


def test_numbers_make_no_other_event_and_words_do() -> None:
    repeats = Repeats(limit=1, clock=lambda: 0.0)

    def is_shown(**fields: Any) -> bool:
        return repeats.admit({"event": "e", "level": "warning", "timestamp": str(fields), **fields}) is not None

    assert is_shown(camera="a", delay_s=1, drops={"full": 3})
    assert not is_shown(camera="a", delay_s=2.5, drops={"full": 4})
    assert is_shown(camera="b", delay_s=1, drops={"full": 3})
    assert is_shown(camera="a", delay_s=1, drops={"stale": 3})
    assert is_shown(camera="a", delay_s=None, drops={"full": 3})
    assert is_shown(camera="a", delay_s=1, drops={"full": 3}, exception="ValueError: x")


def test_what_is_information_is_never_held_back() -> None:
    repeats = Repeats(limit=1, clock=lambda: 0.0)
    assert all(repeats.admit({"event": "e", "level": level}) for level in ("info", "debug") for _ in range(9))


def test_more_kinds_than_are_kept_are_all_shown() -> None:
    repeats = Repeats(limit=1, clock=lambda: 0.0)
    assert all(repeats.admit({"event": str(n), "level": "error"}) for n in range(3000))
    assert repeats.admit({"event": "0", "level": "error"}) is None


# Errors nobody foresaw


def test_what_the_interpreter_shows_of_an_error_holds_no_credential() -> None:
    process = started(
        """
        import threading
        url = "rtsp://viewer:" + "Zq7" + "@192.0.2.1/1"
        def fail(): raise OSError(f"cannot open {url}")
        class Ends:
            def __del__(self): fail()
        Ends()
        thread = threading.Thread(target=fail, name="capture:a")
        thread.start()
        thread.join()
        threading.Thread(target=sys.exit).start()
        try:
            fail()
        except OSError as error:
            raise RuntimeError("--password Zq7") from error
        """,
        stdout=subprocess.DEVNULL,
    )
    said = process.communicate(timeout=30)[1]
    assert process.returncode == 1
    assert MARK not in said
    assert said.count("OSError: cannot open rtsp://viewer:***@192.0.2.1/1\n") == 3
    assert "Exception in thread capture:a:\nTraceback" in said
    assert said.endswith("RuntimeError: --password ***\n")


def test_last_words_are_not_waited_for_and_come_whole_where_they_are_heard() -> None:
    process = started('logs.say("x" * 300_000)', stdout=subprocess.DEVNULL)
    assert process.wait(30) == 0, "nobody read so far"
    assert set(process.communicate()[1]) == {"x"}
    heard = started('sys.stdin.readline(); logs.say("x" * 3000 + "end")', stdout=subprocess.DEVNULL)
    assert heard.communicate("\n", timeout=30)[1] == "x" * 3000 + "end\n"


def test_the_writer_outlives_what_is_asked_of_it_and_counts_that() -> None:
    theirs, ours = os.pipe()
    calls: list[str] = []

    def fails(*arguments: int) -> Any:
        calls.append("idle")
        raise ValueError("not to be shown")

    def notice(lost: int) -> str:
        calls.append(f"notice of {lost}")
        if calls.count(f"notice of {lost}") == 1:
            raise ValueError("not to be shown either")
        return f"lost {lost}"

    with open(theirs) as pipe, open(ours, "w") as stream:  # noqa: PTH123
        others = set(threading.enumerate())
        writer = QueuedWriter(stream, notice=notice, idle=fails)
        [thread] = set(threading.enumerate()) - others
        writer.put("a")
        assert writer.flush(10.0)
        writer.put("b")
        assert writer.flush(10.0)
        writer.close()
        thread.join(10.0)  # before the pipe is closed, and its number another's
        told = 0
        said = []
        while told < writer.dropped:
            said.append(pipe.readline().strip())
            told += int(said[-1].removeprefix("lost ")) if said[-1].startswith("lost") else 0
    assert [line for line in said if not line.startswith("lost")] == ["a", "b"]
    assert calls.count("idle") == writer.dropped >= 3


# A process whose output stands still, in processes of their own

PREAMBLE = """
import os, sys, time
import structlog
from edge_agent import logs
logs.configure(level="debug")
log = structlog.get_logger()
"""


def started(body: str, *, stdout: Any, **options: Any) -> subprocess.Popen[str]:
    script = PREAMBLE + textwrap.dedent(body)
    pipe = subprocess.PIPE
    process = subprocess.Popen(
        [sys.executable, "-c", script], stdout=stdout, stdin=pipe, stderr=pipe, text=True, **options
    )
    _STARTED.append(process)
    return process


def ended(process: subprocess.Popen[str]) -> str:
    """What was said on stderr, of a process that ended well."""
    said = process.communicate(timeout=30)[1]
    assert process.returncode == 0, said
    return said


def read_all(fd: int) -> list[dict[str, Any]]:
    with open(fd, "rb") as pipe:
        return [json.loads(line) for line in pipe.read().splitlines()]


def test_a_pipe_nobody_reads_holds_nothing_up_and_what_was_dropped_is_told_later() -> None:
    theirs, ours = os.pipe()
    process = started(
        """
        for n in range(50_000):
            log.info("line", n=n)
        print(logs.dropped(), file=sys.stderr, flush=True)
        sys.stdin.readline()
        """,
        stdout=ours,
    )
    os.close(ours)
    assert process.stderr is not None
    lost = int(process.stderr.readline())  # it went through all of them though nothing was read
    events = []
    with open(theirs, "rb") as pipe:  # noqa: PTH123
        while not events or events[-1]["event"] != "log.dropped":
            events.append(json.loads(pipe.readline()))  # of the last, too, though nothing else is logged
        assert process.communicate("\n", timeout=30) == (None, "")
        assert pipe.read() == b""
    assert process.returncode == 0
    shown = [event["n"] for event in events if event["event"] == "line"]
    told = [event for event in events if event["event"] == "log.dropped"]
    assert lost > 30_000
    assert shown == list(range(50_000 - lost))
    assert [(event["count"], event["level"]) for event in told] == [(lost, "warning")]


def test_a_reader_that_is_stopped_holds_nothing_up(tmp_path: Path) -> None:
    with (tmp_path / "read").open("wb") as file:
        reader = subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=file)
        reader.send_signal(signal.SIGSTOP)
        process = started(
            """
            while not logs.dropped():
                log.info("line", text="x" * 100)
            print("dropped", file=sys.stderr, flush=True)
            sys.stdin.readline()
            while not logs.flush(): pass
            """,
            stdout=reader.stdin,
        )
        assert reader.stdin is not None
        reader.stdin.close()
        assert process.stderr is not None
        assert process.stderr.readline() == "dropped\n"
        reader.send_signal(signal.SIGCONT)
        ended(process)
        assert reader.wait(10) == 0
    events = [json.loads(line) for line in (tmp_path / "read").read_text().splitlines()]
    assert [event["count"] for event in events if event["event"] == "log.dropped"] == [1]


def test_an_output_that_stands_still_does_not_outlast_the_process() -> None:
    theirs, ours = os.pipe()
    process = started('for n in range(20_000): log.info("line")', stdout=ours)
    os.close(ours)
    ended(process)
    os.close(theirs)


def test_a_closed_pipe_ends_nothing() -> None:
    theirs, ours = os.pipe()
    os.close(theirs)
    process = started(
        """
        for n in range(100): log.error("line", kind=str(n))
        logs.flush()
        print(logs.dropped(), file=sys.stderr)
        """,
        stdout=ours,
    )
    os.close(ours)
    assert ended(process) == "100\n"


def test_no_output_at_all_ends_nothing() -> None:
    done = subprocess.run(
        ["/bin/sh", "-c", '"$0" -c "$1" >&-', sys.executable, PREAMBLE + 'log.info("x"); sys.exit(logs.dropped() + 6)'],
        stderr=subprocess.PIPE,
    )
    assert (done.returncode, done.stderr) == (7, b"")


def test_a_pipe_that_does_not_block_is_waited_for() -> None:
    theirs, ours = os.pipe()
    os.set_blocking(ours, False)
    process = started(
        'for n in range(3000): log.info("line", text="x" * 200)\nwhile not logs.flush(): pass', stdout=ours
    )
    os.close(ours)
    assert len(read_all(theirs)) == 3000
    ended(process)


def test_what_waits_is_written_before_the_process_ends() -> None:
    process = started('for n in range(3000): log.info("line", n=n)', stdout=subprocess.PIPE)
    said, _ = process.communicate(timeout=30)
    assert [json.loads(line)["n"] for line in said.splitlines()] == list(range(3000))


def test_repeats_are_told_at_the_end_and_a_reload_forgets_none() -> None:
    process = started(
        """
        for n in range(10): log.warning("again", n=n)
        logs.configure(level="error")
        for n in range(10): log.warning("not.shown")
        logs.configure(level="debug")
        for n in range(10): log.warning("again", n=n)
        import threading
        print(sum(thread.name == "logs" for thread in threading.enumerate()), file=sys.stderr)
        """,
        stdout=subprocess.PIPE,
    )
    said, threads = process.communicate(timeout=30)
    events = [json.loads(line) for line in said.splitlines()]
    assert [event["n"] for event in events] == [0, 1, 2, 3, 4, 9]
    assert events[-1]["repeated"] == 14
    assert threads == "1\n"


def test_repeats_are_told_when_their_minute_is_over_though_nothing_else_is_logged() -> None:
    process = started(
        """
        from edge_agent.logs.repeats import Repeats
        logs._output.repeats = Repeats(window_s=1.0, on_first=logs._output.repeats._on_first)
        for n in range(7):
            log.warning("again", n=n)
            time.sleep(0.02)  # the writer has nothing to do, and waits
        sys.stdin.readline()
        """,
        stdout=subprocess.PIPE,
    )
    assert process.stdout is not None
    shown = [json.loads(process.stdout.readline()) for _ in range(6)]
    assert [event["n"] for event in shown] == [0, 1, 2, 3, 4, 6]
    assert shown[-1]["repeated"] == 1
    process.communicate("\n", timeout=30)


def test_what_a_collected_object_logs_while_a_line_is_put_by_hangs_nothing_up() -> None:
    process = started(
        """
        import gc
        from edge_agent.logs.writer import QueuedWriter
        class Last:
            def __init__(self): self.me = self
            def __del__(self): log.warning("collected")
        has_room = QueuedWriter._has_room
        def collecting(self, size):  # as the interpreter may do anywhere
            gc.collect()
            return has_room(self, size)
        QueuedWriter._has_room = collecting
        Last()
        log.info("line")
        """,
        stdout=subprocess.PIPE,
    )
    said, _ = process.communicate(timeout=20)
    assert [json.loads(line)["event"] for line in said.splitlines()] == ["collected", "line"]


def test_a_slow_reader_is_not_told_of_each_line_that_it_missed(tmp_path: Path) -> None:
    theirs, ours = os.pipe()
    with open(theirs) as pipe, open(ours, "w") as stream:  # noqa: PTH123
        writer = QueuedWriter(stream, notice=lambda lost: f"lost {lost}", max_lines=100)
        put, seen = 0, []
        for _ in range(400):
            while put < 1000 + 10 * len(seen):
                writer.put("x" * 1000)
                put += 1
            seen.append(pipe.readline())
        told_while_slow = sum(line.startswith("lost") for line in seen)
        writer.close()
        while sum(map(_stands_for, seen)) < put:
            seen.append(pipe.readline())
    assert sum(map(_stands_for, seen)) == put
    assert told_while_slow < 20


def _stands_for(line: str) -> int:
    return int(line.split()[1]) if line.startswith("lost") else 1


@pytest.mark.parametrize("kind", ["a stream of the journal", "another pipe"])
def test_in_the_journal_each_line_begins_with_its_priority(kind: str) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        there = os.fstat(theirs.fileno())
        inode = there.st_ino if kind == "a stream of the journal" else there.st_ino + 1
        process = started(
            """
            for level in ("debug", "info", "warning", "error", "critical"): getattr(log, level)("x", text="a\\nb")
            """,
            stdout=theirs,
            env={**os.environ, "JOURNAL_STREAM": f"{there.st_dev}:{inode}"},
        )
        ended(process)
        theirs.close()
        with ours.makefile() as heard:
            said = heard.read().splitlines()
    assert [line.partition("{")[0] for line in said] == (
        ["<7>", "<6>", "<4>", "<3>", "<2>"] if kind == "a stream of the journal" else [""] * 5
    )
    assert all(json.loads("{" + line.partition("{")[2])["text"] == "a\nb" for line in said)


def test_dropped_is_nought_before_anything_is_configured() -> None:
    done = subprocess.run(
        [sys.executable, "-c", "from edge_agent import logs; print(logs.dropped(), logs.flush())"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "0 True\n"
