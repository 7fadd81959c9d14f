"""Domains: one primary, any number of others, and none that an account ever had goes away."""

import asyncio
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from sqlalchemy import select

from app.addresses import DomainName
from app.db import Database
from app.dns.settings import DomainSettings
from app.errors import NotFound
from app.models.audit_events import Outcome, audit_events
from app.models.hosts import SERVICE_HOST
from app.models.jobs import jobs
from app.queue.claim import claim, give_up
from app.queue.contracts import DNS_PUBLISH
from app.services.changes import Change
from app.services.domains import delete_domain
from tests.conftest import ACTOR, PRIMARY, Clock, TestDatabase

pytestmark = pytest.mark.asyncio


async def add(client: httpx.AsyncClient, name: str = "example.org", **members: Any) -> dict[str, Any]:
    answer = await client.post("/v1/domains", json={"name": name, **members})
    assert answer.status_code == 201, answer.text
    return dict(answer.json())


async def events(database: Database) -> list[tuple[str, str]]:
    """What was done. What was refused is in tests/web/test_audit.py."""
    done = audit_events.c.outcome == Outcome.ACCEPTED
    async with database.read.connect() as connection:
        query = select(audit_events.c.action, audit_events.c.subject_id).where(
            audit_events.c.principal_id != "tests", done
        )
        return [(row.action, row.subject_id) for row in await connection.execute(query.order_by(audit_events.c.id))]


@pytest.mark.parametrize("kind", ["virtual", "relay"])
async def test_a_domain_is_added_read_and_removed(client: httpx.AsyncClient, database: Database, kind: str) -> None:
    answer = await client.post("/v1/domains", json={"name": "Example.ORG", "kind": kind})
    assert answer.status_code == 201
    assert answer.headers["location"] == "/v1/domains/example.org"
    tag = answer.headers["etag"]
    assert tag == ('"1.3"' if kind == "virtual" else '"1.0"')
    body = answer.json()
    assert (body["name"], body["kind"], body["version"]) == ("example.org", kind, 1)
    assert body["created_at"] == body["updated_at"] == "2026-11-23T12:00:00Z"
    read = await client.get("/v1/domains/EXAMPLE.org")
    assert (read.status_code, read.json()) == (200, body)
    unchanged = await client.get("/v1/domains/example.org", headers={"If-None-Match": tag})
    assert (unchanged.status_code, unchanged.content) == (304, b"")
    removed = await client.delete("/v1/domains/example.org")
    assert (removed.status_code, removed.content) == (204, b"")
    assert (await client.get("/v1/domains/example.org")).status_code == 404
    assert await events(database) == [("domains.create", "example.org"), ("domains.delete", "example.org")]


async def test_virtual_is_what_is_meant(client: httpx.AsyncClient) -> None:
    assert (await add(client))["kind"] == "virtual"


@pytest.mark.parametrize(
    ("body", "pointer"),
    [
        ({}, "/name"),
        ({"name": "example"}, "/name"),
        ({"name": "-a.example"}, "/name"),
        ({"name": "exämple.org"}, "/name"),
        ({"name": "example.org."}, "/name"),
        ({"name": "../../etc.org"}, "/name"),
        ({"name": "192.0.2.1"}, "/name"),
        ({"name": f"{'a' * 64}.org"}, "/name"),
        ({"name": 5}, "/name"),
        ({"name": "example.org", "kind": "secondary"}, "/kind"),
        ({"name": "example.org", "version": 3}, "/version"),
    ],
)
async def test_bad_input_is_named(client: httpx.AsyncClient, body: dict[str, Any], pointer: str) -> None:
    answer = await client.post("/v1/domains", json=body)
    assert answer.status_code == 422
    assert [error["pointer"] for error in answer.json()["errors"]] == [pointer]
    assert len((await client.get("/v1/domains")).json()["items"]) == 1


@pytest.mark.parametrize(
    ("body", "problem"),
    [
        ({"name": PRIMARY}, "domain-exists"),
        ({"name": PRIMARY, "kind": "primary"}, "domain-exists"),
        ({"name": "other.test", "kind": "primary"}, "primary-domain-fixed"),
    ],
)
async def test_there_is_one_of_each_name_and_one_primary(
    client: httpx.AsyncClient, body: dict[str, str], problem: str
) -> None:
    answer = await client.post("/v1/domains", json=body)
    # With both at once, each database names the key that it looked at first.
    assert answer.status_code == 409
    assert answer.json()["type"] in (f"/problems/{problem}", "/problems/primary-domain-fixed")
    if body.get("kind") != "primary":
        assert answer.json()["type"] == f"/problems/{problem}"


async def test_ten_at_once_add_one(client: httpx.AsyncClient) -> None:
    answers = await asyncio.gather(*(client.post("/v1/domains", json={"name": "example.org"}) for _ in range(10)))
    assert sorted(answer.status_code for answer in answers) == [201] + [409] * 9


async def test_what_had_an_account_stays(client: httpx.AsyncClient) -> None:
    await add(client)
    made = await client.post("/v1/users", json={"address": "alice@example.org"})
    await client.delete(f"/v1/users/{made.json()['id']}")
    answer = await client.delete("/v1/domains/example.org")
    assert (answer.status_code, answer.json()["type"]) == (409, "/problems/domain-in-use")
    assert (await client.get("/v1/domains/example.org")).status_code == 200
    answer = await client.delete(f"/v1/domains/{PRIMARY}")
    assert (answer.status_code, answer.json()["type"]) == (409, "/problems/primary-domain-fixed")


async def test_two_deletions_are_one_event(seeded: Database, client: httpx.AsyncClient, clock: Clock) -> None:
    await add(client)
    results = await asyncio.gather(
        *(client.delete("/v1/domains/example.org") for _ in range(5)), return_exceptions=True
    )
    assert sorted(result.status_code for result in results) == [204] + [404] * 4  # type: ignore[union-attr]
    assert [action for action, _ in await events(seeded)].count("domains.delete") == 1


@pytest.mark.parametrize("test_database", ["mariadb"], indirect=True)
async def test_a_deletion_between_look_and_delete_is_no_event(
    seeded: Database, client: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch, clock: Clock
) -> None:
    """SQLite has one writer at a time."""
    await add(client)
    from app.services import domains as service

    look = service.get_domain

    async def look_and_lose(connection: Any, name: Any) -> Any:
        row = await look(connection, name)
        monkeypatch.setattr(service, "get_domain", look)
        assert (await client.delete("/v1/domains/example.org")).status_code == 204
        return row

    monkeypatch.setattr(service, "get_domain", look_and_lose)
    with pytest.raises(NotFound):
        async with seeded.write.begin() as connection:
            await delete_domain(Change(connection, ACTOR, clock()), DomainName("example.org"))
    assert await events(seeded) == [("domains.create", "example.org"), ("domains.delete", "example.org")]


@pytest.mark.parametrize("path", ["/v1/domains/none.test", "/v1/domains/xn--nothing.test"])
async def test_what_is_not_there(client: httpx.AsyncClient, path: str) -> None:
    for method in ("GET", "DELETE"):
        answer = await client.request(method, path)
        assert (answer.status_code, answer.json()["type"]) == (404, "/problems/not-found")
        assert "GET /v1/domains lists them" in answer.json()["detail"]


async def test_a_path_that_is_no_domain_is_refused(client: httpx.AsyncClient) -> None:
    for name in ("ü.test", "localhost", "a b.test", "%00"):
        assert (await client.get(f"/v1/domains/{name}")).status_code == 422


async def test_lists_page_and_filter(client: httpx.AsyncClient) -> None:
    for number in range(4):
        await add(client, f"d{number}.test", kind="relay" if number % 2 else "virtual")
    seen: list[str] = []
    url = "/v1/domains?limit=2"
    while url:
        page = await client.get(url)
        assert len(page.json()["items"]) <= 2
        seen += [item["name"] for item in page.json()["items"]]
        link = page.headers.get("link")
        assert (link is None) == (page.json()["next_cursor"] is None)
        url = link.partition("<")[2].partition(">")[0] if link else ""
    assert seen == [PRIMARY, "d0.test", "d1.test", "d2.test", "d3.test"]
    relays = await client.get("/v1/domains", params={"kind": "relay"})
    assert [item["name"] for item in relays.json()["items"]] == ["d1.test", "d3.test"]
    for bad in ("limit=0", "limit=501", "kind=x", "cursor=%FF", "cursor=zz", "name=x"):
        assert (await client.get(f"/v1/domains?{bad}")).status_code == 422, bad


async def test_a_repeat_with_the_same_key_makes_nothing_twice(
    client: httpx.AsyncClient, make_client: Callable[..., Any]
) -> None:
    headers = {"Idempotency-Key": "k1"}
    first = await client.post("/v1/domains", json={"name": "example.org"}, headers=headers)
    repeat = await client.post("/v1/domains", json={"name": "example.org"}, headers=headers)
    assert (repeat.status_code, repeat.json()) == (201, first.json())
    assert repeat.headers["location"] == first.headers["location"]
    assert "idempotency-replayed" not in first.headers
    assert repeat.headers["idempotency-replayed"] == "true"
    other = await client.post("/v1/domains", json={"name": "example.net"}, headers=headers)
    assert (other.status_code, other.json()["type"]) == (422, "/problems/key-reused")
    elsewhere = await client.post("/v1/hosts", json={"name": "example.org"}, headers=headers)
    assert (elsewhere.status_code, elsewhere.json()["type"]) == (422, "/problems/key-reused")
    stranger = await make_client()
    answer = await stranger.post("/v1/domains", json={"name": "example.org"}, headers=headers)
    assert answer.json()["type"] == "/problems/domain-exists"


@pytest.mark.parametrize("key", ["", " ", "a b", "x" * 129, "ü"])
async def test_a_key_that_is_none_is_refused(client: httpx.AsyncClient, key: str) -> None:
    headers = [(b"idempotency-key", key.encode())]
    answer = await client.post("/v1/domains", json={"name": "example.org"}, headers=headers)
    assert answer.status_code == 422
    assert "visible ASCII" in answer.json()["detail"]
    assert (await client.get("/v1/domains/example.org")).status_code == 404


async def test_a_deletion_may_ask_for_a_version(client: httpx.AsyncClient) -> None:
    made = await client.post("/v1/domains", json={"name": "example.org"})
    url = made.headers["location"]
    assert (await client.delete(url, headers={"If-Match": '"99.0"'})).status_code == 412
    assert (await client.delete(url, headers={"If-Match": made.headers["etag"]})).status_code == 204


async def patch(client: httpx.AsyncClient, name: str = PRIMARY, **settings: Any) -> httpx.Response:
    return await client.patch(f"/v1/domains/{name}", json={"settings": settings})


async def test_settings_are_merged_and_null_is_the_default_again(client: httpx.AsyncClient, seeded: Database) -> None:
    before = (await client.get(f"/v1/domains/{PRIMARY}")).json()
    assert before["settings"] == DomainSettings().model_dump(mode="json")
    first = await patch(client, dmarc="reject", mx=["MX1.example.net", "mx2.example.net"], rotate_every_days=180)
    assert (first.status_code, first.json()["version"], first.json()["ready"]) == (200, 2, before["ready"])
    changed = {"dmarc": "reject", "mx": ["mx1.example.net", "mx2.example.net"], "rotate_every_days": 180}
    assert first.json()["settings"] == {**before["settings"], **changed}
    second = await patch(client, dmarc=None, dmarc_reports="Reports@example.net")
    after = {"mx": changed["mx"], "rotate_every_days": 180, "dmarc_reports": "Reports@example.net"}
    assert second.json()["settings"] == {**before["settings"], **after}
    assert (await client.get(f"/v1/domains/{PRIMARY}")).json() == second.json()
    same = await patch(client, dmarc="none", rotate_every_days=180)
    assert same.json()["version"] == 3, "what is so already is no change"
    async with seeded.read.connect() as connection:
        query = select(jobs.c.host, jobs.c.kind, jobs.c.lane, jobs.c.subject_id, jobs.c.version).order_by(jobs.c.id)
        asked = [tuple(row) for row in await connection.execute(query)]
        query = select(audit_events.c.before, audit_events.c.after).where(audit_events.c.action == "domains.change")
        trail = [tuple(row) for row in await connection.execute(query.order_by(audit_events.c.id))]
    assert asked == [("-", "dns.publish", "dns:1", 1, version) for version in (2, 3)]
    assert trail == [({"settings": {}}, {"settings": changed}), ({"settings": changed}, {"settings": after})]


@pytest.mark.parametrize(
    ("wanted", "pointer"),
    [
        ({"colour": "blue"}, "/settings/colour"),
        ({"a/b~c": 1}, "/settings/a~1b~0c"),
        ({"publisher": "../x"}, "/settings/publisher"),
        ({"publisher": "Knot"}, "/settings/publisher"),
        ({"rotate_every_days": 6}, "/settings/rotate_every_days"),
        ({"mx": ["mx1.example.net", "mx\n.example.net"]}, "/settings/mx/1"),
        ({"dmarc": "none; rua=mailto:x@example.net"}, "/settings/dmarc"),
        ({"dmarc_reports": "x@example.net; p=none"}, "/settings/dmarc_reports"),
        ({"tls_reports": "https://example.net"}, "/settings/tls_reports"),
    ],
)
async def test_a_setting_that_cannot_be_is_named(
    client: httpx.AsyncClient, wanted: dict[str, Any], pointer: str
) -> None:
    answer = await patch(client, **{"tls_reports": "x@example.net", **wanted})
    assert (answer.status_code, answer.json()["errors"][0]["pointer"]) == (422, pointer), answer.text
    shown = (await client.get(f"/v1/domains/{PRIMARY}")).json()
    assert (shown["version"], shown["settings"]["tls_reports"]) == (1, None)


async def test_only_settings_change(client: httpx.AsyncClient) -> None:
    for bad in ({"name": "x.test"}, {"kind": "relay"}, {"settings": None}, {"settings": []}, {"version": 2}):
        assert (await client.patch(f"/v1/domains/{PRIMARY}", json=bad)).status_code == 422, bad
    assert (await client.patch("/v1/domains/none.test", json={"settings": {"dmarc": "reject"}})).status_code == 404
    assert (await client.patch(f"/v1/domains/{PRIMARY}", json={})).json()["version"] == 1


async def test_a_relay_has_no_dns_of_ours(client: httpx.AsyncClient) -> None:
    await add(client, kind="relay")
    answer = await patch(client, "example.org", dmarc="reject")
    assert (answer.status_code, answer.json()["type"]) == (409, "/problems/domain-is-relay")


async def test_if_match_protects_the_settings(client: httpx.AsyncClient) -> None:
    tag = (await client.get(f"/v1/domains/{PRIMARY}")).headers["etag"]
    url, headers = f"/v1/domains/{PRIMARY}", {"If-Match": tag}
    assert (await client.patch(url, json={"settings": {"dmarc": "reject"}}, headers=headers)).status_code == 200
    late = await client.patch(url, json={"settings": {"dmarc": "quarantine"}}, headers=headers)
    assert (late.status_code, late.json()["type"], late.json()["version"]) == (412, "/problems/version-conflict", 2)


async def test_ten_changes_at_once_are_ten_versions(client: httpx.AsyncClient) -> None:
    answers = await asyncio.gather(*(patch(client, rotate_every_days=7 + number) for number in range(10)))
    made = [answer for answer in answers if answer.status_code == 200]
    shown = (await client.get(f"/v1/domains/{PRIMARY}")).json()
    assert shown["version"] == 1 + len(made)
    assert len(made) >= 1


async def test_a_dead_publication_is_tried_again(
    client: httpx.AsyncClient, test_database: TestDatabase, clock: Clock
) -> None:
    await patch(client, dmarc="reject")
    service = Database(test_database.url("service"))
    [job] = await claim(service, SERVICE_HOST, clock(), limit=1, kinds=[DNS_PUBLISH])
    await give_up(service, job, "no such publisher", clock())
    await service.close()
    retried = (await client.post(f"/v1/jobs/{job.id}/retry")).json()
    assert (retried["kind"], retried["host"], retried["subject_id"]) == ("dns.publish", SERVICE_HOST, 1)
    assert (retried["state"], retried["version"]) == ("ready", 2)
