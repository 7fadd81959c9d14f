"""What the worker reads from and writes to the database, besides the queue.

SECURITY: runs in the worker (root). Reads `worker_users`, a view without any secret, and believes none of it: every name is
parsed again here, and a row that does not parse is refused. Writes `applied` and `host_status`, of its own host.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import Row, Select, and_, column, insert, select, table, update
from sqlalchemy.exc import IntegrityError

from app.addresses import DomainName, LocalPart, MailAddress
from app.db import Database, duplicate_of
from app.errors import BadAddress
from app.models.domains import DomainKind
from app.models.hosts import host_status
from app.models.jobs import JobState, applied, jobs
from app.models.users import UserState, users
from app.queue.claim import Outcome, record
from app.queue.contracts import MAILBOX_SYNC
from app.workers.host.fs import Home

_READ = ("id", "address", "local_part", "domain", "domain_kind", "host", "state", "version", "access_ended_at", "purged_at")

# The types are those of the table below the view, so that times come back aware.
_view = table(
    "worker_users",
    *(column(name, users.c[name].type if name in users.c else None) for name in _READ),
)


class BadRow(Exception):
    """A row that cannot have been written by a well-behaved API. Nothing is done about it."""


@dataclass(frozen=True, slots=True)
class Mailbox:
    """A user, as far as the host is concerned."""

    id: int
    address: MailAddress
    home: Home
    host: str
    state: UserState
    version: int
    access_ended_at: datetime | None
    purged: bool


@dataclass(frozen=True, slots=True)
class Present:
    """What was made true so far, from `applied`."""

    version: int = 0
    stands: bool = False
    proofs: dict[str, Any] | None = None
    result: dict[str, Any] | None = None

    def get(self, name: str) -> Any:
        return (self.result or {}).get(name)


def parse_mailbox(row: Row[Any]) -> Mailbox:
    """Raises BadRow for anything that the rest of the worker must not see."""
    try:
        domain, local_part = DomainName(row.domain), LocalPart(row.local_part)
        address = MailAddress(row.address)
        kind, state = DomainKind(row.domain_kind), UserState(row.state)
    except (BadAddress, ValueError, TypeError, AttributeError) as error:
        raise BadRow(f"User {row.id!r} has a name or state that is none: {error}") from None
    if address != f"{local_part}@{domain}":
        raise BadRow(f"User {row.id} is {address} by its address and {local_part}@{domain} by its parts.")
    if kind is DomainKind.RELAY:
        raise BadRow(f"User {row.id} is in {domain}, which is passed on to another host.")
    if not 0 < row.id < 2**31 or row.version < 1:
        raise BadRow(f"User {row.id} has an impossible id or version.")
    return Mailbox(
        row.id,
        address,
        Home(None if kind is DomainKind.PRIMARY else domain, local_part),
        row.host,
        state,
        row.version,
        row.access_ended_at,
        row.purged_at is not None,
    )


def _present(row: Row[Any]) -> Present:
    if row.applied_version is None:
        return Present()
    return Present(row.applied_version, row.stands, row.proofs, row.result)


_MAILBOXES = select(
    _view, applied.c.version.label("applied_version"), applied.c.stands, applied.c.proofs, applied.c.result
).select_from(
    _view.outerjoin(
        applied,
        and_(
            applied.c.host == _view.c.host,
            applied.c.kind == MAILBOX_SYNC,
            applied.c.subject_id == _view.c.id,
        ),
    )
)


async def read_mailbox(database: Database, host: str, user_id: int) -> tuple[Mailbox, Present]:
    """The user as it should be, and as it is. Raises BadRow when there is none of this host."""
    async with database.read.connect() as connection:
        row = (await connection.execute(_MAILBOXES.where(_view.c.id == user_id))).one_or_none()
    if row is None:
        raise BadRow(f"There is no user {user_id}.")
    if row.host != host:
        raise BadRow(f"User {user_id} lives on another host.")
    return parse_mailbox(row), _present(row)


async def others_of(database: Database, mailbox: Mailbox) -> tuple[bool, bool]:
    """Whether an earlier owner of the address is not archived yet, and whether somebody else has the address now."""
    query = _MAILBOXES.where(
        _view.c.address == mailbox.address, _view.c.host == mailbox.host, _view.c.id != mailbox.id
    )
    async with database.read.connect() as connection:
        rows = (await connection.execute(query)).all()
    deleted = [row for row in rows if row.state == UserState.DELETED]
    waiting = any(row.stands or (row.applied_version or 0) < row.version for row in deleted)
    return waiting, len(deleted) < len(rows)


async def write_applied(database: Database, host: str, user_id: int, outcome: Outcome, now: datetime) -> None:
    async with database.write.begin() as connection:
        await record(connection, host, MAILBOX_SYNC, user_id, outcome, now)


async def read_batch(
    database: Database, host: str, after: int, limit: int
) -> Sequence[tuple[int, Mailbox | BadRow, Present]]:
    """The next users of this host, in the order of their ids, without those that a waiting or running job is about."""
    at_work = select(jobs.c.subject_id).where(
        jobs.c.host == host,
        jobs.c.kind == MAILBOX_SYNC,
        jobs.c.subject_id == _view.c.id,
        jobs.c.state.in_((JobState.READY, JobState.RUNNING)),
    )
    query: Select[Any] = (
        _MAILBOXES.add_columns(at_work.exists().label("at_work"))
        .where(_view.c.host == host, _view.c.id > after)
        .order_by(_view.c.id)
        .limit(limit)
    )
    batch: list[tuple[int, Mailbox | BadRow, Present]] = []
    async with database.read.connect() as connection:
        for row in (await connection.execute(query)).all():
            if row.at_work:
                continue
            try:
                batch.append((row.id, parse_mailbox(row), _present(row)))
            except BadRow as error:
                batch.append((row.id, error, Present()))
    return batch


async def last_id(database: Database, host: str) -> int:
    """The highest id of a user of this host; 0 without any."""
    query = select(_view.c.id).where(_view.c.host == host).order_by(_view.c.id.desc()).limit(1)
    async with database.read.connect() as connection:
        return (await connection.execute(query)).scalar() or 0


async def write_status(database: Database, host: str, now: datetime, **values: Any) -> None:
    """Heartbeat, and whatever else is given, into this host's row of `host_status`."""
    changed = {"heartbeat_at": now, **values}
    async with database.write.begin() as connection:
        result = await connection.execute(update(host_status).where(host_status.c.host == host).values(**changed))
        if result.rowcount:
            return
        try:
            await connection.execute(insert(host_status).values(host=host, **changed))
        except IntegrityError as error:
            if duplicate_of(error) is None:
                raise
