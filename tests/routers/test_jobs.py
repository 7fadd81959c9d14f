"""Jobs, as callers see them; and a dead one, tried again."""

from collections.abc import Awaitable, Callable
from typing import Any

import httpx
import pytest
from sqlalchemy import event, insert, select

from app.db import Database
from app.models.audit_events import audit_events
from app.models.hosts import SERVICE_HOST
from app.models.jobs import JobState, jobs
from app.queue.claim import Outcome, claim, finish, give_up
from app.queue.contracts import MAIL_SEND, MAILBOX_SYNC, JobKind
from app.services.jobs import list_jobs
from tests.conftest import HOST, PRIMARY, Clock, TestDatabase

pytestmark = pytest.mark.asyncio


async def create(client: httpx.AsyncClient, name: str = "alice") -> dict[str, Any]:
    answer = await client.post("/v1/users", json={"address": f"{name}@{PRIMARY}"})
    assert answer.status_code == 202, answer.text
    return dict(answer.json())


Work = Callable[[str | None], Awaitable[None]]


@pytest.fixture
def work(worker_database: Database, clock: Clock) -> Work:
    """Ends all that is due: with an error for good, or well."""

    async def turn(error: str | None) -> None:
        for each in await claim(worker_database, HOST, clock(), limit=100, kinds=[MAILBOX_SYNC]):
            if error is None:
                await finish(worker_database, each, Outcome(each.version, True, {}, {}), clock())
            else:
                await give_up(worker_database, each, error, clock())

    return turn


async def test_a_job_is_followed_to_its_end(client: httpx.AsyncClient, work: Work, clock: Clock) -> None:
    made = await client.post("/v1/users", json={"address": f"alice@{PRIMARY}"}, headers={"X-Request-Id": "request-1"})
    url = made.json()["job"]["url"]
    answer = await client.get(url)
    assert answer.status_code == 200
    assert url == f"/v1/jobs/{answer.json()['id']}"
    assert answer.json() == {
        "id": made.json()["job"]["id"],
        "host": HOST,
        "kind": "mailbox.sync",
        "subject_id": made.json()["id"],
        "version": 1,
        "state": "ready",
        "attempts": 0,
        "error": None,
        "request_id": "request-1",
        "run_at": "2026-11-23T12:00:00Z",
        "created_at": "2026-11-23T12:00:00Z",
        "finished_at": None,
    }
    clock.forward(seconds=5)
    await work(None)
    done = (await client.get(url)).json()
    assert (done["state"], done["attempts"], done["error"]) == ("done", 1, None)
    assert done["finished_at"] == "2026-11-23T12:00:05Z"


async def test_a_dead_job_is_tried_again_as_a_new_one(
    client: httpx.AsyncClient, database: Database, work: Work
) -> None:
    user = await create(client)
    await work("the home belongs to somebody else")
    dead = await client.get(user["job"]["url"])
    assert (dead.json()["state"], dead.json()["error"]) == ("dead", "the home belongs to somebody else")
    answer = await client.post(f"{user['job']['url']}/retry")
    new = answer.json()
    assert answer.status_code == 202
    assert answer.headers["location"] == f"/v1/jobs/{new['id']}"
    assert new["id"] != dead.json()["id"]
    assert (new["state"], new["attempts"], new["error"]) == ("ready", 0, None)
    assert (new["subject_id"], new["version"], new["host"]) == (user["id"], 1, HOST)
    assert (await client.get(user["job"]["url"])).json() == dead.json(), "the dead one is history"
    assert (await client.get(f"/v1/users/{user['id']}")).json()["job"]["id"] == new["id"]
    await work(None)
    assert (await client.get(f"/v1/users/{user['id']}")).json()["ready"] is True
    async with database.read.connect() as connection:
        query = select(audit_events.c.subject_id, audit_events.c.after).where(audit_events.c.action == "jobs.retry")
        assert [tuple(row) for row in await connection.execute(query)] == [(str(dead.json()["id"]), {"job": new["id"]})]


async def test_a_retry_is_about_the_account_as_it_is_now(client: httpx.AsyncClient, work: Work) -> None:
    user = await create(client)
    await work("no")
    await client.patch(f"/v1/users/{user['id']}", json={"display_name": "B"})
    assert (await client.post(f"{user['job']['url']}/retry")).json()["version"] == 2


async def test_a_letter_that_was_refused_is_tried_again_as_that_letter(
    client: httpx.AsyncClient, worker_database: Database, clock: Clock
) -> None:
    """And no account that happens to have its number is touched."""
    body = {"address": f"alice@{PRIMARY}", "contact_address": "alice@example.net", "invite": True}
    user = (await client.post("/v1/users", json=body)).json()
    [letter] = await claim(worker_database, SERVICE_HOST, clock(), limit=1, kinds=[MAIL_SEND])
    assert letter.subject_id == user["id"] == 1
    await give_up(worker_database, letter, "refused: 550 No such user", clock())
    new = (await client.post(f"/v1/jobs/{letter.id}/retry")).json()
    assert (new["kind"], new["host"], new["subject_id"], new["state"]) == (MAIL_SEND, SERVICE_HOST, 1, "ready")
    assert (await client.get(f"/v1/users/{user['id']}")).json()["job"]["id"] == user["job"]["id"]
    assert [each.id for each in await claim(worker_database, SERVICE_HOST, clock(), limit=9, kinds=[MAIL_SEND])] == [
        new["id"]
    ]


async def test_only_a_dead_job_needs_it(client: httpx.AsyncClient, work: Work) -> None:
    user = await create(client)
    retry = f"{user['job']['url']}/retry"
    for state in ("ready", "done"):
        answer = await client.post(retry)
        assert (answer.status_code, answer.json()["type"]) == (409, "/problems/job-not-dead")
        assert f" is {state}." in answer.json()["detail"]
        await work(None)
    assert len((await client.get("/v1/jobs")).json()["items"]) == 1


async def test_a_repeated_retry_makes_one_job(client: httpx.AsyncClient, database: Database, work: Work) -> None:
    user = await create(client)
    await work("no")
    headers = {"Idempotency-Key": "k1"}
    first, repeat = [await client.post(f"{user['job']['url']}/retry", headers=headers) for _ in range(2)]
    assert (repeat.status_code, repeat.json()) == (202, first.json())
    assert repeat.headers["idempotency-replayed"] == "true"
    async with database.read.connect() as connection:
        assert len((await connection.execute(select(jobs.c.id))).all()) == 2


async def test_lists_page_newest_first_and_filter(client: httpx.AsyncClient, work: Work) -> None:
    first = await create(client, "user0")
    await work("no")
    second = await create(client, "user1")
    await work(None)
    for number in range(2, 5):
        await create(client, f"user{number}")
    seen: list[int] = []
    url = "/v1/jobs?limit=2"
    while url:
        page = await client.get(url)
        seen += [item["id"] for item in page.json()["items"]]
        link = page.headers.get("link", "")
        url = link.partition("<")[2].partition(">")[0]
    assert len(seen) == 5
    assert seen == sorted(seen, reverse=True)

    async def found(**parameters: Any) -> list[int]:
        answer = await client.get("/v1/jobs", params=parameters)
        assert answer.status_code == 200, answer.text
        return [item["id"] for item in answer.json()["items"]]

    assert await found(state="dead") == [first["job"]["id"]]
    assert await found(state="done") == [second["job"]["id"]]
    assert await found(state="running") == []
    assert await found(state="ready") == seen[:3]
    assert await found(subject_id=second["id"]) == [second["job"]["id"]]
    assert await found(host=HOST, kind="mailbox.sync") == seen
    assert await found(host="mail9") == []
    for bad in ("limit=0", "state=broken", "kind=x", "host=%C3%BC", "subject_id=0", "subject_id=x", "cursor=zz", "x=1"):
        assert (await client.get(f"/v1/jobs?{bad}")).status_code == 422, bad


@pytest.mark.parametrize(
    ("job", "status"), [("999", 404), (str(2**62), 404), ("0", 422), (str(2**63), 422), ("x", 422)]
)
async def test_what_is_not_there(client: httpx.AsyncClient, job: str, status: int) -> None:
    assert (await client.get(f"/v1/jobs/{job}")).status_code == status
    assert (await client.post(f"/v1/jobs/{job}/retry")).status_code == status


async def test_the_jobs_of_one_account_are_found_by_their_index(
    seeded: Database, test_database: TestDatabase, clock: Clock
) -> None:
    usual = {
        "lane": "a",
        "kind": MAILBOX_SYNC,
        "version": 1,
        "request_id": "r",
        "run_at": clock(),
        "created_at": clock(),
    }
    # Subject 7 has the ids 8, 1008, 2008 and, of another host, 3001.
    rows = [usual | {"host": HOST, "subject_id": n % 1000} for n in range(3000)]
    async with seeded.write.begin() as connection:
        await connection.execute(insert(jobs), [*rows, usual | {"host": SERVICE_HOST, "subject_id": 7}])
    sqlite = test_database.kind == "sqlite"
    sent: list[tuple[str, Any]] = []

    @event.listens_for(seeded.read.sync_engine, "before_cursor_execute")
    def keep(_: Any, __: Any, statement: str, parameters: Any, *___: Any) -> None:
        sent.append((statement, parameters))

    everything: list[tuple[dict[str, Any], list[int]]] = [
        ({}, [3001, 2008, 1008, 8]),
        ({"host": HOST}, [2008, 1008, 8]),
        ({"kind": JobKind.MAILBOX_SYNC}, [3001, 2008, 1008, 8]),
        ({"state": JobState.DEAD}, []),
        ({"state": JobState.READY, "after": 2008}, [1008, 8]),
        ({"host": HOST, "kind": JobKind.MAILBOX_SYNC, "after": 1008}, [8]),
    ]
    async with seeded.read.connect() as connection:
        for filters, ids in everything:
            assert [row.id for row in await list_jobs(connection, subject_id=7, limit=50, **filters)] == ids
            statement, parameters = sent[-1]
            explain = f"EXPLAIN {'QUERY PLAN ' if sqlite else ''}{statement}"
            step = (await connection.exec_driver_sql(explain, parameters)).mappings().first()
            if sqlite:
                assert "ix_jobs_host_kind_subject_id (host=? AND kind=? AND subject_id=?" in step["detail"], filters
            else:
                assert step["key"] == "ix_jobs_host_kind_subject_id", filters
                assert int(step["rows"]) < 100, dict(step)
