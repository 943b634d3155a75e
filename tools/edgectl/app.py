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


def main() -> None:
    """The console script; errors with a name are told in a sentence."""
    try:
        app()
    except EdgeAgentError as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(1)
