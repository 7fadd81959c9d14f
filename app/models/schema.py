"""Which schema this release needs, and whether the database has it.

SECURITY: loaded by the worker (root). Reads the one row of `alembic_version`, and uses it in comparisons and texts only.
"""

from sqlalchemy import text
from sqlalchemy.exc import OperationalError, ProgrammingError
from sqlalchemy.ext.asyncio import AsyncConnection

from app.db import is_busy, is_lost
from app.errors import Unavailable

REVISION = "2026_11_25_dns"
"""The newest revision in `alembic/versions/`."""

_UPGRADE = "run `cacert-mail db upgrade`."
_GRANT = "run `cacert-mail db upgrade`, then `deploy/mariadb/grants.sql`."
_DENIED = 1142
"""MariaDB says so of a missing table too, to a user who was granted nothing on it."""


async def check_schema(connection: AsyncConnection) -> None:
    """Raises Unavailable when the database answers, but has no schema of ours or an older one.

    Revisions begin with their date, so they sort. A later one is fine: migrations leave the previous release able to run.
    """
    try:
        found = (await connection.execute(text("SELECT version_num FROM alembic_version"))).scalar()
    except (ProgrammingError, OperationalError) as error:
        if is_lost(error) or is_busy(error):
            raise
        if error.orig is not None and error.orig.args[:1] == (_DENIED,):
            raise Unavailable(f"This database user may not read the schema: {_GRANT}") from error
        found = None
    if found is None:
        raise Unavailable(f"The database has no schema of ours: {_UPGRADE}")
    if found < REVISION:
        raise Unavailable(f"The schema is at {found}, this release needs {REVISION}: {_UPGRADE}")
