"""Arguments of a command, typed and checked by the JSON Schema that the agent gives of them.

Knows as much of JSON Schema as `commands.list` uses; what it does not know is left to the agent.
"""

from __future__ import annotations

import json
import operator
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from edge_agent import plugins

Schema = Mapping[str, Any]

_TYPES: Mapping[str, tuple[type, ...]] = {
    "string": (str,),
    "integer": (int,),
    "number": (int, float),
    "boolean": (bool,),
    "array": (list,),
    "object": (dict,),
    "null": (type(None),),
}
_ARTICLES = {"string": "text", "integer": "a whole number", "number": "a number", "boolean": "true or false"}
_MORE = {"array": "a list", "object": "a table", "null": "null"}

_LIMITS: Sequence[tuple[str, str, Callable[[Any, Any], bool]]] = (
    ("minimum", "at least", operator.ge),
    ("exclusiveMinimum", "more than", operator.gt),
    ("maximum", "at most", operator.le),
    ("exclusiveMaximum", "less than", operator.lt),
)


def typed(pairs: Sequence[tuple[str, str]], schema: Schema | None) -> dict[str, Any]:
    """What the texts of `key=value` mean. A key with dots goes into a table: `options.fps=5`; values are JSON, else
    text, and text alone where the schema says so."""
    values: dict[str, Any] = {}
    for key, text in pairs:
        head, *path = key.split(".")
        part = _property(schema, head, schema)
        if not path:
            values[key] = _value(text, part, schema)
            continue
        table = values.setdefault(head, {})
        for name in path[:-1]:
            table = table.setdefault(name, {}) if isinstance(table, dict) else {}
        if isinstance(table, dict):
            table[path[-1]] = _value(text, None, schema)
    return values


def problems(value: Any, schema: Schema, *, at: str = "", root: Schema | None = None) -> Iterator[str]:
    """A sentence for each thing that keeps `value` from what the schema asks for."""
    root = schema if root is None else root
    schema = _resolved(schema, root)
    if choices := schema.get("anyOf"):
        found = [list(problems(value, choice, at=at, root=root)) for choice in choices]
        if all(found):
            yield from min(found, key=lambda one: _is_about_type(one[0]))
        return
    if (allowed := schema.get("enum")) is not None and not any(_same(value, one) for one in allowed):
        names = [str(one) for one in allowed]
        hint = plugins.nearest(str(value), names, listing=False)
        yield f"{at}: {_shown(value)} is not one of {', '.join(names)}{hint}"
        return
    kinds = schema.get("type", ())
    kinds = [kinds] if isinstance(kinds, str) else kinds
    if kinds and not any(_is(value, kind) for kind in kinds):
        yield f"{at or 'the arguments'}: {_shown(value)} is not {' or '.join(_named(kind) for kind in kinds)}"
        return
    yield from _bounds(value, schema, at)
    if isinstance(value, list):
        yield from _items(value, schema, at, root)
    elif isinstance(value, dict):
        yield from _keys(value, schema, at, root)


def names(schema: Schema | None) -> Sequence[str]:
    """The arguments there are."""
    return list((schema or {}).get("properties", ()))


def choices(schema: Schema | None, key: str) -> Sequence[str]:
    """The values that an argument can have, where they can be counted."""
    part = _property(schema, key, schema)
    found: list[str] = []
    for one in _alternatives(part, schema or {}):
        found += [str(value) for value in one.get("enum", ())]
        found += ["true", "false"] if one.get("type") == "boolean" else []
    return found


def _property(schema: Schema | None, key: str, root: Schema | None) -> Schema | None:
    if schema is None or root is None:
        return None
    part = schema.get("properties", {}).get(key)
    return None if part is None else _resolved(part, root)


def _alternatives(part: Schema | None, root: Schema) -> Sequence[Schema]:
    if part is None:
        return []
    return [_resolved(one, root) for one in part.get("anyOf", [part])]


def _value(text: str, part: Schema | None, root: Schema | None) -> Any:
    alternatives = _alternatives(part, root or {})
    kinds = {str(one.get("type", "string" if "enum" in one else "")) for one in alternatives}
    if kinds and kinds <= {"string", "null"}:
        return None if text == "null" and "null" in kinds else text
    try:
        return json.loads(text, parse_constant=lambda word: word)
    except (json.JSONDecodeError, RecursionError):
        pass
    if "array" in kinds and text:
        return text.split(",")
    return text


def _resolved(schema: Schema, root: Schema) -> Schema:
    for _ in range(8):
        reference = schema.get("$ref", "")
        if not reference.startswith("#/$defs/"):
            return schema
        schema = root.get("$defs", {}).get(reference.removeprefix("#/$defs/"), {})
    return schema


def _is(value: Any, kind: str) -> bool:
    if isinstance(value, bool):
        return kind == "boolean"
    if kind == "integer" and isinstance(value, float):
        return value.is_integer()
    return isinstance(value, _TYPES.get(kind, (object,)))


def _same(value: Any, allowed: Any) -> bool:
    return bool(value == allowed) and isinstance(value, bool) == isinstance(allowed, bool)


def _is_about_type(sentence: str) -> bool:
    return any(sentence.endswith(f" is not {words}") for words in (*_ARTICLES.values(), *_MORE.values()))


def _bounds(value: Any, schema: Schema, at: str) -> Iterator[str]:
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        for key, words, is_in in _LIMITS:
            if key in schema and not is_in(value, schema[key]):
                yield f"{at}: {value:g} is not {words} {schema[key]:g}"
    if isinstance(value, str):
        if len(value) < schema.get("minLength", 0) or len(value) > schema.get("maxLength", len(value)):
            yield f"{at}: {_shown(value)} has {len(value)} characters, which is too few or too many"
        elif (pattern := schema.get("pattern")) and not re.search(pattern, value):
            yield f"{at}: {_shown(value)} is not of the form {pattern}"


def _items(value: list[Any], schema: Schema, at: str, root: Schema) -> Iterator[str]:
    if len(value) < schema.get("minItems", 0) or len(value) > schema.get("maxItems", len(value)):
        yield f"{at}: a list of {len(value)} is too short or too long"
    first = schema.get("prefixItems", [])
    rest = schema.get("items", True)
    if rest is False and len(value) > len(first):
        yield f"{at}: a list of {len(value)} is too long"
    for index, item in enumerate(value):
        inner = first[index] if index < len(first) else rest
        if isinstance(inner, Mapping):
            yield from problems(item, inner, at=f"{at}[{index}]", root=root)


def _keys(value: dict[str, Any], schema: Schema, at: str, root: Schema) -> Iterator[str]:
    known, others = schema.get("properties", {}), schema.get("additionalProperties", True)
    for key in schema.get("required", ()):
        if key not in value:
            yield f"{_at(at, key)} is missing"
    for key, item in value.items():
        if key in known:
            yield from problems(item, known[key], at=_at(at, key), root=root)
        elif others is False:
            listed = plugins.nearest(key, list(known))
            yield f"{_at(at, key)}: there is no such argument{listed or '; it takes none'}"
        elif isinstance(others, Mapping):
            yield from problems(item, others, at=_at(at, key), root=root)


def _at(path: str, key: str) -> str:
    return f"{path}.{key}" if path else key


def _named(kind: str) -> str:
    return _ARTICLES.get(kind) or _MORE.get(kind, kind)


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False) if not isinstance(value, str) else repr(value)
    return text if len(text) <= 60 else text[:57] + "…"
