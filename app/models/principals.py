"""Whoever calls the API: a person or a service. Written by the command line."""

from datetime import datetime
from enum import StrEnum

import sqlalchemy as sa
from sqlmodel import Field, SQLModel

from app.models.columns import TABLE, ascii_string, one_of, text_string, timestamp
from app.permissions import Role


class PrincipalState(StrEnum):
    ACTIVE = "active"
    DISABLED = "disabled"


class PrincipalRow(SQLModel, table=True):
    __tablename__ = "principals"
    __table_args__ = (
        one_of("role", "role", Role),
        one_of("state", "state", PrincipalState),
        {**TABLE, "sqlite_autoincrement": False},
    )

    id: str = Field(sa_column=sa.Column(ascii_string(40), primary_key=True))
    """The OAuth 2.0 client id."""
    name: str = Field(sa_column=sa.Column(text_string(100), nullable=False, unique=True))
    role: str = Field(sa_column=sa.Column(ascii_string(16), nullable=False))
    permissions: list[str] | None = Field(sa_column=sa.Column(sa.JSON(none_as_null=True)))
    """Null: all that the role has. Otherwise only these, and only as far as the role has them."""
    secret_hash: str = Field(sa_column=sa.Column(ascii_string(64), nullable=False))
    """SHA-256 in hex. The secret has 256 random bits, so nothing slower is needed."""
    version: int = Field(sa_column=sa.Column(sa.Integer(), nullable=False))
    """Raised when the secret changes; a token carries it, so that tokens of an old secret end with it."""
    state: str = Field(sa_column=sa.Column(ascii_string(16), nullable=False))
    created_at: datetime = Field(sa_column=timestamp(nullable=False))
    updated_at: datetime = Field(sa_column=timestamp(nullable=False))


principals: sa.Table = PrincipalRow.__table__  # type: ignore[attr-defined]  # SQLModel does not declare it
