"""/v1/password-resets: links that set a password without the old one."""

from datetime import datetime, timedelta
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Path, Request
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, SecretStr, StringConstraints
from starlette.responses import Response

from app.addresses import MailAddress
from app.credentials.links import link_token, token_hash
from app.errors import Forbidden, LinkNotValid
from app.models.login_failures import FailureKind
from app.models.password_resets import Delivery, ResetKind
from app.permissions import Permission, Principal, Role
from app.routers.passwords import PasswordSetBody, answer_password_set, new_hash, unknown_login
from app.routers.shapes import (
    CONFLICT,
    IDEMPOTENCY_KEY,
    NOT_FOUND,
    PREFER,
    CanRequestResets,
    CanWriteResets,
    parse_key,
    plain_text,
    problem,
    takes,
)
from app.services import password_resets as service
from app.services.password_resets import ResetRecord, Terms, masked
from app.services.passwords import NOT_VALID, confirm_reset
from app.web.answers import answer
from app.web.dependencies import PUBLIC, Call, Route, Service

router = APIRouter(prefix="/v1/password-resets", tags=["Passwords"], route_class=Route)

Whose = Annotated[
    str,
    BeforeValidator(lambda value: str(value) if type(value) is int else value),
    StringConstraints(max_length=254),
    AfterValidator(parse_key),
    Field(description="Address or id of the account."),
]
ResetId = Annotated[int, Path(ge=1, le=2**62, description="The `id` that asking for it showed.")]


class NewResetBody(BaseModel):
    model_config = ConfigDict(
        extra="forbid",
        json_schema_extra={"examples": [{"user": "alice@cacert.org", "reason": "Called, and knew her assurer"}]},
    )

    user: Whose
    reason: Annotated[str, Field(min_length=1, max_length=200), AfterValidator(plain_text)] | None = Field(
        None, description="Needed from callers with `password-resets:write`; the audit trail keeps it."
    )
    deliver: Delivery = Field(
        Delivery.MAIL,
        description="`mail`: to the contact address. `show`: in this answer, once, to hand over; the owner is told by mail.",
    )


class AcceptedBody(BaseModel):
    """The same whether or not there is such an account."""

    accepted: Literal[True] = True
    minutes: int = Field(description="How long the link is good, if there is one.", examples=[30])


class ResetUserBody(BaseModel):
    id: int
    address: str


class MailBody(BaseModel):
    state: Literal["waiting", "sent", "bounced"]
    sent_at: datetime | None
    bounced_at: datetime | None
    detail: str | None = Field(description="What the other server said, for callers with `users:read`.")


class ResetBody(BaseModel):
    id: str = Field(description="A number too long for some JSON readers.", examples=["3141592653589793238"])
    kind: ResetKind
    state: Literal["pending", "used", "cancelled", "expired"]
    user: ResetUserBody | None = Field(
        description="Null: asked for by a client that must not learn that there is none."
    )
    contact_address: str | None = Field(description="Where the mail went, masked.", examples=["a•••@e•••.net"])
    deliver: Delivery
    reason: str | None
    requested_by: str
    mail: MailBody | None
    created_at: datetime
    expires_at: datetime
    used_at: datetime | None
    cancelled_at: datetime | None
    link: str | None = Field(description="With `deliver: show`, in the first answer alone.")


def _body(record: ResetRecord, call: Call, link: str | None = None) -> dict[str, Any]:
    row = record.row
    mail = None
    if row.recipient is not None:
        mail = {
            "state": "bounced" if row.bounced_at else "sent" if row.sent_at else "waiting",
            "sent_at": row.sent_at,
            "bounced_at": row.bounced_at,
            "detail": row.bounce if call.may(Permission.USERS_READ) else None,
        }
    return {
        "id": str(row.id),
        "kind": row.kind,
        "state": record.state,
        "user": None if row.user_id is None else {"id": row.user_id, "address": row.address},
        "contact_address": masked(row.recipient),
        "deliver": row.deliver,
        "reason": row.reason,
        "requested_by": row.principal_id,
        "mail": mail,
        "created_at": row.created_at,
        "expires_at": row.expires_at,
        "used_at": row.used_at,
        "cancelled_at": row.cancelled_at,
        "link": link,
    }


def _no_store(response: Response) -> Response:
    response.headers["Cache-Control"] = "no-store"
    return response


@router.post(
    "",
    status_code=202,
    response_model=ResetBody | AcceptedBody,
    summary="Have a link sent that sets a new password",
    responses={**NOT_FOUND, **CONFLICT, 429: problem("Too many for this account.")},
    openapi_extra=takes(IDEMPOTENCY_KEY),
)
async def create_password_reset(body: NewResetBody, call: CanRequestResets) -> Response:
    """The link goes to the account's contact address, works once and for half an hour. Nothing else changes until it is used.

    Callers with `password-resets:write` see whose link it is and what becomes of it, and what stands in the way. All others get
    the same answer whatever there is.
    """
    settings = call.service.settings
    key: MailAddress | int = body.user  # type: ignore[assignment]  # parsed by Whose
    terms = Terms(call.service.link_key, timedelta(minutes=settings.reset_minutes))
    if not call.may(Permission.RESETS_WRITE):
        if body.deliver is Delivery.SHOW:
            missing = Permission.RESETS_WRITE
            raise Forbidden(f"To be shown a link needs the permission {missing}.", missing=missing.value)
        # By the account alone: the caller is a service, and its own network says nothing about who asked it.
        await call.service.throttle.count_request(await _login(call, key))
        await call.write(service.request_reset_unseen, key, terms, reason=body.reason)
        return _no_store(answer(call, {"accepted": True, "minutes": settings.reset_minutes}, status=202))
    # A count of its own: what strangers ask of a website does not keep an administrator from helping.
    await call.service.throttle.count_request(f"{call.principal.id} {await _login(call, key)}")
    reset_id = await call.write(service.request_reset, key, terms, reason=body.reason, deliver=body.deliver)
    record = await call.read(service.get_reset, reset_id, call.service.clock())
    link = None
    if body.deliver is Delivery.SHOW and not call.replayed:
        link = settings.link(link_token(terms.key, reset_id))
    location = f"/v1/password-resets/{reset_id}"
    return _no_store(answer(call, _body(record, call, link), status=202, location=location))


async def _login(call: Call, key: MailAddress | int) -> str:
    """The account's address, however it was named, for the same work where there is none."""
    return await call.read(service.find_address, key) or unknown_login(key)


@router.get("/{reset}", response_model=ResetBody, summary="Look what became of a link", responses=NOT_FOUND)
async def get_password_reset(reset: ResetId, call: CanWriteResets) -> Response:
    """Whether it was used, and whether its mail was sent or came back. Never the link itself."""
    return _no_store(answer(call, _body(await call.read(service.get_reset, reset, call.service.clock()), call)))


class ConfirmBody(BaseModel):
    model_config = ConfigDict(
        extra="forbid",
        hide_input_in_errors=True,
        json_schema_extra={
            "examples": [
                {
                    "token": "what stands after # in the link",
                    "password": "seven green lanterns over the harbour",
                    "revoke": ["app_passwords"],
                }
            ]
        },
    )

    token: SecretStr = Field(max_length=128)
    password: SecretStr = Field(max_length=256, description="At least 15 characters; a few words will do.")
    revoke: list[Literal["app_passwords"]] = Field([], max_length=1, description="What else shall end.")


@router.post(
    "/confirm",
    response_model=PasswordSetBody,
    summary="Set a password by a link",
    dependencies=[PUBLIC],
    responses={
        202: {"model": PasswordSetBody, "description": "Accepted; sessions are ending."},
        410: problem("The link is used, expired, cancelled or none of ours."),
        429: problem("Too many links that are none, from this network."),
    },
    openapi_extra=takes(PREFER),
)
async def confirm_password_reset(body: ConfirmBody, request: Request) -> Response:
    """Uses the link up and ends **every access that the old password had**. A password that is refused leaves the link good.

    Needs no credentials but the link's token.
    """
    ours: Service = request.app.state.service
    client = request.client.host if request.client else ""
    hashed = token_hash(body.token.get_secret_value())
    async with ours.throttle.guessing(FailureKind.RESET, "", client, hashed):
        link = await ours.database.reading(service.find_link, hashed, ours.clock())
        if link is None:
            raise LinkNotValid(NOT_VALID)
    owner = Principal(f"owner-{link.user_id}", link.address, Role.OWNER, frozenset(), None, link.user_id)
    call = Call(request, owner, ours)
    password_hash = await new_hash(call, body.password, link.address, link.display_name)
    network = ours.throttle.network_of(client)
    revoke = "app_passwords" in body.revoke
    await call.write(confirm_reset, link.user_id, hashed, password_hash, revoke=revoke, network=network)
    return await answer_password_set(call, link.user_id)
