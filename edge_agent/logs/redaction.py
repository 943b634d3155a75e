"""Credentials out of what is logged: by the names of fields, and by how they look inside any text.

Hidden are the values of fields such as `password`, `token` or `api_key` (`is_secret`), and in every text: what stands
between a URL's `user:` and its `@`, parameters such as `?token=`, assignments such as `user-pw=`, options such as
`--password `, entries such as `"password": `, and the rest of a line after `password: ` or in headers such as
`Cookie`. In doubt too much is hidden: a password may hold any sign, quoted or not.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

HIDDEN = "***"
_DEEPEST = 8
_NAME = (
    r"(?:password|passwd|passphrase|passcode|pwd|psw|loginpass?|user[-_]pw|secret|token|credentials?|cookie|authorization"
    r"|(?:api|access|private|secret|auth)[-_]?key)"
)
_FIELD = re.compile(rf"(?:.*_)?(?:{_NAME}|pw|bearer)")
_WORD = re.compile(r"(?<=[a-z0-9])(?=[A-Z])")
_SCHEME = re.compile(
    r"[A-Za-z][A-Za-z0-9+.-]{0,30}://"
    r"|(?i:\b(?:https?|rtsps?|rtmps?|mqtts?|wss?|ftps?|srt|tcp|udp):/)"  # what becomes of it in a path
)
_NEXT_URL = re.compile(r"[\s,;'\"(\[<][A-Za-z][A-Za-z0-9+.-]{0,30}://")
_AUTHORITY = re.compile(r"(\[[^\]\s]*\]|[^\s/?#:\[]*)(:?)[^\s/?#]*")
_PORT = re.compile(r"\d+(?![^\s/?#:,;'\"<>()\[\]{}|\\.])|(?=\s|$)")  # or a colon of the sentence around it
_RUN = re.compile(r"\S*")
_QUOTED = r"""b?"(?:[^"\\\n]|\\.)*"?|b?'(?:[^'\\\n]|\\.)*'?"""
_ESCAPED = r"""(?P<esc>\\+)(?P<quote>["'])(?:[^\n]*?(?<!\\)(?P=esc)(?P=quote)|[^\n]*)"""  # an entry in a text in JSON
_ENTRY = re.compile(rf"""(?i)(["'](?:[\w-]*[_-])?{_NAME}\\*["']\s*:\s*)(?:{_ESCAPED}|{_QUOTED}|[^\s,}}\]]+)""")
# Not in quotes it may hold blanks: it ends before another parameter or assignment, or the next part of a pipeline.
_BARE = r"[^\n&]+?(?=&|\s{1,3}[!|]\s|[\s,;]{1,3}[\w.-]{1,40}[ \t]?=|$)"
_ASSIGNMENT = re.compile(rf"""(?im)({_NAME}[ \t]*=[ \t]*)(?:{_QUOTED}|{_BARE})""")
_OPTION = re.compile(rf"""(?i)(--[\w-]{{0,40}}{_NAME}[ \t]+)(?:{_QUOTED}|\S+)""")
_PARAMETER = re.compile(r"(?i)([?&;](?:key|pass|auth|sig|signature|x-amz-(?:signature|credential))=)[^\s&]+")
_HEADER = re.compile(r"(?i)(authorization[\"']?\s*[:=]\s*)[^\s*][^\n]*")
# Not our own sentences: `mqtt.password: expected …`, `cannot read the secret: …`, `token: unknown key`
_LINE = re.compile(
    rf"(?i)((?<!\.)(?<!the )(?:{_NAME}|\bbearer)[ \t]*:(?!//|[ \t]*unknown key\b)[ \t]*)(?=[^\n]*\S)[^\n]+"
)
_BEARER = re.compile(r"(?i)(\bbearer\s+)[A-Za-z0-9._~+/=-]{8,}")


def is_secret(name: str) -> bool:
    """Whether a field of this name holds a credential; `password_file`, `public_key` and `token_count` do not."""
    return _FIELD.fullmatch(_WORD.sub("_", name).lower().replace("-", "_")) is not None


def redacted(value: Any, *, depth: int = 0) -> Any:
    """`value` without credentials, whatever it holds; objects become their `repr`, so that none comes in later."""
    if value is None or isinstance(value, (bool, int, float)):
        return value
    if isinstance(value, str):
        return redacted_text(value)
    if depth > _DEEPEST:
        return "…"
    if isinstance(value, Mapping):
        return {_key(key): _field(key, inner, depth + 1) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [redacted(inner, depth=depth + 1) for inner in value]
    return redacted_text(repr(value))


def redacted_text(text: str) -> str:
    """`text` with `***` in the places of credentials."""
    if ":/" in text:
        text = "\n".join(map(_without_logins, text.split("\n")))
    for pattern in (_HEADER, _LINE, _BEARER, _ENTRY, _ASSIGNMENT, _OPTION, _PARAMETER):
        text = pattern.sub(rf"\1{HIDDEN}", text)
    return text


def _key(key: object) -> str:
    return redacted_text(key if isinstance(key, str) else repr(key))


def _field(key: object, value: Any, depth: int) -> Any:
    is_empty = value is None or isinstance(value, bool) or (isinstance(value, str) and not value)
    if isinstance(key, str) and is_secret(key) and not is_empty:
        return HIDDEN
    return redacted(value, depth=depth)


def _without_logins(line: str) -> str:
    """A line of text with the logins of its URLs hidden."""
    done, at = "", 0
    while (scheme := _SCHEME.search(line, at)) is not None:
        start, end = _login(line, scheme.end())
        done += line[at:start] + (HIDDEN if end > start else "")
        at = end
    return done + line[at:]


def _login(line: str, at: int) -> tuple[int, int]:
    """What to hide of the URL whose host, or user, begins at `at`. The last `@` counts, however far it is: a password
    may hold `/`, blanks and whole URLs. Only after what looks like a port is a next URL one of its own."""
    authority = _AUTHORITY.match(line, at)
    assert authority is not None  # every part of it may be empty
    colon = authority.end(2)
    if not authority[2] or "@" in authority[1]:  # no password, but what comes before the `@` may be a token
        return at, max(at, line.rfind("@", at, authority.end()))
    is_port = _PORT.match(line, colon) is not None
    following = _NEXT_URL.search(line, colon) if is_port else None
    end = line.rfind("@", colon, following.start() if following else len(line))
    if end < 0 and not is_port and (cut_off := _RUN.match(line, colon)):
        end = cut_off.end()
    return colon, max(colon, end)
