"""What every answer carries, whatever it answers."""

import httpx
import pytest
from fastapi import FastAPI

from tests.conftest import anonymous

pytestmark = pytest.mark.asyncio

POLICY = "default-src 'none'; frame-ancestors 'none'"


@pytest.mark.parametrize("given", ["12345678", "a.b_c-D9" * 8])
async def test_a_request_id_is_taken_over(client: httpx.AsyncClient, given: str) -> None:
    for path in ("/v1/me", "/nowhere"):
        answer = await client.get(path, headers={"X-Request-Id": given})
        assert answer.headers["x-request-id"] == given


@pytest.mark.parametrize(
    "given", [None, "", "1234567", "x" * 65, "a b c d e f", "abcdefgh\x7f", "abcdéfgh", "../../etc/passwd"]
)
async def test_or_made(client: httpx.AsyncClient, given: str | None) -> None:
    headers = [] if given is None else [(b"x-request-id", given.encode())]
    ids = {(await client.get("/v1/me", headers=headers)).headers["x-request-id"] for _ in range(2)}
    assert len(ids) == 2
    assert all(len(made) == 16 and int(made, 16) >= 0 for made in ids)


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/v1/me", 200),
        ("GET", "/v1/nothing", 404),
        ("PUT", "/v1/me", 405),
        ("GET", "/v1/users?colour=red", 422),
        ("GET", "/problems", 200),
        ("GET", "/docs/static/swagger-ui.css", 200),
        ("GET", "/docs/static/../../secret", 404),
    ],
)
async def test_every_answer_is_protected(client: httpx.AsyncClient, method: str, path: str, status: int) -> None:
    answer = await client.request(method, path)
    assert answer.status_code == status
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["referrer-policy"] == "no-referrer"
    assert answer.headers["content-security-policy"] == POLICY
    assert answer.headers["cache-control"] == "no-store"
    assert "server" not in answer.headers


async def test_what_a_route_says_about_itself_stands(client: httpx.AsyncClient) -> None:
    docs = await client.get("/docs")
    assert docs.headers.get_list("content-security-policy") != [POLICY]
    assert len(docs.headers.get_list("content-security-policy")) == 1
    assert docs.headers.get_list("cache-control") == ["no-cache"]
    account = await client.get("/v1/hosts/mail")
    assert account.headers.get_list("cache-control") == ["private, no-cache"]


@pytest.mark.parametrize(
    "path", ["/livez", "/v1/me", "/v1/users", "/v1/hosts/mail", "/docs", "/v1/hosts/none", "/nowhere"]
)
async def test_head_answers_as_get_does_without_a_body(client: httpx.AsyncClient, path: str) -> None:
    got, headed = await client.get(path), await client.head(path)
    assert headed.status_code == got.status_code
    assert headed.content == b""
    different = {"x-request-id", "content-length"}
    assert {k: v for k, v in headed.headers.items() if k not in different} == {
        k: v for k, v in got.headers.items() if k not in different
    }
    assert got.content
    assert "content-length" in headed.headers


async def test_head_is_no_way_around(client: httpx.AsyncClient, api: FastAPI) -> None:
    assert (await client.head("/v1/users/1/purge")).status_code == 405
    async with anonymous(api) as visitor:
        assert (await visitor.head("/v1/me")).status_code == 401
