"""App passwords over HTTP: shown once, limited, listed, revoked. What mail programs may do with them is in tests/mail."""

import asyncio
import hashlib
import re
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from sqlalchemy import select, update

from app.db import Database, utc_now
from app.models.app_passwords import app_passwords
from app.models.audit_events import audit_events
from app.models.idempotency_keys import idempotency_keys
from app.models.jobs import jobs
from app.models.principals import principals
from app.models.users import users
from app.permissions import Role
from app.queue.claim import Outcome, record
from app.queue.contracts import MAILBOX_SYNC
from app.services.app_passwords import list_app_passwords, revoke_app_passwords
from app.services.changes import Change
from app.services.principals import as_principal, create_principal, read_client
from tests.conftest import ACTOR, HOST, PRIMARY, Clock, anonymous
from tests.routers.accounts import ALICE, BOB, make_user, stand

pytestmark = pytest.mark.asyncio

SHAPE = re.compile(r"[a-hjkmnp-z2-9]{4}(-[a-hjkmnp-z2-9]{4}){6}")


async def make(client: httpx.AsyncClient, user: object = ALICE, *protocols: str, **headers: str) -> dict[str, Any]:
    body = {"name": "Telephone", "protocols": protocols or ["imap", "smtp"]}
    answer = await client.post(f"/v1/users/{user}/app-passwords", json=body, headers=headers)
    assert answer.status_code == 201, answer.text
    return dict(answer.json())


async def listed(client: httpx.AsyncClient, user: object = ALICE) -> list[int]:
    answer = await client.get(f"/v1/users/{user}/app-passwords")
    assert answer.status_code == 200, answer.text
    return [item["id"] for item in answer.json()["items"]]


async def rows(database: Database, query: Any) -> list[Any]:
    async with database.read.connect() as connection:
        return list((await connection.execute(query)).all())


async def test_shown_once_and_kept_as_a_hash(client: httpx.AsyncClient, database: Database) -> None:
    user = await make_user(client, "alice")
    answer = await client.post(
        f"/v1/users/{ALICE}/app-passwords", json={"name": "Télephone", "protocols": ["smtp", "imap"]}
    )
    assert (answer.status_code, answer.headers["cache-control"]) == (201, "no-store")
    made = answer.json()
    assert answer.headers["location"] == f"/v1/users/{user['id']}/app-passwords/{made['id']}"
    password = made.pop("password")
    assert SHAPE.fullmatch(password)
    assert made == {
        "id": made["id"],
        "name": "Télephone",
        "protocols": ["imap", "smtp"],
        "created_at": "2026-11-23T12:00:00Z",
        "revoked_at": None,
        "last_used_at": None,
        "last_used_from": None,
    }
    assert (await client.get(answer.headers["location"])).json() == made
    assert (await client.get(f"/v1/users/{ALICE}/app-passwords")).json() == {"items": [made]}
    [row] = await rows(database, select(app_passwords))
    assert row.secret_hash == hashlib.sha256(password.encode()).hexdigest()
    assert (row.user_id, row.imap, row.pop3, row.smtp, row.sieve) == (user["id"], True, False, True, False)
    # Neither the secret nor its hash is anywhere else, and nothing is left for the host to do.
    everything = [*await rows(database, select(audit_events)), *await rows(database, select(jobs))]
    assert password not in str(everything)
    assert row.secret_hash not in str(everything)
    assert (await client.get(f"/v1/users/{ALICE}")).json()["version"] == 1


async def test_who_made_and_revoked_it_is_in_the_audit_trail(client: httpx.AsyncClient, database: Database) -> None:
    user = await make_user(client, "alice")
    made = await make(client)
    await client.delete(f"/v1/users/{ALICE}/app-passwords/{made['id']}")
    query = select(audit_events).where(audit_events.c.subject_kind == "app-password").order_by(audit_events.c.id)
    [created, revoked] = await rows(database, query)
    assert (created.action, revoked.action) == ("app-passwords.create", "app-passwords.revoke")
    for event in (created, revoked):
        assert (event.subject_id, event.user_id) == (str(made["id"]), user["id"])
    assert created.after == {"name": "Telephone", "protocols": ["imap", "smtp"]}
    assert revoked.before == {"name": "Telephone"}
    assert made["password"] not in str([*created, *revoked])


async def test_sent_again_it_makes_no_second_one_and_shows_no_secret(
    client: httpx.AsyncClient, database: Database
) -> None:
    await make_user(client, "alice")
    made = await make(client, **{"Idempotency-Key": "once"})
    body = {"name": "Telephone", "protocols": ["imap", "smtp"]}
    again = await client.post(f"/v1/users/{ALICE}/app-passwords", json=body, headers={"Idempotency-Key": "once"})
    assert (again.status_code, again.headers["idempotency-replayed"]) == (201, "true")
    assert again.json() == {**made, "password": None}
    assert await listed(client) == [made["id"]]
    assert made["password"] not in str(await rows(database, select(idempotency_keys)))
    other = await client.post(
        f"/v1/users/{ALICE}/app-passwords", json={**body, "name": "Other"}, headers={"Idempotency-Key": "once"}
    )
    assert other.status_code == 422


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"name": "x"},
        {"protocols": ["imap"]},
        {"name": "x", "protocols": []},
        {"name": "x", "protocols": ["imap", "imap"]},
        {"name": "x", "protocols": ["http"]},
        {"name": "x", "protocols": ["IMAP"]},
        {"name": "x", "protocols": "imap"},
        {"name": "", "protocols": ["imap"]},
        {"name": "x" * 101, "protocols": ["imap"]},
        {"name": "a\nb", "protocols": ["imap"]},
        {"name": "\u202eevil", "protocols": ["imap"]},
        {"name": "x", "protocols": ["imap"], "password": "chosen by me, and weak"},
    ],
)
async def test_what_is_refused(client: httpx.AsyncClient, body: dict[str, Any]) -> None:
    await make_user(client, "alice")
    answer = await client.post(f"/v1/users/{ALICE}/app-passwords", json=body)
    assert (answer.status_code, answer.headers["content-type"]) == (422, "application/problem+json")
    assert "chosen by me" not in answer.text
    assert await listed(client) == []


async def test_no_more_than_so_many(client: httpx.AsyncClient, api: FastAPI) -> None:
    await make_user(client, "alice")
    await make_user(client, "bob")
    most = api.state.service.settings.app_passwords_max
    first = await make(client)
    for _ in range(most - 1):
        await make(client)
    body = {"name": "One more", "protocols": ["imap"]}
    refused = await client.post(f"/v1/users/{ALICE}/app-passwords", json=body)
    assert (refused.status_code, refused.json()["type"]) == (409, "/problems/too-many-app-passwords")
    await make(client, BOB)
    await client.delete(f"/v1/users/{ALICE}/app-passwords/{first['id']}")
    await make(client)
    assert len(await listed(client)) == most


async def test_no_more_than_so_many_at_the_same_moment(client: httpx.AsyncClient, api: FastAPI) -> None:
    await make_user(client, "alice")
    most = api.state.service.settings.app_passwords_max
    for _ in range(most - 2):
        await make(client)
    body = {"name": "One more", "protocols": ["imap"]}
    asked = (client.post(f"/v1/users/{ALICE}/app-passwords", json=body) for _ in range(8))
    statuses = sorted([answer.status_code for answer in await asyncio.gather(*asked)])
    assert statuses == [201] * 2 + [409] * 6
    assert len(await listed(client)) == most


async def test_revoking_ends_the_sessions_of_the_account(
    client: httpx.AsyncClient, database: Database, worker_database: Database, clock: Clock
) -> None:
    user = await make_user(client, "alice")
    await stand(worker_database, user)
    made, other = await make(client), await make(client)
    clock.forward(minutes=5)
    url = f"/v1/users/{ALICE}/app-passwords/{made['id']}"
    answer = await client.delete(url)
    assert answer.status_code == 202, answer.text
    body = answer.json()
    assert (body["id"], body["revoked_at"], body["ready"]) == (made["id"], "2026-11-23T12:05:00Z", False)
    assert answer.headers["link"] == f'<{body["job"]["url"]}>; rel="monitor"'
    [row] = await rows(database, select(users.c.version, users.c.access_ended_at))
    assert (row.version, row.access_ended_at) == (2, clock())
    [job] = await rows(database, select(jobs).where(jobs.c.id == body["job"]["id"]))
    assert (job.kind, job.subject_id, job.version) == (MAILBOX_SYNC, user["id"], 2)
    assert await listed(client) == [other["id"]]
    assert (await client.get(url)).json()["revoked_at"] == "2026-11-23T12:05:00Z"
    # Again, once the host has done it: no change.
    proofs = {"sessions": {"result": "ok", "detail": "none is left"}}
    async with worker_database.write.begin() as connection:
        await record(connection, HOST, MAILBOX_SYNC, user["id"], Outcome(2, True, proofs, {}), utc_now())
    clock.forward(minutes=5)
    again = await client.delete(url)
    assert (again.status_code, again.json()["revoked_at"]) == (200, "2026-11-23T12:05:00Z")
    assert (again.json()["ready"], again.json()["proofs"], again.json()["job"]) == (True, proofs, None)
    [row] = await rows(database, select(users.c.version))
    assert row.version == 2


async def test_what_is_not_there(client: httpx.AsyncClient) -> None:
    await make_user(client, "alice")
    bob = await make_user(client, "bob")
    made = await make(client)
    body = {"name": "x", "protocols": ["imap"]}
    for user in (f"nobody@{PRIMARY}", 999999):
        assert (await client.get(f"/v1/users/{user}/app-passwords")).status_code == 404
        assert (await client.post(f"/v1/users/{user}/app-passwords", json=body)).status_code == 404
    for url in (f"{ALICE}/app-passwords/999999", f"{BOB}/app-passwords/{made['id']}", f"{bob['id']}/app-passwords/1e3"):
        for method in ("GET", "DELETE"):
            assert (await client.request(method, f"/v1/users/{url}")).status_code in (404, 422), url
    assert await listed(client) == [made["id"]]
    assert (await client.get(f"/v1/users/{BOB}")).json()["version"] == 1, "nobody ended bob's sessions"


async def test_made_for_an_active_account_alone(client: httpx.AsyncClient) -> None:
    user = await make_user(client, "alice")
    made = await make(client)
    body = {"name": "x", "protocols": ["imap"]}
    url = f"/v1/users/{user['id']}/app-passwords"
    await client.patch(f"/v1/users/{ALICE}", json={"state": "suspended"})
    refused = await client.post(url, json=body)
    assert (refused.status_code, refused.json()["type"]) == (409, "/problems/user-not-active")
    await client.delete(f"/v1/users/{ALICE}")
    refused = await client.post(url, json=body)
    assert (refused.status_code, refused.json()["type"]) == (409, "/problems/user-deleted")
    # Revoking is never refused: who takes one away does it before the account comes back.
    assert (await client.delete(f"{url}/{made['id']}")).status_code == 202
    assert await listed(client, user["id"]) == []


async def test_a_successor_has_none_of_them(client: httpx.AsyncClient) -> None:
    user = await make_user(client, "alice")
    made = await make(client)
    await client.delete(f"/v1/users/{ALICE}")
    await make_user(client, "alice", reuse_address=True)
    assert await listed(client) == []
    assert await listed(client, user["id"]) == [made["id"]]
    assert (await client.delete(f"/v1/users/{ALICE}/app-passwords/{made['id']}")).status_code == 404


async def test_nobody_makes_one_for_somebody_of_a_higher_rank(
    client: httpx.AsyncClient, api: FastAPI, database: Database
) -> None:
    user = await make_user(client, "alice")
    made = await make(client)
    async with database.write.begin() as connection:
        change = Change(connection, ACTOR, utc_now())
        credentials = await create_principal(change, "second", Role.SECONDARY)
        await create_principal(change, "alice herself", Role.PRIMARY)
        await connection.execute(
            update(principals).where(principals.c.name == "alice herself").values(user_id=user["id"])
        )
    url = f"/v1/users/{ALICE}/app-passwords"
    async with anonymous(api) as second:
        second.auth = httpx.BasicAuth(*credentials)
        for refused in (
            await second.post(url, json={"name": "x", "protocols": ["imap"]}),
            await second.delete(f"{url}/{made['id']}"),
        ):
            assert (refused.status_code, refused.json()["type"]) == (403, "/problems/outranked")
    assert await listed(client) == [made["id"]]
    [row] = await rows(database, select(users.c.version))
    assert row.version == 1


async def test_an_owner_sees_and_changes_their_own_alone(
    client: httpx.AsyncClient, api: FastAPI, database: Database, clock: Clock
) -> None:
    alice = await make_user(client, "alice")
    await make_user(client, "bob")
    bobs = await make(client, BOB)
    me = (await client.get("/v1/me")).json()
    async with database.read.connect() as connection:
        found = await read_client(connection, me["id"], clock())
    assert found
    webmail = as_principal(found.row, found.keys[0].id)
    token, _ = await api.state.service.authenticator.issue_for_owner(webmail, alice["id"])
    async with anonymous(api) as owner:
        owner.headers["Authorization"] = f"Bearer {token}"
        made = await make(owner)
        assert await listed(owner) == await listed(owner, alice["id"]) == [made["id"]]
        for method, path in (("GET", ""), ("POST", ""), ("GET", f"/{bobs['id']}"), ("DELETE", f"/{bobs['id']}")):
            body = {"name": "x", "protocols": ["imap"]} if method == "POST" else None
            refused = await owner.request(method, f"/v1/users/{BOB}/app-passwords{path}", json=body)
            assert refused.status_code == 403, (method, path)
        assert (await owner.delete(f"/v1/users/{ALICE}/app-passwords/{made['id']}")).status_code == 202
        # Revoking ended every access, and so this token.
        assert (await owner.get(f"/v1/users/{ALICE}/app-passwords")).status_code == 401
    assert await listed(client) == []


async def test_revoked_with_a_reset(client: httpx.AsyncClient, database: Database, clock: Clock) -> None:
    """What the other changes call within their own transaction: all, or some, and never somebody else's."""
    alice, bob = await make_user(client, "alice"), await make_user(client, "bob")
    made = [(await make(client))["id"] for _ in range(3)]
    bobs = await make(client, BOB)
    async with database.write.begin() as connection:
        change = Change(connection, ACTOR, clock())
        assert await revoke_app_passwords(change, alice["id"], ids=[made[1], bobs["id"]]) == [made[1]]
        assert await revoke_app_passwords(change, alice["id"], ids=[]) == []
        assert [row.id for row in await list_app_passwords(connection, alice["id"])] == [made[0], made[2]]
        assert await revoke_app_passwords(change, alice["id"]) == [made[0], made[2]]
        assert await revoke_app_passwords(change, alice["id"]) == []
    assert await listed(client) == []
    assert await listed(client, bob["id"]) == [bobs["id"]]
    query = select(audit_events.c.subject_id).where(audit_events.c.action == "app-passwords.revoke")
    assert sorted(int(row.subject_id) for row in await rows(database, query)) == made
