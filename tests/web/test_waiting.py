"""`Prefer: wait`: what is read, when it ends, and what it costs."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from sqlalchemy import event
from starlette.requests import Request

from app.db import Database
from app.queue.claim import Outcome, claim, finish, give_up
from app.queue.contracts import MAILBOX_SYNC
from app.web import waiting
from app.web.dependencies import Service
from app.web.waiting import seconds_to_wait
from tests.conftest import HOST, PRIMARY, Clock

FINE = {"maildir": {"result": "ok"}}
FAILED = {"maildir": {"result": "failed", "detail": "wrong owner"}}


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ([], 0),
        (["wait=5"], 5),
        (["WAIT=5"], 5),
        (['wait="5"'], 5),
        (["wait = 5"], 5),
        (["respond-async, wait=5"], 5),
        (["wait=5; x=y"], 5),
        (["return=minimal", "wait=5"], 5),
        (["wait=5, wait=9"], 5),
        (["wait=0"], 0),
        (["wait=30"], 30),
        (["wait=31"], 30),
        (["wait=" + "9" * 5000], 30),
        (["wait=0005"], 5),
        (["wait=" + "0" * 50_000 + "x"], 0),
        (["wait=-5"], 0),
        (["wait=5.5"], 0),
        (["wait=five"], 0),
        (["wait"], 0),
        (["await=5"], 0),
        (["wait=\u0665"], 0),
    ],
)
def test_a_preference_is_read(headers: list[str], seconds: int) -> None:
    raw = [(b"prefer", value.encode("utf-8")) for value in headers]
    assert seconds_to_wait(Request({"type": "http", "headers": raw})) == seconds


Work = Callable[..., Awaitable[int]]


@pytest.fixture
def work(worker_database: Database, clock: Clock) -> Work:
    """A worker's turn: waits for `count` jobs, then ends them. Returns the version of the last."""

    async def turn(*, count: int = 1, proofs: dict[str, Any] = FINE, dead: bool = False) -> int:
        version = 0
        while count:
            claims = await claim(worker_database, HOST, clock(), limit=10, kinds=[MAILBOX_SYNC])
            for each in claims:
                version = each.version
                if dead:
                    await give_up(worker_database, each, "the home belongs to somebody else", clock())
                else:
                    await finish(worker_database, each, Outcome(version, True, proofs, {"uid": 100_001}), clock())
            count -= len(claims)
            await asyncio.sleep(0.005)
        return version

    return turn


async def create(client: httpx.AsyncClient, name: str = "alice", wait: int | None = 20) -> httpx.Response:
    headers = {} if wait is None else {"Prefer": f"wait={wait}"}
    return await client.post("/v1/users", json={"address": f"{name}@{PRIMARY}"}, headers=headers)


@pytest.mark.asyncio
async def test_it_ends_when_the_host_is_ready(client: httpx.AsyncClient, work: Work) -> None:
    started = time.monotonic()
    answer, _ = await asyncio.gather(create(client), work())
    assert time.monotonic() - started < 10
    body = answer.json()
    assert (answer.status_code, body["ready"], body["job"], body["uid"]) == (201, True, None, 100_001)
    assert answer.headers["preference-applied"] == "wait"
    assert answer.headers["etag"] == '"1.1"'
    assert "link" not in answer.headers


@pytest.mark.asyncio
async def test_a_change_and_a_reading_wait_too(client: httpx.AsyncClient, work: Work) -> None:
    made = await create(client, wait=None)
    url = made.headers["location"]
    assert "preference-applied" not in made.headers
    prefer = {"Prefer": "wait=20"}
    read, _ = await asyncio.gather(client.get(url, headers=prefer), work())
    assert (read.status_code, read.json()["ready"]) == (200, True)
    assert read.headers["preference-applied"] == "wait"
    changed, _ = await asyncio.gather(client.patch(url, json={"display_name": "A"}, headers=prefer), work())
    assert (changed.status_code, changed.json()["ready"], changed.json()["version"]) == (200, True, 2)
    deleted, _ = await asyncio.gather(client.delete(url, headers=prefer), work())
    assert (deleted.status_code, deleted.json()["ready"], deleted.json()["state"]) == (200, True, "deleted")


@pytest.mark.asyncio
async def test_what_is_ready_is_not_waited_for(client: httpx.AsyncClient, work: Work) -> None:
    made, _ = await asyncio.gather(create(client), work())
    started = time.monotonic()
    answer = await client.get(made.headers["location"], headers={"Prefer": "wait=20"})
    assert time.monotonic() - started < 2
    assert answer.json()["ready"] is True


@pytest.mark.asyncio
async def test_it_ends_when_the_job_is_dead(client: httpx.AsyncClient, work: Work) -> None:
    started = time.monotonic()
    answer, _ = await asyncio.gather(create(client), work(dead=True))
    assert time.monotonic() - started < 10
    job = answer.json()["job"]
    assert (answer.status_code, answer.json()["ready"]) == (202, False)
    assert (job["state"], job["error"]) == ("dead", "the home belongs to somebody else")
    assert answer.headers["link"] == f'<{job["url"]}>; rel="monitor"'
    again = await client.get(answer.headers["location"], headers={"Prefer": "wait=20"})
    assert again.json()["job"]["state"] == "dead"
    assert time.monotonic() - started < 10


@pytest.mark.asyncio
async def test_it_ends_when_the_job_is_done_and_a_proof_failed(client: httpx.AsyncClient, work: Work) -> None:
    started = time.monotonic()
    answer, _ = await asyncio.gather(create(client), work(proofs=FAILED))
    assert time.monotonic() - started < 10
    assert (answer.status_code, answer.json()["ready"], answer.json()["job"]["state"]) == (202, False, "done")
    assert answer.json()["proofs"] == FAILED


@pytest.mark.asyncio
async def test_it_ends_after_so_many_seconds(client: httpx.AsyncClient) -> None:
    started = time.monotonic()
    answer = await create(client, wait=1)
    assert 1 <= time.monotonic() - started < 5
    assert (answer.status_code, answer.json()["ready"], answer.json()["job"]["state"]) == (202, False, "ready")
    assert answer.headers["preference-applied"] == "wait"


@pytest.mark.asyncio
async def test_many_wait_with_one_poller_and_hold_no_connection(
    api: FastAPI, client: httpx.AsyncClient, work: Work
) -> None:
    service: Service = api.state.service
    count = 40
    waiters = [asyncio.create_task(create(client, f"user{number}")) for number in range(count)]
    while len(service.waiter._awaited) < count:  # noqa: ASYNC110  nothing announces it
        await asyncio.sleep(0.01)
    taken: list[int] = []
    held: list[int] = []
    read = service.database.read.sync_engine
    event.listen(read, "checkout", lambda *_: (taken.append(1), held.append(read.pool.checkedout())))  # type: ignore[attr-defined]
    started = time.monotonic()
    await asyncio.sleep(0.4)
    polls = (time.monotonic() - started) / waiting.POLL_SECONDS
    assert service.database.write.sync_engine.pool.checkedout() == 0  # type: ignore[attr-defined]
    assert 1 <= len(taken) <= polls + 1
    assert max(held) == 1
    await work(count=count)
    assert {answer.status_code for answer in await asyncio.gather(*waiters)} == {201}
    await asyncio.sleep(0.1)
    assert service.waiter._awaited == {}
    polled = len(taken)
    await asyncio.sleep(0.1)
    assert len(taken) == polled, "nobody waits, nobody polls"


@pytest.mark.asyncio
async def test_a_stuck_job_does_not_slow_down_a_newcomer(
    client: httpx.AsyncClient, work: Work, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(waiting, "SLOWER", 10)
    monkeypatch.setattr(waiting, "LONGEST_PAUSE", 20)
    await create(client, "stuck", wait=None)
    await work(dead=True)
    await client.patch(f"/v1/users/stuck@{PRIMARY}", json={"display_name": "x"})
    stuck = asyncio.create_task(client.get(f"/v1/users/stuck@{PRIMARY}", headers={"Prefer": "wait=30"}))
    await asyncio.sleep(1.2)  # 0.008 + 0.08 + 0.8: by now the poller sleeps for eight seconds
    started = time.monotonic()
    newcomer = asyncio.create_task(create(client, "newcomer"))
    await work(count=2)
    assert (await newcomer).status_code == 201
    assert time.monotonic() - started < 4
    stuck.cancel()


@pytest.mark.asyncio
async def test_a_poll_that_fails_ends_no_wait(
    api: FastAPI, client: httpx.AsyncClient, work: Work, monkeypatch: pytest.MonkeyPatch
) -> None:
    service: Service = api.state.service
    failed: list[int] = []
    read = service.database.read

    class Flaky:
        @property
        def read(self) -> Any:
            if len(failed) < 2:
                failed.append(1)
                raise ConnectionError
            return read

    monkeypatch.setattr(service.waiter, "_database", Flaky())
    answer, _ = await asyncio.gather(create(client), work())
    assert (answer.status_code, len(failed)) == (201, 2)
