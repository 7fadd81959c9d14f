"""Runs the migrations on the connection that `app.cli.db` hands over (or, for `alembic` by hand, on DATABASE_URL)."""

import asyncio
import os

from sqlalchemy import Connection
from sqlmodel import SQLModel

from alembic import context
from app.db import Database
from app.models import declare_all

declare_all()


def migrate(connection: Connection) -> None:
    context.configure(
        connection=connection,
        target_metadata=SQLModel.metadata,
        render_as_batch=connection.dialect.name == "sqlite",
        compare_type=True,
        compare_server_default=True,
    )
    with context.begin_transaction():
        context.run_migrations()


async def connect() -> None:
    database = Database(os.environ["DATABASE_URL"])
    async with database.write.begin() as connection:
        await connection.run_sync(migrate)
    await database.close()


if context.is_offline_mode():
    raise SystemExit("Offline migrations are not supported: run `cacert-mail db upgrade` against the database.")
given = context.config.attributes.get("connection")
if given is not None:
    migrate(given)
else:
    asyncio.run(connect())
