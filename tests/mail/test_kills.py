"""The worker is killed at random moments while accounts come and go and mail arrives. No mail may meet a missing home."""

import asyncio
import json
import random
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select

from app.config import WorkerSettings
from app.models.hosts import host_status
from tests.mail.conftest import PASSWORD, Site
from tests.stack.mail import PRIMARY_DOMAIN
from tests.workers.host.machine import stop, until, worker_process

pytestmark = pytest.mark.asyncio

ACCOUNTS = 30
CHANGES = 3
DICE = random.Random(20261123)
TO = re.compile(r"to=<(\w+)@cacert\.test>.* status=(\w+)")


class Churn:
    """What was asked for, of each account."""

    def __init__(self, site: Site) -> None:
        self.site = site
        self.sent = Counter[tuple[str, int]]()
        self.ids: dict[str, int] = {}
        self.state: dict[str, str] = {}
        self.ever_deleted: set[str] = set()
        self.over = False

    async def ask(self, method: str, url: str, **body: Any) -> dict[str, Any]:
        answer = await self.site.client.request(method, url, json=body or None)
        assert answer.status_code in (200, 201, 202), answer.text
        found: dict[str, Any] = answer.json()
        return found

    async def account(self, name: str) -> None:
        await asyncio.sleep(DICE.random() * 1.5)
        made = await self.ask("POST", "/v1/users", address=f"{name}@{PRIMARY_DOMAIN}", password=PASSWORD)
        self.ids[name], self.state[name] = made["id"], "active"
        before = "active"
        quiet = name.endswith(("0", "1", "2"))  # these are suspended at most, so they stand all the time
        for _ in range(CHANGES):
            await asyncio.sleep(DICE.random() * 1.5)
            state = self.state[name]
            if state == "deleted":
                await self.ask("POST", f"/v1/users/{self.ids[name]}/restore")
                self.state[name] = before
            elif quiet or DICE.random() < 0.3:
                self.state[name] = "suspended" if state == "active" else "active"
                await self.ask("PATCH", f"/v1/users/{self.ids[name]}", state=self.state[name])
            else:
                self.ever_deleted.add(name)
                before = state
                await self.ask("DELETE", f"/v1/users/{self.ids[name]}")
                self.state[name] = "deleted"

    async def all(self) -> None:
        async with asyncio.TaskGroup() as group:
            for number in range(ACCOUNTS):
                group.create_task(self.account(f"u{number}"))
        # On a slow machine the first kills come before anything was made.
        await until(self.enough_was_taken, seconds=60)
        self.over = True

    async def enough_was_taken(self) -> bool:
        return sum(map(self.accepted, self.ids)) > ACCOUNTS

    def accepted(self, name: str) -> int:
        return self.sent[name, 250]


async def kill_until(churn: Churn, settings: WorkerSettings) -> int:
    """Starts the worker and kills it, again and again."""

    async def started_at() -> Any:
        async with churn.site.worker.host.database.read.connect() as connection:
            return (await connection.execute(select(host_status.c.started_at))).scalar()

    kills = 0
    while not churn.over:
        before = await started_at()

        async def is_up(before: Any = before) -> bool:
            return await started_at() != before

        with worker_process(settings, LOG_LEVEL="error") as process:
            await until(is_up, seconds=20)
            await asyncio.sleep(DICE.random() * 0.7)
            process.kill()
            await asyncio.to_thread(process.wait)
            kills += 1
    return kills


async def mail_until(churn: Churn) -> None:
    while not churn.over:
        name = DICE.choice(list(churn.ids) or ["nobody"])
        churn.sent[name, await asyncio.to_thread(churn.site.mail.send, f"{name}@{PRIMARY_DOMAIN}")] += 1


def messages(home: Path) -> int:
    return len([*home.glob("Maildir/new/*"), *home.glob("Maildir/cur/*")])


def delivered(site: Site, churn: Churn, name: str) -> int:
    return sum(map(messages, (site.mail.homes / name, site.mail.homes / ".archive" / str(churn.ids[name]))))


async def test_killed_while_accounts_come_and_go_and_mail_arrives(site: Site, worker_settings: WorkerSettings) -> None:
    site.worker.stopping.set()  # The one in this process makes room for one that can be killed.
    await asyncio.sleep(0.2)
    churn = Churn(site)
    offset = site.mail.mail_log.stat().st_size
    _, kills, *_ = await asyncio.gather(
        churn.all(), kill_until(churn, worker_settings), *(mail_until(churn) for _ in range(3))
    )
    assert kills >= 2
    assert {code for _, code in churn.sent} == {250, 550}, churn.sent

    async def all_ready() -> bool:
        query = "SELECT COUNT(*) FROM users u JOIN applied a ON a.subject_id = u.id AND a.version = u.version"
        return site.mariadb.sql(query, "owner") == [[str(ACCOUNTS)]]

    with worker_process(worker_settings, LOG_LEVEL="error") as process:
        await until(all_ready, seconds=20)
        for name, user_id in churn.ids.items():
            user = (await site.client.get(f"/v1/users/{user_id}")).json()
            assert (user["ready"], user["state"]) == (True, churn.state[name])
            assert {proof["result"] for proof in user["proofs"].values()} == {"ok"}, json.dumps(user)
            code = await asyncio.to_thread(site.mail.send, f"{name}@{PRIMARY_DOMAIN}")
            churn.sent[name, code] += 1
            assert code == (550 if churn.state[name] == "deleted" else 250)
            assert (site.mail.homes / name).exists() == (churn.state[name] != "deleted")
        assert await stop(process) == 0

    def statuses() -> dict[str, Counter[str]]:
        found: dict[str, Counter[str]] = {name: Counter() for name in churn.ids}
        for name, status in TO.findall(site.mail.mail_log.read_text(errors="replace")[offset:]):
            found[name][status] += 1
        return found

    async def all_settled() -> bool:
        found = statuses()
        return all(found[name]["sent"] + found[name]["bounced"] >= churn.accepted(name) for name in churn.ids)

    await until(all_settled, seconds=20)
    for name, status in statuses().items():
        assert status["sent"] == delivered(site, churn, name), (name, status)
        if name not in churn.ever_deleted:
            assert status == Counter(sent=churn.accepted(name)), (name, status)
        assert status["sent"] + status["bounced"] == churn.accepted(name), (name, status)
    assert 0 < len(churn.ever_deleted) < ACCOUNTS
