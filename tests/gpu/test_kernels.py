"""The kernels on the GPU agree with their twins on the CPU."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings
from numpy.typing import NDArray

from edge_agent import cuda
from edge_agent import gpu as kernels
from edge_agent.data import PreprocessSpec, Reduction
from edge_agent.errors import GpuUnavailable
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


@settings(max_examples=200, deadline=None)
@given(spec=twins.specs, sizes=twins.sizes, seed=st.integers(0, 1 << 30))
def test_letterbox_agrees_with_opencv(
    gpu: cuda.Gpu, compiled: cuda.Kernels, spec: PreprocessSpec, sizes: list[tuple[int, int]], seed: int
) -> None:
    twins.check_letterbox(partial(twins.letterbox, compiled), spec, twins.pictures(sizes, seed))


def test_a_drawn_scene_comes_out_the_same(gpu: cuda.Gpu, compiled: cuda.Kernels) -> None:
    for size in ((640, 480), (1920, 1080), (333, 777)):
        [image] = scenes(1, seed=2, width=size[0], height=size[1])
        twins.check_a_photograph(partial(twins.letterbox, compiled), image)


@settings(max_examples=200, deadline=None)
@given(drawn=twins.heads())
def test_reduction_leaves_the_very_candidates_that_numpy_leaves(
    gpu: cuda.Gpu, compiled: cuda.Kernels, drawn: tuple[NDArray[Any], Reduction]
) -> None:
    twins.check_reduce(partial(twins.reduce, compiled), *drawn)


def test_a_head_of_full_size_with_more_candidates_than_are_wanted(gpu: cuda.Gpu, compiled: cuda.Kernels) -> None:
    rng = np.random.default_rng(1)
    raw = rng.random((8, 84, 8400), np.float32)
    raw[:, 4:] = np.round(raw[:, 4:], 3)  # hundreds of equal scores
    reduction = Reduction("out", rows_first=True, has_objectness=False, threshold=0.9, max_candidates=1000)
    twins.check_reduce(partial(twins.reduce, compiled), raw, reduction)


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
