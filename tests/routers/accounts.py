"""Accounts and aliases made over HTTP, and what a worker would write of them."""

from typing import Any

import httpx
from sqlalchemy import update

from app.db import Database, utc_now
from app.models.hosts import hosts
from app.permissions import Role
from app.queue.claim import Outcome, record
from app.queue.contracts import ALIASES_SYNC, MAILBOX_SYNC
from app.services.changes import Change
from app.services.principals import create_principal
from tests.conftest import ACTOR, HOST, PRIMARY

ALICE = f"alice@{PRIMARY}"
BOB = f"bob@{PRIMARY}"
FINE = {"postfix": {"result": "ok", "detail": None}}


async def make_user(client: httpx.AsyncClient, name: str, **members: Any) -> dict[str, Any]:
    answer = await client.post("/v1/users", json={"address": f"{name}@{PRIMARY}", **members})
    assert answer.status_code == 202, answer.text
    return dict(answer.json())


async def post_alias(client: httpx.AsyncClient, name: str, *destinations: str, **members: Any) -> httpx.Response:
    address = name if "@" in name else f"{name}@{PRIMARY}"
    body = {"address": address, "kind": "receive_only", "destinations": destinations, **members}
    return await client.post("/v1/aliases", json=body)


async def make_alias(client: httpx.AsyncClient, name: str, *destinations: str, **members: Any) -> dict[str, Any]:
    answer = await post_alias(client, name, *destinations, **members)
    assert answer.status_code == 202, answer.text
    return dict(answer.json())


async def stand(database: Database, user: dict[str, Any]) -> None:
    """As the worker would: the mailbox is in place."""
    async with database.write.begin() as connection:
        await record(connection, HOST, MAILBOX_SYNC, user["id"], Outcome(user["version"], True, FINE, {}), utc_now())


async def apply(database: Database, alias_id: int, version: int, *, host: str = HOST, proofs: Any = FINE) -> None:
    """As the worker would: this version is what its Postfix answers."""
    async with database.write.begin() as connection:
        await record(connection, host, ALIASES_SYNC, alias_id, Outcome(version, True, proofs, {}), utc_now())


async def turn_srs(database: Database, on: bool) -> None:
    async with database.write.begin() as connection:
        await connection.execute(update(hosts).values(settings={"srs": True} if on else {}))


async def credentials_of(database: Database, role: Role, **options: Any) -> httpx.BasicAuth:
    """Of a new principal with all that its role has."""
    async with database.write.begin() as connection:
        made = await create_principal(Change(connection, ACTOR, utc_now()), f"a {role}", role, **options)
    return httpx.BasicAuth(*made)
