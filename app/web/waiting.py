"""`Prefer: wait=N` (RFC 7240): one poller a process asks for all awaited jobs at once, so a waiter holds no connection."""

import asyncio
import contextlib

from sqlalchemy import select
from starlette.requests import Request

from app.db import Database, end_tasks
from app.log import log
from app.models.jobs import JobState, jobs

LONGEST_WAIT = 30
POLL_SECONDS = 0.008
LONGEST_PAUSE = 0.25
SLOWER = 1.05
"""From poll to poll, while nothing ends."""


def seconds_to_wait(request: Request) -> int:
    """The seconds that the caller prefers, at most LONGEST_WAIT; 0 without a preference that can be read."""
    for preference in ",".join(request.headers.getlist("prefer")).replace(";", ",").split(","):
        name, _, value = preference.partition("=")
        digits = value.strip().strip('"')
        if name.strip().lower() == "wait" and digits.isascii() and digits.isdigit():
            return min(int(digits.lstrip("0")[:6] or "0"), LONGEST_WAIT)
    return 0


class JobWaiter:
    """Polls only while somebody waits."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._awaited: dict[int, list[asyncio.Future[None]]] = {}
        self._poller: asyncio.Task[None] | None = None
        self._newcomer = asyncio.Event()

    async def wait(self, job_id: int, seconds: float) -> None:
        """Returns when the job has ended, whichever way, or after so many seconds."""
        future = asyncio.get_running_loop().create_future()
        self._awaited.setdefault(job_id, []).append(future)
        self._newcomer.set()
        if self._poller is None or self._poller.done():
            self._poller = asyncio.create_task(self._poll())
        try:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(future, seconds)
        finally:
            waiters = self._awaited.get(job_id, [])
            if future in waiters:
                waiters.remove(future)
            if not waiters:
                self._awaited.pop(job_id, None)

    async def _poll(self) -> None:
        pause = POLL_SECONDS
        while self._awaited:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._newcomer.wait(), pause)
            if self._newcomer.is_set():
                # A job that is stuck does not slow down whoever came last; nor do many who come one by one hurry us.
                self._newcomer.clear()
                pause = POLL_SECONDS
                await asyncio.sleep(pause)
            wanted = list(self._awaited)
            try:
                async with self._database.read.connect() as connection:
                    rows = await connection.execute(
                        select(jobs.c.id).where(
                            jobs.c.id.in_(wanted), jobs.c.state.not_in((JobState.READY, JobState.RUNNING))
                        )
                    )
                    ended = list(rows.scalars())
            except Exception as error:  # the waiters only wait on: each has a time limit of its own
                log.warning("wait_poll_failed", kind=type(error).__name__)
                await asyncio.sleep(0.5)
                continue
            # A job that waits for its next attempt is asked for less often.
            pause = POLL_SECONDS if ended else min(LONGEST_PAUSE, pause * SLOWER)
            for job_id in ended:
                for future in self._awaited.pop(job_id, []):
                    if not future.done():
                        future.set_result(None)

    async def close(self) -> None:
        if self._poller is not None:
            await end_tasks(self._poller)
