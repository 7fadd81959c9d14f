"""A second mail host, with `srs` on: what comes in from elsewhere and goes on has a sender of ours."""

import json
from collections.abc import Iterator
from typing import Any

import pytest

from tests.stack.accounts import HASH, NOW, OTHER, PASSWORD
from tests.stack.mail import HOST, PRIMARY_DOMAIN, MailStack
from tests.stack.mariadb import MariaDB
from tests.stack.processes import run, wait_until

ALICE, PR, TEAM = f"alice@{PRIMARY_DOMAIN}", f"pr@{PRIMARY_DOMAIN}", f"team@{OTHER}"


@pytest.fixture(scope="module")
def srs_stack(mariadb: MariaDB) -> Iterator[MailStack]:
    stack = MailStack()
    stack.start(mariadb, srs=True)
    yield stack
    stack.close()


@pytest.fixture
def stack(mariadb: MariaDB, srs_stack: MailStack) -> MailStack:
    mariadb.empty()
    srs_stack.empty()
    srs_stack.build_aliases(f"info: friend@example.net\nback: {ALICE}\n")
    home = srs_stack.homes / "alice"
    uid = srs_stack.file.uid_first + 1
    result = f'{{"uid": {uid}, "home": "{home}"}}'
    statements = [
        f"INSERT hosts VALUES ('{HOST}', 1, '{{}}', 1, {NOW}, {NOW})",
        (
            "INSERT domains (name, kind, primary_slot, version, created_at, updated_at)"
            f" VALUES ('{PRIMARY_DOMAIN}', 'primary', 1, 1, {NOW}, {NOW}), ('{OTHER}', 'virtual', NULL, 1, {NOW}, {NOW})"
        ),
        (
            "INSERT users (id, address, local_part, domain_id, host, display_name, state, password_hash, version,"
            f" created_at, updated_at) SELECT 1, '{ALICE}', 'alice', id, '{HOST}', '', 'active', '{HASH}', 1, {NOW}, {NOW}"
            " FROM domains WHERE kind = 'primary'"
        ),
        f"INSERT applied VALUES ('{HOST}', 'mailbox.sync', 1, 1, 1, 1, '{{}}', '{result}', {NOW})",
        (
            "INSERT aliases (id, address, local_part, domain_id, kind, note, version, created_at, updated_at)"
            f" SELECT 1, '{PR}', 'pr', id, 'send_as', '', 1, {NOW}, {NOW} FROM domains WHERE kind = 'primary'"
            f" UNION SELECT 2, '{TEAM}', 'team', id, 'send_as', '', 1, {NOW}, {NOW} FROM domains WHERE kind = 'virtual'"
        ),
        (
            "INSERT alias_destinations (alias_id, position, address)"
            " VALUES (1, 0, 'friend@example.net'), (2, 0, 'friend@example.net')"
        ),
    ]
    mariadb.sql(";".join(statements), "owner")
    run(["install", "-d", "-m", "0700", "-o", str(uid), "-g", str(uid), home, home / "Maildir"])
    return srs_stack


def queued(stack: MailStack, count: int = 1) -> list[dict[str, Any]]:
    """What waits for the way out, which is closed."""

    def waiting() -> list[dict[str, Any]]:
        lines = run(["postqueue", "-c", stack.postfix_config, "-j"]).splitlines()
        return [entry for entry in map(json.loads, lines) if entry["queue_name"] == "deferred"]

    assert wait_until(lambda: len(waiting()) == count)
    return waiting()


@pytest.mark.parametrize("alias", [PR, TEAM, f"info@{PRIMARY_DOMAIN}"])
def test_sender_is_rewritten_and_an_answer_finds_back(stack: MailStack, alias: str) -> None:
    assert stack.send(alias, sender="s@example.org") == 250
    [entry] = queued(stack)
    rewritten = entry["sender"]
    assert rewritten.startswith("SRS0=")
    assert rewritten.endswith(f"=example.org=s@{PRIMARY_DOMAIN}")
    assert entry["recipients"][0]["address"] == "friend@example.net"
    run(["postsuper", "-c", stack.postfix_config, "-d", "ALL"])
    assert stack.send(rewritten, sender="") == 250
    [back] = queued(stack)
    assert back["recipients"][0]["address"] == "s@example.org"


def test_header_is_left_alone(stack: MailStack) -> None:
    assert stack.send(ALICE, sender="s@example.org") == 250
    [message] = stack.wait_for_mail(stack.homes / "alice")
    assert "\nFrom: s@example.org\n" in message.read_text()


def test_no_relay_by_a_rewritten_address_of_ones_own_making(stack: MailStack) -> None:
    for forged in (
        f"SRS0=AAAA=AA=example.net=victim@{PRIMARY_DOMAIN}",
        f"SRS0=aaaa=2A=example.net=victim@{PRIMARY_DOMAIN}",
        f"SRS1=AAAA=example.net==AAAA=AA=example.org=victim@{PRIMARY_DOMAIN}",
        f"SRS0=@{PRIMARY_DOMAIN}",
        f"SRS0=x@{PRIMARY_DOMAIN}",
    ):
        assert stack.send(forged, sender="") == 550, forged


def test_own_users_keep_their_sender(stack: MailStack) -> None:
    with stack.submission(ALICE, PASSWORD) as client:
        client.sendmail(ALICE, ["friend@example.net", PR], f"From: {ALICE}\r\n\r\nx\r\n")
    assert {entry["sender"] for entry in queued(stack, 2)} == {ALICE}


def test_bounces_keep_their_empty_sender(stack: MailStack) -> None:
    assert stack.send(PR, sender="") == 250
    [entry] = queued(stack)
    assert entry["sender"] == "MAILER-DAEMON"


def test_rewritten_address_is_no_sender_of_strangers(stack: MailStack) -> None:
    assert stack.send(ALICE, sender=f"SRS0=AAAA=AA=example.net=x@{PRIMARY_DOMAIN}") == 550
