"""/v1/principals: people and services that may call, and the secrets and certificates by which they show who they are."""

from datetime import datetime, timedelta
from ipaddress import IPv6Network, ip_network
from typing import Annotated, Any

from cryptography import x509
from fastapi import APIRouter, Path, Query
from pydantic import AfterValidator, AwareDatetime, BaseModel, ConfigDict, Field, StringConstraints, model_validator
from pydantic_core import PydanticCustomError
from starlette.responses import Response

from app.addresses import MailAddress
from app.errors import BadField, Unchangeable
from app.models.principals import KeyKind, PrincipalState
from app.permissions import RANKS, Permission, Role
from app.routers.shapes import (
    CHANGED,
    CONFLICT,
    IDEMPOTENCY_KEY,
    IF_MATCH,
    IF_NONE_MATCH,
    NOT_FOUND,
    NOT_MODIFIED,
    CanReadPrincipals,
    CanWritePrincipals,
    parse_key,
    plain_text,
    takes,
)
from app.services import principals as service
from app.services.principals import Credentials
from app.services.users import find_user_id
from app.web.answers import answer
from app.web.certificates import read_certificate
from app.web.conditional import etag, expected_version
from app.web.dependencies import Call, Route
from app.web.paging import Limit, NameCursor, page_response

router = APIRouter(prefix="/v1/principals", tags=["Principals"], route_class=Route)

PrincipalId = Annotated[str, Path(pattern=r"^[a-z0-9-]{1,40}$", description="The client id.")]
KeyId = Annotated[int, Path(ge=1, le=2**62, description="The key's id.")]


def _network(text: str) -> str:
    try:
        network = ip_network(text)
    except ValueError:
        raise ValueError("This takes a network such as 192.0.2.0/24 or 2001:db8::/32, or one address.") from None
    if isinstance(network, IPv6Network) and network.network_address.ipv4_mapped is not None:
        raise ValueError("Write an IPv4 network as IPv4.")
    return str(network)


def _not_owner(role: Role) -> Role:
    if role is Role.OWNER:
        raise ValueError("An owner is no principal: POST /v1/users/{user}/owner-tokens makes a token for one.")
    return role


def _account(key: int | str | None) -> MailAddress | int | None:
    return parse_key(key) if isinstance(key, str) else key


Name = Annotated[str, Field(min_length=1, max_length=100), AfterValidator(plain_text)]
NewRole = Annotated[Role, AfterValidator(_not_owner)]
Permissions = Annotated[list[Permission], Field(max_length=len(Permission))]
Networks = Annotated[
    list[Annotated[str, StringConstraints(max_length=50), AfterValidator(_network)]],
    Field(min_length=1, max_length=50, examples=[["192.0.2.0/24"]]),
]
Account = Annotated[
    Annotated[int, Field(ge=1, le=2**62)] | Annotated[str, StringConstraints(max_length=254)],
    AfterValidator(_account),
]

_PERMISSIONS = "Only these of its role; null: all that the role has."
_NETWORKS = "From where alone it may call; null: from anywhere."
_EXPIRES = "From then on it is refused; null: never."
_USER = "A person's own account, address or id: nobody whose role stands lower acts on it."


class KeyBody(BaseModel):
    """A secret or certificate. Of a secret nothing is shown but that it is there."""

    id: int = Field(description="The audit trail names it.")
    kind: KeyKind
    fingerprint: str | None = Field(description="SHA-256 of the certificate, in hex; null for a secret.")
    created_at: datetime
    ends_at: datetime | None = Field(description="From then on it is refused; null: no end is set.")


class PrincipalBody(BaseModel):
    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "id": "website-3f9c1d2ab04e",
                    "name": "Community website",
                    "role": "website",
                    "rank": 0,
                    "state": "active",
                    "permissions": None,
                    "networks": ["192.0.2.10/32"],
                    "user_id": None,
                    "expires_at": None,
                    "version": 1,
                    "keys": [
                        {
                            "id": 4,
                            "kind": "secret",
                            "fingerprint": None,
                            "created_at": "2026-11-23T12:00:00Z",
                            "ends_at": None,
                        }
                    ],
                    "created_at": "2026-11-23T12:00:00Z",
                    "updated_at": "2026-11-23T12:00:00Z",
                }
            ]
        }
    )

    id: str = Field(description="The client id.")
    name: str
    role: Role
    rank: int = Field(description="Nobody of a lower one acts on it.")
    state: PrincipalState
    permissions: list[str] | None = Field(description=_PERMISSIONS)
    networks: list[str] | None = Field(description=_NETWORKS)
    user_id: int | None = Field(description="A person's own account.")
    expires_at: datetime | None = Field(description=_EXPIRES)
    version: int
    keys: list[KeyBody] = Field(description="All that it ever had; some have ended.")
    created_at: datetime
    updated_at: datetime


class CredentialsBody(PrincipalBody):
    secret: str | None = Field(description="Shown now and never again; null when the request was a repeat.")


class PrincipalList(BaseModel):
    items: list[PrincipalBody]
    next_cursor: str | None


def _shown(row: Any, keys: list[Any]) -> dict[str, Any]:
    """What PrincipalBody describes."""
    body = {name: getattr(row, name) for name in PrincipalBody.model_fields if name not in ("keys", "rank")}
    return body | {"rank": RANKS[Role(row.role)], "keys": [_key(key) for key in keys]}


def _key(key: Any) -> dict[str, Any]:
    shown = {name: getattr(key, name) for name in KeyBody.model_fields if name != "fingerprint"}
    return shown | {"fingerprint": key.hash if key.kind == KeyKind.CERTIFICATE else None}


class NewPrincipalBody(BaseModel):
    model_config = ConfigDict(
        extra="forbid",
        json_schema_extra={
            "examples": [{"role": "website", "name": "Community website", "networks": ["192.0.2.10/32"]}]
        },
    )

    role: NewRole
    name: Name
    permissions: Permissions | None = Field(None, description=_PERMISSIONS)
    networks: Networks | None = Field(None, description=_NETWORKS)
    expires_at: AwareDatetime | None = Field(None, description=_EXPIRES)
    user: Account | None = Field(None, description=_USER)


class ChangedPrincipalBody(BaseModel):
    """Only what is sent is changed."""

    model_config = ConfigDict(extra="forbid", json_schema_extra={"examples": [{"networks": ["192.0.2.0/24"]}]})

    name: Name | None = None
    permissions: Permissions | None = Field(None, description=_PERMISSIONS)
    networks: Networks | None = Field(None, description=_NETWORKS)
    expires_at: AwareDatetime | None = Field(None, description=_EXPIRES)
    user: Account | None = Field(None, description=_USER)
    state: PrincipalState | None = Field(None, description="`disabled` refuses its keys and tokens within two seconds.")

    @model_validator(mode="before")
    @classmethod
    def say_what_to_do_instead(cls, data: Any) -> Any:
        if isinstance(data, dict):
            if "role" in data:
                raise Unchangeable("A role never changes. Make another principal, and disable this one.", field="role")
            for name in ("name", "state"):
                if name in data and data[name] is None:
                    raise PydanticCustomError("null", "{name} cannot be null.", {"name": name})
        return data


class RotationBody(BaseModel):
    model_config = ConfigDict(extra="forbid", json_schema_extra={"examples": [{"overlap_seconds": 3600}]})

    overlap_seconds: int = Field(
        86_400, ge=0, le=7 * 86_400, description="How long the present secret lives on; 0: it ends now."
    )


class NewCertificateBody(BaseModel):
    model_config = ConfigDict(
        extra="forbid",
        hide_input_in_errors=True,
        json_schema_extra={"examples": [{"fingerprint": "0b" * 32}]},
    )

    certificate: str | None = Field(None, max_length=16_384, description="In PEM, or")
    fingerprint: str | None = Field(
        None, max_length=120, description="its SHA-256 in hex, as `openssl x509 -fingerprint -sha256` prints it."
    )

    @model_validator(mode="after")
    def one_of_both(self) -> "NewCertificateBody":
        if (self.certificate is None) == (self.fingerprint is None):
            raise PydanticCustomError("one_of_both", "Send certificate or fingerprint.")
        return self


async def _answer(call: Call, client_id: str, *, status: int = 200, **more: Any) -> Response:
    row = await call.read(service.get_principal, client_id)
    body = _shown(row, (await call.read(service.list_keys, [client_id]))[client_id])
    created = f"/v1/principals/{client_id}" if status == 201 else None
    return answer(call, {**body, **more}, status=status, tag=etag(row.version, None), location=created)


async def _user_id(call: Call, key: Any) -> int | None:
    return None if key is None else await call.read(find_user_id, key)


@router.post(
    "",
    status_code=201,
    response_model=CredentialsBody,
    summary="Add a person or service",
    responses=CONFLICT,
    openapi_extra=takes(IDEMPOTENCY_KEY),
)
async def create_principal(body: NewPrincipalBody, call: CanWritePrincipals) -> Response:
    """Its client id and secret are in the answer; **the secret is never shown again**. Nobody gives what they do not have."""
    made: Credentials | str = await call.write(
        service.create_principal,
        body.name,
        body.role,
        body.permissions,
        networks=body.networks,
        expires_at=body.expires_at,
        user_id=await _user_id(call, body.user),
        caller=call.principal,
    )
    if isinstance(made, Credentials):
        return await _answer(call, made.id, status=201, secret=made.secret)
    return await _answer(call, made, status=201, secret=None)


@router.get("", response_model=PrincipalList, summary="List people and services")
async def list_principals(
    call: CanReadPrincipals,
    role: Annotated[Role | None, Query(description="Only of this role.")] = None,
    state: Annotated[PrincipalState | None, Query(description="Only in this state.")] = None,
    limit: Limit = 50,
    cursor: NameCursor = None,
) -> Response:
    """In the order of their ids, which begin with the role."""
    rows = await call.read(service.list_principals, role=role, state=state, after=cursor, limit=limit)
    keys = await call.read(service.list_keys, [row.id for row in rows])
    items = [_shown(row, keys[row.id]) for row in rows]
    return page_response(call.request, items, rows[-1].id if rows else None, limit)


@router.get(
    "/{principal}",
    response_model=PrincipalBody,
    summary="Read a person or service",
    responses={**NOT_FOUND, **NOT_MODIFIED},
    openapi_extra=takes(IF_NONE_MATCH),
)
async def get_principal(principal: PrincipalId, call: CanReadPrincipals) -> Response:
    """What it may do and from where, and its keys."""
    return await _answer(call, principal)


@router.patch(
    "/{principal}",
    response_model=PrincipalBody,
    summary="Change, restrict, expire or disable a person or service",
    responses={**NOT_FOUND, **CONFLICT, **CHANGED},
    openapi_extra=takes(IF_MATCH),
)
async def change_principal(principal: PrincipalId, body: ChangedPrincipalBody, call: CanWritePrincipals) -> Response:
    """Holds for its secrets, certificates and tokens alike, within two seconds. Nobody raises their own rights."""
    wanted = body.model_dump(include=body.model_fields_set)
    if "user" in wanted:
        wanted["user_id"] = await _user_id(call, wanted.pop("user"))
    version = expected_version(call.request)
    await call.write(service.change_principal, principal, wanted, expected_version=version, caller=call.principal)
    return await _answer(call, principal)


@router.post(
    "/{principal}/rotate",
    status_code=201,
    response_model=CredentialsBody,
    summary="Give a new secret",
    responses={**NOT_FOUND, **CONFLICT, **CHANGED},
    openapi_extra=takes(IDEMPOTENCY_KEY, IF_MATCH),
)
async def rotate_secret(principal: PrincipalId, body: RotationBody, call: CanWritePrincipals) -> Response:
    """The present one lives on for `overlap_seconds`, with its tokens, while the client is moved. Two live side by side, and
    no third: with `overlap_seconds: 0` all others end now. **The new secret is never shown again.**"""
    made: Credentials | str = await call.write(
        service.rotate_secret,
        principal,
        overlap=timedelta(seconds=body.overlap_seconds),
        expected_version=expected_version(call.request),
        caller=call.principal,
    )
    secret = made.secret if isinstance(made, Credentials) else None
    return await _answer(call, principal, status=201, secret=secret)


@router.post(
    "/{principal}/certificates",
    status_code=201,
    response_model=PrincipalBody,
    summary="Register a client certificate",
    responses={**NOT_FOUND, **CONFLICT, **CHANGED},
    openapi_extra=takes(IDEMPOTENCY_KEY, IF_MATCH),
)
async def add_certificate(principal: PrincipalId, body: NewCertificateBody, call: CanWritePrincipals) -> Response:
    """Instead of a secret, for requests that come through a proxy of CERTIFICATE_PROXIES. It may be self-signed: what counts
    is that the client holds the key of this very certificate."""
    await call.write(
        service.add_certificate,
        principal,
        _fingerprint(call, body),
        expected_version=expected_version(call.request),
        caller=call.principal,
    )
    return await _answer(call, principal, status=201)


@router.post(
    "/{principal}/keys/{key}/revoke",
    response_model=PrincipalBody,
    summary="End a secret or certificate now",
    responses={**NOT_FOUND, **CONFLICT, **CHANGED},
    openapi_extra=takes(IDEMPOTENCY_KEY, IF_MATCH),
)
async def revoke_key(principal: PrincipalId, key: KeyId, call: CanWritePrincipals) -> Response:
    """And the tokens that were obtained with it, within two seconds."""
    version = expected_version(call.request)
    await call.write(service.end_key, principal, key, expected_version=version, caller=call.principal)
    return await _answer(call, principal)


def _fingerprint(call: Call, body: NewCertificateBody) -> str:
    if body.fingerprint is not None:
        digest = body.fingerprint.rpartition("=")[2].replace(":", "").strip().lower()
        if len(digest) != 64 or set(digest) - set("0123456789abcdef"):
            raise BadField("This takes 64 hexadecimal digits, with colons or without.", field="fingerprint")
        return digest
    text = body.certificate or ""
    if "PRIVATE KEY" in text:
        raise BadField(
            "This holds a private key. Keep that to yourself: send the certificate alone.", field="certificate"
        )
    try:
        certificate = read_certificate(text.encode())
    except (ValueError, x509.InvalidVersion):
        raise BadField("This takes one certificate, in PEM.", field="certificate") from None
    if certificate.not_after < call.service.clock():
        raise BadField("This certificate has expired.", field="certificate")
    return certificate.fingerprint
