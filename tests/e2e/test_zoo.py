"""The bundled models of other kinds than detection: their accuracy against the drawn world's truth, read from MQTT."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pycocotools.mask
import pytest
from numpy.typing import NDArray

from edge_agent.models.store import ModelStore
from edge_agent.sources.world import CLASS_NAMES, KEYPOINT_NAMES, World
from tests import accuracy, schemas
from tests.rigs import AgentProcess, Broker, Probe, config

pytestmark = [pytest.mark.slow, pytest.mark.soak]

SEEDS = range(7_100, 7_106)  # worlds that the training never saw
FRAMES = 40
ZOO = Path(ModelStore({}).get("demo-320").path).parent


def results(
    folder: Path, broker: Broker, probe: Probe, body: str, *, objects: int = 6, seeds: range = SEEDS
) -> list[tuple[dict[str, Any], World]]:
    """Results of many worlds, each with the world that it is of."""
    cameras = "".join(
        f'[cameras.c{seed}]\nsource = "synthetic"\npace = "fast"\nseed = {seed}\nobjects = {objects}\n'
        for seed in seeds
    )
    with AgentProcess(folder, config(broker.port, body + cameras, mqtt="max_queued_results = 100000")) as agent:
        for seed in seeds:
            probe.wait(f"cameras/c{seed}/results", n=FRAMES, timeout_s=60)
        assert agent.stop() == 0
    found = []
    for seed in seeds:
        world = World(width=640, height=480, seed=seed, objects=objects)
        for message in probe.on(f"cameras/c{seed}/results")[:FRAMES]:
            schemas.validate(message)
            found.append((message.json(), world))
    return found


def test_poses_have_their_boxes_and_keypoints_where_they_are(tmp_path: Path, broker: Broker, probe: Probe) -> None:
    body = '[model]\nactive = "demo-pose"\n[inference]\nscore_threshold = 0.03\n'
    frames, errors = [], []
    for result, world in results(tmp_path, broker, probe, body):
        truth = world.truth(result["seq"])
        frames.append(accuracy.Scored(result["poses"], truth))
        for pose in result["poses"]:
            assert [point["name"] for point in pose["keypoints"]] == list(KEYPOINT_NAMES)
            overlap = accuracy.iou(np.array(pose["box"]), truth.boxes) * (truth.class_ids == pose["class_id"])
            best = int(overlap.argmax())
            if pose["score"] < 0.4 or overlap[best] < 0.5:
                continue
            for point, (x, y, is_visible) in zip(pose["keypoints"], truth.keypoints[best], strict=True):
                if is_visible:
                    errors.append(float(np.hypot(point["x"] - x, point["y"] - y)))
    reached = accuracy.mean_average_precision(frames)
    middle, most = np.quantile(errors, (0.5, 0.9))
    print(f"demo-pose: mAP@0.5 = {reached:.3f}; keypoints off by {middle:.1f} px, 9 of 10 by {most:.1f} px at most")
    assert reached >= 0.85
    assert middle <= 5


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # of pycocotools
def test_maps_of_classes_cover_what_they_should(tmp_path: Path, broker: Broker, probe: Probe) -> None:
    body = f'[model]\nactive = "seg"\n[models.seg]\npath = "{ZOO / "demo-seg.onnx"}"\noptions = {{ mask = true }}\n'
    both, either = np.zeros(len(CLASS_NAMES) + 1), np.zeros(len(CLASS_NAMES) + 1)
    for result, world in results(tmp_path, broker, probe, body):
        seen, true = class_map(result), true_map(world, result["seq"])
        true = cv2.resize(true, seen.shape[::-1], interpolation=cv2.INTER_NEAREST)
        for class_id in range(len(both)):
            both[class_id] += ((seen == class_id) & (true == class_id)).sum()
            either[class_id] += ((seen == class_id) | (true == class_id)).sum()
        for region in result["segmentation"]["regions"]:
            assert region["label"] in CLASS_NAMES  # none of the background
            x1, y1, x2, y2 = region["box"]
            assert x1 <= region["centroid"][0] <= x2
            assert y1 <= region["centroid"][1] <= y2
    reached = both / np.maximum(1, either)
    print(f"demo-seg: mean IoU {reached.mean():.3f}, by class {reached.round(3).tolist()}")
    assert reached.mean() >= 0.75


def class_map(result: dict[str, Any]) -> NDArray[np.uint8]:
    masks = [
        (share["class_id"], {**share["mask"], "counts": share["mask"]["counts"].encode()})
        for share in result["segmentation"]["classes"]
    ]
    whole = np.zeros(masks[0][1]["size"], np.uint8)
    for class_id, mask in masks:
        whole[np.array(pycocotools.mask.decode([mask]))[..., 0] == 1] = class_id
    return whole


def true_map(world: World, index: int) -> NDArray[np.uint8]:
    truth = world.truth(index)
    whole = np.zeros((world.height, world.width), np.uint8)
    for mask, class_id in zip(truth.masks, truth.class_ids, strict=True):
        whole[mask] = class_id + 1
    return whole


def test_a_picture_is_called_what_it_shows(tmp_path: Path, broker: Broker, probe: Probe) -> None:
    right = total = 0
    seeds = range(7_200, 7_212)
    for result, world in results(tmp_path, broker, probe, '[model]\nactive = "demo-cls"\n', objects=1, seeds=seeds):
        truth = world.truth(result["seq"])
        if truth.visibility[0] < 0.6:
            continue
        total += 1
        right += result["classes"][0]["label"] == CLASS_NAMES[truth.class_ids[0]]
        assert sum(one["score"] for one in result["classes"]) == pytest.approx(1, abs=0.01)
    print(f"demo-cls: {right} of {total} right")
    assert total > 200
    assert right / total >= 0.9
