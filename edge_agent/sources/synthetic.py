"""A camera that needs no hardware: it shows the synthetic world of `sources/world.py`."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, ClassVar

import numpy as np
from msgspec import Meta

from edge_agent import plugins
from edge_agent.config import CameraOptions, Positive, Share
from edge_agent.data import Image, VideoFormat
from edge_agent.errors import SourceError
from edge_agent.sources import PaceName
from edge_agent.sources._pace import Pace

if TYPE_CHECKING:
    from edge_agent.sources.world import World

Side = Annotated[int, Meta(ge=32, le=8192)]


class SyntheticOptions(CameraOptions, kw_only=True):
    """`[cameras.<name>]` with `source = "synthetic"`."""

    width: Side = 640
    height: Side = 480
    fps: Positive = 30.0
    objects: Annotated[int, Meta(ge=0, le=255)] = 6
    seed: Annotated[int, Meta(ge=0)] = 0
    noise: Annotated[int, Meta(ge=0, le=64)] = 8
    lighting: Share = 0.25
    pace: PaceName = "realtime"


class SyntheticSource:
    """Frame `n` read is frame `n` of the world, at a camera's pace or as fast as it is read."""

    Options: ClassVar[type[CameraOptions]] = SyntheticOptions

    def __init__(self, options: SyntheticOptions) -> None:
        self._options = options
        self._world: World | None = None
        self._index = 0
        self._pace: Pace | None = None

    @property
    def is_live(self) -> bool:
        return self._options.pace == "realtime"

    def check(self) -> Sequence[str]:
        try:
            import cv2  # noqa: F401
        except ImportError as error:
            return [plugins.missing(error, needed_by="the source 'synthetic'")]
        return []

    def open(self) -> VideoFormat:
        for problem in self.check():
            raise SourceError(problem, reason="unsupported")
        from edge_agent.sources.world import World

        o = self._options
        self._world = World(
            width=o.width, height=o.height, objects=o.objects, seed=o.seed, noise=o.noise, lighting=o.lighting
        )
        self._pace = Pace(o.fps) if self.is_live else None
        return VideoFormat(width=o.width, height=o.height, fps=o.fps if self.is_live else None)

    def grab(self) -> int | None:
        if self._pace and not self._pace.is_due():
            return None
        self._index += 1
        return time.monotonic_ns()

    def retrieve(self, into: Image) -> Image:
        assert self._world is not None, "open() comes first"
        shape = (self._options.height, self._options.width, 3)
        image = into if into.shape == shape else np.empty(shape, np.uint8)
        self._world.draw(self._index - 1, image)
        return image

    def close(self) -> None:
        self._world = None


Source = SyntheticSource
