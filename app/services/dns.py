"""Which DNS records a domain should have, from its settings, senders and DKIM keys."""

from contextlib import suppress
from typing import Any

from sqlalchemy import Row, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from app.addresses import DomainName
from app.dns.autoconfig import autoconfig
from app.dns.records import Ports, Wanted, mta_sts_policy, wanted_records
from app.dns.settings import DomainSettings
from app.errors import BadAddress, DomainIsRelay, NoPublisher, NotFound
from app.models.dkim_keys import DkimState, dkim_keys
from app.models.dns_checks import dns_checks
from app.models.domain_senders import domain_senders
from app.models.domains import DomainKind, domains
from app.models.hosts import hosts
from app.models.jobs import applied
from app.queue.contracts import THE_HOST, JobKind
from app.services.audit_events import record_event
from app.services.changes import Change
from app.services.dkim_keys import DKIM_KEYS, record_of
from app.services.domain_senders import mechanism
from app.services.domains import domain_settings, get_domain, publish_domain
from app.services.hosts import effective_settings


async def read_wanted_records(connection: AsyncConnection, name: DomainName) -> list[Wanted]:
    """Raises NotFound and DomainIsRelay."""
    domain = await _our_domain(connection, name)
    query = select(domain_senders).where(domain_senders.c.domain_id == domain.id).order_by(domain_senders.c.id)
    senders = [mechanism(row.kind, row.value) for row in await connection.execute(query)]
    there = (dkim_keys.c.domain_id == domain.id) & (dkim_keys.c.state != DkimState.REMOVED.value)
    rows = await connection.execute(DKIM_KEYS.where(there).order_by(dkim_keys.c.id))
    keys = [record for row in rows if (record := record_of(row)) is not None]
    ports, names = await _ports(connection), await _host_names(connection)
    return wanted_records(name, domain_settings(domain.settings), senders, keys, ports, names)


async def request_publication(change: Change, name: DomainName) -> int:
    """The service process has the records entered, and tries until every name server says them. Returns the job's id.

    Raises NotFound, DomainIsRelay, NoPublisher.
    """
    domain = await _our_domain(change.connection, name)
    publisher = domain_settings(domain.settings).publisher
    if publisher is None:
        raise NoPublisher(f"{name} has no publisher.")
    await change.connection.execute(
        update(domains).where(domains.c.id == domain.id).values(publish_version=domains.c.publish_version + 1)
    )
    await record_event(change, "dns.publish", "domain", name, after={"publisher": publisher})
    return await publish_domain(change, domain.id)


async def read_health(connection: AsyncConnection, name: DomainName) -> Row[Any] | None:
    """What was seen last; None: nothing yet. Raises NotFound and DomainIsRelay."""
    domain = await _our_domain(connection, name)
    query = (
        select(dns_checks, (dns_checks.c.published_version < domains.c.publish_version).label("publishing"))
        .join(domains, domains.c.id == dns_checks.c.domain_id)
        .where(dns_checks.c.domain_id == domain.id)
    )
    row: Row[Any] | None = (await connection.execute(query)).one_or_none()
    return row


async def _our_domain(connection: AsyncConnection, name: DomainName) -> Row[Any]:
    """One whose mailboxes are here. Raises NotFound and DomainIsRelay."""
    domain: Row[Any] = await get_domain(connection, name)
    if domain.kind == DomainKind.RELAY:
        raise DomainIsRelay(f"{name} is a relay domain: the host that has its mailboxes answers for its DNS.")
    return domain


async def _host_names(connection: AsyncConnection) -> list[DomainName]:
    """As each host that is in use reported it with its configuration. What is no name is none."""
    query = (
        select(applied.c.result)
        .join(hosts, hosts.c.name == applied.c.host)
        .where(hosts.c.enabled, applied.c.kind == JobKind.MAILHOST_SYNC.value, applied.c.subject_id == THE_HOST)
        .order_by(hosts.c.name)
    )
    found = []
    for result in (await connection.execute(query)).scalars():
        with suppress(BadAddress):
            found.append(DomainName(str((result or {}).get("hostname", ""))))
    return found


async def _ports(connection: AsyncConnection) -> Ports | None:
    """Those of the first host: all have the same accounts."""
    query = select(hosts.c.settings).where(hosts.c.enabled).order_by(hosts.c.name).limit(1)
    stored = (await connection.execute(query)).scalar_one_or_none()
    if stored is None:
        return None
    settings = effective_settings(stored)
    return Ports(
        settings["submissions_port"],
        settings["submission_port"],
        settings["imaps_port"],
        settings["imap_port"],
        settings["pop3s_port"] if settings["pop3_enabled"] else None,
    )


async def read_policy(connection: AsyncConnection, host: str) -> str:
    """The MTA-STS policy that is fetched from `mta-sts.DOMAIN`. Raises NotFound for any other host name."""
    label, _, domain = host.partition(".")
    settings = await _settings_of(connection, domain) if label == "mta-sts" else None
    if settings is None or settings.mta_sts is None:
        raise NotFound("Here is no MTA-STS policy of that name.")
    return mta_sts_policy(settings)


async def read_autoconfig(connection: AsyncConnection, host: str, address: str) -> bytes:
    """For Thunderbird: by the name that it asks, `autoconfig.DOMAIN` or `DOMAIN`, or else by the address that it asks about.

    The same for every address of a domain, whether or not there is such an account. Raises NotFound.
    """
    ports = await _ports(connection)
    for domain in (host.removeprefix("autoconfig."), host, address.rpartition("@")[2]):
        settings = await _settings_of(connection, domain)
        if ports is not None and settings is not None and settings.mail_name is not None:
            return autoconfig(domain.lower(), settings.mail_name, ports)
    raise NotFound("Here is nothing about the mail of that domain.")


async def _settings_of(connection: AsyncConnection, text: str) -> DomainSettings | None:
    """None for what is no domain whose mailboxes are here."""
    try:
        return domain_settings((await _our_domain(connection, DomainName(text))).settings)
    except (BadAddress, NotFound, DomainIsRelay):
        return None
