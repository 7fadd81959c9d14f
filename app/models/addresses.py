"""Who holds which address. Written by the API.

Users, aliases and tombstones claim their address here, so that uniqueness is one insert and never a check before it.
"""

from enum import StrEnum

import sqlalchemy as sa
from sqlmodel import Field, SQLModel

from app.models.columns import TABLE, ascii_string, big_integer, one_of


class AddressKind(StrEnum):
    USER = "user"
    ALIAS = "alias"
    TOMBSTONE = "tombstone"
    """Of the deleted user `subject_id`."""


class Address(SQLModel, table=True):
    __tablename__ = "addresses"
    __table_args__ = (one_of("kind", "kind", AddressKind), {**TABLE, "sqlite_autoincrement": False})

    address: str = Field(sa_column=sa.Column(ascii_string(254), primary_key=True))
    kind: str = Field(sa_column=sa.Column(ascii_string(16), nullable=False))
    subject_id: int = Field(sa_column=sa.Column(big_integer(), nullable=False))


addresses: sa.Table = Address.__table__  # type: ignore[attr-defined]  # SQLModel does not declare it
