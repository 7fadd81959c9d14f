"""Engines: what is left of a transaction, and what survives a server that went away."""

import asyncio
import gc
import random
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest
import uvloop
from sqlalchemy import insert, select, text
from sqlalchemy.exc import DBAPIError, IntegrityError
from sqlalchemy.ext.asyncio import AsyncConnection

from app.db import Database, duplicate_of, end_tasks, insert_by_driver, is_lost
from app.models.domains import domains
from tests.conftest import TestDatabase
from tests.stack.certificates import make_certificates
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


async def test_a_statement_past_sqlalchemy_fails_like_any_other(mariadb: MariaDB) -> None:
    """It is in the transaction, its errors are SQLAlchemy's, and neither they nor a cancellation leave anything in the pool."""
    mariadb.empty()
    database = Database(mariadb.url("api"), pool_size=1)
    statement = "INSERT INTO addresses (address, kind, subject_id) VALUES (%s, %s, %s)"

    async def add(address: str) -> None:
        async with database.write.connect() as connection, connection.begin():
            await insert_by_driver(connection, statement, [address, "alias", 1])
            await connection.execute(text("SELECT 1"))
            if address == "half@b.test":
                await insert_by_driver(connection, "SELECT SLEEP(%s)", [5])

    await add("it's; \\ -- %s@b.test")
    with pytest.raises(IntegrityError) as duplicate:
        await add("it's; \\ -- %s@b.test")
    assert duplicate_of(duplicate.value) == "primary"
    for _ in range(5):
        task = asyncio.create_task(add("half@b.test"))
        await asyncio.sleep(0.05)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        async with database.write.connect() as connection:
            assert (await connection.execute(text("SELECT @@in_transaction"))).scalar_one() == 0
            rows = (await connection.execute(text("SELECT address FROM addresses"))).scalars()
            assert list(rows) == ["it's; \\ -- %s@b.test"]

    async def killed() -> None:
        async with database.write.connect() as connection, connection.begin():
            number = (await connection.execute(text("SELECT CONNECTION_ID()"))).scalar_one()
            mariadb.sql(f"KILL {number}", "api")
            await insert_by_driver(connection, statement, ["b@b.test", "alias", 1])

    with pytest.raises(DBAPIError) as lost:
        await killed()
    assert is_lost(lost.value)
    await add("c@b.test")
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


# TLS


async def ciphers(url: str, ca_file: Path | None) -> list[str]:
    """What each engine's connection is encrypted with, or why there is none."""
    database = Database(url, ca_file=ca_file)
    found: list[str] = []
    for engine in (database.read, database.write):
        try:
            async with engine.connect() as connection:
                found.append((await connection.execute(text("SHOW STATUS LIKE 'Ssl_cipher'"))).one()[1])
        except DBAPIError as error:
            found.append(f"{'lost' if is_lost(error) else 'refused'}: {error.orig}")
    await database.close()
    return found


@pytest.mark.parametrize("run", [asyncio.run, uvloop.run])  # the API's loop is uvloop's
async def test_with_a_ca_the_connection_is_encrypted(mariadb: MariaDB, run: Callable[[Any], list[str]]) -> None:
    found = await asyncio.to_thread(run, ciphers(mariadb.url("api"), mariadb.ca_file))
    assert [cipher[:4] for cipher in found] == ["TLS_", "TLS_"]
    assert await ciphers(mariadb.url("api"), None) == ["", ""]


async def test_a_server_of_another_ca_is_refused(mariadb: MariaDB, scratch: Path) -> None:
    make_certificates(scratch, names=["another.test"])
    for said in await ciphers(mariadb.url("api"), scratch / "ca.pem"):
        assert said.startswith(
            "lost: (2003, \"Can't connect to MySQL server on '127.0.0.1' ([SSL: CERTIFICATE_VERIFY_FAILED]"
        )


async def test_a_server_with_another_name_is_refused(mariadb: MariaDB) -> None:
    for said in await ciphers(mariadb.url("api").replace("@127.0.0.1:", "@localhost:"), mariadb.ca_file):
        assert said.startswith(
            "lost: (2003, \"Can't connect to MySQL server on 'localhost' ([SSL: CERTIFICATE_VERIFY_FAILED]"
        )
        assert "certificate is not valid for 'localhost'" in said


@pytest.fixture
def tls_only(mariadb: MariaDB) -> Iterator[str]:
    """The URL of a user who has to come over TLS."""
    mariadb.sql("CREATE USER tls_only@'%' IDENTIFIED BY 'secret' REQUIRE SSL; GRANT SHOW VIEW ON *.* TO tls_only@'%'")
    yield f"mysql+asyncmy://tls_only:secret@127.0.0.1:{mariadb.port}/cacertusers"
    mariadb.sql("DROP USER tls_only@'%'")


async def test_who_has_to_come_over_tls_is_refused_without(mariadb: MariaDB, tls_only: str) -> None:
    for said in await ciphers(tls_only, None):
        assert said.startswith("refused: (1045, \"Access denied for user 'tls_only'@'127.0.0.1'")
    assert [cipher[:4] for cipher in await ciphers(tls_only, mariadb.ca_file)] == ["TLS_", "TLS_"]


async def test_a_ca_file_that_cannot_be_used_is_named(scratch: Path) -> None:
    missing, empty = scratch / "missing.pem", scratch / "empty.pem"
    empty.touch()
    for file in (missing, empty):
        with pytest.raises(OSError, match=f"^DATABASE_CA_FILE: {file}: .*(No such file|no certificate)"):
            Database("mysql+asyncmy://api:secret@127.0.0.1/cacertusers", ca_file=file)


@pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning")  # the driver drops some of those that are cut off
async def test_tasks_end_although_a_cancellation_gets_lost(mariadb: MariaDB) -> None:
    """Which is not said by anybody: the statement returns as if nothing had happened, and a loop goes on for ever."""
    database = Database(mariadb.url("api"), pool_size=4)
    dice = random.Random(20261124)

    async def for_ever() -> None:
        while True:
            async with database.read.connect() as connection:
                await connection.execute(text("SELECT 1"))

    try:
        for _ in range(600):
            task = asyncio.create_task(for_ever())
            await asyncio.sleep(dice.random() * 0.004)
            async with asyncio.timeout(10):
                await end_tasks(task)
            assert task.done()
    finally:
        await database.close()
        gc.collect()  # here, and not in the midst of another test
