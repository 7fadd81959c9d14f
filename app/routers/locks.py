"""/v1/users/{user}/lock and unlock: for an account that seems stolen."""

from typing import Annotated

from fastapi import APIRouter
from pydantic import AfterValidator, BaseModel, ConfigDict, Field
from starlette.responses import Response

from app.routers.shapes import (
    CHANGED,
    CONFLICT,
    IDEMPOTENCY_KEY,
    IF_MATCH,
    NOT_FOUND,
    PREFER,
    CanLockUsers,
    UserKey,
    plain_text,
    takes,
)
from app.routers.users import UserBody, answer_user
from app.services import locks as service
from app.services.users import find_user_id
from app.web.conditional import expected_version
from app.web.dependencies import Route

router = APIRouter(prefix="/v1/users/{user}", tags=["Users"], route_class=Route)


class LockBody(BaseModel):
    model_config = ConfigDict(
        extra="forbid", json_schema_extra={"examples": [{"reason": "Sends spam since this morning"}]}
    )

    reason: Annotated[str, Field(min_length=1, max_length=200), AfterValidator(plain_text)] | None = None


_NO_REASON = LockBody()


@router.post(
    "/lock",
    response_model=UserBody,
    summary="Lock a stolen account",
    responses={
        202: {"model": UserBody, "description": "Accepted; the host is not ready yet."},
        **NOT_FOUND,
        **CONFLICT,
        **CHANGED,
    },
    openapi_extra=takes(PREFER, IDEMPOTENCY_KEY, IF_MATCH),
)
async def lock_user(user: UserKey, call: CanLockUsers, body: LockBody = _NO_REASON) -> Response:
    """Suspends it, ends every session, holds its queued mail, **revokes its app passwords** and cancels its links.

    Only `unlock` ends it. The owner is told by mail.
    """
    user_id = await call.read(find_user_id, user)  # type: ignore[arg-type]  # parsed by UserKey
    await call.write(service.lock_user, user_id, body.reason, expected_version=expected_version(call.request))
    return await answer_user(call, user_id)


@router.post(
    "/unlock",
    response_model=UserBody,
    summary="Unlock an account",
    responses={
        202: {"model": UserBody, "description": "Accepted; the host is not ready yet."},
        **NOT_FOUND,
        **CONFLICT,
        **CHANGED,
    },
    openapi_extra=takes(PREFER, IDEMPOTENCY_KEY, IF_MATCH),
)
async def unlock_user(user: UserKey, call: CanLockUsers) -> Response:
    """What it was before, active or suspended, with the same password: set a new one first. App passwords stay revoked."""
    user_id = await call.read(find_user_id, user)  # type: ignore[arg-type]  # parsed by UserKey
    await call.write(service.unlock_user, user_id, expected_version=expected_version(call.request))
    return await answer_user(call, user_id)
