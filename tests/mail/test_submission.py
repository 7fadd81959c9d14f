"""Ports 587 and 465: who may sign in, and under which names they may send. On rows and homes made by hand."""

import smtplib
import socket
from contextlib import suppress
from email import message_from_bytes
from pathlib import Path

import pytest

from tests.stack.accounts import OTHER, PASSWORD, Account, Alias
from tests.stack.mail import PRIMARY_DOMAIN, MailStack
from tests.stack.mariadb import MariaDB
from tests.stack.processes import wait_until

ALICE, BOB, CAROL = (f"{name}@{PRIMARY_DOMAIN}" for name in ("alice", "bob", "carol"))
PR = f"pr@{PRIMARY_DOMAIN}"

Reply = tuple[int, bytes]


@pytest.fixture
def home(account: Account) -> Path:
    account(ALICE)
    return account(BOB)


def envelope(client: smtplib.SMTP, sender: str, recipient: str = BOB) -> Reply:
    """The answer to RCPT, where Postfix gives its refusals; then the session is as before."""
    code, text = client.docmd(f"MAIL FROM:<{sender}>")  # smtplib's own methods tidy an address up
    if code == 250:
        code, text = client.docmd(f"RCPT TO:<{recipient}>")
    client.rset()
    return code, text


def say(client: smtplib.SMTP, header: str, *, sender: str = ALICE, recipient: str = BOB, body: str = "x") -> Reply:
    """The answer to a message with exactly this header."""
    assert client.mail(sender)[0] == 250
    assert client.rcpt(recipient)[0] == 250
    return client.data(f"{header}\r\n\r\n{body}\r\n".encode("latin-1"))


# Signing in


def test_no_password_before_tls(stack: MailStack, home: Path) -> None:
    with smtplib.SMTP(
        "127.0.0.1", stack.settings.submission_port, source_address=("127.0.0.5", 0), timeout=10
    ) as client:
        client.ehlo()
        assert client.has_extn("starttls")
        assert not client.has_extn("auth")
        assert client.docmd("AUTH PLAIN AGFsaWNlAHg=")[0] == 530
        assert client.docmd(f"MAIL FROM:<{ALICE}>")[0] == 530
        client.starttls(context=stack.tls)
        client.ehlo()
        assert sorted(client.esmtp_features["auth"].split()) == ["LOGIN", "PLAIN"]
        assert client.login(ALICE, PASSWORD)[0] == 235


def test_no_words_in_the_clear_where_tls_comes_first(stack: MailStack) -> None:
    with socket.create_connection(("127.0.0.1", stack.settings.submissions_port), 10, ("127.0.0.5", 0)) as client:
        client.sendall(b"EHLO client.test\r\n")
        with suppress(ConnectionResetError):
            assert client.recv(100) == b""


@pytest.mark.parametrize("tls_first", [False, True])
@pytest.mark.parametrize("login", ["alice", "ALICE", ALICE, ALICE.upper()])
def test_full_address_or_bare_name(stack: MailStack, home: Path, tls_first: bool, login: str) -> None:
    with stack.submission(login, PASSWORD, tls_first=tls_first) as client:
        assert envelope(client, ALICE)[0] == 250


@pytest.mark.parametrize("tls_first", [False, True])
def test_wrong_password(stack: MailStack, account: Account, tls_first: bool) -> None:
    account(ALICE)
    account(BOB, state="suspended")
    account(f"carol@{OTHER}")
    for login, password in (
        (ALICE, PASSWORD + " "),
        (ALICE, ""),
        (BOB, PASSWORD),
        ("carol", PASSWORD),
        ("nobody", PASSWORD),
    ):
        with pytest.raises(smtplib.SMTPAuthenticationError) as refused:
            stack.submission(login, password, tls_first=tls_first)
        assert refused.value.smtp_code == 535
    with stack.submission(f"carol@{OTHER}", PASSWORD, tls_first=tls_first) as client:
        assert envelope(client, f"carol@{OTHER}", ALICE)[0] == 250


@pytest.mark.parametrize("tls_first", [False, True])
@pytest.mark.parametrize("recipient", [BOB, "victim@example.net"])
def test_nobody_sends_without_signing_in(stack: MailStack, home: Path, tls_first: bool, recipient: str) -> None:
    for sender in (ALICE, "s@example.net", ""):
        with stack.submission(tls_first=tls_first, source="127.0.0.1") as client:
            assert envelope(client, sender, recipient)[0] == 530


def test_no_password_is_asked_for_on_port_25(stack: MailStack, home: Path) -> None:
    with stack.smtp() as client:
        client.starttls(context=stack.tls)
        client.ehlo()
        assert not client.has_extn("auth")
        assert client.docmd("AUTH PLAIN AGFsaWNlAHg=")[0] == 503


def test_mail_goes_out(stack: MailStack, home: Path) -> None:
    with stack.submission(ALICE, PASSWORD) as client:
        assert say(client, f"From: Alice <{ALICE}>", recipient="friend@example.net")[0] == 250
        assert say(client, f"From: Alice <{ALICE}>")[0] == 250
    [message] = stack.wait_for_mail(home)
    assert "with ESMTPSA" in message.read_text()
    assert PASSWORD not in message.read_text()


# The envelope


def test_own_address_and_no_other(stack: MailStack, account: Account, home: Path) -> None:
    account(f"alice@{OTHER}")
    with stack.submission(ALICE, PASSWORD) as client:
        for own in (
            ALICE,
            ALICE.upper(),
            "alice",
            f"alice+list@{PRIMARY_DOMAIN}",
            f"alice+a+b@{PRIMARY_DOMAIN}",
            f'"alice"@{PRIMARY_DOMAIN}',
        ):
            assert envelope(client, own)[0] == 250, own
    for foreign in (
        BOB,
        "bob",
        f"bob+alice@{PRIMARY_DOMAIN}",
        f'"bob"@{PRIMARY_DOMAIN}',
        f"alice@{OTHER}",
        f"nobody@{PRIMARY_DOMAIN}",
        f"alice@sub.{PRIMARY_DOMAIN}",
        f"alice@mail.{PRIMARY_DOMAIN}",
        f"returns@{PRIMARY_DOMAIN}",
        f"+alice@{PRIMARY_DOMAIN}",
        f"@{PRIMARY_DOMAIN}",
        "alice@example.net",
        "alice@localhost",
        "alice@[127.0.0.1]",
        f"{ALICE}@example.net",
        f"@{PRIMARY_DOMAIN}:{BOB}",
        f"<@{PRIMARY_DOMAIN}:alice@example.net>",
        f"x' OR '1'='1@{PRIMARY_DOMAIN}".replace(" ", "_"),
    ):
        with stack.submission(ALICE, PASSWORD) as client:
            code, text = envelope(client, foreign)
            assert (code, text[:5]) in ((553, b"5.7.1"), (501, b"5.1.7")), (foreign, code, text)


def test_sender_outside_ascii_hurts_nobody(stack: MailStack, home: Path) -> None:
    with stack.submission(ALICE, PASSWORD) as client:
        assert client.sock
        for hostile in ("ü".encode(), b"\xfc", "用户".encode()):
            client.sock.sendall(b"MAIL FROM:<" + hostile + b"@" + PRIMARY_DOMAIN.encode() + b">\r\n")
            code, _ = client.getreply()
            if code == 250:
                assert client.rcpt(BOB)[0] == 553
                client.rset()
        assert envelope(client, ALICE)[0] == 250


def test_alias_may_be_used_by_the_designated_alone(stack: MailStack, account: Account, alias: Alias) -> None:
    for address in (ALICE, BOB, CAROL):
        account(address)
    alias(PR, BOB, CAROL, designated=[ALICE, CAROL])
    expected = {ALICE: 250, CAROL: 250, BOB: 553}  # bob only receives it
    for login, code in expected.items():
        with stack.submission(login, PASSWORD) as client:
            assert envelope(client, PR, ALICE)[0] == code, login
            assert envelope(client, f"pr+2026@{PRIMARY_DOMAIN}", ALICE)[0] == code, login
            assert envelope(client, login, ALICE)[0] == 250
            if code == 250:
                assert say(client, f"From: Press <{PR}>\r\nSender: <{login}>", sender=PR, recipient=ALICE)[0] == 250
            refused = say(client, f"From: Press <{PR}>", sender=login, recipient=ALICE)
            assert refused[0] == (250 if code == 250 else 554), (login, refused)


def test_with_nobody_designated_it_is_nobody(stack: MailStack, account: Account, alias: Alias) -> None:
    account(ALICE)
    alias(PR, ALICE)
    alias(f"info@{PRIMARY_DOMAIN}", ALICE, kind="receive_only", designated=[ALICE])  # a row that the API does not write
    with stack.submission(ALICE, PASSWORD) as client:
        assert envelope(client, PR, ALICE)[0] == 553
        assert envelope(client, f"info@{PRIMARY_DOMAIN}", ALICE)[0] == 553
        assert say(client, f"From: {PR}", recipient=ALICE)[0] == 554
        assert say(client, f"From: info@{PRIMARY_DOMAIN}", recipient=ALICE)[0] == 554


def test_alias_of_another_domain(mariadb: MariaDB, stack: MailStack, account: Account, alias: Alias) -> None:
    account(ALICE)
    alias(f"team@{OTHER}", ALICE, designated=[ALICE])
    with stack.submission(ALICE, PASSWORD) as client:
        assert envelope(client, f"team@{OTHER}", ALICE)[0] == 250
        assert say(client, f"From: team@{OTHER}", sender=f"team@{OTHER}", recipient=ALICE)[0] == 250
        mariadb.sql("UPDATE aliases SET deleted_at = created_at", "owner")
        assert envelope(client, f"team@{OTHER}", ALICE)[0] == 553


# Sessions that stay open


END = [
    "UPDATE users SET state = 'suspended' WHERE id = 1",
    "UPDATE users SET state_before = state, state = 'deleted', deleted_at = created_at, purge_at = created_at WHERE id = 1",
    "UPDATE applied SET stands = 0 WHERE subject_id = 1",
    "UPDATE users SET host = 'elsewhere' WHERE id = 1; UPDATE applied SET host = 'elsewhere' WHERE subject_id = 1",
]


@pytest.mark.parametrize("statement", END)
def test_open_session_sends_nothing_more(mariadb: MariaDB, stack: MailStack, home: Path, statement: str) -> None:
    with stack.submission(ALICE, PASSWORD) as client:
        assert envelope(client, ALICE)[0] == 250
        mariadb.sql(statement, "owner")
        assert envelope(client, ALICE)[0] in (550, 553)
        assert envelope(client, "")[0] == 550
        assert envelope(client, "", "victim@example.net")[0] == 550


def test_open_transaction_sends_nothing_more(mariadb: MariaDB, stack: MailStack, home: Path) -> None:
    for sender in (ALICE, ""):
        with stack.submission(ALICE, PASSWORD) as client:
            assert client.mail(sender)[0] == 250
            assert client.rcpt(BOB)[0] == 250
            mariadb.sql("UPDATE users SET state = 'suspended' WHERE id = 1", "owner")
            assert client.docmd("DATA")[0] == 550
        mariadb.sql("UPDATE users SET state = 'active' WHERE id = 1", "owner")
        stack.doveadm("auth", "cache", "flush")


def test_bounce_of_ones_own_is_allowed(stack: MailStack, home: Path) -> None:
    with stack.submission(ALICE, PASSWORD) as client:
        assert say(client, f"From: {ALICE}", sender="")[0] == 250
        assert say(client, f"From: {BOB}", sender="")[0] == 554


# The header


@pytest.mark.parametrize(
    "header",
    [
        f"From: {ALICE}",
        f"from: Alice <{ALICE}>",
        f'From: "Alice, of Accounts" <ALICE@{PRIMARY_DOMAIN.upper()}>',
        f"From: =?utf-8?Q?Al=C3=AFce?= <{ALICE}>",
        f"From: Alice\r\n <{ALICE}>",
        f"From: <alice+list@{PRIMARY_DOMAIN}>",
        f"Subject: x\r\nFrom: {ALICE}\r\nSender: {ALICE}\r\nTo: undisclosed:;",
    ],
)
def test_own_from(stack: MailStack, home: Path, header: str) -> None:
    with stack.submission(ALICE, PASSWORD) as client:
        assert say(client, header)[0] == 250


FORGED = {
    f"From: {BOB}": "is not yours",
    f"From: Alice <{BOB}>": "is not yours",
    f'From: "{ALICE}" <{BOB}>': "is not",
    f"From: alice@{OTHER}": "is not yours",
    "From: alice@example.net": "is not yours",
    f"From: {ALICE}\r\nFrom: {BOB}": "more than one From",
    f"From: {BOB}\r\nfrom: {ALICE}": "more than one From",
    f"From: {ALICE}\r\nFrom : {BOB}": "",
    f"From: {ALICE}\r\nSender: {BOB}": "is not yours",
    f"From: {ALICE}\r\nResent-From: {BOB}": "is not yours",
    f"From: {ALICE}\r\nResent-Sender: {BOB}": "is not yours",
    f"From: {ALICE}, {BOB}": "not one plain address",
    f"From: friends: {ALICE};": "not one plain address",
    "From: friends:;": "not one plain address",
    f"From: <@example.net:{ALICE}>": "not one plain address",
    f'From: "alice"@{PRIMARY_DOMAIN}': "not one plain address",
    f"From: {ALICE} ({BOB})": "",
    f"From: =?utf-8?Q?bob=40{PRIMARY_DOMAIN}?=": "not one plain address",
    f"From: =?utf-8?Q?bob=40{PRIMARY_DOMAIN}?= <{ALICE}>": "",
    "From: =?utf-8?B?YWxpY2U=?=@" + PRIMARY_DOMAIN: "",
    "From:": "",
    "From: <>": "not one plain address",
    "From: alice": "not one plain address",
    f"From: \xfc <{ALICE}>": "outside ASCII",
    f"From: {ALICE}\xfc": "outside ASCII",
    "Subject: no sender": "no From header",
    f"X-From: {ALICE}": "no From header",
}


@pytest.mark.parametrize("sender", [ALICE, ""])
@pytest.mark.parametrize("header", FORGED)
def test_forged_from(stack: MailStack, home: Path, header: str, sender: str) -> None:
    with stack.submission(ALICE, PASSWORD) as client:
        code, text = say(client, header, sender=sender)
        assert (code, text[:5]) == (554, b"5.7.1"), text
        assert FORGED[header].encode() in text
        assert say(client, f"From: {ALICE}", sender=sender)[0] == 250, "the session goes on"
    assert len(stack.wait_for_mail(home)) == 1


@pytest.mark.parametrize("body", [b"", b"\r\n", b"x\r\n", b"\x00\r\n", b"\xff" * 900 + b"\r\n"])
@pytest.mark.parametrize("start", [b"", b"\r\n", b" \r\n", b"no header line\r\n"])
def test_message_without_a_header(stack: MailStack, home: Path, start: bytes, body: bytes) -> None:
    with stack.submission(ALICE, PASSWORD) as client:
        client.mail(ALICE)
        client.rcpt(BOB)
        code, text = client.data(start + body)
        assert (code, text[:5]) == (554, b"5.7.1"), text


@pytest.mark.parametrize("source", ["127.0.0.5", "127.0.0.1"])
@pytest.mark.parametrize(
    "start",
    [
        "no header line\r\n",
        "Subject: x\r\n\r\n",
        "Subject: x\r\nno header line\r\n",
        # What rspamd skips before it looks for the header.
        "\r\n",
        "\r\n\r\n",
        " ",
        " \r\n",
        "\t\r\n",
        "\x0c\r\n",
        "\x0b\r\n",
        " \r\n\t\r\n",
        "X-Header-Begins: here\r\n\r\n",
        "\r\nX-Header-Begins: here\r\n",
    ],
)
def test_from_in_the_body_is_none(stack: MailStack, home: Path, start: str, source: str) -> None:
    """Whoever gets such a message would see no From at all, or one that Postfix had made up for a program on this host."""
    with stack.submission(ALICE, PASSWORD, source=source) as client:
        for sender in (ALICE, BOB):
            client.mail(ALICE)
            client.rcpt(BOB)
            code, text = client.data(f"{start}From: {sender}\r\n\r\nx\r\n")
            assert (code, text[:5]) == (554, b"5.7.1"), text
        assert say(client, f"From: {ALICE}")[0] == 250
    assert len(stack.wait_for_mail(home)) == 1


@pytest.mark.parametrize("source", ["127.0.0.5", "127.0.0.1"])
def test_header_arrives_as_it_was_written(stack: MailStack, home: Path, source: str) -> None:
    """For many recipients too; nothing is added that only rspamd was to see, and nothing that the sender left out."""
    with stack.submission(ALICE, PASSWORD, source=source) as client:
        client.mail(ALICE)
        for to in (BOB, ALICE):
            assert client.rcpt(to)[0] == 250
        own = f"X-Header-Begins: here\r\nSubject: x\r\nFrom: {ALICE}\r\nX-Header-Begins: there"
        assert client.data(f"{own}\r\n\r\nx\r\n")[0] == 250
    [message] = stack.wait_for_mail(home)
    fields = [(name, value) for name, value in message_from_bytes(message.read_bytes()).items() if name != "Received"]
    assert fields[-4:] == [tuple(line.split(": ")) for line in own.split("\r\n")]
    assert {name for name, _ in fields[:-4]} <= {"Return-Path", "Delivered-To"}


def test_strangers_are_asked_nothing(stack: MailStack, home: Path) -> None:
    """Whether a From from outside is forged is for other rules: SPF, DKIM, DMARC."""
    with stack.smtp() as client:
        assert say(client, f"From: {BOB}\r\nFrom: {ALICE}", sender="s@example.net")[0] == 250
    assert stack.wait_for_mail(home)


def test_long_header(stack: MailStack, home: Path) -> None:
    with stack.submission(ALICE, PASSWORD) as client:
        many = "\r\n".join(f"X-Filler-{number}: {'x' * 900}" for number in range(200))
        assert say(client, f"{many}\r\nFrom: {ALICE}")[0] == 250
        assert say(client, f"{many}\r\nFrom: {BOB}")[0] == 554
        assert say(client, f"{many}\r\n{many}\r\nFrom: {ALICE}")[0] == 554


def test_header_alone(stack: MailStack, home: Path) -> None:
    with stack.submission(ALICE, PASSWORD) as client:
        for end in ("\r\n", "\r\n\r\n"):
            for who, code in ((ALICE, 250), (BOB, 554)):
                client.mail(ALICE)
                client.rcpt(BOB)
                assert client.data(f"From: {who}{end}")[0] == code


def test_big_message(stack: MailStack, home: Path) -> None:
    big = ("x" * 76 + "\r\n") * 400_000  # 31 MB
    with stack.submission(ALICE, PASSWORD) as client:
        assert say(client, f"From: {BOB}", body=big)[0] == 554
        assert say(client, f"From: {ALICE}", body=big)[0] == 250


# When a part is away


def test_policy_away(stack: MailStack, home: Path) -> None:
    with stack.submission(ALICE, PASSWORD) as client:
        assert client.mail(ALICE)[0] == 250
        assert client.rcpt(BOB)[0] == 250
        stack.stop(stack.policy)
        try:
            for command in ("DATA", "RSET", "MAIL FROM:<>"):
                code, text = client.docmd(command)
                assert command == "RSET" or (code, text[:5]) == (451, b"4.3.0"), text
            with pytest.raises(smtplib.SMTPConnectError) as refused:
                stack.submission(ALICE, PASSWORD)
            assert refused.value.smtp_code == 451
        finally:
            stack.start_policy()
            stack.wait_for_policy()
        assert client.mail(ALICE)[0] == 421, "it does not know when this one began"
    with stack.submission(ALICE, PASSWORD) as client:
        assert say(client, f"From: {ALICE}")[0] == 250


def test_rspamd_away(stack: MailStack, home: Path) -> None:
    stack.stop(stack.rspamd)
    try:
        with pytest.raises(smtplib.SMTPResponseException) as refused:
            stack.submission(ALICE, PASSWORD)
        assert refused.value.smtp_code in (451, 454)  # whatever comes first: 454 is for STARTTLS
        with stack.smtp() as client:
            assert client.mail("s@example.net")[0] == 451
    finally:
        stack.start_rspamd()
        stack.wait_for_rspamd()
    with stack.submission(ALICE, PASSWORD) as client:
        assert say(client, f"From: {ALICE}")[0] == 250


def test_rspamd_goes_within_a_session(stack: MailStack, home: Path) -> None:
    with stack.submission(ALICE, PASSWORD) as client:
        assert client.mail(ALICE)[0] == 250
        assert client.rcpt(BOB)[0] == 250
        stack.stop(stack.rspamd)
        try:
            assert client.data(f"From: {ALICE}\r\n\r\nx\r\n")[0] == 451
        finally:
            stack.start_rspamd()
            stack.wait_for_rspamd()


def test_database_away(mariadb: MariaDB, stack: MailStack, home: Path) -> None:
    with stack.submission(ALICE, PASSWORD) as client:
        assert client.mail(ALICE)[0] == 250
        assert client.rcpt(BOB)[0] == 250
        mariadb.stop()
        try:
            assert client.docmd("DATA")[0] == 451
            client.rset()  # Postfix keeps the envelope after a refusal of this kind
            assert envelope(client, ALICE)[0] == 451
        finally:
            mariadb.restart()
            stack.reload()

    def sends() -> bool:
        with stack.submission(ALICE, PASSWORD) as client:
            return envelope(client, ALICE)[0] == 250

    assert wait_until(sends)


# How much


def test_limit_of_recipients(mariadb: MariaDB, stack: MailStack, account: Account, home: Path) -> None:
    login = f"limited@{PRIMARY_DOMAIN}"  # in no other test: the policy process remembers
    account(login)
    mariadb.sql(f"UPDATE users SET send_limit = 2 WHERE address = '{login}'", "owner")
    with stack.submission(login, PASSWORD) as client:
        assert say(client, f"From: {login}", sender=login)[0] == 250
        assert envelope(client, login, ALICE)[0] == 250
        code, text = envelope(client, login, ALICE)
        assert (code, text[:5]) == (450, b"4.7.1"), text


def test_unknown_and_full_recipients_are_refused_here_too(stack: MailStack, account: Account, home: Path) -> None:
    account(CAROL, quota=20_000)
    with stack.submission(ALICE, PASSWORD) as client:
        assert envelope(client, ALICE, f"nobody@{PRIMARY_DOMAIN}")[0] == 550
        assert envelope(client, ALICE, f"nobody@{OTHER}")[0] == 550
        client.mail(ALICE, ["size=30000"])
        assert client.rcpt(CAROL)[0] == 552
