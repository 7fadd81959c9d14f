"""Jobs, as callers see them: read, list, try a dead one again."""

from collections.abc import Collection, Sequence
from typing import Any

from sqlalchemy import Row, select
from sqlalchemy.ext.asyncio import AsyncConnection

from app.errors import JobNotDead, NotFound
from app.models.hosts import SERVICE_HOST, hosts
from app.models.jobs import JobState, jobs
from app.queue.contracts import JobKind
from app.services.aliases import resync_alias
from app.services.audit_events import record_event
from app.services.changes import Change
from app.services.dkim_keys import resync_dkim_key
from app.services.domains import publish_domain
from app.services.hosts import resync_host
from app.services.notices import resend_notice
from app.services.users import resync_user


async def get_job(connection: AsyncConnection, job_id: int, *, without: Collection[JobKind] = ()) -> Row[Any]:
    """Of a kind in `without` there is none."""
    row = (await connection.execute(select(jobs).where(jobs.c.id == job_id))).one_or_none()
    if row is None or row.kind in without:
        raise NotFound(f"There is no job {job_id}. Finished ones are kept for a while only.")
    return row


async def list_jobs(
    connection: AsyncConnection,
    *,
    state: JobState | None = None,
    kind: JobKind | None = None,
    host: str | None = None,
    subject_id: int | None = None,
    after: int | None = None,
    without: Collection[JobKind] = (),
    limit: int,
) -> Sequence[Row[Any]]:
    """Newest first, those of the kinds `without` left out."""
    query = select(jobs).order_by(jobs.c.id.desc()).limit(limit)
    if without:
        query = query.where(jobs.c.kind.not_in([each.value for each in without]))
    if state is not None:
        query = query.where(jobs.c.state == state.value)
    if subject_id is not None:
        # Its index begins with host and kind, so both are always named; else all jobs would be walked through. The hosts as
        # values: MariaDB joins a subquery by another index. And it is told to: it would change its mind now and then.
        query = query.where(jobs.c.subject_id == subject_id)
        query = query.with_hint(jobs, "FORCE INDEX (ix_jobs_host_kind_subject_id)")  # nothing on SQLite
        query = query.where(jobs.c.kind.in_([each.value for each in JobKind]))
        names = (await connection.execute(select(hosts.c.name))).scalars()
        query = query.where(jobs.c.host.in_([*names, SERVICE_HOST]))
    if kind is not None:
        query = query.where(jobs.c.kind == kind.value)
    if host is not None:
        query = query.where(jobs.c.host == host)
    if after is not None:
        query = query.where(jobs.c.id < after)
    return (await connection.execute(query)).all()


async def retry_job(change: Change, job_id: int) -> int:
    """A new job about the same subject, as it is now. The dead one stays as it is, for whoever reads the history."""
    job = await get_job(change.connection, job_id)
    if job.state != JobState.DEAD:
        raise JobNotDead(f"Job {job_id} is {job.state}. Only a dead job needs a retry; the others go on by themselves.")
    if job.kind == JobKind.ALIASES_SYNC:
        new_id = await resync_alias(change, job.subject_id, job.host)
    elif job.kind == JobKind.MAILHOST_SYNC:
        new_id = await resync_host(change, job.host)
    elif job.kind == JobKind.DKIM_SYNC:
        new_id = await resync_dkim_key(change, job.subject_id)
    elif job.kind == JobKind.DNS_PUBLISH:
        new_id = await publish_domain(change, job.subject_id)
    elif job.kind == JobKind.MAIL_SEND:
        new_id = await resend_notice(change, job.subject_id)
    else:
        new_id = await resync_user(change, job.subject_id)
    owner = job.subject_id if job.kind == JobKind.MAILBOX_SYNC else None
    await record_event(change, "jobs.retry", "job", job_id, user_id=owner, after={"job": new_id})
    return new_id
