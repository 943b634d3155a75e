"""Any other model: its outputs as they are, for whoever knows what they mean (policies, features, experiments)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
from msgspec import Meta
from numpy.typing import NDArray

from edge_agent import plugins
from edge_agent.config import Table
from edge_agent.data import ModelFacts, Names, RawTensors, Tensors
from edge_agent.errors import ModelError
from edge_agent.families import Guess, Meaning
from edge_agent.families._pictures import NORMAL, picture_spec, picture_tensor
from edge_agent.geometry import Placement

_POLICIES = ("action", "policy", "waypoint", "trajectory", "q_value")


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
    takes_batches = True
    task = "raw"
    reduction = None
    names = Names()

    @staticmethod
    def recognise(facts: ModelFacts) -> Guess | None:
        for spec in facts.outputs:
            if any(word in spec.name.lower() for word in _POLICIES):
                return Guess(3, [f"the output {spec.name!r} is called as those of policies are"])
        return Guess(0, ["nothing is known of its outputs: they are published as they are"])

    def __init__(self, meaning: Meaning) -> None:
        options = meaning.options
        assert isinstance(options, RawOptions)
        self.preprocess = picture_spec(meaning, resize="stretch", **NORMAL[options.normalize])
        self._options = options
        known = [spec.name for spec in meaning.facts.outputs]
        for name in options.outputs or ():
            if name not in known:
                raise ModelError(f"options.outputs: there is no output {name!r}{plugins.nearest(name, known)}")
        # Of an output whose first axis is free nobody knows whether it is the batch's or a list's.
        batch = picture_tensor(meaning.facts).shape[0]
        self.takes_batches = batch is not None
        self._batched = {spec.name for spec in meaning.facts.outputs if spec.shape[:1] == (batch,)}

    def reduce(self, outputs: Tensors) -> Sequence[Tensors]:
        wanted = self._options.outputs
        kept = {name: value for name, value in outputs.items() if wanted is None or name in wanted}
        if not self.takes_batches:
            return [
                {
                    name: np.array(value[0] if self._is_batch_of_one(name, value) else value)
                    for name, value in kept.items()
                }
            ]
        count = next((len(value) for name, value in outputs.items() if name in self._batched), 1)
        return [
            {name: np.array(value[index] if name in self._batched else value) for name, value in kept.items()}
            for index in range(count)
        ]

    def _is_batch_of_one(self, name: str, value: NDArray[Any]) -> bool:
        return name in self._batched and len(value) == 1

    def decode(self, candidates: Tensors, placement: Placement) -> RawTensors:
        return RawTensors(candidates, self._options.inline, self._options.max_bytes)


Family = RawFamily
