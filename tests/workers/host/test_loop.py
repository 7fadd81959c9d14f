"""The worker: claims, lanes, retries, leases, signals, and what is left when it is killed."""

import asyncio
import io
import json
import os
import random
import subprocess
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import structlog
from asyncmy import errors as asyncmy_errors
from sqlalchemy import select, text, update
from sqlalchemy.exc import OperationalError

from app.config import WorkerSettings
from app.db import utc_now
from app.log import set_up_logging
from app.models.hosts import host_status
from app.models.jobs import JobState, jobs
from app.models.schema import REVISION
from app.queue import claim as queue
from app.queue.claim import MAX_ATTEMPTS, Outcome
from app.queue.contracts import ALIASES_LANE, ALIASES_SYNC, MAILBOX_SYNC, MAILHOST_LANE, MAILHOST_SYNC
from app.queue.wake import Listener, wake
from app.workers.host import fs
from app.workers.host import loop as loop_module
from app.workers.host.commands import Commands
from app.workers.host.handlers import users as users_handler
from app.workers.host.handlers.users import GiveUp, Host, TryAgain, sync_mailbox
from app.workers.host.loop import Worker, _begin
from tests.conftest import HOST
from tests.stack.mariadb import MariaDB
from tests.workers.host.machine import Machine, machine, root, stop, until, worker_process, worker_settings

pytestmark = pytest.mark.asyncio
__all__ = ["machine", "root", "worker_settings"]

Handler = Callable[[Host, int], Awaitable[Outcome]]
DONE = Outcome(1, True, {}, {})
only_sqlite = pytest.mark.parametrize("test_database", ["sqlite"], indirect=True)
only_mariadb = pytest.mark.parametrize("test_database", ["mariadb"], indirect=True)


@asynccontextmanager
async def running(machine: Machine, settings: WorkerSettings, **changed: Any) -> AsyncIterator[Worker]:
    settings = settings.model_copy(update={"poll_seconds": 0.05, "sweep_minutes": 1000} | changed)
    worker = Worker(machine.host, settings)
    worker.sweep = nothing  # type: ignore[method-assign]  # has tests of its own
    listener = Listener(settings.wake_directory, HOST)
    await _begin(worker)
    task = asyncio.create_task(worker.run(listener))
    try:
        yield worker
    finally:
        worker.stopping.set()
        await asyncio.wait_for(task, 10)
        listener.close()


async def nothing() -> None:
    return None


def states(machine: Machine, *wanted: JobState) -> Callable[[], Awaitable[bool]]:
    async def are() -> bool:
        return [job.state for job in await machine.jobs()] == list(wanted)

    return are


@pytest.fixture
def handle(monkeypatch: pytest.MonkeyPatch) -> Callable[[Handler], None]:
    return lambda handler: monkeypatch.setitem(loop_module.HANDLERS, MAILBOX_SYNC, handler)


# Lanes


@only_sqlite
async def test_the_same_number_of_another_kind_is_another_subject(
    machine: Machine, worker_settings: WorkerSettings
) -> None:
    """Account 1, alias 1 and the host itself, which is always 1, wait for nobody but their own."""
    worker = Worker(machine.host, worker_settings)
    async with (
        asyncio.timeout(1),
        worker.lane("ann@cacert.test", 1, MAILBOX_SYNC),
        worker.lane(ALIASES_LANE, 1, ALIASES_SYNC),
        worker.lane(MAILHOST_LANE, 1, MAILHOST_SYNC),
    ):
        pass


# Claiming


async def test_by_wake_up(machine: Machine, worker_settings: WorkerSettings) -> None:
    async with running(machine, worker_settings, poll_seconds=60):
        await asyncio.sleep(0.1)  # so that it has polled, and found nothing
        await machine.create()
        await asyncio.sleep(0.1)
        assert [job.state for job in await machine.jobs()] == [JobState.READY]
        wake(worker_settings.wake_directory, HOST)
        await until(states(machine, JobState.DONE), seconds=2)


async def test_by_poll(machine: Machine, worker_settings: WorkerSettings) -> None:
    async with running(machine, worker_settings, poll_seconds=0.2):
        await asyncio.sleep(0.1)
        await machine.create()
        await until(states(machine, JobState.DONE), seconds=2)


async def test_two_jobs_of_one_account_are_one_run(machine: Machine, worker_settings: WorkerSettings) -> None:
    ann = await machine.create()
    await machine.suspend(ann)
    async with running(machine, worker_settings):
        await until(states(machine, JobState.DONE, JobState.SUPERSEDED))
    assert (await machine.applied(ann)).version == 2


@only_sqlite
async def test_other_kinds_and_other_hosts_are_left_alone(machine: Machine, worker_settings: WorkerSettings) -> None:
    for name in ("ann", "bob", "carol"):
        await machine.create(name)
    await machine.as_owner(
        "UPDATE jobs SET kind = 'root.shell' WHERE id = 1", "UPDATE jobs SET host = 'elsewhere' WHERE id = 2"
    )
    async with running(machine, worker_settings):
        await until(states(machine, JobState.READY, JobState.READY, JobState.DONE))


@only_sqlite
async def test_lanes_run_side_by_side_and_one_lane_never(
    machine: Machine, worker_settings: WorkerSettings, handle: Callable[[Handler], None]
) -> None:
    at_work: list[int] = []
    together: list[set[int]] = []
    most = 0

    async def slow(host: Host, user_id: int) -> Outcome:
        nonlocal most
        at_work.append(user_id)
        most = max(most, len(at_work))
        together.append(set(at_work))
        assert len(together[-1]) == len(at_work)
        await asyncio.sleep(0.05)
        at_work.remove(user_id)
        return Outcome(0, True, {}, {})  # supersedes no other

    handle(slow)
    for name in ("ann", "bob", "carol", "dave"):
        user_id = await machine.create(name)
        await machine.suspend(user_id)
    async with running(machine, worker_settings, concurrency=3):
        await until(states(machine, *[JobState.DONE] * 8))
    assert most == 3


@only_sqlite
async def test_a_sweep_and_a_job_share_the_lane(
    machine: Machine, worker_settings: WorkerSettings, handle: Callable[[Handler], None]
) -> None:
    begun = asyncio.Event()

    async def quick(host: Host, user_id: int) -> Outcome:
        begun.set()
        return DONE

    handle(quick)
    await machine.create()
    async with running(machine, worker_settings) as worker:
        async with worker.lane("ann@cacert.test", 0, MAILBOX_SYNC):
            await until(states(machine, JobState.RUNNING))
            assert not begun.is_set()
        await until(states(machine, JobState.DONE))


@only_sqlite
async def test_one_account_in_two_lanes_is_still_worked_on_once(
    machine: Machine, worker_settings: WorkerSettings, handle: Callable[[Handler], None]
) -> None:
    """A lane is what the API wrote: a hostile one could give an account two."""
    at_work = 0

    async def slow(host: Host, user_id: int) -> Outcome:
        nonlocal at_work
        at_work += 1
        assert at_work == 1
        await asyncio.sleep(0.05)
        at_work -= 1
        return Outcome(0, True, {}, {})

    handle(slow)
    ann = await machine.create()
    await machine.suspend(ann)
    await machine.as_owner("UPDATE jobs SET lane = 'elsewhere' WHERE id = 2")
    async with running(machine, worker_settings):
        await until(states(machine, JobState.DONE, JobState.DONE))
    assert [job.attempts for job in await machine.jobs()] == [1, 1]


# What fails


@pytest.mark.parametrize("times", [1, 3])
async def test_an_end_that_meets_a_busy_database_is_written_again(
    machine: Machine, worker_settings: WorkerSettings, monkeypatch: pytest.MonkeyPatch, times: int
) -> None:
    """Without running the handler, and so the host's work, once more."""
    left = times
    real = loop_module.finish

    async def finish(*arguments: Any) -> None:
        nonlocal left
        if left:
            left -= 1
            raise OperationalError("UPDATE", {}, asyncmy_errors.OperationalError(1213, "Deadlock found"))
        await real(*arguments)

    monkeypatch.setattr(loop_module, "finish", finish)
    await machine.create()
    async with running(machine, worker_settings):
        await until(states(machine, JobState.DONE))
    [job] = await machine.jobs()
    assert (left, job.attempts) == (0, 1)


async def test_tries_again_and_dies_in_the_end(
    machine: Machine, worker_settings: WorkerSettings, handle: Callable[[Handler], None]
) -> None:
    async def fail(host: Host, user_id: int) -> Outcome:
        raise TryAgain("The moon is full.")

    handle(fail)
    await machine.create()
    worker = Worker(machine.host, worker_settings, jitter=random.Random(7))
    waits = []
    for attempt in range(1, MAX_ATTEMPTS + 1):
        assert await worker.round() == 1
        await asyncio.gather(*worker.running)
        [job] = await machine.jobs()
        assert job.attempts == attempt
        if attempt < MAX_ATTEMPTS:
            assert (job.state, job.error) == (JobState.READY, "The moon is full.")
            waits.append(job.run_at - machine.clock.now)
            assert timedelta(0) <= waits[-1] <= timedelta(seconds=0.5 * 2**attempt)
            machine.clock.now = job.run_at - timedelta(microseconds=1)
            assert await worker.round() == 0
            machine.clock.now = job.run_at
    assert len(set(waits)) == len(waits)
    assert (job.state, job.error) == (JobState.DEAD, f"The moon is full. (gave up after {MAX_ATTEMPTS} attempts)")
    assert job.finished_at == machine.clock.now
    machine.clock.forward(days=1)
    assert await worker.round() == 0


@only_sqlite
async def test_gives_up_at_once(
    machine: Machine, worker_settings: WorkerSettings, handle: Callable[[Handler], None]
) -> None:
    async def fail(host: Host, user_id: int) -> Outcome:
        raise GiveUp("Somebody must look.")

    handle(fail)
    await machine.create()
    async with running(machine, worker_settings):
        await until(states(machine, JobState.DEAD))
    [job] = await machine.jobs()
    assert (job.error, job.attempts) == ("Somebody must look.", 1)


async def test_a_disk_that_is_full_is_tried_again(
    machine: Machine, worker_settings: WorkerSettings, handle: Callable[[Handler], None]
) -> None:
    calls = 0

    async def fail_once(host: Host, user_id: int) -> Outcome:
        nonlocal calls
        calls += 1
        if calls == 1:
            raise OSError(28, "No space left on device")
        return await sync_mailbox(host, user_id)

    handle(fail_once)
    machine.host.clock = utc_now  # so that the retry becomes due
    await machine.create()
    async with running(machine, worker_settings):
        await until(states(machine, JobState.DONE))
    assert [(job.attempts, job.error) for job in await machine.jobs()] == [(2, None)]


@pytest.fixture
def logged() -> Iterator[io.StringIO]:
    """What the worker logs, as JSON lines."""
    stream = io.StringIO()
    set_up_logging("json", "info")
    structlog.configure(logger_factory=structlog.PrintLoggerFactory(stream), cache_logger_on_first_use=False)
    yield stream
    set_up_logging("json", "error")


async def test_an_unknown_error_is_tried_again_and_logged_without_secrets(
    machine: Machine,
    worker_settings: WorkerSettings,
    handle: Callable[[Handler], None],
    logged: io.StringIO,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(loop_module, "log", structlog.get_logger())

    async def fail(host: Host, user_id: int) -> Outcome:
        password = "hunter2" + "hunter2"
        async with host.database.read.connect() as connection:
            await connection.execute(text("SELECT * FROM nowhere WHERE x = :x"), {"x": password})
        return DONE

    handle(fail)
    await machine.create()
    worker = Worker(machine.host, worker_settings)
    await worker.round()
    await asyncio.gather(*worker.running)
    [job] = await machine.jobs()
    assert (job.state, job.error) == (JobState.READY, "OperationalError")
    lines = [json.loads(line) for line in logged.getvalue().splitlines()]
    [error] = [line for line in lines if line["event"] == "job_failed"]
    assert (error["job_id"], error["request_id"]) == (job.id, "test-request")
    assert "nowhere" in error["exception"]
    assert "hunter2hunter2" not in logged.getvalue()
    assert (machine.host.database.url.password or "no password") not in logged.getvalue()


# Leases


async def test_what_a_lost_lease_made_is_discarded(
    machine: Machine, worker_settings: WorkerSettings, handle: Callable[[Handler], None]
) -> None:
    async def lose(host: Host, user_id: int) -> Outcome:
        machine.clock.forward(minutes=2)
        assert await queue.take_back(host.database, HOST, host.clock()) == 1
        return Outcome(1, True, {"made": {"result": "by the loser", "detail": None}}, {})

    handle(lose)
    ann = await machine.create()
    worker = Worker(machine.host, worker_settings)
    await worker.round()
    await asyncio.gather(*worker.running)
    assert [(job.state, job.attempts) for job in await machine.jobs()] == [(JobState.READY, 1)]
    assert await machine.applied(ann) is None
    handle(sync_mailbox)
    await worker.round()
    await asyncio.gather(*worker.running)
    assert (await machine.applied(ann)).proofs["maildir"]["result"] == "ok"


async def test_the_heartbeat_renews_a_long_job_and_notices_a_lost_one(
    machine: Machine, worker_settings: WorkerSettings, handle: Callable[[Handler], None]
) -> None:
    cancelled: list[int] = []
    goes_on = asyncio.Event()

    async def long(host: Host, user_id: int) -> Outcome:
        try:
            await goes_on.wait()
        except asyncio.CancelledError:
            cancelled.append(user_id)
            raise
        return DONE

    handle(long)
    kept, lost = await machine.create("kept"), await machine.create("lost")
    worker = Worker(machine.host, worker_settings)
    assert await worker.round() == 2
    tasks = list(worker.running)
    await asyncio.sleep(0)
    for _ in range(5):
        machine.clock.forward(seconds=50)
        await worker.beat()
    assert [job.state for job in await machine.jobs()] == [JobState.RUNNING] * 2
    async with machine.host.database.write.begin() as connection:
        await connection.execute(update(jobs).where(jobs.c.subject_id == lost).values(fence=jobs.c.fence + 1))
    await worker.beat()
    goes_on.set()
    await asyncio.wait(tasks)
    assert cancelled == [lost]
    assert [job.state for job in await machine.jobs()] == [JobState.DONE, JobState.RUNNING]
    assert worker.running == {}
    async with machine.api.read.connect() as connection:
        # There was no start, so there is no row to say it in.
        assert (await connection.execute(select(host_status))).all() == []
    assert kept


async def test_a_lost_job_keeps_its_lane_until_the_disk_is_left_alone(
    machine: Machine, worker_settings: WorkerSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A thread cannot be cancelled: it must not go on beside whoever works in the lane next."""
    at_work, may_end = threading.Event(), threading.Event()

    def slow(*args: Any) -> str:
        at_work.set()
        assert may_end.wait(10)
        return fs.ensure_home(*args)

    ann = await machine.create()
    worker = Worker(machine.host, worker_settings)
    with monkeypatch.context() as patch:
        patch.setattr(users_handler, "ensure_home", slow)
        await worker.round()
        [lost] = worker.running
        assert await asyncio.to_thread(at_work.wait, 10)
    machine.clock.forward(minutes=2)
    await queue.take_back(machine.host.database, HOST, machine.clock())
    await worker.beat()
    await worker.beat()
    assert await worker.round() == 1
    [again] = [task for task in worker.running if task is not lost]
    done, _ = await asyncio.wait([lost, again], timeout=0.2)
    assert done == set()
    may_end.set()
    await asyncio.wait([lost, again])
    assert lost.cancelled()
    assert (await machine.applied(ann)).version == 1
    assert [job.state for job in await machine.jobs()] == [JobState.DONE]


async def test_a_long_purge_holds_up_nobody(
    machine: Machine, worker_settings: WorkerSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    ann = await machine.create()
    await machine.sync(ann)
    for number in range(100):
        machine.deliver(message=str(number))
    await machine.delete(ann)
    await machine.sync(ann)
    await machine.purge(ann)
    removing = threading.Event()
    unlink = os.unlink

    def slow(*args: Any, **options: Any) -> None:
        removing.set()
        time.sleep(0.02)
        unlink(*args, **options)

    task = asyncio.create_task(sync_mailbox(machine.host, ann))
    with monkeypatch.context() as patch:
        patch.setattr(os, "unlink", slow)
        assert await asyncio.to_thread(removing.wait, 10)
        task.cancel()
        await asyncio.wait([task])
    assert task.cancelled()
    assert list((machine.root / "home/.trash").iterdir())
    await machine.sync(ann)
    assert list((machine.root / "home/.trash").iterdir()) == []


async def test_a_start_takes_back_and_says_so(machine: Machine, worker_settings: WorkerSettings) -> None:
    await machine.create()
    dead = Worker(machine.host, worker_settings)
    [taken] = await queue.claim(machine.host.database, HOST, machine.clock(), limit=1, kinds=[MAILBOX_SYNC])
    assert dead.running == {}
    async with running(machine, worker_settings):
        await until(states(machine, JobState.DONE))
    [job] = await machine.jobs()
    assert (job.id, job.attempts) == (taken.id, 2)
    async with machine.api.read.connect() as connection:
        [status] = (await connection.execute(select(host_status))).all()
    assert (status.host, status.started_at, status.heartbeat_at) == (HOST, machine.clock.now, machine.clock.now)
    assert status.release


async def test_stopping_lets_the_running_job_end(
    machine: Machine, worker_settings: WorkerSettings, handle: Callable[[Handler], None]
) -> None:
    begun = asyncio.Event()

    async def slow(host: Host, user_id: int) -> Outcome:
        begun.set()
        await asyncio.sleep(0.2)
        return DONE

    handle(slow)
    await machine.create()
    async with running(machine, worker_settings):
        await begun.wait()
    assert [job.state for job in await machine.jobs()] == [JobState.DONE]


# The database away


@only_mariadb
async def test_the_database_goes_away_and_comes_back(
    machine: Machine, worker_settings: WorkerSettings, mariadb: MariaDB, monkeypatch: pytest.MonkeyPatch
) -> None:
    reloads = []

    async def reload(self: Commands) -> None:
        reloads.append(1)

    monkeypatch.setattr(Commands, "reload_postfix", reload)
    machine.host.clock = utc_now  # so that what is tried again becomes due
    async with running(machine, worker_settings):
        await machine.create()
        await until(states(machine, JobState.DONE))
        await asyncio.to_thread(mariadb.stop)
        await asyncio.sleep(0.3)
        await asyncio.to_thread(mariadb.restart)
        await machine.api.close()
        await machine.create("bob")
        await until(states(machine, JobState.DONE, JobState.DONE))
    assert reloads == [1]


@only_mariadb
async def test_the_database_is_away_at_the_start(
    machine: Machine, worker_settings: WorkerSettings, mariadb: MariaDB
) -> None:
    await machine.create()
    await asyncio.to_thread(mariadb.stop)
    try:
        with worker_process(worker_settings) as process:
            await asyncio.sleep(1.5)
            assert process.poll() is None
            await asyncio.to_thread(mariadb.restart)
            await machine.api.close()
            await until(states(machine, JobState.DONE))
            assert await stop(process) == 0
        with worker_process(worker_settings) as process:
            await until_started(machine, process)
    finally:
        await asyncio.to_thread(mariadb.restart)


# The real process


async def until_started(machine: Machine, process: subprocess.Popen[str], count: int = 1) -> None:
    """Until its row says that it has begun anew."""
    began = utc_now() - timedelta(seconds=30)

    async def started() -> bool:
        assert process.poll() is None, process.communicate()[1]
        async with machine.api.read.connect() as connection:
            found = (await connection.execute(select(host_status.c.started_at))).scalar()
        return found is not None and found > began

    await until(started)


@only_sqlite
async def test_sigterm_and_the_lock_and_what_is_loaded(
    machine: Machine, worker_settings: WorkerSettings, scratch: Path
) -> None:
    loaded = scratch / "modules"
    code = (
        "import atexit, pathlib, sys\n"
        f"atexit.register(lambda: pathlib.Path({str(loaded)!r}).write_text('\\n'.join(sys.modules)))\n"
        "from app.cli.main import main; main()"
    )
    await machine.create()
    with worker_process(worker_settings, code) as process:
        await until_started(machine, process)
        await until(states(machine, JobState.DONE))
        # Another one on the same host
        with worker_process(worker_settings) as second:
            said = await asyncio.to_thread(second.communicate, timeout=10)
            assert second.returncode == 1
            assert said == ("", f"Another worker holds {worker_settings.lock_file}.\n")
        assert await stop(process) == 0
        assert '"event": "worker_stopped"' in process.stderr.read()
    modules = loaded.read_text().splitlines()
    assert "app.workers.host.handlers.users" in modules
    forbidden = ["fastapi", "starlette", "uvicorn", "jose", "httpx"]
    forbidden += ["app.web", "app.routers", "app.services", "app.credentials", "app.queue.enqueue"]
    assert [name for name in modules for bad in forbidden if name == bad or name.startswith(f"{bad}.")] == []


SLOW = """
import asyncio
from app.workers.host import loop
handler = loop.HANDLERS["mailbox.sync"]
async def slow(host, user_id):
    await asyncio.sleep(0.7)
    return await handler(host, user_id)
loop.HANDLERS["mailbox.sync"] = slow
from app.cli.main import main; main()
"""


@only_sqlite
async def test_sigterm_finishes_the_running_job_and_claims_no_other(
    machine: Machine, worker_settings: WorkerSettings
) -> None:
    for number in range(5):
        await machine.create(f"u{number}")

    async def at_work() -> bool:
        return JobState.RUNNING in [job.state for job in await machine.jobs()]

    with worker_process(worker_settings, SLOW, CONCURRENCY="2") as process:
        await until(at_work)
        assert await stop(process) == 0
    assert [job.state for job in await machine.jobs()] == [JobState.DONE] * 2 + [JobState.READY] * 3
    assert await machine.ready() == 2


@only_sqlite
async def test_a_directory_that_is_not_safe_is_one_clear_line(
    machine: Machine, worker_settings: WorkerSettings
) -> None:
    machine.root.chmod(0o777)
    with worker_process(worker_settings) as process:
        said = await asyncio.to_thread(process.communicate, timeout=10)
    assert process.returncode == 1
    assert said == (
        "",
        f"HOST_ROOT ({machine.root}): {machine.root} is drwxrwxrwx 0:0: root alone must own it and be able to write there.\n",
    )


async def test_a_schema_that_is_missing_is_one_clear_line(machine: Machine, worker_settings: WorkerSettings) -> None:
    await machine.as_owner("UPDATE alembic_version SET version_num = '2026_01_01_older'")
    try:
        with worker_process(worker_settings) as process:
            said = await asyncio.to_thread(process.communicate, timeout=10)
    finally:
        await machine.as_owner(f"UPDATE alembic_version SET version_num = '{REVISION}'")
    assert process.returncode == 1
    assert said[0] == ""
    assert said[1].splitlines()[-1].startswith("The schema is at 2026_01_01_older, this release needs ")
    assert said[1].count("\n") == 1


@only_sqlite
@pytest.mark.parametrize("setting", ["lock_file", "host_root"])
async def test_a_setting_that_leads_nowhere_is_named(
    machine: Machine, worker_settings: WorkerSettings, setting: str
) -> None:
    path = worker_settings.lock_file.parent / "nowhere/file"
    with worker_process(worker_settings.model_copy(update={setting: path})) as process:
        said = await asyncio.to_thread(process.communicate, timeout=10)
    assert (process.returncode, said) == (1, ("", f"{setting.upper()} ({path}): No such file or directory\n"))


async def test_killed_in_a_burst_and_nothing_is_lost(machine: Machine, worker_settings: WorkerSettings) -> None:
    count, kills = 200, 4
    machine.clock.now = utc_now()
    for number in range(count):
        await machine.create(f"u{number}")
    for kill in range(1, kills + 1):

        async def so_far(kill: int = kill) -> bool:
            return await machine.ready() >= kill * count // (kills + 1)

        with worker_process(worker_settings, LOG_LEVEL="error") as process:
            await until(so_far)
            process.kill()
            await asyncio.to_thread(process.wait)
    assert await machine.ready() < count

    async def all_ready() -> bool:
        return await machine.ready() == count

    with worker_process(worker_settings, LOG_LEVEL="error") as process:
        await until(all_ready)
        assert await stop(process) == 0
    found = await machine.jobs()
    assert [job.state for job in found] == [JobState.DONE] * count
    assert max(job.attempts for job in found) <= kills + 1
    tried_again = sum(job.attempts - 1 for job in found)
    assert tried_again <= kills * worker_settings.concurrency
    homes = [path for path in machine.home("").iterdir() if not path.name.startswith(".")]
    assert len(homes) == count
    assert len({path.stat().st_uid for path in homes}) == count
