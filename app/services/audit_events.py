"""The audit trail: one event for each accepted change, in the change's own transaction."""

from typing import Any

from sqlalchemy import insert

from app.models.audit_events import audit_events
from app.services.changes import Change

_INSERT = insert(audit_events)


async def record_event(
    change: Change,
    action: str,
    subject_kind: str,
    subject_id: int | str,
    *,
    before: dict[str, Any] | None = None,
    after: dict[str, Any] | None = None,
) -> None:
    """`before` and `after` hold what changed, without secrets. Values must be JSON."""
    await change.connection.execute(
        _INSERT,
        {
            "at": change.now,
            "principal_id": change.actor.principal_id,
            "client_address": change.actor.client_address,
            "request_id": change.actor.request_id,
            "action": action,
            "subject_kind": subject_kind,
            "subject_id": str(subject_id),
            "before": before,
            "after": after,
        },
    )
