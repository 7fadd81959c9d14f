"""A database with an account, its notices, and the service process that sends them. Import the fixtures that you use."""

import secrets
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from pydantic import SecretStr
from sqlalchemy import Executable, insert, select, update

from app.addresses import MailAddress, OutsideAddress
from app.config import ServiceSettings
from app.credentials.links import create_link_key, link_token, load_link_key, token_hash
from app.db import Database, utc_now
from app.models.jobs import jobs
from app.models.notices import NoticeKind, notices
from app.models.password_resets import password_resets
from app.services.changes import Change
from app.services.notices import queue_notice
from app.services.users import NewUser, create_user
from app.workers.service.loop import Parts
from tests.conftest import ACTOR, Clock, TestDatabase
from tests.stack.processes import Processes
from tests.stack.sink import Sink

CONTACT = "Ann.Other@elsewhere.test"
URL = "https://mail.cacert.test"


@dataclass
class Post:
    """`api` writes what a request would, `parts` does what a round does, on the same clock."""

    api: Database
    parts: Parts
    settings: ServiceSettings
    clock: Clock
    sink: Sink
    key: bytes
    owner_url: str
    user_id: int = 0

    async def account(self, name: str = "ann", display_name: str = "Ann") -> int:
        new = NewUser(
            MailAddress(f"{name}@cacert.test"), display_name=display_name, contact_address=OutsideAddress(CONTACT)
        )
        async with self.api.write.begin() as connection:
            self.user_id = (await create_user(Change(connection, ACTOR, self.clock()), new)).id
        return self.user_id

    async def notice(
        self, kind: NoticeKind = NoticeKind.RESET, *, recipient: str | None = CONTACT, reason: str | None = None
    ) -> int:
        """A notice, its job, and for those that carry a link its row. Returns its id."""
        now = self.clock()
        async with self.api.write.begin() as connection:
            reset_id = None
            if kind in (NoticeKind.INVITATION, NoticeKind.RESET, NoticeKind.RESET_SHOWN):
                reset_id = secrets.randbits(62)
                row = {"id": reset_id, "user_id": self.user_id, "kind": "reset", "deliver": "mail", "reason": reason}
                row["principal_id"] = "limited-0123456789ab"
                row["token_hash"] = token_hash(link_token(self.key, reset_id))
                row |= {"created_at": now, "expires_at": now + timedelta(minutes=30)}
                await connection.execute(insert(password_resets), row)
            return await queue_notice(
                Change(connection, ACTOR, now),
                kind,
                user_id=self.user_id,
                recipient=recipient,
                reset_id=reset_id,
            )

    async def row(self, notice_id: int) -> Any:
        async with self.api.read.connect() as connection:
            return (await connection.execute(select(notices).where(notices.c.id == notice_id))).one()

    async def job(self, notice_id: int) -> Any:
        query = select(jobs).where(jobs.c.host == "-", jobs.c.subject_id == notice_id).order_by(jobs.c.id.desc())
        async with self.api.read.connect() as connection:
            return (await connection.execute(query)).first()

    async def change_reset(self, notice_id: int, **values: Any) -> None:
        reset_id = (await self.row(notice_id)).reset_id
        async with self.api.write.begin() as connection:
            await connection.execute(update(password_resets).where(password_resets.c.id == reset_id).values(**values))

    async def as_owner(self, *statements: Executable) -> None:
        """As whoever owns the schema: what no process of ours may write."""
        owner = Database(self.owner_url)
        async with owner.write.begin() as connection:
            for statement in statements:
                await connection.execute(statement)
        await owner.close()

    async def link(self, notice_id: int) -> str:
        return f"{URL}/reset#{link_token(self.key, (await self.row(notice_id)).reset_id)}"

    @contextmanager
    def process(self, **more: str) -> Iterator[subprocess.Popen[str]]:
        """`cacert-mail service`, with the real clock. Its log is `process.stderr`."""
        given = {
            "DATABASE_URL": self.settings.database_url.get_secret_value(),
            "LINK_KEY_FILE": str(self.settings.link_key_file),
            "WAKE_DIRECTORY": str(self.settings.wake_directory),
            "PUBLIC_URL": URL,
            "SMTP_PORT": str(self.settings.smtp_port),
            "POLL_SECONDS": "0.1",
            "LOG_FORMAT": "json",
        }
        if self.settings.returns_maildir is not None:
            given["RETURNS_MAILDIR"] = str(self.settings.returns_maildir)
        with subprocess.Popen(
            [sys.executable, "-m", "app.cli.main", "service"],
            env=given | more,
            cwd=Path(__file__).parents[3],
            stderr=subprocess.PIPE,
            text=True,
        ) as process:
            try:
                yield process
            finally:
                process.kill()


@pytest.fixture(scope="session")
def sinks() -> Iterator[Processes]:
    processes = Processes()
    yield processes
    processes.close()


@pytest.fixture
def sink(sinks: Processes) -> Iterator[Sink]:
    made = Sink(sinks)
    made.start()
    yield made
    made.stop()


@pytest.fixture
def link_key_file(scratch: Path) -> Path:
    create_link_key(scratch / "link.key")
    return scratch / "link.key"


@pytest_asyncio.fixture
async def post(
    seeded: Database, test_database: TestDatabase, scratch: Path, link_key_file: Path, clock: Clock, sink: Sink
) -> AsyncIterator[Post]:
    clock.now = utc_now()  # the process has the real one
    settings = ServiceSettings(
        database_url=SecretStr(test_database.url("service")),
        wake_directory=scratch,
        link_key_file=link_key_file,
        public_url=URL,
        smtp_port=sink.port,
        returns_maildir=scratch / "returns",
        poll_seconds=0.1,
    )
    database = Database(settings.database_url.get_secret_value())
    key = load_link_key(link_key_file)
    post = Post(seeded, Parts(database, settings, key, clock), settings, clock, sink, key, test_database.url("owner"))
    await post.account()
    yield post
    await database.close()
