"""Aliases, where they lead, who may send as them; how much a user may send; the views of both.

Revision: 2026_11_23_aliases, after 2026_11_23_accounts.
"""

import sqlalchemy as sa

from alembic import op
from app.models.columns import TABLE, Timestamp, ascii_string, big_integer, text_string

revision = "2026_11_23_aliases"
down_revision = "2026_11_23_accounts"
branch_labels = None
depends_on = None

UNNUMBERED = {**TABLE, "sqlite_autoincrement": False}


def upgrade() -> None:
    op.add_column("users", sa.Column("send_limit", sa.Integer(), nullable=True))
    op.create_table(
        "aliases",
        sa.Column("id", big_integer(), autoincrement=True, nullable=False),
        sa.Column("address", ascii_string(254), nullable=False),
        sa.Column("local_part", ascii_string(64), nullable=False),
        sa.Column("domain_id", big_integer(), nullable=False),
        sa.Column("kind", ascii_string(16), nullable=False),
        sa.Column("note", text_string(200), nullable=False),
        sa.Column("version", sa.Integer(), nullable=False),
        sa.Column("created_at", Timestamp(), nullable=False),
        sa.Column("updated_at", Timestamp(), nullable=False),
        sa.Column("deleted_at", Timestamp(), nullable=True),
        sa.CheckConstraint("kind IN ('receive_only', 'send_as')", name="kind"),
        sa.ForeignKeyConstraint(["domain_id"], ["domains.id"]),
        sa.PrimaryKeyConstraint("id"),
        **TABLE,
    )
    op.create_index("ix_aliases_address", "aliases", ["address"])
    op.create_index("ix_aliases_domain_id_id", "aliases", ["domain_id", "id"])
    op.create_table(
        "alias_destinations",
        sa.Column("alias_id", big_integer(), autoincrement=False, nullable=False),
        sa.Column("position", sa.SmallInteger(), autoincrement=False, nullable=False),
        sa.Column("user_id", big_integer(), nullable=True),
        sa.Column("target_alias_id", big_integer(), nullable=True),
        sa.Column("address", ascii_string(254), nullable=True),
        sa.CheckConstraint(
            "(user_id IS NOT NULL) + (target_alias_id IS NOT NULL) + (address IS NOT NULL) = 1", name="exactly_one"
        ),
        sa.ForeignKeyConstraint(["alias_id"], ["aliases.id"]),
        sa.ForeignKeyConstraint(["target_alias_id"], ["aliases.id"]),
        sa.ForeignKeyConstraint(["user_id"], ["users.id"]),
        sa.PrimaryKeyConstraint("alias_id", "position"),
        **UNNUMBERED,
    )
    for column in ("address", "target_alias_id", "user_id"):
        op.create_index(f"ix_alias_destinations_{column}", "alias_destinations", [column])
    op.create_table(
        "sender_rules",
        sa.Column("alias_id", big_integer(), autoincrement=False, nullable=False),
        sa.Column("user_id", big_integer(), autoincrement=False, nullable=False),
        sa.ForeignKeyConstraint(["alias_id"], ["aliases.id"]),
        sa.ForeignKeyConstraint(["user_id"], ["users.id"]),
        sa.PrimaryKeyConstraint("alias_id", "user_id"),
        **UNNUMBERED,
    )
    op.create_index("ix_sender_rules_user_id", "sender_rules", ["user_id"])

    op.execute("DROP VIEW service_users")
    op.execute(
        "CREATE VIEW service_users AS SELECT id, address, local_part, domain_id, host, display_name, contact_address, external_id, quota_bytes, send_limit, state, state_before, suspended_reason, access_ended_at, version, created_at, updated_at, deleted_at, purge_at, purged_at FROM users"
    )
    op.execute(
        "CREATE VIEW worker_aliases AS SELECT a.id, a.address, a.local_part, d.name AS domain, d.kind AS domain_kind, a.kind, a.version, a.deleted_at FROM aliases a JOIN domains d ON d.id = a.domain_id"
    )
    op.execute(
        "CREATE VIEW worker_alias_destinations AS SELECT a.id AS alias_id, t.position, COALESCE(t.address, o.address, u.address) AS destination FROM aliases a JOIN domains d ON d.id = a.domain_id JOIN alias_destinations t ON t.alias_id = a.id LEFT JOIN users u ON u.id = t.user_id LEFT JOIN applied p ON p.host = u.host AND p.kind = 'mailbox.sync' AND p.subject_id = u.id LEFT JOIN aliases o ON o.id = t.target_alias_id WHERE a.deleted_at IS NULL AND (t.address IS NOT NULL OR (o.id IS NOT NULL AND o.deleted_at IS NULL) OR (p.stands = 1 AND u.state IN ('active', 'suspended')))"
    )
    op.execute(
        "CREATE VIEW postfix_local_aliases AS SELECT a.local_part, COALESCE(t.address, o.address, u.address) AS destination FROM aliases a JOIN domains d ON d.id = a.domain_id JOIN alias_destinations t ON t.alias_id = a.id LEFT JOIN users u ON u.id = t.user_id LEFT JOIN applied p ON p.host = u.host AND p.kind = 'mailbox.sync' AND p.subject_id = u.id LEFT JOIN aliases o ON o.id = t.target_alias_id WHERE a.deleted_at IS NULL AND (t.address IS NOT NULL OR (o.id IS NOT NULL AND o.deleted_at IS NULL) OR (p.stands = 1 AND u.state IN ('active', 'suspended'))) AND d.kind = 'primary' AND a.kind = 'send_as'"
    )
    op.execute(
        "CREATE VIEW postfix_virtual_aliases AS SELECT a.address, COALESCE(t.address, o.address, u.address) AS destination FROM aliases a JOIN domains d ON d.id = a.domain_id JOIN alias_destinations t ON t.alias_id = a.id LEFT JOIN users u ON u.id = t.user_id LEFT JOIN applied p ON p.host = u.host AND p.kind = 'mailbox.sync' AND p.subject_id = u.id LEFT JOIN aliases o ON o.id = t.target_alias_id WHERE a.deleted_at IS NULL AND (t.address IS NOT NULL OR (o.id IS NOT NULL AND o.deleted_at IS NULL) OR (p.stands = 1 AND u.state IN ('active', 'suspended'))) AND d.kind = 'virtual'"
    )
    op.execute("CREATE VIEW postfix_own_domains AS SELECT name FROM domains WHERE kind IN ('primary', 'virtual')")
    op.execute(
        "CREATE VIEW postfix_senders AS SELECT u.address, u.address AS login FROM users u JOIN applied a ON a.host = u.host AND a.kind = 'mailbox.sync' AND a.subject_id = u.id AND a.stands = 1 WHERE u.state = 'active' UNION ALL SELECT s.address, u.address AS login FROM sender_rules r JOIN aliases s ON s.id = r.alias_id AND s.deleted_at IS NULL AND s.kind = 'send_as' JOIN users u ON u.id = r.user_id JOIN applied a ON a.host = u.host AND a.kind = 'mailbox.sync' AND a.subject_id = u.id AND a.stands = 1 WHERE u.state = 'active'"
    )
    op.execute(
        "CREATE VIEW postfix_logins AS SELECT u.address AS login, u.host FROM users u JOIN applied a ON a.host = u.host AND a.kind = 'mailbox.sync' AND a.subject_id = u.id AND a.stands = 1 WHERE u.state = 'active'"
    )
    op.execute(
        "CREATE VIEW policy_senders AS SELECT u.address, u.address AS login FROM users u JOIN applied a ON a.host = u.host AND a.kind = 'mailbox.sync' AND a.subject_id = u.id AND a.stands = 1 WHERE u.state = 'active' UNION ALL SELECT s.address, u.address AS login FROM sender_rules r JOIN aliases s ON s.id = r.alias_id AND s.deleted_at IS NULL AND s.kind = 'send_as' JOIN users u ON u.id = r.user_id JOIN applied a ON a.host = u.host AND a.kind = 'mailbox.sync' AND a.subject_id = u.id AND a.stands = 1 WHERE u.state = 'active'"
    )
    op.execute(
        "CREATE VIEW policy_logins AS SELECT u.address AS login, u.host, u.send_limit FROM users u JOIN applied a ON a.host = u.host AND a.kind = 'mailbox.sync' AND a.subject_id = u.id AND a.stands = 1 WHERE u.state = 'active'"
    )
    # An adopted home keeps a gid of its own.
    sqlite = op.get_bind().dialect.name == "sqlite"
    if sqlite:
        uid = "json_extract(a.result, '$.uid')"
        gid = "COALESCE(json_extract(a.result, '$.gid'), json_extract(a.result, '$.uid'))"
        home = "json_extract(a.result, '$.home')"
    else:
        uid = "CAST(JSON_VALUE(a.result, '$.uid') AS UNSIGNED)"
        gid = "CAST(COALESCE(JSON_VALUE(a.result, '$.gid'), JSON_VALUE(a.result, '$.uid')) AS UNSIGNED)"
        home = "JSON_VALUE(a.result, '$.home')"
    op.execute("DROP VIEW dovecot_users")
    op.execute(
        f"CREATE VIEW dovecot_users AS SELECT u.address, u.host, {uid} AS uid, {gid} AS gid, {home} AS home, u.quota_bytes FROM users u JOIN applied a ON a.host = u.host AND a.kind = 'mailbox.sync' AND a.subject_id = u.id AND a.stands = 1 WHERE u.state IN ('active', 'suspended')"
    )
