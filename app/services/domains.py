"""Mail domains: exactly one `primary`, any number of `virtual` and `relay`."""

from collections.abc import Sequence
from typing import Any

from sqlalchemy import Row, delete, insert, select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncConnection

from app.addresses import DomainName
from app.db import duplicate_of, inserted_id, is_reference
from app.errors import DomainExists, DomainInUse, NotFound, PrimaryDomainFixed, VersionConflict
from app.models.addresses import AddressKind, addresses
from app.models.domains import DomainKind, domains
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
                f"{name} has, or had, accounts or aliases. Their rows are kept so that no id is given out twice, so the domain "
                "stays."
            ) from None
        raise
    if result.rowcount == 0:
        raise _missing(name)  # somebody deleted it since
    await record_event(change, "domains.delete", "domain", name, before={"name": name, "kind": domain.kind})


async def get_domain(connection: AsyncConnection, name: str | int) -> Row[Any]:
    column = domains.c.id if isinstance(name, int) else domains.c.name
    row = (await connection.execute(_BY_NAME.where(column == name))).one_or_none()
    if row is None:
        raise _missing(name)
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


def _missing(name: str | int) -> NotFound:
    return NotFound(f"There is no domain {name} here. GET /v1/domains lists them; POST /v1/domains adds one.")
