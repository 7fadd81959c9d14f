"""pytest plugin: one MariaDB and one mail host for the whole session, or for each of xdist's processes.

Missing programs are an error, never a skip. `mariadb_schema` may be overridden by a conftest.
"""

import asyncio
import importlib
import pkgutil
from collections.abc import Callable, Iterator

import pytest
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import create_async_engine
from sqlmodel import SQLModel

import app.models
from app.models.views import VIEWS
from tests.stack import missing_packages
from tests.stack.mail import MailStack
from tests.stack.mariadb import MariaDB


def create_schema_from_models(url: str) -> None:
    """Every table and view of `app.models`, without the migrations."""
    for module in pkgutil.iter_modules(app.models.__path__, "app.models."):
        importlib.import_module(module.name)

    async def create() -> None:
        engine = create_async_engine(url)
        async with engine.begin() as connection:
            await connection.run_sync(SQLModel.metadata.create_all)
            for view in VIEWS:
                await connection.execute(sa.text(view.create("mariadb")))
            await connection.execute(sa.text("CREATE TABLE alembic_version (version_num VARCHAR(32) PRIMARY KEY)"))
        await engine.dispose()

    asyncio.run(create())


@pytest.fixture(scope="session")
def mariadb_schema() -> Callable[[str], None]:
    return create_schema_from_models


@pytest.fixture(scope="session")
def mariadb(mariadb_schema: Callable[[str], None]) -> Iterator[MariaDB]:
    """Has the schema, and its users as in production. A test that writes calls `mariadb.empty()` first."""
    if missing := missing_packages():
        pytest.fail(f"The tests need these Debian packages: {' '.join(missing)}", pytrace=False)
    server = MariaDB()
    server.start()
    try:
        server.create_database(mariadb_schema)
        server.apply_grants()
        yield server
    finally:
        server.close()


@pytest.fixture(scope="session")
def mail_stack(mariadb: MariaDB) -> Iterator[MailStack]:
    stack = MailStack()
    stack.start(mariadb)
    try:
        yield stack
    finally:
        stack.close()
