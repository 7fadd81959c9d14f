"""Who is believed, for how long, and what is said to everybody else."""

import base64
from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import timedelta
from functools import partial
from typing import Any

import httpx
import pytest
import pytest_asyncio
from fastapi import FastAPI

from app.db import Database
from app.permissions import Permission, Role
from app.services.changes import Change
from app.services.principals import create_principal, disable_principal, rotate_secret
from tests.conftest import ACTOR, ISSUER, Clock, anonymous

pytestmark = pytest.mark.asyncio

Credentials = tuple[str, str]


async def change(database: Database, function: Callable[..., Awaitable[Any]], *args: Any) -> Any:
    async with database.write.begin() as connection:
        return await function(Change(connection, ACTOR, Clock().now), *args)


new_secret = partial(rotate_secret, overlap=timedelta(0))
rotate_secret_with_overlap = partial(rotate_secret, overlap=timedelta(days=1))


@pytest_asyncio.fixture
async def credentials(seeded: Database) -> Credentials:
    made: Credentials = await change(seeded, create_principal, "somebody", Role.PRIMARY)
    return made


@pytest_asyncio.fixture
async def visitor(api: FastAPI) -> AsyncIterator[httpx.AsyncClient]:
    """Without credentials of its own."""
    async with anonymous(api) as client:
        yield client


def basic(client_id: str, secret: str) -> dict[str, str]:
    return {"Authorization": "Basic " + base64.b64encode(f"{client_id}:{secret}".encode()).decode()}


async def token(visitor: httpx.AsyncClient, credentials: Credentials, **form: str) -> dict[str, str]:
    answer = await visitor.post(
        "/oauth/token", data={"grant_type": "client_credentials", **form}, headers=basic(*credentials)
    )
    assert answer.status_code == 200, answer.text
    return {"Authorization": f"Bearer {answer.json()['access_token']}"}


def refusal(answer: httpx.Response) -> str:
    """Checks that it is a whole and proper 401, and returns its words."""
    problem = answer.json()
    assert answer.status_code == problem["status"] == 401
    assert answer.headers["content-type"] == "application/problem+json"
    assert answer.headers["www-authenticate"] == 'Bearer realm="cacert-mail"'
    assert problem["type"] == "/problems/unauthenticated"
    assert problem["request_id"] == answer.headers["x-request-id"]
    return str(problem["detail"])


@pytest.mark.parametrize(
    ("header", "says"),
    [
        (None, "needs credentials"),
        ("", "needs credentials"),
        ("Digest username=x", "Basic and Bearer"),
        ("Bearer", "malformed"),
        ("Bearer not.a.token", "malformed"),
        ("Bearer \xff", "malformed"),
        ("Basic", "cannot be read"),
        ("Basic !!!", "cannot be read"),
        ("Basic \xff\xfe", "cannot be read"),
        ("Basic " + base64.b64encode(b"no colon").decode(), "cannot be read"),
        ("Basic " + base64.b64encode("ü:ö".encode()).decode(), "cannot be read"),
        ("Basic " + base64.b64encode(b":").decode(), "is wrong"),
        ("Basic " + base64.b64encode(b"x" * 41 + b":y").decode(), "is wrong"),
    ],
)
async def test_what_cannot_be_read_is_refused(visitor: httpx.AsyncClient, header: str | None, says: str) -> None:
    headers = [] if header is None else [(b"authorization", header.encode("latin-1"))]
    assert says in refusal(await visitor.get("/v1/me", headers=headers))


async def test_nobody_learns_whether_a_client_exists(visitor: httpx.AsyncClient, credentials: Credentials) -> None:
    client_id, _ = credentials
    wrong_secret = refusal(await visitor.get("/v1/me", headers=basic(client_id, "wrong")))
    unknown = refusal(await visitor.get("/v1/me", headers=basic("primary-000000000000", "wrong")))
    assert wrong_secret == unknown


@pytest.mark.parametrize("scheme", ["Basic", "basic", "BASIC"])
async def test_the_scheme_is_read_in_any_case(
    visitor: httpx.AsyncClient, credentials: Credentials, scheme: str
) -> None:
    encoded = basic(*credentials)["Authorization"].partition(" ")[2]
    answer = await visitor.get("/v1/me", headers={"Authorization": f"{scheme} {encoded}"})
    assert (answer.status_code, answer.json()["id"]) == (200, credentials[0])


@pytest.mark.parametrize("by", ["basic", "token"])
@pytest.mark.parametrize("ending", [disable_principal, new_secret])
async def test_an_ended_client_is_out_within_two_seconds(
    visitor: httpx.AsyncClient,
    seeded: Database,
    credentials: Credentials,
    clock: Clock,
    by: str,
    ending: Callable[..., Awaitable[Any]],
) -> None:
    headers = basic(*credentials) if by == "basic" else await token(visitor, credentials)
    assert (await visitor.get("/v1/me", headers=headers)).status_code == 200
    await change(seeded, ending, credentials[0])
    clock.forward(seconds=1.9)
    assert (await visitor.get("/v1/me", headers=headers)).status_code == 200, "the row is remembered, as is promised"
    clock.forward(seconds=0.1)
    refusal(await visitor.get("/v1/me", headers=headers))
    clock.forward(seconds=60)
    refusal(await visitor.get("/v1/me", headers=headers))


async def test_the_new_secret_works_and_makes_tokens_that_work(
    visitor: httpx.AsyncClient, seeded: Database, credentials: Credentials, clock: Clock
) -> None:
    old = await token(visitor, credentials)
    _, secret = await change(seeded, new_secret, credentials[0])
    clock.forward(seconds=2)
    new = await token(visitor, (credentials[0], secret))
    assert (await visitor.get("/v1/me", headers=new)).status_code == 200
    refusal(await visitor.get("/v1/me", headers=old))


async def test_a_token_ends_after_ten_minutes(
    visitor: httpx.AsyncClient, credentials: Credentials, clock: Clock
) -> None:
    headers = await token(visitor, credentials)
    clock.forward(seconds=599)
    assert (await visitor.get("/v1/me", headers=headers)).status_code == 200
    clock.forward(seconds=1)
    refusal(await visitor.get("/v1/me", headers=headers))


@pytest.mark.parametrize(
    ("peer", "url", "taken"),
    [
        (("192.0.2.1", 1), "http://mail.cacert.test", False),
        (("192.0.2.1", 1), ISSUER, True),
        (("127.0.0.1", 1), "http://mail.cacert.test", True),
        (("::1", 1), "http://mail.cacert.test", True),
        (("2001:db8::1", 1), "http://mail.cacert.test", False),
        (("nonsense", 1), "http://mail.cacert.test", False),
    ],
)
async def test_a_secret_is_taken_over_tls_or_from_this_machine_only(
    api: FastAPI, credentials: Credentials, peer: tuple[str, int], url: str, taken: bool
) -> None:
    transport = httpx.ASGITransport(api, client=peer)
    async with httpx.AsyncClient(transport=transport, base_url=url, auth=httpx.BasicAuth(*credentials)) as client:
        answer = await client.get("/v1/me")
        granted = await client.post("/oauth/token", data={"grant_type": "client_credentials"})
    assert answer.status_code == granted.status_code == (200 if taken else 401)
    if not taken:
        assert "over TLS" in refusal(answer)
        assert granted.json()["error"] == "invalid_client"


async def test_a_token_is_taken_over_plain_http(
    api: FastAPI, visitor: httpx.AsyncClient, credentials: Credentials
) -> None:
    headers = await token(visitor, credentials)
    transport = httpx.ASGITransport(api, client=("192.0.2.1", 1))
    async with httpx.AsyncClient(transport=transport, base_url="http://mail.cacert.test") as client:
        assert (await client.get("/v1/me", headers=headers)).status_code == 200


async def test_a_scope_narrows_a_token_and_never_widens_it(
    visitor: httpx.AsyncClient, seeded: Database, credentials: Credentials
) -> None:
    headers = await token(visitor, credentials, scope="users:read hosts:read")
    assert (await visitor.get("/v1/me", headers=headers)).json()["permissions"] == ["hosts:read", "users:read"]
    assert (await visitor.get("/v1/users", headers=headers)).status_code == 200
    refused = await visitor.get("/v1/domains", headers=headers)
    assert (refused.status_code, refused.json()["missing"]) == (403, "domains:read")
    # What the client loses, its token loses too.
    narrow: Credentials = await change(seeded, create_principal, "narrow", Role.PRIMARY, [Permission.USERS_READ])
    headers = await token(visitor, narrow)
    assert (await visitor.get("/v1/me", headers=headers)).json()["permissions"] == ["users:read"]


async def test_a_missing_permission_is_named(make_client: Callable[..., Any]) -> None:
    reader = await make_client(Permission.USERS_READ)
    answer = await reader.post("/v1/domains", json={"name": "example.org"})
    problem = answer.json()
    assert answer.status_code == problem["status"] == 403
    assert answer.headers["content-type"] == "application/problem+json"
    assert "www-authenticate" not in answer.headers
    assert (problem["type"], problem["missing"]) == ("/problems/forbidden", "domains:write")
    assert "domains:write" in problem["detail"]


async def test_what_is_new_is_believed_at_once(
    visitor: httpx.AsyncClient, seeded: Database, credentials: Credentials
) -> None:
    """The row is remembered for two seconds, and a secret of this moment is not in it."""
    client_id, old = credentials
    assert (await visitor.get("/v1/me", headers=basic(client_id, old))).status_code == 200
    _, new = await change(seeded, rotate_secret_with_overlap, client_id)
    assert (await visitor.get("/v1/me", headers=basic(client_id, new))).status_code == 200
    assert (await visitor.get("/v1/me", headers=basic(client_id, old))).status_code == 200
