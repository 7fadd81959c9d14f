"""What several routers say about themselves in the OpenAPI document."""

import re
from typing import Annotated, Any, Literal

from fastapi import Depends, Path
from pydantic import AfterValidator, BaseModel, Field, StringConstraints

from app.addresses import MailAddress
from app.permissions import Permission
from app.web.dependencies import Call, Needs


def problem(description: str) -> dict[str, Any]:
    return {
        "description": description,
        "content": {"application/problem+json": {"schema": {"$ref": "#/components/schemas/Problem"}}},
    }


NOT_FOUND: dict[int | str, dict[str, Any]] = {404: problem("There is no such thing.")}
CONFLICT: dict[int | str, dict[str, Any]] = {409: problem("Right in itself, but not in the present state.")}
CHANGED: dict[int | str, dict[str, Any]] = {412: problem("If-Match: somebody changed it first.")}
NOT_MODIFIED: dict[int | str, dict[str, Any]] = {304: {"description": "If-None-Match: nothing changed."}}

HostName = Annotated[str, Field(pattern=r"^[a-z0-9]([a-z0-9.-]{0,62}[a-z0-9])?$")]
"""ASCII, as its column is: MariaDB answers anything else with an error, not with no row."""

AnyCall = Annotated[Call, Depends(Needs(None, owners=True))]
CanReadUsers = Annotated[Call, Depends(Needs(Permission.USERS_READ))]
CanReadOwnUser = Annotated[Call, Depends(Needs(Permission.USERS_READ, owners=True))]
CanWriteUsers = Annotated[Call, Depends(Needs(Permission.USERS_WRITE))]
CanPurgeUsers = Annotated[Call, Depends(Needs(Permission.USERS_PURGE))]
CanReadAppPasswords = Annotated[Call, Depends(Needs(Permission.APP_PASSWORDS_READ, owners=True))]
CanWriteAppPasswords = Annotated[Call, Depends(Needs(Permission.APP_PASSWORDS_WRITE, owners=True))]
CanSummarizeUsers = Annotated[Call, Depends(Needs(Permission.USERS_SUMMARY))]
CanLockUsers = Annotated[Call, Depends(Needs(Permission.USERS_LOCK))]
CanChangePasswords = Annotated[Call, Depends(Needs(Permission.PASSWORDS_CHANGE, owners=True))]
CanRequestResets = Annotated[Call, Depends(Needs(Permission.RESETS_REQUEST))]
CanWriteResets = Annotated[Call, Depends(Needs(Permission.RESETS_WRITE))]
CanReadDomains = Annotated[Call, Depends(Needs(Permission.DOMAINS_READ))]
CanWriteDomains = Annotated[Call, Depends(Needs(Permission.DOMAINS_WRITE))]
CanReadDkimKeys = Annotated[Call, Depends(Needs(Permission.DKIM_KEYS_READ))]
CanWriteDkimKeys = Annotated[Call, Depends(Needs(Permission.DKIM_KEYS_WRITE))]
CanReadHosts = Annotated[Call, Depends(Needs(Permission.HOSTS_READ))]
CanWriteHosts = Annotated[Call, Depends(Needs(Permission.HOSTS_WRITE))]
CanReadAliases = Annotated[Call, Depends(Needs(Permission.ALIASES_READ))]
CanWriteAliases = Annotated[Call, Depends(Needs(Permission.ALIASES_WRITE))]
CanReadAddresses = Annotated[Call, Depends(Needs(Permission.ADDRESSES_READ))]
CanReadOwnAliases = Annotated[Call, Depends(Needs(Permission.ALIASES_READ, owners=True))]
CanReadPrincipals = Annotated[Call, Depends(Needs(Permission.PRINCIPALS_READ))]
CanWritePrincipals = Annotated[Call, Depends(Needs(Permission.PRINCIPALS_WRITE))]
CanMakeOwnerTokens = Annotated[Call, Depends(Needs(Permission.OWNER_TOKENS_WRITE))]
CanReadJobs = Annotated[Call, Depends(Needs(Permission.JOBS_READ))]
CanReadLockouts = Annotated[Call, Depends(Needs(Permission.LOCKOUTS_READ))]
CanWriteLockouts = Annotated[Call, Depends(Needs(Permission.LOCKOUTS_WRITE))]
CanReadAudit = Annotated[Call, Depends(Needs(Permission.AUDIT_READ, owners=True))]
CanReadIdentities = Annotated[Call, Depends(Needs(Permission.IDENTITIES_READ))]
CanRetryJobs = Annotated[Call, Depends(Needs(Permission.JOBS_RETRY))]


_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def plain_text(text: str | None) -> str | None:
    """Raises ValueError for what would change the look of a log or a page."""
    if text is not None and _CONTROL.search(text):
        raise ValueError("No control characters, line breaks or text direction marks here.")
    return text


class ProofBody(BaseModel):
    """What the real program answered."""

    result: Literal["ok", "failed", "not configured"]
    detail: str | None = None


def _header(name: str, description: str, **more: Any) -> dict[str, Any]:
    return {"name": name, "in": "header", "description": description, "schema": {"type": "string"}, **more}


PREFER = _header("Prefer", "`wait=N`: answer when the host is ready, at most after N seconds (30).", example="wait=10")
IDEMPOTENCY_KEY = _header("Idempotency-Key", "Up to 128 visible characters: sent again, it does nothing twice.")
IF_MATCH = _header("If-Match", "The ETag of what you read: refused with 412 if it changed since.")
IF_NONE_MATCH = _header("If-None-Match", "The ETag that you have: 304 if it is still so.")


def takes(*headers: dict[str, Any]) -> dict[str, Any]:
    """Headers that `web` reads by itself. As parameters of the handler they would cost each request 60 µs."""
    return {"parameters": list(headers)}


def parse_key(text: str) -> MailAddress | int:
    """An address, or the number that is its account's id."""
    if text.isdigit() and text.isascii() and len(text) <= 18:
        return int(text)
    return MailAddress(text)


AliasKey = Annotated[
    str,
    StringConstraints(max_length=254),
    AfterValidator(parse_key),
    Path(description="Address or id. A deleted alias: the id."),
]
UserKey = Annotated[
    str,
    StringConstraints(max_length=254),
    AfterValidator(parse_key),
    Path(description="Address or id. A deleted account: the id."),
]
