"""Small ONNX files for what the models at hand do not have."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper


def save(path: Path, nodes: list[Any], inputs: list[Any], outputs: list[Any], weights: list[Any]) -> Path:
    graph = helper.make_graph(nodes, path.stem, inputs, outputs, weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, str(path))
    return path


def info(name: str, dtype: int, shape: list[Any]) -> Any:
    return helper.make_tensor_value_info(name, dtype, shape)


def head(path: Path, *, operator: str = "Sigmoid", side: int = 16, dtype: int = TensorProto.FLOAT) -> Path:
    """A dense head [batch, 7, side * side]: mixed colours of a picture of that size, through an operator."""
    kind = np.float16 if dtype == TensorProto.FLOAT16 else np.float32
    nodes = [
        helper.make_node("Conv", ["images", "weight"], ["rows"], kernel_shape=[1, 1], name="mix"),
        helper.make_node(operator, ["rows"], ["rated"], name="rate"),
        helper.make_node("Reshape", ["rated", "shape"], ["output0"], name="flatten"),
    ]
    weights = [
        numpy_helper.from_array(np.random.default_rng(0).normal(0, 2, (7, 3, 1, 1)).astype(kind), "weight"),
        numpy_helper.from_array(np.array([0, 7, side * side], np.int64), "shape"),
    ]
    inputs = [info("images", dtype, ["batch", 3, side, side])]
    return save(path, nodes, inputs, [info("output0", dtype, ["batch", 7, side * side])], weights)


def many_types(path: Path) -> Path:
    """A picture, and a scale [batch, 2] int32 beside it; float32, float16, int32 and bool outputs."""
    nodes = [
        helper.make_node("ReduceMean", ["images"], ["mean"], axes=[2, 3], keepdims=0),
        helper.make_node("Cast", ["scale"], ["factor"], to=TensorProto.FLOAT),
        helper.make_node("ReduceSum", ["factor", "last"], ["sum"], keepdims=1),
        helper.make_node("Mul", ["mean", "sum"], ["scaled"]),
        helper.make_node("Cast", ["scaled"], ["halved"], to=TensorProto.FLOAT16),
        helper.make_node("Mul", ["scaled", "hundred"], ["large"]),
        helper.make_node("Cast", ["large"], ["counted"], to=TensorProto.INT32),
        helper.make_node("Greater", ["mean", "half"], ["bright"]),
    ]
    weights = [
        numpy_helper.from_array(np.array([1], np.int64), "last"),
        numpy_helper.from_array(np.array(100, np.float32), "hundred"),
        numpy_helper.from_array(np.array(0.5, np.float32), "half"),
    ]
    inputs = [info("images", TensorProto.FLOAT, ["batch", 3, 32, 48]), info("scale", TensorProto.INT32, ["batch", 2])]
    types = {
        "scaled": TensorProto.FLOAT,
        "halved": TensorProto.FLOAT16,
        "counted": TensorProto.INT32,
        "bright": TensorProto.BOOL,
    }
    outputs = [info(name, dtype, ["batch", 3]) for name, dtype in types.items()]
    return save(path, nodes, inputs, outputs, weights)


def moving_shape(path: Path) -> Path:
    """The places of the bright pixels: how many there are, only the run knows."""
    nodes = [
        helper.make_node("Greater", ["images", "half"], ["bright"]),
        helper.make_node("NonZero", ["bright"], ["places"]),
        helper.make_node("ReduceMean", ["images"], ["mean"], axes=[2, 3], keepdims=0),
    ]
    weights = [numpy_helper.from_array(np.array(0.9, np.float32), "half")]
    inputs = [info("images", TensorProto.FLOAT, [1, 3, 24, 24])]
    outputs = [info("places", TensorProto.INT64, [4, "found"]), info("mean", TensorProto.FLOAT, [1, 3])]
    return save(path, nodes, inputs, outputs, weights)


def half_head(path: Path) -> Path:
    """`head` in half precision throughout."""
    return head(path, dtype=TensorProto.FLOAT16)
