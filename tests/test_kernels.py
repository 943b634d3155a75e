"""The CUDA kernels where there is no GPU: they compile for every architecture, and computed by the CPU they agree
with their twins. `tests/gpu` says the same of a GPU."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from numpy.typing import NDArray

from edge_agent import cuda, gpu
from edge_agent.data import PreprocessSpec, Reduction
from edge_agent.errors import GpuUnavailable
from edge_agent.sources.world import World
from tests import twins

if TYPE_CHECKING:
    from tests.fake_gpu import FakeTensorRt


@pytest.fixture
def kernels(fake_gpu: FakeTensorRt) -> Iterator[cuda.Kernels]:
    compiled = gpu.kernels(cuda.open_gpu(), None)
    yield compiled
    compiled.close()


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(spec=twins.specs, sizes=twins.sizes, seed=st.integers(0, 1 << 30))
def test_the_letterbox_kernel_agrees_with_opencv(
    kernels: cuda.Kernels, spec: PreprocessSpec, sizes: list[tuple[int, int]], seed: int
) -> None:
    twins.check_letterbox(partial(twins.letterbox, kernels), spec, twins.pictures(sizes, seed))


def test_a_drawn_scene_comes_out_the_same(kernels: cuda.Kernels) -> None:
    image = np.empty((480, 640, 3), np.uint8)
    World(width=640, height=480, seed=3).draw(10, image)
    twins.check_a_photograph(partial(twins.letterbox, kernels), image)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(drawn=twins.heads())
def test_the_reduction_kernels_leave_the_very_candidates_that_numpy_leaves(
    kernels: cuda.Kernels, drawn: tuple[NDArray[Any], Reduction]
) -> None:
    twins.check_reduce(partial(twins.reduce, kernels), *drawn)


@pytest.mark.parametrize("architecture", ["sm_87", "sm_90", "sm_120"])
def test_the_kernels_compile_for_orin_hopper_and_blackwell(architecture: str) -> None:
    pytest.importorskip("cuda.bindings.nvrtc", reason="cuda-bindings is not installed: pip install cuda-bindings")
    cubin = cuda.compile_kernels(gpu.SOURCE.read_text(), "gpu", architecture)
    assert cubin.startswith(b"\x7fELF")
    for kernel in (b"letterbox_float32", b"letterbox_uint8", b"score_cells_float16", b"gather_float32"):
        assert kernel in cubin


def test_a_source_that_does_not_compile_is_told_with_the_compilers_words() -> None:
    pytest.importorskip("cuda.bindings.nvrtc", reason="cuda-bindings is not installed: pip install cuda-bindings")
    with pytest.raises(GpuUnavailable, match=r'NVRTC cannot compile the kernels for sm_90: .*identifier "nonsense"'):
        cuda.compile_kernels("nonsense x;", "gpu", "sm_90")


def test_the_records_are_laid_out_as_the_kernels_have_them() -> None:
    assert (gpu.PICTURE.size, ctypes.sizeof(gpu.Places)) == (32, 32)
    assert ctypes.sizeof(gpu.Style) == 44
    assert ctypes.sizeof(gpu.Head) == 36
