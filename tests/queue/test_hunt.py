"""Many processes on one queue: every job is claimed once, and no lane by two at a time.

So that this means something, the same hunt with a careless claim, which reads and then writes, has to catch it."""

import json
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from itertools import pairwise

import pytest
from sqlalchemy import func, insert, select

from app.db import Database, utc_now
from app.models.jobs import applied, jobs
from app.queue.contracts import MAILBOX_SYNC
from tests.conftest import HOST, TestDatabase
from tests.queue.hunter import SECONDS

pytestmark = pytest.mark.asyncio


@dataclass
class Hunt:
    claims: list[tuple[int, int]]
    held: list[tuple[str, float, float]]
    lost: int

    @property
    def twice(self) -> int:
        """Claims of a job that was claimed already."""
        return len(self.claims) - len({job_id for job_id, _ in self.claims})

    @property
    def overlaps(self) -> int:
        """How often a lane was entered before it was left."""
        by_lane = sorted(self.held)
        return sum(one[0] == next_[0] and next_[1] < one[2] for one, next_ in pairwise(by_lane))


def hunt(test_database: TestDatabase, how: str) -> Hunt:
    done = subprocess.run(
        [sys.executable, "-m", "tests.queue.hunter"],
        input=f"{test_database.url('worker')} {HOST} {how}\n",
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        timeout=SECONDS + 10,
    )
    reports = json.loads(done.stdout)
    return Hunt(
        [(job_id, fence) for report in reports for job_id, fence in report["claimed"]],
        [(lane, began, ended) for report in reports for lane, began, ended in report["held"]],
        sum(report["lost"] for report in reports),
    )


async def add(database: Database, count: int, lanes: int) -> None:
    now = utc_now()  # the hunters have the real clock
    rows = [
        {
            "host": HOST,
            "lane": f"{n % lanes}@cacert.test",
            "kind": MAILBOX_SYNC,
            "subject_id": n,
            "version": 1,
            "request_id": "request",
            "run_at": now,
            "created_at": now,
        }
        for n in range(count)
    ]
    async with database.write.begin() as connection:
        await connection.execute(insert(jobs), rows)


async def ended(database: Database) -> tuple[Counter[tuple[str, int, int]], int]:
    """How many jobs have which state, fence and attempts; how many subjects were written once."""
    async with database.read.connect() as connection:
        rows = (await connection.execute(select(jobs.c.state, jobs.c.fence, jobs.c.attempts))).all()
        once = await connection.execute(select(func.count()).select_from(applied).where(applied.c.revision == 1))
        return Counter(tuple(row) for row in rows), once.scalar_one()


@pytest.mark.parametrize("how", ["careful", "careless"])
async def test_every_job_is_claimed_once(test_database: TestDatabase, database: Database, how: str) -> None:
    await add(database, 5000, lanes=5000)
    found = hunt(test_database, how)
    assert len(found.claims) - found.twice == 5000
    if how == "careless":
        assert found.twice > 0
    else:
        assert (found.twice, found.lost) == (0, 0)
        assert {fence for _, fence in found.claims} == {1}
        assert await ended(database) == (Counter({("done", 1, 1): 5000}), 5000)


@pytest.mark.parametrize("how", ["careful", "careless"])
async def test_no_lane_is_entered_twice(test_database: TestDatabase, database: Database, how: str) -> None:
    await add(database, 300, lanes=15)
    found = hunt(test_database, how)
    assert len(found.claims) - found.twice == 300
    if how == "careless":
        assert found.overlaps > 0
    else:
        assert (found.twice, found.overlaps, found.lost) == (0, 0, 0)
