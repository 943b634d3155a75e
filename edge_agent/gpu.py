"""What the GPU does to pictures and to dense heads: the CUDA twins of `imaging.Preprocessor` and `dense.reduce`.

Both are sequences of launches on a stream, so that they can be captured into a graph; which pictures a launch
is for stands in memory that it reads, not in its arguments.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_agent.cuda import DeviceMemory, Gpu, Kernels, PinnedMemory, Stream, pinned_array, pinned_memory
from edge_agent.data import Candidates, PreprocessSpec, Reduction
from edge_agent.geometry import Placement

SOURCE = Path(__file__).with_name("gpu.cu")

PICTURE = struct.Struct("<Q6i")
"""`Picture` of gpu.cu: address, width and height, left and top, width and height in the input."""

_TILE = (32, 8, 1)
_CELLS = 128
_GATHERERS = 256


class Style(ctypes.Structure):
    """`Style` of gpu.cu."""

    _fields_ = (
        ("width", ctypes.c_int),
        ("height", ctypes.c_int),
        ("swap", ctypes.c_int),
        ("interleaved", ctypes.c_int),
        ("pad", ctypes.c_int),
        ("scale", ctypes.c_float * 3),
        ("shift", ctypes.c_float * 3),
    )


class Head(ctypes.Structure):
    """`Head` of gpu.cu."""

    _fields_ = (
        ("cells", ctypes.c_int),
        ("rows", ctypes.c_int),
        ("row_step", ctypes.c_int),
        ("cell_step", ctypes.c_int),
        ("objectness", ctypes.c_int),
        ("first_class", ctypes.c_int),
        ("classes", ctypes.c_int),
        ("threshold", ctypes.c_float),
        ("most", ctypes.c_int),
    )


class Places(ctypes.Structure):
    """`Candidates` of gpu.cu: where the kernel writes them."""

    _fields_ = (
        ("cells", ctypes.c_uint64),
        ("class_ids", ctypes.c_uint64),
        ("scores", ctypes.c_uint64),
        ("boxes", ctypes.c_uint64),
    )


def kernels(gpu: Gpu, cache: Path | None) -> Kernels:
    """The kernels of gpu.cu for this GPU."""
    return Kernels(gpu, "gpu", SOURCE.read_text(encoding="utf-8"), cache=cache)


def style(spec: PreprocessSpec) -> Style:
    """A `PreprocessSpec` as the kernel reads it; pictures of whole numbers are not normalised, as on the CPU."""
    whole = spec.dtype in ("uint8", "int32")
    scale = [1.0 if whole else spec.scale / std for std in spec.std]
    shift = [0.0 if whole else mean / std for mean, std in zip(spec.mean, spec.std, strict=True)]
    return Style(
        width=spec.width,
        height=spec.height,
        swap=spec.color == "rgb",
        interleaved=spec.layout == "nhwc",
        pad=spec.pad,
        scale=(ctypes.c_float * 3)(*scale),
        shift=(ctypes.c_float * 3)(*shift),
    )


def head(reduction: Reduction, shape: Sequence[int]) -> Head:
    """A `Reduction` of an output of this shape, as the kernels read it."""
    _, first, second = shape
    rows, cells = (first, second) if reduction.rows_first else (second, first)
    first_class = 5 if reduction.has_objectness else 4
    return Head(
        cells=cells,
        rows=rows,
        row_step=cells if reduction.rows_first else 1,
        cell_step=1 if reduction.rows_first else rows,
        objectness=4 if reduction.has_objectness else -1,
        first_class=first_class,
        classes=reduction.classes or rows - first_class,
        threshold=reduction.threshold,
        most=min(reduction.max_candidates, cells),
    )


class Letterbox:
    """Turns the pictures of a batch, wherever they lie, into a model's input.

    `show` says which pictures; `launch` does it, and reads what was shown when it runs.
    """

    def __init__(self, gpu: Gpu, kernels: Kernels, spec: PreprocessSpec, *, max_batch: int) -> None:
        self._kernels = kernels
        self._kernel = f"letterbox_{spec.dtype}"
        self._style = style(spec)
        self._shown = pinned_array(gpu, (max_batch * PICTURE.size,), np.uint8)
        self._pictures = DeviceMemory(self._shown.nbytes)
        self._known: list[tuple[int, Placement] | None] = [None] * max_batch

    def show(self, index: int, address: int, at: Placement) -> None:
        """Picture `index` of the next launch lies at a device address, and goes there in the input."""
        known = self._known[index]
        if known is None or known[1] is not at or known[0] != address:
            PICTURE.pack_into(self._shown, index * PICTURE.size, *picture_fields(address, at))
            self._known[index] = address, at

    def launch(self, stream: Stream, out: int, *, batch: int) -> None:
        stream.copy_in(self._pictures.address, _pinned(self._shown).address, self._shown.nbytes)
        grid = (_tiles(self._style.width, _TILE[0]), _tiles(self._style.height, _TILE[1]), batch)
        arguments = (ctypes.c_uint64(self._pictures.address), ctypes.c_uint64(out), self._style)
        self._kernels.launch(self._kernel, stream, grid, _TILE, arguments)

    def close(self) -> None:
        self._pictures.close()


class Reducer:
    """Leaves the candidates of a dense head; only they reach the host, written there by the kernel itself."""

    def __init__(self, gpu: Gpu, kernels: Kernels, reduction: Reduction, shape: Sequence[int], dtype: str) -> None:
        batch = shape[0]
        self._kernels = kernels
        self._dtype = dtype
        self._head = head(reduction, shape)
        most = self._head.most
        self._counts = pinned_array(gpu, (batch,), np.uint32)
        self._found_cells = pinned_array(gpu, (batch, most), np.int64)
        self._found_class_ids = pinned_array(gpu, (batch, most), np.int64)
        self._found_scores = pinned_array(gpu, (batch, most), np.float32)
        self._found_boxes = pinned_array(gpu, (batch, most, 4), np.float32)
        self._found = DeviceMemory(4 * batch)
        self._ranks = DeviceMemory(8 * batch * self._head.cells)
        self._class_ids = DeviceMemory(4 * batch * self._head.cells)
        self._survivors = DeviceMemory(8 * batch * most)

    def launch(self, stream: Stream, output: int, *, batch: int) -> None:
        """Reduce the head that lies at a device address."""
        stream.clear(self._found.address, self._found.nbytes)
        found, ranks, class_ids, survivors, head_at = (
            ctypes.c_uint64(address)
            for address in (
                self._found.address,
                self._ranks.address,
                self._class_ids.address,
                self._survivors.address,
                output,
            )
        )
        self._kernels.launch(
            f"score_cells_{self._dtype}",
            stream,
            (_tiles(self._head.cells, _CELLS), batch, 1),
            (_CELLS, 1, 1),
            (head_at, self._head, found, ranks, class_ids),
        )
        counts = ctypes.c_uint64(_pinned(self._counts).device_address)
        out = Places(
            cells=_pinned(self._found_cells).device_address,
            class_ids=_pinned(self._found_class_ids).device_address,
            scores=_pinned(self._found_scores).device_address,
            boxes=_pinned(self._found_boxes).device_address,
        )
        self._kernels.launch(
            f"gather_{self._dtype}",
            stream,
            (batch, 1, 1),
            (_GATHERERS, 1, 1),
            (head_at, self._head, found, ranks, class_ids, survivors, counts, out),
        )

    def candidates(self, batch: int) -> Sequence[Candidates]:
        """What the launch that has ended found, a picture each; views, valid until the next launch."""
        return [
            Candidates(
                self._found_cells[i, :count],
                self._found_boxes[i, :count],
                self._found_scores[i, :count],
                self._found_class_ids[i, :count],
            )
            for i, count in enumerate(self._counts[:batch].tolist())
        ]

    def close(self) -> None:
        for memory in (self._survivors, self._found, self._ranks, self._class_ids):
            memory.close()


def picture_fields(address: int, at: Placement) -> tuple[int, ...]:
    """The fields of a `PICTURE`."""
    return address, at.source_width, at.source_height, at.left, at.top, at.width, at.height


def _pinned(array: NDArray[Any]) -> PinnedMemory:
    memory = pinned_memory(array)
    assert memory is not None
    return memory


def _tiles(size: int, tile: int) -> int:
    return -(-size // tile)
