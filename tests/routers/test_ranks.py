"""Nobody acts on the account of somebody whose role stands higher: neither at it, nor around it."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from typing import Any

import httpx
import pytest
import pytest_asyncio
from fastapi import FastAPI
from sqlalchemy import select, update

from app.db import Database
from app.models.app_passwords import app_passwords
from app.models.password_resets import password_resets
from app.models.principals import principal_keys, principals
from app.models.users import users
from app.permissions import Permission, Role
from app.web.throttle import Throttle
from tests.conftest import PRIMARY, anonymous
from tests.routers.accounts import credentials_of, make_user
from tests.web.test_permissions import WHO

pytestmark = pytest.mark.asyncio

ALICE, BOB = f"alice@{PRIMARY}", f"bob@{PRIMARY}"
Make = Callable[..., Awaitable[httpx.AsyncClient]]


@pytest_asyncio.fixture
async def caller(api: FastAPI, seeded: Database) -> AsyncIterator[Make]:
    async with AsyncExitStack() as stack:

        async def make(role: Role, **options: Any) -> httpx.AsyncClient:
            client = await stack.enter_async_context(anonymous(api))
            client.auth = await credentials_of(seeded, role, **options)
            return client

        yield make


@pytest_asyncio.fixture
async def chief(client: httpx.AsyncClient, caller: Make) -> httpx.AsyncClient:
    """A primary, whose own account Alice's is."""
    alice = await make_user(client, "alice", contact_address=f"chief@{PRIMARY}")
    await make_user(client, "bob")
    return await caller(Role.PRIMARY, user_id=alice["id"])


def outranked(answer: httpx.Response) -> bool:
    return (answer.status_code, answer.json()["type"]) == (403, "/problems/outranked")


async def alias(client: httpx.AsyncClient, name: str, *destinations: str) -> str:
    body = {"address": f"{name}@{PRIMARY}", "kind": "receive_only", "destinations": list(destinations)}
    answer = await client.post("/v1/aliases", json=body)
    assert answer.status_code in (201, 202), answer.text
    return f"/v1/aliases/{answer.json()['id']}"


async def test_mail_is_not_led_away_from_a_higher_one(
    client: httpx.AsyncClient, chief: httpx.AsyncClient, caller: Make
) -> None:
    secondary = await caller(Role.SECONDARY)
    both = await alias(client, "board", ALICE, BOB)
    assert outranked(await secondary.patch(both, json={"destinations": [BOB]}))
    assert outranked(await secondary.delete(both))
    assert (await secondary.patch(both, json={"destinations": [ALICE]})).status_code in (200, 202)
    assert (await secondary.patch(both, json={"note": "of the board"})).status_code in (200, 202)
    team = await alias(secondary, "team", BOB)
    assert (await secondary.patch(team, json={"destinations": [BOB, ALICE]})).status_code in (200, 202)
    assert (await chief.delete(both)).status_code in (200, 202, 204)


async def test_where_a_higher_ones_links_go_is_not_changed(
    client: httpx.AsyncClient, chief: httpx.AsyncClient, caller: Make
) -> None:
    secondary = await caller(Role.SECONDARY)
    home = await alias(client, "home", BOB)
    contact = await alias(client, "chief", f"home@{PRIMARY}")
    for url in (contact, home):
        assert outranked(await secondary.patch(url, json={"destinations": [BOB, ALICE]})), url
        assert outranked(await secondary.delete(url)), url
    assert (await chief.patch(home, json={"destinations": [ALICE]})).status_code in (200, 202)


async def test_a_lockout_of_a_higher_one_stays(
    api: FastAPI, client: httpx.AsyncClient, chief: httpx.AsyncClient, caller: Make
) -> None:
    throttle: Throttle = api.state.service.throttle
    chief_id = (await chief.get("/v1/me")).json()["id"]
    async with anonymous(api) as stranger:
        for number in range(10):
            for login in (ALICE, BOB):
                await throttle.report(
                    login, "192.0.2.1", f"{number:03x}", success=False, rejected=False, app_password_id=None
                )
            await stranger.get("/v1/me", auth=httpx.BasicAuth(chief_id, f"guess {number}"))
    secondary = await caller(Role.SECONDARY)
    found = {
        each["login"]: each["id"] for each in (await secondary.get("/v1/lockouts")).json()["items"] if each["login"]
    }
    assert set(found) == {ALICE, BOB, chief_id}
    for login in (ALICE, chief_id):
        assert outranked(await secondary.delete(f"/v1/lockouts/{found[login]}"))
        assert (await chief.delete(f"/v1/lockouts/{found[login]}")).status_code == 204
    assert (await secondary.delete(f"/v1/lockouts/{found[BOB]}")).status_code == 204


@pytest.mark.parametrize("how", ["create", "change"])
async def test_a_link_of_before_does_not_open_what_has_become_a_higher_ones(
    api: FastAPI, client: httpx.AsyncClient, caller: Make, how: str
) -> None:
    await make_user(client, "alice")
    limited = await caller(Role.LIMITED)
    asked = await limited.post("/v1/password-resets", json={"user": ALICE, "reason": "Called", "deliver": "show"})
    token = asked.json()["link"].partition("#")[2]
    body = {"name": "Alice", "role": "primary"}
    if how == "create":
        assert (await client.post("/v1/principals", json={**body, "user": ALICE})).status_code == 201
    else:
        made = (await client.post("/v1/principals", json=body)).json()
        answer = await client.patch(f"/v1/principals/{made['id']}", json={"user": ALICE})
        assert answer.status_code == 200, answer.text
    async with anonymous(api) as visitor:
        new = {"token": token, "password": "seven green lanterns over the harbour"}
        assert (await visitor.post("/v1/password-resets/confirm", json=new)).status_code == 410


async def test_a_link_does_not_outlive_a_suspension_of_the_same_moment(
    client: httpx.AsyncClient, caller: Make, seeded: Database
) -> None:
    """Who suspends holds the account's row: who asks for a link waits, and then sees it."""
    await make_user(client, "alice", contact_address="alice@example.net")
    website, limited = await caller(Role.WEBSITE), await caller(Role.LIMITED)
    body = {"user": ALICE, "reason": "Called"}
    async with seeded.write.begin() as connection:
        await connection.execute(update(users).where(users.c.address == ALICE).values(state="suspended"))
        asked = [asyncio.create_task(each.post("/v1/password-resets", json=body)) for each in (website, limited)]
        await asyncio.wait(asked, timeout=0.5)
    seen, unseen = await asked[1], await asked[0]
    assert (unseen.status_code, seen.status_code, seen.json()["type"]) == (202, 409, "/problems/user-not-active")
    async with seeded.read.connect() as connection:
        assert (await connection.execute(select(password_resets.c.user_id))).scalars().all() == [None]


async def test_a_contact_address_that_leads_back_is_refused(client: httpx.AsyncClient) -> None:
    await make_user(client, "alice")
    await make_user(client, "bob")
    await alias(client, "a", ALICE)
    await alias(client, "b", f"a@{PRIMARY}")
    await alias(client, "c", ALICE, BOB)
    for name in ("a", "b", "b+x"):
        answer = await client.patch(f"/v1/users/{ALICE}", json={"contact_address": f"{name}@{PRIMARY}"})
        assert answer.status_code == 422, answer.text
        assert "leads to the mailbox itself" in answer.text
    answer = await client.patch(f"/v1/users/{ALICE}", json={"contact_address": f"c@{PRIMARY}"})
    assert answer.status_code in (200, 202)


async def test_a_mail_job_does_not_tell_whether_there_is_somebody(
    client: httpx.AsyncClient, caller: Make, seeded: Database
) -> None:
    await make_user(client, "alice", contact_address="alice@example.net")
    website = await caller(Role.WEBSITE, permissions=[Permission.RESETS_REQUEST, Permission.JOBS_READ])
    for user in (ALICE, f"nobody@{PRIMARY}"):
        assert (await website.post("/v1/password-resets", json={"user": user})).status_code == 202
    jobs = (await client.get("/v1/jobs?kind=mail.send")).json()["items"]
    assert len(jobs) == 2
    for query in ("", "?kind=mail.send", f"?kind=mail.send&subject_id={jobs[0]['subject_id']}"):
        assert not [
            each for each in (await website.get(f"/v1/jobs{query}")).json()["items"] if each["kind"] == "mail.send"
        ]
    for job in jobs:
        assert (await website.get(f"/v1/jobs/{job['id']}")).status_code == 404
        assert (await client.get(f"/v1/jobs/{job['id']}")).status_code == 200


# Every operation that changes an account or a principal, from the routes themselves

BODIES: dict[tuple[str, str], dict[str, Any] | None] = {
    ("PATCH", "/v1/users/{user}"): {"display_name": "Somebody else"},
    ("DELETE", "/v1/users/{user}"): None,
    ("POST", "/v1/users/{user}/restore"): None,
    ("POST", "/v1/users/{user}/purge"): None,
    ("POST", "/v1/users/{user}/lock"): None,
    ("POST", "/v1/users/{user}/unlock"): None,
    ("PUT", "/v1/users/{user}/password"): {"password": "seven green lanterns over the harbour"},
    ("POST", "/v1/users/{user}/app-passwords"): {"name": "x", "protocols": ["imap"]},
    ("DELETE", "/v1/users/{user}/app-passwords/{app_password}"): None,
    ("POST", "/v1/users/{user}/owner-tokens"): None,
    ("PATCH", "/v1/principals/{principal}"): {"name": "Somebody else"},
    ("POST", "/v1/principals/{principal}/rotate"): {"overlap_seconds": 0},
    ("POST", "/v1/principals/{principal}/certificates"): {"fingerprint": "0b" * 32},
    ("POST", "/v1/principals/{principal}/keys/{key}/revoke"): None,
}
FIRST = {
    "/v1/users/{user}/restore": [("DELETE", "/v1/users/{user}")],
    "/v1/users/{user}/purge": [("DELETE", "/v1/users/{user}")],
    "/v1/users/{user}/unlock": [("POST", "/v1/users/{user}/lock")],
}
"""What the account must have gone through before."""


async def test_every_such_operation_is_tried() -> None:
    about = ("/v1/users/{user}", "/v1/principals/{principal}")
    assert {each for each in WHO if each[0] != "GET" and each[1].startswith(about)} == set(BODIES)


@pytest.mark.parametrize(("method", "path"), BODIES)
async def test_each_is_refused_below_and_taken_beside(
    client: httpx.AsyncClient, chief: httpx.AsyncClient, caller: Make, seeded: Database, method: str, path: str
) -> None:
    """The same request, by a secondary and by another primary: only the rank differs."""
    me = (await chief.get("/v1/me")).json()["id"]
    key = (await client.get(f"/v1/principals/{me}")).json()["keys"][0]["id"]
    app_password = await chief.post("/v1/users/1/app-passwords", json={"name": "phone", "protocols": ["imap"]})
    values = {"user": 1, "principal": me, "key": key, "app_password": app_password.json()["id"]}
    for verb, before in FIRST.get(path, []):
        answer = await client.request(verb, before.format_map(values))
        assert answer.is_success, answer.text

    async def state() -> list[Any]:
        async with seeded.read.connect() as connection:
            return [
                (await connection.execute(select(table).order_by(*table.primary_key))).all()
                for table in (users, principals, principal_keys, app_passwords)
            ]

    body = BODIES[method, path]
    for role in (Role.SECONDARY, *([Role.WEBSITE] if path.endswith("owner-tokens") else [])):
        lower = await caller(role)
        unchanged = await state()
        answer = await lower.request(method, path.format_map(values), json=body)
        assert outranked(answer), (role, answer.text)
        assert await state() == unchanged
    answer = await client.request(method, path.format_map(values), json=body)
    assert answer.is_success, answer.text
