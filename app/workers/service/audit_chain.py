"""Adds to the chain over the audit trail, and tells its head to places where nobody can change it afterwards.

Ids are given when a row is inserted and seen when it is committed, so an event may appear below others that have their link
already. It gets the next link then: the order of the chain is the order in which events were found. Each round looks for events
not far below the highest that has a link; at the start, and every hour, for all that have none.
"""

import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import func, insert, select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncConnection

from app.config import ServiceSettings
from app.db import Database, duplicate_of
from app.log import log
from app.models.audit_chain import audit_chain
from app.models.audit_events import audit_events
from app.services.audit_chain import FIRST, Head, head_line, link_hash, read_head

BATCH = 500
NEAR = 1_000
"""So far below the highest event with a link each round looks: a transaction lasts milliseconds, seconds at most."""
LOOK_AT_ALL = timedelta(hours=1)
TELL_HEAD = timedelta(minutes=1)
_AUTHPRIV_NOTICE = 10 * 8 + 5
"""RFC 3164, section 4.1.1."""


@dataclass
class Chain:
    """What one service process remembers between its rounds."""

    database: Database
    settings: ServiceSettings
    looked_at_all: datetime | None = None
    told_at: datetime | None = None
    told: Head = FIRST

    async def extend(self, now: datetime) -> int:
        """Gives each event that has no link its link, and returns how many there were."""
        of_all = self.looked_at_all is None or now - self.looked_at_all >= LOOK_AT_ALL
        above = 0 if of_all else await self.database.reading(_highest) - NEAR
        added = 0
        while events := await self.database.reading(unlinked_events, above):
            try:
                async with self.database.write.begin() as connection:
                    await add_links(connection, events, now)
            except IntegrityError as error:
                if duplicate_of(error) is None:
                    raise
                # Two service processes by accident: the unique keys let one of them add a link. The next round looks again.
                log.warning("audit_chain_shared", hint="Another service process adds to it; one is enough.")
                return added
            added += len(events)
            above = events[-1]["id"]
        if of_all:
            self.looked_at_all = now
        self.tell_head(await self.database.reading(read_head), now)
        return added

    def tell_head(self, head: Head, now: datetime) -> None:
        """When it is another than before, and once a minute at most. What fails is tried again after a minute."""
        if head == self.told or (self.told_at is not None and now - self.told_at < TELL_HEAD):
            return
        self.told_at = now
        line = head_line(head, now)
        try:
            if self.settings.audit_head_file is not None:
                with self.settings.audit_head_file.open("a", encoding="ascii") as file:
                    file.write(f"{line}\n")
            if self.settings.audit_head_syslog is not None:
                _tell_syslog(self.settings.audit_head_syslog, f"audit head {line}")
        except OSError as error:
            log.error("audit_head_not_told", error=str(error))
        else:
            self.told = head


async def _highest(connection: AsyncConnection) -> int:
    return (await connection.execute(select(func.max(audit_chain.c.event_id)))).scalar() or 0


async def unlinked_events(connection: AsyncConnection, above: int) -> Sequence[Mapping[Any, Any]]:
    """At most BATCH with higher ids than `above`, in the order of their ids."""
    missing = (
        select(audit_events.c.id)
        .outerjoin(audit_chain, audit_chain.c.event_id == audit_events.c.id)
        .where(audit_chain.c.event_id.is_(None), audit_events.c.id > above)
        .order_by(audit_events.c.id)
        .limit(BATCH)
    )
    ids = list((await connection.execute(missing)).scalars())
    if not ids:
        return []
    query = select(audit_events).where(audit_events.c.id.in_(ids)).order_by(audit_events.c.id)
    return (await connection.execute(query)).mappings().all()


async def add_links(connection: AsyncConnection, events: Sequence[Mapping[Any, Any]], now: datetime) -> None:
    head = await read_head(connection)
    links = []
    for event in events:
        digest = link_hash(head.sequence + 1, head.hash, now, event)
        links.append(
            {
                "sequence": head.sequence + 1,
                "event_id": event["id"],
                "previous_hash": head.hash,
                "hash": digest,
                "chained_at": now,
            }
        )
        head = Head(head.sequence + 1, digest)
    await connection.execute(insert(audit_chain), links)


def _tell_syslog(place: str, text: str) -> None:
    """To the socket at this path, or by UDP to `host:port`. Raises OSError."""
    packet = f"<{_AUTHPRIV_NOTICE}>cacert-mail: {text}".encode("ascii")
    if place.startswith("/"):
        family, address = socket.AF_UNIX, place
    else:
        host, _, port = place.rpartition(":")
        family, _, _, _, address = socket.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_DGRAM)[0]  # type: ignore[assignment]
    with socket.socket(family, socket.SOCK_DGRAM) as sender:
        sender.settimeout(1)
        sender.sendto(packet, address)
