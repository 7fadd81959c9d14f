"""Mail to account owners, through the real Postfix to a server elsewhere, and what comes back from there."""

import asyncio
import os
import smtplib
import time
from collections.abc import AsyncIterator
from email.message import EmailMessage
from pathlib import Path

import pytest
import pytest_asyncio
from pydantic import SecretStr
from sqlalchemy import update

from app.config import ServiceSettings
from app.credentials.links import create_link_key, load_link_key
from app.db import Database, utc_now
from app.models.notices import notices
from app.workers.service.bounces import MOST, Returns, failure
from app.workers.service.letters import return_path
from app.workers.service.loop import Parts
from tests.conftest import Clock
from tests.stack.mail import HOST, PRIMARY_DOMAIN, MailStack
from tests.stack.mariadb import MariaDB
from tests.stack.processes import Processes, wait_until
from tests.stack.sink import Sink
from tests.workers.host.machine import until
from tests.workers.service.post import CONTACT, URL, Post, sinks

__all__ = ["sinks"]
pytestmark = pytest.mark.asyncio

RETURNS = f"returns@{PRIMARY_DOMAIN}"
STATUS = "Content-Type: message/delivery-status\r\n\r\n"


@pytest_asyncio.fixture
async def post(
    mariadb: MariaDB, stack: MailStack, clock: Clock, sinks: Processes, scratch: Path
) -> AsyncIterator[Post]:
    clock.now = utc_now()  # the process has the real one
    create_link_key(scratch / "link.key")
    settings = ServiceSettings(
        database_url=SecretStr(mariadb.url("service")),
        wake_directory=scratch,
        link_key_file=scratch / "link.key",
        public_url=URL,
        smtp_port=stack.settings.service_port,
        returns_maildir=stack.returns,
    )
    api, database = Database(mariadb.url("api")), Database(mariadb.url("service"))
    key = load_link_key(scratch / "link.key")
    sink = Sink(sinks, stack.relay_port)
    post = Post(api, Parts(database, settings, key, clock), settings, clock, sink, key, mariadb.url("owner"))
    mariadb.sql(f"UPDATE hosts SET enabled = (name = '{HOST}')", "owner")
    await post.account()
    yield post
    sink.stop()
    await api.close()
    await database.close()


async def one_round(post: Post) -> None:
    await post.parts.round(asyncio.Event())


def bounce(to: str, report: str, *, sender: str = "MAILER-DAEMON@example.net") -> bytes:
    """As RFC 3464 has it."""
    return (
        f"From: {sender}\r\nTo: {to}\r\nSubject: Undelivered\r\nMIME-Version: 1.0\r\n"
        'Content-Type: multipart/report; report-type=delivery-status; boundary="b"\r\n\r\n'
        f"--b\r\nContent-Type: text/plain\r\n\r\nSorry.\r\n"
        f"--b\r\n{STATUS}Reporting-MTA: dns; mx.example.net\r\n\r\n{report}\r\n\r\n--b--\r\n"
    ).encode()


FAILED = (
    "Final-Recipient: rfc822; x@example.net\r\nAction: failed\r\nStatus: 5.2.2\r\nDiagnostic-Code: smtp; 552 5.2.2 full"
)


def deliver(stack: MailStack, to: str, data: bytes) -> None:
    with stack.smtp() as client:
        assert client.mail("")[0] == 250
        assert client.rcpt(to)[0] == 250
        assert client.data(data)[0] == 250


async def test_through_postfix_to_a_server_elsewhere(stack: MailStack, post: Post) -> None:
    post.sink.start("-N")
    notice_id = await post.notice()
    await one_round(post)
    assert (await post.job(notice_id)).error is None
    assert (await post.row(notice_id)).sent_at == post.clock.now
    assert wait_until(lambda: len(post.sink.messages()) == 1), stack.mail_log.read_text()[-2000:]
    [message] = post.sink.messages()
    assert (message["X-Mail-Args"], message["X-Rcpt-Args"]) == (
        f"<{return_path(RETURNS, post.key, notice_id)}>",
        f"<{CONTACT}>",
    )
    assert message["From"].addresses[0].addr_spec == f"accounts@{PRIMARY_DOMAIN}"
    text = message.get_body(("plain",))
    assert text is not None
    assert await post.link(notice_id) in text.get_content()


async def test_to_a_mailbox_of_ours(stack: MailStack, post: Post, account: object) -> None:
    notice_id = await post.notice(recipient=f"nobody@{PRIMARY_DOMAIN}")
    await one_round(post)
    job, row = await post.job(notice_id), await post.row(notice_id)
    assert (job.state, row.bounce) == (
        "dead",
        "550 5.1.1 …: Recipient address rejected: User unknown in local recipient table",
    )


@pytest.mark.parametrize("sender", ["", f"ann@{PRIMARY_DOMAIN}", "s@example.net", f"x+returns@{PRIMARY_DOMAIN}"])
async def test_the_door_is_for_this_machine_and_for_returns(stack: MailStack, sender: str) -> None:
    port = stack.settings.service_port
    with pytest.raises(ConnectionRefusedError):
        smtplib.SMTP("127.0.0.2", port, timeout=5)
    with smtplib.SMTP("127.0.0.1", port, timeout=5) as client:
        client.ehlo()
        client.docmd(f"MAIL FROM:<{sender}>")
        code, _ = client.docmd("RCPT TO:<victim@example.net>")
        assert code in (550, 554)
    with stack.smtp(source="127.0.0.1") as client:  # and not that of the public port
        client.docmd(f"MAIL FROM:<{RETURNS}>")
        assert client.docmd("RCPT TO:<victim@example.net>")[0] == 554


async def test_a_real_bounce_is_written_down(stack: MailStack, post: Post) -> None:
    post.sink.start("-f", "RCPT", "-B", f"550 5.1.1 <{CONTACT}>: unknown here")
    notice_id, other = await post.notice(), await post.notice(recipient=None)
    await one_round(post)
    assert (await post.row(notice_id)).sent_at is not None

    async def bounced() -> bool:
        await one_round(post)
        return (await post.row(notice_id)).bounced_at is not None

    await until(bounced)
    row = await post.row(notice_id)
    assert row.bounce.startswith("5.1.1 550 5.1.1 …: unknown here"), row.bounce
    assert (await post.row(other)).bounced_at is None
    assert list(stack.returns.glob("new/*")) == []
    [read] = stack.returns.glob("cur/*")
    assert read.name.endswith(":2,S")


async def test_the_process_reads_them(stack: MailStack, post: Post) -> None:
    post.sink.start("-f", "RCPT")
    notice_id = await post.notice()

    async def bounced() -> bool:
        return (await post.row(notice_id)).bounced_at is not None

    with post.process() as process:
        await until(bounced, seconds=20)
        assert process.poll() is None


async def test_only_what_was_sent_by_us_and_has_failed(stack: MailStack, post: Post) -> None:
    notice_id, other = await post.notice(recipient=None), await post.notice(recipient=None)
    good = return_path(RETURNS, post.key, notice_id)
    wrong = return_path(RETURNS, b"another key" * 3, other)
    swapped = good.replace(f"+{notice_id}.", f"+{other}.")
    left = {
        RETURNS: bounce(RETURNS, FAILED),
        wrong: bounce(good, FAILED),
        swapped: bounce(good, FAILED),
        f"returns+{other}@{PRIMARY_DOMAIN}": b"Delivered-To: " + good.encode() + b"\r\n" + bounce(good, FAILED),
    }
    for to, data in left.items():
        await asyncio.to_thread(deliver, stack, to, data)
    about = [
        bounce(good, FAILED.replace("failed", "delayed")),
        b"Subject: I am on holiday\r\nAuto-Submitted: auto-replied\r\n\r\nuntil May\r\n",
        b"",
    ]
    for data in about:
        await asyncio.to_thread(deliver, stack, good, data)
    await asyncio.to_thread(stack.wait_for_returns, 7)
    await one_round(post)
    assert ((await post.row(notice_id)).bounced_at, (await post.row(other)).bounced_at) == (None, None)
    assert (len(list(stack.returns.glob("new/*"))), len(list(stack.returns.glob("cur/*")))) == (4, 3)
    # By now those are known; the next is read all the same.
    await asyncio.to_thread(deliver, stack, good.upper(), bounce(good, FAILED))
    await asyncio.to_thread(stack.wait_for_returns, 5)
    await one_round(post)
    assert (await post.row(notice_id)).bounce == "5.2.2 552 5.2.2 full"
    # The first word stands.
    post.clock.forward(hours=1)
    await asyncio.to_thread(deliver, stack, good, bounce(good, FAILED.replace("full", "gone")))
    await asyncio.to_thread(stack.wait_for_returns, 5)
    await one_round(post)
    assert (await post.row(notice_id)).bounce == "5.2.2 552 5.2.2 full"
    assert len(list(stack.returns.glob("cur/*"))) == 5


async def test_killed_between_the_row_and_the_file_it_reads_it_again(stack: MailStack, post: Post) -> None:
    notice_id = await post.notice(recipient=None)
    good = return_path(RETURNS, post.key, notice_id)
    await asyncio.to_thread(deliver, stack, good, bounce(good, FAILED))
    await asyncio.to_thread(stack.wait_for_returns, 1)
    await post.as_owner(update(notices).values(bounced_at=post.clock.now, bounce="earlier"))
    await one_round(post)
    assert (await post.row(notice_id)).bounce == "earlier"
    assert list(stack.returns.glob("new/*")) == []


NESTED = b"".join(b'Content-Type: multipart/mixed; boundary="%d"\r\n\r\n--%d\r\n' % (n, n) for n in range(2000))
HOSTILE = {
    "controls": (FAILED.replace("full", "\x1b[31m\x00\u202e full " + "x" * 5000), "5.2.2 552 5.2.2"),
    "addresses": (
        FAILED.replace("full", f"<{CONTACT}> {CONTACT} https://x.test/#token " + "t" * 43),
        "5.2.2 552 5.2.2 … … … …",
    ),
    "nothing said": ("Action: failed", "no reason was given"),
    "shouting": ("ACTION: FAILED\r\nStatus: 5.1.1", "5.1.1"),
    "folded": ("Action:\r\n failed\r\nStatus: 5.1.1\r\nDiagnostic-Code: smtp;\r\n 550\r\n no", "5.1.1 550 no"),
}


@pytest.mark.parametrize("what", HOSTILE)
async def test_hostile_reports(what: str) -> None:
    report, expected = HOSTILE[what]
    found = failure(bounce("x@y.test", report))
    assert found is not None
    assert found.isprintable()
    assert found.startswith(expected)
    assert len(found) <= 200


async def test_hostile_messages_are_harmless_and_quick(post: Post, scratch: Path) -> None:
    notice_id = await post.notice(recipient=None)
    address = return_path(RETURNS, post.key, notice_id).encode()
    maildir = scratch / "hostile"
    for name in ("new", "cur"):
        (maildir / name).mkdir(parents=True)
    top = b"Delivered-To: " + address + b"\r\n"
    report = b'Content-Type: multipart/report; boundary="b"\r\n\r\n'
    messages = {
        "huge": top + report + b"x" * 30_000_000 + bounce("x@y.test", FAILED),
        "nested": top + NESTED,
        "nested reports": top + report + b"--b\r\n" + STATUS.encode() + b"Action: failed\r\n\r\n" * 5000,
        "long line": top + b"Subject: " + b"x" * MOST,
        "many headers": top + b"X: y\r\n" * 20_000,
        "charset": top + b'Content-Type: multipart/report; boundary*=utf-99\'\'%ff\r\n\r\n--b\r\n',
        "encoded": top + b"Content-Type: =?utf-8?b?bXVsdGlwYXJ0L3JlcG9ydA==?=\r\n\r\n",
        "binary": top + os.urandom(MOST),
    }  # fmt: skip
    for name, data in messages.items():
        (maildir / "new" / name.replace(" ", "-")).write_bytes(data)
    began = time.perf_counter()
    await Returns(maildir, post.key).read(post.parts.database, post.clock.now)
    assert time.perf_counter() - began < 3
    assert (await post.row(notice_id)).bounce == "no reason was given"


async def test_a_flood_of_other_mail_is_looked_at_once_and_in_parts(post: Post, scratch: Path) -> None:
    notice_id = await post.notice(recipient=None)
    maildir = scratch / "flood"
    for name in ("new", "cur"):
        (maildir / name).mkdir(parents=True)
    for number in range(250):
        (maildir / "new" / f"a{number}").write_bytes(b"Subject: x\r\n\r\n")
    message = EmailMessage()
    message["Delivered-To"] = return_path(RETURNS, post.key, notice_id)
    (maildir / "new/z").write_bytes(message.as_bytes()[:-1] + bounce("x@y.test", FAILED))
    returns = Returns(maildir, post.key)
    for bounced in (False, False, True):
        await returns.read(post.parts.database, post.clock.now)
        assert ((await post.row(notice_id)).bounced_at is not None) is bounced
    assert len(list((maildir / "new").iterdir())) == 250
