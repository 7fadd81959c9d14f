"""Engines: what is left of a transaction, and what survives a server that went away."""

import asyncio
from datetime import UTC, datetime, timedelta, timezone

import pytest
from sqlalchemy import insert, select, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncConnection

from app.db import Database, is_lost
from app.models.domains import domains
from tests.conftest import TestDatabase
from tests.stack.mariadb import MariaDB

pytestmark = pytest.mark.asyncio

INSERT = "INSERT INTO addresses (address, kind, subject_id) VALUES ('a@b.test', 'alias', 1)"


async def count(connection: AsyncConnection) -> int:
    return int((await connection.execute(text("SELECT COUNT(*) FROM addresses"))).scalar_one())


@pytest.mark.parametrize("cut_off_by", ["cancelled", "error"])
async def test_a_transaction_that_is_cut_off_leaves_nothing_in_the_pool(
    test_database: TestDatabase, cut_off_by: str
) -> None:
    """Connections are given back without a ROLLBACK of the pool's own: the block must have done it."""
    database = Database(test_database.url("api"), pool_size=1)
    begun = asyncio.Event()

    async def half() -> None:
        async with database.write.connect() as connection, connection.begin():
            await connection.execute(text(INSERT))
            begun.set()
            if cut_off_by == "error":
                raise KeyError
            await asyncio.sleep(60)

    task = asyncio.create_task(half())
    await begun.wait()
    task.cancel()
    with pytest.raises((asyncio.CancelledError, KeyError)):
        await task
    async with database.write.connect() as connection:
        if test_database.kind == "mariadb":
            assert (await connection.execute(text("SELECT @@in_transaction"))).scalar_one() == 0
        assert await count(connection) == 0
    await database.close()


async def test_cancelled_while_a_statement_runs(mariadb: MariaDB) -> None:
    mariadb.empty()
    database = Database(mariadb.url("api"), pool_size=1)

    async def half() -> None:
        async with database.write.connect() as connection, connection.begin():
            await connection.execute(text(INSERT))
            await connection.execute(text("SELECT SLEEP(5)"))

    for _ in range(5):
        task = asyncio.create_task(half())
        await asyncio.sleep(0.05)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        async with database.write.connect() as connection:
            assert (await connection.execute(text("SELECT @@in_transaction"))).scalar_one() == 0
            assert await count(connection) == 0
    await database.close()


async def test_reading_goes_on_after_a_restart_and_says_when_the_server_is_away(mariadb: MariaDB) -> None:
    mariadb.empty()
    database = Database(mariadb.url("api"))
    assert await database.reading(count) == 0
    mariadb.restart()
    assert await database.reading(count) == 0
    mariadb.stop()
    try:
        with pytest.raises(DBAPIError) as error:
            await database.reading(count)
        assert is_lost(error.value)
    finally:
        mariadb.restart()
    assert await database.reading(count) == 0
    await database.close()


async def test_times_keep_their_microseconds_and_their_zone(test_database: TestDatabase) -> None:
    database = Database(test_database.url("api"))
    at = datetime(2026, 3, 29, 3, 30, 0, 123456, tzinfo=timezone(timedelta(hours=2)))
    async with database.write.begin() as connection:
        values = {"name": "a.test", "kind": "virtual", "version": 1, "created_at": at, "updated_at": at}
        await connection.execute(insert(domains), values)
    async with database.read.connect() as connection:
        found = (await connection.execute(select(domains.c.created_at))).scalar_one()
    assert found == at
    assert found.tzinfo is UTC
    await database.close()
