"""Links by which a password is set without the old one: resets and invitations. Written by the API.

No usable form of a link is here: its token is an HMAC of the row's id under a file key, of which the row has the SHA-256.
"""

from datetime import datetime
from enum import StrEnum

import sqlalchemy as sa
from sqlmodel import Field, SQLModel

from app.models.columns import TABLE, ascii_string, big_integer, one_of, text_string, timestamp


class ResetKind(StrEnum):
    RESET = "reset"
    INVITATION = "invitation"


class Delivery(StrEnum):
    MAIL = "mail"
    SHOW = "show"
    """The link was given to whoever asked, to hand it over; the owner is told by mail."""


class PasswordReset(SQLModel, table=True):
    __tablename__ = "password_resets"
    __table_args__ = (
        one_of("kind", "kind", ResetKind),
        one_of("deliver", "deliver", Delivery),
        {**TABLE, "sqlite_autoincrement": False},
    )

    id: int = Field(sa_column=sa.Column(big_integer(), primary_key=True, autoincrement=False))
    """Random, of 62 bits: an id that came again, after a backup was restored, would make the old link again."""
    user_id: int | None = Field(sa_column=sa.Column(big_integer(), sa.ForeignKey("users.id"), index=True))
    """Null: there is no such account, and whoever asked must not learn it."""
    kind: str = Field(sa_column=sa.Column(ascii_string(16), nullable=False))
    deliver: str = Field(sa_column=sa.Column(ascii_string(16), nullable=False))
    token_hash: str = Field(sa_column=sa.Column(ascii_string(64), nullable=False, unique=True))
    reason: str | None = Field(sa_column=sa.Column(text_string(200)))
    principal_id: str = Field(sa_column=sa.Column(ascii_string(40), nullable=False))
    """Who asked for it."""
    created_at: datetime = Field(sa_column=timestamp(nullable=False, index=True))
    expires_at: datetime = Field(sa_column=timestamp(nullable=False))
    used_at: datetime | None = Field(sa_column=timestamp())
    cancelled_at: datetime | None = Field(sa_column=timestamp())
    """The password was set otherwise, or the account was locked or deleted, before the link was used."""


password_resets: sa.Table = PasswordReset.__table__  # type: ignore[attr-defined]  # SQLModel does not declare it
