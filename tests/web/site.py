"""The API as its own process with a database file, and a browser to look at it. Import the fixtures that you use."""

import asyncio
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from playwright.sync_api import Browser, sync_playwright

from app.addresses import DomainName
from app.db import Database, utc_now
from app.models.domains import DomainKind
from app.permissions import Role
from app.services.changes import Change
from app.services.domains import create_domain
from app.services.hosts import create_host
from app.services.principals import create_principal
from tests.conftest import ACTOR, HOST
from tests.stack.processes import Processes, free_ports

QUIET = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)


@dataclass(frozen=True)
class Site:
    """A running API, and the worker of its host."""

    url: str
    database_url: str
    host: str
    client_id: str
    secret: str
    processes: Processes


async def _fill(database_url: str) -> tuple[str, str]:
    """The domain of the documentation's examples, a host, and a client that may do everything."""
    database = Database(database_url)
    async with database.write.begin() as connection:
        change = Change(connection, ACTOR, utc_now())
        await create_domain(change, DomainName("cacert.org"), DomainKind.PRIMARY)
        await create_host(change, HOST)
        credentials = await create_principal(change, "administrator", Role.PRIMARY)
    await database.close()
    return credentials


@pytest.fixture(scope="module")
def site(sqlite_template: Path, key_directory: Path) -> Iterator[Site]:
    processes = Processes()
    try:
        path = processes.directory / "site.db"
        shutil.copy(sqlite_template, path)
        database_url = f"sqlite+aiosqlite:///{path}"
        client_id, secret = asyncio.run(_fill(database_url))
        (port,) = free_ports(1)
        url = f"http://127.0.0.1:{port}"
        process = processes.start(
            [sys.executable, "-m", "app.cli.main", "api"],
            DATABASE_URL=database_url,
            KEY_DIRECTORY=str(key_directory),
            LINK_KEY_FILE=str(key_directory / "link.key"),
            PUBLIC_URL=url,
            ISSUER=url,
            PORT=str(port),
            WAKE_DIRECTORY=str(processes.directory),
            DNS_RESOLVERS="127.0.0.1",  # nobody is there: what is asked must not leave the machine
            DNS_PORT="9",
            DNS_SECONDS="0.2",
        )
        (processes.directory / "host").mkdir()
        processes.start(
            [sys.executable, "-m", "app.cli.main", "worker"],
            DATABASE_URL=database_url,
            MAIL_HOST=HOST,
            HOST_ROOT=str(processes.directory / "host"),
            LOCK_FILE=str(processes.directory / "worker.lock"),
            ADOPTED_HOMES=str(processes.directory / "etc/adopted-homes"),
            WAKE_DIRECTORY=str(processes.directory),
        )
        processes.wait_for(process, port, processes.directory / "python.out")
        yield Site(url, database_url, HOST, client_id, secret, processes)
    finally:
        processes.close()


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path="/usr/bin/chromium", args=list(QUIET))
        yield browser
        browser.close()
