"""An owner's token: for one account, ten minutes, and not longer than the access behind it."""

import base64
import json
from collections.abc import Callable
from typing import Any

import httpx
import pytest
import pytest_asyncio
from fastapi import FastAPI
from sqlalchemy import select, update

from app.db import Database, utc_now
from app.models.audit_events import audit_events
from app.models.users import users
from app.permissions import ROLE_PERMISSIONS, Role
from app.services.changes import Change
from app.services.principals import change_principal, create_principal
from tests.conftest import ACTOR, Clock, anonymous
from tests.routers.accounts import ALICE, BOB, make_user

pytestmark = pytest.mark.asyncio

Client = httpx.AsyncClient


@pytest_asyncio.fixture
async def webmail(api: FastAPI, seeded: Database) -> Any:
    async with seeded.write.begin() as connection:
        credentials = await create_principal(Change(connection, ACTOR, utc_now()), "Webmail", Role.WEBMAIL)
    async with anonymous(api) as made:
        made.auth = httpx.BasicAuth(*credentials)
        made.headers["x-me"] = credentials.id
        yield made


@pytest_asyncio.fixture
async def accounts(client: Client) -> dict[str, int]:
    return {name: (await make_user(client, name))["id"] for name in ("alice", "bob")}


async def owner_token(webmail: Client, user: int | str) -> dict[str, str]:
    answer = await webmail.post(f"/v1/users/{user}/owner-tokens")
    assert answer.status_code == 201, answer.text
    return {"Authorization": f"Bearer {answer.json()['access_token']}"}


async def test_the_answer_is_a_token_for_that_account(
    api: FastAPI, webmail: Client, accounts: dict[str, int], seeded: Database
) -> None:
    answer = await webmail.post(f"/v1/users/{ALICE}/owner-tokens")
    body = answer.json()
    token = body.pop("access_token")
    assert (answer.status_code, answer.headers["cache-control"]) == (201, "no-store")
    assert body == {"token_type": "Bearer", "expires_in": 600, "user_id": accounts["alice"]}
    claims = json.loads(base64.urlsafe_b64decode(token.split(".")[1] + "=="))
    assert (claims["sub"], claims["client_id"]) == (f"owner-{accounts['alice']}", webmail.headers["x-me"])
    async with anonymous(api) as owner:
        me = (await owner.get("/v1/me", headers={"Authorization": f"Bearer {token}"})).json()
    assert (me["role"], me["rank"], me["user_id"], me["name"]) == ("owner", 0, accounts["alice"], ALICE)
    assert set(me["permissions"]) == ROLE_PERMISSIONS[Role.OWNER]
    async with seeded.read.connect() as connection:
        query = select(audit_events).where(audit_events.c.action == "owner-tokens.create")
        event = (await connection.execute(query)).one()
    assert (event.principal_id, event.user_id) == (webmail.headers["x-me"], accounts["alice"])
    assert token not in str(event)


async def test_it_opens_that_account_and_no_other(api: FastAPI, webmail: Client, accounts: dict[str, int]) -> None:
    headers = await owner_token(webmail, accounts["alice"])
    alice, bob = accounts["alice"], accounts["bob"]
    async with anonymous(api) as owner:
        owner.headers.update(headers)
        for key in (alice, ALICE, ALICE.upper(), ALICE.replace("@", "%40")):
            assert (await owner.get(f"/v1/users/{key}")).json()["id"] == alice, key
            assert (await owner.get(f"/v1/users/{key}/send-as")).status_code == 200
        for key in (bob, BOB, 99, f"0{alice}", f" {alice}", "nobody@cacert.test", f"{alice}.0", "x"):
            for path in (f"/v1/users/{key}", f"/v1/users/{key}/send-as"):
                answer = await owner.get(path)
                assert (answer.status_code, answer.json()["type"]) == (403, "/problems/forbidden"), path
        for path in ("/v1/users", "/v1/aliases", f"/v1/send-as?login={ALICE}&from={ALICE}", "/v1/principals"):
            assert (await owner.get(path)).status_code == 403, path
        assert (await owner.patch(f"/v1/users/{alice}", json={"display_name": "Me"})).status_code == 403
        assert (await owner.post(f"/v1/users/{alice}/owner-tokens")).status_code == 403, "nor is one made of another"


async def test_only_who_answers_for_the_sign_in_gets_one(
    make_client: Callable[..., Any], accounts: dict[str, int]
) -> None:
    powerless = await make_client(only_none=True)
    answer = await powerless.post(f"/v1/users/{accounts['alice']}/owner-tokens")
    assert (answer.status_code, answer.json()["missing"]) == (403, "owner-tokens:write")


@pytest.mark.parametrize("state", ["suspended", "deleted", "purged", "locked"])
async def test_none_for_an_account_that_is_not_active_and_an_old_one_ends(
    api: FastAPI, webmail: Client, client: Client, accounts: dict[str, int], seeded: Database, state: str
) -> None:
    path = f"/v1/users/{accounts['alice']}"
    headers = await owner_token(webmail, accounts["alice"])
    if state == "suspended":
        await client.patch(path, json={"state": "suspended"})
    elif state == "locked":
        assert (await client.post(f"{path}/lock", json={})).status_code == 202
    else:
        await client.delete(path)
        if state == "purged":
            await client.post(f"{path}/purge")
    refused = await webmail.post(f"{path}/owner-tokens")
    assert (refused.status_code, refused.json()["type"]) == (409, "/problems/user-not-active"), refused.text
    async with anonymous(api) as owner:
        assert (await owner.get(path, headers=headers)).status_code == 401
        assert (await owner.get("/v1/me", headers=headers)).status_code == 401
        # And it does not come back to life with the account.
        if state == "suspended":
            await client.patch(path, json={"state": "active"})
        elif state == "deleted":
            await client.post(f"{path}/restore")
        elif state == "locked":
            await client.post(f"{path}/unlock")
        assert (await owner.get(path, headers=headers)).status_code == 401


async def test_it_ends_with_whatever_ends_access(
    api: FastAPI, webmail: Client, accounts: dict[str, int], seeded: Database, clock: Clock
) -> None:
    headers = await owner_token(webmail, accounts["alice"])
    async with seeded.write.begin() as connection:
        await connection.execute(update(users).where(users.c.id == accounts["alice"]).values(access_ended_at=clock.now))
    async with anonymous(api) as owner:
        assert (await owner.get("/v1/me", headers=headers)).status_code == 401
        assert (await owner.get("/v1/me", headers=await owner_token(webmail, ALICE))).status_code == 200


async def test_a_successor_is_somebody_else(
    api: FastAPI, webmail: Client, client: Client, accounts: dict[str, int], clock: Clock
) -> None:
    old = await owner_token(webmail, accounts["alice"])
    await client.delete(f"/v1/users/{accounts['alice']}")
    successor = (await make_user(client, "alice", reuse_address=True))["id"]
    new = await owner_token(webmail, ALICE)
    async with anonymous(api) as owner:
        for path in (f"/v1/users/{ALICE}", f"/v1/users/{successor}", f"/v1/users/{accounts['alice']}"):
            assert (await owner.get(path, headers=old)).status_code == 401
        assert (await owner.get(f"/v1/users/{ALICE}", headers=new)).json()["id"] == successor
        assert (await owner.get(f"/v1/users/{accounts['alice']}", headers=new)).status_code == 403


async def test_it_ends_with_the_client_that_asked_for_it(
    api: FastAPI, webmail: Client, accounts: dict[str, int], seeded: Database, clock: Clock
) -> None:
    headers = await owner_token(webmail, accounts["alice"])
    async with anonymous(api) as owner:
        assert (await owner.get("/v1/me", headers=headers)).status_code == 200
        async with seeded.write.begin() as connection:
            change = Change(connection, ACTOR, utc_now())
            await change_principal(change, webmail.headers["x-me"], {"networks": ["192.0.2.0/24"]})
        clock.forward(seconds=2)
        assert (await owner.get("/v1/me", headers=headers)).status_code == 401
        async with seeded.write.begin() as connection:
            change = Change(connection, ACTOR, utc_now())
            await change_principal(change, webmail.headers["x-me"], {"networks": None})
        clock.forward(seconds=2)
        assert (await owner.get("/v1/me", headers=headers)).status_code == 200
        clock.forward(seconds=600)
        assert (await owner.get("/v1/me", headers=headers)).status_code == 401


async def test_unknown_accounts(webmail: Client) -> None:
    for key in (99, "nobody@cacert.test"):
        assert (await webmail.post(f"/v1/users/{key}/owner-tokens")).status_code == 404
