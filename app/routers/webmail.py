"""/v1/webmail: what a webmail needs of an account."""

from hashlib import sha256
from typing import Annotated

from fastapi import APIRouter, Path
from pydantic import BaseModel, Field
from starlette.responses import Response

from app.addresses import MailAddress
from app.routers.shapes import IF_NONE_MATCH, NOT_FOUND, NOT_MODIFIED, CanReadIdentities, takes
from app.services.senders import Reason
from app.services.webmail import read_identities
from app.web.answers import encode
from app.web.conditional import not_modified
from app.web.dependencies import Route
from app.web.recent import Made

router = APIRouter(prefix="/v1/webmail", tags=["Webmail"], route_class=Route)

Address = Annotated[MailAddress, Path(description="The address of an account.")]


class IdentityBody(BaseModel):
    address: str
    reason: Reason = Field(description="`own`, or `designated` for an alias.")


class IdentitiesBody(BaseModel):
    address: str
    display_name: str
    quota_bytes: int | None = Field(description="null: no limit. What is used says IMAP (GETQUOTAROOT).")
    identities: list[IdentityBody] = Field(
        description="What the account may send as, itself first; empty while it is suspended or not ready."
    )


@router.get(
    "/{address}/identities",
    response_model=IdentitiesBody,
    summary="Read what a webmail needs at login",
    responses={**NOT_FOUND, **NOT_MODIFIED},
    openapi_extra=takes(IF_NONE_MATCH),
)
async def list_identities(address: Address, call: CanReadIdentities) -> Response:
    """The names under which the account may send, from the very view that Postfix reads. At most a second old. The ETag is
    another one whenever something in the answer is."""
    recent = call.service.recent_identities
    made = recent.get(address)
    if made is None:
        began = recent.now()
        body = encode(await call.read(read_identities, address))
        made = Made(f'"{sha256(body).hexdigest()[:24]}"', body)
        recent.put(address, made, began)
    headers = {"ETag": made.tag, "Cache-Control": "private, no-cache"}
    if not_modified(call.request, made.tag):
        return Response(status_code=304, headers=headers)
    return Response(made.body, headers=headers, media_type="application/json")
