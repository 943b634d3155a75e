"""Configurations of earlier versions, brought to this one's layout a step at a time.

Works on tables as they come from a file, before anybody looks whether they are right. A step knows one version and
the next, and says what it moved and under which name it is now.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from edge_agent.errors import ConfigError

Tables = dict[str, Any]
Step = Callable[[Tables], Iterator[str]]
"""Changes tables of version n to those of n + 1, in place, and gives a sentence for each key that moved."""


def migrated(raw: Mapping[str, Any], *, steps: Sequence[Step] | None = None) -> tuple[Tables, list[str]]:
    """A copy of `raw` in this version's layout, and a sentence for each key that is elsewhere now.

    Tables without `config_version` are of version 1; those whose version is no number stay as they are, for whoever
    checks them. Raises `ConfigError` for a newer version.
    """
    steps = STEPS if steps is None else steps
    current = 1 + len(steps)
    version = raw.get("config_version", 1)
    if isinstance(version, bool) or not isinstance(version, int) or version < 1:
        return dict(raw), []
    if version > current:
        raise ConfigError(
            f"config_version: {version} was written for a newer edge_agent; this one reads versions up to {current}: "
            "install the newer one, or write the file as this one's config.toml shows"
        )
    tables = copy.deepcopy(dict(raw))
    moved = [sentence for step in steps[version - 1 :] for sentence in step(tables)]
    return {**tables, "config_version": current}, moved


def _silence_of_rtsp(tables: Tables) -> Iterator[str]:
    """1 to 2: a silent stream was lost after `read_timeout_s`; now it is after twice `stall_timeout_s`."""
    for name, camera in _cameras(tables):
        if camera.get("source") != "rtsp" or "read_timeout_s" not in camera:
            continue
        path, value = f"cameras.{name}", camera.pop("read_timeout_s")
        if "stall_timeout_s" in camera:
            yield f"{path}.read_timeout_s is no key any more, and stall_timeout_s is there: take it out"
            continue
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        camera["stall_timeout_s"] = value / 2 if is_number else value
        yield (
            f"{path}.read_timeout_s is {path}.stall_timeout_s now, and half as long, since a stream is lost after "
            f"twice that time: write stall_timeout_s = {camera['stall_timeout_s']!r}"
        )


def _cameras(tables: Tables) -> Iterator[tuple[str, Tables]]:
    cameras = tables.get("cameras")
    if isinstance(cameras, dict):
        yield from ((name, camera) for name, camera in cameras.items() if isinstance(camera, dict))


STEPS: Sequence[Step] = (_silence_of_rtsp,)
"""The first is from version 1 to 2."""

VERSION = 1 + len(STEPS)
"""What this edge_agent writes and reads."""
