"""Password resets: whether the clock tells who has an account, and how soon a used link has ended the old sessions."""

import asyncio
import http.client
import imaplib
import json
import random
import statistics
import threading
import time
import urllib.request
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from app.db import Database, utc_now
from app.permissions import Role
from app.services.changes import Actor, Change
from app.services.principals import create_principal
from bench.load import Load
from bench.system import Api, System

PASSWORD = "seven green lanterns over the harbour"
NEW = "eleven brown foxes below the bridge"
ID = "SELECT id FROM users WHERE address = '{}'"


@dataclass(frozen=True)
class Timing:
    """Medians, in milliseconds, and what they differ by, in percent of the greater."""

    known: float
    unknown: float

    @property
    def difference(self) -> float:
        return 100 * abs(self.known - self.unknown) / max(self.known, self.unknown)


def measure_timing(system: System, count: int) -> Timing:
    """Requests for so many accounts, and for as many addresses that nobody has, mixed, one after another."""
    addresses = [system.address(number) for number in range(1, count + 1)]
    asked = [(True, address) for address in addresses] + [(False, f"none{address[4:]}") for address in addresses]
    random.Random(1).shuffle(asked)
    with system.api() as api:
        website = Api(api.port, api.pid, _website_token(system, api.port))
        warm_up = [
            website.request("POST", "/v1/password-resets", {"user": f"warm{n}@nowhere.test"}) for n in range(100)
        ]
        Load(api.port, warm_up, 60, connections=1, once=True, warm_up=0).run().only(202)
        requests = [website.request("POST", "/v1/password-resets", {"user": address}) for _, address in asked]
        took = Load(api.port, requests, 600, connections=1, once=True, warm_up=0).run().only(202).latencies
    linked = system.mariadb.sql("SELECT COUNT(user_id), COUNT(*) FROM password_resets", "owner")
    if linked != [[str(count), str(2 * count + len(warm_up))]]:
        raise RuntimeError(f"links: {linked}")
    system.mariadb.sql(_FORGET, "owner")
    medians = [
        statistics.median(seconds for seconds, (known, _) in zip(took, asked, strict=True) if known is wanted) * 1e3
        for wanted in (True, False)
    ]
    return Timing(*medians)


_FORGET = """
DELETE FROM notices; DELETE FROM password_resets; DELETE FROM jobs WHERE kind = 'mail.send'; DELETE FROM login_failures;
DELETE FROM audit_events WHERE subject_kind = 'password-reset';
"""


def _website_token(system: System, port: int) -> str:
    async def make() -> tuple[str, str]:
        database = Database(system.mariadb.url("owner"))
        async with database.write.begin() as connection:
            change = Change(connection, Actor("bench", "127.0.0.1", "bench"), utc_now())
            credentials = await create_principal(change, "bench website", Role.WEBSITE)
        await database.close()
        return credentials

    client_id, secret = asyncio.run(make())
    form = f"grant_type=client_credentials&client_id={client_id}&client_secret={secret}".encode()
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/oauth/token", form, timeout=10) as answer:
        token: str = json.load(answer)["access_token"]
    return token


def measure_confirm(system: System, count: int) -> float:
    """Milliseconds from sending the new password until the account's open IMAP session is closed; the median.

    Wants a worker that runs.
    """
    hashed = system.mail.doveadm("pw", "-s", "SHA512-CRYPT", "-p", PASSWORD).strip()
    names = [system.address(number) for number in range(1, count + 1)]
    among = ", ".join(f"'{name}'" for name in names)
    system.mariadb.sql(f"UPDATE users SET password_hash = '{hashed}' WHERE address IN ({among})", "owner")
    took = []
    with system.api() as api:
        for name in names:
            shown = _ask(api, "/v1/password-resets", {"user": name, "reason": "bench", "deliver": "show"})
            token = shown["link"].partition("#")[2]
            # It cannot sign out any more when it is closed.
            with suppress(imaplib.IMAP4.abort), system.mail.imap(name, PASSWORD) as reader:
                reader.select("INBOX")
                took.append(_close(api, reader, token))
    system.mariadb.sql(_FORGET, "owner")
    return statistics.median(took) * 1e3


def _close(api: Api, reader: imaplib.IMAP4, token: str) -> float:
    closed = 0.0

    def watch() -> None:
        nonlocal closed
        while reader.readline():
            pass
        closed = time.perf_counter()

    watcher = threading.Thread(target=watch)
    watcher.start()
    began = time.perf_counter()
    answer = _ask(api, "/v1/password-resets/confirm", {"token": token, "password": NEW}, wait=20)
    watcher.join(20)
    if not (closed and answer["ready"]):
        raise RuntimeError(f"the session is still open: {answer}")
    return closed - began


def _ask(api: Api, path: str, body: object, wait: int = 0) -> dict[str, Any]:
    connection = http.client.HTTPConnection("127.0.0.1", api.port, timeout=60)
    headers = {"Authorization": f"Bearer {api.token}", "Content-Type": "application/json", "Prefer": f"wait={wait}"}
    connection.request("POST", path, json.dumps(body), headers)
    answer = connection.getresponse()
    text = answer.read()
    connection.close()
    if answer.status not in (200, 202):
        raise RuntimeError(f"{path}: {answer.status} {text!r}")
    return dict(json.loads(text))
