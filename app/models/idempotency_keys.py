"""Requests that carried an Idempotency-Key, for 24 hours. Written by the API, pruned by the service process.

Holds the ids that a request made, never its body or a secret; the request itself only as an HMAC under a file key, since
a plain hash of a body that has a password in it could be guessed against.
"""

from datetime import datetime

import sqlalchemy as sa
from sqlmodel import Field, SQLModel

from app.models.columns import TABLE, ascii_string, big_integer, timestamp


class IdempotencyKey(SQLModel, table=True):
    __tablename__ = "idempotency_keys"
    __table_args__ = ({**TABLE, "sqlite_autoincrement": False},)

    principal_id: str = Field(sa_column=sa.Column(ascii_string(40), primary_key=True))
    key: str = Field(sa_column=sa.Column(ascii_string(128), primary_key=True))
    request_hash: str = Field(sa_column=sa.Column(ascii_string(64), nullable=False))
    subject_id: int | None = Field(sa_column=sa.Column(big_integer()))
    subject_name: str | None = Field(sa_column=sa.Column(ascii_string(254)))
    """What the request made, by id or by name, whichever its noun is known by."""
    created_at: datetime = Field(sa_column=timestamp(nullable=False, index=True))


idempotency_keys: sa.Table = IdempotencyKey.__table__  # type: ignore[attr-defined]  # SQLModel does not declare it
