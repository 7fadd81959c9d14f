"""Every error has a page, a status and words; none tells a secret, neither to the caller nor to the log."""

import io
import json
import logging
import re
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
import pytest_asyncio
import structlog
from fastapi import FastAPI
from pydantic import SecretStr
from sqlalchemy import update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from starlette.requests import Request

import app.db
from app import errors
from app.config import ApiSettings
from app.db import Database
from app.log import log
from app.main import build_app, create_app
from app.models.hosts import hosts
from app.routers.users import NewUserBody
from app.web.problems import BY_ERROR, CATALOGUE, PATTERNS, error_response, pointer, problem_for, problem_page, words
from tests.conftest import HOST, PRIMARY, Clock, anonymous
from tests.stack.mariadb import MariaDB

INNER = {errors.CacertMailError, errors.Refused, errors.Conflict}
"""Never raised themselves."""


def all_errors() -> set[type[errors.CacertMailError]]:
    found = {errors.CacertMailError}
    while more := {sub for kind in found for sub in kind.__subclasses__()} - found:
        found |= more
    return found


def test_every_error_that_can_be_raised_is_in_the_catalogue() -> None:
    assert len(all_errors()) > 20
    assert all_errors() - INNER == set(BY_ERROR)
    for kind in INNER:
        assert problem_for(kind("x")).status == 500, "somebody raised a base class"


def test_every_slug_is_one_problem_with_words() -> None:
    assert len({problem.slug for problem in BY_ERROR.values()}) == len(BY_ERROR)
    for slug, problem in CATALOGUE.items():
        assert slug == problem.slug
        assert 400 <= problem.status < 600
        assert problem.title
        assert problem.remedy.endswith(".")
        assert problem.curl is None or problem.curl.startswith("curl ")


@pytest.mark.parametrize(
    ("location", "where"),
    [
        (("body",), {"pointer": ""}),
        ((), {"pointer": ""}),
        (("body", "address"), {"pointer": "/address"}),
        (("body", "a/b", "c~d"), {"pointer": "/a~1b/c~0d"}),
        (("body", "targets", 0, "address"), {"pointer": "/targets/0/address"}),
        (("query", "limit"), {"parameter": "limit"}),
        (("path", "user"), {"parameter": "user"}),
        (("header", "prefer"), {"header": "prefer"}),
    ],
)
def test_a_fault_is_pointed_at(location: tuple[Any, ...], where: dict[str, str]) -> None:
    assert pointer(location) == where


def test_a_page_escapes_what_it_shows() -> None:
    page = problem_page(CATALOGUE["forbidden"])
    assert "&quot;$CLIENT_ID:$CLIENT_SECRET&quot;" in page
    assert "<script" not in page


@pytest.fixture
def lines(monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[dict[str, Any]]]:
    """What was logged, at any level, as it would be written."""
    buffer = io.StringIO()
    logger = structlog.wrap_logger(
        structlog.PrintLogger(buffer),
        processors=structlog.get_config()["processors"],
        wrapper_class=structlog.make_filtering_bound_logger(logging.DEBUG),
    )
    for name, module in list(sys.modules.items()):
        if name.startswith("app.") and getattr(module, "log", None) is log:
            monkeypatch.setattr(module, "log", logger)
    return lambda: [json.loads(line) for line in buffer.getvalue().splitlines()]


@pytest_asyncio.fixture
async def visitor(api: FastAPI) -> AsyncIterator[httpx.AsyncClient]:
    async with anonymous(api) as client:
        yield client


def raising(api: FastAPI, error: BaseException) -> None:
    async def fail() -> None:
        raise error

    api.add_api_route("/fails", fail)


async def problem(answer: httpx.Response, slug: str) -> dict[str, Any]:
    """Checks that it is this problem, whole and consistent."""
    body: dict[str, Any] = answer.json()
    assert body["type"] == f"/problems/{slug}"
    assert answer.status_code == body["status"] == CATALOGUE[slug].status
    assert answer.headers["content-type"] == "application/problem+json"
    assert (body["title"], body["remedy"]) == (CATALOGUE[slug].title, CATALOGUE[slug].remedy)
    assert body["request_id"] == answer.headers["x-request-id"]
    return body


@pytest.mark.asyncio
async def test_every_problem_has_a_page_and_the_list_has_all(visitor: httpx.AsyncClient) -> None:
    listed = await visitor.get("/problems")
    for slug, entry in CATALOGUE.items():
        assert f'href="/problems/{slug}"' in listed.text
        page = await visitor.get(f"/problems/{slug}")
        assert page.status_code == 200
        assert page.headers["content-type"].startswith("text/html")
        assert entry.title in page.text.replace("&#x27;", "'")
        assert str(entry.status) in page.text
        assert re.search("<pre>curl .*\\$URL", page.text)
    await problem(await visitor.get("/problems/no-such-thing"), "not-found")


@pytest.mark.asyncio
@pytest.mark.parametrize("kind", BY_ERROR, ids=lambda kind: kind.__name__)
async def test_every_error_becomes_its_problem(
    api: FastAPI, visitor: httpx.AsyncClient, kind: type[errors.CacertMailError]
) -> None:
    raising(api, kind("The words.", field="name", id=7, retry_after=3))
    answer = await visitor.get("/fails")
    entry = BY_ERROR[kind]
    body = await problem(answer, entry.slug)
    assert (body["detail"], body["id"]) == ("The words.", 7)
    assert body["errors"] == [{"pointer": "/name", "detail": "The words."}]
    assert ("www-authenticate" in answer.headers) == (entry.status == 401)
    assert ("retry-after" in answer.headers) == (entry.status in (429, 503) or kind is errors.KeyInUse)


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("method", "path", "options", "slug"),
    [
        ("GET", "/nowhere", {}, "no-such-page"),
        ("GET", "/v1/users/", {}, "no-such-page"),
        ("PUT", "/v1/users", {}, "method-not-allowed"),
        ("POST", "/v1/users", {"content": b"{", "headers": {"content-type": "application/json"}}, "bad-request"),
        ("POST", "/v1/users", {"content": b'"\xff"', "headers": {"content-type": "application/json"}}, "bad-request"),
        (
            "POST",
            "/v1/users",
            {"content": b"[" * 60_000, "headers": {"content-type": "application/json"}},
            "bad-request",
        ),
        ("POST", "/v1/users", {"content": b"1" * 9999, "headers": {"content-type": "application/json"}}, "bad-request"),
        (
            "POST",
            "/v1/users",
            {"content": b" " * 65_537, "headers": {"content-type": "application/json"}},
            "body-too-large",
        ),
        ("POST", "/v1/users", {"json": {}}, "invalid-request"),
        ("POST", "/v1/users", {}, "invalid-request"),
        ("POST", "/v1/users", {"content": b"{}"}, "wrong-media-type"),
        ("POST", "/v1/users", {"content": b"{}", "headers": {"content-type": "text/plain"}}, "wrong-media-type"),
        ("POST", "/v1/users", {"data": {"address": "a@b.test"}}, "wrong-media-type"),
        (
            "PATCH",
            "/v1/users/1",
            {"content": b"<x/>", "headers": {"content-type": "application/xml"}},
            "wrong-media-type",
        ),
        ("GET", "/v1/users?limit=x", {}, "invalid-request"),
        ("POST", "/oauth/token", {"data": {"grant_type": "x" * 70_000}}, "body-too-large"),
    ],
)
async def test_what_the_framework_refuses_is_a_problem_too(
    client: httpx.AsyncClient, method: str, path: str, options: dict[str, Any], slug: str
) -> None:
    answer = await client.request(method, path, **options)
    await problem(answer, slug)
    if slug == "method-not-allowed":
        assert set(answer.headers["allow"].split(", ")) == {"POST"} or "GET" in answer.headers["allow"]


FIELDS = ", ".join(NewUserBody.model_fields)
HOST_NAME = "The name of a host takes 1 to 64 of a-z, 0-9, dot and hyphen; it starts and ends with a letter or digit."


@pytest.mark.asyncio
@pytest.mark.parametrize("test_database", ["sqlite"], indirect=True)
@pytest.mark.parametrize(
    ("members", "name", "says"),
    [
        ({"quota": "swordfish"}, "quota", f"There is no such field. This takes: {FIELDS}."),
        ({"a/b.c": 1}, "a/b.c", f"There is no such field. This takes: {FIELDS}."),
        ({"address": None}, "address", "This takes a string, in double quotes."),
        ({"external_id": 4711}, "external_id", "This takes a string, in double quotes."),
        ({"external_id": ""}, "external_id", "String should have at least 1 character."),
        ({"display_name": "swordfish" * 30}, "display_name", "String should have at most 200 characters."),
        (
            {"display_name": "sword\nfish"},
            "display_name",
            "No control characters, line breaks or text direction marks here.",
        ),
        ({"quota_bytes": 5}, "quota_bytes", "Input should be greater than or equal to 1048576."),
        (
            {"quota_bytes": "swordfish"},
            "quota_bytes",
            "Input should be a valid integer, unable to parse string as an integer.",
        ),
        ({"reuse_address": "swordfish"}, "reuse_address", "This is true or false."),
        ({"reuse_address": None}, "reuse_address", "This is true or false."),
        ({"reuse_address": []}, "reuse_address", "This is true or false."),
        ({"host": "Swordfish"}, "host", HOST_NAME),
        ({"password": "swordfish" * 30}, "password", "This takes at most 256 characters."),
        ({"password": ["swordfish"]}, "password", "This takes a string, in double quotes."),
        ({"password_hash": "swordfish" * 60}, "password_hash", "This takes at most 500 characters."),
    ],
)
async def test_a_wrong_field_is_named_in_words(
    client: httpx.AsyncClient, members: dict[str, Any], name: str, says: str
) -> None:
    answer = await client.post("/v1/users", json={"address": f"alice@{PRIMARY}", **members})
    body = await problem(answer, "invalid-request")
    assert body["errors"] == [{"pointer": f"/{name.replace('/', '~1')}", "detail": says}]
    assert body["detail"] == f"{name}: {says}"
    assert "swordfish" not in answer.text


@pytest.mark.asyncio
@pytest.mark.parametrize("test_database", ["sqlite"], indirect=True)
@pytest.mark.parametrize(
    ("method", "path", "options", "detail"),
    [
        ("POST", "/v1/users", {"json": {}}, "address: This is required."),
        ("POST", "/v1/users", {}, "body: This is required."),
        ("POST", "/v1/users", {"json": ["swordfish"]}, "body: This takes a JSON object, in braces."),
        ("POST", "/v1/users", {"json": "swordfish"}, "body: This takes a JSON object, in braces."),
        ("POST", "/v1/domains", {"json": {}}, "name: This is required."),
        (
            "POST",
            "/v1/domains",
            {"json": {"name": "example.org", "kind": "swordfish"}},
            "kind: Input should be 'primary', 'virtual' or 'relay'.",
        ),
        ("POST", "/v1/hosts", {"json": {"name": "-"}}, f"name: {HOST_NAME}"),
        (
            "POST",
            "/v1/domains",
            {"json": {"names": "swordfish"}},
            "name: This is required. names: There is no such field. This takes: name, kind.",
        ),
        ("GET", "/v1/hosts/Swordfish", {}, f"host: {HOST_NAME}"),
        ("GET", "/v1/users?ready=swordfish", {}, "ready: This is true or false."),
        ("GET", "/v1/users?limit=501", {}, "limit: Input should be less than or equal to 500."),
    ],
)
async def test_what_is_wrong_is_said_in_words(
    client: httpx.AsyncClient, method: str, path: str, options: dict[str, Any], detail: str
) -> None:
    answer = await client.request(method, path, **options)
    body = await problem(answer, "invalid-request")
    assert body["detail"] == detail
    assert "swordfish" not in answer.text


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        ({"type": "extra_forbidden", "loc": ("body", "settings", "colour")}, "There is no such field."),
        ({"type": "string_pattern_mismatch", "ctx": {"pattern": "^[0-9]$"}, "msg": "The pattern"}, "The pattern."),
        (
            {"type": "too_long", "ctx": {"field_type": "List", "max_length": 5}, "msg": "List should have 5 items"},
            "List should have 5 items.",
        ),
        ({"type": "value_error", "msg": "Value error, What we said."}, "What we said."),
    ],
)
def test_what_is_not_known_to_be_plainer_is_left(fault: dict[str, Any], says: str) -> None:
    assert words(Request({"type": "http"}), {"loc": ("body", "x"), **fault}) == says


def test_every_pattern_has_words() -> None:
    found = set(re.findall(r'"pattern": ("(?:[^"\\]|\\.)*")', json.dumps(build_app().openapi())))
    assert {json.loads(pattern) for pattern in found} == set(PATTERNS)


@pytest.mark.asyncio
@pytest.mark.parametrize("test_database", ["sqlite"], indirect=True)
@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"{", "Expecting property name enclosed in double quotes at line 1, column 2."),
        (b"{'address': 'swordfish'}", "Expecting property name enclosed in double quotes at line 1, column 2."),
        (b'{\n "address": swordfish\n}', "Expecting value at line 2, column 13."),
        (b'{\n "a": 1\n "swordfish": 2}', "Expecting ',' delimiter at line 3, column 2."),
        (b'{"password": "swordfish', "Unterminated string starting at line 1, column 14."),
        (b'{"password": "swordfish\n"}', "Invalid control character at line 1, column 24."),
        (b'{"password": "\\swordfish"}', "Invalid \\escape at line 1, column 15."),
        (b'{"password": "x"} swordfish', "Extra data at line 1, column 19."),
    ],
)
async def test_where_the_json_ends_is_said(client: httpx.AsyncClient, content: bytes, says: str) -> None:
    answer = await client.post("/v1/users", content=content, headers={"content-type": "application/json"})
    body = await problem(answer, "bad-request")
    assert body["detail"] == f"The body is not valid JSON: {says}"
    assert "swordfish" not in answer.text


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("method", "path", "known"),
    [
        ("GET", "/v1/users/", True),
        ("DELETE", "/v1/users/", True),
        ("GET", f"/v1/users/alice@{PRIMARY}/", True),
        ("POST", "/v1/users/1/restore/", True),
        ("GET", "/docs/", True),
        ("GET", "/livez/", True),
        ("GET", "/v1/users//", False),
        ("GET", "/v1/nowhere/", False),
        ("GET", "/v1/nowhere", False),
        ("GET", "/v1/userss", False),
        ("GET", "/", False),
        ("GET", "/docs/static/", False),
        ("GET", "/docs/static/nothing/", False),
    ],
)
async def test_a_slash_too_many_is_named(visitor: httpx.AsyncClient, method: str, path: str, known: bool) -> None:
    body = await problem(await visitor.request(method, path), "no-such-page")
    assert (body["detail"] == "Leave out the slash at the end.") == known


@pytest.mark.asyncio
@pytest.mark.parametrize("kind", ["application/json", "application/json; charset=utf-8", "application/vnd.x+json"])
async def test_json_is_known_by_all_its_names(client: httpx.AsyncClient, kind: str) -> None:
    answer = await client.post("/v1/users", content=f'{{"address":"alice@{PRIMARY}"}}', headers={"content-type": kind})
    assert answer.status_code == 202, answer.text


@pytest.mark.asyncio
async def test_a_body_without_a_length_is_limited_too(client: httpx.AsyncClient) -> None:
    async def chunks() -> AsyncIterator[bytes]:
        for _ in range(80):
            yield b" " * 1024

    answer = await client.post("/v1/users", content=chunks(), headers={"content-type": "application/json"})
    await problem(answer, "body-too-large")


@pytest.mark.asyncio
async def test_faults_are_listed_up_to_twenty(client: httpx.AsyncClient) -> None:
    answer = await client.post("/v1/users", json={f"field{number}": 1 for number in range(50)})
    body = await problem(answer, "invalid-request")
    assert len(body["errors"]) == 20
    assert len(body["detail"]) <= 500


UNKNOWN = [
    RuntimeError("swordfish"),
    KeyError("swordfish"),
    FileNotFoundError(2, "swordfish", "/etc/swordfish"),
    IntegrityError("INSERT", {}, Exception("CHECK constraint failed: swordfish")),
]


@pytest.mark.asyncio
@pytest.mark.parametrize("error", UNKNOWN, ids=lambda error: type(error).__name__)
async def test_an_unknown_error_tells_only_where_to_look(
    api: FastAPI, visitor: httpx.AsyncClient, lines: Callable[[], list[dict[str, Any]]], error: Exception
) -> None:
    raising(api, error)
    answer = await visitor.get("/fails", headers={"X-Request-Id": "find-me-1"})
    body = await problem(answer, "internal-error")
    assert body["detail"] == "Internal Server Error."
    assert body.keys() == {"type", "title", "status", "detail", "remedy", "request_id"}
    assert "swordfish" not in answer.text
    [line] = [line for line in lines() if line["event"] == "internal_error"]
    assert (line["request_id"], line["level"]) == ("find-me-1", "error")
    assert "swordfish" in line["exception"]
    [line] = [line for line in lines() if line["event"] == "request"]
    assert (line["request_id"], line["status"], line["path"]) == ("find-me-1", 500, "/fails")


@pytest.mark.asyncio
@pytest.mark.parametrize(
    "error", [PoolTimeout(), ConnectionRefusedError(), TimeoutError(), OSError(101, "unreachable")], ids=repr
)
async def test_what_passes_is_a_503(
    api: FastAPI, visitor: httpx.AsyncClient, lines: Callable[[], list[dict[str, Any]]], error: Exception
) -> None:
    raising(api, error)
    answer = await visitor.get("/fails")
    await problem(answer, "unavailable")
    assert answer.headers["retry-after"] == "1"
    assert "Nothing was changed" not in answer.text, "a connection that breaks in COMMIT leaves that open"
    assert [line["event"] for line in lines()] == ["database_unavailable", "request"]


@pytest.mark.asyncio
async def test_a_database_that_does_not_answer(key_directory: Path, scratch: Path) -> None:
    settings = ApiSettings(
        database_url=SecretStr("mysql+asyncmy://api:swordfish@127.0.0.1:1/cacertusers"),
        key_directory=key_directory,
        link_key_file=key_directory / "link.key",
        wake_directory=scratch,
    )
    api = create_app(settings)
    async with api.router.lifespan_context(api), anonymous(api) as visitor:
        for path, auth in (("/v1/me", ("a", "b")), ("/readyz", None)):
            answer = await visitor.get(path, auth=auth)
            await problem(answer, "unavailable")
            assert answer.headers["retry-after"] == "1"
            assert "swordfish" not in answer.text
        assert (await visitor.get("/livez")).status_code == 200


@pytest.mark.asyncio
@pytest.mark.parametrize("test_database", ["mariadb"], indirect=True)
async def test_a_connection_that_was_cut_is_replaced(client: httpx.AsyncClient, mariadb: MariaDB) -> None:
    assert (await client.get("/v1/hosts")).status_code == 200
    cut = mariadb.sql("SELECT id FROM information_schema.processlist WHERE user = 'api'")
    mariadb.sql("".join(f"KILL {row[0]};" for row in cut))
    assert cut
    answers = [await client.get("/v1/hosts") for _ in range(2)] + [
        await client.patch(f"/v1/hosts/{HOST}", json={"enabled": False}) for _ in range(2)
    ]
    assert {answer.status_code for answer in answers} <= {200, 202, 503}
    assert (answers[1].status_code, answers[3].status_code) == (200, 202)


@pytest.mark.asyncio
async def test_a_busy_database(
    settings: ApiSettings, client: httpx.AsyncClient, seeded: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(app.db, "SQLITE_BUSY_SECONDS", 0.02)
    monkeypatch.setattr(app.db, "LOCK_WAIT_SECONDS", 0)
    api = create_app(settings, clock=Clock())
    async with api.router.lifespan_context(api), anonymous(api) as hurried:
        hurried.auth = client.auth
        async with seeded.write.begin() as connection:
            await connection.execute(update(hosts).values(enabled=True, version=5))
            answer = await hurried.patch(f"/v1/hosts/{HOST}", json={"enabled": False})
            await problem(answer, "unavailable")
            assert answer.headers["retry-after"] == "1"
        answer = await hurried.patch(f"/v1/hosts/{HOST}", json={"enabled": False})
        assert (answer.status_code, answer.json()["version"]) == (202, 6)


@pytest.mark.asyncio
async def test_no_secret_reaches_the_log(
    client: httpx.AsyncClient,
    visitor: httpx.AsyncClient,
    lines: Callable[[], list[dict[str, Any]]],
    capfd: pytest.CaptureFixture[str],
) -> None:
    secret = "swordfish seven green lanterns"
    hashed = (
        "{ARGON2ID}$argon2id$v=19$m=8192,t=1,p=1$c2FsdHNhbHRzYWx0c2FsdA$DYFAS5QpLBm0KKZKwM8bR4MwmUEyJ3tqXkmOc1rbzAM"
    )
    json_type = {"content-type": "application/json"}
    granted = await client.post("/oauth/token", data={"grant_type": "client_credentials"})
    token = granted.json()["access_token"]
    answers = [
        granted,
        await client.post("/v1/users", json={"address": f"a@{PRIMARY}", "password": secret}),
        await client.post("/v1/users", json={"address": f"a@{PRIMARY}", "password": secret}),
        await client.post("/v1/users", json={"address": f"b@{PRIMARY}", "password_hash": hashed}),
        await client.post("/v1/users", json={"address": f"c@{PRIMARY}", "password_hash": f"{{PLAIN}}{secret}"}),
        await client.post("/v1/users", json={"address": "bad", "password": [secret], "passwort": secret}),
        await client.post("/v1/users", content=f'{{"password": "{secret}"', headers=json_type),
        await client.post("/v1/users", content=f'{{"password": "{secret}"}}', headers={"content-type": "text/plain"}),
        await client.patch("/v1/users/1", json={"password": secret}),
        await visitor.get("/v1/me", headers={"Authorization": f"Bearer {token}"}),
        await visitor.get("/v1/me", headers={"Authorization": f"Bearer {token}x", "Cookie": secret}),
        await visitor.get("/v1/me", auth=("primary-000000000000", secret)),
        await visitor.get(f"/v1/me?password={secret}"),
        await visitor.post("/oauth/token", data={"grant_type": secret, "client_secret": secret}),
        await visitor.post("/oauth/token", files={"client_secret": ("name", secret.encode())}),
    ]
    logged = lines()
    assert [line["status"] for line in logged if line["event"] == "request"] == [each.status_code for each in answers]
    text = json.dumps(logged) + "".join(capfd.readouterr())
    for word in ("swordfish", "argon2id", token, token.rpartition(".")[2], "seven green"):
        assert word not in text
    for answer in answers[1:]:
        assert "swordfish" not in answer.text, answer.request.url


def test_an_error_without_a_field_names_none() -> None:
    request = Request({"type": "http", "method": "GET", "path": "/", "headers": [], "request_id": "x"})
    body = json.loads(bytes(error_response(request, errors.NotFound("No.")).body))
    assert "errors" not in body
    assert body["request_id"] == "x"
