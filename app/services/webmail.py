"""What the webmail needs to know of an account when its owner signs in."""

from typing import Any

from sqlalchemy import and_, bindparam, select
from sqlalchemy.ext.asyncio import AsyncConnection

from app.addresses import MailAddress
from app.errors import NotFound
from app.models.addresses import AddressKind, addresses
from app.models.users import users
from app.services.senders import list_send_as

_ACCOUNT = (
    select(users.c.address, users.c.display_name, users.c.quota_bytes)
    .join(addresses, and_(addresses.c.subject_id == users.c.id, addresses.c.kind == AddressKind.USER))
    .where(addresses.c.address == bindparam("address"))
)


async def read_identities(connection: AsyncConnection, address: MailAddress) -> dict[str, Any]:
    """Under which names this account sends, itself first; none while it is suspended or not ready. Raises NotFound."""
    row = (await connection.execute(_ACCOUNT, {"address": address})).one_or_none()
    if row is None:
        raise NotFound(f"There is no account {address}.")
    found = await list_send_as(connection, address)
    return {
        "address": row.address,
        "display_name": row.display_name,
        "quota_bytes": row.quota_bytes,
        "identities": [{"address": each, "reason": reason} for each, reason in found],
    }
