"""Who may send as what, and why. The answer is that of the view which Postfix and the policy process read."""

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum

from sqlalchemy import and_, column, select, table
from sqlalchemy.ext.asyncio import AsyncConnection

from app.addresses import MailAddress, OutsideAddress
from app.models.addresses import AddressKind, addresses
from app.models.aliases import AliasKind, aliases, sender_rules
from app.models.domains import DomainKind, domains
from app.models.users import UserState, users

SENDERS = table("postfix_senders", column("address"), column("login"))
"""The view."""


class Reason(StrEnum):
    """Strings that never change: programs compare them."""

    OWN = "own"
    DESIGNATED = "designated"
    NO_SUCH_LOGIN = "no_such_login"
    SUSPENDED = "suspended"
    NOT_READY = "not_ready"
    NOT_OURS = "not_ours"
    NOBODYS = "nobodys"
    SOMEBODY_ELSES = "somebody_elses"
    RECEIVE_ONLY = "receive_only"
    NOT_DESIGNATED = "not_designated"


@dataclass(frozen=True, slots=True)
class Verdict:
    allowed: bool
    reason: Reason
    detail: str


async def list_send_as(connection: AsyncConnection, login: MailAddress) -> list[tuple[str, Reason]]:
    """What this login may send as: itself first, then its aliases. Nothing while it is suspended or not ready."""
    query = select(SENDERS.c.address).where(SENDERS.c.login == login)
    return with_reasons(login, (await connection.execute(query)).scalars())


def with_reasons(login: str, found: Iterable[str]) -> list[tuple[str, Reason]]:
    """Of what the view has for this login; itself first."""
    ordered = sorted(found, key=lambda address: (address != login, address))
    return [(address, Reason.OWN if address == login else Reason.DESIGNATED) for address in ordered]


async def list_senders(connection: AsyncConnection, address: MailAddress) -> list[str]:
    """The logins that may send as this address."""
    query = select(SENDERS.c.login).where(SENDERS.c.address == address).order_by(SENDERS.c.login)
    return list((await connection.execute(query)).scalars())


async def judge_sender(connection: AsyncConnection, login: MailAddress, sender: OutsideAddress) -> Verdict:
    """Whether Postfix takes `sender` from `login`, in the envelope and in From. An extension (`+list`) changes nothing."""
    plain = without_extension(sender)
    query = select(SENDERS.c.login).where(SENDERS.c.address == plain, SENDERS.c.login == login)
    if (await connection.execute(query)).first() is not None:
        if plain == login:
            return Verdict(True, Reason.OWN, f"{plain} is the account itself.")
        return Verdict(True, Reason.DESIGNATED, f"{login} is designated for {plain}.")
    return await _why_not(connection, login, plain)


def without_extension(address: OutsideAddress) -> str:
    """In lower case, as addresses of ours are."""
    local, _, domain = address.lower().rpartition("@")
    return f"{local.partition('+')[0]}@{domain}"


async def _why_not(connection: AsyncConnection, login: MailAddress, sender: str) -> Verdict:
    user = (
        await connection.execute(
            select(users.c.id, users.c.state)
            .join(addresses, and_(addresses.c.subject_id == users.c.id, addresses.c.kind == AddressKind.USER))
            .where(addresses.c.address == login)
        )
    ).one_or_none()
    if user is None:
        return Verdict(False, Reason.NO_SUCH_LOGIN, f"There is no account {login}.")
    if user.state != UserState.ACTIVE:
        return Verdict(False, Reason.SUSPENDED, f"{login} is suspended and sends nothing.")
    holder = (
        await connection.execute(select(addresses.c.kind, addresses.c.subject_id).where(addresses.c.address == sender))
    ).one_or_none()
    if holder is None or holder.kind == AddressKind.TOMBSTONE:
        ours = select(domains.c.kind).where(domains.c.name == sender.rpartition("@")[2])
        if (await connection.execute(ours)).scalar() in (DomainKind.PRIMARY, DomainKind.VIRTUAL):
            return Verdict(False, Reason.NOBODYS, f"Nobody has {sender}.")
        return Verdict(False, Reason.NOT_OURS, f"{sender} is in none of our domains.")
    if holder.kind == AddressKind.USER:
        if sender == login:
            return Verdict(False, Reason.NOT_READY, f"The mail host is not ready for {login} yet.")
        return Verdict(False, Reason.SOMEBODY_ELSES, f"{sender} is somebody else's account.")
    rule = and_(sender_rules.c.alias_id == aliases.c.id, sender_rules.c.user_id == user.id)
    query = select(aliases.c.kind, sender_rules.c.user_id).select_from(aliases.outerjoin(sender_rules, rule))
    alias = (await connection.execute(query.where(aliases.c.id == holder.subject_id))).one()
    if alias.kind == AliasKind.RECEIVE_ONLY:
        return Verdict(False, Reason.RECEIVE_ONLY, f"{sender} is an alias that nobody sends as (receive_only).")
    if alias.user_id is not None:
        return Verdict(False, Reason.NOT_READY, f"The mail host is not ready for {login} yet.")
    return Verdict(
        False, Reason.NOT_DESIGNATED, f"{login} is not designated for {sender}; to receive its mail is not enough."
    )
