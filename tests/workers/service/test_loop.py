"""The service process: what it does when its time has come, under its own database user, and not before."""

import asyncio
import logging
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
import structlog
from pydantic import SecretStr
from sqlalchemy import func, insert, select, update

from app.config import ServiceSettings
from app.credentials.links import create_link_key
from app.db import Database, utc_now
from app.errors import UserPurged
from app.models.audit_events import audit_events
from app.models.idempotency_keys import idempotency_keys
from app.models.jobs import JobState, jobs
from app.models.users import users
from app.services import users as services
from app.workers.service import loop
from app.workers.service.loop import run_due, run_service
from tests.conftest import HOST, Clock, TestDatabase
from tests.stack.mariadb import MariaDB
from tests.stack.processes import wait_until
from tests.workers.host.machine import RETENTION, Machine

pytestmark = pytest.mark.asyncio
INSTANT = timedelta(microseconds=1)


@pytest.fixture
def settings(test_database: TestDatabase, scratch: Path) -> ServiceSettings:
    create_link_key(scratch / "link.key")
    return ServiceSettings(
        link_key_file=scratch / "link.key",
        database_url=SecretStr(test_database.url("service")),
        wake_directory=scratch,
        poll_seconds=0.1,
        log_format="json",
    )


@pytest_asyncio.fixture
async def service(settings: ServiceSettings) -> AsyncIterator[Database]:
    database = Database(settings.database_url.get_secret_value())
    yield database
    await database.close()


@pytest.fixture
def side(seeded: Database, clock: Clock, test_database: TestDatabase, scratch: Path) -> Machine:
    """Only its services: no host."""
    return Machine(scratch, seeded, None, clock, test_database)  # type: ignore[arg-type]


async def rows(database: Database, query: Any) -> list[Any]:
    async with database.read.connect() as connection:
        return list((await connection.execute(query)).all())


async def user(side: Machine, user_id: int) -> Any:
    [row] = await rows(side.api, select(users).where(users.c.id == user_id))
    return row


async def test_purges_when_the_time_has_come(side: Machine, service: Database, settings: ServiceSettings) -> None:
    ann, bob = await side.create("ann"), await side.create("bob")
    await side.change(
        services.change_user,
        ann,
        {"display_name": "Ann", "contact_address": "ann@elsewhere.test", "external_id": "7"},
    )
    await side.delete(ann)
    before = await user(side, ann)
    assert before.purge_at == side.clock.now + RETENTION
    counted = len(await side.jobs())
    await run_due(service, settings, before.purge_at - INSTANT)
    assert await user(side, ann) == before
    assert len(await side.jobs()) == counted

    side.clock.now = before.purge_at
    await run_due(service, settings, side.clock.now)
    after = await user(side, ann)
    assert (after.purged_at, after.version) == (before.purge_at, before.version + 1)
    assert (after.display_name, after.contact_address, after.external_id, after.password_hash) == ("", None, None, None)
    assert (after.address, after.state) == (before.address, "deleted")
    job = (await side.jobs())[-1]
    assert (job.host, job.lane, job.kind, job.subject_id, job.version, job.state) == (
        HOST,
        "ann@cacert.test",
        "mailbox.sync",
        ann,
        after.version,
        JobState.READY,
    )
    [event] = await rows(side.api, select(audit_events).where(audit_events.c.action == "users.purge"))
    assert (event.principal_id, event.subject_id, event.at) == ("service", str(ann), side.clock.now)
    assert event.request_id == job.request_id
    assert event.request_id.startswith("purge-")
    assert (await user(side, bob)).password_hash is not None

    # Not twice.
    counted = len(await side.jobs())
    side.clock.forward(days=1)
    await run_due(service, settings, side.clock.now)
    assert await user(side, ann) == after
    assert len(await side.jobs()) == counted
    with pytest.raises(UserPurged):
        await side.restore(ann)


async def test_who_was_restored_is_not_purged(side: Machine, service: Database, settings: ServiceSettings) -> None:
    ann = await side.create()
    await side.delete(ann)
    await side.restore(ann)
    before = await user(side, ann)
    await run_due(service, settings, side.clock.now + 2 * RETENTION)
    assert await user(side, ann) == before
    side.clock.forward(days=10)
    await side.delete(ann)
    await run_due(service, settings, side.clock.now + RETENTION - INSTANT)
    assert (await user(side, ann)).purged_at is None


async def test_who_was_deleted_again_meanwhile_has_the_whole_time(
    side: Machine, service: Database, settings: ServiceSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    ann = await side.create()
    await side.delete(ann)
    found = loop.due_for_purge

    async def found_and_changed(*args: Any, **options: Any) -> list[int]:
        due = await found(*args, **options)
        await side.restore(ann)
        await side.delete(ann)
        return due

    monkeypatch.setattr(loop, "due_for_purge", found_and_changed)
    side.clock.forward(days=30)
    await run_due(service, settings, side.clock.now)
    assert (await user(side, ann)).purged_at is None


@pytest.mark.parametrize("test_database", ["mariadb"], indirect=True)  # SQLite has one writer at a time
async def test_who_was_deleted_again_at_the_last_moment_has_it_too(
    side: Machine, service: Database, settings: ServiceSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    ann = await side.create()
    await side.delete(ann)
    purge = loop.purge_user

    async def change_and_purge(*args: Any, **options: Any) -> int:
        await side.restore(ann)
        await side.delete(ann)
        return await purge(*args, **options)

    monkeypatch.setattr(loop, "purge_user", change_and_purge)
    side.clock.forward(days=30)
    await run_due(service, settings, side.clock.now)
    assert (await user(side, ann)).purged_at is None


async def test_more_than_a_batch(side: Machine, service: Database, settings: ServiceSettings) -> None:
    ann = await side.create()
    row = (await user(side, ann))._asdict()
    del row["id"]
    row |= {"state": "deleted", "state_before": "active", "deleted_at": side.clock.now, "purge_at": side.clock.now}
    async with side.api.write.begin() as connection:
        await connection.execute(insert(users), [row | {"address": f"u{n}@cacert.test"} for n in range(150)])
    for left in (50, 0):
        await run_due(service, settings, side.clock.now)
        query = select(func.count()).where(users.c.purge_at.is_not(None), users.c.purged_at.is_(None))
        assert [tuple(row) for row in await rows(side.api, query)] == [(left,)]


async def test_one_that_cannot_be_purged_keeps_no_other_from_it(
    side: Machine, service: Database, settings: ServiceSettings
) -> None:
    ann, bob = await side.create("ann"), await side.create("bob")
    await side.delete(bob)
    async with side.api.write.begin() as connection:
        # No request leaves such a row.
        early = side.clock.now - timedelta(days=1)
        await connection.execute(update(users).where(users.c.id == ann).values(purge_at=early))
        await connection.execute(insert(idempotency_keys), key("old", early - INSTANT))
    await run_due(service, settings, side.clock.now + RETENTION)
    assert (await user(side, ann)).purged_at is None
    assert (await user(side, bob)).purged_at is not None
    assert await rows(side.api, select(idempotency_keys)) == []


def key(name: str, created_at: Any) -> dict[str, Any]:
    return {"principal_id": "p", "key": name, "request_hash": "h", "created_at": created_at}


async def test_prunes_old_jobs_and_keys(
    side: Machine, service: Database, worker_database: Database, settings: ServiceSettings
) -> None:
    now = side.clock.now
    old, young = now - timedelta(days=settings.keep_jobs_days) - INSTANT, now - timedelta(days=settings.keep_jobs_days)
    ends = {"old": ("done", old), "dead": ("dead", old), "young": ("done", young), "ready": ("ready", None)}
    for name in ends:
        await side.create(name)
    async with worker_database.write.begin() as connection:
        for number, (state, finished_at) in enumerate(ends.values(), 1):
            changed = update(jobs).where(jobs.c.id == number).values(state=state, finished_at=finished_at)
            await connection.execute(changed)
    async with side.api.write.begin() as connection:
        day = timedelta(hours=24)
        await connection.execute(insert(idempotency_keys), [key("old", now - day - INSTANT), key("young", now - day)])
    await run_due(service, settings, now)
    assert [job.lane for job in await side.jobs()] == ["young@cacert.test", "ready@cacert.test"]
    assert [row.key for row in await rows(side.api, select(idempotency_keys))] == ["young"]


async def test_prunes_in_batches(side: Machine, service: Database, settings: ServiceSettings) -> None:
    old = side.clock.now - timedelta(days=2)
    async with side.api.write.begin() as connection:
        await connection.execute(insert(idempotency_keys), [key(f"k{n}", old) for n in range(1200)])
    for left in (700, 200, 0):
        await run_due(service, settings, side.clock.now)
        assert len(await rows(side.api, select(idempotency_keys.c.key))) == left


def service_process(given: dict[str, str]) -> subprocess.Popen[str]:
    argv = [sys.executable, "-m", "app.cli.main", "service"]
    return subprocess.Popen(argv, env=given, cwd=Path(__file__).parents[3], stderr=subprocess.PIPE, text=True)


async def test_the_process_starts_purges_and_stops(side: Machine, settings: ServiceSettings, scratch: Path) -> None:
    ann = await side.create()
    await side.change(services.delete_user, ann, retention=timedelta(0))
    given = {
        "PATH": os.environ["PATH"],
        "DATABASE_URL": settings.database_url.get_secret_value(),
        "WAKE_DIRECTORY": str(scratch),
        "LINK_KEY_FILE": str(settings.link_key_file),
        "LOG_FORMAT": "json",
        "POLL_SECONDS": "30",
    }
    with service_process(given) as process:
        try:
            for _ in range(1000):
                if (await user(side, ann)).purged_at is not None:
                    break
                assert process.poll() is None
                await asyncio.sleep(0.01)
            assert (scratch / "-.wake").exists()
            process.send_signal(signal.SIGTERM)
            assert await asyncio.to_thread(process.wait, 10) == 0
            assert process.stderr is not None
            said = process.stderr.read()
        finally:
            process.kill()
    assert '"event": "user_purged"' in said
    assert '"event": "service_stopped"' in said
    assert wait_until(lambda: not (scratch / "-.wake").exists())


@pytest.mark.parametrize("test_database", ["mariadb"], indirect=True)
async def test_an_outage_of_the_database_is_logged_once_and_so_is_its_end(
    mariadb: MariaDB, settings: ServiceSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = structlog.testing.LogCapture()
    level = structlog.make_filtering_bound_logger(logging.INFO)
    monkeypatch.setattr(loop, "log", structlog.wrap_logger(None, processors=[said], wrapper_class=level))
    rounds: asyncio.Queue[datetime] = asyncio.Queue()

    def clock() -> datetime:
        """Is asked once a round."""
        rounds.put_nowait(utc_now())
        return utc_now()

    async def some_rounds() -> None:
        while not rounds.empty():
            rounds.get_nowait()
        for _ in range(4):
            await rounds.get()

    service = asyncio.create_task(run_service(settings.model_copy(update={"poll_seconds": 0.02}), clock=clock))
    try:
        async with asyncio.timeout(60):
            await some_rounds()
            for _ in range(2):
                mariadb.stop()
                await some_rounds()
                mariadb.restart()
                await some_rounds()
    finally:
        service.cancel()
        await asyncio.wait([service])
        mariadb.restart()
    away = {"event": "database_away", "kind": "OperationalError", "log_level": "warning"}
    back = {"event": "database_back", "log_level": "warning"}
    worse = [entry for entry in said.entries if entry["log_level"] != "info"]
    assert all(entry.pop("error") for entry in worse if entry["event"] == "database_away")
    assert worse == [away, back, away, back]
