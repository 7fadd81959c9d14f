"""Headers that programs could disagree about, through the real Postfix and rspamd: what arrives is from its sender alone."""

import email
import email.policy
from pathlib import Path

import pytest

from tests.stack.accounts import PASSWORD, Account, account, stack
from tests.stack.mail import MailStack

__all__ = ["account", "stack"]

ALICE, BOB = "alice@cacert.test", "bob@cacert.test"
OWN, BOSS = b"From: alice@cacert.test\r\n", b"From: boss@cacert.test\r\n"

HEADERS = {
    "a line of blanks": OWN + b"Subject: x\r\n \r\n" + BOSS,
    "a line of a tab, and more": OWN + b"Subject: x\r\n\t\r\n y\r\n" + BOSS,
    "blanks first": b"Subject: x\r\n \r\n" + BOSS + OWN,
    "a line of blanks after From": OWN + b" \r\n" + BOSS,
    "bare LF": OWN + b"Subject: x\n" + BOSS,
    "two bare LF": OWN + b"Subject: x\n\n" + BOSS,
    "bare CR": OWN + b"Subject: x\r" + BOSS,
    "CR CR LF": OWN + b"Subject: x\r\r\n" + BOSS,
    "NUL": OWN + b"Subject: \0\r\n" + BOSS,
    "NUL in From": b"From: alice@cacert.test\0, boss@cacert.test\r\n",
    "NUL in the fold of From": b"From: alice@cacert.test\r\n \0, boss@cacert.test\r\n",
    "NUL in the name beside it": b"From: \0 <alice@cacert.test>, boss@cacert.test\r\n",
    "NUL in a name": OWN + b"From\0: boss@cacert.test\r\n",
    "NUL before a name": OWN + b"\0" + BOSS,
    "blanks before the colon": OWN + b"From : boss@cacert.test\r\n",
    "a blank before From": OWN + b" " + BOSS,
    "a blank before the first": b" " + BOSS + OWN,
    "no header first": b"hello\r\n" + OWN + BOSS,
    "no header between": OWN + b"hello\r\n" + BOSS,
    "no header and own after": b"hello\r\n" + OWN,
    "mbox": b"From boss@cacert.test Mon Nov 23 12:00:00 2026\r\n" + OWN,
    "mbox between": OWN + b"From boss@cacert.test Mon Nov 23 12:00:00 2026\r\n",
    "none": b"Subject: x\r\n",
    "nothing": b"",
    "only the body": b"\r\n" + BOSS,
    "a long field": OWN + b"X: " + b"x" * 3000 + b"\r\n" + BOSS,
    "a huge field": OWN + b"X: " + b"x\r\n " * 60_000 + b"\r\n" + BOSS,
    "a huge From": b"From: alice@cacert.test" + b"\r\n " * 40_000 + b", boss@cacert.test\r\n",
    "many fields": OWN + b"X: y\r\n" * 20_000 + BOSS,
    "more than is looked at": OWN + b"X: y\r\n" * 50_000 + BOSS,
    "8-bit name": OWN + b"Fr\xf6m: boss@cacert.test\r\n\xa0" + BOSS,
    "colon alone": OWN + b": x\r\n" + BOSS,
    "MIME in the header": OWN + b"Content-Type: multipart/mixed; boundary=x\r\n--x\r\n" + BOSS,
    "resent": b"Resent-From: boss@cacert.test\r\n" + OWN,
    "an encoded address": b"From: =?utf-8?q?boss=40cacert.test?= <alice@cacert.test>\r\n",
}
GOOD = {
    "own": OWN,
    "a long subject": OWN + b"Subject: " + b"x " * 400 + b"\r\n",
    "folded": b"From: Alice\r\n <alice@cacert.test>\r\nTo: bob@cacert.test,\r\n\tx@example.org\r\n",
    "8-bit subject": OWN + "Subject: Grüße\r\n".encode(),
    "an encoded name": b"From: =?utf-8?q?J=C3=BCrgen?= <alice@cacert.test>\r\n",
}


@pytest.fixture
def inbox(account: Account) -> Path:
    account(ALICE)
    return account(BOB)


def submit(stack: MailStack, header: bytes) -> tuple[int, bytes]:
    """By hand: smtplib would repair the line ends."""
    with stack.submission(ALICE, PASSWORD) as client:
        assert client.mail(ALICE)[0] == 250
        assert client.rcpt(BOB)[0] == 250
        assert client.docmd("DATA")[0] == 354
        client.send(header + b"\r\nhello\r\n.\r\n")
        return client.getreply()


def test_whatever_arrives_is_from_its_sender_alone(stack: MailStack, inbox: Path) -> None:
    arrived = 0
    for name, header in {**HEADERS, **GOOD}.items():
        code, said = submit(stack, header)
        assert code == 250 if name in GOOD else code in (250, 554), (name, code, said)
        if code != 250:
            continue
        arrived += 1
        for path in stack.wait_for_mail(inbox):
            delivered = path.read_bytes()
            for policy in (email.policy.compat32, email.policy.SMTP):
                message = email.message_from_bytes(delivered, policy=policy)
                assert len(message.get_all("From", [])) == 1, (name, delivered)
                assert "boss" not in str(message["From"]), name
                assert "alice@cacert.test" in str(message["From"]), name
            shown = stack.doveadm("fetch", "-u", BOB, "imap.envelope", "all")
            assert '"boss"' not in shown, (name, shown)
            assert '"alice" "cacert.test"' in shown, (name, shown)
            path.unlink()
    assert arrived >= len(GOOD)
