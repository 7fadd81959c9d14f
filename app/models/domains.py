"""Mail domains. Written by the API."""

from datetime import datetime
from enum import StrEnum
from typing import Any

import sqlalchemy as sa
from sqlmodel import Field, SQLModel

from app.models.columns import TABLE, ascii_string, key, one_of, timestamp


class DomainKind(StrEnum):
    PRIMARY = "primary"
    """The one that `local(8)` delivers, whose mailboxes lie in `/home/<local part>`. Exactly one, unchangeable."""
    VIRTUAL = "virtual"
    """Its mailboxes lie in `/home/@<domain>/<local part>`."""
    RELAY = "relay"
    """Passed on to another host; it has no mailboxes here."""


class Domain(SQLModel, table=True):
    __tablename__ = "domains"
    __table_args__ = (
        one_of("kind", "kind", DomainKind),
        sa.CheckConstraint("(kind = 'primary') = (primary_slot IS NOT NULL)", name="primary_slot"),
        sa.CheckConstraint("primary_slot = 1", name="primary_slot_is_1"),
        TABLE,
    )

    id: int | None = Field(default=None, sa_column=key())
    name: str = Field(sa_column=sa.Column(ascii_string(253), unique=True, nullable=False))
    kind: str = Field(sa_column=sa.Column(ascii_string(16), nullable=False))
    primary_slot: int | None = Field(sa_column=sa.Column(sa.SmallInteger(), unique=True))
    """1 for the primary domain, null for all others: the unique index makes a second primary impossible."""
    alias_changes: int = Field(sa_column=sa.Column(sa.Integer(), nullable=False, server_default=sa.text("0")))
    """Of the first row only: raised by every change of what leads to what, so that two such changes are in conflict."""
    settings: dict[str, Any] = Field(sa_column=sa.Column(sa.JSON(), nullable=False, server_default=sa.text("('{}')")))
    """What its DNS should say; see `app.dns.settings`. No secret."""
    publish_version: int = Field(
        default=0, sa_column=sa.Column(sa.Integer(), nullable=False, server_default=sa.text("0"))
    )
    """Raised each time that somebody wants the records, but for the keys', entered by the publisher."""
    version: int = Field(sa_column=sa.Column(sa.Integer(), nullable=False))
    created_at: datetime = Field(sa_column=timestamp(nullable=False))
    updated_at: datetime = Field(sa_column=timestamp(nullable=False))


domains: sa.Table = Domain.__table__  # type: ignore[attr-defined]  # SQLModel does not declare it
