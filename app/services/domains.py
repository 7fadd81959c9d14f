"""Mail domains: exactly one `primary`, any number of `virtual` and `relay`; and what their DNS should say."""

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import ValidationError
from sqlalchemy import Row, delete, insert, select, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncConnection

from app.addresses import DomainName
from app.db import duplicate_of, inserted_id, is_reference
from app.dns.settings import DomainSettings
from app.errors import (
    BadField,
    DomainExists,
    DomainInUse,
    DomainIsRelay,
    NotFound,
    PrimaryDomainFixed,
    VersionConflict,
)
from app.models.addresses import AddressKind, addresses
from app.models.domains import DomainKind, domains
from app.models.hosts import SERVICE_HOST
from app.queue.contracts import JobKind, dns_lane
from app.queue.enqueue import enqueue
from app.services.audit_events import record_event
from app.services.changes import Change

_BY_NAME = select(domains)


async def create_domain(change: Change, name: DomainName, kind: DomainKind) -> int:
    values = {
        "name": name,
        "kind": kind.value,
        "primary_slot": 1 if kind is DomainKind.PRIMARY else None,
        "version": 1,
        "created_at": change.now,
        "updated_at": change.now,
    }
    try:
        result = await change.connection.execute(insert(domains), values)
    except IntegrityError as error:
        match duplicate_of(error):
            case "domains_name":
                raise DomainExists(f"The domain {name} is there already.", domain=str(name)) from None
            case "domains_primary_slot":
                raise PrimaryDomainFixed("There is a primary domain already, and it never changes.") from None
        raise
    domain_id = inserted_id(result)
    await record_event(change, "domains.create", "domain", name, after={"name": name, "kind": kind.value})
    return domain_id


async def change_domain(
    change: Change, name: DomainName, wanted: Mapping[str, Any], *, expected_version: int | None = None
) -> int:
    """Sets single members of `settings` (null: the default again). What is so already is no change. Returns the domain's id.

    Raises DomainIsRelay, and BadField for a setting that cannot be.
    """
    row = (
        await change.connection.execute(select(domains).where(domains.c.name == name).with_for_update())
    ).one_or_none()
    if row is None:
        raise missing_domain(name)
    if expected_version is not None and row.version != expected_version:
        raise VersionConflict(f"The domain is at version {row.version}.", version=row.version)
    settings = _merged_settings(row.settings, wanted.get("settings", {}))
    if settings == row.settings:
        return int(row.id)
    if row.kind == DomainKind.RELAY:
        raise DomainIsRelay(f"{name} is a relay domain: the host that has its mailboxes answers for its DNS.")
    await change.connection.execute(
        update(domains)
        .where(domains.c.id == row.id)
        .values(settings=settings, version=row.version + 1, updated_at=change.now)
    )
    await record_event(
        change, "domains.change", "domain", name, before={"settings": row.settings}, after={"settings": settings}
    )
    await publish_domain(change, row.id)
    return int(row.id)


def _merged_settings(present: Mapping[str, Any], wanted: Mapping[str, Any]) -> dict[str, Any]:
    """What is stored: only what differs from the defaults of `DomainSettings`, which is the judge."""
    for name in wanted:
        if name not in DomainSettings.model_fields:
            place = name[:64].replace("~", "~0").replace("/", "~1")
            known = ", ".join(DomainSettings.model_fields)
            raise BadField(f"There is no such setting. These are: {known}.", field=f"settings/{place}")
    merged = {name: value for name, value in {**_known(present), **wanted}.items() if value is not None}
    try:
        checked = DomainSettings.model_validate(merged)
    except ValidationError as error:
        fault = error.errors(include_url=False, include_input=False)[0]
        place = "/".join(["settings", *map(str, fault["loc"])])
        raise BadField(f"{fault['msg'].removeprefix('Value error, ')}.", field=place) from None
    return checked.model_dump(mode="json", exclude_defaults=True)


def domain_settings(stored: Mapping[str, Any]) -> DomainSettings:
    """Of a row of `domains`."""
    return DomainSettings.model_validate(_known(stored))


def _known(stored: Mapping[str, Any]) -> dict[str, Any]:
    """An earlier release may have had more settings."""
    return {name: value for name, value in stored.items() if name in DomainSettings.model_fields}


async def publish_domain(change: Change, domain_id: int) -> int:
    """The service process takes the domain's keys and records a step further at once. Returns the job's id."""
    version = (await change.connection.execute(select(domains.c.version).where(domains.c.id == domain_id))).scalar()
    if version is None:
        raise missing_domain(domain_id)
    return await enqueue(
        change.connection,
        JobKind.DNS_PUBLISH,
        host=SERVICE_HOST,
        lane=dns_lane(domain_id),
        subject_id=domain_id,
        version=version,
        request_id=change.actor.request_id,
        now=change.now,
    )


async def delete_domain(change: Change, name: DomainName, *, expected_version: int | None = None) -> None:
    """Only one that never had an account or alias: their rows stay for ever, and so does their domain."""
    domain = await get_domain(change.connection, name)
    if expected_version is not None and domain.version != expected_version:
        raise VersionConflict(f"The domain is at version {domain.version}.", version=domain.version)
    if domain.kind == DomainKind.PRIMARY:
        raise PrimaryDomainFixed(f"{name} is the primary domain. It cannot be deleted.")
    try:
        result = await change.connection.execute(delete(domains).where(domains.c.id == domain.id))
    except IntegrityError as error:
        if is_reference(error):
            raise DomainInUse(
                f"{name} has, or had, accounts, aliases or DKIM keys. Their rows are kept so that no id, and no selector, is "
                "given out twice, so the domain stays."
            ) from None
        raise
    if result.rowcount == 0:
        raise missing_domain(name)  # somebody deleted it since
    await record_event(change, "domains.delete", "domain", name, before={"name": name, "kind": domain.kind})


async def get_domain(connection: AsyncConnection, name: str | int) -> Row[Any]:
    column = domains.c.id if isinstance(name, int) else domains.c.name
    row = (await connection.execute(_BY_NAME.where(column == name))).one_or_none()
    if row is None:
        raise missing_domain(name)
    return row


async def list_domains(
    connection: AsyncConnection, *, kind: DomainKind | None = None, after: int | None = None, limit: int
) -> Sequence[Row[Any]]:
    query = select(domains).order_by(domains.c.id).limit(limit)
    if kind is not None:
        query = query.where(domains.c.kind == kind.value)
    if after is not None:
        query = query.where(domains.c.id > after)
    return (await connection.execute(query)).all()


NEEDED = ("postmaster", "abuse")
"""Addresses that every domain with mail must have: RFC 2142, sections 4 and 5; RFC 5321, section 4.5.1."""


async def missing_addresses(connection: AsyncConnection, rows: Sequence[Row[Any]]) -> dict[int, list[str]]:
    """Of each domain, which of NEEDED nobody has yet. A relay's are its own host's business."""
    wanted = {f"{name}@{row.name}": (row.id, name) for row in rows if row.kind != DomainKind.RELAY for name in NEEDED}
    query = select(addresses.c.address).where(
        addresses.c.address.in_(wanted), addresses.c.kind != AddressKind.TOMBSTONE
    )
    there = set((await connection.execute(query)).scalars())
    found: dict[int, list[str]] = {row.id: [] for row in rows}
    for address, (domain_id, name) in wanted.items():
        if address not in there:
            found[domain_id].append(name)
    return found


def missing_domain(name: str | int) -> NotFound:
    return NotFound(f"There is no domain {name} here. GET /v1/domains lists them; POST /v1/domains adds one.")
