"""Topics and JSON of the MQTT interface, version 1, both ways.

These structs are the contract: `docs/asyncapi.yaml` and the JSON Schemas are generated from them.
Units are in the names; unknown is null, never 0.
"""

from __future__ import annotations

import itertools
import secrets
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
from edge_agent.readings import BoardReadings, GpuReadings, HostReadings, ProcessReadings

SCHEMA_VERSION = 1
MAX_COMMAND_BYTES = 64_000

_RUN = secrets.token_hex(6)
_numbers = itertools.count()

Availability = Literal["online", "offline"]
CameraPhase = Literal["connecting", "running", "stalled", "backoff", "disabled"]
CheckState = Literal["ok", "degraded", "failed"]
ModelState = Literal["loading", "ready", "probation", "failed"]
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
    """What the model saw in one frame; the task decides which of the last keys is there. `id` is this message's
    own: one that comes twice comes with the same."""

    schema: int
    id: str
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
    `seq` and `captured_at` are of the frame that showed it. It comes at least once, always with the same `id`."""

    schema: int
    id: str
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


class Rejected(Struct, frozen=True):
    """The last model that was to run and did not come to it, and why."""

    model: str
    code: str
    message: str
    at: str


class ActiveModel(Struct, frozen=True):
    """The model in `status`, that runs: `state` and `reason` tell of the one that is on its way (`next`) too."""

    name: str | None
    version: str | None
    task: str | None
    state: ModelState
    reason: str | None = None
    next: str | None = None
    rejected: Rejected | None = None


class PolicyStatus(Struct, frozen=True):
    """The latency ladder in `status`. `rung`: 0 is the model that was asked for; `models`: what stands on the rungs;
    `floor`: no lower rung is of use, and latency is over the limit; `spent`: there were all the changes of an hour.
    `cause` and `reason` are of the last change."""

    state: Literal["off", "ok", "stepped_down", "floor", "spent"]
    rung: int
    models: list[str]
    limit_ms: float | None
    p95_ms: float | None
    changes_last_hour: int
    detail: str
    cause: Literal["latency", "thermal", "power_mode", "recovered"] | None = None
    reason: str | None = None


class Status(Struct, frozen=True):
    """What the agent is, retained. `overrides`: keys of the configuration that commands have changed since."""

    schema: int
    device: str
    state: AgentState
    version: str
    started_at: str
    model: ActiveModel
    backend: str | None
    policy: PolicyStatus
    overrides: list[str]
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
    """One named health check, in this state since `since`, the fact behind it, and how old that was at `at`."""

    state: CheckState
    fact: str
    since: str
    age_s: float


class Health(Struct, frozen=True):
    """Named checks, retained; `state` is the worst of them."""

    schema: int
    device: str
    at: str
    state: CheckState
    checks: dict[str, Check]


class Percentiles(Struct, frozen=True):
    """Of the `n` samples in the window, within 1 % (`max` is exact); null where there were none."""

    p50: float | None
    p95: float | None
    p99: float | None
    max: float | None
    n: int = 0


class Drops(Struct, frozen=True):
    """Frames that were captured and not inferred, by cause, since `since`."""

    full: int = 0
    stale: int = 0
    frozen: int = 0
    damaged: int = 0
    no_memory: int = 0
    shutdown: int = 0


class Connection(Struct, frozen=True):
    """How good a camera's connection is: `nominal_fps` is what the camera says it sends, `fps_last_hour` what
    it sent (outages included), `jitter_ms` the standard deviation of the time between two pictures over the
    last hour, `first_frame_ms` from the last connecting to its first picture, `last_reason` why it was last lost.
    `reconnects`, `stalls` and `threads_left_behind` count from `since` on."""

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
    """Counters since `since`; rates over the last interval. `skipped` pictures were not wanted (`fps`);
    `captured` is `inferred` and all `drops`, and what is on its way; `published` are results that the broker has.
    `capture_ms`: from a picture that is there to one in the queue. `objects` are those of the last result, by label."""

    captured: int
    inferred: int
    published: int
    drops: Drops
    skipped: int
    waiting: int
    captured_fps: float
    inferred_fps: float
    published_fps: float
    capture_ms: Percentiles
    objects: dict[str, int]
    connection: Connection


class SpoolStats(Struct, frozen=True):
    """What waits on disk for the broker; `trouble` says why it waits in memory instead."""

    messages: int
    bytes: int
    trouble: str | None


class OutboxStats(Struct, frozen=True):
    """Messages that wait for the broker in memory, by class; those dropped since `since`, by class and cause; those
    that the broker refused, by its reason."""

    waiting: dict[str, int]
    dropped: dict[str, dict[str, int]]
    refused: dict[str, int]
    spool: SpoolStats


class Stats(Struct, frozen=True):
    """Performance, every `stats.interval_s`. What is counted is counted from `since` on: the agent's start, or
    `stats.reset`. `stages_ms` and `batch_sizes` (batches by their number of frames) are of the last `window_s`, or from
    `since` on if that is later. `inference_clock`: whether `inference` is the GPU's own time, by CUDA events, or the
    CPU's, with all that it waited for. `commands`: replies, `ok` or by their code; `unanswerable` those for whose reply
    nobody left an address, `repeated` those that ran already. `process`, `host`, `gpus` and `board` are what the
    sensors saw last, null what they cannot see, and `sensor_troubles` why one of them sees nothing. `loop_lag_ms`: how
    late the event loop came to what was due in the last `window_s`. `log_lines_dropped`: those that a stuck stdout kept
    from the log."""

    schema: int
    device: str
    at: str
    since: str
    interval_s: float
    window_s: float
    model: str | None
    inference_clock: Literal["gpu", "cpu"] | None
    cameras: dict[str, CameraStats]
    stages_ms: dict[str, Percentiles]
    batch_sizes: dict[str, int]
    outbox: OutboxStats
    commands: dict[str, int]
    process: ProcessReadings
    loop_lag_ms: Percentiles
    host: HostReadings | None
    gpus: list[GpuReadings] | None
    board: BoardReadings | None
    sensor_troubles: dict[str, str]
    log_lines_dropped: int


class MemoryUse(Struct, frozen=True):
    """Megabytes before the model was loaded and after it had run; null where there is nothing to read."""

    gpu_before: float | None
    gpu_after: float | None
    rss_before: float
    rss_after: float

    @property
    def gpu(self) -> float | None:
        """What the model takes of the GPU's memory."""
        if self.gpu_before is None or self.gpu_after is None:
            return None
        return max(0.0, self.gpu_after - self.gpu_before)

    @property
    def rss(self) -> float:
        return max(0.0, self.rss_after - self.rss_before)


class InferenceLatency(Struct, frozen=True):
    """Milliseconds of `n` inferences of `batch` pictures."""

    p50: float
    p95: float
    p99: float
    n: int
    batch: int


class MeasuredOn(Struct, frozen=True):
    """What a figure was measured on. `size`: of the model's input, [width, height]."""

    device: str
    backend: str
    runtime: str
    precision: str | None
    size: tuple[int, int]
    power_mode: str | None


class Throughput(Struct, frozen=True):
    """Pictures a second where the model is never idle: batches of `batch`, `in_flight` of them at once."""

    pictures_per_s: float
    batch: int
    in_flight: int
    pictures: int
    seconds: float


class Measurement(Struct, frozen=True):
    """What a model took when it was last brought up in one way; nothing here is estimated. `throughput`: as it was
    last measured, by `edgectl models bench`; null: never was."""

    at: str
    where: MeasuredOn
    latency_ms: InferenceLatency
    memory_mb: MemoryUse
    throughput: Throughput | None = None


class ModelEntry(Struct, frozen=True):
    """A model the agent knows; `id` is what commands call it, `origin` says where it came from, `family` what its entry
    calls it, or what it was taken for. `measured`: what it took when it was last brought up here; null: never was."""

    id: str
    name: str
    version: str
    family: str
    task: str | None
    path: str
    size_bytes: int | None
    sha256: str | None
    origin: Literal["bundled", "config", "registered", "fetched"]
    active: bool
    measured: Measurement | None = None


class Models(Struct, frozen=True):
    """The index of models, retained."""

    schema: int
    device: str
    active: str | None
    models: list[ModelEntry]


class Job(Struct, frozen=True):
    """How something that takes its time goes, on `jobs/<id>`: a command's, by its id. `percent` is null where nothing
    tells; `code` and `message` say why it failed."""

    schema: int
    device: str
    id: str
    command: str
    state: Literal["running", "done", "failed"]
    phase: str | None
    percent: float | None
    started_at: str
    at: str
    code: str | None = None
    message: str | None = None


class Command(Struct, frozen=True):
    """A command as it comes in on a `cmd` topic. Who is not the `device`, or not of the `group` ("all": everybody is),
    that it names refuses it; a late one (`expires_at`) is refused; each waits up to `spread_s` at random first."""

    id: Annotated[str, Meta(min_length=1, max_length=128)]
    command: Annotated[str, Meta(min_length=1, max_length=128)]
    args: dict[str, Any] = {}
    expires_at: str | None = None
    device: str | None = None
    group: str | None = None
    spread_s: Annotated[float, Meta(ge=0)] = 0.0


class SignedCommand(Struct, frozen=True, forbid_unknown_fields=True):
    """A command in the operator's envelope: `signed` is a `Command` as JSON text, `signature` base64 of the Ed25519
    signature of its bytes."""

    signed: str
    signature: str


class Changed(Struct, frozen=True):
    """What a change of settings came to: which keys changed, the cameras that came, went or connect again, and the
    tables of the configuration that only a restart takes over."""

    changed: list[str]
    cameras: list[str]
    needs_restart: list[str]


class Reply(Struct, frozen=True, omit_defaults=True):
    """The answer to a command, on `reply/<id>` or the MQTT 5 response topic. What takes its time is `accepted` first;
    `ok` or `error` comes once."""

    device: str
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

    def listened(self, groups: Sequence[str]) -> list[str]:
        """Where commands come in: for this device, for all of the prefix, and for each of its groups."""
        fleet = [f"{self.prefix}/all/cmd", *(f"{self.prefix}/group/{name}/cmd" for name in groups)]
        return [self.command, *fleet]

    def reply(self, command_id: str) -> str:
        """Where the reply goes when the command named no response topic."""
        return f"{self.root}/reply/{_safe(command_id)}"

    def job(self, command_id: str) -> str:
        """How a command goes that takes its time."""
        return f"{self.root}/jobs/{_safe(command_id)}"

    def camera(self, name: str, leaf: Literal["status", "results", "events", "snapshot"]) -> str:
        return f"{self.root}/cameras/{name}/{leaf}"


def _safe(command_id: str) -> str:
    return "".join(sign if sign.isprintable() and sign not in "+#/" else "_" for sign in command_id)


def is_publishable(topic: str) -> bool:
    """Whether a topic that somebody else chose may be published to: no wildcard, nothing unprintable."""
    return 0 < len(topic) <= 1024 and topic.isprintable() and not set("+#") & set(topic)


_encoder = msgspec.json.Encoder()
_command_decoder = msgspec.json.Decoder(Command)


def encode(value: Struct) -> bytes:
    """JSON, UTF-8."""
    return _encoder.encode(value)


def _new_id() -> str:
    return f"{_RUN}-{next(_numbers):x}"


def retained(topic: str, value: Struct) -> Message:
    """A message that the broker keeps for those who come later."""
    return Message(topic, encode(value), "status", retain=True)


def availability(topics: Topics, state: Availability) -> Message:
    return Message(topics.available, state.encode(), "status", retain=True)


def encode_result(result: Result, topics: Topics) -> Message:
    """A result, ready to publish."""
    frame, timings, message_id = result.frame, result.timings, _new_id()
    message = ResultMessage(
        schema=SCHEMA_VERSION,
        id=message_id,
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
    return Message(topics.camera(frame.camera, "results"), encode(message), id=message_id)


def encode_event(event: Event, topics: Topics) -> Message:
    """An event, ready to publish: none may be missed."""
    frame, message_id = event.result.frame, _new_id()
    message = EventMessage(
        schema=SCHEMA_VERSION,
        id=message_id,
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
    return Message(topics.camera(frame.camera, "events"), encode(message), "events", id=message_id)


def decode_command(payload: bytes) -> Command:
    """The command in a payload. Raises `CommandError` (`bad_arguments`, `expired`) with what is wrong."""
    if len(payload) > MAX_COMMAND_BYTES:
        raise CommandError(f"the command has {len(payload)} bytes, more than {MAX_COMMAND_BYTES}", code="bad_arguments")
    try:
        command = _command_decoder.decode(payload)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise CommandError(f"not a command: {error}", code="bad_arguments") from error
    require_fresh(command)
    return command


def require_fresh(command: Command) -> None:
    """Raises `CommandError` (`expired`, `bad_arguments`)."""
    if command.expires_at is not None and _parse_time(command.expires_at) < datetime.now(timezone.utc):
        raise CommandError(f"the command expired at {command.expires_at}", code="expired")


def command_id(payload: bytes) -> str | None:
    """The id of a payload that is otherwise no command, so that even its refusal finds its sender."""
    if len(payload) > MAX_COMMAND_BYTES:
        return None
    try:
        if b'"signed"' in payload:
            payload = msgspec.json.decode(payload, type=SignedCommand).signed.encode()
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        pass
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
        "reply/{id}": Reply,
        "jobs/{id}": Job,
    }


def commanded() -> Mapping[str, str]:
    """The topics on which commands come in, by a name for each; on all of them a `Command` or a `SignedCommand`."""
    return {
        "cmd": "{prefix}/{device}/cmd",
        "allCmd": "{prefix}/all/cmd",
        "groupCmd": "{prefix}/group/{group}/cmd",
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
