"""What a password reset, a lock and the like end: every session that the old password had opened, with real clients.

The blocking mail clients run in threads, so that API and worker go on in this loop meanwhile.
"""

import asyncio
import imaplib
import json
import os
import poplib
import smtplib
import socket
import subprocess
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import ExitStack, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import nacl.pwhash.argon2id
import pytest
import pytest_asyncio

from app.addresses import MailAddress
from app.workers.host.commands import Commands
from tests.mail.conftest import PASSWORD, Site
from tests.stack.accounts import PASSWORD as HAND_MADE
from tests.stack.accounts import Account
from tests.stack.mail import PRIMARY_DOMAIN, MailStack
from tests.stack.mariadb import MariaDB
from tests.stack.processes import wait_until

pytestmark = pytest.mark.asyncio

ALICE, BOB = (f"{name}@{PRIMARY_DOMAIN}" for name in ("alice", "bob"))
NEW = "eleven quiet otters beside the mill"
MESSAGE = f"From: {ALICE}\r\nSubject: x\r\n\r\nx\r\n"
AGAIN = (421, b"4.7.0")


def reply(client: smtplib.SMTP, command: str) -> tuple[int, bytes]:
    """Code, and enhanced code."""
    code, text = client.docmd(command)
    return code, text[:5]


def transaction(client: smtplib.SMTP, sender: str = ALICE, recipient: str = BOB) -> smtplib.SMTP:
    """Up to what DATA would follow."""
    assert client.mail(sender)[0] == 250
    assert client.rcpt(recipient)[0] == 250
    return client


def send(client: smtplib.SMTP, sender: str = ALICE, recipient: str = BOB) -> None:
    code, text = transaction(client, sender, recipient).data(MESSAGE.replace(ALICE, sender))
    assert code == 250, text


@pytest_asyncio.fixture
async def people(site: Site) -> AsyncIterator[dict[str, Path]]:
    """Their homes."""
    homes = {}
    for name in ("alice", "bob"):
        homes[name] = Path((await site.create(name))["home"])
    yield homes


async def set_password(site: Site, password: str = NEW, **members: Any) -> dict[str, Any]:
    return await site.ask("PUT", f"/v1/users/{ALICE}/password", {"password": password, **members})


def old_password_is_refused(stack: MailStack, password: str = PASSWORD) -> None:
    with pytest.raises(imaplib.IMAP4.error):
        stack.imap(ALICE, password)
    with pytest.raises(poplib.error_proto):
        stack.pop3(ALICE, password)
    for tls_first in (True, False):
        with pytest.raises(smtplib.SMTPAuthenticationError):
            stack.submission(ALICE, password, tls_first=tls_first)


def sessions(stack: MailStack, login: str) -> int:
    return sum(line.startswith(login) for line in stack.doveadm("-f", "tab", "who", "-1").splitlines())


async def test_a_reset_ends_every_session_and_no_other(site: Site, people: dict[str, Path]) -> None:
    stack = site.mail

    def begin(stay: ExitStack) -> tuple[list[Callable[[], object]], dict[str, smtplib.SMTP]]:
        imap, pop3 = stack.imap(ALICE, PASSWORD), stack.pop3(ALICE, PASSWORD)
        stay.callback(imap.shutdown)
        stay.callback(pop3.close)
        imap.select("INBOX")
        assert sessions(stack, ALICE) == 2
        # All from one address, so that only their ports tell them apart.
        steps = ("idle", "bounce", "recipient", "data", "pipelined", "bdat", "half", "has sent")
        smtp = {}
        for number, step in enumerate(steps):
            smtp[step] = client = stack.submission(ALICE, PASSWORD, tls_first=number % 2 == 0)
            stay.callback(client.close)
        assert smtp["recipient"].mail("")[0] == 250
        for step in ("data", "bdat"):
            transaction(smtp[step])
        transaction(smtp["half"])
        assert smtp["half"].docmd("DATA")[0] == 354
        smtp["half"].send(MESSAGE.encode())
        send(smtp["has sent"])
        return [imap.noop, pop3.noop], smtp

    with ExitStack() as stay:
        gone, smtp = await asyncio.to_thread(begin, stay)
        bobs_imap = await asyncio.to_thread(stack.imap, BOB, PASSWORD)
        stay.callback(bobs_imap.shutdown)
        bobs = stay.enter_context(await asyncio.to_thread(stack.submission, BOB, PASSWORD))
        done = await set_password(site)
        assert done["proofs"]["sessions"] == {"result": "ok", "detail": "login cache flushed; no session is left"}

        def look() -> None:
            assert sessions(stack, ALICE) == 0
            for noop in gone:
                with pytest.raises((imaplib.IMAP4.abort, poplib.error_proto, OSError)):
                    noop()
            # The owner signs in again, from the same address too.
            mine = stay.enter_context(stack.submission(ALICE, NEW))
            send(mine)
            stack.imap(ALICE, NEW).logout()
            stack.pop3(ALICE, NEW).quit()
            assert reply(smtp["idle"], f"MAIL FROM:<{ALICE}>") == AGAIN
            assert reply(smtp["bounce"], "MAIL FROM:<>") == AGAIN
            assert reply(smtp["recipient"], f"RCPT TO:<{BOB}>") == AGAIN
            assert reply(smtp["data"], "DATA") == AGAIN
            smtp["bdat"].send(f"BDAT {len(MESSAGE)} LAST\r\n{MESSAGE}")
            assert smtp["bdat"].getreply()[0] == 421
            assert reply(smtp["half"], ".") == AGAIN
            smtp["pipelined"].send(f"MAIL FROM:<{ALICE}>\r\nRCPT TO:<{BOB}>\r\nDATA\r\n{MESSAGE}.\r\nQUIT\r\n")
            assert smtp["pipelined"].getreply()[0] == 421
            assert reply(smtp["has sent"], "MAIL FROM:<>") == AGAIN
            for client in smtp.values():
                with pytest.raises((smtplib.SMTPServerDisconnected, OSError)):
                    client.noop()
            send(mine)
            send(bobs, BOB, ALICE)
            assert bobs_imap.noop()[0] == "OK"
            old_password_is_refused(stack)
            assert len(stack.wait_for_mail(people["bob"], 3)) == 3, "one before, and two of the new session"
            assert len(stack.wait_for_mail(people["alice"])) == 1

        await asyncio.to_thread(look)


async def test_what_was_ended_once_is_not_ended_again(site: Site, people: dict[str, Path]) -> None:
    """A later change of something else leaves the owner's new sessions alone; a second reset does not."""
    await set_password(site)
    session = await asyncio.to_thread(site.mail.imap, ALICE, NEW)
    client = await asyncio.to_thread(site.mail.submission, ALICE, NEW)
    await site.ask("PATCH", f"/v1/users/{ALICE}", {"display_name": "Alice"})
    assert (await asyncio.to_thread(session.noop))[0] == "OK"
    await asyncio.to_thread(send, client)
    await set_password(site, "seven tall lighthouses in the rain")
    with pytest.raises((imaplib.IMAP4.abort, OSError)):
        await asyncio.to_thread(session.noop)
    session.shutdown()
    assert await asyncio.to_thread(reply, client, "MAIL FROM:<>") == AGAIN
    client.close()


async def test_a_home_that_somebody_must_look_at_keeps_no_session_open(site: Site, people: dict[str, Path]) -> None:
    """The job is dead, and still nobody is signed in with the old password."""
    session = await asyncio.to_thread(site.mail.imap, ALICE, PASSWORD)
    smtp = await asyncio.to_thread(site.mail.submission, ALICE, PASSWORD)
    os.chown(people["alice"], 0, 0)
    answer = await site.client.put(
        f"/v1/users/{ALICE}/password", json={"password": NEW}, headers={"Prefer": "wait=10"}, timeout=30
    )
    assert not answer.json()["ready"]
    assert answer.json()["proofs"]["maildir"]["result"] == "failed"
    assert answer.json()["proofs"]["sessions"]["result"] == "ok"
    with pytest.raises((imaplib.IMAP4.abort, OSError)):
        await asyncio.to_thread(session.noop)
    session.shutdown()
    assert await asyncio.to_thread(reply, smtp, f"MAIL FROM:<{ALICE}>") == AGAIN
    smtp.close()


SENT_BY = "named_attribute: sasl_username="
SLOW = "{ARGON2ID}" + nacl.pwhash.argon2id.str(PASSWORD.encode(), opslimit=14, memlimit=64 * 2**20).decode()
"""Takes Dovecot a good half of a second, so that a login can be overtaken by a reset."""


async def test_a_login_that_is_half_done(site: Site, people: dict[str, Path], mariadb: MariaDB) -> None:
    """It has read the old password, and is at work on it while everything is ended. Then it must get nothing, neither now nor
    by what Dovecot remembers of it."""
    stack = site.mail
    mariadb.sql(f"UPDATE users SET password_hash = '{SLOW}' WHERE address = '{ALICE}'", "owner")
    stack.doveadm("auth", "cache", "flush")
    opened: list[Any] = []
    refused: list[str] = []
    running = threading.Barrier(5)

    def sign_in(how: Callable[[], Any]) -> None:
        running.wait()
        try:
            opened.append(how())
        except (imaplib.IMAP4.error, poplib.error_proto, smtplib.SMTPException, OSError) as error:
            refused.append(str(error))

    ways = [
        lambda: stack.imap(ALICE, PASSWORD),
        lambda: stack.pop3(ALICE, PASSWORD),
        lambda: stack.submission(ALICE, PASSWORD),
        lambda: stack.submission(ALICE, PASSWORD, tls_first=True),
    ]
    logins = [asyncio.create_task(asyncio.to_thread(sign_in, way)) for way in ways]
    await asyncio.to_thread(running.wait)
    await asyncio.sleep(0.3)
    await set_password(site)
    overtaken = [login for login in logins if not login.done()]
    await asyncio.gather(*logins)
    assert overtaken, "nothing was half done: the hash is too quick"

    def look() -> None:
        assert sessions(stack, ALICE) == 0
        for client in opened:
            if isinstance(client, smtplib.SMTP):
                assert reply(client, "MAIL FROM:<>") == AGAIN
                client.close()
            else:
                with pytest.raises((imaplib.IMAP4.abort, poplib.error_proto, OSError)):
                    client.noop()
                client.shutdown() if isinstance(client, imaplib.IMAP4) else client.close()
        for _ in range(3):
            old_password_is_refused(stack)
        stack.imap(ALICE, NEW).logout()

    await asyncio.to_thread(look)


async def test_nobody_slips_in_while_it_is_ended(site: Site, people: dict[str, Path]) -> None:
    """Logins with the old password, one after another by every protocol, while it is replaced."""
    stack = site.mail
    over = threading.Event()
    kept: list[Any] = []

    def knock(how: Callable[[], Any]) -> None:
        while not over.is_set():
            with suppress(imaplib.IMAP4.error, poplib.error_proto, smtplib.SMTPException, OSError):
                kept.append(how())

    ways = [lambda: stack.imap(ALICE, PASSWORD), lambda: stack.pop3(ALICE, PASSWORD)]
    ways += [lambda: stack.submission(ALICE, PASSWORD), lambda: stack.imap(ALICE, PASSWORD)]
    knocking = [asyncio.create_task(asyncio.to_thread(knock, way)) for way in ways]
    await asyncio.sleep(0.3)
    await set_password(site)
    alive = len(kept)
    await asyncio.sleep(0.3)
    over.set()
    await asyncio.gather(*knocking)
    assert alive, "nobody was signed in"

    def look() -> None:
        assert sessions(stack, ALICE) == 0
        for client in kept:
            if isinstance(client, smtplib.SMTP):
                assert reply(client, "MAIL FROM:<>") == AGAIN
                client.close()
            else:
                with pytest.raises((imaplib.IMAP4.abort, poplib.error_proto, OSError)):
                    client.noop()
                client.shutdown() if isinstance(client, imaplib.IMAP4) else client.close()
        old_password_is_refused(stack)

    await asyncio.to_thread(look)


# By rows, without API and worker


def in_queue(stack: MailStack) -> dict[str, str]:
    """By id, the name of the queue."""
    argv: list[str | Path] = ["postqueue", "-c", stack.postfix_config, "-j"]
    lines = subprocess.run(argv, capture_output=True, text=True, check=True).stdout.splitlines()
    return {message["queue_id"]: message["queue_name"] for message in map(json.loads, lines)}


def applied_now(mariadb: MariaDB, ended: str, flushed: datetime) -> None:
    changed = f"'$.access_ended_at', '{ended}', '$.flushed_at', '{flushed.isoformat()}'"
    mariadb.sql(f"UPDATE applied SET result = JSON_SET(result, {changed}) WHERE subject_id = 1", "owner")


async def test_nothing_is_sent_until_the_host_has_carried_it_out(
    mariadb: MariaDB, stack: MailStack, account: Account
) -> None:
    for address in (ALICE, BOB):
        account(address)
    with stack.submission(ALICE, HAND_MADE) as before, stack.submission(ALICE, HAND_MADE, tls_first=True) as other:
        send(before)
        mariadb.sql("UPDATE users SET access_ended_at = '2026-11-24 10:00:00.000001' WHERE id = 1", "owner")
        assert reply(before, f"MAIL FROM:<{ALICE}>") == AGAIN
        with stack.submission(ALICE, HAND_MADE) as after:
            assert reply(after, f"MAIL FROM:<{ALICE}>") == AGAIN, "the old password may have opened this one too"
        # Carried out: an earlier ending, then this one.
        for ended, sends in (("2026-11-24T09:00:00+00:00", False), ("2026-11-24T10:00:00.000001+00:00", True)):
            applied_now(mariadb, ended, datetime.now(UTC))
            with stack.submission(ALICE, HAND_MADE) as after:
                assert after.mail(ALICE)[0] == (250 if sends else 421)
        assert reply(other, "MAIL FROM:<>") == AGAIN


async def test_a_newer_connection_from_the_same_port_is_another(
    mariadb: MariaDB, stack: MailStack, account: Account
) -> None:
    """To the other of the two ports: client address and port alone would be those of the session from before."""
    for address in (ALICE, BOB):
        account(address)
    port = stack.settings.submission_port

    def connect(to: int, source: tuple[str, int]) -> socket.socket:
        client = socket.socket()
        client.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        client.bind(source)
        client.settimeout(10)
        client.connect(("127.0.0.1", to))
        return client

    class Bound(smtplib.SMTP):
        def _get_socket(self, host: str, port: int, timeout: float) -> socket.socket:
            return connect(port, ("127.0.0.5", 0))

    with Bound("127.0.0.1", port) as before:
        assert before.sock is not None
        source = before.sock.getsockname()
        before.starttls(context=stack.tls)
        before.login(ALICE, HAND_MADE)
        send(before)
        ended = "2026-11-24T10:00:00+00:00"
        mariadb.sql("UPDATE users SET access_ended_at = '2026-11-24 10:00:00' WHERE id = 1", "owner")
        applied_now(mariadb, ended, datetime.now(UTC))
        with stack.tls.wrap_socket(
            connect(stack.settings.submissions_port, source), server_hostname="localhost"
        ) as again:
            assert again.recv(100).startswith(b"220")
            assert reply(before, "MAIL FROM:<>") == AGAIN


async def test_held_and_released(mariadb: MariaDB, stack: MailStack, account: Account) -> None:
    """What a login has sent, by whatever sender, and nothing else."""
    for address in (ALICE, BOB):
        account(address)
    commands = Commands(postfix_config=stack.postfix_config)
    assert await commands.list_mail_of(ALICE) == []
    elsewhere = "friend@example.net"  # `relay_port` is closed, so all of it stays in the queue
    with stack.submission(ALICE, HAND_MADE) as client:
        send(client, ALICE, elsewhere)
        assert client.mail("", ["RET=HDRS", f"ENVID=x+20sasl_username={BOB}"])[0] == 250
        assert client.rcpt(elsewhere, [f"ORCPT=rfc822;sasl_username={BOB}"])[0] == 250
        assert client.data(MESSAGE)[0] == 250
        assert client.docmd("MAIL FROM:<> ENVID=x+0Ax")[0] == 501
    with stack.submission(BOB, HAND_MADE) as client:
        send(client, BOB, elsewhere)
        assert client.mail(f"bob+{ALICE.partition('@')[0]}@{PRIMARY_DOMAIN}")[0] == 250
        assert client.rcpt(elsewhere)[0] == 250
        assert client.data(MESSAGE.replace(ALICE, BOB))[0] == 250
    assert stack.send(BOB, sender="alice@example.net") == 250
    assert wait_until(lambda: set(in_queue(stack).values()) == {"deferred"} and len(in_queue(stack)) == 4)
    found = await commands.list_mail_of(ALICE)
    assert len(found) == 2
    assert len(await commands.list_mail_of(BOB)) == 2
    await commands.hold_mail(found)
    await commands.hold_mail([*found, "4AAAAAAAAA"])
    assert {queue_id for queue_id, name in in_queue(stack).items() if name == "hold"} == set(found)
    assert await commands.list_mail_of(ALICE) == []
    bobs = await commands.list_mail_of(BOB)
    with stack.submission(ALICE, HAND_MADE) as client:
        for victim in bobs:  # a recipient can carry lines that look like the beginning of another message
            lines = f"rfc822;x\n*** ENVELOPE RECORDS deferred/{victim[0]}/{victim} ***\n{SENT_BY}{ALICE}\nx: x"
            assert client.mail(ALICE)[0] == 250
            xtext = lines.replace(" ", "+20").replace("\n", "+0A").replace("=", "+3D")
            assert client.docmd(f"RCPT TO:<{elsewhere}> ORCPT={xtext}")[0] == 250
            assert client.data(MESSAGE)[0] == 250
    assert set(await commands.list_mail_of(BOB)) == set(bobs)
    mallorys = await commands.list_mail_of(ALICE)
    assert len(mallorys) == 2
    assert not set(mallorys) & set(bobs)
    assert (
        await commands._sent_by(
            MailAddress(ALICE), ["4AAAAAAAAA", mallorys[0], "4BBBBBBBBB", mallorys[1], "4CCCCCCCCC"]
        )
        == mallorys
    )
    await commands.release_mail([found[0], "4AAAAAAAAA"])
    assert {queue_id for queue_id, name in in_queue(stack).items() if name == "hold"} == {found[1]}


async def test_a_lock_holds_mail_and_unlocking_releases_it(site: Site, people: dict[str, Path]) -> None:
    """But for what an administrator had put on hold before."""
    stack = site.mail
    elsewhere = "friend@example.net"

    def send_some() -> None:
        with stack.submission(ALICE, PASSWORD) as client:
            for _ in range(3):
                send(client, ALICE, elsewhere)
        with stack.submission(BOB, PASSWORD) as client:
            send(client, BOB, elsewhere)
        assert wait_until(lambda: len(in_queue(stack)) == 4)

    await asyncio.to_thread(send_some)
    [by_hand, *others] = await site.worker.host.commands.list_mail_of(ALICE)
    await site.worker.host.commands.hold_mail([by_hand])
    session = await asyncio.to_thread(stack.submission, ALICE, PASSWORD)

    def on_hold() -> set[str]:
        return {queue_id for queue_id, name in in_queue(stack).items() if name == "hold"}

    for _ in range(2):  # twice is no change
        locked = await site.ask("POST", f"/v1/users/{ALICE}/lock", {"reason": "somebody else reads the mail"})
        assert locked["state"] == "suspended"
        assert locked["proofs"]["queue"] == {"result": "ok", "detail": "2 messages are held"}
        assert on_hold() == {by_hand, *others}
    assert (await asyncio.to_thread(session.docmd, "MAIL FROM:<>"))[0] == 550
    session.close()
    user = await site.ask("DELETE", f"/v1/users/{ALICE}")
    assert on_hold() == {by_hand, *others}, "deleting releases nothing"
    await site.ask("POST", f"/v1/users/{user['id']}/restore")
    assert on_hold() == {by_hand, *others}
    unlocked = await site.ask("POST", f"/v1/users/{ALICE}/unlock")
    assert "queue" not in unlocked["proofs"]
    assert on_hold() == {by_hand}
