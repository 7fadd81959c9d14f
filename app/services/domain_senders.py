"""Who else may send as a domain: what its SPF record (RFC 7208) is made from, beside the domain's own `mx`."""

from collections.abc import Iterable, Sequence
from ipaddress import ip_network
from typing import Any

from sqlalchemy import Row, delete, insert, select, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncConnection

from app.addresses import DomainName
from app.db import duplicate_of, inserted_id
from app.errors import BadAddress, BadField, DomainIsRelay, NotFound, SenderExists, TooManyLookups
from app.models.domain_senders import SenderKind, domain_senders
from app.models.domains import DomainKind, domains
from app.services.audit_events import record_event
from app.services.changes import Change
from app.services.domains import get_domain, missing_domain, publish_domain

MOST_LOOKUPS = 10
"""RFC 7208, section 4.6.4. What an included record looks up by itself counts too, and is not ours to know."""

WIDEST = {SenderKind.IP4: 8, SenderKind.IP6: 16}
"""A shorter prefix would let a great part of the internet send."""


async def create_domain_sender(change: Change, domain: DomainName, kind: SenderKind, value: str, note: str) -> int:
    """Returns its id. Raises BadField, DomainIsRelay, SenderExists and TooManyLookups."""
    row = await _lock(change, domain)
    if row.kind == DomainKind.RELAY:
        raise DomainIsRelay(f"{domain} is a relay domain: the host that has its mailboxes answers for its DNS.")
    value = _checked(domain, kind, value)
    if (kind, value) == (SenderKind.MX, ""):
        raise SenderExists(f"The servers that take mail for {domain} may always send as it.", field="value")
    query = select(domain_senders.c.kind).where(domain_senders.c.domain_id == row.id)
    present = (await change.connection.execute(query)).scalars()
    needed = lookups([*present, kind])
    values = {"domain_id": row.id, "kind": kind.value, "value": value, "note": note, "created_at": change.now}
    try:
        sender_id = inserted_id(await change.connection.execute(insert(domain_senders), values))
    except IntegrityError as error:
        if duplicate_of(error) in ("domain_senders_value", "domain_senders_domain_id_kind_value"):
            raise SenderExists(f"{domain} has this sender already: {mechanism(kind, value)}", field="value") from None
        raise
    if needed > MOST_LOOKUPS and kind not in WIDEST:
        raise TooManyLookups(f"With this one, receivers would need {needed} DNS lookups.", lookups=needed)
    after = {"domain": domain, "kind": kind.value, "value": value, "note": note}
    await record_event(change, "senders.create", "sender", sender_id, after=after)
    await _changed(change, row)
    return sender_id


async def delete_domain_sender(change: Change, domain: DomainName, sender_id: int) -> None:
    """Raises NotFound."""
    row = await _lock(change, domain)
    sender = await get_domain_sender(change.connection, domain, sender_id)
    await change.connection.execute(delete(domain_senders).where(domain_senders.c.id == sender_id))
    before = {"domain": domain, "kind": sender.kind, "value": sender.value, "note": sender.note}
    await record_event(change, "senders.delete", "sender", sender_id, before=before)
    await _changed(change, row)


async def get_domain_sender(connection: AsyncConnection, domain: DomainName, sender_id: int) -> Row[Any]:
    row = await get_domain(connection, domain)
    query = select(domain_senders).where(domain_senders.c.domain_id == row.id, domain_senders.c.id == sender_id)
    found = (await connection.execute(query)).one_or_none()
    if found is None:
        raise NotFound(f"{domain} has no sender {sender_id}. GET /v1/domains/{domain}/senders lists them.")
    return found


async def list_domain_senders(
    connection: AsyncConnection, domain: DomainName, *, after: int | None = None, limit: int
) -> Sequence[Row[Any]]:
    """In the order in which they were added."""
    row = await get_domain(connection, domain)
    query = select(domain_senders).where(domain_senders.c.domain_id == row.id)
    if after is not None:
        query = query.where(domain_senders.c.id > after)
    return (await connection.execute(query.order_by(domain_senders.c.id).limit(limit))).all()


def mechanism(kind: str, value: str) -> str:
    """As the SPF record has it (RFC 7208, section 5)."""
    return f"{kind}:{value}" if value else kind


def lookups(kinds: Iterable[str]) -> int:
    """That a record with the domain's own `mx` and these needs, those of included records left out."""
    return 1 + sum(kind not in WIDEST for kind in kinds)


def _checked(domain: DomainName, kind: SenderKind, value: str) -> str:
    """As it is stored. Raises BadField."""
    if kind in WIDEST:
        return _network(kind, value)
    if value == "" and kind is not SenderKind.INCLUDE:
        return ""
    try:
        # The names of SPF records often begin with an underscore, which no host's name has.
        DomainName(value.replace("_", "0"))
    except BadAddress as error:
        raise BadField(f"{error.detail} Underscores, too, are taken here.", field="value") from None
    name = value.lower()
    if name != domain:
        return name
    if kind is SenderKind.INCLUDE:
        raise BadField("A record that includes itself never ends.", field="value")
    return ""


def _network(kind: SenderKind, value: str) -> str:
    try:
        network = ip_network(value)
    except ValueError:
        network = None
    if network is None or f"ip{network.version}" != kind or "%" in value:
        raise BadField(
            f"{kind} takes an address or a network of that kind, no bit set behind its prefix.", field="value"
        )
    if network.prefixlen < WIDEST[kind]:
        raise BadField(f"The widest network that {kind} takes here is a /{WIDEST[kind]}.", field="value")
    return str(network.network_address) if network.prefixlen == network.max_prefixlen else str(network)


async def _lock(change: Change, name: DomainName) -> Row[Any]:
    """Whoever has it counts alone."""
    row = (
        await change.connection.execute(select(domains).where(domains.c.name == name).with_for_update())
    ).one_or_none()
    if row is None:
        raise missing_domain(name)
    return row


async def _changed(change: Change, domain: Row[Any]) -> None:
    """The domain's records are others now: a version, and a job that is about it."""
    version = domain.version + 1
    await change.connection.execute(
        update(domains).where(domains.c.id == domain.id).values(version=version, updated_at=change.now)
    )
    await publish_domain(change, domain.id)
