"""/dovecot/auth-policy: what Dovecot asks about each login, and how it tells what came of it.

Source: https://doc.dovecot.org/2.3/configuration_manual/authentication/auth_policy/. Not behind a client's credentials: it
shows a secret of its own in X-API-Key, from the networks of the mail hosts, and it speaks to us directly, through no proxy.
"""

import asyncio
import hmac
from ipaddress import ip_address
from typing import Annotated, Any, Literal

import orjson
from fastapi import APIRouter, Query, Request
from pydantic import BaseModel, Field
from starlette.responses import Response

from app.errors import Forbidden, NotFound, Unavailable
from app.routers.shapes import NOT_FOUND, problem
from app.web.dependencies import PUBLIC, Route, Service

router = APIRouter(prefix="/dovecot", tags=["Lockouts"], route_class=Route)

SECONDS = 2
"""After which Dovecot is told that we cannot say: its own setting then decides, and not its patience."""

_FORWARDED = ("x-forwarded-for", "forwarded", "x-real-ip")


class PolicyAnswer(BaseModel):
    status: int = Field(description="0: go on. -1: refuse. Else the seconds to wait before going on.")
    msg: str = Field(description="For the client; always empty.")


@router.post(
    "/auth-policy",
    response_model=PolicyAnswer,
    summary="For Dovecot: may this login go on, and what came of it",
    dependencies=[PUBLIC],
    responses={
        **NOT_FOUND,
        403: problem("Another key, another network, or a proxy on the way."),
        503: problem("The database did not answer in time."),
    },
    openapi_extra={
        "requestBody": {
            "content": {
                "application/json": {
                    "schema": {"type": "object"},
                    "example": {"login": "alice@cacert.org", "remote": "192.0.2.7", "pwhash": "07a6"},
                }
            }
        }
    },
)
async def auth_policy(
    request: Request, command: Annotated[Literal["allow", "report"], Query(description="Before, or after.")]
) -> Response:
    """Set up by `auth_policy_url` and `auth_policy_key` in the host's file: see docs/brute-force.md."""
    service: Service = request.app.state.service
    _check_caller(request, service)
    try:
        said = orjson.loads(await request.body())
    except orjson.JSONDecodeError:
        said = None
    if not isinstance(said, dict):
        said = {}
    login, remote, guess = (_text(said.get(name)) for name in ("login", "remote", "pwhash"))
    if command == "report":  # Dovecot does not wait for it, and it is not to be lost
        await service.throttle.report(
            login,
            remote,
            guess,
            success=said.get("success") is True,
            rejected=said.get("policy_reject") is True,
            app_password_id=_number(said.get("app_password_id")),
        )
        return _answer(0)
    try:
        async with asyncio.timeout(SECONDS):
            return _answer(await service.throttle.allow(login, remote, guess))
    except TimeoutError:
        raise Unavailable("The database does not answer in time.") from None


def _answer(status: int) -> Response:
    return Response(b'{"status":%d,"msg":""}' % status, media_type="application/json")


def _check_caller(request: Request, service: Service) -> None:
    """Raises NotFound when Dovecot is not to ask at all, and Forbidden for anybody else."""
    if service.policy_key is None:
        raise NotFound("AUTH_POLICY_KEY_FILE is not set: nothing is answered here.")
    key = request.headers.get("x-api-key", "").encode("utf-8", "replace")
    if (
        not hmac.compare_digest(key, service.policy_key)
        or any(name in request.headers for name in _FORWARDED)
        or not _is_near(request, service)
    ):
        raise Forbidden("This is for the mail hosts' Dovecot alone.")


def _is_near(request: Request, service: Service) -> bool:
    try:
        address = ip_address(request.client.host if request.client else "")
    except ValueError:
        return False
    address = getattr(address, "ipv4_mapped", None) or address
    return any(address in network for network in service.policy_networks if network.version == address.version)


def _text(value: Any) -> str:
    return value if isinstance(value, str) else ""


def _number(value: Any) -> int | None:
    """Dovecot sends each attribute of ours as a string, and an empty one for none."""
    text = str(value)
    return int(text) if text.isascii() and text.isdigit() and len(text) <= 18 else None
