"""The kernel's Video4Linux2 interface: devices, what they offer, and pictures from mapped buffers.

Structures and numbers are those of <linux/videodev2.h> on 64-bit machines:
https://docs.kernel.org/userspace-api/media/v4l/v4l2.html
"""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import re
import select
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from edge_agent.sources._pixels import Raw

_CAPTURE, _MMAP, _ANY_FIELD = 1, 1, 0  # V4L2_BUF_TYPE_VIDEO_CAPTURE, V4L2_MEMORY_MMAP, V4L2_FIELD_ANY
_CAP_CAPTURE, _CAP_STREAMING = 0x00000001, 0x04000000
_TIMESTAMP_MASK, _TIMESTAMP_MONOTONIC = 0xE000, 0x2000
_BUFFER_ERROR = 0x0040
_NEXT_CONTROL = 0x80000000
_DISABLED, _READ_ONLY, _BUTTON_OR_CLASS = 0x0001, 0x0004, (4, 6)
_DISCRETE = 1


def _code(direction: int, number: int, size: int) -> int:
    return direction << 30 | size << 16 | ord("V") << 8 | number


_WRITE, _READ, _BOTH = 1, 2, 3
_QUERYCAP = _code(_READ, 0, 104)
_ENUM_FMT = _code(_BOTH, 2, 64)
_G_FMT, _S_FMT = _code(_BOTH, 4, 208), _code(_BOTH, 5, 208)
_REQBUFS, _QUERYBUF = _code(_BOTH, 8, 20), _code(_BOTH, 9, 88)
_QBUF, _DQBUF = _code(_BOTH, 15, 88), _code(_BOTH, 17, 88)
_STREAMON, _STREAMOFF = _code(_WRITE, 18, 4), _code(_WRITE, 19, 4)
_G_PARM, _S_PARM = _code(_BOTH, 21, 204), _code(_BOTH, 22, 204)
_S_CTRL = _code(_BOTH, 28, 8)
_QUERYCTRL = _code(_BOTH, 36, 68)
_ENUM_FRAMESIZES, _ENUM_FRAMEINTERVALS = _code(_BOTH, 74, 44), _code(_BOTH, 75, 52)
_BUFFER = struct.Struct("<6I 2q 16s 2I Q 2I 4x 4x")
_FORMAT = struct.Struct("<2I 12I")


@dataclass(frozen=True, slots=True)
class Mode:
    """A pixel format (four letters) at a size, and the most pictures a second it comes at, where told."""

    format: str
    width: int
    height: int
    fps: float | None


@dataclass(frozen=True, slots=True)
class Control:
    """A setting of the camera, by the name that `v4l2-ctl --list-ctrls` shows."""

    id: int
    name: str
    least: int
    most: int
    default: int


@dataclass(frozen=True, slots=True)
class Negotiated:
    """What the driver made of a wish."""

    format: str
    width: int
    height: int
    stride: int
    fps: float | None


@dataclass(frozen=True, slots=True)
class Taken:
    """A filled buffer; `captured_ns` is None where the driver's clock is not the monotonic one."""

    index: int
    nbytes: int
    captured_ns: int | None
    is_damaged: bool


class Device:
    """An open V4L2 device. Every method may raise `OSError` with the kernel's errno."""

    def __init__(self, path: str) -> None:
        self._fd = os.open(path, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
        self._buffers: list[mmap.mmap] = []
        try:
            answer = self._call(_QUERYCAP, bytearray(104))
        except OSError:  # no V4L2 device, or it has just gone
            self.close()
            raise
        self._poll = select.poll()
        self._poll.register(self._fd, select.POLLIN)
        _, card, bus, _, everything, here = struct.unpack_from("<16s32s32s3I", answer)
        self.card, self.bus = _text(card), _text(bus)
        capabilities = here or everything
        self.can_capture = bool(capabilities & _CAP_CAPTURE and capabilities & _CAP_STREAMING)

    def modes(self) -> Iterator[Mode]:
        """Everything the driver lists; of a range of sizes the largest."""
        for code in self._formats():
            for width, height in self._sizes(code):
                yield Mode(_letters(code), width, height, self._fastest(code, width, height))

    def fps_at(self, format: str, width: int, height: int) -> float | None:
        """The most pictures a second of a mode; None where the driver does not say."""
        return self._fastest(_number(format), width, height)

    def formats(self) -> Sequence[str]:
        """The pixel formats, in the driver's order."""
        return [_letters(code) for code in self._formats()]

    def current(self) -> Negotiated:
        """What the device is set to."""
        return self._negotiated(self._call(_G_FMT, bytearray(struct.pack("<I", _CAPTURE).ljust(208, b"\0"))))

    def negotiate(self, format: str, width: int, height: int, fps: float | None) -> Negotiated:
        """Ask for a mode; the driver answers with the nearest that it has."""
        wish = _FORMAT.pack(_CAPTURE, 0, width, height, _number(format), _ANY_FIELD, *(0,) * 8)
        answer = self._call(_S_FMT, bytearray(wish.ljust(208, b"\0")))
        if fps:
            self._ask_for_rate(fps)
        return self._negotiated(answer)

    def controls(self) -> Sequence[Control]:
        """The settings that can be written."""
        found: list[Control] = []
        last = 0
        while True:
            try:
                answer = self._call(_QUERYCTRL, bytearray(struct.pack("<I", last | _NEXT_CONTROL).ljust(68, b"\0")))
            except OSError:  # EINVAL after the last
                return found
            last, kind, name, least, most, _, default, flags = struct.unpack_from("<2I32s4iI", answer)
            if not flags & (_DISABLED | _READ_ONLY) and kind not in _BUTTON_OR_CLASS:
                found.append(Control(last, _slug(_text(name)), least, most, default))

    def set_control(self, control: Control, value: int) -> None:
        self._call(_S_CTRL, bytearray(struct.pack("<Ii", control.id, value)))

    def start(self, count: int = 4) -> None:
        """Map buffers and let pictures come."""
        answer = self._call(_REQBUFS, bytearray(struct.pack("<3I8x", count, _CAPTURE, _MMAP)))
        for index in range(struct.unpack_from("<I", answer)[0]):
            fields = _BUFFER.unpack(self._call(_QUERYBUF, self._buffer(index)))
            offset, length = fields[11] & 0xFFFFFFFF, fields[12]
            self._buffers.append(mmap.mmap(self._fd, length, offset=offset))
            self.give_back(index)
        self._call(_STREAMON, bytearray(struct.pack("<i", _CAPTURE)))

    def take(self, timeout_s: float) -> Taken | None:
        """The oldest filled buffer, or None if none is filled in time. Give it back before long."""
        if not self._poll.poll(timeout_s * 1000):
            return None
        fields = _BUFFER.unpack(self._call(_DQBUF, self._buffer(0)))
        index, nbytes, flags, seconds, microseconds = (fields[i] for i in (0, 2, 3, 6, 7))
        is_monotonic = flags & _TIMESTAMP_MASK == _TIMESTAMP_MONOTONIC
        captured_ns = seconds * 1_000_000_000 + microseconds * 1000 if is_monotonic else None
        return Taken(index, nbytes, captured_ns, bool(flags & _BUFFER_ERROR))

    def bytes_of(self, taken: Taken) -> Raw:
        """A view of the picture, valid until it is given back."""
        return np.frombuffer(self._buffers[taken.index], np.uint8, taken.nbytes)

    def give_back(self, index: int) -> None:
        self._call(_QBUF, self._buffer(index))

    def close(self) -> None:
        """Stop and let go; may be called twice."""
        if self._fd < 0:
            return
        fd, self._fd = self._fd, -1
        try:
            fcntl.ioctl(fd, _STREAMOFF, struct.pack("<i", _CAPTURE))
        except OSError:  # the device may be gone
            pass
        finally:
            os.close(fd)
            for buffer in self._buffers:
                with contextlib.suppress(BufferError):  # a picture of it is still looked at; it goes with that
                    buffer.close()

    def _call(self, request: int, structure: bytearray) -> bytearray:
        fcntl.ioctl(self._fd, request, structure, True)
        return structure

    def _buffer(self, index: int) -> bytearray:
        return bytearray(_BUFFER.pack(index, _CAPTURE, 0, 0, 0, 0, 0, 0, bytes(16), 0, _MMAP, 0, 0, 0))

    def _negotiated(self, answer: bytearray) -> Negotiated:
        width, height, code, _, stride = _FORMAT.unpack_from(answer)[2:7]
        return Negotiated(_letters(code), width, height, stride, self._rate())

    def _rate(self) -> float | None:
        try:
            answer = self._call(_G_PARM, bytearray(struct.pack("<I", _CAPTURE).ljust(204, b"\0")))
        except OSError:  # an optional ioctl
            return None
        return _per_second(*struct.unpack_from("<12x2I", answer))

    def _ask_for_rate(self, fps: float) -> None:
        wish = struct.pack("<3I2I", _CAPTURE, 0, 0, 1000, round(fps * 1000))
        try:
            self._call(_S_PARM, bytearray(wish.ljust(204, b"\0")))
        except OSError:  # optional as well; surplus pictures are skipped
            return

    def _formats(self) -> Iterator[int]:
        for answer in self._listing(_ENUM_FMT, 64, "<2I", _CAPTURE):
            yield struct.unpack_from("<44xI", answer)[0]

    def _sizes(self, code: int) -> Iterator[tuple[int, int]]:
        for answer in self._listing(_ENUM_FRAMESIZES, 44, "<2I", code):
            kind, first, second, _, _, most_high = struct.unpack_from("<8x6I", answer)
            yield (first, second) if kind == _DISCRETE else (second, most_high)

    def _fastest(self, code: int, width: int, height: int) -> float | None:
        rates = []
        for answer in self._listing(_ENUM_FRAMEINTERVALS, 52, "<4I", code, width, height):
            numerator, denominator = struct.unpack_from("<20x2I", answer)
            rates.append(_per_second(numerator, denominator) or 0.0)
        return max(rates, default=None)

    def _listing(self, request: int, size: int, layout: str, *keys: int) -> Iterator[bytearray]:
        for index in range(256):
            try:
                yield self._call(request, bytearray(struct.pack(layout, index, *keys).ljust(size, b"\0")))
            except OSError:  # EINVAL after the last, ENOTTY where the driver lists nothing
                return


@dataclass(frozen=True, slots=True)
class Found:
    """A capture device of this machine; `by_id` is its lasting name, `usb` its vendor:product, where it has one."""

    path: str
    card: str
    bus: str
    by_id: str | None
    usb: str | None


def devices() -> Iterator[Found]:
    """The capture devices that can be opened, in the order of their numbers."""
    for node in sorted(Path("/sys/class/video4linux").glob("video*"), key=lambda path: int(path.name[5:])):
        path = f"/dev/{node.name}"
        try:
            device = Device(path)
        except OSError:
            continue
        is_camera, card, bus = device.can_capture, device.card, device.bus
        device.close()
        if is_camera:
            yield Found(path, card, bus, _by_id(path), _usb_of(node))


def by_usb(wanted: str) -> str | None:
    """The device path of the first camera with this USB vendor:product (hexadecimal), or None."""
    nodes = sorted(Path("/sys/class/video4linux").glob("video*"), key=lambda path: int(path.name[5:]))
    return next((f"/dev/{node.name}" for node in nodes if _usb_of(node) == wanted.lower() and _is_first(node)), None)


def _usb_of(node: Path) -> str | None:
    try:
        usb = (node / "device").resolve().parent  # of the interface, the USB device
        return f"{(usb / 'idVendor').read_text().strip()}:{(usb / 'idProduct').read_text().strip()}"
    except OSError:
        return None


def _is_first(node: Path) -> bool:
    """One camera has several nodes: pictures come from the first, metadata from another."""
    try:
        return (node / "index").read_text().strip() == "0"
    except OSError:
        return True


def _by_id(path: str) -> str | None:
    links = sorted(Path("/dev/v4l/by-id").glob("*")) if Path("/dev/v4l/by-id").is_dir() else []
    return next((str(link) for link in links if str(link.resolve()) == path), None)


def _per_second(numerator: int, denominator: int) -> float | None:
    """A frame interval, as the kernel tells it, turned into a rate."""
    return round(denominator / numerator, 3) if numerator and denominator else None


def _number(letters: str) -> int:
    return int.from_bytes(letters.encode("ascii"), "little")


def _letters(code: int) -> str:
    return code.to_bytes(4, "little").decode("ascii", "replace")


def _text(raw: bytes) -> str:
    return raw.partition(b"\0")[0].decode("utf-8", "replace")


def _slug(name: str) -> str:
    """A control's name as v4l2-ctl writes it."""
    return re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")
