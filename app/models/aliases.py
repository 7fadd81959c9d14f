"""Addresses that lead elsewhere, where they lead, and who may send as them. Written by the API.

A row is never deleted, so that what was applied on the hosts can be told of a deleted alias too. Users and aliases are referred
to by id: whoever has an address later inherits neither its mail nor its rights.
"""

from datetime import datetime
from enum import StrEnum

import sqlalchemy as sa
from sqlmodel import Field, SQLModel

from app.models.columns import TABLE, ascii_string, big_integer, key, one_of, text_string, timestamp


class AliasKind(StrEnum):
    RECEIVE_ONLY = "receive_only"
    """Never sent from. On the primary domain it stands in the alias file."""
    SEND_AS = "send_as"
    """The users designated in `sender_rules`, and nobody else, may send under it."""


class Alias(SQLModel, table=True):
    __tablename__ = "aliases"
    __table_args__ = (
        one_of("kind", "kind", AliasKind),
        sa.Index("ix_aliases_domain_id_id", "domain_id", "id"),
        TABLE,
    )

    id: int | None = Field(default=None, sa_column=key())
    address: str = Field(sa_column=sa.Column(ascii_string(254), nullable=False, index=True))
    """Not unique here: deleted ones keep theirs. `addresses` says whose it is now."""
    local_part: str = Field(sa_column=sa.Column(ascii_string(64), nullable=False))
    domain_id: int = Field(sa_column=sa.Column(big_integer(), sa.ForeignKey("domains.id"), nullable=False))
    kind: str = Field(sa_column=sa.Column(ascii_string(16), nullable=False))
    note: str = Field(sa_column=sa.Column(text_string(200), nullable=False))
    """For people: what it is there for."""
    version: int = Field(sa_column=sa.Column(sa.Integer(), nullable=False))
    created_at: datetime = Field(sa_column=timestamp(nullable=False))
    updated_at: datetime = Field(sa_column=timestamp(nullable=False))
    deleted_at: datetime | None = Field(sa_column=timestamp())


class AliasDestination(SQLModel, table=True):
    """A user, another alias, or an address somewhere else."""

    __tablename__ = "alias_destinations"
    __table_args__ = (
        sa.CheckConstraint(
            "(user_id IS NOT NULL) + (target_alias_id IS NOT NULL) + (address IS NOT NULL) = 1", name="exactly_one"
        ),
        {**TABLE, "sqlite_autoincrement": False},
    )

    alias_id: int = Field(
        sa_column=sa.Column(big_integer(), sa.ForeignKey("aliases.id"), primary_key=True, autoincrement=False)
    )
    position: int = Field(sa_column=sa.Column(sa.SmallInteger(), primary_key=True, autoincrement=False))
    """From 0, in the order in which the caller gave them."""
    user_id: int | None = Field(sa_column=sa.Column(big_integer(), sa.ForeignKey("users.id"), index=True))
    target_alias_id: int | None = Field(sa_column=sa.Column(big_integer(), sa.ForeignKey("aliases.id"), index=True))
    address: str | None = Field(sa_column=sa.Column(ascii_string(254), index=True))


class SenderRule(SQLModel, table=True):
    """A user who may send as an alias of the kind `send_as`."""

    __tablename__ = "sender_rules"
    __table_args__ = ({**TABLE, "sqlite_autoincrement": False},)

    alias_id: int = Field(
        sa_column=sa.Column(big_integer(), sa.ForeignKey("aliases.id"), primary_key=True, autoincrement=False)
    )
    user_id: int = Field(
        sa_column=sa.Column(big_integer(), sa.ForeignKey("users.id"), primary_key=True, autoincrement=False, index=True)
    )


aliases: sa.Table = Alias.__table__  # type: ignore[attr-defined]  # SQLModel does not declare it
alias_destinations: sa.Table = AliasDestination.__table__  # type: ignore[attr-defined]  # SQLModel does not declare it
sender_rules: sa.Table = SenderRule.__table__  # type: ignore[attr-defined]  # SQLModel does not declare it
