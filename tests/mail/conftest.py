"""The whole service on the real mail stack: API, worker, MariaDB, Postfix, Dovecot."""

import asyncio
import shutil
import tempfile
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import pytest_asyncio
from pydantic import SecretStr

from app.addresses import DomainName
from app.config import ApiSettings, WorkerSettings
from app.db import Database, utc_now
from app.main import create_app
from app.models.domains import DomainKind
from app.permissions import Role
from app.queue.wake import Listener
from app.services.changes import Change
from app.services.domains import create_domain
from app.services.hosts import create_host
from app.services.principals import create_principal
from app.workers.host.loop import Worker, _begin, opened
from tests.conftest import ACTOR, ISSUER, anonymous
from tests.stack.accounts import account, alias, stack
from tests.stack.mail import HOST, PRIMARY_DOMAIN, MailStack
from tests.stack.mariadb import MariaDB

__all__ = ["account", "alias", "stack"]

PASSWORD = "seven green lanterns over the harbour"


@dataclass
class Site:
    """What a test talks to."""

    client: httpx.AsyncClient
    mail: MailStack
    mariadb: MariaDB
    worker: Worker

    async def post(self, url: str, **body: Any) -> dict[str, Any]:
        return await self.ask("POST", url, body)

    async def ask(self, method: str, url: str, body: Any = None) -> dict[str, Any]:
        """Waits for the host, and fails unless it got ready."""
        answer = await self.client.request(method, url, json=body, headers={"Prefer": "wait=20"}, timeout=30)
        assert answer.status_code in (200, 201), answer.text
        found: dict[str, Any] = answer.json()
        assert found["ready"], found
        return found

    async def create(self, name: str = "alice", **members: Any) -> dict[str, Any]:
        return await self.post("/v1/users", address=f"{name}@{PRIMARY_DOMAIN}", password=PASSWORD, **members)


@pytest.fixture
def emptied(mail_stack: MailStack, mariadb: MariaDB) -> MailStack:
    mariadb.empty()
    mail_stack.empty()
    for leftover in mail_stack.homes.iterdir():
        shutil.rmtree(leftover)
    return mail_stack


@pytest.fixture
def run_directory() -> Iterator[Path]:
    path = Path(tempfile.mkdtemp(prefix="cm-", dir="/dev/shm"))
    yield path
    shutil.rmtree(path)


@pytest.fixture
def worker_settings(emptied: MailStack, mariadb: MariaDB, run_directory: Path) -> WorkerSettings:
    return WorkerSettings(
        database_url=SecretStr(mariadb.url("worker")),
        mail_host=HOST,
        host_root=emptied.host_root,
        lock_file=run_directory / "worker.lock",
        wake_directory=run_directory,
        postfix_config=emptied.postfix_config,
        postfix_recipients=emptied.recipients_map,
        postfix_local_aliases=emptied.local_aliases_map,
        postfix_virtual_aliases=emptied.virtual_aliases_map,
        aliases_directory=emptied.aliases,
        dovecot_config=emptied.dovecot_config,
        uid_first=emptied.file.uid_first,
        uid_last=emptied.file.uid_last,
    )


@pytest_asyncio.fixture
async def site(
    emptied: MailStack, mariadb: MariaDB, run_directory: Path, key_directory: Path, worker_settings: WorkerSettings
) -> AsyncIterator[Site]:
    database = Database(mariadb.url("api"))
    async with database.write.begin() as connection:
        change = Change(connection, ACTOR, utc_now())
        await create_domain(change, PRIMARY_DOMAIN, DomainKind.PRIMARY)
        await create_domain(change, DomainName("other.test"), DomainKind.VIRTUAL)
        await create_host(change, HOST)
        credentials = await create_principal(change, "tests", Role.PRIMARY)
    await database.close()
    settings = ApiSettings(
        database_url=SecretStr(mariadb.url("api")),
        key_directory=key_directory,
        link_key_file=key_directory / "link.key",
        issuer=ISSUER,
        wake_directory=run_directory,
    )
    app = create_app(settings)
    async with app.router.lifespan_context(app), opened(worker_settings) as host, anonymous(app) as client:
        client.auth = httpx.BasicAuth(*credentials)
        worker = Worker(host, worker_settings)
        listener = Listener(run_directory, HOST)
        await _begin(worker)
        running = asyncio.create_task(worker.run(listener))
        yield Site(client, emptied, mariadb, worker)
        worker.stopping.set()
        await running
        listener.close()
