"""Who else may send as a domain, for its SPF record (RFC 7208). Written by the API."""

from datetime import datetime
from enum import StrEnum

import sqlalchemy as sa
from sqlmodel import Field, SQLModel

from app.models.columns import TABLE, ascii_string, big_integer, key, one_of, text_string, timestamp


class SenderKind(StrEnum):
    IP4 = "ip4"
    IP6 = "ip6"
    A = "a"
    MX = "mx"
    INCLUDE = "include"


class DomainSender(SQLModel, table=True):
    __tablename__ = "domain_senders"
    __table_args__ = (
        one_of("kind", "kind", SenderKind),
        sa.UniqueConstraint("domain_id", "kind", "value", name="uq_domain_senders_value"),
        TABLE,
    )

    id: int | None = Field(default=None, sa_column=key())
    domain_id: int = Field(
        sa_column=sa.Column(big_integer(), sa.ForeignKey("domains.id", ondelete="CASCADE"), nullable=False)
    )
    kind: str = Field(sa_column=sa.Column(ascii_string(8), nullable=False))
    value: str = Field(sa_column=sa.Column(ascii_string(253), nullable=False))
    """A network of the kind's family, or a name; of `a` and `mx` empty for the domain itself."""
    note: str = Field(sa_column=sa.Column(text_string(200), nullable=False))
    """Who that is, and why."""
    created_at: datetime = Field(sa_column=timestamp(nullable=False))


domain_senders: sa.Table = DomainSender.__table__  # type: ignore[attr-defined]  # SQLModel does not declare it
