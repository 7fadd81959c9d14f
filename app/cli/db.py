"""`cacert-mail db upgrade`: the schema."""

import logging
from pathlib import Path

from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, inspect

from alembic import command
from app.db import Database

_ALEMBIC = Path(__file__).resolve().parents[2] / "alembic"


class NotOurs(Exception):
    """The database holds tables that this project did not make, or of a later release. Nothing was changed."""


def _config(connection: Connection | None = None) -> Config:
    config = Config()
    config.set_main_option("script_location", str(_ALEMBIC))
    config.set_main_option("path_separator", "os")
    config.attributes["connection"] = connection
    return config


def migrate(connection: Connection) -> tuple[str | None, str | None]:
    """Brings the schema up to date and returns the revisions before and after. Raises NotOurs, nothing changed."""
    scripts = ScriptDirectory.from_config(_config())
    before = MigrationContext.configure(connection).get_current_revision()
    found = sorted(set(inspect(connection).get_table_names()) - {"alembic_version"})
    if before is None and found:
        raise NotOurs(
            f"The database has tables that are not ours ({', '.join(found[:5])}{', …' if len(found) > 5 else ''}) and no "
            "record of a migration. Nothing was changed. Give an empty database in DATABASE_URL: on MariaDB, rename the old "
            "one first (`CREATE DATABASE cacertusers_old`, then `RENAME TABLE cacertusers.t TO cacertusers_old.t` for each "
            "table), and import its accounts over the API afterwards."
        )
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


async def upgrade_database(database: Database) -> tuple[str | None, str | None]:
    async with database.write.begin() as connection:
        return await connection.run_sync(migrate)
