"""What the checks look at."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from edge_agent import config as configuration
from edge_agent.backends.tensorrt import TensorRtOptions
from edge_agent.config import Config
from edge_agent.errors import ConfigError
from edgectl.doctor._words import State


@dataclass(frozen=True, slots=True)
class Reading:
    """What became of the configuration file: `config` is what could be read of it, `moved` tells of older keys."""

    config: Config | None
    problems: list[str]
    moved: list[str]


@dataclass(frozen=True)
class Subject:
    """What is looked at: this machine, and the configuration in `path`, or the built-in defaults. `acl`: whether to
    send test messages where others listen."""

    path: Path | None
    acl: bool = False

    @cached_property
    def reading(self) -> Reading:
        moved: list[str] = []
        try:
            if self.path is None:
                return Reading(configuration.parse({"cameras": {"none": {"source": "synthetic"}}}), [], [])
            return Reading(configuration.load(self.path, tell=moved.append), [], moved)
        except ConfigError as error:
            return Reading(error.usable, list(error.problems), moved)

    @property
    def config(self) -> Config | None:
        return self.reading.config

    @property
    def tensorrt(self) -> TensorRtOptions:
        found = self.config.backends.get("tensorrt") if self.config else None
        return found if isinstance(found, TensorRtOptions) else TensorRtOptions()

    @property
    def without_gpu(self) -> State:
        """How bad it is that the GPU cannot be used: where TensorRT is asked for by name, that is a failure."""
        return "fail" if self.config and self.config.inference.backend == "tensorrt" else "warn"
