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
    dtype: Literal["float32", "float16", "uint8", "int32"] = "float32"

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of one picture as the model wants it, without the batch axis."""
        return (3, self.height, self.width) if self.layout == "nchw" else (self.height, self.width, 3)


@dataclass(frozen=True, slots=True)
class Reduction:
    """The hot first step of decoding a dense head, as data: which cells are worth a look.

    `output` is [B, rows, cells] (`rows_first`) or [B, cells, rows]; rows 0 to 3 are the box, then objectness
    if the head has it, then one value a class; of more rows than `classes` the rest are extras, which go with
    the candidates as they are. A cell's score is its best class, times objectness; it is a
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
    classes: int | None = None


@dataclass(frozen=True, slots=True)
class Candidates:
    """What a `Reduction` leaves of one picture, in the order of the cells: cells: [K] int64;
    boxes: [K, 4] float32 as the head has them; scores: [K] float32; class_ids: [K] int64;
    extras: [K, E] float32, of heads that have some. Views, where an engine reduced: valid as long as its tensors."""

    cells: NDArray[np.int64]
    boxes: NDArray[np.float32]
    scores: NDArray[np.float32]
    class_ids: NDArray[np.int64]
    extras: NDArray[np.float32] | None = None

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
class Mask:
    """The pixels of one object: bits [h, w] bool, whose upper left corner lies at column `left`, row `top`."""

    left: int
    top: int
    bits: NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Detections:
    """boxes: [N, 4] float32, x1 y1 x2 y2 in source pixels; scores: [N] float32 in 0..1;
    class_ids: [N] int64. Best score first.

    Where the model has them: masks, one an object; keypoints: [N, K, 3] float32, x y score; corners: [N, 4, 2]
    float32, of boxes that are turned (`boxes` is then what encloses them); track_ids: [N] int64, -1 for none.
    """

    boxes: NDArray[np.float32]
    scores: NDArray[np.float32]
    class_ids: NDArray[np.int64]
    masks: Sequence[Mask] | None = None
    keypoints: NDArray[np.float32] | None = None
    corners: NDArray[np.float32] | None = None
    track_ids: NDArray[np.int64] | None = None

    def __len__(self) -> int:
        return len(self.scores)


@dataclass(frozen=True, slots=True)
class Poses:
    """keypoints: [N, K, 3] float32, x y in source pixels and a score in 0..1; scores: [N] float32;
    boxes: [N, 4] float32, x1 y1 x2 y2; class_ids: [N] int64. Best score first."""

    keypoints: NDArray[np.float32]
    scores: NDArray[np.float32]
    boxes: NDArray[np.float32]
    class_ids: NDArray[np.int64]
    track_ids: NDArray[np.int64] | None = None

    def __len__(self) -> int:
        return len(self.scores)


@dataclass(frozen=True, slots=True)
class Classes:
    """The likeliest classes of a picture, best first. class_ids: [N] int64; scores: [N] float32 in 0..1."""

    class_ids: NDArray[np.int64]
    scores: NDArray[np.float32]

    def __len__(self) -> int:
        return len(self.scores)


@dataclass(frozen=True, slots=True)
class Region:
    """A connected part of a segmented picture, in source pixels: box x1 y1 x2 y2; centroid x y; area in
    pixels; outline: [P, 2] float32; score: the mean over its pixels, None where the model gives labels only."""

    class_id: int
    area: float
    box: tuple[float, float, float, float]
    centroid: tuple[float, float]
    score: float | None
    outline: NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Segmentation:
    """class_map: [h, w] uint8 or uint16, which covers the whole source picture at the model's own resolution;
    ratios: [C] float64, each class's share of it; regions, largest first."""

    class_map: NDArray[Any]
    ratios: NDArray[np.float64]
    regions: Sequence[Region]
    carries_map: bool = False

    def __len__(self) -> int:
        return len(self.regions)


@dataclass(frozen=True, slots=True)
class DepthMap:
    """values: [h, w] float32, in the model's own unit, NaN where unknown, which covers the whole source picture;
    png: the map from its least value (1) to its largest (65535), where messages shall carry it; 0 is unknown."""

    values: NDArray[np.float32]
    png: bytes | None = None

    def __len__(self) -> int:
        return 1


@dataclass(frozen=True, slots=True)
class Embedding:
    """vector: [D] float32 of length 1."""

    vector: NDArray[np.float32]

    def __len__(self) -> int:
        return 1


@dataclass(frozen=True, slots=True)
class RawTensors:
    """A picture's outputs as they are, by name; of more than `inline` values, and of more than `cap` bytes, the
    message has less."""

    tensors: Tensors
    inline: int
    cap: int

    def __len__(self) -> int:
        return len(self.tensors)


Prediction: TypeAlias = Detections | Poses | Classes | Segmentation | DepthMap | Embedding | RawTensors
"""What a family makes of a frame."""


@dataclass(frozen=True, slots=True)
class Names:
    """What a model's numbers are called: classes, keypoints, which of these are joined, colours (R, G, B) by class."""

    labels: Sequence[str] = ()
    keypoints: Sequence[str] = ()
    skeleton: Sequence[tuple[int, int]] = ()
    colors: Sequence[tuple[int, int, int]] = ()


@dataclass(frozen=True, slots=True)
class ModelRef:
    """Which model made a result. `thresholds`: of classes that have one of their own, by
    number; `family`: what it was taken for."""

    name: str
    version: str
    task: str
    names: Names = field(repr=False, default_factory=Names)
    thresholds: Mapping[int, float] = field(repr=False, default_factory=dict)
    family: str = ""


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
    """What the model that ran saw in a frame; `zone_counts`: of each zone of its camera, how many of which label."""

    frame: Frame
    model: ModelRef
    prediction: Prediction
    timings: Timings
    zone_counts: Mapping[str, Mapping[str, int]] | None = None


@dataclass(frozen=True, slots=True)
class TrackState:
    """How a followed object was seen: box x1 y1 x2 y2 in source pixels, and the zones that it stands in."""

    class_id: int
    score: float
    box: tuple[float, ...]
    zones: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Crossing:
    """A line was crossed; `forward` is from its left to its right, as one looks from its first point to the second."""

    line: str
    direction: Literal["forward", "backward"]


@dataclass(frozen=True, slots=True)
class Event:
    """What happened to a followed object, told by `result`. `new` has no before, `end` no after."""

    result: Result
    type: Literal["new", "update", "end"]
    track_id: int
    before: TrackState | None
    after: TrackState | None
    entered: tuple[str, ...] = ()
    left: tuple[str, ...] = ()
    crossed: tuple[Crossing, ...] = ()


MessageClass = Literal["status", "replies", "events", "results"]


@dataclass(frozen=True, slots=True)
class Message:
    """Something to publish. Its class says what becomes of it while the broker is away: of a `status` the latest of its
    topic is kept, others wait in line. `id`: of one that may come twice, and stands in its payload. `correlation`
    travels with replies to MQTT 5 requests."""

    topic: str
    payload: bytes
    kind: MessageClass = "results"
    retain: bool = False
    id: str | None = None
    correlation: bytes | None = None
