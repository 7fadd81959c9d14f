"""Who else may send as a domain: networks and names as the SPF record has them, and never more than ten lookups."""

import asyncio
from typing import Any

import httpx
import pytest
from sqlalchemy import select

from app.db import Database
from app.models.audit_events import Outcome, audit_events
from app.models.jobs import jobs
from app.services.domain_senders import lookups
from tests.conftest import PRIMARY

pytestmark = pytest.mark.asyncio

SENDERS = f"/v1/domains/{PRIMARY}/senders"
OTHER = "other.test"


async def add(client: httpx.AsyncClient, kind: str, value: str | None = None, note: str = "a test") -> httpx.Response:
    body = {"kind": kind, "value": value, "note": note}
    return await client.post(SENDERS, json={name: member for name, member in body.items() if member is not None})


async def test_a_sender_is_added_read_and_removed(client: httpx.AsyncClient, seeded: Database) -> None:
    answer = await add(client, "ip4", "192.0.2.0/28", "Newsletter")
    assert answer.status_code == 201
    sender = answer.json()
    assert answer.headers["location"] == f"{SENDERS}/{sender['id']}"
    assert sender == {
        "id": sender["id"],
        "kind": "ip4",
        "value": "192.0.2.0/28",
        "note": "Newsletter",
        "mechanism": "ip4:192.0.2.0/28",
        "created_at": "2026-11-23T12:00:00Z",
    }
    assert (await client.get(f"{SENDERS}/{sender['id']}")).json() == sender
    assert (await client.get(SENDERS)).json() == {"items": [sender], "next_cursor": None}
    assert (await client.get(f"/v1/domains/{PRIMARY}")).json()["version"] == 2, "its records are others now"
    assert (await client.delete(f"{SENDERS}/{sender['id']}")).status_code == 204
    for method in ("GET", "DELETE"):
        assert (await client.request(method, f"{SENDERS}/{sender['id']}")).status_code == 404
    async with seeded.read.connect() as connection:
        done = audit_events.c.outcome == Outcome.ACCEPTED
        found = await connection.execute(
            select(audit_events.c.action, audit_events.c.subject_id, audit_events.c.before, audit_events.c.after)
            .where(audit_events.c.subject_kind == "sender", done)
            .order_by(audit_events.c.id)
        )
        value = {"domain": PRIMARY, "kind": "ip4", "value": "192.0.2.0/28", "note": "Newsletter"}
        number = str(sender["id"])
        assert [tuple(row) for row in found] == [
            ("senders.create", number, None, value),
            ("senders.delete", number, value, None),
        ]
        columns = jobs.c.host, jobs.c.kind, jobs.c.lane, jobs.c.subject_id, jobs.c.version
        asked = [tuple(row) for row in await connection.execute(select(*columns).order_by(jobs.c.id))]
    assert asked == [("-", "dns.publish", "dns:1", 1, version) for version in (2, 3)]


@pytest.mark.parametrize(
    ("kind", "value", "stored", "mechanism"),
    [
        ("ip4", "192.0.2.1", "192.0.2.1", "ip4:192.0.2.1"),
        ("ip4", "192.0.2.1/32", "192.0.2.1", "ip4:192.0.2.1"),
        ("ip4", "192.0.2.0/255.255.255.0", "192.0.2.0/24", "ip4:192.0.2.0/24"),
        ("ip6", "2001:DB8:0:0::/32", "2001:db8::/32", "ip6:2001:db8::/32"),
        ("ip6", "2001:db8::1/128", "2001:db8::1", "ip6:2001:db8::1"),
        ("a", None, "", "a"),
        ("a", PRIMARY.upper(), "", "a"),
        ("a", "WWW.Example.net", "www.example.net", "a:www.example.net"),
        ("mx", "example.net", "example.net", "mx:example.net"),
        ("include", "example.net", "example.net", "include:example.net"),
        ("include", "_SPF.example.net", "_spf.example.net", "include:_spf.example.net"),
    ],
)
async def test_it_is_stored_in_one_form(
    client: httpx.AsyncClient, kind: str, value: str | None, stored: str, mechanism: str
) -> None:
    made = (await add(client, kind, value)).json()
    assert (made["value"], made["mechanism"]) == (stored, mechanism)
    again = await add(client, kind, stored)
    assert (again.status_code, again.json()["type"]) == (409, "/problems/sender-exists")
    assert again.json()["errors"][0]["pointer"] == "/value"


@pytest.mark.parametrize(
    ("body", "pointer"),
    [
        ({}, "/kind"),
        ({"kind": "all"}, "/kind"),
        ({"kind": "ptr", "value": "example.net"}, "/kind"),
        ({"kind": "ip4"}, "/value"),
        ({"kind": "ip4", "value": "2001:db8::/32"}, "/value"),
        ({"kind": "ip6", "value": "192.0.2.0/24"}, "/value"),
        ({"kind": "ip4", "value": "192.0.2.1/24"}, "/value"),
        ({"kind": "ip4", "value": "0.0.0.0/0"}, "/value"),
        ({"kind": "ip4", "value": "0.0.0.0/7"}, "/value"),
        ({"kind": "ip6", "value": "::/0"}, "/value"),
        ({"kind": "ip6", "value": "fe80::1%eth0"}, "/value"),
        ({"kind": "ip4", "value": "192.0.2.1 +all"}, "/value"),
        ({"kind": "include"}, "/value"),
        ({"kind": "include", "value": PRIMARY}, "/value"),
        ({"kind": "include", "value": "_spf.exa mple.net"}, "/value"),
        ({"kind": "include", "value": "example.net +all"}, "/value"),
        ({"kind": "include", "value": "example.net\n"}, "/value"),
        ({"kind": "include", "value": "%{i}.example.net"}, "/value"),
        ({"kind": "include", "value": "example.net/24"}, "/value"),
        ({"kind": "include", "value": "example..net"}, "/value"),
        ({"kind": "include", "value": "-a.example.net"}, "/value"),
        ({"kind": "include", "value": "example.net."}, "/value"),
        ({"kind": "a", "value": "localhost"}, "/value"),
        ({"kind": "a", "value": "192.0.2.1"}, "/value"),
        ({"kind": "a", "value": "x" * 254}, "/value"),
        ({"kind": "mx", "value": 5}, "/value"),
        ({"kind": "a", "note": ""}, "/note"),
        ({"kind": "a", "note": "two\nlines"}, "/note"),
        ({"kind": "a", "note": "x" * 201}, "/note"),
        ({"kind": "a", "weight": 3}, "/weight"),
    ],
)
async def test_bad_input_is_named_and_changes_nothing(
    client: httpx.AsyncClient, body: dict[str, Any], pointer: str
) -> None:
    answer = await client.post(SENDERS, json={"note": "a test", **body} if body else {"note": "a test"})
    assert answer.status_code == 422, answer.text
    assert [error["pointer"] for error in answer.json()["errors"]] == [pointer]
    assert (await client.get(SENDERS)).json()["items"] == []
    assert (await client.get(f"/v1/domains/{PRIMARY}")).json()["version"] == 1


async def test_the_domains_own_mx_is_always_there(client: httpx.AsyncClient) -> None:
    for value in (None, PRIMARY):
        answer = await add(client, "mx", value)
        assert (answer.status_code, answer.json()["type"]) == (409, "/problems/sender-exists")


async def test_more_than_ten_lookups_are_refused(client: httpx.AsyncClient) -> None:
    """RFC 7208, section 4.6.4: networks cost none, all else one each, and the domain's own `mx` is the first."""
    kinds = ["a", "mx", "include"] * 3
    for number, kind in enumerate(kinds):
        assert (await add(client, kind, f"s{number}.example.net")).status_code == 201
    assert lookups(kinds) == 10
    for kind in ("a", "mx", "include"):
        answer = await add(client, kind, "one.too.many.test")
        assert (answer.status_code, answer.json()["type"]) == (409, "/problems/too-many-lookups")
        assert answer.json()["lookups"] == 11
    assert len((await client.get(SENDERS)).json()["items"]) == 9
    assert (await add(client, "ip4", "192.0.2.1")).status_code == 201
    assert (await add(client, "ip6", "2001:db8::1")).status_code == 201
    first = (await client.get(SENDERS)).json()["items"][0]
    await client.delete(f"{SENDERS}/{first['id']}")
    assert (await add(client, "a", "one.too.many.test")).status_code == 201


async def test_twenty_at_once_are_counted_too(client: httpx.AsyncClient) -> None:
    answers = await asyncio.gather(*(add(client, "include", f"s{number}.example.net") for number in range(20)))
    made = [answer for answer in answers if answer.status_code == 201]
    assert len(made) <= 9
    assert {answer.status_code for answer in answers} <= {201, 409, 503}
    assert len((await client.get(SENDERS)).json()["items"]) == len(made)


async def test_a_relay_domain_has_none(client: httpx.AsyncClient) -> None:
    await client.post("/v1/domains", json={"name": OTHER, "kind": "relay"})
    url = f"/v1/domains/{OTHER}/senders"
    answer = await client.post(url, json={"kind": "a", "value": "example.net", "note": "x"})
    assert (answer.status_code, answer.json()["type"]) == (409, "/problems/domain-is-relay")
    assert (await client.get(url)).json()["items"] == []


async def test_what_is_not_there(client: httpx.AsyncClient) -> None:
    await client.post("/v1/domains", json={"name": OTHER})
    sender = (await add(client, "a", "example.net")).json()
    for method, url in (
        ("GET", f"/v1/domains/{OTHER}/senders/{sender['id']}"),
        ("DELETE", f"/v1/domains/{OTHER}/senders/{sender['id']}"),
        ("GET", "/v1/domains/none.test/senders"),
        ("POST", "/v1/domains/none.test/senders"),
        ("DELETE", "/v1/domains/none.test/senders/1"),
    ):
        body = {"kind": "a", "value": "example.net", "note": "x"}
        answer = await client.request(method, url, **({"json": body} if method == "POST" else {}))  # type: ignore[arg-type]
        assert (answer.status_code, answer.json()["type"]) == (404, "/problems/not-found"), url
    for bad in ("0", "-1", "x", "9223372036854775808"):
        assert (await client.get(f"{SENDERS}/{bad}")).status_code == 422
    assert (await client.get(f"{SENDERS}/{sender['id']}")).status_code == 200


async def test_lists_page(client: httpx.AsyncClient) -> None:
    for number in range(1, 6):
        await add(client, "ip4", f"192.0.2.{number}")
    first = (await client.get(f"{SENDERS}?limit=3")).json()
    rest = (await client.get(f"{SENDERS}?limit=3&cursor={first['next_cursor']}")).json()
    values = [item["value"] for page in (first, rest) for item in page["items"]]
    assert (values, rest["next_cursor"]) == ([f"192.0.2.{number}" for number in range(1, 6)], None)


async def test_a_repeat_with_the_same_key_adds_one(client: httpx.AsyncClient) -> None:
    body = {"kind": "a", "value": "example.net", "note": "x"}
    first, repeat = [await client.post(SENDERS, json=body, headers={"Idempotency-Key": "k"}) for _ in range(2)]
    assert (repeat.status_code, repeat.json()) == (201, first.json())


async def test_a_removed_domain_takes_its_senders_along(client: httpx.AsyncClient) -> None:
    await client.post("/v1/domains", json={"name": OTHER})
    made = await client.post(f"/v1/domains/{OTHER}/senders", json={"kind": "a", "note": "itself"})
    assert made.status_code == 201
    assert (await client.delete(f"/v1/domains/{OTHER}")).status_code == 204
