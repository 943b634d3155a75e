"""The daemon's main job, seen from outside: frames in, results out, against a real broker."""

from __future__ import annotations

import base64
from pathlib import Path

import cv2
import numpy as np
import pytest

from edge_agent.sources.world import World
from tests import accuracy, schemas
from tests.brokers import on_all_brokers
from tests.rigs import DEVICE, AgentProcess, Broker, Probe, RtspServer, Server, config, encode_h264

pytestmark = [pytest.mark.slow, pytest.mark.line]

CAMERAS = 8
FRAMES = 50


@pytest.mark.parametrize(("model", "least"), [("demo-320", 0.9), ("demo-160", 0.9)])
def test_bundled_models_reach_their_accuracy_through_the_whole_agent(
    tmp_path: Path, broker: Broker, probe: Probe, model: str, least: float
) -> None:
    seeds = range(7_000, 7_000 + CAMERAS)  # worlds that the training never saw
    cameras = "".join(
        f'[cameras.c{seed}]\nsource = "synthetic"\npace = "fast"\nseed = {seed}\nobjects = 7\n' for seed in seeds
    )
    body = f'[model]\nactive = "{model}"\n[inference]\nscore_threshold = 0.03\n{cameras}'
    with AgentProcess(tmp_path, config(broker.port, body, mqtt="max_queued_results = 100000")) as agent:
        for seed in seeds:
            probe.wait(f"cameras/c{seed}/results", n=FRAMES, timeout_s=60)
        assert agent.stop() == 0
    frames = []
    for seed in seeds:
        world = World(width=640, height=480, seed=seed, objects=7)
        for message in probe.on(f"cameras/c{seed}/results")[:FRAMES]:
            schemas.validate(message)
            result = message.json()
            assert result["model"]["name"] == model
            frames.append(accuracy.Scored(result["detections"], world.truth(result["seq"])))
    reached = accuracy.mean_average_precision(frames)
    print(f"{model}: mAP@0.5 = {reached:.3f} over {len(frames)} frames of {CAMERAS} worlds")
    assert reached >= least


def test_every_frame_of_a_file_gives_a_result_that_matches_the_truth(
    tmp_path: Path, broker: Broker, probe: Probe
) -> None:
    world = World(width=640, height=480, seed=31, objects=5)
    video = cv2.VideoWriter(str(tmp_path / "world.avi"), cv2.VideoWriter_fourcc(*"MJPG"), 30, (640, 480))
    frame = np.empty((480, 640, 3), np.uint8)
    for index in range(60):
        world.draw(index, frame)
        video.write(frame)
    video.release()
    body = '[cameras.film]\nsource = "file"\npath = "world.avi"\npace = "fast"'
    with AgentProcess(tmp_path, config(broker.port, body)):
        probe.wait("cameras/film/status", lambda status: status["reason"] == "end_of_stream")
        results = probe.wait("cameras/film/results", n=60)
    assert [message.json()["seq"] for message in results] == list(range(60))
    found = wanted = 0
    for message in probe.heard:
        schemas.validate(message)
    for message in results:
        result = message.json()
        truth = world.truth(result["seq"])
        assert (result["width"], result["height"]) == (640, 480)
        for box, class_id, visibility in zip(truth.boxes, truth.class_ids, truth.visibility, strict=True):
            if visibility < 0.5:
                continue
            wanted += 1
            same = [np.array(d["box"]) for d in result["detections"] if d["class_id"] == class_id]
            found += bool(same) and accuracy.iou(box, np.array(same)).max() >= 0.5
    assert found / wanted >= 0.9, f"{found} of {wanted} objects found"


def test_latency_stages_add_up_to_no_more_than_the_total(tmp_path: Path, broker: Broker, probe: Probe) -> None:
    body = '[cameras.a]\nsource = "synthetic"'
    with AgentProcess(tmp_path, config(broker.port, body)):
        results = probe.wait("cameras/a/results", n=10)
    complete = []
    for message in results:
        latency = message.json()["latency_ms"]
        stages = sum(latency[stage] for stage in ("queue", "preprocess", "inference", "postprocess"))
        assert all(value >= 0 for value in latency.values())
        assert stages <= 1.05 * latency["total"] + 0.5
        complete.append(latency["total"] - stages <= 0.05 * latency["total"] + 0.5)
    assert sum(complete) > len(complete) / 2, "between two stages the machine may do something else, though not often"


@on_all_brokers
def test_every_camera_has_a_retained_state_from_start_to_end(tmp_path: Path, broker: Server, probe: Probe) -> None:
    body = '[cameras.a]\nsource = "synthetic"\n[cameras.off]\nsource = "synthetic"\nenabled = false\n'
    with AgentProcess(tmp_path, config(broker.port, body)) as agent:
        probe.wait("cameras/a/status", lambda status: status["state"] == "running")
        probe.wait("cameras/off/status", lambda status: status["state"] == "disabled")
        probe.wait(
            "health",
            lambda health: all(check["state"] == "ok" for name, check in health["checks"].items() if name != "clock"),
        )
        assert agent.stop() == 0
    with Probe(broker.port, f"edge/{DEVICE}/cameras/a/status", version=broker.version) as latecomer:
        last = latecomer.wait("cameras/a/status")[0].json()
    assert (last["state"], last["message"]) == ("disabled", "stopped")


@pytest.mark.alone  # the rate is the camera's
def test_rtsp_at_720p30_keeps_the_cameras_rate(tmp_path: Path, broker: Broker, probe: Probe) -> None:
    world = World(width=1280, height=720, seed=5, noise=0)

    def frames() -> object:
        frame = np.empty((720, 1280, 3), np.uint8)
        for index in range(240):
            world.draw(index, frame)
            yield frame

    film = encode_h264(frames(), tmp_path / "camera.mp4", fps=30)
    with RtspServer(film) as server:
        body = f'[inference]\nbackend = "fake"\n[cameras.gate]\nsource = "rtsp"\nurl = "{server.url}"\n'
        with AgentProcess(tmp_path, config(broker.port, body)):
            probe.wait("cameras/gate/status", lambda status: status["state"] == "running", timeout_s=30)
            probe.wait("cameras/gate/results", lambda result: result["seq"] >= 235, timeout_s=30)
    results = probe.on("cameras/gate/results")
    first = [message for message in results if message.json()["seq"] < 240]
    seconds = first[-1].at - first[0].at
    assert (first[0].json()["width"], first[0].json()["height"]) == (1280, 720)
    assert len(first) >= 0.95 * 240, f"{len(first)} of 240 frames gave a result"
    assert (len(first) - 1) / seconds >= 0.95 * 30, f"{len(first)} results in {seconds:.2f} s"


def test_two_cameras_share_the_engine_fairly(tmp_path: Path, broker: Broker, probe: Probe) -> None:
    body = """
[inference]
backend = "fake"
max_batch = 1
[backends.fake]
latency_ms = 20
[cameras.fast]
source = "synthetic"
fps = 200
[cameras.slow]
source = "synthetic"
fps = 10
"""
    with AgentProcess(tmp_path, config(broker.port, body)):
        probe.wait("cameras/slow/results", n=30)
        stats = probe.wait("stats", lambda stats: stats["cameras"]["slow"]["inferred"] >= 20)[-1].json()
    slow, fast = stats["cameras"]["slow"], stats["cameras"]["fast"]
    assert sum(slow["drops"].values()) == 0
    assert fast["drops"]["full"] > 0
    assert fast["captured"] >= fast["inferred"] + sum(fast["drops"].values())


def test_a_snapshot_is_the_annotated_picture_of_the_frame_it_names(
    tmp_path: Path, broker: Broker, probe: Probe
) -> None:
    body = '[cameras.a]\nsource = "synthetic"\nseed = 3\nnoise = 0\n'
    with AgentProcess(tmp_path, config(broker.port, body)):
        probe.wait("cameras/a/results")
        plain = probe.command("camera.snapshot", camera="a", annotated=False)
        assert plain["status"] == "ok", base64.b64encode(repr(plain).encode())
        picture = probe.wait("cameras/a/snapshot")[0]
        annotated = probe.command("camera.snapshot", camera="a")
        marked = probe.wait("cameras/a/snapshot", lambda _: True, n=2)[1]
    shown = cv2.imdecode(np.frombuffer(picture.payload, np.uint8), cv2.IMREAD_COLOR)
    drawn = np.empty((480, 640, 3), np.uint8)
    World(width=640, height=480, seed=3, objects=6, noise=0).draw(plain["result"]["seq"], drawn)
    assert shown.shape == (480, 640, 3)
    assert np.abs(shown.astype(int) - drawn).mean() < 6  # JPEG's loss, and nothing else
    assert annotated["result"]["bytes"] == len(marked.payload) != len(picture.payload)
