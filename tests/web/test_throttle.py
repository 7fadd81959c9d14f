"""The API's own secrets, and what other routes ask the throttle for."""

import asyncio
import base64
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import AsyncExitStack
from typing import Any

import httpx
import pytest
import pytest_asyncio
from fastapi import FastAPI
from sqlalchemy import event, select

from app.db import Database
from app.errors import TooManyTries
from app.models.login_failures import FailureKind, login_failures
from app.permissions import Role
from app.services.login_failures import guess_of
from app.web.throttle import Throttle
from tests.conftest import PRIMARY, Clock, anonymous
from tests.routers.accounts import credentials_of, make_user

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


@pytest_asyncio.fixture
async def as_role(api: FastAPI, seeded: Database) -> AsyncIterator[Callable[..., Any]]:
    """`await as_role(role)`: a client of the API."""
    async with AsyncExitStack() as stack:

        async def make(role: Role) -> httpx.AsyncClient:
            client = await stack.enter_async_context(anonymous(api))
            client.auth = await credentials_of(seeded, role)
            return client

        yield make


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
        await fails(throttle, FailureKind.MAIL, ALICE, "192.0.2.1", f"wrong {number}")
        await throttle.report(
            "alice", "192.0.2.1", f"{number:03x}", success=False, rejected=False, app_password_id=None
        )
    with pytest.raises(TooManyTries):
        await check(throttle, FailureKind.MAIL, "Alice", "192.0.2.1")
    await check(throttle, FailureKind.MAIL, ALICE, "192.0.2.2")
    await check(throttle, FailureKind.API, ALICE, "192.0.2.1")
    await check(throttle, FailureKind.RESET, ALICE, "192.0.2.1")


async def test_resets_are_counted_by_account_however_it_is_named_and_whether_there_is_one(
    throttle: Throttle, client: httpx.AsyncClient, as_role: Callable[..., Any], seeded: Database, clock: Clock
) -> None:
    alice = await make_user(client, "alice")
    assert alice["id"] == 1
    website = await as_role(Role.WEBSITE)

    async def ask(user: str | int) -> httpx.Response:
        return await website.post("/v1/password-resets", json={"user": user})

    for names in ((ALICE, 1, "1", ALICE.upper(), ALICE), (f"nobody@{PRIMARY}",) * 5, (77, "77", 77, "77", 77)):
        for name in names:
            assert (await ask(name)).status_code == 202
        for name in names:
            refused = await ask(name)
            assert (refused.status_code, refused.headers["retry-after"]) == (429, "3601")
    assert (await ask(f"1@{PRIMARY}")).status_code == 202, "an id is no local part"
    assert len(await rows(seeded)) == 16, "what was refused is not counted"
    clock.forward(minutes=60)
    assert (await ask(ALICE)).status_code == 202


async def test_administrators_are_counted_for_themselves(
    client: httpx.AsyncClient, as_role: Callable[..., Any], seeded: Database
) -> None:
    await make_user(client, "alice", contact_address="alice@example.net")
    website, limited = await as_role(Role.WEBSITE), await as_role(Role.LIMITED)
    body = {"user": ALICE, "reason": "Called"}
    for _ in range(5):
        assert (await website.post("/v1/password-resets", json={"user": ALICE})).status_code == 202
    for _ in range(5):
        assert (await limited.post("/v1/password-resets", json=body)).status_code == 202
    assert (await limited.post("/v1/password-resets", json=body)).status_code == 429
    assert (await client.post("/v1/password-resets", json=body)).status_code == 202


async def test_of_many_at_once_no_more_get_through(
    client: httpx.AsyncClient,
    as_role: Callable[..., Any],
    visitor: Callable[..., Any],
    api: FastAPI,
) -> None:
    await make_user(client, "alice", contact_address="alice@example.net")
    website = await as_role(Role.WEBSITE)
    path, new = "/v1/password-resets", "seven green lanterns over the harbour"

    async def codes(asked: Iterable[Awaitable[httpx.Response]]) -> dict[int, int]:
        return dict(Counter(answer.status_code for answer in await asyncio.gather(*asked)))

    resets = await codes(website.post(path, json={"user": ALICE}) for _ in range(30))
    assert 0 <= resets.pop(202, 0) <= 5, "who see each other at the limit are both refused"
    assert set(resets) == {429}
    async with anonymous(api) as visitors:
        tokens = await codes(
            visitors.post(f"{path}/confirm", json={"token": f"{n}", "password": new}) for n in range(90)
        )
    assert_let_through(tokens, 410, 40, of=90)
    body = {"password": new}
    url = f"/v1/users/{ALICE}/password"
    passwords = await codes(website.put(url, json={**body, "current_password": f"guess {n}"}) for n in range(30))
    assert_let_through(passwords, 403, 10, of=30)
    client_id = (await website.get("/v1/me")).json()["id"]
    secrets = await codes(visitor(client_id, f"guess {n}") for n in range(30))
    assert_let_through(secrets, 401, 10, of=30)


def assert_let_through(codes: dict[int, int], code: int, limit: int, *, of: int) -> None:
    """No more than the limit, but for those few that have the short hash of another one: they count as one guess."""
    assert limit <= codes[code] <= limit + 3
    assert codes == {code: codes[code], 429: of - codes[code]}


async def test_a_guess_whose_hash_was_seen_is_refused_at_the_limit(throttle: Throttle, seeded: Database) -> None:
    """Two passwords may have one short hash: a repeated one is slowed less, and not let through more often."""
    for number in range(10):
        await fails(throttle, FailureKind.MAIL, ALICE, "192.0.2.1", f"wrong {number}")
    for number in range(10):
        with pytest.raises(TooManyTries):
            await check(throttle, FailureKind.MAIL, ALICE, "192.0.2.1", f"wrong {number}")
        guess = guess_of(throttle._key, ALICE, f"wrong {number}")
        assert await throttle.allow(ALICE, "192.0.2.1", guess) == -1


async def test_names_tried_at_once_from_one_network_count(throttle: Throttle) -> None:
    answers = [await throttle.allow(f"user{n}@{PRIMARY}", "192.0.2.1", "abc") for n in range(60)]
    assert answers[39] >= 0
    assert set(answers[40:]) == {-1}
    assert await throttle.allow(f"user59@{PRIMARY}", "192.0.2.2", "abc") == 0


async def test_links_that_are_none_are_counted_by_network(throttle: Throttle, seeded: Database) -> None:
    for number in range(40):
        await check(throttle, FailureKind.RESET, "", "192.0.2.1")
        await fails(throttle, FailureKind.RESET, "", "192.0.2.1", f"token {number}")
    with pytest.raises(TooManyTries):
        await check(throttle, FailureKind.RESET, "", "192.0.2.1")
    await check(throttle, FailureKind.RESET, "", "192.0.2.2")
    assert {row.login for row in await rows(seeded)} == {""}


async def test_without_an_address_the_login_alone_counts(throttle: Throttle, client: httpx.AsyncClient) -> None:
    await make_user(client, "alice")
    for number in range(110):  # with 16 bits each, a few may look alike
        await fails(throttle, FailureKind.MAIL, ALICE, "", f"wrong {number}")
    with pytest.raises(TooManyTries):
        await check(throttle, FailureKind.MAIL, ALICE, "")
    await check(throttle, FailureKind.MAIL, f"bob@{PRIMARY}", "")


async def fails(throttle: Throttle, kind: FailureKind, login: str, address: str, guess: str) -> None:
    """One wrong guess, however many there were."""
    await throttle._record(await throttle._try(kind, login, address, guess_of(throttle._key, login, guess)))


async def check(throttle: Throttle, kind: FailureKind, login: str, address: str, guess: str = "right") -> None:
    async with throttle.guessing(kind, login, address, guess):
        pass


def _secret(client: httpx.AsyncClient) -> str:
    assert isinstance(client.auth, httpx.BasicAuth)
    return base64.b64decode(client.auth._auth_header.partition(" ")[2]).decode().partition(":")[2]


async def _tried(throttle: Throttle, *addresses: str) -> None:
    """Ten wrong passwords from each, and one success."""
    for address in addresses:
        for number in range(11):
            await fails(throttle, FailureKind.MAIL, ALICE, address, f"wrong {number}")
        await throttle.report(ALICE, address, "1234", success=True, rejected=False, app_password_id=None)
        with pytest.raises(TooManyTries):
            await check(throttle, FailureKind.MAIL, ALICE, address)


async def test_a_link_forgets_the_guesses_from_where_it_is_used(
    throttle: Throttle, client: httpx.AsyncClient, api: FastAPI, seeded: Database
) -> None:
    await make_user(client, "alice")
    await _tried(throttle, "127.0.0.1", "192.0.2.9")
    asked = await client.post("/v1/password-resets", json={"user": ALICE, "reason": "Called", "deliver": "show"})
    body = {"token": asked.json()["link"].partition("#")[2], "password": "seven green lanterns over the harbour"}
    async with anonymous(api) as owner:
        assert (await owner.post("/v1/password-resets/confirm", json=body)).status_code == 202
    await check(throttle, FailureKind.MAIL, ALICE, "127.0.0.1")
    with pytest.raises(TooManyTries):
        await check(throttle, FailureKind.MAIL, ALICE, "192.0.2.9")
    known = [row.network for row in await rows(seeded) if row.guess == "known"]
    assert sorted(known) == ["127.0.0.1/32", "192.0.2.9/32"]


async def test_a_successor_of_an_address_begins_with_nothing(
    throttle: Throttle, client: httpx.AsyncClient, seeded: Database
) -> None:
    first = await make_user(client, "alice")
    await make_user(client, "bob")
    await _tried(throttle, "192.0.2.8", "192.0.2.9")
    await fails(throttle, FailureKind.MAIL, f"bob@{PRIMARY}", "192.0.2.9", "wrong")
    await client.delete(f"/v1/users/{first['id']}")
    assert (await client.post("/v1/users", json={"address": ALICE, "reuse_address": True})).status_code in (201, 202)
    await check(throttle, FailureKind.MAIL, ALICE, "192.0.2.8")
    assert [row.login for row in await rows(seeded)] == [f"bob@{PRIMARY}"]
