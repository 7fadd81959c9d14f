"""/v1/addresses/{address}: can it be had, and if not, why not."""

from typing import Annotated

from fastapi import APIRouter, Path
from pydantic import BaseModel, Field
from starlette.responses import Response

from app.addresses import MailAddress
from app.routers.shapes import CanReadAddresses
from app.services.addresses import AddressStatus, report_address
from app.web.answers import answer
from app.web.dependencies import Route

router = APIRouter(prefix="/v1/addresses", tags=["Addresses"], route_class=Route)


class AddressBody(BaseModel):
    address: str
    status: AddressStatus
    detail: str
    user_id: int | None = Field(description="The account that has it, or had it.")


@router.get("/{address}", response_model=AddressBody, summary="Ask whether an address is free")
async def get_address(
    address: Annotated[MailAddress, Path(description="The address.")], call: CanReadAddresses
) -> Response:
    """`free`, or why not: `user`, `alias`, `tombstone`, `reserved`, `no_domain`."""
    report = await call.read(report_address, address)
    body = AddressBody(address=report.address, status=report.status, detail=report.detail, user_id=report.user_id)
    return answer(call, body)
