"""Who may send as what: every reason there is. That Postfix and the From rule say the same is tested with them."""

from typing import Any

import httpx
import pytest
import pytest_asyncio

from app.db import Database
from app.services.senders import Reason
from tests.conftest import PRIMARY
from tests.routers.accounts import ALICE, BOB, make_alias, make_user, stand

pytestmark = pytest.mark.asyncio

CAROL = f"carol@{PRIMARY}"
"""Designated, and suspended."""
DAVE = f"dave@{PRIMARY}"
"""Designated, and no host has made the mailbox yet."""
PR = f"pr@{PRIMARY}"


@pytest_asyncio.fixture
async def world(client: httpx.AsyncClient, worker_database: Database) -> httpx.AsyncClient:
    for name in ("alice", "bob", "carol", "dave", "gone"):
        user = await make_user(client, name)
        if name != "dave":
            await stand(worker_database, user)
        if name == "carol":
            await client.patch(f"/v1/users/{user['id']}", json={"state": "suspended"})
        if name == "gone":
            await client.delete(f"/v1/users/{user['id']}")
    await client.post("/v1/domains", json={"name": "lists.test", "kind": "relay"})
    await make_alias(client, "pr", ALICE, kind="send_as", designated=[BOB, CAROL, DAVE])
    await make_alias(client, "quiet", BOB, kind="send_as")
    await make_alias(client, "info", BOB)
    return client


async def judge(client: httpx.AsyncClient, login: str, sender: str) -> tuple[bool, str]:
    answer = await client.get("/v1/send-as", params={"login": login, "from": sender})
    assert answer.status_code == 200, answer.text
    body = answer.json()
    assert body.keys() == {"allowed", "reason", "detail"}
    assert body["detail"].endswith(".")
    return body["allowed"], body["reason"]


REASONS = [
    (ALICE, ALICE, Reason.OWN),
    (ALICE.upper(), "Alice@CACERT.test", Reason.OWN),
    (ALICE, f"ALICE+list+x@{PRIMARY}", Reason.OWN),
    (BOB, PR, Reason.DESIGNATED),
    (BOB, f"Pr+x@{PRIMARY}", Reason.DESIGNATED),
    (ALICE, PR, Reason.NOT_DESIGNATED),  # though its mail goes there
    (BOB, f"quiet@{PRIMARY}", Reason.NOT_DESIGNATED),  # nobody is
    (BOB, f"info@{PRIMARY}", Reason.RECEIVE_ONLY),
    (ALICE, BOB, Reason.SOMEBODY_ELSES),
    (ALICE, f"nobody@{PRIMARY}", Reason.NOBODYS),
    (ALICE, f"gone@{PRIMARY}", Reason.NOBODYS),
    (ALICE, f"+alice@{PRIMARY}", Reason.NOBODYS),
    (ALICE, "alice@example.net", Reason.NOT_OURS),
    (ALICE, "alice@lists.test", Reason.NOT_OURS),
    (CAROL, CAROL, Reason.SUSPENDED),
    (CAROL, PR, Reason.SUSPENDED),
    (DAVE, DAVE, Reason.NOT_READY),
    (DAVE, PR, Reason.NOT_READY),
    (DAVE, BOB, Reason.SOMEBODY_ELSES),
    (f"nobody@{PRIMARY}", ALICE, Reason.NO_SUCH_LOGIN),
    (f"gone@{PRIMARY}", f"gone@{PRIMARY}", Reason.NO_SUCH_LOGIN),
    (PR, PR, Reason.NO_SUCH_LOGIN),
]


async def test_every_reason(world: httpx.AsyncClient) -> None:
    for login, sender, reason in REASONS:
        allowed = reason in (Reason.OWN, Reason.DESIGNATED)
        assert await judge(world, login, sender) == (allowed, reason), (login, sender)
    assert {reason for _, _, reason in REASONS} == set(Reason)


async def test_what_an_account_may_send_as(world: httpx.AsyncClient) -> None:
    async def found(key: object) -> list[tuple[str, str]]:
        answer = await world.get(f"/v1/users/{key}/send-as")
        assert answer.status_code == 200, answer.text
        return [(item["address"], item["reason"]) for item in answer.json()["items"]]

    await make_alias(world, "alpha", ALICE, kind="send_as", designated=[BOB])
    assert await found(BOB) == [(BOB, "own"), (f"alpha@{PRIMARY}", "designated"), (PR, "designated")]
    bob = (await world.get(f"/v1/users/{BOB}")).json()
    assert await found(bob["id"]) == await found(BOB.upper())
    assert await found(ALICE) == [(ALICE, "own")]
    assert await found(CAROL) == await found(DAVE) == []
    assert (await world.get(f"/v1/users/{PR}/send-as")).status_code == 404
    assert (await world.get(f"/v1/users/nobody@{PRIMARY}/send-as")).status_code == 404
    await world.delete(f"/v1/users/{bob['id']}")
    assert await found(bob["id"]) == []


async def test_it_ends_and_returns_with_the_account_and_no_successor_has_it(
    world: httpx.AsyncClient, worker_database: Database
) -> None:
    bob = (await world.get(f"/v1/users/{BOB}")).json()
    await world.delete(f"/v1/users/{bob['id']}")
    assert await judge(world, BOB, PR) == (False, "no_such_login")
    await stand(worker_database, successor := await make_user(world, "bob", reuse_address=True))
    assert await judge(world, BOB, BOB) == (True, "own")
    assert await judge(world, BOB, PR) == (False, "not_designated")
    answer = await world.get(f"/v1/users/{bob['id']}/send-as")
    assert answer.json() == {"login": BOB, "items": []}, "the deleted one's, not the successor's"
    assert (await world.get(f"/v1/users/{successor['id']}/send-as")).json()["items"] == [
        {"address": BOB, "reason": "own"}
    ]


async def test_who_is_no_longer_designated_may_not(world: httpx.AsyncClient) -> None:
    await world.patch(f"/v1/aliases/{PR}", json={"designated": [ALICE]})
    assert (await judge(world, BOB, PR), await judge(world, ALICE, PR)) == (
        (False, "not_designated"),
        (True, "designated"),
    )
    await world.delete(f"/v1/aliases/{PR}")
    assert await judge(world, ALICE, PR) == (False, "nobodys")


@pytest.mark.parametrize(
    "parameters",
    [
        {},
        {"login": ALICE},
        {"from": ALICE},
        {"login": "alice", "from": ALICE},
        {"login": ALICE, "from": "alice"},
        {"login": ALICE, "from": ""},
        {"login": ALICE, "from": f"älice@{PRIMARY}"},
        {"login": ALICE, "from": f"{ALICE}\n"},
        {"login": ALICE, "from": f"a{chr(0)}@{PRIMARY}"},
        {"login": ALICE, "from": f"{'x' * 300}@{PRIMARY}"},
        {"login": ALICE, "from": f"<{ALICE}>"},
        {"login": f"alice+x@{PRIMARY}", "from": ALICE},
        {"login": ALICE, "sender": ALICE},
    ],
)
async def test_what_is_no_question(client: httpx.AsyncClient, parameters: dict[str, Any]) -> None:
    answer = await client.get("/v1/send-as", params=parameters)
    assert (answer.status_code, answer.headers["content-type"]) == (422, "application/problem+json")
