"""Train the bundled detectors on the synthetic world and export them: `python -m train_demo`.

Seeded; minutes on two cores. The 160 model starts from the 320 model's weights.
"""

from __future__ import annotations

import argparse
import copy
import random
import time
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
import onnx
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from edge_agent.data import PreprocessSpec
from edge_agent.imaging import Preprocessor
from edge_agent.sources.world import CLASS_NAMES, World
from train_demo.detector import STRIDES, Detector, cell_centers
from train_demo.loss import detection_loss

Sample = tuple[Tensor, Tensor, Tensor]
_FRAME_SIZES = ((640, 480), (640, 480), (640, 360), (320, 240), (480, 480), (960, 540))
_MIN_VISIBILITY = 0.25
_SEED = 20_000_000  # far from the seeds that tests and demos use


class Scenes(IterableDataset[Sample]):
    """Endless pictures from worlds of ever new seeds, as the agent would prepare them."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __iter__(self) -> Iterator[Sample]:
        worker = torch.utils.data.get_worker_info()
        rng = random.Random(_SEED + (worker.id if worker else 0))
        cv2.setNumThreads(1)
        fit = Preprocessor(PreprocessSpec(self.size, self.size))
        while True:
            width, height = rng.choice(_FRAME_SIZES)
            world = World(
                width=width,
                height=height,
                objects=rng.randint(2, 10),
                seed=_SEED + rng.randrange(10**7),
                noise=rng.choice((0, 8, 16)),
                lighting=rng.uniform(0, 0.4),
            )
            frame = np.empty((height, width, 3), np.uint8)
            for _ in range(10):
                index = rng.randrange(100_000)
                world.draw(index, frame)
                if rng.random() < 0.15:
                    cv2.GaussianBlur(frame, (3, 3), 0, dst=frame)
                truth = world.truth(index)
                picture = np.empty((3, self.size, self.size), np.float32)
                at = fit(frame, picture)
                seen = truth.visibility >= _MIN_VISIBILITY
                boxes = at.to_input(truth.boxes[seen])
                yield torch.from_numpy(picture), torch.from_numpy(boxes), torch.from_numpy(truth.class_ids[seen])


def collate(samples: list[Sample]) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
    return torch.stack([s[0] for s in samples]), [(s[1], s[2]) for s in samples]


def train(model: Detector, *, size: int, steps: int, batch: int, rate: float) -> Detector:
    """Train in place; returns the running average of the weights, which is what to export."""
    centers = torch.cat([cell_centers(size // s, size // s, s)[0] for s in STRIDES], 1)
    average = copy.deepcopy(model).eval()
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps, pct_start=0.1)
    loader = DataLoader(Scenes(size), batch_size=batch, collate_fn=collate, num_workers=1, prefetch_factor=4)
    model.train()
    began, running = time.monotonic(), 0.0
    for step, (pictures, truths) in zip(range(1, steps + 1), loader, strict=False):
        loss = detection_loss(*model.dense(pictures), centers, truths)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 10.0)
        optimizer.step()
        schedule.step()
        _blend(average, model, keep=min(0.998, 1 - 1 / step))
        running = loss.item() if step == 1 else 0.98 * running + 0.02 * loss.item()
        if step % 50 == 0:
            print(f"{size}: step {step}/{steps}  loss {running:.3f}  {(time.monotonic() - began) / step:.2f} s a step")
    return average


@torch.no_grad()
def _blend(average: Detector, model: Detector, *, keep: float) -> None:
    for kept, new in zip(average.state_dict().values(), model.state_dict().values(), strict=True):
        if kept.dtype.is_floating_point:
            kept.mul_(keep).add_(new, alpha=1 - keep)
        else:
            kept.copy_(new)


def export(model: Detector, size: int, path: Path) -> None:
    """Write the model as ONNX (opset 17, dynamic batch) with the metadata that the agent reads."""
    example = torch.zeros(1, 3, size, size)
    torch.onnx.export(
        model.eval(),
        (example,),
        str(path),
        input_names=["images"],
        output_names=["output0"],
        dynamic_axes={"images": {0: "batch"}, "output0": {0: "batch"}},
        opset_version=17,
        dynamo=False,
    )
    exported = onnx.load(path)
    facts = {
        "task": "detect",
        "names": str(dict(enumerate(CLASS_NAMES))),
        "imgsz": str([size, size]),
        "stride": str(max(STRIDES)),
        "version": "1",
        "license": "Apache-2.0",
        "description": "shapes of edge_agent's synthetic world, trained by tools/train_demo",
    }
    onnx.helper.set_model_props(exported, facts)
    _fix_output_shape(exported, cells=sum((size // stride) ** 2 for stride in STRIDES))
    onnx.checker.check_model(exported)
    onnx.save(exported, path)
    print(f"{path}: {path.stat().st_size / 1e6:.2f} MB")


def _fix_output_shape(exported: onnx.ModelProto, *, cells: int) -> None:
    """Say [batch, 4 + classes, cells], which tracing leaves open and the agent tells the head by."""
    batch, rows, columns = exported.graph.output[0].type.tensor_type.shape.dim
    batch.dim_param, rows.dim_value, columns.dim_value = "batch", 4 + len(CLASS_NAMES), cells


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("edge_agent/models/zoo"))
    parser.add_argument(
        "--steps", type=int, default=3000, help="of the 320 model; the 160 model takes half as many more"
    )
    parser.add_argument("--batch", type=int, default=16)
    args = parser.parse_args()
    torch.manual_seed(_SEED)
    model = Detector(len(CLASS_NAMES))
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters")
    large = train(model, size=320, steps=args.steps, batch=args.batch, rate=3e-3)
    export(large, 320, args.out / "demo-320.onnx")
    small = train(copy.deepcopy(large), size=160, steps=args.steps * 3 // 2, batch=args.batch * 2, rate=2e-3)
    export(small, 160, args.out / "demo-160.onnx")


if __name__ == "__main__":
    main()
