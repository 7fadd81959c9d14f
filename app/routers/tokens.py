"""/oauth/token (RFC 6749, client credentials) and the keys that verify its tokens (RFC 7517). Errors as RFC 6749 has them."""

from typing import Annotated, Any

from fastapi import APIRouter, Form, Request
from fastapi.responses import JSONResponse
from pydantic import BaseModel, Field
from starlette.responses import Response

from app.errors import Unauthenticated
from app.web.authentication import parse_basic
from app.web.dependencies import PUBLIC, Route, Service
from app.web.problems import CHALLENGE

router = APIRouter(tags=["Tokens"], route_class=Route)


class TokenBody(BaseModel):
    access_token: str
    token_type: str = Field(examples=["Bearer"])
    expires_in: int = Field(description="Seconds.")
    scope: str = Field(description="The permissions that the token carries.")


_NO_STORE = {"Cache-Control": "no-store", "Pragma": "no-cache"}


def _refused(status: int, error: str, description: str) -> Response:
    headers = {**_NO_STORE, **(CHALLENGE if status == 401 else {})}
    return JSONResponse({"error": error, "error_description": description}, status, headers)


@router.post("/oauth/token", response_model=TokenBody, summary="Get an access token", dependencies=[PUBLIC])
async def create_token(
    request: Request,
    grant_type: Annotated[str, Form(description="`client_credentials`.", max_length=64)] = "",
    scope: Annotated[str | None, Form(description="Fewer permissions than the client has, blank between.", max_length=2048)] = None,
    client_id: Annotated[str | None, Form(max_length=64)] = None,
    client_secret: Annotated[str | None, Form(max_length=128)] = None,
) -> Response:
    """Ten minutes' worth, for the client named by HTTP Basic or in the form."""
    if grant_type != "client_credentials":
        return _refused(400, "unsupported_grant_type", "grant_type must be client_credentials.")
    service: Service = request.app.state.service
    authorization = request.headers.get("authorization", "")
    try:
        if authorization.lower().startswith("basic "):
            client_id, client_secret = parse_basic(authorization[6:])
        if not client_id or not client_secret:
            raise Unauthenticated("Send client id and secret, by HTTP Basic or as client_id and client_secret.")
        principal = await service.authenticator.by_secret(request, client_id, client_secret)
    except Unauthenticated as error:
        return _refused(401, "invalid_client", error.detail)
    asked = None if not scope else frozenset(scope.split())
    if asked is not None and not asked <= {permission.value for permission in principal.permissions}:
        return _refused(400, "invalid_scope", "The client does not have all of these permissions; /v1/me lists them.")
    token, seconds = await service.authenticator.issue(principal, asked)
    granted = asked if asked is not None else {permission.value for permission in principal.permissions}
    body: dict[str, Any] = {
        "access_token": token,
        "token_type": "Bearer",
        "expires_in": seconds,
        "scope": " ".join(sorted(granted)),
    }
    return JSONResponse(body, headers=_NO_STORE)


@router.get("/.well-known/jwks.json", summary="The public keys of our tokens", dependencies=[PUBLIC])
async def get_keys(request: Request) -> JSONResponse:
    service: Service = request.app.state.service
    return JSONResponse(service.authenticator.jwks(), headers={"Cache-Control": "public, max-age=300"})


