"""What an ONNX file is made of, by its bytes: whether it is whole, where its weights lie, whether they are numbers.

Walks the protobuf messages of onnx.proto (https://github.com/onnx/onnx/blob/main/onnx/onnx.proto) without building
them, so that a file that nobody trusts yet is looked at before any runtime opens it, and needs no library.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from edge_agent.errors import ModelError
from edge_agent.models.files import is_plain_file, require_file

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5

# Message kinds, and which of their fields hold which kind. Everything else is skipped.
_FIELDS: Mapping[str, Mapping[int, str]] = {
    "model": {7: "graph", 20: "training", 25: "function"},
    "training": {1: "graph", 2: "graph"},
    "function": {7: "node", 11: "attribute"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
}
_GRAPH, _OPSET = 7, 8
_FLOATS: Mapping[int, np.dtype[np.floating[Any]]] = {1: np.dtype("<f4"), 10: np.dtype("<f2"), 11: np.dtype("<f8")}
_FLOAT16 = 10
_DEEPEST = 64
_CHUNK = 1 << 20


@dataclass
class Survey:
    """`external`: the files beside it in which weights lie, as it names them; `not_finite`: tensors that hold NaN."""

    external: list[str] = field(default_factory=list)
    not_finite: list[str] = field(default_factory=list)


def survey(path: Path, *, values: bool = False) -> Survey:
    """Look through a file; at its weights themselves only with `values`.

    Raises `ModelError`: `model_truncated` where it ends too early, `model_rejected` where it is none,
    `model_not_found` where it cannot be read.
    """
    found = Survey()
    try:
        require_file(path)
        with path.open("rb") as file:
            if file.seek(0, 2) == 0:
                raise _Truncated
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data, memoryview(data) as whole:
                _Walk(whole, found, values).model()
    except OSError as error:
        raise ModelError(f"{path}: {error.strerror or error}", code="model_not_found") from error
    except _Truncated as error:
        raise ModelError(
            f"{path.name} is cut short: it is not the whole ONNX file; copy it again", code="model_truncated"
        ) from error
    except _Malformed as error:
        raise ModelError(f"{path.name} is no ONNX file ({error})") from error
    return found


def external_files(path: Path, *, beside: Path | None = None) -> list[Path]:
    """The files in which a model keeps weights. Raises `ModelError` (`external_data`) unless each is a plain file
    in the model's own folder, or in the one that it came from."""
    files = []
    for location in survey(path).external:
        if location != Path(location).name or location in ("", ".", "..") or "\\" in location:
            raise _forbidden(path, location, "only the plain name of a file in the same folder is allowed")
        file = (beside or path.parent) / location
        if not is_plain_file(file):
            raise _forbidden(path, location, "there is no such file, or it is a link; put the file beside the model")
        files.append(file)
    return files


def require_numbers(path: Path) -> None:
    """Raises `ModelError` (`model_not_finite`) where a weight is NaN."""
    if bad := survey(path, values=True).not_finite:
        named = ", ".join(bad[:3]) + (", …" if len(bad) > 3 else "")
        raise ModelError(f"{path.name}: weights are not numbers (NaN): {named}", code="model_not_finite")


class _Truncated(Exception):
    """A field runs past the end."""


class _Malformed(Exception):
    """This is no protobuf message of the kind."""


class _Walk:
    def __init__(self, data: memoryview, found: Survey, values: bool) -> None:
        self._data = data
        self._found = found
        self._values = values
        self._locations: set[str] = set()

    def model(self) -> None:
        seen = {number for number, *_ in self._fields(0, len(self._data))}
        if not seen & {1, _GRAPH, _OPSET}:
            raise _Malformed("it has neither version nor graph")
        if not {_GRAPH, _OPSET} <= seen:
            raise _Truncated
        self._message("model", 0, len(self._data), 0)

    def _message(self, kind: str, start: int, end: int, depth: int) -> None:
        if depth > _DEEPEST:
            raise _Malformed("graphs in graphs without end")
        inner = _FIELDS[kind]
        for number, wire, begin, stop in self._fields(start, end):
            if wire != _BYTES or number not in inner:
                continue
            if inner[number] == "tensor":
                self._tensor(begin, stop)
            else:
                self._message(inner[number], begin, stop, depth + 1)

    def _tensor(self, start: int, end: int) -> None:
        """TensorProto: data_type 2, float_data 4, int32_data 5 (float16 too), name 8, raw_data 9, double_data 10,
        external_data 13."""
        name, kind, values, halves = "", 0, [], []
        for number, wire, begin, stop in self._fields(start, end):
            if number == 2 and wire == _VARINT:
                kind = begin & 0xFFFFFFFF  # as an int32 is read
            elif number == 8 and wire == _BYTES:
                name = bytes(self._data[begin:stop]).decode(errors="replace")
            elif number == 13 and wire == _BYTES:
                self._external(begin, stop)
            elif number in (4, 9, 10) and wire != _VARINT:
                values.append((begin, stop))
            elif number == 5 and wire == _BYTES:
                halves.append((begin, stop))
        dtype = _FLOATS.get(kind) if self._values else None
        if dtype is None:
            return
        bad = any(self._has_nan(begin, stop, dtype) for begin, stop in values)
        if bad or (kind == _FLOAT16 and any(self._has_nan_in_varints(begin, stop) for begin, stop in halves)):
            self._found.not_finite.append(name)

    def _external(self, start: int, end: int) -> None:
        """StringStringEntryProto: key 1, value 2."""
        pair = {number: (begin, stop) for number, wire, begin, stop in self._fields(start, end) if wire == _BYTES}
        key, name = (bytes(self._data[slice(*pair.get(number, (0, 0)))]) for number in (1, 2))
        if key != b"location":
            return
        try:
            value = name.decode()
        except UnicodeDecodeError as error:
            raise _Malformed(f"a file name that is not UTF-8 at byte {start}") from error
        if value not in self._locations:
            self._locations.add(value)
            self._found.external.append(value)

    def _has_nan(self, start: int, end: int, dtype: np.dtype[np.floating[Any]]) -> bool:
        step = _CHUNK * dtype.itemsize
        end -= (end - start) % dtype.itemsize
        return any(
            bool(np.isnan(np.frombuffer(self._data[at : min(at + step, end)], dtype)).any())
            for at in range(start, end, step)
        )

    def _has_nan_in_varints(self, start: int, end: int) -> bool:
        """Of float16 numbers, each as a varint of its bits: up to 3 bytes of 7 bits, the lowest first."""
        data = np.frombuffer(self._data[start:end], np.uint8)
        last = np.flatnonzero(data < 0x80)
        first = np.concatenate(([0], last[:-1] + 1))
        bits = np.zeros(len(last), np.uint32)
        for place in range(3):
            at = np.minimum(first + place, last)
            bits |= np.where(first + place <= last, data[at] & 0x7F, 0).astype(np.uint32) << (7 * place)
        return bool(((bits & 0x7FFF) > 0x7C00).any())

    def _fields(self, start: int, end: int) -> Iterator[tuple[int, int, int, int]]:
        """Number, wire type, and where a field's content begins and stops; for a varint its value, twice."""
        at = start
        while at < end:
            tag, at = self._varint(at, end)
            number, wire = tag >> 3, tag & 7
            if number == 0 or tag >> 32:  # parsers disagree on what a longer one means
                raise _Malformed(f"a field without a number at byte {at}")
            if wire == _VARINT:
                value, at = self._varint(at, end)
                yield number, wire, value, value
                continue
            if wire == _BYTES:
                size, at = self._varint(at, end)
            elif wire in (_FIXED64, _FIXED32):
                size = 8 if wire == _FIXED64 else 4
            else:
                raise _Malformed(f"wire type {wire} at byte {at}")
            if at + size > end:
                raise _Truncated if end == len(self._data) else _Malformed(f"a field too long at byte {at}")
            yield number, wire, at, at + size
            at += size

    def _varint(self, at: int, end: int) -> tuple[int, int]:
        value = shift = 0
        while at < end and shift < 70:
            byte = self._data[at]
            at += 1
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value, at
            shift += 7
        if shift >= 70:
            raise _Malformed(f"a number without end at byte {at}")
        raise _Truncated if end == len(self._data) else _Malformed(f"a number cut off at byte {at}")


def _forbidden(path: Path, location: str, why: str) -> ModelError:
    return ModelError(
        f"{path.name} keeps weights in {location!r}: {why}, or save the model as one file", code="external_data"
    )
