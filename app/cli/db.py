"""`cacert-mail db upgrade`: the schema."""

import logging
import sqlite3
from contextlib import closing
from pathlib import Path
from urllib.parse import quote

from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, inspect
from sqlmodel import SQLModel

from alembic import command
from app.db import Database
from app.models import declare_all

_ALEMBIC = Path(__file__).resolve().parents[2] / "alembic"


class NotOurs(Exception):
    """The database holds tables that this project did not make, or of a later release. Nothing was changed."""


def _config(connection: Connection | None = None) -> Config:
    config = Config()
    config.set_main_option("script_location", str(_ALEMBIC))
    config.set_main_option("path_separator", "os")
    config.attributes["connection"] = connection
    return config


def _not_ours(found: list[str]) -> NotOurs:
    return NotOurs(
        f"The database has tables that are not ours ({', '.join(found[:5])}{', …' if len(found) > 5 else ''}) and no "
        "record of a migration. Nothing was changed. Give an empty database in DATABASE_URL: on MariaDB, rename the "
        "old one first (`CREATE DATABASE cacertusers_old`, then `RENAME TABLE cacertusers.t TO cacertusers_old.t` for "
        "each table), and import its accounts over the API afterwards."
    )


def migrate(connection: Connection) -> tuple[str | None, str | None]:
    """Brings the schema up to date and returns the revisions before and after. Raises NotOurs, nothing changed."""
    scripts = ScriptDirectory.from_config(_config())
    before = MigrationContext.configure(connection).get_current_revision()
    found = sorted(set(inspect(connection).get_table_names()) - {"alembic_version"})
    declare_all()
    ours = set(SQLModel.metadata.tables)
    if before is None and found and set(found) <= ours:
        raise NotOurs(
            "The database has some of our own tables and no record of a migration: one was interrupted, and MariaDB "
            "cannot take such steps back. Nothing was changed. If they are empty, drop them, and run this again: "
            f"{', '.join(found)}."
        )
    if before is None and found:
        raise _not_ours(found)
    known = {script.revision for script in scripts.walk_revisions()}
    if before is not None and before not in known:
        raise NotOurs(
            f"The database is at revision {before}, which this release does not know: it was made by a later one. "
            "Nothing was changed. Run the later release."
        )
    # MariaDB names no primary key, and the driver logs a warning each time that Alembic names one.
    logging.getLogger("asyncmy").setLevel(logging.ERROR)
    command.upgrade(_config(connection), "head")
    return before, scripts.get_current_head()


def _look_first(path: Path) -> None:
    """Opening an SQLite file as ours changes its journal mode, so a foreign one is found out read-only."""
    if not path.is_file() or path.stat().st_size == 0:
        return
    with closing(sqlite3.connect(f"file:{quote(str(path))}?mode=ro", uri=True)) as looking:
        names = {name for (name,) in looking.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
    if names and "alembic_version" not in names:
        raise _not_ours(sorted(names))


async def upgrade_database(database: Database) -> tuple[str | None, str | None]:
    """Brings the schema up to date; returns the revisions before and after. Raises NotOurs."""
    if database.dialect == "sqlite" and database.url.database:
        _look_first(Path(database.url.database))
    async with database.write.begin() as connection:
        return await connection.run_sync(migrate)
