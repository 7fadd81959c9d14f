"""Rank: nobody acts on the account of somebody whose role stands higher."""

from typing import Any

from sqlalchemy import Select, select
from sqlalchemy.ext.asyncio import AsyncConnection

from app.errors import Outranked
from app.models.principals import principals
from app.models.users import users
from app.permissions import RANKS
from app.services.changes import Change


async def check_rank(change: Change, *user_ids: int) -> None:
    """Raises Outranked when one of the accounts is the own one of a principal whose role stands higher than the caller's."""
    for user_id in user_ids:
        if await is_outranked(change.connection, user_id, change.actor.rank):
            raise _outranked()


async def check_rank_of_predecessor(change: Change, address: str) -> None:
    """The same for a deleted account whose address is to be given to somebody else, so that it could not be restored."""
    theirs = select(users.c.id).where(users.c.address == address)
    if await is_outranked(change.connection, theirs, change.actor.rank):
        raise _outranked()


def _outranked() -> Outranked:
    return Outranked("This account belongs to somebody whose role stands higher than yours.")


async def is_outranked(connection: AsyncConnection, user_id: int | Select[Any], rank: int) -> bool:
    """A caller of the highest rank costs no query."""
    higher = higher_roles(rank)
    if not higher:
        return False
    whose = principals.c.user_id == user_id if isinstance(user_id, int) else principals.c.user_id.in_(user_id)
    query = select(principals.c.id).where(whose, principals.c.role.in_(higher)).limit(1)
    return (await connection.execute(query)).first() is not None


async def check_rank_of_contact(change: Change, addresses: set[str]) -> None:
    """The same for accounts whose contact address is one of these: whoever changes where it leads gets their links."""
    theirs = select(users.c.id).where(users.c.contact_address.in_(addresses))
    if await is_outranked(change.connection, theirs, change.actor.rank):
        raise Outranked("It is the contact address of somebody whose role stands higher than yours.")


def higher_roles(rank: int) -> list[str]:
    return [role.value for role, of_role in RANKS.items() if of_role > rank]
