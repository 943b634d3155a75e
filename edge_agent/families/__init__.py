"""What a model wants and means. One module a family; each has `Family`, whose `Options` are the
`options` of a model's entry."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

from edge_agent.config import PreprocessOptions, Table
from edge_agent.data import ModelFacts, Names, Prediction, PreprocessSpec, Reduction, Tensors
from edge_agent.geometry import Placement


@dataclass(frozen=True, slots=True)
class Thresholds:
    """What is worth reporting, whatever the family. `tracked`: detections from this score on are wanted for tracking,
    which sorts out what is reported."""

    score: float = 0.4
    iou: float = 0.5
    max_detections: int = 300
    tracked: float | None = None

    @property
    def least(self) -> float:
        """Below this no detection is wanted."""
        return self.score if self.tracked is None else min(self.score, self.tracked)


@dataclass(frozen=True, slots=True)
class Meaning:
    """All that is known of a model when its family is made: the file's facts (without the inputs that the entry
    gives values), then the entry's say."""

    facts: ModelFacts
    options: Table
    labels: Sequence[str] | None
    preprocess: PreprocessOptions
    thresholds: Thresholds


@dataclass(frozen=True, slots=True)
class Guess:
    """Why a family takes a model for one of its own by the file alone, a sentence each.

    `confidence`: 3 where the file says so itself, 2 where nothing else has these shapes, 1 where others might.
    """

    confidence: int
    because: Sequence[str]


class Family(Protocol):
    """Pre-processing as data, and decoding in two steps. Created with a `Meaning`; raises `ModelError`
    where facts and entry do not fit together."""

    Options: ClassVar[type[Table]]
    takes_batches: bool
    """Whether its outputs keep the pictures of a batch apart."""

    @staticmethod
    def recognise(facts: ModelFacts) -> Guess | None:
        """What this model would be, if it may be one of this family."""

    @property
    def task(self) -> str: ...

    @property
    def names(self) -> Names: ...

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
