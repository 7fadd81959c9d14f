"""The API's own secrets, and what other routes ask the throttle for."""

import base64
from collections.abc import AsyncIterator, Callable
from typing import Any

import httpx
import pytest
import pytest_asyncio
from fastapi import FastAPI
from sqlalchemy import event, select

from app.db import Database
from app.errors import TooManyTries
from app.models.login_failures import FailureKind, login_failures
from app.web.throttle import Throttle
from tests.conftest import PRIMARY, Clock, anonymous
from tests.routers.accounts import make_user

pytestmark = pytest.mark.asyncio

ALICE = f"alice@{PRIMARY}"


@pytest.fixture
def throttle(api: FastAPI) -> Throttle:
    found: Throttle = api.state.service.throttle
    return found


@pytest_asyncio.fixture
async def visitor(api: FastAPI) -> AsyncIterator[Callable[..., Any]]:
    """`await visitor(id, secret, peer=…)`: the status of a request with HTTP Basic."""

    async def ask(client_id: str, secret: str, *, peer: str = "192.0.2.1", token: bool = False) -> httpx.Response:
        transport = httpx.ASGITransport(api, raise_app_exceptions=False, client=(peer, 1))
        async with httpx.AsyncClient(transport=transport, base_url="https://mail.cacert.test") as client:
            auth = httpx.BasicAuth(client_id, secret)
            if token:
                return await client.post("/oauth/token", data={"grant_type": "client_credentials"}, auth=auth)
            return await client.get("/v1/me", auth=auth)

    yield ask


async def rows(database: Database) -> list[Any]:
    async with database.read.connect() as connection:
        return list(await connection.execute(select(login_failures)))


@pytest.mark.parametrize("token", [False, True])
async def test_wrong_secrets_are_refused_after_ten_and_the_right_one_is_taken(
    visitor: Callable[..., Any], make_client: Callable[..., Any], seeded: Database, token: bool
) -> None:
    client = await make_client()
    client_id, secret = (await client.get("/v1/me")).json()["id"], _secret(client)
    for number in range(10):
        assert (await visitor(client_id, f"wrong {number}", token=token)).status_code == 401
    refused = await visitor(client_id, "wrong again", token=token)
    assert (refused.status_code, refused.json()["type"]) == (429, "/problems/too-many-tries")
    assert 3590 <= int(refused.headers["retry-after"]) == refused.json()["retry_after"] <= 3601
    assert len(await rows(seeded)) == 10, "what was refused is not counted again"
    assert (await visitor(client_id, secret, token=token)).status_code == 200, "nobody guesses 256 bits"
    assert (await visitor(client_id, "wrong", peer="192.0.2.9", token=token)).status_code == 401


async def test_a_client_that_repeats_an_old_secret_is_one_guess(
    visitor: Callable[..., Any], client: httpx.AsyncClient, seeded: Database
) -> None:
    client_id = (await client.get("/v1/me")).json()["id"]
    for _ in range(30):
        assert (await visitor(client_id, "an old one")).status_code == 401
    (row,) = await rows(seeded)
    assert (row.kind, row.login, row.attempts) == ("api", client_id, 30)
    assert "old" not in row.guess
    assert len(row.guess) == 4


async def test_one_network_that_tries_many_clients_is_refused(visitor: Callable[..., Any], seeded: Database) -> None:
    for number in range(40):
        assert (await visitor(f"primary-{number:012x}", "x")).status_code == 401
    assert (await visitor("primary-ffffffffffff", "x")).status_code == 429
    assert all(row.login.startswith("~") for row in await rows(seeded)), "none of them exists"


async def test_a_successful_request_asks_nothing_of_the_throttle(
    make_client: Callable[..., Any], visitor: Callable[..., Any], api: FastAPI
) -> None:
    client = await make_client()
    client_id, secret = (await client.get("/v1/me")).json()["id"], _secret(client)
    for number in range(20):
        await visitor(client_id, f"wrong {number}")
    statements: list[str] = []
    database: Database = api.state.service.database
    for engine in (database.read, database.write):
        event.listen(engine.sync_engine, "before_cursor_execute", lambda *args: statements.append(args[2]))
    assert (await visitor(client_id, secret)).status_code == 200
    assert not [each for each in statements if "login_failures" in each]
    await visitor(client_id, "wrong")
    assert [each for each in statements if "login_failures" in each]


async def test_a_current_password_is_counted_with_dovecots(throttle: Throttle, client: httpx.AsyncClient) -> None:
    await make_user(client, "alice")
    for number in range(5):
        await throttle.failed(FailureKind.MAIL, ALICE, "192.0.2.1", f"wrong {number}")
        await throttle.report(
            "alice", "192.0.2.1", f"{number:03x}", success=False, rejected=False, app_password_id=None
        )
    with pytest.raises(TooManyTries):
        await throttle.check(FailureKind.MAIL, "Alice", "192.0.2.1")
    await throttle.check(FailureKind.MAIL, ALICE, "192.0.2.2")
    await throttle.check(FailureKind.API, ALICE, "192.0.2.1")
    await throttle.check(FailureKind.RESET, ALICE, "192.0.2.1")


async def test_resets_are_counted_by_account_whoever_asks_and_whether_there_is_one(
    throttle: Throttle, client: httpx.AsyncClient, clock: Clock
) -> None:
    await make_user(client, "alice")
    for address in (ALICE, f"nobody@{PRIMARY}"):
        for number in range(5):
            await throttle.check(FailureKind.RESET, address, f"192.0.2.{number}")
            await throttle.failed(FailureKind.RESET, address, f"192.0.2.{number}", "")
        for source in ("192.0.2.99", "192.0.2.1", ""):
            with pytest.raises(TooManyTries) as refused:
                await throttle.check(FailureKind.RESET, address, source)
            assert refused.value.members["retry_after"] == 3601
    clock.forward(minutes=60)
    await throttle.check(FailureKind.RESET, ALICE, "192.0.2.1")


async def test_links_that_are_none_are_counted_by_network(throttle: Throttle, seeded: Database) -> None:
    for number in range(40):
        await throttle.check(FailureKind.RESET, "", "192.0.2.1")
        await throttle.failed(FailureKind.RESET, "", "192.0.2.1", f"token {number}")
    with pytest.raises(TooManyTries):
        await throttle.check(FailureKind.RESET, "", "192.0.2.1")
    await throttle.check(FailureKind.RESET, "", "192.0.2.2")
    assert {row.login for row in await rows(seeded)} == {""}


async def test_without_an_address_the_login_alone_counts(throttle: Throttle, client: httpx.AsyncClient) -> None:
    await make_user(client, "alice")
    for number in range(110):  # with 16 bits each, a few may look alike
        await throttle.failed(FailureKind.MAIL, ALICE, "", f"wrong {number}")
    with pytest.raises(TooManyTries):
        await throttle.check(FailureKind.MAIL, ALICE, "")
    await throttle.check(FailureKind.MAIL, f"bob@{PRIMARY}", "")


def _secret(client: httpx.AsyncClient) -> str:
    assert isinstance(client.auth, httpx.BasicAuth)
    return base64.b64decode(client.auth._auth_header.partition(" ")[2]).decode().partition(":")[2]


async def _tried(throttle: Throttle, *addresses: str) -> None:
    """Ten wrong passwords from each, and one success."""
    for address in addresses:
        for number in range(11):
            await throttle.failed(FailureKind.MAIL, ALICE, address, f"wrong {number}")
        await throttle.report(ALICE, address, "1234", success=True, rejected=False, app_password_id=None)
        with pytest.raises(TooManyTries):
            await throttle.check(FailureKind.MAIL, ALICE, address)


async def test_a_link_forgets_the_guesses_from_where_it_is_used(
    throttle: Throttle, client: httpx.AsyncClient, api: FastAPI, seeded: Database
) -> None:
    await make_user(client, "alice")
    await _tried(throttle, "127.0.0.1", "192.0.2.9")
    asked = await client.post("/v1/password-resets", json={"user": ALICE, "reason": "Called", "deliver": "show"})
    body = {"token": asked.json()["link"].partition("#")[2], "password": "seven green lanterns over the harbour"}
    async with anonymous(api) as owner:
        assert (await owner.post("/v1/password-resets/confirm", json=body)).status_code == 202
    await throttle.check(FailureKind.MAIL, ALICE, "127.0.0.1")
    with pytest.raises(TooManyTries):
        await throttle.check(FailureKind.MAIL, ALICE, "192.0.2.9")
    known = [row.network for row in await rows(seeded) if row.guess == "known"]
    assert sorted(known) == ["127.0.0.1/32", "192.0.2.9/32"]


async def test_a_successor_of_an_address_begins_with_nothing(
    throttle: Throttle, client: httpx.AsyncClient, seeded: Database
) -> None:
    first = await make_user(client, "alice")
    await make_user(client, "bob")
    await _tried(throttle, "192.0.2.8", "192.0.2.9")
    await throttle.failed(FailureKind.MAIL, f"bob@{PRIMARY}", "192.0.2.9", "wrong")
    await client.delete(f"/v1/users/{first['id']}")
    assert (await client.post("/v1/users", json={"address": ALICE, "reuse_address": True})).status_code in (201, 202)
    await throttle.check(FailureKind.MAIL, ALICE, "192.0.2.8")
    assert [row.login for row in await rows(seeded)] == [f"bob@{PRIMARY}"]
