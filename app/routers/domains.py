"""/v1/domains."""

from datetime import datetime
from typing import Annotated, Any

from fastapi import APIRouter, Path, Query
from pydantic import BaseModel, ConfigDict, Field
from starlette.responses import Response

from app.addresses import DomainName
from app.dns.settings import DomainSettings
from app.models.domains import DomainKind
from app.routers.shapes import (
    CHANGED,
    CONFLICT,
    IDEMPOTENCY_KEY,
    IF_MATCH,
    IF_NONE_MATCH,
    NOT_FOUND,
    NOT_MODIFIED,
    CanReadDomains,
    CanWriteDomains,
    takes,
)
from app.services import domains as service
from app.web.answers import answer
from app.web.conditional import etag, expected_version
from app.web.dependencies import Call, Route
from app.web.paging import Limit, NumberCursor, page_response

router = APIRouter(prefix="/v1/domains", tags=["Domains"], route_class=Route)

Name = Annotated[DomainName, Path(description="The domain.")]


class DomainBody(BaseModel):
    id: int
    name: str
    kind: DomainKind
    ready: bool = Field(description="It has what every domain with mail must have.")
    missing: list[str] = Field(description="What it lacks: `postmaster` and `abuse` must be somebody's (RFC 2142).")
    settings: DomainSettings = Field(description="What its DNS should say, the defaults too.")
    version: int
    created_at: datetime
    updated_at: datetime

    @staticmethod
    def of(row: Any, missing: list[str]) -> "DomainBody":
        return DomainBody.model_construct(
            ready=not missing,
            missing=missing,
            settings=service.domain_settings(row.settings),
            id=row.id,
            name=row.name,
            kind=DomainKind(row.kind),
            version=row.version,
            created_at=row.created_at,
            updated_at=row.updated_at,
        )


class DomainList(BaseModel):
    items: list[DomainBody]
    next_cursor: str | None


class NewDomainBody(BaseModel):
    model_config = ConfigDict(
        extra="forbid", json_schema_extra={"examples": [{"name": "example.org", "kind": "virtual"}]}
    )

    name: DomainName
    kind: DomainKind = DomainKind.VIRTUAL


class ChangedDomainBody(BaseModel):
    """Only what is sent is changed."""

    model_config = ConfigDict(
        extra="forbid", json_schema_extra={"examples": [{"settings": {"rotate_every_days": 180, "dmarc": "reject"}}]}
    )

    settings: dict[str, Any] = Field({}, description="Single settings; null: the default again.")


async def _answer(call: Call, name: str | int, *, created: bool = False) -> Response:
    row = await call.read(service.get_domain, name)
    missing = (await call.read(service.missing_addresses, [row]))[row.id]
    location = f"/v1/domains/{row.name}" if created else None
    tag = etag(row.version, sum(1 << service.NEEDED.index(name) for name in missing))
    return answer(call, DomainBody.of(row, missing), status=201 if created else 200, tag=tag, location=location)


@router.post(
    "",
    status_code=201,
    response_model=DomainBody,
    summary="Add a domain",
    responses=CONFLICT,
    openapi_extra=takes(IDEMPOTENCY_KEY),
)
async def create_domain(body: NewDomainBody, call: CanWriteDomains) -> Response:
    """`virtual`: accounts here. `relay`: passed on to another host. `primary`: there is exactly one, made first."""
    domain_id = await call.write(service.create_domain, body.name, body.kind)
    return await _answer(call, domain_id, created=True)


@router.get("", response_model=DomainList, summary="List domains")
async def list_domains(
    call: CanReadDomains,
    kind: Annotated[DomainKind | None, Query(description="Only of this kind.")] = None,
    limit: Limit = 50,
    cursor: NumberCursor = None,
) -> Response:
    """In the order in which they were added."""
    rows = await call.read(service.list_domains, kind=kind, after=int(cursor) if cursor else None, limit=limit)
    missing = await call.read(service.missing_addresses, rows)
    items = [DomainBody.of(row, missing[row.id]) for row in rows]
    return page_response(call.request, items, rows[-1].id if rows else None, limit)


@router.get(
    "/{domain}",
    response_model=DomainBody,
    summary="Read a domain",
    responses={**NOT_FOUND, **NOT_MODIFIED},
    openapi_extra=takes(IF_NONE_MATCH),
)
async def get_domain(domain: Name, call: CanReadDomains) -> Response:
    """Whether mailboxes are here (`primary`, `virtual`) or mail is passed on (`relay`)."""
    return await _answer(call, domain)


@router.patch(
    "/{domain}",
    response_model=DomainBody,
    summary="Change what the DNS of a domain should say",
    responses={**NOT_FOUND, **CONFLICT, **CHANGED},
    openapi_extra=takes(IF_MATCH),
)
async def change_domain(domain: Name, body: ChangedDomainBody, call: CanWriteDomains) -> Response:
    """Who publishes it, how often DKIM keys rotate, MX, DMARC, MTA-STS and reports. Name and kind never change."""
    version = expected_version(call.request)
    await call.write(service.change_domain, domain, body.model_dump(), expected_version=version)
    return await _answer(call, domain)


@router.delete(
    "/{domain}",
    status_code=204,
    summary="Remove a domain that never had an account",
    responses={**NOT_FOUND, **CONFLICT, **CHANGED},
    openapi_extra=takes(IF_MATCH),
)
async def delete_domain(domain: Name, call: CanWriteDomains) -> Response:
    """Not the primary one, and none that has or had accounts: their rows are kept."""
    await call.write(service.delete_domain, domain, expected_version=expected_version(call.request))
    return Response(status_code=204)
