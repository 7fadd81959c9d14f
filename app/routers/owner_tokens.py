"""/v1/users/{user}/owner-tokens: an account acts for itself, once a webmail or website has seen its owner sign in."""

from fastapi import APIRouter
from pydantic import BaseModel, Field
from starlette.responses import Response

from app.routers.shapes import CONFLICT, NOT_FOUND, CanMakeOwnerTokens, UserKey
from app.services.principals import permit_owner
from app.services.users import find_user_id
from app.web.answers import answer
from app.web.dependencies import Route

router = APIRouter(prefix="/v1/users/{user}/owner-tokens", tags=["Principals"], route_class=Route)


class OwnerTokenBody(BaseModel):
    access_token: str
    token_type: str = Field(examples=["Bearer"])
    expires_in: int = Field(description="Seconds.")
    user_id: int = Field(description="The account that it is the owner of.")


@router.post(
    "",
    status_code=201,
    response_model=OwnerTokenBody,
    summary="Get a token for an account's owner",
    responses={**NOT_FOUND, **CONFLICT},
)
async def create_owner_token(user: UserKey, call: CanMakeOwnerTokens) -> Response:
    """Ten minutes' worth, for this one account. Ask for it only once the owner has signed in: you answer for that.

    It ends before, when the account is suspended or deleted, its password changes, or your own key ends.
    """
    user_id = await call.read(find_user_id, user)  # type: ignore[arg-type]  # parsed by UserKey
    await call.write(permit_owner, user_id)
    token, seconds = await call.service.authenticator.issue_for_owner(call.principal, user_id)
    body = OwnerTokenBody(access_token=token, token_type="Bearer", expires_in=seconds, user_id=user_id)  # noqa: S106  RFC 6750
    return answer(call, body, status=201)
