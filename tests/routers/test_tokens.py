"""The token endpoint, as RFC 6749 has it, and the keys, as anybody can use them."""

import base64
import json
from collections.abc import AsyncIterator

import httpx
import pytest
import pytest_asyncio
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import padding, rsa
from fastapi import FastAPI

from app.permissions import Permission
from tests.conftest import ISSUER, Clock, anonymous

pytestmark = pytest.mark.asyncio

GRANT = {"grant_type": "client_credentials"}
ALL = " ".join(sorted(Permission))


@pytest_asyncio.fixture
async def visitor(api: FastAPI) -> AsyncIterator[httpx.AsyncClient]:
    async with anonymous(api) as client:
        yield client


def secret_of(client: httpx.AsyncClient) -> tuple[str, str]:
    """The client id and secret that this client sends."""
    header = next(client.auth.auth_flow(httpx.Request("GET", ISSUER))).headers["authorization"]  # type: ignore[union-attr]
    client_id, _, secret = base64.b64decode(header.partition(" ")[2]).decode().partition(":")
    return client_id, secret


def unpadded(text: str) -> bytes:
    return base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))


@pytest.mark.parametrize("by", ["basic", "form"])
async def test_a_grant(client: httpx.AsyncClient, visitor: httpx.AsyncClient, by: str) -> None:
    client_id, secret = secret_of(client)
    form = {} if by == "basic" else {"client_id": client_id, "client_secret": secret}
    answer = await (client if by == "basic" else visitor).post("/oauth/token", data={**GRANT, **form})
    assert answer.status_code == 200
    assert answer.headers["cache-control"] == "no-store"
    assert answer.headers["pragma"] == "no-cache"
    body = answer.json()
    token = body.pop("access_token")
    key_id = body.pop("key_id")
    assert body == {"token_type": "Bearer", "expires_in": 600, "scope": ALL, "role": "primary", "rank": 3}
    me = await visitor.get("/v1/me", headers={"Authorization": f"Bearer {token}"})
    assert me.json()["key_id"] == key_id
    assert (me.status_code, me.json()["id"]) == (200, client_id)


@pytest.mark.parametrize(
    ("scope", "granted"),
    [("users:read", "users:read"), ("users:write  users:read", "users:read users:write"), ("", ALL)],
)
async def test_a_scope_is_granted_as_asked(client: httpx.AsyncClient, scope: str, granted: str) -> None:
    answer = await client.post("/oauth/token", data={**GRANT, "scope": scope})
    assert (answer.status_code, answer.json()["scope"]) == (200, granted)


@pytest.mark.parametrize(
    ("form", "error"),
    [
        ({}, "invalid_request"),
        ({"grant_type": "password"}, "unsupported_grant_type"),
        ({"grant_type": "x" * 1000}, "unsupported_grant_type"),
        ({**GRANT, "scope": "users:read root"}, "invalid_scope"),
        ({**GRANT, "scope": "ü"}, "invalid_scope"),
        ({**GRANT, "scope": "x" * 5000}, "invalid_scope"),
    ],
)
async def test_a_refused_grant(client: httpx.AsyncClient, form: dict[str, str], error: str) -> None:
    answer = await client.post("/oauth/token", data=form)
    assert answer.status_code == 400
    assert answer.headers["content-type"] == "application/json"
    assert answer.headers["cache-control"] == "no-store"
    assert answer.headers["pragma"] == "no-cache"
    assert answer.json().keys() == {"error", "error_description"}
    assert answer.json()["error"] == error


async def test_what_the_framework_refuses_has_that_shape_too(client: httpx.AsyncClient) -> None:
    for answer in (
        await client.post("/oauth/token?colour=red", data=GRANT),
        await client.post("/oauth/token", files={"grant_type": b"client_credentials"}),
    ):
        assert (answer.status_code, answer.json()["error"]) == (400, "invalid_request")


@pytest.mark.parametrize(
    ("form", "header"),
    [
        ({}, None),
        ({"client_id": "primary-000000000000"}, None),
        ({"client_id": "primary-000000000000", "client_secret": "wrong"}, None),
        ({"client_id": "ü" * 100, "client_secret": "ü" * 500}, None),
        ({}, "Basic rubbish"),
        ({}, "Basic " + base64.b64encode(b"a:b").decode()),
        ({}, "Bearer a.b.c"),
    ],
)
async def test_an_unknown_client(visitor: httpx.AsyncClient, form: dict[str, str], header: str | None) -> None:
    headers = {} if header is None else {"Authorization": header}
    answer = await visitor.post("/oauth/token", data={**GRANT, **form}, headers=headers)
    assert answer.status_code == 401
    assert answer.json()["error"] == "invalid_client"
    assert answer.headers["www-authenticate"] == 'Bearer realm="cacert-mail"'
    assert answer.headers["cache-control"] == "no-store"


async def test_a_client_cannot_ask_for_what_it_lacks(make_client, visitor: httpx.AsyncClient) -> None:  # type: ignore[no-untyped-def]
    reader = await make_client(Permission.USERS_READ)
    assert (await reader.post("/oauth/token", data={**GRANT, "scope": "users:write"})).json()[
        "error"
    ] == "invalid_scope"
    assert (await reader.post("/oauth/token", data=GRANT)).json()["scope"] == "users:read"


async def test_the_published_keys_alone_verify_a_token(
    client: httpx.AsyncClient, visitor: httpx.AsyncClient, clock: Clock
) -> None:
    token = (await client.post("/oauth/token", data={**GRANT, "scope": "users:read"})).json()["access_token"]
    answer = await visitor.get("/.well-known/jwks.json")
    assert answer.headers["cache-control"] == "public, max-age=300"
    signed, _, signature = token.rpartition(".")
    header, claims = (json.loads(unpadded(part)) for part in signed.split("."))
    [key] = [key for key in answer.json()["keys"] if key["kid"] == header["kid"]]
    assert key.keys() == {"kty", "n", "e", "alg", "use", "kid"}, "and nothing of the private half"
    numbers = rsa.RSAPublicNumbers(*(int.from_bytes(unpadded(key[name])) for name in ("e", "n")))
    numbers.public_key().verify(unpadded(signature), signed.encode(), padding.PKCS1v15(), hashes.SHA256())
    now = int(clock.now.timestamp())
    assert {name: claims[name] for name in ("iss", "aud", "sub", "scope", "iat", "exp", "generation")} == {
        "iss": ISSUER,
        "aud": ISSUER,
        "sub": secret_of(client)[0],
        "scope": "users:read",
        "iat": now,
        "exp": now + 600,
        "generation": 0,
    }
