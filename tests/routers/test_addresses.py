"""Whether an address can be had, and if not, why not; where its mail goes, and who may send as it."""

from collections.abc import Callable
from typing import Any

import httpx
import pytest

from app.db import Database
from app.permissions import Permission
from tests.conftest import PRIMARY
from tests.routers.accounts import ALICE, make_alias, make_user, stand

pytestmark = pytest.mark.asyncio


async def report(client: httpx.AsyncClient, address: str) -> tuple[Any, ...]:
    answer = await client.get(f"/v1/addresses/{address}")
    assert answer.status_code == 200, answer.text
    body = answer.json()
    assert body.keys() == {"address", "status", "detail", "user_id", "alias_id", "route", "senders"}
    assert body["detail"].endswith(".")
    return body["address"], body["status"], body["user_id"], body["alias_id"]


async def route(client: httpx.AsyncClient, address: str) -> list[tuple[str, str, list[str]]]:
    hops = (await client.get(f"/v1/addresses/{address}")).json()["route"]
    return [(hop["address"].partition("@")[0], hop["kind"], hop["leads_to"]) for hop in hops]


async def test_each_status(client: httpx.AsyncClient) -> None:
    made = await make_user(client, "alice")
    gone = await make_user(client, "bob")
    await client.delete(f"/v1/users/{gone['id']}")
    await client.post("/v1/domains", json={"name": "relay.test", "kind": "relay"})
    await client.post("/v1/domains", json={"name": "virtual.test", "kind": "virtual"})
    pr, abuse = await make_alias(client, "pr", ALICE), await make_alias(client, "abuse", ALICE)
    expected = {
        ALICE: ("user", made["id"], None),
        f"bob@{PRIMARY}": ("tombstone", gone["id"], None),
        f"pr@{PRIMARY}": ("alias", None, pr["id"]),
        f"abuse@{PRIMARY}": ("alias", None, abuse["id"]),  # reserved for aliases, and this one is
        f"postmaster@{PRIMARY}": ("reserved", None, None),
        "alice@nowhere.test": ("no_domain", None, None),
        "alice@relay.test": ("no_domain", None, None),
        "alice@virtual.test": ("free", None, None),
        f"carol@{PRIMARY}": ("free", None, None),
    }
    for address, status in expected.items():
        assert await report(client, address) == (address, *status)


async def test_what_is_said_to_be_free_is(client: httpx.AsyncClient) -> None:
    assert (await report(client, f"carol@{PRIMARY}"))[1] == "free"
    made = await client.post("/v1/users", json={"address": f"carol@{PRIMARY}"})
    assert await report(client, f"CAROL@{PRIMARY.upper()}") == (f"carol@{PRIMARY}", "user", made.json()["id"], None)


async def test_where_its_mail_goes_hop_by_hop(client: httpx.AsyncClient, worker_database: Database) -> None:
    alice = await make_user(client, "alice")
    await make_user(client, "bob")
    await client.post("/v1/domains", json={"name": "lists.test", "kind": "relay"})
    low = await make_alias(client, "low", ALICE, "Team@lists.test")
    await make_alias(client, "high", low["address"], f"bob@{PRIMARY}", ALICE)
    bob = f"bob@{PRIMARY}"
    everything = [
        ("high", "alias", [low["address"], bob, ALICE]),
        ("low", "alias", [ALICE, "Team@lists.test"]),
        ("bob", "user", []),
        ("alice", "user", []),
        ("Team", "outside", []),
    ]
    assert await route(client, f"high@{PRIMARY}") == everything, "each once, nearest first"
    assert await route(client, ALICE) == [("alice", "user", [])]
    for nowhere in (f"carol@{PRIMARY}", "somebody@nowhere.test", "team@lists.test"):
        assert await route(client, nowhere) == []
    await client.delete(f"/v1/users/{alice['id']}")
    assert await route(client, ALICE) == [], "a tombstone"
    assert await route(client, f"low@{PRIMARY}") == [("low", "alias", ["Team@lists.test"]), ("Team", "outside", [])]
    # A successor of the address is not where the alias leads.
    await make_user(client, "alice", reuse_address=True)
    assert await route(client, f"low@{PRIMARY}") == [("low", "alias", ["Team@lists.test"]), ("Team", "outside", [])]
    await client.delete(f"/v1/aliases/{low['id']}")
    await make_alias(client, "low", bob)
    assert await route(client, f"high@{PRIMARY}") == [("high", "alias", [bob]), ("bob", "user", [])]


async def test_who_may_send_as_it(client: httpx.AsyncClient, worker_database: Database) -> None:
    for name in ("alice", "bob"):
        await stand(worker_database, await make_user(client, name))
    pr = await make_alias(client, "pr", ALICE, kind="send_as", designated=[f"bob@{PRIMARY}", ALICE])

    async def senders(address: str) -> Any:
        return (await client.get(f"/v1/addresses/{address}")).json()["senders"]

    assert await senders(pr["address"]) == [ALICE, f"bob@{PRIMARY}"]
    assert await senders(ALICE) == [ALICE]
    await client.patch(f"/v1/aliases/{pr['id']}", json={"designated": []})
    assert await senders(pr["address"]) == []


async def test_without_aliases_read_only_free_or_why_not(
    client: httpx.AsyncClient, make_client: Callable[..., Any]
) -> None:
    await make_user(client, "alice")
    await make_alias(client, "pr", ALICE)
    reader = await make_client(Permission.ADDRESSES_READ)
    body = (await reader.get(f"/v1/addresses/pr@{PRIMARY}")).json()
    assert (body["status"], body["alias_id"], body["route"], body["senders"]) == ("alias", None, None, None)


@pytest.mark.parametrize("address", ["alice", f"alice+x@{PRIMARY}", f"älice@{PRIMARY}", f"a..b@{PRIMARY}", "a@b", "@"])
async def test_what_is_no_address_of_ours(client: httpx.AsyncClient, address: str) -> None:
    answer = await client.get(f"/v1/addresses/{address}")
    assert (answer.status_code, answer.json()["errors"][0]["parameter"]) == (422, "address")
