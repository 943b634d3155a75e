"""Detection transformers: a fixed number of queries, each with class logits and a box in shares of the picture.

Outputs [B, queries, classes] and [B, queries, 4] (cx cy w h in 0..1). `sigmoid`: classes are independent, and the
best of all queries and classes count (RT-DETR, D-FINE, RF-DETR; arXiv 2304.08069). `softmax`: the last class is
"nothing", and each query has one class (Carion et al., "End-to-End Object Detection with Transformers", arXiv
2005.12872). No NMS is needed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from edge_agent.config import Table
from edge_agent.data import Candidates, Detections, ModelFacts, Names, Tensors, TensorSpec
from edge_agent.errors import ModelError
from edge_agent.families import Guess, Meaning
from edge_agent.families._boxes import BoxFormat, BoxOptions, Selection, decoded, sigmoid, softmax
from edge_agent.families._metadata import file_labels, labels_of, require_real
from edge_agent.families._pictures import IMAGENET, RGB_0_1, outputs_of, picture_spec, shown
from edge_agent.geometry import Placement

_MOST_QUERIES = 1000


class DetrOptions(BoxOptions):
    """`[models.<name>.options]` of a detection transformer."""

    nms: Literal["class", "agnostic", "none"] = "none"
    activation: Literal["auto", "sigmoid", "softmax"] = "auto"
    box_format: BoxFormat = "cxcywh"
    normalize: Literal["auto", "none", "imagenet"] = "auto"


class DetrFamily:
    """Boxes with classes and scores."""

    Options: ClassVar[type[Table]] = DetrOptions
    takes_batches = True
    task = "detect"
    reduction = None

    @staticmethod
    def recognise(facts: ModelFacts) -> Guess | None:
        try:
            logits, boxes = _outputs(facts)
        except ModelError:
            return None
        named = "logit" in logits.name or "label" in logits.name
        if not named and (logits.shape[1] is None or logits.shape[1] > _MOST_QUERIES):
            return None
        because = [
            f"{logits.name!r} {shown(logits.shape)} and {boxes.name!r} {shown(boxes.shape)} are a transformer's queries"
        ]
        return Guess(3 if named else 1, because)

    def __init__(self, meaning: Meaning) -> None:
        options = meaning.options
        assert isinstance(options, DetrOptions)
        logits, boxes = _outputs(meaning.facts)
        self._logits, self._boxes = logits.name, boxes.name
        require_real(meaning.facts, logits.name, boxes.name)
        values = logits.shape[2]
        if values is None:
            raise ModelError(f"the output {shown(logits.shape)} does not say how many classes there are")
        labels = meaning.labels if meaning.labels is not None else file_labels(meaning.facts)
        is_rf_detr = (boxes.name, logits.name) == ("dets", "labels")
        self._softmax = not is_rf_detr and _is_softmax(options, labels, values)
        # RF-DETR has a sigmoid, perhaps a column more than classes, and wants ImageNet's mean.
        spare = int(is_rf_detr and labels is not None and len(labels) == values - 1)
        self._classes = values - max(spare, int(self._softmax))
        is_plain = not self._softmax and options.normalize == "auto" and not is_rf_detr
        normal = RGB_0_1 if is_plain or options.normalize == "none" else IMAGENET
        # Its positions are learnt over the whole input: pictures are stretched over it.
        self.preprocess = picture_spec(meaning, resize="stretch", **normal)
        self.names = Names(labels_of(meaning.labels, meaning.facts, self._classes))
        self._options = options
        self._selection = Selection(options, meaning.thresholds, self.names.labels)
        self._scale = np.array([self.preprocess.width, self.preprocess.height] * 2, np.float32)

    def reduce(self, outputs: Tensors) -> Sequence[Candidates]:
        pairs = zip(outputs[self._logits], outputs[self._boxes], strict=True)
        return [self._reduce(logits, boxes) for logits, boxes in pairs]

    def decode(self, candidates: Candidates, placement: Placement) -> Detections:
        return decoded(candidates, self._selection, placement, form=self._options.box_format, scale=self._scale)

    def _reduce(self, logits: NDArray[Any], boxes: NDArray[Any]) -> Candidates:
        threshold = np.float32(self._selection.threshold)
        with np.errstate(invalid="ignore", over="ignore"):
            if self._softmax:
                likely = softmax(logits)[:, :-1]
                queries, class_ids = np.arange(len(likely)), likely.argmax(1)
                scores = likely.max(1)
                kept = np.flatnonzero(scores >= threshold)
                queries, class_ids, scores = queries[kept], class_ids[kept], scores[kept]
            else:
                likely = sigmoid(logits[:, : self._classes])
                queries, class_ids = np.nonzero(likely >= threshold)
                scores = likely[queries, class_ids]
        best = np.argsort(-scores, kind="stable")[: min(len(logits), self._options.top_k)]
        queries = queries[best]
        return Candidates(queries, boxes[queries].astype(np.float32), scores[best], class_ids[best])


Family = DetrFamily


def _outputs(facts: ModelFacts) -> tuple[TensorSpec, TensorSpec]:
    """Class logits and boxes. Raises `ModelError`."""
    flat = [spec for spec in facts.outputs if len(spec.shape) == 3]
    boxes = [spec for spec in flat if spec.shape[2] == 4]
    logits = [spec for spec in flat if spec.shape[2] != 4 and spec.shape[1] == boxes[0].shape[1]] if boxes else []
    if len(flat) == 2 and len(boxes) == 2:  # four classes
        logits = [spec for spec in boxes if "logit" in spec.name or spec.name == "labels"]
        boxes = [spec for spec in boxes if spec not in logits]
    if len(boxes) != 1 or len(logits) != 1:
        raise ModelError(
            "a transformer has outputs [batch, queries, classes] and [batch, queries, 4]; "
            f"this model's are {outputs_of(facts)}"
        )
    return logits[0], boxes[0]


def _is_softmax(options: DetrOptions, labels: Sequence[str] | None, values: int) -> bool:
    if options.activation != "auto":
        return options.activation == "softmax"
    return values == 92 or (labels is not None and len(labels) == values - 1)
