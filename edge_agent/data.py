"""The five nouns of the line, `Frame → Batch → Tensors → Result → Message`, and what they are made of.

Values only: no behaviour beyond a derived property, no third-party import but numpy.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

Image: TypeAlias = NDArray[np.uint8]
"""[height, width, 3] uint8, BGR, as OpenCV hands it out."""

Tensors: TypeAlias = Mapping[str, NDArray[Any]]
"""What an engine gives back: output name → array, batch axis first."""


@dataclass(frozen=True, slots=True)
class VideoFormat:
    """What a source delivers once it is open; `fps` is nominal, None where unknown."""

    width: int
    height: int
    fps: float | None = None


@dataclass(frozen=True, slots=True)
class Frame:
    """One picture of one camera. `seq` counts every captured frame, dropped ones too, from 0.

    `captured_at_ns` is wall time (data); `captured_mono_ns` is the monotonic clock (intervals).
    """

    camera: str
    seq: int
    image: Image
    captured_at_ns: int
    captured_mono_ns: int


Batch: TypeAlias = Sequence[Frame]


@dataclass(frozen=True, slots=True)
class PreprocessSpec:
    """What a model wants its pictures to be, as data, so that each backend can do it its own way.

    Pixels become `(value * scale - mean) / std` by channel, after the colour order was applied;
    `mean` and `std` are in the units of `value * scale`. `anchor` says where a letterboxed picture
    lies in the canvas; the rest is filled with `pad` (0..255, before normalisation).
    """

    width: int
    height: int
    resize: Literal["letterbox", "stretch", "crop"] = "letterbox"
    anchor: Literal["center", "top-left"] = "center"
    pad: int = 114
    color: Literal["rgb", "bgr"] = "rgb"
    scale: float = 1 / 255
    mean: tuple[float, float, float] = (0.0, 0.0, 0.0)
    std: tuple[float, float, float] = (1.0, 1.0, 1.0)
    layout: Literal["nchw", "nhwc"] = "nchw"
    dtype: Literal["float32", "float16", "uint8"] = "float32"

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of one picture as the model wants it, without the batch axis."""
        return (3, self.height, self.width) if self.layout == "nchw" else (self.height, self.width, 3)


@dataclass(frozen=True, slots=True)
class Reduction:
    """The hot first step of decoding a dense head, as data: which cells are worth a look.

    `output` is [B, rows, cells] (`rows_first`) or [B, cells, rows]; rows 0 to 3 are the box, then objectness
    if the head has it, then one value a class. A cell's score is its best class, times objectness; it is a
    candidate at `threshold` or more (objectness alone too). Of more than `max_candidates` in a picture the
    best stay, of equal ones the first. NaN is no candidate. `cells` is how many there must be, where that
    is known.
    """

    output: str
    rows_first: bool
    has_objectness: bool
    threshold: float
    max_candidates: int
    cells: int | None = None


@dataclass(frozen=True, slots=True)
class Candidates:
    """What a `Reduction` leaves of one picture, in the order of the cells: cells: [K] int64;
    boxes: [K, 4] float32 as the head has them; scores: [K] float32; class_ids: [K] int64. Owned, no views."""

    cells: NDArray[np.int64]
    boxes: NDArray[np.float32]
    scores: NDArray[np.float32]
    class_ids: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.cells)


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A model's input or output; a dimension of None is dynamic."""

    name: str
    shape: tuple[int | None, ...]
    dtype: str


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What a model's file says about itself."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    metadata: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Detections:
    """boxes: [N, 4] float32, x1 y1 x2 y2 in source pixels; scores: [N] float32 in 0..1;
    class_ids: [N] int64. Best score first."""

    boxes: NDArray[np.float32]
    scores: NDArray[np.float32]
    class_ids: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.scores)


Prediction: TypeAlias = Detections
"""What a family makes of a frame; more members come with more families."""


@dataclass(frozen=True, slots=True)
class ModelRef:
    """Which model made a result."""

    name: str
    version: str
    task: str
    labels: Sequence[str] = field(repr=False, default=())


@dataclass(frozen=True, slots=True)
class Timings:
    """Milliseconds a frame spent in each stage; in a batch, its share of the batch's time
    for `preprocess`, `inference` and `postprocess`. `queue` runs from capture to the engine's start,
    `total` from capture to the end of post-processing, batch mates included."""

    queue_ms: float
    preprocess_ms: float
    inference_ms: float
    postprocess_ms: float
    total_ms: float


@dataclass(frozen=True, slots=True)
class Result:
    """What the model that ran saw in a frame."""

    frame: Frame
    model: ModelRef
    prediction: Prediction
    timings: Timings


@dataclass(frozen=True, slots=True)
class Message:
    """Something to publish. `correlation` travels with replies to MQTT 5 requests."""

    topic: str
    payload: bytes
    qos: int = 0
    retain: bool = False
    correlation: bytes | None = None
