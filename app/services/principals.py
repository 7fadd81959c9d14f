"""Principals: who may call. Made on the command line; an API for them comes with the roles."""

import secrets
from collections.abc import Collection, Sequence
from typing import Any

from sqlalchemy import Row, insert, select, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncConnection

from app.credentials.tokens import client_secret, hash_secret
from app.db import duplicate_of
from app.errors import BadField, NotFound
from app.models.principals import PrincipalState, principals
from app.permissions import ROLE_PERMISSIONS, Permission, Principal, Role
from app.services.audit_events import record_event
from app.services.changes import Change


async def create_principal(
    change: Change, name: str, role: Role, permissions: Collection[Permission] | None = None
) -> tuple[str, str]:
    """Returns client id and secret; the secret is nowhere else, so it is shown now or never."""
    if permissions is not None and not set(permissions) <= ROLE_PERMISSIONS[role]:
        raise BadField(f"The role {role} does not have all of these permissions.", field="permissions")
    client_id = f"{role.value}-{secrets.token_hex(6)}"
    secret = client_secret()
    values = {
        "id": client_id,
        "name": name,
        "role": role.value,
        "permissions": None if permissions is None else sorted(permissions),
        "secret_hash": hash_secret(secret),
        "version": 1,
        "state": PrincipalState.ACTIVE.value,
        "created_at": change.now,
        "updated_at": change.now,
    }
    try:
        await change.connection.execute(insert(principals), values)
    except IntegrityError as error:
        if duplicate_of(error) == "principals_name":
            raise BadField(f"There is a principal named {name!r} already.", field="name") from None
        raise
    after = {"name": name, "role": role.value, "permissions": values["permissions"]}
    await record_event(change, "principals.create", "principal", client_id, after=after)
    return client_id, secret


async def disable_principal(change: Change, client_id: str) -> None:
    await _update(change, client_id, {"state": PrincipalState.DISABLED.value})
    await record_event(change, "principals.disable", "principal", client_id)


async def reset_principal_secret(change: Change, client_id: str) -> str:
    """The old secret, and the tokens that were obtained with it, end with the change."""
    secret = client_secret()
    await _update(change, client_id, {"secret_hash": hash_secret(secret), "version": principals.c.version + 1})
    await record_event(change, "principals.reset-secret", "principal", client_id)
    return secret


async def _update(change: Change, client_id: str, values: dict[str, Any]) -> None:
    result = await change.connection.execute(
        update(principals).where(principals.c.id == client_id).values(**values, updated_at=change.now)
    )
    if result.rowcount == 0:
        raise NotFound(f"There is no principal {client_id}. `cacert-mail principal list` shows them.")


async def list_principals(connection: AsyncConnection) -> Sequence[Row[Any]]:
    return (await connection.execute(select(principals).order_by(principals.c.created_at))).all()


async def read_principal(connection: AsyncConnection, client_id: str) -> Row[Any] | None:
    return (await connection.execute(select(principals).where(principals.c.id == client_id))).one_or_none()


def as_principal(row: Row[Any]) -> Principal:
    """Permissions that the role has lost, or that this release does not know, count for nothing."""
    role = Role(row.role)
    granted = ROLE_PERMISSIONS[role]
    if row.permissions is not None:
        granted = frozenset(permission for permission in granted if permission.value in row.permissions)
    return Principal(row.id, row.name, role, granted)
