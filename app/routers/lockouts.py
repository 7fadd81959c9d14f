"""/v1/lockouts: whose logins are slowed or refused right now, and lifting that."""

from datetime import datetime
from typing import Annotated, Literal

from fastapi import APIRouter, Path, Query
from pydantic import BaseModel, Field
from starlette.responses import Response

from app.models.login_failures import FailureKind
from app.routers.shapes import NOT_FOUND, CanReadLockouts, CanWriteLockouts
from app.services import lockouts as service
from app.web.dependencies import Route
from app.web.paging import Limit, NameCursor, page_response

router = APIRouter(prefix="/v1/lockouts", tags=["Lockouts"], route_class=Route)

LockoutId = Annotated[str, Path(pattern=r"^[A-Za-z0-9_-]{4,512}$", description="As the list shows it.")]


class LockoutBody(BaseModel):
    id: str
    kind: FailureKind = Field(description="`mail`: Dovecot. `api`: client secrets. `reset`: password resets.")
    login: str | None = Field(description="Null: whatever login. `~…`: none of ours, kept as a hash.")
    network: str | None = Field(description="Null: wherever the login is not known. `shared`: the shared sources.")
    state: Literal["slowed", "refused"]
    guesses: int = Field(description="Different wrong passwords; of `reset`, requests.")
    attempts: int
    first_at: datetime
    last_at: datetime
    refused_until: datetime | None
    ends_at: datetime = Field(description="When nothing of it counts any more, without a further guess.")

    @staticmethod
    def of(lockout: service.Lockout) -> "LockoutBody":
        state: Literal["slowed", "refused"] = "slowed" if lockout.refused_until is None else "refused"
        values = {name: getattr(lockout, name) for name in LockoutBody.model_fields if name != "state"}
        return LockoutBody.model_construct(**values, state=state)


class LockoutList(BaseModel):
    items: list[LockoutBody]
    next_cursor: str | None


@router.get("", response_model=LockoutList, summary="List who is slowed or refused")
async def list_lockouts(
    call: CanReadLockouts,
    login: Annotated[str | None, Query(max_length=254, description="Only about this address or client.")] = None,
    network: Annotated[str | None, Query(max_length=43, description="Only about this network.")] = None,
    limit: Limit = 50,
    cursor: NameCursor = None,
) -> Response:
    """By login, by network and by both, as docs/brute-force.md has the rules."""
    throttle = call.service.throttle
    found = await call.read(
        service.list_lockouts,
        throttle.limits,
        call.service.clock(),
        throttle.window,
        login=login,
        network=network,
        after=cursor,
        limit=limit,
    )
    last = found[-1].id if found else None
    return page_response(call.request, [LockoutBody.of(lockout) for lockout in found], last, limit)


@router.delete("/{lockout}", status_code=204, summary="Lift a lockout", responses=NOT_FOUND)
async def lift_lockout(lockout: LockoutId, call: CanWriteLockouts) -> Response:
    """Forgets the wrong guesses that it follows from. Lifting a login's leaves nothing of that login recorded; a network's,
    nothing of that network."""
    await call.write(service.lift_lockout, lockout)
    return Response(status_code=204)
