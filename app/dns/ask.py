"""Asks the name servers of a zone, each of them, and never a cache: what all of them answer is what everybody will find.

SECURITY: whatever a name server answers was written by a stranger; it is compared and shown, nothing else.
"""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import dns.asyncresolver
import dns.exception
import dns.flags
import dns.message
import dns.name
import dns.rcode
import dns.rdatatype
import dns.resolver
from dns import asyncquery

from app.config import DnsSettings

MOST = 500
"""Characters of what a server answered, or of why it did not, that are shown."""


@dataclass(frozen=True, slots=True)
class Server:
    name: str
    address: str


@dataclass(frozen=True, slots=True)
class Answer:
    """Of one server: `values` as `Record.value` has them, sorted; or why there is none."""

    server: Server
    values: tuple[str, ...] | None
    """Empty: it says that there is no such record. None: it did not say."""
    problem: str | None = None
    referred: bool = False
    """It said that the name lies in a zone of its own, below the one that was asked for."""


class DnsUnclear(Exception):
    """The name servers of a zone cannot be found out; the text says why."""


async def find_servers(domain: str, settings: DnsSettings) -> list[Server]:
    """All addresses of all name servers of the zone that `domain` lies in. Raises DnsUnclear."""
    resolver = _resolver(settings)
    try:
        zone = await dns.asyncresolver.zone_for_name(domain, resolver=resolver)
        names = [str(each.target).rstrip(".").lower() for each in await resolver.resolve(zone, "NS")]
        looked_up = await asyncio.gather(*(_addresses(resolver, name) for name in names))
    except (dns.exception.DNSException, OSError) as error:
        raise DnsUnclear(f"The name servers of {domain} cannot be found: {_said(error)}") from None
    servers = sorted(
        {Server(name, address) for name, found in zip(names, looked_up, strict=True) for address in found},
        key=lambda server: (server.name, server.address),
    )
    lost = [name for name, found in zip(names, looked_up, strict=True) if not found]
    if lost:
        raise DnsUnclear(f"The name server {lost[0]} of {domain} has no address.")
    return servers


async def find_zone(domain: str, settings: DnsSettings) -> str:
    """The zone that `domain` lies in. Raises DnsUnclear."""
    resolver = _resolver(settings)
    try:
        return str(await dns.asyncresolver.zone_for_name(domain, resolver=resolver)).rstrip(".").lower()
    except (dns.exception.DNSException, OSError) as error:
        raise DnsUnclear(f"The zone of {domain} cannot be found: {_said(error)}") from None


async def ask_all(servers: Sequence[Server], name: str, kind: str, settings: DnsSettings) -> list[Answer]:
    """What each of them answers, asked at once; by TCP when the answer is long. Never raises.

    Where all of them know the name only as part of a zone of its own (`_domainkey` is often one), the servers of that zone are
    asked instead.
    """
    answers = list(await asyncio.gather(*(_ask(server, name, kind, settings) for server in servers)))
    if answers and all(answer.referred for answer in answers):
        try:
            below = await find_servers(name, settings)
        except DnsUnclear as error:
            return [replace(answer, problem=str(error)) for answer in answers]
        answers = list(await asyncio.gather(*(_ask(server, name, kind, settings) for server in below)))
    return answers


def all_say(
    answers: Sequence[Answer], values: Sequence[str], canonical: Callable[[str], str] = lambda value: value
) -> str | None:
    """None when every server answers with these values, which are the same if their `canonical` forms are; otherwise which one
    does not, in a sentence."""
    if not answers:
        return "There is no name server to ask."
    wanted = sorted(map(canonical, values))
    for answer in answers:
        if answer.values is None:
            return f"{answer.server.name} ({answer.server.address}) did not answer: {answer.problem}"
        if sorted(map(canonical, answer.values)) != wanted:
            found = "; ".join(answer.values)[:MOST] or "no such record"
            return f"{answer.server.name} ({answer.server.address}) answers: {found}"
    return None


def _resolver(settings: DnsSettings) -> dns.asyncresolver.Resolver:
    try:
        resolver = dns.asyncresolver.Resolver(configure=not settings.resolvers)
    except dns.exception.DNSException as error:
        raise DnsUnclear(f"No resolver is configured on this machine: {_said(error)}") from None
    if settings.resolvers:
        resolver.nameservers = list(settings.resolvers)
    resolver.port = settings.dns_port
    resolver.timeout = settings.dns_seconds
    resolver.lifetime = 2 * settings.dns_seconds
    return resolver


async def _addresses(resolver: dns.asyncresolver.Resolver, name: str) -> list[str]:
    """None of a kind is no error; that both kinds fail is."""
    found: list[str] = []
    for kind in ("A", "AAAA"):
        try:
            found += [str(each.address) for each in await resolver.resolve(name, kind)]
        except (dns.resolver.NoAnswer, dns.resolver.NXDOMAIN):
            continue
    return found


async def _ask(server: Server, name: str, kind: str, settings: DnsSettings) -> Answer:
    query = dns.message.make_query(name, kind, use_edns=0, payload=1232)
    query.flags &= ~dns.flags.RD
    try:
        response, _ = await asyncquery.udp_with_fallback(
            query, server.address, timeout=settings.dns_seconds, port=settings.dns_port
        )
    except (dns.exception.DNSException, OSError, ValueError) as error:
        return Answer(server, None, _said(error))
    code = response.rcode()
    if code == dns.rcode.NXDOMAIN and response.flags & dns.flags.AA:
        return Answer(server, ())
    if code != dns.rcode.NOERROR:
        return Answer(server, None, f"it says {dns.rcode.to_text(code)}")
    kind_wanted = dns.rdatatype.from_text(kind)
    owner = dns.name.from_text(name)
    if not response.flags & dns.flags.AA:
        cuts = [rrset.name for rrset in response.authority if rrset.rdtype == dns.rdatatype.NS]
        referred = any(owner.is_subdomain(cut) for cut in cuts)
        return Answer(server, None, "it is not responsible for this name", referred=referred)
    values = [
        _value(rdata)
        for rrset in response.answer
        if rrset.rdtype == kind_wanted and rrset.name == owner
        for rdata in rrset
    ]
    return Answer(server, tuple(sorted(values)))


def _value(rdata: Any) -> str:
    """As `Record.value` has it."""
    if rdata.rdtype == dns.rdatatype.TXT:
        return b"".join(rdata.strings).decode("ascii", "backslashreplace")
    return str(rdata.to_text()).lower()


def _said(error: Exception) -> str:
    if isinstance(error, dns.exception.Timeout):
        return "no answer in time"
    return (str(error) or type(error).__name__)[:MOST]
