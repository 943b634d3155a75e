"""Sees nothing, for machines of which nothing is to be known."""

from __future__ import annotations

from edge_agent.readings import Readings


class NullSensor:
    """All is absent."""

    def read(self) -> Readings:
        return Readings()

    def close(self) -> None:
        """There is nothing to let go of."""


Sensor = NullSensor
