"""The processes of the hunt: each claims and finishes until nothing is ready.

Its orders come on one line of stdin: database, host, and which claim to hunt with. Prints what each of them did, as
JSON.
"""

import asyncio
import json
import multiprocessing
import random
import sys
import time
from datetime import datetime
from typing import Any

from sqlalchemy import func, select, update
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncConnection

from app.db import Database, is_busy, utc_now
from app.models.jobs import JobState, jobs
from app.queue import claim as queue
from app.queue.contracts import MAILBOX_SYNC

LIMIT = 20
PROCESSES = 6
SECONDS = 300
"""Then they give up, whoever started them."""
FORK = multiprocessing.get_context("fork")  # what takes long is the import, and there is no thread yet
START = FORK.Barrier(PROCESSES)


async def careless_take(connection: AsyncConnection, row: Any, now: datetime) -> bool:
    """Read, then write: asks whether it is ready just before it takes it, and compares nothing when it does. Nor has
    this claim a key that locks the lane; that no other job of the lane is running was read with the candidates."""
    state = (await connection.execute(select(jobs.c.state).where(jobs.c.id == row.id))).scalar_one()
    if state != JobState.READY:
        return False
    taken = (
        update(jobs)
        .where(jobs.c.id == row.id)
        .values(
            state=JobState.RUNNING,
            running_lane=str(random.getrandbits(64)),
            fence=row.fence + 1,
            attempts=row.attempts + 1,
            lease_until=now + queue.LEASE,
        )
    )
    try:
        await connection.execute(taken)
    except DBAPIError as error:
        if not is_busy(error):
            raise
        return False
    return True


async def hunt(url: str, host: str) -> dict[str, Any]:
    database = Database(url, pool_size=2)
    async with database.read.connect(), database.write.connect():
        START.wait(SECONDS)
    claimed: list[tuple[int, int]] = []  # id and fence
    held: list[tuple[str, float, float]] = []  # a lane, and from when to when it was surely ours
    counts = {"lost": 0, "busy": 0}
    ready = select(func.count()).where(jobs.c.host == host, jobs.c.state == JobState.READY)
    while True:
        claims = await queue.claim(database, host, utc_now(), limit=LIMIT, kinds=[MAILBOX_SYNC])
        began = time.monotonic()
        if not claims:
            async with database.read.connect() as connection:
                left = (await connection.execute(ready)).scalar_one()
            if not left:
                break
        for claim in claims:
            claimed.append((claim.id, claim.fence))
            held.append((claim.lane, began, time.monotonic()))
            await finish(database, claim, counts)
    await database.close()
    return {"claimed": claimed, "held": held, **counts}


async def finish(database: Database, claim: queue.Claim, counts: dict[str, int]) -> None:
    outcome = queue.Outcome(claim.version, True, {}, {})
    while True:
        try:
            return await queue.finish(database, claim, outcome, utc_now())
        except queue.LeaseLost:
            counts["lost"] += 1
            return None
        except DBAPIError as error:
            if not is_busy(error):
                raise
            counts["busy"] += 1


def run(url: str, host: str, how: str) -> dict[str, Any]:
    if how == "careless":
        queue._take = careless_take
    return asyncio.run(asyncio.wait_for(hunt(url, host), SECONDS))


def main() -> None:
    orders = sys.stdin.readline().split()
    with FORK.Pool(PROCESSES) as pool:
        print(json.dumps(pool.starmap(run, [orders] * PROCESSES, chunksize=1)))


if __name__ == "__main__":
    main()
