"""Where frames come from. One module a kind of camera; each has `Source`, whose `Options` are that
camera's table in the config."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal, Protocol

from edge_agent.config import CameraOptions
from edge_agent.data import Captured, Image, VideoFormat

PaceName = Literal["realtime", "fast"]

HELPERS = ("world",)  # modules of this package that are no source


class Source(Protocol):
    """A camera, driven by the one thread that owns it. Created with its `Options`; opens nothing then."""

    Options: ClassVar[type[CameraOptions]]

    @property
    def is_live(self) -> bool:
        """True where frames come whether or not anybody takes them; others wait to be read."""

    def check(self) -> Sequence[str]:
        """What would keep `open` from working, one sentence each, found without opening anything."""

    def open(self) -> VideoFormat:
        """Connect, and say what will come. Raises `SourceError` with a reason."""

    def read(self, into: Image) -> Captured | None:
        """The next picture, in `into` where its shape fits, or None where none came in time.

        Blocks for a bounded time. Raises `EndOfStream` at the end of a file, and `SourceError`
        when the connection is lost; `close` and `open` may then be tried again.
        """

    def close(self) -> None:
        """Let go of the device; may be called twice, and before `open`."""
