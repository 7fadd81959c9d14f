"""The sweep without daemons: every kind of drift is found, changes nothing when only asked, and is repaired."""

import os
import shutil
from collections.abc import Awaitable, Callable
from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy import func, insert, select, update

from app.addresses import LocalPart
from app.config import WorkerSettings
from app.db import utc_now
from app.models.hosts import host_status
from app.models.jobs import JobState, applied, jobs
from app.models.users import users
from app.workers.host import sweep as module
from app.workers.host.commands import CommandFailed, Commands
from app.workers.host.fs import Home, ensure_home, hold_lock
from app.workers.host.loop import Worker, _begin
from app.workers.host.rows import read_mailbox
from app.workers.host.sweep import Report, sweep
from tests.conftest import HOST, PRIMARY
from tests.workers.host.machine import (
    UID_FIRST,
    UID_LAST,
    VIRTUAL,
    Machine,
    add_virtual_domain,
    machine,
    root,
    sweep_command,
    worker_settings,
)
from tests.workers.host.test_loop import only_sqlite

pytestmark = pytest.mark.asyncio
__all__ = ["machine", "root", "worker_settings"]


async def standing(machine: Machine, name: str = "ann", **options: Any) -> int:
    """Ready, and no job waits."""
    user_id = await machine.create(name, **options)
    await machine.sync(user_id)
    await no_jobs(machine)
    return user_id


async def no_jobs(machine: Machine, state: JobState = JobState.DONE) -> None:
    async with machine.host.database.write.begin() as connection:
        await connection.execute(update(jobs).values(state=state, finished_at=machine.clock()))


async def run(machine: Machine, settings: WorkerSettings, *, dry_run: bool = False) -> Report:
    return await sweep(machine.host, Worker(machine.host, settings).lane, dry_run=dry_run)


async def everything(machine: Machine) -> Any:
    """Disk and rows."""
    async with machine.api.read.connect() as connection:
        rows = [
            (await connection.execute(select(table).order_by(*table.primary_key))).all()
            for table in (users, applied, jobs, host_status)
        ]
    return machine.disk(), rows


Harm = Callable[[Machine, int], Awaitable[None] | None]


def home_removed(machine: Machine, user_id: int) -> None:
    shutil.rmtree(machine.home())


def mode(machine: Machine, user_id: int) -> None:
    machine.home().chmod(0o755)


def group(machine: Machine, user_id: int) -> None:
    os.chown(machine.home() / "Maildir", -1, 4711)


def maildir_removed(machine: Machine, user_id: int) -> None:
    shutil.rmtree(machine.home() / "Maildir")


def new_removed(machine: Machine, user_id: int) -> None:
    (machine.home() / "Maildir/new").rmdir()


async def applied_lost(machine: Machine, user_id: int) -> None:
    await machine.as_owner("DELETE FROM applied")


async def hidden(machine: Machine, user_id: int) -> None:
    await machine.as_owner("UPDATE applied SET stands = 0")


async def failed_proof(machine: Machine, user_id: int) -> None:
    await machine.as_owner(
        """UPDATE applied SET proofs = '{"sessions": {"result": "failed", "detail": "2 sessions are still open"}}'"""
    )


async def ended_by_an_earlier_release(machine: Machine, user_id: int) -> None:
    """Which did not say when."""
    await machine.suspend(user_id)
    await machine.sync(user_id)
    await no_jobs(machine)
    remove = "JSON_REMOVE(result, '$.flushed_at')"
    await machine.as_owner(f"UPDATE applied SET result = {remove} WHERE subject_id = {user_id}")


async def job_dead(machine: Machine, user_id: int) -> None:
    await machine.suspend(user_id)
    await no_jobs(machine, JobState.DEAD)


async def job_lost(machine: Machine, user_id: int) -> None:
    await machine.delete(user_id)
    await machine.as_owner("DELETE FROM jobs")


async def back_from_the_archive(machine: Machine, user_id: int) -> None:
    machine.deliver()
    await machine.delete(user_id)
    await machine.sync(user_id)
    await no_jobs(machine)
    machine.archive(user_id).rename(machine.home())


async def back_after_the_purge(machine: Machine, user_id: int) -> None:
    machine.deliver()
    await machine.delete(user_id)
    await machine.purge(user_id)
    shutil.copytree(machine.home(), machine.root / "kept")
    await machine.sync(user_id)
    await no_jobs(machine)
    (machine.root / "kept").rename(machine.home())
    for path in (machine.home(), *machine.home().rglob("*")):
        os.chown(path, UID_FIRST + user_id, UID_FIRST + user_id)


async def deleted(machine: Machine, user_id: int) -> None:
    machine.deliver()
    await machine.delete(user_id)
    await machine.sync(user_id)
    await no_jobs(machine)


async def half_of_it_back(machine: Machine, user_id: int) -> None:
    await deleted(machine, user_id)
    shutil.rmtree(machine.archive(user_id) / "Maildir/tmp")
    machine.archive(user_id).rename(machine.home())


async def archive_after_the_purge(machine: Machine, user_id: int) -> None:
    await deleted(machine, user_id)
    await machine.purge(user_id)
    await machine.sync(user_id)
    await no_jobs(machine)
    machine.archive(user_id).mkdir()


DRIFT: dict[str, tuple[Harm, str]] = {
    "home removed": (home_removed, "maildir: {home}: ann is missing."),
    "mode": (mode, "maildir: {home} is drwxr-xr-x {uid}:{uid}, not drwx------ {uid}:{uid}."),
    "group": (group, "maildir: {home}/Maildir is drwx------ {uid}:4711, not drwx------ {uid}:{uid}."),
    "Maildir removed": (maildir_removed, "maildir: {home}: Maildir is missing."),
    "new removed": (new_removed, "maildir: {home}: new is missing."),
    "applied lost": (applied_lost, "version 0 is applied, 1 is wanted"),
    "hidden": (hidden, "it does not stand"),
    "failed proof": (failed_proof, "sessions: 2 sessions are still open"),
    "ended by an earlier release": (ended_by_an_earlier_release, "access was ended, and not here"),
    "job dead": (job_dead, "version 1 is applied, 2 is wanted"),
    "job lost": (job_lost, "version 1 is applied, 2 is wanted"),
    "back from the archive": (back_from_the_archive, "maildir: its home is in place"),
    "back after the purge": (back_after_the_purge, "maildir: its home is in place"),
    "half of it back": (half_of_it_back, "maildir: its home is in place"),
    "archive after the purge": (archive_after_the_purge, "maildir: an archive is left, and it was purged"),
}


@pytest.mark.parametrize("drift", DRIFT)
async def test_drift_is_found_and_repaired(machine: Machine, worker_settings: WorkerSettings, drift: str) -> None:
    harm, words = DRIFT[drift]
    await _begin(Worker(machine.host, worker_settings))
    ann, bob = await standing(machine), await standing(machine, "bob")
    assert (await run(machine, worker_settings, dry_run=True)).differ == 0
    done = harm(machine, ann)
    if done is not None:
        await done
    before = await everything(machine)
    if drift == "applied lost":
        await machine.sync(bob)
        before = await everything(machine)
    why = words.format(home=machine.home(), uid=UID_FIRST + ann)
    found = await run(machine, worker_settings, dry_run=True)
    also_bob = drift in ("hidden", "failed proof")
    assert (found.seen, found.differ, found.repaired, found.left) == (2, 1 + also_bob, 0, 1 + also_bob)
    assert found.lines[0] == f"user {ann}: {why}"
    assert await everything(machine) == before

    repaired = await run(machine, worker_settings)
    assert (repaired.seen, repaired.differ, repaired.left) == (2, 1 + also_bob, 0)
    assert repaired.lines[0] == f"user {ann}: {why}: repaired"
    after = await run(machine, worker_settings, dry_run=True)
    assert (after.seen, after.differ) == (2, 0)
    assert await machine.ready() == 2
    assert bob
    if drift in ("back from the archive", "half of it back"):
        assert (machine.archive(ann) / "Maildir/new/1").exists()
    gone = ("job lost", "back from the archive", "back after the purge", "half of it back", "archive after the purge")
    assert machine.home().exists() != (drift in gone)
    assert machine.archive(ann).exists() == (drift in gone and "purge" not in drift)


async def test_what_cannot_be_repaired_is_left_and_said(machine: Machine, worker_settings: WorkerSettings) -> None:
    ann, bob = await standing(machine), await standing(machine, "bob")
    os.chown(machine.home(), 4711, 4711)
    home_of_bob = machine.home("bob")
    shutil.rmtree(home_of_bob)
    report = await run(machine, worker_settings)
    assert (report.differ, report.repaired, report.left) == (2, 1, 1)
    assert report.lines[0].endswith(f": {machine.home()} is the home of uid 4711.")
    assert home_of_bob.exists()
    assert (machine.home().stat().st_uid, ann) == (4711, ann)
    assert (await machine.applied(ann)).proofs["maildir"]["result"] == "failed"
    assert (await machine.applied(bob)).proofs["maildir"]["result"] == "ok"


async def test_an_archive_that_is_gone_is_left_and_said(machine: Machine, worker_settings: WorkerSettings) -> None:
    ann = await standing(machine)
    await deleted(machine, ann)
    assert (await run(machine, worker_settings)).differ == 0
    shutil.rmtree(machine.archive(ann))
    found = await run(machine, worker_settings, dry_run=True)
    assert (found.left, found.lines) == (1, [f"user {ann}: maildir: its archive is gone"])
    for _ in range(2):
        tried = await run(machine, worker_settings)
        assert (tried.repaired, tried.left) == (0, 1)
        assert tried.lines[0].endswith(f": The archive of user {ann} is gone, and its mail with it.")
    await machine.purge(ann)
    await machine.sync(ann)
    await no_jobs(machine)
    assert (await run(machine, worker_settings)).differ == 0


async def test_an_archive_beside_its_home_is_left_and_said(machine: Machine, worker_settings: WorkerSettings) -> None:
    ann = await standing(machine)
    machine.archive(ann).mkdir()
    before = machine.disk()
    for dry_run in (True, False):
        report = await run(machine, worker_settings, dry_run=dry_run)
        assert (report.differ, report.repaired, report.left) == (1, 0, 1)
        assert report.lines == [f"user {ann}: an archive of it lies beside its home"]
    assert machine.disk() == before


async def test_what_belongs_to_no_account_is_left_and_said(machine: Machine, worker_settings: WorkerSettings) -> None:
    """Homes with a uid of ours where it does not belong; those of the system's users are none of our business."""
    await add_virtual_domain(machine)
    ann, carol = await standing(machine), await standing(machine, "carol", domain=VIRTUAL)
    homes = machine.root / "home"
    strange = {
        "zoe": UID_FIRST + 99,  # nobody has this id
        "bob": UID_FIRST + ann,
        f"@{PRIMARY}/ann": UID_FIRST + ann,
        f"@{VIRTUAL}/ann": UID_FIRST + ann,
        "@else.test/carol": UID_FIRST + carol,
        "No Name": UID_FIRST + ann,
    }
    for name, uid in ({"root": 0, "system": 1000, "first": UID_FIRST} | strange).items():
        (homes / name).mkdir(parents=True)
        os.chown(homes / name, uid, uid)
    for name in ("77", "77x", "077"):
        (homes / ".archive" / name).mkdir()
    before = machine.disk()
    for dry_run in (True, False):
        report = await run(machine, worker_settings, dry_run=dry_run)
        assert (report.seen, report.differ, report.repaired, report.left) == (2, 7, 0, 7)
        assert sorted(report.lines) == sorted(
            [f"{homes / name} has uid {uid} and belongs to no account" for name, uid in strange.items()]
            + [f"{homes}/.archive/77 belongs to no account"]
        )
    assert machine.disk() == before


async def test_a_deleted_account_that_waits_for_its_job_is_no_stranger(
    machine: Machine, worker_settings: WorkerSettings
) -> None:
    ann = await standing(machine)
    await machine.delete(ann)
    assert (await run(machine, worker_settings)).differ == 0
    await machine.sync(ann)
    assert (await run(machine, worker_settings)).differ == 0


async def test_accounts_with_waiting_jobs_are_left_to_them(machine: Machine, worker_settings: WorkerSettings) -> None:
    for name in ("ann", "bob"):
        await standing(machine, name)
        shutil.rmtree(machine.home(name))
    bob = 2
    await machine.suspend(bob)
    report = await run(machine, worker_settings)
    assert (report.seen, report.repaired) == (1, 1)
    assert (machine.home().exists(), machine.home("bob").exists()) == (True, False)


async def test_many_waiting_jobs_hide_no_drift(
    machine: Machine, worker_settings: WorkerSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "BATCH", 3)
    for number in range(7):
        await standing(machine, f"u{number}")
    await standing(machine)
    for user_id in range(1, 8):
        await machine.suspend(user_id)
    shutil.rmtree(machine.home())
    assert (await run(machine, worker_settings)).repaired == 1


async def test_a_bad_row_is_reported_and_stops_nothing(machine: Machine, worker_settings: WorkerSettings) -> None:
    await add_virtual_domain(machine)
    names = ("ann", "bad", "range", "time", "zoe")
    for name in names:
        await standing(machine, name)
    await standing(machine, "unsafe", domain=VIRTUAL)
    zero = "0000-00-00 00:00:00" if machine.test_database.kind == "mariadb" else "rubbish"
    await machine.as_owner(
        "UPDATE users SET local_part = '..' WHERE id = 2",
        f"UPDATE users SET id = {UID_LAST - UID_FIRST + 5} WHERE id = 3",
        f"UPDATE users SET access_ended_at = '{zero}' WHERE id = 4",
    )
    machine.home(f"@{VIRTUAL}").chmod(0o777)
    for name in ("ann", "zoe"):
        shutil.rmtree(machine.home(name))
    report = await run(machine, worker_settings)
    assert (report.seen, report.differ, report.repaired, report.left) == (6, 7, 2, 5)
    said = "\n".join(report.lines)
    for words in (
        "user 2: User 2 has a name",
        "user 4: User 4 has a",
        "above UID_LAST",
        "root alone must own it",
        "range has uid",
    ):
        assert words in said
    assert machine.home("ann").exists()
    assert machine.home("zoe").exists()


async def test_an_error_nobody_thought_of_stops_nothing(
    machine: Machine, worker_settings: WorkerSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    ann, bob = await standing(machine), await standing(machine, "bob")
    for name in ("ann", "bob"):
        shutil.rmtree(machine.home(name))
    sync = module.sync_mailbox

    async def fail(host: Any, user_id: int) -> Any:
        if user_id == ann:
            raise KeyError("a secret")
        return await sync(host, user_id)

    monkeypatch.setattr(module, "sync_mailbox", fail)
    report = await run(machine, worker_settings)
    assert (report.repaired, report.left) == (1, 1)
    assert report.lines[0].endswith(": KeyError")
    assert machine.home("bob").exists()
    assert bob


async def test_a_program_that_is_away_is_said_once_and_homes_are_compared(
    machine: Machine, worker_settings: WorkerSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("ann", "bob", "carol"):
        await standing(machine, name)
    shutil.rmtree(machine.home())

    async def away(self: Commands, asked: Any) -> Any:
        raise CommandFailed(["/usr/sbin/postmap"], "was killed after 30 seconds")

    monkeypatch.setattr(Commands, "lookup_recipients", away)
    report = await run(machine, worker_settings)
    assert (report.seen, report.differ, report.repaired, report.left) == (3, 1, 1, 1)
    assert report.lines[0] == "/usr/sbin/postmap: was killed after 30 seconds"
    assert machine.home().exists()


async def test_three_thousand_accounts(machine: Machine, worker_settings: WorkerSettings) -> None:
    ann = await standing(machine, "ann")
    async with machine.api.read.connect() as connection:
        [row] = (await connection.execute(select(users).where(users.c.id == ann))).all()
    usual = {name: value for name, value in row._mapping.items() if name != "id"}
    many = [
        usual | {"local_part": f"u{number}", "address": f"u{number}@cacert.test", "external_id": None}
        for number in range(2999)
    ]
    made = (await machine.applied(ann))._mapping
    rows = []
    for number in range(2999):
        home = Home(None, LocalPart(f"u{number}"))
        uid = UID_FIRST + ann + 1 + number
        path = ensure_home(machine.host.homes, home, uid)
        result = made["result"] | {"uid": uid, "home": path}
        rows.append({**made, "subject_id": ann + 1 + number, "result": result})
    async with machine.api.write.begin() as connection:
        await connection.execute(insert(users), many)
    async with machine.host.database.write.begin() as connection:
        await connection.execute(insert(applied), rows)
    for number in range(0, 2999, 50):
        shutil.rmtree(machine.home(f"u{number}") / "Maildir")
    worker = Worker(machine.host, worker_settings)
    await _begin(worker)
    report = await worker.sweep()
    assert (report.seen, report.differ, report.repaired, report.left) == (3000, 60, 60, 0)
    assert len(report.lines) == 50
    again = await worker.sweep()
    assert (again.seen, again.differ) == (3000, 0)
    async with machine.api.read.connect() as connection:
        assert (await connection.execute(select(func.count()).select_from(applied))).scalar() == 3000
        [status] = (await connection.execute(select(host_status))).all()
    assert (status.host, status.swept_at) == (HOST, machine.clock.now)
    assert status.sweep == {"seen": 3000, "differ": 0, "repaired": 0, "left": 0, "lines": [], "aliases": 0}
    mailbox, present = await read_mailbox(machine.host.database, HOST, 3000)
    assert (mailbox.address, present.stands) == ("u2998@cacert.test", True)


# The command


@only_sqlite
async def test_the_command(machine: Machine, worker_settings: WorkerSettings) -> None:
    """On a host whose worker never ran, too: there is no row in host_status yet."""
    ann = await standing(machine)
    await standing(machine, "bob")
    shutil.rmtree(machine.home("bob"))
    before = await everything(machine)
    dry = sweep_command(worker_settings, "--dry-run")
    line = f"user 2: maildir: {machine.home('bob')}: bob is missing."
    summary = "2 accounts compared, 1 differed, 0 repaired, 1 left."
    assert (dry.returncode, dry.stdout, dry.stderr) == (1, f"{line}\n{summary}\n", "")
    assert await everything(machine) == before
    wet = sweep_command(worker_settings)
    summary = "2 accounts compared, 1 differed, 1 repaired, 0 left."
    assert (wet.returncode, wet.stdout, wet.stderr) == (0, f"{line}: repaired\n{summary}\n", "")
    clean = sweep_command(worker_settings, "--dry-run")
    assert (clean.returncode, clean.stdout) == (0, "2 accounts compared, 0 differed, 0 repaired, 0 left.\n")
    assert ann


@only_sqlite
async def test_the_command_beside_a_worker(machine: Machine, worker_settings: WorkerSettings) -> None:
    fd = hold_lock(worker_settings.lock_file)
    try:
        refused = sweep_command(worker_settings)
        assert (refused.returncode, refused.stdout) == (1, "")
        assert refused.stderr == f"Another worker holds {worker_settings.lock_file}.\n"
        assert sweep_command(worker_settings, "--dry-run").returncode == 0
    finally:
        os.close(fd)


async def test_a_sweep_by_hand_is_no_sign_of_life(machine: Machine, worker_settings: WorkerSettings) -> None:
    await _begin(Worker(machine.host, worker_settings))
    began = machine.clock.now
    machine.clock.forward(hours=1)
    await run(machine, worker_settings)
    async with machine.api.read.connect() as connection:
        [status] = (await connection.execute(select(host_status))).all()
    assert (status.heartbeat_at, status.swept_at) == (began, began + timedelta(hours=1))
    assert utc_now() > began
