"""Who am I."""

from collections.abc import Callable
from typing import Any

import pytest

from app.permissions import Permission

pytestmark = pytest.mark.asyncio


@pytest.mark.parametrize(
    ("given", "listed"),
    [
        ({"only_none": True}, []),
        ({}, sorted(Permission)),
    ],
)
async def test_it_lists_what_the_client_may_do(
    make_client: Callable[..., Any], given: dict[str, Any], listed: list[str]
) -> None:
    answer = await (await make_client(**given)).get("/v1/me")
    body = answer.json()
    assert answer.status_code == 200
    assert body.keys() == {"id", "name", "role", "rank", "permissions", "key_id", "user_id"}
    assert (body["rank"], body["user_id"]) == (3, None)
    assert isinstance(body["key_id"], int)
    assert body["id"].startswith("primary-")
    assert (body["name"], body["role"], body["permissions"]) == ("client 0", "primary", listed)


async def test_some_permissions_are_listed_in_order(make_client: Callable[..., Any]) -> None:
    client = await make_client(Permission.USERS_READ, Permission.DOMAINS_READ)
    assert (await client.get("/v1/me")).json()["permissions"] == ["domains:read", "users:read"]


async def test_a_token_shows_what_it_carries(make_client: Callable[..., Any]) -> None:
    client = await make_client()
    token = await client.post("/oauth/token", data={"grant_type": "client_credentials", "scope": "jobs:read"})
    headers = {"Authorization": f"Bearer {token.json()['access_token']}"}
    answer = await client.get("/v1/me", headers=headers, auth=None)
    assert answer.json()["permissions"] == ["jobs:read"]
