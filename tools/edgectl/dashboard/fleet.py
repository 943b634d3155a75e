"""What the topics of a prefix said last, in bounded memory. No input or output; moments are monotonic seconds."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import msgspec
from msgspec import UNSET

from edge_agent.messages import CameraStatus, Health, Job, Models, Reply, Stats, Status
from edgectl.dashboard.device import Device, JobView, Picture, sample

Part = Literal["device", "status", "health", "stats", "models", "camera", "picture", "job"]

_MOST_DEVICES = 10_000
_MOST_CAMERAS = 256
_MOST_HISTORIES = 100
_MOST_JOBS = 20
_MOST_PICTURE_BYTES = 4_000_000
_JPEG = b"\xff\xd8\xff"
_ROWS: frozenset[Part] = frozenset({"device", "status", "health", "stats"})


class Change(NamedTuple):
    """A part of what is known of a device is new; `name` is the camera's, or the job's id."""

    device: str
    part: Part
    name: str = ""

    @property
    def is_in_row(self) -> bool:
        """Whether the table of all devices shows it."""
        return self.part in _ROWS


class Fleet:
    """`take` reads a message and says what it changed. `misread` counts those that made no sense, `ignored` those of
    devices and cameras beyond what is kept."""

    def __init__(self, prefix: str) -> None:
        self.devices: dict[str, Device] = {}
        self.misread = 0
        self.ignored = 0
        self._prefix = prefix
        self._pictures = 0

    def take(self, topic: str, payload: bytes, now_s: float, *, is_retained: bool = False) -> Change | None:
        name, *leaf = topic[len(self._prefix) + 1 :].split("/")
        if leaf == ["available"] and not payload:  # somebody cleared what the broker kept of it
            return Change(name, "device") if self.devices.pop(name, None) else None
        device = self.devices.get(name) or Device()
        try:
            change = self._read(name, device, leaf, payload, now_s, is_retained)
        except (msgspec.DecodeError, UnicodeDecodeError):
            self.misread += 1  # another version's message, or nobody's
            return None
        if change is None:
            return None
        if name not in self.devices and len(self.devices) >= _MOST_DEVICES:
            self.ignored += 1
            return None
        self.devices[name] = device
        if not is_retained:
            device.heard_s = now_s
        return change

    def doubt(self) -> list[Change]:
        """The broker was away: who is online will be told anew, or was forgotten."""
        for device in self.devices.values():
            device.available = None
        return [Change(name, "device") for name in self.devices]

    def sent(self, name: str, job_id: str, command: str, now_s: float) -> Change:
        """A command is on its way to the device."""
        device = self.devices.setdefault(name, Device())
        return self._keep_job(name, device, job_id, JobView(command, "sent", now_s))

    def answered(self, name: str, reply: Reply) -> Change | None:
        """The reply to a command that was `sent`."""
        device = self.devices.get(name)
        job = device.jobs.get(reply.id or "") if device else None
        if device is None or job is None or reply.id is None:
            return None
        if reply.status == "accepted":
            return self._keep_job(name, device, reply.id, msgspec.structs.replace(job, state="accepted"))
        told = {
            "state": "done" if reply.status == "ok" else "failed",
            "phase": None,
            "percent": None,
            "code": _known(reply.code),
            "message": _known(reply.message),
            "duration_ms": reply.duration_ms,
            "result": _known(reply.result),
        }
        return self._keep_job(name, device, reply.id, msgspec.structs.replace(job, **told))

    def no_picture(self, name: str, camera: str, why: str) -> Change | None:
        """A picture was asked for and none will come."""
        device = self.devices.get(name)
        if device is None or device.picture_troubles.get(camera) == why:
            return None
        device.picture_troubles[camera] = why
        return Change(name, "picture", camera)

    def _read(
        self, name: str, device: Device, leaf: list[str], payload: bytes, now_s: float, is_retained: bool
    ) -> Change | None:
        """Takes the message into `device`; None where there is nothing to tell."""
        match leaf:
            case ["available"]:
                device.available = payload.decode()[:20]
                return Change(name, "device")
            case ["status"]:
                device.status = msgspec.json.decode(payload, type=Status)
                return Change(name, "status")
            case ["health"]:
                device.health = msgspec.json.decode(payload, type=Health)
                device.health_s = None if is_retained else now_s
                return Change(name, "health")
            case ["stats"]:
                self._take_stats(device, msgspec.json.decode(payload, type=Stats), now_s)
                return Change(name, "stats")
            case ["models"]:
                device.models = msgspec.json.decode(payload, type=Models)
                return Change(name, "models")
            case ["cameras", camera, "status"]:
                return self._take_camera(name, device, camera, payload)
            case ["cameras", camera, "snapshot"]:
                return self._take_picture(name, device, camera, payload, now_s)
            case ["jobs", job_id]:
                return self._take_job(name, device, job_id, msgspec.json.decode(payload, type=Job), now_s)
        return None

    def _take_stats(self, device: Device, stats: Stats, now_s: float) -> None:
        device.stats, device.stats_s = stats, now_s
        if len(self.devices) <= _MOST_HISTORIES or device.history:
            device.history.append(sample(stats, now_s))

    def _take_camera(self, name: str, device: Device, camera: str, payload: bytes) -> Change | None:
        if not payload:
            for known in (device.cameras, device.pictures, device.picture_troubles):
                known.pop(camera, None)
            return Change(name, "camera", camera)
        status = msgspec.json.decode(payload, type=CameraStatus)
        if camera not in device.cameras and len(device.cameras) >= _MOST_CAMERAS:
            self.ignored += 1
            return None
        device.cameras[camera] = status
        return Change(name, "camera", camera)

    def _take_picture(self, name: str, device: Device, camera: str, jpeg: bytes, now_s: float) -> Change | None:
        if not jpeg.startswith(_JPEG) or len(jpeg) > _MOST_PICTURE_BYTES:
            self.misread += 1
            return None
        if camera not in device.pictures and len(device.pictures) >= _MOST_CAMERAS:
            self.ignored += 1
            return None
        self._pictures += 1
        device.pictures[camera] = Picture(jpeg, now_s, self._pictures)
        device.picture_troubles.pop(camera, None)
        return Change(name, "picture", camera)

    def _take_job(self, name: str, device: Device, job_id: str, job: Job, now_s: float) -> Change | None:
        before = device.jobs.get(job_id) or JobView(job.command, "running", now_s)
        if before.is_over:
            return None
        told = {key: getattr(job, key) for key in ("state", "phase", "percent", "code", "message")}
        return self._keep_job(name, device, job_id, msgspec.structs.replace(before, **told))

    def _keep_job(self, name: str, device: Device, job_id: str, job: JobView) -> Change:
        device.jobs[job_id] = job
        while len(device.jobs) > _MOST_JOBS:
            device.jobs.pop(next(iter(device.jobs)))
        return Change(name, "job", job_id)


def _known(value: Any) -> Any:
    return None if value is UNSET else value
