"""The kernels on the GPU agree with their twins on the CPU."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings
from numpy.typing import NDArray

from edge_agent import cuda
from edge_agent import gpu as kernels
from edge_agent.data import Candidates, PreprocessSpec, Reduction
from edge_agent.errors import GpuUnavailable
from edge_agent.geometry import place
from tests import twins
from tests.gpu.conftest import scenes


@pytest.fixture(scope="module")
def gpu() -> cuda.Gpu:
    """Needs no TensorRT."""
    if reason := cuda.missing():
        pytest.skip(reason)
    try:
        return cuda.open_gpu()
    except GpuUnavailable as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def compiled(gpu: cuda.Gpu, tmp_path_factory: pytest.TempPathFactory) -> cuda.Kernels:
    return kernels.kernels(gpu, tmp_path_factory.mktemp("cubins"))


def letterbox(
    gpu: cuda.Gpu, compiled: cuda.Kernels, images: Sequence[NDArray[np.uint8]], spec: PreprocessSpec
) -> NDArray[Any]:
    stream = cuda.Stream()
    box = kernels.Letterbox(gpu, compiled, spec, max_batch=len(images))
    shape = (3, spec.height, spec.width) if spec.layout == "nchw" else (spec.height, spec.width, 3)
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


def reduce(gpu: cuda.Gpu, compiled: cuda.Kernels, raw: NDArray[Any], reduction: Reduction) -> Sequence[Candidates]:
    stream = cuda.Stream()
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


@settings(max_examples=200, deadline=None)
@given(spec=twins.specs, sizes=twins.sizes, seed=st.integers(0, 1 << 30))
def test_letterbox_agrees_with_opencv(
    gpu: cuda.Gpu, compiled: cuda.Kernels, spec: PreprocessSpec, sizes: list[tuple[int, int]], seed: int
) -> None:
    twins.check_letterbox(
        lambda images, spec: letterbox(gpu, compiled, images, spec), spec, twins.pictures(sizes, seed)
    )


def test_a_drawn_scene_comes_out_the_same(gpu: cuda.Gpu, compiled: cuda.Kernels) -> None:
    for size in ((640, 480), (1920, 1080), (333, 777)):
        [image] = scenes(1, seed=2, width=size[0], height=size[1])
        twins.check_a_photograph(lambda images, spec: letterbox(gpu, compiled, images, spec), image)


@settings(max_examples=200, deadline=None)
@given(drawn=twins.heads())
def test_reduction_leaves_the_very_candidates_that_numpy_leaves(
    gpu: cuda.Gpu, compiled: cuda.Kernels, drawn: tuple[NDArray[Any], Reduction]
) -> None:
    twins.check_reduce(lambda raw, reduction: reduce(gpu, compiled, raw, reduction), *drawn)


def test_a_head_of_full_size_with_more_candidates_than_are_wanted(gpu: cuda.Gpu, compiled: cuda.Kernels) -> None:
    rng = np.random.default_rng(1)
    raw = rng.random((8, 84, 8400), np.float32)
    raw[:, 4:] = np.round(raw[:, 4:], 3)  # hundreds of equal scores
    reduction = Reduction("out", rows_first=True, has_objectness=False, threshold=0.9, max_candidates=1000)
    twins.check_reduce(lambda raw, reduction: reduce(gpu, compiled, raw, reduction), raw, reduction)


def test_compiled_kernels_are_read_from_the_cache_and_made_again_when_damaged(gpu: cuda.Gpu, tmp_path: Path) -> None:
    kernels.kernels(gpu, tmp_path).close()
    [cubin] = tmp_path.iterdir()
    sound = cubin.read_bytes()
    cubin.write_bytes(b"damaged")
    kernels.kernels(gpu, tmp_path).close()
    assert cubin.read_bytes() == sound
    before = cubin.stat().st_mtime_ns
    kernels.kernels(gpu, tmp_path).close()
    assert cubin.stat().st_mtime_ns == before
