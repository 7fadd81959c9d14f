"""Mail hosts (written by the API) and how each one does (written by its worker)."""

from datetime import datetime
from typing import Any

import sqlalchemy as sa
from sqlmodel import Field, SQLModel

from app.models.columns import TABLE, ascii_string, text_string, timestamp

SERVICE_HOST = "-"
"""The `jobs.host` of work that belongs to no mail host but to the service process."""


class Host(SQLModel, table=True):
    __tablename__ = "hosts"
    __table_args__ = (sa.CheckConstraint("name <> '-'", name="name"), {**TABLE, "sqlite_autoincrement": False})

    name: str = Field(sa_column=sa.Column(ascii_string(64), primary_key=True))
    enabled: bool = Field(sa_column=sa.Column(sa.Boolean(), nullable=False))
    settings: dict[str, Any] = Field(sa_column=sa.Column(sa.JSON(), nullable=False))
    """What varies by host and is no secret, no path and no trusted network: those stay in the host's own file."""
    version: int = Field(sa_column=sa.Column(sa.Integer(), nullable=False))
    created_at: datetime = Field(sa_column=timestamp(nullable=False))
    updated_at: datetime = Field(sa_column=timestamp(nullable=False))


class HostStatus(SQLModel, table=True):
    """One row a host, written by its worker alone."""

    __tablename__ = "host_status"
    __table_args__ = ({**TABLE, "sqlite_autoincrement": False},)

    host: str = Field(sa_column=sa.Column(ascii_string(64), primary_key=True))
    heartbeat_at: datetime = Field(sa_column=timestamp(nullable=False))
    started_at: datetime = Field(sa_column=timestamp(nullable=False))
    release: str = Field(sa_column=sa.Column(text_string(64), nullable=False))
    swept_at: datetime | None = Field(sa_column=timestamp())
    sweep: dict[str, Any] | None = Field(sa_column=sa.Column(sa.JSON(none_as_null=True)))
    """What the last sweep found: counts, and the first differences in words."""


hosts: sa.Table = Host.__table__  # type: ignore[attr-defined]  # SQLModel does not declare it
host_status: sa.Table = HostStatus.__table__  # type: ignore[attr-defined]  # SQLModel does not declare it
