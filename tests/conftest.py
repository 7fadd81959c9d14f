"""Fixtures for all: a database of each kind, migrated, empty; the API on it; a clock that stands still."""

import asyncio
import functools
import shutil
import tempfile
from collections.abc import AsyncIterator, Callable, Hashable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest
import pytest_asyncio
from fastapi import FastAPI
from pydantic import SecretStr
from sqlalchemy import insert
from starlette.datastructures import State
from starlette.routing import BaseRoute

from app import main
from app.addresses import DomainName
from app.cli.db import upgrade_database
from app.config import ApiSettings
from app.credentials import tokens
from app.credentials.links import create_link_key
from app.credentials.tokens import create_request_key, create_signing_key
from app.db import Database, utc_now
from app.log import set_up_logging
from app.main import build_app
from app.models.domains import DomainKind
from app.models.hosts import hosts
from app.permissions import Permission, Role
from app.services.changes import Actor, Change
from app.services.domains import create_domain
from app.services.principals import create_principal
from tests.stack.mariadb import MariaDB

pytest_plugins = ["tests.stack.fixtures"]

PRIMARY = "cacert.test"
HOST = "mail"
ISSUER = "https://mail.cacert.test"


set_up_logging("json", "error")


class Clock:
    """Stands still until it is moved."""

    def __init__(self) -> None:
        self.now = datetime(2026, 11, 23, 12, 0, 0, tzinfo=UTC)

    def __call__(self) -> datetime:
        return self.now

    def forward(self, **duration: float) -> None:
        self.now += timedelta(**duration)


@dataclass(frozen=True)
class TestDatabase:
    """Where a database is, for each process user. SQLite has one for all."""

    __test__ = False
    kind: str
    url: Callable[[str], str]


def migrate(url: str) -> None:
    async def work() -> None:
        database = Database(url)
        await upgrade_database(database)
        await database.close()

    asyncio.run(work())


@pytest.fixture(scope="session")
def mariadb_schema() -> Callable[[str], None]:
    return migrate


@pytest.fixture(scope="session")
def memory_directory() -> Iterator[Path]:
    """On tmpfs: commits of SQLite and files of the tests cost no disk. Others may pass through it."""
    path = Path(tempfile.mkdtemp(prefix="cm-", dir="/dev/shm"))
    path.chmod(0o755)
    yield path
    shutil.rmtree(path)


@pytest.fixture(scope="session")
def sqlite_template(memory_directory: Path) -> Path:
    path = memory_directory / "template.db"
    migrate(f"sqlite+aiosqlite:///{path}")
    return path


@pytest.fixture
def scratch(memory_directory: Path) -> Iterator[Path]:
    path = Path(tempfile.mkdtemp(dir=memory_directory))
    path.chmod(0o755)
    yield path
    shutil.rmtree(path)


@pytest.fixture(params=["sqlite", "mariadb"])
def test_database(request: pytest.FixtureRequest, scratch: Path) -> TestDatabase:
    """Migrated and empty. On MariaDB under the users and grants of production."""
    if request.param == "sqlite":
        path = scratch / "test.db"
        shutil.copy(request.getfixturevalue("sqlite_template"), path)
        return TestDatabase("sqlite", lambda user: f"sqlite+aiosqlite:///{path}")
    mariadb: MariaDB = request.getfixturevalue("mariadb")
    mariadb.empty()
    return TestDatabase("mariadb", mariadb.url)


@pytest_asyncio.fixture
async def database(test_database: TestDatabase) -> AsyncIterator[Database]:
    """As the API's user."""
    database = Database(test_database.url("api"))
    yield database
    await database.close()


@pytest_asyncio.fixture
async def worker_database(test_database: TestDatabase) -> AsyncIterator[Database]:
    """As the worker's user."""
    database = Database(test_database.url("worker"))
    yield database
    await database.close()


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture(scope="session")
def key_directory(memory_directory: Path) -> Path:
    path = memory_directory / "keys"
    create_signing_key(path)
    create_request_key(path)
    create_link_key(path / "link.key")
    return path


ACTOR = Actor("tests", "127.0.0.1", "test-request")


@pytest_asyncio.fixture
async def seeded(database: Database) -> Database:
    """The primary domain and one host, which has been there for a while: nothing of it waits to be made so."""
    async with database.write.begin() as connection:
        change = Change(connection, ACTOR, utc_now())
        await create_domain(change, DomainName(PRIMARY), DomainKind.PRIMARY)
        row = {"name": HOST, "enabled": True, "settings": {}, "version": 1}
        await connection.execute(insert(hosts), {**row, "created_at": change.now, "updated_at": change.now})
    return database


@pytest.fixture
def settings(test_database: TestDatabase, key_directory: Path, scratch: Path) -> ApiSettings:
    return ApiSettings(
        database_url=SecretStr(test_database.url("api")),
        key_directory=key_directory,
        link_key_file=key_directory / "link.key",
        issuer=ISSUER,
        wake_directory=scratch,
        database_pool=10,
        dns_resolvers="127.0.0.1",  # nobody is there: what tests ask must not leave the machine
        dns_port=9,
        dns_seconds=0.1,
    )


@pytest.fixture(scope="session", autouse=True)
def each_key_is_read_once() -> Iterator[None]:
    """To check an RSA key takes 80 ms, and each API that is made would do it again."""
    read = functools.cache(tokens.load_pem_private_key)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokens, "load_pem_private_key", read)
        yield


_built: dict[Hashable, tuple[FastAPI, list[BaseRoute]]] = {}


def build_once(settings: ApiSettings, *, lifespan: Any) -> FastAPI:
    """As `build_app`, but one for all tests: it works its routes out at the first request, for 60 ms."""
    key = settings.certificate_header, settings.certificate_proxies, settings.trusted_proxies
    if key not in _built:
        app = build_app(settings)
        _built[key] = app, list(app.router.routes)
    app, routes = _built[key]
    app.router.routes[:] = routes
    app.router.lifespan_context = lifespan
    app.state = State()
    return app


@pytest_asyncio.fixture
async def api(settings: ApiSettings, clock: Clock, seeded: Database) -> AsyncIterator[FastAPI]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(main, "build_app", build_once)
        app = main.create_app(settings, clock=clock)
    async with app.router.lifespan_context(app):
        yield app


Client = httpx.AsyncClient
MakeClient = Callable[..., "asyncio.Future[Client]"]


@pytest_asyncio.fixture
async def make_client(api: FastAPI, seeded: Database) -> AsyncIterator[Callable[..., object]]:
    """`await make_client(permissions…)`: a client of the API with these permissions; without any, with all."""
    clients: list[Client] = []

    async def make(*permissions: Permission, only_none: bool = False) -> Client:
        async with seeded.write.begin() as connection:
            change = Change(connection, ACTOR, utc_now())
            wanted = list(permissions) if permissions or only_none else None
            credentials = await create_principal(change, f"client {len(clients)}", Role.PRIMARY, wanted)
        client = anonymous(api)
        client.auth = httpx.BasicAuth(*credentials)
        clients.append(client)
        return client

    yield make
    for client in clients:
        await client.aclose()


def anonymous(api: FastAPI) -> Client:
    transport = httpx.ASGITransport(api, raise_app_exceptions=False)
    return Client(transport=transport, base_url="http://mail.cacert.test")


@pytest_asyncio.fixture
async def client(make_client: Callable[..., object]) -> Client:
    """May do everything."""
    return await make_client()  # type: ignore[misc,no-any-return]
