"""Who may send as what: of one account, and of one login and one address."""

from typing import Annotated

from fastapi import APIRouter, Query
from pydantic import BaseModel, Field
from starlette.responses import Response

from app.addresses import MailAddress, OutsideAddress
from app.routers.shapes import NOT_FOUND, CanReadAliases, CanReadOwnAliases, UserKey
from app.services.senders import Reason, judge_sender, list_send_as
from app.services.users import get_user
from app.web.answers import answer
from app.web.dependencies import Route

router = APIRouter(tags=["Aliases"], route_class=Route)


class SenderBody(BaseModel):
    address: str
    reason: Reason


class SenderList(BaseModel):
    login: str
    items: list[SenderBody] = Field(description="Empty while the account is suspended, or the host not ready.")


class VerdictBody(BaseModel):
    allowed: bool
    reason: Reason
    detail: str


@router.get(
    "/v1/users/{user}/send-as",
    response_model=SenderList,
    summary="List what an account may send as",
    responses=NOT_FOUND,
)
async def list_senders(user: UserKey, call: CanReadOwnAliases) -> Response:
    """From the very view that Postfix reads, with the reason for each."""
    record = await call.read(get_user, user)  # type: ignore[arg-type]  # parsed by UserKey
    login = record.shown["address"]
    found = [] if record.shown["state"] == "deleted" else await call.read(list_send_as, login)
    items = [SenderBody(address=address, reason=reason) for address, reason in found]
    return answer(call, SenderList(login=login, items=items))


@router.get("/v1/send-as", response_model=VerdictBody, summary="Ask whether a login may send as an address")
async def judge(
    call: CanReadAliases,
    login: Annotated[MailAddress, Query(description="Who signs in.")],
    sender: Annotated[OutsideAddress, Query(alias="from", description="What stands in the envelope, or in From.")],
) -> Response:
    """Yes or no, as Postfix and the From rule decide it, and why."""
    verdict = await call.read(judge_sender, login, sender)
    return answer(call, VerdictBody(allowed=verdict.allowed, reason=verdict.reason, detail=verdict.detail))
