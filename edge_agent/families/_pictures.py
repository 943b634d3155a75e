"""The picture that a model takes, told from its input: size, layout, type and what the values mean."""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np

from edge_agent.data import ModelFacts, PreprocessSpec, TensorSpec
from edge_agent.errors import ModelError
from edge_agent.families import Meaning
from edge_agent.families._metadata import literal

RGB_0_1: dict[str, Any] = {}
BGR_0_255: dict[str, Any] = {"color": "bgr", "scale": 1.0}
RGB_SIGNED: dict[str, Any] = {"scale": 1.0, "mean": (127.5, 127.5, 127.5), "std": (127.5, 127.5, 127.5)}
IMAGENET: dict[str, Any] = {
    "scale": 1.0,
    "mean": (123.675, 116.28, 103.53),
    "std": (58.395, 57.12, 57.375),
}
"""The mean and deviation of ImageNet's red, green and blue, in 0..255."""
NORMAL: dict[str, dict[str, Any]] = {"none": RGB_0_1, "imagenet": IMAGENET, "signed": RGB_SIGNED}
"""What the option `normalize` names: 0..1, ImageNet's, -1..1."""

_DTYPES = ("float32", "float16", "uint8", "int32")


def picture_spec(meaning: Meaning, **defaults: Any) -> PreprocessSpec:
    """How pictures are prepared: the input's own shape and type, the family's `defaults`, the file's own `resize`, then
    what the entry says.

    Inputs of whole numbers take the picture's own values, unless the entry says otherwise. Raises `ModelError`.
    """
    taken = picture_tensor(meaning.facts)
    if taken.dtype not in _DTYPES:
        raise ModelError(f"the input {taken.name!r} takes {taken.dtype}; pictures can be {', '.join(_DTYPES)}")
    layout = _layout(taken)
    if taken.dtype in ("uint8", "int32"):
        for normalising in ("scale", "mean", "std"):
            defaults.pop(normalising, None)
        defaults["scale"] = 1.0
    if (resize := meaning.facts.metadata.get("resize")) in ("letterbox", "stretch", "crop"):
        defaults["resize"] = resize
    width, height = _size(meaning, taken, layout)
    changes = {key: value for key, value in msgspec.structs.asdict(meaning.preprocess).items() if value is not None}
    changes.pop("size", None)
    if "scale" in changes:  # another range of values than the family's mean and deviation are of
        defaults = {key: value for key, value in defaults.items() if key not in ("mean", "std")}
    if changes.get("color", color := defaults.get("color", "rgb")) != color:
        defaults |= {key: defaults[key][::-1] for key in ("mean", "std") if key in defaults}
    for key in ("scale", "mean", "std"):
        if not np.isfinite(changes.get(key, 0.0)).all():
            raise ModelError(f"preprocess.{key}: {changes[key]} is no finite number")
    return PreprocessSpec(width, height, **{"layout": layout, "dtype": taken.dtype, **defaults, **changes})


def picture_tensor(facts: ModelFacts) -> TensorSpec:
    """The input that takes the picture. Raises `ModelError` where none or several could."""
    fitting = [tensor for tensor in facts.inputs if len(tensor.shape) == 4]
    if len(fitting) == 1:
        return fitting[0]
    listed = ", ".join(f"{tensor.name} {shown(tensor.shape)}" for tensor in facts.inputs) or "none"
    if not fitting:
        raise ModelError(f"the model takes no picture, [batch, 3, height, width]; its inputs are: {listed}")
    raise ModelError(
        f"one input has to take pictures, [batch, 3, height, width] or [batch, height, width, 3]; "
        f"the model's are: {listed}; give values to the others, such as inputs = {{ scale = [1.0] }}"
    )


def are_channels_last(spec: TensorSpec, facts: ModelFacts) -> bool | None:
    """Whether the classes or keypoints of an output [B, C, H, W] or [B, H, W, C] come last: the other two sides are in
    the picture's ratio, else the longer ones; None where the shape is not known."""
    _, first, middle, last = spec.shape
    if first is None:
        return None if last is None else True
    if last is None:
        return False
    ratio = _ratio(facts)
    if ratio is not None and middle is not None and last != first:
        is_first = abs(middle / last - ratio) < 0.05 * ratio
        if is_first != (abs(first / middle - ratio) < 0.05 * ratio):
            return not is_first
    return last < first


def picture_sides(facts: ModelFacts) -> tuple[int | None, int | None]:
    """Height and width of the picture that the model takes, as far as its input tells."""
    try:
        taken = picture_tensor(facts)
        height, width = taken.shape[2:] if _layout(taken) == "nchw" else taken.shape[1:3]
    except ModelError:
        return None, None
    return height, width


def _ratio(facts: ModelFacts) -> float | None:
    height, width = picture_sides(facts)
    return height / width if height and width else None


def is_interleaved(facts: ModelFacts) -> bool:
    """Whether the picture's channels come last, as in models of TensorFlow."""
    return _layout(picture_tensor(facts)) == "nhwc"


def output_of(facts: ModelFacts, name: str) -> TensorSpec:
    """The output of this name, which there is."""
    return next(spec for spec in facts.outputs if spec.name == name)


def outputs_of(facts: ModelFacts) -> str:
    """A model's outputs, as a sentence lists them."""
    return ", ".join(f"{spec.name} {shown(spec.shape)}" for spec in facts.outputs)


def shown(shape: tuple[int | None, ...]) -> str:
    """A shape as people write it; `?` is dynamic."""
    return f"[{', '.join('?' if side is None else str(side) for side in shape)}]"


def _layout(taken: TensorSpec) -> str:
    _, first, _, last = taken.shape
    if last == 3 and first != 3:
        return "nhwc"
    if first in (3, None):
        return "nchw"
    raise ModelError(f"the input {taken.name!r} is {shown(taken.shape)}; pictures have three channels, first or last")


def _size(meaning: Meaning, taken: TensorSpec, layout: str) -> tuple[int, int]:
    if meaning.preprocess.size:
        return meaning.preprocess.size
    height, width = taken.shape[2:] if layout == "nchw" else taken.shape[1:3]
    if width and height:
        return width, height
    if text := meaning.facts.metadata.get("imgsz"):
        match literal("imgsz", text):
            case int(side) if side > 0:
                return side, side
            case [int(height), int(width)] if height > 0 and width > 0:
                return width, height
    raise ModelError(f"the model's input {shown(taken.shape)} has no fixed size; set preprocess.size = [width, height]")
