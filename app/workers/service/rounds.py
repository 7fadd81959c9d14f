"""Work that goes on beside the service's loop, which a name server that does not answer must not hold up."""

import asyncio
from collections.abc import Awaitable, Callable

from app.db import end_tasks
from app.log import log


class Rounds:
    """One round at a time; one that fails is told as `event`, and the next one tries again."""

    def __init__(self, go_round: Callable[[], Awaitable[None]], event: str) -> None:
        self._go_round = go_round
        self._event = event
        self._task: asyncio.Task[None] | None = None

    def begin(self) -> None:
        """Unless one is going on."""
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._guarded())

    async def close(self) -> None:
        if self._task is not None:
            await end_tasks(self._task)

    async def _guarded(self) -> None:
        try:
            await self._go_round()
        except Exception as error:  # the loop beside says when the database is away
            log.warning(self._event, kind=type(error).__name__, error=str(error)[:200])
