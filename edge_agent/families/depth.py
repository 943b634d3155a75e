"""Depth: one value a pixel, [B, H, W], [B, 1, H, W] or [B, H, W, 1], in the model's own unit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import cv2
import numpy as np
from numpy.typing import NDArray

from edge_agent.config import Table
from edge_agent.data import DepthMap, ModelFacts, Names, Tensors, TensorSpec
from edge_agent.errors import ModelError
from edge_agent.families import Guess, Meaning
from edge_agent.families._pictures import IMAGENET, outputs_of, picture_spec, picture_tensor, shown
from edge_agent.geometry import Placement


class DepthOptions(Table):
    """`[models.<name>.options]` of a depth model. `png`: whether messages carry the map, 16 bits a pixel."""

    output: str | None = None
    png: bool = False


class DepthFamily:
    """A map of depths, or of their inverse, as the model gives it."""

    Options: ClassVar[type[Table]] = DepthOptions
    takes_batches = True
    task = "depth"
    reduction = None
    names = Names()

    @staticmethod
    def recognise(facts: ModelFacts) -> Guess | None:
        told = facts.metadata.get("task") in ("depth", "depth-estimation")
        spec = _output(facts, None)
        if spec is None or (len(facts.outputs) > 1 and not told):
            return None
        named = "depth" in spec.name.lower() or "disp" in spec.name.lower()
        if not (told or named or _is_picture_shaped(facts, spec)):
            return None
        because = [f"the output {spec.name!r} {shown(spec.shape)} is one number a pixel"]
        return Guess(3 if told or named else 1, because)

    def __init__(self, meaning: Meaning) -> None:
        options = meaning.options
        assert isinstance(options, DepthOptions)
        spec = _output(meaning.facts, options.output)
        if spec is None:
            raise ModelError(
                "a depth model gives one number a pixel, [batch, height, width]; "
                f"this one's are {outputs_of(meaning.facts)}"
            )
        self._output = spec.name
        self.preprocess = picture_spec(meaning, resize="stretch", **IMAGENET)
        self._png = options.png

    def reduce(self, outputs: Tensors) -> Sequence[NDArray[Any]]:
        raw = outputs[self._output]
        if raw.ndim == 4:
            raw = raw[:, 0] if raw.shape[1] == 1 else raw[..., 0]
        return list(raw)

    def decode(self, candidates: NDArray[Any], placement: Placement) -> DepthMap:
        height, width = candidates.shape
        x, y = width / self.preprocess.width, height / self.preprocess.height
        left, top = round(placement.left * x), round(placement.top * y)
        right, bottom = round((placement.left + placement.width) * x), round((placement.top + placement.height) * y)
        columns, rows = np.arange(left, max(left + 1, right)), np.arange(top, max(top + 1, bottom))
        seen = candidates[np.clip(rows, 0, height - 1)[:, None], np.clip(columns, 0, width - 1)[None]]
        values = seen.astype(np.float32)
        values[~np.isfinite(values)] = np.nan
        return DepthMap(values, png=_png(values) if self._png else None)


Family = DepthFamily


def _output(facts: ModelFacts, wanted: str | None) -> TensorSpec | None:
    for spec in facts.outputs:
        sides = spec.shape[1:]
        is_map = len(sides) == 2 or (len(sides) == 3 and 1 in (sides[0], sides[2]))
        is_large = all(side is None or side >= 16 for side in sides if side != 1)
        if wanted in (None, spec.name) and is_map and is_large and spec.dtype.startswith("float"):
            return spec
    return None


def _is_picture_shaped(facts: ModelFacts, spec: TensorSpec) -> bool:
    """Whether the output has the shape of the picture, at the same or a lower resolution."""
    sides = [side for side in spec.shape[1:] if side != 1]
    taken = [side for side in picture_tensor(facts).shape[1:] if side != 3]
    if len(sides) != 2 or len(taken) != 2:
        return False
    known = [(inner, outer) for inner, outer in zip(sides, taken, strict=True) if inner and outer]
    ratios = {round(outer / inner, 1) for inner, outer in known}
    return len(known) == 2 and len(ratios) == 1 and min(ratios) >= 1


def _png(values: NDArray[np.float32]) -> bytes:
    """The map from its least (1) to its largest value (65535); 0 is unknown."""
    known = np.isfinite(values)
    if not known.any():
        low, high = 0.0, 1.0
    else:
        low, high = float(np.min(values[known])), float(np.max(values[known]))
    span = (high - low) or 1.0
    levels = np.where(known, np.round((np.nan_to_num(values) - low) / span * 65_534) + 1, 0).astype(np.uint16)
    _, data = cv2.imencode(".png", levels)
    return data.tobytes()
