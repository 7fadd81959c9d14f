"""Whose address is it, can it be had, and where does its mail go."""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from sqlalchemy import and_, delete, func, insert, or_, select, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncConnection

from app.addresses import NEVER_ALIASES, RESERVED_LOCAL_PARTS, MailAddress
from app.db import duplicate_of
from app.errors import AddressReserved, AddressRetired, AliasExists, UserExists
from app.models.addresses import AddressKind, addresses
from app.models.aliases import alias_destinations, aliases
from app.models.domains import DomainKind, domains
from app.models.users import UserState, users

_INSERT = insert(addresses)


class AddressStatus(StrEnum):
    FREE = "free"
    USER = "user"
    ALIAS = "alias"
    TOMBSTONE = "tombstone"
    RESERVED = "reserved"
    NO_DOMAIN = "no_domain"


@dataclass(frozen=True, slots=True)
class AddressReport:
    address: str
    status: AddressStatus
    detail: str
    user_id: int | None = None
    alias_id: int | None = None


async def claim_address(
    connection: AsyncConnection, address: MailAddress, kind: AddressKind, subject_id: int, *, reuse: bool = False
) -> None:
    """The one insert that makes an address somebody's. With `reuse` it may be a deleted account's."""
    check_reserved(address, kind)
    values = {"address": address, "kind": kind.value, "subject_id": subject_id}
    try:
        await connection.execute(_INSERT, values)
        return
    except IntegrityError as error:
        if duplicate_of(error) not in ("primary", "addresses_address"):
            raise
    if reuse and await _retake(connection, address, None, kind, subject_id):
        return
    raise await holder_of(connection, address)


async def reclaim_address(connection: AsyncConnection, address: MailAddress, user_id: int) -> None:
    """Gives a deleted user their own tombstone back."""
    if not await _retake(connection, address, user_id, AddressKind.USER, user_id):
        raise await holder_of(connection, address)


async def release_address(connection: AsyncConnection, address: str, user_id: int) -> None:
    """Leaves a tombstone, so that nobody else gets the address by accident."""
    await connection.execute(
        update(addresses)
        .where(addresses.c.address == address, addresses.c.kind == AddressKind.USER, addresses.c.subject_id == user_id)
        .values(kind=AddressKind.TOMBSTONE)
    )


async def _retake(
    connection: AsyncConnection, address: str, from_user: int | None, kind: AddressKind, subject_id: int
) -> bool:
    tombstone = and_(addresses.c.address == address, addresses.c.kind == AddressKind.TOMBSTONE)
    if from_user is not None:
        tombstone = and_(tombstone, addresses.c.subject_id == from_user)
    taken = await connection.execute(update(addresses).where(tombstone).values(kind=kind.value, subject_id=subject_id))
    return taken.rowcount == 1


async def forget_alias_address(connection: AsyncConnection, address: str, alias_id: int) -> None:
    """Makes it free; or the tombstone again that it was before, if a deleted account had it."""
    mine = and_(
        addresses.c.address == address, addresses.c.kind == AddressKind.ALIAS, addresses.c.subject_id == alias_id
    )
    query = select(func.max(users.c.id)).where(users.c.address == address, users.c.state == UserState.DELETED)
    deleted = (await connection.execute(query)).scalar()
    if deleted is None:
        await connection.execute(delete(addresses).where(mine))
    else:
        values = {"kind": AddressKind.TOMBSTONE.value, "subject_id": deleted}
        await connection.execute(update(addresses).where(mine).values(**values))


def check_reserved(address: MailAddress, kind: AddressKind = AddressKind.USER) -> None:
    if kind is AddressKind.ALIAS:
        if address.local_part in NEVER_ALIASES:
            raise AddressReserved(f"{address.local_part} is the mail system's own: bounces go there.", field="address")
        return
    if address.local_part in RESERVED_LOCAL_PARTS:
        raise AddressReserved(
            f"{address.local_part} is kept for the mail system (RFC 2142 and system users) and cannot be an account.",
            field="address",
        )


async def holder_of(connection: AsyncConnection, address: str) -> UserExists | AliasExists | AddressRetired:
    """Who has it, as the error to raise."""
    # READ COMMITTED sees the row that the insert ran into, unless its transaction was rolled back since.
    row = (
        await connection.execute(
            select(addresses.c.kind, addresses.c.subject_id, users.c.external_id)
            .join(
                users, and_(users.c.id == addresses.c.subject_id, addresses.c.kind != AddressKind.ALIAS), isouter=True
            )
            .where(addresses.c.address == address)
        )
    ).one_or_none()
    if row is not None and row.kind == AddressKind.TOMBSTONE:
        return AddressRetired(
            f"{address} belongs to a deleted account. Restore that account, or send `reuse_address: true` to give the "
            "address to someone else, who gets an empty mailbox.",
            user_id=row.subject_id,
        )
    if row is not None and row.kind == AddressKind.ALIAS:
        return AliasExists(f"{address} is an alias.", id=row.subject_id)
    members = {"id": row.subject_id, "external_id": row.external_id} if row and row.kind == AddressKind.USER else {}
    return UserExists(f"{address} is taken.", **members)


@dataclass(frozen=True, slots=True)
class Hop:
    """One step of the way that mail takes."""

    address: str
    kind: str
    """`user`, `alias`, or `outside`."""
    leads_to: list[str]


MAX_HOPS = 200


async def follow_address(connection: AsyncConnection, address: str) -> list[Hop]:
    """Where mail to it goes, step by step, each address once, at most MAX_HOPS. Nowhere: an empty list.

    What a deleted account or alias would get is left out: Postfix leaves it out too.
    """
    hops: list[Hop] = []
    seen = {address}
    level = [address]
    while level and len(hops) < MAX_HOPS:
        query = select(addresses.c.address, addresses.c.kind, addresses.c.subject_id).where(
            addresses.c.address.in_(level), addresses.c.kind != AddressKind.TOMBSTONE
        )
        holders = {row.address: row for row in await connection.execute(query)}
        ids = [row.subject_id for row in holders.values() if row.kind == AddressKind.ALIAS]
        next_ones = await _destinations(connection, ids)
        following: list[str] = []
        for each in level:
            holder = holders.get(each)
            if holder is None:
                if each != address:
                    hops.append(Hop(each, "outside", []))
                continue
            leads_to = next_ones.get(holder.subject_id, []) if holder.kind == AddressKind.ALIAS else []
            hops.append(Hop(each, holder.kind, leads_to))
            for target in leads_to:
                if target not in seen:
                    seen.add(target)
                    following.append(target)
        level = following
    return hops[:MAX_HOPS]


async def _destinations(connection: AsyncConnection, ids: Sequence[int]) -> dict[int, list[str]]:
    other = aliases.alias("other")
    leads_to = func.coalesce(alias_destinations.c.address, other.c.address, users.c.address)
    query = (
        select(alias_destinations.c.alias_id, leads_to.label("address"))
        .select_from(
            alias_destinations.outerjoin(users, users.c.id == alias_destinations.c.user_id).outerjoin(
                other, other.c.id == alias_destinations.c.target_alias_id
            )
        )
        .where(
            alias_destinations.c.alias_id.in_(ids),
            or_(users.c.id.is_(None), users.c.state != UserState.DELETED),
            other.c.deleted_at.is_(None),
        )
        .order_by(alias_destinations.c.alias_id, alias_destinations.c.position)
    )
    found: dict[int, list[str]] = {}
    for row in await connection.execute(query):
        found.setdefault(row.alias_id, []).append(row.address)
    return found


async def report_address(connection: AsyncConnection, address: MailAddress) -> AddressReport:
    """Free, or why not. Says nothing about the account behind it but its id."""
    row = (
        await connection.execute(select(addresses.c.kind, addresses.c.subject_id).where(addresses.c.address == address))
    ).one_or_none()
    if row is not None:
        status = AddressStatus(row.kind)
        detail = {
            AddressStatus.USER: "An account has this address.",
            AddressStatus.ALIAS: "An alias has this address.",
            AddressStatus.TOMBSTONE: "A deleted account had this address. Restore it, or create with `reuse_address: true`.",
        }[status]
        if status is AddressStatus.ALIAS:
            return AddressReport(address, status, detail, alias_id=row.subject_id)
        return AddressReport(address, status, detail, row.subject_id)
    if address.local_part in RESERVED_LOCAL_PARTS:
        return AddressReport(address, AddressStatus.RESERVED, "Kept for the mail system (RFC 2142 and system users).")
    kind = (
        await connection.execute(select(domains.c.kind).where(domains.c.name == address.domain))
    ).scalar_one_or_none()
    if kind is None or kind == DomainKind.RELAY:
        return AddressReport(address, AddressStatus.NO_DOMAIN, f"{address.domain} is no domain with mailboxes here.")
    return AddressReport(address, AddressStatus.FREE, "Nobody has this address, and nobody had it.")
