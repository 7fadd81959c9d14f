"""From an HTTP request to a program that signs in with an app password, and to the end of its sessions when it is revoked."""

import asyncio
import imaplib
import poplib
import smtplib
from contextlib import suppress
from typing import Any

import pytest

from tests.mail.conftest import PASSWORD, Site
from tests.stack.mail import PRIMARY_DOMAIN

pytestmark = pytest.mark.asyncio

ALICE = f"alice@{PRIMARY_DOMAIN}"
REFUSED = (imaplib.IMAP4.error, poplib.error_proto, smtplib.SMTPAuthenticationError)


async def make(site: Site, *protocols: str, user: object = ALICE) -> dict[str, Any]:
    body = {"name": "Telephone", "protocols": protocols}
    answer = await site.client.post(f"/v1/users/{user}/app-passwords", json=body)
    assert answer.status_code == 201, answer.text
    return dict(answer.json())


async def opens(site: Site, password: str) -> set[str]:
    """The protocols by which the password gets in."""
    ways = {
        "imap": lambda: site.mail.imap(ALICE, password).logout(),
        "pop3": lambda: site.mail.pop3(ALICE, password).quit(),
        "smtp": lambda: site.mail.submission(ALICE, password).quit(),
    }
    found = set()
    for name, way in ways.items():
        with suppress(*REFUSED):
            await asyncio.to_thread(way)
            found.add(name)
    return found


async def test_made_over_http_and_good_at_once_for_its_protocols(site: Site) -> None:
    await site.create()
    made = await make(site, "imap", "smtp")
    assert await opens(site, made["password"]) == {"imap", "smtp"}
    assert await opens(site, (await make(site, "pop3"))["password"]) == {"pop3"}
    assert await opens(site, PASSWORD) == {"imap", "pop3", "smtp"}


async def test_revoked_its_sessions_end_and_nothing_of_it_gets_in(site: Site) -> None:
    await site.create()
    made, other = await make(site, "imap", "pop3", "smtp"), await make(site, "imap", "pop3", "smtp")
    imap = await asyncio.to_thread(site.mail.imap, ALICE, made["password"])
    pop3 = await asyncio.to_thread(site.mail.pop3, ALICE, made["password"])
    smtp = await asyncio.to_thread(site.mail.submission, ALICE, made["password"])
    imap.select("INBOX")
    assert smtp.mail(ALICE)[0] == 250
    smtp.rset()
    revoked = await site.ask("DELETE", f"/v1/users/{ALICE}/app-passwords/{made['id']}")
    assert revoked["proofs"]["sessions"]["result"] == "ok"
    assert revoked["revoked_at"] is not None
    assert ALICE not in await asyncio.to_thread(site.mail.doveadm, "who", "-1", ALICE)
    with pytest.raises((imaplib.IMAP4.abort, OSError)):
        await asyncio.to_thread(imap.noop)
    with pytest.raises((poplib.error_proto, OSError)):
        await asyncio.to_thread(pop3.stat)
    with suppress(smtplib.SMTPServerDisconnected):
        code, _ = await asyncio.to_thread(smtp.mail, ALICE)
        assert code == 421, "a session that had signed in sends nothing more"
    for close in (imap.shutdown, pop3.close, smtp.close):
        with suppress(OSError):
            close()
    assert await opens(site, made["password"]) == set()
    assert await opens(site, other["password"]) == {"imap", "pop3", "smtp"}
    assert await opens(site, PASSWORD) == {"imap", "pop3", "smtp"}
    items = (await site.client.get(f"/v1/users/{ALICE}/app-passwords")).json()["items"]
    assert [item["id"] for item in items] == [other["id"]]


async def test_suspended_and_resumed(site: Site) -> None:
    await site.create()
    made = await make(site, "imap", "smtp")
    assert await opens(site, made["password"]) == {"imap", "smtp"}
    await site.ask("PATCH", f"/v1/users/{ALICE}", {"state": "suspended"})
    assert await opens(site, made["password"]) == set()
    refused = await site.client.post(
        f"/v1/users/{ALICE}/app-passwords", json={"name": "Another", "protocols": ["imap"]}
    )
    assert (refused.status_code, refused.json()["type"]) == (409, "/problems/user-not-active")
    await site.ask("PATCH", f"/v1/users/{ALICE}", {"state": "active"})
    assert await opens(site, made["password"]) == {"imap", "smtp"}


async def test_a_lock_takes_all_of_them_for_good(site: Site) -> None:
    await site.create()
    made = [await make(site, "imap", "smtp") for _ in range(2)]
    assert await opens(site, made[1]["password"]) == {"imap", "smtp"}
    await site.ask("POST", f"/v1/users/{ALICE}/lock", {})
    await site.ask("POST", f"/v1/users/{ALICE}/unlock", {})
    for each in made:
        assert await opens(site, each["password"]) == set()
    assert await opens(site, PASSWORD) == {"imap", "pop3", "smtp"}


async def test_a_successor_of_the_address_inherits_none(site: Site) -> None:
    user = await site.create()
    made = await make(site, "imap", "pop3", "smtp")
    assert await opens(site, made["password"]) == {"imap", "pop3", "smtp"}
    await site.client.delete(f"/v1/users/{ALICE}")
    await site.create(reuse_address=True)
    assert await opens(site, made["password"]) == set()
    assert (await site.client.get(f"/v1/users/{ALICE}/app-passwords")).json() == {"items": []}
    items = (await site.client.get(f"/v1/users/{user['id']}/app-passwords")).json()["items"]
    assert [item["id"] for item in items] == [made["id"]]


async def test_a_new_password_leaves_them_and_may_take_them(site: Site) -> None:
    """What the owner is told of and chooses: see docs/passwords.md."""
    await site.create()
    made = await make(site, "imap")
    session = await asyncio.to_thread(site.mail.imap, ALICE, made["password"])
    changed = await site.ask("PUT", f"/v1/users/{ALICE}/password", {"password": "eight blue herons by the weir"})
    assert [each["id"] for each in changed["app_passwords"]] == [made["id"]]
    with pytest.raises((imaplib.IMAP4.abort, OSError)):
        await asyncio.to_thread(session.noop)
    session.shutdown()
    assert await opens(site, made["password"]) == {"imap"}
