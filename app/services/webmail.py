"""What the webmail needs to know of an account when its owner signs in."""

from typing import Any

from sqlalchemy import BindParameter, and_, bindparam, null, select, union_all
from sqlalchemy.ext.asyncio import AsyncConnection

from app.addresses import MailAddress
from app.errors import NotFound
from app.models.addresses import AddressKind, addresses
from app.models.users import users
from app.services.senders import SENDERS, with_reasons

_ADDRESS: BindParameter[str] = bindparam("address")
_IDENTITIES = union_all(  # one question: this is read more often than anything else
    select(users.c.address, users.c.display_name, users.c.quota_bytes)
    .join(addresses, and_(addresses.c.subject_id == users.c.id, addresses.c.kind == AddressKind.USER))
    .where(addresses.c.address == _ADDRESS),
    select(SENDERS.c.address, null(), null()).where(SENDERS.c.login == _ADDRESS),
)


async def read_identities(connection: AsyncConnection, address: MailAddress) -> dict[str, Any]:
    """Under which names this account sends, itself first; none while it is suspended or not ready. Raises NotFound."""
    rows = (await connection.execute(_IDENTITIES, {"address": address})).all()
    account = next((row for row in rows if row[1] is not None), None)
    if account is None:
        raise NotFound(f"There is no account {address}.")
    found = with_reasons(address, (row[0] for row in rows if row[1] is None))
    return {
        "address": address,
        "display_name": account[1],
        "quota_bytes": account[2],
        "identities": [{"address": each, "reason": reason} for each, reason in found],
    }
