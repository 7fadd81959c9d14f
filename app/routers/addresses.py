"""/v1/addresses/{address}: can it be had, and if not, why not; where its mail goes, and who may send as it."""

from typing import Annotated, Literal

from fastapi import APIRouter, Path
from pydantic import BaseModel, Field
from starlette.responses import Response

from app.addresses import MailAddress
from app.permissions import Permission
from app.routers.shapes import CanReadAddresses
from app.services.addresses import AddressStatus, follow_address, report_address
from app.services.senders import list_senders
from app.web.answers import answer
from app.web.dependencies import Route

router = APIRouter(prefix="/v1/addresses", tags=["Addresses"], route_class=Route)


class HopBody(BaseModel):
    address: str
    kind: Literal["user", "alias", "outside"]
    leads_to: list[str]


class AddressBody(BaseModel):
    address: str
    status: AddressStatus
    detail: str
    user_id: int | None = Field(description="The account that has it, or had it.")
    alias_id: int | None = Field(description="The alias that has it.")
    route: list[HopBody] | None = Field(
        description="Where mail to it goes, step by step; empty: nowhere, it bounces. Null without `aliases:read`."
    )
    senders: list[str] | None = Field(description="Who may send as it. Null without `aliases:read`.")


@router.get("/{address}", response_model=AddressBody, summary="Ask whose an address is, and where it leads")
async def get_address(
    address: Annotated[MailAddress, Path(description="The address.")], call: CanReadAddresses
) -> Response:
    """`free`, or why not: `user`, `alias`, `tombstone`, `reserved`, `no_domain`; and every step that mail to it takes."""
    report = await call.read(report_address, address)
    route: list[HopBody] | None = None
    senders: list[str] | None = None
    shown = call.may(Permission.ALIASES_READ)
    if shown:
        hops = await call.read(follow_address, address)
        route = [HopBody(address=hop.address, kind=hop.kind, leads_to=hop.leads_to) for hop in hops]
        senders = await call.read(list_senders, address)
    body = AddressBody(
        address=report.address,
        status=report.status,
        detail=report.detail,
        user_id=report.user_id,
        alias_id=report.alias_id if shown else None,
        route=route,
        senders=senders,
    )
    return answer(call, body)
