"""`edgectl`: look at an agent, tell it things, find out what a machine lacks. One file a command."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from edge_agent.errors import EdgeAgentError

app = typer.Typer(no_args_is_help=True, add_completion=True, help="Diagnostics for edge_agent.")

ConfigFile = Annotated[Path, typer.Option("--config", help="The agent's own file: broker, prefix and device.")]
Device = Annotated[str, typer.Option("--device", help="Another device; '+' for all that `watch` can see.")]


@app.command()
def doctor(config: ConfigFile = Path("config.toml")) -> None:
    """What will and will not work on this machine, and how to mend it. Exit status 1 if anything fails."""
    from edgectl import doctor as command

    raise typer.Exit(command.doctor(config))


@app.command()
def cameras(
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document instead of a table.")] = False,
) -> None:
    """The V4L2 cameras of this machine: lasting names, pixel formats, sizes and rates."""
    from edgectl import cameras as command

    command.cameras(as_json=as_json)


@app.command()
def watch(
    config: ConfigFile = Path("config.toml"),
    device: Device = "",
    seconds: Annotated[float, typer.Option("--for", help="Stop after so many seconds; 0: never.")] = 0.0,
) -> None:
    """A live table of an agent's cameras: state, rate, latency, and what was seen last."""
    from edgectl import watch as command

    command.watch(config, device=device, seconds=seconds)


@app.command()
def cmd(
    name: Annotated[str, typer.Argument(help="For example model.activate; agent.info lists them.")],
    arguments: Annotated[list[str] | None, typer.Argument(help="key=value; values are JSON, else text.")] = None,
    config: ConfigFile = Path("config.toml"),
    device: Device = "",
    timeout_s: Annotated[
        float, typer.Option("--timeout", help="Seconds to wait for the reply, or for the next word on how it goes.")
    ] = 30.0,
    key: Annotated[Path | None, typer.Option("--key", help="The operator's Ed25519 key, to sign with.")] = None,
) -> None:
    """Send a command and print its reply. Exit status 1 if it is refused or not answered."""
    from edgectl import cmd as command

    raise typer.Exit(command.cmd(name, arguments or [], config, device=device, timeout_s=timeout_s, key=key))


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
        Path | None, typer.Option("--config", help="The agent's own file, for its models, cameras and backends.")
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
) -> None:
    """Run a model on pictures, a video or a camera, by the agent's own line, and show what it sees."""
    from edgectl import infer as command

    command.infer(
        picture, model, settings or [], config, backend=backend, score=score, as_json=as_json, out=out, limit=limit
    )


models = typer.Typer(no_args_is_help=True, help="Models: what a file is, and what the store keeps.")
app.add_typer(models, name="models")

StoreConfig = Annotated[
    Path | None, typer.Option("--config", help="The agent's own file; default: ./config.toml, or none.")
]
Settings = Annotated[
    list[str] | None, typer.Option("--set", help="key=value of the model's entry, dotted: family=yolo")
]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON document.")]


@models.command("list")
def list_models(config: StoreConfig = None, as_json: AsJson = False) -> None:
    """All models that an agent with this configuration knows, and those it may fetch by name."""
    from edgectl import store as command

    command.listing(config, as_json=as_json)


@models.command()
def show(name: Annotated[str, typer.Argument(help="A model, or name@version.")], config: StoreConfig = None) -> None:
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
    name: Annotated[str, typer.Argument(help="A model of the store, or name@version.")], config: StoreConfig = None
) -> None:
    """Delete a model of the store with its engines; never the active one or its fallback."""
    from edgectl import store as command

    command.remove(name, config)


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
def gc(config: StoreConfig = None) -> None:
    """Remove engines that fit nothing here, and what killed processes left behind."""
    from edgectl import store as command

    command.gc(config)


@models.command()
def inspect(
    model: Annotated[str, typer.Argument(help="The name of a bundled model, or a file: .onnx, or a TensorRT engine.")],
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="key=value of the model's entry, dotted: family=yolo")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document.")] = False,
) -> None:
    """Say what a model is taken for, and why, without running it. Exit status 1 if nothing fits together."""
    from edgectl import models as command

    raise typer.Exit(command.inspect(model, settings or [], as_json=as_json))


def main() -> None:
    """The console script; errors with a name are told in a sentence."""
    try:
        app()
    except EdgeAgentError as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(1)
