"""deploy/mariadb/grants.sql against what is written here: each user, table, verb and column, in both directions.

A statement is refused for lack of a grant before it does anything; those that are allowed change nothing either, for
their condition is false. What an allowed verb does to rows is tested where the processes are.
"""

import re
import subprocess
from collections.abc import Iterator

import pytest

from tests.stack.mariadb import GRANTS, OWNER, USERS, MariaDB

NEW_JOB = "host lane kind subject_id version request_id run_at created_at"
PROGRESS = "state run_at attempts fence lease_until running_lane error finished_at"
PURGE = "display_name contact_address external_id suspended_reason version updated_at purged_at"

# What is not written here is refused. "all" means all columns.
ALLOWED: dict[str, dict[str, dict[str, str]]] = {
    "api": {
        "domains": {"SELECT": "all", "INSERT": "all", "UPDATE": "all", "DELETE": "all"},
        "hosts": {"SELECT": "all", "INSERT": "all", "UPDATE": "all", "DELETE": "all"},
        "dkim_keys": {"SELECT": "all", "INSERT": "all", "UPDATE": "all"},
        "domain_senders": {"SELECT": "all", "INSERT": "all", "DELETE": "all"},
        "dns_checks": {"SELECT": "all"},
        "addresses": {"SELECT": "all", "INSERT": "all", "UPDATE": "all", "DELETE": "all"},
        "aliases": {"SELECT": "all", "INSERT": "all", "UPDATE": "all"},
        "alias_destinations": {"SELECT": "all", "INSERT": "all", "UPDATE": "all", "DELETE": "all"},
        "sender_rules": {"SELECT": "all", "INSERT": "all", "DELETE": "all"},
        "postfix_senders": {"SELECT": "all"},
        "users": {"SELECT": "all", "INSERT": "all", "UPDATE": "all"},
        "principals": {"SELECT": "all", "INSERT": "all", "UPDATE": "all"},
        "principal_keys": {"SELECT": "all", "INSERT": "all", "UPDATE": "ends_at"},
        "password_resets": {"SELECT": "all", "INSERT": "all", "UPDATE": "used_at cancelled_at"},
        "notices": {"SELECT": "all", "INSERT": "all"},
        "app_passwords": {"SELECT": "all", "INSERT": "all", "UPDATE": "revoked_at last_used_at last_used_from"},
        "login_failures": {"SELECT": "all", "INSERT": "all", "UPDATE": "all", "DELETE": "all"},
        "audit_chain": {"SELECT": "all"},
        "applied": {"SELECT": "all"},
        "host_status": {"SELECT": "all"},
        "jobs": {"SELECT": "all", "INSERT": NEW_JOB},
        "audit_events": {"SELECT": "all", "INSERT": "all"},
        "idempotency_keys": {"SELECT": "all", "INSERT": "all", "UPDATE": "subject_id subject_name"},
        "alembic_version": {"SELECT": "all"},
    },
    "worker": {
        "worker_users": {"SELECT": "all"},
        "worker_aliases": {"SELECT": "all"},
        "worker_alias_destinations": {"SELECT": "all"},
        "worker_dkim_keys": {"SELECT": "all"},
        "domains": {"SELECT": "all"},
        "hosts": {"SELECT": "all"},
        "jobs": {"SELECT": "all", "UPDATE": PROGRESS},
        "applied": {"SELECT": "all", "INSERT": "all", "UPDATE": "all"},
        "host_status": {"SELECT": "all", "INSERT": "all", "UPDATE": "all"},
        "alembic_version": {"SELECT": "all"},
    },
    "service": {
        "jobs": {"SELECT": "all", "INSERT": NEW_JOB, "UPDATE": PROGRESS, "DELETE": "all"},
        "service_users": {"SELECT": "all", "UPDATE": PURGE},
        "service_purged": {"SELECT": "id", "UPDATE": "password_hash"},
        "dkim_keys": {"SELECT": "all", "INSERT": "all", "UPDATE": "all"},
        "domain_senders": {"SELECT": "all"},
        "dns_checks": {"SELECT": "all", "INSERT": "all", "UPDATE": "all"},
        "domains": {"SELECT": "all"},
        "hosts": {"SELECT": "all"},
        "addresses": {"SELECT": "all"},
        "applied": {"SELECT": "all"},
        "host_status": {"SELECT": "all"},
        "audit_events": {"SELECT": "all", "INSERT": "all"},
        "audit_chain": {"SELECT": "all", "INSERT": "all"},
        "password_resets": {"SELECT": "all", "DELETE": "all"},
        "notices": {"SELECT": "all", "UPDATE": "sent_at bounced_at bounce recipient", "DELETE": "all"},
        "login_failures": {"SELECT": "all", "DELETE": "all"},
        "idempotency_keys": {"SELECT": "all", "DELETE": "all"},
        "alembic_version": {"SELECT": "all"},
    },
    "policy": {
        "policy_senders": {"SELECT": "all"},
        "policy_logins": {"SELECT": "all"},
        "alembic_version": {"SELECT": "all"},
    },
    "postfix": {
        "postfix_recipients": {"SELECT": "all"},
        "postfix_virtual_domains": {"SELECT": "all"},
        "postfix_local_aliases": {"SELECT": "all"},
        "postfix_virtual_aliases": {"SELECT": "all"},
        "postfix_own_domains": {"SELECT": "all"},
        "postfix_senders": {"SELECT": "all"},
        "postfix_logins": {"SELECT": "all"},
    },
    "dovecot": {
        "dovecot_users": {"SELECT": "all"},
        "dovecot_passwords": {"SELECT": "all"},
        "dovecot_app_passwords": {"SELECT": "all"},
    },
}

# table access, column access, database access, "you need the privilege", routine access
REFUSED = {"1142", "1143", "1044", "1227", "1370"}


@pytest.fixture(scope="module")
def columns(mariadb: MariaDB) -> dict[str, list[str]]:
    """Of every table and view."""
    rows = mariadb.sql(
        "SELECT table_name, column_name FROM information_schema.columns WHERE table_schema = DATABASE()"
        " ORDER BY table_name, ordinal_position",
        OWNER,
    )
    found: dict[str, list[str]] = {}
    for table, column in rows:
        found.setdefault(table, []).append(column)
    return found


def errors(mariadb: MariaDB, user: str, statements: list[str]) -> list[str | None]:
    """The number of each statement's error. One connection for all."""
    assert not any("\n" in statement for statement in statements)
    argv = [*mariadb.client(user), "--force", "cacertusers"]
    text = "".join(f"{statement};\n" for statement in statements)
    done = subprocess.run(argv, input=text, capture_output=True, text=True, check=False)
    by_line = {
        int(line): code for code, line in re.findall(r"^ERROR (\d+) .*? at line (\d+):", done.stderr, re.MULTILINE)
    }
    assert done.stderr.count("ERROR") == len(by_line), done.stderr
    return [by_line.get(line) for line in range(1, len(statements) + 1)]


def _statements(table: str, column: str) -> dict[str, str]:
    return {
        "SELECT": f"SELECT `{column}` FROM {table} LIMIT 0",
        "INSERT": f"INSERT INTO {table} (`{column}`) SELECT 1 FROM DUAL WHERE FALSE",
        "UPDATE": f"UPDATE {table} SET `{column}` = NULL WHERE FALSE",
        "DELETE": f"DELETE FROM {table} WHERE FALSE",
    }


def test_every_table_is_written_down(columns: dict[str, list[str]]) -> None:
    named = {table for tables in ALLOWED.values() for table in tables}
    assert named == set(columns), "a new table or view: say here who may do what with it"


@pytest.mark.parametrize("user", USERS)
def test_each_verb_on_each_column(mariadb: MariaDB, columns: dict[str, list[str]], user: str) -> None:
    asked = [
        (table, verb, column, statement)
        for table, names in columns.items()
        for column in names
        for verb, statement in _statements(table, column).items()
    ]
    wrong = []
    answers = errors(mariadb, user, [statement for *_, statement in asked])
    for (table, verb, column, statement), error in zip(asked, answers, strict=True):
        granted = ALLOWED[user].get(table, {}).get(verb, "")
        allowed = granted == "all" or column in granted.split()
        # 1364, a column without a default, comes after the grants have been looked at; so does 1048, not null.
        if (allowed and error not in (None, "1364", "1048")) or (not allowed and error not in REFUSED):
            wrong.append(f"{statement}: {'allowed' if allowed else 'refused'}, but {error or 'it worked'}")
    assert wrong == []


@pytest.mark.parametrize("user", USERS)
def test_allowed_statements_work_whole(mariadb: MariaDB, columns: dict[str, list[str]], user: str) -> None:
    """All granted columns in one statement, with the condition that such a statement has."""
    statements = []
    for table, verbs in ALLOWED[user].items():
        for verb, granted in verbs.items():
            names = columns[table] if granted == "all" else granted.split()
            listed = ", ".join(f"`{name}`" for name in names)
            nulls = ", ".join(f"`{name}` = NULL" for name in names)
            ones = ", ".join("1" * len(names))
            key = columns[table][0]
            statements.append(
                {
                    "SELECT": f"SELECT {listed} FROM {table} WHERE `{key}` = '1' FOR UPDATE"
                    if "UPDATE" in verbs
                    else f"SELECT {listed} FROM {table} WHERE `{key}` = '1'",
                    "INSERT": f"INSERT INTO {table} ({listed}) SELECT {ones} FROM DUAL WHERE FALSE",
                    "UPDATE": f"UPDATE {table} SET {nulls} WHERE `{key}` = 'x'",
                    "DELETE": f"DELETE FROM {table} WHERE `{key}` = 'x'",
                }[verb]
            )
    answers = errors(mariadb, user, statements)
    assert [(s, e) for s, e in zip(statements, answers, strict=True) if e] == []


@pytest.mark.parametrize("user", USERS)
def test_nothing_else(mariadb: MariaDB, user: str) -> None:
    """No DDL, no administration, no files, no other database, no way to more."""
    statements = [
        "CREATE TABLE mine (a INT)",
        "CREATE TEMPORARY TABLE mine (a INT)",
        "CREATE VIEW mine AS SELECT * FROM jobs",
        "CREATE OR REPLACE VIEW worker_users AS SELECT * FROM users",
        "ALTER TABLE jobs ADD COLUMN more INT",
        "ALTER TABLE applied DROP COLUMN proofs",
        "CREATE INDEX mine ON jobs (error)",
        "CREATE TRIGGER mine BEFORE INSERT ON jobs FOR EACH ROW SET NEW.error = ''",
        "CREATE PROCEDURE mine() SELECT 1",
        "DROP TABLE alembic_version",
        "DROP VIEW worker_users",
        "TRUNCATE audit_events",
        "TRUNCATE jobs",
        "LOCK TABLES jobs WRITE, users WRITE",
        "CREATE DATABASE mine",
        "DROP DATABASE cacertusers",
        "SELECT * FROM mysql.global_priv",
        "CREATE USER mine",
        f"GRANT SELECT ON cacertusers.users TO '{user}'@'%'",
        "SET GLOBAL general_log = 1",
        "SHOW CREATE VIEW dovecot_passwords",
        "SELECT 1 INTO OUTFILE '/tmp/cm-grants'",
        "LOAD DATA INFILE '/etc/passwd' INTO TABLE jobs (error)",
        "SHUTDOWN",
        "KILL 1",
    ]
    answers = errors(mariadb, user, statements)
    accepted = [
        s for s, e in zip(statements, answers, strict=True) if e not in {*REFUSED, "1045", "1094", "1095", "1410"}
    ]
    assert accepted == []
    assert mariadb.sql("SHOW DATABASES", user) == [["cacertusers"], ["information_schema"]]


@pytest.mark.parametrize("user", ["worker", "service", "postfix"])
@pytest.mark.parametrize(
    "statement",
    [
        "SELECT password_hash FROM users",
        "SELECT * FROM users",
        "SELECT 1 FROM users WHERE password_hash LIKE '{%'",
        "SELECT 1 FROM users ORDER BY password_hash",
        "SELECT id FROM users GROUP BY id HAVING MAX(password_hash) > ''",
        "SELECT password FROM dovecot_passwords",
        "SELECT 1 FROM dovecot_passwords",
        "SELECT password_hash FROM worker_users",
        "UPDATE users SET display_name = password_hash",
        "UPDATE service_users SET display_name = password_hash",
        "SELECT password_hash FROM service_purged",
        "SELECT id FROM service_purged WHERE password_hash IS NOT NULL",
        "UPDATE users SET version = 1 WHERE password_hash IS NULL",
        "UPDATE users SET version = 1 ORDER BY password_hash LIMIT 1",
        "UPDATE jobs SET error = (SELECT password_hash FROM users LIMIT 1)",
        "UPDATE jobs, users SET jobs.error = users.password_hash",
        "INSERT INTO applied (host, kind) SELECT password_hash, 'x' FROM users",
        "INSERT INTO audit_events (action) SELECT password FROM dovecot_passwords",
        "DELETE FROM jobs WHERE error = (SELECT password_hash FROM users LIMIT 1) RETURNING error",
        "WITH u AS (SELECT * FROM users) SELECT * FROM u",
        "ANALYZE FORMAT=JSON SELECT password_hash FROM users",
    ],
)
def test_no_way_to_a_password_hash(mariadb: MariaDB, user: str, statement: str) -> None:
    (error,) = errors(mariadb, user, [statement])
    assert error in {*REFUSED, "1054"}, statement


@pytest.mark.parametrize(
    "user",
    [
        "worker",
        "postfix",
        "service",
    ],
)
def test_no_way_to_a_password_hash_by_handler(mariadb: MariaDB, user: str) -> None:
    (error,) = errors(mariadb, user, ["HANDLER users OPEN"])
    assert error in REFUSED


def test_service_can_clear_a_hash_that_it_cannot_read(mariadb: MariaDB) -> None:
    """As a purge does, by id: needs SELECT on `id`, not on the column it clears."""
    statements = [
        "UPDATE service_users SET version = version + 1 WHERE id = 1",
        "UPDATE service_purged SET password_hash = NULL WHERE id = 1",
    ]
    assert errors(mariadb, "service", statements) == [None, None]


def test_view_shows_nothing_of_a_password(columns: dict[str, list[str]]) -> None:
    for view in ("worker_users", "postfix_recipients", "dovecot_users"):
        assert not [name for name in columns[view] if "password" in name or "hash" in name]


@pytest.fixture
def grants_restored(mariadb: MariaDB) -> Iterator[None]:
    yield
    mariadb.apply_grants()


@pytest.mark.usefixtures("grants_restored")
def test_new_users_are_locked(mariadb: MariaDB) -> None:
    mariadb.sql("".join(f"DROP USER '{user}'@'%';" for user in USERS))
    mariadb.sql(GRANTS.read_text())
    for user in USERS:
        mariadb.sql(f"ALTER USER '{user}'@'%' ACCOUNT UNLOCK")
        argv = [option for option in mariadb.client(user) if not option.startswith("--password")]
        done = subprocess.run(argv, input="SELECT 1", capture_output=True, text=True, check=False)
        assert "ERROR 1045" in done.stderr, "unlocked without a password"
        mariadb.sql(f"DROP USER '{user}'@'%'")
    mariadb.sql(GRANTS.read_text())
    for user in USERS:
        mariadb.sql(f"ALTER USER '{user}'@'%' IDENTIFIED BY '{mariadb.passwords[user]}'")
        with pytest.raises(RuntimeError, match="ERROR 4151"):
            mariadb.sql("SELECT 1", user)


@pytest.mark.usefixtures("grants_restored")
def test_second_run_takes_back_what_was_added_and_keeps_passwords(mariadb: MariaDB) -> None:
    before = {user: mariadb.sql(f"SHOW GRANTS FOR '{user}'@'%'") for user in USERS}
    mariadb.sql(
        "GRANT ALL ON *.* TO 'worker'@'%' WITH GRANT OPTION; GRANT ALL ON cacertusers.* TO 'service'@'%';"
        "GRANT UPDATE (state) ON cacertusers.jobs TO 'api'@'%'"
    )
    mariadb.sql(GRANTS.read_text())
    for user in USERS:
        assert sorted(mariadb.sql(f"SHOW GRANTS FOR '{user}'@'%'")) == sorted(before[user])
        assert mariadb.sql("SELECT 1", user) == [["1"]]
