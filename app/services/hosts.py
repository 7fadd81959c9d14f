"""Mail hosts: where mailboxes lie. Each has a worker, which alone writes how it does."""

from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any

from pydantic import ValidationError
from sqlalchemy import Row, and_, delete, func, insert, select, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncConnection

from app.db import duplicate_of, is_reference
from app.errors import BadField, HostExists, HostInUse, HostNotChosen, NotFound, VersionConflict
from app.mailconfig.hosts import HostSettings
from app.models.dkim_keys import DkimState, dkim_keys
from app.models.hosts import host_status, hosts
from app.models.jobs import JobRow, JobState, applied, jobs
from app.queue.contracts import MAILHOST_LANE, THE_HOST, JobKind
from app.queue.enqueue import enqueue
from app.services.aliases import refuse_outside, touch_all_aliases
from app.services.audit_events import record_event
from app.services.changes import Change

GONE = timedelta(hours=1)
"""So long its worker is silent before a host that is not enabled counts as one that is no more."""

_WITH_STATUS = select(
    hosts,
    host_status.c.heartbeat_at,
    host_status.c.started_at,
    host_status.c.release,
    host_status.c.swept_at,
    host_status.c.sweep,
    applied.c.version.label("applied_version"),
    applied.c.revision,
    applied.c.proofs,
).select_from(
    hosts.outerjoin(
        # Older than the host: of another one that had its name.
        host_status,
        and_(host_status.c.host == hosts.c.name, host_status.c.heartbeat_at >= hosts.c.created_at),
    ).outerjoin(
        applied,
        and_(
            applied.c.host == hosts.c.name,
            applied.c.kind == JobKind.MAILHOST_SYNC.value,
            applied.c.subject_id == THE_HOST,
        ),
    )
)


async def create_host(change: Change, name: str, *, enabled: bool = True) -> str:
    """Raises HostExists, and SrsNeeded for an enabled one while aliases lead elsewhere: it begins without SRS."""
    if enabled:
        await refuse_outside(change, field="enabled")
    version = await _first_version(change.connection, name)
    values = {
        "name": name,
        "enabled": enabled,
        "settings": {},
        "version": version,
        "created_at": change.now,
        "updated_at": change.now,
    }
    try:
        await change.connection.execute(insert(hosts), values)
    except IntegrityError as error:
        if duplicate_of(error) in ("primary", "hosts_name"):
            raise HostExists(f"The host {name} is there already.", host=name) from None
        raise
    await record_event(change, "hosts.create", "host", name, after={"name": name, "enabled": enabled})
    await _enqueue(change, name, version)
    if enabled:
        await touch_all_aliases(change)
    return name


async def _first_version(connection: AsyncConnection, name: str) -> int:
    """Above all that was ever asked of, or done by, a host that had the name before: nothing of it is this one's."""
    done = select(func.max(applied.c.version)).where(
        applied.c.host == name, applied.c.kind == JobKind.MAILHOST_SYNC.value, applied.c.subject_id == THE_HOST
    )
    asked = select(func.max(jobs.c.version)).where(
        jobs.c.host == name, jobs.c.kind == JobKind.MAILHOST_SYNC.value, jobs.c.subject_id == THE_HOST
    )
    found = [(await connection.execute(query)).scalar() or 0 for query in (done, asked)]
    return 1 + max(found)


async def change_host(
    change: Change, name: str, wanted: Mapping[str, Any], *, expected_version: int | None = None
) -> str:
    """Sets `enabled`, and single members of `settings` (null: the default again). What is so already is no change.

    A host that is not enabled gets no new accounts; those that it has stay. Raises BadField for a setting that cannot be, and
    SrsNeeded when the host would pass on without SRS what aliases lead elsewhere.
    """
    row = (await change.connection.execute(select(hosts).where(hosts.c.name == name).with_for_update())).one_or_none()
    if row is None:
        raise _missing(name)
    if expected_version is not None and row.version != expected_version:
        raise VersionConflict(f"The host is at version {row.version}, not {expected_version}.", version=row.version)
    settings = merged_settings(row.settings, wanted.get("settings", {}))
    new = {"enabled": wanted.get("enabled", row.enabled), "settings": settings}
    new = {member: value for member, value in new.items() if getattr(row, member) != value}
    if not new:
        return name
    enabled = new.get("enabled", row.enabled)
    if _is_without_srs(enabled, settings) and not _is_without_srs(row.enabled, row.settings):
        await refuse_outside(change, field="settings/srs" if "settings" in new else "enabled")
    await change.connection.execute(
        update(hosts).where(hosts.c.name == name).values(**new, version=row.version + 1, updated_at=change.now)
    )
    before = {member: getattr(row, member) for member in new}
    await record_event(change, "hosts.change", "host", name, before=before, after=new)
    await _enqueue(change, name, row.version + 1)
    if enabled and not row.enabled:
        await touch_all_aliases(change)
    return name


async def is_gone(connection: AsyncConnection, name: str, now: datetime) -> bool:
    """It is not enabled, and its worker has been silent for `GONE`: nothing is to be expected of it any more."""
    query = (
        select(hosts.c.enabled, func.coalesce(host_status.c.heartbeat_at, hosts.c.created_at).label("heard_at"))
        .outerjoin(host_status, host_status.c.host == hosts.c.name)
        .where(hosts.c.name == name)
    )
    row = (await connection.execute(query)).one()
    return not row.enabled and now - row.heard_at >= GONE


def _is_without_srs(enabled: bool, settings: Mapping[str, Any]) -> bool:
    return enabled and settings.get("srs") is not True


def merged_settings(present: Mapping[str, Any], wanted: Mapping[str, Any]) -> dict[str, Any]:
    """What is stored: only what differs from the defaults of `HostSettings`, which is the judge."""
    names = HostSettings.model_fields
    for name in wanted:
        if name not in names:
            place = name[:64].replace("~", "~0").replace("/", "~1")
            raise BadField(f"There is no such setting. These are: {', '.join(names)}.", field=f"settings/{place}")
    kept = {name: value for name, value in present.items() if name in names}  # an earlier release may have had more
    merged = {name: value for name, value in {**kept, **wanted}.items() if value is not None}
    try:
        checked = HostSettings.model_validate(merged)
    except ValidationError as error:
        fault = error.errors(include_url=False, include_input=False)[0]
        place = "/".join(["settings", *map(str, fault["loc"])])
        raise BadField(f"{fault['msg'].removeprefix('Value error, ')}.", field=place) from None
    return checked.model_dump(mode="json", exclude_defaults=True)


def effective_settings(stored: Mapping[str, Any]) -> dict[str, Any]:
    """All of them, the defaults too."""
    return HostSettings.model_construct(**stored).model_dump(mode="json")


async def resync_host(change: Change, name: str) -> int:
    """Another job for the host as it is. Returns the job's id."""
    row = (await change.connection.execute(select(hosts).where(hosts.c.name == name))).one_or_none()
    if row is None:
        raise _missing(name)
    return await _enqueue(change, name, row.version)


async def _enqueue(change: Change, name: str, version: int) -> int:
    return await enqueue(
        change.connection,
        JobKind.MAILHOST_SYNC,
        host=name,
        lane=MAILHOST_LANE,
        subject_id=THE_HOST,
        version=version,
        request_id=change.actor.request_id,
        now=change.now,
    )


async def delete_host(change: Change, name: str, *, expected_version: int | None = None) -> None:
    """Only one that never had a mailbox, and has no DKIM key. Raises HostInUse and VersionConflict.

    Its jobs, and what its worker reported, stay: only the worker's side may take them away. See `_first_version`.
    """
    row = (await change.connection.execute(select(hosts).where(hosts.c.name == name).with_for_update())).one_or_none()
    if row is None:
        raise _missing(name)
    if expected_version is not None and row.version != expected_version:
        raise VersionConflict(f"The host is at version {row.version}, not {expected_version}.", version=row.version)
    # Whoever makes a key holds the host's row meanwhile.
    query = select(dkim_keys.c.id).where(dkim_keys.c.host == name, dkim_keys.c.state != DkimState.REMOVED).limit(1)
    if (await change.connection.execute(query)).first() is not None:
        raise HostInUse(f"{name} has DKIM keys that are not removed. Disable it instead: PATCH enabled to false.")
    try:
        await change.connection.execute(delete(hosts).where(hosts.c.name == name))
    except IntegrityError as error:
        if is_reference(error):
            raise HostInUse(f"{name} has, or had, mailboxes. Disable it instead: PATCH enabled to false.") from None
        raise
    await record_event(change, "hosts.delete", "host", name, before={"name": name})


def choose_host(found: Sequence[str], name: str | None) -> str:
    """The only one of the enabled hosts that were found for `name`, or without one; HostNotChosen says what to do."""
    if len(found) == 1:
        return found[0]
    if name is not None:
        raise HostNotChosen(f"There is no enabled host {name}. GET /v1/hosts lists them.", field="host")
    if found:
        raise HostNotChosen("There are several hosts: say which one by `host`.", field="host")
    raise HostNotChosen("There is no enabled mail host yet: POST /v1/hosts adds one.", field="host")


async def get_host(connection: AsyncConnection, name: str) -> Row[Any]:
    row = (await connection.execute(_WITH_STATUS.where(hosts.c.name == name))).one_or_none()
    if row is None:
        raise _missing(name)
    return row


async def list_hosts(connection: AsyncConnection, *, after: str | None = None, limit: int) -> Sequence[Row[Any]]:
    query = _WITH_STATUS.order_by(hosts.c.name).limit(limit)
    if after is not None:
        query = query.where(hosts.c.name > after)
    return (await connection.execute(query)).all()


async def latest_jobs(connection: AsyncConnection, names: Sequence[str]) -> dict[str, JobRow]:
    """Of each host, the latest job about its configuration."""
    query = (
        select(jobs.c.host, jobs.c.id, jobs.c.state, jobs.c.error)
        .where(
            jobs.c.host.in_(names),
            jobs.c.kind == JobKind.MAILHOST_SYNC.value,
            jobs.c.subject_id == THE_HOST,
            jobs.c.state != JobState.SUPERSEDED,
        )
        .order_by(jobs.c.version, jobs.c.id)
    )
    return {row.host: JobRow(row.id, row.state, row.error) for row in await connection.execute(query)}


def _missing(name: str) -> NotFound:
    return NotFound(f"There is no host {name}. GET /v1/hosts lists them; POST /v1/hosts adds one.")
