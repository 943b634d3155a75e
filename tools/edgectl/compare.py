"""`edgectl models compare`: two models on the same pictures: how far they agree, and how fast each of them is."""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import msgspec
import numpy as np
import typer
from msgspec import Struct
from numpy.typing import NDArray

from edge_agent import logs
from edge_agent.config import Config
from edge_agent.data import (
    Classes,
    DepthMap,
    Detections,
    Embedding,
    Frame,
    Image,
    Names,
    Poses,
    Prediction,
    RawTensors,
    Segmentation,
)
from edge_agent.errors import ModelError
from edge_agent.messages import InferenceLatency
from edge_agent.models import agreement, pictures
from edge_agent.models.loaded import LoadedModel
from edge_agent.models.loading import Wanted
from edgectl._bench import loader
from edgectl._config import models_configuration
from edgectl._models import found
from edgectl._progress import Tell, progress

Asked = tuple[str, str, Sequence[str]]
"""A model, its backend, and what is set differently for it."""
Measure = Literal["detections", "classes", "pixels", "cosine"]

_UNITS: Mapping[Measure, str] = {
    "detections": "detections of both",
    "classes": "first classes",
    "pixels": "pixels",
    "cosine": "cosines",
}
_BUNDLED = 16  # pictures of the synthetic world, where none are given
_INFERENCES = 500


class Side(Struct, frozen=True):
    """One of the two, and what its inference takes; `latency_ms` is of one picture."""

    id: str
    runtime: str
    size: tuple[int, int]
    latency_ms: InferenceLatency


class PictureAgreement(Struct, frozen=True):
    """Of one picture; `score` is null where there was nothing to compare."""

    picture: str
    score: float | None
    compared: int


class Compared(Struct, frozen=True):
    """1 is perfect; null where neither found anything. `compared`: detections, pictures or pixels, by `measure`."""

    a: Side
    b: Side
    measure: Measure
    score: float | None
    compared: int
    pictures: list[PictureAgreement]


@dataclass(frozen=True, slots=True)
class _Judged:
    """Of a picture: what is compared, how much of it agrees, and how much there is."""

    measure: Measure
    agreeing: float
    total: int

    @property
    def score(self) -> float | None:
        return round(self.agreeing / self.total, 4) if self.total else None


def compare(
    a: Asked, b: Asked, path: Path | None, *, images: Path | None, plot: Path | None, seconds: float, as_json: bool
) -> None:
    """Run both and tell. Raises `EdgeAgentError` with a sentence."""
    logs.configure(level="error", format="console", stream=sys.stderr)
    count, shown = _listed(images)
    loaded = models_configuration(path)
    with ExitStack() as stack:
        tell = stack.enter_context(progress("load"))
        one, other = (_opened(asked, loaded, tell, stack) for asked in (a, b))
        if one[1].ref.task != other[1].ref.task:
            raise ModelError(f"{one[0]} does {one[1].ref.task!r}, {other[0]} {other[1].ref.task!r}: nothing to compare")
        judged = dict[str, _Judged]()
        for name, image in shown:
            tell("compare", 100 * len(judged) / count)
            judged[name] = _judged_on(image, one[1], other[1], loaded.inference.score_threshold)
        if not judged:
            raise ModelError(f"--images {images}: it holds no picture that OpenCV can read")
        took = [_timed(model, name, seconds, tell) for name, model in (one, other)]
        sides = [_side(name, model, ms) for (name, model), ms in zip((one, other), took, strict=True)]
    compared = _compared(sides[0], sides[1], judged)
    if plot is not None:
        from edgectl import _plot

        _plot.draw(plot, compared, took)
    typer.echo(msgspec.json.format(msgspec.json.encode(compared), indent=2).decode() if as_json else _told(compared))
    if plot is not None:
        typer.echo(f"drawn: {plot}", err=True)


def _opened(asked: Asked, loaded: Config, tell: Tell, stack: ExitStack) -> tuple[str, LoadedModel]:
    """The model's id, and itself; its threshold is lower, by `agreement.SLACK`."""
    model, backend, settings = asked
    store, name = found(model, settings, loaded)
    lower = loaded.inference.score_threshold * agreement.SLACK
    inference = msgspec.structs.replace(loaded.inference, score_threshold=lower)
    line = loader(store, loaded, backend=backend, inference=inference)
    prepared = line.prepare(Wanted(name, purpose="relief"), tell)
    stack.callback(prepared.model.close)
    return prepared.id, prepared.model


def _listed(images: Path | None) -> tuple[int, Iterator[tuple[str, Image]]]:
    """How many pictures there are at most, and each with its name, read when its turn comes. Raises `ModelError`."""
    if images is None:
        return _BUNDLED, ((f"synthetic-{index}", image) for index, image in enumerate(pictures.bundled(_BUNDLED)))
    if not images.is_dir():
        raise ModelError(f"--images {images}: there is no such folder")
    try:
        files = pictures.listed(images)
    except ModelError as error:
        raise ModelError(f"--images {images}: the folder holds no picture") from error
    return len(files), ((file.name, image) for file in files for image in pictures.read([file]))


def _judged_on(image: Image, a: LoadedModel, b: LoadedModel, threshold: float) -> _Judged:
    one, other = _seen(a, image), _seen(b, image)
    return _judged(one, _renamed(other, b.ref.names, a.ref.names), threshold)


def _seen(model: LoadedModel, image: Image) -> Prediction:
    frame = Frame("compare", 0, image, time.time_ns(), time.monotonic_ns())
    [result] = model.collect(model.submit([frame])).results
    return result.prediction


def _judged(one: Prediction, other: Prediction, threshold: float) -> _Judged:
    if isinstance(one, (Detections, Poses)):
        left, right = agreement.boxed(one), agreement.boxed(other)
        hits = [agreement.confirmed_by(*pair, threshold) for pair in ((left, right), (right, left))]
        return _Judged("detections", float(sum(hit.sum() for hit in hits)), sum(map(len, hits)))
    if isinstance(one, Classes) and isinstance(other, Classes):
        same = len(one) and len(other) and one.class_ids[0] == other.class_ids[0]
        return _Judged("classes", float(bool(same)), 1)
    if isinstance(one, Segmentation) and isinstance(other, Segmentation):
        same_class = one.class_map == _resampled(other.class_map, one.class_map.shape)
        return _Judged("pixels", float(same_class.sum()), same_class.size)
    return _Judged("cosine", _cosine(one, other), 1)


def _resampled(values: NDArray[Any], shape: tuple[int, ...]) -> NDArray[Any]:
    """The nearest value at each place of another resolution; both cover the same picture."""
    pairs = zip(shape, values.shape, strict=True)
    rows, columns = ((2 * np.arange(size) + 1) * other // (2 * size) for size, other in pairs)
    nearest: NDArray[Any] = values[rows[:, None], columns[None]]
    return nearest


def _cosine(one: Prediction, other: Prediction) -> float:
    """Of depths, vectors or raw outputs; 0 where they are not of the same shape."""
    a, b = _numbers(one), _numbers(other)
    if isinstance(one, DepthMap) and isinstance(other, DepthMap):
        b = _resampled(other.values, one.values.shape).ravel().astype(np.float64)
        known = np.isfinite(a) & np.isfinite(b)
        a, b = a[known], b[known]
    norm = float(np.linalg.norm(a) * np.linalg.norm(b))
    return float(a @ b / norm) if norm and a.size == b.size else 0.0


def _numbers(seen: Prediction) -> NDArray[np.float64]:
    if isinstance(seen, DepthMap):
        return seen.values.ravel().astype(np.float64)
    if isinstance(seen, Embedding):
        return seen.vector.astype(np.float64)
    if isinstance(seen, RawTensors):
        return np.concatenate([np.nan_to_num(tensor).ravel().astype(np.float64) for tensor in seen.tensors.values()])
    raise AssertionError(f"{type(seen).__name__} is compared in another way")


def _renamed(seen: Prediction, own: Names, common: Names) -> Prediction:
    """With the other model's numbers for classes of the same name, -1 for what it has not; as it is where no name is
    common to both, and numbers are all there is."""
    if list(own.labels) == list(common.labels) or not set(own.labels) & set(common.labels):
        return seen
    numbers = {name: number for number, name in enumerate(common.labels)}
    table = np.array([numbers.get(name, -1) for name in own.labels], np.int64)
    if isinstance(seen, Segmentation):
        return dataclasses.replace(seen, class_map=table[seen.class_map])
    if isinstance(seen, (Detections, Poses, Classes)):
        return dataclasses.replace(seen, class_ids=table[seen.class_ids])
    return seen


def _timed(model: LoadedModel, name: str, seconds: float, tell: Tell) -> Sequence[float]:
    tell(f"time {name}", None)
    return model.time_inferences(_INFERENCES, within_s=seconds)


def _side(name: str, model: LoadedModel, took: Sequence[float]) -> Side:
    p50, p95, p99 = (round(float(value), 3) for value in np.percentile(took, (50, 95, 99)))
    return Side(name, model.runtime, model.size, InferenceLatency(p50, p95, p99, n=len(took), batch=1))


def _compared(a: Side, b: Side, judged: Mapping[str, _Judged]) -> Compared:
    each = [PictureAgreement(name, one.score, one.total) for name, one in judged.items()]
    agreeing, total = sum(one.agreeing for one in judged.values()), sum(one.total for one in judged.values())
    whole = _Judged(next(iter(judged.values())).measure, agreeing, total)
    return Compared(a, b, whole.measure, whole.score, whole.total, each)


def _told(compared: Compared) -> str:
    lines = []
    for letter, side in (("A", compared.a), ("B", compared.b)):
        latency, size = side.latency_ms, f"{side.size[0]}x{side.size[1]}"
        figures = f"p50 {latency.p50:.2f} ms  p95 {latency.p95:.2f} ms  p99 {latency.p99:.2f} ms"
        lines.append(f"{letter}  {side.id}  {size}  {side.runtime}  {figures}  ({latency.n} inferences)")
    score = "nothing to compare was found" if compared.score is None else f"{compared.score:.4f}"
    lines.append(
        f"agreement  {score}  ({compared.compared} {_UNITS[compared.measure]}, {len(compared.pictures)} pictures)"
    )
    least = sorted((one for one in compared.pictures if one.score is not None), key=_score)[:3]
    lines += [f"  least on {one.picture}: {one.score:.4f}" for one in least if _score(one) < 1]
    return "\n".join(lines)


def _score(one: PictureAgreement) -> float:
    assert one.score is not None
    return one.score
