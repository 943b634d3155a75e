"""What exporters write into a model's file, and the names that come of it."""

from __future__ import annotations

import ast
import json
from collections.abc import Sequence

from edge_agent.data import ModelFacts
from edge_agent.errors import ModelError


def labels_of(given: Sequence[str] | None, facts: ModelFacts, count: int) -> tuple[str, ...]:
    """A name for each of `count` classes: the entry's, else the file's own, else the numbers.

    Raises `ModelError` where there are more or fewer.
    """
    labels, origin = given, "the entry"
    if labels is None:
        labels, origin = file_labels(facts), "the model's metadata"
    if labels is None:
        return tuple(f"class_{i}" for i in range(count))
    if len(labels) != count:
        raise ModelError(f"{origin} names {len(labels)} labels, the model's output has {count} classes")
    return tuple(labels)


def file_labels(facts: ModelFacts) -> Sequence[str] | None:
    """Ultralytics' `names`, {0: 'person', …} or a list; Hugging Face's `id2label`; or `labels`, one a line or comma;
    PaddlePaddle's `character`."""
    if text := facts.metadata.get("names") or facts.metadata.get("id2label"):
        return _names(text)
    if text := facts.metadata.get("labels") or facts.metadata.get("classes"):
        return [label.strip() for label in text.replace("\n", ",").split(",") if label.strip()]
    if text := facts.metadata.get("character"):  # PaddlePaddle's, one a line
        return [label.strip() for label in text.splitlines() if label.strip()]
    return None


def require_real(facts: ModelFacts, *outputs: str) -> None:
    """Raises `ModelError` where an output that scores and places are read from holds quantised numbers."""
    for spec in facts.outputs:
        if spec.name in outputs and not spec.dtype.startswith("float"):
            raise ModelError(
                f"{spec.name} holds {spec.dtype}; say what its numbers mean, such as "
                f"dequantize = {{ {spec.name!r} = [0.0039, 0] }} (scale and zero point)"
            )


def literal(key: str, text: str) -> object:
    """A value of the file's metadata, where Ultralytics writes Python literals and others JSON."""
    try:
        value: object = ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        try:
            value = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ModelError(f"the model's metadata {key!r} cannot be read: {text[:80]!r}") from error
    return value


def _names(text: str) -> Sequence[str]:
    names = literal("names", text)
    if isinstance(names, dict):
        try:
            return [str(names[key]) for key in sorted(names, key=int)]
        except (ValueError, TypeError):
            names = None
    if isinstance(names, (list, tuple)):
        return [str(name) for name in names]
    raise ModelError(f"the model's metadata 'names' is neither a table by number nor a list: {text[:80]!r}")
