"""DKIM keys, who else may send as a domain, what its DNS should say and what it says.

Revision: 2026_11_25_dns, after 2026_11_24_access.
"""

import sqlalchemy as sa

from alembic import op
from app.models.columns import TABLE, Timestamp, ascii_string, big_integer, text_string

revision = "2026_11_25_dns"
down_revision = "2026_11_24_access"
branch_labels = None
depends_on = None

UNNUMBERED = {**TABLE, "sqlite_autoincrement": False}


def upgrade() -> None:
    op.add_column("domains", sa.Column("settings", sa.JSON(), server_default=sa.text("('{}')"), nullable=False))
    op.add_column("domains", sa.Column("publish_version", sa.Integer(), server_default=sa.text("0"), nullable=False))
    op.create_table(
        "dkim_keys",
        sa.Column("id", big_integer(), autoincrement=True, nullable=False),
        sa.Column("domain_id", big_integer(), nullable=False),
        sa.Column("host", ascii_string(64), nullable=False),
        sa.Column("selector", ascii_string(63), nullable=False),
        sa.Column("algorithm", ascii_string(16), nullable=False),
        sa.Column("public_key", ascii_string(1024), nullable=True),
        sa.Column("state", ascii_string(16), nullable=False),
        sa.Column("activate", sa.Boolean(), nullable=False),
        sa.Column("version", sa.Integer(), nullable=False),
        sa.Column("created_at", Timestamp(), nullable=False),
        sa.Column("updated_at", Timestamp(), nullable=False),
        sa.Column("generated_at", Timestamp(), nullable=True),
        sa.Column("published_at", Timestamp(), nullable=True),
        sa.Column("active_at", Timestamp(), nullable=True),
        sa.Column("probed_at", Timestamp(), nullable=True),
        sa.Column("proved_at", Timestamp(), nullable=True),
        sa.Column("retiring_at", Timestamp(), nullable=True),
        sa.Column("revoked_at", Timestamp(), nullable=True),
        sa.Column("removed_at", Timestamp(), nullable=True),
        sa.Column("due_at", Timestamp(), nullable=True),
        sa.Column("checked_at", Timestamp(), nullable=True),
        sa.Column("problem", text_string(500), nullable=True),
        sa.CheckConstraint("algorithm IN ('rsa-2048', 'rsa-3072', 'ed25519')", name="algorithm"),
        sa.CheckConstraint(
            "state IN ('generating', 'unpublished', 'published', 'active', 'retiring', 'revoked', 'removed')",
            name="state",
        ),
        sa.ForeignKeyConstraint(["domain_id"], ["domains.id"]),
        sa.PrimaryKeyConstraint("id"),
        sa.UniqueConstraint("domain_id", "selector", name="uq_dkim_keys_domain_id_selector"),
        **TABLE,
    )
    op.create_index("ix_dkim_keys_host", "dkim_keys", ["host"])
    op.create_table(
        "domain_senders",
        sa.Column("id", big_integer(), autoincrement=True, nullable=False),
        sa.Column("domain_id", big_integer(), nullable=False),
        sa.Column("kind", ascii_string(8), nullable=False),
        sa.Column("value", ascii_string(253), nullable=False),
        sa.Column("note", text_string(200), nullable=False),
        sa.Column("created_at", Timestamp(), nullable=False),
        sa.CheckConstraint("kind IN ('ip4', 'ip6', 'a', 'mx', 'include')", name="kind"),
        sa.ForeignKeyConstraint(["domain_id"], ["domains.id"], ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("id"),
        sa.UniqueConstraint("domain_id", "kind", "value", name="uq_domain_senders_value"),
        **TABLE,
    )
    op.create_table(
        "dns_checks",
        sa.Column("domain_id", big_integer(), autoincrement=False, nullable=False),
        sa.Column("status", ascii_string(8), nullable=False),
        sa.Column("records", sa.JSON(), nullable=False),
        sa.Column("published_version", sa.Integer(), nullable=False),
        sa.Column("published", sa.JSON(), nullable=False),
        sa.Column("checked_at", Timestamp(), nullable=False),
        sa.CheckConstraint("status IN ('ok', 'wrong', 'unknown')", name="status"),
        sa.ForeignKeyConstraint(["domain_id"], ["domains.id"], ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("domain_id"),
        **UNNUMBERED,
    )
    op.execute(
        "CREATE VIEW worker_dkim_keys AS SELECT k.id, d.name AS domain, d.kind AS domain_kind, k.host, k.selector, k.algorithm, k.public_key, k.state, k.version FROM dkim_keys k JOIN domains d ON d.id = k.domain_id"
    )
