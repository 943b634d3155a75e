"""For sources that find out only when they open how they are read: the rest is left to whoever reads."""

from __future__ import annotations

from typing import Protocol

from edge_agent.data import Image


class Player(Protocol):
    """An open stream; see `Source` for what each does."""

    def grab(self) -> int | None: ...
    def retrieve(self, into: Image) -> Image | None: ...
    def close(self) -> None: ...


class Playing:
    """The part of a source that hands on to its player, which `open` sets."""

    _player: Player | None = None

    def grab(self) -> int | None:
        assert self._player is not None, "open() comes first"
        return self._player.grab()

    def retrieve(self, into: Image) -> Image | None:
        assert self._player is not None, "grab() comes first"
        return self._player.retrieve(into)

    def close(self) -> None:
        if self._player is not None:
            self._player.close()
            self._player = None
