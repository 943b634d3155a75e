"""How long to wait before trying again."""

from __future__ import annotations

import random
from collections.abc import Iterator


def backoff(*, first_s: float = 1.0, most_s: float = 30.0) -> Iterator[float]:
    """Seconds to wait before each next attempt: a ceiling that doubles, and a random share of it.

    The first wait is `first_s` at most; the jitter (half to all of the ceiling) keeps a fleet from
    knocking at one door in step.
    """
    ceiling = first_s
    while True:
        yield ceiling * random.uniform(0.5, 1.0)
        ceiling = min(most_s, ceiling * 2)
