"""The worker's side of the queue, and the service process's: claim, keep, finish, give back.

SECURITY: loaded by the worker (root). Writes the progress columns of `jobs`, and `applied`; trusts no row.

A claim is one autocommitted compare-and-set. `UNIQUE(host, running_lane)` is the lane's lock: the second claim in a
lane is a duplicate key, on SQLite and on every node of a Galera cluster alike (`SKIP LOCKED` is neither). Everything
after the claim carries the fence that the claim raised; when no row changes, the lease is lost and the work's outcome
is discarded.
"""

import random
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import (
    CursorResult,
    Executable,
    and_,
    bindparam,
    delete,
    func,
    insert,
    literal,
    literal_column,
    select,
    tuple_,
    update,
)
from sqlalchemy.dialects import mysql, sqlite
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

BATCH_MOST = 20_000
"""Waiting jobs that one run ends at most; the next run ends the rest."""
BATCH_STEP = 500
"""Subjects that are written in one transaction, so that none holds its locks for long."""


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


@dataclass(frozen=True, slots=True)
class Waiting:
    """A ready job that one run may end together with the claimed one."""

    id: int
    subject_id: int
    version: int
    attempts: int


@dataclass(frozen=True, slots=True)
class End:
    """What one run made true of one subject, and the waiting jobs that end by it."""

    subject_id: int
    outcome: Outcome | None
    """None: `applied` stays as it is."""
    jobs: Sequence[Waiting] = ()
    error: str | None = None
    """Why it was not made true. Its jobs are tried again, or are dead if it is `final`."""
    final: bool = False


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
        await end_job(connection, claim, JobState.DONE, None, now)
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


async def waiting(database: Database, host: str, kind: str) -> list[Waiting]:
    """The ready jobs of a kind, due or not: a job that waits to be tried again is done too when its subject is.

    Whoever reads the rows after this may end exactly these jobs: what they asked for was committed before.
    """
    query = (
        select(*(jobs.c[field.name] for field in fields(Waiting)))
        .where(jobs.c.host == host, jobs.c.state == JobState.READY, jobs.c.kind == kind)
        .order_by(jobs.c.id)
        .limit(BATCH_MOST)
    )
    async with database.read.connect() as connection:
        return [Waiting(**row._mapping) for row in await connection.execute(query)]


async def finish_batch(
    database: Database, claim: Claim, ends: Sequence[End], now: datetime, *, jitter: random.Random
) -> JobState:
    """For lanes that many subjects share: ends the claimed job and all waiting ones that one run did for.

    `ends` has the claimed job's subject. A waiting job becomes `done`, or `superseded` when a newer version was made
    true than it asked for. Returns the claimed job's state; raises LeaseLost.

    A batch of up to `BATCH_STEP` subjects is one transaction. A larger one is several, each with `applied` and jobs of
    its subjects, and the claimed job in the last. Cut off between two, the rest of the jobs is ready still and the
    claimed one is taken back, so that the next run does for them.
    """
    (own,) = (end for end in ends if end.subject_id == claim.subject_id)
    ordered = [*(end for end in ends if end is not own), own]
    state = JobState.DONE if own.error is None else _failed_state(own, claim.attempts)
    for start in range(0, len(ordered), BATCH_STEP):
        step = ordered[start : start + BATCH_STEP]
        async with database.write.begin() as connection:
            if step[-1] is not own:
                # The fence, as in every transaction that writes for this claim.
                if await _changed(connection, update(jobs).where(_ours(claim)).values(lease_until=now + LEASE)) != 1:
                    raise LeaseLost
            elif state is JobState.READY:
                await _again(connection, claim, own.error or "", now, jitter)
            else:
                await end_job(connection, claim, state, own.error, now)
            outcomes = {end.subject_id: end.outcome for end in step if end.outcome is not None}
            await _record_all(connection, claim.host, claim.kind, outcomes, now)
            await _end_waiting(connection, step, now, jitter)
    return state


def _failed_state(end: End, attempts: int) -> JobState:
    return JobState.DEAD if end.final or attempts >= MAX_ATTEMPTS else JobState.READY


async def _end_waiting(connection: AsyncConnection, ends: Iterable[End], now: datetime, jitter: random.Random) -> None:
    """The jobs are ready and not claimed; one that somebody ended meanwhile stays as it is."""
    ended: dict[JobState, list[int]] = {JobState.DONE: [], JobState.SUPERSEDED: []}
    failed: list[dict[str, Any]] = []
    for end in ends:
        for job in end.jobs:
            if end.error is None:
                newer = end.outcome is not None and job.version < end.outcome.version
                ended[JobState.SUPERSEDED if newer else JobState.DONE].append(job.id)
                continue
            attempts = job.attempts + 1
            state = _failed_state(end, attempts)
            again = state is JobState.READY
            failed.append(
                {
                    "job_id": job.id,
                    "state": state,
                    "attempts": attempts,
                    "error": _short(end.error),
                    "run_at": now + backoff(attempts, jitter) if again else now,
                    "finished_at": None if again else now,
                }
            )
    for state, ids in ended.items():
        if ids:
            ready = and_(jobs.c.id.in_(ids), jobs.c.state == JobState.READY)
            await connection.execute(update(jobs).where(ready).values(state=state, error=None, finished_at=now))
    if failed:
        ready = and_(jobs.c.id == bindparam("job_id"), jobs.c.state == JobState.READY)
        await connection.execute(update(jobs).where(ready), failed)


async def give_up(database: Database, claim: Claim, error: str, now: datetime) -> None:
    """Dead: this cannot pass by waiting. A newer version, or a retry over HTTP, is a new job."""
    async with database.write.begin() as connection:
        await end_job(connection, claim, JobState.DEAD, error, now)


async def retry(
    database: Database, claim: Claim, error: str, now: datetime, *, jitter: random.Random, attempts: int = MAX_ATTEMPTS
) -> JobState:
    """Back to ready, after a random part of a time that doubles up to five minutes; dead after so many attempts."""
    if claim.attempts >= attempts:
        await give_up(database, claim, f"{error} (gave up after {claim.attempts} attempts)", now)
        return JobState.DEAD
    async with database.read.connect() as connection:
        await _again(connection, claim, error, now, jitter)
    return JobState.READY


async def _again(connection: AsyncConnection, claim: Claim, error: str, now: datetime, jitter: random.Random) -> None:
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
    if await _changed(connection, again) != 1:
        raise LeaseLost


def backoff(attempts: int, jitter: random.Random) -> timedelta:
    """Full jitter: anything between nothing and half a second doubled by each attempt, at most `MAX_BACKOFF`."""
    ceiling = min(MAX_BACKOFF, timedelta(seconds=0.5) * 2 ** min(attempts, 20))
    return timedelta(seconds=ceiling.total_seconds() * jitter.random())


async def end_job(connection: AsyncConnection, claim: Claim, state: JobState, error: str | None, now: datetime) -> None:
    """Ends the job in a transaction of the caller, who writes there what else is true by it. Or LeaseLost."""
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


async def record_all(database: Database, host: str, kind: str, outcomes: Mapping[int, Outcome], now: datetime) -> None:
    """`record` for many subjects, `BATCH_STEP` in a transaction."""
    subjects = sorted(outcomes)
    for start in range(0, len(subjects), BATCH_STEP):
        step = {subject_id: outcomes[subject_id] for subject_id in subjects[start : start + BATCH_STEP]}
        async with database.write.begin() as connection:
            await _record_all(connection, host, kind, step, now)


async def _record_all(
    connection: AsyncConnection, host: str, kind: str, outcomes: Mapping[int, Outcome], now: datetime
) -> None:
    """One statement for all, in each database's own words: two for each row took seconds for ten thousand."""
    if not outcomes:
        return
    rows = [
        {
            "host": host,
            "kind": kind,
            "subject_id": subject_id,
            "version": outcome.version,
            "stands": outcome.stands,
            "revision": 1,
            "proofs": outcome.proofs,
            "result": outcome.result,
            "applied_at": now,
        }
        for subject_id, outcome in sorted(outcomes.items())
    ]
    written = ("stands", "proofs", "result", "applied_at")
    statement: Any
    if connection.dialect.name == "sqlite":
        statement = sqlite.insert(applied)
        new = statement.excluded
        values: dict[str, Any] = {name: new[name] for name in (*written, "version")}
        statement = statement.on_conflict_do_update(
            index_elements=["host", "kind", "subject_id"],
            set_=values | {"revision": applied.c.revision + 1},
            where=applied.c.version <= new.version,
        )
    else:
        statement = mysql.insert(applied)
        new = statement.inserted
        not_older = new.version >= applied.c.version
        changes = [(name, func.if_(not_older, new[name], applied.c[name])) for name in written]
        changes.append(("revision", func.if_(not_older, applied.c.revision + literal_column("1"), applied.c.revision)))
        # Last: MariaDB assigns in this order, and what comes later sees what was assigned. No bound value may stand here:
        # the driver joins many rows into one statement and knows those of VALUES alone.
        changes.append(("version", func.greatest(new.version, applied.c.version)))
        statement = statement.on_duplicate_key_update(changes)
    await connection.execute(statement, rows)


async def take_back(
    database: Database, host: str, now: datetime, *, all_running: bool = False, attempts: int = MAX_ATTEMPTS
) -> int:
    """Gives back the jobs whose lease has ended; with `all_running` (at the start, under the flock) all of this host.

    The fence rises, so whoever still works on one can finish nothing. A job that was tried too often is dead instead:
    it has most likely killed its worker each time.
    """
    taken = and_(jobs.c.host == host, jobs.c.state == JobState.RUNNING)
    if not all_running:
        taken = and_(taken, jobs.c.lease_until < now)
    freed = {"running_lane": None, "lease_until": None, "fence": jobs.c.fence + 1}
    message = f"gave up after {attempts} attempts: the worker ended while at work on it"
    async with database.write.begin() as connection:
        poison = (
            update(jobs)
            .where(taken, jobs.c.attempts >= attempts)
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
