"""`aliases.sync`: make the alias file and its map match the rows, and prove what Postfix answers for aliases.

SECURITY: runs as root. All rows are read after the claim and parsed by `rows.py`; nothing of the jobs but ids is used. The
text of the file comes from `alias_file.py`, the disk is touched by `fs.py`, programs are run by `commands.py`.

All aliases of a host share one lane, and one run does for all that wait: it reads the waiting jobs, then the rows, makes
the one file match all rows, and proves those that were asked for in one call a map. So it ends in the same place however
often it runs, and wherever it is killed:

    alias                                    Postfix finds it in
    primary domain, receive_only             `aliases.lmdb`, built from `aliases`, both ours
    primary domain, send_as                  its map of local aliases, a view
    another domain                           its map of virtual aliases, a view
    deleted, or no destination stands        none of them

The file is built beside and moved into place, map first. Killed in between, Postfix has the new map, and the next run sees
by the text that stands that it is not done.
"""

import asyncio
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from app.models.aliases import AliasKind
from app.queue.claim import End, Outcome, Waiting, record_all, waiting
from app.queue.contracts import ALIASES_SYNC
from app.workers.host.alias_file import names_in, render, same_lines, value_of, version_of
from app.workers.host.commands import CommandFailed, NotConfigured
from app.workers.host.fs import (
    HostError,
    empty_staging,
    has_file,
    move_staged,
    open_own_directory,
    read_file,
    stage_file,
)
from app.workers.host.handlers.users import NOT_CONFIGURED, Host, TryAgain, on_disk
from app.workers.host.rows import Alias, Aliases, BadRow, Present, read_aliases, read_present_aliases

TEXT, MAP = "aliases", "aliases.lmdb"


@dataclass(frozen=True, slots=True)
class Plan:
    """What the alias file is to hold, and which aliases cannot be as they should."""

    entries: dict[str, Sequence[str]]
    text: bytes
    refused: dict[int, str]
    """Sentences: nothing but a change of the row, or of the hand-made file, can mend it."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """The proof of one alias. `final`: it cannot pass by waiting."""

    proof: dict[str, Any]
    final: bool = False
    of_file: bool = False
    """It fails by the map of the alias file."""

    @property
    def error(self) -> str | None:
        return f"postfix: {self.proof['detail']}" if self.proof["result"] == "failed" else None


async def sync_aliases(host: Host, alias_id: int) -> list[End]:
    """How the claimed job's alias, and all for which jobs wait, are now. Holds the lane while it waits for its turn."""
    await host.alias_pace.wait(host.stopping)
    others = await waiting(host.database, host.name, ALIASES_SYNC)
    host.alias_pace.begin(asyncio.get_running_loop().time(), len(others) + 1)
    jobs: dict[int, list[Waiting]] = {alias_id: []}
    for job in others:
        jobs.setdefault(job.subject_id, []).append(job)
    try:
        outcomes, errors = await make_true(host, jobs)
    except (TryAgain, HostError) as reason:
        return [End(subject_id, None, ended, str(reason)) for subject_id, ended in jobs.items()]
    ends = []
    for subject_id, ended in jobs.items():
        error, final = errors.get(subject_id, (None, False))
        ends.append(End(subject_id, outcomes.get(subject_id), ended, error, final))
    return ends


async def make_true(host: Host, ids: Collection[int]) -> tuple[dict[int, Outcome], dict[int, tuple[str, bool]]]:
    """The file as all rows say, and proofs of these aliases.

    Returns what `applied` is to say, and the error of each that is not as it should be, with whether that is final.
    Raises HostError or TryAgain when nothing can be said of any.
    """
    aliases = await read_aliases(host.database)
    present = await read_present_aliases(host.database, host.name, ids)
    plan = await make_plan(host, aliases)
    rebuilt = await ensure_file(host, plan, aliases.version)
    asked = [alias for alias_id in ids if isinstance(alias := aliases.rows.get(alias_id), Alias)]
    try:
        verdicts = await prove(host, aliases, plan, asked)
        wrong = any(verdict.of_file for verdict in verdicts.values())
    except CommandFailed:
        if rebuilt:
            raise
        wrong = True
    if wrong and not rebuilt:
        # The text is right, but the map is not of it, or cannot be read.
        await ensure_file(host, plan, aliases.version, force=True)
        verdicts = await prove(host, aliases, plan, asked)
    return _outcomes(ids, aliases, present, verdicts)


def _outcomes(
    ids: Collection[int], aliases: Aliases, present: Mapping[int, Present], verdicts: Mapping[int, Verdict]
) -> tuple[dict[int, Outcome], dict[int, tuple[str, bool]]]:
    outcomes: dict[int, Outcome] = {}
    errors: dict[int, tuple[str, bool]] = {}
    for alias_id in ids:
        before = present.get(alias_id, Present())
        match aliases.rows.get(alias_id):
            case None:
                errors[alias_id] = (f"There is no alias {alias_id}.", True)
                continue
            case BadRow() as error:
                version, stands, verdict = before.version, before.stands, Verdict(_failed(str(error)), final=True)
                errors[alias_id] = (str(error), True)
            case Alias() as alias:
                verdict = verdicts[alias_id]
                version, stands = alias.version, not alias.deleted
                if verdict.error:
                    version, stands = before.version, before.stands
                    errors[alias_id] = (verdict.error, verdict.final)
        outcomes[alias_id] = Outcome(version, stands, {"postfix": verdict.proof}, {})
    return outcomes, errors


async def make_plan(host: Host, aliases: Aliases) -> Plan:
    """Of the hand-made file's names none is put into ours: that would silence a line that somebody wrote."""
    theirs = await on_disk(partial(_hand_made, host.hand_made_aliases))
    entries: dict[str, Sequence[str]] = {}
    refused: dict[int, str] = {}
    for alias in aliases.rows.values():
        if isinstance(alias, BadRow) or not alias.primary or alias.deleted:
            continue
        line = theirs.get(alias.local_part)
        if line is not None:
            refused[alias.id] = (
                f"{host.hand_made_aliases}, line {line}, defines {alias.local_part} too, and that line is in force: "
                "remove it there, and run postalias, or delete this alias"
            )
        elif alias.in_file:
            entries[alias.local_part] = alias.destinations
    return Plan(entries, render(entries, aliases.version), refused)


def _hand_made(file: Path | None) -> dict[str, int]:
    if file is None:
        return {}
    try:
        text = read_file(None, str(file))
    except OSError as error:
        raise TryAgain(f"HAND_MADE_ALIASES ({file}): {error.strerror}") from None
    if text is None:
        raise TryAgain(f"HAND_MADE_ALIASES ({file}): there is no such file")
    return names_in(text.decode("ascii", "surrogateescape"))


async def ensure_file(host: Host, plan: Plan, version: int, *, force: bool = False) -> bool:
    """Whether it was built anew: not when the text that stands has the same lines, unless `force` is set."""
    if host.commands.postfix_config is None:
        return False
    try:
        with open_own_directory(host.aliases_directory) as directory:
            standing = await on_disk(partial(read_file, directory, TEXT))
            same = standing is not None and same_lines(standing, plan.text) and has_file(directory, MAP)
            if same and not force:
                return False
            newer = version_of(standing or b"")
            if newer > version:
                raise TryAgain(
                    f"{host.aliases_directory}/{TEXT} is of version {newer}, and the database is at {version}. If it was "
                    "restored from a backup or made anew, remove that file: the next run makes it again"
                )
            await _build(host, directory, plan)
    except OSError as error:
        raise TryAgain(f"{host.aliases_directory}: {error.strerror or error}") from None
    return True


async def _build(host: Host, directory: int, plan: Plan) -> None:
    """The map is the one that counts, so it is moved first. Postfix warns of a text that is newer than its map.

    Before that the new map is read as a whole: on a full disk postalias was seen to leave an empty one and exit 0.
    """
    durable = host.homes.durable
    beside = host.aliases_directory / ".new" / TEXT
    await on_disk(partial(empty_staging, directory))
    try:
        await on_disk(partial(stage_file, directory, TEXT, plan.text, durable=durable))
        await host.commands.build_aliases(beside)
        built = await host.commands.list_file_aliases(beside)
        if built != {name: value_of(destinations) for name, destinations in plan.entries.items()}:
            raise TryAgain(
                f"{host.aliases_directory}: postalias made a map of {len(built)} aliases and not of these "
                f"{len(plan.entries)}; is the disk full?"
            )
        await on_disk(partial(move_staged, directory, MAP, TEXT, durable=durable))
    except Exception:
        # A full disk stays full otherwise.
        await on_disk(partial(empty_staging, directory))
        raise


async def prove(host: Host, aliases: Aliases, plan: Plan, asked: Sequence[Alias]) -> dict[int, Verdict]:
    """One question to each map for all aliases that are asked for."""
    local = [alias.local_part for alias in asked if alias.primary]
    virtual = [alias.address for alias in asked if not alias.primary]
    try:
        in_file, in_local, in_virtual = await asyncio.gather(
            host.commands.lookup_file_aliases(host.aliases_directory / TEXT, local),
            host.commands.lookup_local_aliases(local),
            host.commands.lookup_virtual_aliases(virtual),
        )
    except NotConfigured:
        judged = {alias.id: Verdict(NOT_CONFIGURED) for alias in asked}
    else:
        owners = {alias.address for alias in aliases.rows.values() if isinstance(alias, Alias) and not alias.deleted}
        judged = {
            alias.id: judge(
                alias,
                in_file.get(alias.local_part) if alias.primary else None,
                (in_local.get(alias.local_part) if alias.primary else in_virtual.get(alias.address)),
                somebody_elses=alias.deleted and alias.address in owners,
            )
            for alias in asked
        }
    return judged | {
        alias.id: Verdict(_failed(plan.refused[alias.id]), final=True) for alias in asked if alias.id in plan.refused
    }


def judge(alias: Alias, in_file: str | None, in_view: str | None, *, somebody_elses: bool) -> Verdict:
    """Whether the maps answer what the row says; `in_view` is what the view's map has, its destinations in any order."""
    if somebody_elses:
        return Verdict(_ok("the address is another alias's now"))
    in_view_found = set((in_view or "").split(",")) - {""}
    live = () if alias.deleted else alias.destinations
    if alias.primary and alias.kind is AliasKind.RECEIVE_ONLY:
        if in_view_found and alias.deleted:
            return Verdict(_failed("its map of local aliases still has the name"))
        if (in_file or "") != value_of(live):
            detail = f"the alias file leads to {in_file or 'nobody'}, not to {value_of(live) or 'nobody'}"
            return Verdict(_failed(detail), of_file=True)
    else:
        if in_file is not None:
            return Verdict(_failed("the alias file still has the name"), of_file=True)
        if in_view_found != set(live):
            found = ", ".join(sorted(in_view_found)) or "nobody"
            return Verdict(_failed(f"its map leads to {found}, not to {value_of(live) or 'nobody'}"))
    if alias.deleted:
        return Verdict(_ok("the address is unknown"))
    if not live:
        return Verdict(_ok("none of its destinations stands, and so nobody gets its mail"))
    return Verdict(_ok("it leads where the row says"))


async def follow_accounts(host: Host) -> int:
    """For accounts that came to stand: puts into the file what it lacks of them. Returns how many aliases changed.

    The caller holds the lane.
    """
    host.alias_pace.begin(asyncio.get_running_loop().time(), host.stood)
    host.stood = 0
    aliases = await read_aliases(host.database)
    differ, _ = await compare_map(host, aliases, await make_plan(host, aliases))
    if differ:
        outcomes, _ = await make_true(host, list(differ))
        await record_all(host.database, host.name, ALIASES_SYNC, outcomes, host.clock())
    return len(differ)


async def compare_map(host: Host, aliases: Aliases, plan: Plan) -> tuple[dict[int, str], list[str]]:
    """For which aliases the map that stands does not say what it should, and why; and what else is wrong with it."""
    if host.commands.postfix_config is None:
        return {}, []
    answers: dict[str, str] = {}
    others: list[str] = []
    try:
        with open_own_directory(host.aliases_directory, make=False) as directory:
            text = await on_disk(partial(read_file, directory, TEXT))
            if has_file(directory, MAP):
                answers = await host.commands.list_file_aliases(host.aliases_directory / TEXT)
            else:
                others.append(f"{host.aliases_directory}/{MAP} is missing")
        if text is None or not same_lines(text, plan.text):
            others.append(f"{host.aliases_directory}/{TEXT} is not what the rows say")
    except FileNotFoundError:
        # Without aliases too: Postfix wants a map, were it an empty one.
        others.append(f"{host.aliases_directory} is missing")
    differ: dict[int, str] = {}
    strange = set(answers) - set(plan.entries)
    for alias in aliases.rows.values():
        if not isinstance(alias, Alias) or not alias.primary:
            continue
        found = answers.get(alias.local_part)
        wanted = plan.entries.get(alias.local_part) if not alias.deleted else None
        if wanted is not None and found != value_of(wanted):
            differ[alias.id] = f"the alias file leads to {found or 'nobody'}, not to {value_of(wanted)}"[:500]
        elif alias.local_part in strange:
            differ[alias.id] = "the alias file still has the name"
    strange -= {alias.local_part for alias in aliases.rows.values() if isinstance(alias, Alias) and alias.primary}
    others += [f"the alias file has {name}, which is no alias" for name in sorted(strange)]
    return differ, others


def _ok(detail: str) -> dict[str, Any]:
    return {"result": "ok", "detail": detail}


def _failed(detail: str) -> dict[str, Any]:
    return {"result": "failed", "detail": detail[:500]}
