"""Can the service do its work?"""

from sqlalchemy import text
from sqlalchemy.exc import OperationalError, ProgrammingError
from sqlalchemy.ext.asyncio import AsyncConnection

from app.db import is_lost
from app.errors import Unavailable


async def check_schema(connection: AsyncConnection) -> None:
    """Raises Unavailable when the database answers, but has not our schema."""
    try:
        await connection.execute(text("SELECT version_num FROM alembic_version"))
    except (ProgrammingError, OperationalError) as error:
        if is_lost(error):
            raise
        raise Unavailable("The database does not answer, or has no schema: run `cacert-mail db upgrade`.") from error
