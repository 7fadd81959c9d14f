"""/v1/audit-events: what is in it, its filters and pages, what an owner sees of it, and what a page costs."""

from collections.abc import AsyncIterator
from datetime import timedelta
from typing import Any

import httpx
import pytest
import pytest_asyncio
from fastapi import FastAPI
from sqlalchemy import insert, text

from app.db import Database, utc_now
from app.models.audit_events import audit_events
from app.permissions import Role
from app.services.audit_events import EventFilter, list_events
from app.services.changes import Change
from app.services.principals import create_principal
from tests.conftest import ACTOR, Clock, TestDatabase, anonymous
from tests.routers.accounts import ALICE, BOB, make_alias, make_user

pytestmark = pytest.mark.asyncio

Client = httpx.AsyncClient
HIDDEN = {"principal_id": None, "principal_name": None, "key_id": None, "client_address": None}


async def events(client: Client, query: str = "", **headers: str) -> list[dict[str, Any]]:
    answer = await client.get(f"/v1/audit-events{query}", headers=headers)
    assert answer.status_code == 200, answer.text
    return list(answer.json()["items"])


@pytest_asyncio.fixture
async def webmail(api: FastAPI, seeded: Database) -> AsyncIterator[Client]:
    async with seeded.write.begin() as connection:
        credentials = await create_principal(Change(connection, ACTOR, utc_now()), "Webmail", Role.WEBMAIL)
    async with anonymous(api) as made:
        made.auth = httpx.BasicAuth(*credentials)
        yield made


async def owner(webmail: Client, user: str) -> dict[str, str]:
    answer = await webmail.post(f"/v1/users/{user}/owner-tokens")
    return {"Authorization": f"Bearer {answer.json()['access_token']}"}


async def test_a_change_is_there_with_before_and_after(client: Client, clock: Clock) -> None:
    alice = await make_user(client, "alice", password="four unrelated words here", display_name="Alice")
    clock.forward(seconds=1)
    body = {"display_name": "Alice Smith"}
    await client.patch(f"/v1/users/{ALICE}", json=body, headers={"X-Request-ID": "request-12345"})
    [changed, created] = await events(client, f"?user_id={alice['id']}")
    me = (await client.get("/v1/me")).json()
    assert changed.pop("id") > created["id"]
    assert isinstance(changed.pop("key_id"), int)
    assert changed == {
        "at": "2026-11-23T12:00:01Z",
        "action": "users.change",
        "outcome": "accepted",
        "problem": None,
        "subject_kind": "user",
        "subject_id": str(alice["id"]),
        "user_id": alice["id"],
        "role": "primary",
        "principal_id": me["id"],
        "principal_name": me["name"],
        "client_address": "127.0.0.1",
        "request_id": "request-12345",
        "before": {"display_name": "Alice"},
        "after": {"display_name": "Alice Smith"},
    }
    assert created["after"]["password"] is True
    assert "four unrelated" not in str(created)
    assert "$argon2" not in str(created)


async def test_each_filter(client: Client, clock: Clock) -> None:
    await make_user(client, "alice")
    clock.forward(seconds=1)
    bob = await make_user(client, "bob")
    clock.forward(seconds=1)
    refused = await client.delete("/v1/hosts/nowhere")
    me = (await client.get("/v1/me")).json()["id"]

    async def found(query: str) -> list[str]:
        return [event["action"] for event in await events(client, query)]

    assert await found(f"?principal={me}") == ["hosts.delete", "users.create", "users.create"]
    assert await found("?principal=nobody") == []
    assert await found("?action=users.create") == ["users.create"] * 2
    assert await found("?outcome=refused") == ["hosts.delete"]
    assert await found(f"?subject_kind=user&subject_id={bob['id']}") == ["users.create"]
    assert await found("?subject_kind=host&subject_id=nowhere") == ["hosts.delete"]
    assert await found(f"?user_id={bob['id']}") == ["users.create"]
    assert await found(f"?request_id={refused.headers['X-Request-Id']}") == ["hosts.delete"]
    assert await found("?from=2026-11-23T12:00:02Z&outcome=refused") == ["hosts.delete"]
    assert await found(f"?principal={me}&from=2026-11-23T13:00:01%2B01:00&to=2026-11-23T12:00:02Z") == ["users.create"]
    assert await found("?action=users.create&outcome=refused") == []


@pytest.mark.parametrize(
    "query",
    ["since=2026-11-23T12:00:02Z", "from=2026-11-23T12:00:02", "outcome=maybe", "subject_id=1", "subject_kind=user",
     "cursor=MTIz", "cursor=x", "action=%C3%BC", "user_id=0", "limit=0"],
)  # fmt: skip
async def test_what_is_no_filter_is_named(client: Client, query: str) -> None:
    answer = await client.get(f"/v1/audit-events?{query}")
    assert (answer.status_code, answer.headers["content-type"]) == (422, "application/problem+json")


async def test_pages_are_whole_and_in_order(client: Client, seeded: Database, clock: Clock) -> None:
    base = {
        "principal_id": "p",
        "client_address": "",
        "request_id": "r",
        "action": "x.y",
        "subject_kind": "user",
        "subject_id": "1",
    }
    times = [
        clock.now + timedelta(microseconds=step) for step in (0, 0, 0, 5, 5, 3, 9, 1)
    ]  # times and ids in other orders
    async with seeded.write.begin() as connection:
        await connection.execute(insert(audit_events), [{**base, "at": at} for at in times])
    whole = [event["id"] for event in await events(client, "?action=x.y")]
    assert len(whole) == len(times)
    ordered = sorted(zip(times, sorted(whole), strict=True), reverse=True)
    assert whole == [event_id for _, event_id in ordered]
    paged, url = [], "/v1/audit-events?action=x.y&limit=3"
    while url:
        answer = await client.get(url)
        paged += [event["id"] for event in answer.json()["items"]]
        url = answer.links["next"]["url"] if "next" in answer.links else ""
    assert paged == whole


async def test_an_owner_sees_what_concerns_the_account_and_not_who_or_whence(
    client: Client, webmail: Client, api: FastAPI, clock: Clock
) -> None:
    alice = await make_user(client, "alice")
    bob = await make_user(client, "bob")
    clock.forward(seconds=1)
    await make_alias(client, "pr", ALICE, BOB, kind="send_as", designated=[BOB], note="nobody's business")
    clock.forward(seconds=1)
    await webmail.patch(f"/v1/users/{ALICE}", json={})
    clock.forward(seconds=1)
    mine = await owner(webmail, ALICE)
    async with anonymous(api) as me:
        refused = await me.delete(f"/v1/users/{ALICE}", headers=mine)
        seen = await events(me, "", **mine)
        by_id = await events(me, f"?user_id={alice['id']}", **mine)
        others = await me.get(f"/v1/audit-events?user_id={bob['id']}", headers=mine)
        principals = await me.get("/v1/audit-events?principal=x", headers=mine)
        kinds = await events(me, "?action=aliases.create", **mine)
    assert refused.status_code == 403
    assert by_id == seen
    assert (others.status_code, principals.status_code) == (403, 403)
    assert kinds == []
    assert {event["user_id"] for event in seen} == {alice["id"]}
    assert [(e["action"], e["outcome"], e["role"]) for e in seen] == [
        ("users.delete", "refused", "owner"),
        ("owner-tokens.create", "accepted", "webmail"),
        ("users.change", "refused", "webmail"),
        ("users.alias", "accepted", "primary"),
        ("users.create", "accepted", "primary"),
    ]
    assert (seen[0]["principal_id"], seen[0]["client_address"]) == (f"owner-{alice['id']}", "127.0.0.1")
    for event in seen[1:]:
        assert {name: event[name] for name in HIDDEN} == HIDDEN
    assert seen[3]["before"] == {"alias": "pr@cacert.test", "receives": False, "sends_as": False}
    assert seen[3]["after"] == {"alias": "pr@cacert.test", "receives": True, "sends_as": False}
    assert not {BOB, "nobody's business"} & set(str(seen).replace('"', "'").split("'"))


async def test_owners_are_told_of_each_change_of_an_alias(client: Client, clock: Clock) -> None:
    alice, bob = await make_user(client, "alice"), await make_user(client, "bob")
    alias = await make_alias(client, "pr", ALICE, kind="send_as", designated=[ALICE])
    for body in ({"note": "x"}, {"designated": [BOB]}, {"destinations": [ALICE, BOB]}):
        clock.forward(seconds=1)
        assert (await client.patch(f"/v1/aliases/{alias['id']}", json=body)).status_code == 202
    clock.forward(seconds=1)
    await client.delete(f"/v1/aliases/{alias['id']}")

    async def told(user: dict[str, Any]) -> list[tuple[bool, bool]]:
        found = await events(client, f"?action=users.alias&user_id={user['id']}")
        return [(event["after"]["receives"], event["after"]["sends_as"]) for event in reversed(found)]

    assert await told(alice) == [(True, True), (True, False), (False, False)]
    assert await told(bob) == [(False, True), (True, True), (False, False)]


MANY = """
INSERT INTO audit_events (at, principal_id, client_address, request_id, action, subject_kind, subject_id, user_id, outcome)
  SELECT '2026-01-01' + INTERVAL seq SECOND, CONCAT('p', seq % 7), '', CONCAT('r', seq),
    IF(seq % 5, 'users.change', 'users.create'), 'user', seq % 1000, seq % 1000,
    IF(seq % 1000 = 0, 'refused', 'accepted')
  FROM seq_1_to_120000
"""


@pytest.mark.parametrize("test_database", ["mariadb"], indirect=True)
async def test_a_page_of_many_events_is_one_look_into_an_index(
    seeded: Database, test_database: TestDatabase, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many there are: each filter has an index in which its events are in order, so a page reads what it shows."""
    boss = Database(test_database.url("owner"))
    async with boss.write.begin() as connection:
        await connection.execute(text(MANY))
    async with boss.write.connect() as connection:
        await connection.execute(text("ANALYZE TABLE audit_events"))
    await boss.close()
    middle = utc_now().replace(year=2026, month=1, day=1, hour=10)
    wanted = [
        EventFilter(),
        EventFilter(principal_id="p3"),
        EventFilter(action="users.change"),
        EventFilter(subject_kind="user", subject_id="17"),
        EventFilter(user_id=17),
        EventFilter(outcome="refused"),  # type: ignore[arg-type]
        EventFilter(request_id="r5000"),
        EventFilter(since=middle, until=middle + timedelta(hours=3)),
        EventFilter(action="users.create", since=middle),
        EventFilter(user_id=17, outcome="refused"),  # type: ignore[arg-type]
    ]
    count = (
        "SHOW SESSION STATUS WHERE Variable_name IN ('Handler_read_next', 'Handler_read_prev', 'Handler_read_rnd_next')"
    )
    async with seeded.read.connect() as connection:
        for each in wanted:
            for before in (None, (middle, 50_000)):
                read = [int(row[1]) for row in await connection.execute(text(count))]
                found = await list_events(connection, each, before=before, limit=50)
                now = [int(row[1]) for row in await connection.execute(text(count))]
                cost = sum(now) - sum(read)
                assert cost < 50 + 200, (each, before, cost, len(found))
