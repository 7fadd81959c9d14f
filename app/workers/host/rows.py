"""What the worker reads from and writes to the database, besides the queue.

SECURITY: runs in the worker (root). Reads `worker_users`, `worker_aliases` and `worker_dkim_keys`, views without any secret,
and believes none of it: every name is parsed again here, and a row that does not parse is refused. Writes `applied` and
`host_status`, of its own host.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import Row, Select, and_, column, insert, select, table, update
from sqlalchemy.exc import IntegrityError

from app.addresses import DomainName, LocalPart, MailAddress, Selector
from app.db import Database, duplicate_of
from app.errors import BadAddress
from app.models.aliases import AliasKind
from app.models.dkim_keys import Algorithm, DkimState
from app.models.domains import DomainKind, domains
from app.models.hosts import host_status, hosts
from app.models.jobs import JobState, applied, jobs
from app.models.users import UserState
from app.queue.claim import Outcome, record
from app.queue.contracts import ALIASES_SYNC, DKIM_SYNC, MAILBOX_SYNC
from app.workers.host.alias_file import parse_destination, parse_name
from app.workers.host.fs import Home

_READ = (
    "id",
    "address",
    "local_part",
    "domain",
    "domain_kind",
    "host",
    "state",
    "version",
    "access_ended_at",
    "locked_at",
    "purged_at",
)

_view: Any = table("worker_users", *(column(name) for name in _READ))
"""Without types: a time that is none must spoil its own row, in `parse_mailbox`, and not the answer that it is in."""


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
    locked: bool
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
        access_ended_at, locked_at, purged_at = map(_moment, (row.access_ended_at, row.locked_at, row.purged_at))
        possible = 0 < row.id < 2**31 and row.version >= 1
    except (BadAddress, ValueError, TypeError, AttributeError) as error:
        raise BadRow(f"User {row.id!r} has a name, state or time that is none: {error}") from None
    if address != f"{local_part}@{domain}":
        raise BadRow(f"User {row.id} is {address} by its address and {local_part}@{domain} by its parts.")
    if kind is DomainKind.RELAY:
        raise BadRow(f"User {row.id} is in {domain}, which is passed on to another host.")
    if not possible:
        raise BadRow(f"User {row.id} has an impossible id or version.")
    return Mailbox(
        row.id,
        address,
        Home(None if kind is DomainKind.PRIMARY else domain, local_part),
        row.host,
        state,
        row.version,
        access_ended_at,
        locked_at is not None,
        purged_at is not None,
    )


def _moment(value: Any) -> datetime | None:
    """MariaDB's driver gives a datetime; SQLite's gives text, and so does MariaDB's for a date that is none."""
    if value is None:
        return None
    return (value if isinstance(value, datetime) else datetime.fromisoformat(value)).replace(tzinfo=UTC)


def _present(row: Row[Any]) -> Present:
    if row.applied_version is None:
        return Present()
    return Present(row.applied_version, row.stands, row.proofs, row.result)


_MAILBOXES: Select[Any] = select(
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
    query = _MAILBOXES.where(_view.c.address == mailbox.address, _view.c.host == mailbox.host, _view.c.id != mailbox.id)
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
    """The users of this host among the next `limit` ids, without those that a waiting or running job is about.

    A range of ids and not a number of rows: for that MariaDB sorted all users that were left, for each batch.
    """
    at_work = select(jobs.c.subject_id).where(
        jobs.c.host == host,
        jobs.c.kind == MAILBOX_SYNC,
        jobs.c.subject_id == _view.c.id,
        jobs.c.state.in_((JobState.READY, JobState.RUNNING)),
    )
    ids = _view.c.id.between(after + 1, after + limit)
    query: Select[Any] = _MAILBOXES.where(_view.c.host == host, ids, ~at_work.exists()).order_by(_view.c.id)
    batch: list[tuple[int, Mailbox | BadRow, Present]] = []
    async with database.read.connect() as connection:
        for row in (await connection.execute(query)).all():
            try:
                batch.append((row.id, parse_mailbox(row), _present(row)))
            except BadRow as error:
                batch.append((row.id, error, Present()))
    return batch


_alias_view: Any = table(
    "worker_aliases",
    *map(column, ("id", "address", "local_part", "domain", "domain_kind", "kind", "version", "deleted_at")),
)
_destination_view: Any = table("worker_alias_destinations", *map(column, ("alias_id", "position", "destination")))


@dataclass(frozen=True, slots=True)
class Alias:
    """An alias, as far as the host is concerned."""

    id: int
    address: MailAddress
    local_part: LocalPart
    primary: bool
    """Of the primary domain: for local(8)."""
    kind: AliasKind
    version: int
    deleted: bool
    destinations: tuple[str, ...]
    """Those that mail can be delivered to at present; in order, each once."""

    @property
    def in_file(self) -> bool:
        """Whether the alias file is where it belongs."""
        return self.primary and self.kind is AliasKind.RECEIVE_ONLY and not self.deleted and bool(self.destinations)


@dataclass(frozen=True, slots=True)
class Aliases:
    """All of them, deleted ones too."""

    rows: dict[int, Alias | BadRow]
    version: int
    """The sum of all versions. Rows are never deleted and versions never fall, so it rises with every change."""


def parse_alias(row: Row[Any], destinations: Sequence[str]) -> Alias:
    """Raises BadRow for anything that must not get into the alias file."""
    try:
        domain, local_part, address = DomainName(row.domain), LocalPart(row.local_part), MailAddress(row.address)
        domain_kind, kind = DomainKind(row.domain_kind), AliasKind(row.kind)
        deleted = row.deleted_at is not None
        if domain_kind is DomainKind.PRIMARY and not deleted:
            parse_name(row.local_part)
        leads_to = tuple(dict.fromkeys(map(parse_destination, destinations)))
        possible = 0 < row.id < 2**31 and 1 <= row.version < 2**31
    except (BadAddress, ValueError, TypeError, AttributeError) as error:
        raise BadRow(f"Alias {row.id!r} has a name, kind or destination that is none: {error}") from None
    if address != f"{local_part}@{domain}":
        raise BadRow(f"Alias {row.id} is {address} by its address and {local_part}@{domain} by its parts.")
    if domain_kind is DomainKind.RELAY:
        raise BadRow(f"Alias {row.id} is in {domain}, which is passed on to another host.")
    if not possible:
        raise BadRow(f"Alias {row.id} has an impossible id or version.")
    primary = domain_kind is DomainKind.PRIMARY
    return Alias(row.id, address, local_part, primary, kind, row.version, deleted, leads_to)


async def read_aliases(database: Database) -> Aliases:
    """Rows first: a change in between has a job of its own, which comes later."""
    async with database.read.connect() as connection:
        found = (await connection.execute(select(_alias_view).order_by(_alias_view.c.id))).all()
        ordered = select(_destination_view).order_by(_destination_view.c.alias_id, _destination_view.c.position)
        destinations: dict[int, list[str]] = {}
        for row in await connection.execute(ordered):
            destinations.setdefault(row.alias_id, []).append(row.destination)
    rows: dict[int, Alias | BadRow] = {}
    owners: dict[str, int] = {}
    version = 0
    for row in found:
        version += row.version if isinstance(row.version, int) and row.version > 0 else 0
        try:
            alias = rows[row.id] = parse_alias(row, destinations.get(row.id, ()))
            if not alias.deleted and (first := owners.setdefault(alias.address, alias.id)) != alias.id:
                rows[row.id] = BadRow(f"Alias {alias.id} has the address of alias {first}, {alias.address}.")
        except BadRow as error:
            rows[row.id] = error
    return Aliases(rows, version)


async def read_present_aliases(database: Database, host: str, ids: Collection[int] | None = None) -> dict[int, Present]:
    """What was made true of these aliases, or of all."""
    return await _read_present(database, host, ALIASES_SYNC, ids)


async def _read_present(database: Database, host: str, kind: str, ids: Collection[int] | None) -> dict[int, Present]:
    query = select(applied).where(applied.c.host == host, applied.c.kind == kind)
    if ids is not None and len(ids) <= 500:
        query = query.where(applied.c.subject_id.in_(ids))
    async with database.read.connect() as connection:
        rows = (await connection.execute(query)).all()
    return {row.subject_id: Present(row.version, row.stands, row.proofs, row.result) for row in rows}


_dkim_view: Any = table(
    "worker_dkim_keys",
    *map(column, ("id", "domain", "domain_kind", "host", "selector", "algorithm", "public_key", "state", "version")),
)


@dataclass(frozen=True, slots=True)
class DkimKey:
    """A DKIM key of this host."""

    id: int
    domain: DomainName
    selector: Selector
    algorithm: Algorithm
    public_key: str | None
    """What the API side takes its public half to be."""
    state: DkimState
    version: int

    @property
    def name(self) -> str:
        """Its name in the DNS (RFC 6376, section 3.6.2.1), and of its file: no selector has an underscore in it."""
        return f"{self.selector}._domainkey.{self.domain}"


@dataclass(frozen=True, slots=True)
class DkimKeys:
    """All of this host, removed ones too."""

    rows: dict[int, DkimKey | BadRow]
    version: int
    """The sum of all versions. Rows are never deleted and versions never fall, so it rises with every change."""


def parse_dkim_key(row: Row[Any]) -> DkimKey:
    """Raises BadRow for anything that must become neither the name of a file nor a line of the list of keys."""
    try:
        key = DkimKey(
            row.id,
            DomainName(row.domain),
            Selector(row.selector),
            Algorithm(row.algorithm),
            row.public_key,
            DkimState(row.state),
            row.version,
        )
        kind = DomainKind(row.domain_kind)
        possible = 0 < row.id < 2**31 and 1 <= row.version < 2**31
    except (BadAddress, ValueError, TypeError, AttributeError) as error:
        raise BadRow(f"DKIM key {row.id!r} has a domain, selector, algorithm or state that is none: {error}") from None
    if (key.domain, key.selector) != (row.domain, row.selector):
        raise BadRow(f"The names of DKIM key {key.id} are not stored in lower case.")
    if kind is DomainKind.RELAY:
        raise BadRow(f"DKIM key {key.id} is of {key.domain}, whose mail another host sends.")
    if len(key.name) > MAX_DKIM_NAME:
        raise BadRow(f"The name of DKIM key {key.id} has more than {MAX_DKIM_NAME} characters.")
    if not possible:
        raise BadRow(f"DKIM key {key.id} has an impossible id or version.")
    return key


MAX_DKIM_NAME = 240
"""So that a file can have it; a name in the DNS may have 253."""


async def read_dkim_keys(database: Database, host: str) -> DkimKeys:
    async with database.read.connect() as connection:
        query = select(_dkim_view).where(_dkim_view.c.host == host).order_by(_dkim_view.c.id)
        found = (await connection.execute(query)).all()
    rows: dict[int, DkimKey | BadRow] = {}
    names: dict[str, int] = {}
    version = 0
    for row in found:
        version += row.version if isinstance(row.version, int) and row.version > 0 else 0
        try:
            key = rows[row.id] = parse_dkim_key(row)
            if (first := names.setdefault(key.name, key.id)) != key.id:
                rows[row.id] = BadRow(f"DKIM key {key.id} has the selector of key {first}, {key.name}.")
        except BadRow as error:
            rows[row.id] = error
    return DkimKeys(rows, version)


async def read_present_dkim_keys(
    database: Database, host: str, ids: Collection[int] | None = None
) -> dict[int, Present]:
    """What was made true of these DKIM keys, or of all."""
    return await _read_present(database, host, DKIM_SYNC, ids)


async def at_work(database: Database, host: str, kind: str) -> set[int]:
    """What waiting or running jobs of this kind are about."""
    query = select(jobs.c.subject_id).where(
        jobs.c.host == host, jobs.c.kind == kind, jobs.c.state.in_((JobState.READY, JobState.RUNNING))
    )
    async with database.read.connect() as connection:
        return set((await connection.execute(query)).scalars())


async def primary_domain(database: Database) -> str | None:
    async with database.read.connect() as connection:
        query = select(domains.c.name).where(domains.c.kind == DomainKind.PRIMARY)
        return (await connection.execute(query)).scalar_one_or_none()


async def ids_at(database: Database, host: str, places: Collection[str]) -> dict[str, set[int]]:
    """Whose address each of these is or was, among the users of this host."""
    query = select(_view.c.address, _view.c.id).where(_view.c.host == host, _view.c.address.in_(places))
    found: dict[str, set[int]] = {}
    async with database.read.connect() as connection:
        for row in await connection.execute(query):
            found.setdefault(row.address, set()).add(row.id)
    return found


async def known_ids(database: Database, host: str, ids: Collection[int]) -> set[int]:
    """Which of these are ids of users of this host."""
    query = select(_view.c.id).where(_view.c.host == host, _view.c.id.in_(ids))
    async with database.read.connect() as connection:
        return set((await connection.execute(query)).scalars())


async def last_id(database: Database, host: str) -> int:
    """The highest id of a user of this host; 0 without any."""
    query = select(_view.c.id).where(_view.c.host == host).order_by(_view.c.id.desc()).limit(1)
    async with database.read.connect() as connection:
        return (await connection.execute(query)).scalar() or 0


@dataclass(frozen=True, slots=True)
class HostRow:
    """What the API wants of this host. Nothing of it is checked here."""

    version: int
    settings: Any
    primary_domain: str | None


async def read_host(database: Database, host: str) -> HostRow:
    """Raises BadRow when the host is not in the database."""
    async with database.read.connect() as connection:
        query = select(hosts.c.version, hosts.c.settings).where(hosts.c.name == host)
        row = (await connection.execute(query)).one_or_none()
    if row is None:
        raise BadRow(f"There is no host {host}: POST /v1/hosts adds it, or MAIL_HOST has another name.")
    return HostRow(row.version, row.settings, await primary_domain(database))


async def write_status(database: Database, host: str, **values: Any) -> None:
    """Into this host's row of `host_status`. Only a worker that starts makes the row, a sweep by hand does not."""
    async with database.write.begin() as connection:
        result = await connection.execute(update(host_status).where(host_status.c.host == host).values(**values))
        if result.rowcount or "started_at" not in values:
            return
        try:
            await connection.execute(insert(host_status).values(host=host, **values))
        except IntegrityError as error:
            if duplicate_of(error) is None:
                raise
