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
    timeout_s: Annotated[float, typer.Option("--timeout", help="Seconds to wait for the reply.")] = 30.0,
) -> None:
    """Send a command and print its reply. Exit status 1 if it is refused or not answered."""
    from edgectl import cmd as command

    raise typer.Exit(command.cmd(name, arguments or [], config, device=device, timeout_s=timeout_s))


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


models = typer.Typer(no_args_is_help=True, help="What a model's file is.")
app.add_typer(models, name="models")


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
