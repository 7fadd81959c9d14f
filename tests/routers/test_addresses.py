"""Whether an address can be had, and if not, why not."""

from typing import Any

import httpx
import pytest
from sqlalchemy import insert

from app.db import Database
from app.models.addresses import addresses
from tests.conftest import PRIMARY

pytestmark = pytest.mark.asyncio


async def report(client: httpx.AsyncClient, address: str) -> tuple[Any, ...]:
    answer = await client.get(f"/v1/addresses/{address}")
    assert answer.status_code == 200, answer.text
    body = answer.json()
    assert body.keys() == {"address", "status", "detail", "user_id"}
    assert body["detail"].endswith(".")
    return body["address"], body["status"], body["user_id"]


async def test_each_status(client: httpx.AsyncClient, database: Database) -> None:
    made = await client.post("/v1/users", json={"address": f"alice@{PRIMARY}"})
    gone = await client.post("/v1/users", json={"address": f"bob@{PRIMARY}"})
    await client.delete(f"/v1/users/{gone.json()['id']}")
    await client.post("/v1/domains", json={"name": "relay.test", "kind": "relay"})
    await client.post("/v1/domains", json={"name": "virtual.test", "kind": "virtual"})
    async with database.write.begin() as connection:
        alias = {"address": f"pr@{PRIMARY}", "kind": "alias", "subject_id": 7}
        await connection.execute(insert(addresses), alias)
        await connection.execute(insert(addresses), {**alias, "address": f"abuse@{PRIMARY}"})
    expected = {
        f"alice@{PRIMARY}": ("user", made.json()["id"]),
        f"bob@{PRIMARY}": ("tombstone", gone.json()["id"]),
        f"pr@{PRIMARY}": ("alias", None),
        f"abuse@{PRIMARY}": ("alias", None),  # reserved for aliases, and this one is
        f"postmaster@{PRIMARY}": ("reserved", None),
        "alice@nowhere.test": ("no_domain", None),
        "alice@relay.test": ("no_domain", None),
        "alice@virtual.test": ("free", None),
        f"carol@{PRIMARY}": ("free", None),
    }
    for address, status in expected.items():
        assert await report(client, address) == (address, *status)


async def test_what_is_said_to_be_free_is(client: httpx.AsyncClient) -> None:
    assert (await report(client, f"carol@{PRIMARY}"))[1] == "free"
    made = await client.post("/v1/users", json={"address": f"carol@{PRIMARY}"})
    assert await report(client, f"CAROL@{PRIMARY.upper()}") == (f"carol@{PRIMARY}", "user", made.json()["id"])


@pytest.mark.parametrize("address", ["alice", f"alice+x@{PRIMARY}", f"älice@{PRIMARY}", f"a..b@{PRIMARY}", "a@b", "@"])
async def test_what_is_no_address_of_ours(client: httpx.AsyncClient, address: str) -> None:
    answer = await client.get(f"/v1/addresses/{address}")
    assert (answer.status_code, answer.json()["errors"][0]["parameter"]) == (422, "address")
