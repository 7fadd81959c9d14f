"""What the API says about who may send as what is what Postfix (envelope) and rspamd (From) do, for 200 combinations."""

import asyncio
import random
import smtplib
from dataclasses import dataclass
from itertools import cycle

import pytest

from tests.mail.conftest import PASSWORD, Site
from tests.stack.mail import PRIMARY_DOMAIN

pytestmark = pytest.mark.asyncio

DICE = random.Random(20261123)
NAMES = ("ann", "bob", "carol", "dave", "erin", "frank")
SUSPENDED, DELETED = "erin", "frank"
"""After they have signed in: their sessions stay open."""
COMBINATIONS = 200


@dataclass(frozen=True)
class Combination:
    login: str
    sender: str


def address(name: str, domain: str = PRIMARY_DOMAIN) -> str:
    return f"{name}@{domain}"


async def fill(site: Site) -> list[str]:
    """Accounts, and aliases of every kind with rules at random. Returns every address that anybody may want to send as."""
    hashed = (await asyncio.to_thread(site.mail.doveadm, "pw", "-s", "SHA512-CRYPT", "-p", PASSWORD)).strip()
    for name in NAMES:
        await site.post("/v1/users", address=address(name), password_hash=hashed)
    everybody = [address(name) for name in NAMES]
    aliases = []
    for number in range(8):
        kind = "receive_only" if number % 3 == 0 else "send_as"
        alias = address(f"alias{number}", PRIMARY_DOMAIN if number % 2 else "other.test")
        designated = [] if kind == "receive_only" else DICE.sample(everybody, DICE.randrange(4))
        body = {"kind": kind, "destinations": DICE.sample(everybody, 2), "designated": designated}
        answer = await site.client.post("/v1/aliases", json={"address": alias, **body})
        assert answer.status_code in (201, 202), answer.text
        aliases.append(alias)
    for alias in aliases:
        answer = await site.client.get(f"/v1/aliases/{alias}", headers={"Prefer": "wait=20"}, timeout=30)
        assert answer.json()["ready"], answer.text
    strangers = [address("nobody-has-it"), address("ann", "other.test"), "someone@example.net", address("ANN+list")]
    return [*everybody, *aliases, *strangers]


class Sessions:
    """Signed in, and replaced before Postfix tires of refusals: from the tenth on each costs a second. Of whoever can no longer
    sign in there are some in store."""

    def __init__(self, site: Site, store: int) -> None:
        sources = (f"127.0.0.{number}" for number in cycle(range(10, 250)))  # Postfix takes 50 connections from each
        self._open = lambda name: site.mail.submission(address(name), PASSWORD, source=next(sources))
        self._store = {name: [self._open(name) for _ in range(store)] for name in (SUSPENDED, DELETED)}
        self._all = [client for clients in self._store.values() for client in clients]
        self._used: dict[str, tuple[smtplib.SMTP, int]] = {}

    def of(self, name: str) -> smtplib.SMTP:
        client, count = self._used.get(name, (None, 0))
        if client is None or count == 4:
            if client is not None:
                client.close()
            client, count = (self._store[name].pop() if name in self._store else self._open(name)), 0
            self._all.append(client)
        self._used[name] = (client, count + 1)
        return client

    def close(self) -> None:
        for client in self._all:
            client.close()


def try_both(client: smtplib.SMTP, sender: str, own: str) -> tuple[bool, bool]:
    """Whether it is taken as the envelope sender, and as From under one's own envelope."""
    to = address("ann")
    client.rset()
    envelope = client.mail(sender)[0] == 250 and client.rcpt(to)[0] == 250
    client.rset()
    if client.mail(own)[0] != 250 or client.rcpt(to)[0] != 250:
        return envelope, False
    code, _ = client.data(f"From: <{sender}>\r\nTo: <{to}>\r\nSubject: x\r\n\r\ntext\r\n".encode())
    assert code == 250 or 500 <= code < 600, code
    return envelope, code == 250


async def test_200_combinations(site: Site) -> None:
    senders = await fill(site)
    sessions = await asyncio.to_thread(Sessions, site, COMBINATIONS // len(NAMES) // 2)
    try:
        await site.ask("PATCH", f"/v1/users/{address(SUSPENDED)}", {"state": "suspended"})
        await site.ask("DELETE", f"/v1/users/{address(DELETED)}")
        every = [Combination(name, sender) for name in NAMES for sender in senders]
        asked = [DICE.choice(every) for _ in range(COMBINATIONS)]
        listed = {}
        for name in NAMES:
            answer = await site.client.get(f"/v1/users/{address(name)}/send-as")
            listed[name] = {item["address"] for item in answer.json()["items"]} if answer.status_code == 200 else set()
        wrong = []
        for each in asked:
            query = {"login": address(each.login), "from": each.sender}
            said = (await site.client.get("/v1/send-as", params=query)).json()
            plain = each.sender.lower().replace("+list", "")
            done = await asyncio.to_thread(
                lambda each=each: try_both(sessions.of(each.login), each.sender, address(each.login))  # type: ignore[misc]  # a default
            )
            if not (said["allowed"] == done[0] == done[1] == (plain in listed[each.login])):
                wrong.append((each, said, done, plain in listed[each.login]))
        assert wrong == []
        allowed = sum(each.sender.lower().replace("+list", "") in listed[each.login] for each in asked)
        assert 15 < allowed < COMBINATIONS - 15, "the combinations tell nothing"
        assert listed[SUSPENDED] == listed[DELETED] == set()
    finally:
        sessions.close()
