"""App passwords: make, list, revoke. Dovecot finds one by its SHA-256, in the view `dovecot_app_passwords`."""

from collections.abc import Collection, Sequence
from enum import StrEnum
from typing import Any

from sqlalchemy import ColumnElement, Row, func, insert, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from app.db import inserted_id
from app.errors import NotFound, TooManyAppPasswords, UserDeleted, UserNotActive
from app.models.app_passwords import app_passwords
from app.models.users import UserState
from app.services.audit_events import record_event
from app.services.changes import Change
from app.services.users import hold_user, write_user

_c = app_passwords.c

SHOWN = [column for column in _c if column.name not in ("user_id", "secret_hash")]


class Protocol(StrEnum):
    """Each is a column of the same name."""

    IMAP = "imap"
    POP3 = "pop3"
    SMTP = "smtp"
    """Submission, by Postfix."""
    SIEVE = "sieve"


async def create_app_password(
    change: Change, user_id: int, name: str, protocols: Collection[Protocol], secret_hash: str, *, most: int
) -> int:
    """Good at once: no cache holds that there was none. Raises TooManyAppPasswords when `most` are alive."""
    user = await hold_user(change, user_id)
    if user.state == UserState.DELETED:
        raise UserDeleted(f"User {user_id} is deleted. POST /v1/users/{user_id}/restore brings it back.")
    if user.state != UserState.ACTIVE:
        raise UserNotActive(f"User {user_id} is {user.state}: no app password is made for it.")
    alive = select(func.count()).select_from(app_passwords).where(_c.user_id == user_id, _c.revoked_at.is_(None))
    if (await change.connection.execute(alive)).scalar_one() >= most:
        raise TooManyAppPasswords(f"There are {most} already. Revoke one that is no longer used.")
    allowed = {protocol.value: protocol in protocols for protocol in Protocol}
    values = {"user_id": user_id, "name": name, "secret_hash": secret_hash, "created_at": change.now, **allowed}
    app_password_id = inserted_id(await change.connection.execute(insert(app_passwords), values))
    after = {"name": name, "protocols": sorted(protocols)}
    await record_event(change, "app-passwords.create", "app-password", app_password_id, user_id=user_id, after=after)
    return app_password_id


async def list_app_passwords(connection: AsyncConnection, user_id: int) -> Sequence[Row[Any]]:
    """Those that are alive, the oldest first."""
    query = select(*SHOWN).where(_c.user_id == user_id, _c.revoked_at.is_(None)).order_by(_c.id)
    return (await connection.execute(query)).all()


async def get_app_password(connection: AsyncConnection, user_id: int, app_password_id: int) -> Row[Any]:
    """Also one that is revoked."""
    query = select(*SHOWN).where(_c.user_id == user_id, _c.id == app_password_id)
    row: Row[Any] | None = (await connection.execute(query)).one_or_none()
    if row is None:
        raise NotFound(f"User {user_id} has no app password {app_password_id}.")
    return row


async def revoke_app_passwords(change: Change, user_id: int, *, ids: Collection[int] | None = None) -> list[int]:
    """Those of `ids` that are alive; None: all. Returns which.

    New logins end with it, but for what Dovecot remembers: the caller ends the account's access in the same transaction.
    """
    alive: list[ColumnElement[bool]] = [_c.user_id == user_id, _c.revoked_at.is_(None)]
    if ids is not None:
        alive.append(_c.id.in_(ids))
    rows = (await change.connection.execute(select(_c.id, _c.name).where(*alive).order_by(_c.id))).all()
    if rows:
        revoked = [row.id for row in rows]
        await change.connection.execute(
            update(app_passwords).where(_c.id.in_(revoked), _c.revoked_at.is_(None)).values(revoked_at=change.now)
        )
    for row in rows:
        await record_event(
            change, "app-passwords.revoke", "app-password", row.id, user_id=user_id, before={"name": row.name}
        )
    return [row.id for row in rows]


async def revoke_app_password(change: Change, user_id: int, app_password_id: int) -> int:
    """Ends every session of the account: nobody knows which of them signed in with this one. Twice is no change.

    Also of a suspended or deleted account: it would be good again when that comes back.
    """
    user = await hold_user(change, user_id)
    await get_app_password(change.connection, user_id, app_password_id)
    if await revoke_app_passwords(change, user_id, ids=[app_password_id]):
        await write_user(change, user, {"access_ended_at": change.now}, "users.end-sessions", before={}, after={})
    return app_password_id
