"""Passwords for single programs, made by the server, each for some protocols. Written by the API.

They have 128 random bits or more, so a SHA-256 serves, and Dovecot finds the one that was sent by it.
"""

from datetime import datetime

import sqlalchemy as sa
from sqlmodel import Field, SQLModel

from app.models.columns import TABLE, ascii_string, big_integer, key, text_string, timestamp


def _allowed() -> "sa.Column[bool]":
    return sa.Column(sa.Boolean(), nullable=False)


class AppPassword(SQLModel, table=True):
    __tablename__ = "app_passwords"
    __table_args__ = TABLE

    id: int | None = Field(default=None, sa_column=key())
    user_id: int = Field(sa_column=sa.Column(big_integer(), sa.ForeignKey("users.id"), nullable=False, index=True))
    name: str = Field(sa_column=sa.Column(text_string(100), nullable=False))
    secret_hash: str = Field(sa_column=sa.Column(ascii_string(64), nullable=False, unique=True))
    """SHA-256 in hex."""
    imap: bool = Field(sa_column=_allowed())
    pop3: bool = Field(sa_column=_allowed())
    smtp: bool = Field(sa_column=_allowed())
    sieve: bool = Field(sa_column=_allowed())
    created_at: datetime = Field(sa_column=timestamp(nullable=False))
    revoked_at: datetime | None = Field(sa_column=timestamp())
    last_used_at: datetime | None = Field(sa_column=timestamp())
    last_used_from: str | None = Field(sa_column=sa.Column(ascii_string(45)))


app_passwords: sa.Table = AppPassword.__table__  # type: ignore[attr-defined]  # SQLModel does not declare it
