"""Who changed what, or tried to. The API inserts and reads; nobody updates or deletes."""

from datetime import datetime
from enum import StrEnum
from typing import Any

import sqlalchemy as sa
from sqlmodel import Field, SQLModel

from app.models.columns import TABLE, ascii_string, big_integer, key, timestamp


class Outcome(StrEnum):
    ACCEPTED = "accepted"
    REFUSED = "refused"


class AuditEvent(SQLModel, table=True):
    __tablename__ = "audit_events"
    # Each ends with the time, by which a list is in order: however many events there are, a page is one look.
    __table_args__ = (
        sa.Index("ix_audit_events_principal_id_at", "principal_id", "at"),
        sa.Index("ix_audit_events_action_at", "action", "at"),
        sa.Index("ix_audit_events_subject_kind_subject_id_at", "subject_kind", "subject_id", "at"),
        sa.Index("ix_audit_events_user_id_at", "user_id", "at"),
        sa.Index("ix_audit_events_outcome_at", "outcome", "at"),
        TABLE,
    )

    id: int | None = Field(default=None, sa_column=key())
    at: datetime = Field(sa_column=timestamp(nullable=False, index=True))
    principal_id: str = Field(sa_column=sa.Column(ascii_string(40), nullable=False))
    """A principal's id, or the process that acted by itself: `service`, `cacert-mail`."""
    key_id: int | None = Field(sa_column=sa.Column(big_integer()))
    """Of `principal_keys`: by which secret or certificate."""
    client_address: str = Field(sa_column=sa.Column(ascii_string(45), nullable=False))
    request_id: str = Field(sa_column=sa.Column(ascii_string(64), nullable=False, index=True))
    action: str = Field(sa_column=sa.Column(ascii_string(32), nullable=False))
    """`users.create`, `users.suspend`, …"""
    subject_kind: str = Field(sa_column=sa.Column(ascii_string(16), nullable=False))
    subject_id: str = Field(sa_column=sa.Column(ascii_string(254), nullable=False))
    user_id: int | None = Field(sa_column=sa.Column(big_integer()))
    """The account whose owner it concerns."""
    outcome: str = Field(sa_column=sa.Column(ascii_string(16), nullable=False, server_default=sa.text("'accepted'")))
    problem: str | None = Field(sa_column=sa.Column(ascii_string(64)))
    """Why it was refused: the last part of the problem's `type`."""
    before: dict[str, Any] | None = Field(sa_column=sa.Column(sa.JSON(none_as_null=True)))
    after: dict[str, Any] | None = Field(sa_column=sa.Column(sa.JSON(none_as_null=True)))
    """Both without secrets: only whether a password is set."""


audit_events: sa.Table = AuditEvent.__table__  # type: ignore[attr-defined]  # SQLModel does not declare it
