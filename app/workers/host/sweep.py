"""The sweep: compare all that should be with all that is, and repair. Drift detection is the same with `dry_run`.

SECURITY: runs as root, with the same handlers and the same lanes as the jobs. It inserts no jobs and changes no row of what
should be.
"""

import asyncio
from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from typing import Any

from app.log import log
from app.models.users import UserState
from app.workers.host.commands import CommandFailed, DovecotUser, NotConfigured
from app.workers.host.handlers.users import GiveUp, Host, TryAgain, judge_login, judge_recipient, prove_maildir, sync_mailbox
from app.workers.host.rows import BadRow, Mailbox, Present, read_batch, write_applied, write_status

BATCH = 1000
SHOWN = 50
"""Differences that the report keeps in words; the counts have all."""

Lane = Callable[[str], AbstractAsyncContextManager[Any]]


@dataclass(slots=True)
class Report:
    """What a sweep found. `left` counts the differences that it could not, or was not to, repair."""

    seen: int = 0
    differ: int = 0
    repaired: int = 0
    left: int = 0
    lines: list[str] = field(default_factory=list)

    @property
    def summary(self) -> str:
        return f"{self.seen} accounts compared, {self.differ} differed, {self.repaired} repaired, {self.left} left."

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
        }


async def sweep(host: Host, lane: Lane, *, dry_run: bool = False) -> Report:
    """Over all accounts of this host in the order of their ids, a thousand at a time; programs are asked once a batch.

    Accounts that a job is about at the moment are the job's business.
    """
    report = Report()
    after = 0
    while True:
        batch = await read_batch(host.database, host.name, after, BATCH)
        if not batch:
            break
        after = batch[-1][0]
        report.seen += len(batch)
        for user_id, mailbox, why in await _differences(host, batch):
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
    if not dry_run:
        now = host.clock()
        await write_status(host.database, host.name, now, swept_at=now, sweep=report.as_json())
    if report.differ:
        log.warning("sweep", **{name: value for name, value in report.as_json().items() if name != "lines"})
    return report


async def _repair(host: Host, lane: Lane, mailbox: Mailbox) -> str | None:
    """None when it is as it should be now; otherwise why not."""
    try:
        async with lane(mailbox.address):
            outcome = await sync_mailbox(host, mailbox.id)
            await write_applied(host.database, host.name, mailbox.id, outcome, host.clock())
    except (TryAgain, GiveUp, OSError) as error:
        return str(error)
    return None


Difference = tuple[int, Mailbox | None, str]


async def _differences(host: Host, batch: Sequence[tuple[int, Mailbox | BadRow, Present]]) -> list[Difference]:
    good = [(mailbox, present) for _, mailbox, present in batch if isinstance(mailbox, Mailbox)]
    standing = [mailbox for mailbox, _ in good if mailbox.state is not UserState.DELETED]
    recipients, logins = await asyncio.gather(_recipients(host, standing), _logins(host, standing))
    maildirs = await asyncio.to_thread(lambda: {mailbox.id: prove_maildir(host, mailbox) for mailbox in standing})
    found: list[Difference] = [
        (user_id, None, str(mailbox)) for user_id, mailbox, _ in batch if isinstance(mailbox, BadRow)
    ]
    for mailbox, present in good:
        if present.version != mailbox.version:
            found.append((mailbox.id, mailbox, f"version {present.version} is applied, {mailbox.version} is wanted"))
            continue
        stands = mailbox.state is not UserState.DELETED
        if present.stands != stands:
            found.append((mailbox.id, mailbox, "it stands" if present.stands else "it does not stand"))
            continue
        if not stands:
            continue
        proofs = {"maildir": maildirs[mailbox.id]}
        if recipients is not None:
            proofs["postfix"] = judge_recipient(mailbox, recipients.get(mailbox.address))
        if logins is not None:
            home = host.homes.path_of(mailbox.home)
            proofs["dovecot"] = _judge(logins.get(mailbox.address), host.owner_of(mailbox), home)
        failed = [f"{name}: {proof['detail']}" for name, proof in proofs.items() if proof["result"] == "failed"]
        failed += [
            f"{name}: {proof['detail']}"
            for name, proof in (present.proofs or {}).items()
            if proof["result"] == "failed" and name not in proofs
        ]
        if failed:
            found.append((mailbox.id, mailbox, "; ".join(failed)))
    return sorted(found, key=lambda difference: difference[0])


def _judge(answer: DovecotUser | CommandFailed | None, uid: int, home: str) -> dict[str, Any]:
    if isinstance(answer, CommandFailed):
        return {"result": "failed", "detail": str(answer)}
    return judge_login(answer, uid, home)


async def _recipients(host: Host, standing: Sequence[Mailbox]) -> dict[str, str] | None:
    try:
        return await host.commands.lookup_recipients([mailbox.address for mailbox in standing]) if standing else {}
    except NotConfigured:
        return None


async def _logins(host: Host, standing: Sequence[Mailbox]) -> dict[str, DovecotUser | CommandFailed] | None:
    try:
        return await host.commands.lookup_users([mailbox.address for mailbox in standing]) if standing else {}
    except NotConfigured:
        return None
