"""Pictures of the synthetic world to train on, prepared as the agent prepares frames, and what to learn from each."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Generic, NamedTuple, TypeVar

import cv2
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import IterableDataset

from edge_agent.data import PreprocessSpec
from edge_agent.geometry import Placement
from edge_agent.imaging import Preprocessor
from edge_agent.sources.world import Truth, World

SEED = 20_000_000  # far from the seeds that tests and demos use
_FRAME_SIZES = ((640, 480), (640, 480), (640, 360), (320, 240), (480, 480), (960, 540))
_MIN_VISIBILITY = 0.25

Target = TypeVar("Target")


class Objects(NamedTuple):
    """What a picture shows: boxes [M, 4] and keypoints [M, K, 3] (x, y, visible) in input pixels; class ids [M]."""

    boxes: Tensor
    class_ids: Tensor
    keypoints: Tensor


class Scenes(IterableDataset[tuple[Tensor, Target]], Generic[Target]):
    """Endless pictures from worlds of ever new seeds; those that `target` answers None for are left out."""

    def __init__(
        self,
        size: int,
        target: Callable[[Truth, Placement], Target | None],
        *,
        objects: tuple[int, int] = (2, 10),
        frames_per_world: int = 10,
    ) -> None:
        self.size, self.target = size, target
        self.objects, self.frames_per_world = objects, frames_per_world

    def __iter__(self) -> Iterator[tuple[Tensor, Target]]:
        worker = torch.utils.data.get_worker_info()
        rng = random.Random(SEED + (worker.id if worker else 0))
        cv2.setNumThreads(1)
        fit = Preprocessor(PreprocessSpec(self.size, self.size))
        while True:
            width, height = rng.choice(_FRAME_SIZES)
            world = World(
                width=width,
                height=height,
                objects=rng.randint(*self.objects),
                seed=SEED + rng.randrange(10**7),
                noise=rng.choice((0, 8, 16)),
                lighting=rng.uniform(0, 0.4),
            )
            frame = np.empty((height, width, 3), np.uint8)
            for _ in range(self.frames_per_world):
                index = rng.randrange(100_000)
                world.draw(index, frame)
                if rng.random() < 0.15:
                    cv2.GaussianBlur(frame, (3, 3), 0, dst=frame)
                picture = np.empty((3, self.size, self.size), np.float32)
                at = fit(frame, picture)
                target = self.target(world.truth(index), at)
                if target is not None:
                    yield torch.from_numpy(picture), target


def visible_objects(truth: Truth, at: Placement) -> Objects:
    """Boxes, class ids and keypoints of what is visible enough to be asked for."""
    seen = truth.visibility >= _MIN_VISIBILITY
    keypoints = truth.keypoints[seen]
    keypoints[..., :2] = at.to_input(keypoints[..., :2])
    boxes = at.to_input(truth.boxes[seen])
    return Objects(torch.from_numpy(boxes), torch.from_numpy(truth.class_ids[seen]), torch.from_numpy(keypoints))
