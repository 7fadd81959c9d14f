"""Rows and homes as the API and the worker would make them, without either."""

import os
from collections.abc import Callable, Iterable
from pathlib import Path

import nacl.pwhash.argon2id
import pytest

from tests.stack.mail import HOST, PRIMARY_DOMAIN, MailStack
from tests.stack.mariadb import MariaDB

PASSWORD = "a good one"
HASH = "{ARGON2ID}" + nacl.pwhash.argon2id.str(PASSWORD.encode(), opslimit=1, memlimit=8 * 2**20).decode()
OTHER = "lists.cacert.test"
STRANGER = "127.0.0.5"
NOW = "UTC_TIMESTAMP(6)"

Account = Callable[..., Path]


@pytest.fixture
def stack(mariadb: MariaDB, mail_stack: MailStack) -> MailStack:
    mariadb.empty()
    mail_stack.empty()
    mariadb.sql(
        f"INSERT hosts VALUES ('{HOST}', 1, '{{}}', 1, {NOW}, {NOW}), ('elsewhere', 1, '{{}}', 1, {NOW}, {NOW});"
        "INSERT domains (name, kind, primary_slot, version, created_at, updated_at)"
        f" VALUES ('{PRIMARY_DOMAIN}', 'primary', 1, 1, {NOW}, {NOW}), ('{OTHER}', 'virtual', NULL, 1, {NOW}, {NOW})",
        "owner",
    )
    return mail_stack


@pytest.fixture
def account(mariadb: MariaDB, stack: MailStack) -> Account:
    return account_maker(mariadb, stack)


def account_maker(mariadb: MariaDB, stack: MailStack) -> Account:
    """What makes an account and its home as the API and the worker would, and returns the home."""
    made: list[str] = []

    def make(
        address: str,
        *,
        state: str = "active",
        stands: int = 1,
        quota: int | None = None,
        host: str = HOST,
    ) -> Path:
        made.append(address)
        number, uid = len(made), stack.file.uid_first + len(made)
        local_part, _, domain = address.partition("@")
        home = stack.homes / (local_part if domain == PRIMARY_DOMAIN else f"@{domain}/{local_part}")
        mariadb.sql(
            "INSERT users (id, address, local_part, domain_id, host, display_name, quota_bytes, state, password_hash,"
            f" version, created_at, updated_at) SELECT {number}, '{address}', '{local_part}', id, '{host}', '',"
            f" {quota or 'NULL'}, '{state}', '{HASH}', 1, {NOW}, {NOW} FROM domains WHERE name = '{domain}';"
            f"INSERT applied VALUES ('{host}', 'mailbox.sync', {number}, 1, {stands}, 1, '{{}}',"
            f' \'{{"uid": {uid}, "home": "{home}"}}\', {NOW})',
            "owner",
        )
        (home / "Maildir").mkdir(parents=True)
        for path in (home, home / "Maildir"):
            path.chmod(0o700)
            os.chown(path, uid, uid)
        return home

    return make


Alias = Callable[..., int]


@pytest.fixture
def alias(mariadb: MariaDB, stack: MailStack) -> Alias:
    """Adds an alias that leads to accounts, aliases and addresses elsewhere, and the accounts that may send as it."""
    made: dict[str, int] = {}

    def make(address: str, *destinations: str, kind: str = "send_as", designated: Iterable[str] = ()) -> int:
        number = made[address] = len(made) + 1
        local_part, _, domain = address.partition("@")
        statements = [
            (
                "INSERT aliases (id, address, local_part, domain_id, kind, note, version, created_at, updated_at)"
                f" SELECT {number}, '{address}', '{local_part}', id, '{kind}', '', 1, {NOW}, {NOW}"
                f" FROM domains WHERE name = '{domain}'"
            )
        ]
        for position, destination in enumerate(destinations):
            quoted = destination.replace("\\", "\\\\").replace("'", "''")
            user = f"(SELECT id FROM users WHERE address = '{quoted}')"
            elsewhere = f"IF({user} IS NULL, '{quoted}', NULL)" if destination not in made else "NULL"
            statements.append(
                "INSERT alias_destinations (alias_id, position, user_id, target_alias_id, address)"
                f" SELECT {number}, {position}, {user}, {made.get(destination, 'NULL')}, {elsewhere}"
            )
        statements += [
            f"INSERT sender_rules SELECT {number}, id FROM users WHERE address = '{login}'" for login in designated
        ]
        mariadb.sql(";".join(statements), "owner")
        return number

    return make
