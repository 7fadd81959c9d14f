"""Roles, keys of principals, password resets and their mail, app passwords, login failures, the chain over the audit trail.

Revision: 2026_11_24_access, after 2026_11_23_aliases.
"""

import sqlalchemy as sa

from alembic import op
from app.models.columns import TABLE, Timestamp, ascii_string, big_integer, text_string

revision = "2026_11_24_access"
down_revision = "2026_11_23_aliases"
branch_labels = None
depends_on = None

UNNUMBERED = {**TABLE, "sqlite_autoincrement": False}


def upgrade() -> None:
    op.add_column("users", sa.Column("locked_at", Timestamp(), nullable=True))
    op.add_column("users", sa.Column("locked_from", ascii_string(16), nullable=True))
    op.add_column("audit_events", sa.Column("key_id", big_integer(), nullable=True))
    op.add_column("audit_events", sa.Column("user_id", big_integer(), nullable=True))
    op.add_column(
        "audit_events",
        sa.Column("outcome", ascii_string(16), server_default=sa.text("'accepted'"), nullable=False),
    )
    op.add_column("audit_events", sa.Column("problem", ascii_string(64), nullable=True))
    op.drop_index("ix_audit_events_subject_kind_subject_id", "audit_events")
    op.create_index("ix_audit_events_subject_kind_subject_id_at", "audit_events", ["subject_kind", "subject_id", "at"])
    for column in ("action", "outcome", "principal_id", "user_id"):
        op.create_index(f"ix_audit_events_{column}_at", "audit_events", [column, "at"])
    op.create_index("ix_audit_events_request_id", "audit_events", ["request_id"])
    op.add_column("domains", sa.Column("alias_changes", sa.Integer(), server_default=sa.text("0"), nullable=False))

    with op.batch_alter_table("principals") as table:
        table.drop_constraint(op.f("ck_principals_role"), type_="check")
        table.create_check_constraint(
            "role", "role IN ('primary', 'secondary', 'limited', 'auditor', 'website', 'webmail')"
        )
        table.add_column(sa.Column("networks", sa.JSON(none_as_null=True), nullable=True))
        table.add_column(sa.Column("user_id", big_integer(), nullable=True))
        table.add_column(sa.Column("expires_at", Timestamp(), nullable=True))
        table.alter_column("secret_hash", existing_type=ascii_string(64), nullable=True)
        table.create_foreign_key("fk_principals_user_id", "users", ["user_id"], ["id"])
    op.create_index("ix_principals_user_id", "principals", ["user_id"])
    op.create_table(
        "principal_keys",
        sa.Column("id", big_integer(), autoincrement=True, nullable=False),
        sa.Column("principal_id", ascii_string(40), nullable=False),
        sa.Column("kind", ascii_string(16), nullable=False),
        sa.Column("hash", ascii_string(64), nullable=False),
        sa.Column("created_at", Timestamp(), nullable=False),
        sa.Column("ends_at", Timestamp(), nullable=True),
        sa.CheckConstraint("kind IN ('secret', 'certificate')", name="kind"),
        sa.ForeignKeyConstraint(["principal_id"], ["principals.id"]),
        sa.PrimaryKeyConstraint("id"),
        sa.UniqueConstraint("hash", name="uq_principal_keys_hash"),
        **TABLE,
    )
    op.create_index("ix_principal_keys_principal_id", "principal_keys", ["principal_id"])
    op.execute(
        "INSERT INTO principal_keys (principal_id, kind, hash, created_at)"
        " SELECT id, 'secret', secret_hash, created_at FROM principals"
    )

    op.create_table(
        "password_resets",
        sa.Column("id", big_integer(), autoincrement=False, nullable=False),
        sa.Column("user_id", big_integer(), nullable=True),
        sa.Column("kind", ascii_string(16), nullable=False),
        sa.Column("deliver", ascii_string(16), nullable=False),
        sa.Column("token_hash", ascii_string(64), nullable=False),
        sa.Column("reason", text_string(200), nullable=True),
        sa.Column("principal_id", ascii_string(40), nullable=False),
        sa.Column("created_at", Timestamp(), nullable=False),
        sa.Column("expires_at", Timestamp(), nullable=False),
        sa.Column("used_at", Timestamp(), nullable=True),
        sa.Column("cancelled_at", Timestamp(), nullable=True),
        sa.CheckConstraint("deliver IN ('mail', 'show')", name="deliver"),
        sa.CheckConstraint("kind IN ('reset', 'invitation')", name="kind"),
        sa.ForeignKeyConstraint(["user_id"], ["users.id"]),
        sa.PrimaryKeyConstraint("id"),
        sa.UniqueConstraint("token_hash", name="uq_password_resets_token_hash"),
        **UNNUMBERED,
    )
    op.create_index("ix_password_resets_created_at", "password_resets", ["created_at"])
    op.create_index("ix_password_resets_user_id", "password_resets", ["user_id"])
    op.create_table(
        "notices",
        sa.Column("id", big_integer(), autoincrement=True, nullable=False),
        sa.Column("user_id", big_integer(), nullable=True),
        sa.Column("reset_id", big_integer(), nullable=True),
        sa.Column("kind", ascii_string(24), nullable=False),
        sa.Column("recipient", ascii_string(254), nullable=True),
        sa.Column("details", sa.JSON(none_as_null=True), nullable=True),
        sa.Column("created_at", Timestamp(), nullable=False),
        sa.Column("sent_at", Timestamp(), nullable=True),
        sa.Column("bounced_at", Timestamp(), nullable=True),
        sa.Column("bounce", text_string(200), nullable=True),
        sa.CheckConstraint(
            "kind IN ('invitation', 'reset', 'reset_shown', 'password_changed', 'locked', 'unlocked')", name="kind"
        ),
        sa.ForeignKeyConstraint(["reset_id"], ["password_resets.id"]),
        sa.ForeignKeyConstraint(["user_id"], ["users.id"]),
        sa.PrimaryKeyConstraint("id"),
        **TABLE,
    )
    for column in ("created_at", "reset_id", "user_id"):
        op.create_index(f"ix_notices_{column}", "notices", [column])
    op.create_table(
        "app_passwords",
        sa.Column("id", big_integer(), autoincrement=True, nullable=False),
        sa.Column("user_id", big_integer(), nullable=False),
        sa.Column("name", text_string(100), nullable=False),
        sa.Column("secret_hash", ascii_string(64), nullable=False),
        sa.Column("imap", sa.Boolean(), nullable=False),
        sa.Column("pop3", sa.Boolean(), nullable=False),
        sa.Column("smtp", sa.Boolean(), nullable=False),
        sa.Column("sieve", sa.Boolean(), nullable=False),
        sa.Column("created_at", Timestamp(), nullable=False),
        sa.Column("revoked_at", Timestamp(), nullable=True),
        sa.Column("last_used_at", Timestamp(), nullable=True),
        sa.Column("last_used_from", ascii_string(45), nullable=True),
        sa.ForeignKeyConstraint(["user_id"], ["users.id"]),
        sa.PrimaryKeyConstraint("id"),
        sa.UniqueConstraint("secret_hash", name="uq_app_passwords_secret_hash"),
        **TABLE,
    )
    op.create_index("ix_app_passwords_user_id", "app_passwords", ["user_id"])
    op.create_table(
        "login_failures",
        sa.Column("id", big_integer(), autoincrement=True, nullable=False),
        sa.Column("kind", ascii_string(8), nullable=False),
        sa.Column("login", ascii_string(254), nullable=False),
        sa.Column("network", ascii_string(43), nullable=False),
        sa.Column("guess", ascii_string(64), nullable=False),
        sa.Column("attempts", sa.Integer(), nullable=False),
        sa.Column("first_at", Timestamp(), nullable=False),
        sa.Column("last_at", Timestamp(), nullable=False),
        sa.CheckConstraint("kind IN ('mail', 'api', 'reset')", name="kind"),
        sa.PrimaryKeyConstraint("id"),
        sa.UniqueConstraint("kind", "login", "network", "guess", name="uq_login_failures_guess"),
        **TABLE,
    )
    op.create_index("ix_login_failures_last_at", "login_failures", ["last_at"])
    op.create_index("ix_login_failures_network_last_at", "login_failures", ["network", "last_at"])
    op.create_table(
        "audit_chain",
        sa.Column("sequence", big_integer(), autoincrement=False, nullable=False),
        sa.Column("event_id", big_integer(), nullable=False),
        sa.Column("previous_hash", ascii_string(64), nullable=False),
        sa.Column("hash", ascii_string(64), nullable=False),
        sa.Column("chained_at", Timestamp(), nullable=False),
        sa.PrimaryKeyConstraint("sequence"),
        sa.UniqueConstraint("event_id", name="uq_audit_chain_event_id"),
        **UNNUMBERED,
    )

    sqlite = op.get_bind().dialect.name == "sqlite"
    ended, flushed = (
        f"json_extract(a.result, '$.{name}')" if sqlite else f"JSON_VALUE(a.result, '$.{name}')"
        for name in ("access_ended_at", "flushed_at")
    )
    op.execute("DROP VIEW service_users")
    op.execute(
        "CREATE VIEW service_users AS SELECT id, address, local_part, domain_id, host, display_name, contact_address, external_id, quota_bytes, send_limit, state, state_before, suspended_reason, access_ended_at, locked_at, locked_from, version, created_at, updated_at, deleted_at, purge_at, purged_at FROM users"
    )
    op.execute("DROP VIEW worker_users")
    op.execute(
        "CREATE VIEW worker_users AS SELECT u.id, u.address, u.local_part, d.name AS domain, d.kind AS domain_kind, u.host, u.state, u.version, u.quota_bytes, u.access_ended_at, u.locked_at, u.deleted_at, u.purged_at FROM users u JOIN domains d ON d.id = u.domain_id"
    )
    op.execute("DROP VIEW policy_logins")
    op.execute(
        f"CREATE VIEW policy_logins AS SELECT u.address AS login, u.host, u.send_limit, u.access_ended_at, {ended} AS ended_at, {flushed} AS flushed_at FROM users u JOIN applied a ON a.host = u.host AND a.kind = 'mailbox.sync' AND a.subject_id = u.id AND a.stands = 1 WHERE u.state = 'active'"
    )
    uid, gid, home = (
        (f"json_extract(a.result, '$.{name}')" if sqlite else f"JSON_VALUE(a.result, '$.{name}')")
        for name in ("uid", "gid", "home")
    )
    gid = f"COALESCE({gid}, {uid})"
    if not sqlite:
        uid, gid = f"CAST({uid} AS UNSIGNED)", f"CAST({gid} AS UNSIGNED)"
    op.execute("DROP VIEW dovecot_users")
    op.execute(
        f"CREATE VIEW dovecot_users AS SELECT u.address, u.host, {uid} AS uid, {gid} AS gid, {home} AS home, u.quota_bytes, COALESCE(CAST(u.access_ended_at AS CHAR), 'never') AS access FROM users u JOIN applied a ON a.host = u.host AND a.kind = 'mailbox.sync' AND a.subject_id = u.id AND a.stands = 1 WHERE u.state IN ('active', 'suspended')"
    )
    op.execute("DROP VIEW dovecot_passwords")
    op.execute(
        "CREATE VIEW dovecot_passwords AS SELECT u.address, u.host, u.password_hash AS password, COALESCE(CAST(u.access_ended_at AS CHAR), 'never') AS access FROM users u JOIN applied a ON a.host = u.host AND a.kind = 'mailbox.sync' AND a.subject_id = u.id AND a.stands = 1 WHERE u.state = 'active' AND u.password_hash IS NOT NULL"
    )
    op.execute(
        "CREATE VIEW dovecot_app_passwords AS SELECT p.id, u.address, u.host, p.secret_hash, p.imap, p.pop3, p.smtp, p.sieve, COALESCE(CAST(u.access_ended_at AS CHAR), 'never') AS access FROM app_passwords p JOIN users u ON u.id = p.user_id JOIN applied a ON a.host = u.host AND a.kind = 'mailbox.sync' AND a.subject_id = u.id AND a.stands = 1 WHERE p.revoked_at IS NULL AND u.state = 'active'"
    )
