"""`edgectl`: look at an agent, tell it things, find out what a machine lacks. One file a command."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from edge_agent.errors import EdgeAgentError

app = typer.Typer(no_args_is_help=True, add_completion=True, help="Diagnostics for edge_agent.")

ConfigFile = Annotated[Path, typer.Option("--config", help="The agent's own file: broker, prefix and device.")]


OwnFile = Annotated[
    Path | None,
    typer.Option("--config", help="The agent's own file; default: ./config.toml, else /etc/edge-agent/config.toml."),
]


@app.command()
def doctor(
    config: OwnFile = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document instead of lines.")] = False,
    acl: Annotated[
        bool,
        typer.Option("--acl", help="Also send empty messages as results and events of a camera 'edgectl-doctor'."),
    ] = False,
    timeout_s: Annotated[
        float, typer.Option("--timeout", help="Seconds that a check may be silent before it is given up.", min=0.1)
    ] = 30.0,
) -> None:
    """What will and will not work on this machine, and how to mend it.

    Looks at Python, the board, rights, clock, OpenCV, the GPU and what drives it, cameras, the configuration, its
    models and engines, and the broker: logs in, subscribes as the agent does, and sends itself a message. A check that
    hangs or crashes is told as such. Exit status 1 if anything fails.
    """
    from edgectl import doctor as command

    raise typer.Exit(command.doctor(config, as_json=as_json, timeout_s=timeout_s, acl=acl))


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(help="The folder to make; it must not be there, or be empty.")],
    config: OwnFile = None,
    device: Annotated[str, typer.Option("--device", help="Another device than the configured one.")] = "",
    seconds: Annotated[
        float, typer.Option("--for", help="How many seconds to listen to the agent.", min=0.0, max=86_400.0)
    ] = 30.0,
    log: Annotated[
        Path | None, typer.Option("--log", help="The agent's log, if it is not in systemd's journal.")
    ] = None,
    unit: Annotated[str, typer.Option("--unit", help="The service whose journal is taken.")] = "edge-agent",
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document on what was collected.")] = False,
) -> None:
    """Collect into one folder what a bug report needs, without passwords.

    Listens to the agent for a while, runs `doctor`, and takes the configuration, the log and all versions along.
    index.html shows it, with plots; it needs no network. An agent that is silent or a broker that is away is noted, and
    the rest collected. Exit status 1 if the folder cannot be written.
    """
    from edgectl import report as command

    command.report(folder, config, device=device, seconds=seconds, log=log, unit=unit, as_json=as_json)


cameras = typer.Typer(
    invoke_without_command=True, help="Cameras: what is plugged in, and how well anything delivers pictures."
)
app.add_typer(cameras, name="cameras")

FoundConfig = Annotated[
    Path | None,
    typer.Option("--config", help="The agent's own file; default: ./config.toml, else /etc/edge-agent/config.toml."),
]
CameraSource = Annotated[
    str,
    typer.Argument(
        metavar="SOURCE",
        help="The name of a configured camera, a URL (rtsp, http), a device (/dev/…, usb:VENDOR:PRODUCT), a file, a "
        "folder, a GStreamer pipeline, or 'synthetic'.",
    ),
]


@cameras.callback()
def list_cameras_by_default(
    context: typer.Context,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document instead of a table.")] = False,
) -> None:
    """Cameras: what is plugged in, and how well anything delivers pictures. Without a command: `list`."""
    if context.invoked_subcommand is None:
        list_cameras(as_json=as_json)


@cameras.command("list")
def list_cameras(
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document instead of a table.")] = False,
) -> None:
    """The V4L2 cameras of this machine: lasting names, pixel formats, sizes and rates."""
    from edgectl import cameras as command

    command.cameras(as_json=as_json)


@cameras.command("probe")
def probe_camera(
    source: CameraSource,
    config: FoundConfig = None,
    seconds: Annotated[float, typer.Option("--seconds", help="How long to read it, once it delivers.", min=0.1)] = 5.0,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document.")] = False,
) -> None:
    """Read a camera as the agent does: time to the first frame, codec, size, real rate, jitter, gaps, what is dropped.

    Exit status 1 if it does not deliver, with the reason that the agent would give.
    """
    from edgectl import cameras as command

    raise typer.Exit(command.probe(source, config, seconds=seconds, as_json=as_json))


@cameras.command("snapshot")
def snapshot_camera(
    source: CameraSource,
    file: Annotated[Path, typer.Argument(help="Where the picture goes: .jpg, .png, .bmp, .webp or .tif.")],
    config: FoundConfig = None,
    skip: Annotated[
        int, typer.Option("--skip", help="Frames to let pass first: many cameras begin too dark.", min=0)
    ] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document.")] = False,
) -> None:
    """Write one picture of a camera, as it comes, to a file. Exit status 1 if there is none."""
    from edgectl import cameras as command

    raise typer.Exit(command.snapshot(source, file, config, skip=skip, as_json=as_json))


@cameras.command("bench")
def bench_cameras(
    sources: Annotated[list[str], typer.Argument(metavar="SOURCE", help="As for `probe`; all are read at once.")],
    config: FoundConfig = None,
    seconds: Annotated[float, typer.Option("--seconds", help="How long, once all deliver.", min=0.1)] = 5.0,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document.")] = False,
) -> None:
    """What reading cameras costs: CPU a frame, and frames a second (files and 'synthetic' at full pace).

    Exit status 1 if one of them does not deliver.
    """
    from edgectl import cameras as command

    raise typer.Exit(command.bench(sources, config, seconds=seconds, as_json=as_json))


ListenDevice = Annotated[str, typer.Argument(metavar="DEVICE", help="Default: the device of the configuration.")]
Fleet = Annotated[bool, typer.Option("--all", help="All devices under the prefix.")]


@app.command()
def watch(
    device: ListenDevice = "",
    config: FoundConfig = None,
    fleet: Fleet = False,
    seconds: Annotated[
        float, typer.Option("--for", help="Stop after so many seconds; 0: never, with --json: 5.", min=0)
    ] = 0.0,
    as_json: Annotated[
        bool, typer.Option("--json", help="At the end, one JSON document of all that was seen.")
    ] = False,
) -> None:
    """A live view of an agent or a fleet: cameras, rates, latency, GPU, health, jobs, and what was seen last.

    Where the output is no terminal: plain lines, at each change and every two seconds. Exit status 1 if nothing was
    heard within --for.
    """
    from edgectl import watch as command
    from edgectl._config import config_file

    if fleet and device:
        raise typer.BadParameter("give either a device or --all")
    raise typer.Exit(
        command.watch(config_file(config), device=device, is_fleet=fleet, seconds=seconds, as_json=as_json)
    )


@app.command()
def events(
    device: ListenDevice = "",
    config: FoundConfig = None,
    fleet: Fleet = False,
    camera: Annotated[list[str] | None, typer.Option("--camera", help="Only of this one; may be repeated.")] = None,
    kind: Annotated[
        list[str] | None, typer.Option("--kind", help="Only result, new, update or end; may be repeated.")
    ] = None,
    label: Annotated[
        list[str] | None, typer.Option("--label", help="Only with an object of this label; may be repeated.")
    ] = None,
    zone: Annotated[
        list[str] | None, typer.Option("--zone", help="Only with an object in this zone; may be repeated.")
    ] = None,
    score: Annotated[
        float, typer.Option("--score", help="Only with an object of at least this score.", min=0, max=1)
    ] = 0.0,
    count: Annotated[int, typer.Option("--count", help="Stop after so many; 0: never.", min=0)] = 0,
    seconds: Annotated[float, typer.Option("--for", help="Stop after so many seconds; 0: never.", min=0)] = 0.0,
    as_json: Annotated[bool, typer.Option("--json", help="The messages themselves, one a line.")] = False,
) -> None:
    """Follow results and events as they come. Filters of different kinds hold at once, for one object.

    Exit status 1 if fewer than --count came within --for.
    """
    from edgectl import events as command
    from edgectl._config import config_file

    if fleet and device:
        raise typer.BadParameter("give either a device or --all")
    for one in {*(kind or ())} - {"result", "new", "update", "end"}:
        raise typer.BadParameter(f"{one!r} is not one of result, new, update, end", param_hint="--kind")
    wanted = command.Wanted(camera or (), kind or (), label or (), zone or (), score)
    path = config_file(config)
    raise typer.Exit(
        command.events(
            path, device=device, is_fleet=fleet, wanted=wanted, count=count, seconds=seconds, as_json=as_json
        )
    )


def _known_commands(context: typer.Context, incomplete: str) -> list[tuple[str, str]]:
    from edgectl import _complete

    return _complete.commands(context.params, incomplete)


def _known_arguments(context: typer.Context, incomplete: str) -> list[str]:
    from edgectl import _complete

    return _complete.arguments(context.params, incomplete)


@app.command()
def cmd(
    name: Annotated[
        str,
        typer.Argument(help="For example model.activate; commands.list names them.", autocompletion=_known_commands),
    ],
    arguments: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="KEY=VALUE",
            help="Values are JSON, else text; options.fps=5 goes into a table.",
            autocompletion=_known_arguments,
        ),
    ] = None,
    config: FoundConfig = None,
    device: Annotated[str, typer.Option("--device", help="Another device than the one of the configuration.")] = "",
    fleet: Annotated[bool, typer.Option("--all", help="Of everybody under the prefix who is online.")] = False,
    group: Annotated[str, typer.Option("--group", help="Of all in this group (mqtt.groups).")] = "",
    expect: Annotated[int, typer.Option("--expect", help="With --all or --group: how many must answer.", min=0)] = 0,
    seconds: Annotated[
        float,
        typer.Option(
            "--for",
            help="With --all or --group: gather for so many seconds. Default: until all who are online, or --expect, "
            "have answered; of a group, for 5 s after the last reply.",
            min=0,
        ),
    ] = 0.0,
    timeout_s: Annotated[
        float,
        typer.Option("--timeout", help="Seconds to wait for the reply, or for the next word on how it goes.", min=0.1),
    ] = 30.0,
    key: Annotated[Path | None, typer.Option("--key", help="The operator's Ed25519 key, to sign with.")] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="The whole reply; with --all or --group all of them, in one document.")
    ] = False,
) -> None:
    """Send a command, checked by the agent's own list of them, and print what it replies.

    Exit status 1 if anybody refuses or does not answer; 2 if nothing was sent, for the command or its arguments are
    wrong.
    """
    from edgectl import cmd as command
    from edgectl._config import config_file

    if (fleet or group) and (device or (fleet and group)):
        raise typer.BadParameter("give one of --device, --group and --all")
    if (expect or seconds) and not (fleet or group):
        raise typer.BadParameter("--expect and --for go with --all or --group")
    raise typer.Exit(
        command.cmd(
            name,
            arguments or [],
            config_file(config),
            device=device,
            group="all" if fleet else group,
            expect=expect,
            seconds=seconds,
            timeout_s=timeout_s,
            key=key,
            as_json=as_json,
        )
    )


@app.command()
def infer(
    picture: Annotated[
        str, typer.Argument(help="A picture, a folder, a video, a camera's URL or device, 'synthetic'.")
    ],
    model: Annotated[str, typer.Option("--model", help="The name of a model, or a file: .onnx, or a TensorRT engine.")],
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", help="key=value of the model's entry, dotted: preprocess.size=[320,320]"),
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(
            "--config",
            help="The agent's own file, for its models, cameras, zones and backends. Default: ./config.toml, "
            "/etc/edge-agent/config.toml, or the built-in defaults.",
        ),
    ] = None,
    backend: Annotated[str, typer.Option("--backend", help="auto, onnx or tensorrt.")] = "auto",
    score: Annotated[
        float | None, typer.Option("--score", help="The least score of detections and poses that are told, 0 to 1.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One result message a frame, as on MQTT.")] = False,
    out: Annotated[
        Path | None, typer.Option("--out", help="Write annotated: a picture, a video (.mp4, .avi), or a folder.")
    ] = None,
    limit: Annotated[int, typer.Option("--limit", help="Stop after so many frames; 0: never.", min=0)] = 0,
    track: Annotated[
        bool | None, typer.Option("--track/--no-track", help="Follow objects; default: as the configuration says.")
    ] = None,
) -> None:
    """Run a model on pictures, a video or a camera, by the agent's own line, and show what it sees.

    Pictures and videos get boxes, masks, skeletons and colour maps, the tracks of --track, and the zones and lines of a
    camera that the configuration names. Ctrl-C ends a camera; what was written until then is complete.
    """
    from edgectl import infer as command

    command.infer(
        picture,
        model,
        settings or [],
        config,
        backend=backend,
        score=score,
        as_json=as_json,
        out=out,
        limit=limit,
        track=track,
    )


@app.command()
def dashboard(
    config: OwnFile = None,
    port: Annotated[
        int, typer.Option("--port", help="The page's port; 0: any that is free.", min=0, max=65_535)
    ] = 8080,
    listen: Annotated[
        str, typer.Option("--listen", help="The address to listen on; beyond loopback others see the page too.")
    ] = "127.0.0.1",
    allow_commands: Annotated[
        bool, typer.Option("--allow-commands", help="Let the page change models; without it, it only shows.")
    ] = False,
    picture_interval_s: Annotated[
        float,
        typer.Option(
            "--pictures", help="Seconds between pictures of a camera that somebody looks at; 0: ask for none.", min=0.0
        ),
    ] = 2.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print the page's address as one JSON document.")] = False,
) -> None:
    """A web page of all devices of the broker: cameras with pictures, plots, health, models. Ctrl-C ends it.

    Fed by MQTT through this process; the browser talks to it alone, and the page needs no network beyond. It starts
    without a broker too, and says so. Pictures are asked for with camera.snapshot, of the device that is looked at and
    while it is. Exit status 1 if the address cannot be listened on.
    """
    from edgectl import dashboard as command

    command.dashboard(
        config,
        listen=listen,
        port=port,
        allow_commands=allow_commands,
        picture_interval_s=picture_interval_s,
        as_json=as_json,
    )


models = typer.Typer(no_args_is_help=True, help="Models: what a file is, what the store keeps, how it runs here.")
app.add_typer(models, name="models")

StoreConfig = Annotated[
    Path | None,
    typer.Option(
        "--config", help="The agent's own file. Default: ./config.toml, /etc/edge-agent/config.toml, or none."
    ),
]
Settings = Annotated[
    list[str] | None, typer.Option("--set", help="key=value of the model's entry, dotted: family=yolo")
]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON document.")]
Backend = Annotated[str, typer.Option("--backend", help="auto, onnx or tensorrt; one that is named has to be there.")]
ModelOrFile = Annotated[str, typer.Argument(help="A model, name@version, or a file: .onnx, or a TensorRT engine.")]
Target = Annotated[
    str | None,
    typer.Option("--target", help="Build for GPUs of this compute capability, such as 8.7, into --out. No GPU needed."),
]
EngineFile = Annotated[Path | None, typer.Option("--out", help="Where an engine for another machine goes.")]


@models.command("list")
def list_models(config: StoreConfig = None, as_json: AsJson = False) -> None:
    """All models that an agent with this configuration knows, and those it may fetch by name."""
    from edgectl import store as command

    command.listing(config, as_json=as_json)


@models.command()
def show(
    name: Annotated[str, typer.Argument(help="A model, or name@version.")],
    config: StoreConfig = None,
    as_json: Annotated[bool, typer.Option("--json", help="JSON, as it is without.")] = True,
) -> None:
    """All that is known of a model, as JSON: files, inputs and outputs, engines, what was measured."""
    from edgectl import store as command

    command.show(name, config)


@models.command()
def add(
    file: Annotated[Path, typer.Argument(help="An ONNX file.")],
    name: Annotated[str, typer.Option("--name", help="What it will be called: a-z 0-9 . _ -")],
    config: StoreConfig = None,
    version: Annotated[str | None, typer.Option("--version", help="Default: the next number.")] = None,
    settings: Settings = None,
    sha256: Annotated[str | None, typer.Option("--sha256", help="What the file must have.")] = None,
    signature: Annotated[Path | None, typer.Option("--signature", help="The file's Ed25519 signature.")] = None,
    as_json: AsJson = False,
) -> None:
    """Copy a model into the store, after a look at it from all sides."""
    from edgectl import store as command

    command.add(
        file,
        name,
        config,
        version=version,
        settings=settings or [],
        sha256=sha256,
        signature=signature,
        as_json=as_json,
    )


@models.command()
def fetch(
    name: Annotated[str, typer.Argument(help="A model of the catalogue (`models list` names them), or a new name.")],
    config: StoreConfig = None,
    url: Annotated[str | None, typer.Option("--url", help="Where an ONNX file lies, if not in the catalogue.")] = None,
    sha256: Annotated[str | None, typer.Option("--sha256", help="What that file must have.")] = None,
    version: Annotated[
        str | None, typer.Option("--version", help="Default: the catalogue's, or the next number.")
    ] = None,
    settings: Settings = None,
    signature_url: Annotated[str | None, typer.Option("--signature-url", help="Its Ed25519 signature.")] = None,
    allow_private: Annotated[
        bool, typer.Option("--allow-private", help="From addresses of private networks too, such as a mirror's.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Download a model into the store: `edgectl models fetch yolox-nano` gives a detector of 80 classes."""
    from edgectl import store as command

    command.fetch(
        name,
        config,
        url=url,
        sha256=sha256,
        version=version,
        settings=settings or [],
        signature_url=signature_url,
        allow_private=allow_private,
        as_json=as_json,
    )


@models.command()
def remove(
    name: Annotated[str, typer.Argument(help="A model of the store, or name@version.")],
    config: StoreConfig = None,
    as_json: AsJson = False,
) -> None:
    """Delete a model of the store with its engines; never the active one or its fallback."""
    from edgectl import store as command

    command.remove(name, config, as_json=as_json)


@models.command()
def verify(
    name: Annotated[str | None, typer.Argument(help="Default: all models.")] = None,
    config: StoreConfig = None,
    as_json: AsJson = False,
) -> None:
    """Whether each stored file is still what it was. Exit status 1 if one is not."""
    from edgectl import store as command

    raise typer.Exit(command.verify(name, config, as_json=as_json))


@models.command()
def gc(config: StoreConfig = None, as_json: AsJson = False) -> None:
    """Remove engines that fit nothing here, and what killed processes left behind."""
    from edgectl import store as command

    command.gc(config, as_json=as_json)


@models.command()
def inspect(model: ModelOrFile, settings: Settings = None, config: StoreConfig = None, as_json: AsJson = False) -> None:
    """Say what a model is taken for, and why, without running it. Exit status 1 if nothing fits together."""
    from edgectl import models as command

    raise typer.Exit(command.inspect(model, settings or [], config, as_json=as_json))


@models.command("build")
def build_model(
    name: ModelOrFile,
    precision: Annotated[
        str | None, typer.Option("--precision", help="fp32, fp16 or int8; default: the model's own.")
    ] = None,
    target: Target = None,
    out: EngineFile = None,
    settings: Settings = None,
    config: StoreConfig = None,
    as_json: AsJson = False,
) -> None:
    """Build a model's TensorRT engine, so that activating it takes no building; minutes, in a process of its own.

    It is compared with its ONNX file before it counts. What is there already and fits is not built again.
    """
    from edgectl import build as command

    command.build(
        name, settings or [], config, precision=precision, images=None, target=target, out=out, as_json=as_json
    )


@models.command()
def calibrate(
    name: ModelOrFile,
    images: Annotated[Path, typer.Option("--images", help="A folder of some hundred pictures like the camera's.")],
    target: Target = None,
    out: EngineFile = None,
    settings: Settings = None,
    config: StoreConfig = None,
    as_json: AsJson = False,
) -> None:
    """Build a model's INT8 engine with these pictures, and measure how far it agrees with its ONNX file on them."""
    from edgectl import build as command

    command.build(
        name, settings or [], config, precision="int8", images=images, target=target, out=out, as_json=as_json
    )


@models.command()
def bench(
    model: ModelOrFile,
    backend: Backend = "auto",
    inferences: Annotated[int, typer.Option("--inferences", help="Of one picture, at most.", min=1, max=100_000)] = 200,
    seconds: Annotated[float, typer.Option("--seconds", help="For all of it, at most.", min=0.1, max=600)] = 20.0,
    settings: Settings = None,
    config: StoreConfig = None,
    as_json: AsJson = False,
) -> None:
    """Measure a model here: latency (p50, p95, p99), throughput and memory. What runs meanwhile slows it.

    Latency and memory of a known model are kept in the registry, where the agent looks before it loads the model.
    """
    from edgectl import bench as command

    command.bench(
        model, settings or [], config, backend=backend, inferences=inferences, seconds=seconds, as_json=as_json
    )


@models.command()
def compare(
    a: ModelOrFile,
    b: ModelOrFile,
    images: Annotated[
        Path | None, typer.Option("--images", help="A folder of pictures; default: the synthetic world's.")
    ] = None,
    plot: Annotated[Path | None, typer.Option("--plot", help="Draw it into a picture: compared.png")] = None,
    backend: Backend = "auto",
    backend_b: Annotated[str | None, typer.Option("--backend-b", help="Another one for B.")] = None,
    settings_a: Annotated[list[str] | None, typer.Option("--set-a", help="key=value of A's entry.")] = None,
    settings_b: Annotated[
        list[str] | None, typer.Option("--set-b", help="key=value of B's entry: precision=int8, say.")
    ] = None,
    seconds: Annotated[
        float, typer.Option("--seconds", help="To time each of them with, at most.", min=0.1, max=600)
    ] = 3.0,
    config: StoreConfig = None,
    as_json: AsJson = False,
) -> None:
    """How far two models of one task agree on the same pictures, and how fast each of them is.

    Detections and poses: the share that the other has too, in class and place. Classes: how often the first is the
    same. Segmentations: the share of the picture. Others: the cosine of what they give.
    """
    from edgectl import compare as command

    command.compare(
        (a, backend, settings_a or []),
        (b, backend_b or backend, settings_b or []),
        config,
        images=images,
        plot=plot,
        seconds=seconds,
        as_json=as_json,
    )


@models.command()
def export(
    source: Annotated[
        str, typer.Argument(help="A TorchScript file, a pickled module (.pt), or package.module:Class (or :factory).")
    ],
    size: Annotated[str, typer.Option("--size", help="Of the pictures it takes: 320, or 640x480 (width x height).")],
    out: Annotated[Path | None, typer.Option("--out", help="The ONNX file to write.")] = None,
    name: Annotated[str | None, typer.Option("--name", help="Register it in the store by this name.")] = None,
    weights: Annotated[Path | None, typer.Option("--weights", help="A state dict for a module of Python.")] = None,
    trust: Annotated[
        bool, typer.Option("--trust", help="Open a pickled module: that runs whatever code is in the file.")
    ] = False,
    parent: Annotated[
        str | None, typer.Option("--parent", help="The known model that it was made from; told in the registry.")
    ] = None,
    labels: Annotated[str | None, typer.Option("--labels", help="Names of its classes: a file, or a,b,c.")] = None,
    facts: Annotated[list[str] | None, typer.Option("--fact", help="key=value for the file's own metadata.")] = None,
    opset: Annotated[int, typer.Option("--opset", help="Of ONNX.", min=11)] = 17,
    fixed_batch: Annotated[bool, typer.Option("--fixed-batch", help="It takes one picture at a time.")] = False,
    settings: Settings = None,
    config: StoreConfig = None,
    as_json: AsJson = False,
) -> None:
    """PyTorch to ONNX: trace a module, write the file, and compare its outputs with PyTorch's on random pictures.

    Needs the extra: pip install 'edge-agent[export]'. Into a file (--out), the store (--name), or both.
    """
    from edgectl import export as command

    command.export(
        source,
        config,
        size=size,
        out=out,
        name=name,
        weights=weights,
        trust=trust,
        parent=parent,
        labels=labels,
        facts=facts or [],
        opset=opset,
        fixed_batch=fixed_batch,
        settings=settings or [],
        as_json=as_json,
    )


def main() -> None:
    """The console script; errors with a name are told in a sentence."""
    try:
        app()
    except EdgeAgentError as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(1)
