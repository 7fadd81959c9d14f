"""Answers that were made a moment ago, for reads that come again and again."""

import time
from collections import OrderedDict
from collections.abc import Callable
from typing import NamedTuple

SECONDS = 1.0
"""So old an answer may be."""
MOST = 20_000


class Made(NamedTuple):
    tag: str
    body: bytes


class Recent:
    """Of one process. Every key must hold all that the answer depends on; what the caller may see is checked before."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._made: OrderedDict[str, tuple[float, Made]] = OrderedDict()

    def get(self, key: str) -> Made | None:
        found = self._made.get(key)
        if found is None or self._clock() - found[0] > SECONDS:
            return None
        return found[1]

    def put(self, key: str, made: Made, read_at: float) -> None:
        """`read_at`: before it was read, since what is read later may be newer."""
        self._made[key] = read_at, made
        self._made.move_to_end(key)
        if len(self._made) > MOST:
            self._made.popitem(last=False)

    def now(self) -> float:
        return self._clock()
