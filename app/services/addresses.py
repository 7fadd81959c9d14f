"""Whose address is it, and can it be had."""

from dataclasses import dataclass
from enum import StrEnum

from sqlalchemy import and_, insert, select, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncConnection

from app.addresses import RESERVED_LOCAL_PARTS, MailAddress
from app.db import duplicate_of
from app.errors import AddressReserved, AddressRetired, UserExists
from app.models.addresses import AddressKind, addresses
from app.models.domains import DomainKind, domains
from app.models.users import users

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


async def claim_address(
    connection: AsyncConnection, address: MailAddress, kind: AddressKind, subject_id: int, *, reuse: bool = False
) -> None:
    """The one insert that makes an address somebody's. With `reuse` it may be a deleted account's."""
    check_reserved(address)
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


def check_reserved(address: MailAddress) -> None:
    if address.local_part in RESERVED_LOCAL_PARTS:
        raise AddressReserved(
            f"{address.local_part} is kept for the mail system (RFC 2142 and system users) and cannot be an account.",
            field="address",
        )


async def holder_of(connection: AsyncConnection, address: str) -> UserExists | AddressRetired:
    """Who has it, as the error to raise."""
    # READ COMMITTED sees the row that the insert ran into, unless its transaction was rolled back since.
    row = (
        await connection.execute(
            select(addresses.c.kind, addresses.c.subject_id, users.c.external_id)
            .join(users, users.c.id == addresses.c.subject_id, isouter=True)
            .where(addresses.c.address == address)
        )
    ).one_or_none()
    if row is not None and row.kind == AddressKind.TOMBSTONE:
        return AddressRetired(
            f"{address} belongs to a deleted account. Restore that account, or send `reuse_address: true` to give the "
            "address to someone else, who gets an empty mailbox.",
            user_id=row.subject_id,
        )
    members = {"id": row.subject_id, "external_id": row.external_id} if row and row.kind == AddressKind.USER else {}
    return UserExists(f"{address} is taken.", **members)


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
        return AddressReport(address, status, detail, None if status is AddressStatus.ALIAS else row.subject_id)
    if address.local_part in RESERVED_LOCAL_PARTS:
        return AddressReport(address, AddressStatus.RESERVED, "Kept for the mail system (RFC 2142 and system users).")
    kind = (
        await connection.execute(select(domains.c.kind).where(domains.c.name == address.domain))
    ).scalar_one_or_none()
    if kind is None or kind == DomainKind.RELAY:
        return AddressReport(address, AddressStatus.NO_DOMAIN, f"{address.domain} is no domain with mailboxes here.")
    return AddressReport(address, AddressStatus.FREE, "Nobody has this address, and nobody had it.")
