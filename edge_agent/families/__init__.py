"""What a model wants and means. One module a family; each has `Family`, whose `Options` are the
`options` of a model's entry."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import msgspec

from edge_agent.config import PreprocessOptions, Table
from edge_agent.data import ModelFacts, Prediction, PreprocessSpec, Reduction, Tensors
from edge_agent.geometry import Placement


@dataclass(frozen=True, slots=True)
class Thresholds:
    """What is worth reporting, whatever the family."""

    score: float = 0.4
    iou: float = 0.5
    max_detections: int = 300


@dataclass(frozen=True, slots=True)
class Meaning:
    """All that is known of a model when its family is made: the file's facts, then the entry's say."""

    facts: ModelFacts
    options: Table
    labels: Sequence[str] | None
    preprocess: PreprocessOptions
    thresholds: Thresholds


class Family(Protocol):
    """Pre-processing as data, and decoding in two steps. Created with a `Meaning`; raises `ModelError`
    where facts and entry do not fit together."""

    Options: ClassVar[type[Table]]

    @property
    def task(self) -> str: ...

    @property
    def labels(self) -> Sequence[str]: ...

    @property
    def preprocess(self) -> PreprocessSpec: ...

    @property
    def reduction(self) -> Reduction | None:
        """What `reduce` does, as data, where an engine may do it in its own way; None where it may not."""

    def reduce(self, outputs: Tensors) -> Sequence[Any]:
        """The hot first step: from a batch's raw outputs to the few candidates of each picture; `Candidates`
        where there is a `reduction`."""

    def decode(self, candidates: Any, placement: Placement) -> Prediction:
        """What the candidates of one picture mean, in its own pixels."""


def adjusted(spec: PreprocessSpec, by: PreprocessOptions) -> PreprocessSpec:
    """A family's pre-processing with what the model's entry says differently."""
    changes = {key: value for key, value in msgspec.structs.asdict(by).items() if value is not None}
    if size := changes.pop("size", None):
        changes["width"], changes["height"] = size
    fields = {name: getattr(spec, name) for name in spec.__dataclass_fields__}
    return PreprocessSpec(**{**fields, **changes})
