"""Principals: who may call, and the secrets and certificates by which they show who they are.

`caller` is who asks for a change, and None for our own commands, which may do everything. Nobody acts on a principal whose
role stands higher, gives what they do not have, or raises their own rights.
"""

import secrets
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from ipaddress import IPv4Network, IPv6Network, ip_network
from typing import Any, NamedTuple

from sqlalchemy import Row, exists, insert, or_, select, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncConnection

from app.credentials.tokens import client_secret, hash_secret
from app.db import duplicate_of, inserted_id
from app.errors import (
    BadField,
    CertificateKnown,
    Forbidden,
    LastPrimary,
    NotFound,
    Outranked,
    OwnRights,
    TooManyKeys,
    UserDeleted,
    UserNotActive,
    VersionConflict,
)
from app.models.principals import KeyKind, PrincipalState, principal_keys, principals
from app.models.users import UserState, users
from app.permissions import RANKS, ROLE_PERMISSIONS, Permission, Principal, Role
from app.services.audit_events import record_event
from app.services.changes import Change
from app.services.password_resets import cancel_links
from app.services.ranks import check_rank

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)

Network = IPv4Network | IPv6Network

MAX_CERTIFICATES = 10
"""Alive at once, of one principal. Of secrets there are two, while a client is moved from one to the other."""


@dataclass(frozen=True, slots=True)
class Client:
    """A principal as the rows say, with those keys that have not ended when they were read."""

    row: Row[Any]
    keys: list[Row[Any]]
    networks: tuple[Network, ...] | None
    """From where alone it may call; None: from anywhere."""


class Credentials(NamedTuple):
    id: str
    secret: str


async def create_principal(
    change: Change,
    name: str,
    role: Role,
    permissions: Collection[Permission] | None = None,
    *,
    networks: Sequence[str] | None = None,
    expires_at: datetime | None = None,
    user_id: int | None = None,
    caller: Principal | None = None,
) -> Credentials:
    """The secret is nowhere else, so it is shown now or never. Links to the person's own account, which somebody of a lower
    rank may have asked for before, end.

    Raises BadField, Outranked, and Forbidden for a permission that the caller lacks.
    """
    if permissions is not None:
        _check_role_has(role, permissions)
    client_id = f"{role.value}-{secrets.token_hex(6)}"
    values = {
        "id": client_id,
        "name": name,
        "role": role.value,
        "permissions": None if permissions is None else sorted(set(permissions)),
        "networks": networks,
        "expires_at": expires_at,
        "user_id": user_id,
    }
    if caller is not None:
        if RANKS[role] > caller.rank:
            raise Outranked(f"A {caller.role} makes nobody whose role stands higher.", field="role")
        await _check_gift(change, caller, role, values)
    await _check_account(change, user_id)
    if user_id is not None:
        await cancel_links(change, user_id)
    now = {"version": 1, "state": PrincipalState.ACTIVE.value, "created_at": change.now, "updated_at": change.now}
    try:
        await change.connection.execute(insert(principals), {**values, **now})
    except IntegrityError as error:
        raise _named(error, name) from None
    key_id, secret = await _add_secret(change, client_id)
    after = {**_told(values), "key_id": key_id}
    await record_event(change, "principals.create", "principal", client_id, after=after)
    return Credentials(client_id, secret)


CHANGEABLE = ("name", "permissions", "networks", "expires_at", "user_id", "state")
_REACH = {"permissions", "networks", "expires_at", "state"}


async def change_principal(
    change: Change,
    client_id: str,
    wanted: Mapping[str, Any],
    *,
    expected_version: int | None = None,
    caller: Principal | None = None,
) -> str:
    """Sets some of CHANGEABLE; what is so already is no change.

    Raises Outranked, OwnRights, LastPrimary, and Forbidden for a permission that the caller lacks.
    """
    row = await _lock(change, client_id, caller, expected_version)
    new = {name: value for name, value in wanted.items() if name in CHANGEABLE and getattr(row, name) != value}
    if not new:
        return client_id
    role = Role(row.role)
    if new.get("permissions") is not None:
        _check_role_has(role, new["permissions"])
    if caller is not None:
        if caller.id == client_id:
            _check_own(row, new)
        elif new.keys() & _REACH and new.get("state") != PrincipalState.DISABLED:
            await _check_gift(change, caller, role, {**row._mapping, **new})
    if "user_id" in new:
        await _check_account(change, new["user_id"])
        if new["user_id"] is not None:
            await cancel_links(change, new["user_id"])
    lasting = await _lasting(change)
    try:
        await _update(change, client_id, new)
    except IntegrityError as error:
        raise _named(error, new.get("name", "")) from None
    await _keep_a_primary(change, lasting, caller)
    action = "principals.change"
    if "state" in new:
        action = "principals.disable" if new["state"] == PrincipalState.DISABLED else "principals.enable"
    before = {name: getattr(row, name) for name in new}
    await record_event(change, action, "principal", client_id, before=_told(before), after=_told(new))
    return client_id


async def disable_principal(change: Change, client_id: str) -> None:
    """For our own command, which may disable the last one that could do everything: it can make another."""
    await change_principal(change, client_id, {"state": PrincipalState.DISABLED.value})


async def rotate_secret(
    change: Change,
    client_id: str,
    *,
    overlap: timedelta,
    expected_version: int | None = None,
    caller: Principal | None = None,
) -> Credentials:
    """A new secret; the present one, and the tokens that were obtained with it, live on for `overlap`.

    Two live side by side and no third: TooManyKeys while an earlier rotation goes on, unless `overlap` is none, which ends
    both. Raises Outranked, and Forbidden for a principal with a permission that the caller lacks.
    """
    row = await _lock(change, client_id, caller, expected_version)
    await _check_new_key(change, row, caller)
    alive = await _alive(change, client_id, KeyKind.SECRET)
    if len(alive) > 1 and overlap:
        raise TooManyKeys(
            f"Two secrets of {client_id} live side by side already. End one of them first, or send overlap_seconds: 0, which "
            "ends both.",
            keys=[key.id for key in alive],
        )
    until = change.now + overlap
    for key in alive:
        if key.ends_at is None or key.ends_at > until:
            await _end(change, key.id, until)
    key_id, secret = await _add_secret(change, client_id)
    await _update(change, client_id, {"secret_hash": None})
    before = {"keys": [key.id for key in alive], "end_at": until.isoformat()}
    await record_event(change, "principals.rotate", "principal", client_id, before=before, after={"key_id": key_id})
    return Credentials(client_id, secret)


async def add_certificate(
    change: Change,
    client_id: str,
    fingerprint: str,
    *,
    expected_version: int | None = None,
    caller: Principal | None = None,
) -> str:
    """`fingerprint`: SHA-256 of the certificate's DER, in hex. Raises CertificateKnown, TooManyKeys and those of rank."""
    row = await _lock(change, client_id, caller, expected_version)
    await _check_new_key(change, row, caller)
    alive = await _alive(change, client_id, KeyKind.CERTIFICATE)
    if len(alive) >= MAX_CERTIFICATES:
        raise TooManyKeys(f"{client_id} has {MAX_CERTIFICATES} certificates. End one of them first.")
    try:
        key_id = await _add_key(change, client_id, KeyKind.CERTIFICATE, fingerprint)
    except IntegrityError as error:
        if duplicate_of(error) == "principal_keys_hash":
            raise CertificateKnown(
                "This certificate is registered already, with this principal or another, or was until it was ended.",
                field="certificate",
            ) from None
        raise
    await _update(change, client_id, {})
    after = {"key_id": key_id, "fingerprint": fingerprint}
    await record_event(change, "principals.add-certificate", "principal", client_id, after=after)
    return client_id


async def end_key(
    change: Change,
    client_id: str,
    key_id: int,
    *,
    expected_version: int | None = None,
    caller: Principal | None = None,
) -> str:
    """A secret or certificate, and the tokens that were obtained with it, end now. One that has ended is no change."""
    await _lock(change, client_id, caller, expected_version)
    query = select(principal_keys).where(principal_keys.c.id == key_id, principal_keys.c.principal_id == client_id)
    key = (await change.connection.execute(query)).one_or_none()
    if key is None:
        raise NotFound(f"{client_id} has no key {key_id}. GET /v1/principals/{client_id} lists them.")
    if key.ends_at is not None and key.ends_at <= change.now:
        return client_id
    lasting = await _lasting(change)
    await _end(change, key_id, change.now)
    await _update(change, client_id, {"secret_hash": None} if key.kind == KeyKind.SECRET else {})
    await _keep_a_primary(change, lasting, caller)
    after = {"key_id": key_id, "kind": key.kind}
    await record_event(change, "principals.end-key", "principal", client_id, after=after)
    return client_id


# Who may do that


def _check_role_has(role: Role, permissions: Collection[Permission]) -> None:
    if not set(permissions) <= ROLE_PERMISSIONS[role]:
        raise BadField(f"The role {role} does not have all of these permissions.", field="permissions")


_PROGRAMS = (Role.WEBSITE, Role.WEBMAIL)


async def _check_gift(change: Change, caller: Principal, role: Role, values: Mapping[str, Any]) -> None:
    """Nobody gives what they do not have, also not by a token that was narrowed.

    Nor does anybody give wider networks and a longer life than their own: else a restriction would be got rid of by making
    another principal. The programs of others are an exception: a website may be given a network that its administrator does
    not have, as long as it cannot make principals in turn.
    """
    given = granted(role, values["permissions"])
    if lacked := sorted(given - caller.permissions):
        raise Forbidden(f"Nobody gives what they do not have: you lack {', '.join(lacked)}.", missing=lacked[0])
    if role in _PROGRAMS and Permission.PRINCIPALS_WRITE not in given:
        return
    own = (await change.connection.execute(select(principals).where(principals.c.id == caller.id))).one()
    if not _no_wider(values["networks"], own.networks):
        raise OwnRights("Whom you make calls from your own networks, or fewer.", field="networks")
    if not _no_later(values["expires_at"], own.expires_at):
        raise OwnRights(f"Whom you make expires when you do, or before: {own.expires_at}.", field="expires_at")


def _check_own(row: Row[Any], new: Mapping[str, Any]) -> None:
    """Less is fine; state and account are for somebody else to change."""
    for name in ("state", "user_id"):
        if name in new:
            raise OwnRights("Nobody changes their own state or account here. Ask somebody of your role.", field=name)
    role = Role(row.role)
    if "permissions" in new and not granted(role, new["permissions"]) <= granted(role, row.permissions):
        raise OwnRights("Nobody raises their own rights. Ask somebody of your role.", field="permissions")
    if "networks" in new and not _no_wider(new["networks"], row.networks):
        raise OwnRights("Nobody widens their own networks. Ask somebody of your role.", field="networks")
    if "expires_at" in new and not _no_later(new["expires_at"], row.expires_at):
        raise OwnRights("Nobody prolongs their own time. Ask somebody of your role.", field="expires_at")


def _no_wider(wanted: Sequence[str] | None, present: Sequence[str] | None) -> bool:
    if present is None:
        return True
    if wanted is None:
        return False
    known = [ip_network(text) for text in present]
    return all(
        any(new.version == old.version and new.subnet_of(old) for old in known)  # type: ignore[arg-type]  # as compared
        for new in map(ip_network, wanted)
    )


def _no_later(wanted: datetime | None, present: datetime | None) -> bool:
    return present is None or (wanted is not None and wanted <= present)


async def _check_new_key(change: Change, row: Row[Any], caller: Principal | None) -> None:
    """A key gives its holder all that the principal may do. And one that is about to end begets none that stays."""
    if caller is None:
        return
    if caller.id != row.id:
        await _check_gift(change, caller, Role(row.role), dict(row._mapping))
        return
    if lacked := sorted(granted(Role(row.role), row.permissions) - caller.permissions):
        raise Forbidden("This token was narrowed: a new key would carry more.", missing=lacked[0])
    ends_at = select(principal_keys.c.ends_at).where(principal_keys.c.id == caller.key_id)
    if (await change.connection.execute(ends_at)).scalar_one() is not None:
        raise OwnRights("These credentials are about to end, and make no others. Use the newer ones.")


async def _check_account(change: Change, user_id: int | None) -> None:
    """A person's own account is there, and of nobody whose role stands higher than the caller's."""
    if user_id is None:
        return
    state = (await change.connection.execute(select(users.c.state).where(users.c.id == user_id))).scalar_one_or_none()
    if state is None:
        raise BadField(f"There is no account {user_id}.", field="user")
    if state == UserState.DELETED:
        raise UserDeleted(f"User {user_id} is deleted.", field="user")
    await check_rank(change, user_id)


async def _lasting(change: Change) -> set[str]:
    """The primaries that can repair everything, from any day on. Their rows are locked."""
    key = exists().where(principal_keys.c.principal_id == principals.c.id, principal_keys.c.ends_at.is_(None))
    query = select(principals.c.id, principals.c.permissions).where(
        principals.c.role == Role.PRIMARY.value,
        principals.c.state == PrincipalState.ACTIVE.value,
        principals.c.expires_at.is_(None),
        key,
    )
    rows = await change.connection.execute(query)
    return {row.id for row in rows if Permission.PRINCIPALS_WRITE in granted(Role.PRIMARY, row.permissions)}


async def _keep_a_primary(change: Change, before: set[str], caller: Principal | None) -> None:
    """Raises LastPrimary when there was one of those, and is none now."""
    if caller is not None and before and not await _lasting(change):
        raise LastPrimary(
            f"{', '.join(before)} is the last primary that may write principals, with a key and no end. Make another first; "
            "on the host, `cacert-mail principal create` does."
        )


# Rows


async def _lock(change: Change, client_id: str, caller: Principal | None, expected_version: int | None) -> Row[Any]:
    # All primaries, in one order: of two that end each other at one moment, the second sees what the first did.
    which = or_(principals.c.id == client_id, principals.c.role == Role.PRIMARY.value)
    query = select(principals).where(which).order_by(principals.c.id).with_for_update()
    rows = {row.id: row for row in await change.connection.execute(query)}
    row = rows.get(client_id)
    if row is None:
        raise _missing(client_id)
    if expected_version is not None and row.version != expected_version:
        raise VersionConflict(
            f"The principal is at version {row.version}, not {expected_version}: somebody changed it. Read it again.",
            version=row.version,
        )
    if caller is not None and RANKS[Role(row.role)] > caller.rank:
        raise Outranked(f"{client_id} is {row.role}, which stands higher than {caller.role}.")
    return row


async def _update(change: Change, client_id: str, values: Mapping[str, Any]) -> None:
    await change.connection.execute(
        update(principals)
        .where(principals.c.id == client_id)
        .values(**values, version=principals.c.version + 1, updated_at=change.now)
    )


async def _add_secret(change: Change, client_id: str) -> tuple[int, str]:
    secret = client_secret()
    return await _add_key(change, client_id, KeyKind.SECRET, hash_secret(secret)), secret


async def _add_key(change: Change, client_id: str, kind: KeyKind, digest: str) -> int:
    values = {"principal_id": client_id, "kind": kind.value, "hash": digest, "created_at": change.now}
    return inserted_id(await change.connection.execute(insert(principal_keys), values))


async def _alive(change: Change, client_id: str, kind: KeyKind) -> Sequence[Row[Any]]:
    query = select(principal_keys).where(
        principal_keys.c.principal_id == client_id, principal_keys.c.kind == kind.value, _not_ended(change.now)
    )
    return (await change.connection.execute(query.order_by(principal_keys.c.id))).all()


async def _end(change: Change, key_id: int, at: datetime) -> None:
    await change.connection.execute(update(principal_keys).where(principal_keys.c.id == key_id).values(ends_at=at))


def _not_ended(now: datetime) -> Any:
    return principal_keys.c.ends_at.is_(None) | (principal_keys.c.ends_at > now)


def _told(values: Mapping[str, Any]) -> dict[str, Any]:
    """As the audit trail writes it."""
    return {
        name: value.isoformat() if isinstance(value, datetime) else value
        for name, value in values.items()
        if name in ("role", *CHANGEABLE)
    }


def _named(error: IntegrityError, name: str) -> Exception:
    if duplicate_of(error) == "principals_name":
        return BadField(f"There is a principal named {name!r} already.", field="name")
    return error


def _missing(client_id: str) -> NotFound:
    return NotFound(
        f"There is no principal {client_id}. GET /v1/principals and `cacert-mail principal list` show them."
    )


async def list_principals(
    connection: AsyncConnection,
    *,
    role: Role | None = None,
    state: PrincipalState | None = None,
    after: str | None = None,
    limit: int | None = None,
) -> Sequence[Row[Any]]:
    """In the order of their ids, which begin with the role."""
    query = select(principals).order_by(principals.c.id).limit(limit)
    if role is not None:
        query = query.where(principals.c.role == role.value)
    if state is not None:
        query = query.where(principals.c.state == state.value)
    if after is not None:
        query = query.where(principals.c.id > after)
    return (await connection.execute(query)).all()


async def get_principal(connection: AsyncConnection, client_id: str) -> Row[Any]:
    row = (await connection.execute(select(principals).where(principals.c.id == client_id))).one_or_none()
    if row is None:
        raise _missing(client_id)
    return row


async def list_keys(connection: AsyncConnection, client_ids: Collection[str]) -> dict[str, list[Row[Any]]]:
    """Of each principal all its keys, ended ones too: the audit trail names their ids."""
    query = select(principal_keys).where(principal_keys.c.principal_id.in_(client_ids)).order_by(principal_keys.c.id)
    found: dict[str, list[Row[Any]]] = {client_id: [] for client_id in client_ids}
    for key in await connection.execute(query):
        found[key.principal_id].append(key)
    return found


async def read_client(connection: AsyncConnection, client_id: str, now: datetime) -> Client | None:
    """With its keys, for whoever has to believe it. None: there is no such principal."""
    row = (await connection.execute(select(principals).where(principals.c.id == client_id))).one_or_none()
    if row is None:
        return None
    keys = select(principal_keys.c.id, principal_keys.c.kind, principal_keys.c.hash, principal_keys.c.ends_at).where(
        principal_keys.c.principal_id == client_id, _not_ended(now)
    )
    networks = None if row.networks is None else tuple(ip_network(text) for text in row.networks)
    return Client(row, list(await connection.execute(keys)), networks)


async def find_client_by_certificate(connection: AsyncConnection, fingerprint: str, now: datetime) -> str | None:
    """Whose certificate it is, by the SHA-256 of its DER; None if nobody's, or ended."""
    query = select(principal_keys.c.principal_id).where(
        principal_keys.c.hash == fingerprint,
        principal_keys.c.kind == KeyKind.CERTIFICATE.value,
        _not_ended(now),
    )
    return (await connection.execute(query)).scalar_one_or_none()


async def permit_owner(change: Change, user_id: int) -> int:
    """That a client gets a token for the account's owner goes into the trail. Raises NotFound, UserNotActive, Outranked."""
    query = select(users.c.state).where(users.c.id == user_id)
    state = (await change.connection.execute(query)).scalar_one_or_none()
    if state is None:
        raise NotFound(f"There is no account {user_id}.")
    await check_rank(change, user_id)
    if state != UserState.ACTIVE:
        raise UserNotActive(f"User {user_id} is {state}.")
    await record_event(change, "owner-tokens.create", "user", user_id)
    return user_id


async def read_owner(connection: AsyncConnection, user_id: int) -> tuple[Principal, int] | None:
    """The owner of an account, without a key, and the generation of its access, which each end of it makes another.

    None: there is no such account, or it is not active.
    """
    query = select(users.c.address, users.c.access_ended_at).where(
        users.c.id == user_id, users.c.state == UserState.ACTIVE.value
    )
    row = (await connection.execute(query)).one_or_none()
    if row is None:
        return None
    generation = 0 if row.access_ended_at is None else (row.access_ended_at - _EPOCH) // timedelta(microseconds=1)
    return Principal(
        f"owner-{user_id}", row.address, Role.OWNER, ROLE_PERMISSIONS[Role.OWNER], None, user_id
    ), generation


def granted(role: Role, permissions: Collection[str] | None) -> frozenset[Permission]:
    """Permissions that the role has lost, or that this release does not know, count for nothing."""
    if permissions is None:
        return ROLE_PERMISSIONS[role]
    return frozenset(permission for permission in ROLE_PERMISSIONS[role] if permission.value in permissions)


def as_principal(row: Row[Any], key_id: int, certificate: str | None = None) -> Principal:
    role = Role(row.role)
    return Principal(row.id, row.name, role, granted(role, row.permissions), key_id, row.user_id, certificate)
