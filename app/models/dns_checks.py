"""What the DNS says of each domain, as it was last looked at. Written by the service process."""

from datetime import datetime
from enum import StrEnum
from typing import Any

import sqlalchemy as sa
from sqlmodel import Field, SQLModel

from app.models.columns import TABLE, ascii_string, big_integer, one_of, timestamp


class Health(StrEnum):
    OK = "ok"
    WRONG = "wrong"
    UNKNOWN = "unknown"
    """Not every name server could be asked."""


class DnsCheck(SQLModel, table=True):
    __tablename__ = "dns_checks"
    __table_args__ = (one_of("status", "status", Health), {**TABLE, "sqlite_autoincrement": False})

    domain_id: int = Field(
        sa_column=sa.Column(
            big_integer(), sa.ForeignKey("domains.id", ondelete="CASCADE"), primary_key=True, autoincrement=False
        )
    )
    status: str = Field(sa_column=sa.Column(ascii_string(8), nullable=False))
    records: list[dict[str, Any]] = Field(sa_column=sa.Column(sa.JSON(), nullable=False))
    """Each record that the domain should have: what is live, whether that is right, and why not."""
    published_version: int = Field(sa_column=sa.Column(sa.Integer(), nullable=False))
    """Up to this `domains.publish_version` it was done: every name server had said so."""
    published: list[list[str]] = Field(sa_column=sa.Column(sa.JSON(), nullable=False))
    """Name and type of what the publisher entered, and takes away when it is wanted no more."""
    checked_at: datetime = Field(sa_column=timestamp(nullable=False))


dns_checks: sa.Table = DnsCheck.__table__  # type: ignore[attr-defined]  # SQLModel does not declare it
