"""Every route says who may call it, and means it."""

from collections.abc import Callable
from typing import Annotated, Any

import httpx
import pytest
from fastapi import APIRouter, Depends, FastAPI

from app.main import build_app
from app.permissions import Permission
from app.web.dependencies import PUBLIC, Call, Needs, Route
from tests.conftest import anonymous

PUBLIC_ROUTES = "none"
ANY_CLIENT = "any client"

WHO: dict[tuple[str, str], str] = {
    ("GET", "/v1/users"): Permission.USERS_READ,
    ("POST", "/v1/users"): Permission.USERS_WRITE,
    ("GET", "/v1/users/{user}"): Permission.USERS_READ,
    ("PATCH", "/v1/users/{user}"): Permission.USERS_WRITE,
    ("DELETE", "/v1/users/{user}"): Permission.USERS_WRITE,
    ("POST", "/v1/users/{user}/restore"): Permission.USERS_WRITE,
    ("POST", "/v1/users/{user}/purge"): Permission.USERS_PURGE,
    ("GET", "/v1/users/{user}/send-as"): Permission.ALIASES_READ,
    ("GET", "/v1/send-as"): Permission.ALIASES_READ,
    ("GET", "/v1/aliases"): Permission.ALIASES_READ,
    ("POST", "/v1/aliases"): Permission.ALIASES_WRITE,
    ("GET", "/v1/aliases/{alias}"): Permission.ALIASES_READ,
    ("PATCH", "/v1/aliases/{alias}"): Permission.ALIASES_WRITE,
    ("DELETE", "/v1/aliases/{alias}"): Permission.ALIASES_WRITE,
    ("GET", "/v1/addresses/{address}"): Permission.ADDRESSES_READ,
    ("GET", "/v1/jobs"): Permission.JOBS_READ,
    ("GET", "/v1/jobs/{job}"): Permission.JOBS_READ,
    ("POST", "/v1/jobs/{job}/retry"): Permission.JOBS_RETRY,
    ("GET", "/v1/domains"): Permission.DOMAINS_READ,
    ("POST", "/v1/domains"): Permission.DOMAINS_WRITE,
    ("GET", "/v1/domains/{domain}"): Permission.DOMAINS_READ,
    ("DELETE", "/v1/domains/{domain}"): Permission.DOMAINS_WRITE,
    ("GET", "/v1/hosts"): Permission.HOSTS_READ,
    ("POST", "/v1/hosts"): Permission.HOSTS_WRITE,
    ("GET", "/v1/hosts/{host}"): Permission.HOSTS_READ,
    ("PATCH", "/v1/hosts/{host}"): Permission.HOSTS_WRITE,
    ("DELETE", "/v1/hosts/{host}"): Permission.HOSTS_WRITE,
    ("GET", "/v1/me"): ANY_CLIENT,
    ("POST", "/oauth/token"): PUBLIC_ROUTES,
    ("GET", "/.well-known/jwks.json"): PUBLIC_ROUTES,
    ("GET", "/livez"): PUBLIC_ROUTES,
    ("GET", "/readyz"): PUBLIC_ROUTES,
    ("GET", "/problems"): PUBLIC_ROUTES,
    ("GET", "/problems/{slug}"): PUBLIC_ROUTES,
}
"""Written by hand: a new route is a new line, and somebody thought about it."""

VALUES = {
    "user": "1",
    "alias": "1",
    "address": "a@b.test",
    "job": "1",
    "domain": "b.test",
    "host": "mail",
    "slug": "forbidden",
}


def test_the_table_names_every_operation_and_no_other() -> None:
    paths = build_app().openapi()["paths"]
    declared = {
        (method.upper(), path): operation.get("x-permission", PUBLIC_ROUTES)
        for path, operations in paths.items()
        for method, operation in operations.items()
    }
    assert declared == WHO


def test_every_permission_opens_something() -> None:
    assert set(Permission) <= set(WHO.values())


async def _send(client: httpx.AsyncClient, method: str, path: str) -> httpx.Response:
    # A body that is well formed and wrong: no answer may come from looking at it.
    body = {"json": {}} if method in ("POST", "PATCH") and path != "/oauth/token" else {}
    return await client.request(method, path.format_map(VALUES), **body)  # type: ignore[arg-type]


@pytest.mark.asyncio
async def test_without_credentials_and_without_permission(api: FastAPI, make_client: Callable[..., Any]) -> None:
    powerless = await make_client(only_none=True)
    async with anonymous(api) as visitor:
        for (method, path), permission in WHO.items():
            unknown, known = await _send(visitor, method, path), await _send(powerless, method, path)
            if permission == PUBLIC_ROUTES:
                assert unknown.status_code in (200, 400), path
                continue
            assert unknown.status_code == 401, (method, path)
            if permission == ANY_CLIENT:
                assert known.status_code == 200, path
            else:
                assert (known.status_code, known.json().get("missing")) == (403, permission), (method, path)


@pytest.mark.asyncio
async def test_each_permission_opens_its_own_routes_only(make_client: Callable[..., Any]) -> None:
    for mine in Permission:
        client = await make_client(mine)
        for (method, path), permission in WHO.items():
            if permission in (PUBLIC_ROUTES, ANY_CLIENT):
                continue
            answer = await _send(client, method, path)
            assert (answer.status_code == 403) == (permission != mine), (mine, method, path, answer.text)


async def _handler() -> None: ...


async def _with_call(call: Annotated[Call, Depends(Needs(Permission.USERS_READ))]) -> None: ...


async def _with_two(
    one: Annotated[Call, Depends(Needs(Permission.USERS_READ))],
    two: Annotated[Call, Depends(Needs(Permission.USERS_WRITE))],
) -> None: ...


@pytest.mark.parametrize(
    ("handler", "options"),
    [(_handler, {}), (_with_two, {}), (_with_call, {"dependencies": [PUBLIC]}), (_handler, {"dependencies": []})],
)
def test_a_route_that_does_not_say_who_may_call_it_does_not_import(
    handler: Callable[..., Any], options: dict[str, Any]
) -> None:
    router = APIRouter(route_class=Route)
    with pytest.raises(TypeError, match="declare exactly one permission, or PUBLIC"):
        router.get("/x", **options)(handler)


@pytest.mark.parametrize(("handler", "options"), [(_with_call, {}), (_handler, {"dependencies": [PUBLIC]})])
def test_and_one_that_does_is_fine(handler: Callable[..., Any], options: dict[str, Any]) -> None:
    APIRouter(route_class=Route).get("/x", **options)(handler)


def test_every_router_uses_that_route() -> None:
    """Only the documentation is served by plain routes."""
    plain = set()
    for route in build_app().routes:
        router = getattr(route, "original_router", None)
        for each in router.routes if router is not None else [route]:
            if not isinstance(each, Route):
                plain.add(each.path)  # type: ignore[attr-defined]
    assert plain == {"/docs", "/docs/init.js", "/docs/style.css", "/docs/static", "/openapi.json"}
