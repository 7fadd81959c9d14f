"""The chain over the audit trail: how a link is computed, and whether the chain and the trail are as they were written.

A link's hash is the SHA-256 of this JSON, in ASCII, its keys sorted, without blanks:

    {"format": 1, "sequence": …, "previous_hash": "…", "chained_at": "…", "event": {…}}

`event` has every column of the event that is not null, so a column that is added later, and may be null, leaves older links as
they are. Times are UTC to the microsecond, `2026-11-24T00:00:00.000000Z`. The first link's `previous_hash` is 64 zeros.
"""

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from sqlalchemy import func, select
from sqlalchemy.ext.asyncio import AsyncConnection

from app.models.audit_chain import audit_chain
from app.models.audit_events import audit_events

LATE = timedelta(hours=2)
"""An event that has no link after so long, or gets it after events that are so much younger, was put in by hand.

Twice the time after which the service process looks for all that have none.
"""
_HEAD = re.compile(r"(?:^|\s)([0-9]{1,18})[:\s]([0-9a-f]{64})\Z", re.ASCII)
_BATCH = 1000


@dataclass(frozen=True, slots=True)
class Head:
    """The last link. Who keeps it elsewhere can tell later whether all that led to it still stands."""

    sequence: int
    hash: str

    def __str__(self) -> str:
        return f"{self.sequence}:{self.hash}"


FIRST = Head(0, "0" * 64)
"""Before there is a link."""


def link_hash(sequence: int, previous_hash: str, chained_at: datetime, event: Mapping[Any, Any]) -> str:
    """`event` maps the columns of `audit_events` to values."""
    link = {
        "format": 1,
        "sequence": sequence,
        "previous_hash": previous_hash,
        "chained_at": _time(chained_at),
        "event": {str(name): value for name, value in event.items() if value is not None},
    }
    text = json.dumps(link, sort_keys=True, separators=(",", ":"), ensure_ascii=True, default=_time)
    return hashlib.sha256(text.encode("ascii")).hexdigest()


def _time(at: datetime) -> str:
    return at.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def head_line(head: Head, now: datetime) -> str:
    """As it is kept elsewhere: time, sequence, hash."""
    return f"{_time(now)} {head.sequence} {head.hash}"


def parse_head(text: str) -> Head:
    """`sequence:hash`, or a line that ends with sequence and hash, blanks between. Raises ValueError."""
    found = _HEAD.search(text.strip())
    if found is None:
        raise ValueError(f"not a head: {text.strip()[:100]!r}")
    return Head(int(found[1]), found[2])


async def read_head(connection: AsyncConnection) -> Head:
    query = select(audit_chain.c.sequence, audit_chain.c.hash).order_by(audit_chain.c.sequence.desc()).limit(1)
    row = (await connection.execute(query)).one_or_none()
    return FIRST if row is None else Head(row.sequence, row.hash)


async def verify_chain(
    connection: AsyncConnection, heads: Iterable[Head], now: datetime, report: Callable[[str], None]
) -> tuple[Head, int]:
    """Reads the whole chain and trail, a thousand rows at a time, and reports each thing that is not as it was written.

    `heads` are heads that were kept elsewhere, in order. Returns the present head, and how many events wait for their link.
    """
    present = FIRST
    newest = datetime(1970, 1, 1, tzinfo=UTC)
    kept = iter(heads)
    head = next(kept, None)
    while True:
        query = (
            select(audit_chain, audit_events)
            .outerjoin(audit_events, audit_events.c.id == audit_chain.c.event_id)
            .where(audit_chain.c.sequence > present.sequence)
            .order_by(audit_chain.c.sequence)
            .limit(_BATCH)
        )
        try:
            rows = (await connection.execute(query)).mappings().all()
        except ValueError as error:  # SQLite takes anything: text that is no time, or no JSON
            report(f"the links {present.sequence + 1} and following: the trail holds what we never write ({error})")
            return present, 0
        for row in rows:
            sequence, digest = row[audit_chain.c.sequence], row[audit_chain.c.hash]
            chained_at, at = row[audit_chain.c.chained_at], row[audit_events.c.at]
            link = f"link {sequence}, event {row[audit_chain.c.event_id]}"
            if sequence != present.sequence + 1:
                report(f"{link}: the links {present.sequence + 1} to {sequence - 1} before it are missing")
            elif row[audit_chain.c.previous_hash] != present.hash:
                report(f"{link}: it does not follow from the link before it")
            if row[audit_events.c.id] is None:
                report(f"{link}: the event was deleted")
            else:
                event = {column.name: row[column] for column in audit_events.c}
                if link_hash(sequence, row[audit_chain.c.previous_hash], chained_at, event) != digest:
                    report(f"{link}: the event or its link was changed")
                if at < newest - LATE:
                    report(f"{link}: it is dated {_time(at)}, but was put in after events of {_time(newest)}")
                newest = max(newest, min(at, chained_at))
            present = Head(sequence, digest)
            while head is not None and head.sequence <= sequence:
                if (head != present) if head.sequence == sequence else not await _stands(connection, head):
                    report(f"link {head.sequence}: its hash is not {head.hash}, which was kept elsewhere")
                head = next(kept, None)
        if len(rows) < _BATCH:
            break
    if head is not None and not await _stands(connection, head):  # it may have been kept while this was reading
        report(
            f"the chain ends with link {present.sequence}, but link {head.sequence} was kept elsewhere: its end is cut off"
        )
    return present, await _verify_waiting(connection, now, report)


async def _stands(connection: AsyncConnection, head: Head) -> bool:
    query = select(audit_chain.c.hash).where(audit_chain.c.sequence == head.sequence)
    return (await connection.execute(query)).scalar() == head.hash


async def _verify_waiting(connection: AsyncConnection, now: datetime, report: Callable[[str], None]) -> int:
    unlinked = (
        select(func.count(), func.min(audit_events.c.id), func.min(audit_events.c.at))
        .select_from(audit_events.outerjoin(audit_chain, audit_chain.c.event_id == audit_events.c.id))
        .where(audit_chain.c.event_id.is_(None))
    )
    waiting, _, _ = (await connection.execute(unlinked)).one()
    old, first, at = (await connection.execute(unlinked.where(audit_events.c.at < now - LATE))).one()
    if old:
        report(
            f"{old} events, the first is {first}, have no link though the oldest is of {_time(at)}: "
            "the service process does not run, or they were put in just now"
        )
    return int(waiting)
