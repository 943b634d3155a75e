"""The process in which the checks run, and its messages to the one that shows them."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import msgspec

from edge_agent import logs
from edge_agent.logs.redaction import redacted_text
from edgectl.doctor import _broker, _gpu, _machine, _settings, _video
from edgectl.doctor._subject import Subject
from edgectl.doctor._words import Began, Done, Finding, Task, Word

CHECKS: dict[str, Callable[[Subject], Iterable[Finding]]] = {
    "python": _machine.python,
    "platform": _machine.board,
    "groups": _machine.groups,
    "clock": _machine.clock,
    "onnxruntime": _video.onnxruntime,
    "opencv": _video.opencv,
    "driver": _gpu.driver,
    "cuda runtime": _gpu.runtime,
    "cuda python": _gpu.bindings,
    "tensorrt": _gpu.tensorrt,
    "nvrtc": _gpu.nvrtc,
    "nvml": _gpu.nvml,
    "cameras": _video.cameras,
    "config": _settings.file,
    "disk": _machine.disk,
    "models": _settings.models,
    "broker": _broker.broker,
}
"""In the order in which a first run would trip over what they find."""
_PATIENCE = {"models": 10.0}


def main() -> None:
    """Run the checks that the command line's task names."""
    task = msgspec.json.decode(sys.argv[1], type=Task)
    logs.configure(level="error", format="console", stream=sys.stderr)
    subject = Subject(Path(task.path) if task.path else None, acl=task.acl)
    with os.fdopen(task.answers, "wb", buffering=0) as answers:

        def say(word: Word) -> None:
            answers.write(msgspec.json.encode(word) + b"\n")

        for index, (name, check) in enumerate(CHECKS.items()):
            if index >= task.first:
                say(Began(index, name, _PATIENCE.get(name, 1.0)))
                _run(name, check, subject, say)
        say(Done())
        os._exit(0)  # a thread that is stuck in a driver would hold up the interpreter's end


def _run(
    name: str, check: Callable[[Subject], Iterable[Finding]], subject: Subject, say: Callable[[Word], None]
) -> None:
    try:
        for finding in check(subject):
            say(msgspec.structs.replace(finding, fact=redacted_text(finding.fact)))
    except Exception as error:  # noqa: BLE001  whatever a driver or a broken package comes up with is a line
        fact = f"cannot be looked at: {type(error).__name__}: {redacted_text(str(error))}"
        say(Finding("fail", name, " ".join(fact.split()), "this check itself failed; the line says on what"))
