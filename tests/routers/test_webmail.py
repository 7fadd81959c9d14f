"""What a webmail reads at login."""

from collections.abc import Callable
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from app.db import Database, utc_now
from app.permissions import Permission
from app.queue.claim import Outcome
from app.web.recent import SECONDS
from app.workers.host.rows import write_applied
from tests.conftest import HOST, PRIMARY

pytestmark = pytest.mark.asyncio

ALICE, BOB = f"alice@{PRIMARY}", f"bob@{PRIMARY}"
URL = f"/v1/webmail/{ALICE}/identities"
PROOFS = {"maildir": {"result": "ok", "detail": None}}


class Later:
    """The time of the answers that are kept."""

    def __init__(self, api: FastAPI) -> None:
        self.now = 0.0
        api.state.service.recent_identities._clock = lambda: self.now

    def __call__(self) -> None:
        self.now += SECONDS + 0.1


@pytest.fixture
def later(api: FastAPI) -> Later:
    return Later(api)


async def make(client: httpx.AsyncClient, worker: Database, address: str, **members: Any) -> dict[str, Any]:
    user: dict[str, Any] = (await client.post("/v1/users", json={"address": address, **members})).json()
    await stands(worker, user)
    return user


async def stands(worker: Database, user: dict[str, Any]) -> None:
    """As its host reports."""
    await write_applied(worker, HOST, user["id"], Outcome(user["version"], True, PROOFS, {}), utc_now())


async def test_who_one_is(client: httpx.AsyncClient, worker_database: Database, later: Later) -> None:
    user = await make(client, worker_database, ALICE, display_name="Alice Müller", quota_bytes=1 << 30)
    await make(client, worker_database, BOB)
    pr = {"address": f"pr@{PRIMARY}", "kind": "send_as", "destinations": [BOB], "designated": [ALICE]}
    made = (await client.post("/v1/aliases", json=pr)).json()
    await client.post(
        "/v1/aliases", json={"address": f"help@{PRIMARY}", "kind": "receive_only", "destinations": [ALICE]}
    )
    answer = await client.get(f"/v1/webmail/Alice@{PRIMARY.upper()}/identities")
    assert answer.status_code == 200
    assert answer.json() == {
        "address": ALICE,
        "display_name": "Alice Müller",
        "quota_bytes": 1 << 30,
        "identities": [
            {"address": ALICE, "reason": "own"},
            {"address": f"pr@{PRIMARY}", "reason": "designated"},
        ],
    }
    assert answer.headers["cache-control"] == "private, no-cache"
    later()
    same = await client.get(URL, headers={"If-None-Match": answer.headers["etag"]})
    assert (same.status_code, same.content, same.headers["etag"]) == (304, b"", answer.headers["etag"])

    assert (await client.patch(f"/v1/aliases/{made['id']}", json={"designated": [BOB]})).status_code in (200, 202)
    later()
    gone = await client.get(URL, headers={"If-None-Match": answer.headers["etag"]})
    assert (gone.status_code, gone.json()["identities"]) == (200, [{"address": ALICE, "reason": "own"}])
    assert gone.headers["etag"] != answer.headers["etag"]

    suspended = (await client.patch(f"/v1/users/{user['id']}", json={"state": "suspended"})).json()
    await stands(worker_database, suspended)
    later()
    assert (await client.get(URL)).json()["identities"] == []


async def test_an_answer_is_a_second_old_at_most(
    client: httpx.AsyncClient, worker_database: Database, later: Later
) -> None:
    user = await make(client, worker_database, ALICE, display_name="Alice")
    first = await client.get(URL)
    await client.patch(f"/v1/users/{user['id']}", json={"display_name": "Another"})
    assert (await client.get(URL)).headers["etag"] == first.headers["etag"], "of this very moment"
    later()
    second = await client.get(URL)
    assert second.json()["display_name"] == "Another"
    assert second.headers["etag"] != first.headers["etag"]


async def test_nobody_and_nothing(client: httpx.AsyncClient, worker_database: Database, later: Later) -> None:
    for address, status in ((BOB, 404), (f"pr@{PRIMARY}", 404), ("1", 422), ("bob", 422), ("bob@", 422)):
        answer = await client.get(f"/v1/webmail/{address}/identities")
        assert (answer.status_code, answer.headers["content-type"]) == (status, "application/problem+json")
    user = await make(client, worker_database, ALICE)
    assert (await client.get(URL)).status_code == 200
    await client.delete(f"/v1/users/{user['id']}")
    later()
    assert (await client.get(URL)).status_code == 404, "a deleted account has no identity, and no successor has its"


async def test_of_accounts_that_are_not_ready_nothing_is_offered(client: httpx.AsyncClient) -> None:
    await client.post("/v1/users", json={"address": ALICE})
    assert (await client.get(URL)).json()["identities"] == []


async def test_what_is_kept_opens_to_nobody_else(
    client: httpx.AsyncClient, worker_database: Database, make_client: Callable[..., Any]
) -> None:
    await make(client, worker_database, ALICE)
    assert (await (await make_client(Permission.IDENTITIES_READ)).get(URL)).status_code == 200
    assert (await (await make_client(Permission.USERS_READ)).get(URL)).status_code == 403
