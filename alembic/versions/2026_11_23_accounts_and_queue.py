"""Domains, hosts, accounts, the queue, and the views that the mail programs read.

Revision: 2026_11_23_accounts, the first.
"""

import sqlalchemy as sa

from alembic import op
from app.models.columns import TABLE, Timestamp, ascii_string, big_integer, text_string

revision = "2026_11_23_accounts"
down_revision = None
branch_labels = None
depends_on = None

UNNUMBERED = {**TABLE, "sqlite_autoincrement": False}


def upgrade() -> None:
    op.create_table(
        "addresses",
        sa.Column("address", ascii_string(254), nullable=False),
        sa.Column("kind", ascii_string(16), nullable=False),
        sa.Column("subject_id", big_integer(), nullable=False),
        sa.CheckConstraint("kind IN ('user', 'alias', 'tombstone')", name="kind"),
        sa.PrimaryKeyConstraint("address"),
        **UNNUMBERED,
    )
    op.create_table(
        "applied",
        sa.Column("host", ascii_string(64), nullable=False),
        sa.Column("kind", ascii_string(32), nullable=False),
        sa.Column("subject_id", big_integer(), autoincrement=False, nullable=False),
        sa.Column("version", sa.Integer(), nullable=False),
        sa.Column("stands", sa.Boolean(), nullable=False),
        sa.Column("revision", sa.Integer(), nullable=False),
        sa.Column("proofs", sa.JSON(), nullable=False),
        sa.Column("result", sa.JSON(), nullable=False),
        sa.Column("applied_at", Timestamp(), nullable=False),
        sa.PrimaryKeyConstraint("host", "kind", "subject_id"),
        **UNNUMBERED,
    )
    op.create_table(
        "audit_events",
        sa.Column("id", big_integer(), autoincrement=True, nullable=False),
        sa.Column("at", Timestamp(), nullable=False),
        sa.Column("principal_id", ascii_string(40), nullable=False),
        sa.Column("client_address", ascii_string(45), nullable=False),
        sa.Column("request_id", ascii_string(64), nullable=False),
        sa.Column("action", ascii_string(32), nullable=False),
        sa.Column("subject_kind", ascii_string(16), nullable=False),
        sa.Column("subject_id", ascii_string(254), nullable=False),
        sa.Column("before", sa.JSON(none_as_null=True), nullable=True),
        sa.Column("after", sa.JSON(none_as_null=True), nullable=True),
        sa.PrimaryKeyConstraint("id"),
        **TABLE,
    )
    op.create_index("ix_audit_events_at", "audit_events", ["at"])
    op.create_index("ix_audit_events_subject_kind_subject_id", "audit_events", ["subject_kind", "subject_id"])

    op.create_table(
        "domains",
        sa.Column("id", big_integer(), autoincrement=True, nullable=False),
        sa.Column("name", ascii_string(253), nullable=False),
        sa.Column("kind", ascii_string(16), nullable=False),
        sa.Column("primary_slot", sa.SmallInteger(), nullable=True),
        sa.Column("version", sa.Integer(), nullable=False),
        sa.Column("created_at", Timestamp(), nullable=False),
        sa.Column("updated_at", Timestamp(), nullable=False),
        sa.CheckConstraint("(kind = 'primary') = (primary_slot IS NOT NULL)", name="primary_slot"),
        sa.CheckConstraint("kind IN ('primary', 'virtual', 'relay')", name="kind"),
        sa.CheckConstraint("primary_slot = 1", name="primary_slot_is_1"),
        sa.PrimaryKeyConstraint("id"),
        sa.UniqueConstraint("name", name="uq_domains_name"),
        sa.UniqueConstraint("primary_slot", name="uq_domains_primary_slot"),
        **TABLE,
    )
    op.create_table(
        "host_status",
        sa.Column("host", ascii_string(64), nullable=False),
        sa.Column("heartbeat_at", Timestamp(), nullable=False),
        sa.Column("started_at", Timestamp(), nullable=False),
        sa.Column("release", text_string(64), nullable=False),
        sa.Column("swept_at", Timestamp(), nullable=True),
        sa.Column("sweep", sa.JSON(none_as_null=True), nullable=True),
        sa.PrimaryKeyConstraint("host"),
        **UNNUMBERED,
    )
    op.create_table(
        "hosts",
        sa.Column("name", ascii_string(64), nullable=False),
        sa.Column("enabled", sa.Boolean(), nullable=False),
        sa.Column("settings", sa.JSON(), nullable=False),
        sa.Column("version", sa.Integer(), nullable=False),
        sa.Column("created_at", Timestamp(), nullable=False),
        sa.Column("updated_at", Timestamp(), nullable=False),
        sa.CheckConstraint("name <> '-'", name="name"),
        sa.PrimaryKeyConstraint("name"),
        **UNNUMBERED,
    )
    op.create_table(
        "idempotency_keys",
        sa.Column("principal_id", ascii_string(40), nullable=False),
        sa.Column("key", ascii_string(128), nullable=False),
        sa.Column("request_hash", ascii_string(64), nullable=False),
        sa.Column("subject_id", big_integer(), nullable=True),
        sa.Column("subject_name", ascii_string(254), nullable=True),
        sa.Column("created_at", Timestamp(), nullable=False),
        sa.PrimaryKeyConstraint("principal_id", "key"),
        **UNNUMBERED,
    )
    op.create_index("ix_idempotency_keys_created_at", "idempotency_keys", ["created_at"])

    op.create_table(
        "jobs",
        sa.Column("id", big_integer(), autoincrement=True, nullable=False),
        sa.Column("host", ascii_string(64), nullable=False),
        sa.Column("lane", ascii_string(254), nullable=False),
        sa.Column("kind", ascii_string(32), nullable=False),
        sa.Column("subject_id", big_integer(), nullable=False),
        sa.Column("version", sa.Integer(), nullable=False),
        sa.Column("request_id", ascii_string(64), nullable=False),
        sa.Column("state", ascii_string(16), server_default=sa.text("'ready'"), nullable=False),
        sa.Column("run_at", Timestamp(), nullable=False),
        sa.Column("attempts", sa.Integer(), server_default=sa.text("0"), nullable=False),
        sa.Column("fence", sa.Integer(), server_default=sa.text("0"), nullable=False),
        sa.Column("lease_until", Timestamp(), nullable=True),
        sa.Column("running_lane", ascii_string(254), nullable=True),
        sa.Column("error", text_string(1000), nullable=True),
        sa.Column("created_at", Timestamp(), nullable=False),
        sa.Column("finished_at", Timestamp(), nullable=True),
        sa.CheckConstraint("(state = 'running') = (running_lane IS NOT NULL)", name="running_lane"),
        sa.CheckConstraint("state IN ('ready', 'running', 'done', 'dead', 'superseded')", name="state"),
        sa.PrimaryKeyConstraint("id"),
        sa.UniqueConstraint("host", "running_lane", name="uq_jobs_host_running_lane"),
        **TABLE,
    )
    op.create_index("ix_jobs_finished_at", "jobs", ["finished_at"])
    op.create_index("ix_jobs_host_kind_subject_id", "jobs", ["host", "kind", "subject_id"])
    op.create_index("ix_jobs_host_state_run_at", "jobs", ["host", "state", "run_at"])

    op.create_table(
        "principals",
        sa.Column("id", ascii_string(40), nullable=False),
        sa.Column("name", text_string(100), nullable=False),
        sa.Column("role", ascii_string(16), nullable=False),
        sa.Column("permissions", sa.JSON(none_as_null=True), nullable=True),
        sa.Column("secret_hash", ascii_string(64), nullable=False),
        sa.Column("version", sa.Integer(), nullable=False),
        sa.Column("state", ascii_string(16), nullable=False),
        sa.Column("created_at", Timestamp(), nullable=False),
        sa.Column("updated_at", Timestamp(), nullable=False),
        sa.CheckConstraint("role IN ('primary')", name="role"),
        sa.CheckConstraint("state IN ('active', 'disabled')", name="state"),
        sa.PrimaryKeyConstraint("id"),
        sa.UniqueConstraint("name", name="uq_principals_name"),
        **UNNUMBERED,
    )
    op.create_table(
        "users",
        sa.Column("id", big_integer(), autoincrement=True, nullable=False),
        sa.Column("address", ascii_string(254), nullable=False),
        sa.Column("local_part", ascii_string(64), nullable=False),
        sa.Column("domain_id", big_integer(), nullable=False),
        sa.Column("host", ascii_string(64), nullable=False),
        sa.Column("display_name", text_string(200), nullable=False),
        sa.Column("contact_address", ascii_string(254), nullable=True),
        sa.Column("external_id", text_string(128), nullable=True),
        sa.Column("quota_bytes", big_integer(), nullable=True),
        sa.Column("state", ascii_string(16), nullable=False),
        sa.Column("state_before", ascii_string(16), nullable=True),
        sa.Column("suspended_reason", text_string(200), nullable=True),
        sa.Column("password_hash", ascii_string(500), nullable=True),
        sa.Column("access_ended_at", Timestamp(), nullable=True),
        sa.Column("version", sa.Integer(), nullable=False),
        sa.Column("created_at", Timestamp(), nullable=False),
        sa.Column("updated_at", Timestamp(), nullable=False),
        sa.Column("deleted_at", Timestamp(), nullable=True),
        sa.Column("purge_at", Timestamp(), nullable=True),
        sa.Column("purged_at", Timestamp(), nullable=True),
        sa.CheckConstraint("(state = 'deleted') = (deleted_at IS NOT NULL)", name="deleted_at"),
        sa.CheckConstraint("(state = 'deleted') = (state_before IS NOT NULL)", name="state_before"),
        sa.CheckConstraint("purged_at IS NULL OR state = 'deleted'", name="purged_at"),
        sa.CheckConstraint("state IN ('active', 'suspended', 'deleted')", name="state"),
        sa.ForeignKeyConstraint(["domain_id"], ["domains.id"], name="fk_users_domain_id"),
        sa.ForeignKeyConstraint(["host"], ["hosts.name"], name="fk_users_host"),
        sa.PrimaryKeyConstraint("id"),
        sa.UniqueConstraint("external_id", name="uq_users_external_id"),
        **TABLE,
    )
    op.create_index("ix_users_address", "users", ["address"])
    op.create_index("ix_users_domain_id_id", "users", ["domain_id", "id"])
    op.create_index("ix_users_host", "users", ["host"])
    op.create_index("ix_users_purge_at", "users", ["purge_at"])
    sqlite = op.get_bind().dialect.name == "sqlite"
    uid = "json_extract(a.result, '$.uid')" if sqlite else "CAST(JSON_VALUE(a.result, '$.uid') AS UNSIGNED)"
    home = "json_extract(a.result, '$.home')" if sqlite else "JSON_VALUE(a.result, '$.home')"
    stands = "JOIN applied a ON a.host = u.host AND a.kind = 'mailbox.sync' AND a.subject_id = u.id AND a.stands = 1"
    op.execute(
        "CREATE VIEW worker_users AS SELECT u.id, u.address, u.local_part, d.name AS domain, d.kind AS domain_kind, u.host, u.state, u.version, u.quota_bytes, u.access_ended_at, u.deleted_at, u.purged_at"
        " FROM users u JOIN domains d ON d.id = u.domain_id"
    )
    op.execute(
        "CREATE VIEW service_users AS SELECT id, address, local_part, domain_id, host, display_name, contact_address, external_id, quota_bytes, state, state_before, suspended_reason, access_ended_at, version, created_at, updated_at, deleted_at, purge_at, purged_at"
        " FROM users"
    )
    op.execute("CREATE VIEW service_purged AS SELECT id, password_hash FROM users WHERE purged_at IS NOT NULL")
    op.execute("CREATE VIEW postfix_virtual_domains AS SELECT name FROM domains WHERE kind = 'virtual'")
    op.execute(
        f"CREATE VIEW postfix_recipients AS SELECT u.address, u.host"
        f" FROM users u {stands}"
        f" WHERE u.state IN ('active', 'suspended')"
    )
    op.execute(
        f"CREATE VIEW dovecot_users AS SELECT u.address, u.host, {uid} AS uid, {uid} AS gid, {home} AS home, u.quota_bytes"
        f" FROM users u {stands}"
        f" WHERE u.state IN ('active', 'suspended')"
    )
    op.execute(
        f"CREATE VIEW dovecot_passwords AS SELECT u.address, u.host, u.password_hash AS password"
        f" FROM users u {stands}"
        f" WHERE u.state = 'active' AND u.password_hash IS NOT NULL"
    )
