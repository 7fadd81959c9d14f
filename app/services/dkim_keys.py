"""DKIM keys: made, activated, rotated, deleted, and taken from state to state by the service process.

A row is what should be. Each change of it is one version, one audit event and one job for its host, whose worker makes the
private half, signs or signs no more, and deletes it. The lock is the domain's row: who holds it decides alone about selectors
and rotations. Sources: RFC 6376, RFC 8463.
"""

import re
from base64 import b64decode, b64encode
from binascii import Error as NotBase64
from collections.abc import Iterator, Sequence
from itertools import count, product
from string import ascii_lowercase
from typing import Any

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicKey
from cryptography.hazmat.primitives.serialization import load_der_public_key
from sqlalchemy import Row, Select, and_, insert, or_, select, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncConnection

from app.addresses import DomainName, Selector
from app.db import duplicate_of, inserted_id
from app.dns.records import Record, dkim_name, dkim_record
from app.errors import (
    BadField,
    DkimKeyExists,
    DkimKeySigns,
    DkimStepNotNow,
    DomainIsRelay,
    NotFound,
    RotationUnderWay,
    VersionConflict,
)
from app.models.dkim_keys import Algorithm, DkimState, dkim_keys
from app.models.domains import DomainKind, domains
from app.models.hosts import hosts
from app.models.jobs import JobRow, JobState, applied, jobs
from app.queue.contracts import DKIM_LANE, JobKind
from app.queue.enqueue import enqueue
from app.services.audit_events import record_event
from app.services.changes import Change
from app.services.domains import domain_settings, missing_domain, publish_domain
from app.services.hosts import choose_host, is_gone

NOT_YET_ACTIVE = (DkimState.GENERATING, DkimState.UNPUBLISHED, DkimState.PUBLISHED)

MOST_IN_A_NAME = 240
"""In the DNS 253 would do; the host has a file of this name."""

_REACHED = {
    DkimState.UNPUBLISHED: "generated_at",
    DkimState.PUBLISHED: "published_at",
    DkimState.ACTIVE: "active_at",
    DkimState.RETIRING: "retiring_at",
    DkimState.REVOKED: "revoked_at",
    DkimState.REMOVED: "removed_at",
}
_VERBS = {
    DkimState.UNPUBLISHED: "generate",
    DkimState.PUBLISHED: "publish",
    DkimState.ACTIVE: "sign",
    DkimState.RETIRING: "retire",
    DkimState.REVOKED: "revoke",
    DkimState.REMOVED: "remove",
}
"""What the audit trail calls each; `activate` and `delete` are what people ask for."""

DKIM_KEYS: Select[Any] = select(
    dkim_keys,
    domains.c.name.label("domain"),
    domains.c.settings,
    applied.c.version.label("applied_version"),
    applied.c.applied_at,
    applied.c.revision,
    applied.c.proofs,
    applied.c.result,
).select_from(
    dkim_keys.join(domains, domains.c.id == dkim_keys.c.domain_id).outerjoin(
        applied,
        and_(
            applied.c.host == dkim_keys.c.host,
            applied.c.kind == JobKind.DKIM_SYNC.value,
            applied.c.subject_id == dkim_keys.c.id,
        ),
    )
)
"""Each with its domain's name and settings, and with what its host did."""


async def create_dkim_key(
    change: Change,
    domain: DomainName,
    *,
    host: str | None = None,
    selector: Selector | None = None,
    algorithm: Algorithm = Algorithm.RSA_2048,
    activate: bool = False,
    public_key: str | None = None,
) -> int:
    """With `public_key`: the key is on the host already, and will be found there. Returns the key's id.

    Raises DomainIsRelay, HostNotChosen, DkimKeyExists, and BadField for a public key that is none of this algorithm.
    """
    row = await _lock_domain(change, domain)
    # Shared: whoever deletes the host waits, or is waited for.
    query = select(hosts.c.name).where(hosts.c.enabled).with_for_update(read=True)
    if host is not None:
        query = query.where(hosts.c.name == host)
    chosen = choose_host(list((await change.connection.execute(query)).scalars()), host)
    if public_key is not None:
        check_public_key(algorithm, public_key)
    return await _insert(change, row, chosen, algorithm, selector=selector, activate=activate, public_key=public_key)


async def rotate_dkim_keys(
    change: Change, domain: DomainName, *, host: str | None = None, algorithm: Algorithm | None = None
) -> list[int]:
    """New keys that become active by themselves and then replace the others of their host and family. Returns their ids.

    On each enabled host, and on each that signs for the domain; or on `host` alone. One for each family that is active there,
    of the same length as the youngest of them (RSA 2048 where none is); or one of `algorithm`. Raises DomainIsRelay,
    HostNotChosen, and RotationUnderWay, whose `selectors` are those that have not taken over yet.
    """
    row = await _lock_domain(change, domain)
    query = select(dkim_keys).where(dkim_keys.c.domain_id == row.id).order_by(dkim_keys.c.id)
    keys = (await change.connection.execute(query)).all()
    active = [key for key in keys if key.state == DkimState.ACTIVE]
    signs = or_(hosts.c.enabled, hosts.c.name.in_({key.host for key in active}))
    names = select(hosts.c.name).where(signs).order_by(hosts.c.name).with_for_update(read=True)
    if host is not None:
        names = names.where(hosts.c.name == host)
    found = list((await change.connection.execute(names)).scalars())
    if host is not None or not found:
        found = [choose_host(found, host)]
    wanted = [
        (name, each)
        for name in found
        for each in ([algorithm] if algorithm else _algorithms([key for key in active if key.host == name]))
    ]
    waiting = [
        key.selector
        for key in keys
        if is_under_way(key) and (key.host, Algorithm(key.algorithm).family) in {(name, a.family) for name, a in wanted}
    ]
    if waiting:
        raise RotationUnderWay(
            f"{domain} has keys that are to take over and have not yet: {', '.join(waiting)}.", selectors=waiting
        )
    return [await _insert(change, row, name, each, activate=True) for name, each in wanted]


def _algorithms(active: Sequence[Row[Any]]) -> list[Algorithm]:
    """Of each family the youngest's, which is the last."""
    youngest = {Algorithm(key.algorithm).family: Algorithm(key.algorithm) for key in active}
    return list(youngest.values()) or [Algorithm.RSA_2048]


def is_under_way(key: Row[Any]) -> bool:
    """It is to take over, and has not yet."""
    return (key.activate and key.state in NOT_YET_ACTIVE) or (key.state == DkimState.ACTIVE and key.proved_at is None)


async def activate_dkim_key(
    change: Change, domain: DomainName, selector: Selector, *, expected_version: int | None = None
) -> int:
    """It becomes active as soon as all name servers have it; what is so already is no change. Raises DkimStepNotNow."""
    row = await _lock_key(change, domain, selector, expected_version)
    if row.state not in (*NOT_YET_ACTIVE, DkimState.ACTIVE):
        raise _not_now(row, "A key that was replaced never signs again.")
    if not row.activate:
        await _write(change, row, "activate", {"activate": True})
        await publish_domain(change, row.domain_id)
    return int(row.id)


async def delete_dkim_key(
    change: Change, domain: DomainName, selector: Selector, *, expected_version: int | None = None
) -> int:
    """One that never took over: the service process takes its record away, the host its private half. An active one of a host
    that is gone for good retires: mail that it signed may be under way.

    Raises DkimKeySigns for any other active one, and DkimStepNotNow for one that is on its way out by itself.
    """
    row = await _lock_key(change, domain, selector, expected_version)
    if row.state == DkimState.ACTIVE:
        if not await is_gone(change.connection, row.host, change.now):
            raise DkimKeySigns(
                f"{selector} signs the mail of {domain} on {row.host}: at no moment may that be unsigned. Rotate instead. If"
                f" {row.host} is gone for good, set enabled to false there, and try again when it was silent for an hour."
            )
        await set_dkim_state(change, row, DkimState.RETIRING, verb="delete", activate=False, due_at=change.now)
        return int(row.id)
    if row.state not in NOT_YET_ACTIVE:
        raise _not_now(row, "It goes by itself.")
    if row.state == DkimState.GENERATING:  # no record of it was ever made
        await set_dkim_state(change, row, DkimState.REMOVED, verb="delete", activate=False)
        return int(row.id)
    await set_dkim_state(change, row, DkimState.REVOKED, verb="delete", activate=False, due_at=change.now)
    await publish_domain(change, row.domain_id)
    return int(row.id)


async def set_dkim_state(change: Change, row: Row[Any], state: DkimState, *, verb: str = "", **columns: Any) -> int:
    """The one way from state to state: its time, no problem and no `due_at` but a given one, a version, an event, a job.

    `row` is one of DKIM_KEYS. Every change has its job, also where the host has nothing to do, so that what the host says of a
    key is always about its present version. Returns the new version. Raises VersionConflict when somebody changed the key since
    `row` was read: nothing is written then.
    """
    values = {"state": state.value, "problem": None, "due_at": None, _REACHED[state]: change.now, **columns}
    if state is DkimState.PUBLISHED and row.state == DkimState.ACTIVE:
        values |= {"active_at": None, "published_at": row.published_at}
        verb = verb or "withdraw"
    return await _write(change, row, verb or _VERBS[state], values)


async def _write(change: Change, row: Row[Any], verb: str, values: dict[str, Any]) -> int:
    version = int(row.version) + 1
    result = await change.connection.execute(
        update(dkim_keys)
        .where(dkim_keys.c.id == row.id, dkim_keys.c.version == row.version)
        .values(**values, version=version, updated_at=change.now)
    )
    if result.rowcount == 0:
        raise VersionConflict("Somebody changed the key at this moment. Read it, and try again.")
    changed = [name for name in ("state", "activate") if name in values and values[name] != getattr(row, name)]
    await record_event(
        change,
        f"dkim-keys.{verb}",
        "dkim-key",
        row.id,
        before={name: getattr(row, name) for name in changed},
        after={"domain": row.domain, "selector": row.selector, **{name: values[name] for name in changed}},
    )
    await _enqueue(change, row.id, row.host, version)
    return version


async def resync_dkim_key(change: Change, key_id: int) -> int:
    """Another job for the key as it is. Returns the job's id."""
    query = select(dkim_keys.c.host, dkim_keys.c.version).where(dkim_keys.c.id == key_id)
    row = (await change.connection.execute(query)).one_or_none()
    if row is None:
        raise NotFound(f"There is no DKIM key {key_id}.")
    return await _enqueue(change, key_id, row.host, row.version)


async def _enqueue(change: Change, key_id: int, host: str, version: int) -> int:
    return await enqueue(
        change.connection,
        JobKind.DKIM_SYNC,
        host=host,
        lane=DKIM_LANE,
        subject_id=key_id,
        version=version,
        request_id=change.actor.request_id,
        now=change.now,
    )


async def _insert(
    change: Change,
    domain: Row[Any],
    host: str,
    algorithm: Algorithm,
    *,
    selector: Selector | None = None,
    activate: bool = False,
    public_key: str | None = None,
) -> int:
    """The domain's row is locked."""
    chosen = selector or await _free_selector(change, domain.id)
    if len(dkim_name(chosen, domain.name)) > MOST_IN_A_NAME:
        raise BadField(f"The record's name would have more than {MOST_IN_A_NAME} characters.", field="selector")
    state = DkimState.GENERATING if public_key is None else DkimState.UNPUBLISHED
    values = {
        "domain_id": domain.id,
        "host": host,
        "selector": chosen,
        "algorithm": algorithm.value,
        "public_key": public_key,
        "state": state.value,
        "activate": activate,
        "version": 1,
        "created_at": change.now,
        "updated_at": change.now,
        "generated_at": None if public_key is None else change.now,
    }
    try:
        key_id = inserted_id(await change.connection.execute(insert(dkim_keys), values))
    except IntegrityError as error:
        if duplicate_of(error) == "dkim_keys_domain_id_selector":
            raise DkimKeyExists(f"{domain.name} has, or had, the selector {chosen}.", field="selector") from None
        raise
    shown = ("host", "selector", "algorithm", "state", "activate")
    after = {"domain": domain.name, **{name: values[name] for name in shown}}
    await record_event(change, "dkim-keys.create", "dkim-key", key_id, after=after)
    await _enqueue(change, key_id, host, 1)
    return key_id


async def _free_selector(change: Change, domain_id: int) -> str:
    """The year and month, and the first of a, b, …, z, aa, … that the domain never had."""
    month = change.now.strftime("%Y%m")
    query = select(dkim_keys.c.selector).where(
        dkim_keys.c.domain_id == domain_id, dkim_keys.c.selector.startswith(month, autoescape=True)
    )
    taken = set((await change.connection.execute(query)).scalars())
    return next(selector for letters in _letters() if (selector := f"{month}{letters}") not in taken)


def _letters() -> Iterator[str]:
    return ("".join(letters) for length in count(1) for letters in product(ascii_lowercase, repeat=length))


_BASE64 = re.compile(r"[A-Za-z0-9+/]+={0,2}\Z")


def check_public_key(algorithm: Algorithm, public_key: str) -> None:
    """Raises BadField unless it is one of this algorithm, as `p=` has it. Whoever wrote it is not trusted."""
    try:
        octets = b64decode(public_key, validate=True) if _BASE64.match(public_key) else b""
    except NotBase64:
        octets = b""
    if b64encode(octets).decode() != public_key:
        raise BadField("A public key is base64 without blanks, as `p=` of the record has it.", field="public_key")
    if algorithm is Algorithm.ED25519:
        if len(octets) != 32:
            raise BadField("A public key of ed25519 has 32 octets (RFC 8463, section 4.2).", field="public_key")
        return
    try:
        key = load_der_public_key(octets)
    except (ValueError, UnsupportedAlgorithm):
        raise BadField("This is no SubjectPublicKeyInfo (RFC 6376, section 3.6.1).", field="public_key") from None
    if not isinstance(key, RSAPublicKey) or f"rsa-{key.key_size}" != algorithm:
        raise BadField(f"This is no key of {algorithm}.", field="public_key")


def record_of(row: Row[Any]) -> Record | None:
    """What the DNS should say of it: nothing while its host has not made it, and once it is removed."""
    if row.state == DkimState.REMOVED or (row.public_key is None and row.state != DkimState.REVOKED):
        return None
    public_key = "" if row.state == DkimState.REVOKED else row.public_key
    return dkim_record(row.selector, row.domain, Algorithm(row.algorithm), public_key)


def next_step(row: Row[Any], publisher: str | None) -> str:
    """In a sentence, what happens next and who does it."""
    due = f"From {row.due_at:%Y-%m-%d %H:%M} UTC on" if row.due_at else "Soon"
    match DkimState(row.state):
        case DkimState.GENERATING:
            return f"The host {row.host} makes the private key."
        case DkimState.UNPUBLISHED if publisher:
            return f"The publisher {publisher} enters the record; when all name servers have it, the key is published."
        case DkimState.UNPUBLISHED:
            return "Enter `record` into the zone by hand; when all name servers have it, the key is published."
        case DkimState.PUBLISHED if row.activate:
            return f"It becomes active by itself: the host {row.host} begins to sign with it."
        case DkimState.PUBLISHED:
            return "Activate it (POST …/activate). Until then it signs nothing."
        case DkimState.ACTIVE if row.proved_at is None:
            return "A probe is sent, signed with it; when that came back and verified, those that it replaces retire."
        case DkimState.ACTIVE:
            return "Nothing is left to do: it signs until a rotation replaces it."
        case DkimState.RETIRING if row.applied_version != row.version:
            return f"It is revoked a retention time after the host {row.host} said that it signs no more with it."
        case DkimState.RETIRING if publisher:
            return f"{due} it is revoked: the publisher {publisher} empties `p=` in its record."
        case DkimState.RETIRING:
            return f"{due} it is revoked: empty `p=` in its record by hand then."
        case DkimState.REVOKED if publisher:
            return f"{due} the publisher {publisher} deletes the record, and the host {row.host} the private key."
        case DkimState.REVOKED:
            return f"{due} delete the record by hand; when no name server has it, {row.host} deletes the private key."
        case DkimState.REMOVED:
            return "Nothing: it is gone."


async def get_dkim_key(connection: AsyncConnection, domain: DomainName, selector: Selector | int) -> Row[Any]:
    """By selector or id. Raises NotFound, for the domain too."""
    column = dkim_keys.c.id if isinstance(selector, int) else dkim_keys.c.selector
    query = DKIM_KEYS.where(domains.c.name == domain, column == selector)
    row: Row[Any] | None = (await connection.execute(query)).one_or_none()
    if row is None:
        await _domain(connection, domain)
        raise NotFound(f"{domain} has no DKIM key {selector}. GET /v1/domains/{domain}/dkim-keys lists them.")
    return row


async def list_dkim_keys(
    connection: AsyncConnection,
    domain: DomainName,
    *,
    state: DkimState | None = None,
    host: str | None = None,
    ids: Sequence[int] | None = None,
    after: int | None = None,
    limit: int,
) -> Sequence[Row[Any]]:
    """In the order in which they were made. Raises NotFound for the domain."""
    row = await _domain(connection, domain)
    query: Select[Any] = DKIM_KEYS.where(dkim_keys.c.domain_id == row.id).order_by(dkim_keys.c.id).limit(limit)
    if state is not None:
        query = query.where(dkim_keys.c.state == state.value)
    if host is not None:
        query = query.where(dkim_keys.c.host == host)
    if ids is not None:
        query = query.where(dkim_keys.c.id.in_(ids))
    if after is not None:
        query = query.where(dkim_keys.c.id > after)
    rows: Sequence[Row[Any]] = (await connection.execute(query)).all()
    return rows


async def latest_jobs(connection: AsyncConnection, keys: Sequence[Row[Any]]) -> dict[int, JobRow]:
    """Of each key, the latest job for its host."""
    query = (
        select(jobs.c.subject_id, jobs.c.id, jobs.c.state, jobs.c.error)
        .where(
            jobs.c.host.in_({key.host for key in keys}),
            jobs.c.kind == JobKind.DKIM_SYNC.value,
            jobs.c.subject_id.in_([key.id for key in keys]),
            jobs.c.state != JobState.SUPERSEDED,
        )
        .order_by(jobs.c.version, jobs.c.id)
    )
    return {row.subject_id: JobRow(row.id, row.state, row.error) for row in await connection.execute(query)}


async def _domain(connection: AsyncConnection, name: DomainName) -> Row[Any]:
    row = (await connection.execute(select(domains).where(domains.c.name == name))).one_or_none()
    if row is None:
        raise missing_domain(name)
    return row


async def _lock_domain(change: Change, name: DomainName) -> Row[Any]:
    """Raises NotFound and DomainIsRelay."""
    query = select(domains).where(domains.c.name == name).with_for_update()
    row = (await change.connection.execute(query)).one_or_none()
    if row is None:
        raise missing_domain(name)
    if row.kind == DomainKind.RELAY:
        raise DomainIsRelay(f"{name} is a relay domain: the host that has its mailboxes signs its mail.")
    return row


async def _lock_key(change: Change, domain: DomainName, selector: Selector, expected_version: int | None) -> Row[Any]:
    await _lock_domain(change, domain)
    row = await get_dkim_key(change.connection, domain, selector)
    if expected_version is not None and row.version != expected_version:
        raise VersionConflict(f"The key is at version {row.version}, not {expected_version}.", version=row.version)
    return row


def _not_now(row: Row[Any], why: str) -> DkimStepNotNow:
    step = next_step(row, domain_settings(row.settings).publisher)
    return DkimStepNotNow(f"The key {row.selector} is {row.state}. {why}", state=row.state, next_step=step)
