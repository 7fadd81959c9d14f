"""Accounts with a mailbox. Written by the API, and by the service process when a retention time ends.

A row is never deleted, so no id, and therefore no uid, is ever given out again.
"""

from datetime import datetime
from enum import StrEnum

import sqlalchemy as sa
from sqlmodel import Field, SQLModel

from app.models.columns import TABLE, ascii_string, big_integer, key, one_of, text_string, timestamp


class UserState(StrEnum):
    ACTIVE = "active"
    SUSPENDED = "suspended"
    """Receives, but can neither sign in nor send."""
    DELETED = "deleted"


class User(SQLModel, table=True):
    __tablename__ = "users"
    __table_args__ = (
        one_of("state", "state", UserState),
        sa.CheckConstraint("(state = 'deleted') = (deleted_at IS NOT NULL)", name="deleted_at"),
        sa.CheckConstraint("(state = 'deleted') = (state_before IS NOT NULL)", name="state_before"),
        sa.CheckConstraint("purged_at IS NULL OR state = 'deleted'", name="purged_at"),
        sa.Index("ix_users_domain_id_id", "domain_id", "id"),
        TABLE,
    )

    id: int | None = Field(default=None, sa_column=key())
    address: str = Field(sa_column=sa.Column(ascii_string(254), nullable=False, index=True))
    """Not unique here: deleted users keep theirs. `addresses` says whose it is now."""
    local_part: str = Field(sa_column=sa.Column(ascii_string(64), nullable=False))
    domain_id: int = Field(sa_column=sa.Column(big_integer(), sa.ForeignKey("domains.id"), nullable=False))
    host: str = Field(sa_column=sa.Column(ascii_string(64), sa.ForeignKey("hosts.name"), nullable=False, index=True))
    display_name: str = Field(sa_column=sa.Column(text_string(200), nullable=False))
    contact_address: str | None = Field(sa_column=sa.Column(ascii_string(254)))
    external_id: str | None = Field(sa_column=sa.Column(text_string(128), unique=True))
    quota_bytes: int | None = Field(sa_column=sa.Column(big_integer()))
    send_limit: int | None = Field(sa_column=sa.Column(sa.Integer()))
    """Recipients an hour by submission; null: what the policy process is set to."""
    state: str = Field(sa_column=sa.Column(ascii_string(16), nullable=False))
    state_before: str | None = Field(sa_column=sa.Column(ascii_string(16)))
    """What a deleted account was before, for `restore`."""
    suspended_reason: str | None = Field(sa_column=sa.Column(text_string(200)))
    password_hash: str | None = Field(sa_column=sa.Column(ascii_string(500)))
    """As Dovecot reads it, scheme in front. Null: no password opens this account."""
    access_ended_at: datetime | None = Field(sa_column=timestamp())
    """Whatever signed in before this moment must be gone: the worker flushes and kicks until `applied` says so."""
    locked_at: datetime | None = Field(sa_column=timestamp())
    """Stolen, it seems: suspended until it is unlocked."""
    locked_from: str | None = Field(sa_column=sa.Column(ascii_string(16)))
    """What a locked account was before, for `unlock`."""
    version: int = Field(sa_column=sa.Column(sa.Integer(), nullable=False))
    created_at: datetime = Field(sa_column=timestamp(nullable=False))
    updated_at: datetime = Field(sa_column=timestamp(nullable=False))
    deleted_at: datetime | None = Field(sa_column=timestamp())
    purge_at: datetime | None = Field(sa_column=timestamp(index=True))
    purged_at: datetime | None = Field(sa_column=timestamp())


users: sa.Table = User.__table__  # type: ignore[attr-defined]  # SQLModel does not declare it
