"""The unprivileged side of the queue: one INSERT, in the transaction of the change that it follows. Never commits."""

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
