"""/v1/me: who am I, and what may I do."""

from fastapi import APIRouter
from pydantic import BaseModel
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
    permissions: list[Permission]


@router.get("", response_model=MeBody, summary="Who am I, and what may I do?")
async def get_me(call: AnyCall) -> Response:
    """The client, and the permissions that these credentials carry."""
    me = call.principal
    return answer(call, MeBody(id=me.id, name=me.name, role=me.role, permissions=sorted(me.permissions)))
