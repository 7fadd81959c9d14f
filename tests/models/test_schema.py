"""The migrations make what the models declare, to the letter, on both databases."""

import asyncio
import re
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, inspect, make_url, text
from sqlalchemy.exc import DBAPIError
from sqlmodel import SQLModel

from alembic import command
from app.cli.db import NotOurs, _config, upgrade_database
from app.db import Database, is_busy, is_lost
from app.errors import Unavailable
from app.models.schema import REVISION, check_schema
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
    # SQLite keeps the statement as it was sent, where constraints and added columns stand in any order and in any place of a
    # line, and quotes a name that was altered; a database name is part of a view.
    statement = re.sub(r"AUTO_INCREMENT=\d+ ", "", statement).replace("`declared`.", "").replace("`cacertusers`.", "")
    statement = statement.replace('"', "")
    if not statement.startswith("CREATE TABLE"):
        return statement
    head, _, rest = statement.partition("(")
    body, _, tail = rest.rpartition(")")
    parts, depth = [""], 0
    for character in body:
        depth += (character == "(") - (character == ")")
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return "\n".join([head.strip(), *sorted(" ".join(part.split()) for part in parts), tail.strip()])


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


def test_the_revision_that_this_release_needs_is_the_newest() -> None:
    revisions = [script.revision for script in ScriptDirectory.from_config(_config()).walk_revisions()]
    assert revisions[0] == REVISION, "write the newest revision into REVISION in app/models/schema.py"
    assert revisions == sorted(revisions, reverse=True), "name revisions so that they sort: check_schema compares them"


async def _check(url: str) -> None:
    database = Database(url)
    try:
        await database.reading(check_schema)
    finally:
        await database.close()


def check(url: str) -> str:
    """What check_schema says, or nothing."""
    try:
        asyncio.run(_check(url))
    except Unavailable as error:
        return error.detail
    return ""


MISSING = "The database has no schema of ours: run `cacert-mail db upgrade`."
OLDER = f"The schema is at 2026_01_01_older, this release needs {REVISION}: run `cacert-mail db upgrade`."


@pytest.mark.parametrize(
    ("statement", "says"),
    [
        ("SELECT 1", ""),
        ("UPDATE alembic_version SET version_num = '2031_01_01_later'", ""),
        ("UPDATE alembic_version SET version_num = '2026_01_01_older'", OLDER),
        ("DELETE FROM alembic_version", MISSING),
        ("DROP TABLE alembic_version", MISSING),
    ],
)
def test_the_schema_is_checked_on_sqlite(scratch: Path, statement: str, says: str) -> None:
    url = f"sqlite+aiosqlite:///{scratch}/checked.db"
    migrate(url)
    run(url, lambda connection: connection.execute(text(statement)))
    assert check(url) == says


def test_an_empty_file_has_no_schema(scratch: Path) -> None:
    assert check(f"sqlite+aiosqlite:///{scratch}/empty.db") == MISSING


def test_the_schema_is_checked_on_mariadb(mariadb: MariaDB) -> None:
    url = make_url(mariadb.url("api")).set(username="dovecot", password=mariadb.passwords["dovecot"])
    granted_nothing = url.render_as_string(hide_password=False)
    for user in ("api", "worker", "service"):
        assert check(mariadb.url(user)) == ""
    assert "deploy/mariadb/grants.sql" in check(granted_nothing)
    mariadb.sql("RENAME TABLE alembic_version TO elsewhere", OWNER)
    try:
        assert check(mariadb.url("api")) == MISSING
        assert check(mariadb.url(OWNER)) == MISSING
        assert "deploy/mariadb/grants.sql" in check(granted_nothing)
    finally:
        mariadb.sql("RENAME TABLE elsewhere TO alembic_version", OWNER)


def test_a_database_that_is_away_is_not_called_empty(mariadb: MariaDB) -> None:
    async def work() -> None:
        database = Database(mariadb.url("api"))
        try:
            async with database.read.connect() as connection:
                number = (await connection.execute(text("SELECT CONNECTION_ID()"))).scalar()
                mariadb.sql(f"KILL {number}")
                with pytest.raises(DBAPIError) as caught:
                    await check_schema(connection)
                assert is_lost(caught.value)
        finally:
            await database.close()

    asyncio.run(work())


def test_a_database_that_is_busy_is_not_called_empty(scratch: Path) -> None:
    url = f"sqlite+aiosqlite:///{scratch}/busy.db"
    migrate(url)

    async def work() -> None:
        database = Database(url)
        try:
            async with database.read.connect() as connection:
                await connection.execute(text("PRAGMA journal_mode = DELETE"))
                await connection.execute(text("PRAGMA busy_timeout = 0"))
                with closing(sqlite3.connect(scratch / "busy.db")) as other:
                    other.execute("BEGIN EXCLUSIVE")
                    with pytest.raises(DBAPIError) as caught:
                        await check_schema(connection)
                assert is_busy(caught.value)
        finally:
            await database.close()

    asyncio.run(work())
