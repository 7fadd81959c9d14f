"""Aliases over HTTP, as far as they need no host: what is stored, answered, refused, and who hears of it."""

import asyncio
import json
from collections.abc import Callable
from typing import Any

import httpx
import pytest
import pytest_asyncio
from sqlalchemy import event, func, insert, select, update

from app.db import Database
from app.main import build_app
from app.models.addresses import addresses
from app.models.aliases import AliasKind, alias_destinations, aliases, sender_rules
from app.models.audit_events import audit_events
from app.models.domains import domains
from app.models.jobs import JobState, jobs
from app.permissions import Permission
from app.queue.claim import claim, give_up
from app.queue.contracts import ALIASES_SYNC
from app.routers.aliases import AliasBody
from app.services import aliases as service
from app.services.aliases import AliasFilter
from tests.conftest import HOST, PRIMARY, Clock
from tests.routers.accounts import ALICE, BOB, apply, make_alias, make_user, post_alias, turn_srs

pytestmark = pytest.mark.asyncio


async def rows(database: Database, query: Any) -> list[Any]:
    async with database.read.connect() as connection:
        return [tuple(row) for row in await connection.execute(query)]


async def job_versions(database: Database, alias_id: int) -> list[tuple[str, int]]:
    query = select(jobs.c.host, jobs.c.version).where(jobs.c.kind == ALIASES_SYNC, jobs.c.subject_id == alias_id)
    return await rows(database, query.order_by(jobs.c.id))


async def actions(database: Database) -> list[str]:
    query = select(audit_events.c.action).where(audit_events.c.subject_kind == "alias").order_by(audit_events.c.id)
    return [action for (action,) in await rows(database, query)]


async def read(client: httpx.AsyncClient, key: object) -> dict[str, Any]:
    answer = await client.get(f"/v1/aliases/{key}")
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


def lapsed(address: str, was: str, reason: str) -> dict[str, str]:
    return {"address": address, "was": was, "reason": reason}


def refusal(answer: httpx.Response) -> tuple[int, str, str]:
    """Status, problem and pointer."""
    problem = answer.json()
    assert answer.headers["content-type"] == "application/problem+json"
    return answer.status_code, problem["type"].removeprefix("/problems/"), problem["errors"][0]["pointer"]


# One alias


async def test_a_new_alias_is_row_address_destinations_event_and_job(
    client: httpx.AsyncClient, database: Database
) -> None:
    alice, bob = await make_user(client, "alice"), await make_user(client, "bob")
    body = {
        "address": f"PR@{PRIMARY.upper()}",
        "kind": "send_as",
        "destinations": [BOB.upper(), ALICE],
        "designated": [BOB, ALICE.upper()],
        "note": "Prëss",
    }
    answer = await client.post("/v1/aliases", json=body)
    assert answer.status_code == 202
    made = answer.json()
    assert answer.headers["location"] == f"/v1/aliases/{made['id']}"
    assert answer.headers["link"] == f'</v1/jobs/{made["job"]["id"]}>; rel="monitor"'
    assert answer.headers["etag"].startswith('"1.')
    assert made == {
        "id": made["id"],
        "address": f"pr@{PRIMARY}",
        "kind": "send_as",
        "destinations": [BOB, ALICE],
        "designated": [ALICE, BOB],
        "lapsed": [],
        "note": "Prëss",
        "version": 1,
        "ready": False,
        "proofs": {},
        "job": made["job"],
        "created_at": "2026-11-23T12:00:00Z",
        "updated_at": "2026-11-23T12:00:00Z",
        "deleted_at": None,
    }
    [listed] = (await client.get("/v1/aliases")).json()["items"]
    for same in (listed, await read(client, made["id"]), await read(client, f"Pr@{PRIMARY}")):
        assert same == made
        assert AliasBody.model_validate(same).model_dump(mode="json") == same
    query = select(jobs.c.host, jobs.c.lane, jobs.c.subject_id, jobs.c.version, jobs.c.request_id, jobs.c.id)
    assert await rows(database, query.where(jobs.c.kind == ALIASES_SYNC)) == [
        (HOST, "aliases", made["id"], 1, answer.headers["x-request-id"], made["job"]["id"])
    ]
    held = select(addresses.c.kind, addresses.c.subject_id).where(addresses.c.address == f"pr@{PRIMARY}")
    assert await rows(database, held) == [("alias", made["id"])]
    stored = select(alias_destinations.c.user_id, alias_destinations.c.address).order_by(alias_destinations.c.position)
    assert await rows(database, stored) == [(bob["id"], None), (alice["id"], None)], "by id, not by address"
    said = select(audit_events.c.action, audit_events.c.request_id, audit_events.c.after)
    [(action, request_id, after)] = await rows(database, said.where(audit_events.c.subject_kind == "alias"))
    assert (action, request_id) == ("aliases.create", answer.headers["x-request-id"])
    assert (after["kind"], after["address"]) == ("send_as", f"pr@{PRIMARY}")


BAD: list[tuple[dict[str, Any], str]] = [
    ({"address": "pr"}, "/address"),
    ({"address": f"pr+x@{PRIMARY}"}, "/address"),
    ({"address": f"a..b@{PRIMARY}"}, "/address"),
    ({"address": f"|cat@{PRIMARY}"}, "/address"),
    ({"address": f":include:/x@{PRIMARY}"}, "/address"),
    ({"address": f"pr\n@{PRIMARY}"}, "/address"),
    ({"address": f"pr\x00@{PRIMARY}"}, "/address"),
    ({"address": f"pr\u202e@{PRIMARY}"}, "/address"),
    ({"address": f"\ud800@{PRIMARY}"}, "/address"),
    ({"address": f" pr@{PRIMARY}"}, "/address"),
    ({"address": f"pŕ@{PRIMARY}"}, "/address"),
    ({"address": f"{'x' * 65}@{PRIMARY}"}, "/address"),
    ({"address": "x" * 300}, "/address"),
    ({"address": "pr@nowhere.test"}, "/address"),
    ({"address": "pr@relay.test"}, "/address"),
    ({"address": f"owner-pr@{PRIMARY}"}, "/address"),
    ({"address": 5}, "/address"),
    ({"kind": "both"}, "/kind"),
    ({"kind": None}, "/kind"),
    ({"destinations": []}, "/destinations"),
    ({"destinations": ALICE}, "/destinations"),
    ({"destinations": None}, "/destinations"),
    ({"destinations": [ALICE, 5]}, "/destinations/1"),
    ({"destinations": [ALICE, "x" * 255]}, "/destinations/1"),
    ({"destinations": [ALICE, ""]}, "/destinations/1"),
    ({"destinations": ["alice"]}, "/destinations/0"),
    ({"destinations": ["|cat"]}, "/destinations/0"),
    ({"destinations": ["|cat@example.net"]}, "/destinations/0"),
    ({"destinations": ["/etc/passwd@example.net"]}, "/destinations/0"),
    ({"destinations": ["/tmp/x"]}, "/destinations/0"),
    ({"destinations": ["-oQ@example.net"]}, "/destinations/0"),
    ({"destinations": ["a!b@example.net"]}, "/destinations/0"),
    ({"destinations": [f"a%example.net@{PRIMARY}"]}, "/destinations/0"),
    ({"destinations": ["a%example.net@relay.test"]}, "/destinations/0"),
    ({"destinations": [":include:/etc/passwd"]}, "/destinations/0"),
    ({"destinations": [f":include:{ALICE}"]}, "/destinations/0"),
    ({"destinations": [f'"{ALICE}"']}, "/destinations/0"),
    ({"destinations": [f"{ALICE}, {ALICE}"]}, "/destinations/0"),
    ({"destinations": [f"{ALICE}\nroot: x@y.test"]}, "/destinations/0"),
    ({"destinations": [f"{ALICE}\n"]}, "/destinations/0"),
    ({"destinations": [f"{ALICE}\x00"]}, "/destinations/0"),
    ({"destinations": [f"\u200f{ALICE}"]}, "/destinations/0"),
    ({"destinations": [f"älice@{PRIMARY}"]}, "/destinations/0"),
    ({"destinations": [f"alice@{PRIMARY}."]}, "/destinations/0"),
    ({"destinations": [f"alice+x@{PRIMARY}"]}, "/destinations/0"),
    ({"destinations": [f"carol@{PRIMARY}"]}, "/destinations/0"),
    ({"destinations": [ALICE, f"gone@{PRIMARY}"]}, "/destinations/1"),
    ({"destinations": [ALICE, "x@example.net"]}, "/destinations/1"),
    ({"destinations": [ALICE, ALICE.upper()]}, "/destinations"),
    ({"designated": [ALICE]}, "/designated"),
    ({"kind": "send_as", "designated": [ALICE, f"carol@{PRIMARY}"]}, "/designated/1"),
    ({"kind": "send_as", "designated": [f"gone@{PRIMARY}"]}, "/designated/0"),
    ({"kind": "send_as", "designated": ["x@example.net"]}, "/designated/0"),
    ({"kind": "send_as", "designated": [f"abuse@{PRIMARY}"]}, "/designated/0"),
    ({"kind": "send_as", "designated": ["|cat"]}, "/designated/0"),
    ({"kind": "send_as", "designated": [f"|a@{PRIMARY}"]}, "/designated/0"),
    ({"kind": "send_as", "designated": [None]}, "/designated/0"),
    ({"note": "x" * 201}, "/note"),
    ({"note": "a\nb"}, "/note"),
    ({"note": "a\x00"}, "/note"),
    ({"note": "a\u202eb"}, "/note"),
    ({"note": "a\u200fb"}, "/note"),
    ({"note": "a\u2028b"}, "/note"),
    ({"note": None}, "/note"),
    ({"reuse_address": "perhaps"}, "/reuse_address"),
    ({"id": 1}, "/id"),
    ({"version": 1}, "/version"),
    ({"command": "cat"}, "/command"),
]


@pytest_asyncio.fixture
async def world(client: httpx.AsyncClient) -> httpx.AsyncClient:
    """With alice, a deleted account `gone`, an alias `abuse`, and a relay domain."""
    await make_user(client, "alice")
    gone = await make_user(client, "gone")
    await client.delete(f"/v1/users/{gone['id']}")
    await make_alias(client, "abuse", ALICE)
    await client.post("/v1/domains", json={"name": "relay.test", "kind": "relay"})
    return client


async def test_bad_input_is_named_and_nothing_is_kept(world: httpx.AsyncClient, database: Database) -> None:
    pr = await make_alias(world, "old", ALICE, kind="send_as", designated=[ALICE])
    counts = [select(func.count()).select_from(table) for table in (aliases, addresses, jobs, alias_destinations)]
    before = [await rows(database, count) for count in counts]
    usual = {"address": f"pr@{PRIMARY}", "kind": "receive_only", "destinations": [ALICE]}
    headers = {"content-type": "application/json"}
    for members, pointer in BAD:
        sent = json.dumps({**usual, **members})  # escaped: half a surrogate pair too
        answer = await world.post("/v1/aliases", content=sent, headers=headers)
        assert answer.status_code == (409 if "owner-" in sent else 422), (members, answer.text)
        assert [error["pointer"] for error in answer.json()["errors"]] == [pointer], members
        if members.keys() <= {"destinations", "note", "id", "version", "command"}:
            answer = await world.patch(f"/v1/aliases/{pr['id']}", content=json.dumps(members), headers=headers)
            assert answer.status_code == 422, (members, answer.text)
            assert [error["pointer"] for error in answer.json()["errors"]] == [pointer], members
    assert [await rows(database, count) for count in counts] == before
    assert await read(world, pr["id"]) == pr


async def test_as_many_destinations_as_are_allowed(client: httpx.AsyncClient, database: Database) -> None:
    await turn_srs(database, True)
    outside = [f"x{number}@example.net" for number in range(101)]
    made = await make_alias(client, "many", *outside[:100])
    assert made["destinations"] == outside[:100]
    assert refusal(await post_alias(client, "more", *outside)) == (422, "invalid-request", "/destinations")
    answer = await client.patch(f"/v1/aliases/{made['id']}", json={"destinations": outside})
    assert refusal(answer) == (422, "invalid-request", "/destinations")


async def test_reserved_names_may_be_aliases_but_not_where_bounces_go(client: httpx.AsyncClient) -> None:
    await make_user(client, "alice")
    await client.post("/v1/domains", json={"name": "virtual.test"})
    for name in ("postmaster", "abuse", "root", "info", "www-data", "postmaster@virtual.test", "owner-x@virtual.test"):
        await make_alias(client, name, ALICE)
    for name in ("returns", "mailer-daemon", "Returns@virtual.test"):
        assert refusal(await post_alias(client, name, ALICE)) == (409, "address-reserved", "/address")


async def test_a_domain_is_ready_when_postmaster_and_abuse_are_somebodys(client: httpx.AsyncClient) -> None:
    await make_user(client, "alice")
    url = f"/v1/domains/{PRIMARY}"
    tags = set()

    async def missing() -> tuple[list[str], bool]:
        answer = await client.get(url)
        tags.add(answer.headers["etag"])
        stale = await client.get(url, headers={"If-None-Match": answer.headers["etag"]})
        assert stale.status_code == 304
        return answer.json()["missing"], answer.json()["ready"]

    assert await missing() == (["postmaster", "abuse"], False)
    postmaster = await make_alias(client, "postmaster", ALICE)
    assert await missing() == (["abuse"], False)
    await make_alias(client, "abuse", ALICE)
    assert await missing() == ([], True)
    await client.delete(f"/v1/aliases/{postmaster['id']}")
    assert await missing() == (["postmaster"], False)
    assert len(tags) == 4, "each of the four is news"
    [listed] = (await client.get("/v1/domains")).json()["items"]
    assert listed == (await client.get(url)).json()


async def test_a_domain_that_had_an_alias_stays(client: httpx.AsyncClient) -> None:
    await make_user(client, "alice")
    await client.post("/v1/domains", json={"name": "virtual.test"})
    made = await make_alias(client, "pr@virtual.test", ALICE)
    await client.delete(f"/v1/aliases/{made['id']}")
    answer = await client.delete("/v1/domains/virtual.test")
    assert (answer.status_code, answer.json()["type"]) == (409, "/problems/domain-in-use")


async def test_what_is_sent_is_changed_and_nothing_else(client: httpx.AsyncClient, database: Database) -> None:
    await make_user(client, "alice")
    await make_user(client, "bob")
    made = await make_alias(client, "pr", ALICE, kind="send_as", designated=[ALICE, BOB], note="N")
    url = f"/v1/aliases/pr@{PRIMARY}"
    # What is so already, however it is written: no version, no event, no job.
    for same in (
        {},
        {"note": "N"},
        {"destinations": [ALICE.upper()]},
        {"designated": [BOB, ALICE.upper(), BOB]},
        {"note": "N", "destinations": [ALICE], "designated": [ALICE, BOB]},
    ):
        answer = await client.patch(url, json=same)
        assert (answer.status_code, answer.json()) == (202, made), same
    assert await actions(database) == ["aliases.create"]
    changed = (await client.patch(url, json={"destinations": [BOB, ALICE]})).json()
    assert changed == {**made, "destinations": [BOB, ALICE], "version": 2, "job": changed["job"]}
    changed = (await client.patch(url, json={"designated": [BOB]})).json()
    assert (changed["designated"], changed["destinations"], changed["version"]) == ([BOB], [BOB, ALICE], 3)
    changed = (await client.patch(url, json={"designated": [], "note": ""})).json()
    assert (changed["designated"], changed["note"], changed["version"]) == ([], "", 4)
    assert await job_versions(database, made["id"]) == [(HOST, version) for version in (1, 2, 3, 4)]
    query = select(audit_events.c.before, audit_events.c.after).where(audit_events.c.action == "aliases.change")
    assert await rows(database, query.order_by(audit_events.c.id)) == [
        ({"destinations": [ALICE]}, {"destinations": [BOB, ALICE]}),
        ({"designated": [ALICE, BOB]}, {"designated": [BOB]}),
        ({"designated": [BOB], "note": "N"}, {"designated": [], "note": ""}),
    ]


async def test_address_and_kind_never_change(client: httpx.AsyncClient) -> None:
    await make_user(client, "alice")
    made = await make_alias(client, "pr", ALICE)
    for name, value in (("address", f"pr@{PRIMARY}"), ("kind", "send_as"), ("kind", "receive_only")):
        answer = await client.patch(f"/v1/aliases/{made['id']}", json={name: value, "note": "x"})
        assert refusal(answer)[::2] == (422, f"/{name}")
        assert "Delete this alias" in answer.json()["detail"]
    assert await read(client, made["id"]) == made
    answer = await client.patch(f"/v1/aliases/{made['id']}", json={"designated": [ALICE]})
    assert refusal(answer) == (422, "bad-field", "/designated")


async def test_a_deleted_alias_leads_nowhere_and_its_address_is_free(
    client: httpx.AsyncClient, database: Database
) -> None:
    await make_user(client, "alice")
    made = await make_alias(client, "pr", ALICE, kind="send_as", designated=[ALICE])
    url = f"/v1/aliases/{made['id']}"
    answer = await client.delete(f"/v1/aliases/pr@{PRIMARY}")
    gone = answer.json()
    assert (answer.status_code, gone["version"], gone["deleted_at"]) == (202, 2, "2026-11-23T12:00:00Z")
    assert (gone["destinations"], gone["designated"], gone["lapsed"]) == ([], [], [])
    again = await client.delete(url)
    assert (again.status_code, again.json()) == (202, gone), "twice is once"
    assert await actions(database) == ["aliases.create", "aliases.delete"]
    assert await job_versions(database, made["id"]) == [(HOST, 1), (HOST, 2)]
    for table in (alias_destinations, sender_rules):
        assert await rows(database, select(table)) == []
    assert await read(client, made["id"]) == gone
    for method in ("GET", "PATCH", "DELETE"):
        missing = await client.request(
            method, f"/v1/aliases/pr@{PRIMARY}", **({"json": {}} if method == "PATCH" else {})
        )  # type: ignore[arg-type]
        assert missing.status_code == 404
    late = await client.patch(url, json={"note": "x"})
    assert (late.status_code, late.json()["type"]) == (409, "/problems/alias-deleted")
    assert (await client.get(f"/v1/addresses/pr@{PRIMARY}")).json()["status"] == "free"
    successor = await make_alias(client, "pr", ALICE)
    assert successor["id"] != made["id"]
    assert await read(client, f"pr@{PRIMARY}") == successor


@pytest.mark.parametrize(
    ("key", "status"), [("999", 404), ("0", 404), ("9" * 18, 404), (f"x@{PRIMARY}", 404), ("x", 422), ("%00", 422)]
)
async def test_what_is_not_there(client: httpx.AsyncClient, key: str, status: int) -> None:
    for method in ("GET", "PATCH", "DELETE"):
        answer = await client.request(method, f"/v1/aliases/{key}", **({"json": {}} if method == "PATCH" else {}))  # type: ignore[arg-type]
        assert answer.status_code == status, answer.text


async def test_if_match_protects_and_if_none_match_spares(client: httpx.AsyncClient, worker_database: Database) -> None:
    await make_user(client, "alice")
    made = await make_alias(client, "pr", ALICE)
    url = f"/v1/aliases/{made['id']}"
    waiting = (await client.get(url)).headers["etag"]
    assert (await client.get(url, headers={"If-None-Match": waiting})).status_code == 200, "its job goes on"
    await apply(worker_database, made["id"], 1)
    ready = await client.get(url)
    assert (ready.json()["ready"], ready.json()["job"]) == (True, None)
    assert ready.headers["etag"] != waiting
    assert (await client.get(url, headers={"If-None-Match": ready.headers["etag"]})).status_code == 304
    changed = await client.patch(url, json={"note": "x"}, headers={"If-Match": waiting})
    assert (changed.status_code, changed.json()["version"]) == (202, 2), "what a worker writes is nobody's edit"
    for method, body in (("PATCH", {"json": {"note": "y"}}), ("DELETE", {})):
        late = await client.request(method, url, headers={"If-Match": waiting}, **body)  # type: ignore[arg-type]
        assert (late.status_code, late.json()["type"], late.json()["version"]) == (412, "/problems/version-conflict", 2)
    assert (await client.delete(url, headers={"If-Match": changed.headers["etag"]})).status_code == 202


async def test_a_repeat_with_the_same_key_makes_nothing_twice(client: httpx.AsyncClient, database: Database) -> None:
    await make_user(client, "alice")
    body = {"address": f"pr@{PRIMARY}", "kind": "receive_only", "destinations": [ALICE]}
    headers = {"Idempotency-Key": "k1"}
    first = await client.post("/v1/aliases", json=body, headers=headers)
    await client.patch(first.headers["location"], json={"note": "since"})
    repeat = await client.post("/v1/aliases", json=body, headers=headers)
    assert (repeat.status_code, repeat.headers["idempotency-replayed"]) == (202, "true")
    assert repeat.headers["location"] == first.headers["location"]
    assert (repeat.json()["id"], repeat.json()["note"]) == (first.json()["id"], "since")
    other = await client.post("/v1/aliases", json={**body, "note": "x"}, headers=headers)
    assert (other.status_code, other.json()["type"]) == (422, "/problems/key-reused")
    assert len(await rows(database, select(aliases.c.id))) == 1


async def test_prefer_wait_ends_when_every_host_is_ready(client: httpx.AsyncClient, worker_database: Database) -> None:
    await make_user(client, "alice")
    body = {"address": f"pr@{PRIMARY}", "kind": "receive_only", "destinations": [ALICE]}
    asked = asyncio.create_task(client.post("/v1/aliases", json=body, headers={"Prefer": "wait=20"}))
    made = None
    while made is None:
        found = (await client.get("/v1/aliases")).json()["items"]
        made = found[0] if found else None
    await apply(worker_database, made["id"], 1)
    [job] = await claim(worker_database, HOST, Clock()(), limit=10, kinds=[ALIASES_SYNC])
    await give_up(worker_database, job, "the wait ends at a dead job too", Clock()())
    answer = await asked
    assert (answer.status_code, answer.json()["ready"], answer.json()["job"]) == (201, True, None)
    assert answer.headers["preference-applied"] == "wait"
    assert "link" not in answer.headers
    again = await client.patch(answer.headers["location"], json={"note": ""})
    assert again.status_code == 200, "ready, and nothing to change"


# Lists


async def test_lists_page_and_filter(client: httpx.AsyncClient, database: Database) -> None:
    await client.post("/v1/domains", json={"name": "virtual.test"})
    await make_user(client, "alice")
    await make_user(client, "bob")
    await turn_srs(database, True)
    made = [
        await make_alias(client, "a1", ALICE),
        await make_alias(client, "a2", BOB, kind="send_as", designated=[ALICE, BOB]),
        await make_alias(client, "a3@virtual.test", ALICE, "Out@example.net"),
        await make_alias(client, "a4", f"a1@{PRIMARY}", kind="send_as"),
        await make_alias(client, "a5", ALICE),
    ]
    ids = [alias["id"] for alias in made]
    await client.delete(f"/v1/aliases/{ids[4]}")
    seen: list[int] = []
    url = "/v1/aliases?limit=3"
    while url:
        page = await client.get(url)
        seen += [item["id"] for item in page.json()["items"]]
        link = page.headers.get("link")
        assert (link is None) == (page.json()["next_cursor"] is None)
        url = link.partition("<")[2].partition(">")[0] if link else ""
    assert seen == ids[:4], "in the order in which they were made"

    async def found(**parameters: Any) -> list[int]:
        answer = await client.get("/v1/aliases", params=parameters)
        assert answer.status_code == 200, answer.text
        return [ids.index(item["id"]) + 1 for item in answer.json()["items"]]

    assert await found(domain="Virtual.test") == [3]
    assert await found(domain=PRIMARY) == [1, 2, 4]
    assert await found(domain="nowhere.test") == []
    assert await found(kind="send_as") == [2, 4]
    assert await found(destination=ALICE.upper()) == [1, 3]
    assert await found(destination=f"a1@{PRIMARY}") == [4]
    assert await found(destination="Out@example.net") == [3]
    assert await found(destination="nobody@example.net") == []
    assert await found(designated=ALICE) == [2]
    assert await found(designated=f"a1@{PRIMARY}") == []
    assert await found(address=f"A1@{PRIMARY}") == [1]
    assert await found(deleted=True) == [5]
    assert await found(deleted=True, address=f"a5@{PRIMARY}") == [5]
    assert await found(kind="send_as", destination=BOB, domain=PRIMARY, designated=BOB) == [2]
    assert await found(kind="receive_only", designated=BOB) == []
    # Whoever has a deleted account's address is not who was meant.
    alice = (await client.get(f"/v1/users/{ALICE}")).json()["id"]
    await client.delete(f"/v1/users/{alice}")
    await make_user(client, "alice", reuse_address=True)
    assert await found(destination=ALICE) == await found(designated=ALICE) == []
    for bad in (
        "limit=0",
        "limit=501",
        "kind=both",
        "domain=x",
        "destination=%00",
        "destination=x",
        "designated=%C3%BC@a.test",
        "address=a..b@a.test",
        "deleted=perhaps",
        "cursor=zz",
        "user=1",
    ):
        assert (await client.get(f"/v1/aliases?{bad}")).status_code == 422, bad


# Where it leads


async def chain_of(client: httpx.AsyncClient, count: int, *, first: str = "c1") -> list[dict[str, Any]]:
    """`c1` leads to alice, `c2` to `c1`, and so on."""
    made = [await make_alias(client, first, ALICE)]
    for number in range(2, count + 1):
        made.append(await make_alias(client, f"c{number}", made[-1]["address"]))
    return made


async def lead(client: httpx.AsyncClient, alias: dict[str, Any], *destinations: str) -> httpx.Response:
    return await client.patch(f"/v1/aliases/{alias['id']}", json={"destinations": destinations})


@pytest.mark.parametrize("length", [1, 2, 3, 7])
async def test_a_circle_is_refused_with_the_way_around(
    client: httpx.AsyncClient, database: Database, length: int
) -> None:
    await make_user(client, "alice")
    made = await chain_of(client, length)
    before = await rows(database, select(alias_destinations))
    answer = await lead(client, made[0], ALICE, made[-1]["address"])
    assert refusal(answer) == (409, "alias-loops", "/destinations")
    around = [made[0]["address"], *(alias["address"] for alias in reversed(made))]
    assert answer.json()["chain"] == around
    assert " → ".join(around) in answer.json()["detail"]
    assert await rows(database, select(alias_destinations)) == before
    assert (await read(client, made[0]["id"]))["version"] == 1


async def test_to_itself_is_a_circle_from_the_beginning(client: httpx.AsyncClient) -> None:
    alice = await make_user(client, "alice")
    await client.delete(f"/v1/users/{(await make_user(client, 'gone'))['id']}")
    for address, more in ((f"pr@{PRIMARY}", {}), (f"gone@{PRIMARY}", {"reuse_address": True})):
        answer = await post_alias(client, address.split("@")[0], ALICE, address.upper(), **more)
        assert refusal(answer) == (409, "alias-loops", "/destinations/1")
        assert answer.json()["chain"] == [address, address]
    answer = await post_alias(client, "alice", ALICE)
    assert (answer.status_code, answer.json()["type"]) == (409, "/problems/user-exists"), alice


async def test_every_change_of_what_leads_to_what_changes_one_row(
    client: httpx.AsyncClient, database: Database
) -> None:
    """So that on a cluster, where a row's lock is local to a node, two of them at once are a conflict. Others are none."""
    await make_user(client, "alice")

    async def count() -> int:
        return int((await rows(database, select(func.sum(domains.c.alias_changes))))[0][0])

    plain = await make_alias(client, "plain", ALICE)
    await client.patch(f"/v1/aliases/{plain['id']}", json={"note": "x"})
    assert await count() == 0
    over = await make_alias(client, "over", plain["address"])
    assert await count() == 1
    await lead(client, plain, ALICE)
    assert await count() == 2
    await client.delete(f"/v1/aliases/{over['id']}")
    assert await count() == 3
    await client.patch(f"/v1/hosts/{HOST}", json={"settings": {"srs": True}})
    assert await count() == 3
    outside = await make_alias(client, "out", "x@example.net")
    assert await count() == 4
    await client.delete(f"/v1/aliases/{outside['id']}")
    await client.patch(f"/v1/hosts/{HOST}", json={"settings": {"srs": False}})
    assert await count() == 6


async def test_a_diamond_is_no_circle(client: httpx.AsyncClient) -> None:
    await make_user(client, "alice")
    low = (await make_alias(client, "low", ALICE))["address"]
    left, right = (
        (await make_alias(client, "left", low))["address"],
        (await make_alias(client, "right", low))["address"],
    )
    top = await make_alias(client, "top", left, right, low)
    assert (await lead(client, top, right, left)).status_code == 202
    # Deleted, an alias is no step of a circle any more.
    await client.delete(f"/v1/aliases/{top['id']}")
    assert (await lead(client, await read(client, low), ALICE)).status_code == 202


async def test_ten_aliases_deep_and_no_deeper(client: httpx.AsyncClient) -> None:
    await make_user(client, "alice")
    made = await chain_of(client, 10)
    names = [alias["address"] for alias in reversed(made)]
    answer = await post_alias(client, "c11", made[-1]["address"])
    assert refusal(answer) == (409, "alias-too-deep", "/destinations")
    assert answer.json()["chain"] == [f"c11@{PRIMARY}", *names]
    # In the middle and at the bottom of a way, what stands above counts too.
    other = await make_alias(client, "other", ALICE)
    answer = await lead(client, made[0], other["address"])
    assert answer.json()["chain"] == [*names, other["address"]]
    assert (await lead(client, made[1], other["address"])).status_code == 202, "as long as before"
    below = await make_alias(client, "below", ALICE)
    answer = await lead(client, other, ALICE, below["address"])
    assert answer.json()["chain"] == [*names[:-1], other["address"], below["address"]]
    # Of several ways the longest counts.
    assert (await lead(client, below, made[0]["address"])).status_code == 202
    answer = await post_alias(client, "wide", made[0]["address"], made[-1]["address"], below["address"])
    assert answer.json()["chain"] == [f"wide@{PRIMARY}", *names[:-1], other["address"]]


@pytest.mark.parametrize("attempt", range(3))
async def test_two_that_close_a_circle_at_once_one_is_refused(
    client: httpx.AsyncClient, database: Database, attempt: int
) -> None:
    await make_user(client, "alice")
    count = (2, 3, 5)[attempt]
    made = [await make_alias(client, f"a{number}", ALICE) for number in range(count)]
    following = [*made[1:], made[0]]
    answers = await asyncio.gather(
        *(lead(client, alias, other["address"]) for alias, other in zip(made, following, strict=True))
    )
    statuses = [answer.status_code for answer in answers]
    assert sorted(statuses) == [202] * (count - 1) + [409], [answer.text for answer in answers]
    [refused] = [answer.json() for answer in answers if answer.status_code == 409]
    assert refused["type"] == "/problems/alias-loops"
    assert len(refused["chain"]) == count + 1


async def test_two_that_close_a_circle_far_from_each_other(client: httpx.AsyncClient) -> None:
    """Neither changes an alias that the other names, so no foreign key makes one wait for the other."""
    await make_user(client, "alice")
    for turn in range(5):
        upper = await make_alias(client, f"b{turn}", ALICE)
        lower = await make_alias(client, f"d{turn}", ALICE)
        to_upper = await make_alias(client, f"a{turn}", upper["address"])
        to_lower = await make_alias(client, f"c{turn}", lower["address"])
        answers = await asyncio.gather(
            lead(client, upper, to_lower["address"]), lead(client, lower, to_upper["address"])
        )
        assert sorted(answer.status_code for answer in answers) == [202, 409], [answer.text for answer in answers]
        [refused] = [answer.json() for answer in answers if answer.status_code == 409]
        assert (refused["type"], len(refused["chain"])) == ("/problems/alias-loops", 5)


async def test_two_that_together_go_too_deep_one_is_refused(client: httpx.AsyncClient) -> None:
    await make_user(client, "alice")
    made = await chain_of(client, 9)
    low = await make_alias(client, "low", ALICE)
    top = await make_alias(client, "top", ALICE)
    for _ in range(5):
        answers = await asyncio.gather(lead(client, made[0], low["address"]), lead(client, top, made[-1]["address"]))
        assert sorted(answer.status_code for answer in answers) == [202, 409], [answer.text for answer in answers]
        [refused] = [answer.json() for answer in answers if answer.status_code == 409]
        assert (refused["type"], len(refused["chain"])) == ("/problems/alias-too-deep", 11)
        for each in (made[0], top):
            await lead(client, each, ALICE)


async def test_eight_writers_on_the_same_aliases_all_come_through(client: httpx.AsyncClient) -> None:
    await make_user(client, "alice")
    low = [await make_alias(client, f"low{number}", ALICE) for number in range(4)]
    names = [alias["address"] for alias in low]
    high = [await make_alias(client, f"high{number}", ALICE) for number in range(4)]

    async def write(number: int) -> list[int]:
        turned = names[number % 4 :] + names[: number % 4]
        return [(await lead(client, high[(number + turn) % 4], *turned[: 1 + turn])).status_code for turn in range(4)]

    answers = await asyncio.gather(*(write(number) for number in range(8)))
    assert {status for each in answers for status in each} == {202}


async def test_changes_while_their_destinations_come_and_go(client: httpx.AsyncClient) -> None:
    """An alias waits for its user there, and a user's deletion for the alias: the database ends one, which is tried again."""
    await make_user(client, "alice")
    bob = await make_user(client, "bob")
    made = [await make_alias(client, f"a{number}", ALICE, BOB) for number in range(4)]

    async def come_and_go() -> list[int]:
        steps = [("DELETE", ""), ("POST", "/restore")] * 3
        return [(await client.request(method, f"/v1/users/{bob['id']}{verb}")).status_code for method, verb in steps]

    async def write(alias: dict[str, Any]) -> list[int]:
        notes = [await client.patch(f"/v1/aliases/{alias['id']}", json={"note": str(turn)}) for turn in range(6)]
        both = [await lead(client, alias, ALICE, BOB) for _ in range(6)]
        return [answer.status_code for answer in notes + both if answer.status_code != 422]  # bob is away

    answers = await asyncio.gather(come_and_go(), *(write(alias) for alias in made))
    assert {status for each in answers for status in each} == {202}
    for alias in made:
        now = await read(client, alias["id"])
        assert (now["destinations"], now["lapsed"]) == ([ALICE, BOB], [])


async def test_a_destination_that_nobody_has_is_refused_with_the_chain(client: httpx.AsyncClient) -> None:
    await make_user(client, "alice")
    gone = await make_user(client, "gone")
    await client.delete(f"/v1/users/{gone['id']}")
    for name in ("carol", "gone"):
        answer = await post_alias(client, "pr", ALICE, f"{name}@{PRIMARY}")
        assert refusal(answer) == (422, "no-destination", "/destinations/1")
        assert answer.json()["chain"] == [f"pr@{PRIMARY}", f"{name}@{PRIMARY}"]


async def test_a_relayed_domain_takes_any_address(client: httpx.AsyncClient) -> None:
    await client.post("/v1/domains", json={"name": "lists.test", "kind": "relay"})
    made = await make_alias(client, "pr", "Team+x@LISTS.test")
    assert made["destinations"] == ["Team+x@lists.test"]


async def test_elsewhere_needs_srs_on_every_enabled_host(client: httpx.AsyncClient, database: Database) -> None:
    answer = await post_alias(client, "pr", "Out@example.net")
    assert refusal(answer) == (422, "outside-refused", "/destinations/0")
    assert "SRS" in answer.json()["detail"]
    await client.patch(f"/v1/hosts/{HOST}", json={"settings": {"srs": True}})
    made = await make_alias(client, "pr", "Out@Example.NET")
    assert made["destinations"] == ["Out@example.net"]
    await client.delete(f"/v1/aliases/{made['id']}")
    await client.post("/v1/hosts", json={"name": "mail2"})
    assert refusal(await post_alias(client, "x", "out@example.net"))[1] == "outside-refused"
    await client.patch("/v1/hosts/mail2", json={"enabled": False})
    await make_alias(client, "x", "out@example.net")
    await client.patch(f"/v1/hosts/{HOST}", json={"enabled": False})
    assert refusal(await post_alias(client, "y", "out@example.net"))[1] == "outside-refused", "no host, no SRS"


# Whose address is it


async def test_an_address_is_an_accounts_or_an_alias(
    client: httpx.AsyncClient, make_client: Callable[..., Any]
) -> None:
    alice = await make_user(client, "alice")
    pr = await make_alias(client, "pr", ALICE)
    over_user = await post_alias(client, "alice", f"pr@{PRIMARY}")
    assert (over_user.status_code, over_user.json()["type"], over_user.json()["id"]) == (
        409,
        "/problems/user-exists",
        alice["id"],
    )
    over_alias = await client.post("/v1/users", json={"address": f"pr@{PRIMARY}", "reuse_address": True})
    twice = await post_alias(client, "pr", ALICE, reuse_address=True)
    for answer in (over_alias, twice):
        assert (answer.status_code, answer.json()["type"], answer.json()["id"]) == (
            409,
            "/problems/alias-exists",
            pr["id"],
        )
    # Who may not read them is not told which they are.
    writer = await make_client(Permission.USERS_WRITE, Permission.ALIASES_WRITE)
    gone = await make_user(client, "gone")
    await client.delete(f"/v1/users/{gone['id']}")
    for answer in (
        await post_alias(writer, "alice", f"pr@{PRIMARY}"),
        await post_alias(writer, "pr", ALICE),
        await writer.post("/v1/users", json={"address": f"pr@{PRIMARY}"}),
        await post_alias(writer, "gone", ALICE),
        await writer.post("/v1/users", json={"address": f"gone@{PRIMARY}"}),
    ):
        assert answer.status_code == 409
        assert not {"id", "user_id", "external_id"} & answer.json().keys(), answer.text


async def test_a_deleted_accounts_address_is_taken_on_purpose_only(
    client: httpx.AsyncClient, database: Database
) -> None:
    await make_user(client, "alice")
    bob = await make_user(client, "bob")
    await client.delete(f"/v1/users/{bob['id']}")
    answer = await post_alias(client, "bob", ALICE)
    assert (answer.status_code, answer.json()["type"], answer.json()["user_id"]) == (
        409,
        "/problems/address-retired",
        bob["id"],
    )
    alias = await make_alias(client, "bob", ALICE, reuse_address=True)
    restored = await client.post(f"/v1/users/{bob['id']}/restore")
    assert (restored.status_code, restored.json()["type"], restored.json()["id"]) == (
        409,
        "/problems/alias-exists",
        alias["id"],
    )
    # Without the alias it is the deleted account's again, not free for anybody.
    await client.delete(f"/v1/aliases/{alias['id']}")
    held = select(addresses.c.kind, addresses.c.subject_id).where(addresses.c.address == BOB)
    assert await rows(database, held) == [("tombstone", bob["id"])]
    assert (await post_alias(client, "bob", ALICE)).json()["type"] == "/problems/address-retired"
    assert (await client.post(f"/v1/users/{bob['id']}/restore")).status_code == 202
    assert (await client.get(f"/v1/users/{BOB}")).json()["id"] == bob["id"]


async def test_of_a_user_and_an_alias_made_at_once_one_wins(client: httpx.AsyncClient, database: Database) -> None:
    await make_user(client, "alice")
    answers = await asyncio.gather(
        *(
            make(name)
            for name in ("x1", "x2", "x3")
            for make in (
                lambda name: client.post("/v1/users", json={"address": f"{name}@{PRIMARY}"}),
                lambda name: post_alias(client, name, ALICE),
            )
        )
    )
    for number in range(3):
        assert sorted(answer.status_code for answer in answers[2 * number : 2 * number + 2]) == [202, 409]
    assert len(await rows(database, select(addresses.c.address))) == 4


# Whoever comes later


async def test_a_successor_inherits_nothing_and_who_is_restored_has_all_back(
    client: httpx.AsyncClient, database: Database, worker_database: Database
) -> None:
    await make_user(client, "alice")
    bob = await make_user(client, "bob")
    await client.post("/v1/hosts", json={"name": "off", "enabled": False})
    pr = await make_alias(client, "pr", ALICE, BOB, kind="send_as", designated=[ALICE, BOB])
    only = await make_alias(client, "only", ALICE, kind="send_as", designated=[BOB])
    over = await make_alias(client, "over", pr["address"])
    untouched = await make_alias(client, "untouched", ALICE)
    for made in (pr, only, over, untouched):
        await apply(worker_database, made["id"], 1)
    tag = (await client.get(f"/v1/aliases/{only['id']}")).headers["etag"]
    await client.delete(f"/v1/users/{bob['id']}")
    bob_lapsed = [lapsed(BOB, was, "account_deleted") for was in ("designated", "destination")]
    now = await read(client, pr["id"])
    assert (now["destinations"], now["designated"], now["lapsed"]) == ([ALICE], [ALICE], bob_lapsed)
    assert (now["version"], now["ready"], now["job"]["state"]) == (2, False, "ready")
    assert (await client.get(f"/v1/aliases/{only['id']}", headers={"If-None-Match": tag})).status_code == 200
    assert ((await read(client, only["id"]))["designated"], (await read(client, only["id"]))["lapsed"]) == (
        [],
        [lapsed(BOB, "designated", "account_deleted")],
    )
    await make_user(client, "bob", reuse_address=True)
    successor = await read(client, pr["id"])
    assert (successor["destinations"], successor["designated"], successor["lapsed"]) == ([ALICE], [ALICE], bob_lapsed)
    successor_id = (await client.get(f"/v1/users/{BOB}")).json()["id"]
    await client.delete(f"/v1/users/{successor_id}")
    assert (await client.post(f"/v1/users/{bob['id']}/restore")).status_code == 409, "the successor's tombstone now"
    for made, versions in ((pr, 2), (only, 2), (over, 1), (untouched, 1)):
        assert await job_versions(database, made["id"]) == [(HOST, 1 + number) for number in range(versions)]
    # What is sent replaces those that lapsed too.
    changed = (await client.patch(f"/v1/aliases/{pr['id']}", json={"destinations": [ALICE]})).json()
    assert (changed["version"], changed["destinations"], changed["designated"]) == (3, [ALICE], [ALICE])
    changed = (await client.patch(f"/v1/aliases/{pr['id']}", json={"designated": [ALICE]})).json()
    assert (changed["version"], changed["lapsed"]) == (4, [])


async def test_restored_both_are_back(client: httpx.AsyncClient, database: Database) -> None:
    await make_user(client, "alice")
    bob = await make_user(client, "bob")
    pr = await make_alias(client, "pr", BOB, ALICE, kind="send_as", designated=[BOB])
    await client.delete(f"/v1/users/{bob['id']}")
    assert (await client.post(f"/v1/users/{bob['id']}/restore")).status_code == 202
    now = await read(client, pr["id"])
    assert (now["destinations"], now["designated"], now["lapsed"], now["version"]) == ([BOB, ALICE], [BOB], [], 3)
    assert await actions(database) == ["aliases.create"], "nobody changed the alias"
    assert await job_versions(database, pr["id"]) == [(HOST, 1), (HOST, 2), (HOST, 3)]


async def test_a_deleted_alias_and_its_successor(client: httpx.AsyncClient, database: Database) -> None:
    await make_user(client, "alice")
    low = await make_alias(client, "low", ALICE)
    high = await make_alias(client, "high", low["address"], ALICE)
    await client.delete(f"/v1/aliases/{low['id']}")
    now = await read(client, high["id"])
    assert (now["destinations"], now["lapsed"], now["version"]) == (
        [ALICE],
        [lapsed(low["address"], "destination", "alias_deleted")],
        2,
    )
    assert await job_versions(database, high["id"]) == [(HOST, 1), (HOST, 2)]
    await make_alias(client, "low", ALICE)
    now = await read(client, high["id"])
    assert (now["destinations"], now["lapsed"], now["version"]) == (
        [ALICE],
        [lapsed(low["address"], "destination", "alias_deleted")],
        2,
    )
    changed = (await lead(client, high, ALICE, low["address"])).json()
    assert (changed["destinations"], changed["lapsed"]) == ([ALICE, low["address"]], [])


async def test_why_somebody_lapsed(client: httpx.AsyncClient) -> None:
    await make_user(client, "alice")
    bob, carol = await make_user(client, "bob"), await make_user(client, "carol")
    low = await make_alias(client, "low", ALICE)
    pr = await make_alias(
        client, "pr", low["address"], BOB, carol["address"], ALICE, kind="send_as", designated=[BOB, ALICE]
    )
    await client.delete(f"/v1/aliases/{low['id']}")
    for user in (bob, carol):
        await client.delete(f"/v1/users/{user['id']}")
    assert (await client.post(f"/v1/users/{carol['id']}/purge")).status_code == 202
    now = await read(client, pr["id"])
    assert now["lapsed"] == [
        lapsed(BOB, "designated", "account_deleted"),
        lapsed(BOB, "destination", "account_deleted"),
        lapsed(carol["address"], "destination", "account_purged"),
        lapsed(low["address"], "destination", "alias_deleted"),
    ]
    assert AliasBody.model_validate(now).model_dump(mode="json") == now
    [listed] = (await client.get("/v1/aliases", params={"address": pr["address"]})).json()["items"]
    assert listed == now


# Ready


async def test_ready_is_every_enabled_host_and_no_failed_proof(
    client: httpx.AsyncClient, database: Database, worker_database: Database
) -> None:
    await make_user(client, "alice")
    for name, enabled in (("mail2", True), ("off", False)):
        await client.post("/v1/hosts", json={"name": name, "enabled": enabled})
    made = await make_alias(client, "pr", ALICE)
    assert sorted(await job_versions(database, made["id"])) == [(HOST, 1), ("mail2", 1)], "none for a disabled host"
    await apply(worker_database, made["id"], 1)
    half = await read(client, made["id"])
    assert (half["ready"], list(half["proofs"])) == (False, [HOST])
    await apply(worker_database, made["id"], 1, host="mail2")
    full = await client.get(f"/v1/aliases/{made['id']}")
    assert (full.json()["ready"], list(full.json()["proofs"]), full.json()["job"]) == (True, [HOST, "mail2"], None)
    failed = {"postfix": {"result": "failed", "detail": "its map has it not"}}
    await apply(worker_database, made["id"], 1, host="mail2", proofs=failed)
    worse = await read(client, made["id"])
    assert (worse["ready"], worse["proofs"]["mail2"]) == (False, failed)
    # A host that goes or comes changes the answer, and so the tag.
    async with worker_database.write.begin() as connection:
        await connection.execute(update(jobs).values(state=JobState.SUPERSEDED.value))
    await client.patch("/v1/hosts/mail2", json={"enabled": False})
    gone = await client.get(f"/v1/aliases/{made['id']}")
    assert (gone.json()["ready"], list(gone.json()["proofs"])) == (True, [HOST])
    await client.patch("/v1/hosts/off", json={"enabled": True})
    come = await client.get(f"/v1/aliases/{made['id']}", headers={"If-None-Match": gone.headers["etag"]})
    assert (come.status_code, come.json()["ready"]) == (200, False)
    await client.patch(f"/v1/hosts/{HOST}", json={"enabled": False})
    await client.patch("/v1/hosts/off", json={"enabled": False})
    assert (await read(client, made["id"]))["ready"] is False, "nobody has it"


async def test_an_older_version_is_not_ready(client: httpx.AsyncClient, worker_database: Database) -> None:
    await make_user(client, "alice")
    made = await make_alias(client, "pr", ALICE)
    await apply(worker_database, made["id"], 1)
    await client.patch(f"/v1/aliases/{made['id']}", json={"note": "x"})
    assert (await read(client, made["id"]))["ready"] is False
    await apply(worker_database, made["id"], 2)
    assert (await read(client, made["id"]))["ready"] is True


async def test_a_dead_job_is_tried_again_on_its_host(
    client: httpx.AsyncClient, database: Database, worker_database: Database, clock: Clock
) -> None:
    await make_user(client, "alice")
    await client.post("/v1/hosts", json={"name": "mail2"})
    made = await make_alias(client, "pr", ALICE)
    [job] = await claim(worker_database, "mail2", clock(), limit=10, kinds=[ALIASES_SYNC])
    await give_up(worker_database, job, "a hand-made line has it", clock())
    shown = await read(client, made["id"])
    assert shown["job"]["state"] == "ready", "while another is at work, that one"
    await client.patch(f"/v1/aliases/{made['id']}", json={"note": "x"})
    answer = await client.post(f"/v1/jobs/{job.id}/retry")
    new = answer.json()
    assert (answer.status_code, new["kind"], new["host"], new["subject_id"], new["version"]) == (
        202,
        ALIASES_SYNC,
        "mail2",
        made["id"],
        2,
    )
    states = dict(await rows(database, select(jobs.c.id, jobs.c.state)))
    assert (states[job.id], states[new["id"]]) == (JobState.DEAD, JobState.READY)


# At scale


async def test_few_queries_for_one_and_for_a_page(client: httpx.AsyncClient, api: Any) -> None:
    alice = await make_user(client, "alice")
    for number in range(30):
        await make_alias(client, f"a{number}", ALICE, kind="send_as", designated=[ALICE])
    sent: list[str] = []

    def keep(_: Any, __: Any, statement: str, *___: Any) -> None:
        sent.append(statement)

    for engine in (api.state.service.database.read, api.state.service.database.write):
        event.listen(engine.sync_engine, "before_cursor_execute", keep)
    for url, most in (("/v1/aliases?limit=100", 6), (f"/v1/aliases/a1@{PRIMARY}", 6), ("/v1/aliases/1", 6)):
        sent.clear()
        assert (await client.get(url)).status_code == 200
        assert 0 < len(sent) <= most, "\n".join(sent)
    sent.clear()
    assert (await client.delete(f"/v1/users/{alice['id']}")).status_code == 202
    assert 0 < len(sent) <= 18, "however many aliases lead there"
    assert [alias["version"] for alias in (await client.get("/v1/aliases?limit=100")).json()["items"]] == [2] * 30


async def test_the_examples_of_the_document_can_be_sent_as_they_stand(client: httpx.AsyncClient) -> None:
    """In their order; the domain of the examples is the one that `make run` makes."""
    schemas = build_app().openapi()["components"]["schemas"]

    def example(name: str) -> Any:
        return json.loads(json.dumps(schemas[name]["examples"][0]).replace("cacert.org", PRIMARY))

    assert (await client.post("/v1/users", json=example("NewUserBody"))).status_code == 202
    made = await client.post("/v1/aliases", json=example("NewAliasBody"))
    assert made.status_code == 202, made.text
    changed = await client.patch(made.headers["location"], json=example("ChangedAliasBody"))
    assert (changed.status_code, changed.json()["version"]) == (202, 2), changed.text
    assert (await client.patch(f"/v1/hosts/{HOST}", json=example("ChangedHostBody"))).status_code == 202
    shown = {"job": None, "deleted_at": None, **example("AliasBody")}  # the document leaves out null
    assert AliasBody.model_validate(shown).model_dump(mode="json") == shown


@pytest.mark.parametrize("test_database", ["mariadb"], indirect=True)
@pytest.mark.parametrize(
    ("wanted", "key"),
    [
        (AliasFilter(), "PRIMARY"),
        (AliasFilter(domain="virtual.test"), "ix_aliases_domain_id_id"),
        (AliasFilter(address=f"a77@{PRIMARY}"), "ix_aliases_address"),
        (AliasFilter(destination=f"a77@{PRIMARY}"), None),
        (AliasFilter(destination="x77@example.net"), None),
        (AliasFilter(designated=ALICE), None),
    ],
)
async def test_pages_are_found_by_an_index(
    seeded: Database, clock: Clock, wanted: AliasFilter, key: str | None
) -> None:
    now = clock()
    usual: dict[str, Any] = {"kind": AliasKind.SEND_AS.value, "note": "", "version": 1}
    numbers = range(1, 2001)
    other = {"id": 2, "name": "virtual.test", "kind": "virtual", "version": 1, "created_at": now, "updated_at": now}
    usual |= {"created_at": now, "updated_at": now}
    stored = [
        {"id": n, "local_part": f"a{n}", "address": f"a{n}@{PRIMARY}", "domain_id": 1 if n % 20 else 2, **usual}
        for n in numbers
    ]
    held = [{"address": row["address"], "kind": "alias", "subject_id": row["id"]} for row in stored]
    leads = [
        {"alias_id": n, "position": 0, "target_alias_id": n - 1 if n > 1 and n % 2 else None,
         "address": None if n > 1 and n % 2 else f"x{n}@example.net"} for n in numbers
    ]  # fmt: skip
    async with seeded.write.begin() as connection:
        for table, values in (
            (domains, [other]),
            (aliases, stored),
            (addresses, held),
            (alias_destinations, leads),
        ):
            await connection.execute(insert(table), values)
    first: list[tuple[str, Any]] = []

    @event.listens_for(seeded.read.sync_engine, "before_cursor_execute")
    def keep(_: Any, __: Any, statement: str, parameters: Any, *___: Any) -> None:
        first.append((statement, parameters))

    async with seeded.read.connect() as connection:
        await service.list_aliases(connection, wanted, limit=10)
        statement, parameters = first[0]
        steps = (await connection.exec_driver_sql(f"EXPLAIN {statement}", parameters)).mappings().all()
    walked = [dict(step) for step in steps if step["rows"] is not None and int(step["rows"]) > 100]
    if key in ("PRIMARY", "ix_aliases_domain_id_id"):
        assert steps[0]["key"] == key, steps
    else:
        assert walked == []
