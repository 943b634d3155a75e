"""Where frames come from. One module a kind of camera; each has `Source`, whose `Options` are that
camera's table in the config."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import ClassVar, Literal, Protocol

from edge_agent import plugins
from edge_agent.config import CameraOptions, Positive
from edge_agent.data import Image, VideoFormat

PaceName = Literal["realtime", "fast"]

HELPERS = ("world",)  # modules of this package that are no source


class LiveOptions(CameraOptions, kw_only=True):
    """Of cameras that send at a rate of their own: `fps` is how many of their pictures a second are wanted."""

    fps: Positive | None = None


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

    def grab(self) -> int | None:
        """Take the next picture off the camera, undecoded where that is cheaper: when it was captured
        (monotonic clock, ns), by the camera's own clock where it has one; or None where none came in time.

        Blocks for a bounded time. Raises `EndOfStream` at the end of a file, and `SourceError` when the
        connection is lost; `close` and `open` may then be tried again.
        """

    def retrieve(self, into: Image) -> Image | None:
        """The picture that was grabbed last, in `into` where its shape fits; None if it arrived damaged."""

    def close(self) -> None:
        """Let go of the device; may be called twice, and before `open`."""


def make(options: CameraOptions) -> Source:
    """A new source for a camera's table. Imports its module; raises `ConfigError`."""
    source_class: Callable[[CameraOptions], Source] = plugins.load("sources", options.source)
    if options.isolation == "process":
        from edge_agent.sources._isolated import IsolatedSource

        return IsolatedSource(source_class, options)
    return source_class(options)
