"""Every view that Postfix, Dovecot and the worker read. One view a lookup, so that no configuration holds a join.

SECURITY: loaded by the worker (root). `worker_users` is all that root sees of an account: no password hash.

The mail programs see an account only while it stands (`applied.stands`: the home is in place) and its wanted state allows.
"""

from dataclasses import dataclass

import sqlalchemy as sa

from app.models.users import users


@dataclass(frozen=True, slots=True)
class View:
    name: str
    query: str
    """Runs on both databases. `{home}` and the like differ: SQLite has no JSON_VALUE, MariaDB's JSON_EXTRACT keeps quotes."""

    def select(self, dialect: str) -> str:
        if dialect == "sqlite":
            result = {
                "uid": "json_extract(a.result, '$.uid')",
                "gid": "COALESCE(json_extract(a.result, '$.gid'), json_extract(a.result, '$.uid'))",
                "home": "json_extract(a.result, '$.home')",
                "ended": "json_extract(a.result, '$.access_ended_at')",
                "flushed": "json_extract(a.result, '$.flushed_at')",
            }
        else:
            result = {
                "uid": "CAST(JSON_VALUE(a.result, '$.uid') AS UNSIGNED)",
                "gid": "CAST(COALESCE(JSON_VALUE(a.result, '$.gid'), JSON_VALUE(a.result, '$.uid')) AS UNSIGNED)",
                "home": "JSON_VALUE(a.result, '$.home')",
                "ended": "JSON_VALUE(a.result, '$.access_ended_at')",
                "flushed": "JSON_VALUE(a.result, '$.flushed_at')",
            }
        return self.query.format_map(result)

    def create(self, dialect: str) -> str:
        return f"CREATE VIEW {self.name} AS {self.select(dialect)}"


_STANDS = "JOIN applied a ON a.host = u.host AND a.kind = 'mailbox.sync' AND a.subject_id = u.id AND a.stands = 1"

# Another one each time access is ended: what a login found with the password must still be so when the mailbox is opened.
_ACCESS = "COALESCE(CAST(u.access_ended_at AS CHAR), 'never') AS access"

# Where an alias leads now: to accounts that stand, to aliases that are there, and elsewhere.
_ROUTE = (
    " FROM aliases a JOIN domains d ON d.id = a.domain_id JOIN alias_destinations t ON t.alias_id = a.id"
    " LEFT JOIN users u ON u.id = t.user_id"
    " LEFT JOIN applied p ON p.host = u.host AND p.kind = 'mailbox.sync' AND p.subject_id = u.id"
    " LEFT JOIN aliases o ON o.id = t.target_alias_id"
    " WHERE a.deleted_at IS NULL AND (t.address IS NOT NULL OR (o.id IS NOT NULL AND o.deleted_at IS NULL)"
    " OR (p.stands = 1 AND u.state IN ('active', 'suspended')))"
)
_DESTINATION = "COALESCE(t.address, o.address, u.address) AS destination"

# Everybody as themselves, and the designated as their aliases.
_SENDERS = (
    f"SELECT u.address, u.address AS login FROM users u {_STANDS} WHERE u.state = 'active'"
    " UNION ALL SELECT s.address, u.address AS login FROM sender_rules r"
    " JOIN aliases s ON s.id = r.alias_id AND s.deleted_at IS NULL AND s.kind = 'send_as'"
    f" JOIN users u ON u.id = r.user_id {_STANDS} WHERE u.state = 'active'"
)

VIEWS = (
    View(
        "worker_users",
        "SELECT u.id, u.address, u.local_part, d.name AS domain, d.kind AS domain_kind, u.host, u.state, u.version,"
        " u.quota_bytes, u.access_ended_at, u.locked_at, u.deleted_at, u.purged_at"
        " FROM users u JOIN domains d ON d.id = u.domain_id",
    ),
    # MariaDB's HANDLER statement reads whole rows of a table with SELECT on any one column, so the service process, which must
    # not see a password hash, has no right on `users` at all: it purges through these two, which can be written through.
    View(
        "service_users",
        "SELECT " + ", ".join(column.name for column in users.c if column.name != "password_hash") + " FROM users",
    ),
    View("service_purged", "SELECT id, password_hash FROM users WHERE purged_at IS NOT NULL"),
    View("postfix_virtual_domains", "SELECT name FROM domains WHERE kind = 'virtual'"),
    View(
        "postfix_recipients",
        f"SELECT u.address, u.host FROM users u {_STANDS} WHERE u.state IN ('active', 'suspended')",
    ),
    View(
        "dovecot_users",
        f"SELECT u.address, u.host, {{uid}} AS uid, {{gid}} AS gid, {{home}} AS home, u.quota_bytes, {_ACCESS}"
        f" FROM users u {_STANDS} WHERE u.state IN ('active', 'suspended')",
    ),
    View(
        "dovecot_passwords",
        f"SELECT u.address, u.host, u.password_hash AS password, {_ACCESS}"
        f" FROM users u {_STANDS} WHERE u.state = 'active' AND u.password_hash IS NOT NULL",
    ),
    View(
        "dovecot_app_passwords",
        f"SELECT p.id, u.address, u.host, p.secret_hash, p.imap, p.pop3, p.smtp, p.sieve, {_ACCESS}"
        f" FROM app_passwords p JOIN users u ON u.id = p.user_id {_STANDS}"
        " WHERE p.revoked_at IS NULL AND u.state = 'active'",
    ),
    View(
        "worker_aliases",
        "SELECT a.id, a.address, a.local_part, d.name AS domain, d.kind AS domain_kind, a.kind, a.version, a.deleted_at"
        " FROM aliases a JOIN domains d ON d.id = a.domain_id",
    ),
    View("worker_alias_destinations", f"SELECT a.id AS alias_id, t.position, {_DESTINATION}{_ROUTE}"),
    # What is not in the alias file: local(8) asks the first, by local part, and cleanup(8) the second.
    View(
        "postfix_local_aliases",
        f"SELECT a.local_part, {_DESTINATION}{_ROUTE} AND d.kind = 'primary' AND a.kind = 'send_as'",
    ),
    View("postfix_virtual_aliases", f"SELECT a.address, {_DESTINATION}{_ROUTE} AND d.kind = 'virtual'"),
    View(
        "worker_dkim_keys",
        "SELECT k.id, d.name AS domain, d.kind AS domain_kind, k.host, k.selector, k.algorithm, k.public_key,"
        " k.state, k.version"
        " FROM dkim_keys k JOIN domains d ON d.id = k.domain_id",
    ),
    View("postfix_own_domains", "SELECT name FROM domains WHERE kind IN ('primary', 'virtual')"),
    View("postfix_senders", _SENDERS),
    View("postfix_logins", f"SELECT u.address AS login, u.host FROM users u {_STANDS} WHERE u.state = 'active'"),
    View("policy_senders", _SENDERS),
    View(
        "policy_logins",
        "SELECT u.address AS login, u.host, u.send_limit, u.access_ended_at, {ended} AS ended_at, {flushed} AS flushed_at"
        f" FROM users u {_STANDS} WHERE u.state = 'active'",
    ),
)

service_users = users.to_metadata(sa.MetaData(), name="service_users")
service_purged = users.to_metadata(sa.MetaData(), name="service_purged")
"""To be written through on MariaDB. On SQLite, which has no grants and no such views, the service process uses the table."""
