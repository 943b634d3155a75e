"""The numpy twin of the reduction kernels in `gpu.cu`: which cells of a dense head are worth a look."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_agent.data import Candidates, Reduction
from edge_agent.errors import EngineError


def reduce(raw: NDArray[Any], reduction: Reduction) -> Sequence[Candidates]:
    """The candidates of each picture; `raw` is the output that `reduction` names, float32 or float16.

    Raises `EngineError` where it has another number of cells than there must be.
    """
    pictures = raw if reduction.rows_first else raw.transpose(0, 2, 1)
    if reduction.cells not in (None, pictures.shape[2]):
        raise EngineError(f"the model gave {pictures.shape[2]} cells where its strides make {reduction.cells}")
    return [_reduce(picture, reduction) for picture in pictures]


def _reduce(picture: NDArray[Any], reduction: Reduction) -> Candidates:
    """`picture`: [rows, cells]. Scores are compared as float32, whatever the model's own type."""
    threshold = np.float32(reduction.threshold)
    first = 5 if reduction.has_objectness else 4
    last = None if reduction.classes is None else first + reduction.classes
    if reduction.has_objectness:
        likely = np.flatnonzero(picture[4].astype(np.float32) >= threshold)
        scores = picture[5:last, likely].astype(np.float32) * picture[4, likely].astype(np.float32)
        best = scores.max(0)
        chosen = _best(best, threshold, reduction.max_candidates)
        cells, best, class_ids = likely[chosen], best[chosen], scores[:, chosen].argmax(0)
    else:
        every = picture[4:last].max(0).astype(np.float32, copy=False)
        cells = _best(every, threshold, reduction.max_candidates)
        best, class_ids = every[cells], picture[4:last, cells].argmax(0)
    boxes = np.ascontiguousarray(picture[:4, cells].T, np.float32)
    extras = None if last is None else np.ascontiguousarray(picture[last:, cells].T, np.float32)
    return Candidates(cells, boxes, best, class_ids, extras)


def _best(scores: NDArray[np.float32], threshold: np.float32, most: int) -> NDArray[np.intp]:
    """Indices of the scores at the threshold or above, ascending; the `most` best if there are more, of equal
    ones the first."""
    kept = np.flatnonzero(scores >= threshold)
    if len(kept) > most:
        kept = np.sort(kept[np.argsort(-scores[kept], kind="stable")[:most]])
    return kept
