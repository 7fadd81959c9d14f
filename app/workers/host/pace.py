"""How often the alias file is made anew.

SECURITY: loaded by the worker (root). Reads a clock.
"""

import asyncio

MANY = 50
"""Jobs in one run from which on the next run waits longer."""
SHORTEST, LONGEST = 1.0, 8.0
"""Seconds from the beginning of one run to that of the next, at least."""


class Pace:
    """When the next run may begin: at once when all was quiet, later and later in a burst.

    Ten thousand changes cost a few runs so, each for hundreds of them. Seconds are those of the loop's clock.
    """

    def __init__(self) -> None:
        self._began: float | None = None
        self._pause = SHORTEST

    def seconds_left(self, now: float) -> float:
        return 0.0 if self._began is None else max(0.0, self._began + self._pause - now)

    def begin(self, now: float, count: int) -> None:
        """A run for so many begins."""
        if self._began is None or now > self._began + self._pause + SHORTEST:
            self._pause = SHORTEST
        self._pause = SHORTEST if count < MANY else min(LONGEST, self._pause * 2)
        self._began = now

    async def wait(self, stopping: asyncio.Event) -> None:
        """Until the next run may begin, or the worker is told to end: what was begun is then done without delay."""
        left = self.seconds_left(asyncio.get_running_loop().time())
        if left > 0:
            stopped = asyncio.create_task(stopping.wait())
            try:
                await asyncio.wait([stopped], timeout=left)
            finally:
                stopped.cancel()
