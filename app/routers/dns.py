"""/v1/domains/{domain}/dns: which records the domain should have, and what its name servers answer."""

from datetime import datetime
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Path, Query
from pydantic import BaseModel, Field
from starlette.responses import Response

from app.addresses import DomainName
from app.dns.checks import check_records
from app.models.dns_checks import Health
from app.routers.shapes import CONFLICT, IDEMPOTENCY_KEY, NOT_FOUND, CanReadDomains, CanWriteDomains, takes
from app.services import dns as service
from app.web.answers import answer
from app.web.dependencies import Route

router = APIRouter(prefix="/v1/domains/{domain}/dns", tags=["Domains"], route_class=Route)

Domain = Annotated[DomainName, Path(description="The domain.")]


class LiveBody(BaseModel):
    server: str
    address: str
    values: list[str] | None = Field(description="Of SPF only such records. Null: it did not say.")
    problem: str | None = Field(description="Why it did not.")


class DnsRecordBody(BaseModel):
    purpose: Literal["mx", "spf", "dkim", "dmarc", "tls-rpt", "mta-sts", "srv", "autoconfig"]
    name: str
    type: str
    values: list[str] = Field(description="What should be there. Of TXT the whole text, without quotes.")
    zone: list[str] = Field(description="The same as lines of a zone file.")
    live: list[LiveBody] = Field(description="What each name server answers.")
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
    checked = await check_records(domain, wanted, call.service.settings)
    body = {
        "domain": domain,
        "ok": checked.status is Health.OK,
        "servers": [f"{server.name} ({server.address})" for server in checked.servers],
        "records": checked.records,
    }
    return answer(call, body)


class HealthBody(BaseModel):
    """What the service process has seen last."""

    domain: str
    status: Health = Field(
        description="`ok`; `wrong`: a name server says something else; `unknown`: not all could be asked, or not yet."
    )
    checked_at: datetime | None = Field(description="Null: never yet.")
    publishing: bool = Field(
        description="The publisher was told to enter the records, and not all servers have them yet."
    )
    records: list[DnsRecordBody]


@router.get(
    "/health",
    response_model=HealthBody,
    summary="Read whether a domain's DNS records are live",
    responses={**NOT_FOUND, **CONFLICT},
)
async def get_domain_dns_health(domain: Domain, call: CanReadDomains) -> Response:
    """As they were when the service process looked last: every ten minutes, every minute while something is wrong, and after
    each change of what should be there. Asks nobody now, so monitoring may read it often.
    """
    checked = await call.read(service.read_health, domain)
    body: dict[str, Any] = {
        "domain": domain,
        "status": Health.UNKNOWN,
        "checked_at": None,
        "publishing": False,
        "records": [],
    }
    if checked is not None:
        body |= {name: getattr(checked, name) for name in ("status", "checked_at", "records")}
        body["publishing"] = bool(checked.publishing)
    return answer(call, body)


class PublicationBody(BaseModel):
    domain: str
    job: int = Field(description="/v1/jobs/{job} tells when it was begun; `publishing` of the health, when it is done.")


@router.post(
    "/publish",
    status_code=202,
    response_model=PublicationBody,
    summary="Have the records entered by the domain's publisher",
    responses={**NOT_FOUND, **CONFLICT},
    openapi_extra=takes(IDEMPOTENCY_KEY),
)
async def publish_domain_dns(domain: Domain, call: CanWriteDomains) -> Response:
    """All but those of DKIM keys, which are published as the keys' steps come. Beside SPF other texts of the domain stay.

    What was entered so before and is no longer wanted is taken away. Nothing else is touched. Tried until every name server
    says the records; `GET …/dns/health` shows it.
    """
    job = await call.write(service.request_publication, domain)
    return answer(call, {"domain": domain, "job": job}, status=202, location=f"/v1/jobs/{job}")
