"""/v1/audit-events: who changed what, or tried to."""

from datetime import UTC, datetime, timedelta
from typing import Annotated, Any

from fastapi import APIRouter, Query
from pydantic import AwareDatetime, BaseModel, Field, StringConstraints
from starlette.responses import Response

from app.errors import BadField, Forbidden
from app.models.audit_events import Outcome
from app.permissions import Permission, Role
from app.routers.shapes import CanReadAudit
from app.services.audit_events import EventFilter, list_events
from app.web.dependencies import Route
from app.web.paging import Limit, NameCursor, page_response

router = APIRouter(prefix="/v1/audit-events", tags=["Audit"], route_class=Route)

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)
_PROCESSES = {"service": "service", "cacert-mail": "command"}
_OWNERS_OWN = ("user", "app-password")


def _ascii(length: int) -> Any:
    return StringConstraints(pattern=r"^[\x20-\x7e]+$", max_length=length)


class AuditEvent(BaseModel):
    id: int
    at: datetime
    action: str = Field(examples=["users.create"])
    outcome: Outcome
    problem: str | None = Field(description="Why it was refused: the last part of the problem's `type`.")
    subject_kind: str
    subject_id: str
    user_id: int | None = Field(description="The account whose owner it concerns.")
    role: str | None = Field(
        description="Of who did it: a role, `service` (our own process), `command` (an administrator on a host); "
        "null: somebody who did not show who it is."
    )
    principal_id: str | None
    principal_name: str | None
    key_id: int | None = Field(description="Which of the principal's secrets or certificates it was.")
    client_address: str | None
    request_id: str
    before: dict[str, Any] | None
    after: dict[str, Any] | None = Field(description="Both without secrets.")


class AuditEventList(BaseModel):
    items: list[AuditEvent]
    next_cursor: str | None


@router.get("", response_model=AuditEventList, summary="Read the audit trail")
async def list_audit_events(
    call: CanReadAudit,
    principal: Annotated[Annotated[str, _ascii(40)] | None, Query(description="Id of who did it.")] = None,
    action: Annotated[Annotated[str, _ascii(32)] | None, Query(description="Like `users.suspend`.")] = None,
    subject_kind: Annotated[
        Annotated[str, _ascii(16)] | None, Query(description="`user`, `alias`, `host`, …; with `subject_id`.")
    ] = None,
    subject_id: Annotated[
        Annotated[str, _ascii(254)] | None, Query(description="Its id or name; with `subject_kind`.")
    ] = None,
    user_id: Annotated[
        int | None, Query(ge=1, le=2**62, description="All that concerns this account, also aliases that lead to it.")
    ] = None,
    outcome: Annotated[Outcome | None, Query(description="`refused`: what somebody tried in vain.")] = None,
    since: Annotated[AwareDatetime | None, Query(alias="from", description="Not before this time (RFC 3339).")] = None,
    until: Annotated[AwareDatetime | None, Query(alias="to", description="Before this time.")] = None,
    request_id: Annotated[Annotated[str, _ascii(64)] | None, Query(description="`X-Request-Id` of an answer.")] = None,
    limit: Limit = 50,
    cursor: NameCursor = None,
) -> Response:
    """Newest first: accepted changes with what was before and after, and refused ones with the reason.

    An owner sees what concerns their own account: what was done and when, and by which role, but neither who that was nor from
    where, unless it was the owner.
    """
    if (subject_id is None) != (subject_kind is None):
        raise BadField("subject_kind and subject_id go together.", field="subject_id")
    owner = call.principal.user_id if call.principal.role is Role.OWNER else None
    if owner is not None and (principal is not None or user_id not in (None, owner)):
        raise Forbidden("An owner reads by account, not by principal.", missing=Permission.AUDIT_READ.value)
    wanted = EventFilter(
        principal_id=principal,
        action=action,
        subject_kind=subject_kind,
        subject_id=subject_id,
        user_id=user_id if owner is None else owner,
        outcome=outcome,
        request_id=request_id,
        since=since,
        until=until,
    )
    rows = await call.read(list_events, wanted, before=_parse(cursor), limit=limit)
    items = [_shown(row) if owner is None else _shown_to(owner, row) for row in rows]
    last = f"{(rows[-1].at - _EPOCH) // _MICROSECOND}-{rows[-1].id}" if rows else None
    return page_response(call.request, items, last, limit)


def _parse(cursor: str | None) -> tuple[datetime, int] | None:
    if cursor is None:
        return None
    at, _, event_id = cursor.partition("-")
    if not (at.isdigit() and event_id.isdigit() and len(at) <= 17 and len(event_id) <= 18):
        raise BadField("A cursor is what `next_cursor` of an earlier page said.", field="cursor")
    return _EPOCH + int(at) * _MICROSECOND, int(event_id)


def _shown(row: Any) -> dict[str, Any]:
    values = {name: getattr(row, name) for name in AuditEvent.model_fields}
    if row.role is None:
        role = _PROCESSES.get(row.principal_id)
        values["role"] = role or (Role.OWNER.value if row.principal_id.startswith("owner-") else None)
    return values


def _shown_to(owner: int, row: Any) -> dict[str, Any]:
    """Without what is other people's: who they are, where they were, and what an alias has besides this account."""
    values = _shown(row)
    if row.principal_id != f"owner-{owner}":
        values |= {"principal_id": None, "principal_name": None, "key_id": None, "client_address": None}
    if row.subject_kind not in _OWNERS_OWN:
        values |= {"before": None, "after": None}
    return values
