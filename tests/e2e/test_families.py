"""Every kind of model, trained by others, through the whole agent: what others saw with them is seen here."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cv2
import pytest

from tests import schemas
from tests.rigs import SHARED, AgentProcess, Broker, Probe, config, need_file

pytestmark = [pytest.mark.slow, pytest.mark.soak]


@dataclass(frozen=True)
class Model:
    """A file of ours to use in place, and its entry; what is not said is told by the file."""

    file: str
    entry: str = ""
    score: float = 0.5


MODELS = {
    "yolox": Model("det_yolox_nano_416.onnx", 'labels = "coco80"'),
    "nanodet": Model("det_nanodet_g_416_raw.onnx", 'labels = "coco80"'),
    "efficientdet": Model("det_efficientdet_lite0_int8_nms.onnx", 'labels = "coco90"', 0.45),
    "deeplab": Model("seg_deeplabv3_mnv2_257_voc21.onnx", 'labels = "voc21"'),
    "movenet": Model("pose_movenet_lightning_192.onnx", score=0.3),
    "posenet": Model("pose_posenet_mnv1_337_heatmap.onnx", score=0.4),
    "efficientnet": Model("cls_efficientnet_lite0_int8.onnx", 'labels = "imagenet1000"'),
}


@dataclass(frozen=True)
class Seen:
    """What others saw in a picture. `boxes`: label, least and largest score, box; `shares`: of the picture."""

    boxes: tuple[tuple[str, float, float, tuple[int, ...] | None], ...] = ()
    shares: dict[str, float] = field(default_factory=dict)


ASTRONAUT = {
    "yolox": Seen((("person", 0.906, 0.946, (11, 20, 369, 507)),)),
    "nanodet": Seen((("person", 0.71, 0.75, (15, 6, 362, 506)),)),
    "efficientdet": Seen((("person", 0.83, 0.93, (15, 6, 362, 506)),)),
    "deeplab": Seen(shares={"person": 0.464}),
}
CHELSEA = {
    "yolox": Seen((("cat", 0.601, 0.641, None),)),
    "nanodet": Seen((("cat", 0.54, 0.58, None),)),
    "efficientdet": Seen((("cat", 0.69, 0.79, (10, 2, 417, 298)),)),
    "deeplab": Seen(shares={"cat": 0.763}),
    "efficientnet": Seen((("Egyptian cat", 0.37, 0.47, None),)),
}
FACE = {  # of the astronaut, measured on the picture itself by eye: x, y
    "nose": (222, 124),
    "left_eye": (245, 104),
    "right_eye": (204, 102),
    "left_shoulder": (312, 268),
    "right_shoulder": (112, 258),
}


def run(tmp_path: Path, broker: Broker, probe: Probe, name: str, camera: str, *, n: int, extra: str = "") -> list[Any]:
    model = MODELS[name]
    path = need_file(SHARED / "models" / model.file)
    body = (
        f'[model]\nactive = "{name}"\n[models.{name}]\npath = "{path}"\n{model.entry}\n{extra}\n'
        f'[inference]\nscore_threshold = {model.score}\n[cameras.album]\nsource = "file"\npace = "fast"\n{camera}\n'
    )
    with AgentProcess(tmp_path, config(broker.port, body)):
        heard = probe.wait("cameras/album/results", n=n, timeout_s=60)
    for message in heard:
        schemas.validate(message)
    return [message.json() for message in heard[:n]]


def picture(tmp_path: Path, name: str) -> str:
    folder = tmp_path / "pictures"
    folder.mkdir()
    (folder / name).symlink_to(need_file(SHARED / "media" / name))
    return f'path = "{folder}"'


def iou(one: Any, other: Any) -> float:
    across = max(0.0, min(one[2], other[2]) - max(one[0], other[0]))
    down = max(0.0, min(one[3], other[3]) - max(one[1], other[1]))
    areas = sum((box[2] - box[0]) * (box[3] - box[1]) for box in (one, other))
    return across * down / (areas - across * down)


@pytest.mark.parametrize(
    ("file", "name", "seen"),
    [("astronaut.png", name, seen) for name, seen in ASTRONAUT.items()]
    + [("chelsea.png", name, seen) for name, seen in CHELSEA.items()],
)
def test_a_picture_shows_what_others_saw_in_it(
    tmp_path: Path, broker: Broker, probe: Probe, file: str, name: str, seen: Seen
) -> None:
    # NanoDet was trained on stretched pictures, and sees this cat in one that is not.
    is_wide = (name, file) == ("nanodet", "chelsea.png")
    resize = 'preprocess = { resize = "letterbox", pad = 0 }' if is_wide else ""
    [result] = run(tmp_path, broker, probe, name, picture(tmp_path, file), n=1, extra=resize)
    found = result.get("detections") or result.get("classes") or []
    for label, least, most, box in seen.boxes:
        best = next(one for one in found if one["label"] == label)
        assert least <= best["score"] <= most
        if box:
            assert iou(best["box"], box) >= 0.9
    if seen.boxes and "detections" in result:
        assert len(found) == len(seen.boxes)
    for label, share in seen.shares.items():
        classes = {one["label"]: one["ratio"] for one in result["segmentation"]["classes"]}
        assert classes[label] == pytest.approx(share, abs=0.01)
        assert result["segmentation"]["regions"][0]["label"] == label


@pytest.mark.parametrize(
    ("name", "people", "vehicles"),
    [("yolox", 7, {"car", "truck"}), ("nanodet", 6, {"car", "truck"}), ("efficientdet", 5, {"truck"})],
)
def test_a_street_shows_whom_others_saw_in_it(
    tmp_path: Path, broker: Broker, probe: Probe, name: str, people: int, vehicles: set[str]
) -> None:
    film = need_file(SHARED / "media" / "vtest_200.avi")
    results = run(tmp_path, broker, probe, name, f'path = "{film}"', n=101)
    found = results[100]["detections"]
    assert sum(one["label"] == "person" for one in found) == people
    assert {one["label"] for one in found} == {"person", *vehicles}


@pytest.mark.parametrize("name", ["movenet", "posenet"])
def test_a_face_lies_where_it_is(tmp_path: Path, broker: Broker, probe: Probe, name: str) -> None:
    [result] = run(tmp_path, broker, probe, name, picture(tmp_path, "astronaut.png"), n=1)
    [pose] = result["poses"]
    points = {point["name"]: point for point in pose["keypoints"]}
    for point in ("nose", "left_eye", "right_eye"):
        assert abs(points[point]["x"] - FACE[point][0]) <= 6
        assert abs(points[point]["y"] - FACE[point][1]) <= 6
    for point in ("left_shoulder", "right_shoulder"):
        assert abs(points[point]["x"] - FACE[point][0]) <= 12
        assert abs(points[point]["y"] - FACE[point][1]) <= 12
    assert points["left_eye"]["x"] > points["right_eye"]["x"]  # the person's own left


def test_walkers_are_followed_and_counted_in_a_zone(tmp_path: Path, broker: Broker, probe: Probe) -> None:
    film = need_file(SHARED / "media" / "vtest_200.avi")
    zone, line = "left = [[0, 0], [0.5, 0], [0.5, 1], [0, 1]]", "middle = [[0.5, 0], [0.5, 1]]"
    camera = f'path = "{film}"\nzones = {{ {zone} }}\nlines = {{ {line} }}'
    results = run(tmp_path, broker, probe, "yolox", camera, n=200, extra="[tracking]\nenabled = true")
    followed: dict[int, list[int]] = {}
    for result in results:
        width = result["width"]
        inside = [one for one in result["detections"] if (one["box"][0] + one["box"][2]) / 2 < width / 2]
        assert sum(result["zones"]["left"].values()) == len(inside)
        for one in result["detections"]:
            if "track_id" in one:
                followed.setdefault(one["track_id"], []).append(result["seq"])
    lasting = [seqs for seqs in followed.values() if len(seqs) >= 50]
    assert len(lasting) >= 5  # walkers and parked cars
    assert len(followed) <= 25  # of some ten that pass, not a new one each moment
    events = [message.json() for message in probe.on("cameras/album/events")]
    for message in probe.on("cameras/album/events"):
        schemas.validate(message)
    begun = {event["track_id"] for event in events if event["type"] == "new"}
    assert {event["track_id"] for event in events} <= begun
    for event in events:
        assert (event["before"] is None) == (event["type"] == "new")
        assert (event["after"] is None) == (event["type"] == "end")
    crossings = [one for event in events for one in event["crossed"]]
    assert {one["line"] for one in crossings} <= {"middle"}


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # of pycocotools
def test_masks_of_a_segmentation_model_travel_where_they_are_wanted(
    tmp_path: Path, broker: Broker, probe: Probe
) -> None:
    import pycocotools.mask

    [result] = run(
        tmp_path, broker, probe, "deeplab", picture(tmp_path, "chelsea.png"), n=1, extra="options = { mask = true }"
    )
    for one in result["segmentation"]["classes"]:
        mask = pycocotools.mask.decode({**one["mask"], "counts": one["mask"]["counts"].encode()})
        assert mask.mean() == pytest.approx(one["ratio"], abs=1e-4)
    shown = cv2.imread(str(SHARED / "media" / "chelsea.png"))
    assert shown.shape[:2] == (result["height"], result["width"])
