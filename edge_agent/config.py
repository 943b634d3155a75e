"""The configuration: TOML in, checked structs out, every mistake named at once.

Knows the shape of the file; what a camera or a backend may be told is asked of its own module.
"""

from __future__ import annotations

import hashlib
import os
import re
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol, TypeVar, get_args, get_origin, get_type_hints

import msgspec
from msgspec import Meta, Struct

from edge_agent import migrations, plugins
from edge_agent._compat import tomllib
from edge_agent.errors import ConfigError

T = TypeVar("T", bound=Struct)
DropPolicy = Literal["drop_oldest", "drop_newest", "block"]
Positive = Annotated[float, Meta(gt=0)]
Count = Annotated[int, Meta(ge=1)]
Side = Annotated[int, Meta(ge=1, le=16_384)]
Share = Annotated[float, Meta(ge=0, le=1)]
Port = Annotated[int, Meta(ge=1, le=65535)]
Name = Annotated[str, Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}\Z")]
ModelName = Annotated[str, Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}(@[A-Za-z0-9][A-Za-z0-9._-]{0,63})?\Z")]
"""A model's name, or `name@version` of one in the store; without a version it is the last that came."""
Precision = Literal["fp32", "fp16", "int8"]
ConfigPath = Annotated[str, Meta(min_length=1, extra={"from": "the file's folder"})]
"""A path that, where it is relative, is taken from the configuration file's folder."""


class Secret:
    """A password: shows itself to nobody who does not ask for `reveal()`."""

    __slots__ = ("_value",)

    def __init__(self, value: str) -> None:
        self._value = value

    def reveal(self) -> str:
        return self._value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Secret) and self._value == other._value

    def __hash__(self) -> int:
        return hash(self._value)

    def __repr__(self) -> str:
        return "Secret('***')"


class Table(Struct, kw_only=True, forbid_unknown_fields=True):
    """A table of the file."""


class AgentOptions(Table):
    """`[agent]`"""

    device: str = ""
    shutdown_timeout_s: Positive = 10.0


Qos = Literal[0, 1, 2]


class QosOptions(Table):
    """`[mqtt.qos]`: how surely each class of message arrives; `status` is all that is retained, and statistics."""

    results: Qos = 0
    events: Qos = 1
    replies: Qos = 1
    status: Qos = 1


class MqttOptions(Table):
    """`[mqtt]`. `host` is the path of a socket where `transport` is "unix". `client_id`: None for one of this machine's
    own; `groups` of devices that this one listens with; `max_pending`: messages that wait for the broker's word."""

    host: Annotated[str, Meta(pattern=r"^\S+\Z")] = "127.0.0.1"
    port: Port = 1883
    transport: Literal["tcp", "websockets", "unix"] = "tcp"
    websocket_path: str = "/mqtt"
    embedded: bool = False
    prefix: Annotated[str, Meta(pattern=r"^[^#+\s/$][^#+\s]*\Z")] = "edge"
    groups: list[Name] = msgspec.field(default_factory=list)
    client_id: str | None = None
    username: str = ""
    password: Secret | None = None
    protocol: Literal["auto", "5", "3.1.1"] = "auto"
    keepalive_s: Annotated[int, Meta(ge=5, le=3600)] = 15
    tls: bool = False
    tls_ca: ConfigPath | None = None
    tls_cert: ConfigPath | None = None
    tls_key: ConfigPath | None = None
    tls_insecure: bool = False
    qos: QosOptions = msgspec.field(default_factory=QosOptions)
    max_pending: Annotated[int, Meta(ge=1, le=1000)] = 20
    max_queued_results: Count = 1000
    command_public_key_file: ConfigPath | None = None
    disabled_commands: list[str] = msgspec.field(default_factory=list)


class SpoolOptions(Table):
    """`[spool]`: messages on disk while the broker is away."""

    enabled: bool = True
    results: bool = False
    max_mb: Positive = 64.0
    max_messages: Count = 100_000
    max_age_s: Positive = 604_800.0
    fsync_interval_s: Positive = 1.0
    drain_per_s: Positive = 100.0


class HomeAssistantOptions(Table):
    """`[homeassistant]`: discovery over MQTT."""

    enabled: bool = False
    prefix: Annotated[str, Meta(pattern=r"^[^#+\s/$][^#+\s]*\Z")] = "homeassistant"


class PrometheusOptions(Table):
    """`[prometheus]`: `listen` is address:port; empty: no exporter."""

    listen: str = ""


class ModelChoice(Table):
    """`[model]`: what runs, and how another takes its place. `probation_frames` and `probation_s`: how long a new
    model is watched, whichever ends first; `latency_factor`: how much slower than the limit it may be meanwhile."""

    active: ModelName = "demo-320"
    swap: Literal["beside", "replace"] = "beside"
    reserve_mb: Annotated[float, Meta(ge=0)] = 256.0
    probation_frames: Count = 60
    probation_s: Positive = 10.0
    latency_factor: Annotated[float, Meta(ge=1)] = 1.5


class PreprocessOptions(Table):
    """`preprocess` of a model: what differs from the family's defaults. See `data.PreprocessSpec`."""

    size: tuple[Side, Side] | None = None
    resize: Literal["letterbox", "stretch", "crop"] | None = None
    anchor: Literal["center", "top-left"] | None = None
    pad: Annotated[int, Meta(ge=0, le=255)] | None = None
    color: Literal["rgb", "bgr"] | None = None
    scale: Positive | None = None
    mean: tuple[float, float, float] | None = None
    std: tuple[Positive, Positive, Positive] | None = None


class Cheaper(Table):
    """One of `cheaper` of a model: the same file run for less, by another precision or a smaller picture."""

    precision: Precision | None = None
    size: tuple[Side, Side] | None = None


class ShapeRange(Table):
    """`shapes.<input>` of a model: what an engine built from it must take, and what it is made fast for."""

    min: list[Count]
    opt: list[Count]
    max: list[Count]


class ModelOptions(Table):
    """`[models.<name>]`: a model of yours, and what its file cannot say about itself."""

    path: ConfigPath
    family: str = "auto"
    version: str = "1"
    labels: str | list[str] | None = None
    preprocess: PreprocessOptions = msgspec.field(default_factory=PreprocessOptions)
    options: dict[str, Any] = msgspec.field(default_factory=dict)
    inputs: dict[str, Any] = msgspec.field(default_factory=dict)
    dequantize: dict[str, tuple[Positive, float]] = msgspec.field(default_factory=dict)
    precision: Precision | None = None
    calibration: ConfigPath | None = None
    shapes: dict[str, ShapeRange] = msgspec.field(default_factory=dict)
    max_latency_ms: Positive | None = None
    cheaper: list[Cheaper] = msgspec.field(default_factory=list)


class ModelsOptions(Table):
    """`[models]`: `dir` is where the store keeps models that were registered or fetched; each table is one of yours."""

    dir: ConfigPath | None = None
    entries: dict[Name, ModelOptions] = msgspec.field(default_factory=dict)


class FetchOptions(Table):
    """`[fetch]`: what models may be downloaded. `hosts`: from these alone, which may speak plain http too."""

    hosts: list[str] = msgspec.field(default_factory=list)
    max_mb: Positive = 2000.0
    timeout_s: Positive = 3600.0
    stall_timeout_s: Positive = 30.0
    allow_private: bool = False
    ca_file: ConfigPath | None = None
    public_key_file: ConfigPath | None = None
    require_signature: bool = False


class PolicyOptions(Table):
    """`[policy]`: the latency ladder. `recover_below`: the share of the limit under which a better model comes back."""

    enabled: bool | Literal["auto"] = "auto"
    max_latency_ms: Positive = 50.0
    window_s: Positive = 10.0
    ladder: list[ModelName] = msgspec.field(default_factory=list)
    dwell_s: Annotated[float, Meta(ge=60)] = 60.0
    max_changes_per_hour: Count = 6
    recover_below: Annotated[float, Meta(gt=0, lt=1)] = 0.6


class InferenceOptions(Table):
    """`[inference]`"""

    backend: str = "auto"
    fallback: Literal["onnx", ""] = "onnx"
    max_batch: Count = 8
    batch_window_ms: Annotated[float, Meta(ge=0, le=1000)] = 0.0
    score_threshold: Share = 0.4
    iou_threshold: Share = 0.5
    max_detections: Count = 300
    classes: list[str] = msgspec.field(default_factory=list)
    max_results_per_s: Annotated[float, Meta(ge=0)] = 0.0


class TrackingOptions(Table):
    """`[tracking]`: objects get ids that last from frame to frame. `high`: scores above it are sure, `low`: those above
    it may go on with a track, `new`: those at it begin one; `match`: the largest distance of a box from its track, by
    overlap and score; `lost_frames`: how long an object may be out of sight."""

    enabled: bool = False
    high: Share = 0.5
    low: Share = 0.1
    new: Share = 0.6
    match: Share = 0.8
    lost_frames: Count = 30


class QueueOptions(Table):
    """`[queue]`: what each camera may keep waiting; a camera's own keys come first."""

    drop: DropPolicy = "drop_oldest"
    max_frames: Count = 4
    max_mb: Positive = 64.0
    max_staleness_ms: Annotated[int, Meta(ge=0)] = 1000


class CameraOptions(Table):
    """The keys that every camera has, whatever its source; each source's `Options` adds its own."""

    source: str
    enabled: bool = True
    isolation: Literal["thread", "process"] = "thread"
    open_timeout_s: Positive = 10.0
    stall_timeout_s: Positive = 5.0
    frozen_timeout_s: Annotated[float, Meta(ge=0)] = 60.0
    backoff_max_s: Positive = 30.0
    drop: DropPolicy | None = None
    max_frames: Count | None = None
    max_staleness_ms: Annotated[int, Meta(ge=0)] | None = None
    zones: dict[Name, Annotated[list[tuple[Share, Share]], Meta(min_length=3)]] = msgspec.field(default_factory=dict)
    lines: dict[Name, tuple[tuple[Share, Share], tuple[Share, Share]]] = msgspec.field(default_factory=dict)


class StatsOptions(Table):
    """`[stats]`"""

    interval_s: Positive = 10.0


class HealthOptions(Table):
    """`[health]`: when what is checked is no longer well. `recovery_s`: how long it must be well again before it counts
    as that; `min_memory_share` and `min_disk_mb`: what is to be available, a fifth of which is a failure."""

    recovery_s: Annotated[float, Meta(ge=0)] = 5.0
    max_result_age_s: Positive = 5.0
    max_temperature_c: Positive = 90.0
    min_memory_share: Share = 0.05
    min_disk_mb: Annotated[float, Meta(ge=0)] = 500.0


class SnapshotOptions(Table):
    """`[snapshots]`"""

    directory: str = "snapshots"
    on_start: bool = True
    max_kb: Positive = 1000.0
    jpeg_quality: Annotated[int, Meta(ge=1, le=100)] = 85


class LoggingOptions(Table):
    """`[logging]`"""

    level: Literal["debug", "info", "warning", "error"] = "info"
    format: Literal["auto", "console", "json"] = "auto"


class Config(Table):
    """The whole file. `cameras` and `backends` hold the options of their own plug-ins."""

    config_version: Count = migrations.VERSION
    agent: AgentOptions = msgspec.field(default_factory=AgentOptions)
    mqtt: MqttOptions = msgspec.field(default_factory=MqttOptions)
    model: ModelChoice = msgspec.field(default_factory=ModelChoice)
    models: ModelsOptions = msgspec.field(default_factory=ModelsOptions)
    fetch: FetchOptions = msgspec.field(default_factory=FetchOptions)
    policy: PolicyOptions = msgspec.field(default_factory=PolicyOptions)
    inference: InferenceOptions = msgspec.field(default_factory=InferenceOptions)
    backends: dict[str, Table] = msgspec.field(default_factory=dict)
    tracking: TrackingOptions = msgspec.field(default_factory=TrackingOptions)
    queue: QueueOptions = msgspec.field(default_factory=QueueOptions)
    cameras: dict[Name, CameraOptions] = msgspec.field(default_factory=dict)
    spool: SpoolOptions = msgspec.field(default_factory=SpoolOptions)
    homeassistant: HomeAssistantOptions = msgspec.field(default_factory=HomeAssistantOptions)
    prometheus: PrometheusOptions = msgspec.field(default_factory=PrometheusOptions)
    stats: StatsOptions = msgspec.field(default_factory=StatsOptions)
    health: HealthOptions = msgspec.field(default_factory=HealthOptions)
    snapshots: SnapshotOptions = msgspec.field(default_factory=SnapshotOptions)
    logging: LoggingOptions = msgspec.field(default_factory=LoggingOptions)

    @property
    def device(self) -> str:
        """The stable name of this machine: configured, or the host name with a part of the machine id."""
        return self.agent.device or _machine_name()


class _WithOptions(Protocol):
    Options: type[Table]


def load(
    path: Path, *, environ: Mapping[str, str] = os.environ, tell: Callable[[str], None] = lambda sentence: None
) -> Config:
    """Read and check a file. Raises `ConfigError` holding every problem found, each with its key's path.

    Relative paths in `*_file` keys and in the `path` of models and files are taken from the file's folder.
    The error's `usable` is what could be read all the same. `tell` hears of each key of an older version that is
    elsewhere now.
    """
    return parse(read(path), folder=path.parent, environ=environ, tell=tell)


def read(path: Path) -> dict[str, Any]:
    """The file's tables as they are. Raises `ConfigError`."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}; give the file with --config") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8: {error}") from error
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path}: not valid TOML: {error}") from error


def parse(
    raw: Mapping[str, Any],
    *,
    folder: Path = Path(),
    environ: Mapping[str, str] = os.environ,
    tell: Callable[[str], None] = lambda sentence: None,
) -> Config:
    """A checked `Config` from decoded TOML, of this version or an older one; see `load`."""
    tables, moved = migrations.migrated(raw)
    for sentence in moved:
        tell(sentence)
    reader = _Reader(folder, environ)
    config = reader.table(tables, Config, "")
    problems = [*reader.problems, *(_contradictions(config) if config and not reader.problems else ())]
    if problems or config is None:
        raise ConfigError(*problems, usable=config)
    return config


class _Reader:
    """Walks the raw tables beside the types, so that one mistake does not hide the next."""

    def __init__(self, folder: Path, environ: Mapping[str, str]) -> None:
        self.problems: list[str] = []
        self._folder = folder
        self._environ = environ

    def table(self, raw: object, kind: type[T], path: str) -> T | None:
        """`raw` as a struct of type `kind`, without the keys for which a problem was noted; None where
        nothing can be made of it."""
        if not isinstance(raw, Mapping):
            self.problems.append(f"{path}: expected a table, got {_kind(raw)}")
            return None
        types = get_type_hints(kind, include_extras=True)
        values: dict[str, Any] = {}
        for key, value in self._with_secrets(raw, types, path):
            where = f"{path}.{key}" if path else key
            if key not in types:
                self.problems.append(f"{where}: unknown key{plugins.nearest(key, list(types))}")
                continue
            noted = len(self.problems)
            read = self._value(value, types[key], where)
            if len(self.problems) == noted or isinstance(read, (Table, dict)):
                values[key] = read
        required = {field.name for field in msgspec.structs.fields(kind) if field.required}
        for key in sorted(required - set(raw)):
            self.problems.append(f"{path}: the key {key!r} is missing")
        return kind(**values) if required <= set(values) else None

    def _value(self, value: object, kind: Any, path: str) -> Any:
        if path == "models":
            return self._models(value)
        if readers := {
            "cameras": (self._camera, Name),
            "backends": (self._backend, str),
        }.get(path):
            return self._each(value, path, *readers)
        if isinstance(kind, type) and issubclass(kind, Struct):
            return self.table(value, kind, path)
        try:
            read = msgspec.convert(self._expanded(value), kind, dec_hook=_decode_secret)
        except msgspec.ValidationError as error:
            reason, _, inside = str(error).partition(" - at `$")
            self.problems.append(f"{path}{inside.rstrip('`')}: {_friendly(reason, value, kind)}")
        except ConfigError as error:
            self.problems.append(f"{path}: {error}")
        else:
            return self._resolved(read, kind, path)
        return None

    def _resolved(self, value: Any, kind: Any, path: str) -> Any:
        """`value`, with a path taken from the file's folder; `labels` is one if such a file is there."""
        if value is not None and (kind == ConfigPath or ConfigPath in get_args(kind)):
            return str(self._folder / value)
        if path.startswith("models.") and path.endswith(".labels") and isinstance(value, str):
            beside = self._folder / value
            return str(beside) if os.path.isfile(beside) else value  # noqa: PTH113  is False for what may not be seen
        return value

    def _each(self, value: object, path: str, read: Callable[[object, str], Any], name_kind: Any) -> dict[str, Any]:
        if not isinstance(value, Mapping):
            self.problems.append(f"{path}: expected tables [{path}.<name>], got {_kind(value)}")
            return {}
        out = {}
        for name, raw in value.items():
            where = f"{path}.{name}"
            try:
                msgspec.convert(name, name_kind)
            except msgspec.ValidationError:
                self.problems.append(f"{where}: a name has 1 to 64 of A-Z a-z 0-9 . _ - and starts with no sign")
                continue
            if (table := read(raw, where)) is not None:
                out[name] = table
        return out

    def _models(self, raw: object) -> Any:
        """`[models]`: its own keys, and the tables in it, each of which is a model."""
        if not isinstance(raw, Mapping):
            self._each(raw, "models", self._camera, Name)
            return ModelsOptions()
        entries = {key: value for key, value in raw.items() if key != "dir" or isinstance(value, Mapping)}
        models = self.table({key: raw[key] for key in raw if key not in entries}, ModelsOptions, "models")
        assert models is not None
        models.entries = self._each(entries, "models", lambda value, at: self.table(value, ModelOptions, at), Name)
        return models

    def _camera(self, raw: object, path: str) -> Any:
        source = raw.get("source") if isinstance(raw, Mapping) else None
        try:
            source = self._expanded(source)
        except ConfigError as error:
            self.problems.append(f"{path}.source: {error}")
            return None
        if not isinstance(source, str):
            return self.table(raw, CameraOptions, path)
        return self._plugin_table("sources", source, raw, path, f"{path}.source")

    def _backend(self, raw: object, path: str) -> Any:
        return self._plugin_table("backends", path.partition(".")[2], raw, path, path)

    def _plugin_table(self, kind: plugins.Kind, name: str, raw: object, path: str, blame: str) -> Any:
        try:
            plugin: _WithOptions = plugins.load(kind, name)
        except ConfigError as error:
            self.problems.append(f"{blame}: {error}")
            return None
        return self.table(raw, plugin.Options, path)

    def _with_secrets(
        self, raw: Mapping[str, Any], types: Mapping[str, Any], path: str
    ) -> Iterator[tuple[str, object]]:
        """The table's items, with `password_file` read into `password` for keys that hold secrets."""
        for key, value in raw.items():
            target = key.removesuffix("_file")
            if key in types or target == key or not _is_secret(types.get(target)):
                yield key, value
                continue
            where = f"{path}.{key}"
            if target in raw:
                self.problems.append(f"{where}: give either {target!r} or {key!r}, not both")
                continue
            try:
                yield target, (self._folder / str(self._expanded(value))).read_text().strip()
            except (OSError, UnicodeDecodeError, ConfigError) as error:
                reason = getattr(error, "strerror", None) or getattr(error, "reason", None) or error
                self.problems.append(f"{where}: cannot read the secret: {reason}")

    def _expanded(self, value: object) -> object:
        """`value` with `${VAR}` and `${VAR:-default}` replaced in its strings."""
        if isinstance(value, str):
            return _VARIABLE.sub(self._variable, value)
        if isinstance(value, list):
            return [self._expanded(item) for item in value]
        if isinstance(value, dict):
            return {key: self._expanded(item) for key, item in value.items()}
        return value

    def _variable(self, match: re.Match[str]) -> str:
        name, default = match.group(1), match.group(2)
        value = self._environ.get(name, default)
        if value is None:
            raise ConfigError(f"the environment variable {name} is not set; set it, or write ${{{name}:-default}}")
        return value


_VARIABLE = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)(?::-([^}]*))?\}")


def _contradictions(config: Config) -> Iterator[str]:
    if not config.cameras:
        yield "cameras: there is none; add a table such as [cameras.front] with its source"
    if config.agent.device:
        try:
            msgspec.convert(config.agent.device, Name)
        except msgspec.ValidationError:
            yield f"agent.device: {config.agent.device!r} is no name; use A-Z a-z 0-9 . _ -, at most 64"
    if config.agent.device in ("all", "group"):
        yield f"agent.device: {config.agent.device!r} is where commands for many come in; choose another name"
    if not config.tracking.enabled:
        for name, camera in config.cameras.items():
            if camera.lines:
                yield f"cameras.{name}.lines: crossing a line takes tracking; set tracking.enabled = true"
    if config.mqtt.embedded and config.mqtt.host not in ("127.0.0.1", "localhost", "::1"):
        yield f"mqtt.host: the embedded broker listens on loopback only, not on {config.mqtt.host!r}"


def state_directory(environ: Mapping[str, str] = os.environ) -> Path:
    """Where the agent keeps what it makes: systemd's directory for the service, else the user's."""
    if given := environ.get("STATE_DIRECTORY"):
        return Path(given.split(":")[0])
    base = environ.get("XDG_STATE_HOME")
    return (Path(base) if base else Path("~/.local/state").expanduser()) / "edge-agent"


def models_directory(config: Config) -> Path:
    """Where the store keeps its models: `[models] dir`, else `models/` in the state directory."""
    return Path(config.models.dir) if config.models.dir else state_directory() / "models"


def _is_secret(kind: Any) -> bool:
    return kind is Secret or Secret in get_args(kind)


def _decode_secret(kind: type, value: object) -> object:
    if kind is Secret and isinstance(value, str):
        return Secret(value)
    raise msgspec.ValidationError(f"Expected `str`, got `{type(value).__name__}`")


def _friendly(reason: str, value: object, kind: Any) -> str:
    allowed = [str(choice) for choice in _choices(kind)]
    if allowed and isinstance(value, str):
        return f"{value!r} is not one of {', '.join(allowed)}{plugins.nearest(value, allowed, listing=False)}"
    if _is_secret(kind):
        return f"{reason[:1].lower()}{reason[1:]}"
    shown = repr(value) if isinstance(value, (str, int, float, bool)) else _kind(value)
    return f"{reason[:1].lower()}{reason[1:]}; it is {shown}"


def _choices(kind: Any) -> Iterator[object]:
    """The values of the `Literal`s in a type."""
    if get_origin(kind) is Literal:
        yield from get_args(kind)
    else:
        for part in get_args(kind):
            yield from _choices(part)


def _kind(value: object) -> str:
    names: Sequence[tuple[type, str]] = ((bool, "a truth value"), (str, "a string"), (int, "a number"))
    more: Sequence[tuple[type, str]] = ((float, "a number"), (list, "a list"), (dict, "a table"))
    return next((name for kind, name in (*names, *more) if isinstance(value, kind)), type(value).__name__)


def _machine_name() -> str:
    host, machine = re.sub(r"[^A-Za-z0-9._-]", "-", socket.gethostname()).strip("-._") or "edge", machine_id()
    return f"{host[:56]}-{hashlib.sha256(machine.encode()).hexdigest()[:6]}" if machine else host[:63]


def machine_id() -> str:
    """systemd's, or nothing where there is none."""
    try:
        return Path("/etc/machine-id").read_text().strip()
    except OSError:
        return ""
