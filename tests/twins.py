"""What holds for the CUDA kernels wherever they run: they agree with `imaging.Preprocessor` and `_dense.reduce`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import hypothesis.strategies as st
import numpy as np
from numpy.typing import NDArray

from edge_agent import cuda
from edge_agent import gpu as kernels
from edge_agent.data import Candidates, PreprocessSpec, Reduction
from edge_agent.families import _dense
from edge_agent.geometry import place
from edge_agent.imaging import Preprocessor

RunLetterbox = Callable[[Sequence[NDArray[np.uint8]], PreprocessSpec], NDArray[Any]]
RunReduce = Callable[[NDArray[Any], Reduction], Sequence[Candidates]]


def letterbox(compiled: cuda.Kernels, images: Sequence[NDArray[np.uint8]], spec: PreprocessSpec) -> NDArray[Any]:
    """What the letterbox kernel makes of pictures in pinned memory."""
    gpu, stream = cuda.open_gpu(), cuda.Stream()
    box = kernels.Letterbox(gpu, compiled, spec, max_batch=len(images))
    shape = spec.shape
    out = cuda.pinned_array(gpu, (len(images), *shape), spec.dtype)
    device = cuda.DeviceMemory(out.nbytes)
    held = []
    for index, image in enumerate(images):
        pinned = cuda.pinned_array(gpu, image.shape, np.uint8)
        np.copyto(pinned, image)
        memory = cuda.pinned_memory(pinned)
        assert memory is not None
        held.append(pinned)
        box.show(index, memory.device_address, place(image.shape[1], image.shape[0], spec))
    box.launch(stream, device.address, batch=len(images))
    stream.copy_out(out.ctypes.data, device.address, out.nbytes)
    stream.synchronize()
    for thing in (box, device, stream):
        thing.close()
    return np.array(out)


def reduce(compiled: cuda.Kernels, raw: NDArray[Any], reduction: Reduction) -> Sequence[Candidates]:
    """What the reduction kernels leave of a head."""
    gpu, stream = cuda.open_gpu(), cuda.Stream()
    reducer = kernels.Reducer(gpu, compiled, reduction, raw.shape, raw.dtype.name)
    host = cuda.pinned_array(gpu, raw.shape, raw.dtype)
    np.copyto(host, raw)
    device = cuda.DeviceMemory(raw.nbytes)
    stream.copy_in(device.address, host.ctypes.data, raw.nbytes)
    found: Sequence[Candidates] = ()
    for _ in range(2):  # nothing may be left over from one run to the next
        reducer.launch(stream, device.address, batch=len(raw))
        stream.synchronize()
        found = reducer.candidates(len(raw))
    for thing in (reducer, device, stream):
        thing.close()
    return found


specs = st.builds(
    PreprocessSpec,
    width=st.integers(1, 90),
    height=st.integers(1, 90),
    resize=st.sampled_from(("letterbox", "stretch", "crop")),
    anchor=st.sampled_from(("center", "top-left")),
    pad=st.integers(0, 255),
    color=st.sampled_from(("rgb", "bgr")),
    scale=st.sampled_from((1.0, 1 / 255)),
    mean=st.sampled_from(((0.0, 0.0, 0.0), (0.485, 0.456, 0.406))),
    std=st.sampled_from(((1.0, 1.0, 1.0), (0.229, 0.224, 0.225))),
    layout=st.sampled_from(("nchw", "nhwc")),
    dtype=st.sampled_from(("float32", "float16", "uint8", "int32")),
)
sizes = st.lists(st.tuples(st.integers(1, 130), st.integers(1, 130)), min_size=1, max_size=3)


def pictures(sizes: Sequence[tuple[int, int]], seed: int) -> list[NDArray[np.uint8]]:
    """Noise, the hardest to sample alike."""
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 256, (*size, 3), dtype=np.uint8) for size in sizes]


def check_letterbox(run: RunLetterbox, spec: PreprocessSpec, images: Sequence[NDArray[np.uint8]]) -> None:
    """Within one level of 255 of the CPU, and the rounding of the type."""
    got = run(images, spec).astype(np.float64)
    for image, picture in zip(images, got, strict=True):
        shape = spec.shape
        wanted = np.zeros(shape, spec.dtype)
        Preprocessor(spec)(image, wanted)
        level = 1.0 if spec.dtype in ("uint8", "int32") else abs(spec.scale) / min(spec.std)
        rounding = (2e-3 if spec.dtype == "float16" else 1e-5) * np.maximum(1.0, np.abs(wanted.astype(np.float64)))
        assert (np.abs(picture - wanted) <= level + rounding).all()


def check_a_photograph(run: RunLetterbox, photograph: NDArray[np.uint8]) -> None:
    """Of a picture as cameras give it, no value is off by more than one level, and few by that much: halves are
    rounded up here, and down by some builds of OpenCV."""
    spec = PreprocessSpec(320, 320)
    wanted = np.zeros((3, 320, 320), np.float32)
    Preprocessor(spec)(photograph, wanted)
    [got] = run([photograph], spec)
    off = np.abs(got - wanted) * 255
    assert off.max() < 1.01
    assert off.mean() < 0.35


@st.composite
def heads(draw: st.DrawFn) -> tuple[NDArray[Any], Reduction]:
    """A head's output with many equal scores, NaN and infinities in it, and what is to be left of it."""
    batch, cells, classes = draw(st.integers(1, 3)), draw(st.integers(1, 400)), draw(st.integers(1, 7))
    has_objectness = draw(st.booleans())
    rows = (5 if has_objectness else 4) + classes
    rng = np.random.default_rng(draw(st.integers(0, 1 << 30)))
    steps = draw(st.sampled_from((3, 20, 100_000)))
    values = (rng.integers(0, steps + 1, (batch, rows, cells)) / steps).astype(np.float32)
    for odd in draw(st.lists(st.sampled_from((np.nan, np.inf, -np.inf, -1.0, -0.0)), max_size=3)):
        values[rng.integers(batch), rng.integers(rows), rng.integers(cells)] = odd
    rows_first = draw(st.booleans())
    values = values.astype(draw(st.sampled_from(("float32", "float16"))))
    reduction = Reduction(
        output="out",
        rows_first=rows_first,
        has_objectness=has_objectness,
        threshold=draw(st.sampled_from((-1.0, 0.0, 0.05, 0.4, 1 / 3, 0.999))),
        max_candidates=draw(st.sampled_from((1, 2, 17, 1000))),
    )
    return np.ascontiguousarray(values if rows_first else values.transpose(0, 2, 1)), reduction


def check_reduce(run: RunReduce, raw: NDArray[Any], reduction: Reduction) -> None:
    """The very same candidates as the CPU's: cells, classes, scores and boxes, bit for bit."""
    with np.errstate(invalid="ignore"):
        wanted = _dense.reduce(raw, reduction)
    got = run(raw, reduction)
    assert len(got) == len(wanted) == len(raw)
    for a, b in zip(got, wanted, strict=True):
        for name in ("cells", "class_ids", "scores", "boxes"):
            assert np.array_equal(getattr(a, name), getattr(b, name), equal_nan=name == "boxes"), name
