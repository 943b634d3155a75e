"""Topics and JSON of the MQTT interface, version 1, both ways.

These structs are the contract: `docs/asyncapi.yaml` and the JSON Schemas are generated from them.
Units are in the names; unknown is null, never 0.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from typing import Annotated, Any, Literal

import msgspec
from msgspec import UNSET, Meta, Struct, UnsetType

from edge_agent.data import Event, Message, ModelRef, Result, TrackState
from edge_agent.errors import CommandError, SourceReason
from edge_agent.predictions import (
    ClassScore,
    DepthMessage,
    Detection,
    EmbeddingMessage,
    Pose,
    SegmentationMessage,
    TensorMessage,
    described,
    label,
)

SCHEMA_VERSION = 1
MAX_COMMAND_BYTES = 64_000

Availability = Literal["online", "offline"]
CameraPhase = Literal["connecting", "running", "stalled", "backoff", "disabled"]
CheckState = Literal["ok", "degraded", "failed"]
ModelState = Literal["loading", "ready", "failed"]
AgentState = Literal["starting", "running", "stopping"]


class Model(Struct, frozen=True):
    """The model that made a result."""

    name: str
    version: str
    task: str


class Latency(Struct, frozen=True):
    """Milliseconds by stage; `total` runs from capture to the end of post-processing."""

    queue: float
    preprocess: float
    inference: float
    postprocess: float
    total: float


class ResultMessage(Struct, frozen=True):
    """What the model saw in one frame; the task decides which of the last keys is there."""

    schema: int
    device: str
    camera: str
    seq: int
    captured_at: str
    width: int
    height: int
    model: Model
    latency_ms: Latency
    detections: list[Detection] | UnsetType = UNSET
    poses: list[Pose] | UnsetType = UNSET
    classes: list[ClassScore] | UnsetType = UNSET
    segmentation: SegmentationMessage | UnsetType = UNSET
    depth: DepthMessage | UnsetType = UNSET
    embedding: EmbeddingMessage | UnsetType = UNSET
    tensors: dict[str, TensorMessage] | UnsetType = UNSET
    zones: dict[str, dict[str, int]] | UnsetType = UNSET


class TrackStateMessage(Struct, frozen=True):
    """How a followed object was seen: box in source pixels, and the zones that it stands in."""

    label: str
    class_id: int
    score: float
    box: tuple[float, float, float, float]
    zones: list[str]


class CrossingMessage(Struct, frozen=True):
    """A line was crossed; `forward` is from its left to its right, as one looks from its first point to the second."""

    line: str
    direction: Literal["forward", "backward"]


class EventMessage(Struct, frozen=True):
    """What happened to a followed object: `new`, `update` (it entered or left a zone, or crossed a line) or `end`;
    `seq` and `captured_at` are of the frame that showed it."""

    schema: int
    device: str
    camera: str
    seq: int
    captured_at: str
    type: Literal["new", "update", "end"]
    track_id: int
    entered: list[str]
    left: list[str]
    crossed: list[CrossingMessage]
    before: TrackStateMessage | None
    after: TrackStateMessage | None


class ActiveModel(Struct, frozen=True):
    """The model in `status`: `reason` says why it is not `ready`."""

    name: str | None
    version: str | None
    task: str | None
    state: ModelState
    reason: str | None = None


class Status(Struct, frozen=True):
    """What the agent is, retained."""

    schema: int
    device: str
    state: AgentState
    version: str
    started_at: str
    model: ActiveModel
    backend: str | None
    degraded: list[str]
    cameras: dict[str, CameraPhase]


class CameraStatus(Struct, frozen=True):
    """How one camera fares, retained; `reason` says why it does not run."""

    schema: int
    camera: str
    state: CameraPhase
    since: str
    reason: SourceReason | None = None
    message: str | None = None
    width: int | None = None
    height: int | None = None
    fps: float | None = None


class Check(Struct, frozen=True):
    """One named health check and the fact behind it."""

    state: CheckState
    fact: str


class Health(Struct, frozen=True):
    """Named checks, retained; `state` is the worst of them."""

    schema: int
    device: str
    at: str
    state: CheckState
    checks: dict[str, Check]


class Percentiles(Struct, frozen=True):
    """Of the last samples; null where there were none."""

    p50: float | None
    p95: float | None
    p99: float | None
    max: float | None


class Drops(Struct, frozen=True):
    """Frames that were captured and not inferred, by cause, since the start."""

    full: int = 0
    stale: int = 0
    frozen: int = 0
    damaged: int = 0
    no_memory: int = 0
    shutdown: int = 0


class Connection(Struct, frozen=True):
    """How good a camera's connection is: `nominal_fps` is what the camera says it sends, `fps_last_hour` what
    it sent (outages included), `jitter_ms` the standard deviation of the time between two pictures over the
    last hour, `first_frame_ms` from the last connecting to its first picture, `last_reason` why it was last lost."""

    nominal_fps: float | None
    fps_last_hour: float | None
    jitter_ms: float | None
    reconnects_last_hour: int
    stalls_last_hour: int
    reconnects: int
    stalls: int
    threads_left_behind: int
    first_frame_ms: float | None
    last_reason: SourceReason | None


class CameraStats(Struct, frozen=True):
    """Counters since the start; rates over the last interval. `skipped` pictures were not wanted (`fps`);
    `captured` is `inferred` and all `drops`, and what is on its way."""

    captured: int
    inferred: int
    published: int
    drops: Drops
    skipped: int
    waiting: int
    captured_fps: float
    inferred_fps: float
    connection: Connection


class ProcessStats(Struct, frozen=True):
    """The agent's own process."""

    cpu_percent: float | None
    rss_mb: float | None
    threads: int | None
    open_files: int | None


class OutboxStats(Struct, frozen=True):
    """Messages waiting for the broker, and dropped since the start."""

    waiting: int
    dropped: int


class Stats(Struct, frozen=True):
    """Performance, every `stats.interval_s`."""

    schema: int
    device: str
    at: str
    since: str
    interval_s: float
    model: str | None
    cameras: dict[str, CameraStats]
    stages_ms: dict[str, Percentiles]
    outbox: OutboxStats
    process: ProcessStats


class ModelEntry(Struct, frozen=True):
    """A model the agent knows; `origin` says where it came from, `family` what its entry calls it, or what the active
    one was taken for."""

    name: str
    version: str
    family: str
    path: str
    size_bytes: int | None
    origin: Literal["bundled", "config"]
    active: bool


class Models(Struct, frozen=True):
    """The index of models, retained."""

    schema: int
    device: str
    active: str | None
    models: list[ModelEntry]


class Command(Struct, frozen=True):
    """A command as it comes in on `cmd`."""

    id: Annotated[str, Meta(min_length=1, max_length=128)]
    command: Annotated[str, Meta(min_length=1, max_length=128)]
    args: dict[str, Any] = {}
    expires_at: str | None = None


class Reply(Struct, frozen=True, omit_defaults=True):
    """The answer to a command, on `reply/<id>` or the MQTT 5 response topic."""

    id: str | None
    status: Literal["ok", "error", "accepted"]
    duration_ms: float
    code: str | UnsetType = UNSET
    message: str | UnsetType = UNSET
    result: Any | UnsetType = UNSET


@dataclass(frozen=True, slots=True)
class Topics:
    """The names of the agent's topics."""

    prefix: str
    device: str

    @property
    def root(self) -> str:
        return f"{self.prefix}/{self.device}"

    @property
    def available(self) -> str:
        return f"{self.root}/available"

    @property
    def status(self) -> str:
        return f"{self.root}/status"

    @property
    def health(self) -> str:
        return f"{self.root}/health"

    @property
    def stats(self) -> str:
        return f"{self.root}/stats"

    @property
    def models(self) -> str:
        return f"{self.root}/models"

    @property
    def command(self) -> str:
        return f"{self.root}/cmd"

    def reply(self, command_id: str) -> str:
        """Where the reply goes when the command named no response topic."""
        safe = "".join(sign if sign.isprintable() and sign not in "+#/" else "_" for sign in command_id)
        return f"{self.root}/reply/{safe}"

    def camera(self, name: str, leaf: Literal["status", "results", "events", "snapshot"]) -> str:
        return f"{self.root}/cameras/{name}/{leaf}"


def is_publishable(topic: str) -> bool:
    """Whether a topic that somebody else chose may be published to: no wildcard, nothing unprintable."""
    return 0 < len(topic) <= 1024 and topic.isprintable() and not set("+#") & set(topic)


_encoder = msgspec.json.Encoder()
_command_decoder = msgspec.json.Decoder(Command)


def encode(value: Struct) -> bytes:
    """JSON, UTF-8."""
    return _encoder.encode(value)


def retained(topic: str, value: Struct) -> Message:
    """A message that the broker keeps for those who come later."""
    return Message(topic, encode(value), qos=1, retain=True)


def availability(topics: Topics, state: Availability) -> Message:
    return Message(topics.available, state.encode(), qos=1, retain=True)


def encode_result(result: Result, topics: Topics) -> Message:
    """A result, ready to publish with QoS 0."""
    frame, timings = result.frame, result.timings
    message = ResultMessage(
        schema=SCHEMA_VERSION,
        device=topics.device,
        camera=frame.camera,
        seq=frame.seq,
        captured_at=timestamp(frame.captured_at_ns),
        width=frame.image.shape[1],
        height=frame.image.shape[0],
        model=Model(result.model.name, result.model.version, result.model.task),
        latency_ms=Latency(
            queue=round(timings.queue_ms, 3),
            preprocess=round(timings.preprocess_ms, 3),
            inference=round(timings.inference_ms, 3),
            postprocess=round(timings.postprocess_ms, 3),
            total=round(timings.total_ms, 3),
        ),
        **described(result.prediction, result.model.names, frame.image.shape[:2]),
        zones=UNSET
        if result.zone_counts is None
        else {name: dict(count) for name, count in result.zone_counts.items()},
    )
    return Message(topics.camera(frame.camera, "results"), encode(message))


def encode_event(event: Event, topics: Topics) -> Message:
    """An event, ready to publish with QoS 1: none may be missed."""
    frame = event.result.frame
    message = EventMessage(
        schema=SCHEMA_VERSION,
        device=topics.device,
        camera=frame.camera,
        seq=frame.seq,
        captured_at=timestamp(frame.captured_at_ns),
        type=event.type,
        track_id=event.track_id,
        entered=list(event.entered),
        left=list(event.left),
        crossed=[CrossingMessage(crossing.line, crossing.direction) for crossing in event.crossed],
        before=_track_state(event.before, event.result.model),
        after=_track_state(event.after, event.result.model),
    )
    return Message(topics.camera(frame.camera, "events"), encode(message), qos=1)


def decode_command(payload: bytes) -> Command:
    """The command in a payload. Raises `CommandError` (`bad_arguments`, `expired`) with what is wrong."""
    if len(payload) > MAX_COMMAND_BYTES:
        raise CommandError(f"the command has {len(payload)} bytes, more than {MAX_COMMAND_BYTES}", code="bad_arguments")
    try:
        command = _command_decoder.decode(payload)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise CommandError(f"not a command: {error}", code="bad_arguments") from error
    if command.expires_at is not None and _parse_time(command.expires_at) < datetime.now(timezone.utc):
        raise CommandError(f"the command expired at {command.expires_at}", code="expired")
    return command


def command_id(payload: bytes) -> str | None:
    """The id of a payload that is otherwise no command, so that even its refusal finds its sender."""
    if len(payload) > MAX_COMMAND_BYTES:
        return None
    try:
        value = msgspec.json.decode(payload, type=_OnlyId).id
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return None
    return value if 0 < len(value) <= 128 else None


class _OnlyId(Struct):
    id: str


def timestamp(epoch_ns: int) -> str:
    """RFC 3339 in UTC with microseconds."""
    moment = _EPOCH + timedelta(microseconds=epoch_ns // 1000)
    return moment.isoformat(timespec="microseconds")[:-6] + "Z"


_EPOCH = datetime(1970, 1, 1, tzinfo=timezone.utc)


def percentiles(samples: Sequence[float]) -> Percentiles:
    """Nearest-rank percentiles of some samples."""
    if not samples:
        return Percentiles(None, None, None, None)
    ordered = sorted(samples)
    p50, p95, p99 = (ordered[max(0, math.ceil(q * len(ordered)) - 1)] for q in (0.5, 0.95, 0.99))
    return Percentiles(*(round(value, 3) for value in (p50, p95, p99, ordered[-1])))


def contract() -> Mapping[str, type[Struct]]:
    """Every message type by the topic (below `<prefix>/<device>/`) that carries it as JSON."""
    return {
        "status": Status,
        "health": Health,
        "stats": Stats,
        "models": Models,
        "cameras/{camera}/status": CameraStatus,
        "cameras/{camera}/results": ResultMessage,
        "cameras/{camera}/events": EventMessage,
        "cmd": Command,
        "reply/{id}": Reply,
    }


def model_of(ref: ModelRef) -> Model:
    return Model(ref.name, ref.version, ref.task)


def _track_state(state: TrackState | None, model: ModelRef) -> TrackStateMessage | None:
    if state is None:
        return None
    x1, y1, x2, y2 = (round(side, 2) for side in state.box)
    name = label(model.names, state.class_id)
    return TrackStateMessage(name, state.class_id, round(state.score, 4), (x1, y1, x2, y2), list(state.zones))


def _parse_time(text: str) -> datetime:
    try:
        moment = datetime.fromisoformat(text.replace("Z", "+00:00"))
    except ValueError as error:
        raise CommandError(
            f"expires_at {text!r} is no RFC 3339 time, such as 2026-01-31T12:00:00Z", code="bad_arguments"
        ) from error
    return moment if moment.tzinfo else moment.replace(tzinfo=timezone.utc)
