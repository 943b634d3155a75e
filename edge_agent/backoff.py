"""How long to wait before trying again."""

from __future__ import annotations

import random
from collections.abc import Iterator

_LEAST_S = 0.05


def backoff(*, first_s: float = 1.0, most_s: float = 30.0) -> Iterator[float]:
    """Seconds to wait before each next attempt: any share of a ceiling that doubles ("full jitter").

    The jitter keeps a fleet from knocking at one door in step:
    https://aws.amazon.com/blogs/architecture/exponential-backoff-and-jitter/
    """
    ceiling = min(first_s, most_s)
    while True:
        yield max(_LEAST_S, random.uniform(0.0, ceiling))
        ceiling = min(most_s, ceiling * 2)
