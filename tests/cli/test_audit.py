"""`cacert-mail audit`, as typed, and what the service process of its own makes for it."""

import asyncio
import re
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio
from pydantic import SecretStr
from sqlalchemy import insert, text

from app.config import ServiceSettings
from app.db import Database, utc_now
from app.models.audit_events import audit_events
from app.workers.service.audit_chain import Chain
from tests.cli.test_commands import cacert_mail
from tests.conftest import TestDatabase
from tests.stack.processes import Processes, wait_until
from tests.workers.service.test_audit_chain import EVENT

pytestmark = pytest.mark.asyncio


@pytest_asyncio.fixture
async def owner(test_database: TestDatabase, scratch: Path) -> AsyncIterator[Database]:
    """Somebody with all rights. There are five events, each with its link, and the head after each in a file."""
    database = Database(test_database.url("owner"))
    service = Database(test_database.url("service"))
    for number in range(1, 6):
        async with database.write.begin() as connection:
            row = {**EVENT, "id": number, "at": utc_now()}
            await connection.execute(insert(audit_events), row)
        url = SecretStr(test_database.url("service"))
        chain = Chain(service, ServiceSettings(database_url=url, audit_head_file=scratch / "heads"))
        await chain.extend(utc_now())
    await service.close()
    yield database
    await database.close()


async def audit(test_database: TestDatabase, at: Path, *arguments: str) -> tuple[int, str, str]:
    """Under the API's own database user, which may read and no more."""
    url = test_database.url("api")
    done = await asyncio.to_thread(cacert_mail, "audit", *arguments, at=at, DATABASE_URL=url)
    return done.returncode, done.stdout, done.stderr


async def test_all_is_well(owner: Database, test_database: TestDatabase, scratch: Path) -> None:
    heads = (scratch / "heads").read_text().splitlines()
    assert len(heads) == 5
    status, out, err = await audit(test_database, scratch, "verify", "--head", str(scratch / "heads"))
    last = ":".join(heads[-1].split()[1:])
    assert (status, err) == (0, "")
    assert out == f"5 links; 0 events wait for theirs. The head is {last}\nThe audit trail is as it was written.\n"
    status, out, err = await audit(test_database, scratch, "verify")
    assert (status, out.splitlines()[-1][:27]) == (0, "Whether its end was cut off")
    status, out, err = await audit(test_database, scratch, "head")
    assert (status, re.sub(r"^\S+ (\d+) (\w+)\n$", r"\1:\2", out)) == (0, last)


async def test_what_was_changed_is_named(owner: Database, test_database: TestDatabase, scratch: Path) -> None:
    async with owner.write.begin() as connection:
        await connection.execute(text("UPDATE audit_events SET action = 'users.read' WHERE id = 3"))
    status, out, err = await audit(test_database, scratch, "verify")
    assert (status, out.splitlines()[0]) == (1, "link 3, event 3: the event or its link was changed")
    assert err == "The audit trail is not as it was written: 1 findings.\n"


async def test_a_cut_off_end_is_found_by_any_kept_head(
    owner: Database, test_database: TestDatabase, scratch: Path
) -> None:
    async with owner.write.begin() as connection:
        await connection.execute(text("DELETE FROM audit_chain WHERE sequence > 3"))
        await connection.execute(text("DELETE FROM audit_events WHERE id > 3"))
    assert (await audit(test_database, scratch, "verify"))[0] == 0
    last = ":".join((scratch / "heads").read_text().splitlines()[-1].split()[1:])
    for head in (last, str(scratch / "heads")):
        status, out, _ = await audit(test_database, scratch, "verify", "--head", head)
        assert status == 1
        assert "its end is cut off" in out.splitlines()[0]


@pytest.mark.parametrize("test_database", ["sqlite"], indirect=True)
async def test_what_could_not_be_looked_at_is_neither_good_nor_bad(
    owner: Database, test_database: TestDatabase, scratch: Path
) -> None:
    (scratch / "none").write_text("2026-11-24T00:00:00Z 1\n")
    for head in ("1:x", "no-such-file", str(scratch / "none")):
        status, _, err = await audit(test_database, scratch, "verify", "--head", head)
        assert (status, "Traceback" in err) == (2, False), head
        assert err.startswith("--head: ")
    for command in (["verify"], ["head"]):
        url = "mysql+asyncmy://api:hunter2hunter2@127.0.0.1:1/cacertusers"
        done = cacert_mail("audit", *command, at=scratch, DATABASE_URL=url)
        assert done.returncode == 2
        assert "cannot be reached" in done.stderr
        assert "hunter2" not in done.stderr + done.stdout


async def test_the_service_process_adds_the_links_and_keeps_the_head(
    seeded: Database, test_database: TestDatabase, scratch: Path, key_directory: Path
) -> None:
    """The events that made the domain and the host of these tests."""
    processes = Processes()
    try:
        processes.start(
            [sys.executable, "-m", "app.cli.main", "service"],
            DATABASE_URL=test_database.url("service"),
            LINK_KEY_FILE=str(key_directory / "link.key"),
            WAKE_DIRECTORY=str(scratch),
            AUDIT_HEAD_FILE=str(scratch / "heads"),
        )
        assert await asyncio.to_thread(wait_until, (scratch / "heads").exists, seconds=20)
    finally:
        await asyncio.to_thread(processes.close)
    status, out, _ = await audit(test_database, scratch, "verify", "--head", str(scratch / "heads"))
    assert (status, out.splitlines()[0].split(" The")[0]) == (0, "1 links; 0 events wait for theirs.")
