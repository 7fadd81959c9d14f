"""Links by which a password is set without the old one: asked for, found, used, cancelled. A reset and an invitation are alike.

What a link leads to, a new password, is in `services/passwords.py`.
"""

import secrets
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import ColumnElement, Row, Select, and_, bindparam, insert, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from app.addresses import MailAddress
from app.credentials.links import link_token, token_hash
from app.errors import BadField, NoContactAddress, NotFound, UserDeleted, UserLocked, UserNotActive
from app.models.addresses import AddressKind, addresses
from app.models.notices import NoticeKind, notices
from app.models.password_resets import Delivery, ResetKind, password_resets
from app.models.users import UserState, users
from app.services.audit_events import record_event
from app.services.changes import Change
from app.services.notices import queue_notice
from app.services.ranks import check_rank, is_outranked

_c = password_resets.c
_INSERT = insert(password_resets)
_NOBODY = 0
"""No account has this id: for queries that are made whether or not there is an account."""

_ACCOUNT: Select[Any] = select(
    users.c.id, users.c.address, users.c.display_name, users.c.state, users.c.locked_at, users.c.contact_address
)
_BY_ID = _ACCOUNT.where(users.c.id == bindparam("key"))
_BY_ADDRESS = _ACCOUNT.select_from(addresses.join(users, users.c.id == addresses.c.subject_id)).where(
    addresses.c.kind == AddressKind.USER, addresses.c.address == bindparam("key")
)
_LOCKED = _BY_ID.with_for_update()


@dataclass(frozen=True, slots=True)
class Terms:
    """What links are made with, and how long they are good."""

    key: bytes
    lifetime: timedelta


async def request_reset(
    change: Change, key: MailAddress | int, terms: Terms, *, reason: str | None, deliver: Delivery
) -> int:
    """For callers who may see whether there is such an account. Returns the id of the link.

    Raises NotFound, Outranked, UserDeleted, UserLocked, UserNotActive, and NoContactAddress for a link that is to be mailed.
    """
    if reason is None:
        raise BadField("Say why: the audit trail keeps it.", field="reason")
    account = await _lock(change.connection, key)
    if account is None:
        raise _missing(key)
    await check_rank(change, account.id)
    why_not = _why_not(account)
    if why_not is not None:
        raise why_not
    if account.contact_address is None and deliver is Delivery.MAIL:
        raise NoContactAddress("The account has no contact address, so a link cannot be mailed.")
    # That a link was shown is said even where no link could be sent: nothing secret stands in it.
    recipient = account.contact_address or account.address
    return await issue_link(
        change, account.id, recipient, ResetKind.RESET, terms, asked=key, reason=reason, deliver=deliver
    )


async def request_reset_unseen(change: Change, key: MailAddress | int, terms: Terms, *, reason: str | None) -> int:
    """For callers who must not learn whether there is such an account: the same statements, whatever comes of it.

    Without an account that may have a link, link and mail are rows that belong to nobody and lead nowhere.
    """
    account = await _lock(change.connection, key)
    looked_at = _NOBODY if account is None else account.id
    outranked = await is_outranked(change.connection, looked_at, change.actor.rank)
    if account is None or outranked or _why_not(account) is not None or account.contact_address is None:
        return await issue_link(change, None, None, ResetKind.RESET, terms, asked=key, reason=reason)
    return await issue_link(
        change, account.id, account.contact_address, ResetKind.RESET, terms, asked=key, reason=reason
    )


async def issue_link(
    change: Change,
    user_id: int | None,
    recipient: str | None,
    kind: ResetKind,
    terms: Terms,
    *,
    asked: MailAddress | int,
    reason: str | None = None,
    deliver: Delivery = Delivery.MAIL,
) -> int:
    """The link's row, its mail and its audit event. Returns its id."""
    reset_id = secrets.randbits(62) or 1
    values = {
        "id": reset_id,
        "user_id": user_id,
        "kind": kind.value,
        "deliver": deliver.value,
        "token_hash": token_hash(link_token(terms.key, reset_id)),
        "reason": reason,
        "principal_id": change.actor.principal_id,
        "created_at": change.now,
        "expires_at": change.now + terms.lifetime,
    }
    await change.connection.execute(_INSERT, values)
    mail = NoticeKind.RESET_SHOWN if deliver is Delivery.SHOW else NoticeKind(kind.value)
    await queue_notice(change, mail, user_id=user_id, recipient=recipient, reset_id=reset_id)
    after = {"user": asked, "kind": kind.value, "deliver": deliver.value, "reason": reason}
    await record_event(change, "password-resets.create", "password-reset", reset_id, user_id=user_id, after=after)
    return reset_id


async def find_address(connection: AsyncConnection, key: MailAddress | int) -> str | None:
    account = (await connection.execute(_by(key), {"key": key})).one_or_none()
    return None if account is None else str(account.address)


async def cancel_links(change: Change, user_id: int) -> None:
    """All that could still be used: what they were asked for has changed."""
    await change.connection.execute(
        update(password_resets).where(_c.user_id == user_id, _open(change.now)).values(cancelled_at=change.now)
    )


async def find_link(connection: AsyncConnection, hashed: str, now: datetime) -> Row[Any] | None:
    """Whose link this is: `user_id`, `address`, `display_name`; None: it opens nothing (any more)."""
    query: Select[Any] = (
        select(_c.user_id, users.c.address, users.c.display_name)
        .join_from(password_resets, users, users.c.id == _c.user_id)
        .where(_c.token_hash == hashed, _open(now), users.c.state == UserState.ACTIVE.value)
    )
    row: Row[Any] | None = (await connection.execute(query)).one_or_none()
    return row


async def use_link(change: Change, hashed: str, user_id: int) -> bool:
    """Whether it could be used, which it cannot be again: of two at one moment one wins."""
    query = update(password_resets).where(_c.token_hash == hashed, _c.user_id == user_id, _open(change.now))
    return (await change.connection.execute(query.values(used_at=change.now))).rowcount == 1


def _open(now: datetime) -> ColumnElement[bool]:
    return and_(_c.used_at.is_(None), _c.cancelled_at.is_(None), _c.expires_at > now)


@dataclass(frozen=True, slots=True)
class ResetRecord:
    """A link as its row says, whose it is, and what became of the mail. Nothing of it opens anything."""

    row: Row[Any]
    state: str
    """pending, used, cancelled, expired."""

    @property
    def id(self) -> int:
        return int(self.row.id)


_RESET: Select[Any] = (
    select(
        _c.id,
        _c.kind,
        _c.deliver,
        _c.reason,
        _c.principal_id,
        _c.created_at,
        _c.expires_at,
        _c.used_at,
        _c.cancelled_at,
        users.c.id.label("user_id"),
        users.c.address,
        notices.c.id.label("notice_id"),
        notices.c.recipient,
        notices.c.sent_at,
        notices.c.bounced_at,
        notices.c.bounce,
    )
    .select_from(
        password_resets.outerjoin(users, users.c.id == _c.user_id).outerjoin(notices, notices.c.reset_id == _c.id)
    )
    .where(_c.id == bindparam("id"))
)


async def get_reset(connection: AsyncConnection, reset_id: int, now: datetime) -> ResetRecord:
    row: Row[Any] | None = (await connection.execute(_RESET, {"id": reset_id})).one_or_none()
    if row is None:
        raise NotFound(f"There is no password reset {reset_id}.")
    if row.used_at is not None:
        state = "used"
    elif row.cancelled_at is not None:
        state = "cancelled"
    else:
        state = "expired" if row.expires_at <= now else "pending"
    return ResetRecord(row, state)


@dataclass(frozen=True, slots=True)
class Summary:
    """Just enough of an account to help its owner with a reset."""

    account: Row[Any]
    why_not: str | None
    """No reset by mail: in a sentence."""


async def summarize_user(connection: AsyncConnection, key: MailAddress | int, rank: int) -> Summary:
    """`rank` is that of the caller."""
    account = await _find(connection, key)
    error = _why_not(account)
    if await is_outranked(connection, account.id, rank):
        return Summary(account, "It belongs to somebody whose role stands higher than yours.")
    if error is not None:
        return Summary(account, error.detail)
    missing = "It has no contact address: a link can only be shown, and handed over."
    return Summary(account, missing if account.contact_address is None else None)


def masked(address: str | None) -> str | None:
    """`a•••@e•••.org`: enough for who knows it to recognise it."""
    if address is None:
        return None
    local, _, domain = address.rpartition("@")
    name, dot, last = domain.rpartition(".")
    return f"{local[:1]}•••@{(name or last)[:1]}•••{dot}{last if dot else ''}"


def _by(key: MailAddress | int) -> Any:
    return _BY_ID if isinstance(key, int) else _BY_ADDRESS


async def _find(connection: AsyncConnection, key: MailAddress | int) -> Row[Any]:
    account = (await connection.execute(_by(key), {"key": key})).one_or_none()
    if account is None:
        raise _missing(key)
    return account


async def _lock(connection: AsyncConnection, key: MailAddress | int) -> Row[Any] | None:
    """As it is until the transaction ends: who locks or suspends it then finds the link, and cancels it."""
    found = (await connection.execute(_by(key), {"key": key})).one_or_none()
    which = {"key": _NOBODY if found is None else found.id}
    account: Row[Any] | None = (await connection.execute(_LOCKED, which)).one_or_none()
    return account


def _missing(key: MailAddress | int) -> NotFound:
    return NotFound(f"There is no account {key}.")


def _why_not(account: Row[Any]) -> UserDeleted | UserLocked | UserNotActive | None:
    if account.state == UserState.DELETED:
        return UserDeleted(f"User {account.id} is deleted. POST /v1/users/{account.id}/restore brings it back.")
    if account.locked_at is not None:
        return UserLocked(
            f"User {account.id} is locked: no link is made for it. POST /v1/users/{account.id}/unlock comes first."
        )
    if account.state != UserState.ACTIVE:
        return UserNotActive(f"User {account.id} is suspended: no link is made for it.")
    return None
