"""Who is slowed or refused, as /v1/lockouts has it, and lifting that."""

from datetime import datetime, timedelta
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from sqlalchemy import insert, select

from app.db import Database
from app.models.audit_events import audit_events
from app.models.login_failures import login_failures
from app.web.throttle import Throttle
from tests.conftest import PRIMARY, Clock
from tests.routers.accounts import make_user

pytestmark = pytest.mark.asyncio

ALICE = f"alice@{PRIMARY}"


async def wrote(database: Database, now: datetime, tries: list[tuple[str, str, str]], *, kind: str = "mail") -> None:
    """Login, network and guess of each; a minute between them, the last one now."""
    values = [
        {
            "kind": kind,
            "login": login,
            "network": network,
            "guess": guess,
            "attempts": 2,
            "first_at": now - timedelta(minutes=len(tries) - 1 - number),
            "last_at": now - timedelta(minutes=len(tries) - 1 - number),
        }
        for number, (login, network, guess) in enumerate(tries)
    ]
    async with database.write.begin() as connection:
        await connection.execute(insert(login_failures), values)


async def listed(client: httpx.AsyncClient, **query: Any) -> list[dict[str, Any]]:
    answer = await client.get("/v1/lockouts", params=query)
    assert answer.status_code == 200, answer.text
    return list(answer.json()["items"])


def short(lockout: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(lockout[name] for name in ("kind", "login", "network", "state", "guesses"))


async def test_nobody(client: httpx.AsyncClient) -> None:
    assert await listed(client) == []


async def test_by_login_by_network_and_by_both(client: httpx.AsyncClient, seeded: Database, clock: Clock) -> None:
    here, now = "192.0.2.1/32", clock.now
    await wrote(seeded, now, [(ALICE, here, f"{n:x}") for n in range(12)])
    await wrote(seeded, now, [(ALICE, here, "known"), (f"bob@{PRIMARY}", here, "1")])
    await wrote(seeded, now, [(f"carol@{PRIMARY}", f"10.0.{n}.0/32", f"{n % 35:x}") for n in range(40)])
    found = await listed(client)
    assert sorted(map(short, found), key=str) == sorted(
        [
            ("mail", ALICE, here, "refused", 12),
            ("mail", None, here, "slowed", 13),
            ("mail", f"carol@{PRIMARY}", None, "slowed", 35),
        ],
        key=str,
    )
    refused = next(each for each in found if each["state"] == "refused")
    assert refused["attempts"] == 24
    # Twelve, a minute apart, of which nine are let through: when the third has left the window.
    assert refused["refused_until"] == f"{now + timedelta(minutes=60 - 9):%Y-%m-%dT%H:%M:%SZ}"
    assert refused["ends_at"] == f"{now + timedelta(minutes=60):%Y-%m-%dT%H:%M:%SZ}"


async def test_what_it_says_is_what_dovecot_is_answered(api: FastAPI, client: httpx.AsyncClient, clock: Clock) -> None:
    throttle: Throttle = api.state.service.throttle
    await make_user(client, "alice")
    for number in range(12):
        await throttle.report(ALICE, "192.0.2.1", f"{number:03x}", success=False, rejected=False, app_password_id=None)
        status = await throttle.allow(ALICE, "192.0.2.1", "fff")
        found = await listed(client, login=ALICE, network="192.0.2.1/32")
        state = found[0]["state"] if found else None
        assert state == ("refused" if status < 0 else "slowed" if number >= 2 else None), number
    clock.now = datetime.fromisoformat(found[0]["refused_until"])
    assert await throttle.allow(ALICE, "192.0.2.1", "fff") >= 0


async def test_a_shared_source_is_refused_by_login_only(
    client: httpx.AsyncClient, seeded: Database, clock: Clock
) -> None:
    await wrote(seeded, clock.now, [(f"user{n}@{PRIMARY}", "shared", "1") for n in range(50)])
    assert await listed(client) == []
    await wrote(seeded, clock.now, [(ALICE, "shared", f"{n:x}") for n in range(29)])
    assert await listed(client) == []
    await wrote(seeded, clock.now, [(ALICE, "shared", f"b{n:x}") for n in range(29)])
    assert sorted(map(short, await listed(client)), key=str) == sorted(
        [("mail", ALICE, "shared", "slowed", 58), ("mail", ALICE, None, "slowed", 58)], key=str
    )


async def test_kinds_have_limits_of_their_own(client: httpx.AsyncClient, seeded: Database, clock: Clock) -> None:
    await wrote(
        seeded, clock.now, [("primary-0123456789ab", f"10.0.{n}.0/32", f"{n:x}") for n in range(90)], kind="api"
    )
    assert await listed(client) == [], "what all networks try at a client shuts it out nowhere"
    await wrote(seeded, clock.now, [(ALICE, f"10.0.{n}.0/32", f"{n:x}") for n in range(5)], kind="reset")
    assert list(map(short, await listed(client))) == [("reset", ALICE, None, "refused", 5)]


async def test_pages(client: httpx.AsyncClient, seeded: Database, clock: Clock) -> None:
    for name in ("a1", "b2", "c3", "d4", "e5"):
        await wrote(seeded, clock.now, [(f"{name}@{PRIMARY}", "192.0.2.1/32", f"{n:x}") for n in range(3)])
    seen, url = [], "/v1/lockouts?limit=2"
    for _ in range(3):
        answer = await client.get(url)
        seen += [each["login"] for each in answer.json()["items"]]
        url = answer.links["next"]["url"] if answer.links else ""
    assert sorted(filter(None, seen)) == [f"{name}@{PRIMARY}" for name in ("a1", "b2", "c3", "d4", "e5")]
    assert (len(seen), url) == (6, f"/v1/lockouts?limit=2&cursor={url.partition('cursor=')[2]}")


@pytest.mark.parametrize("which", ["pair", "network", "login"])
async def test_lifting_forgets_what_it_is_about_and_is_recorded(
    client: httpx.AsyncClient, seeded: Database, clock: Clock, which: str
) -> None:
    here, there = "192.0.2.1/32", "2001:db8:0:1::/64"
    for network in (here, there):
        await wrote(seeded, clock.now, [(ALICE, network, f"{n:x}{network[0]}") for n in range(50)])
        await wrote(seeded, clock.now, [(ALICE, network, "known"), (f"bob@{PRIMARY}", network, "1")])
    login = None if which == "network" else ALICE
    network = None if which == "login" else here
    (lockout,) = [each for each in await listed(client) if (each["login"], each["network"]) == (login, network)]
    assert (await client.delete(f"/v1/lockouts/{lockout['id']}")).status_code == 204
    again = await client.delete(f"/v1/lockouts/{lockout['id']}")
    assert (again.status_code, again.json()["type"]) == (404, "/problems/not-found")
    async with seeded.read.connect() as connection:
        left = (await connection.execute(select(login_failures))).all()
        query = select(audit_events).where(
            audit_events.c.action == "lockouts.lift", audit_events.c.outcome == "accepted"
        )
        event = (await connection.execute(query)).one()
    assert len([row for row in left if row.guess == "known"]) == 2
    others = {(row.login, row.network) for row in left if row.guess != "known"}
    bob = f"bob@{PRIMARY}"
    assert (
        others
        == {
            "pair": {(ALICE, there), (bob, here), (bob, there)},
            "network": {(ALICE, there), (bob, there)},
            "login": {(bob, here), (bob, there)},
        }[which]
    )
    assert (event.subject_kind, event.subject_id) == ("lockout", login or network)
    records = {"pair": 50, "network": 51, "login": 100}[which]
    assert event.before == {"kind": "mail", "login": login, "network": network, "records": records}


@pytest.mark.parametrize("lockout", ["AAAA", "bWFpbAAA", "bWFpbABhAA-_", "____", "bWFpbADDvAA", "x" * 513])
async def test_an_id_that_is_none(client: httpx.AsyncClient, lockout: str) -> None:
    assert (await client.delete(f"/v1/lockouts/{lockout}")).status_code == (404 if len(lockout) < 513 else 422)
