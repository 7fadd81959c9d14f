"""/v1/me: who am I, and what may I do."""

from fastapi import APIRouter
from pydantic import BaseModel, Field
from starlette.responses import Response

from app.permissions import Permission, Role
from app.routers.shapes import AnyCall
from app.web.answers import answer
from app.web.dependencies import Route

router = APIRouter(prefix="/v1/me", tags=["Me"], route_class=Route)


class MeBody(BaseModel):
    id: str
    name: str
    role: Role
    rank: int = Field(description="You act on no principal, and on nobody's account, of a higher one.")
    permissions: list[Permission] = Field(description="That these credentials carry: a token may have been narrowed.")
    key_id: int | None = Field(description="Of the secret or certificate behind them. The audit trail names it.")
    user_id: int | None = Field(description="An owner's account; a person's own.")


@router.get("", response_model=MeBody, summary="Who am I, and what may I do?")
async def get_me(call: AnyCall) -> Response:
    """Whom these credentials are taken for."""
    me = call.principal
    body = MeBody(
        id=me.id,
        name=me.name,
        role=me.role,
        rank=me.rank,
        permissions=sorted(me.permissions),
        key_id=me.key_id,
        user_id=me.user_id,
    )
    return answer(call, body)
