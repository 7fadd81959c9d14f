"""The sweep: compare all that should be with all that is, and repair. Drift detection is the same with `dry_run`.

SECURITY: runs as root, with the same handlers and the same lanes as the jobs. It inserts no jobs and changes no row of what
should be.
"""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from app.addresses import MailAddress
from app.db import is_lost
from app.log import log
from app.mailconfig.hosts import HostFileError, load_host_file
from app.models.users import UserState
from app.queue.claim import Outcome, record_all
from app.queue.contracts import (
    ALIASES_LANE,
    ALIASES_SYNC,
    DKIM_LANE,
    DKIM_SYNC,
    MAILBOX_SYNC,
    MAILHOST_LANE,
    MAILHOST_SYNC,
    THE_HOST,
)
from app.workers.host import mailhost
from app.workers.host.commands import CommandFailed, DovecotUser, NotConfigured
from app.workers.host.fs import HostError, has_archive, list_archives, list_homes, owner_in_place
from app.workers.host.handlers.aliases import compare_map, ensure_file, make_plan, make_true, prove
from app.workers.host.handlers.dkim import compare_keys, ensure_table, own_file, sync_dkim_key
from app.workers.host.handlers.mailhost import sync_mailhost
from app.workers.host.handlers.users import (
    GiveUp,
    Host,
    TryAgain,
    is_access_due,
    judge_login,
    judge_recipient,
    prove_maildir,
    sync_mailbox,
)
from app.workers.host.rows import (
    Alias,
    BadRow,
    Mailbox,
    Present,
    at_work,
    ids_at,
    known_ids,
    last_id,
    others_of,
    primary_domain,
    read_aliases,
    read_batch,
    read_dkim_keys,
    read_present_aliases,
    read_present_dkim_keys,
    write_applied,
    write_status,
)

BATCH = 1000
SHOWN = 50
"""Differences that the report keeps in words; the counts have all."""

Lane = Callable[[str, int, str], AbstractAsyncContextManager[Any]]


@dataclass(slots=True)
class Report:
    """What a sweep found. `left` counts the differences that it could not, or was not to, repair."""

    seen: int = 0
    differ: int = 0
    repaired: int = 0
    left: int = 0
    lines: list[str] = field(default_factory=list)
    aliases: int = 0

    @property
    def summary(self) -> str:
        what = f"{self.seen} accounts" + (f" and {self.aliases} aliases" if self.aliases else "")
        return f"{what} compared, {self.differ} differed, {self.repaired} repaired, {self.left} left."

    def note(self, line: str) -> None:
        if len(self.lines) < SHOWN:
            self.lines.append(line)

    def as_json(self) -> dict[str, Any]:
        return {
            "seen": self.seen,
            "differ": self.differ,
            "repaired": self.repaired,
            "left": self.left,
            "lines": self.lines,
            "aliases": self.aliases,
        }


async def sweep(host: Host, lane: Lane, *, dry_run: bool = False) -> Report:
    """Over all accounts of this host in the order of their ids, a thousand at a time; programs are asked once a batch.

    Then over all aliases at once, and over the configuration of the programs. What a job is about at the moment is the job's
    business.
    """
    report = Report()
    for after in range(0, await last_id(host.database, host.name), BATCH):
        batch = await read_batch(host.database, host.name, after, BATCH)
        report.seen += len(batch)
        for user_id, mailbox, why in await _differences(host, batch, report):
            report.differ += 1
            if dry_run or mailbox is None:
                report.left += 1
                report.note(f"user {user_id}: {why}")
                continue
            outcome = await _repair(host, lane, mailbox)
            if outcome is None:
                report.repaired += 1
                report.note(f"user {user_id}: {why}: repaired")
            else:
                report.left += 1
                report.note(f"user {user_id}: {why}: {outcome}")
    async with lane(ALIASES_LANE, 0, ALIASES_SYNC):
        await _aliases(host, report, dry_run=dry_run)
    await _strangers(host, report)
    if host.host_file is not None:
        async with lane(DKIM_LANE, 0, DKIM_SYNC):
            await _dkim(host, report, dry_run=dry_run)
        async with lane(MAILHOST_LANE, THE_HOST, MAILHOST_SYNC):
            await _mailhost(host, host.host_file, report, dry_run=dry_run)
    if not dry_run:
        now = host.clock()
        await write_status(host.database, host.name, swept_at=now, sweep=report.as_json())
    if report.differ:
        log.warning("sweep", **{name: value for name, value in report.as_json().items() if name != "lines"})
    return report


async def _repair(host: Host, lane: Lane, mailbox: Mailbox) -> str | None:
    """None when it is as it should be now; otherwise why not."""
    try:
        async with lane(mailbox.address, mailbox.id, MAILBOX_SYNC):
            outcome = await sync_mailbox(host, mailbox.id)
            await write_applied(host.database, host.name, mailbox.id, outcome, host.clock())
    except (TryAgain, GiveUp, OSError) as error:
        return str(error)
    except Exception as error:
        if is_lost(error):
            raise
        log.error("repair_failed", user_id=mailbox.id, exc_info=error)
        return type(error).__name__
    return None


Difference = tuple[int, Mailbox | None, str]


async def _differences(
    host: Host, batch: Sequence[tuple[int, Mailbox | BadRow, Present]], report: Report
) -> list[Difference]:
    found: list[Difference] = []
    good: list[tuple[Mailbox, Present]] = []
    for user_id, mailbox, present in batch:
        try:
            if isinstance(mailbox, BadRow):
                raise mailbox
            host.uid_of(mailbox)
        except (BadRow, GiveUp) as error:
            found.append((user_id, None, str(error)))
        else:
            good.append((mailbox, present))
    boxes = [mailbox for mailbox, _ in good]
    recipients, logins = await asyncio.gather(
        _asked(report, host.commands.lookup_recipients, boxes), _asked(report, host.commands.lookup_users, boxes)
    )
    seen = await asyncio.to_thread(lambda: {box.id: _look(host, box, present) for box, present in good})
    for mailbox, present in good:
        if present.version != mailbox.version:
            found.append((mailbox.id, mailbox, f"version {present.version} is applied, {mailbox.version} is wanted"))
            continue
        stands = mailbox.state is not UserState.DELETED
        if is_access_due(mailbox, present):
            found.append((mailbox.id, mailbox, "access was ended, and not here"))
            continue
        if present.stands != stands:
            found.append((mailbox.id, mailbox, "it stands" if present.stands else "it does not stand"))
            continue
        proofs = {"maildir": seen[mailbox.id]}
        if stands:
            if recipients is not None:
                proofs["postfix"] = judge_recipient(mailbox, recipients.get(mailbox.address))
            if logins is not None:
                home = host.homes.path_of(mailbox.home)
                proofs["dovecot"] = _judge(logins.get(mailbox.address), host.ids_of(mailbox), home)
        elif mailbox.address in (recipients or {}) or mailbox.address in (logins or {}):
            proofs |= await _judge_deleted(host, mailbox, recipients or {}, logins or {})
        failed = [f"{name}: {proof['detail']}" for name, proof in proofs.items() if proof["result"] == "failed"]
        failed += [
            f"{name}: {proof['detail']}"
            for name, proof in (present.proofs or {}).items()
            if proof["result"] == "failed" and name not in proofs
        ]
        if failed:
            found.append((mailbox.id, mailbox, "; ".join(failed)))
        elif stands and has_archive(host.homes, mailbox.id):
            found.append((mailbox.id, None, "an archive of it lies beside its home"))
    return sorted(found, key=lambda difference: difference[0])


async def _judge_deleted(
    host: Host, mailbox: Mailbox, recipients: dict[str, str], logins: dict[str, DovecotUser | CommandFailed]
) -> dict[str, dict[str, Any]]:
    """That nobody knows a deleted account, unless its address is somebody else's by now."""
    _, successor = await others_of(host.database, mailbox)
    found = {}
    if mailbox.address in recipients and not successor:
        found["postfix"] = {"result": "failed", "detail": "its map still has the address"}
    login = logins.get(mailbox.address)
    if isinstance(login, DovecotUser) and not (successor and login.uid != host.uid_of(mailbox)):
        found["dovecot"] = {"result": "failed", "detail": "it still knows the login"}
    return found


def _judge(answer: DovecotUser | CommandFailed | None, ids: tuple[int, int], home: str) -> dict[str, Any]:
    if isinstance(answer, CommandFailed):
        return {"result": "failed", "detail": str(answer)}
    return judge_login(answer, ids, home)


def _look(host: Host, mailbox: Mailbox, present: Present) -> dict[str, Any]:
    """Home and archive, without a change."""
    try:
        if mailbox.state is not UserState.DELETED:
            return prove_maildir(host, mailbox)
        archived = has_archive(host.homes, mailbox.id)
        # Without root all homes have one owner, so that this one could be a successor's.
        if host.tells_apart(mailbox) and owner_in_place(host.homes, mailbox.home) == host.uid_of(mailbox):
            return {"result": "failed", "detail": "its home is in place"}
    except (HostError, OSError) as error:
        return {"result": "failed", "detail": str(error)}
    if archived and mailbox.purged:
        return {"result": "failed", "detail": "an archive is left, and it was purged"}
    if not archived and present.get("archived"):
        return {"result": "failed", "detail": "its archive is gone"}
    return {"result": "ok", "detail": None}


async def _aliases(host: Host, report: Report, *, dry_run: bool) -> None:
    """The alias file, and what Postfix's maps answer for every alias; one call of each program for all."""
    busy = await at_work(host.database, host.name, ALIASES_SYNC)
    aliases = await read_aliases(host.database)
    present = await read_present_aliases(host.database, host.name)
    mine = {alias_id: alias for alias_id, alias in aliases.rows.items() if alias_id not in busy}
    report.aliases = len(mine)
    others: list[str] = []
    reasons: dict[int, str] = {}
    outdated: set[int] = set()
    try:
        plan = await make_plan(host, aliases)
        differ, others = await compare_map(host, aliases, plan)
        if others and not dry_run:
            await ensure_file(host, plan, aliases.version, force=True)
        verdicts = await prove(host, aliases, plan, [alias for alias in mine.values() if isinstance(alias, Alias)])
    except (TryAgain, HostError, OSError) as error:
        for line in (*([] if busy else others), str(error)):
            _strange(report, line)
        return
    for alias_id, alias in mine.items():
        before = present.get(alias_id, Present())
        recorded = (before.proofs or {}).get("postfix", {})
        if isinstance(alias, BadRow):
            reasons[alias_id] = str(alias)
        elif before.version != alias.version and alias_id not in plan.refused:
            reasons[alias_id] = f"version {before.version} is applied, {alias.version} is wanted"
        elif alias_id in differ:
            reasons[alias_id] = differ[alias_id]
        elif failed := verdicts[alias_id].error:
            reasons[alias_id] = failed
        elif recorded.get("result") == "failed":
            reasons[alias_id] = f"postfix: {recorded['detail']}"
        elif recorded != verdicts[alias_id].proof:
            outdated.add(alias_id)
    await _repair_aliases(host, report, reasons, outdated, present, dry_run=dry_run)
    # While jobs wait the file is not yet what the rows say. What an alias's own line tells is not told twice.
    for line in [] if busy or (reasons and not dry_run) else others:
        report.differ += 1
        report.repaired += not dry_run
        report.left += dry_run
        report.note(line if dry_run else f"{line}: repaired")


async def _repair_aliases(
    host: Host,
    report: Report,
    reasons: dict[int, str],
    outdated: set[int],
    present: dict[int, Present],
    *,
    dry_run: bool,
) -> None:
    """`outdated` are those whose recorded proof is right, but says it in the words of another day."""
    outcomes: dict[int, Outcome] = {}
    errors: dict[int, tuple[str, bool]] = dict.fromkeys(reasons, ("", False))
    if not dry_run and (reasons or outdated):
        try:
            outcomes, errors = await make_true(host, [*reasons, *outdated])
        except (TryAgain, HostError, OSError) as error:
            errors = {alias_id: (str(error), False) for alias_id in reasons}
    changed = {}
    for alias_id, outcome in outcomes.items():
        before = present.get(alias_id, Present())
        if (outcome.version, outcome.stands, outcome.proofs) != (before.version, before.stands, before.proofs):
            changed[alias_id] = outcome
    await record_all(host.database, host.name, ALIASES_SYNC, changed, host.clock())
    for alias_id, why in sorted(reasons.items()):
        report.differ += 1
        if alias_id in errors:
            again, _ = errors[alias_id]
            report.left += 1
            report.note(f"alias {alias_id}: {why}" + (f": {again}" if again and again != why else ""))
        else:
            report.repaired += 1
            report.note(f"alias {alias_id}: {why}: repaired")


async def _dkim(host: Host, report: Report, *, dry_run: bool) -> None:
    """The files of DKIM keys, the list of those that sign, and what rspamd does. A key that is gone is told, and the others are
    seen to all the same."""
    busy = await at_work(host.database, host.name, DKIM_SYNC)
    keys = await read_dkim_keys(host.database, host.name)
    present = await read_present_dkim_keys(host.database, host.name)
    try:
        found = await compare_keys(host, own_file(host), keys, present)
    except (HostError, OSError, GiveUp) as error:
        _strange(report, f"dkim: {error}")
        return
    for key_id, why in sorted(found.items()):
        if key_id in busy or (key_id == 0 and busy):
            continue
        report.differ += 1
        what = f"DKIM key {key_id}: {why}" if key_id else why
        try:
            if dry_run or isinstance(keys.rows.get(key_id), BadRow):
                raise TryAgain
            if key_id:
                outcome = await sync_dkim_key(host, key_id)
                await record_all(host.database, host.name, DKIM_SYNC, {key_id: outcome}, host.clock())
            else:
                await ensure_table(host)
        except (TryAgain, GiveUp) as error:
            report.left += 1
            report.note(what + (f": {error}" if str(error) and str(error) != why else ""))
        else:
            report.repaired += 1
            report.note(f"{what}: repaired")


async def _mailhost(host: Host, host_file: Path, report: Report, *, dry_run: bool) -> None:
    """A file that was changed by hand, a certificate that was renewed, a program that does not answer."""
    if await at_work(host.database, host.name, MAILHOST_SYNC):
        return
    try:
        if dry_run:
            wanted = await mailhost.read_wanted(host.database, host.name, load_host_file(host_file))
            for difference in mailhost.compare(wanted.files):
                _strange(report, f"mailhost: {difference.path} {difference.words}")
            return
        now = host.clock()
        outcome = await sync_mailhost(host, THE_HOST)
    except (BadRow, HostFileError, HostError, OSError, GiveUp, TryAgain) as error:
        log.error("mailhost_differs", error=str(error))
        _strange(report, f"mailhost: {error}")
        return
    for line in outcome.result["changed"]:
        report.differ += 1
        report.repaired += 1
        report.note(f"mailhost: {line}: repaired")
    await record_all(host.database, host.name, MAILHOST_SYNC, {THE_HOST: outcome}, now)


async def _strangers(host: Host, report: Report) -> None:
    """Homes in our range of uids, and archives, that belong to no account. Whose they are is for people to say."""
    owners, primary = host.owners(), await primary_domain(host.database)
    places = await asyncio.to_thread(lambda: [place for place in list_homes(host.homes) if place[2] in owners])
    for start in range(0, len(places), BATCH):
        named = [
            (f"{home.local_part}@{home.domain or primary}" if home and home.domain != primary else "", path, owner)
            for home, path, owner in places[start : start + BATCH]
        ]
        found = await ids_at(host.database, host.name, [address for address, _, _ in named if address])
        for address, path, owner in named:
            ids = found.get(address, set())
            if not (owner - host.uid_first in ids if isinstance(owners, range) else ids):
                _strange(report, f"{path} has uid {owner} and belongs to no account")
    archives = await asyncio.to_thread(list_archives, host.homes)
    for start in range(0, len(archives), BATCH):
        ids = set(archives[start : start + BATCH])
        for user_id in sorted(ids - await known_ids(host.database, host.name, ids)):
            _strange(report, f"{host.homes.path}/.archive/{user_id} belongs to no account")


def _strange(report: Report, line: str) -> None:
    report.differ += 1
    report.left += 1
    report.note(line)


V = TypeVar("V")


async def _asked(
    report: Report, lookup: Callable[[list[MailAddress]], Awaitable[dict[str, V]]], standing: Sequence[Mailbox]
) -> dict[str, V] | None:
    """None when there is no such program, or when it has no answer for anybody, which is no account's difference."""
    try:
        return await lookup([mailbox.address for mailbox in standing]) if standing else {}
    except NotConfigured:
        return None
    except CommandFailed as error:
        report.left += 1
        report.note(str(error))
        return None
