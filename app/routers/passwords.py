"""/v1/users/{user}/password: a new one, with the current one or by those who need not know it."""

from typing import Any

import orjson
from fastapi import APIRouter
from pydantic import BaseModel, ConfigDict, Field, SecretStr
from starlette.responses import Response

from app.addresses import MailAddress
from app.credentials.passwords import check_password, hash_password, password_matches
from app.errors import BadField, NotFound, WrongPassword
from app.models.login_failures import FailureKind
from app.permissions import Permission
from app.routers.shapes import CONFLICT, NOT_FOUND, PREFER, CanChangePasswords, ProofBody, UserKey, takes
from app.services import passwords as service
from app.services.app_passwords import list_app_passwords
from app.services.passwords import Account
from app.services.users import UserRecord, get_user
from app.web.answers import JobBody, answer, job_body, settled
from app.web.dependencies import Call, Route

router = APIRouter(prefix="/v1/users/{user}/password", tags=["Passwords"], route_class=Route)


class RemainingBody(BaseModel):
    id: int
    name: str


class PasswordSetBody(BaseModel):
    """Whose password is a new one, and whether everything that the old one had opened is closed."""

    id: int
    address: str
    version: int
    ready: bool = Field(description="The host has forgotten every login that it remembered, and no session is left.")
    proofs: dict[str, ProofBody] = Field(description="`sessions` is the one that tells.")
    job: JobBody | None
    app_passwords: list[RemainingBody] = Field(description="Those that still open the account.")


class NewPasswordBody(BaseModel):
    model_config = ConfigDict(
        extra="forbid",
        hide_input_in_errors=True,
        json_schema_extra={
            "examples": [{"current_password": "the one until now", "password": "seven green lanterns over the harbour"}]
        },
    )

    password: SecretStr = Field(max_length=256, description="At least 15 characters; a few words will do.")
    current_password: SecretStr | None = Field(
        None, max_length=1024, description="Callers with `passwords:set` may leave it out."
    )


async def new_hash(call: Call, password: SecretStr, address: str, display_name: str) -> str:
    """Before the transaction: the hash is slow on purpose. Raises BadPassword, which names the rule."""
    text = password.get_secret_value()
    minimum = call.service.settings.password_min_length
    check_password(text, address=address, display_name=display_name, minimum=minimum)
    return await hash_password(text)


async def answer_password_set(call: Call, user_id: int) -> Response:
    """Less than the whole account: whoever may set a password may not read everything."""

    async def read() -> UserRecord:
        return await call.read(get_user, user_id)

    record, waited = await settled(call, read)
    remaining = await call.read(list_app_passwords, user_id)
    body: dict[str, Any] = {
        **{name: record.shown[name] for name in ("id", "address", "version")},
        "ready": record.ready,
        "proofs": orjson.Fragment(record.proofs),
        "job": None if record.job is None else job_body(record.job),
        "app_passwords": [{"id": row.id, "name": row.name} for row in remaining],
    }
    response = answer(call, body, status=200 if record.ready else 202, job=record.job, waited=waited)
    response.headers["Cache-Control"] = "no-store"
    return response


@router.put(
    "",
    response_model=PasswordSetBody,
    summary="Set a new password",
    responses={
        202: {"model": PasswordSetBody, "description": "Accepted; sessions are ending."},
        **NOT_FOUND,
        **CONFLICT,
    },
    openapi_extra=takes(PREFER),
)
async def change_password(user: UserKey, body: NewPasswordBody, call: CanChangePasswords) -> Response:
    """Ends **every access that the old one had**: sessions, remembered logins, links, owner tokens. App passwords stay.

    A wrong `current_password` counts as a failed login. Whether there is such an account is not told then.
    """
    key: MailAddress | int = user  # type: ignore[assignment]  # parsed by UserKey
    if body.current_password is not None:
        account = await _prove(call, key, body.current_password.get_secret_value())
        known = account.password_hash
    elif call.may(Permission.PASSWORDS_SET):
        account, known = await call.read(service.read_account, key), None
    else:
        raise BadField("Send the current password; only callers with passwords:set need not.", field="current_password")
    hashed = await new_hash(call, body.password, account.address, account.display_name)
    await call.write(service.set_password, account.id, hashed, known_hash=known)
    return await answer_password_set(call, account.id)


def unknown_login(key: MailAddress | int) -> str:
    """By what tries are counted where there is no account: an id is no local part."""
    return f"id {key}" if isinstance(key, int) else str(key)


async def _prove(call: Call, key: MailAddress | int, password: str) -> Account:
    """The account that has this password. Raises WrongPassword, after the same work where there is none."""
    client = call.request.client.host if call.request.client else ""
    account: Account | None
    try:
        account = await call.read(service.read_account, key)
    except NotFound:
        account = None
    login = unknown_login(key) if account is None else account.address
    async with call.service.throttle.guessing(FailureKind.MAIL, login, client, password):
        matches = await password_matches(password, None if account is None else account.password_hash)
        if account is None or not matches:
            raise WrongPassword("The current password is wrong.")
    return account
