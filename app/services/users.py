"""Accounts: create, change, delete, restore, purge, find. Each change is one row, one audit event and one job.

The job is always `mailbox.sync`, whatever happened: the worker reads the row and makes the host match.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import cache
from typing import Any, NamedTuple

from sqlalchemy import (
    ColumnElement,
    DateTime,
    Row,
    Select,
    String,
    Table,
    Text,
    and_,
    bindparam,
    func,
    insert,
    not_,
    or_,
    select,
    type_coerce,
    update,
)
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncConnection

from app.addresses import MailAddress, OutsideAddress
from app.db import duplicate_of, inserted_id, is_reference
from app.errors import (
    BadField,
    NotFound,
    PlaceGone,
    UserDeleted,
    UserExists,
    UserLocked,
    UserNotDeleted,
    UserPurged,
    VersionConflict,
)
from app.models.addresses import AddressKind, addresses
from app.models.columns import Timestamp
from app.models.domains import DomainKind, domains
from app.models.hosts import hosts
from app.models.jobs import JobRow, JobState, applied, jobs
from app.models.users import UserState, users
from app.models.views import service_purged, service_users
from app.queue.contracts import JobKind, mailbox_lane
from app.queue.enqueue import enqueue
from app.services.addresses import (
    check_reserved,
    claim_address,
    follow_address,
    holder_of,
    reclaim_address,
    release_address,
)
from app.services.aliases import touch_aliases_of_user
from app.services.audit_events import record_event
from app.services.changes import Change
from app.services.hosts import choose_host
from app.services.login_failures import forget_login
from app.services.password_resets import cancel_links
from app.services.ranks import check_rank, check_rank_of_predecessor

KIND = JobKind.MAILBOX_SYNC.value


class Rights(NamedTuple):
    """Through what a process changes users: the table, or views that keep the password hash from it."""

    users: Table
    purged: Table


API = Rights(users, users)
SERVICE = Rights(service_users, service_purged)

_APPLIED = and_(applied.c.host == users.c.host, applied.c.kind == KIND, applied.c.subject_id == users.c.id)

SHOWN = (
    "id address display_name contact_address external_id quota_bytes state suspended_reason host version created_at"
    " updated_at deleted_at purge_at purged_at locked_at send_limit has_password"
).split()
"""The first columns of `_USERS`, in this order: what an answer shows as it stands."""


def _bare(column: ColumnElement[Any]) -> ColumnElement[Any]:
    """Times as the driver gives them, without a zone: the answer's encoder knows them as UTC, and there are six a row."""
    return type_coerce(column, DateTime()).label(column.name) if isinstance(column.type, Timestamp) else column


_USERS: Select[Any] = select(
    *(_bare(users.c[name]) for name in SHOWN[:-1]),
    users.c.password_hash.is_not(None).label(SHOWN[-1]),
    applied.c.version.label("applied_version"),
    applied.c.revision,
    type_coerce(applied.c.proofs, Text()).label("proofs"),
    applied.c.result,
)
_BY_ID = _USERS.select_from(users.outerjoin(applied, _APPLIED))
_BY_ADDRESS = _USERS.select_from(
    addresses.join(users, users.c.id == addresses.c.subject_id).outerjoin(applied, _APPLIED)
).where(addresses.c.kind == AddressKind.USER)

others = users.alias("others")

# The statements of each GET and POST, made once: to make one costs as much as to run it.
_ONE_BY_ID = _BY_ID.where(users.c.id == bindparam("key"))
_ONE_BY_ADDRESS = _BY_ADDRESS.where(addresses.c.address == bindparam("key"))
# The last two only spare the id, and so the uid, that a refused INSERT would use up; the unique keys are the judge.
_PLACE = (
    select(
        domains.c.id,
        domains.c.kind,
        hosts.c.name.label("host"),
        select(addresses.c.kind).where(addresses.c.address == bindparam("address")).scalar_subquery().label("taken"),
        select(others.c.id).where(others.c.external_id == bindparam("external_id")).scalar_subquery().label("other"),
    )
    .select_from(
        domains.outerjoin(
            hosts,
            and_(
                hosts.c.enabled,
                or_(bindparam("host", type_=hosts.c.name.type).is_(None), hosts.c.name == bindparam("host")),
            ),
        )
    )
    .where(domains.c.name == bindparam("domain"))
    .limit(2)
)
_INSERT = insert(users)
_LATEST_JOB = (
    select(jobs.c.id, jobs.c.state, jobs.c.error)
    .where(
        jobs.c.host == bindparam("host"),
        jobs.c.kind == KIND,
        jobs.c.subject_id == bindparam("user_id"),
        jobs.c.state != JobState.SUPERSEDED,
    )
    .order_by(jobs.c.version.desc(), jobs.c.id.desc())
    .limit(1)
)


@dataclass(frozen=True, slots=True)
class NewUser:
    """Everything that a caller may say about a new account. The password is a hash by now."""

    address: MailAddress
    display_name: str = ""
    contact_address: OutsideAddress | None = None
    external_id: str | None = None
    quota_bytes: int | None = None
    send_limit: int | None = None
    host: str | None = None
    password_hash: str | None = None
    reuse_address: bool = False


@dataclass(slots=True)
class UserRecord:
    """A user as it should be and as it is, and the job in between while they differ. Not frozen: that takes a microsecond."""

    shown: dict[str, Any]
    """By the names of SHOWN. Times are UTC and say no zone."""
    revision: int | None
    proofs: str
    """JSON, as the worker wrote it."""
    result: dict[str, Any]
    ready: bool
    job: JobRow | None

    @property
    def id(self) -> int:
        return int(self.shown["id"])


@dataclass(frozen=True, slots=True)
class UserFilter:
    domain: str | None = None
    state: UserState | None = None
    """None leaves out the deleted ones."""
    ready: bool | None = None
    q: str | None = None
    external_id: str | None = None
    address: str | None = None


async def create_user(change: Change, new: NewUser) -> UserRecord:
    """Returns the account as it was written, so that nobody who does not wait for the host reads it again."""
    connection = change.connection
    check_reserved(new.address)
    asked = {"domain": new.address.domain, "address": new.address, "external_id": new.external_id}
    places = (await connection.execute(_PLACE, {**asked, "host": new.host})).all()
    if not places:
        raise BadField(f"{new.address.domain} is not a domain here: POST /v1/domains adds one.", field="address")
    if places[0].kind == DomainKind.RELAY:
        raise BadField(f"{new.address.domain} is passed on to another host and has no mailboxes here.", field="address")
    host = choose_host([place.host for place in places if place.host is not None], new.host)
    if places[0].taken is not None and not (new.reuse_address and places[0].taken == AddressKind.TOMBSTONE):
        raise await holder_of(connection, new.address)
    if places[0].other is not None:
        raise await _exists(connection, new.external_id)
    await _check_contact(change.connection, new.contact_address, new.address)
    values = {
        "address": new.address,
        "local_part": new.address.local_part,
        "domain_id": places[0].id,
        "host": host,
        "display_name": new.display_name,
        "contact_address": new.contact_address,
        "external_id": new.external_id,
        "quota_bytes": new.quota_bytes,
        "send_limit": new.send_limit,
        "state": UserState.ACTIVE.value,
        "password_hash": new.password_hash,
        "version": 1,
        "created_at": change.now,
        "updated_at": change.now,
    }
    try:
        user_id = inserted_id(await connection.execute(_INSERT, values))
    except IntegrityError as error:
        raise await _named(connection, error, new.external_id) from None
    if new.reuse_address:
        await check_rank_of_predecessor(change, new.address)
        await forget_login(connection, new.address)
    await claim_address(connection, new.address, AddressKind.USER, user_id, reuse=new.reuse_address)
    await record_event(
        change,
        "users.create",
        "user",
        user_id,
        after={
            "address": new.address,
            "display_name": new.display_name,
            "contact_address": new.contact_address,
            "external_id": new.external_id,
            "quota_bytes": new.quota_bytes,
            "send_limit": new.send_limit,
            "host": host,
            "password": new.password_hash is not None,
            "reuse_address": new.reuse_address,
        },
    )
    job_id = await _enqueue(change, user_id, host, new.address, 1)
    shown = {name: values.get(name) for name in SHOWN} | {"id": user_id, "has_password": new.password_hash is not None}
    return UserRecord(shown, None, "{}", {}, False, JobRow(job_id, JobState.READY, None))


CHANGEABLE = (
    "display_name",
    "contact_address",
    "external_id",
    "quota_bytes",
    "send_limit",
    "state",
    "suspended_reason",
)


async def change_user(
    change: Change, user_id: int, wanted: Mapping[str, Any], *, expected_version: int | None = None
) -> int:
    """Sets some of CHANGEABLE. What is so already is no change: no version, no event, no job."""
    row = await hold_user(change, user_id, expected_version)
    if row.state == UserState.DELETED:
        raise UserDeleted(f"User {user_id} is deleted. POST /v1/users/{user_id}/restore brings it back.")
    new = {name: value for name, value in wanted.items() if name in CHANGEABLE and getattr(row, name) != value}
    state = new.get("state", row.state)
    if "state" in new and row.locked_at is not None:
        raise UserLocked(f"User {user_id} is locked. POST /v1/users/{user_id}/unlock ends that.")
    if state == UserState.ACTIVE:
        if wanted.get("suspended_reason"):
            raise BadField("A reason goes with `state: suspended`.", field="suspended_reason")
        if row.suspended_reason is not None:
            new["suspended_reason"] = None
    await _check_contact(change.connection, new.get("contact_address"), row.address)
    if not new:
        return user_id
    action = "users.change"
    ended: dict[str, Any] = {}
    if "state" in new:
        action = "users.suspend" if state == UserState.SUSPENDED else "users.resume"
        if state == UserState.SUSPENDED:
            ended["access_ended_at"] = change.now
    before = {name: getattr(row, name) for name in new}
    await write_user(change, row, {**new, **ended}, action, before=before, after=new)
    if ended or "contact_address" in new:
        await cancel_links(change, user_id)
    return user_id


async def delete_user(
    change: Change, user_id: int, *, retention: timedelta, expected_version: int | None = None
) -> int:
    """The address becomes a tombstone and the home goes to the archive, until `purge_at`. Deleting twice is no change."""
    row = await hold_user(change, user_id, expected_version)
    if row.state == UserState.DELETED:
        return user_id
    await release_address(change.connection, row.address, user_id)
    purge_at = change.now + retention
    values = {
        "state": UserState.DELETED.value,
        "state_before": row.state,
        "deleted_at": change.now,
        "purge_at": purge_at,
        "access_ended_at": change.now,
    }
    after = {"state": UserState.DELETED.value, "purge_at": purge_at.isoformat()}
    await write_user(change, row, values, "users.delete", before={"state": row.state}, after=after)
    await cancel_links(change, user_id)
    await touch_aliases_of_user(change, user_id)
    return user_id


async def restore_user(change: Change, user_id: int, *, expected_version: int | None = None) -> int:
    """Brings account, password and mail back as they were, suspended if it was. Raises UserExists or AddressRetired."""
    row = await hold_user(change, user_id, expected_version)
    if row.state != UserState.DELETED:
        raise UserNotDeleted(f"User {user_id} is {row.state}, not deleted: there is nothing to restore.")
    if row.purged_at is not None:
        raise UserPurged(
            f"User {user_id} was purged: the mail is gone. Create the account anew with `reuse_address: true`."
        )
    await reclaim_address(change.connection, MailAddress(row.address), user_id)
    values = {
        "state": row.state_before,
        "state_before": None,
        "deleted_at": None,
        "purge_at": None,
    }
    before = {"state": row.state, "deleted_at": row.deleted_at.isoformat()}
    await write_user(change, row, values, "users.restore", before=before, after={"state": row.state_before})
    await touch_aliases_of_user(change, user_id)
    return user_id


async def purge_user(change: Change, user_id: int, *, expected_version: int | None = None, rights: Rights = API) -> int:
    """Removes the archived mail and the personal fields of a deleted account. Cannot be undone. Twice is no change."""
    row = await hold_user(change, user_id, expected_version, rights.users)
    if row.state != UserState.DELETED:
        raise UserNotDeleted(f"User {user_id} is {row.state}. Delete it first: DELETE /v1/users/{user_id}.")
    if row.purged_at is not None:
        return user_id
    values = {
        "display_name": "",
        "contact_address": None,
        "external_id": None,
        "suspended_reason": None,
        "purged_at": change.now,
    }
    after = {"purged_at": change.now.isoformat()}
    await write_user(change, row, values, "users.purge", before={}, after=after, table=rights.users)
    purged = rights.purged
    await change.connection.execute(update(purged).where(purged.c.id == user_id).values(password_hash=None))
    return user_id


async def resync_user(change: Change, user_id: int) -> int:
    """Another job for the account as it is; used to try a dead one again. Returns the job's id."""
    row = await hold_user(change, user_id, None)
    return await _enqueue(change, user_id, row.host, row.address, row.version)


async def due_for_purge(connection: AsyncConnection, now: datetime, *, limit: int, rights: Rights = API) -> list[int]:
    columns = rights.users.c
    due = (
        select(columns.id)
        .where(columns.purge_at <= now, columns.purged_at.is_(None))
        .order_by(columns.purge_at)
        .limit(limit)
    )
    return list((await connection.execute(due)).scalars())


async def hold_user(
    change: Change, user_id: int, expected_version: int | None = None, table: Table = users
) -> Row[Any]:
    """The row, but for its password hash, locked until the transaction ends. Raises NotFound, VersionConflict, Outranked."""
    columns = [column for column in table.c if column.name != "password_hash"]
    query = select(*columns).where(table.c.id == user_id).with_for_update()
    row: Row[Any] | None = (await change.connection.execute(query)).one_or_none()
    if row is None:
        raise _missing(user_id)
    if expected_version is not None and row.version != expected_version:
        raise VersionConflict(
            f"The account is at version {row.version}, not {expected_version}: somebody changed it. Read it again.",
            version=row.version,
        )
    await check_rank(change, user_id)
    return row


async def write_user(
    change: Change,
    row: Row[Any],
    values: dict[str, Any],
    action: str,
    *,
    before: dict[str, Any],
    after: dict[str, Any],
    table: Table = users,
) -> None:
    """The row that `hold_user` gave, with its next version, its audit event and its job."""
    version = row.version + 1
    try:
        await change.connection.execute(
            update(table).where(table.c.id == row.id).values(**values, version=version, updated_at=change.now)
        )
    except IntegrityError as error:
        raise await _named(change.connection, error, values.get("external_id")) from None
    await record_event(change, action, "user", row.id, before=before, after=after)
    await _enqueue(change, row.id, row.host, row.address, version)


async def _enqueue(change: Change, user_id: int, host: str, address: str, version: int) -> int:
    return await enqueue(
        change.connection,
        JobKind.MAILBOX_SYNC,
        host=host,
        lane=mailbox_lane(address),
        subject_id=user_id,
        version=version,
        request_id=change.actor.request_id,
        now=change.now,
    )


async def _named(connection: AsyncConnection, error: IntegrityError, external_id: str | None) -> Exception:
    if is_reference(error):
        return PlaceGone("The domain or the host was removed at this moment. Look at both, and try again.")
    if duplicate_of(error) != "users_external_id":
        return error
    return await _exists(connection, external_id)


async def _exists(connection: AsyncConnection, external_id: str | None) -> UserExists:
    row = (
        await connection.execute(select(users.c.id, users.c.state).where(users.c.external_id == external_id))
    ).one_or_none()
    if row is None:
        return UserExists("Another account has this external_id.", field="external_id")
    hint = " It is deleted: restore or purge it, or send another external_id." if row.state == UserState.DELETED else ""
    return UserExists(
        f"Another account has this external_id.{hint}", id=row.id, external_id=external_id, field="external_id"
    )


async def _check_contact(connection: AsyncConnection, contact: str | None, address: str) -> None:
    """Not the mailbox itself, whatever stands after the recipient delimiter, nor an alias that leads there and nowhere else:
    what opens it must not be sent into it."""
    if contact is None:
        return
    local, _, domain = contact.lower().rpartition("@")
    plain = f"{local.partition('+')[0]}@{domain}"
    if plain == address:
        raise BadField("The contact address cannot be the mailbox itself.", field="contact_address")
    ends = {hop.address for hop in await follow_address(connection, plain) if hop.kind != AddressKind.ALIAS}
    if ends == {address}:
        raise BadField(f"{plain} leads to the mailbox itself, and nowhere else.", field="contact_address")


def _missing(key: MailAddress | int) -> NotFound:
    if isinstance(key, int):
        return NotFound(f"There is no account {key}.")
    return NotFound(
        f"There is no account {key}. A deleted one is found by its id only: GET /v1/users?state=deleted&address=…"
    )


async def find_user_id(connection: AsyncConnection, key: MailAddress | int) -> int:
    """By id, deleted or not; by address, only who has it now."""
    if isinstance(key, int):
        return key
    user_id = (
        await connection.execute(
            select(addresses.c.subject_id).where(addresses.c.address == key, addresses.c.kind == AddressKind.USER)
        )
    ).scalar_one_or_none()
    if user_id is None:
        raise _missing(key)
    return int(user_id)


async def get_user(connection: AsyncConnection, key: MailAddress | int) -> UserRecord:
    query = _ONE_BY_ID if isinstance(key, int) else _ONE_BY_ADDRESS
    row = (await connection.execute(query, {"key": key})).one_or_none()
    if row is None:
        raise _missing(key)
    record = _record(row)
    if not record.ready:
        job = (await connection.execute(_LATEST_JOB, {"host": row.host, "user_id": row.id})).one_or_none()
        record.job = None if job is None else JobRow(job.id, job.state, job.error)
    return record


def _record(row: Row[Any]) -> UserRecord:
    """Without its job. Ready is when the version that is wanted was applied, and no proof has failed since."""
    # By place: by name each takes a quarter of a microsecond.
    *values, applied_version, revision, proofs, result = row  # type: ignore[misc]  # as many as `_USERS` has
    shown = dict(zip(SHOWN, values, strict=False))
    ready = applied_version == shown["version"] and _FAILED not in proofs
    return UserRecord(shown, revision, proofs or "{}", result or {}, ready, None)


_FAILED = '"result": "failed"'
"""How a failed proof reads in `applied.proofs`; within a text, its quotes would be escaped."""


async def _latest_jobs(connection: AsyncConnection, ids: Sequence[int]) -> dict[int, JobRow]:
    if not ids:
        return {}
    rows = await connection.execute(
        select(jobs.c.subject_id, jobs.c.id, jobs.c.state, jobs.c.error)
        .join(users, and_(users.c.id == jobs.c.subject_id, users.c.host == jobs.c.host))
        .where(users.c.id.in_(ids), jobs.c.kind == KIND, jobs.c.state != JobState.SUPERSEDED)
        .order_by(jobs.c.version, jobs.c.id)
    )
    return {row.subject_id: JobRow(row.id, row.state, row.error) for row in rows}


async def list_users(
    connection: AsyncConnection, wanted: UserFilter, *, after: int | None = None, limit: int
) -> list[UserRecord]:
    """In the order of their ids. Paging by id lets MariaDB walk one index; by domain and address it chose a slow plan."""
    q = None if not wanted.q else f"%{_escaped(wanted.q.lower())}%"
    given = {
        "after": after,
        "domain": wanted.domain,
        "state": wanted.state,
        "address": wanted.address,
        "external_id": wanted.external_id,
        # An address is compared with an ascii column, where anything else is an error on MariaDB.
        "name": q,
        "name_or_address": q if q is not None and q.isascii() else None,
    }
    used = {name: value for name, value in given.items() if value is not None}
    query = _page(frozenset(used), wanted.ready)
    rows = (await connection.execute(query, {**used, "limit": limit})).all()
    found = [_record(row) for row in rows]
    waiting = [record for record in found if not record.ready]
    latest = await _latest_jobs(connection, [record.id for record in waiting])
    for record in waiting:
        record.job = latest.get(record.id)
    return found


def _escaped(text: str) -> str:
    return text.replace("/", "//").replace("%", "/%").replace("_", "/_")


@cache
def _page(used: frozenset[str], ready: bool | None) -> Select[Any]:
    """The statement for the filters that are used: to make one costs as much as to run it."""
    query = _BY_ID.order_by(users.c.id).limit(bindparam("limit"))
    if "after" in used:
        query = query.where(users.c.id > bindparam("after"))
    if "domain" in used:
        query = query.where(
            users.c.domain_id == select(domains.c.id).where(domains.c.name == bindparam("domain")).scalar_subquery()
        )
    query = query.where(users.c.state == bindparam("state") if "state" in used else users.c.state != UserState.DELETED)
    for name in ("address", "external_id"):
        if name in used:
            query = query.where(users.c[name] == bindparam(name))
    if "name" in used:
        matches: list[ColumnElement[bool]] = [func.lower(users.c.display_name).like(bindparam("name"), escape="/")]
        if "name_or_address" in used:
            matches.append(users.c.address.like(bindparam("name_or_address"), escape="/"))
        query = query.where(or_(*matches))
    if ready is not None:
        failed = applied.c.proofs.cast(String).contains(_FAILED)
        applies = and_(applied.c.version == users.c.version, not_(failed))
        query = query.where(applies if ready else or_(applied.c.version.is_(None), not_(applies)))
    return query
