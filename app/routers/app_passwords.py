"""/v1/users/{user}/app-passwords: passwords for single programs."""

from datetime import datetime
from typing import Annotated, Any

import orjson
from fastapi import APIRouter, Path
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, field_validator
from starlette.responses import Response

from app.credentials.app_passwords import new_app_password
from app.credentials.tokens import hash_secret
from app.routers.shapes import (
    CONFLICT,
    IDEMPOTENCY_KEY,
    NOT_FOUND,
    PREFER,
    CanReadAppPasswords,
    CanWriteAppPasswords,
    ProofBody,
    UserKey,
    plain_text,
    takes,
)
from app.services import app_passwords as service
from app.services.app_passwords import Protocol
from app.services.users import UserRecord, find_user_id, get_user
from app.web.answers import JobBody, answer, job_body, settled
from app.web.dependencies import Route

router = APIRouter(prefix="/v1/users/{user}/app-passwords", tags=["App passwords"], route_class=Route)

AppPasswordId = Annotated[int, Path(ge=1, le=2**62, description="The app password's id.")]


class AppPasswordBody(BaseModel):
    id: int
    name: str
    protocols: list[Protocol]
    created_at: datetime
    revoked_at: datetime | None
    last_used_at: datetime | None = Field(description="The last login with it, give or take a few minutes.")
    last_used_from: str | None = Field(description="The address that this login came from.")


class NewAppPasswordBody(BaseModel):
    model_config = ConfigDict(
        extra="forbid", json_schema_extra={"examples": [{"name": "Telephone", "protocols": ["imap", "smtp"]}]}
    )

    name: Annotated[str, Field(min_length=1, max_length=100), AfterValidator(plain_text)] = Field(
        description="What the owner knows it by."
    )
    protocols: list[Protocol] = Field(min_length=1, max_length=len(Protocol))

    @field_validator("protocols")
    @classmethod
    def each_once(cls, protocols: list[Protocol]) -> list[Protocol]:
        if len(set(protocols)) < len(protocols):
            raise ValueError("Name each protocol once.")
        return protocols


class MadeAppPasswordBody(AppPasswordBody):
    password: str | None = Field(
        description="Shown this once, hyphens included; null when the request was sent again with its Idempotency-Key."
    )


class AppPasswordList(BaseModel):
    items: list[AppPasswordBody] = Field(description="Those that can be used, the oldest first.")


class RevokedAppPasswordBody(AppPasswordBody):
    """And how far the host has got with ending the account's sessions."""

    ready: bool = Field(description="Every session of the account has ended since, and no login is remembered.")
    proofs: dict[str, ProofBody]
    job: JobBody | None


def _members(row: Any) -> dict[str, Any]:
    members = {name: getattr(row, name) for name in AppPasswordBody.model_fields if name != "protocols"}
    return {**members, "protocols": [protocol for protocol in Protocol if getattr(row, protocol)]}


@router.post(
    "",
    status_code=201,
    response_model=MadeAppPasswordBody,
    summary="Make an app password",
    responses={**NOT_FOUND, **CONFLICT},
    openapi_extra=takes(IDEMPOTENCY_KEY),
)
async def create_app_password(user: UserKey, body: NewAppPasswordBody, call: CanWriteAppPasswords) -> Response:
    """A random one, for these protocols alone. It is shown in this answer and never again."""
    user_id = await call.read(find_user_id, user)  # type: ignore[arg-type]  # parsed by UserKey
    password = new_app_password()
    most = call.service.settings.app_passwords_max
    arguments = (user_id, body.name, body.protocols, hash_secret(password))
    made = await call.write(service.create_app_password, *arguments, most=most)
    row = await call.read(service.get_app_password, user_id, made)
    shown = {**_members(row), "password": None if call.replayed else password}
    response = answer(call, shown, status=201, location=f"/v1/users/{user_id}/app-passwords/{made}")
    response.headers["Cache-Control"] = "no-store"
    return response


@router.get("", response_model=AppPasswordList, summary="List the app passwords of an account", responses=NOT_FOUND)
async def list_app_passwords(user: UserKey, call: CanReadAppPasswords) -> Response:
    """With when and from where each was last used."""
    account = await call.read(get_user, user)  # type: ignore[arg-type]  # parsed by UserKey
    rows = await call.read(service.list_app_passwords, account.id)
    return answer(call, {"items": [_members(row) for row in rows]})


@router.get(
    "/{app_password}",
    response_model=AppPasswordBody,
    summary="Read an app password",
    responses=NOT_FOUND,
)
async def get_app_password(user: UserKey, app_password: AppPasswordId, call: CanReadAppPasswords) -> Response:
    """Never the password itself. Also one that is revoked."""
    user_id = await call.read(find_user_id, user)  # type: ignore[arg-type]  # parsed by UserKey
    return answer(call, _members(await call.read(service.get_app_password, user_id, app_password)))


@router.delete(
    "/{app_password}",
    response_model=RevokedAppPasswordBody,
    summary="Revoke an app password",
    responses={202: {"model": RevokedAppPasswordBody, "description": "Accepted; sessions are ending."}, **NOT_FOUND},
    openapi_extra=takes(PREFER),
)
async def revoke_app_password(user: UserKey, app_password: AppPasswordId, call: CanWriteAppPasswords) -> Response:
    """Ends it, and **every session of the account**: programs with another password sign in again by themselves."""
    user_id = await call.read(find_user_id, user)  # type: ignore[arg-type]  # parsed by UserKey
    await call.write(service.revoke_app_password, user_id, app_password)

    async def read() -> UserRecord:
        return await call.read(get_user, user_id)

    account, waited = await settled(call, read)
    job = account.job
    members = _members(await call.read(service.get_app_password, user_id, app_password))
    reached = {"ready": account.ready, "proofs": orjson.Fragment(account.proofs), "job": job and job_body(job)}
    return answer(call, {**members, **reached}, status=200 if account.ready else 202, job=job, waited=waited)
