"""`mailbox.sync` without daemons: it ends in the same place, however often and however late it runs, and wherever it dies.

The proofs of Postfix and Dovecot read `not configured` here; tests/mail has the real ones.
"""

import asyncio
import json
import os
import shutil
import threading
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr

from app.addresses import DomainName
from app.config import WorkerSettings
from app.db import Database
from app.models.domains import DomainKind
from app.models.jobs import JobState
from app.services.domains import create_domain
from app.services.hosts import create_host
from app.services.locks import lock_user, unlock_user
from app.workers.host import fs
from app.workers.host.commands import Commands
from app.workers.host.handlers import users as handler
from app.workers.host.handlers.users import GiveUp, TryAgain, sync_mailbox
from app.workers.host.loop import Worker, opened
from tests.conftest import HOST, PRIMARY, Clock
from tests.workers.host.machine import (
    UID_FIRST,
    UID_LAST,
    VIRTUAL,
    Machine,
    add_virtual_domain,
    machine,
    root,
    worker_settings,
)

pytestmark = pytest.mark.asyncio
__all__ = ["machine", "root", "worker_settings"]

SEEN = {"postfix_recipients", "dovecot_users", "dovecot_passwords"}
NOT_CONFIGURED = {"result": "not configured", "detail": None}


async def work_all(machine: Machine, settings: WorkerSettings, *, rounds: int = 100) -> None:
    """The worker's own way from a claim to its end, until nothing is due."""
    worker = Worker(machine.host, settings)
    for _ in range(rounds):
        if not await worker.round() and not worker.running:
            return
        await asyncio.gather(*worker.running)


# Every state


async def test_active(machine: Machine) -> None:
    ann = await machine.create()
    assert await machine.shown(ann) == set()
    await machine.sync(ann)
    row = await machine.applied(ann)
    assert (row.version, row.stands) == (1, True)
    assert row.result == {
        "uid": UID_FIRST + ann,
        "gid": UID_FIRST + ann,
        "home": str(machine.home()),
        "archived": False,
        "access_ended_at": None,
        "flushed_at": None,
    }
    assert row.proofs == {
        "maildir": {"result": "ok", "detail": f"owner {UID_FIRST + ann}, mode 0700"},
        "postfix": NOT_CONFIGURED,
        "dovecot": NOT_CONFIGURED,
    }
    for part in ("", "Maildir", "Maildir/cur", "Maildir/new", "Maildir/tmp"):
        status = (machine.home() / part).stat()
        assert (status.st_mode & 0o7777, status.st_uid, status.st_gid) == (0o700, UID_FIRST + ann, UID_FIRST + ann)
    assert await machine.shown(ann) == SEEN


async def test_in_a_virtual_domain(machine: Machine) -> None:
    await add_virtual_domain(machine)
    ann, other = await machine.create(), await machine.create(domain=VIRTUAL)
    for user_id in (ann, other):
        await machine.sync(user_id)
    row = await machine.applied(other)
    assert row.result["home"] == str(machine.root / f"home/@{VIRTUAL}/ann")
    assert machine.home(f"@{VIRTUAL}/ann").stat().st_uid == UID_FIRST + other
    assert machine.home().stat().st_uid == UID_FIRST + ann


async def test_locked(machine: Machine) -> None:
    """Here without Postfix; tests/mail has the mail that is held."""
    ann = await machine.create()
    await machine.sync(ann)
    await machine.change(lock_user, ann, "stolen")
    assert await machine.shown(ann) == SEEN - {"dovecot_passwords"}
    for _ in range(2):
        await machine.sync(ann)
        row = await machine.applied(ann)
        assert (row.version, row.stands) == (2, True)
        assert row.proofs["queue"] == row.proofs["sessions"] == NOT_CONFIGURED
    await machine.change(unlock_user, ann)
    await machine.sync(ann)
    row = await machine.applied(ann)
    assert "queue" not in row.proofs
    assert "held" not in row.result
    assert await machine.shown(ann) == SEEN


async def test_suspended(machine: Machine) -> None:
    ann = await machine.create()
    await machine.sync(ann)
    await machine.suspend(ann)
    # At once, not when the worker gets to it.
    assert await machine.shown(ann) == SEEN - {"dovecot_passwords"}
    await machine.sync(ann)
    row = await machine.applied(ann)
    assert (row.version, row.stands) == (2, True)
    assert row.proofs["sessions"] == NOT_CONFIGURED
    assert row.result["access_ended_at"] == machine.clock.now.isoformat()
    assert await machine.shown(ann) == SEEN - {"dovecot_passwords"}
    await machine.resume(ann)
    await machine.sync(ann)
    assert await machine.shown(ann) == SEEN


async def test_deleted_restored_and_purged(machine: Machine) -> None:
    ann = await machine.create()
    await machine.sync(ann)
    machine.deliver()
    before = machine.disk()
    await machine.delete(ann)
    assert await machine.shown(ann) == set()
    await machine.sync(ann)
    row = await machine.applied(ann)
    assert (row.version, row.stands) == (2, False)
    assert row.result == {
        "uid": UID_FIRST + ann,
        "gid": UID_FIRST + ann,
        "home": None,
        "archived": True,
        "access_ended_at": machine.clock.now.isoformat(),
        "flushed_at": machine.clock.now.isoformat(),
    }
    assert row.proofs["maildir"] == {"result": "ok", "detail": "archived"}
    assert not machine.home().exists()
    assert (machine.archive(ann) / "Maildir/new/1").read_text() == "message 1"

    await machine.restore(ann)
    assert await machine.shown(ann) == set()
    await machine.sync(ann)
    assert machine.disk() == before
    assert await machine.shown(ann) == SEEN

    await machine.delete(ann)
    await machine.sync(ann)
    await machine.purge(ann)
    await machine.sync(ann)
    row = await machine.applied(ann)
    assert row.proofs["maildir"] == {"result": "ok", "detail": "purged"}
    assert (row.stands, row.result["archived"]) == (False, False)
    assert sorted(machine.disk()) == ["home", "home/.archive", "home/.staging", "home/.trash"]


async def test_deleted_before_it_was_ever_made(machine: Machine) -> None:
    ann = await machine.create()
    await machine.delete(ann)
    await machine.sync(ann)
    assert (await machine.applied(ann)).proofs["maildir"] == {"result": "ok", "detail": "there was none to keep"}
    await machine.restore(ann)
    await machine.sync(ann)
    assert await machine.shown(ann) == SEEN
    assert machine.home().stat().st_uid == UID_FIRST + ann


async def test_purged_before_it_was_archived(machine: Machine) -> None:
    ann = await machine.create()
    await machine.sync(ann)
    machine.deliver()
    await machine.delete(ann)
    await machine.purge(ann)
    await machine.sync(ann)
    assert not machine.home().exists()
    assert not machine.archive(ann).exists()
    assert (await machine.applied(ann)).version == 3


Step = Callable[[Machine, int], Awaitable[None]]

STATES: dict[str, list[Step]] = {
    "active": [],
    "suspended": [Machine.suspend],
    "deleted": [Machine.delete],
    "restored": [Machine.delete, Machine.restore],
    "purged": [Machine.delete, Machine.purge],
}


@pytest.mark.parametrize("state", STATES)
async def test_twice_ends_the_same(machine: Machine, state: str) -> None:
    ann = await machine.create()
    await machine.sync(ann)
    machine.deliver()
    for step in STATES[state]:
        await step(machine, ann)
        await machine.sync(ann)
    disk, first, shown = machine.disk(), await machine.applied(ann), await machine.shown(ann)
    await machine.sync(ann)
    second = await machine.applied(ann)
    assert machine.disk() == disk
    assert await machine.shown(ann) == shown
    assert (second.version, second.stands, second.proofs, second.result) == (
        first.version,
        first.stands,
        first.proofs,
        first.result,
    )
    assert second.revision > first.revision


@pytest.mark.parametrize("state", STATES)
async def test_late_is_the_same_as_in_time(machine: Machine, state: str) -> None:
    """One run after all changes, on top of what the first one made."""
    ann, bob = await machine.create(), await machine.create("bob")
    for user_id, name in ((ann, "ann"), (bob, "bob")):
        await machine.sync(user_id)
        machine.deliver(name)
        for step in STATES[state]:
            await step(machine, user_id)
            if name == "ann":
                await machine.sync(user_id)
        await machine.sync(user_id)
    assert state_of(machine, ann, "ann") == state_of(machine, bob, "bob")


def state_of(machine: Machine, user_id: int, name: str) -> list[Any]:
    """Where the account's files are and whose, without its name and number."""
    uid = UID_FIRST + user_id
    found = []
    for path, (mode, owner, group, data) in machine.disk().items():
        for top, place in ((f"home/{name}", "home"), (f"home/.archive/{user_id}", "archive")):
            if path == top or path.startswith(f"{top}/"):
                found.append((place + path.removeprefix(top), mode, owner - uid, group - uid, data))
    return found


async def test_jobs_out_of_order(machine: Machine, worker_settings: WorkerSettings) -> None:
    """The job of version 1 comes last; whatever it was inserted for, it sees version 3."""
    ann = await machine.create()
    await machine.suspend(ann)
    await machine.delete(ann)
    await machine.as_owner("UPDATE jobs SET run_at = '2026-11-23 11:00:00.000000' WHERE version = 3")
    await work_all(machine, worker_settings)
    assert [job.state for job in await machine.jobs()] == [JobState.SUPERSEDED, JobState.SUPERSEDED, JobState.DONE]
    assert (await machine.applied(ann)).version == 3


async def test_an_outcome_of_an_older_version_changes_nothing(machine: Machine) -> None:
    ann = await machine.create()
    late = await sync_mailbox(machine.host, ann)
    await machine.delete(ann)
    await machine.sync(ann)
    await handler.write_applied(machine.host.database, HOST, ann, late, machine.clock())
    row = await machine.applied(ann)
    assert (row.version, row.stands) == (2, False)


# Successors


async def test_a_successor_waits_and_gets_an_empty_home(machine: Machine) -> None:
    ann = await machine.create()
    await machine.sync(ann)
    machine.deliver()
    await machine.delete(ann)
    second = await machine.create(reuse=True)
    with pytest.raises(TryAgain, match="not archived yet"):
        await machine.sync(second)
    assert await machine.shown(second) == set()
    await machine.sync(ann)
    await machine.sync(second)
    assert machine.home().stat().st_uid == UID_FIRST + second
    assert list(machine.home().rglob("Maildir/new/*")) == []
    assert (machine.archive(ann) / "Maildir/new/1").stat().st_uid == UID_FIRST + ann
    # Whatever is done about the first now, the second's home stays.
    machine.deliver(message="2")
    await machine.sync(ann)
    await machine.purge(ann)
    await machine.sync(ann)
    assert (machine.home() / "Maildir/new/2").exists()
    assert not machine.archive(ann).exists()


async def test_a_successor_of_one_that_was_never_made(machine: Machine) -> None:
    ann = await machine.create()
    await machine.delete(ann)
    second = await machine.create(reuse=True)
    await machine.sync(ann)
    await machine.sync(second)
    machine.deliver()
    await machine.purge(ann)
    await machine.sync(ann)
    assert machine.home().stat().st_uid == UID_FIRST + second
    assert (machine.home() / "Maildir/new/1").exists()


async def test_a_successor_comes_while_the_archiving_is_tried_again(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Dovecot was away after the account had been hidden, and before its home was moved."""
    ann = await machine.create()
    await machine.sync(ann)
    machine.deliver()
    await machine.delete(ann)

    async def fail(self: Commands, address: str) -> None:
        raise handler.CommandFailed(["doveadm"], "away")

    with monkeypatch.context() as patch:
        patch.setattr(Commands, "flush_auth_cache", fail)
        with pytest.raises(TryAgain, match="away"):
            await machine.sync(ann)
    second = await machine.create(reuse=True)
    with pytest.raises(TryAgain):
        await machine.sync(second)
    await machine.sync(ann)
    await machine.sync(second)
    assert machine.home().stat().st_uid == UID_FIRST + second
    assert list(machine.home().glob("Maildir/new/*")) == []
    assert (machine.archive(ann) / "Maildir/new/1").exists()


# Restored


async def test_restored_from_an_archive_that_is_gone(machine: Machine, worker_settings: WorkerSettings) -> None:
    ann = await machine.create()
    await machine.sync(ann)
    await machine.delete(ann)
    await machine.sync(ann)
    shutil.rmtree(machine.archive(ann))
    with pytest.raises(GiveUp, match=f"The archive of user {ann} is gone"):
        await machine.sync(ann)  # does not make it a box that never was
    assert (await machine.applied(ann)).proofs["maildir"]["result"] == "failed"
    await machine.restore(ann)
    await work_all(machine, worker_settings)
    job = (await machine.jobs())[-1]
    assert job.state == JobState.DEAD
    assert job.error == f"There is neither {machine.home()} nor an archive of user {ann}."
    assert (await machine.applied(ann)).proofs["maildir"] == {"result": "failed", "detail": job.error}
    assert await machine.shown(ann) == set()
    assert not machine.home().exists()


async def test_restored_when_the_archiving_was_not_reported(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Dovecot was away just after the home was moved. The mail must come back, not an empty home."""
    ann = await machine.create()
    await machine.sync(ann)
    machine.deliver()
    before = machine.disk()
    await machine.delete(ann)

    async def fail(*args: Any) -> None:
        raise handler.CommandFailed(["doveadm"], "away")

    with monkeypatch.context() as patch:
        patch.setattr(handler, "_prove_no_login", fail)
        with pytest.raises(TryAgain, match="away"):
            await machine.sync(ann)
    assert machine.archive(ann).exists()
    await machine.restore(ann)
    await machine.sync(ann)
    assert machine.disk() == before


# A database that was made anew


async def forget(machine: Machine) -> None:
    """To the worker it is the same as a database in which others got the ids."""
    await machine.as_owner("DELETE FROM applied")


async def refused(machine: Machine, user_id: int, before: Any) -> None:
    with pytest.raises(GiveUp, match="holds files, and nothing in the database says"):
        await machine.sync(user_id)
    assert machine.disk() == before
    assert await machine.shown(user_id) == set()
    row = await machine.applied(user_id)
    assert (row.version, row.stands, row.proofs["maildir"]["result"]) == (0, False, "failed")


async def test_a_home_of_which_nothing_is_known_is_nobodys(machine: Machine) -> None:
    ann = await machine.create()
    await machine.sync(ann)
    machine.deliver()
    await forget(machine)
    before = machine.disk()
    await refused(machine, ann, before)
    await refused(machine, ann, before)
    await machine.delete(ann)
    await refused(machine, ann, before)
    await machine.restore(ann)
    await refused(machine, ann, before)
    machine.host.trust_homes = True
    await machine.sync(ann)
    assert machine.disk() == before
    assert await machine.shown(ann) == SEEN
    machine.host.trust_homes = False
    await machine.sync(ann)
    assert await machine.shown(ann) == SEEN


async def test_an_archive_of_which_nothing_is_known_is_nobodys(machine: Machine) -> None:
    ann = await machine.create()
    await machine.sync(ann)
    machine.deliver()
    home = machine.disk()
    await machine.delete(ann)
    await machine.sync(ann)
    await forget(machine)
    before = machine.disk()
    await refused(machine, ann, before)
    await machine.restore(ann)
    await refused(machine, ann, before)
    machine.host.trust_homes = True
    await machine.sync(ann)
    assert machine.disk() == home
    await machine.delete(ann)
    await machine.sync(ann)
    machine.host.trust_homes = False
    await forget(machine)
    await machine.purge(ann)
    await refused(machine, ann, before)


async def test_an_empty_home_may_be_one_that_was_not_reported(machine: Machine) -> None:
    ann = await machine.create()
    await machine.sync(ann)
    await forget(machine)
    await machine.sync(ann)
    assert await machine.shown(ann) == SEEN
    await machine.delete(ann)
    await machine.sync(ann)
    await forget(machine)
    await machine.restore(ann)
    await machine.sync(ann)
    assert await machine.shown(ann) == SEEN


# A foreign home, a broken one


async def test_a_foreign_home_is_left_alone_and_shown(machine: Machine, worker_settings: WorkerSettings) -> None:
    machine.home().mkdir(mode=0o755)
    os.chown(machine.home(), 4711, 4711)
    (machine.home() / "letter").write_text("private")
    before = machine.disk()
    ann = await machine.create()
    await work_all(machine, worker_settings)
    [job] = await machine.jobs()
    assert (job.state, job.error, job.attempts) == (JobState.DEAD, f"{machine.home()} is the home of uid 4711.", 1)
    row = await machine.applied(ann)
    assert row.proofs["maildir"] == {"result": "failed", "detail": job.error}
    assert (row.version, row.stands) == (0, False)
    assert await machine.shown(ann) == set()
    assert machine.disk() == before
    # Once it is out of the way, the account can be had.
    shutil.rmtree(machine.home())
    await machine.sync(ann)
    assert await machine.shown(ann) == SEEN


async def test_a_home_that_broke_stays_shown_with_the_failed_proof(
    machine: Machine, worker_settings: WorkerSettings
) -> None:
    ann = await machine.create()
    await machine.sync(ann)
    os.chown(machine.home() / "Maildir/new", 4711, 4711)
    await work_all(machine, worker_settings)
    row = await machine.applied(ann)
    assert row.proofs["maildir"]["result"] == "failed"
    assert "belongs to uid 4711" in row.proofs["maildir"]["detail"]
    assert await machine.shown(ann) == SEEN


# Killed


class Killed(BaseException):
    """Nothing in the code under test may catch it."""


class Steps:
    """Counts what the handler does, each before it begins and after it has ended, and dies at the n-th."""

    def __init__(self) -> None:
        self.done = 0
        self.kill_at = -1
        self.lock = threading.Lock()

    def __call__(self) -> None:
        with self.lock:
            self.done += 1
            if self.done == self.kill_at:
                raise Killed


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> Iterator[Steps]:
    steps = Steps()

    def around(function: Callable[..., Any]) -> Callable[..., Any]:
        def stepped(*args: Any, **options: Any) -> Any:
            steps()
            result = function(*args, **options)
            steps()
            return result

        return stepped

    def around_async(function: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
        async def stepped(*args: Any, **options: Any) -> Any:
            steps()
            result = await function(*args, **options)
            steps()
            return result

        return stepped

    for name in ("ensure_home", "ensure_restored", "ensure_archived", "ensure_purged"):
        monkeypatch.setattr(handler, name, around(getattr(handler, name)))
    for name in ("_move", "_build", "_empty"):
        monkeypatch.setattr(fs, name, around(getattr(fs, name)))
    monkeypatch.setattr(handler, "write_applied", around_async(handler.write_applied))
    for name in ("flush_auth_cache", "kick_sessions", "list_sessions", "lookup_recipients", "lookup_users"):
        monkeypatch.setattr(Commands, name, around_async(getattr(Commands, name)))
    yield steps
    steps.kill_at = -1


async def run_killed(machine: Machine, steps: Steps, user_id: int, at: int) -> bool:
    """False when it ran through before that step."""
    steps.done, steps.kill_at = 0, at
    try:
        await machine.sync(user_id)
    except Killed:
        return True
    finally:
        steps.kill_at = -1
    return False


async def end_of(machine: Machine, user_id: int, name: str) -> Any:
    """Where all ended up, without what differs by account."""
    row = await machine.applied(user_id)
    result = {key: value for key, value in row.result.items() if key not in ("uid", "gid", "home")}
    return (
        state_of(machine, user_id, name),
        await machine.shown(user_id),
        (row.version, row.stands, {key: proof["result"] for key, proof in row.proofs.items()}, result),
        list((machine.root / "home/.staging").iterdir()),
        list((machine.root / "home/.trash").iterdir()),
    )


CASES = {
    "active": ([], []),
    "suspended": ([], [Machine.suspend]),
    "deleted": ([], [Machine.delete]),
    "restored": ([Machine.delete], [Machine.restore]),
    "purged": ([Machine.delete], [Machine.purge]),
    "deleted and purged": ([], [Machine.delete, Machine.purge]),
    # Killed at work on the first change, and found with the second as well.
    "deleted, then restored": ([], [Machine.delete, None, Machine.restore]),
    "restored, then deleted": ([Machine.delete], [Machine.restore, None, Machine.delete]),
    "deleted, then purged": ([], [Machine.delete, None, Machine.purge]),
    "suspended, then deleted": ([], [Machine.suspend, None, Machine.delete]),
}


@pytest.mark.parametrize("case", CASES)
async def test_killed_at_every_step(machine: Machine, steps: Steps, case: str) -> None:
    before, changes = CASES[case]
    cut = changes.index(None) if None in changes else len(changes)
    wanted: Any = None
    for at in range(200):
        name = f"u{at}"
        user_id = await machine.create(name)
        if case != "active":
            await machine.sync(user_id)
            machine.deliver(name)
        for change in before:
            await change(machine, user_id)
            await machine.sync(user_id)
        for change in changes[:cut]:
            await change(machine, user_id)
        killed = await run_killed(machine, steps, user_id, at)
        await machine.check_views(user_id)
        for change in changes[cut + 1 :]:
            await change(machine, user_id)
            await machine.check_views(user_id)
        await machine.sync(user_id)
        end = await end_of(machine, user_id, name)
        wanted = wanted or end  # At 0 nothing kills it.
        assert end == wanted, f"killed at step {at}"
        await machine.check_views(user_id)
        if at and not killed:
            assert at > 4, "nothing was counted"
            return
    pytest.fail("it never ran through")


async def test_killed_at_every_step_of_the_archiving_and_a_successor(machine: Machine, steps: Steps) -> None:
    for at in range(1, 200):
        name = f"u{at}"
        first = await machine.create(name)
        await machine.sync(first)
        machine.deliver(name)
        await machine.delete(first)
        killed = await run_killed(machine, steps, first, at)
        second = await machine.create(name, reuse=True)
        if killed:
            with pytest.raises(TryAgain):
                await machine.sync(second)
            await machine.sync(first)
        second_killed = True
        for again in range(1, 200):
            second_killed = await run_killed(machine, steps, second, again)
            await machine.check_views(second)
            if not second_killed:
                break
        assert not second_killed
        assert machine.home(name).stat().st_uid == UID_FIRST + second
        assert list(machine.home(name).glob("Maildir/new/*")) == []
        assert (machine.archive(first) / "Maildir/new/1").exists()
        assert await machine.shown(second) == SEEN
        if not killed:
            return


# Hostile rows

HOSTILE = [
    ("local_part = '..', address = '..@cacert.test'", "time that is none"),
    ("local_part = 'a/b', address = 'a/b@cacert.test'", "time that is none"),
    ("local_part = '/etc', address = '/etc@cacert.test'", "time that is none"),
    ("local_part = '', address = '@cacert.test'", "time that is none"),
    ("local_part = '.archive', address = '.archive@cacert.test'", "time that is none"),
    ("local_part = 'a\n', address = 'a\n@cacert.test'", "time that is none"),
    ("local_part = 'bob'", "by its address and"),
    ("address = 'bob@cacert.test'", "by its address and"),
    ("state = 'root'", "time that is none"),
    ("host = 'elsewhere'", "lives on another host"),
    ("version = 0", "impossible id or version"),
    ("version = -5", "impossible id or version"),
    (f"id = {UID_LAST - UID_FIRST + 1}", "above UID_LAST"),
    ("id = 2147483648", "impossible id or version"),
    (f"id = {2**32 - UID_FIRST}", "impossible id or version"),
    ("id = -3", "impossible id or version"),
]


async def assert_refused(machine: Machine, user_id: int, word: str) -> None:
    before = machine.disk()
    with pytest.raises(GiveUp, match=word):
        await sync_mailbox(machine.host, user_id)
    assert machine.disk() == before


async def test_hostile_rows(machine: Machine) -> None:
    bob = await machine.create("bob")
    await machine.sync(bob)
    for number, (change, word) in enumerate(HOSTILE):
        user_id = await machine.create(f"ann{number}")
        await machine.as_owner(f"UPDATE users SET {change} WHERE id = {user_id}")
        await assert_refused(machine, user_id if "id =" not in change else int(change.split()[-1]), word)


@pytest.mark.parametrize("hostile", ["deleted", "purged"])
async def test_hostile_row_of_a_deleted_account(machine: Machine, hostile: str) -> None:
    ann, bob = await machine.create(), await machine.create("bob")
    await machine.sync(ann)
    await machine.sync(bob)
    machine.deliver("bob")
    await machine.delete(ann)
    if hostile == "purged":
        await machine.purge(ann)
    await machine.as_owner(f"UPDATE users SET local_part = '../bob', address = '../bob@cacert.test' WHERE id = {ann}")
    await assert_refused(machine, ann, "time that is none")
    # A row that speaks of somebody else's mailbox moves nothing: it has another owner.
    await machine.as_owner(f"UPDATE users SET local_part = 'bob', address = 'bob@cacert.test' WHERE id = {ann}")
    await machine.sync(ann)
    assert (machine.home("bob") / "Maildir/new/1").exists()


async def test_hostile_domains(machine: Machine) -> None:
    await add_virtual_domain(machine)
    ann = await machine.create(domain=VIRTUAL)
    for name in ("a/b.test", "../..", "", "..", ".archive", "other.test/x"):
        await machine.as_owner(
            f"UPDATE domains SET name = '{name}' WHERE kind = 'virtual'",
            f"UPDATE users SET address = 'ann@{name}' WHERE id = {ann}",
        )
        await assert_refused(machine, ann, "time that is none")


@pytest.mark.parametrize(("kind", "word"), [("relay", "passed on to another host"), ("root", "that is none")])
async def test_hostile_kind_of_domain(machine: Machine, kind: str, word: str) -> None:
    await add_virtual_domain(machine)
    ann = await machine.create(domain=VIRTUAL)
    await machine.as_owner(f"UPDATE domains SET kind = '{kind}' WHERE name = '{VIRTUAL}'")
    await assert_refused(machine, ann, word)


async def test_nobody(machine: Machine) -> None:
    await assert_refused(machine, 4711, "There is no user 4711")


@pytest.mark.parametrize("column", ["access_ended_at", "purged_at"])
async def test_a_time_that_is_none(machine: Machine, column: str) -> None:
    """MariaDB takes the zeroth of the zeroth month from whoever turns its checks off, SQLite anything."""
    ann = await machine.create()
    value = "0000-00-00 00:00:00" if machine.test_database.kind == "mariadb" else "rubbish"
    await machine.as_owner(f"UPDATE users SET {column} = '{value}', state = 'deleted' WHERE id = {ann}")
    await assert_refused(machine, ann, "that is none")


# Without root


def die(*args: Any) -> None:
    raise RuntimeError


def as_nobody(settings: WorkerSettings, users: list[int], *, cut: str = "") -> list[Any]:
    """In a child that is nobody: what it made true for each, or why not. `cut` names the call at which it dies."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.setgroups([])
            os.setgid(65534)
            os.setuid(65534)
            if cut:
                setattr(handler, cut, die)

            async def work() -> list[Any]:
                found: list[Any] = []
                async with opened(settings) as host:
                    for user_id in users:
                        try:
                            outcome = await sync_mailbox(host, user_id)
                            await handler.write_applied(host.database, HOST, user_id, outcome, host.clock())
                            found.append([outcome.stands, outcome.proofs, outcome.result])
                        except (TryAgain, GiveUp) as error:
                            found.append(str(error))
                return found

            os.write(write, json.dumps(asyncio.run(work())).encode())
        except BaseException as error:
            os.write(write, json.dumps([repr(error)]).encode())
        finally:
            os._exit(0)
    os.close(write)
    with os.fdopen(read) as answer:
        found: list[Any] = json.load(answer)
    os.waitpid(child, 0)
    return found


@pytest.fixture
def nobodys(scratch: Path, sqlite_template: Path) -> WorkerSettings:
    for path in (scratch, scratch / "host"):
        path.mkdir(exist_ok=True)
        os.chown(path, 65534, 65534)
    shutil.copy(sqlite_template, scratch / "nobody.db")
    os.chown(scratch / "nobody.db", 65534, 65534)
    return WorkerSettings(
        database_url=SecretStr(f"sqlite+aiosqlite:///{scratch}/nobody.db"),
        wake_directory=scratch,
        mail_host=HOST,
        host_root=scratch / "host",
        uid_first=UID_FIRST,
        uid_last=UID_LAST,
        lock_file=scratch / "nobody.lock",
        durable=False,
    )


async def test_without_root(nobodys: WorkerSettings) -> None:
    """The owner is left as it is, which the proof says; and a successor still gets an empty home."""
    api = Database(nobodys.database_url.get_secret_value())
    side = Machine(nobodys.host_root, api, None, Clock(), None)  # type: ignore[arg-type]  # only its services
    await side.change(create_domain, DomainName(PRIMARY), DomainKind.PRIMARY)
    await side.change(create_host, HOST)
    ann = await side.create()
    [[stands, proofs, result]] = as_nobody(nobodys, [ann])
    assert (stands, result["uid"]) == (True, 65534)
    detail = f"owner 65534, mode 0700; its own uid {UID_FIRST + ann} needs root, which this worker is not"
    assert proofs["maildir"] == {"result": "ok", "detail": detail}
    assert side.home().stat().st_uid == 65534
    side.deliver()
    await side.delete(ann)
    second = await side.create(reuse=True)
    waits, gone, stands = as_nobody(nobodys, [second, ann, second])
    assert "not archived yet" in waits
    assert (gone[2]["archived"], stands[0]) == (True, True)
    side.deliver(message="2")
    await side.purge(ann)
    as_nobody(nobodys, [ann, ann, second])
    assert [path.name for path in side.home().glob("Maildir/new/*")] == ["2"]
    assert list((nobodys.host_root / "home/.archive").iterdir()) == []
    await side.delete(second)
    as_nobody(nobodys, [second, ann, second])
    await side.restore(second)
    as_nobody(nobodys, [second, ann])
    assert [path.name for path in side.home().glob("Maildir/new/*")] == ["2"]
    await api.close()


@pytest.mark.parametrize("at", ["hidden", "restoring"])
async def test_without_root_a_run_that_was_cut_off_is_known(nobodys: WorkerSettings, at: str) -> None:
    """All homes have one owner, so only `applied` tells whose the home in the place is."""
    api = Database(nobodys.database_url.get_secret_value())
    side = Machine(nobodys.host_root, api, None, Clock(), None)  # type: ignore[arg-type]  # only its services
    await side.change(create_domain, DomainName(PRIMARY), DomainKind.PRIMARY)
    await side.change(create_host, HOST)
    ann = await side.create()
    as_nobody(nobodys, [ann])
    side.deliver()
    if at == "restoring":
        await side.delete(ann)
        as_nobody(nobodys, [ann])
        await side.restore(ann)
        assert as_nobody(nobodys, [ann], cut="ensure_home") == ["RuntimeError()"]
        assert side.home().exists()
    await side.delete(ann)
    if at == "hidden":
        assert as_nobody(nobodys, [ann], cut="ensure_archived") == ["RuntimeError()"]
    second = await side.create(reuse=True)
    gone, stands = as_nobody(nobodys, [ann, second])
    assert (gone[2]["archived"], stands[0]) == (True, True)
    assert list(side.home().glob("Maildir/new/*")) == []
    assert (side.archive(ann) / "Maildir/new/1").exists()
    await api.close()
