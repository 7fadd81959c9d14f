"""Every route says who may call it, and means it."""

from collections.abc import AsyncIterator, Callable
from typing import Annotated, Any

import httpx
import pytest
import pytest_asyncio
from fastapi import APIRouter, Depends, FastAPI

from app.db import Database, utc_now
from app.main import build_app
from app.permissions import Permission, Role
from app.services.changes import Change
from app.services.principals import create_principal
from app.web.dependencies import PUBLIC, Call, Needs, Route
from tests.conftest import ACTOR, anonymous
from tests.routers.accounts import make_user

PUBLIC_ROUTES = "none"
ANY_CLIENT = "any client"

# What it needs, and which roles it is open to. `primary` and `secondary` may do everything, so they are not named.
# `owner` is the owner of the very account that the path names; the owner of another one may do nothing here.
WHO: dict[tuple[str, str], tuple[str, str]] = {
    ("GET", "/v1/users"): (Permission.USERS_READ, "auditor website"),
    ("POST", "/v1/users"): (Permission.USERS_WRITE, "website"),
    ("GET", "/v1/users/{user}"): (Permission.USERS_READ, "auditor website owner"),
    ("PATCH", "/v1/users/{user}"): (Permission.USERS_WRITE, "website"),
    ("DELETE", "/v1/users/{user}"): (Permission.USERS_WRITE, "website"),
    ("POST", "/v1/users/{user}/restore"): (Permission.USERS_WRITE, "website"),
    ("POST", "/v1/users/{user}/purge"): (Permission.USERS_PURGE, ""),
    ("GET", "/v1/users/{user}/summary"): (Permission.USERS_SUMMARY, "limited"),
    ("POST", "/v1/users/{user}/lock"): (Permission.USERS_LOCK, ""),
    ("POST", "/v1/users/{user}/unlock"): (Permission.USERS_LOCK, ""),
    ("PUT", "/v1/users/{user}/password"): (Permission.PASSWORDS_CHANGE, "website webmail owner"),
    ("POST", "/v1/password-resets"): (Permission.RESETS_REQUEST, "limited website"),
    ("GET", "/v1/password-resets/{reset}"): (Permission.RESETS_WRITE, "limited"),
    ("POST", "/v1/password-resets/confirm"): (PUBLIC_ROUTES, ""),
    ("GET", "/v1/users/{user}/app-passwords"): (Permission.APP_PASSWORDS_READ, "auditor owner"),
    ("POST", "/v1/users/{user}/app-passwords"): (Permission.APP_PASSWORDS_WRITE, "owner"),
    ("GET", "/v1/users/{user}/app-passwords/{app_password}"): (Permission.APP_PASSWORDS_READ, "auditor owner"),
    ("DELETE", "/v1/users/{user}/app-passwords/{app_password}"): (Permission.APP_PASSWORDS_WRITE, "owner"),
    ("GET", "/v1/users/{user}/send-as"): (Permission.ALIASES_READ, "auditor website owner"),
    ("GET", "/v1/send-as"): (Permission.ALIASES_READ, "auditor website"),
    ("GET", "/v1/aliases"): (Permission.ALIASES_READ, "auditor website"),
    ("POST", "/v1/aliases"): (Permission.ALIASES_WRITE, ""),
    ("GET", "/v1/aliases/{alias}"): (Permission.ALIASES_READ, "auditor website"),
    ("PATCH", "/v1/aliases/{alias}"): (Permission.ALIASES_WRITE, ""),
    ("DELETE", "/v1/aliases/{alias}"): (Permission.ALIASES_WRITE, ""),
    ("GET", "/v1/addresses/{address}"): (Permission.ADDRESSES_READ, "auditor website"),
    ("GET", "/v1/jobs"): (Permission.JOBS_READ, "auditor website"),
    ("GET", "/v1/jobs/{job}"): (Permission.JOBS_READ, "auditor website"),
    ("POST", "/v1/jobs/{job}/retry"): (Permission.JOBS_RETRY, ""),
    ("GET", "/v1/domains"): (Permission.DOMAINS_READ, "auditor website"),
    ("POST", "/v1/domains"): (Permission.DOMAINS_WRITE, ""),
    ("GET", "/v1/domains/{domain}"): (Permission.DOMAINS_READ, "auditor website"),
    ("GET", "/v1/domains/{domain}/dns"): (Permission.DOMAINS_READ, "auditor website"),
    ("POST", "/v1/domains/{domain}/dns/publish"): (Permission.DOMAINS_WRITE, ""),
    ("GET", "/v1/domains/{domain}/dns/health"): (Permission.DOMAINS_READ, "auditor website"),
    ("PATCH", "/v1/domains/{domain}"): (Permission.DOMAINS_WRITE, ""),
    ("DELETE", "/v1/domains/{domain}"): (Permission.DOMAINS_WRITE, ""),
    ("GET", "/v1/domains/{domain}/senders"): (Permission.DOMAINS_READ, "auditor website"),
    ("POST", "/v1/domains/{domain}/senders"): (Permission.DOMAINS_WRITE, ""),
    ("GET", "/v1/domains/{domain}/senders/{sender}"): (Permission.DOMAINS_READ, "auditor website"),
    ("DELETE", "/v1/domains/{domain}/senders/{sender}"): (Permission.DOMAINS_WRITE, ""),
    ("GET", "/v1/domains/{domain}/dkim-keys"): (Permission.DKIM_KEYS_READ, "auditor"),
    ("POST", "/v1/domains/{domain}/dkim-keys"): (Permission.DKIM_KEYS_WRITE, ""),
    ("POST", "/v1/domains/{domain}/dkim-keys/rotate"): (Permission.DKIM_KEYS_WRITE, ""),
    ("GET", "/v1/domains/{domain}/dkim-keys/{selector}"): (Permission.DKIM_KEYS_READ, "auditor"),
    ("DELETE", "/v1/domains/{domain}/dkim-keys/{selector}"): (Permission.DKIM_KEYS_WRITE, ""),
    ("POST", "/v1/domains/{domain}/dkim-keys/{selector}/activate"): (Permission.DKIM_KEYS_WRITE, ""),
    ("GET", "/v1/hosts"): (Permission.HOSTS_READ, "auditor"),
    ("POST", "/v1/hosts"): (Permission.HOSTS_WRITE, ""),
    ("GET", "/v1/hosts/{host}"): (Permission.HOSTS_READ, "auditor"),
    ("PATCH", "/v1/hosts/{host}"): (Permission.HOSTS_WRITE, ""),
    ("DELETE", "/v1/hosts/{host}"): (Permission.HOSTS_WRITE, ""),
    ("GET", "/v1/principals"): (Permission.PRINCIPALS_READ, "auditor"),
    ("POST", "/v1/principals"): (Permission.PRINCIPALS_WRITE, ""),
    ("GET", "/v1/principals/{principal}"): (Permission.PRINCIPALS_READ, "auditor"),
    ("PATCH", "/v1/principals/{principal}"): (Permission.PRINCIPALS_WRITE, ""),
    ("POST", "/v1/principals/{principal}/rotate"): (Permission.PRINCIPALS_WRITE, ""),
    ("POST", "/v1/principals/{principal}/certificates"): (Permission.PRINCIPALS_WRITE, ""),
    ("POST", "/v1/principals/{principal}/keys/{key}/revoke"): (Permission.PRINCIPALS_WRITE, ""),
    ("POST", "/v1/users/{user}/owner-tokens"): (Permission.OWNER_TOKENS_WRITE, "website webmail"),
    ("GET", "/v1/audit-events"): (Permission.AUDIT_READ, "auditor owner"),
    ("GET", "/v1/lockouts"): (Permission.LOCKOUTS_READ, "auditor"),
    ("DELETE", "/v1/lockouts/{lockout}"): (Permission.LOCKOUTS_WRITE, ""),
    # Public only as far as principals go: it wants a secret of its own, see tests/routers/test_auth_policy.py.
    ("POST", "/dovecot/auth-policy"): (PUBLIC_ROUTES, ""),
    ("GET", "/v1/webmail/{address}/identities"): (Permission.IDENTITIES_READ, "auditor webmail"),
    ("GET", "/v1/me"): (ANY_CLIENT, "limited auditor website webmail owner"),
    ("POST", "/oauth/token"): (PUBLIC_ROUTES, ""),
    ("GET", "/.well-known/jwks.json"): (PUBLIC_ROUTES, ""),
    ("GET", "/.well-known/mta-sts.txt"): (PUBLIC_ROUTES, ""),
    ("GET", "/.well-known/autoconfig/mail/config-v1.1.xml"): (PUBLIC_ROUTES, ""),
    ("GET", "/mail/config-v1.1.xml"): (PUBLIC_ROUTES, ""),
    ("GET", "/livez"): (PUBLIC_ROUTES, ""),
    ("GET", "/readyz"): (PUBLIC_ROUTES, ""),
    ("GET", "/problems"): (PUBLIC_ROUTES, ""),
    ("GET", "/problems/{slug}"): (PUBLIC_ROUTES, ""),
}
"""Written by hand: a new route is a new line, and somebody thought about it."""

VALUES = {
    "user": "1",
    "alias": "1",
    "reset": "1",
    "app_password": "1",
    "address": "a@b.test",
    "job": "1",
    "domain": "b.test",
    "selector": "202611a",
    "sender": "1",
    "host": "mail",
    "principal": "website-000000000000",
    "key": "1",
    "slug": "forbidden",
    "lockout": "bWFpbABhAGI",
}


WIDENING = {Permission.PASSWORDS_SET}
"""These open no route of their own: they widen what another one does."""

ROLES = ("primary", "secondary", "limited", "auditor", "website", "webmail", "owner", "owner of another", "nobody")


def _operations() -> dict[tuple[str, str], str]:
    """What the routes themselves say they need, whether or not the document shows them."""
    found = {}
    for route in build_app().routes:
        router = getattr(route, "original_router", None)
        for each in router.routes if router is not None else [route]:
            if isinstance(each, Route):
                needs = PUBLIC_ROUTES if each.needs is None else each.needs.permission or ANY_CLIENT
                found |= {(method, each.path): needs for method in each.methods or ()}
    return found


def test_the_table_names_every_operation_and_no_other() -> None:
    assert _operations() == {operation: needed for operation, (needed, _) in WHO.items()}


def test_the_document_says_the_same() -> None:
    paths = build_app().openapi()["paths"]
    declared = {
        (method.upper(), path): operation.get("x-permission", PUBLIC_ROUTES)
        for path, operations in paths.items()
        for method, operation in operations.items()
    }
    assert declared.items() <= _operations().items()
    assert {path for _, path in _operations().items() - declared.items()} <= {PUBLIC_ROUTES}, "only pages are left out"


def test_every_permission_opens_something() -> None:
    assert set(Permission) - WIDENING <= {needed for needed, _ in WHO.values()}
    assert not WIDENING & {needed for needed, _ in WHO.values()}


async def _send(client: httpx.AsyncClient, method: str, path: str) -> httpx.Response:
    # A body that is well formed and wrong: no answer may come from looking at it.
    body = {"json": {}} if method in ("POST", "PATCH", "PUT") and path != "/oauth/token" else {}
    return await client.request(method, path.format_map(VALUES), **body)  # type: ignore[arg-type]


@pytest_asyncio.fixture
async def caller(
    api: FastAPI, seeded: Database, client: httpx.AsyncClient, request: pytest.FixtureRequest
) -> AsyncIterator[httpx.AsyncClient]:
    """Of the role in the parameter. The account that VALUES names is there, and another one."""
    mine, others = [(await make_user(client, name))["id"] for name in ("alice", "bob")]
    assert VALUES["user"] == str(mine)
    async with anonymous(api) as made:
        if request.param.startswith("owner"):
            account = mine if request.param == "owner" else others
            token = (await client.post(f"/v1/users/{account}/owner-tokens")).json()["access_token"]
            made.headers["Authorization"] = f"Bearer {token}"
        elif request.param != "nobody":
            async with seeded.write.begin() as connection:
                change = Change(connection, ACTOR, utc_now())
                made.auth = httpx.BasicAuth(*await create_principal(change, "caller", Role(request.param)))
        yield made


def _may(role: str, path: str, needed: str, listed: str) -> bool:
    if needed == PUBLIC_ROUTES or role in ("primary", "secondary"):
        return True
    if role == "owner of another":  # of an account that the path does not name
        return "owner" in listed.split() and "{user}" not in path
    return role in listed.split()


@pytest.mark.asyncio
@pytest.mark.parametrize(("caller", "role"), [(role, role) for role in ROLES], indirect=["caller"], ids=ROLES)
async def test_each_role_may_do_what_is_written_and_nothing_else(caller: httpx.AsyncClient, role: str) -> None:
    wrong = []
    for (method, path), (needed, listed) in WHO.items():
        answer = await _send(caller, method, path)
        refused = answer.status_code == (401 if role == "nobody" else 403)
        assert refused or answer.status_code not in (401, 403), (method, path, answer.text)
        assert answer.status_code < 500, (method, path, answer.text)
        if refused == _may(role, path, needed, listed):
            wrong.append((method, path, answer.status_code))
    assert not wrong


@pytest.mark.asyncio
async def test_a_missing_permission_is_named_everywhere(make_client: Callable[..., Any]) -> None:
    powerless = await make_client(only_none=True)
    for (method, path), (needed, _) in WHO.items():
        answer = await _send(powerless, method, path)
        if needed == ANY_CLIENT:
            assert answer.status_code == 200, path
        elif needed != PUBLIC_ROUTES:
            assert (answer.status_code, answer.json().get("missing")) == (403, needed), (method, path)


@pytest.mark.asyncio
async def test_each_permission_opens_its_own_routes_only(make_client: Callable[..., Any]) -> None:
    for mine in Permission:
        client = await make_client(mine)
        for (method, path), (needed, _) in WHO.items():
            if needed in (PUBLIC_ROUTES, ANY_CLIENT):
                continue
            answer = await _send(client, method, path)
            assert (answer.status_code == 403) == (needed != mine), (mine, method, path, answer.text)


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
    """Only pages are served by plain routes: the documentation, and the one where a new password is set."""
    plain = set()
    for route in build_app().routes:
        router = getattr(route, "original_router", None)
        for each in router.routes if router is not None else [route]:
            if not isinstance(each, Route):
                plain.add(each.path)  # type: ignore[attr-defined]
    documentation = {"/docs", "/docs/init.js", "/docs/style.css", "/docs/static", "/openapi.json"}
    assert plain == documentation | {"/reset", "/reset/page.js", "/reset/style.css"}
