"""What the URL of a network camera must look like."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from urllib.parse import urlsplit


def problems(url: str, schemes: Collection[str]) -> Sequence[str]:
    """A sentence if `url` names no host by one of these schemes, or a port that cannot be."""
    try:
        parts = urlsplit(url)
        usable = parts.scheme in schemes and bool(parts.hostname) and parts.port != 0
    except ValueError:
        usable = False
    plain, secure = sorted(schemes)
    return [] if usable else [f"url: not of the form {plain}://host[:port]/path or {secure}://…"]
