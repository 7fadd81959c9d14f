"""The audit trail: one event for each accepted change, in the change's own transaction, and for each refused one."""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import Row, insert, or_, select
from sqlalchemy.ext.asyncio import AsyncConnection

from app.db import insert_by_driver
from app.models.addresses import addresses
from app.models.audit_events import Outcome, audit_events
from app.models.principals import principals
from app.services.changes import Change

_INSERT = insert(audit_events)
_COLUMNS = [column.name for column in audit_events.c if not column.primary_key]
_STATEMENT = f"INSERT INTO audit_events (`{'`, `'.join(_COLUMNS)}`) VALUES ({', '.join(['%s'] * len(_COLUMNS))})"  # noqa: S608


async def record_event(
    change: Change,
    action: str,
    subject_kind: str,
    subject_id: int | str,
    *,
    user_id: int | None = None,
    before: dict[str, Any] | None = None,
    after: dict[str, Any] | None = None,
) -> None:
    """`before` and `after` hold what changed, without secrets. Values must be JSON.

    `user_id` is the account whose owner it concerns; a subject of the kind `user` is that account itself.
    """
    if subject_kind == "user":
        user_id = int(subject_id)
    await _insert(
        change.connection,
        {
            "at": change.now,
            "principal_id": change.actor.principal_id,
            "key_id": change.actor.key_id,
            "client_address": change.actor.client_address,
            "request_id": change.actor.request_id,
            "action": action,
            "subject_kind": subject_kind,
            "subject_id": str(subject_id),
            "user_id": user_id,
            "outcome": Outcome.ACCEPTED.value,
            "problem": None,
            "before": before,
            "after": after,
        },
    )


async def _insert(connection: AsyncConnection, values: dict[str, Any]) -> None:
    """Every write has one: it is to cost little."""
    if connection.dialect.name == "sqlite":
        await connection.execute(_INSERT, values)
        return
    values["at"] = values["at"].replace(tzinfo=None)  # UTC, as everywhere
    for name in ("before", "after"):
        if values[name] is not None:
            values[name] = json.dumps(values[name])
    await insert_by_driver(connection, _STATEMENT, [values[name] for name in _COLUMNS])


@dataclass(frozen=True, slots=True)
class Refusal:
    """A request that was refused, as far as the trail keeps it: neither its body nor its query."""

    at: datetime
    principal_id: str
    """Empty: the caller did not show who it is."""
    key_id: int | None
    client_address: str
    request_id: str
    action: str
    subject_kind: str
    subject: str
    """As the path names it."""
    user_id: int | None
    problem: str | None
    after: dict[str, Any] | None


async def record_refusal(connection: AsyncConnection, refusal: Refusal) -> None:
    """An account or alias that is named by its address is recorded by its id, if there is one, as in accepted changes."""
    values = asdict(refusal)
    subject = values.pop("subject")
    if refusal.subject_kind in ("user", "alias") and subject:
        subject = await _id_of(connection, refusal.subject_kind, subject) or subject
    if refusal.subject_kind == "user" and subject.isdigit() and len(subject) <= 18:
        values["user_id"] = int(subject)
    await _insert(connection, {**values, "subject_id": subject, "outcome": Outcome.REFUSED.value, "before": None})


@dataclass(frozen=True, slots=True)
class EventFilter:
    """None: any."""

    principal_id: str | None = None
    action: str | None = None
    subject_kind: str | None = None
    subject_id: str | None = None
    user_id: int | None = None
    outcome: Outcome | None = None
    request_id: str | None = None
    since: datetime | None = None
    until: datetime | None = None
    """The first moment that is too late."""


_INDEXES: tuple[tuple[str, Callable[[EventFilter], bool]], ...] = (
    ("request_id", lambda wanted: wanted.request_id is not None),
    ("subject_kind_subject_id_at", lambda wanted: wanted.subject_id is not None),
    ("user_id_at", lambda wanted: wanted.user_id is not None),
    ("outcome_at", lambda wanted: wanted.outcome == Outcome.REFUSED),
    ("action_at", lambda wanted: wanted.action is not None),
    ("principal_id_at", lambda wanted: wanted.principal_id is not None),
)
"""The rarest first. MariaDB is told: once a page has a cursor, it would rather sort half of all events."""


async def list_events(
    connection: AsyncConnection, wanted: EventFilter, *, before: tuple[datetime, int] | None, limit: int
) -> Sequence[Row[Any]]:
    """Newest first, with the present name and role of who it was. `before` is time and id of the last one of a page."""
    c = audit_events.c
    index = next((name for name, fits in _INDEXES if fits(wanted)), "at")
    query = (
        select(audit_events, principals.c.name.label("principal_name"), principals.c.role)
        .outerjoin(principals, principals.c.id == c.principal_id)
        .with_hint(audit_events, f"FORCE INDEX (ix_audit_events_{index})", "mysql")
        .with_hint(audit_events, f"FORCE INDEX (ix_audit_events_{index})", "mariadb")
        .order_by(c.at.desc(), c.id.desc())
        .limit(limit)
    )
    for name in ("principal_id", "action", "subject_kind", "subject_id", "user_id", "outcome", "request_id"):
        if (value := getattr(wanted, name)) is not None:
            query = query.where(c[name] == value)
    if wanted.since is not None:
        query = query.where(c.at >= wanted.since)
    if wanted.until is not None:
        query = query.where(c.at < wanted.until)
    if before is not None:
        at, event_id = before
        query = query.where(c.at <= at, or_(c.at < at, c.id < event_id))
    return (await connection.execute(query)).all()


async def _id_of(connection: AsyncConnection, kind: str, address: str) -> str | None:
    query = select(addresses.c.subject_id).where(addresses.c.address == address.lower(), addresses.c.kind == kind)
    found = (await connection.execute(query)).scalar()
    return None if found is None else str(found)
