"""What may come in on a command topic from people, programs and attackers: named payloads, and a strategy for more."""

from __future__ import annotations

import gzip
import json
import random
import struct
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any

import hypothesis.strategies as st
import msgspec
from hypothesis.strategies import SearchStrategy

from edge_agent.commands import registered

LIMIT = 64_000
"""The most bytes that a command may have."""
COMMANDS = tuple(registered())
NEAR_MISSES = (
    "agent.inf",
    "Agent.Info",
    "agent.info ",
    "agent.info\0",
    "agent/info",
    "agent",
    ".",
    "agent..info",
    "cmd",
)
NAMES = ("demo-320", "demo-160", "demo-320@1", "nothing", "a", "b")
"""Some of them are names of models and cameras that there are."""
ODD_TEXTS = (
    "",
    " ",
    "0",
    "null",
    "a/b",
    "+",
    "#",
    "a/+/#",
    "$SYS/x",
    "\0",
    "\x01\x1f\x7f",
    "\x1b[2J\x1b[31mred",
    "\r\nSet-Cookie: x",
    "\ufeff",
    "\u202egpj.exe",
    "\u200b",
    "\ufffe",
    "\U0010ffff",
    "\U0001f600" * 8,
    "e\u0301",
    "%s%n%x%p",
    "{0.__class__}",
    "{}",
    "${HOME}",
    "$(reboot)",
    "`reboot`",
    "'; DROP TABLE models;--",
    "../../../etc/passwd",
    "..",
    "/etc/passwd",
    "C:\\boot.ini",
    "demo-320\0.onnx",
    "file:///etc/passwd",
    "http://127.0.0.1:1/",
    "__proto__",
    "__class__",
    "demo-320@1@2",
    "@",
    "x" * 128,
    "x" * 129,
)
ODD_VALUES: tuple[Any, ...] = (
    None,
    True,
    False,
    0,
    -1,
    3,
    2**31,
    2**63,
    2**64,
    1.5,
    -0.0,
    1e308,
    [],
    [[]],
    {},
    {"a": None},
    ["demo-320"],
    *ODD_TEXTS,
)
ODD_TIMES = (
    "2020-01-01T00:00:00Z",
    "2999-01-01T00:00:00Z",
    "2999-01-01T00:00:00",
    "2999-01-01",
    "2020-01-01T00:00:00+23:59",
    "2020-01-01T00:00:00+24:00",
    "9999-12-31T23:59:59-23:59",
    "0001-01-01T00:00:00+23:59",
    "2999-13-01T00:00:00Z",
    "2999-02-30T00:00:00Z",
    "2999-01-01T24:00:00Z",
    "2999-01-01T00:00:60Z",
    "2999-W01-1",
    "20990101T000000Z",
    "now",
    "",
    "Z",
    "1700000000",
    "\uff12\uff10\uff12\uff10-01-01T00:00:00Z",
)


def dumps(value: Any) -> bytes:
    return json.dumps(value).encode()


def raw(value: Any) -> bytes:
    """JSON with its letters as they are, lone surrogates included."""
    return json.dumps(value, ensure_ascii=False).encode("utf-8", "surrogatepass")


def valid(**changes: Any) -> dict[str, Any]:
    """A command that is good but for the changes."""
    return {"id": "good", "command": "agent.info", "args": {}, **changes}


def _padded(size: int) -> bytes:
    """A good command of just so many bytes."""
    return dumps(valid()).ljust(size)


def _nested(levels: int, opening: bytes, closing: bytes) -> bytes:
    return opening * levels + closing * levels


def _in_args(value: bytes) -> bytes:
    return b'{"id":"deep","command":"agent.info","args":{"x":' + value + b"}}"


def _bytes() -> Iterator[tuple[str, bytes]]:
    good = dumps(valid())
    yield from {
        "empty": b"",
        "space": b" \t\r\n",
        "nul": b"\0",
        "nuls": bytes(1000),
        "ff": b"\xff" * 100,
        "invalid-utf8": b'{"id":"\xff\xfe","command":"agent.info"}',
        "invalid-utf8-in-args": b'{"id":"u","command":"agent.info","args":{"\xc3":1}}',
        "overlong-utf8": b'{"id":"\xc0\xaf","command":"agent.info"}',
        "surrogate-utf8": b'{"id":"\xed\xa0\x80","command":"agent.info"}',
        "cut-utf8": b'{"id":"\xf0\x9f\x98',
        "latin-1": '{"id":"\u00e9","command":"agent.info"}'.encode("latin-1"),
        "utf-16": good.decode().encode("utf-16"),
        "utf-32": good.decode().encode("utf-32"),
        "bom": b"\xef\xbb\xbf" + good,
        "nul-before": b"\0" + good,
        "nul-after": good + b"\0",
        "twice": good + good,
        "lines": good + b"\n" + good,
        "comma-after": good + b",",
        "cut": good[:-1],
        "at-the-limit": _padded(LIMIT),
        "over-the-limit": _padded(LIMIT + 1),
        "megabyte": _padded(1_000_000),
        "megabyte-of-id": dumps(valid(id="x" * 1_000_000)),
        "gzip": gzip.compress(good),
        "gzip-bomb": gzip.compress(bytes(10_000_000)),
        "msgpack": b"\x83\xa2id\xa1a\xa7command\xaaagent.info\xa4args\x80",
        "protobuf": b"\x0a\x01a\x12\x0aagent.info\x1a\x00",
        "cbor": b"\xa2bidaagcommandjagent.info",
        "bson": struct.pack("<i", 20) + b"\x02id\0\x02\0\0\0a\0\0",
        "pickle": b"\x80\x04\x95\x0c\x00\x00\x00\x00\x00\x00\x00\x8c\x02os\x94.",
        "xml": b'<?xml version="1.0"?><!DOCTYPE x [<!ENTITY a "a">]><id>&a;</id>',
        "http": b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
        "yaml": b"id: a\ncommand: agent.info\n",
        "mqtt": bytes.fromhex("101000044d515454050200000000036162 63".replace(" ", "")),
    }.items()


def _grammar() -> Iterator[tuple[str, bytes]]:
    yield from {
        "comment": b'{"id":"a", /* why */ "command":"agent.info"}',
        "line-comment": b'{"id":"a","command":"agent.info"} // now',
        "single-quotes": b"{'id':'a','command':'agent.info'}",
        "no-quotes": b'{id:"a",command:"agent.info"}',
        "trailing-comma": b'{"id":"a","command":"agent.info",}',
        "bare-newline": b'{"id":"a\nb","command":"agent.info"}',
        "bare-control": b'{"id":"a\x01b","command":"agent.info"}',
        "bad-escape": b'{"id":"\\x41","command":"agent.info"}',
        "short-escape": b'{"id":"\\u12","command":"agent.info"}',
        "lone-high-surrogate": b'{"id":"\\ud83d","command":"agent.info"}',
        "lone-low-surrogate": b'{"id":"\\ude00","command":"agent.info"}',
        "surrogates-swapped": b'{"id":"\\ude00\\ud83d","command":"agent.info"}',
        "surrogate-in-command": b'{"id":"a","command":"\\ud83d"}',
        "surrogate-in-args": b'{"id":"a","command":"model.show","args":{"name":"\\ud83d"}}',
        "escaped-keys": b'{"\\u0069d":"a","comm\\u0061nd":"agent.info"}',
        "duplicate-id": b'{"id":"a","id":"b","command":"agent.info"}',
        "duplicate-id-of-another-type": b'{"id":"a","id":3,"command":"agent.info"}',
        "duplicate-command": b'{"id":"a","command":"model.gc","command":"agent.info"}',
        "duplicate-args": b'{"id":"a","command":"agent.info","args":{"x":1},"args":{}}',
        "nan": _in_args(b"NaN"),
        "infinity": _in_args(b"-Infinity"),
        "overflow": _in_args(b"1e999"),
        "tiny": _in_args(b"1e-999"),
        "huge-exponent": _in_args(b"1e99999999999999999999"),
        "400-digits": _in_args(b"9" * 400),
        "5000-digits": _in_args(b"9" * 5000),
        "60000-digits": _in_args(b"9" * 60_000),
        "60000-decimals": _in_args(b"0." + b"9" * 60_000),
        "leading-zero": _in_args(b"007"),
        "plus": _in_args(b"+1"),
        "hex": _in_args(b"0x10"),
        "minus": _in_args(b"-"),
        "overflowing-timeout": b'{"id":"a","command":"camera.snapshot","args":{"camera":"a","timeout_s":1e999}}',
        "long-timeout": b'{"id":"a","command":"camera.snapshot","args":{"camera":"b","timeout_s":' + b"9" * 400 + b"}}",
        "many-keys": b"{" + b",".join(b'"k%d":0' % i for i in range(5000)) + b',"id":"a","command":"agent.info"}',
        "many-args": dumps(valid(args={f"k{i}": i for i in range(5000)})),
        "same-key-5000-times": b'{"id":"a","command":"agent.info","args":{' + b",".join([b'"k":0'] * 5000) + b"}}",
        "many-elements": _in_args(b"[" + b",".join([b"0"] * 30_000) + b"]"),
        "many-empty-objects": _in_args(b"[" + b",".join([b"{}"] * 20_000) + b"]"),
        "key-of-60000": b'{"id":"a","command":"agent.info","' + b"k" * 60_000 + b'":1}',
        "escapes-60000": b'{"id":"a","command":"agent.info","x":"' + b"\\u0000" * 10_000 + b'"}',
    }.items()
    for levels in (10, 100, 900, 1000, 1100, 5000, 30_000, 100_000):
        yield f"array-{levels}-deep", _nested(levels, b"[", b"]")
        yield f"array-{levels}-deep-and-open", b"[" * levels
        yield f"object-{levels}-deep", _nested(levels, b'{"a":', b"}").replace(b":}", b":0}", 1)
        yield f"args-{levels}-deep", _in_args(_nested(levels, b"[", b"]"))
        yield f"id-{levels}-deep", b'{"id":' + _nested(levels, b"[", b"]") + b',"command":"agent.info"}'
        yield f"unknown-{levels}-deep", b'{"id":"a","x":' + _nested(levels, b"[", b"]") + b',"command":"agent.info"}'


def _shapes() -> Iterator[tuple[str, bytes]]:
    for index, value in enumerate(ODD_VALUES):
        yield f"whole-{index}", dumps(value)
        for field in ("id", "command", "args", "expires_at", "device", "spread_s", "signed", "signature", "unknown"):
            yield f"{field}-{index}", dumps(valid(**{field: value}))
        yield f"signed-alone-{index}", dumps({"signed": value, "signature": "AA=="})
        yield f"signature-alone-{index}", dumps({"signed": json.dumps(valid()), "signature": value})
    for text in ODD_TEXTS[1:]:
        yield f"raw-id-{text[:20]!r}", raw(valid(id=text))
    for missing in ("id", "command", "args"):
        yield f"no-{missing}", dumps({key: value for key, value in valid().items() if key != missing})
    for size in (1, 127, 128, 129, 1000, 60_000, 100_000):
        yield f"id-of-{size}", dumps(valid(id="i" * size))
        yield f"command-of-{size}", dumps(valid(command="c" * size))
        yield f"name-of-{size}", dumps(valid(command="model.show", args={"name": "n" * size}))
        yield f"argument-of-{size}", dumps(valid(args={"n" * size: 1}))
        yield f"expires-at-of-{size}", dumps(valid(expires_at="9" * size))
    yield "emoji-id-of-128", raw(valid(id="\U0001f600" * 128))
    yield "unprintable-expires-at", raw(valid(expires_at="\U0010ffff" * 15_000))
    yield "unprintable-name", raw(valid(command="model.show", args={"name": "\U0010ffff" * 15_000}))
    yield "unprintable-argument", raw(valid(args={"\U0010ffff" * 15_000: 1}))
    yield "lone-surrogate-raw", raw(valid(id="\ud83d"))
    for name in (*NEAR_MISSES, *COMMANDS):
        yield f"command-{name!r}", dumps(valid(command=name))
        yield f"command-{name!r}-signed", dumps({"signed": json.dumps(valid(command=name)), "signature": "AA=="})
    for text in ODD_TIMES:
        yield f"expires-{text!r}", dumps(valid(expires_at=text))


def _arguments() -> Iterator[tuple[str, bytes]]:
    """Every field of every command's arguments, with every odd value; the other fields are good."""
    for name, entry in registered().items():
        fields = msgspec.structs.fields(entry.arguments)
        good = {field.encode_name: _good(name, field) for field in fields if field.required}
        yield f"{name}-good", dumps(valid(command=name, args=good))
        for field in fields:
            for index, value in enumerate((*ODD_VALUES, *NAMES, 1e305, -1e308, 10**400)):
                payload = dumps(valid(command=name, args={**good, field.encode_name: value}))
                yield f"{name}-{field.encode_name}-{index}", payload
            for levels in (100, 400, 900):
                deep = _nested(levels, b'{"a":', b"}").replace(b":}", b":0}", 1)
                whole = dumps(valid(command=name, args={**good, field.encode_name: "here"}))
                yield f"{name}-{field.encode_name}-{levels}-deep", whole.replace(b'"here"', deep)


def _good(command: str, field: Any) -> Any:
    """A value for a required field."""
    if field.name == "camera":
        return "new" if command == "camera.add" else "a"
    if field.type is str:
        return "demo-320"
    return {"source": "synthetic"} if "dict" in str(field.type) else [] if "list" in str(field.type) else 1


CORPUS: Mapping[str, bytes] = MappingProxyType(dict([*_bytes(), *_grammar(), *_shapes(), *_arguments()]))
"""Named payloads. A few are good commands in odd dress."""


def payloads() -> SearchStrategy[bytes]:
    """Payloads of every kind: noise, broken and odd JSON, commands wrong in one place or in none, and the corpus."""
    return st.one_of(
        st.binary(max_size=300),
        st.text(max_size=200).map(str.encode),
        _values().map(_compact),
        _commands().map(_compact),
        _commands().map(dumps),
        st.builds(_spaced, _commands(), st.text(" \t\r\n", max_size=5), st.text(" \t\r\n", max_size=5)),
        st.builds(_damaged, _commands().map(dumps), st.integers(0, 2**16), st.binary(max_size=3), st.booleans()),
        st.builds(_nested, st.integers(1, 20_000), st.sampled_from((b"[", b'{"a":', b'[{"":')), st.just(b"")),
        st.integers(1, 20_000).map(lambda levels: _in_args(_nested(levels, b"[", b"]"))),
        st.sampled_from(sorted(CORPUS)).map(lambda name: CORPUS[name]),
    )


def relatives(payload: bytes, count: int) -> Iterator[bytes]:
    """So many more of its kind, the same ones each time: one value of it is another or is gone, or where it is no JSON,
    one byte. They cost next to nothing beside one that is drawn."""
    chance = random.Random(payload)
    for _ in range(count):
        try:
            value = json.loads(payload)
            _change(value, chance)
            yield _compact(value)
        except (ValueError, RecursionError):
            at = chance.randrange(len(payload) + 1)
            yield payload[:at] + chance.randbytes(chance.randrange(2)) + payload[at + 1 :]


def _change(value: Any, chance: random.Random) -> None:
    places, inside = [], [value]
    while inside:
        outer = inside.pop()
        keys = list(outer) if isinstance(outer, dict) else range(len(outer)) if isinstance(outer, list) else []
        places += [(outer, key) for key in keys]
        inside += [outer[key] for key in keys]
    if not places:
        raise ValueError("nothing is inside")
    outer, key = chance.choice(places)
    if chance.random() < 0.3:
        del outer[key]
    else:
        outer[key] = chance.choice(ODD_VALUES)


def _texts() -> SearchStrategy[str]:
    return st.one_of(st.sampled_from(ODD_TEXTS), st.text(st.characters(), max_size=150))


def _values() -> SearchStrategy[Any]:
    leaves = st.one_of(st.sampled_from(ODD_VALUES), _texts(), st.floats(), st.integers(), st.integers(10**300, 10**400))
    return st.recursive(
        leaves, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(_texts(), inner, max_size=4), max_leaves=15
    )


def _commands() -> SearchStrategy[dict[str, Any]]:
    """Each field is good more often than not, so that what lies behind the first check is reached as well."""
    ids = st.one_of(st.text("abc-_.0123456789", min_size=1, max_size=128), st.integers().map(str), _values())
    times = st.one_of(
        st.sampled_from(ODD_TIMES), st.datetimes().map(lambda moment: moment.isoformat() + "Z"), _values()
    )
    around = {"expires_at": times, "extra": _values(), "device": st.sampled_from(("rig", "other", "", None, 3))}
    known = st.sampled_from(COMMANDS).flatmap(
        lambda name: st.fixed_dictionaries(
            {"id": ids, "command": st.just(name), "args": _arguments_of(name)}, optional=around
        )
    )
    anything = st.fixed_dictionaries(
        {},
        optional={"id": ids, "command": st.sampled_from(NEAR_MISSES) | _values(), "args": _values(), **around},
    )
    return known | anything


def _arguments_of(command: str) -> SearchStrategy[Any]:
    fields = msgspec.structs.fields(registered()[command].arguments)
    likely = st.one_of(st.sampled_from(NAMES), st.dictionaries(_texts(), _values(), max_size=3), _values())
    required = {field.encode_name: likely for field in fields if field.required}
    optional = {field.encode_name: likely for field in fields if not field.required}
    return st.fixed_dictionaries(required, optional=optional) | st.dictionaries(_texts(), _values(), max_size=3)


def _compact(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "surrogatepass")


def _spaced(value: Any, before: str, after: str) -> bytes:
    text = json.dumps(value, separators=(f"{before},{after}", f"{after}:{before}"))
    return f"{before}{text}{after}".encode()


def _damaged(payload: bytes, at: int, noise: bytes, cuts: bool) -> bytes:
    at %= len(payload) + 1
    return payload[:at] + noise + (b"" if cuts else payload[at + len(noise) :])
