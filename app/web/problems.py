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
from starlette.routing import Match

from app import errors
from app.db import is_busy, is_lost, reason_of
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
        "Look at the spelling. A deleted account no longer answers to its address: list deleted ones with it.",
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
    errors.AliasExists: _of(
        errors.AliasExists,
        409,
        "The address is an alias",
        "Read it (its id is `id`) and change where it leads, or delete it first: its address is free then.",
        f"{_ME}/v1/aliases/$ID",
    ),
    errors.AliasDeleted: _of(
        errors.AliasDeleted,
        409,
        "The alias is deleted",
        "Nothing of it is left to change. Create it anew.",
        f"{_ME}'/v1/aliases?deleted=true'",
    ),
    errors.AliasLoops: _of(
        errors.AliasLoops,
        409,
        "Mail would go in a circle",
        "`chain` shows the way from the alias back to itself. Take one step out of it. Nothing was changed.",
        f"{_ME}/v1/addresses/pr@cacert.org",
    ),
    errors.AliasTooDeep: _of(
        errors.AliasTooDeep,
        409,
        "Mail would pass through too many aliases",
        "`chain` shows them. Lead one of the first straight to where the mail should end. Nothing was changed.",
        f"{_ME}/v1/addresses/pr@cacert.org",
    ),
    errors.NoDestination: _of(
        errors.NoDestination,
        422,
        "It leads to nobody",
        "`errors` names the address that nobody has. Create that account or alias first. Nothing was changed.",
        f"{_ME}/v1/addresses/alice@cacert.org",
    ),
    errors.OutsideRefused: _of(
        errors.OutsideRefused,
        422,
        "Addresses elsewhere need SRS",
        "A mail that is passed on keeps its sender, whose domain does not allow our host to send for it (SPF): it would be "
        "refused there. With `srs` on, our hosts rewrite the sender.",
        f"""{_SEND} -X PATCH $URL/v1/hosts/$HOST -d '{{"settings": {{"srs": true}}}}'""",
    ),
    errors.LastPrimary: _of(
        errors.LastPrimary,
        409,
        "The last one who may do everything",
        "Make another primary first, without an end and with a key of its own: nobody else could repair what this would break.",
        f"""{_SEND} $URL/v1/principals -d '{{"role": "primary", "name": "Second administrator"}}'""",
    ),
    errors.TooManyKeys: _of(
        errors.TooManyKeys,
        409,
        "Too many keys",
        "Two secrets live side by side while a client is moved, and no third. End one of `keys`, the one that nobody uses.",
        f"{_ME}/v1/principals/$PRINCIPAL/keys/$KEY/revoke -X POST",
    ),
    errors.CertificateKnown: _of(
        errors.CertificateKnown,
        409,
        "The certificate is registered already",
        "A certificate belongs to one principal, and once ended it stays ended. Make a new one.",
        f"{_ME}/v1/principals",
    ),
    errors.SrsNeeded: _of(
        errors.SrsNeeded,
        409,
        "Aliases lead to other mail servers",
        "Without SRS on every enabled host, what they pass on would be refused there (SPF). Lead the aliases in `aliases` "
        "elsewhere, or delete them; or leave SRS on. A host is added with `enabled: false`, and gets `srs: true` and "
        "`enabled: true` in one PATCH. Nothing was changed.",
        f"""{_SEND} -X PATCH $URL/v1/hosts/$HOST -d '{{"enabled": true, "settings": {{"srs": true}}}}'""",
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
    errors.UserNotActive: _of(
        errors.UserNotActive,
        409,
        "The account is not active",
        "Resume it, or unlock it, first.",
        f"{_ME}/v1/users/$ID",
    ),
    errors.UserLocked: _of(
        errors.UserLocked,
        409,
        "The account is locked",
        "Somebody locked it because it seemed stolen. When its owner has it back, unlock it: it is then what it was before.",
        f"{_ME}/v1/users/$ID/unlock -X POST",
    ),
    errors.NoContactAddress: _of(
        errors.NoContactAddress,
        409,
        "There is nowhere to send the link",
        "Give the account a contact address first, or have the link shown (`deliver: show`) and hand it over yourself.",
        f"""{_SEND} $URL/v1/password-resets -d '{{"user": "$ID", "reason": "...", "deliver": "show"}}'""",
    ),
    errors.PasswordUnreadable: _of(
        errors.PasswordUnreadable,
        409,
        "The password cannot be checked here",
        "It was taken over in a form that only Dovecot reads. Ask for a reset instead: its link sets a new one without it.",
        f"""{_SEND} $URL/v1/password-resets -d '{{"user": "$ID"}}'""",
    ),
    errors.LinkNotValid: _of(
        errors.LinkNotValid,
        410,
        "The link is no longer good",
        "It was used, it is too old, a newer change cancelled it, or it was cut off on the way. Ask for a new one.",
        f"""{_SEND} $URL/v1/password-resets -d '{{"user": "alice@cacert.org"}}'""",
    ),
    errors.WrongPassword: _of(
        errors.WrongPassword,
        403,
        "Wrong password",
        "The current password is wrong, or there is no such active account. Wrong ones are counted, as logins are. Whoever "
        "forgot it asks for a reset.",
        f"""{_SEND} -X PUT $URL/v1/users/$ID/password -d '{{"current_password": "...", "password": "four unrelated words"}}'""",
    ),
    errors.TooManyAppPasswords: _of(
        errors.TooManyAppPasswords,
        409,
        "The account has too many app passwords",
        "Revoke one that is no longer used: `last_used_at` tells. The number is a setting, APP_PASSWORDS_MAX.",
        f"{_ME}/v1/users/$ID/app-passwords",
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
    errors.DomainIsRelay: _of(
        errors.DomainIsRelay,
        409,
        "Another host answers for this domain",
        "Mail of a relay domain is only passed on: it is signed, and its DNS kept, where its mailboxes are.",
        f"{_ME}/v1/domains",
    ),
    errors.DkimKeyExists: _of(
        errors.DkimKeyExists,
        409,
        "The selector is, or was, in use",
        "Choose another selector, or leave it out: one is made. A selector is never used twice.",
        f"{_ME}/v1/domains/example.org/dkim-keys",
    ),
    errors.DkimKeySigns: _of(
        errors.DkimKeySigns,
        409,
        "This key signs",
        "Rotate first (POST /v1/domains/DOMAIN/dkim-keys/rotate): the new key takes over, and this one retires by itself.",
        f"{_ME}/v1/domains/example.org/dkim-keys/rotate -X POST",
    ),
    errors.DkimStepNotNow: _of(
        errors.DkimStepNotNow,
        409,
        "Not in the key's present state",
        "Read the key: `next_step` says what comes next, `problem` what stands in the way.",
        f"{_ME}/v1/domains/example.org/dkim-keys",
    ),
    errors.RotationUnderWay: _of(
        errors.RotationUnderWay,
        409,
        "A rotation is under way",
        "Wait for it. The keys named in `selectors` show in `next_step` how far it is.",
        f"{_ME}/v1/domains/example.org/dkim-keys",
    ),
    errors.SenderExists: _of(
        errors.SenderExists,
        409,
        "This sender is in the list already",
        "Nothing is left to do.",
        f"{_ME}/v1/domains/example.org/senders",
    ),
    errors.TooManyLookups: _of(
        errors.TooManyLookups,
        409,
        "SPF allows ten lookups",
        "Receivers give up after ten DNS lookups (RFC 7208, section 4.6.4) and take all mail of the domain for forged. Name "
        "networks (`ip4`, `ip6`) instead of `a`, `mx` and `include`, or remove a sender.",
        f"{_ME}/v1/domains/example.org/senders",
    ),
    errors.NoPublisher: _of(
        errors.NoPublisher,
        409,
        "Nobody publishes this domain's records",
        "Set `publisher` in the domain's settings to one of DNS_FILE, or enter the records by hand: "
        "GET /v1/domains/DOMAIN/dns?format=zone.",
        f"{_ME}/v1/domains/example.org/dns",
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
    errors.Outranked: _of(
        errors.Outranked,
        403,
        "Somebody of a higher role",
        "Only a principal of the same role or a higher one may do this. Ask one of them: GET /v1/principals lists them.",
        f"{_ME}/v1/principals",
    ),
    errors.OwnRights: _of(
        errors.OwnRights,
        403,
        "Nobody raises their own rights",
        "Somebody else who may write principals does it for you; GET /v1/principals lists them.",
        f"{_ME}/v1/principals",
    ),
    errors.ForgedCertificate: _of(
        errors.ForgedCertificate,
        403,
        "A client certificate from the wrong place",
        "Leave the header out. Only the proxies in CERTIFICATE_PROXIES say whose certificate they saw; this was recorded.",
        f"{_ME}/v1/me",
    ),
    errors.TooManyTries: _of(
        errors.TooManyTries,
        429,
        "Too many tries",
        "Wrong passwords, wrong secrets or reset requests came too often: for this name, or from your network. Wait for "
        "`retry_after` seconds. An administrator can see why (GET /v1/lockouts) and lift it (DELETE /v1/lockouts/ID).",
        f"{_ME}/v1/lockouts",
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
    request.scope["problem"] = problem.slug
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
    elif isinstance(error, errors.TooManyTries):
        headers = {"Retry-After": str(error.members["retry_after"])}
    return problem_response(request, problem, error.detail, members=members, headers=headers)


def pointer(location: Sequence[int | str]) -> dict[str, str]:
    """Where the fault is: a JSON pointer into the body (RFC 6901), or the name of a parameter or header."""
    place, *path = location or ("body",)
    if place == "body":
        escaped = (str(part).replace("~", "~0").replace("/", "~1") for part in path)
        return {"pointer": "/" + "/".join(escaped) if path else ""}
    return {"parameter" if place in ("query", "path") else str(place): ".".join(map(str, path))}


_PLAINER = {
    "missing": "This is required.",
    "extra_forbidden": "There is no such field.",
    "string_type": "This takes a string, in double quotes.",
    "bool_type": "This is true or false.",
    "bool_parsing": "This is true or false.",
    "model_attributes_type": "This takes a JSON object, in braces.",
}
"""For pydantic's messages that only a programmer understands."""

PATTERNS = {
    r"^[a-z0-9]([a-z0-9.-]{0,62}[a-z0-9])?$": "The name of a host takes 1 to 64 of a-z, 0-9, dot and hyphen; it starts and "
    "ends with a letter or digit.",
    r"^[a-z0-9-]{1,40}$": "A client id takes 1 to 40 of a-z, 0-9 and hyphen. GET /v1/principals lists them.",
    r"^[A-Za-z0-9_-]{4,512}$": "This takes the `id` of a lockout. GET /v1/lockouts lists them.",
    r"^[\x20-\x7e]+$": "This takes plain ASCII.",
}
"""What takes which pattern, in words."""


def words(request: Request, fault: Mapping[str, Any]) -> str:
    """What is wrong, for people, and never the value that was sent."""
    kind, context = fault["type"], fault.get("ctx", {})
    if kind == "extra_forbidden" and len(fault["loc"]) == 2:  # a member of the body itself
        fields = request.scope["route"].body_field.field_info.annotation.model_fields
        return f"There is no such field. This takes: {', '.join(fields)}."
    if kind == "string_pattern_mismatch" and context["pattern"] in PATTERNS:
        return PATTERNS[context["pattern"]]
    if kind == "too_long" and context["field_type"] == "Value":  # of a secret: pydantic says how long it is
        return f"This takes at most {context['max_length']} characters."
    if kind in _PLAINER:
        return _PLAINER[kind]
    return f"{fault['msg'].removeprefix('Value error, ').removesuffix('.')}."


def _exists_without_slash(request: Request) -> bool:
    path = request.scope["path"]
    scope = {**request.scope, "path": path[:-1]}
    return path.endswith("/") and any(route.matches(scope)[0] != Match.NONE for route in request.app.routes)


def install(app: FastAPI) -> None:
    """Every error of every route ends in one of these four."""

    @app.exception_handler(errors.CacertMailError)
    async def ours(request: Request, error: errors.CacertMailError) -> Response:
        return error_response(request, error)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        if request.scope["path"] == "/oauth/token":  # RFC 6749, section 5.2
            refused = {"error": "invalid_request", "error_description": "The form is not well formed; see /docs."}
            return Response(json.dumps(refused), 400, {"Cache-Control": "no-store"}, "application/json")
        if isinstance(reason := error.__cause__, json.JSONDecodeError):
            where = f"at line {reason.lineno}, column {reason.colno}"
            detail = f"The body is not valid JSON: {reason.msg.removesuffix(' at')} {where}."
            return problem_response(request, CATALOGUE["bad-request"], detail)
        faults = [(fault["loc"], words(request, fault)) for fault in error.errors()]
        found = [{**pointer(place), "detail": text} for place, text in faults[:20]]
        detail = " ".join(f"{'.'.join(map(str, place[1:])) or 'body'}: {text}" for place, text in faults)[:500]
        return problem_response(request, CATALOGUE["invalid-request"], detail, members={"errors": found})

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> Response:
        problem = CATALOGUE[
            _BY_STATUS.get(error.status_code, "bad-request" if error.status_code < 500 else "internal-error")
        ]
        detail = str(error.detail)
        if error.status_code == 404 and _exists_without_slash(request):
            detail = "Leave out the slash at the end."
        return problem_response(request, problem, detail, headers=error.headers)

    @app.exception_handler(DBAPIError)
    @app.exception_handler(PoolTimeout)
    @app.exception_handler(OSError)
    async def database(request: Request, error: Exception) -> Response:
        a_file = isinstance(error, OSError) and error.filename is not None  # of ours is missing: no lost connection
        busy = isinstance(error, PoolTimeout) or (isinstance(error, DBAPIError) and is_busy(error))
        if busy or (is_lost(error) and not a_file):
            log.warning("database_unavailable", kind=type(error).__name__, error=reason_of(error))
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
