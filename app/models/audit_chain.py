"""The chain over the audit trail: each link holds the hash of its event and of the link before. The service process adds to it.

Whoever edits, deletes or swaps events breaks it; whoever cuts off its end is found by a head that was kept elsewhere.
"""

from datetime import datetime

import sqlalchemy as sa
from sqlmodel import Field, SQLModel

from app.models.columns import TABLE, ascii_string, big_integer, timestamp


class AuditLink(SQLModel, table=True):
    __tablename__ = "audit_chain"
    __table_args__ = ({**TABLE, "sqlite_autoincrement": False},)

    sequence: int = Field(sa_column=sa.Column(big_integer(), primary_key=True, autoincrement=False))
    """From 1, without gaps."""
    event_id: int = Field(sa_column=sa.Column(big_integer(), nullable=False, unique=True))
    previous_hash: str = Field(sa_column=sa.Column(ascii_string(64), nullable=False))
    hash: str = Field(sa_column=sa.Column(ascii_string(64), nullable=False))
    chained_at: datetime = Field(sa_column=timestamp(nullable=False))


audit_chain: sa.Table = AuditLink.__table__  # type: ignore[attr-defined]  # SQLModel does not declare it
