"""A new password with the current one, or by those who need not know it."""

import asyncio
import statistics
import time
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
import pytest_asyncio
from fastapi import FastAPI
from sqlalchemy import select, update

from app.credentials.passwords import hash_password, password_matches
from app.db import Database
from app.models.audit_events import audit_events
from app.models.jobs import jobs
from app.models.login_failures import login_failures
from app.models.notices import notices
from app.models.users import users
from app.permissions import Role
from tests.conftest import PRIMARY, Clock, anonymous
from tests.routers.accounts import ALICE, credentials_of, make_user

pytestmark = pytest.mark.asyncio

OLD = "thirteen quiet ferries at noon"
NEW = "seven green lanterns over the harbour"
OTHER = "eleven brown foxes below the bridge"
PATH = f"/v1/users/{ALICE}/password"
Client = httpx.AsyncClient


@pytest_asyncio.fixture(params=[Role.WEBMAIL, Role.WEBSITE])
async def service(request: pytest.FixtureRequest, api: FastAPI, seeded: Database) -> AsyncIterator[Client]:
    """A client that must know the current password."""
    async with anonymous(api) as made:
        made.auth = await credentials_of(seeded, request.param)
        yield made


@pytest_asyncio.fixture
async def alice(client: Client) -> dict[str, Any]:
    return await make_user(
        client, "alice", contact_address="alice@example.net", password=OLD, display_name="Alice Example"
    )


async def rows(database: Database, query: Any) -> list[Any]:
    async with database.read.connect() as connection:
        return list((await connection.execute(query)).all())


async def stored(database: Database) -> Any:
    (row,) = await rows(database, select(users).where(users.c.address == ALICE))
    return row


async def test_the_current_password_opens_the_way_to_a_new_one(
    service: Client, alice: dict[str, Any], seeded: Database, clock: Clock
) -> None:
    clock.forward(minutes=5)
    answer = await service.put(PATH, json={"current_password": OLD, "password": NEW})
    body = answer.json()
    assert (answer.status_code, answer.headers["cache-control"]) == (202, "no-store")
    assert (body["id"], body["version"], body["ready"]) == (alice["id"], 2, False)
    assert "example.net" not in answer.text, "webmail may not read the account"
    row = await stored(seeded)
    assert await password_matches(NEW, row.password_hash)
    assert row.access_ended_at == clock()
    [job] = await rows(seeded, select(jobs).where(jobs.c.kind == "mailbox.sync", jobs.c.version == 2))
    assert job.id == body["job"]["id"]
    [notice] = await rows(seeded, select(notices))
    assert (notice.kind, notice.recipient) == ("password_changed", "alice@example.net")
    [entry] = await rows(seeded, select(audit_events).where(audit_events.c.action == "users.set-password"))
    assert entry.user_id == alice["id"]
    for secret in (OLD, NEW, row.password_hash):
        assert secret not in str(list(entry)) + str(list(notice))


async def test_who_must_send_it_is_told(service: Client, alice: dict[str, Any], seeded: Database) -> None:
    before = await stored(seeded)
    answer = await service.put(PATH, json={"password": NEW})
    assert (answer.status_code, answer.json()["errors"][0]["pointer"]) == (422, "/current_password")
    assert await stored(seeded) == before


async def _prepare(client: Client, database: Database, which: str) -> tuple[str, str]:
    """The account to name, and the password that would have been right."""
    path = PATH
    match which:
        case "another password":
            return path, "wrong"
        case "unknown":
            return f"/v1/users/nobody@{PRIMARY}/password", OLD
        case "unknown id":
            return "/v1/users/987654/password", OLD
        case "no password":
            async with database.write.begin() as connection:
                await connection.execute(update(users).values(password_hash=None))
        case "suspended":
            await client.patch(f"/v1/users/{ALICE}", json={"state": "suspended"})
        case "locked":
            await client.post(f"/v1/users/{ALICE}/lock")
        case "deleted":
            await client.delete(f"/v1/users/{ALICE}")
        case "deleted id":
            path = f"/v1/users/{(await client.delete(f'/v1/users/{ALICE}')).json()['id']}/password"
    return path, OLD


CLOSED = (
    "another password",
    "unknown",
    "unknown id",
    "no password",
    "suspended",
    "locked",
    "deleted",
    "deleted id",
)


@pytest.mark.parametrize("which", CLOSED)
@pytest.mark.parametrize("service", [Role.WEBMAIL], indirect=True)
async def test_a_wrong_one_is_refused_and_counted_whatever_the_account(
    client: Client, service: Client, alice: dict[str, Any], seeded: Database, which: str
) -> None:
    path, current = await _prepare(client, seeded, which)
    before = await rows(seeded, select(users))
    answer = await service.put(path, json={"current_password": current, "password": NEW})
    problem = answer.json()
    assert (answer.status_code, problem["type"], problem["detail"]) == (
        403,
        "/problems/wrong-password",
        "The current password is wrong.",
    )
    assert set(problem) == {"type", "title", "status", "detail", "remedy", "request_id"}
    assert await rows(seeded, select(users)) == before
    [failure] = await rows(seeded, select(login_failures))
    assert (failure.kind, failure.attempts) == ("mail", 1)
    assert OLD not in str(list(failure))


async def test_guessing_is_refused_as_a_login_is(service: Client, alice: dict[str, Any]) -> None:
    statuses = []
    for number in range(12):
        body = {"current_password": f"guess {number}", "password": NEW}
        statuses.append((await service.put(PATH, json=body)).status_code)
    assert statuses == [403] * 10 + [429] * 2
    right = await service.put(PATH, json={"current_password": OLD, "password": NEW})
    assert (right.status_code, right.json()["type"]) == (429, "/problems/too-many-tries")


@pytest.mark.parametrize("service", [Role.WEBMAIL], indirect=True)
async def test_nobodys_account_costs_as_much_as_somebodys(
    service: Client, alice: dict[str, Any], seeded: Database
) -> None:
    """Half of it is the hash: without it, an unknown account would be told by the clock."""

    spent: dict[str, list[float]] = {PATH: [], f"/v1/users/nobody@{PRIMARY}/password": []}
    for number in range(5):
        for path, times in spent.items():
            started = time.process_time()  # of all threads: the hash is made in one, and other programs do not count
            await service.put(path, json={"current_password": f"wrong {number}", "password": NEW})
            times.append(time.process_time() - started)
    known, unknown = map(statistics.median, spent.values())
    assert 0.6 < known / unknown < 1.6


@pytest.mark.parametrize(
    ("password", "says"),
    [
        ("q7-x9-z2", "too short"),
        ("alice.example.2026", "the name of its owner"),
        ("qwertyuiopasdfgh", "a row of the alphabet or the keyboard"),
        ("passwordpassword", "attackers try first"),
        ("x" * 257, "256"),
        ("seven green\tlanterns over", "control character"),
    ],
)
@pytest.mark.parametrize("service", [Role.WEBMAIL], indirect=True)
async def test_the_rule_that_failed_is_named(
    service: Client, alice: dict[str, Any], seeded: Database, password: str, says: str
) -> None:
    answer = await service.put(PATH, json={"current_password": OLD, "password": password})
    error = answer.json()["errors"][0]
    assert (answer.status_code, error["pointer"]) == (422, "/password")
    assert says in error["detail"]
    assert password not in answer.text
    assert (await stored(seeded)).version == 1


@pytest.mark.parametrize(
    "password", ["a long one without any capital or digit", "Grüße vom Möwenfelsen 🐦", " " * 3 + "leading blanks stay"]
)
async def test_no_rule_of_composition(client: Client, alice: dict[str, Any], seeded: Database, password: str) -> None:
    assert (await client.put(PATH, json={"password": password})).status_code == 202
    assert await password_matches(password, (await stored(seeded)).password_hash)


async def test_an_administrator_need_not_know_it(client: Client, alice: dict[str, Any], seeded: Database) -> None:
    assert (await client.put(PATH, json={"password": NEW})).status_code == 202
    wrong = await client.put(PATH, json={"password": OTHER, "current_password": "but if it is sent, it counts"})
    assert wrong.status_code == 403
    assert await password_matches(NEW, (await stored(seeded)).password_hash)


@pytest.mark.parametrize(
    ("which", "status"), [("unknown", 404), ("unknown id", 404), ("deleted id", 409), ("suspended", 202)]
)
async def test_an_administrator_sees_what_is_there(
    client: Client, alice: dict[str, Any], seeded: Database, which: str, status: int
) -> None:
    path, _ = await _prepare(client, seeded, which)
    assert (await client.put(path, json={"password": NEW})).status_code == status


async def test_an_owner_changes_their_own_and_the_token_ends(
    api: FastAPI, service: Client, client: Client, alice: dict[str, Any]
) -> None:
    await make_user(client, "bob", password=OLD)
    token = (await service.post(f"/v1/users/{ALICE}/owner-tokens")).json()["access_token"]
    async with anonymous(api) as owner:
        owner.headers["Authorization"] = f"Bearer {token}"
        body = {"current_password": OLD, "password": NEW}
        assert (await owner.put(f"/v1/users/bob@{PRIMARY}/password", json=body)).status_code == 403
        assert (await owner.put(PATH, json={"password": NEW})).status_code == 422
        assert (await owner.get("/v1/me")).status_code == 200
        assert (await owner.put(PATH, json=body)).status_code == 202
        assert (await owner.get("/v1/me")).status_code == 401


async def test_rank_holds_for_passwords_too(
    api: FastAPI, client: Client, alice: dict[str, Any], seeded: Database
) -> None:
    await credentials_of(seeded, Role.PRIMARY, user_id=alice["id"])
    async with anonymous(api) as secondary:
        secondary.auth = await credentials_of(seeded, Role.SECONDARY)
        for method, path, body in (
            ("PUT", PATH, {"password": NEW}),
            ("POST", f"/v1/users/{ALICE}/lock", {}),
            ("POST", f"/v1/users/{ALICE}/unlock", None),
        ):
            answer = await secondary.request(method, path, json=body)
            assert (answer.status_code, answer.json()["type"]) == (403, "/problems/outranked")
    assert (await stored(seeded)).version == 1


@pytest.mark.parametrize("service", [Role.WEBMAIL], indirect=True)
async def test_of_two_with_the_same_current_password_one_wins(
    service: Client, alice: dict[str, Any], seeded: Database
) -> None:
    """Both were right when they were looked at; by then the second one's is no longer the current one."""
    bodies = [{"current_password": OLD, "password": password} for password in (NEW, OTHER)]
    answers = await asyncio.gather(*(service.put(PATH, json=body) for body in bodies))
    assert sorted(answer.status_code for answer in answers) == [202, 403]
    row = await stored(seeded)
    assert row.version == 2
    assert await password_matches((NEW, OTHER)[[a.status_code for a in answers].index(202)], row.password_hash)


@pytest.mark.parametrize("service", [Role.WEBMAIL], indirect=True)
async def test_a_hash_that_only_dovecot_reads_leads_to_a_reset(
    service: Client, alice: dict[str, Any], seeded: Database
) -> None:
    async with seeded.write.begin() as connection:
        await connection.execute(update(users).values(password_hash="{MD5-CRYPT}$1$salt$qJH7.N4xYta3aEG/dfqo/0"))
    answer = await service.put(PATH, json={"current_password": "x", "password": NEW})
    assert (answer.status_code, answer.json()["type"]) == (409, "/problems/password-unreadable")
    assert "reset" in answer.json()["remedy"]


async def test_the_hash_is_made_while_no_connection_is_held(
    api: FastAPI, client: Client, alice: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    database: Database = api.state.service.database
    held: list[int] = []

    async def note(password: str) -> str:
        held.extend(engine.pool.checkedout() for engine in (database.read, database.write))  # type: ignore[attr-defined]
        return await hash_password(password)

    monkeypatch.setattr("app.routers.passwords.hash_password", note)
    assert (await client.put(PATH, json={"password": NEW})).status_code == 202
    assert held == [0, 0]
