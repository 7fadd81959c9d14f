"""Mail hosts: where mailboxes lie. Each has a worker, which alone writes how it does."""

from collections.abc import Sequence
from typing import Any

from sqlalchemy import Row, delete, insert, select, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncConnection

from app.db import duplicate_of, is_reference
from app.errors import HostExists, HostInUse, HostNotChosen, NotFound, VersionConflict
from app.models.hosts import host_status, hosts
from app.services.audit_events import record_event
from app.services.changes import Change

_WITH_STATUS = select(
    hosts,
    host_status.c.heartbeat_at,
    host_status.c.started_at,
    host_status.c.release,
    host_status.c.swept_at,
    host_status.c.sweep,
).join(host_status, host_status.c.host == hosts.c.name, isouter=True)


async def create_host(change: Change, name: str, *, enabled: bool = True) -> str:
    values = {
        "name": name,
        "enabled": enabled,
        "settings": {},
        "version": 1,
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
    return name


async def change_host(change: Change, name: str, *, enabled: bool, expected_version: int | None = None) -> str:
    """A host that is not enabled gets no new accounts; those that it has stay."""
    row = (await change.connection.execute(select(hosts).where(hosts.c.name == name).with_for_update())).one_or_none()
    if row is None:
        raise _missing(name)
    if expected_version is not None and row.version != expected_version:
        raise VersionConflict(f"The host is at version {row.version}, not {expected_version}.", version=row.version)
    if row.enabled == enabled:
        return name
    await change.connection.execute(
        update(hosts)
        .where(hosts.c.name == name)
        .values(enabled=enabled, version=row.version + 1, updated_at=change.now)
    )
    await record_event(
        change, "hosts.change", "host", name, before={"enabled": row.enabled}, after={"enabled": enabled}
    )
    return name


async def delete_host(change: Change, name: str, *, expected_version: int | None = None) -> None:
    """Only one that never had a mailbox. Raises HostInUse and VersionConflict."""
    row = (await change.connection.execute(select(hosts).where(hosts.c.name == name).with_for_update())).one_or_none()
    if row is None:
        raise _missing(name)
    if expected_version is not None and row.version != expected_version:
        raise VersionConflict(f"The host is at version {row.version}, not {expected_version}.", version=row.version)
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


def _missing(name: str) -> NotFound:
    return NotFound(f"There is no host {name}. GET /v1/hosts lists them; POST /v1/hosts adds one.")
