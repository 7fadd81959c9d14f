"""The worker's side of the queue: claim, keep, finish, give back.

SECURITY: loaded by the worker (root). Writes the progress columns of `jobs`, and `applied`; trusts no row.

A claim is one autocommitted compare-and-set. `UNIQUE(host, running_lane)` is the lane's lock: the second claim in a
lane is a duplicate key, on SQLite and on every node of a Galera cluster alike (`SKIP LOCKED` is neither). Everything
after the claim carries the fence that the claim raised; when no row changes, the lease is lost and the work's outcome
is discarded.
"""

import random
from collections.abc import Collection, Sequence
from dataclasses import dataclass, fields
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import CursorResult, Executable, and_, delete, insert, literal, select, tuple_, update
from sqlalchemy.exc import DBAPIError, IntegrityError
from sqlalchemy.ext.asyncio import AsyncConnection

from app.db import Database, duplicate_of, is_busy
from app.models.jobs import JobState, applied, jobs

LEASE = timedelta(seconds=60)
"""How long a claim holds without a heartbeat."""

MAX_ATTEMPTS = 12
"""Enough to reach `MAX_BACKOFF`: about ten minutes. What takes longer to pass is for the sweep."""
MAX_BACKOFF = timedelta(minutes=5)
CANDIDATES = 100


@dataclass(frozen=True, slots=True)
class Claim:
    """A job that is ours until `LEASE` after the last heartbeat, and the fence that proves it."""

    id: int
    host: str
    lane: str
    kind: str
    subject_id: int
    version: int
    request_id: str
    attempts: int
    fence: int


@dataclass(frozen=True, slots=True)
class Outcome:
    """What the handler made true. Goes into `applied` in the same transaction that finishes the job."""

    version: int
    """The version that was read from the rows after the claim, not the one that the job names."""
    stands: bool
    proofs: dict[str, Any]
    result: dict[str, Any]


_CANDIDATE = [jobs.c[field.name] for field in fields(Claim)]
"""No timestamp is read: whoever inserts jobs may leave one that is no date, and no row may stop the others."""


class LeaseLost(Exception):
    """Another worker has the job by now. Stop; what was done is harmless, since handlers end in the same place."""


async def claim(database: Database, host: str, now: datetime, *, limit: int, kinds: Collection[str]) -> list[Claim]:
    """Takes up to `limit` jobs that are due, at most one a lane, oldest first.

    Lanes that are at work are left out of the candidates, so that ten thousand jobs of one lane starve nobody.
    """
    page = max(limit, CANDIDATES)
    busy = select(jobs.c.running_lane).where(jobs.c.host == host, jobs.c.state == JobState.RUNNING)
    due = (
        select(*_CANDIDATE)
        .where(
            jobs.c.host == host,
            jobs.c.state == JobState.READY,
            jobs.c.run_at <= now,
            jobs.c.kind.in_(sorted(kinds)),
            jobs.c.lane.not_in(busy),
        )
        .order_by(jobs.c.run_at, jobs.c.id)
        .limit(page)
    )
    claims: list[Claim] = []
    lanes: set[str] = set()
    async with database.read.connect() as connection:
        while len(claims) < limit:
            rows = (await connection.execute(due)).all()
            before = len(claims)
            for row in rows:
                if len(claims) == limit:
                    break
                if row.lane in lanes:
                    continue
                lanes.add(row.lane)
                if await _take(connection, row, now):
                    claims.append(Claim(**{**row._mapping, "attempts": row.attempts + 1, "fence": row.fence + 1}))
            # A full page may have held few lanes. Those that we took are busy now, so the next page shows others.
            if len(rows) < page or len(claims) == before:
                break
    return claims


async def _take(connection: AsyncConnection, row: Any, now: datetime) -> bool:
    compare_and_set = (
        update(jobs)
        .where(jobs.c.id == row.id, jobs.c.state == JobState.READY, jobs.c.fence == row.fence)
        .values(
            state=JobState.RUNNING,
            running_lane=row.lane,
            fence=row.fence + 1,
            attempts=row.attempts + 1,
            lease_until=now + LEASE,
        )
    )
    try:
        return await _changed(connection, compare_and_set) == 1
    except IntegrityError as error:
        if duplicate_of(error) is None:
            raise
        return False
    except DBAPIError as error:
        if not is_busy(error):
            raise
        return False


async def _changed(connection: AsyncConnection, statement: Executable) -> int:
    result: CursorResult[Any] = await connection.execute(statement)
    return result.rowcount


def _ours(claim: Claim) -> Any:
    return and_(jobs.c.id == claim.id, jobs.c.state == JobState.RUNNING, jobs.c.fence == claim.fence)


async def heartbeat(database: Database, claims: Sequence[Claim], now: datetime) -> list[Claim]:
    """Renews the leases and returns the claims that are lost."""
    if not claims:
        return []
    fences = [(claim.id, claim.fence) for claim in claims]
    held = and_(
        jobs.c.id.in_([claim.id for claim in claims]),  # for SQLite, which would scan the table for pairs
        tuple_(jobs.c.id, jobs.c.fence).in_(fences),
        jobs.c.state == JobState.RUNNING,
    )
    async with database.read.connect() as connection:
        await connection.execute(update(jobs).where(held).values(lease_until=now + LEASE))
        rows = await connection.execute(select(jobs.c.id).where(held))
        kept = set(rows.scalars())
    return [claim for claim in claims if claim.id not in kept]


async def finish(database: Database, claim: Claim, outcome: Outcome, now: datetime) -> None:
    """Done: the job, `applied`, and the older waiting jobs of the same subject, in one transaction. Or LeaseLost."""
    async with database.write.begin() as connection:
        await _end(connection, claim, JobState.DONE, None, now)
        await record(connection, claim.host, claim.kind, claim.subject_id, outcome, now)
        await connection.execute(
            update(jobs)
            .where(
                jobs.c.host == claim.host,
                jobs.c.kind == claim.kind,
                jobs.c.subject_id == claim.subject_id,
                jobs.c.state == JobState.READY,
                jobs.c.version <= outcome.version,
            )
            .values(state=JobState.SUPERSEDED, finished_at=now)
        )


async def give_up(database: Database, claim: Claim, error: str, now: datetime) -> None:
    """Dead: this cannot pass by waiting. A newer version, or a retry over HTTP, is a new job."""
    async with database.write.begin() as connection:
        await _end(connection, claim, JobState.DEAD, error, now)


async def retry(database: Database, claim: Claim, error: str, now: datetime, *, jitter: random.Random) -> JobState:
    """Back to ready, after a random part of a time that doubles up to five minutes; dead after `MAX_ATTEMPTS`."""
    if claim.attempts >= MAX_ATTEMPTS:
        await give_up(database, claim, f"{error} (gave up after {claim.attempts} attempts)", now)
        return JobState.DEAD
    again = (
        update(jobs)
        .where(_ours(claim))
        .values(
            state=JobState.READY,
            running_lane=None,
            lease_until=None,
            run_at=now + backoff(claim.attempts, jitter),
            error=_short(error),
        )
    )
    async with database.read.connect() as connection:
        if await _changed(connection, again) != 1:
            raise LeaseLost
    return JobState.READY


def backoff(attempts: int, jitter: random.Random) -> timedelta:
    """Full jitter: anything between nothing and half a second doubled by each attempt, at most `MAX_BACKOFF`."""
    ceiling = min(MAX_BACKOFF, timedelta(seconds=0.5) * 2**attempts)
    return timedelta(seconds=ceiling.total_seconds() * jitter.random())


async def _end(connection: AsyncConnection, claim: Claim, state: JobState, error: str | None, now: datetime) -> None:
    ended = (
        update(jobs)
        .where(_ours(claim))
        .values(state=state, running_lane=None, lease_until=None, error=_short(error), finished_at=now)
    )
    if await _changed(connection, ended) != 1:
        raise LeaseLost


def _short(error: str | None) -> str | None:
    """As the column takes it. A file's name in a message may hold what is no text (`surrogateescape`)."""
    return None if error is None else error.encode(errors="backslashreplace").decode()[:1000]


async def record(
    connection: AsyncConnection, host: str, kind: str, subject_id: int, outcome: Outcome, now: datetime
) -> None:
    """Writes `applied`; its version never falls, its revision rises with every write."""
    this = and_(applied.c.host == host, applied.c.kind == kind, applied.c.subject_id == subject_id)
    values = {"stands": outcome.stands, "proofs": outcome.proofs, "result": outcome.result, "applied_at": now}
    changed = await _changed(
        connection,
        update(applied)
        .where(this, applied.c.version <= outcome.version)
        .values(**values, version=outcome.version, revision=applied.c.revision + 1),
    )
    if changed:
        return
    # Either there is no row yet, or a newer version was made true meanwhile and this outcome is history.
    await connection.execute(
        insert(applied).from_select(
            ["host", "kind", "subject_id", "version", "stands", "revision", "proofs", "result", "applied_at"],
            select(
                literal(host, applied.c.host.type),
                literal(kind, applied.c.kind.type),
                literal(subject_id, applied.c.subject_id.type),
                literal(outcome.version),
                literal(outcome.stands),
                literal(1),
                literal(outcome.proofs, applied.c.proofs.type),
                literal(outcome.result, applied.c.result.type),
                literal(now, applied.c.applied_at.type),
            ).where(~select(applied.c.version).where(this).exists()),
        )
    )


async def take_back(database: Database, host: str, now: datetime, *, all_running: bool = False) -> int:
    """Gives back the jobs whose lease has ended; with `all_running` (at the start, under the flock) all of this host.

    The fence rises, so whoever still works on one can finish nothing. A job that was tried too often is dead instead:
    it has most likely killed its worker each time.
    """
    taken = and_(jobs.c.host == host, jobs.c.state == JobState.RUNNING)
    if not all_running:
        taken = and_(taken, jobs.c.lease_until < now)
    freed = {"running_lane": None, "lease_until": None, "fence": jobs.c.fence + 1}
    message = f"gave up after {MAX_ATTEMPTS} attempts: the worker ended while at work on it"
    async with database.write.begin() as connection:
        poison = (
            update(jobs)
            .where(taken, jobs.c.attempts >= MAX_ATTEMPTS)
            .values(**freed, state=JobState.DEAD, error=message, finished_at=now)
        )
        others = update(jobs).where(taken).values(**freed, state=JobState.READY, run_at=now)
        return await _changed(connection, poison) + await _changed(connection, others)


async def prune(database: Database, before: datetime, *, limit: int = 500) -> int:
    """Deletes up to `limit` jobs that ended before then, by primary key, so that no lock spreads."""
    async with database.read.connect() as connection:
        old = await connection.execute(
            select(jobs.c.id).where(jobs.c.finished_at < before).order_by(jobs.c.finished_at).limit(limit)
        )
        ids = list(old.scalars())
        if not ids:
            return 0
        return await _changed(connection, delete(jobs).where(jobs.c.id.in_(ids)))
