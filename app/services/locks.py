"""Locking an account that seems stolen, and unlocking it: one row, one audit event, one job, and a notice to its owner."""

from typing import Any

from sqlalchemy import Row

from app.errors import UserDeleted
from app.models.notices import NoticeKind
from app.models.users import UserState
from app.services.app_passwords import revoke_app_passwords
from app.services.changes import Change
from app.services.notices import queue_notice
from app.services.password_resets import cancel_links
from app.services.users import hold_user, write_user


async def lock_user(change: Change, user_id: int, reason: str | None, *, expected_version: int | None = None) -> int:
    """Suspended until it is unlocked; every session and app password ends. Locking twice is no change. Raises UserDeleted."""
    row = await _hold(change, user_id, expected_version)
    if row.locked_at is not None:
        return user_id
    values: dict[str, Any] = {
        "state": UserState.SUSPENDED.value,
        "locked_at": change.now,
        "locked_from": row.state,
        "access_ended_at": change.now,
    }
    if row.state == UserState.ACTIVE:  # what it was suspended for before still holds
        values["suspended_reason"] = reason
    revoked = await revoke_app_passwords(change, user_id)
    after = {"state": values["state"], "reason": reason, "app_passwords_revoked": revoked}
    await write_user(change, row, values, "users.lock", before={"state": row.state}, after=after)
    await cancel_links(change, user_id)
    await _tell(change, row, NoticeKind.LOCKED)
    return user_id


async def unlock_user(change: Change, user_id: int, *, expected_version: int | None = None) -> int:
    """What it was before, but for its app passwords. Twice is no change. Raises UserDeleted."""
    row = await _hold(change, user_id, expected_version)
    if row.locked_at is None:
        return user_id
    values: dict[str, Any] = {"state": row.locked_from, "locked_at": None, "locked_from": None}
    if row.locked_from == UserState.ACTIVE:
        values["suspended_reason"] = None
    await write_user(change, row, values, "users.unlock", before={"state": row.state}, after={"state": row.locked_from})
    await _tell(change, row, NoticeKind.UNLOCKED)
    return user_id


async def _hold(change: Change, user_id: int, expected_version: int | None) -> Row[Any]:
    row = await hold_user(change, user_id, expected_version)
    if row.state == UserState.DELETED:
        raise UserDeleted(f"User {user_id} is deleted. POST /v1/users/{user_id}/restore brings it back.")
    return row


async def _tell(change: Change, row: Row[Any], kind: NoticeKind) -> None:
    if row.contact_address is not None:
        await queue_notice(change, kind, user_id=row.id, recipient=row.contact_address)
