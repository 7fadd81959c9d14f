"""Errors as `application/problem+json` (RFC 9457), and the page behind each `type`. Only this file knows status numbers.

A problem says what happened, what to do, and never the value of a secret: validation errors carry a JSON pointer and a
message, not the input.
"""

import html
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from sqlalchemy.exc import DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from starlette.exceptions import HTTPException
from starlette.responses import Response

from app import errors
from app.db import is_busy, is_lost
from app.log import log


@dataclass(frozen=True, slots=True)
class ProblemType:
    """One entry of the catalogue at `/problems`."""

    slug: str
    status: int
    title: str
    remedy: str
    """What to do, in a sentence or three, for someone who is tired."""
    curl: str
    """A line to look at the matter, or to do it right. Variables stand for what only the caller knows."""


def _slug(error: type[Exception]) -> str:
    return re.sub(r"(?<!^)(?=[A-Z])", "-", error.__name__).lower()


def _of(error: type[Exception], status: int, title: str, remedy: str, curl: str | None = None) -> ProblemType:
    return ProblemType(_slug(error), status, title, remedy, curl or _CURL[_slug(error)])


_ME = 'curl -u "$CLIENT_ID:$CLIENT_SECRET" $URL'
_SEND = 'curl -u "$CLIENT_ID:$CLIENT_SECRET" -H "Content-Type: application/json"'

_CURL = {
    "bad-password": f"""{_SEND} $URL/v1/users -d '{{"address": "alice@cacert.org", "password": "four unrelated words"}}'""",
    "bad-field": "curl $URL/openapi.json",
    "unchangeable": f"""{_SEND} -X PATCH $URL/v1/users/$ID -d '{{"display_name": "Alice"}}'""",
    "address-reserved": f"{_ME}/v1/addresses/alice@cacert.org",
    "user-not-deleted": f"{_ME}/v1/users/$ID -X DELETE",
    "user-purged": f"""{_SEND} $URL/v1/users -d '{{"address": "alice@cacert.org", "reuse_address": true}}'""",
    "domain-exists": f"{_ME}/v1/domains",
    "domain-in-use": f"{_ME}'/v1/users?domain=example.org'",
    "primary-domain-fixed": f"""{_SEND} $URL/v1/domains -d '{{"name": "example.org", "kind": "virtual"}}'""",
    "host-exists": f"{_ME}/v1/hosts",
    "host-in-use": f"""{_SEND} -X PATCH $URL/v1/hosts/$HOST -d '{{"enabled": false}}'""",
    "job-not-dead": f"{_ME}'/v1/jobs?state=dead'",
    "version-conflict": f"{_ME}/v1/users/$ID -i",
    "key-in-use": f"""{_SEND} -H "Idempotency-Key: $KEY" $URL/v1/users -d "$BODY" """.strip(),
    "key-reused": f"""{_SEND} -H "Idempotency-Key: $(uuidgen)" $URL/v1/users -d "$BODY" """.strip(),
}

BY_ERROR: dict[type[Exception], ProblemType] = {
    errors.BadAddress: _of(
        errors.BadAddress,
        422,
        "The address is not one we can have",
        "Write it as name@domain: a-z, 0-9, dot, underscore and hyphen before the @, and a domain in plain ASCII after it.",
        f"{_ME}/v1/addresses/alice@cacert.org",
    ),
    errors.BadPassword: _of(
        errors.BadPassword,
        422,
        "The password cannot be used",
        "Take a longer one that nobody would guess: four or five unrelated words do. It needs no digits or signs.",
    ),
    errors.BadField: _of(
        errors.BadField,
        422,
        "A field cannot have this value",
        "`errors` names the field and says what it takes. Nothing was changed.",
    ),
    errors.Unchangeable: _of(
        errors.Unchangeable,
        422,
        "This never changes",
        "The detail says what to do instead. Nothing was changed.",
    ),
    errors.NotFound: _of(
        errors.NotFound,
        404,
        "There is no such thing",
        "Look at the spelling. A deleted account answers to its id only; list deleted ones with their address.",
        f"{_ME}'/v1/users?state=deleted&address=alice@cacert.org'",
    ),
    errors.AddressReserved: _of(
        errors.AddressReserved,
        409,
        "The address is reserved",
        "Names like postmaster, abuse and root belong to the mail system. Make an account with another name.",
    ),
    errors.AddressRetired: _of(
        errors.AddressRetired,
        409,
        "The address belongs to a deleted account",
        "Restore that account (its id is `user_id`), or create with `reuse_address: true`: the new owner gets an empty "
        "mailbox and nothing of the old one. The old account can then no longer be restored.",
        f"{_ME}/v1/users/$ID/restore -X POST",
    ),
    errors.UserExists: _of(
        errors.UserExists,
        409,
        "The account is there already",
        "Read it (its id is `id`) and change it instead, or take another address or external_id.",
        f"{_ME}/v1/users/$ID",
    ),
    errors.UserNotDeleted: _of(
        errors.UserNotDeleted,
        409,
        "The account is not deleted",
        "Only a deleted account can be restored or purged.",
    ),
    errors.UserDeleted: _of(
        errors.UserDeleted,
        409,
        "The account is deleted",
        "Restore it first; then it can be changed.",
        f"{_ME}/v1/users/$ID/restore -X POST",
    ),
    errors.UserPurged: _of(
        errors.UserPurged,
        409,
        "The account was purged",
        "Its mail and personal data are gone for good. Create it anew with `reuse_address: true`.",
    ),
    errors.DomainExists: _of(errors.DomainExists, 409, "The domain is there already", "Nothing is left to do."),
    errors.DomainInUse: _of(
        errors.DomainInUse,
        409,
        "The domain has accounts",
        "Rows of accounts are kept for ever, so that no uid is ever given to someone else; their domain stays with them.",
    ),
    errors.PrimaryDomainFixed: _of(
        errors.PrimaryDomainFixed,
        409,
        "There is one primary domain, and it never changes",
        "Add further domains as `virtual`.",
    ),
    errors.HostExists: _of(errors.HostExists, 409, "The host is there already", "Nothing is left to do."),
    errors.HostInUse: _of(
        errors.HostInUse,
        409,
        "The host has mailboxes",
        "Disable it instead: it keeps what it has and gets nothing new.",
    ),
    errors.HostNotChosen: _of(
        errors.HostNotChosen,
        409,
        "Which mail host?",
        "Name an enabled host in `host`. With one host only, it may be left out.",
        f"{_ME}/v1/hosts",
    ),
    errors.PlaceGone: _of(
        errors.PlaceGone,
        409,
        "The domain or the host is gone",
        "It was removed while the account was being made. Nothing was made. Look at both, then try again.",
        f"{_ME}/v1/domains",
    ),
    errors.JobNotDead: _of(
        errors.JobNotDead,
        409,
        "The job is not dead",
        "Jobs that are ready or running go on by themselves; finished ones need nothing.",
    ),
    errors.VersionConflict: _of(
        errors.VersionConflict,
        412,
        "Somebody changed it first",
        "Read it again, look at what changed, and send your change with the new ETag in If-Match.",
    ),
    errors.KeyInUse: _of(
        errors.KeyInUse,
        409,
        "The same Idempotency-Key is at work right now",
        "Send the same request again in a second: it answers with what the first one made.",
    ),
    errors.KeyReused: _of(
        errors.KeyReused,
        422,
        "The Idempotency-Key was used for another request",
        "Make a new key for a new request; keep a key only for repeating the same one, byte by byte.",
    ),
    errors.Unauthenticated: _of(
        errors.Unauthenticated,
        401,
        "Who are you?",
        "Send HTTP Basic with client id and secret, or a Bearer token from /oauth/token. A token lives ten minutes. "
        "`cacert-mail principal create` makes a client on the host.",
        f"{_ME}/v1/me",
    ),
    errors.Forbidden: _of(
        errors.Forbidden,
        403,
        "You may not do this",
        "`missing` names the permission that your client lacks; /v1/me lists what it has. Ask an administrator.",
        f"{_ME}/v1/me",
    ),
    errors.Unavailable: _of(
        errors.Unavailable,
        503,
        "Not just now",
        "The database is away or too busy. Try again after Retry-After seconds. A change may have been made all the same, "
        "if the connection broke at its very end: a repeat with the same Idempotency-Key cannot make it twice.",
        "curl $URL/readyz",
    ),
}

_OTHERS = (
    ProblemType(
        "invalid-request",
        422,
        "The request is not well formed",
        "`errors` lists each field or parameter that is wrong, with what it takes. Nothing was changed.",
        "curl $URL/openapi.json",
    ),
    ProblemType(
        "bad-request",
        400,
        "The request cannot be read",
        "The detail says what is wrong with it.",
        f"""{_SEND} $URL/v1/users -d '{{"address": "alice@cacert.org"}}'""",
    ),
    ProblemType(
        "no-such-page", 404, "There is nothing at this address", "/docs lists all operations.", "curl $URL/openapi.json"
    ),
    ProblemType(
        "method-not-allowed",
        405,
        "Not with this method",
        "The Allow header names those that work; see /docs.",
        "curl $URL/openapi.json",
    ),
    ProblemType(
        "body-too-large",
        413,
        "The request is too large",
        "No request here needs more than 64 KiB.",
        f"""{_SEND} $URL/v1/users -d '{{"address": "alice@cacert.org"}}'""",
    ),
    ProblemType(
        "wrong-media-type",
        415,
        "Not in this format",
        "Send JSON, with `Content-Type: application/json`.",
        f"""{_SEND} $URL/v1/users -d '{{"address": "alice@cacert.org"}}'""",
    ),
    ProblemType(
        "internal-error",
        500,
        "Our fault",
        "Something is broken here. Give the request id to an administrator: it is in the log, with the reason.",
        "curl $URL/readyz",
    ),
)

CATALOGUE: dict[str, ProblemType] = {problem.slug: problem for problem in (*BY_ERROR.values(), *_OTHERS)}
_BY_STATUS = {
    400: "bad-request",
    404: "no-such-page",
    405: "method-not-allowed",
    413: "body-too-large",
    415: "wrong-media-type",
}


class WrongMediaType(HTTPException):
    """A body that is no JSON, where JSON is wanted."""

    def __init__(self) -> None:
        super().__init__(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "The body must be JSON, and be called so.")


CHALLENGE = {"WWW-Authenticate": 'Bearer realm="cacert-mail"'}
"""Only Bearer: a browser that is challenged with Basic asks for a password, and remembers it."""


def problem_for(error: errors.CacertMailError) -> ProblemType:
    for kind in type(error).__mro__:
        if kind in BY_ERROR:
            return BY_ERROR[kind]
    return CATALOGUE["internal-error"]


def problem_response(
    request: Request,
    problem: ProblemType,
    detail: str,
    *,
    members: Mapping[str, Any] | None = None,
    headers: Mapping[str, str] | None = None,
) -> Response:
    body = {
        "type": f"/problems/{problem.slug}",
        "title": problem.title,
        "status": problem.status,
        "detail": detail,
        "remedy": problem.remedy,
        "request_id": request.scope.get("request_id"),
        **(members or {}),
    }
    return Response(json.dumps(body), problem.status, dict(headers or {}), "application/problem+json")


def error_response(request: Request, error: errors.CacertMailError) -> Response:
    problem = problem_for(error)
    members = dict(error.members)
    field = error.field if isinstance(error, errors.Refused) else members.pop("field", None)
    if field is not None:
        members["errors"] = [{"pointer": f"/{field}", "detail": error.detail}]
    headers: dict[str, str] = {}
    if problem.status == 401:
        headers = dict(CHALLENGE)
    elif problem.status == 503 or isinstance(error, errors.KeyInUse):
        headers = {"Retry-After": "1"}
    return problem_response(request, problem, error.detail, members=members, headers=headers)


def pointer(location: Sequence[int | str]) -> dict[str, str]:
    """Where the fault is: a JSON pointer into the body (RFC 6901), or the name of a parameter or header."""
    place, *path = location or ("body",)
    if place == "body":
        escaped = (str(part).replace("~", "~0").replace("/", "~1") for part in path)
        return {"pointer": "/" + "/".join(escaped) if path else ""}
    return {"parameter" if place in ("query", "path") else str(place): ".".join(map(str, path))}


def install(app: FastAPI) -> None:
    """Every error of every route ends in one of these four."""

    @app.exception_handler(errors.CacertMailError)
    async def ours(request: Request, error: errors.CacertMailError) -> Response:
        return error_response(request, error)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        faults = error.errors()
        if request.scope["path"] == "/oauth/token":  # RFC 6749, section 5.2
            said = {"error": "invalid_request", "error_description": "The form is not well formed; see /docs."}
            return Response(json.dumps(said), 400, {"Cache-Control": "no-store"}, "application/json")
        if len(faults) == 1 and faults[0]["type"] == "json_invalid":
            return problem_response(request, CATALOGUE["bad-request"], "The body is not valid JSON.")
        found = [{**pointer(fault["loc"]), "detail": fault["msg"].removeprefix("Value error, ")} for fault in faults]
        detail = " ".join(sorted({str(fault["detail"]) for fault in found}))[:500]
        return problem_response(request, CATALOGUE["invalid-request"], detail, members={"errors": found[:20]})

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> Response:
        problem = CATALOGUE[
            _BY_STATUS.get(error.status_code, "bad-request" if error.status_code < 500 else "internal-error")
        ]
        return problem_response(request, problem, str(error.detail), headers=error.headers)

    @app.exception_handler(DBAPIError)
    @app.exception_handler(PoolTimeout)
    @app.exception_handler(OSError)
    async def database(request: Request, error: Exception) -> Response:
        a_file = isinstance(error, OSError) and error.filename is not None  # of ours is missing: no lost connection
        busy = isinstance(error, PoolTimeout) or (isinstance(error, DBAPIError) and is_busy(error))
        if busy or (is_lost(error) and not a_file):
            log.warning("database_unavailable", kind=type(error).__name__)
            unavailable = errors.Unavailable("The database does not answer, or is too busy.")
            return error_response(request, unavailable)
        return internal_error(request, error)


def internal_error(request: Request, error: Exception) -> Response:
    """Tells the caller nothing but the request id; the log has the rest."""
    log.error("internal_error", exc_info=error)
    status = HTTPStatus.INTERNAL_SERVER_ERROR
    return problem_response(request, CATALOGUE["internal-error"], f"{status.phrase}.")


def too_large(request: Request) -> Response:
    return problem_response(request, CATALOGUE["body-too-large"], HTTPStatus.REQUEST_ENTITY_TOO_LARGE.phrase + ".")


def problem_page(problem: ProblemType) -> str:
    curl = f"<h2>Try</h2><pre>{html.escape(problem.curl)}</pre>"
    title, remedy = html.escape(problem.title), html.escape(problem.remedy)
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>{title}</title><h1>{title}</h1><p>Status {problem.status}, "
        f"<code>/problems/{problem.slug}</code></p><h2>What to do</h2><p>{remedy}</p>{curl}"
        f'<p><a href="/problems">All problems</a> · <a href="/docs">All operations</a></p></html>'
    )
