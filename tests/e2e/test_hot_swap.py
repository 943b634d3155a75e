"""Models change under load: nothing is lost, nothing is mixed up, nothing grows."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.rigs import Broker, Probe, config
from tests.swapping import BATCH, CAMERA_TABLES, Swaps, Watched

pytestmark = [pytest.mark.slow, pytest.mark.soak, pytest.mark.alone]  # no gap between results is long

KINDS = {"demo-seg": "segmentation", "demo-cls": "classes", "demo-320": "detections"}


def test_200_swaps_lose_no_frame_mix_nothing_up_and_leave_nothing_behind(
    tmp_path: Path, broker: Broker, probe: Probe
) -> None:
    body = f"[model]\nprobation_frames = 8\n[inference]\nmax_batch = {BATCH}\n{CAMERA_TABLES}"
    swaps = Swaps(KINDS)
    with Watched(tmp_path, config(broker.port, body, mqtt="max_queued_results = 100000")) as agent:
        swaps.make(agent, probe, tuple(KINDS), 200)
        assert agent.stop() == 0
    swaps.gather(probe)
    print(swaps.check(tmp_path / "lags.json"))
