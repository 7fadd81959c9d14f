"""Wrong passwords, and other things that are counted: who tried what, how often, from where. Written by the API.

A program that repeats one wrong password is one row, whose count and time go up.
"""

from datetime import datetime
from enum import StrEnum

import sqlalchemy as sa
from sqlmodel import Field, SQLModel

from app.models.columns import TABLE, ascii_string, key, one_of, timestamp


class FailureKind(StrEnum):
    MAIL = "mail"
    """A login to Dovecot: IMAP, POP3, submission."""
    API = "api"
    """A client id and secret, or a token request."""
    RESET = "reset"
    """A password reset that was asked for, or a link that is none."""


class LoginFailure(SQLModel, table=True):
    __tablename__ = "login_failures"
    __table_args__ = (
        one_of("kind", "kind", FailureKind),
        sa.UniqueConstraint("kind", "login", "network", "guess", name="uq_login_failures_guess"),
        sa.Index("ix_login_failures_network_last_at", "network", "last_at"),
        TABLE,
    )

    id: int | None = Field(default=None, sa_column=key())
    kind: str = Field(sa_column=sa.Column(ascii_string(8), nullable=False))
    login: str = Field(sa_column=sa.Column(ascii_string(254), nullable=False))
    """An address or a client id. What is neither may be a password in the wrong field, and is kept as a hash."""
    network: str = Field(sa_column=sa.Column(ascii_string(43), nullable=False))
    """/32 of IPv4, /64 of IPv6."""
    guess: str = Field(sa_column=sa.Column(ascii_string(64), nullable=False))
    """A hash that tells one wrong password from another, and nothing else about it."""
    attempts: int = Field(sa_column=sa.Column(sa.Integer(), nullable=False))
    first_at: datetime = Field(sa_column=timestamp(nullable=False))
    last_at: datetime = Field(sa_column=timestamp(nullable=False, index=True))


login_failures: sa.Table = LoginFailure.__table__  # type: ignore[attr-defined]  # SQLModel does not declare it
