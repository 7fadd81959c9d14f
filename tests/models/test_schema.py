"""The migrations make what the models declare, to the letter, on both databases."""

import asyncio
import re
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Connection, inspect, text
from sqlmodel import SQLModel

from alembic import command
from app.cli.db import NotOurs, _config, upgrade_database
from app.db import Database
from app.models.views import VIEWS
from tests.conftest import migrate
from tests.stack.mariadb import OWNER, MariaDB


def run(url: str, function: Any) -> Any:
    async def work() -> Any:
        database = Database(url)
        try:
            async with database.write.begin() as connection:
                return await connection.run_sync(function)
        finally:
            await database.close()

    return asyncio.run(work())


def declare(connection: Connection) -> None:
    SQLModel.metadata.create_all(connection)
    for view in VIEWS:
        connection.execute(text(view.create(connection.dialect.name)))


def described(connection: Connection) -> dict[str, str]:
    """Every table and view as the database itself writes it down, without what differs for no reason."""
    if connection.dialect.name == "sqlite":
        rows = connection.execute(text("SELECT name, sql FROM sqlite_master WHERE sql IS NOT NULL"))
        found = {name: statement for name, statement in rows if not name.startswith("sqlite_")}
    else:
        found = {}
        for name in inspect(connection).get_table_names():
            found[name] = connection.execute(text(f"SHOW CREATE TABLE {name}")).one()[1]
        for name in inspect(connection).get_view_names():
            found[name] = connection.execute(text(f"SHOW CREATE VIEW {name}")).one()[1]
    found.pop("alembic_version", None)
    return {name: _sorted(statement) for name, statement in found.items()}


def _sorted(statement: str) -> str:
    # SQLite keeps the statement as it was sent, where constraints stand in any order; a database name is part of a view.
    statement = re.sub(r"AUTO_INCREMENT=\d+ ", "", statement).replace("`declared`.", "").replace("`cacertusers`.", "")
    return "\n".join(sorted(line.strip(" ,\t") for line in statement.splitlines() if line.strip(" ,\t")))


def test_on_sqlite(scratch: Path) -> None:
    migrated, declared = f"sqlite+aiosqlite:///{scratch}/migrated.db", f"sqlite+aiosqlite:///{scratch}/declared.db"
    migrate(migrated)
    run(declared, declare)
    assert run(migrated, described) == run(declared, described)


def test_on_mariadb(mariadb: MariaDB) -> None:
    mariadb.sql(
        "DROP DATABASE IF EXISTS declared; CREATE DATABASE declared CHARACTER SET utf8mb4 COLLATE utf8mb4_nopad_bin;"
    )
    mariadb.sql(f"GRANT ALL ON declared.* TO {OWNER}@'%'")
    try:
        url = mariadb.url(OWNER)
        declared = url.rpartition("/")[0] + "/declared"
        run(declared, declare)
        assert run(url, described) == run(declared, described)
    finally:
        mariadb.sql("DROP DATABASE declared")


def test_alembic_finds_nothing_to_add_on_mariadb(mariadb: MariaDB) -> None:
    run(mariadb.url(OWNER), lambda connection: command.check(_config(connection)))


def test_upgrading_twice_changes_nothing(scratch: Path) -> None:
    url = f"sqlite+aiosqlite:///{scratch}/twice.db"
    migrate(url)
    before = run(url, described)
    migrate(url)
    assert run(url, described) == before


@pytest.mark.parametrize(
    "setup",
    [
        "CREATE TABLE users (name TEXT)",
        "CREATE TABLE alembic_version (version_num VARCHAR(32)); INSERT INTO alembic_version VALUES ('2031_01_01_later')",
    ],
)
def test_a_database_that_is_not_ours_is_left_alone(scratch: Path, setup: str) -> None:
    url = f"sqlite+aiosqlite:///{scratch}/theirs.db"

    def prepare(connection: Connection) -> None:
        for statement in setup.split("; "):
            connection.execute(text(statement))

    run(url, prepare)
    before = run(url, described)

    async def upgrade() -> None:
        database = Database(url)
        try:
            with pytest.raises(NotOurs, match="Nothing was changed"):
                await upgrade_database(database)
        finally:
            await database.close()

    asyncio.run(upgrade())
    assert run(url, described) == before
