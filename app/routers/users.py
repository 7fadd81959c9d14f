"""/v1/users: accounts with a mailbox."""

from datetime import datetime, timedelta
from typing import Annotated, Any, Literal

import orjson
from fastapi import APIRouter, Query
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, SecretStr, field_validator, model_validator
from pydantic_core import PydanticCustomError
from starlette.responses import Response

from app.addresses import DomainName, MailAddress, OutsideAddress
from app.credentials.passwords import check_hash
from app.errors import Unchangeable
from app.models.users import UserState
from app.routers.passwords import new_hash
from app.routers.shapes import (
    CHANGED,
    CONFLICT,
    IDEMPOTENCY_KEY,
    IF_MATCH,
    IF_NONE_MATCH,
    NOT_FOUND,
    NOT_MODIFIED,
    PREFER,
    CanPurgeUsers,
    CanReadOwnUser,
    CanReadUsers,
    CanWriteUsers,
    HostName,
    ProofBody,
    UserKey,
    plain_text,
    takes,
)
from app.services import users as service
from app.services.password_resets import Terms
from app.services.passwords import create_invited_user
from app.services.users import NewUser, UserFilter, UserRecord
from app.web.answers import JobBody, answer, job_body, settled
from app.web.conditional import etag, expected_version
from app.web.dependencies import Call, Route
from app.web.paging import Limit, NumberCursor, page_response
from app.web.waiting import seconds_to_wait

router = APIRouter(prefix="/v1/users", tags=["Users"], route_class=Route)

DisplayName = Annotated[str, Field(max_length=200), AfterValidator(plain_text)]
ExternalId = Annotated[str, Field(min_length=1, max_length=128), AfterValidator(plain_text)]
Reason = Annotated[str, Field(min_length=1, max_length=200), AfterValidator(plain_text)]
SendLimit = Annotated[
    int, Field(ge=0, le=1_000_000, description="Recipients an hour by submission; 0: none; null: the host's setting.")
]
Quota = Annotated[int, Field(ge=1024 * 1024, le=2**50, description="Bytes; null: no limit.")]


class UserBody(BaseModel):
    """An account as it should be, and how far the host has got."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "id": 17,
                    "address": "alice@cacert.org",
                    "display_name": "Alice Example",
                    "contact_address": "alice@example.net",
                    "external_id": None,
                    "quota_bytes": None,
                    "send_limit": None,
                    "state": "active",
                    "suspended_reason": None,
                    "has_password": True,
                    "host": "mail",
                    "uid": 100017,
                    "home": "/home/alice",
                    "version": 1,
                    "ready": True,
                    "proofs": {name: {"result": "ok"} for name in ("maildir", "postfix", "dovecot", "sessions")},
                    "job": None,
                    "created_at": "2026-11-23T12:00:00Z",
                    "updated_at": "2026-11-23T12:00:00Z",
                    "deleted_at": None,
                    "purge_at": None,
                    "purged_at": None,
                    "locked_at": None,
                }
            ]
        }
    )

    id: int
    address: str
    display_name: str
    contact_address: str | None
    external_id: str | None
    quota_bytes: int | None
    send_limit: int | None = Field(description="Recipients an hour by submission; null: what the host is set to.")
    state: UserState
    suspended_reason: str | None
    has_password: bool = Field(description="Without one, no login works.")
    host: str
    uid: int | None = Field(description="Of the mailbox's files; null until the host has made it.")
    home: str | None = Field(description="Where the mailbox lies on the host; null until it is made.")
    version: int = Field(description="Raised by every change.")
    ready: bool = Field(description="The host reflects this version, and every proof holds.")
    proofs: dict[str, ProofBody] = Field(description="By name: maildir, postfix, dovecot, sessions.")
    job: JobBody | None
    created_at: datetime
    updated_at: datetime
    deleted_at: datetime | None
    purge_at: datetime | None = Field(description="When the archived mail and the personal data go for good.")
    purged_at: datetime | None
    locked_at: datetime | None = Field(description="Stolen, it seemed: suspended until it is unlocked.")


def user_body(record: UserRecord) -> dict[str, Any]:
    """What UserBody describes. A dict: a page of 100 takes half the time, and a test holds it to the model."""
    return {
        **record.shown,
        "has_password": bool(record.shown["has_password"]),
        "uid": record.result.get("uid"),
        "home": record.result.get("home"),
        "ready": record.ready,
        "proofs": orjson.Fragment(record.proofs),
        "job": None if record.job is None else job_body(record.job),
    }


class UserList(BaseModel):
    items: list[UserBody]
    next_cursor: str | None


class NewUserBody(BaseModel):
    model_config = ConfigDict(
        extra="forbid",
        hide_input_in_errors=True,
        json_schema_extra={
            "examples": [
                {
                    "address": "alice@cacert.org",
                    "display_name": "Alice Example",
                    "contact_address": "alice@example.net",
                    "password": "seven green lanterns over the harbour",
                }
            ]
        },
    )

    address: MailAddress
    display_name: DisplayName = ""
    contact_address: OutsideAddress | None = Field(
        None, description="Where password resets go; never the mailbox itself."
    )
    external_id: ExternalId | None = Field(None, description="Your own key for this person; unique.")
    quota_bytes: Quota | None = None
    send_limit: SendLimit | None = None
    host: HostName | None = Field(None, description="The mail host; may be left out while there is only one.")
    password: SecretStr | None = Field(
        None, max_length=256, description="Or `password_hash`; or neither: no login works."
    )
    password_hash: SecretStr | None = Field(None, max_length=500, description="A ready-made Dovecot hash, `{SCHEME}…`.")
    reuse_address: bool = Field(False, description="Take the address of a deleted account, on purpose.")
    invite: bool = Field(
        False,
        description="Mail the contact address a link by which the owner sets the password. Else nothing is mailed.",
    )

    @model_validator(mode="after")
    def one_password(self) -> "NewUserBody":
        if self.password is not None and self.password_hash is not None:
            raise PydanticCustomError("two_passwords", "Send password or password_hash, not both.")
        if self.invite and (self.password is not None or self.password_hash is not None):
            raise PydanticCustomError("invited", "Whoever is invited sets the password: send none.")
        return self


_INSTEAD = {
    "address": "An address never changes. Create an account with the new one; an alias can lead the old one there.",
    "host": "An account does not move between hosts.",
    "password": "A password is not changed here: PUT /v1/users/{user}/password.",
    "password_hash": "A password is not changed here: PUT /v1/users/{user}/password.",
}


class ChangedUserBody(BaseModel):
    """Only what is sent is changed."""

    model_config = ConfigDict(
        extra="forbid",
        hide_input_in_errors=True,
        json_schema_extra={"examples": [{"state": "suspended", "suspended_reason": "Asked for it on 2026-11-23"}]},
    )

    display_name: DisplayName | None = None
    contact_address: OutsideAddress | None = None
    external_id: ExternalId | None = None
    quota_bytes: Quota | None = None
    send_limit: SendLimit | None = None
    state: Literal["active", "suspended"] | None = Field(
        None, description="`suspended` ends every session; `active` resumes."
    )
    suspended_reason: Reason | None = None

    @model_validator(mode="before")
    @classmethod
    def say_what_to_do_instead(cls, data: Any) -> Any:
        if isinstance(data, dict):
            for name, instead in _INSTEAD.items():
                if name in data:
                    raise Unchangeable(instead, field=name)
            if data.get("state") == UserState.DELETED:
                raise Unchangeable("Send DELETE to delete an account.", field="state")
        return data

    @field_validator("display_name", "state", mode="before")
    @classmethod
    def not_null(cls, value: Any) -> Any:
        if value is None:
            raise ValueError("This cannot be null.")
        return value


async def answer_user(call: Call, key: MailAddress | int, *, created: bool = False) -> Response:
    async def read() -> UserRecord:
        return await call.read(service.get_user, key)

    record, waited = await settled(call, read)
    return _answered(call, record, created=created, waited=waited)


def _answered(call: Call, record: UserRecord, *, created: bool = False, waited: bool = False) -> Response:
    reading = call.request.method == "GET"
    return answer(
        call,
        user_body(record),
        status=200 if reading or (record.ready and not created) else 201 if record.ready else 202,
        tag=etag(record.shown["version"], record.revision),
        job=record.job,
        location=f"/v1/users/{record.id}" if created else None,
        waited=waited,
    )


async def _hashed(call: Call, body: NewUserBody) -> str | None:
    """Before the transaction: the hash is slow on purpose."""
    if body.password_hash is not None:
        return check_hash(body.password_hash.get_secret_value())
    if body.password is None:
        return None
    return await new_hash(call, body.password, body.address, body.display_name)


@router.post(
    "",
    status_code=201,
    response_model=UserBody,
    summary="Create an account",
    responses={202: {"model": UserBody, "description": "Accepted; the host is not ready yet."}, **CONFLICT},
    openapi_extra=takes(PREFER, IDEMPOTENCY_KEY),
)
async def create_user(body: NewUserBody, call: CanWriteUsers) -> Response:
    """Claims the address and has the host make the mailbox. With `PREFER: wait=10` the answer comes when it is ready."""
    new = NewUser(
        address=body.address,
        display_name=body.display_name,
        contact_address=body.contact_address,
        external_id=body.external_id,
        quota_bytes=body.quota_bytes,
        send_limit=body.send_limit,
        host=body.host,
        password_hash=await _hashed(call, body),
        reuse_address=body.reuse_address,
    )
    if body.invite:
        terms = Terms(call.service.link_key, timedelta(days=call.service.settings.invitation_days))
        made: UserRecord | int = await call.write(create_invited_user, new, terms)
    else:
        made = await call.write(service.create_user, new)
    if isinstance(made, UserRecord):
        if not seconds_to_wait(call.request):
            return _answered(call, made, created=True)
        made = made.id
    return await answer_user(call, made, created=True)


@router.get("", response_model=UserList, summary="List accounts")
async def list_users(
    call: CanReadUsers,
    domain: Annotated[DomainName | None, Query(description="Only of this domain.")] = None,
    state: Annotated[UserState | None, Query(description="Without it: all but the deleted ones.")] = None,
    ready: Annotated[bool | None, Query(description="Whether the host reflects the wanted version.")] = None,
    q: Annotated[str | None, Query(max_length=100, description="Part of the address or the display name.")] = None,
    external_id: Annotated[str | None, Query(max_length=128, description="Your own key for the person.")] = None,
    address: Annotated[
        MailAddress | None, Query(description="Exactly this one; finds deleted ones with state=deleted.")
    ] = None,
    limit: Limit = 50,
    cursor: NumberCursor = None,
) -> Response:
    """In the order in which they were made."""
    wanted = UserFilter(domain=domain, state=state, ready=ready, q=q, external_id=external_id, address=address)
    records = await call.read(service.list_users, wanted, after=int(cursor) if cursor else None, limit=limit)
    last = records[-1].id if records else None
    return page_response(call.request, [user_body(record) for record in records], last, limit)


@router.get(
    "/{user}",
    response_model=UserBody,
    summary="Read an account",
    responses={**NOT_FOUND, **NOT_MODIFIED},
    openapi_extra=takes(PREFER, IF_NONE_MATCH),
)
async def get_user(user: UserKey, call: CanReadOwnUser) -> Response:
    """As it should be, whether the host reflects it, and the proofs."""
    return await answer_user(call, user)  # type: ignore[arg-type]  # parsed by UserKey


@router.patch(
    "/{user}",
    response_model=UserBody,
    summary="Change, suspend or resume an account",
    responses={
        202: {"model": UserBody, "description": "Accepted; the host is not ready yet."},
        **NOT_FOUND,
        **CONFLICT,
        **CHANGED,
    },
    openapi_extra=takes(PREFER, IF_MATCH),
)
async def change_user(user: UserKey, body: ChangedUserBody, call: CanWriteUsers) -> Response:
    """Suspending ends every session and every login at once; mail still arrives."""
    user_id = await call.read(service.find_user_id, user)  # type: ignore[arg-type]  # parsed by UserKey
    wanted = body.model_dump(include=body.model_fields_set)
    await call.write(service.change_user, user_id, wanted, expected_version=expected_version(call.request))
    return await answer_user(call, user_id)


@router.delete(
    "/{user}",
    response_model=UserBody,
    summary="Delete an account",
    responses={202: {"model": UserBody, "description": "Accepted; the host is not ready yet."}, **NOT_FOUND, **CHANGED},
    openapi_extra=takes(PREFER, IF_MATCH),
)
async def delete_user(user: UserKey, call: CanWriteUsers) -> Response:
    """Ends every session, bounces further mail, archives the mailbox. It can be restored until `purge_at`."""
    user_id = await call.read(service.find_user_id, user)  # type: ignore[arg-type]  # parsed by UserKey
    version = expected_version(call.request)
    await call.write(service.delete_user, user_id, retention=call.service.retention, expected_version=version)
    return await answer_user(call, user_id)


@router.post(
    "/{user}/restore",
    response_model=UserBody,
    summary="Restore a deleted account",
    responses={
        202: {"model": UserBody, "description": "Accepted; the host is not ready yet."},
        **NOT_FOUND,
        **CONFLICT,
        **CHANGED,
    },
    openapi_extra=takes(PREFER, IDEMPOTENCY_KEY, IF_MATCH),
)
async def restore_user(
    user: UserKey,
    call: CanWriteUsers,
) -> Response:
    """Brings back the address, the password and the old mail, unless the address was given to someone else."""
    user_id = await call.read(service.find_user_id, user)  # type: ignore[arg-type]  # parsed by UserKey
    await call.write(service.restore_user, user_id, expected_version=expected_version(call.request))
    return await answer_user(call, user_id)


@router.post(
    "/{user}/purge",
    response_model=UserBody,
    summary="Purge a deleted account for good",
    responses={
        202: {"model": UserBody, "description": "Accepted; the host is not ready yet."},
        **NOT_FOUND,
        **CONFLICT,
        **CHANGED,
    },
    openapi_extra=takes(PREFER, IDEMPOTENCY_KEY, IF_MATCH),
)
async def purge_user(
    user: UserKey,
    call: CanPurgeUsers,
) -> Response:
    """Removes the archived mail and the personal data of a deleted account. **Cannot be undone.**"""
    user_id = await call.read(service.find_user_id, user)  # type: ignore[arg-type]  # parsed by UserKey
    await call.write(service.purge_user, user_id, expected_version=expected_version(call.request))
    return await answer_user(call, user_id)
