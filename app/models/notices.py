"""Mail to account owners: links and what happened to their account. Written by the API, sent by the service process.

No text and no link is kept here: both are made when it is sent.
"""

from datetime import datetime
from enum import StrEnum
from typing import Any

import sqlalchemy as sa
from sqlmodel import Field, SQLModel

from app.models.columns import TABLE, ascii_string, big_integer, key, one_of, text_string, timestamp


class NoticeKind(StrEnum):
    INVITATION = "invitation"
    RESET = "reset"
    RESET_SHOWN = "reset_shown"
    """Somebody else was given a link to this account."""
    PASSWORD_CHANGED = "password_changed"  # noqa: S105  the name of a kind of mail
    LOCKED = "locked"
    UNLOCKED = "unlocked"


class Notice(SQLModel, table=True):
    __tablename__ = "notices"
    __table_args__ = (one_of("kind", "kind", NoticeKind), TABLE)

    id: int | None = Field(default=None, sa_column=key())
    user_id: int | None = Field(sa_column=sa.Column(big_integer(), sa.ForeignKey("users.id"), index=True))
    reset_id: int | None = Field(sa_column=sa.Column(big_integer(), sa.ForeignKey("password_resets.id"), index=True))
    kind: str = Field(sa_column=sa.Column(ascii_string(24), nullable=False))
    recipient: str | None = Field(sa_column=sa.Column(ascii_string(254)))
    """The contact address at that time. Null: there is no such account, and nothing is sent."""
    details: dict[str, Any] | None = Field(sa_column=sa.Column(sa.JSON(none_as_null=True)))
    """What the text says besides. No secret."""
    created_at: datetime = Field(sa_column=timestamp(nullable=False, index=True))
    sent_at: datetime | None = Field(sa_column=timestamp())
    bounced_at: datetime | None = Field(sa_column=timestamp())
    bounce: str | None = Field(sa_column=sa.Column(text_string(200)))
    """What the other server said."""


notices: sa.Table = Notice.__table__  # type: ignore[attr-defined]  # SQLModel does not declare it
