"""What this machine can tell besides the agent: its log, its versions, its models, what `doctor` finds."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import edge_agent
from edge_agent.check import store_of
from edge_agent.config import Config
from edge_agent.errors import EdgeAgentError
from edgectl import doctor
from edgectl._progress import Tell
from edgectl.doctor._words import Finding

_MOST_LOG_BYTES = 4_000_000
_JOURNAL_LINES, _JOURNAL_S = 5000, 20.0
_CHECK_S = 30.0


class ReportError(EdgeAgentError):
    """A report cannot be made; the sentence says what to give instead."""

    code = "report"


def findings(path: Path | None, tell: Tell) -> Iterator[dict[str, Any]]:
    """What `edgectl doctor --json` finds."""
    for one in doctor.look(path, timeout_s=_CHECK_S):
        if isinstance(one, Finding):
            yield {name: getattr(one, name) for name in ("state", "what", "fact", "fix")}
        else:
            tell(f"doctor: {one.name}", None)


def log_file(path: Path) -> tuple[str, str]:
    """The end of a log, and a sentence on it. Raises `ReportError`."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - _MOST_LOG_BYTES))
            content = file.read(_MOST_LOG_BYTES)
    except OSError as error:
        raise ReportError(f"--log {path}: {error.strerror or error}") from error
    return content.decode(errors="replace"), str(path)


def journal(unit: str) -> tuple[str, str]:
    """What systemd's journal has of a service, or nothing and the reason in a sentence."""
    wanted = ["journalctl", "--unit", unit, "--lines", str(_JOURNAL_LINES), "--no-pager", "--quiet"]
    try:
        done = subprocess.run(
            [*wanted, "--output", "short-iso"], capture_output=True, timeout=_JOURNAL_S, stdin=subprocess.DEVNULL
        )
    except FileNotFoundError:
        return "", "No log: there is no journalctl here; give the agent's log with --log."
    except (OSError, subprocess.TimeoutExpired) as error:
        return "", f"No log: journalctl failed ({error}); give the agent's log with --log."
    text = done.stdout.decode(errors="replace")
    if text.strip():
        return text, f"journalctl --unit {unit}"
    complaint = done.stderr.decode(errors="replace").strip().partition("\n")[0]
    why = f" ({complaint})" if complaint else ""
    return "", f"No log: the journal has nothing of {unit} that may be read{why}; give the agent's log with --log."


def versions() -> Mapping[str, str]:
    """Of the system, of Python and of its packages; only names and numbers."""
    try:
        system = platform.freedesktop_os_release().get("PRETTY_NAME", platform.system())
    except OSError:
        system = platform.system()
    known = {
        "edge-agent": edge_agent.__version__,
        "python": f"Python {platform.python_version()}",
        "system": system,
        "kernel": platform.release(),
        "machine": platform.machine(),
    }
    packages = {one.metadata["Name"]: one.version for one in metadata.distributions() if one.metadata["Name"]}
    return known | {
        f"{name}=={version}": "" for name, version in sorted(packages.items(), key=lambda at: at[0].lower())
    }


def models(loaded: Config | None) -> tuple[list[dict[str, Any]], str | None]:
    """The models of this configuration and of its store, or why they cannot be listed."""
    if loaded is None:
        return [], None
    try:
        listed = [
            {"id": model.id, "origin": model.origin, "size_bytes": model.size_bytes, "path": str(model.path)}
            for model in store_of(loaded)
        ]
    except EdgeAgentError as error:
        return [], f"The models cannot be listed: {error}"
    return listed, None
