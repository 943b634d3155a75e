"""The CUDA kernels where there is no GPU: they compile for every architecture, and computed by the CPU they agree
with their twins. `tests/gpu` says the same of a GPU."""

from __future__ import annotations

import ctypes
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings
from numpy.typing import NDArray

from edge_agent import cuda, gpu
from edge_agent.data import Candidates, PreprocessSpec, Reduction
from edge_agent.errors import GpuUnavailable
from edge_agent.geometry import place
from edge_agent.sources.world import World
from tests import twins
from tests.rigs import need_program

_KINDS = ("float32", "float16", "uint8")


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    compiler = need_program("g++", "g++")
    target = tmp_path_factory.mktemp("kernels") / "kernels.so"
    source = Path(__file__).with_name("kernels_on_cpu.cpp")
    options = ["-std=c++20", "-O2", "-ffp-contract=off", "-shared", "-fPIC", "-pthread", f'-DGPU_CU="{gpu.SOURCE}"']
    subprocess.run([compiler, *options, str(source), "-o", str(target)], check=True)
    return ctypes.CDLL(str(target))


def letterbox(library: ctypes.CDLL, images: Sequence[NDArray[np.uint8]], spec: PreprocessSpec) -> NDArray[Any]:
    shown = np.zeros(len(images) * gpu.PICTURE.size, np.uint8)
    for index, image in enumerate(images):
        at = place(image.shape[1], image.shape[0], spec)
        gpu.PICTURE.pack_into(shown, index * gpu.PICTURE.size, *gpu.picture_fields(image.ctypes.data, at))
    shape = (3, spec.height, spec.width) if spec.layout == "nchw" else (spec.height, spec.width, 3)
    out = np.empty((len(images), *shape), spec.dtype)
    style = gpu.style(spec)
    library.run_letterbox(
        _KINDS.index(spec.dtype),
        ctypes.c_void_p(shown.ctypes.data),
        ctypes.c_void_p(out.ctypes.data),
        ctypes.byref(style),
        len(images),
    )
    return out


def reduce(library: ctypes.CDLL, raw: NDArray[Any], reduction: Reduction) -> Sequence[Candidates]:
    head = gpu.head(reduction, raw.shape)
    counts = np.zeros(len(raw), np.uint32)
    records = np.zeros((len(raw), head.most, gpu.CANDIDATE_WORDS), np.float32)
    library.run_reduce(
        _KINDS.index(raw.dtype.name),
        ctypes.c_void_p(raw.ctypes.data),
        ctypes.byref(head),
        len(raw),
        ctypes.c_void_p(counts.ctypes.data),
        ctypes.c_void_p(records.ctypes.data),
    )
    return [gpu.candidates_of(picture[:count]) for picture, count in zip(records, counts, strict=True)]


@settings(max_examples=150, deadline=None)
@given(spec=twins.specs, sizes=twins.sizes, seed=st.integers(0, 1 << 30))
def test_the_letterbox_kernel_agrees_with_opencv(
    library: ctypes.CDLL, spec: PreprocessSpec, sizes: list[tuple[int, int]], seed: int
) -> None:
    twins.check_letterbox(lambda images, spec: letterbox(library, images, spec), spec, twins.pictures(sizes, seed))


def test_a_drawn_scene_comes_out_the_same(library: ctypes.CDLL) -> None:
    image = np.empty((480, 640, 3), np.uint8)
    World(width=640, height=480, seed=3).draw(10, image)
    twins.check_a_photograph(lambda images, spec: letterbox(library, images, spec), image)


@settings(max_examples=150, deadline=None)
@given(drawn=twins.heads())
def test_the_reduction_kernels_leave_the_very_candidates_that_numpy_leaves(
    library: ctypes.CDLL, drawn: tuple[NDArray[Any], Reduction]
) -> None:
    twins.check_reduce(lambda raw, reduction: reduce(library, raw, reduction), *drawn)


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
    assert (gpu.PICTURE.size, 4 * gpu.CANDIDATE_WORDS) == (32, 32)
    assert ctypes.sizeof(gpu.Style) == 44
    assert ctypes.sizeof(gpu.Head) == 36
