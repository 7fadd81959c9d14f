"""`Call.write`: all or nothing, again when another was in the way, and no connection held after it."""

import asyncio
import sqlite3
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from asyncmy.errors import OperationalError as MariaDBError
from fastapi import FastAPI
from sqlalchemy import event, func, select, update
from sqlalchemy.exc import DBAPIError, OperationalError
from starlette.requests import Request

from app.addresses import DomainName
from app.db import Database
from app.errors import DomainExists
from app.models.audit_events import audit_events
from app.models.domains import DomainKind, domains
from app.models.hosts import hosts
from app.models.idempotency_keys import idempotency_keys
from app.permissions import Permission, Principal, Role
from app.services.changes import Change
from app.services.domains import create_domain
from app.services.hosts import create_host
from app.web.dependencies import TRIES, Call

pytestmark = pytest.mark.asyncio

ME = Principal("primary-1", "tests", Role.PRIMARY, frozenset(Permission))


def mariadb_error(number: int) -> DBAPIError:
    return OperationalError("UPDATE", {}, MariaDBError(number, "words"))


def sqlite_error(name: str) -> DBAPIError:
    error = sqlite3.OperationalError("words")
    error.sqlite_errorname = name
    return OperationalError("UPDATE", {}, error)


LOST = mariadb_error(2013)
BUSY = [mariadb_error(1213), mariadb_error(1205), mariadb_error(1020), sqlite_error("SQLITE_BUSY"), LOST]
BUSY += [sqlite_error("SQLITE_BUSY_SNAPSHOT"), sqlite_error("SQLITE_LOCKED_SHAREDCACHE")]
OTHERS: list[Exception] = [mariadb_error(1064), sqlite_error("SQLITE_CORRUPT"), sqlite_error("")]
OTHERS += [DomainExists("x"), RuntimeError("x"), TimeoutError(), ConnectionError()]


def words(error: Exception) -> str:
    return f"{type(error).__name__} {getattr(error, 'orig', '')}"


def call(api: FastAPI, *, method: str = "POST", key: str | None = None) -> Call:
    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": b"", "more_body": False}

    headers = [] if key is None else [(b"idempotency-key", key.encode())]
    scope = {"type": "http", "method": method, "path": "/x", "headers": headers, "query_string": b""}
    scope |= {"request_id": "test-request", "client": ("127.0.0.1", 1), "server": ("x", 80), "scheme": "http"}
    return Call(Request(scope, receive), ME, api.state.service)


def failing(errors: list[Exception]) -> tuple[Callable[[Change], Awaitable[int]], list[int]]:
    """Makes a domain, and fails after that as often as there are errors. And the list of its attempts."""
    attempts: list[int] = []

    async def make(change: Change) -> int:
        attempts.append(1)
        made = await create_domain(change, DomainName("example.org"), DomainKind.VIRTUAL)
        if len(attempts) <= len(errors):
            raise errors[len(attempts) - 1]
        return made

    return make, attempts


async def stored(database: Database) -> tuple[int, int, int]:
    """How many domains of this name, events of it and keys there are."""
    async with database.read.connect() as connection:
        counts = [
            select(func.count()).where(domains.c.name == "example.org"),
            select(func.count()).where(audit_events.c.subject_id == "example.org"),
            select(func.count()).select_from(idempotency_keys),
        ]
        one, two, three = [(await connection.execute(count)).scalar_one() for count in counts]
        return one, two, three


@pytest.mark.parametrize("key", [None, "k"])
@pytest.mark.parametrize("error", BUSY, ids=words)
async def test_what_ran_into_another_is_run_again_as_a_whole(
    api: FastAPI, database: Database, error: Exception, key: str | None
) -> None:
    make, attempts = failing([error] * (TRIES - 1))
    await call(api, key=key).write(make)
    assert (TRIES, len(attempts)) == (3, 3)
    assert await stored(database) == (1, 1, int(key is not None))


@pytest.mark.parametrize("error", BUSY, ids=words)
async def test_but_not_for_ever(api: FastAPI, database: Database, error: Exception) -> None:
    make, attempts = failing([error] * TRIES)
    with pytest.raises(DBAPIError) as raised:
        await call(api, key="k").write(make)
    assert raised.value is error
    assert len(attempts) == TRIES
    assert await stored(database) == (0, 0, 0)


@pytest.mark.parametrize("error", OTHERS, ids=words)
async def test_nothing_else_is_run_again_and_nothing_is_half_done(
    api: FastAPI, database: Database, error: Exception
) -> None:
    make, attempts = failing([error])
    with pytest.raises(type(error)):
        await call(api, key="k").write(make)
    assert len(attempts) == 1
    assert await stored(database) == (0, 0, 0)
    assert api.state.service.database.write.sync_engine.pool.checkedout() == 0
    await call(api, key="k").write(make)
    assert await stored(database) == (1, 1, 1)


async def test_a_connection_that_is_lost_while_it_commits_may_have_committed(api: FastAPI) -> None:
    make, attempts = failing([])
    engine = api.state.service.database.write.sync_engine

    def lose(connection: Any) -> None:
        raise LOST

    event.listen(engine, "commit", lose)
    with pytest.raises(DBAPIError):
        await call(api).write(make)
    event.remove(engine, "commit", lose)
    assert len(attempts) == 1


async def test_a_caller_who_leaves_leaves_nothing_half_done(api: FastAPI, database: Database) -> None:
    reached = asyncio.Event()

    async def slow(change: Change) -> int:
        made = await create_domain(change, DomainName("example.org"), DomainKind.VIRTUAL)
        reached.set()
        await asyncio.sleep(60)
        return made

    task = asyncio.create_task(call(api).write(slow))
    await reached.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await stored(database) == (0, 0, 0)
    assert api.state.service.database.write.sync_engine.pool.checkedout() == 0


async def test_a_get_takes_no_key(api: FastAPI, database: Database) -> None:
    make, _ = failing([])
    await call(api, method="PATCH", key="k").write(make)
    assert await stored(database) == (1, 1, 0)


@pytest.mark.parametrize("test_database", ["mariadb"], indirect=True)
async def test_a_real_deadlock_is_survived(api: FastAPI, database: Database) -> None:
    """SQLite has one writer at a time, and so none."""
    both = asyncio.Barrier(2)
    attempts: list[str] = []

    async def crossing(change: Change, first: str, second: str) -> str:
        attempts.append(first)
        await change.connection.execute(update(hosts).where(hosts.c.name == first).values(version=hosts.c.version + 1))
        if len(attempts) <= 2:
            await both.wait()
        await change.connection.execute(update(hosts).where(hosts.c.name == second).values(version=hosts.c.version + 1))
        return first

    await call(api).write(create_host, "a")
    await call(api).write(create_host, "b")
    await asyncio.gather(call(api).write(crossing, "a", "b"), call(api).write(crossing, "b", "a"))
    assert len(attempts) == 3
    async with database.read.connect() as connection:
        rows = await connection.execute(select(hosts.c.version).where(hosts.c.name.in_(["a", "b"])))
        assert list(rows.scalars()) == [3, 3]


async def test_the_connection_is_back_before_the_workers_are_woken(
    api: FastAPI, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[int, Path]] = []
    pool: Any = api.state.service.database.write.sync_engine.pool
    monkeypatch.setattr(
        "app.web.dependencies.wake_workers", lambda directory: seen.append((pool.checkedout(), directory))
    )
    make, _ = failing([])
    await call(api).write(make)
    assert seen == [(0, api.state.service.settings.wake_directory)]
    with pytest.raises(DomainExists):
        await call(api).write(make)
    assert len(seen) == 1, "nothing was changed, nobody is woken"
