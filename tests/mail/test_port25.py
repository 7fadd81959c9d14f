"""Port 25: what strangers may and may not. On rows and homes made by hand."""

import smtplib
from pathlib import Path

import pytest

from tests.stack.accounts import OTHER, Account, Alias
from tests.stack.mail import PRIMARY_DOMAIN, RETURNS_UID, MailStack
from tests.stack.mariadb import MariaDB

ALICE = f"alice@{PRIMARY_DOMAIN}"
RETURNS = f"returns@{PRIMARY_DOMAIN}"


def envelope(client: smtplib.SMTP, sender: str, recipient: str = ALICE) -> tuple[int, bytes]:
    code, text = client.docmd(f"MAIL FROM:<{sender}>")  # smtplib's own methods tidy an address up
    if code == 250:
        code, text = client.docmd(f"RCPT TO:<{recipient}>")
    client.rset()
    return code, text


@pytest.mark.parametrize(
    "sender",
    [
        ALICE,
        f"nobody@{PRIMARY_DOMAIN}",
        f"ALICE@{PRIMARY_DOMAIN.upper()}",
        f"alice+x@{PRIMARY_DOMAIN}",
        f'"alice"@{PRIMARY_DOMAIN}',
        f'"a b"@{PRIMARY_DOMAIN}',
        "alice",
        f"alice@{OTHER}",
        f"alice@sub.{PRIMARY_DOMAIN}",
        f"alice@a.b.c.{PRIMARY_DOMAIN}",
        f"alice@sub.{OTHER}",
        f"returns@sub.{PRIMARY_DOMAIN}",
        f"returns@{OTHER}",
        f"xreturns@{PRIMARY_DOMAIN}",
        f"@example.net:{ALICE}",
        f"<@example.net,@example.org:{ALICE}>",
        f"x+returns@{PRIMARY_DOMAIN}",
    ],
)
def test_own_domain_as_sender(stack: MailStack, account: Account, sender: str) -> None:
    account(ALICE)
    for source in ("127.0.0.5", "127.0.0.1"):  # this host is a stranger too
        with stack.smtp(source=source) as client:
            code, text = envelope(client, sender)
            assert (code, text[:5]) == (550, b"5.7.1"), text


@pytest.mark.parametrize(
    "sender",
    [
        "",
        RETURNS,
        RETURNS.upper(),
        f"returns+4711@{PRIMARY_DOMAIN}",
        "s@example.net",
        f"s@not{PRIMARY_DOMAIN}",
        f"s@{PRIMARY_DOMAIN}.example.net",
        f"{ALICE.replace('@', '=')}@example.net",
        f'"{ALICE}"@example.net',
    ],
)
def test_other_senders(stack: MailStack, account: Account, sender: str) -> None:
    account(ALICE)
    with stack.smtp() as client:
        assert envelope(client, sender)[0] == 250


def test_domain_of_a_sender_outside_ascii_hurts_nobody(stack: MailStack, account: Account) -> None:
    account(ALICE)
    for hostile in ("ü".encode(), b"\xfc", "用户".encode()):
        with stack.smtp() as client:  # of its own: from the tenth refusal on each costs a second
            assert client.sock
            for sender in (hostile + b"@" + PRIMARY_DOMAIN.encode(), b"s@" + hostile + b".test", b"s@" + hostile):
                client.sock.sendall(b"MAIL FROM:<" + sender + b">\r\n")
                client.getreply()
                client.rcpt(ALICE)
                client.rset()
            assert envelope(client, "s@example.net")[0] == 250
            assert envelope(client, ALICE)[0] == 550


def test_domain_that_we_only_relay_is_not_ours(mariadb: MariaDB, stack: MailStack, account: Account) -> None:
    account(ALICE)
    mariadb.sql("UPDATE domains SET kind = 'relay' WHERE kind = 'virtual'", "owner")
    with stack.smtp() as client:
        assert envelope(client, "s@example.net", f"x@{OTHER}")[0] == 554
        mariadb.sql("UPDATE domains SET name = 'relayed.test' WHERE kind = 'relay'", "owner")
        assert envelope(client, "s@relayed.test")[0] == 250


def test_unknown_and_relay(stack: MailStack, account: Account) -> None:
    account(ALICE)
    expected = {
        ALICE: 250,
        f"nobody@{PRIMARY_DOMAIN}": 550,
        f"alice@{OTHER}": 550,
        f"pr@{PRIMARY_DOMAIN}": 550,
        "victim@example.net": 554,
        f"alice@sub.{PRIMARY_DOMAIN}": 554,
        f'"victim@example.net"@{PRIMARY_DOMAIN}': 554,
    }
    for recipient, code in expected.items():
        with stack.smtp() as client:  # of its own: from the tenth refusal on each costs a second
            for sender in ("s@example.net", "", RETURNS):
                assert envelope(client, sender, recipient)[0] == code, (sender, recipient)


def test_bounces_to_returns(stack: MailStack, account: Account) -> None:
    account(ALICE)
    recipients = (RETURNS, f"returns+4711@{PRIMARY_DOMAIN}", "returns", f"info@{PRIMARY_DOMAIN}", RETURNS)
    for count, recipient in enumerate(recipients, 1):
        if count == 4:
            stack.build_aliases(f"returns: {ALICE}\ninfo: {RETURNS}\n")  # the first has no effect
        with stack.smtp() as client:
            assert client.mail("")[0] == 250
            assert client.rcpt(recipient)[0] == 250
            assert client.data(f"From: <mailer-daemon@example.net>\r\n\r\n{recipient}\r\n")[0] == 250
        stack.wait_for_returns(count)
    messages = list(stack.returns.glob("new/*"))
    assert {message.read_text().splitlines()[-1] for message in messages} >= {RETURNS, f"returns+4711@{PRIMARY_DOMAIN}"}
    for path in (stack.returns, *messages):
        status = path.stat()
        assert status.st_uid == RETURNS_UID
        assert not status.st_mode & 0o077
    assert not list(stack.homes.glob("*/Maildir/new/*"))


def test_returns_of_another_domain_is_nobody(stack: MailStack, account: Account) -> None:
    with stack.smtp() as client:
        assert envelope(client, "", f"returns@{OTHER}")[0] == 550
        assert envelope(client, "", "returns@localhost")[0] == 550


def test_account_called_returns_gets_none_of_it(stack: MailStack, account: Account, alias: Alias) -> None:
    """Neither is possible over HTTP."""
    home: Path = account(RETURNS)
    account(ALICE)
    alias(RETURNS, ALICE)
    assert stack.send(RETURNS) == 250
    stack.wait_for_returns(1)
    assert not list((home / "Maildir").iterdir())
