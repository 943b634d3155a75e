"""The training loop and the export that all bundled models share."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import onnx
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from train_demo.scenes import Scenes, Target

Model = TypeVar("Model", bound=nn.Module)


def train(
    model: Model,
    scenes: Scenes[Target],
    loss_of: Callable[[Model, Tensor, list[Target]], Tensor],
    *,
    name: str,
    steps: int,
    batch: int,
    rate: float,
) -> Model:
    """Train in place; returns the running average of the weights, which is what to export."""
    average = copy.deepcopy(model).eval()
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps, pct_start=0.1)
    loader = DataLoader(scenes, batch_size=batch, collate_fn=_collate, num_workers=1, prefetch_factor=4)
    model.train()
    print(f"{name}: {sum(p.numel() for p in model.parameters()):,} parameters")
    began, running = time.monotonic(), 0.0
    for step, (pictures, targets) in zip(range(1, steps + 1), loader, strict=False):
        loss = loss_of(model, pictures, targets)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 10.0)
        optimizer.step()
        schedule.step()
        _blend(average, model, keep=min(0.998, 1 - 1 / step))
        running = loss.item() if step == 1 else 0.98 * running + 0.02 * loss.item()
        if step % 50 == 0:
            print(f"{name}: step {step}/{steps}  loss {running:.3f}  {(time.monotonic() - began) / step:.2f} s a step")
    return average


def _collate(samples: list[tuple[Tensor, Target]]) -> tuple[Tensor, list[Target]]:
    return torch.stack([picture for picture, _ in samples]), [target for _, target in samples]


@torch.no_grad()
def _blend(average: nn.Module, model: nn.Module, *, keep: float) -> None:
    for kept, new in zip(average.state_dict().values(), model.state_dict().values(), strict=True):
        if kept.dtype.is_floating_point:
            kept.mul_(keep).add_(new, alpha=1 - keep)
        else:
            kept.copy_(new)


def export(model: nn.Module, path: Path, *, size: int, output: str, facts: dict[str, str]) -> None:
    """Write the model as ONNX (opset 17, dynamic batch) with the metadata that the agent reads."""
    example = torch.zeros(1, 3, size, size)
    torch.onnx.export(
        model.eval(),
        (example,),
        str(path),
        input_names=["images"],
        output_names=[output],
        dynamic_axes={"images": {0: "batch"}, output: {0: "batch"}},
        opset_version=17,
        dynamo=False,
    )
    exported = onnx.load(path)
    common = {
        "imgsz": str([size, size]),
        "version": "1",
        "license": "Apache-2.0",
        "description": "shapes of edge_agent's synthetic world, trained by tools/train_demo",
    }
    onnx.helper.set_model_props(exported, facts | common)
    _fix_output_shape(exported, tuple(model(example).shape[1:]))
    onnx.checker.check_model(exported)
    onnx.save(exported, path)
    print(f"{path}: {path.stat().st_size / 1e6:.2f} MB")


def _fix_output_shape(exported: onnx.ModelProto, shape: tuple[int, ...]) -> None:
    """Say the shape of one picture's output, which tracing leaves open and the agent tells the head by."""
    batch, *dims = exported.graph.output[0].type.tensor_type.shape.dim
    batch.dim_param = "batch"
    for dim, value in zip(dims, shape, strict=True):
        dim.dim_value = value
