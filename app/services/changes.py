"""What a service function gets: an open transaction, who asks, and the time. It never commits."""

from dataclasses import dataclass
from datetime import datetime

from sqlalchemy.ext.asyncio import AsyncConnection


@dataclass(frozen=True, slots=True)
class Actor:
    """Who is behind a change, as the audit trail names them."""

    principal_id: str
    client_address: str
    request_id: str


@dataclass(frozen=True, slots=True)
class Change:
    """One transaction. `now` is the time of all that it writes."""

    connection: AsyncConnection
    actor: Actor
    now: datetime
