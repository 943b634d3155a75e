"""Embeddings: a vector that says what a picture is like, [B, D], made of length 1."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from edge_agent.config import Table
from edge_agent.data import Embedding, ModelFacts, Names, Tensors, TensorSpec
from edge_agent.errors import ModelError
from edge_agent.families import Guess, Meaning
from edge_agent.families._metadata import file_labels
from edge_agent.families._pictures import IMAGENET, outputs_of, picture_spec, shown
from edge_agent.geometry import Placement

_USUAL_SIZES = (64, 128, 256, 384, 512, 768, 1024, 2048)


class EmbeddingOptions(Table):
    """`[models.<name>.options]` of such a model."""

    output: str | None = None


class EmbeddingFamily:
    """A vector of length 1."""

    Options: ClassVar[type[Table]] = EmbeddingOptions
    takes_batches = True
    task = "embed"
    reduction = None
    names = Names()

    @staticmethod
    def recognise(facts: ModelFacts) -> Guess | None:
        spec = _output(facts, None)
        if spec is None:
            return None
        told = facts.metadata.get("task") in ("embed", "feature-extraction", "image-feature-extraction")
        named = any(word in spec.name.lower() for word in ("embed", "feature"))
        if told or named:
            return Guess(3, [f"the output {spec.name!r} {shown(spec.shape)} is called a vector of features"])
        usual = len(facts.outputs) == 1 and any(side in _USUAL_SIZES for side in spec.shape[1:])
        if not usual or file_labels(facts) is not None:
            return None
        return Guess(1, [f"the output {spec.name!r} {shown(spec.shape)} is as long as vectors of features are"])

    def __init__(self, meaning: Meaning) -> None:
        options = meaning.options
        assert isinstance(options, EmbeddingOptions)
        spec = _output(meaning.facts, options.output)
        if spec is None:
            raise ModelError(
                "an embedding is one vector a picture, [batch, numbers]; "
                f"this model's outputs are {outputs_of(meaning.facts)}"
            )
        self._output = spec.name
        self.preprocess = picture_spec(meaning, resize="stretch", **IMAGENET)

    def reduce(self, outputs: Tensors) -> Sequence[NDArray[Any]]:
        raw = outputs[self._output]
        return list(raw.reshape(len(raw), -1))

    def decode(self, candidates: NDArray[Any], placement: Placement) -> Embedding:
        vector = np.nan_to_num(candidates.astype(np.float64))
        length = float(np.linalg.norm(vector))
        return Embedding((vector / length if 0 < length < np.inf else vector * 0).astype(np.float32))


Family = EmbeddingFamily


def _output(facts: ModelFacts, wanted: str | None) -> TensorSpec | None:
    for spec in facts.outputs:
        sides = [side for side in spec.shape[1:] if side != 1]
        if wanted in (None, spec.name) and len(sides) == 1 and spec.dtype.startswith("float"):
            return spec
    return None
