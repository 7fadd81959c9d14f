"""What a service function gets: an open transaction, who asks, and the time. It never commits."""

from dataclasses import dataclass
from datetime import datetime

from sqlalchemy.ext.asyncio import AsyncConnection

from app.permissions import RANKS


@dataclass(frozen=True, slots=True)
class Actor:
    """Who is behind a change, as the audit trail names them."""

    principal_id: str
    client_address: str
    request_id: str
    key_id: int | None = None
    """Of the secret or certificate that was used; None for our own processes and commands."""
    rank: int = max(RANKS.values())
    """Nobody acts on a principal, or on the account of a principal, of a higher one. Our own processes have the highest."""


@dataclass(frozen=True, slots=True)
class Change:
    """One transaction. `now` is the time of all that it writes."""

    connection: AsyncConnection
    actor: Actor
    now: datetime
