"""Whatever comes in on the command topic: one reply or a drop that is told, nothing broken, nobody held up."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType, UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

import msgspec
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from structlog.testing import capture_logs

from edge_agent import messages
from edge_agent.commands import Dispatcher
from edge_agent.commands.ledger import Ledger
from edge_agent.config import Config, FetchOptions, InferenceOptions
from edge_agent.data import Message
from edge_agent.errors import CommandError, ModelError
from edge_agent.messages import Topics
from edge_agent.models.library import Library
from edge_agent.models.store import ModelStore
from edge_agent.mqtt import Inbound
from edge_agent.settings import Settings
from edge_agent.signing import Signatures
from edge_agent.threads import OwnerThread
from tests import schemas
from tests.hostile import CORPUS, LIMIT, payloads, relatives, valid
from tests.rigs import Heard

pytestmark = pytest.mark.slow

R = TypeVar("R")
T = TypeVar("T", bound=msgspec.Struct)

MOST_ON_THE_LOOP_S = 0.05
MOST_IN_A_REFUSAL = 4096
MOST_LEVELS = 500
"""Of arrays and objects in each other; what is deeper need not be read."""
AWAY = "edge/rig/cmd"
INBOX = "operators/inbox"


class Slot:
    """Of models that cannot be brought up."""

    async def activate(self, wanted: Any, *, progress: Callable[[str, float | None], None], **more: Any) -> Any:
        progress("verify", None)
        raise ModelError(f"there is no model {wanted.model!r}", code="model_not_found")

    async def measure(self, wanted: Any, *rest: Any, **more: Any) -> Any:
        raise ModelError(f"there is no model {wanted.model!r}", code="model_not_found")

    async def deactivate(self) -> None:
        return None

    def abort(self) -> None:
        pass


class Blind:
    """Snapshots of cameras that show nothing."""

    async def take(self, camera: str, **more: Any) -> Any:
        raise CommandError(f"{camera} has shown nothing", code="timeout")


class Agent:
    """The commands' services: real settings, store and library; no camera that shows something, and no engine."""

    def __init__(self, folder: Path, thread: OwnerThread) -> None:
        file = folder / "config.toml"
        file.write_text('[agent]\ndevice = "rig"\n[cameras.a]\nsource = "synthetic"\n')
        self.topics = Topics("edge", "rig")
        self.slot: Any = Slot()
        self.snapshots: Any = Blind()
        self.published: list[Message] = []
        self._file = file
        self.settings = Settings(file)
        self.config = self.settings.load()
        options = FetchOptions(hosts=["nowhere.invalid"])
        self._library = Library(ModelStore({}, folder / "store"), options=options, inference=InferenceOptions())
        self._thread = thread

    def forget(self) -> None:
        """All that commands have changed."""
        self.published.clear()
        if self.settings.changes:
            self.config = self.settings.reset()

    @property
    def camera_names(self) -> list[str]:
        return list(self.config.cameras)

    def publish(self, message: Message) -> None:
        self.published.append(message)

    def status(self) -> messages.Status:
        return blank(messages.Status)

    def stats(self) -> messages.Stats:
        return blank(messages.Stats)

    def reset_stats(self) -> None:
        pass

    def restart(self) -> None:
        pass

    async def models(self) -> messages.Models:
        return blank(messages.Models)

    async def look(self, work: Callable[[Library], R]) -> R:
        return await self._thread.call(work, self._library)

    async def in_library(self, work: Callable[[Library], R]) -> R:
        return await self._thread.call(work, self._library)

    async def change(self, work: Callable[[Settings], Config]) -> messages.Changed:
        self.config = await self._thread.call(work, self.settings)
        return blank(messages.Changed)


def blank(kind: type[T]) -> T:
    """A message with the least in each field."""
    return kind(**{field.name: _least(field.type) for field in msgspec.structs.fields(kind) if field.required})


def _least(kind: Any) -> Any:
    origin, parts = get_origin(kind) or kind, get_args(kind)
    if origin in (Union, UnionType):
        return None if type(None) in parts else _least(parts[0])
    if origin is Literal:
        return parts[0]
    if origin is Annotated:
        return _least(parts[0])
    return blank(origin) if issubclass(origin, msgspec.Struct) else origin()


@dataclass(frozen=True)
class Outcome:
    """What came of a payload; of a long command's replies, the last. `loop_s`: how long the event loop's thread worked
    on it."""

    replies: list[Message]
    drops: list[Any]
    problems: list[str]
    loop_s: float


class Desk:
    """An event loop on which dispatchers are fed one payload each, since one remembers the ids that it has met."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._problems: list[str] = []

    def __enter__(self) -> Desk:
        self._thread = OwnerThread("library")
        self._loop = asyncio.new_event_loop()
        self._loop.set_exception_handler(lambda loop, context: self._problems.append(str(context)))
        self._agent = Agent(self._folder, self._thread)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._loop.close()
        self._thread.close()

    def feed(self, payload: bytes, *, response_topic: str | None = None, retain: bool = False) -> Outcome:
        inbound = Inbound(topic=AWAY, payload=payload, retain=retain, response_topic=response_topic)
        self._agent.forget()
        self._problems = []
        with capture_logs() as logs:
            began = time.thread_time()
            self._loop.run_until_complete(self._handle(inbound))
            loop_s = time.thread_time() - began
        replies = [
            message
            for message in self._agent.published
            if message.topic == response_topic or message.topic.startswith("edge/rig/reply/")
        ]
        accepted = [reply for reply in replies if b'"status":"accepted"' in reply.payload[:400]]
        problems = [*self._problems, *(f"published to {m.topic!r}" for m in self._agent.published if not fits(m.topic))]
        problems += [f"crashed: {event.get('exc_info') or event}" for event in logs if event["log_level"] == "error"]
        problems += [f"invalid reply: {error}" for reply in replies for error in _invalid(reply)]
        problems += [f"accepted {len(accepted)} times of {len(replies)}"] if len(accepted) > len(replies[:-1]) else []
        drops = [event for event in logs if event["event"] == "command.unanswerable"]
        return Outcome([reply for reply in replies if reply not in accepted], drops, problems, loop_s)

    async def _handle(self, inbound: Inbound) -> None:
        dispatcher = Dispatcher(
            self._agent, ledger=Ledger(None, "rig"), keeping=self._thread, signatures=Signatures(None), disabled=()
        )
        dispatcher.handle(inbound)
        me = asyncio.current_task()
        if others := asyncio.all_tasks() - {me}:
            await asyncio.wait(others, timeout=0.2)  # a `spread_s` may ask for more
        await dispatcher.close(timeout_s=0.1)
        if late := asyncio.all_tasks() - {me}:
            self._problems.append(f"a task is left: {late}")


def fits(topic: str) -> bool:
    """Whether MQTT lets a message go to a topic."""
    try:
        size = len(topic.encode())
    except UnicodeEncodeError:
        return False
    return 0 < size <= 65535 and not set("+#\0") & set(topic)


def _invalid(reply: Message) -> Iterator[str]:
    try:
        schemas.validate(Heard("edge/rig/reply/x", reply.payload, False, 0))
    except Exception as error:  # noqa: BLE001
        yield f"{type(error).__name__}: {str(error)[:200]}"
    else:
        if json.loads(reply.payload).get("code") == "internal":
            yield reply.payload.decode()[:300]


def plain_id(payload: bytes) -> str | None:
    """The id of a payload that any strict reader of JSON would find."""
    if len(payload) > LIMIT or payload[:1] in (b"", b"\xef"):
        return None
    try:
        value = json.loads(payload.decode(), parse_constant=_no_number, parse_float=_finite)
        command_id = value["id"]
        json.dumps(value, ensure_ascii=False).encode()  # no lone surrogates
    except (ValueError, TypeError, KeyError, AttributeError, IndexError, RecursionError):
        return None
    is_plain = isinstance(command_id, str) and 0 < len(command_id) <= 128 and _depth(value) <= MOST_LEVELS
    return command_id if is_plain else None


def _depth(value: Any) -> int:
    depth, level = 0, [value]
    while level := [inner for outer in level for inner in _inside(outer)]:
        depth += 1
    return depth


def _inside(value: Any) -> list[Any]:
    return list(value.values()) if isinstance(value, dict) else value if isinstance(value, list) else []


def _no_number(text: str) -> Any:
    raise ValueError(text)


def _finite(text: str) -> float:
    value = float(text)
    if value in (float("inf"), float("-inf")):
        raise ValueError(text)
    return value


def wrong(desk: Desk, payload: bytes, **delivery: Any) -> list[str]:
    """All that is wrong with what came of a payload."""
    outcome = desk.feed(payload, **delivery)
    found = list(outcome.problems)
    command_id = plain_id(payload)
    if len(outcome.replies) > 1:
        found.append(f"{len(outcome.replies)} replies")
    if not outcome.replies and (command_id is not None or delivery.get("response_topic")):
        found.append(f"no reply, though the id {command_id!r} can be read; logged {outcome.drops}")
    if not outcome.replies and not outcome.drops:
        found.append("dropped without a word")
    if outcome.replies and command_id is not None and json.loads(outcome.replies[0].payload)["id"] != command_id:
        found.append(f"the reply has another id than {command_id!r}")
    if outcome.loop_s > MOST_ON_THE_LOOP_S:  # the payload's doing if it is so each time, else the collector's
        least_s = min(desk.feed(payload, **delivery).loop_s for _ in range(3))
        if least_s > MOST_ON_THE_LOOP_S:
            found.append(f"{least_s * 1e3:.0f} ms on the event loop")
    return found


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Desk]:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    with Desk(tmp_path) as desk:
        yield desk


@pytest.mark.parametrize("response_topic", [None, INBOX])
def test_everything_of_the_corpus_gets_one_reply_or_a_drop_that_is_told(desk: Desk, response_topic: str | None) -> None:
    found = {name: wrong(desk, payload, response_topic=response_topic) for name, payload in CORPUS.items()}
    assert {name: problems for name, problems in found.items() if problems} == {}


@settings(max_examples=400, deadline=None, suppress_health_check=list(HealthCheck))
@given(payload=payloads())
def test_hundreds_of_payloads_break_nothing(desk: Desk, payload: bytes) -> None:
    assert wrong(desk, payload) == []


@pytest.mark.soak
@settings(
    max_examples=5_000, deadline=None, suppress_health_check=list(HealthCheck), phases=[Phase.generate, Phase.shrink]
)
@given(payload=payloads())
def test_twenty_thousand_payloads_break_nothing(desk: Desk, payload: bytes) -> None:
    for one in (payload, *relatives(payload, 3)):
        assert wrong(desk, one) == [], one


def test_good_commands_are_answered_after_all_of_that(desk: Desk) -> None:
    for payload in CORPUS.values():
        desk.feed(payload)
    [reply] = desk.feed(json.dumps(valid(id="at-last")).encode()).replies
    assert reply.topic == "edge/rig/reply/at-last"
    assert json.loads(reply.payload)["status"] == "ok"


def test_refusals_are_short_however_long_the_command(desk: Desk) -> None:
    sizes = {
        name: len(reply.payload)
        for name, payload in CORPUS.items()
        for reply in desk.feed(payload).replies
        if json.loads(reply.payload)["status"] == "error"
    }
    assert {name: size for name, size in sizes.items() if size > MOST_IN_A_REFUSAL} == {}


def test_nothing_of_the_corpus_leaves_a_file_in_the_store(tmp_path: Path, desk: Desk) -> None:
    store = tmp_path / "store"
    before = {path for path in store.rglob("*") if path.is_file()}
    for payload in CORPUS.values():
        desk.feed(payload)
    after = {path for path in store.rglob("*") if path.is_file()}
    assert {path.name for path in after - before} <= {".lock", "registry.json"}


@pytest.mark.parametrize(
    "topic",
    ["", "#", "+/x", "a/#", "\0", "a\0b", "a\nb", "x" * 65535, "x" * 65536, "\ud800", "$SYS/x", "/", INBOX, AWAY],
)
@pytest.mark.parametrize("payload", [b'{"id":"a","command":"agent.info"}', b"\xff"])
def test_the_reply_goes_nowhere_that_mqtt_does_not_let_it(desk: Desk, topic: str, payload: bytes) -> None:
    outcome = desk.feed(payload, response_topic=topic)
    assert outcome.problems == []
    assert len(outcome.replies) + len(outcome.drops) == 1
    if payload != b"\xff":
        [reply] = outcome.replies
        assert reply.topic in (topic, "edge/rig/reply/a")


def test_what_is_retained_is_refused_whatever_it_is(desk: Desk) -> None:
    found = {name: wrong(desk, payload, retain=True) for name, payload in CORPUS.items()}
    assert {name: problems for name, problems in found.items() if problems} == {}
