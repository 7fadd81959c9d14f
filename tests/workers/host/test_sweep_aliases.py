"""The sweep over aliases: every kind of drift is found, changes nothing when only asked, and is repaired."""

from collections.abc import Awaitable, Callable

import pytest

from app.queue.contracts import ALIASES_SYNC
from app.workers.host.commands import Commands
from app.workers.host.loop import Worker, _begin
from app.workers.host.sweep import Report, sweep
from tests.conftest import PRIMARY
from tests.workers.host.aliased import OUTSIDE, SEND_AS, Aliased, aliased, no_pause
from tests.workers.host.machine import VIRTUAL, add_virtual_domain, machine, root, sweep_command, worker_settings
from tests.workers.host.test_aliases import OK_DETAIL
from tests.workers.host.test_loop import only_sqlite
from tests.workers.host.test_sweep import everything

pytestmark = pytest.mark.asyncio
__all__ = ["aliased", "machine", "no_pause", "root", "worker_settings"]


async def run(aliased: Aliased, *, dry_run: bool = False, publish: bool = True) -> Report:
    if publish:
        await aliased.publish()
    return await sweep(aliased.machine.host, Worker(aliased.machine.host, aliased.settings).lane, dry_run=dry_run)


async def build(aliased: Aliased, text: str) -> None:
    """Somebody else's map in place of ours."""
    (aliased.base / "x").write_text(text)
    await aliased.machine.host.commands.build_aliases(aliased.base / "x")
    (aliased.base / "x.lmdb").rename(aliased.directory / "aliases.lmdb")


async def job_lost(aliased: Aliased) -> None:
    await aliased.change(1, "new@else.example")
    await aliased.machine.as_owner("DELETE FROM jobs")


async def deletion_lost(aliased: Aliased) -> None:
    await aliased.delete(1)
    await aliased.machine.as_owner("DELETE FROM jobs")


async def applied_lost(aliased: Aliased) -> None:
    await aliased.machine.as_owner("DELETE FROM applied WHERE subject_id = 1")


async def failed_proof(aliased: Aliased) -> None:
    await aliased.machine.as_owner(
        """UPDATE applied SET proofs = '{"postfix": {"result": "failed", "detail": "then"}}' WHERE subject_id = 1"""
    )


async def another_map(aliased: Aliased) -> None:
    await build(aliased, f"info: thief@else.example\nother: {OUTSIDE}\n")


async def half_a_map(aliased: Aliased) -> None:
    await build(aliased, f"other: {OUTSIDE}\n")


async def deleted_is_answered(aliased: Aliased) -> None:
    await build(aliased, f"info: {OUTSIDE}\nother: {OUTSIDE}\ngone: {OUTSIDE}\n")


async def stranger(aliased: Aliased) -> None:
    await build(aliased, f"info: {OUTSIDE}\nother: {OUTSIDE}\nroot: thief@else.example\n")


async def no_map(aliased: Aliased) -> None:
    (aliased.directory / "aliases.lmdb").unlink()


async def no_text(aliased: Aliased) -> None:
    (aliased.directory / "aliases").unlink()


async def another_text(aliased: Aliased) -> None:
    with (aliased.directory / "aliases").open("a") as file:
        file.write("root: thief@else.example\n")


NOBODY = f"the alias file leads to nobody, not to {OUTSIDE}"
DRIFT: dict[str, tuple[Callable[[Aliased], Awaitable[None]], list[str]]] = {
    "job lost": (job_lost, ["alias 1: version 1 is applied, 2 is wanted"]),
    "deletion lost": (deletion_lost, ["alias 1: version 1 is applied, 2 is wanted"]),
    "applied lost": (applied_lost, ["alias 1: version 0 is applied, 1 is wanted"]),
    "failed proof": (failed_proof, ["alias 1: postfix: then"]),
    "another map": (another_map, [f"alias 1: the alias file leads to thief@else.example, not to {OUTSIDE}"]),
    "half a map": (half_a_map, [f"alias 1: {NOBODY}"]),
    "deleted is answered": (deleted_is_answered, ["alias 3: the alias file still has the name"]),
    "stranger": (stranger, ["the alias file has root, which is no alias"]),
    "no text": (no_text, ["{directory}/aliases is not what the rows say"]),
    "another text": (another_text, ["{directory}/aliases is not what the rows say"]),
}


@pytest.mark.parametrize("drift", DRIFT)
async def test_drift_is_found_and_repaired(aliased: Aliased, drift: str) -> None:
    harm, words = DRIFT[drift]
    await add_virtual_domain(aliased.machine)
    for name in ("info", "other", "gone"):
        await aliased.add(name, OUTSIDE)
    await aliased.add("pr", OUTSIDE, kind=SEND_AS)
    await aliased.add("there", OUTSIDE, domain=VIRTUAL)
    await aliased.delete(3)
    await aliased.run()
    await _begin(Worker(aliased.machine.host, aliased.settings))
    clean = await run(aliased, dry_run=True)
    assert (clean.aliases, clean.differ, clean.left) == (5, 0, 0), clean.lines
    assert clean.summary == "0 accounts and 5 aliases compared, 0 differed, 0 repaired, 0 left."
    await harm(aliased)
    before = await everything(aliased.machine), sorted(aliased.directory.iterdir())
    found = await run(aliased, dry_run=True)
    said = [line.format(directory=aliased.directory) for line in words]
    assert found.lines[0] == said[0]
    assert (found.repaired, found.left) == (0, found.differ)
    assert (await everything(aliased.machine), sorted(aliased.directory.iterdir())) == before
    repaired = await run(aliased)
    assert (repaired.left, repaired.repaired) == (0, repaired.differ)
    assert repaired.lines == [f"{line}: repaired" for line in said]
    after = await run(aliased, dry_run=True)
    assert (after.differ, after.left) == (0, 0), after.lines
    info = {"job lost": {"info": "new@else.example"}, "deletion lost": {}}.get(drift, {"info": OUTSIDE})
    assert aliased.answers() == info | {"other": OUTSIDE}


async def test_a_map_that_is_missing(aliased: Aliased) -> None:
    await aliased.add("info", OUTSIDE)
    await aliased.run()
    await no_map(aliased)
    found = await run(aliased, dry_run=True)
    assert found.lines[0] == f"{aliased.directory}/aliases.lmdb is missing"
    assert (await run(aliased)).left == 0
    assert aliased.answers() == {"info": OUTSIDE}


async def test_views_that_answer_wrongly(aliased: Aliased) -> None:
    pr = await aliased.add("pr", OUTSIDE, kind=SEND_AS)
    await aliased.run()
    (aliased.base / "postfix_local_aliases").write_text("")
    found = await run(aliased, publish=False)
    assert (found.repaired, found.left) == (0, 1)
    assert found.lines == [f"alias {pr}: postfix: its map leads to nobody, not to {OUTSIDE}"]
    assert (await aliased.proof(pr))[:2] == (1, "failed")
    assert (await run(aliased)).repaired == 1
    assert await aliased.proof(pr) == (1, "ok", OK_DETAIL)


async def test_what_cannot_be_repaired_is_left_and_said_once(aliased: Aliased) -> None:
    by_hand = aliased.base / "hand-made"
    by_hand.write_text("pr: x\n")
    aliased.machine.host.hand_made_aliases = by_hand
    bad, pr = await aliased.add("bad", OUTSIDE), await aliased.add("pr", OUTSIDE)
    await aliased.add("good", OUTSIDE)
    await aliased.machine.as_owner(f"UPDATE alias_destinations SET address = '|sh' WHERE alias_id = {bad}")
    await aliased.run()
    rows = [await aliased.applied(bad), await aliased.applied(pr)]
    for dry_run in (True, False):
        report = await run(aliased, dry_run=dry_run)
        assert (report.differ, report.repaired, report.left) == (2, 0, 2)
        assert report.lines[0].startswith(f"alias {bad}: Alias {bad} has a name, kind or destination that is none")
        assert report.lines[1].startswith(f"alias {pr}: postfix: {by_hand}, line 1, defines pr too")
    assert [await aliased.applied(bad), await aliased.applied(pr)] == rows  # not written again and again
    assert aliased.answers() == {"good": OUTSIDE}
    by_hand.write_text("")
    assert (await run(aliased)).repaired == 1
    assert await aliased.proof(pr) == (1, "ok", OK_DETAIL)


async def test_what_a_job_is_about_is_left_to_it(aliased: Aliased) -> None:
    info = await aliased.add("info", OUTSIDE)
    await aliased.run()
    await aliased.change(info, "new@else.example")
    for dry_run in (True, False):
        report = await run(aliased, dry_run=dry_run)
        assert (report.aliases, report.differ) == (0, 0), report.lines


async def test_a_proof_in_the_words_of_another_day_is_no_drift(aliased: Aliased) -> None:
    (aliased.base / "recipients").write_text(f"ann@{PRIMARY} ann@{PRIMARY}\n")
    ann = await aliased.machine.create()
    pr = await aliased.add("pr", ann, kind=SEND_AS)
    await aliased.run()
    assert (await aliased.proof(pr))[2].startswith("none of its destinations stands")
    await aliased.machine.sync(ann)
    await aliased.machine.as_owner(
        f"UPDATE jobs SET state = 'done', finished_at = run_at WHERE kind <> '{ALIASES_SYNC}'"
    )
    assert (await run(aliased)).differ == 0
    assert await aliased.proof(pr) == (1, "ok", OK_DETAIL)


@only_sqlite
async def test_without_postfix(aliased: Aliased) -> None:
    aliased.machine.host.commands = Commands()
    await aliased.add("info", OUTSIDE)
    await aliased.run()
    assert (await run(aliased)).differ == 0
    assert not aliased.directory.exists()


@only_sqlite
async def test_without_aliases_there_is_an_empty_map(aliased: Aliased) -> None:
    """Postfix defers local mail when a map is missing."""
    found = await run(aliased, dry_run=True)
    assert (found.left, found.lines) == (1, [f"{aliased.directory} is missing"])
    assert not aliased.directory.exists()
    assert ((await run(aliased)).repaired, aliased.answers()) == (1, {})
    assert (await run(aliased)).differ == 0


@only_sqlite
async def test_the_command(aliased: Aliased) -> None:
    await aliased.add("info", OUTSIDE)
    await aliased.run()
    await half_a_map(aliased)
    dry = sweep_command(aliased.settings, "--dry-run")
    assert (dry.returncode, dry.stderr) == (1, "")
    assert dry.stdout.splitlines()[0] == f"alias 1: {NOBODY}"
    assert aliased.answers() == {"other": OUTSIDE}
    wet = sweep_command(aliased.settings)
    assert (wet.returncode, wet.stderr) == (0, "")
    assert aliased.answers() == {"info": OUTSIDE}
