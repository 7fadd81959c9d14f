"""Aliases: create, change, delete, find. Each change is one row, one audit event and one job on every enabled host.

Destinations and designated users are kept by id, so that whoever has an address later inherits neither its mail nor its rights.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from sqlalchemy import CompoundSelect, Row, Select, and_, case, delete, func, insert, or_, select, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncConnection

from app.addresses import MailAddress, OutsideAddress
from app.db import inserted_id, is_reference
from app.errors import (
    AddressReserved,
    AliasDeleted,
    BadAddress,
    BadField,
    NoDestination,
    NotFound,
    OutsideRefused,
    PlaceGone,
    SrsNeeded,
    VersionConflict,
)
from app.models.addresses import AddressKind, addresses
from app.models.aliases import AliasKind, alias_destinations, aliases, sender_rules
from app.models.domains import DomainKind, domains
from app.models.hosts import hosts
from app.models.jobs import JobRow, JobState, applied, jobs
from app.models.users import UserState, users
from app.queue.contracts import ALIASES_LANE, JobKind
from app.queue.enqueue import enqueue, enqueue_many
from app.services.addresses import claim_address, forget_alias_address
from app.services.alias_graph import check_graph, loops, one_at_a_time
from app.services.audit_events import record_event
from app.services.changes import Change
from app.services.ranks import check_rank, check_rank_of_contact, check_rank_of_predecessor, higher_roles

KIND = JobKind.ALIASES_SYNC.value
MAX_DESTINATIONS = 100


@dataclass(frozen=True, slots=True)
class NewAlias:
    address: MailAddress
    kind: AliasKind
    destinations: Sequence[str]
    designated: Sequence[MailAddress] = ()
    note: str = ""
    reuse_address: bool = False


class Lapsed(NamedTuple):
    """A deleted user or alias that the alias still refers to: it gets nothing, and may nothing."""

    address: str
    was: str
    """`destination` or `designated`."""
    reason: str
    """`account_deleted`, which a restoration takes back; `account_purged` and `alias_deleted`, which only a change of this
    alias ends: whoever has the address now is somebody else."""


@dataclass(slots=True)
class AliasRecord:
    """An alias as it should be, and what its hosts say of it."""

    row: Row[Any]
    destinations: list[str] = field(default_factory=list)
    designated: list[str] = field(default_factory=list)
    lapsed: list[Lapsed] = field(default_factory=list)
    proofs: dict[str, Any] = field(default_factory=dict)
    """By host."""
    revision: int = 0
    ready: bool = True
    job: JobRow | None = None

    @property
    def id(self) -> int:
        return int(self.row.id)


@dataclass(frozen=True, slots=True)
class AliasFilter:
    domain: str | None = None
    kind: AliasKind | None = None
    destination: str | None = None
    designated: str | None = None
    address: str | None = None
    deleted: bool = False


async def create_alias(change: Change, new: NewAlias) -> int:
    """Raises AliasExists, UserExists, AddressRetired, NoDestination, OutsideRefused, AliasLoops, AliasTooDeep, BadField."""
    connection = change.connection
    domain = await _domain(connection, new.address)
    targets = await _resolve(connection, new.address, new.destinations)
    if any(target.user_id is None for target in targets):
        await one_at_a_time(connection)
        targets = await _resolve(connection, new.address, new.destinations)  # as it is while nobody else changes it
    designated = await _designate(connection, new.kind, new.designated)
    await check_rank(change, *designated)
    if new.reuse_address:
        await check_rank_of_predecessor(change, new.address)
    values = {
        "address": new.address,
        "local_part": new.address.local_part,
        "domain_id": domain.id,
        "kind": new.kind.value,
        "note": new.note,
        "version": 1,
        "created_at": change.now,
        "updated_at": change.now,
    }
    try:
        alias_id = inserted_id(await connection.execute(insert(aliases), values))
    except IntegrityError as error:
        if is_reference(error):
            raise PlaceGone("The domain was removed at this moment. Look at it, and try again.") from None
        raise
    await claim_address(connection, new.address, AddressKind.ALIAS, alias_id, reuse=new.reuse_address)
    await _write_targets(connection, alias_id, targets)
    await _write_designated(connection, alias_id, designated)
    if any(target.target_alias_id for target in targets):
        await check_graph(connection, alias_id)
    after = {
        "address": new.address,
        "kind": new.kind.value,
        "destinations": list(new.destinations),
        "designated": list(new.designated),
        "note": new.note,
        "reuse_address": new.reuse_address,
    }
    await record_event(change, "aliases.create", "alias", alias_id, after=after)
    await _tell_owners(change, new.address, {}, await _involved(connection, alias_id))
    await _enqueue(change, {alias_id: 1})
    return alias_id


async def change_alias(
    change: Change, alias_id: int, wanted: Mapping[str, Any], *, expected_version: int | None = None
) -> int:
    """Sets some of `destinations`, `designated` and `note`. What is so already is no change."""
    connection = change.connection
    if "destinations" in wanted:
        await one_at_a_time(connection)
    row = await _lock(change, alias_id, expected_version)
    if row.deleted_at is not None:
        raise AliasDeleted(f"Alias {alias_id} is deleted. Create it anew: POST /v1/aliases.")
    new = {"note": wanted["note"]} if wanted.get("note", row.note) != row.note else {}
    targets: list[Target] = []
    designated: list[int] = []
    if "destinations" in wanted:
        targets = await _resolve(connection, MailAddress(row.address), wanted["destinations"])
        present_targets = await _present_targets(connection, alias_id)
        if targets != present_targets:
            new["destinations"] = wanted["destinations"]
            await _check_rank_of_targets(change, row, [target for target in present_targets if target not in targets])
    if "designated" in wanted:
        designated = await _designate(connection, AliasKind(row.kind), wanted["designated"])
        present_ones = await _present_designated(connection, alias_id)
        if designated != present_ones:
            new["designated"] = wanted["designated"]
            await check_rank(change, *(set(designated) ^ set(present_ones)))
    if not new:
        return alias_id
    present = (await _fill(connection, [row], hosts=False))[0]
    before = {"note": row.note, "destinations": present.destinations, "designated": present.designated}
    involved = await _involved(connection, alias_id)
    if "destinations" in new:
        await connection.execute(delete(alias_destinations).where(alias_destinations.c.alias_id == alias_id))
        await _write_targets(connection, alias_id, targets)
        if any(target.target_alias_id for target in targets):
            await check_graph(connection, alias_id)
    if "designated" in new:
        await connection.execute(delete(sender_rules).where(sender_rules.c.alias_id == alias_id))
        await _write_designated(connection, alias_id, designated)
    values = {"note": new["note"]} if "note" in new else {}
    await connection.execute(
        update(aliases).where(aliases.c.id == alias_id).values(**values, version=row.version + 1, updated_at=change.now)
    )
    kept = {name: before[name] for name in new}
    await record_event(change, "aliases.change", "alias", alias_id, before=kept, after=new)
    await _tell_owners(change, row.address, involved, await _involved(connection, alias_id))
    await _enqueue(change, {alias_id: row.version + 1})
    return alias_id


async def delete_alias(change: Change, alias_id: int, *, expected_version: int | None = None) -> int:
    """The address is free at once, and whatever leads to this alias leads nowhere. Deleting twice is no change."""
    connection = change.connection
    await one_at_a_time(connection)
    row = await _lock(change, alias_id, expected_version)
    if row.deleted_at is not None:
        return alias_id
    present = (await _fill(connection, [row], hosts=False))[0]
    await check_rank(change, *await _present_designated(connection, alias_id))
    await _check_rank_of_targets(change, row, await _present_targets(connection, alias_id))
    involved = await _involved(connection, alias_id)
    await forget_alias_address(connection, row.address, alias_id)
    await connection.execute(delete(alias_destinations).where(alias_destinations.c.alias_id == alias_id))
    await connection.execute(delete(sender_rules).where(sender_rules.c.alias_id == alias_id))
    await connection.execute(
        update(aliases)
        .where(aliases.c.id == alias_id)
        .values(deleted_at=change.now, updated_at=change.now, version=row.version + 1)
    )
    before = {"destinations": present.destinations, "designated": present.designated, "kind": row.kind}
    await record_event(change, "aliases.delete", "alias", alias_id, before={"address": row.address, **before})
    await _tell_owners(change, row.address, involved, {})
    await _enqueue(change, {alias_id: row.version + 1})
    leading_here = select(alias_destinations.c.alias_id).where(alias_destinations.c.target_alias_id == alias_id)
    await _touch(change, leading_here)
    return alias_id


async def _check_rank_of_targets(change: Change, row: Row[Any], lost: Sequence["Target"]) -> None:
    """Raises Outranked for who would take mail away from somebody of a higher rank, or get what is sent to that one's contact
    address. To lead more mail to somebody is nothing of the kind."""
    await check_rank(change, *(target.user_id for target in lost if target.user_id is not None))
    if not higher_roles(change.actor.rank):
        return
    known, leading = {row.id: row.address}, {row.id}
    while leading:
        query = select(aliases.c.id, aliases.c.address).join(
            alias_destinations, alias_destinations.c.alias_id == aliases.c.id
        )
        found = await change.connection.execute(query.where(alias_destinations.c.target_alias_id.in_(leading)))
        new = {each.id: each.address for each in found if each.id not in known}
        known |= new
        leading = set(new)
    await check_rank_of_contact(change, set(known.values()))


async def touch_aliases_of_user(change: Change, user_id: int) -> None:
    """For a user who comes or goes, and whose row is locked: what leads to them, or is sent as by them, differs from now on."""
    leading_there = select(alias_destinations.c.alias_id).where(alias_destinations.c.user_id == user_id)
    await _touch(change, leading_there.union(select(sender_rules.c.alias_id).where(sender_rules.c.user_id == user_id)))


async def touch_all_aliases(change: Change) -> None:
    """For a host that is enabled from now on: what it made true of aliases at another time, or what another machine of its
    name did, no longer counts. An alias that is made at this very moment the sweep finds."""
    standing = aliases.c.deleted_at.is_(None)
    await change.connection.execute(
        update(aliases).where(standing).values(version=aliases.c.version + 1, updated_at=change.now)
    )
    rows = await change.connection.execute(select(aliases.c.id, aliases.c.version).where(standing))
    if versions := {row.id: row.version for row in rows}:
        await _enqueue(change, versions)


async def _touch(change: Change, which: Select[Any] | CompoundSelect[Any]) -> None:
    """Raises the version of these aliases, and has every host look at them."""
    ids = sorted((await change.connection.execute(which)).scalars())
    standing = select(aliases.c.id, aliases.c.version).where(aliases.c.id.in_(ids), aliases.c.deleted_at.is_(None))
    found = await change.connection.execute(standing.order_by(aliases.c.id).with_for_update())
    versions = {row.id: row.version + 1 for row in found}
    if not versions:
        return
    await change.connection.execute(
        update(aliases).where(aliases.c.id.in_(versions)).values(version=aliases.c.version + 1, updated_at=change.now)
    )
    await _enqueue(change, versions)


async def resync_alias(change: Change, alias_id: int, host: str) -> int:
    """Another job for the alias as it is; used to try a dead one again. Returns the job's id."""
    row = await _lock(change, alias_id, None)
    return await enqueue(
        change.connection,
        JobKind.ALIASES_SYNC,
        host=host,
        lane=ALIASES_LANE,
        subject_id=alias_id,
        version=row.version,
        request_id=change.actor.request_id,
        now=change.now,
    )


async def _enqueue(change: Change, versions: Mapping[int, int]) -> None:
    """Of each alias its version. Every enabled host looks at each."""
    names = (await change.connection.execute(select(hosts.c.name).where(hosts.c.enabled))).scalars().all()
    for host in names:
        await enqueue_many(
            change.connection,
            JobKind.ALIASES_SYNC,
            host=host,
            lane=ALIASES_LANE,
            versions=versions,
            request_id=change.actor.request_id,
            now=change.now,
        )


async def _lock(change: Change, alias_id: int, expected_version: int | None) -> Row[Any]:
    query = select(aliases).where(aliases.c.id == alias_id).with_for_update()
    row = (await change.connection.execute(query)).one_or_none()
    if row is None:
        raise _missing(alias_id)
    if expected_version is not None and row.version != expected_version:
        raise VersionConflict(
            f"The alias is at version {row.version}, not {expected_version}: somebody changed it. Read it again.",
            version=row.version,
        )
    return row


async def _domain(connection: AsyncConnection, address: MailAddress) -> Any:
    query = select(domains.c.id, domains.c.kind).where(domains.c.name == address.domain)
    row: Any = (await connection.execute(query)).one_or_none()
    if row is None:
        raise BadField(f"{address.domain} is not a domain here: POST /v1/domains adds one.", field="address")
    if row.kind == DomainKind.RELAY:
        raise BadField(f"{address.domain} is passed on to another host, aliases included.", field="address")
    if row.kind == DomainKind.PRIMARY and address.local_part.startswith("owner-"):
        raise AddressReserved("Bounces of what goes through an alias NAME go to owner-NAME: local(8).", field="address")
    return row


# Where it leads


@dataclass(frozen=True, slots=True)
class Target:
    """Exactly one of these is set."""

    user_id: int | None = None
    target_alias_id: int | None = None
    address: str | None = None


_SPECIAL = re.compile(r"[|/-]|[^@]*[!%]")
"""At its beginning | is a program, / a file and - an option; ! and % are routes. aliases(5), and trivial-rewrite(8)."""


async def _resolve(connection: AsyncConnection, alias: str, destinations: Sequence[str]) -> list[Target]:
    """Raises NoDestination and OutsideRefused for the first that cannot be; `field` says which."""
    if not destinations:
        raise BadField("An alias leads somewhere: name at least one destination.", field="destinations")
    parsed: list[OutsideAddress] = []
    for number, text in enumerate(destinations):
        place = f"destinations/{number}"
        try:
            parsed.append(OutsideAddress(text))
        except BadAddress as error:
            raise BadAddress(error.detail, field=place) from None
        if _SPECIAL.match(text):
            raise BadAddress("It begins with |, / or -, or contains ! or %: Postfix takes that for more.", field=place)
    names = {destination.domain for destination in parsed}
    kinds: dict[str, str] = {
        row.name: row.kind
        for row in await connection.execute(select(domains.c.name, domains.c.kind).where(domains.c.name.in_(names)))
    }
    local = {text.lower() for text in parsed if kinds.get(text.domain) in (DomainKind.PRIMARY, DomainKind.VIRTUAL)}
    found = {
        row.address: row for row in await connection.execute(select(addresses).where(addresses.c.address.in_(local)))
    }
    srs: bool | None = None
    targets: list[Target] = []
    for number, destination in enumerate(parsed):
        place = f"destinations/{number}"
        if kinds.get(destination.domain) == DomainKind.RELAY:
            targets.append(Target(address=destination))
        elif destination.lower() not in local:
            srs = await _srs_everywhere(connection) if srs is None else srs
            if not srs:
                raise OutsideRefused(
                    f"{destination} is not ours, and mail that is passed on there would fail the sender's SPF. Turn on SRS on "
                    'every mail host first: PATCH /v1/hosts/{host} with {"settings": {"srs": true}}.',
                    field=place,
                )
            targets.append(Target(address=destination))
        else:
            holder = found.get(destination.lower())
            if holder is None or holder.kind == AddressKind.TOMBSTONE:
                if destination.lower() == alias:
                    raise loops([alias, alias], place)
                raise NoDestination(
                    f"There is no account and no alias {destination.lower()}: {alias} → {destination.lower()} leads nowhere.",
                    field=place,
                    chain=[alias, destination.lower()],
                )
            if holder.kind == AddressKind.USER:
                targets.append(Target(user_id=holder.subject_id))
            else:
                targets.append(Target(target_alias_id=holder.subject_id))
    if len(set(targets)) < len(targets):
        raise BadField("The same destination is named twice.", field="destinations")
    return targets


async def _srs_everywhere(connection: AsyncConnection) -> bool:
    settings = (await connection.execute(select(hosts.c.settings).where(hosts.c.enabled))).scalars().all()
    return bool(settings) and all(each.get("srs") is True for each in settings)


async def _designate(connection: AsyncConnection, kind: AliasKind, designated: Sequence[MailAddress]) -> list[int]:
    if kind is AliasKind.RECEIVE_ONLY and designated:
        raise BadField(
            "Nobody sends as a receive_only alias. One to send as is of the kind send_as.", field="designated"
        )
    query = select(addresses.c.address, addresses.c.subject_id).where(
        addresses.c.address.in_(designated), addresses.c.kind == AddressKind.USER
    )
    found = {row.address: row.subject_id for row in await connection.execute(query)}
    for number, address in enumerate(designated):
        if address not in found:
            raise NoDestination(f"There is no account {address}.", field=f"designated/{number}")
    return sorted(set(found.values()))


async def _present_targets(connection: AsyncConnection, alias_id: int) -> list[Target]:
    columns = alias_destinations.c
    query = select(columns.user_id, columns.target_alias_id, columns.address).where(columns.alias_id == alias_id)
    return [Target(*row) for row in await connection.execute(query.order_by(columns.position))]


async def _present_designated(connection: AsyncConnection, alias_id: int) -> list[int]:
    query = select(sender_rules.c.user_id).where(sender_rules.c.alias_id == alias_id)
    return list((await connection.execute(query.order_by(sender_rules.c.user_id))).scalars())


async def _involved(connection: AsyncConnection, alias_id: int) -> dict[int, dict[str, Any]]:
    """By account: whether mail to the alias reaches it at once, and whether it may send as the alias."""
    receiving = {
        target.user_id for target in await _present_targets(connection, alias_id) if target.user_id is not None
    }
    sending = set(await _present_designated(connection, alias_id))
    return {each: {"receives": each in receiving, "sends_as": each in sending} for each in sorted(receiving | sending)}


async def _tell_owners(
    change: Change, alias: str, before: Mapping[int, dict[str, Any]], after: Mapping[int, dict[str, Any]]
) -> None:
    """An event for each account that the alias newly involves, or otherwise than before: its owner reads no other one's."""
    nothing = {"receives": False, "sends_as": False}
    for user_id in sorted(before.keys() | after.keys()):
        had, has = before.get(user_id, nothing), after.get(user_id, nothing)
        if had != has:
            told = {"alias": alias}
            await record_event(change, "users.alias", "user", user_id, before={**told, **had}, after={**told, **has})


async def _write_targets(connection: AsyncConnection, alias_id: int, targets: Sequence[Target]) -> None:
    rows = [
        {
            "alias_id": alias_id,
            "position": position,
            "user_id": target.user_id,
            "target_alias_id": target.target_alias_id,
            "address": target.address,
        }
        for position, target in enumerate(targets)
    ]
    await connection.execute(insert(alias_destinations), rows)


async def _write_designated(connection: AsyncConnection, alias_id: int, designated: Sequence[int]) -> None:
    if designated:
        await connection.execute(
            insert(sender_rules), [{"alias_id": alias_id, "user_id": user_id} for user_id in designated]
        )


SHOWN = 10


async def refuse_outside(change: Change, field: str) -> None:
    """For a host that is about to pass mail on without SRS. Raises SrsNeeded while any alias leads elsewhere."""
    await one_at_a_time(change.connection)
    relayed = select(domains.c.name).where(domains.c.kind == DomainKind.RELAY)
    address = alias_destinations.c.address
    outside = address.is_not(None) & func.substr(address, func.instr(address, "@") + 1).not_in(relayed)
    query = select(aliases.c.address).where(aliases.c.id == alias_destinations.c.alias_id, outside)
    found = (await change.connection.execute(query.distinct().order_by(aliases.c.address))).scalars().all()
    if found:
        more = f" and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
        raise SrsNeeded(
            f"{', '.join(found[:SHOWN])}{more} lead to other mail servers, which would refuse what this host passes on without "
            "SRS. Lead them elsewhere or delete them first, or leave SRS on.",
            field=field,
            aliases=found[:SHOWN],
        )


# Reading


def _missing(key: object) -> NotFound:
    return NotFound(f"There is no alias {key}. GET /v1/aliases lists them.")


async def find_alias_id(connection: AsyncConnection, key: MailAddress | int) -> int:
    """By id, deleted or not; by address, only the one that has it now."""
    if isinstance(key, int):
        return key
    query = select(addresses.c.subject_id).where(addresses.c.address == key, addresses.c.kind == AddressKind.ALIAS)
    alias_id = (await connection.execute(query)).scalar_one_or_none()
    if alias_id is None:
        raise _missing(key)
    return int(alias_id)


async def get_alias(connection: AsyncConnection, key: MailAddress | int) -> AliasRecord:
    query = select(aliases)
    if isinstance(key, int):
        query = query.where(aliases.c.id == key)
    else:
        held = and_(addresses.c.subject_id == aliases.c.id, addresses.c.kind == AddressKind.ALIAS)
        query = query.join(addresses, held).where(addresses.c.address == key)
    row = (await connection.execute(query)).one_or_none()
    if row is None:
        raise _missing(key)
    return (await _fill(connection, [row]))[0]


async def list_aliases(
    connection: AsyncConnection, wanted: AliasFilter, *, after: int | None = None, limit: int
) -> list[AliasRecord]:
    """In the order of their ids."""
    query: Select[Any] = select(aliases).order_by(aliases.c.id).limit(limit)
    query = query.where(aliases.c.deleted_at.is_not(None) if wanted.deleted else aliases.c.deleted_at.is_(None))
    if after is not None:
        query = query.where(aliases.c.id > after)
    if wanted.domain is not None:
        domain = select(domains.c.id).where(domains.c.name == wanted.domain).scalar_subquery()
        query = query.where(aliases.c.domain_id == domain)
    if wanted.kind is not None:
        query = query.where(aliases.c.kind == wanted.kind.value)
    if wanted.address is not None:
        query = query.where(aliases.c.address == wanted.address)
    if wanted.destination is not None:
        holder = select(addresses.c.subject_id).where(addresses.c.address == wanted.destination.lower())
        there = or_(
            alias_destinations.c.address == wanted.destination,
            alias_destinations.c.user_id == holder.where(addresses.c.kind == AddressKind.USER).scalar_subquery(),
            alias_destinations.c.target_alias_id
            == holder.where(addresses.c.kind == AddressKind.ALIAS).scalar_subquery(),
        )
        query = query.where(aliases.c.id.in_(select(alias_destinations.c.alias_id).where(there)))
    if wanted.designated is not None:
        holder = select(addresses.c.subject_id).where(
            addresses.c.address == wanted.designated, addresses.c.kind == AddressKind.USER
        )
        rules = select(sender_rules.c.alias_id).where(sender_rules.c.user_id == holder.scalar_subquery())
        query = query.where(aliases.c.id.in_(rules))
    return await _fill(connection, (await connection.execute(query)).all())


async def _fill(connection: AsyncConnection, rows: Sequence[Row[Any]], *, hosts: bool = True) -> list[AliasRecord]:
    """Destinations, designated users, and with `hosts` what the hosts say: four queries for any number of aliases."""
    records = {row.id: AliasRecord(row) for row in rows}
    if not records:
        return []
    other = aliases.alias("other")
    users_gone = (
        (users.c.purged_at.is_not(None), "account_purged"),
        (users.c.state == UserState.DELETED, "account_deleted"),
    )
    gone = case(*users_gone, (other.c.deleted_at.is_not(None), "alias_deleted"))
    leads_to = func.coalesce(alias_destinations.c.address, other.c.address, users.c.address)
    query = (
        select(alias_destinations.c.alias_id, leads_to.label("address"), gone.label("gone"))
        .select_from(
            alias_destinations.outerjoin(users, users.c.id == alias_destinations.c.user_id).outerjoin(
                other, other.c.id == alias_destinations.c.target_alias_id
            )
        )
        .where(alias_destinations.c.alias_id.in_(records))
        .order_by(alias_destinations.c.alias_id, alias_destinations.c.position)
    )
    for row in await connection.execute(query):
        record = records[row.alias_id]
        if row.gone:
            record.lapsed.append(Lapsed(row.address, "destination", row.gone))
        else:
            record.destinations.append(row.address)
    rules = (
        select(sender_rules.c.alias_id, users.c.address, case(*users_gone).label("gone"))
        .join(users, users.c.id == sender_rules.c.user_id)
        .where(sender_rules.c.alias_id.in_(records))
        .order_by(users.c.address)
    )
    for row in await connection.execute(rules):
        record = records[row.alias_id]
        if row.gone:
            record.lapsed.append(Lapsed(row.address, "designated", row.gone))
        else:
            record.designated.append(row.address)
    for record in records.values():
        record.lapsed = sorted(set(record.lapsed))
    if hosts:
        await _add_hosts(connection, records)
    return list(records.values())


async def _add_hosts(connection: AsyncConnection, records: Mapping[int, AliasRecord]) -> None:
    """Ready means: on every enabled host the wanted version was applied, and no proof has failed since."""
    enabled = (await connection.execute(select(hosts.c.name).where(hosts.c.enabled))).scalars().all()
    # The hosts as values: joined, MariaDB walks through all that was applied on each.
    query = (
        select(applied.c.host, applied.c.subject_id, applied.c.version, applied.c.revision, applied.c.proofs)
        .where(applied.c.host.in_(enabled), applied.c.kind == KIND, applied.c.subject_id.in_(records))
        .order_by(applied.c.host)
    )
    done = dict.fromkeys(records, 0)
    for row in await connection.execute(query):
        record = records[row.subject_id]
        record.proofs[row.host] = row.proofs
        record.revision += row.revision
        failed = any(proof["result"] == "failed" for proof in row.proofs.values())
        done[row.subject_id] += row.version == record.row.version and not failed
    for alias_id, count in done.items():
        records[alias_id].ready = count == len(enabled) > 0
        records[alias_id].revision += len(enabled)  # a host that comes or goes changes the answer, and so its tag
    waiting = [alias_id for alias_id, record in records.items() if not record.ready]
    if not waiting or not enabled:
        return
    latest = (
        select(jobs.c.subject_id, jobs.c.id, jobs.c.state, jobs.c.error)
        .where(
            jobs.c.host.in_(enabled),
            jobs.c.kind == KIND,
            jobs.c.subject_id.in_(waiting),
            jobs.c.state != JobState.SUPERSEDED,
        )
        .order_by(jobs.c.version, jobs.c.state.in_((JobState.READY, JobState.RUNNING)), jobs.c.id)
    )
    for found in await connection.execute(latest):
        records[found.subject_id].job = JobRow(found.id, found.state, found.error)
