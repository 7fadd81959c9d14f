"""A mail host without daemons, and the unprivileged side that asks it for things. Import the fixtures that you use."""

import asyncio
import os
import shutil
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr
from sqlalchemy import Row, func, select, text

from app.addresses import DomainName, MailAddress
from app.config import WorkerSettings
from app.db import Database
from app.models.domains import DomainKind
from app.models.jobs import applied, jobs
from app.models.users import users
from app.queue.contracts import MAILBOX_SYNC
from app.services.changes import Change
from app.services.domains import create_domain
from app.services.users import NewUser, change_user, create_user, delete_user, purge_user, restore_user
from app.workers.host.commands import Commands
from app.workers.host.fs import check_home, open_homes
from app.workers.host.handlers.users import Host, sync_mailbox
from app.workers.host.rows import read_mailbox, write_applied
from tests.conftest import ACTOR, HOST, PRIMARY, Clock, TestDatabase

UID_FIRST, UID_LAST = 100_000, 200_000
VIRTUAL = "other.test"
RETENTION = timedelta(days=30)


@dataclass
class Machine:
    """`root` is the host's root directory; `api` may change accounts, `host` is what the handlers get."""

    root: Path
    api: Database
    host: Host
    clock: Clock
    test_database: TestDatabase

    async def change(self, function: Callable[..., Awaitable[Any]], *args: Any, **options: Any) -> Any:
        """As a request would: one transaction, with version and job."""
        async with self.api.write.begin() as connection:
            return await function(Change(connection, ACTOR, self.clock()), *args, **options)

    async def create(self, name: str = "ann", *, domain: str = PRIMARY, reuse: bool = False) -> int:
        new = NewUser(MailAddress(f"{name}@{domain}"), reuse_address=reuse, password_hash="{CRYPT}x")
        user_id: int = (await self.change(create_user, new)).id
        return user_id

    async def suspend(self, user_id: int) -> None:
        await self.change(change_user, user_id, {"state": "suspended"})

    async def resume(self, user_id: int) -> None:
        await self.change(change_user, user_id, {"state": "active"})

    async def delete(self, user_id: int) -> None:
        await self.change(delete_user, user_id, retention=RETENTION)

    async def restore(self, user_id: int) -> None:
        await self.change(restore_user, user_id)

    async def purge(self, user_id: int) -> None:
        await self.change(purge_user, user_id)

    async def sync(self, user_id: int) -> None:
        """What the worker does for a job, without the job."""
        outcome = await sync_mailbox(self.host, user_id)
        await write_applied(self.host.database, HOST, user_id, outcome, self.clock())

    async def applied(self, user_id: int) -> Row[Any] | None:
        async with self.api.read.connect() as connection:
            query = select(applied).where(applied.c.kind == MAILBOX_SYNC, applied.c.subject_id == user_id)
            return (await connection.execute(query)).one_or_none()

    async def ready(self) -> int:
        """How many accounts are as they should be."""
        about = (applied.c.subject_id == users.c.id) & (applied.c.kind == MAILBOX_SYNC)
        query = select(func.count()).select_from(users.join(applied, about))
        async with self.api.read.connect() as connection:
            return (await connection.execute(query.where(applied.c.version == users.c.version))).scalar_one()

    async def jobs(self) -> list[Row[Any]]:
        async with self.api.read.connect() as connection:
            return list((await connection.execute(select(jobs).order_by(jobs.c.id))).all())

    async def shown(self, user_id: int) -> set[str]:
        """The views in which Postfix and Dovecot see the account now."""
        views = ("postfix_recipients", "dovecot_users", "dovecot_passwords")
        found = set()
        owner = Database(self.test_database.url("owner"))
        async with owner.read.connect() as connection:
            for view in views:
                # The views have no id; addresses are compared with the one account that stands.
                query = (
                    f"SELECT 1 FROM {view} v JOIN users u ON u.address = v.address JOIN applied a ON a.subject_id = u.id"
                    " WHERE u.id = :id AND a.stands = 1 AND u.state <> 'deleted'"
                )
                if (await connection.execute(text(query), {"id": user_id})).first():
                    found.add(view)
        await owner.close()
        return found

    async def as_owner(self, *statements: str) -> None:
        """As whoever owns the schema, and without its checks: what a hostile row may be."""
        owner = Database(self.test_database.url("owner"))
        off = "PRAGMA ignore_check_constraints = ON" if owner.dialect == "sqlite" else "SET check_constraint_checks = 0"
        no_keys = "PRAGMA foreign_keys = OFF" if owner.dialect == "sqlite" else "SET foreign_key_checks = 0"
        lax = [] if owner.dialect == "sqlite" else ["SET sql_mode = ''"]
        async with owner.read.connect() as connection:
            for statement in (off, no_keys, *lax, *statements):
                await connection.exec_driver_sql(statement)
            await connection.invalidate()
        await owner.close()

    def home(self, name: str = "ann") -> Path:
        return self.root / "home" / name

    def archive(self, user_id: int) -> Path:
        return self.root / "home/.archive" / str(user_id)

    def deliver(self, name: str = "ann", message: str = "1") -> Path:
        """A message in the INBOX, as Dovecot would put it there."""
        file = self.home(name) / "Maildir/new" / message
        file.write_text(f"message {message}")
        owner = self.home(name).stat()
        shutil.chown(file, owner.st_uid, owner.st_gid)
        return file

    def disk(self) -> dict[str, tuple[str, int, int, str | None]]:
        """All that lies below the root: mode, owner, and what is in a file."""
        found = {}
        for path in sorted(self.root.rglob("*")):
            status = path.lstat()
            data = path.read_text() if stat.S_ISREG(status.st_mode) else None
            found[str(path.relative_to(self.root))] = (
                stat.filemode(status.st_mode),
                status.st_uid,
                status.st_gid,
                data,
            )
        return found

    async def check_views(self, user_id: int) -> None:
        """No mail meets a missing Maildir: whoever is shown has a home."""
        if await self.shown(user_id):
            mailbox, _ = await read_mailbox(self.host.database, HOST, user_id)
            check_home(self.host.homes, mailbox.home, UID_FIRST + user_id)


async def until(condition: Callable[[], Awaitable[object]], *, seconds: float = 10) -> None:
    end = time.monotonic() + seconds
    while not await condition():
        assert time.monotonic() < end, "it did not come true in time"
        await asyncio.sleep(0.01)


def environment(settings: WorkerSettings, **more: str) -> dict[str, str]:
    names = ("wake_directory", "mail_host", "host_root", "uid_first", "uid_last", "lock_file", "durable", "log_format")
    names += ("postfix_config", "postfix_recipients", "dovecot_config")
    names += ("postfix_local_aliases", "postfix_virtual_aliases", "aliases_directory", "hand_made_aliases")
    given = {name.upper(): str(value) for name in names if (value := getattr(settings, name)) is not None}
    url = settings.database_url.get_secret_value()
    return (
        {"PATH": os.environ["PATH"], "DATABASE_URL": url, "POLL_SECONDS": "0.1", "SWEEP_MINUTES": "100"} | given | more
    )


@contextmanager
def worker_process(
    settings: WorkerSettings, code: str = "from app.cli.main import main; main()", **more: str
) -> Iterator[subprocess.Popen[str]]:
    """`cacert-mail worker`. Its log is `process.stderr`."""
    with subprocess.Popen(
        [sys.executable, "-c", code, "worker"],
        env=environment(settings, **more),
        cwd=Path(__file__).parents[3],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            yield process
        finally:
            process.kill()


async def stop(process: subprocess.Popen[str], *, seconds: float = 15) -> int:
    process.send_signal(signal.SIGTERM)
    return await asyncio.to_thread(process.wait, seconds)


def sweep_command(settings: WorkerSettings, *arguments: str) -> subprocess.CompletedProcess[str]:
    """`cacert-mail sweep`, to its end."""
    return subprocess.run(
        [sys.executable, "-m", "app.cli.main", "sweep", *arguments],
        env=environment(settings, LOG_LEVEL="error"),
        cwd=Path(__file__).parents[3],
        capture_output=True,
        text=True,
        check=False,
        timeout=30,
    )


@pytest.fixture
def root(scratch: Path) -> Path:
    path = scratch / "host"
    path.mkdir(mode=0o755)
    return path


@pytest.fixture
def worker_settings(test_database: TestDatabase, scratch: Path, root: Path) -> WorkerSettings:
    return WorkerSettings(
        database_url=SecretStr(test_database.url("worker")),
        wake_directory=scratch,
        mail_host=HOST,
        host_root=root,
        uid_first=UID_FIRST,
        uid_last=UID_LAST,
        lock_file=scratch / "worker.lock",
        durable=False,
        log_format="json",
    )


@pytest.fixture
def machine(
    seeded: Database, worker_database: Database, test_database: TestDatabase, root: Path, clock: Clock
) -> Iterator[Machine]:
    with open_homes(root, durable=False) as homes:
        host = Host(HOST, worker_database, homes, Commands(), UID_FIRST, UID_LAST, clock)
        yield Machine(root, seeded, host, clock, test_database)


async def add_virtual_domain(machine: Machine) -> None:
    await machine.change(create_domain, DomainName(VIRTUAL), DomainKind.VIRTUAL)
