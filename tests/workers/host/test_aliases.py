"""`aliases.sync` with a real postalias: run twice, killed at every step, given hostile rows, in bursts."""

import asyncio
import errno
import itertools
import os
import shutil
import signal
import stat
import subprocess
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from sqlalchemy import func, select

from app.models.hosts import hosts as hosts_table
from app.models.jobs import JobState, applied, jobs
from app.queue.claim import MAX_ATTEMPTS, claim
from app.queue.contracts import ALIASES_SYNC, MAILBOX_SYNC
from app.queue.wake import Listener, wake
from app.services.hosts import create_host
from app.workers.host import fs, pace
from app.workers.host.commands import CommandFailed, Commands
from app.workers.host.handlers import aliases as handler
from app.workers.host.handlers.aliases import ensure_file, make_plan
from app.workers.host.loop import Worker, _begin
from app.workers.host.pace import Pace
from app.workers.host.rows import read_aliases
from tests.conftest import HOST, PRIMARY
from tests.workers.host.aliased import OUTSIDE, SEND_AS, Aliased, aliased, dump, no_pause
from tests.workers.host.machine import (
    VIRTUAL,
    add_virtual_domain,
    machine,
    root,
    until,
    worker_process,
    worker_settings,
)
from tests.workers.host.test_fs import Killed
from tests.workers.host.test_loop import only_sqlite, until_started

pytestmark = pytest.mark.asyncio
__all__ = ["aliased", "machine", "no_pause", "root", "worker_settings"]

DONE, READY, DEAD, SUPERSEDED = JobState.DONE, JobState.READY, JobState.DEAD, JobState.SUPERSEDED
OK_DETAIL = "it leads where the row says"


# What it makes


async def test_an_alias_is_in_the_map_and_proved(aliased: Aliased) -> None:
    (aliased.base / "recipients").write_text(f"ann@{PRIMARY} ann@{PRIMARY}\n")
    ann = await aliased.machine.create()
    await aliased.machine.sync(ann)
    info = await aliased.add("info", ann, OUTSIDE)
    assert await aliased.run() == 1
    assert aliased.answers() == {"info": f"ann@{PRIMARY}, {OUTSIDE}"}
    assert await aliased.proof(info) == (1, "ok", OK_DETAIL)
    assert await aliased.states() == [DONE]
    assert aliased.text().splitlines()[1:] == ["# version: 1", f"info: ann@{PRIMARY},", f"    {OUTSIDE}"]
    for name, mode in (("", 0o755), ("aliases", 0o644), ("aliases.lmdb", 0o644), (".new", 0o700)):
        status = (aliased.directory / name).stat()
        assert (stat.S_IMODE(status.st_mode), status.st_uid, status.st_gid) == (mode, 0, 0), name
    assert list((aliased.directory / ".new").iterdir()) == []
    row = await aliased.applied(info)
    assert row is not None
    assert row.stands


async def test_modes_do_not_depend_on_the_umask(aliased: Aliased) -> None:
    await aliased.add("info", OUTSIDE)
    old = os.umask(0o077)
    try:
        await aliased.run()
    finally:
        os.umask(old)
    modes = [stat.S_IMODE((aliased.directory / name).stat().st_mode) for name in ("", "aliases", "aliases.lmdb")]
    assert modes == [0o755, 0o644, 0o644]


async def test_unchanged_rows_build_nothing(aliased: Aliased) -> None:
    info = await aliased.add("info", OUTSIDE)
    await aliased.run()
    before = [(aliased.directory / name).stat() for name in ("aliases", "aliases.lmdb")]
    await aliased.change(info, OUTSIDE)
    await aliased.add("pr", OUTSIDE, kind=SEND_AS)
    await aliased.run()
    assert await aliased.states() == [DONE] * 3
    assert [(aliased.directory / name).stat().st_ino for name in ("aliases", "aliases.lmdb")] == [
        s.st_ino for s in before
    ]
    assert await aliased.proof(info) == (2, "ok", OK_DETAIL)


async def test_one_run_does_for_all_that_wait(aliased: Aliased) -> None:
    ids = [await aliased.add(f"a{number}", OUTSIDE) for number in range(5)]
    await aliased.change(ids[0], "other@else.example")
    await aliased.delete(ids[1])
    assert await aliased.run() == 1
    assert await aliased.run() == 0
    # The claimed one was done; an older version of the same alias is told apart from what was asked for.
    assert await aliased.states() == [DONE, SUPERSEDED, DONE, DONE, DONE, DONE, DONE]
    assert aliased.answers() == {"a0": "other@else.example"} | {f"a{n}": OUTSIDE for n in (2, 3, 4)}
    assert [await aliased.proof(i) for i in ids[:3]] == [
        (2, "ok", OK_DETAIL),
        (2, "ok", "the address is unknown"),
        (1, "ok", OK_DETAIL),
    ]
    row = await aliased.applied(ids[1])
    assert row is not None
    assert not row.stands


async def test_jobs_that_wait_to_be_tried_again_are_done_too(aliased: Aliased) -> None:
    await aliased.add("one", OUTSIDE)
    await aliased.machine.as_owner("UPDATE jobs SET run_at = '2030-01-01 00:00:00', attempts = 3, error = 'not yet'")
    await aliased.add("two", OUTSIDE)
    await aliased.run()
    assert await aliased.states() == [DONE, DONE]
    assert [job.error for job in await aliased.machine.jobs()] == [None, None]


async def test_where_else_postfix_looks(aliased: Aliased) -> None:
    await add_virtual_domain(aliased.machine)
    pr = await aliased.add("pr", OUTSIDE, "b@else.example", kind=SEND_AS)
    there = await aliased.add("there", "c@else.example", OUTSIDE, domain=VIRTUAL)
    await aliased.run()
    assert [await aliased.proof(i) for i in (pr, there)] == [(1, "ok", OK_DETAIL)] * 2
    assert aliased.answers() == {}
    for alias_id in (pr, there):
        await aliased.delete(alias_id)
    await aliased.run(publish=False)  # the maps still have them
    words = {pr: "its map leads to b@else.example, ", there: "its map leads to c@else.example, "}
    for alias_id, begin in words.items():
        version, result, detail = await aliased.proof(alias_id)
        assert (version, result) == (1, "failed")
        assert detail == f"{begin}{OUTSIDE}, not to nobody"
    assert (await aliased.states())[2:] == [READY, READY]
    aliased.machine.clock.forward(minutes=1)
    await aliased.run()
    assert [await aliased.proof(i) for i in (pr, there)] == [(2, "ok", "the address is unknown")] * 2
    assert await aliased.states() == [DONE] * 4


async def test_a_successor_has_the_name_of_a_deleted_alias(aliased: Aliased) -> None:
    first = await aliased.add("info", OUTSIDE)
    await aliased.run()
    await aliased.delete(first)
    second = await aliased.add("info", "new@else.example")
    await aliased.run()
    assert aliased.answers() == {"info": "new@else.example"}
    assert await aliased.proof(first) == (2, "ok", "the address is another alias's now")
    assert await aliased.proof(second) == (1, "ok", OK_DETAIL)


async def test_nobody_stands(aliased: Aliased) -> None:
    ann = await aliased.machine.create()
    info = await aliased.add("info", ann)
    await aliased.run()
    assert aliased.answers() == {}
    assert await aliased.proof(info) == (1, "ok", "none of its destinations stands, and so nobody gets its mail")


@only_sqlite
async def test_without_postfix(aliased: Aliased) -> None:
    aliased.machine.host.commands = Commands()
    info = await aliased.add("info", OUTSIDE)
    await aliased.run()
    row = await aliased.applied(info)
    assert row is not None
    assert (row.version, row.proofs) == (1, {"postfix": {"result": "not configured", "detail": None}})
    assert not aliased.directory.exists()


async def test_two_hosts(aliased: Aliased) -> None:
    await aliased.machine.change(create_host, "second")
    info = await aliased.add("info", OUTSIDE, hosts=(HOST, "second"))
    await aliased.run()
    found = [(job.host, job.state) for job in await aliased.machine.jobs() if job.kind == ALIASES_SYNC]
    assert found == [(HOST, DONE), ("second", READY)]
    assert await aliased.applied(info, "second") is None
    async with aliased.machine.api.read.connect() as connection:
        assert (await connection.execute(select(func.count()).select_from(hosts_table))).scalar() == 2


async def test_no_such_alias(aliased: Aliased) -> None:
    info = await aliased.add("info", OUTSIDE)
    await aliased.machine.as_owner("UPDATE jobs SET subject_id = 4711")
    await aliased.add("other", OUTSIDE)
    await aliased.run()
    assert [(job.state, job.error) for job in await aliased.machine.jobs()] == [
        (DEAD, "There is no alias 4711."),
        (DONE, None),
    ]
    assert await aliased.applied(4711) is None
    assert set(aliased.answers()) == {"info", "other"}
    assert await aliased.applied(info) is None


async def test_applied_never_falls(aliased: Aliased) -> None:
    info = await aliased.add("info", OUTSIDE)
    await aliased.run()
    await aliased.machine.as_owner("UPDATE applied SET version = 9", "UPDATE jobs SET state = 'ready', fence = 0")
    await aliased.run()
    row = await aliased.applied(info)
    assert row is not None
    assert row.version == 9


# Hostile rows


HOSTILE_ROWS = {
    "pipe": "UPDATE alias_destinations SET address = '|touch /tmp/x' WHERE alias_id = 1",
    "quoted pipe": "UPDATE alias_destinations SET address = '\"|touch /tmp/x\"' WHERE alias_id = 1",
    "pipe at a domain": "UPDATE alias_destinations SET address = '|sh@else.example' WHERE alias_id = 1",
    "file": "UPDATE alias_destinations SET address = '/tmp/file' WHERE alias_id = 1",
    "file at a domain": "UPDATE alias_destinations SET address = '/tmp/f@else.example' WHERE alias_id = 1",
    "include": "UPDATE alias_destinations SET address = ':include:/etc/passwd' WHERE alias_id = 1",
    "option": "UPDATE alias_destinations SET address = '-f@else.example' WHERE alias_id = 1",
    "newline": "UPDATE alias_destinations SET address = 'a@else.example\nroot: evil@else.example' WHERE alias_id = 1",
    "blank": "UPDATE alias_destinations SET address = ' a@else.example' WHERE alias_id = 1",
    "two": "UPDATE alias_destinations SET address = 'a@else.example, |sh' WHERE alias_id = 1",
    "owner": f"UPDATE aliases SET local_part = 'owner-good', address = 'owner-good@{PRIMARY}' WHERE id = 1",
    "returns": f"UPDATE aliases SET local_part = 'returns', address = 'returns@{PRIMARY}' WHERE id = 1",
    "name with a line": "UPDATE aliases SET local_part = 'a\n|b' WHERE id = 1",
    "name with a colon": "UPDATE aliases SET local_part = 'a: |sh' WHERE id = 1",
    "another name": "UPDATE aliases SET local_part = 'other' WHERE id = 1",
    "relay": "UPDATE domains SET kind = 'relay', primary_slot = NULL WHERE name = 'other.test'; "
    "UPDATE aliases SET domain_id = 2, address = 'bad@other.test' WHERE id = 1",
    "kind": "UPDATE aliases SET kind = 'pipe' WHERE id = 1",
    "version": "UPDATE aliases SET version = -1 WHERE id = 1",
}


@pytest.mark.parametrize("name", HOSTILE_ROWS)
async def test_a_hostile_row_harms_nobody_else(aliased: Aliased, name: str) -> None:
    await add_virtual_domain(aliased.machine)
    bad = await aliased.add("bad", OUTSIDE)
    good = await aliased.add("good", OUTSIDE)
    await aliased.machine.as_owner(*HOSTILE_ROWS[name].split("; "))
    await aliased.run()
    assert aliased.answers() == {"good": OUTSIDE}
    assert await aliased.proof(good) == (1, "ok", OK_DETAIL)
    assert await aliased.states() == [DEAD, DONE]
    version, result, detail = await aliased.proof(bad)
    assert (version, result) == (0, "failed")
    assert detail.startswith("Alias 1 ")
    assert (await aliased.machine.jobs())[0].error == detail


@only_sqlite
async def test_characters_that_the_other_database_refuses(aliased: Aliased) -> None:
    bad = await aliased.add("bad", OUTSIDE)
    await aliased.add("good", OUTSIDE)
    await aliased.machine.as_owner(f"UPDATE alias_destinations SET address = 'ä@else.example' WHERE alias_id = {bad}")
    await aliased.run()
    assert set(aliased.answers()) == {"good"}


async def test_two_rows_of_one_address(aliased: Aliased) -> None:
    first = await aliased.add("info", OUTSIDE)
    second = await aliased.add("info", "thief@else.example")
    await aliased.run()
    assert aliased.answers() == {"info": OUTSIDE}
    assert (await aliased.proof(first))[1] == "ok"
    assert await aliased.proof(second) == (0, "failed", f"Alias 2 has the address of alias 1, info@{PRIMARY}.")
    assert await aliased.states() == [DONE, DEAD]


async def test_a_job_in_another_lane_waits_for_the_lane(aliased: Aliased, monkeypatch: pytest.MonkeyPatch) -> None:
    """The lane is what the API wrote."""
    for name in ("one", "two"):
        await aliased.add(name, OUTSIDE)
    await aliased.machine.as_owner("UPDATE jobs SET lane = 'elsewhere' WHERE id = 2")
    at_work = 0
    make_true = handler.make_true

    async def alone(*args: Any) -> Any:
        nonlocal at_work
        at_work += 1
        assert at_work == 1
        await asyncio.sleep(0.05)
        try:
            return await make_true(*args)
        finally:
            at_work -= 1

    monkeypatch.setattr(handler, "make_true", alone)
    await aliased.publish()
    host = aliased.machine.host
    claims = await claim(host.database, HOST, host.clock(), limit=8, kinds=[ALIASES_SYNC])
    assert len(claims) == 2
    await asyncio.gather(*(aliased.worker.work(taken) for taken in claims))
    assert await aliased.states() == [DONE, DONE]


# The hand-made file


async def test_a_hand_made_line_stays_in_force(aliased: Aliased) -> None:
    by_hand = aliased.base / "hand-made"
    by_hand.write_text('# ours\nroot: ann\n\n  # more\nInfo:\n  |prog\n"pr": x\n')
    before = by_hand.stat()
    aliased.machine.host.hand_made_aliases = by_hand
    ids = [await aliased.add("info", OUTSIDE), await aliased.add("pr", OUTSIDE, kind=SEND_AS)]
    other = await aliased.add("other", OUTSIDE)
    await aliased.run()
    assert aliased.answers() == {"other": OUTSIDE}
    assert await aliased.proof(other) == (1, "ok", OK_DETAIL)
    assert await aliased.states() == [DEAD, DEAD, DONE]
    for alias_id, name, line in zip(ids, ("info", "pr"), (5, 7), strict=True):
        version, result, detail = await aliased.proof(alias_id)
        assert (version, result) == (0, "failed")
        assert detail.startswith(f"{by_hand}, line {line}, defines {name} too")
    after = by_hand.stat()
    assert (before.st_mtime_ns, before.st_ino, before.st_size) == (after.st_mtime_ns, after.st_ino, after.st_size)
    by_hand.write_text("")
    for alias_id, kind in zip(ids, ("info", "pr"), strict=True):
        await aliased.change(alias_id, OUTSIDE)
        assert kind
    await aliased.run()
    assert aliased.answers() == {"other": OUTSIDE, "info": OUTSIDE}


async def test_a_hand_made_file_that_is_missing_is_said(aliased: Aliased) -> None:
    aliased.machine.host.hand_made_aliases = aliased.base / "nowhere"
    await aliased.add("info", OUTSIDE)
    await aliased.run()
    [job] = await aliased.machine.jobs()
    assert (job.state, job.error) == (READY, f"HAND_MADE_ALIASES ({aliased.base}/nowhere): there is no such file")


# What stands is never lost


async def test_an_older_version_never_replaces_a_newer(aliased: Aliased) -> None:
    info = await aliased.add("info", OUTSIDE)
    await aliased.run()
    file = aliased.directory / "aliases"
    file.write_text(aliased.text().replace("# version: 1", "# version: 7") + "kept: x@else.example\n")
    await aliased.change(info, "new@else.example")
    await aliased.run()
    job = (await aliased.machine.jobs())[1]
    assert (job.state, job.attempts) == (READY, 1)
    assert job.error.startswith(f"{file} is of version 7, and the database is at 2.")
    assert "remove that file" in job.error
    assert aliased.answers() == {"info": OUTSIDE}
    file.unlink()
    aliased.machine.clock.forward(minutes=1)
    await aliased.run()
    assert aliased.answers() == {"info": "new@else.example"}


async def test_the_version_rises_with_every_change(aliased: Aliased) -> None:
    first = await aliased.add("one", OUTSIDE)
    seen = []
    for step in (lambda: aliased.add("two", OUTSIDE), lambda: aliased.change(first, "b@else.example")):
        await step()
        seen.append((await read_aliases(aliased.machine.host.database)).version)
    await aliased.delete(first)
    seen.append((await read_aliases(aliased.machine.host.database)).version)
    assert seen == [2, 3, 4]


async def in_place(aliased: Aliased) -> bool:
    """One build, without a job."""
    host = aliased.machine.host
    rows = await read_aliases(host.database)
    return await ensure_file(host, await make_plan(host, rows), rows.version)


CALLS = ("open", "mkdir", "unlink", "rename", "stat", "fstat", "fchmod", "fsync", "listdir", "fdopen")


@contextmanager
def killed_in_fs(step: int) -> Iterator[None]:
    """Die instead of making the system call number `step` of the worker, or instead of starting postalias."""
    steps = itertools.count(1)

    def counted(call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            if next(steps) == step:
                raise Killed
            return call(*args, **kwargs)

        return wrapper

    with pytest.MonkeyPatch.context() as patch:
        ours = SimpleNamespace(**{name: getattr(os, name) for name in dir(os)})
        for name in CALLS:
            setattr(ours, name, counted(getattr(os, name)))
        patch.setattr(fs, "os", ours)
        patch.setattr(Commands, "build_aliases", counted(Commands.build_aliases))
        yield


OLD = {"info": OUTSIDE, "kept": OUTSIDE}
NEW = {"info": "new@else.example", "kept": OUTSIDE, "more": OUTSIDE}


@only_sqlite
@pytest.mark.parametrize("first", [False, True])
async def test_killed_before_every_system_call(aliased: Aliased, first: bool) -> None:
    """Postfix has all of the old or all of the new, and the next run ends in the same place."""
    info = await aliased.add("info", OUTSIDE)
    await aliased.add("kept", OUTSIDE)
    await in_place(aliased)
    keep = {name: (aliased.directory / name).read_bytes() for name in ("aliases", "aliases.lmdb")}
    await aliased.change(info, "new@else.example")
    await aliased.add("more", OUTSIDE)
    aliased.machine.host.homes = replace(aliased.machine.host.homes, durable=True)
    seen = set()
    for step in itertools.count(1):
        shutil.rmtree(aliased.directory)
        if not first:
            aliased.directory.mkdir(mode=0o755)
            for name, data in keep.items():
                (aliased.directory / name).write_bytes(data)
        try:
            with killed_in_fs(step):
                await in_place(aliased)
        except Killed:
            if not first or (aliased.directory / "aliases.lmdb").exists():
                answers = aliased.answers()
                assert answers in (OLD, NEW), step
                seen.add(len(answers))
            await in_place(aliased)
            assert aliased.answers() == NEW, step
            assert aliased.text().count("else.example") == 3
            assert list((aliased.directory / ".new").iterdir()) == []
        else:
            break
    assert step > 30
    assert seen == ({3} if first else {2, 3})


@only_sqlite
async def test_postalias_is_killed_in_the_middle(aliased: Aliased, monkeypatch: pytest.MonkeyPatch) -> None:
    await aliased.add("info", OUTSIDE)
    await in_place(aliased)
    await aliased.add("kept", OUTSIDE)

    async def half(self: Commands, file: Path) -> None:
        file.with_suffix(".lmdb").write_bytes(b"half of a map")
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(Commands, "build_aliases", half)
        with pytest.raises(Killed):
            await in_place(aliased)
    assert aliased.answers() == {"info": OUTSIDE}
    assert (aliased.directory / ".new/aliases.lmdb").exists()
    await in_place(aliased)
    assert aliased.answers() == OLD


@only_sqlite
async def test_killed_between_the_two_renames_and_then_changed_back(
    aliased: Aliased, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The text that stands is right again, and the map is not of it."""
    info = await aliased.add("info", OUTSIDE)
    await aliased.run()
    await aliased.change(info, "new@else.example")
    rename = os.rename

    def map_only(source: Any, target: Any, **directories: Any) -> None:
        rename(source, target, **directories)
        if target == "aliases.lmdb":
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", map_only)
        with pytest.raises(Killed):
            await in_place(aliased)
    assert aliased.answers() == {"info": "new@else.example"}
    await aliased.change(info, OUTSIDE)
    await aliased.run()
    assert aliased.answers() == {"info": OUTSIDE}
    assert await aliased.proof(info) == (3, "ok", OK_DETAIL)


@only_sqlite
@pytest.mark.parametrize("harm", ["missing", "rubbish", "another's"])
async def test_a_map_that_is_not_of_its_text(aliased: Aliased, harm: str) -> None:
    info = await aliased.add("info", OUTSIDE)
    await aliased.run()
    file = aliased.directory / "aliases.lmdb"
    if harm == "missing":
        file.unlink()
    elif harm == "rubbish":
        file.write_bytes(b"x" * 8192)
    else:
        (aliased.base / "x").write_text("info: thief@else.example\n")
        await aliased.machine.host.commands.build_aliases(aliased.base / "x")
        (aliased.base / "x.lmdb").rename(file)
    await aliased.change(info, OUTSIDE)
    await aliased.run()
    assert aliased.answers() == {"info": OUTSIDE}
    assert (await aliased.states())[1] == DONE


@pytest.fixture
def small_disk(aliased: Aliased) -> Iterator[Callable[[str], None]]:
    aliased.directory.mkdir(mode=0o755)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=96k,mode=0755", "tmpfs", aliased.directory], check=True)

    def resize(size: str) -> None:
        subprocess.run(["mount", "-o", f"remount,size={size}", aliased.directory], check=True)

    yield resize
    subprocess.run(["umount", aliased.directory], check=True)


@only_sqlite
async def test_a_full_disk(aliased: Aliased, small_disk: Callable[[str], None]) -> None:
    await aliased.add("info", OUTSIDE)
    await aliased.run()
    await aliased.add_many(1500)
    await aliased.run()
    assert aliased.answers() == {"info": OUTSIDE}
    found = [job for job in await aliased.machine.jobs() if job.state == READY]
    assert len(found) == 1500
    assert {job.attempts for job in found} == {1}
    assert found[0].error.endswith("postalias made a map of 0 aliases and not of these 1501; is the disk full?")
    await aliased.add_many(1500, "m")  # now the text alone is too much
    aliased.machine.clock.forward(minutes=1)
    await aliased.run()
    assert aliased.answers() == {"info": OUTSIDE}
    found = [job for job in await aliased.machine.jobs() if job.state == READY]
    assert os.strerror(errno.ENOSPC) in found[0].error
    assert list((aliased.directory / ".new").iterdir()) == []
    small_disk("8m")
    aliased.machine.clock.forward(minutes=1)
    await aliased.run()
    assert len(aliased.answers()) == 3001
    assert set(await aliased.states()) == {DONE}


async def test_what_postalias_complains_of_is_a_failure(aliased: Aliased, monkeypatch: pytest.MonkeyPatch) -> None:
    """It exits 0."""
    await aliased.add("info", OUTSIDE)
    await aliased.run()
    await aliased.add("more", OUTSIDE)
    render = handler.render
    monkeypatch.setattr(handler, "render", lambda *args: render(*args) + b"info: twice@else.example\n")
    await aliased.run()
    job = (await aliased.machine.jobs())[1]
    assert job.state == READY
    assert "duplicate entry" in job.error
    assert aliased.answers() == {"info": OUTSIDE}


async def test_a_directory_that_others_can_change(aliased: Aliased) -> None:
    aliased.directory.mkdir(mode=0o755)
    aliased.directory.chmod(0o777)
    await aliased.add("info", OUTSIDE)
    await aliased.run()
    [job] = await aliased.machine.jobs()
    assert job.state == READY
    assert "root alone must own it" in job.error
    assert list(aliased.directory.iterdir()) == []


async def test_what_does_not_pass_is_dead_after_all_tries(aliased: Aliased, monkeypatch: pytest.MonkeyPatch) -> None:
    async def away(self: Commands, names: Any) -> Any:
        raise CommandFailed(["/usr/sbin/postmap"], "was killed after 30 seconds")

    for name in ("one", "two"):
        await aliased.add(name, OUTSIDE)
    with monkeypatch.context() as patch:
        patch.setattr(Commands, "lookup_local_aliases", away)
        for _ in range(2 * MAX_ATTEMPTS):
            await aliased.run()
            aliased.machine.clock.forward(minutes=6)
    found = await aliased.machine.jobs()
    assert [(job.state, job.attempts) for job in found] == [(DEAD, MAX_ATTEMPTS)] * 2
    assert {"/usr/sbin/postmap: was killed after 30 seconds"} == {job.error.partition(" (gave up")[0] for job in found}
    assert set(aliased.answers()) == {"one", "two"}


# When it is done


async def test_pace() -> None:
    turn = Pace()
    assert turn.seconds_left(0) == 0
    turn.begin(0, 1)
    assert (turn.seconds_left(0), turn.seconds_left(0.25), turn.seconds_left(5)) == (1, 0.75, 0)
    pauses = []
    now = 1.0
    for _ in range(5):
        turn.begin(now, 1000)
        pauses.append(turn.seconds_left(now))
        now += pauses[-1]
    assert pauses == [2, 4, 8, 8, 8]
    turn.begin(now, 49)
    assert turn.seconds_left(now) == 1
    turn.begin(now + 1, 50)
    assert turn.seconds_left(now + 1) == 2
    # A burst that comes after a quiet hour begins anew.
    turn.begin(now + 3600, 1000)
    assert turn.seconds_left(now + 3600) == 2


@pytest.mark.parametrize("rate", [80, 200, 1000, 5000, 100_000])
async def test_ten_thousand_changes_are_a_few_runs(rate: float) -> None:
    """However fast they come: what waits when a run begins is done by it."""
    turn, now, done, runs = Pace(), 0.0, 0, 0
    while done < 10_000:
        now += turn.seconds_left(now)
        came = min(10_000, int(now * rate) + 1)
        turn.begin(now, came - done)
        done, runs = came, runs + 1
    assert runs <= 20


@asynccontextmanager
async def at_work(aliased: Aliased, **changed: Any) -> AsyncIterator[Worker]:
    settings = aliased.settings.model_copy(update={"poll_seconds": 0.05, "sweep_minutes": 1000} | changed)
    worker = Worker(aliased.machine.host, settings)
    worker.sweep = nothing  # type: ignore[method-assign]  # has tests of its own
    listener = Listener(settings.wake_directory, HOST)
    await _begin(worker)
    task = asyncio.create_task(worker.run(listener))
    try:
        yield worker
    finally:
        worker.stopping.set()
        await asyncio.wait_for(task, 30)
        listener.close()


async def nothing() -> None:
    return None


def ended(aliased: Aliased, count: int) -> Callable[[], Awaitable[bool]]:
    async def all_ended() -> bool:
        query = select(func.count()).select_from(jobs).where(jobs.c.state == DONE, jobs.c.kind == ALIASES_SYNC)
        async with aliased.machine.api.read.connect() as connection:
            return (await connection.execute(query)).scalar_one() == count

    return all_ended


async def test_a_burst_of_ten_thousand(
    aliased: Aliased, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    monkeypatch.setattr(pace, "SHORTEST", 1.0)
    monkeypatch.setattr(pace, "LONGEST", 8.0)
    builds: list[float] = []
    build = Commands.build_aliases

    async def counted(self: Commands, file: Path) -> None:
        builds.append(time.monotonic())
        await build(self, file)

    monkeypatch.setattr(Commands, "build_aliases", counted)
    await aliased.publish()
    async with at_work(aliased):
        for start in range(0, 10_000, 500):
            await aliased.add_many(500, start=start)
            wake(aliased.settings.wake_directory, HOST)
        await until(ended(aliased, 10_000), seconds=60)
    assert len(builds) <= 20
    assert all(later - earlier > 0.9 for earlier, later in itertools.pairwise(builds))
    assert len(aliased.answers()) == 10_000
    async with aliased.machine.api.read.connect() as connection:
        good = select(func.count()).select_from(applied).where(applied.c.version == 1, applied.c.stands)
        assert (await connection.execute(good)).scalar() == 10_000


@only_sqlite
async def test_a_signal_ends_the_wait(aliased: Aliased, monkeypatch: pytest.MonkeyPatch) -> None:
    """The job at hand is done at once, and the others wait for the next start."""
    monkeypatch.setattr(pace, "SHORTEST", 1000.0)
    await aliased.publish()
    async with at_work(aliased):
        await aliased.add("one", OUTSIDE)
        await until(ended(aliased, 1))
        await aliased.add("two", OUTSIDE)

        async def is_taken() -> bool:
            return (await aliased.states())[1] == JobState.RUNNING

        await until(is_taken)
        began = time.monotonic()
    assert time.monotonic() - began < 10
    assert await aliased.states() == [DONE, DONE]
    assert set(aliased.answers()) == {"one", "two"}


@only_sqlite
async def test_sigterm_ends_the_wait_of_the_real_process(aliased: Aliased) -> None:
    for name in ("one", "two"):
        await aliased.add(name, OUTSIDE)
    await aliased.publish()
    code = "from app.workers.host import pace; pace.SHORTEST = 1000.0; from app.cli.main import main; main()"
    with worker_process(aliased.settings, code) as process:
        await until_started(aliased.machine, process)
        await until(ended(aliased, 2))
        await aliased.add("three", OUTSIDE)

        async def is_taken() -> bool:
            return (await aliased.states())[2] == JobState.RUNNING

        await until(is_taken)
        process.send_signal(signal.SIGTERM)
        assert await asyncio.to_thread(process.wait, 15) == 0
    assert await aliased.states() == [DONE] * 3


@only_sqlite
async def test_an_alias_that_waits_for_its_turn_is_in_nobodys_way(
    aliased: Aliased, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even where one job at a time is done, nor of the account with the same number."""
    monkeypatch.setattr(pace, "SHORTEST", 1000.0)
    (aliased.base / "recipients").write_text(f"ann@{PRIMARY} ann@{PRIMARY}\n")
    await aliased.publish()
    async with at_work(aliased, concurrency=1):
        one = await aliased.add("one", OUTSIDE)
        await until(ended(aliased, 1))
        await aliased.change(one, "new@else.example")

        async def is_taken() -> bool:
            return (await aliased.states())[1] == JobState.RUNNING

        await until(is_taken)
        assert await aliased.machine.create() == one

        async def is_ready() -> bool:
            return await aliased.machine.ready() == 1

        await until(is_ready)
        assert await is_taken()


# Accounts come


@only_sqlite
async def test_the_file_follows_an_account_that_comes_to_stand(aliased: Aliased) -> None:
    (aliased.base / "recipients").write_text(f"ann@{PRIMARY} ann@{PRIMARY}\n")
    ann = await aliased.machine.create()
    info, other = await aliased.add("info", ann, OUTSIDE), await aliased.add("other", ann)
    await aliased.machine.as_owner(f"UPDATE jobs SET run_at = '2030-01-01 00:00:00' WHERE kind = '{MAILBOX_SYNC}'")
    await aliased.run()
    assert aliased.answers() == {"info": OUTSIDE}
    async with at_work(aliased):
        await aliased.machine.as_owner("UPDATE jobs SET run_at = created_at")

        async def follows() -> bool:
            return aliased.answers() == {"info": f"ann@{PRIMARY}, {OUTSIDE}", "other": f"ann@{PRIMARY}"}

        await until(follows)

        async def proved() -> bool:
            return await aliased.proof(other) == (1, "ok", OK_DETAIL)

        await until(proved)
    assert await aliased.states() == [DONE, DONE]
    assert info
    assert dump(aliased.base / "postfix", aliased.directory / "aliases") == aliased.answers()
