"""/v1/domains/{domain}/senders: who else may send as a domain, for its SPF record."""

from datetime import datetime
from typing import Annotated, Any

from fastapi import APIRouter, Path
from pydantic import AfterValidator, BaseModel, ConfigDict, Field
from starlette.responses import Response

from app.addresses import DomainName
from app.models.domain_senders import SenderKind
from app.routers.shapes import (
    CONFLICT,
    IDEMPOTENCY_KEY,
    NOT_FOUND,
    CanReadDomains,
    CanWriteDomains,
    plain_text,
    takes,
)
from app.services import domain_senders as service
from app.web.answers import answer
from app.web.dependencies import Call, Route
from app.web.paging import Limit, NumberCursor, page_response

router = APIRouter(prefix="/v1/domains/{domain}/senders", tags=["Domains"], route_class=Route)

Domain = Annotated[DomainName, Path(description="The domain.")]
SenderId = Annotated[int, Path(ge=1, le=2**63 - 1, description="The sender's id.")]


class DomainSenderBody(BaseModel):
    id: int
    kind: SenderKind
    value: str
    note: str
    mechanism: str = Field(description="As the SPF record has it.", examples=["include:_spf.example.net"])
    created_at: datetime

    @staticmethod
    def of(row: Any) -> "DomainSenderBody":
        return DomainSenderBody.model_construct(
            id=row.id,
            kind=SenderKind(row.kind),
            value=row.value,
            note=row.note,
            mechanism=service.mechanism(row.kind, row.value),
            created_at=row.created_at,
        )


class DomainSenderList(BaseModel):
    items: list[DomainSenderBody]
    next_cursor: str | None


class NewDomainSenderBody(BaseModel):
    model_config = ConfigDict(
        extra="forbid",
        json_schema_extra={"examples": [{"kind": "ip4", "value": "192.0.2.0/28", "note": "Newsletter, until 2027"}]},
    )

    kind: SenderKind
    value: Annotated[str, Field(max_length=253)] = Field(
        "", description="A network, or a name; `a` and `mx`: empty means the domain itself."
    )
    note: Annotated[str, Field(min_length=1, max_length=200), AfterValidator(plain_text)] = Field(
        description="Who that is, and why."
    )


async def _answer(call: Call, domain: DomainName, sender_id: int, *, created: bool = False) -> Response:
    row = await call.read(service.get_domain_sender, domain, sender_id)
    location = f"/v1/domains/{domain}/senders/{row.id}" if created else None
    return answer(call, DomainSenderBody.of(row), status=201 if created else 200, location=location)


@router.post(
    "",
    status_code=201,
    response_model=DomainSenderBody,
    summary="Let another server send as a domain",
    responses={**NOT_FOUND, **CONFLICT},
    openapi_extra=takes(IDEMPOTENCY_KEY),
)
async def create_domain_sender(domain: Domain, body: NewDomainSenderBody, call: CanWriteDomains) -> Response:
    """It goes into the SPF record, whose ten lookups are counted. The domain's own mail servers are always in it."""
    sender_id = await call.write(service.create_domain_sender, domain, body.kind, body.value, body.note)
    return await _answer(call, domain, sender_id, created=True)


@router.get("", response_model=DomainSenderList, summary="List who else may send as a domain", responses=NOT_FOUND)
async def list_domain_senders(
    domain: Domain, call: CanReadDomains, limit: Limit = 50, cursor: NumberCursor = None
) -> Response:
    """In the order in which they were added."""
    rows = await call.read(service.list_domain_senders, domain, after=int(cursor) if cursor else None, limit=limit)
    items = [DomainSenderBody.of(row) for row in rows]
    return page_response(call.request, items, rows[-1].id if rows else None, limit)


@router.get(
    "/{sender}", response_model=DomainSenderBody, summary="Read who else may send as a domain", responses=NOT_FOUND
)
async def get_domain_sender(domain: Domain, sender: SenderId, call: CanReadDomains) -> Response:
    """A network or a name, and why."""
    return await _answer(call, domain, sender)


@router.delete("/{sender}", status_code=204, summary="Let it send no more", responses=NOT_FOUND)
async def delete_domain_sender(domain: Domain, sender: SenderId, call: CanWriteDomains) -> Response:
    """Its mail fails SPF as soon as the record is published without it."""
    await call.write(service.delete_domain_sender, domain, sender)
    return Response(status_code=204)
