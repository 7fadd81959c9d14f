"""Who changed what. The API inserts and reads; nobody updates or deletes."""

from datetime import datetime
from typing import Any

import sqlalchemy as sa
from sqlmodel import Field, SQLModel

from app.models.columns import TABLE, ascii_string, key, timestamp


class AuditEvent(SQLModel, table=True):
    __tablename__ = "audit_events"
    __table_args__ = (sa.Index("ix_audit_events_subject_kind_subject_id", "subject_kind", "subject_id"), TABLE)

    id: int | None = Field(default=None, sa_column=key())
    at: datetime = Field(sa_column=timestamp(nullable=False, index=True))
    principal_id: str = Field(sa_column=sa.Column(ascii_string(40), nullable=False))
    """A principal's id, or the process that acted by itself: `service`, `cacert-mail`."""
    client_address: str = Field(sa_column=sa.Column(ascii_string(45), nullable=False))
    request_id: str = Field(sa_column=sa.Column(ascii_string(64), nullable=False))
    action: str = Field(sa_column=sa.Column(ascii_string(32), nullable=False))
    """`users.create`, `users.suspend`, …"""
    subject_kind: str = Field(sa_column=sa.Column(ascii_string(16), nullable=False))
    subject_id: str = Field(sa_column=sa.Column(ascii_string(254), nullable=False))
    before: dict[str, Any] | None = Field(sa_column=sa.Column(sa.JSON(none_as_null=True)))
    after: dict[str, Any] | None = Field(sa_column=sa.Column(sa.JSON(none_as_null=True)))
    """Both without secrets: only whether a password is set."""


audit_events: sa.Table = AuditEvent.__table__  # type: ignore[attr-defined]  # SQLModel does not declare it
