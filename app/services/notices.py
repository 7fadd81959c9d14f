"""Notices: mail to account owners. The row and the job are here; the text and the sending are the service process's."""

from typing import Any

from sqlalchemy import insert, select

from app.db import inserted_id
from app.errors import NotFound
from app.models.hosts import SERVICE_HOST
from app.models.notices import NoticeKind, notices
from app.queue.contracts import JobKind, mail_lane
from app.queue.enqueue import enqueue
from app.services.changes import Change

_INSERT = insert(notices)


async def queue_notice(
    change: Change,
    kind: NoticeKind,
    *,
    user_id: int | None,
    recipient: str | None,
    reset_id: int | None = None,
    details: dict[str, Any] | None = None,
) -> int:
    """To the contact address `recipient`; without one nothing will be sent. `details` holds no secret. Returns its id."""
    values = {
        "user_id": user_id,
        "reset_id": reset_id,
        "kind": kind.value,
        "recipient": recipient,
        "details": details,
        "created_at": change.now,
    }
    notice_id = inserted_id(await change.connection.execute(_INSERT, values))
    await _enqueue(change, notice_id)
    return notice_id


async def resend_notice(change: Change, notice_id: int) -> int:
    """Another job for one that could not be sent. Returns the job's id; raises NotFound when it is no longer kept."""
    query = select(notices.c.id).where(notices.c.id == notice_id)
    if (await change.connection.execute(query)).one_or_none() is None:
        raise NotFound(f"The notice {notice_id} is no longer kept: there is nothing to send.")
    return await _enqueue(change, notice_id)


async def _enqueue(change: Change, notice_id: int) -> int:
    return await enqueue(
        change.connection,
        JobKind.MAIL_SEND,
        host=SERVICE_HOST,
        lane=mail_lane(notice_id),
        subject_id=notice_id,
        version=1,
        request_id=change.actor.request_id,
        now=change.now,
    )
