"""The unprivileged side of the queue: an INSERT, in the transaction of the change that it follows. Never commits."""

from collections.abc import Mapping
from datetime import datetime

from sqlalchemy import insert
from sqlalchemy.ext.asyncio import AsyncConnection

from app.db import inserted_id
from app.models.jobs import jobs
from app.queue.contracts import JobKind

_INSERT = insert(jobs)


async def enqueue(
    connection: AsyncConnection,
    kind: JobKind,
    *,
    host: str,
    lane: str,
    subject_id: int,
    version: int,
    request_id: str,
    now: datetime,
) -> int:
    """Adds a job that is due at once and returns its id."""
    result = await connection.execute(
        _INSERT,
        {
            "host": host,
            "lane": lane,
            "kind": kind.value,
            "subject_id": subject_id,
            "version": version,
            "request_id": request_id,
            "run_at": now,
            "created_at": now,
        },
    )
    return inserted_id(result)


async def enqueue_many(
    connection: AsyncConnection,
    kind: JobKind,
    *,
    host: str,
    lane: str,
    versions: Mapping[int, int],
    request_id: str,
    now: datetime,
) -> None:
    """Adds a job for each subject, about this version of it. In one statement: one change may be about thousands."""
    same = {"host": host, "lane": lane, "kind": kind.value, "request_id": request_id, "run_at": now, "created_at": now}
    rows = [{**same, "subject_id": subject_id, "version": version} for subject_id, version in versions.items()]
    await connection.execute(_INSERT, rows)
