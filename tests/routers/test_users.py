"""The life of an account over HTTP, as far as it needs no host: what is stored, answered, refused."""

import asyncio
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from sqlalchemy import insert, select

from app.db import Database, utc_now
from app.models.addresses import addresses
from app.models.audit_events import audit_events
from app.models.idempotency_keys import idempotency_keys
from app.models.jobs import jobs
from app.models.principals import principals
from app.models.users import users
from app.permissions import Permission
from app.queue.claim import Outcome
from app.routers.users import UserBody
from app.services import users as service
from app.workers.host.rows import write_applied
from tests.conftest import HOST, PRIMARY, Clock, TestDatabase

pytestmark = pytest.mark.asyncio

HASH = "{ARGON2ID}$argon2id$v=19$m=8192,t=1,p=1$c2FsdHNhbHRzYWx0c2FsdA$DYFAS5QpLBm0KKZKwM8bR4MwmUEyJ3tqXkmOc1rbzAM"


async def create(client: httpx.AsyncClient, name: str = "alice", **members: Any) -> dict[str, Any]:
    answer = await client.post("/v1/users", json={"address": f"{name}@{PRIMARY}", **members})
    assert answer.status_code == 202, answer.text
    return dict(answer.json())


async def rows(database: Database, query: Any) -> list[Any]:
    async with database.read.connect() as connection:
        return list((await connection.execute(query)).all())


async def test_a_new_account_is_row_address_event_and_job(client: httpx.AsyncClient, database: Database) -> None:
    answer = await client.post(
        "/v1/users",
        json={
            "address": f"Alice@{PRIMARY.upper()}",
            "display_name": "Ålice",
            "contact_address": "Alice@Example.net",
            "external_id": "42",
            "quota_bytes": 10_000_000,
            "password_hash": HASH,
        },
    )
    assert answer.status_code == 202
    body = answer.json()
    assert answer.headers["location"] == f"/v1/users/{body['id']}"
    assert answer.headers["link"] == f'</v1/jobs/{body["job"]["id"]}>; rel="monitor"'
    assert answer.headers["etag"] == '"1.0"'
    assert "password_hash" not in body
    assert {name: body[name] for name in ("address", "display_name", "contact_address", "external_id", "state")} == {
        "address": f"alice@{PRIMARY}",
        "display_name": "Ålice",
        "contact_address": "Alice@example.net",
        "external_id": "42",
        "state": "active",
    }
    assert (body["host"], body["version"], body["ready"], body["proofs"], body["has_password"]) == (
        HOST,
        1,
        False,
        {},
        True,
    )
    assert body["uid"] is None
    assert body["home"] is None
    [job] = await rows(database, select(jobs))
    assert (job.host, job.lane, job.kind, job.subject_id, job.version, job.state, job.fence) == (
        HOST,
        f"alice@{PRIMARY}",
        "mailbox.sync",
        body["id"],
        1,
        "ready",
        0,
    )
    assert job.request_id == answer.headers["x-request-id"]
    [address] = await rows(database, select(addresses))
    assert (address.kind, address.subject_id) == ("user", body["id"])
    [event] = await rows(database, select(audit_events).where(audit_events.c.action == "users.create"))
    assert event.request_id == job.request_id
    assert event.after["password"] is True
    assert HASH not in str(event)
    [user] = await rows(database, select(users))
    assert user.password_hash == HASH


@pytest.mark.parametrize(
    ("body", "pointer"),
    [
        ({}, "/address"),
        ({"address": "alice"}, "/address"),
        ({"address": f"alice+x@{PRIMARY}"}, "/address"),
        ({"address": f"a..b@{PRIMARY}"}, "/address"),
        ({"address": f"../etc@{PRIMARY}"}, "/address"),
        ({"address": f"alice\n@{PRIMARY}"}, "/address"),
        ({"address": f"älice@{PRIMARY}"}, "/address"),
        ({"address": "alice@nowhere.test"}, "/address"),
        ({"address": 5}, "/address"),
        ({"address": f"alice@{PRIMARY}", "display_name": "a\nb"}, "/display_name"),
        ({"address": f"alice@{PRIMARY}", "display_name": "x" * 201}, "/display_name"),
        ({"address": f"alice@{PRIMARY}", "contact_address": "a b@c.d"}, "/contact_address"),
        ({"address": f"alice@{PRIMARY}", "contact_address": f"alice@{PRIMARY}"}, "/contact_address"),
        ({"address": f"alice@{PRIMARY}", "contact_address": f"Alice+me@{PRIMARY}"}, "/contact_address"),
        ({"address": f"alice@{PRIMARY}", "quota_bytes": 5}, "/quota_bytes"),
        ({"address": f"alice@{PRIMARY}", "quota_bytes": 2**70}, "/quota_bytes"),
        ({"address": f"alice@{PRIMARY}", "external_id": ""}, "/external_id"),
        ({"address": f"alice@{PRIMARY}", "uid": 0}, "/uid"),
        ({"address": f"alice@{PRIMARY}", "home": "/root"}, "/home"),
        ({"address": f"alice@{PRIMARY}", "password": "q7-x9"}, "/password"),
        ({"address": f"alice@{PRIMARY}", "password": f"alice{PRIMARY}alice"}, "/password"),
        ({"address": f"alice@{PRIMARY}", "password_hash": "{PLAIN}secret"}, "/password_hash"),
        ({"address": f"alice@{PRIMARY}", "password_hash": HASH, "password": "seven green lanterns over"}, ""),
    ],
)
async def test_bad_input_is_named_and_nothing_is_kept(
    client: httpx.AsyncClient, database: Database, body: dict[str, Any], pointer: str
) -> None:
    answer = await client.post("/v1/users", json=body)
    assert answer.status_code == 422, answer.text
    problem = answer.json()
    assert answer.headers["content-type"] == "application/problem+json"
    assert pointer in [error["pointer"] for error in problem["errors"]]
    assert problem["request_id"] == answer.headers["x-request-id"]
    for secret in ("password", "password_hash"):
        assert secret not in body or str(body[secret]) not in answer.text
    for table in (users, addresses, jobs):
        assert await rows(database, select(table)) == []


async def test_an_unreadable_body_is_a_400(client: httpx.AsyncClient) -> None:
    answer = await client.post("/v1/users", content=b"{", headers={"content-type": "application/json"})
    assert (answer.status_code, answer.json()["type"]) == (400, "/problems/bad-request")
    answer = await client.post("/v1/users", content=b"x" * 70_000, headers={"content-type": "application/json"})
    assert answer.status_code == 413


async def test_reserved_names_are_refused(client: httpx.AsyncClient) -> None:
    answer = await client.post("/v1/users", json={"address": f"Postmaster@{PRIMARY}"})
    assert (answer.status_code, answer.json()["type"]) == (409, "/problems/address-reserved")


async def test_the_second_of_the_same_name_is_told_who_has_it(
    client: httpx.AsyncClient, make_client: Callable[..., Any]
) -> None:
    first = await create(client, external_id="7")
    answer = await client.post("/v1/users", json={"address": f"alice@{PRIMARY}"})
    assert answer.status_code == 409
    assert answer.json()["type"] == "/problems/user-exists"
    assert (answer.json()["id"], answer.json()["external_id"]) == (first["id"], "7")
    answer = await client.post("/v1/users", json={"address": f"bob@{PRIMARY}", "external_id": "7"})
    assert (answer.status_code, answer.json()["id"]) == (409, first["id"])
    writer = await make_client(Permission.USERS_WRITE)
    answer = await writer.post("/v1/users", json={"address": f"alice@{PRIMARY}"})
    assert answer.status_code == 409
    assert "id" not in answer.json()
    assert "external_id" not in answer.json()


async def test_every_answer_has_what_the_document_says(client: httpx.AsyncClient) -> None:
    made = await client.post("/v1/users", json={"address": f"alice@{PRIMARY}", "external_id": "1"})
    read = await client.get(f"/v1/users/alice@{PRIMARY}")
    [listed] = (await client.get("/v1/users")).json()["items"]
    for body in (made.json(), read.json(), listed):
        assert body.keys() == UserBody.model_fields.keys()
        assert UserBody.model_validate(body).model_dump(mode="json") == body
    assert made.json() == read.json() == listed


async def test_twenty_at_once_make_one_account(client: httpx.AsyncClient, database: Database) -> None:
    answers = await asyncio.gather(*(client.post("/v1/users", json={"address": f"alice@{PRIMARY}"}) for _ in range(20)))
    assert sorted(answer.status_code for answer in answers) == [202] + [409] * 19
    assert len(await rows(database, select(users))) == 1
    assert len(await rows(database, select(jobs))) == 1


async def test_get_by_address_and_id_with_etag(client: httpx.AsyncClient, worker_database: Database) -> None:
    user = await create(client)
    waiting = (await client.get(f"/v1/users/{user['id']}")).headers["etag"]
    shown = await client.get(f"/v1/users/{user['id']}", headers={"If-None-Match": waiting})
    assert shown.status_code == 200, "the job that is shown changes without the tag"
    proofs = {"maildir": {"result": "ok", "detail": None}}
    await write_applied(worker_database, HOST, user["id"], Outcome(1, True, proofs, {}), utc_now())
    by_address = await client.get(f"/v1/users/ALICE@{PRIMARY}")
    by_id = await client.get(f"/v1/users/{user['id']}")
    assert by_address.status_code == by_id.status_code == 200
    assert by_address.json() == by_id.json()
    tag = by_id.headers["etag"]
    assert (await client.get(f"/v1/users/{user['id']}", headers={"If-None-Match": tag})).status_code == 304
    assert (await client.get(f"/v1/users/{user['id']}", headers={"If-None-Match": '"9.9"'})).status_code == 200
    for missing in ("999", f"bob@{PRIMARY}"):
        answer = await client.get(f"/v1/users/{missing}")
        assert (answer.status_code, answer.json()["type"]) == (404, "/problems/not-found")
    assert (await client.get("/v1/users/a%2F..%2Fb@x.y")).status_code in (404, 422)
    assert (await client.get("/v1/users/1?colour=red")).status_code == 422


async def test_patch_changes_only_what_is_sent(client: httpx.AsyncClient, database: Database) -> None:
    user = await create(client, display_name="A", contact_address="a@example.net")
    url = f"/v1/users/{user['id']}"
    changed = (await client.patch(url, json={"display_name": "B"})).json()
    assert (changed["display_name"], changed["contact_address"], changed["version"]) == ("B", "a@example.net", 2)
    same = await client.patch(url, json={"display_name": "B"})
    assert same.json()["version"] == 2
    assert len(await rows(database, select(jobs))) == 2
    cleared = (await client.patch(url, json={"contact_address": None})).json()
    assert (cleared["contact_address"], cleared["version"]) == (None, 3)
    [event] = await rows(database, select(audit_events).where(audit_events.c.action == "users.change").limit(1))
    assert (event.before, event.after) == ({"display_name": "A"}, {"display_name": "B"})


async def test_a_refused_creation_uses_up_no_uid(client: httpx.AsyncClient) -> None:
    first = await create(client, external_id="1")
    await create(client, name="gone")
    await client.delete(f"/v1/users/gone@{PRIMARY}")
    for _ in range(5):
        for body in ({"address": f"alice@{PRIMARY}"}, {"address": f"gone@{PRIMARY}"}):
            assert (await client.post("/v1/users", json=body)).status_code == 409
        body = {"address": f"bob@{PRIMARY}", "external_id": "1"}
        assert (await client.post("/v1/users", json=body)).status_code == 409
    assert (await create(client, name="next"))["id"] == first["id"] + 2


async def test_no_conflict_tells_a_writer_whose_it_is(
    client: httpx.AsyncClient, make_client: Callable[..., Any]
) -> None:
    await create(client, external_id="secret-1")
    bob = await create(client, name="bob")
    await client.delete(f"/v1/users/{bob['id']}")
    await create(client, name="bob", reuse_address=True, external_id="secret-2")
    carol = await create(client, name="carol")
    writer = await make_client(Permission.USERS_WRITE)
    for answer in (
        await writer.post("/v1/users", json={"address": f"alice@{PRIMARY}"}),
        await writer.post("/v1/users", json={"address": f"dave@{PRIMARY}", "external_id": "secret-1"}),
        await writer.patch(f"/v1/users/{carol['id']}", json={"external_id": "secret-1"}),
        await writer.post(f"/v1/users/{bob['id']}/restore"),
    ):
        assert (answer.status_code, answer.json()["type"]) == (409, "/problems/user-exists")
        assert not {"id", "external_id"} & answer.json().keys()


async def test_the_password_is_hashed_while_no_connection_is_held(
    api: FastAPI, client: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    database: Database = api.state.service.database
    held: list[int] = []

    async def hash_password(password: str) -> str:
        held.extend(engine.pool.checkedout() for engine in (database.read, database.write))  # type: ignore[attr-defined]
        return HASH

    monkeypatch.setattr("app.routers.passwords.hash_password", hash_password)
    await create(client, password="seven green lanterns over the harbour")
    assert held == [0, 0]


@pytest.mark.parametrize(
    ("body", "type_", "pointer", "says"),
    [
        ({"address": "bob@cacert.test"}, "unchangeable", "/address", "never changes"),
        ({"host": "other"}, "unchangeable", "/host", "does not move"),
        ({"password": "swordfish"}, "unchangeable", "/password", "not changed here"),
        ({"password_hash": "swordfish"}, "unchangeable", "/password_hash", "not changed here"),
        ({"state": "deleted"}, "unchangeable", "/state", "DELETE"),
        ({"display_name": "B", "password": None}, "unchangeable", "/password", "not changed here"),
        ({"state": None}, "invalid-request", "/state", "cannot be null"),
        ({"display_name": None}, "invalid-request", "/display_name", "cannot be null"),
        ({"state": "dead"}, "invalid-request", "/state", "'active' or 'suspended'."),
        ({"suspended_reason": "why"}, "bad-field", "/suspended_reason", "suspended"),
        ({"version": 5}, "invalid-request", "/version", "There is no such field. This takes: display_name, contact_"),
        ([], "invalid-request", "", "JSON object"),
    ],
)
async def test_what_patch_refuses_says_what_to_do(
    client: httpx.AsyncClient, body: Any, type_: str, pointer: str, says: str
) -> None:
    user = await create(client)
    answer = await client.patch(f"/v1/users/{user['id']}", json=body)
    problem = answer.json()
    assert (answer.status_code, problem["type"]) == (422, f"/problems/{type_}")
    [fault] = problem["errors"]
    assert fault["pointer"] == pointer
    assert says in fault["detail"]
    assert says in problem["detail"]
    assert "swordfish" not in answer.text
    assert (await client.get(f"/v1/users/{user['id']}")).json()["version"] == 1


async def test_who_may_write_an_account_sees_it_whole_when_it_writes(make_client: Callable[..., Any]) -> None:
    writer = await make_client(Permission.USERS_WRITE)
    made = await create(writer, contact_address="a@example.net", external_id="7")
    changed = await writer.patch(f"/v1/users/{made['id']}", json={"display_name": "Alice"})
    for body in (made, changed.json()):
        assert body.keys() == UserBody.model_fields.keys()
        assert (body["contact_address"], body["external_id"]) == ("a@example.net", "7")
    for path in (f"/v1/users/{made['id']}", f"/v1/users/alice@{PRIMARY}", "/v1/users"):
        refused = await writer.get(path)
        assert (refused.status_code, refused.json()["missing"]) == (403, "users:read")


async def test_a_missing_account_is_named_as_it_was_asked_for(client: httpx.AsyncClient) -> None:
    by_id, by_address = await client.get("/v1/users/17"), await client.get(f"/v1/users/bob@{PRIMARY}")
    assert (by_id.status_code, by_id.json()["detail"]) == (404, "There is no account 17.")
    assert "its id only" not in by_id.text
    assert by_address.json()["detail"].startswith(
        f"There is no account bob@{PRIMARY}. A deleted one is found by its id only"
    )
    changed = await client.patch("/v1/users/17", json={"display_name": "x"})
    assert (changed.status_code, changed.json()["detail"]) == (404, "There is no account 17.")


async def test_suspend_ends_access_and_resume_clears_the_reason(
    client: httpx.AsyncClient, database: Database, clock: Clock
) -> None:
    user = await create(client)
    url = f"/v1/users/{user['id']}"
    suspended = (await client.patch(url, json={"state": "suspended", "suspended_reason": "stolen"})).json()
    assert (suspended["state"], suspended["suspended_reason"]) == ("suspended", "stolen")
    [row] = await rows(database, select(users))
    assert row.access_ended_at == clock.now
    resumed = (await client.patch(url, json={"state": "active"})).json()
    assert (resumed["state"], resumed["suspended_reason"], resumed["version"]) == ("active", None, 3)


async def test_if_match_protects_a_change(client: httpx.AsyncClient) -> None:
    user = await create(client)
    url = f"/v1/users/{user['id']}"
    assert (await client.patch(url, json={"display_name": "B"}, headers={"If-Match": '"1.0"'})).status_code == 202
    late = await client.patch(url, json={"display_name": "C"}, headers={"If-Match": '"1.0"'})
    assert (late.status_code, late.json()["version"]) == (412, 2)
    assert (await client.delete(url, headers={"If-Match": '"1.0"'})).status_code == 412
    assert (await client.patch(url, json={"display_name": "C"}, headers={"If-Match": "rubbish"})).status_code == 422
    assert (await client.delete(url, headers={"If-Match": f'"{"1" * 5000}"'})).status_code == 422
    # The worker's writes raise the revision only, and are nobody's edit.
    assert (await client.patch(url, json={"display_name": "C"}, headers={"If-Match": '"2.17"'})).status_code == 202


async def test_fifty_changes_at_once_lose_none(client: httpx.AsyncClient, database: Database) -> None:
    user = await create(client)
    names = [f"name {number}" for number in range(50)]
    answers = await asyncio.gather(
        *(client.patch(f"/v1/users/{user['id']}", json={"display_name": name}) for name in names)
    )
    assert {answer.status_code for answer in answers} == {202}
    assert (await client.get(f"/v1/users/{user['id']}")).json()["version"] == 51
    assert sorted(job.version for job in await rows(database, select(jobs))) == list(range(1, 52))


async def test_delete_leaves_a_tombstone(client: httpx.AsyncClient, clock: Clock) -> None:
    user = await create(client)
    deleted = await client.delete(f"/v1/users/alice@{PRIMARY}")
    assert deleted.status_code == 202
    assert deleted.json()["state"] == "deleted"
    assert deleted.json()["deleted_at"] == "2026-11-23T12:00:00Z"
    assert deleted.json()["purge_at"] == "2026-12-23T12:00:00Z"
    again = await client.delete(f"/v1/users/{user['id']}")
    assert again.json()["version"] == deleted.json()["version"]
    assert (await client.get(f"/v1/users/alice@{PRIMARY}")).status_code == 404
    assert (await client.delete(f"/v1/users/alice@{PRIMARY}")).status_code == 404
    assert (await client.get(f"/v1/users/{user['id']}")).json()["state"] == "deleted"
    listed = await client.get("/v1/users", params={"state": "deleted", "address": f"alice@{PRIMARY}"})
    assert [item["id"] for item in listed.json()["items"]] == [user["id"]]
    assert (await client.get("/v1/users")).json()["items"] == []
    changed = await client.patch(f"/v1/users/{user['id']}", json={"display_name": "x"})
    assert (changed.status_code, changed.json()["type"]) == (409, "/problems/user-deleted")
    taken = await client.post("/v1/users", json={"address": f"alice@{PRIMARY}"})
    assert (taken.status_code, taken.json()["type"]) == (409, "/problems/address-retired")
    assert taken.json()["user_id"] == user["id"]


async def test_restore_brings_it_back_unless_somebody_has_the_address(client: httpx.AsyncClient) -> None:
    user = await create(client, password_hash=HASH)
    url = f"/v1/users/{user['id']}"
    assert (await client.post(f"{url}/restore")).json()["type"] == "/problems/user-not-deleted"
    await client.delete(url)
    restored = await client.post(f"{url}/restore")
    assert restored.status_code == 202
    assert restored.json()["state"] == "active"
    assert restored.json()["deleted_at"] is None
    assert restored.json()["has_password"] is True
    assert (await client.get(f"/v1/users/alice@{PRIMARY}")).json()["id"] == user["id"]
    await client.delete(url)
    successor = await create(client, reuse_address=True)
    assert successor["id"] != user["id"]
    refused = await client.post(f"{url}/restore")
    assert (refused.status_code, refused.json()["type"]) == (409, "/problems/user-exists")
    assert refused.json()["id"] == successor["id"]
    # The successor's tombstone is not the predecessor's either.
    await client.delete(f"/v1/users/{successor['id']}")
    refused = await client.post(f"{url}/restore")
    assert (refused.status_code, refused.json()["type"]) == (409, "/problems/address-retired")
    assert (await client.post(f"/v1/users/{successor['id']}/restore")).status_code == 202


async def test_who_was_suspended_is_suspended_after_a_restore(client: httpx.AsyncClient) -> None:
    user = await create(client)
    url = f"/v1/users/{user['id']}"
    await client.patch(url, json={"state": "suspended", "suspended_reason": "abuse"})
    await client.delete(url)
    restored = (await client.post(f"{url}/restore")).json()
    assert (restored["state"], restored["suspended_reason"]) == ("suspended", "abuse")


async def test_a_host_that_goes_away_meanwhile_is_a_conflict(
    client: httpx.AsyncClient, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service, "choose_host", lambda found, name: "removed")
    answer = await client.post("/v1/users", json={"address": f"alice@{PRIMARY}"})
    assert (answer.status_code, answer.json()["type"]) == (409, "/problems/place-gone")
    assert await rows(database, select(users)) == []


async def test_purge_forgets_the_person_and_keeps_the_row(client: httpx.AsyncClient, database: Database) -> None:
    user = await create(
        client, display_name="Alice", contact_address="a@example.net", external_id="5", password_hash=HASH
    )
    url = f"/v1/users/{user['id']}"
    assert (await client.post(f"{url}/purge")).status_code == 409
    await client.delete(url)
    purged = (await client.post(f"{url}/purge")).json()
    assert purged["purged_at"] is not None
    assert (purged["display_name"], purged["contact_address"], purged["external_id"]) == ("", None, None)
    [row] = await rows(database, select(users))
    assert row.password_hash is None
    [address] = await rows(database, select(addresses))
    assert address.kind == "tombstone"
    refused = await client.post(f"{url}/restore")
    assert (refused.status_code, refused.json()["type"]) == (409, "/problems/user-purged")
    assert (await client.post(f"{url}/purge")).json()["version"] == purged["version"]
    assert await create(client, name="carol", external_id="5")


async def test_purge_needs_a_permission_of_its_own(client: httpx.AsyncClient, make_client: Callable[..., Any]) -> None:
    user = await create(client)
    await client.delete(f"/v1/users/{user['id']}")
    writer = await make_client(Permission.USERS_READ, Permission.USERS_WRITE)
    refused = await writer.post(f"/v1/users/{user['id']}/purge")
    assert (refused.status_code, refused.json()["missing"]) == (403, "users:purge")


async def test_lists_page_and_filter(client: httpx.AsyncClient) -> None:
    await client.post("/v1/domains", json={"name": "other.test"})
    for number in range(7):
        await create(client, name=f"user{number}", display_name=f"Person {number}", external_id=f"x{number}")
    await client.post("/v1/users", json={"address": "eve@other.test"})
    await client.patch(f"/v1/users/user3@{PRIMARY}", json={"state": "suspended"})
    seen = []
    url = "/v1/users?limit=3"
    while url:
        page = await client.get(url)
        assert page.status_code == 200, page.text
        seen += [item["address"] for item in page.json()["items"]]
        link = page.headers.get("link")
        assert (link is None) == (page.json()["next_cursor"] is None)
        url = link.partition("<")[2].partition(">")[0] if link else ""
    assert seen == [f"user{number}@{PRIMARY}" for number in range(7)] + ["eve@other.test"]

    async def found(**parameters: Any) -> list[str]:
        answer = await client.get("/v1/users", params=parameters)
        assert answer.status_code == 200, answer.text
        return [item["address"].partition("@")[0] for item in answer.json()["items"]]

    assert await found(domain="other.test") == ["eve"]
    assert await found(domain="unknown.test") == []
    assert await found(state="suspended") == ["user3"]
    assert await found(external_id="x5") == ["user5"]
    assert await found(address=f"USER2@{PRIMARY}") == ["user2"]
    assert await found(q="Person 4") == ["user4"]
    assert await found(q="person 4") == ["user4"]
    assert await found(q="USER4") == ["user4"]
    assert await found(q="%") == []
    assert await found(q="ü") == []
    await create(client, name="zoe", display_name="Zoë Ü")
    assert await found(q="zoë") == ["zoe"]
    await client.delete(f"/v1/users/zoe@{PRIMARY}")
    assert await found(ready="true") == []
    assert len(await found(ready="false")) == 8
    for bad in ("limit=0", "limit=501", "cursor=zz", "state=dead", "colour=red"):
        assert (await client.get(f"/v1/users?{bad}")).status_code == 422


async def test_a_repeat_with_the_same_key_makes_nothing_twice(client: httpx.AsyncClient, database: Database) -> None:
    body = {"address": f"alice@{PRIMARY}", "display_name": "A"}
    first = await client.post("/v1/users", json=body, headers={"Idempotency-Key": "k1"})
    await client.patch(f"/v1/users/{first.json()['id']}", json={"display_name": "B"})
    repeat = await client.post("/v1/users", json=body, headers={"Idempotency-Key": "k1"})
    assert repeat.headers["idempotency-replayed"] == "true"
    assert repeat.json()["id"] == first.json()["id"]
    assert repeat.json()["display_name"] == "B", "the resource as it is now, not a stored answer"
    other = await client.post("/v1/users", json={**body, "display_name": "C"}, headers={"Idempotency-Key": "k1"})
    assert (other.status_code, other.json()["type"]) == (422, "/problems/key-reused")
    assert len(await rows(database, select(users))) == 1


async def test_ten_at_once_with_the_same_key_make_one(client: httpx.AsyncClient, database: Database) -> None:
    body = {"address": f"alice@{PRIMARY}"}
    answers = await asyncio.gather(
        *(client.post("/v1/users", json=body, headers={"Idempotency-Key": "k"}) for _ in range(10))
    )
    assert {answer.status_code for answer in answers} == {202}
    assert len({answer.json()["id"] for answer in answers}) == 1
    assert sum(answer.headers.get("idempotency-replayed") == "true" for answer in answers) == 9
    assert len(await rows(database, select(users))) == 1


async def test_a_key_of_a_refused_request_stays_free(
    client: httpx.AsyncClient, make_client: Callable[..., Any]
) -> None:
    headers = {"Idempotency-Key": "k"}
    body = {"address": f"alice@{PRIMARY}"}
    await create(client)
    assert (await client.post("/v1/users", json=body, headers=headers)).status_code == 409
    await client.delete(f"/v1/users/alice@{PRIMARY}")
    body["reuse_address"] = True  # type: ignore[assignment]
    assert (await client.post("/v1/users", json=body, headers=headers)).status_code == 202
    # Keys belong to their principal.
    other = await make_client()
    assert (await other.post("/v1/users", json={"address": f"bob@{PRIMARY}"}, headers=headers)).status_code == 202


async def test_a_key_at_work_is_a_conflict_after_one_second_and_not_tried_again(
    client: httpx.AsyncClient, database: Database, test_database: TestDatabase
) -> None:
    if test_database.kind == "sqlite":
        return  # its writers queue as a whole: the second finds the first's row, which the tests above show
    async with database.read.connect() as connection:
        principal = (await connection.execute(select(principals.c.id))).scalar_one()
    values = {"principal_id": principal, "key": "busy", "request_hash": "0" * 64, "created_at": utc_now()}
    async with database.write.connect() as other, other.begin() as at_work:
        await other.execute(insert(idempotency_keys), values)
        began = asyncio.get_running_loop().time()
        answer = await client.post(
            "/v1/users", json={"address": f"alice@{PRIMARY}"}, headers={"Idempotency-Key": "busy"}
        )
        took = asyncio.get_running_loop().time() - began
        await at_work.rollback()
    assert (answer.status_code, answer.json()["type"]) == (409, "/problems/key-in-use")
    assert answer.headers["retry-after"] == "1"
    assert took < 2, "a second lock wait means that it was tried again"
    assert await rows(database, select(users)) == []


async def test_a_limit_of_its_own_for_sending(client: httpx.AsyncClient, database: Database) -> None:
    assert (await create(client, "bob"))["send_limit"] is None, "the host's setting"
    made = await create(client, send_limit=500)
    url = f"/v1/users/{made['id']}"
    assert made["send_limit"] == (await client.get(url)).json()["send_limit"] == 500
    for version, limit in enumerate((0, 1_000_000, None), start=2):
        changed = (await client.patch(url, json={"send_limit": limit})).json()
        assert (changed["send_limit"], changed["version"]) == (limit, version)
    for bad in (-1, 1_000_001, "many", 1.5):
        for answer in (
            await client.patch(url, json={"send_limit": bad}),
            await client.post("/v1/users", json={"address": f"carol@{PRIMARY}", "send_limit": bad}),
        ):
            assert (answer.status_code, answer.json()["errors"][0]["pointer"]) == (422, "/send_limit")
    assert await rows(database, select(users.c.send_limit).order_by(users.c.id)) == [(None,), (None,)]
