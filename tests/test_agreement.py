"""How far two engines agree: what counts as the same, and what does not."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from edge_agent.backends import Outcome, Ticket
from edge_agent.backends.onnx import OnnxEngine, OnnxOptions
from edge_agent.config import InferenceOptions
from edge_agent.models import agreement, pictures
from edge_agent.models.inspect import make_family
from edge_agent.models.store import ModelStore

DEMO = ModelStore({}).get("demo-320")
LENIENT = InferenceOptions(score_threshold=0.3)


@pytest.fixture
def engine() -> Iterator[OnnxEngine]:
    made = OnnxEngine(DEMO.path, OnnxOptions())
    yield made
    made.close()


class Altered:
    """An engine whose outputs are changed on the way out."""

    def __init__(self, engine: OnnxEngine, change: Any) -> None:
        self._engine, self._change = engine, change

    def submit(self, images: Sequence[NDArray[np.uint8]]) -> Ticket:
        return self._engine.submit(images)

    def collect(self, ticket: Ticket) -> Outcome:
        tensors = {name: np.array(value) for name, value in self._engine.collect(ticket).tensors.items()}
        self._change(tensors["output0"])
        return Outcome(tensors)


def measured(engine: OnnxEngine, change: Any, *, threshold: float = 0.4) -> agreement.Agreement:
    family, _ = make_family(engine.facts, DEMO.options, None, LENIENT)
    engine.prepare(family.preprocess, max_batch=1)
    other: Any = Altered(engine, change)
    return agreement.measure(engine, other, family, pictures.bundled(4), threshold=threshold)


def nothing(output: NDArray[Any]) -> None:
    """As it was."""


def shifted(output: NDArray[Any]) -> None:
    output[:, 0] += 60


def other_classes(output: NDArray[Any]) -> None:
    output[:, 4:] = np.roll(output[:, 4:], 1, axis=1)


def a_little_less_sure(output: NDArray[Any]) -> None:
    output[:, 4:] *= 0.99


def without_the_left_half(output: NDArray[Any]) -> None:
    output[:, 4:] *= (output[:, :1] > 160).astype(np.float32)


def broken(output: NDArray[Any]) -> None:
    output[:] = np.nan


def test_the_same_outputs_agree_perfectly(engine: OnnxEngine) -> None:
    told = measured(engine, nothing)
    assert (told.score, told.measure, told.pictures, told.cosine) == (1.0, "detections", 4, 1.0)
    assert told.detections > 30


@pytest.mark.parametrize(
    ("change", "low", "high"),
    [
        (a_little_less_sure, 0.99, 1.0),
        (shifted, 0.0, 0.1),
        (other_classes, 0.0, 0.1),
        (without_the_left_half, 0.3, 0.9),
        (broken, 0.0, 0.0),
    ],
)
def test_what_differs_in_place_class_or_number_agrees_less(
    engine: OnnxEngine, change: Any, low: float, high: float
) -> None:
    with np.errstate(invalid="ignore"):
        told = measured(engine, change)
    assert told.measure == "detections"
    assert low <= told.score <= high, told


def test_where_nothing_is_seen_the_outputs_themselves_are_compared(engine: OnnxEngine) -> None:
    told = measured(engine, nothing, threshold=1.5)
    assert (told.measure, told.detections, told.score) == ("cosine", 0, 1.0)
    assert measured(engine, lambda output: np.negative(output, out=output), threshold=1.5).score < 0
