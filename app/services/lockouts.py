"""Lockouts: whose logins are slowed or refused right now, and lifting that. Nothing is kept about them: they follow from the
recorded failures, and end when those have left the window."""

import base64
import binascii
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import CTE, Select, and_, case, delete, func, literal, select, union_all
from sqlalchemy.ext.asyncio import AsyncConnection

from app.errors import NotFound, Outranked
from app.models.addresses import AddressKind, addresses
from app.models.login_failures import FailureKind, login_failures
from app.models.principals import principals
from app.services.audit_events import record_event
from app.services.changes import Change
from app.services.login_failures import KNOWN, SHARED, Limits, slow_from
from app.services.ranks import check_rank, higher_roles

_t = login_failures.c


@dataclass(frozen=True, slots=True)
class Lockout:
    """One of login and network may be None: it counts for all of them."""

    kind: FailureKind
    login: str | None
    network: str | None
    guesses: int
    attempts: int
    first_at: datetime
    last_at: datetime
    refused_until: datetime | None
    """None: it is slowed, and not yet refused."""
    ends_at: datetime
    """Without a further guess nothing of it counts from then on."""

    @property
    def id(self) -> str:
        return lockout_id(self.kind, self.login, self.network)


def lockout_id(kind: FailureKind, login: str | None, network: str | None) -> str:
    text = "\0".join((kind.value, login or "", network or ""))
    return base64.urlsafe_b64encode(text.encode("ascii")).decode("ascii").rstrip("=")


def _parse(lockout: str) -> tuple[FailureKind, str, str]:
    try:
        text = base64.urlsafe_b64decode(lockout.encode("ascii") + b"==").decode("ascii")
        kind, login, network = text.split("\0")
        if not login and not network:
            raise ValueError
        return FailureKind(kind), login, network
    except (binascii.Error, ValueError):
        raise NotFound("There is no such lockout. GET /v1/lockouts lists them.") from None


def _groups(
    kind: FailureKind, limits: Limits, since: datetime, login: str | None, network: str | None
) -> list[Select[Any]]:
    """By login, by network and by both: each with as many guesses as make it slow, and the guess at which it is refused.

    With `login` or `network` only what is about it: an index finds those rows.
    """
    counted = and_(_t.kind == kind.value, _t.last_at > since, _t.guess != KNOWN)
    if login is not None:
        counted = and_(counted, _t.login == login)
    if network is not None:
        counted = and_(counted, _t.network == network)
    here, shared = and_(counted, _t.network != SHARED), and_(counted, _t.network == SHARED)
    both = limits.login or limits.pair
    made = [
        _group(_rows(here, _t.login, _t.network), limits.pair, login=True, network=True),
        _group(_rows(shared, _t.login, _t.network), both, login=True, network=True),
    ]
    if login is None:
        made.append(_group(_rows(here, _t.network), limits.network, login=False, network=True))
    if limits.login is not None and network is None:
        # One guess from two networks is one: the newest row of each.
        guesses = select(
            _t.login,
            func.sum(_t.attempts).label("attempts"),
            func.min(_t.first_at).label("first_at"),
            func.max(_t.last_at).label("last_at"),
        )
        once = guesses.where(counted, _t.login != "").group_by(_t.login, _t.guess).subquery()
        newest = func.row_number().over(partition_by=once.c.login, order_by=once.c.last_at.desc())
        rows = select(once, newest.label("place")).cte()
        made.append(_group(rows, limits.login, login=True, network=False))
    return [group.add_columns(literal(kind.value).label("kind")) for group in made]


def _rows(counted: Any, *by: Any) -> CTE:
    newest = func.row_number().over(partition_by=by, order_by=_t.last_at.desc())
    return (
        select(_t.login, _t.network, _t.attempts, _t.first_at, _t.last_at, newest.label("place")).where(counted).cte()
    )


def _group(rows: CTE, limit: int, *, login: bool, network: bool) -> Select[Any]:
    by = [rows.c[name] for name, wanted in (("login", login), ("network", network)) if wanted]
    return (
        select(
            (rows.c.login if login else literal("")).label("login"),
            (rows.c.network if network else literal("")).label("network"),
            func.count().label("guesses"),
            func.sum(rows.c.attempts).label("attempts"),
            func.min(rows.c.first_at).label("first_at"),
            func.max(rows.c.last_at).label("last_at"),
            # While this one counts there are as many as are refused.
            func.max(case((rows.c.place == limit, rows.c.last_at))).label("limit_at"),
        )
        .group_by(*by)
        .having(func.count() >= slow_from(limit))
    )


async def list_lockouts(
    connection: AsyncConnection,
    limits: Mapping[FailureKind, Limits],
    now: datetime,
    window: timedelta,
    *,
    login: str | None = None,
    network: str | None = None,
    after: str | None = None,
    limit: int,
) -> Sequence[Lockout]:
    """By id. `login` and `network` are what the lockout is about, as it shows them."""
    since = now - window
    selects = [select_ for kind, each in limits.items() for select_ in _groups(kind, each, since, login, network)]
    found = [
        Lockout(
            FailureKind(row.kind),
            row.login or None,
            row.network or None,
            row.guesses,
            int(row.attempts),
            row.first_at,
            row.last_at,
            row.limit_at + window if row.limit_at is not None else None,
            row.last_at + window,
        )
        for row in await connection.execute(union_all(*selects))
    ]
    found.sort(key=lambda lockout: lockout.id)
    return [lockout for lockout in found if after is None or lockout.id > after][:limit]


async def lift_lockout(change: Change, lockout: str) -> None:
    """Forgets what it follows from. Raises NotFound when there is nothing of the kind, and Outranked for a login of somebody
    whose role stands higher."""
    kind, login, network = _parse(lockout)
    await _check_rank(change, kind, login)
    query = delete(login_failures).where(_t.kind == kind.value, _t.guess != KNOWN)
    if login:
        query = query.where(_t.login == login)
    if network:
        query = query.where(_t.network == network)
    forgotten = (await change.connection.execute(query)).rowcount
    if not forgotten:
        raise NotFound("There is no such lockout, or it has ended. GET /v1/lockouts lists them.")
    before = {"kind": kind.value, "login": login or None, "network": network or None, "records": forgotten}
    await record_event(change, "lockouts.lift", "lockout", (login or network)[:254], before=before)


async def _check_rank(change: Change, kind: FailureKind, login: str) -> None:
    if kind is FailureKind.API:
        role = (
            await change.connection.execute(select(principals.c.role).where(principals.c.id == login))
        ).scalar_one_or_none()
        if role in higher_roles(change.actor.rank):
            raise Outranked(f"{login} is {role}, which stands higher than you do.")
    else:
        whose = select(addresses.c.subject_id).where(addresses.c.address == login, addresses.c.kind == AddressKind.USER)
        user_id = (await change.connection.execute(whose)).scalar_one_or_none()
        await check_rank(change, *([] if user_id is None else [user_id]))
