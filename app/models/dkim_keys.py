"""DKIM keys: one selector of a domain, whose private half only one mail host has. Written by the API and the service process.

The host's worker reports the public half in `applied.result`, and what it signs with in `applied.proofs`.
"""

from datetime import datetime
from enum import StrEnum

import sqlalchemy as sa
from sqlmodel import Field, SQLModel

from app.models.columns import TABLE, ascii_string, big_integer, key, one_of, text_string, timestamp


class Algorithm(StrEnum):
    RSA_2048 = "rsa-2048"
    RSA_3072 = "rsa-3072"
    ED25519 = "ed25519"
    """RFC 8463. Beside an RSA key, since many receivers know no other."""

    @property
    def family(self) -> str:
        """`k=` of the record: a key replaces others of its own family."""
        return self.value.partition("-")[0]


class DkimState(StrEnum):
    GENERATING = "generating"
    """Its host makes it."""
    UNPUBLISHED = "unpublished"
    """Its public half is known here, and not yet the same at all name servers of the zone."""
    PUBLISHED = "published"
    """Whoever asks finds it. It signs nothing."""
    ACTIVE = "active"
    """It signs; until a probe was seen to verify (`proved_at`) those that it replaces sign as well."""
    RETIRING = "retiring"
    """It signs nothing more, and stays in the DNS for mail that is under way."""
    REVOKED = "revoked"
    """In the DNS without its key (`p=`, RFC 6376, section 3.6.1)."""
    REMOVED = "removed"
    """Gone from the DNS, and its private half from the host."""


class DkimKey(SQLModel, table=True):
    """A row is never deleted: no selector is used twice."""

    __tablename__ = "dkim_keys"
    __table_args__ = (
        one_of("algorithm", "algorithm", Algorithm),
        one_of("state", "state", DkimState),
        sa.UniqueConstraint("domain_id", "selector", name="uq_dkim_keys_domain_id_selector"),
        TABLE,
    )

    id: int | None = Field(default=None, sa_column=key())
    domain_id: int = Field(sa_column=sa.Column(big_integer(), sa.ForeignKey("domains.id"), nullable=False))
    host: str = Field(sa_column=sa.Column(ascii_string(64), nullable=False, index=True))
    selector: str = Field(sa_column=sa.Column(ascii_string(63), nullable=False))
    algorithm: str = Field(sa_column=sa.Column(ascii_string(16), nullable=False))
    public_key: str | None = Field(sa_column=sa.Column(ascii_string(1024)))
    """As `p=` has it: base64 of the SubjectPublicKeyInfo (RSA), or of the 32 octets (RFC 8463). Null while it is generating."""
    state: str = Field(sa_column=sa.Column(ascii_string(16), nullable=False))
    activate: bool = Field(sa_column=sa.Column(sa.Boolean(), nullable=False))
    """It becomes active as soon as it is published. False: when somebody asks for that."""
    version: int = Field(sa_column=sa.Column(sa.Integer(), nullable=False))
    created_at: datetime = Field(sa_column=timestamp(nullable=False))
    updated_at: datetime = Field(sa_column=timestamp(nullable=False))
    generated_at: datetime | None = Field(sa_column=timestamp())
    published_at: datetime | None = Field(sa_column=timestamp())
    active_at: datetime | None = Field(sa_column=timestamp())
    probed_at: datetime | None = Field(sa_column=timestamp())
    """When a probe was sent last."""
    proved_at: datetime | None = Field(sa_column=timestamp())
    """When a probe came back whose signature verified."""
    retiring_at: datetime | None = Field(sa_column=timestamp())
    revoked_at: datetime | None = Field(sa_column=timestamp())
    removed_at: datetime | None = Field(sa_column=timestamp())
    due_at: datetime | None = Field(sa_column=timestamp())
    """Of a retiring or revoked one: when the next step is."""
    checked_at: datetime | None = Field(sa_column=timestamp())
    """When the DNS, or the host, was looked at last."""
    problem: str | None = Field(sa_column=sa.Column(text_string(500)))
    """What stands in the way of the next step, in a sentence."""


dkim_keys: sa.Table = DkimKey.__table__  # type: ignore[attr-defined]  # SQLModel does not declare it
