"""Which DNS records a domain should have, from its settings, senders and DKIM keys."""

from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncConnection

from app.addresses import DomainName
from app.dns.records import Wanted, wanted_records
from app.errors import DomainIsRelay
from app.models.dkim_keys import DkimState, dkim_keys
from app.models.domain_senders import domain_senders
from app.models.domains import DomainKind
from app.services.dkim_keys import DKIM_KEYS, record_of
from app.services.domain_senders import mechanism
from app.services.domains import domain_settings, get_domain


async def read_wanted_records(connection: AsyncConnection, name: DomainName) -> list[Wanted]:
    """Raises NotFound and DomainIsRelay."""
    domain = await get_domain(connection, name)
    if domain.kind == DomainKind.RELAY:
        raise DomainIsRelay(f"{name} is a relay domain: the host that has its mailboxes answers for its DNS.")
    query = select(domain_senders).where(domain_senders.c.domain_id == domain.id).order_by(domain_senders.c.id)
    senders = [mechanism(row.kind, row.value) for row in await connection.execute(query)]
    there = (dkim_keys.c.domain_id == domain.id) & (dkim_keys.c.state != DkimState.REMOVED.value)
    rows = await connection.execute(DKIM_KEYS.where(there).order_by(dkim_keys.c.id))
    keys = [record for row in rows if (record := record_of(row)) is not None]
    return wanted_records(name, domain_settings(domain.settings), senders, keys)
