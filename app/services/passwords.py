"""A new password, and with it the end of every access that the old one had: by a link, by the old one, or by an administrator.

The hash is made before the transaction, and comes here ready.
"""

import hmac
from dataclasses import dataclass, replace
from typing import Any

from sqlalchemy import Row, select
from sqlalchemy.ext.asyncio import AsyncConnection

from app.addresses import MailAddress
from app.errors import BadField, LinkNotValid, NotFound, UserDeleted, WrongPassword
from app.models.notices import NoticeKind
from app.models.password_resets import ResetKind
from app.models.users import UserState, users
from app.permissions import RANKS
from app.services.app_passwords import revoke_app_passwords
from app.services.changes import Change
from app.services.login_failures import forget_guesses
from app.services.notices import queue_notice
from app.services.password_resets import Terms, cancel_links, issue_link, use_link
from app.services.users import NewUser, UserRecord, create_user, find_user_id, hold_user, write_user

NOT_VALID = "This link is not good, or no longer."
"""Whatever it is: used, expired, cancelled, or never one of ours."""


async def create_invited_user(change: Change, new: NewUser, terms: Terms) -> UserRecord:
    """An account, and in the same transaction the invitation by which its owner sets the first password."""
    if new.contact_address is None:
        raise BadField("An invitation goes to the contact address: send one.", field="contact_address")
    made = await create_user(change, new)
    await issue_link(change, made.id, new.contact_address, ResetKind.INVITATION, terms, asked=new.address)
    return made


@dataclass(frozen=True, slots=True)
class Account:
    """What a new password is measured by, and the one that it replaces."""

    id: int
    address: str
    display_name: str
    password_hash: str | None
    """None: no password opens the account, also while it is suspended or deleted."""


async def read_account(connection: AsyncConnection, key: MailAddress | int) -> Account:
    """Raises NotFound."""
    user_id = await find_user_id(connection, key)
    query = select(users.c.address, users.c.display_name, users.c.state, users.c.password_hash)
    row = (await connection.execute(query.where(users.c.id == user_id))).one_or_none()
    if row is None:
        raise NotFound(f"There is no account {key}.")
    opens = row.password_hash if row.state == UserState.ACTIVE else None
    return Account(user_id, row.address, row.display_name, opens)


async def set_password(
    change: Change, user_id: int, password_hash: str, *, known_hash: str | None = None, revoke: bool = False
) -> int:
    """`known_hash` is what the current password was found to match: if it is another by now, that password is wrong.

    Raises WrongPassword, UserDeleted, Outranked.
    """
    row = await hold_user(change, user_id)
    if known_hash is not None:
        query = select(users.c.password_hash).where(users.c.id == user_id)
        stored = (await change.connection.execute(query)).scalar_one()
        if stored is None or not hmac.compare_digest(stored, known_hash) or row.state != UserState.ACTIVE:
            raise WrongPassword("The current password is wrong.")
    if row.state == UserState.DELETED:
        raise UserDeleted(f"User {user_id} is deleted. POST /v1/users/{user_id}/restore brings it back.")
    await _replace(change, row, password_hash, "users.set-password", revoke)
    return user_id


async def confirm_reset(
    change: Change, user_id: int, hashed_token: str, password_hash: str, *, revoke: bool, network: str
) -> int:
    """Uses the link. Raises LinkNotValid, also for the second of two at one moment.

    `network` is where its holder is, as login failures have it.
    """
    # Whoever asked for the link was asked for their rank then; whoever holds it now is the owner.
    owner = replace(change, actor=replace(change.actor, rank=max(RANKS.values())))
    # The account first, as every other change does: with the link first, two would wait for each other.
    row = await hold_user(owner, user_id)
    if row.state != UserState.ACTIVE or not await use_link(owner, hashed_token, user_id):
        raise LinkNotValid(NOT_VALID)
    await _replace(owner, row, password_hash, "users.reset-password", revoke)
    await forget_guesses(change.connection, row.address, network)
    return user_id


async def _replace(change: Change, row: Row[Any], password_hash: str, action: str, revoke: bool) -> None:
    revoked = await revoke_app_passwords(change, row.id) if revoke else []
    values = {"password_hash": password_hash, "access_ended_at": change.now}
    await write_user(change, row, values, action, before={}, after={"app_passwords_revoked": revoked})
    await cancel_links(change, row.id)
    if row.contact_address is not None:
        kind = NoticeKind.PASSWORD_CHANGED
        await queue_notice(change, kind, user_id=row.id, recipient=row.contact_address)
