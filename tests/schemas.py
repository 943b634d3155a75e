"""Holds real payloads to the published contract, docs/asyncapi.yaml, by a JSON Schema library."""

from __future__ import annotations

import functools
import re
from pathlib import Path
from typing import Any

import yaml
from jsonschema import Draft202012Validator

from tests.rigs import ROOT, Heard

DOCUMENT = ROOT / "docs" / "asyncapi.yaml"


@functools.cache
def document() -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load(Path(DOCUMENT).read_text())
    return loaded


@functools.cache
def _validators() -> list[tuple[re.Pattern[str], Draft202012Validator | None]]:
    found = []
    for channel in document()["channels"].values():
        pattern = re.compile(re.sub(r"\\\{\w+\\\}", "[^/]+", re.escape(channel["address"])) + "$")
        told = list(channel["messages"].values())
        if told[0].get("contentType"):
            found.append((pattern, None))
        else:
            kinds = [message["payload"] for message in told]
            schema = {"anyOf": kinds} if len(kinds) > 1 else kinds[0]
            found.append((pattern, Draft202012Validator({**schema, "components": document()["components"]})))
    return found


def validate(message: Heard) -> None:
    """Fails where a message is on no documented topic, or is not what that topic promises."""
    for pattern, validator in _validators():
        if pattern.match(message.topic):
            if validator is not None and message.payload:  # an empty one clears what was retained
                validator.validate(message.json())
            return
    raise AssertionError(f"{message.topic} is not in {DOCUMENT.name}")
