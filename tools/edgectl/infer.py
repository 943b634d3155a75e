"""`edgectl infer`: a model on pictures, a video or a camera, here and now, by the agent's own line."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import cv2
import msgspec
import numpy as np
import typer

from edge_agent import backends, config, drawing, logs, migrations, sources
from edge_agent.check import engines_of
from edge_agent.config import CameraOptions, Config
from edge_agent.data import Frame, Image, Result
from edge_agent.errors import EdgeAgentError, EndOfStream, SourceError
from edge_agent.messages import Topics, encode_result
from edge_agent.models.loaded import LoadedModel, open_model
from edge_agent.models.store import ModelStore
from edge_agent.predictions import described
from edge_agent.tracking import tracks_of
from edge_agent.zones import Watch
from edgectl._config import config_file
from edgectl._models import entry_of
from edgectl._progress import progress

_PICTURES = (".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
_VIDEOS = (".mp4", ".avi", ".mkv")
_INPUT = "input"  # what a camera is called that has no name
_FPS = 25.0  # of a video that is written, where nothing says what it was


class InferError(EdgeAgentError):
    """What was asked for cannot be done."""

    code = "infer"


def infer(
    picture: str,
    model: str,
    settings: Sequence[str],
    path: Path | None,
    *,
    backend: str,
    score: float | None,
    as_json: bool,
    out: Path | None,
    limit: int,
    track: bool | None = None,
) -> None:
    """Run and print, and write what was annotated. Raises `EdgeAgentError` with a sentence."""
    logs.configure(level="warning", format="console", stream=sys.stderr)  # stdout is for what was seen
    loaded = _configuration(picture, model, settings, path, backend, score, track)
    [camera] = loaded.cameras.values()
    count = 0
    with _opened(loaded) as running, _written(out, picture, camera) as write, suppress(KeyboardInterrupt):
        most = limit or _expected(picture)
        with progress("0 frames", shows=not sys.stdout.isatty()) as tell:  # where lines scroll by, they are enough
            for result, fps in islice(_results(loaded, picture, running), limit or None):
                typer.echo(_json(result, loaded) if as_json else _told(result))
                write(result, fps)
                count += 1
                tell(f"{count} frames", 100 * count / most if most else None)
    if not count:
        raise InferError(f"{picture} gave no picture")


def _results(loaded: Config, picture: str, running: LoadedModel) -> Iterator[tuple[Result, float | None]]:
    """What was seen in each frame, followed and counted as the configuration wants; and the source's rate."""
    follow, watch = tracks_of(loaded), Watch(loaded.cameras, lost_frames=loaded.tracking.lost_frames)
    with closing(_frames(loaded, picture)) as frames:
        for frame, fps in frames:
            [seen] = running.collect(running.submit([frame])).results
            yield watch(follow(seen) if follow else seen)[0], fps


class _Writer(Protocol):
    def __call__(self, result: Result, fps: float | None) -> None: ...


def _configuration(
    picture: str,
    model: str,
    settings: Sequence[str],
    path: Path | None,
    backend: str,
    score: float | None,
    track: bool | None,
) -> Config:
    """The agent's own configuration, or none, with this model and this picture's source in it."""
    found = config_file(path)
    raw, folder = (migrations.migrated(config.read(found))[0], found.parent) if found else ({}, Path())
    name, entry = entry_of(model, settings, raw, folder)
    inference = {**raw.get("inference", {}), "max_batch": 1, "backend": backend}
    if score is not None:
        inference["score_threshold"] = score
    tracking = dict(raw.get("tracking", {}))
    if track is not None:
        tracking["enabled"] = track
    cameras = raw.get("cameras", {})
    camera = cameras[picture] if picture in cameras else _camera(picture)
    return config.parse(
        {
            **{key: raw[key] for key in ("config_version", "agent", "backends") if key in raw},
            "mqtt": {key: value for key, value in raw.get("mqtt", {}).items() if key == "prefix"},
            "model": {"active": name},
            "models": {**raw.get("models", {}), name: entry},
            "inference": inference,
            "tracking": tracking,
            "cameras": {picture if picture in cameras else _INPUT: camera},
        },
        folder=folder.absolute(),
    )


def _camera(picture: str) -> Mapping[str, Any]:
    """The table of a camera that delivers this."""
    scheme = picture.partition("://")[0] if "://" in picture else ""
    if scheme in ("rtsp", "rtsps"):
        return {"source": "rtsp", "url": picture}
    if scheme in ("http", "https"):
        return {"source": "http", "url": picture}
    if picture == "synthetic":
        return {"source": "synthetic"}
    if picture.startswith(("/dev/", "usb:")):
        return {"source": "v4l2", "device": picture}
    there = Path(picture).absolute()
    if not there.exists():
        raise InferError(f"{picture}: there is no such file, folder or camera")
    return {"source": "folder" if there.is_dir() else "file", "path": str(there), "pace": "fast"}


@contextmanager
def _opened(loaded: Config) -> Iterator[LoadedModel]:
    choice = backends.choose(loaded.inference.backend, fallback=loaded.inference.fallback, options=loaded.backends)
    if choice.trouble:
        typer.echo(f"{choice.because}; {choice.name} runs the model", err=True)
    with closing(_loaded(loaded, choice.name)) as model:
        yield model


def _loaded(loaded: Config, backend: str) -> LoadedModel:
    with progress("load") as tell:
        model = open_model(
            ModelStore(loaded.models.entries).get(loaded.model.active),
            backend=backend,
            backends=loaded.backends,
            inference=loaded.inference,
            tracked_from=loaded.tracking.low if loaded.tracking.enabled else None,
            engines=engines_of(backend, loaded),
            progress=lambda phase, percent: tell(f"build an engine: {phase}", percent),
        )
        try:
            tell("warm up", None)
            model.warm_up()
        except BaseException:
            model.close()
            raise
    return model


def _expected(picture: str) -> int | None:
    """How many frames there are, where that can be told beforehand."""
    there = Path(picture)
    if there.is_dir():
        return sum(file.suffix.lower() in _PICTURES for file in there.iterdir())
    if there.suffix.lower() in _PICTURES:
        return 1
    if not there.is_file():
        return None
    video = cv2.VideoCapture(str(there))
    count = int(video.get(cv2.CAP_PROP_FRAME_COUNT))
    video.release()
    return count if count > 0 else None


def _frames(loaded: Config, picture: str) -> Generator[tuple[Frame, float | None], None, None]:
    there = Path(picture)
    if there.suffix.lower() in _PICTURES and there.is_file():
        yield _frame(_INPUT, _read(there), 0, time.monotonic_ns()), None
        return
    [(name, options)] = loaded.cameras.items()
    yield from _from_source(name, options)


def _from_source(name: str, options: CameraOptions) -> Iterator[tuple[Frame, float | None]]:
    source = sources.make(options)
    for problem in source.check():
        raise InferError(problem)
    try:
        opened = source.open()
        until = time.monotonic() + options.stall_timeout_s
        for seq in range(1 << 60):
            while (at := source.grab()) is None:
                if time.monotonic() > until:
                    raise SourceError(f"no picture came within {options.stall_timeout_s:g} s", reason="stalled")
            until = time.monotonic() + options.stall_timeout_s
            image = source.retrieve(np.empty((opened.height, opened.width, 3), np.uint8))
            if image is not None:
                yield _frame(name, image, seq, at), opened.fps
    except EndOfStream:
        return
    finally:
        source.close()


def _read(path: Path) -> Image:
    image = cv2.imread(str(path), cv2.IMREAD_COLOR)
    if image is None:
        raise InferError(f"{path} is no picture that OpenCV can read")
    return np.ascontiguousarray(image, np.uint8)


def _frame(camera: str, image: Image, seq: int, at: int) -> Frame:
    return Frame(camera, seq, image, time.time_ns(), at)


@contextmanager
def _written(out: Path | None, picture: str, camera: CameraOptions) -> Iterator[_Writer]:
    """Writes annotated pictures: to a video, to a picture, or one a frame into a folder."""
    if out is None:
        yield lambda result, fps: None
        return
    if out.suffix.lower() in _PICTURES:
        yield lambda result, fps: _write_only(out, result, camera)
    elif out.suffix.lower() in _VIDEOS:
        with _video(out, camera) as write:
            yield write
    elif out.suffix and not out.is_dir():
        known = ", ".join((*_PICTURES, *_VIDEOS))
        raise InferError(f"{out}: no {out.suffix} can be written; one of {known}, or a folder")
    else:
        try:
            out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InferError(f"{out} cannot be made: {error.strerror}") from error
        stem = Path(picture).stem or "frame"
        yield lambda result, fps: _write(out / f"{stem}-{result.frame.seq:05}.jpg", drawing.annotated(result, camera))
    typer.echo(f"written: {out}", err=True)


@contextmanager
def _video(path: Path, camera: CameraOptions) -> Iterator[_Writer]:
    writer: cv2.VideoWriter | None = None
    size = (0, 0)  # the first picture's is the video's

    def write(result: Result, fps: float | None) -> None:
        nonlocal writer, size
        image = drawing.annotated(result, camera)
        if writer is None:
            size = image.shape[1], image.shape[0]
            fourcc = cv2.VideoWriter.fourcc(*("mp4v" if path.suffix.lower() == ".mp4" else "MJPG"))
            writer = cv2.VideoWriter(str(path), fourcc, fps or _FPS, size)
            if not writer.isOpened():
                raise InferError(f"{path}: OpenCV cannot write such a video")
        writer.write(image if image.shape[1::-1] == size else cv2.resize(image, size))

    try:
        yield write
    finally:
        if writer is not None:
            writer.release()


def _write_only(path: Path, result: Result, camera: CameraOptions) -> None:
    """The picture of the only frame there is."""
    if result.frame.seq:
        raise InferError(f"{path} takes one picture, and there are more: give a folder, a video (.mp4), or --limit 1")
    _write(path, drawing.annotated(result, camera))


def _write(path: Path, image: Image) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        written = cv2.imwrite(str(path), image)
    except (OSError, cv2.error) as error:
        raise InferError(f"{path} cannot be written: {error}") from error
    if not written:
        raise InferError(f"{path} cannot be written")


def _json(result: Result, loaded: Config) -> str:
    return encode_result(result, Topics(loaded.mqtt.prefix, loaded.device)).payload.decode()


def _told(result: Result) -> str:
    """What was seen in a frame, for people: a line, and one more for each thing."""
    size = result.frame.image.shape[:2]
    [(key, seen)] = described(result.prediction, result.model.names, size).items()
    head = f"#{result.frame.seq}  {size[1]}x{size[0]}  {result.model.name}  {result.timings.inference_ms:.1f} ms  {key}"
    return "\n".join([head, *(f"  {line}" for line in _lines(key, msgspec.to_builtins(seen)))])


def _lines(key: str, seen: Any) -> Iterator[str]:
    if key == "detections":
        for one in seen:
            box = ", ".join(f"{side:.0f}" for side in one["box"])
            yield f"{one['label']:<20} {one['score']:.3f}  [{box}]"
    elif key == "poses":
        for one in seen:
            points = "  ".join(f"{p['name']} {p['x']:.0f},{p['y']:.0f}" for p in one["keypoints"] if p["score"] >= 0.3)
            yield f"{one['label']:<20} {one['score']:.3f}  {points}"
    elif key == "classes":
        yield from (f"{one['label']:<30} {one['score']:.3f}" for one in seen)
    elif key == "segmentation":
        yield from (f"{one['label']:<20} {100 * one['ratio']:5.1f} %" for one in seen["classes"])
        yield f"{len(seen['regions'])} region(s)"
    else:
        yield json.dumps(seen)[:300]
