"""Facts of the agent's own process, by psutil."""

from __future__ import annotations

import psutil

from edge_agent.messages import ProcessStats


class HostSensor:
    """Reads /proc, so not on the event loop; CPU is the share of one core since the last read."""

    def __init__(self) -> None:
        self._process = psutil.Process()
        self._process.cpu_percent()

    def read(self) -> ProcessStats:
        with self._process.oneshot():
            return ProcessStats(
                cpu_percent=self._process.cpu_percent(),
                rss_mb=round(self._process.memory_info().rss / 1e6, 1),
                threads=self._process.num_threads(),
                open_files=self._process.num_fds(),
            )


Sensor = HostSensor
