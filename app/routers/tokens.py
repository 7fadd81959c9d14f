"""/oauth/token (RFC 6749, client credentials) and the keys that verify its tokens (RFC 7517). Errors as RFC 6749 has them."""

from typing import Annotated, Any, Literal

from fastapi import APIRouter, Form, Request
from fastapi.responses import JSONResponse
from pydantic import BaseModel, Field, SecretStr
from starlette.responses import Response

from app.errors import Unauthenticated
from app.permissions import Role
from app.web.authentication import parse_basic
from app.web.dependencies import PUBLIC, Route, Service
from app.web.problems import CHALLENGE

router = APIRouter(tags=["Tokens"], route_class=Route)


class TokenBody(BaseModel):
    access_token: str
    token_type: str = Field(examples=["Bearer"])
    expires_in: int = Field(description="Seconds.")
    scope: str = Field(description="The permissions that the token carries.")
    role: Role
    rank: int
    key_id: int = Field(description="Of the secret or certificate that it was obtained with, and ends with.")


class RefusedBody(BaseModel):
    """RFC 6749, section 5.2."""

    error: Literal["invalid_request", "invalid_client", "unsupported_grant_type", "invalid_scope"]
    error_description: str


class Keys(BaseModel):
    keys: list[dict[str, str]]


_NO_STORE = {"Cache-Control": "no-store", "Pragma": "no-cache"}


def _refused(status: int, error: str, description: str) -> Response:
    headers = {**_NO_STORE, **(CHALLENGE if status == 401 else {})}
    return JSONResponse({"error": error, "error_description": description}, status, headers)


@router.post(
    "/oauth/token",
    response_model=TokenBody,
    summary="Get an access token",
    dependencies=[PUBLIC],
    responses={
        400: {"model": RefusedBody, "description": "Another grant, or more scope than the client has."},
        401: {"model": RefusedBody, "description": "Client id or secret is wrong, or the client is disabled."},
    },
)
async def create_token(
    request: Request,
    grant_type: Annotated[str, Form(description="`client_credentials`.", examples=["client_credentials"])] = "",
    scope: Annotated[str | None, Form(description="Fewer permissions than the client has, blank between.")] = None,
    client_id: Annotated[str | None, Form(description="Unless it comes by HTTP Basic.")] = None,
    client_secret: Annotated[SecretStr | None, Form(description="Unless it comes by HTTP Basic.")] = None,
) -> Response:
    """Ten minutes' worth, for the client named by HTTP Basic or in the form.

    With a client certificate `client_id` alone is enough, and the token comes with that certificate or not at all (RFC 8705).
    """
    if not grant_type:
        return _refused(400, "invalid_request", "Send a form with grant_type=client_credentials.")
    if grant_type != "client_credentials":
        return _refused(400, "unsupported_grant_type", "grant_type must be client_credentials.")
    service: Service = request.app.state.service
    authorization = request.headers.get("authorization", "")
    try:
        secret = client_secret.get_secret_value() if client_secret else ""
        if authorization.lower().startswith("basic "):
            client_id, secret = parse_basic(authorization[6:])
        if client_id and not secret and request.scope.get("client_certificate") is not None:
            principal = await service.authenticator.by_certificate(request, client_id)  # RFC 8705, section 2
        elif client_id and secret:
            principal = await service.authenticator.by_secret(request, client_id, secret)
        else:
            raise Unauthenticated("Send client id and secret, by HTTP Basic or as client_id and client_secret.")
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
        "role": principal.role,
        "rank": principal.rank,
        "key_id": principal.key_id,
    }
    return JSONResponse(body, headers=_NO_STORE)


@router.get(
    "/.well-known/jwks.json", response_model=Keys, summary="The public keys of our tokens", dependencies=[PUBLIC]
)
async def get_keys(request: Request) -> JSONResponse:
    """A JWK Set (RFC 7517): whoever has it can verify a token, and make none."""
    service: Service = request.app.state.service
    return JSONResponse(service.authenticator.jwks(), headers={"Cache-Control": "public, max-age=300"})
