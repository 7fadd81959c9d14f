"""Refused requests in the audit trail: which, with what in them, and how many at most."""

import asyncio
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from fastapi.routing import APIRoute
from sqlalchemy import insert, select, text

from app.db import Database
from app.main import build_app
from app.models.audit_events import audit_events
from app.permissions import Permission
from app.web.audit import ANONYMOUS_LIMIT, NETWORK_LIMIT, PRINCIPAL_LIMIT, WINDOW, Refusals, action_of
from tests.conftest import ACTOR, Clock, anonymous

pytestmark = pytest.mark.asyncio
SECRET = "a-secret-that-nobody-may-keep"


async def refusals(database: Database) -> list[Any]:
    query = select(audit_events).where(audit_events.c.outcome == "refused").order_by(audit_events.c.id)
    async with database.read.connect() as connection:
        return list((await connection.execute(query)).all())


async def create_ann(client: httpx.AsyncClient) -> int:
    made = await client.post("/v1/users", json={"address": "ann@cacert.test", "password": "four unrelated words here"})
    assert made.status_code == 202, made.text
    return int(made.json()["id"])


async def test_a_refused_change_is_recorded_whole(
    client: httpx.AsyncClient, make_client: Callable[..., Any], database: Database, clock: Clock
) -> None:
    ann = await create_ann(client)
    reader = await make_client(Permission.USERS_READ)
    body = {"display_name": SECRET}
    refused = await reader.patch("/v1/users/Ann@cacert.test", json=body, headers={"X-Request-ID": "request-12345"})
    assert refused.status_code == 403
    [event] = await refusals(database)
    assert event._asdict() == {
        "id": event.id,
        "at": clock.now,
        "principal_id": reader.auth._auth_header and (await reader.get("/v1/me")).json()["id"],  # type: ignore[union-attr]
        "key_id": event.key_id,
        "client_address": "127.0.0.1",
        "request_id": "request-12345",
        "action": "users.change",
        "subject_kind": "user",
        "subject_id": str(ann),
        "user_id": ann,
        "outcome": "refused",
        "problem": "forbidden",
        "before": None,
        "after": None,
    }
    assert event.key_id is not None


async def test_every_kind_of_refusal(client: httpx.AsyncClient, api: FastAPI, database: Database) -> None:
    ann = await create_ann(client)
    tag = (await client.get(f"/v1/users/{ann}")).headers["ETag"]
    assert (await client.post(f"/v1/users/{ann}/restore")).status_code == 409
    assert (
        await client.patch(f"/v1/users/{ann}", json={"display_name": "A"}, headers={"If-Match": tag})
    ).status_code < 300
    assert (await client.patch(f"/v1/users/{ann}", json={}, headers={"If-Match": tag})).status_code == 412
    assert (await client.post("/v1/users", json={"address": f"{SECRET}@@"})).status_code == 422
    assert (await client.post(f"/v1/users?{SECRET}=1", json={})).status_code == 422
    assert (await client.post("/v1/users", content=f'{{"{SECRET}')).status_code == 415
    assert (await client.delete("/v1/hosts/nowhere")).status_code == 404
    async with anonymous(api) as visitor:
        assert (await visitor.delete("/v1/domains/example.org")).status_code == 401
    found = [(e.action, e.subject_kind, e.subject_id, e.user_id, e.problem) for e in await refusals(database)]
    assert found == [
        ("users.restore", "user", str(ann), ann, "user-not-deleted"),
        ("users.change", "user", str(ann), ann, "version-conflict"),
        ("users.create", "user", "", None, "invalid-request"),
        ("users.create", "user", "", None, "invalid-request"),
        ("users.create", "user", "", None, "wrong-media-type"),
        ("hosts.delete", "host", "nowhere", None, "not-found"),
        ("domains.delete", "domain", "example.org", None, "unauthenticated"),
    ]
    async with database.read.connect() as connection:
        everything = [str(row) for row in await connection.execute(select(audit_events))]
    assert SECRET not in "".join(everything)


async def test_reads_are_recorded_only_when_a_known_caller_may_not(
    client: httpx.AsyncClient, make_client: Callable[..., Any], api: FastAPI, database: Database
) -> None:
    assert (await client.get("/v1/users/nobody@cacert.test")).status_code == 404
    async with anonymous(api) as visitor:
        assert (await visitor.get("/v1/users")).status_code == 401
        assert (await visitor.post("/wp-login.php")).status_code == 404
        assert (await visitor.post("/v1/me")).status_code == 405
    assert await refusals(database) == []
    powerless = await make_client(only_none=True)
    assert (await powerless.get("/v1/users/7")).status_code == 403
    assert (await powerless.head("/v1/users/7")).status_code == 403
    found = [(e.action, e.subject_id, e.user_id, e.problem) for e in await refusals(database)]
    assert found == [("users.get", "7", 7, "forbidden")] * 2


async def test_who_the_caller_claims_to_be(client: httpx.AsyncClient, api: FastAPI, database: Database) -> None:
    me = (await client.get("/v1/me")).json()["id"]
    async with anonymous(api) as visitor:
        await visitor.post("/v1/users", json={}, auth=(me, SECRET))
        await visitor.post("/v1/users", json={}, auth=(SECRET, "x"))  # it may be a secret in the wrong place
        form = {"grant_type": "client_credentials", "client_id": me, "client_secret": SECRET}
        assert (await visitor.post("/oauth/token", data=form)).status_code == 401
        assert (await visitor.post("/oauth/token", data={"grant_type": SECRET})).status_code == 400
    events = await refusals(database)
    assert [(e.principal_id, e.action, e.subject_kind, e.subject_id, e.problem, e.after) for e in events] == [
        ("", "users.create", "user", "", "unauthenticated", {"client": me}),
        ("", "users.create", "user", "", "unauthenticated", None),
        ("", "tokens.create", "principal", me, "unauthenticated", {"client": me}),
        ("", "tokens.create", "principal", "", "bad-request", None),
    ]
    assert SECRET not in str(events)


async def test_a_flood_of_strangers_fills_nothing(api: FastAPI, database: Database, clock: Clock) -> None:
    flood = 3 * NETWORK_LIMIT
    async with anonymous(api) as visitor:
        for _ in range(flood):
            assert (await visitor.delete("/v1/domains/example.org")).status_code == 401
        assert len(await refusals(database)) == NETWORK_LIMIT
        clock.forward(seconds=WINDOW.total_seconds())
        await visitor.delete("/v1/domains/example.org")
    *_, summary, last = await refusals(database)
    assert (summary.action, summary.subject_kind, summary.subject_id) == ("requests.refuse", "network", "127.0.0.1/32")
    assert summary.after == {"unrecorded": flood - NETWORK_LIMIT, "seconds": 60}
    assert (last.action, last.problem) == ("domains.delete", "unauthenticated")
    assert len(await refusals(database)) == NETWORK_LIMIT + 2


def scope(address: str, **more: Any) -> dict[str, Any]:
    (route,) = [r for r in routes() if r.name == "create_user"]
    base = {"method": "POST", "route": route, "path_params": {}, "client": (address, 1), "request_id": "r"}
    return {**base, "problem": "unauthenticated", **more}


async def test_nor_does_one_from_many_networks_and_it_is_counted_though_nothing_follows(
    database: Database, clock: Clock
) -> None:
    trail = Refusals(database, clock)
    for number in range(2 * ANONYMOUS_LIMIT):
        await trail.record(scope(f"2001:db8:{number:x}::1"), 401)
    assert len(await refusals(database)) == ANONYMOUS_LIMIT
    await trail.record(scope("192.0.2.1", problem="forbidden"), 401)
    assert len(trail._windows) <= ANONYMOUS_LIMIT + 1, "it remembers no more than it records"
    await trail.flush()
    assert len(await refusals(database)) == ANONYMOUS_LIMIT, "the minute has not ended"
    clock.forward(seconds=60)
    await trail.flush()
    *_, last = await refusals(database)
    assert (last.subject_id, last.after["unrecorded"]) == ("*", ANONYMOUS_LIMIT + 1)
    await trail.close()


async def test_one_network_leaves_room_for_others(database: Database, clock: Clock) -> None:
    trail = Refusals(database, clock)
    for number in range(NETWORK_LIMIT + 5):
        await trail.record(scope(f"2001:db8::{number:x}"), 401)  # one /64
    await trail.record(scope("192.0.2.1"), 401)
    await trail.close()
    events = await refusals(database)
    assert [e.client_address for e in events[NETWORK_LIMIT:]] == ["192.0.2.1", ""]
    assert (events[-1].subject_id, events[-1].after["unrecorded"]) == ("2001:db8::/64", 5)


async def test_one_principal_has_its_own_bound(
    client: httpx.AsyncClient, api: FastAPI, database: Database, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("app.web.audit.PRINCIPAL_LIMIT", 3)
    assert PRINCIPAL_LIMIT >= NETWORK_LIMIT
    for _ in range(5):
        assert (await client.delete("/v1/hosts/nowhere")).status_code == 404
    async with anonymous(api) as visitor:
        await visitor.delete("/v1/domains/example.org")
    assert [e.action for e in await refusals(database)] == ["hosts.delete"] * 3 + ["domains.delete"]
    await api.state.refusals.close()
    *_, last = await refusals(database)
    me = (await client.get("/v1/me")).json()["id"]
    assert (last.principal_id, last.subject_kind, last.after["unrecorded"]) == (me, "principal", 2)


async def test_a_database_that_is_away_changes_no_refusal(
    client: httpx.AsyncClient, api: FastAPI, database: Database, monkeypatch: pytest.MonkeyPatch, scratch: Path
) -> None:
    gone = Database(f"sqlite+aiosqlite:///{scratch}/no/such/directory/db")
    monkeypatch.setattr(api.state.refusals, "_database", gone)
    assert (await client.delete("/v1/hosts/nowhere")).json()["type"] == "/problems/not-found"
    await gone.close()
    assert await refusals(database) == []


async def test_a_table_that_is_held_is_waited_for_without_the_caller(
    client: httpx.AsyncClient, api: FastAPI, database: Database
) -> None:
    """The answer is out before the trail is written."""
    async with database.write.begin() as connection:
        if database.dialect == "mysql":
            await connection.execute(text("SELECT 1"))
        else:
            await connection.execute(insert(audit_events), _any_event())
        answered: list[float] = []
        loop = asyncio.get_running_loop()

        async def send(message: Any) -> None:
            if message["type"] == "http.response.body":
                answered.append(loop.time())

        async def receive() -> Any:
            return {"type": "http.request", "body": b"", "more_body": False}

        request = client.build_request("DELETE", "/v1/domains/example.org")
        raw = {
            "type": "http",
            "http_version": "1.1",
            "method": "DELETE",
            "path": "/v1/domains/example.org",
            "raw_path": b"/v1/domains/example.org",
            "query_string": b"",
            "scheme": "http",
            "headers": [(k.lower(), v) for k, v in request.headers.raw if k.lower() != b"authorization"],
            "client": ("127.0.0.1", 1),
            "server": ("mail.cacert.test", 80),
        }
        task = asyncio.create_task(api(raw, receive, send))  # type: ignore[arg-type]
        started = loop.time()
        while not answered:
            assert loop.time() - started < 5
            await asyncio.sleep(0.001)
        if database.dialect == "sqlite":  # it has one writer, and that is this test
            assert not task.done()
    await task
    assert [e.problem for e in await refusals(database)] == ["unauthenticated"]


def _any_event() -> dict[str, Any]:
    names = ("principal_id", "client_address", "request_id", "action", "subject_kind", "subject_id")
    return {**dict.fromkeys(names, "x"), "at": Clock().now}


def routes() -> list[APIRoute]:
    found = []
    for route in build_app().routes:
        router = getattr(route, "original_router", None)
        found += [each for each in (router.routes if router is not None else [route]) if isinstance(each, APIRoute)]
    return found


BY_THE_WAY = {
    "principals.disable",
    "principals.enable",
    "users.alias",
    "users.end-sessions",
    "users.resume",
    "users.suspend",
    "requests.refuse",
    "certificates.show",
}
"""What happens within an operation of another name: a PATCH that suspends is refused as `users.change`."""


async def test_refused_and_accepted_changes_are_called_alike() -> None:
    names = {action_of(r.path_format, r.name) for r in routes() if not r.methods & {"GET"}}
    assert all(re.fullmatch(r"[a-z-]+\.[a-z-]+", name) and len(name) <= 32 for name in names), names
    assert len(names) == len([r for r in routes() if not r.methods & {"GET"}]), "no two are called alike"
    sources = "".join(path.read_text() for path in (Path(__file__).parents[2] / "app/services").glob("*.py"))
    recorded = set(re.findall(r'"([a-z-]+\.[a-z-]+)"', sources))
    assert recorded - names - BY_THE_WAY == set(), (
        "an accepted change that would be called otherwise when it is refused"
    )


async def test_the_request_line_of_the_log_says_who_and_why(
    client: httpx.AsyncClient, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[dict[str, Any]] = []
    monkeypatch.setattr(
        "app.web.middleware.log", type("Log", (), {"info": lambda self, event, **more: said.append(more)})()
    )
    await client.delete("/v1/hosts/nowhere?x=1")
    await client.delete("/v1/hosts/nowhere")
    me = (await client.get("/v1/me")).json()["id"]
    assert [(line["client"], line.get("principal"), line.get("problem")) for line in said] == [
        ("127.0.0.1", None, "invalid-request"),
        ("127.0.0.1", me, "not-found"),
        ("127.0.0.1", me, None),
    ]
    assert json.dumps(said), ACTOR
