"""What TensorRT 10 and 11 and TensorRT-RTX have, seen at import: all that the engine asks of them, and no driver."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from edge_agent.backends import _trt
from edge_agent.errors import GpuUnavailable
from tests.rigs import ROOT

LEAN = ("10.16.1.11", "11.4.0.106")

SURFACE = """
import sys
from edge_agent.backends import _trt
from edge_agent.backends.tensorrt import TensorRtEngine, TensorRtOptions, _allocator
from edge_agent.errors import EdgeAgentError
from edge_agent.models.build import builder_library
from pathlib import Path

trt = _trt.library(sys.argv[1])
print("name", _trt.name_of(trt))
wanted = {
    trt.ICudaEngine: "num_io_tensors get_tensor_name get_tensor_mode get_tensor_shape get_tensor_dtype "
    "get_tensor_components_per_element get_tensor_format_desc get_tensor_profile_shape num_optimization_profiles "
    "create_execution_context",
    trt.IExecutionContext: "set_input_shape get_tensor_shape set_tensor_address set_output_allocator "
    "get_max_output_size execute_async_v3 set_optimization_profile_async",
    trt.Runtime: "deserialize_cuda_engine engine_host_code_allowed",
}
for kind, names in wanted.items():
    for name in names.split():
        if not hasattr(kind, name):
            print("lacks", kind.__name__, name)
types = "FLOAT", "HALF", "INT8", "INT32", "INT64", "BOOL", "BF16"
print("dtypes", *(_trt.dtype(getattr(trt.DataType, name)) for name in types))
allocator = _allocator(trt, type("Memory", (), {"nbytes": 100, "address": 4096})())
allocator.notify_shape("out", trt.Dims([1, 5]))
places = allocator.reallocate_output("out", 0, 100, 1), allocator.reallocate_output_async("out", 0, 101, 1, 0)
print("allocator", *places, allocator.shape)
plan = Path(sys.argv[2])
plan.write_bytes(b"no plan at all" * 50)
for call in (lambda: _trt.deserialize(trt, plan), lambda: builder_library(TensorRtOptions(library=sys.argv[1]))):
    try:
        call()
    except EdgeAgentError as error:
        print(type(error).__name__, error)
print("unavailable", TensorRtEngine.unavailable(TensorRtOptions(library=sys.argv[1])))
"""


def surface(folder: Path, generation: str, path: str = "") -> dict[str, str]:
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join((str(ROOT), path))}
    command = [sys.executable, "-c", SURFACE, generation, str(folder / "x.plan")]
    done = subprocess.run(command, env=environ, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return {line.partition(" ")[0]: line.partition(" ")[2] for line in done.stdout.splitlines()}


def check(told: dict[str, str], name: str) -> None:
    assert told["name"].startswith(name)
    assert "lacks" not in told
    assert told["dtypes"] == "float32 float16 int8 int32 int64 bool bf16"
    assert told["allocator"] == "4096 0 (1, 5)"
    assert "no NVIDIA driver that can be used" in told["unavailable"]


@pytest.mark.parametrize("version", LEAN)
def test_the_lean_runtime_of_tensorrt_10_and_11_has_all_that_an_engine_needs(tmp_path: Path, version: str) -> None:
    lean = Path(sys.prefix) / "tensorrt-lean" / version
    if not (lean / ".installed").exists():
        pytest.skip(f"TensorRT lean {version} is not there: tools/test-lean.sh {sys.prefix}")
    told = surface(tmp_path, "tensorrt_lean", str(lean))
    check(told, f"TensorRT lean {version.rpartition('.')[0][:5]}")
    assert "runs engines but builds none; install the full TensorRT" in told["ModelError"]
    assert "does not start here; does the driver fit it?" in told["GpuUnavailable"]
    assert "error: 35" in told["GpuUnavailable"]


def test_tensorrt_rtx_has_all_that_an_engine_needs(tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx_bindings", reason="not installed: pip install '.[test-tensorrt]'")
    check(surface(tmp_path, "tensorrt_rtx"), "TensorRT-RTX 1.")


def test_where_there_is_no_tensorrt_that_is_said_with_what_to_do() -> None:
    code = (
        "import sys\n"
        "for name in ('tensorrt', 'tensorrt_rtx', 'tensorrt_lean'):\n"
        "    sys.modules[name] = sys.modules[name + '_bindings'] = None\n"
        "from edge_agent.backends import _trt\n"
        "_trt.library()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert "TensorRT is not installed (on a Jetson it comes with JetPack" in done.stderr.splitlines()[-1]


def test_a_tensorrt_whose_libraries_are_missing_is_told_with_the_loaders_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tensorrt_lean.py").write_text("raise ImportError('libnvinfer_lean.so.10: cannot open shared object')")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(GpuUnavailable, match=r"cannot be imported: tensorrt_lean: libnvinfer_lean.so.10: cannot open"):
        _trt.library("tensorrt_lean")
