"""Whoever calls the API: a person or a service, and the secrets and certificates by which they show it.

Written by the API and by the command line.
"""

from datetime import datetime
from enum import StrEnum

import sqlalchemy as sa
from sqlmodel import Field, SQLModel

from app.models.columns import TABLE, ascii_string, big_integer, key, one_of, text_string, timestamp
from app.permissions import Role


class PrincipalState(StrEnum):
    ACTIVE = "active"
    DISABLED = "disabled"


class PrincipalRow(SQLModel, table=True):
    __tablename__ = "principals"
    __table_args__ = (
        one_of("role", "role", (role for role in Role if role is not Role.OWNER)),
        one_of("state", "state", PrincipalState),
        {**TABLE, "sqlite_autoincrement": False},
    )

    id: str = Field(sa_column=sa.Column(ascii_string(40), primary_key=True))
    """The OAuth 2.0 client id."""
    name: str = Field(sa_column=sa.Column(text_string(100), nullable=False, unique=True))
    role: str = Field(sa_column=sa.Column(ascii_string(16), nullable=False))
    permissions: list[str] | None = Field(sa_column=sa.Column(sa.JSON(none_as_null=True)))
    """Null: all that the role has. Otherwise only these, and only as far as the role has them."""
    networks: list[str] | None = Field(sa_column=sa.Column(sa.JSON(none_as_null=True)))
    """Null: from anywhere. Otherwise only from these networks, in CIDR notation."""
    user_id: int | None = Field(sa_column=sa.Column(big_integer(), sa.ForeignKey("users.id"), index=True))
    """A person's own account: nobody of a lower rank acts on it."""
    secret_hash: str | None = Field(sa_column=sa.Column(ascii_string(64)))
    """Read by the previous release alone, and null once a key was changed. Goes with the next migration."""
    version: int = Field(sa_column=sa.Column(sa.Integer(), nullable=False))
    state: str = Field(sa_column=sa.Column(ascii_string(16), nullable=False))
    expires_at: datetime | None = Field(sa_column=timestamp())
    created_at: datetime = Field(sa_column=timestamp(nullable=False))
    updated_at: datetime = Field(sa_column=timestamp(nullable=False))


class KeyKind(StrEnum):
    SECRET = "secret"  # noqa: S105  the name of a kind of key
    CERTIFICATE = "certificate"


class PrincipalKey(SQLModel, table=True):
    """A row is never deleted: the audit trail names its id."""

    __tablename__ = "principal_keys"
    __table_args__ = (one_of("kind", "kind", KeyKind), TABLE)

    id: int | None = Field(default=None, sa_column=key())
    principal_id: str = Field(
        sa_column=sa.Column(ascii_string(40), sa.ForeignKey("principals.id"), nullable=False, index=True)
    )
    kind: str = Field(sa_column=sa.Column(ascii_string(16), nullable=False))
    hash: str = Field(sa_column=sa.Column(ascii_string(64), nullable=False, unique=True))
    """SHA-256 in hex: of the secret, which has 256 random bits, so nothing slower is needed; or of the certificate's DER."""
    created_at: datetime = Field(sa_column=timestamp(nullable=False))
    ends_at: datetime | None = Field(sa_column=timestamp())
    """From then on it is refused, and so are the tokens that were obtained with it. Null: no such time is set."""


principals: sa.Table = PrincipalRow.__table__  # type: ignore[attr-defined]  # SQLModel does not declare it
principal_keys: sa.Table = PrincipalKey.__table__  # type: ignore[attr-defined]  # the same
