"""/v1/domains/{domain}/dns: which records the domain should have, and what its name servers answer."""

import asyncio
from dataclasses import replace
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Path, Query
from pydantic import BaseModel, Field
from starlette.responses import Response

from app.addresses import DomainName
from app.dns.ask import DnsUnclear, Server, all_say, ask_all, find_servers
from app.dns.records import Wanted, of_purpose
from app.routers.shapes import CONFLICT, NOT_FOUND, CanReadDomains
from app.services import dns as service
from app.web.answers import answer
from app.web.dependencies import Call, Route

router = APIRouter(prefix="/v1/domains/{domain}/dns", tags=["Domains"], route_class=Route)

Domain = Annotated[DomainName, Path(description="The domain.")]


class DnsRecordBody(BaseModel):
    purpose: Literal["mx", "spf", "dkim", "dmarc", "tls-rpt", "mta-sts", "srv", "autoconfig"]
    name: str
    type: str
    values: list[str] = Field(description="What should be there. Of TXT the whole text, without quotes.")
    zone: list[str] = Field(description="The same as lines of a zone file.")
    ok: bool = Field(description="Every name server of the zone answers so.")
    problem: str | None = Field(description="Which one does not, and what it answers instead.")


class DnsBody(BaseModel):
    domain: str
    ok: bool
    servers: list[str] = Field(description="Those that were asked, each of them, for this very answer.")
    records: list[DnsRecordBody]


@router.get(
    "",
    response_model=DnsBody,
    summary="Show which DNS records a domain should have, and what is live",
    responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}, **NOT_FOUND, **CONFLICT},
)
async def get_domain_dns(
    domain: Domain,
    call: CanReadDomains,
    form: Annotated[
        Literal["json", "zone"], Query(alias="format", description="`zone`: lines for the zone file.")
    ] = "json",
) -> Response:
    """As the domain's settings, senders, keys and hosts say: MX, SPF, DKIM, DMARC, TLS reports, MTA-STS, SRV, autoconfig.

    Every name server of the zone is asked for this answer, which may take some seconds.
    """
    wanted = await call.read(service.read_wanted_records, domain)
    if form == "zone":
        lines = [record.zone_line for each in wanted for record in each.records]
        return Response("".join(f"{line}\n" for line in lines), media_type="text/plain")
    settings = call.service.settings
    servers: list[Server] = []
    problem = None
    try:
        async with asyncio.timeout(2 * settings.dns_seconds):
            servers = await find_servers(domain, settings)
    except DnsUnclear as error:
        problem = str(error)
    except TimeoutError:
        problem = f"The name servers of {domain} did not answer in time."
    records = await asyncio.gather(*(_judged(call, servers, each, problem) for each in wanted))
    body = {
        "domain": domain,
        "ok": all(record["ok"] for record in records),
        "servers": [f"{server.name} ({server.address})" for server in servers],
        "records": records,
    }
    return answer(call, body)


async def _judged(call: Call, servers: list[Server], wanted: Wanted, problem: str | None) -> dict[str, Any]:
    first, values = wanted.records[0], [record.value for record in wanted.records]
    if problem is None:
        answers = await ask_all(servers, first.name, first.type, call.service.settings)
        relevant = [
            each if each.values is None else replace(each, values=of_purpose(wanted.purpose, each.values))
            for each in answers
        ]
        problem = all_say(relevant, values)
    return {
        "purpose": wanted.purpose,
        "name": first.name,
        "type": first.type,
        "values": values,
        "zone": [record.zone_line for record in wanted.records],
        "ok": problem is None,
        "problem": problem,
    }
