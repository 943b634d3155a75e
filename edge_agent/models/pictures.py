"""Pictures to calibrate with and to compare models on: a folder's, or else the synthetic world's."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from edge_agent.data import Image
from edge_agent.errors import ModelError
from edge_agent.sources import _pictures

_MOST = 512


def listed(folder: Path) -> Sequence[Path]:
    """The pictures of a folder, at most 512 of them, evenly chosen. Raises `ModelError` if there is none."""
    try:
        paths = _pictures.listing(folder)
    except OSError as error:
        raise ModelError(f"calibration: the folder {folder}: {error.strerror}") from error
    if not paths:
        raise ModelError(f"calibration: the folder {folder} holds no picture ({', '.join(_pictures.SUFFIXES)})")
    return [paths[i * len(paths) // min(len(paths), _MOST)] for i in range(min(len(paths), _MOST))]


def read(paths: Sequence[Path]) -> Iterator[Image]:
    """The pictures that OpenCV can read."""
    for path in paths:
        image = _pictures.read(path)
        if image is not None:
            yield image


def bundled(count: int) -> Iterator[Image]:
    """Frames of the synthetic world, far apart in its time."""
    from edge_agent.sources.world import World

    world = World(width=640, height=480, seed=7)
    for index in range(count):
        image = np.empty((480, 640, 3), np.uint8)
        world.draw(index * 37, image)
        yield image
