"""Locking an account that seems stolen: one change, and only `unlock` takes it back."""

from typing import Any

import httpx
import pytest
from sqlalchemy import select

from app.db import Database
from app.models.app_passwords import app_passwords
from app.models.audit_events import audit_events
from app.models.jobs import jobs
from app.models.notices import notices
from app.models.password_resets import password_resets
from app.models.users import users
from tests.conftest import Clock
from tests.routers.accounts import ALICE, make_user

pytestmark = pytest.mark.asyncio

AT = f"/v1/users/{ALICE}"
Client = httpx.AsyncClient


async def rows(database: Database, query: Any) -> list[Any]:
    async with database.read.connect() as connection:
        return list((await connection.execute(query)).all())


async def make_alice(client: Client, **members: Any) -> dict[str, Any]:
    return await make_user(client, "alice", **{"contact_address": "alice@example.net", **members})


async def act(client: Client, verb: str, body: Any = None) -> dict[str, Any]:
    answer = await client.post(f"{AT}/{verb}", json=body)
    assert answer.status_code == 202, answer.text
    return dict(answer.json())


async def test_a_lock_is_one_change_with_everything_in_it(client: Client, seeded: Database, clock: Clock) -> None:
    user = await make_alice(client)
    for name in ("Telephone", "Laptop"):
        body = {"name": name, "protocols": ["imap"]}
        assert (await client.post(f"{AT}/app-passwords", json=body)).status_code == 201
    body = {"user": ALICE, "reason": "x"}
    assert (await client.post("/v1/password-resets", json=body)).status_code == 202
    clock.forward(minutes=1)
    locked = await act(client, "lock", {"reason": "Sends spam"})
    assert {name: locked[name] for name in ("state", "suspended_reason", "locked_at", "version", "ready")} == {
        "state": "suspended",
        "suspended_reason": "Sends spam",
        "locked_at": "2026-11-23T12:01:00Z",
        "version": 2,
        "ready": False,
    }
    [row] = await rows(seeded, select(users))
    assert (row.locked_at, row.locked_from, row.access_ended_at) == (clock(), "active", clock())
    assert [each.revoked_at for each in await rows(seeded, select(app_passwords))] == [clock(), clock()]
    assert [each.cancelled_at for each in await rows(seeded, select(password_resets))] == [clock()]
    assert len(await rows(seeded, select(jobs).where(jobs.c.kind == "mailbox.sync", jobs.c.version > 1))) == 1
    [notice] = await rows(seeded, select(notices).where(notices.c.kind == "locked"))
    assert (notice.recipient, notice.user_id) == ("alice@example.net", user["id"])
    [entry] = await rows(seeded, select(audit_events).where(audit_events.c.action == "users.lock"))
    assert (entry.after["reason"], len(entry.after["app_passwords_revoked"])) == ("Sends spam", 2)


async def test_locking_twice_is_no_change(client: Client, seeded: Database, clock: Clock) -> None:
    await make_alice(client)
    first = await act(client, "lock")
    clock.forward(minutes=1)
    again = await act(client, "lock", {"reason": "again"})
    assert {**again, "job": None} == {**first, "job": None}


async def test_only_unlock_ends_it(client: Client) -> None:
    await make_alice(client)
    await act(client, "lock")
    refused = await client.patch(AT, json={"state": "active"})
    assert (refused.status_code, refused.json()["type"]) == (409, "/problems/user-locked")
    assert "/unlock" in refused.json()["detail"]
    assert (await client.patch(AT, json={"state": "suspended", "display_name": "Alice"})).status_code == 202
    unlocked = await act(client, "unlock")
    assert (unlocked["state"], unlocked["locked_at"], unlocked["suspended_reason"]) == ("active", None, None)
    version = unlocked["version"]
    assert (await act(client, "unlock"))["version"] == version


async def test_unlock_brings_back_what_it_was_but_no_app_password(client: Client, seeded: Database) -> None:
    await make_alice(client)
    body = {"name": "Telephone", "protocols": ["imap"]}
    assert (await client.post(f"{AT}/app-passwords", json=body)).status_code == 201
    reason = {"state": "suspended", "suspended_reason": "Asked for it"}
    assert (await client.patch(AT, json=reason)).status_code == 202
    locked = await act(client, "lock", {"reason": "And stolen"})
    assert locked["suspended_reason"] == "Asked for it"
    unlocked = await act(client, "unlock")
    assert (unlocked["state"], unlocked["suspended_reason"]) == ("suspended", "Asked for it")
    assert all(row.revoked_at is not None for row in await rows(seeded, select(app_passwords)))
    assert [each.kind for each in await rows(seeded, select(notices).order_by(notices.c.id))] == ["locked", "unlocked"]


async def test_a_lock_outlasts_delete_and_restore(client: Client) -> None:
    user = await make_alice(client)
    await act(client, "lock")
    deleted = (await client.delete(AT)).json()
    assert deleted["locked_at"] is not None
    for verb in ("lock", "unlock"):
        refused = await client.post(f"/v1/users/{user['id']}/{verb}")
        assert (refused.status_code, refused.json()["type"]) == (409, "/problems/user-deleted")
    restored = (await client.post(f"/v1/users/{user['id']}/restore")).json()
    assert (restored["state"], restored["locked_at"]) == ("suspended", deleted["locked_at"])
    assert (await client.patch(AT, json={"state": "active"})).status_code == 409
    assert (await act(client, "unlock"))["state"] == "active"


async def test_a_new_password_does_not_unlock(client: Client) -> None:
    await make_alice(client)
    await act(client, "lock")
    answer = await client.put(f"{AT}/password", json={"password": "seven green lanterns over the harbour"})
    assert answer.status_code == 202
    assert (await client.get(AT)).json()["locked_at"] is not None


async def test_if_match_and_idempotency_key(client: Client) -> None:
    await make_alice(client)
    stale = await client.post(f"{AT}/lock", headers={"If-Match": '"7.0"'})
    assert (stale.status_code, stale.json()["type"]) == (412, "/problems/version-conflict")
    for replayed in (None, "true"):
        answer = await client.post(f"{AT}/lock", headers={"Idempotency-Key": "k"})
        assert (answer.status_code, answer.headers.get("idempotency-replayed")) == (202, replayed)


@pytest.mark.parametrize(
    ("body", "pointer"), [({"reason": ""}, "/reason"), ({"reason": "x" * 201}, "/reason"), ({"state": "x"}, "/state")]
)
async def test_bad_bodies(client: Client, body: dict[str, str], pointer: str) -> None:
    await make_alice(client)
    answer = await client.post(f"{AT}/lock", json=body)
    assert (answer.status_code, answer.json()["errors"][0]["pointer"]) == (422, pointer)
    assert (await client.get(AT)).json()["locked_at"] is None


async def test_an_unknown_account(client: Client) -> None:
    for path in ("/v1/users/nobody@cacert.test/lock", "/v1/users/987/unlock"):
        assert (await client.post(path)).status_code == 404
