"""From an HTTP request to a message read over IMAPS, and everything that may happen to an account afterwards.

The blocking mail clients run in threads, so that API and worker go on in this loop meanwhile.
"""

import asyncio
import imaplib
import poplib
from pathlib import Path
from typing import Any

import pytest

from tests.mail.conftest import PASSWORD, Site
from tests.stack.mail import PRIMARY_DOMAIN

pytestmark = pytest.mark.asyncio

ALICE = f"alice@{PRIMARY_DOMAIN}"


async def send(site: Site, to: str = ALICE, subject: str = "Hello") -> int:
    return await asyncio.to_thread(site.mail.send, to, subject, "A message.\n")


async def arrived(site: Site, home: str, count: int = 1) -> list[Path]:
    return await asyncio.to_thread(site.mail.wait_for_mail, Path(home), count)


def subjects(site: Site, password: str = PASSWORD) -> list[str]:
    imap = site.mail.imap(ALICE, password)
    try:
        imap.select("INBOX")
        found = []
        for number in imap.search(None, "ALL")[1][0].split():
            data: Any = imap.fetch(number, "(BODY[HEADER.FIELDS (SUBJECT)])")[1]
            found.append(data[0][1].decode().partition(":")[2].strip())
        return found
    finally:
        imap.logout()


async def test_an_account_made_over_http_receives_mail_that_its_owner_reads(site: Site) -> None:
    user = await site.create()
    assert {name: proof["result"] for name, proof in user["proofs"].items()} == {
        "maildir": "ok",
        "postfix": "ok",
        "dovecot": "ok",
    }
    assert user["uid"] == site.mail.file.uid_first + user["id"]
    assert user["home"] == str(site.mail.homes / "alice")
    assert await send(site) == 250
    [message] = await arrived(site, user["home"])
    status = message.stat()
    assert (status.st_uid, status.st_gid) == (user["uid"], user["uid"])
    assert await asyncio.to_thread(subjects, site) == ["Hello"]
    pop = await asyncio.to_thread(site.mail.pop3, ALICE, PASSWORD)
    assert pop.stat()[0] == 1
    pop.quit()
    for wrong in ("", "wrong", PASSWORD.upper()):
        with pytest.raises(imaplib.IMAP4.error):
            await asyncio.to_thread(site.mail.imap, ALICE, wrong)
        with pytest.raises(poplib.error_proto):
            await asyncio.to_thread(site.mail.pop3, ALICE, wrong)


async def test_a_virtual_domain_is_the_same(site: Site) -> None:
    user = await site.post("/v1/users", address="alice@other.test", password=PASSWORD)
    assert user["home"] == str(site.mail.homes / "@other.test/alice")
    assert await send(site, "alice@other.test") == 250
    await arrived(site, user["home"])
    assert await send(site, ALICE) == 550


async def test_suspended_ends_sessions_and_logins_and_mail_still_arrives(site: Site) -> None:
    user = await site.create()
    session = await asyncio.to_thread(site.mail.imap, ALICE, PASSWORD)
    session.select("INBOX")
    suspended = await site.ask("PATCH", f"/v1/users/{ALICE}", {"state": "suspended"})
    assert suspended["proofs"]["sessions"]["result"] == "ok"
    with pytest.raises((imaplib.IMAP4.abort, OSError)):
        await asyncio.to_thread(session.noop)
    session.shutdown()
    with pytest.raises(imaplib.IMAP4.error):
        await asyncio.to_thread(site.mail.imap, ALICE, PASSWORD)
    assert await send(site) == 250
    await arrived(site, user["home"])
    await site.ask("PATCH", f"/v1/users/{ALICE}", {"state": "active"})
    assert await asyncio.to_thread(subjects, site) == ["Hello"]


async def test_deleted_bounces_and_is_archived_and_restore_brings_the_mail_back(site: Site) -> None:
    user = await site.create()
    await send(site, subject="old")
    await arrived(site, user["home"])
    session = await asyncio.to_thread(site.mail.imap, ALICE, PASSWORD)
    deleted = await site.ask("DELETE", f"/v1/users/{ALICE}")
    assert deleted["home"] is None
    assert deleted["proofs"]["maildir"] == {"result": "ok", "detail": "archived"}
    with pytest.raises((imaplib.IMAP4.abort, OSError)):
        await asyncio.to_thread(session.noop)
    session.shutdown()
    assert await send(site) == 550
    with pytest.raises(imaplib.IMAP4.error):
        await asyncio.to_thread(site.mail.imap, ALICE, PASSWORD)
    assert not (site.mail.homes / "alice").exists()
    archive = site.mail.homes / ".archive"
    assert (archive.stat().st_uid, archive.stat().st_mode & 0o777) == (0, 0o700)
    assert (archive / str(user["id"]) / "Maildir").is_dir()
    restored = await site.post(f"/v1/users/{user['id']}/restore")
    assert (restored["uid"], restored["home"]) == (user["uid"], user["home"])
    assert await asyncio.to_thread(subjects, site) == ["old"]
    assert await send(site, subject="new") == 250
    await arrived(site, user["home"], 2)


async def test_a_successor_gets_an_empty_box_and_another_uid(site: Site) -> None:
    first = await site.create()
    await send(site, subject="private")
    await arrived(site, first["home"])
    # Both at once, without waiting in between: the archiving must still come first.
    gone = await site.client.delete(f"/v1/users/{ALICE}")
    assert gone.status_code == 202
    second = await site.create(reuse_address=True)
    assert second["id"] != first["id"]
    assert second["uid"] != first["uid"]
    assert second["home"] == first["home"]
    assert Path(second["home"]).stat().st_uid == second["uid"]
    assert await asyncio.to_thread(subjects, site) == []
    assert await send(site, subject="for the second") == 250
    await arrived(site, second["home"])
    archived = site.mail.homes / ".archive" / str(first["id"])
    assert archived.stat().st_uid == first["uid"]
    # The first one's answer says that all is well, and whose the address is.
    old = await site.ask("GET", f"/v1/users/{first['id']}")
    assert old["proofs"]["dovecot"]["result"] == "ok"
    await site.ask("POST", f"/v1/users/{first['id']}/purge")
    assert not archived.exists()
    assert await asyncio.to_thread(subjects, site) == ["for the second"]


async def test_hostile_recipients_are_refused_and_harm_nobody(site: Site) -> None:
    user = await site.create()
    for hostile in (
        f"ü@{PRIMARY_DOMAIN}",
        f"'@{PRIMARY_DOMAIN}",
        f"%s@{PRIMARY_DOMAIN}",
        f"a' or '1'='1@{PRIMARY_DOMAIN}",
    ):
        assert await asyncio.to_thread(raw_rcpt, site, hostile) in (
            (550,) if "ü" in hostile else (501, 550, 553, 554)
        ), hostile
        assert await send(site) == 250
    await arrived(site, user["home"], 4)


def raw_rcpt(site: Site, address: str) -> int:
    with site.mail.smtp() as smtp:
        smtp.ehlo()
        smtp.docmd("MAIL FROM:<sender@elsewhere.test>")
        smtp.sock.sendall(f"RCPT TO:<{address}>\r\n".encode())
        return smtp.getreply()[0]


async def test_mail_flows_again_within_five_seconds_after_mariadb_was_away(site: Site) -> None:
    user = await site.create()
    assert await send(site) == 250
    await arrived(site, user["home"])
    await asyncio.to_thread(site.mariadb.stop)
    assert await send(site) == 451
    refused = await site.client.get(f"/v1/users/{ALICE}")
    assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")
    await asyncio.to_thread(site.mariadb.restart)
    loop = asyncio.get_running_loop()
    back = loop.time()
    while await send(site) != 250:
        assert loop.time() - back < 5, "mail did not flow again within five seconds"
        await asyncio.sleep(0.1)
    await arrived(site, user["home"], 2)
    assert (await site.create("bob"))["ready"]


async def test_a_quota_is_at_work_and_changes_at_once(site: Site) -> None:
    await site.create(quota_bytes=2 * 1024 * 1024)
    big = "x" * 70 + "\n"
    reply = await asyncio.to_thread(site.mail.send, ALICE, "big", big * 40_000)
    assert reply == 552
    await site.ask("PATCH", f"/v1/users/{ALICE}", {"quota_bytes": 20 * 1024 * 1024})
    assert await asyncio.to_thread(site.mail.send, ALICE, "big", big * 40_000) == 250


async def test_without_a_password_no_login_works(site: Site) -> None:
    user = await site.post("/v1/users", address=ALICE)
    assert user["has_password"] is False
    for password in ("", "null", "None", "*", "!"):
        with pytest.raises(imaplib.IMAP4.error):
            await asyncio.to_thread(site.mail.imap, ALICE, password)
