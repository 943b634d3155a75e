"""Any other model: its outputs as they are, for whoever knows what they mean (policies, features, experiments)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, ClassVar, Literal

import numpy as np
from msgspec import Meta

from edge_agent.config import Table
from edge_agent.data import ModelFacts, Names, RawTensors, Tensors
from edge_agent.families import Guess, Meaning
from edge_agent.families._pictures import IMAGENET, RGB_0_1, RGB_SIGNED, picture_spec, picture_tensor
from edge_agent.geometry import Placement

_NORMAL = {"none": RGB_0_1, "imagenet": IMAGENET, "signed": RGB_SIGNED}


class RawOptions(Table):
    """`[models.<name>.options]` of a raw model. `inline`: values of a tensor that a message lists one by one; above
    that they travel as base64, and above `max_bytes` as statistics alone. `outputs`: those that are published."""

    inline: Annotated[int, Meta(ge=0)] = 64
    max_bytes: Annotated[int, Meta(ge=0)] = 65_536
    outputs: list[str] | None = None
    normalize: Literal["none", "imagenet", "signed"] = "none"


class RawFamily:
    """Named tensors."""

    Options: ClassVar[type[Table]] = RawOptions
    task = "raw"
    reduction = None
    names = Names()

    @staticmethod
    def recognise(facts: ModelFacts) -> Guess | None:
        return Guess(0, ["nothing is known of its outputs: they are published as they are"])

    def __init__(self, meaning: Meaning) -> None:
        options = meaning.options
        assert isinstance(options, RawOptions)
        self.preprocess = picture_spec(meaning, resize="stretch", **_NORMAL[options.normalize])
        self._options = options
        batch = picture_tensor(meaning.facts).shape[0]
        self._batched = {spec.name for spec in meaning.facts.outputs if spec.shape[:1] == (batch,)}

    @property
    def labels(self) -> Sequence[str]:
        return ()

    def reduce(self, outputs: Tensors) -> Sequence[Tensors]:
        wanted = self._options.outputs
        kept = {name: value for name, value in outputs.items() if wanted is None or name in wanted}
        count = next((len(value) for name, value in outputs.items() if name in self._batched), 1)
        return [
            {name: np.array(value[index] if name in self._batched else value) for name, value in kept.items()}
            for index in range(count)
        ]

    def decode(self, candidates: Tensors, placement: Placement) -> RawTensors:
        return RawTensors(candidates, self._options.inline, self._options.max_bytes)


Family = RawFamily
