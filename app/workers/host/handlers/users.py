"""`mailbox.sync`: make the home, Dovecot and Postfix match the user's row, and prove it.

SECURITY: runs as root. The row is read after the claim and parsed by `rows.py`; nothing of the job but its id is used. What is
done to the disk is done by `fs.py`, what is asked of programs by `commands.py`; this file only decides what and in which order.

Whatever happened, this ends in the same place, however often it runs:

    state      home                          views show it    proofs
    active     in place, 0700, own uid       yes              maildir, postfix, dovecot
    suspended  the same                      yes, no login    the same; sessions: none is left
    deleted    in the archive                no               maildir (archived), postfix and dovecot (unknown), sessions
    purged     gone                          no               the same

Before anything else, whatever state it is in, access that was ended is ended here: see `_end_access`. A password reset is
nothing but that. A locked account's mail is held in Postfix's queue (proof queue), and released when it is unlocked.

The order matters: a home stands before the views show the account, and the views hide it before the home is moved. The
`home` in `applied.result` is set before a home is brought back, and cleared after it is archived, so that a run that was cut
off in between is known by it.

Files in the place or in the archive of an account of which `applied` knows nothing are somebody else's (decision 13):
nothing is done with them.
"""

import asyncio
import threading
from collections.abc import Callable, Container
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from app.db import Clock, Database
from app.models.users import UserState
from app.queue.claim import Outcome
from app.workers.host.adopted import AdoptedHomes
from app.workers.host.commands import Batched, CommandFailed, Commands, DovecotUser, NotConfigured
from app.workers.host.fs import (
    ArchiveMissing,
    Homes,
    HostError,
    check_home,
    ensure_archived,
    ensure_home,
    ensure_purged,
    ensure_restored,
    has_archive,
    refuse_unknown,
)
from app.workers.host.pace import Pace
from app.workers.host.rows import BadRow, Mailbox, Present, others_of, read_mailbox, write_applied

R = TypeVar("R")

KICKS = 5
"""How often sessions are ended before the job is tried again later: a login may be half done while we kick."""

MAX_HELD = 10_000
"""Queue ids that are remembered. What is beyond stays on hold until an administrator releases it (`postsuper -H`)."""

NOT_CONFIGURED = {"result": "not configured", "detail": None}


class TryAgain(Exception):
    """Not yet; may pass by itself. The text is for whoever reads the job."""


class GiveUp(Exception):
    """Cannot pass by waiting: somebody must look."""


@dataclass(frozen=True, slots=True)
class Access:
    """What became of access that was ended."""

    proofs: dict[str, dict[str, Any]]
    """`sessions`, of an account whose access was ended once."""
    result: dict[str, Any]
    """The part of `applied.result` that tells of it."""
    new: bool = False
    """It was carried out in this run."""


@dataclass(slots=True)
class Host:
    """This machine: its name, its homes, its programs."""

    name: str
    database: Database
    homes: Homes
    commands: Commands
    uid_first: int
    uid_last: int
    clock: Clock
    host_file: Path | None = None
    """What `mailhost.sync` makes this host's configuration from; None: its programs are configured by somebody else."""
    adopted: AdoptedHomes = field(default_factory=lambda: AdoptedHomes(None))
    trust_homes: bool = False
    """Believe that files of which the database knows nothing belong to the account whose uid, or id, they have."""
    aliases_directory: Path = Path("/etc/cacert-mail/aliases")
    hand_made_aliases: Path | None = None
    alias_pace: Pace = field(default_factory=Pace)
    stopping: asyncio.Event = field(default_factory=asyncio.Event)
    """Set when the worker is told to end: nobody waits for anything but work then."""
    stood: int = 0
    """Accounts that came to stand since the alias file was last compared with the rows (decision 15)."""
    somebody_stood: asyncio.Event = field(default_factory=asyncio.Event)
    ask_postfix: Batched[str] = field(init=False)
    ask_dovecot: Batched[DovecotUser] = field(init=False)

    def __post_init__(self) -> None:
        self.ask_postfix = Batched(self.commands.lookup_recipients)
        self.ask_dovecot = Batched(self.commands.lookup_users)

    def uid_of(self, mailbox: Mailbox) -> int:
        """The uid that this user's files have, from the host's own range, or the one of an adopted home."""
        try:
            kept = self.adopted.find(mailbox.id, mailbox.address)
        except HostError as error:
            raise GiveUp(str(error)) from None
        if kept is not None:
            if self.uid_first <= kept.uid <= self.uid_last:
                raise GiveUp(f"The adopted home of user {mailbox.id} has uid {kept.uid}, which is another user's.")
            self.homes.groups[kept.uid] = kept.gid
            return kept.uid
        uid = self.uid_first + mailbox.id
        if uid > self.uid_last:
            raise GiveUp(
                f"User {mailbox.id} would get uid {uid}, which is above UID_LAST ({self.uid_last}) of this host."
            )
        return uid

    def owner_of(self, mailbox: Mailbox) -> int:
        """The uid that they really have: without root, the worker's own."""
        return self.ids_of(mailbox)[0]

    def ids_of(self, mailbox: Mailbox) -> tuple[int, int]:
        """The same, and the gid."""
        return self.homes.owner_of(self.uid_of(mailbox))

    def owners(self) -> Container[int]:
        """The uids that homes of ours can have: a range, or without root the worker's own alone."""
        uids = range(self.uid_first + 1, self.uid_last + 1)
        own, _ = self.homes.owner_of(uids[0])
        return uids if own == uids[0] else (own,)

    def tells_apart(self, mailbox: Mailbox) -> bool:
        """Whether a home shows by its owner whose it is: not without root."""
        return self.owner_of(mailbox) == self.uid_of(mailbox)


async def sync_mailbox(host: Host, user_id: int) -> Outcome:
    """Returns what was made true and proved. Raises TryAgain, GiveUp, or an OSError or database error that may pass."""
    try:
        mailbox, present = await read_mailbox(host.database, host.name, user_id)
    except BadRow as error:
        raise GiveUp(str(error)) from None
    access = Access({}, {})
    try:
        access = await _end_access(host, mailbox, present)
        access = await _hold_mail(host, mailbox, present, access)
        if mailbox.state is UserState.DELETED:
            return await _make_away(host, mailbox, present, access)
        return await _make_stand(host, mailbox, present, access)
    except CommandFailed as error:
        raise TryAgain(str(error)) from None
    except HostError as error:
        # The proof that failed is shown with the account; what stood before is not withdrawn for it.
        proofs = {**(present.proofs or {}), **access.proofs, "maildir": _failed(str(error))}
        outcome = Outcome(present.version, present.stands, proofs, {**(present.result or {}), **access.result})
        await write_applied(host.database, host.name, mailbox.id, outcome, host.clock())
        raise GiveUp(str(error)) from None


async def on_disk(work: Callable[[], R], *, stopped: threading.Event | None = None) -> R:
    """In a thread. A job that is cancelled meanwhile ends, and leaves its lane, only when the thread has ended."""
    thread = asyncio.get_running_loop().run_in_executor(None, work)
    try:
        return await asyncio.shield(thread)
    except asyncio.CancelledError:
        if stopped is not None:
            stopped.set()
        while not thread.done():
            with suppress(asyncio.CancelledError):
                await asyncio.wait([thread])
        thread.exception()  # Else it is reported as one that nobody looked at.
        raise


async def _refuse_unknown(host: Host, mailbox: Mailbox, present: Present, *, look_in_place: bool = True) -> None:
    adopted = host.adopted.find(mailbox.id, mailbox.address)
    if present.version == 0 and present.get("home") is None and not adopted and not host.trust_homes:
        uid = host.uid_of(mailbox)
        await on_disk(partial(refuse_unknown, host.homes, mailbox.home, uid, mailbox.id, look_in_place=look_in_place))


async def _make_stand(host: Host, mailbox: Mailbox, present: Present, access: Access) -> Outcome:
    uid = host.uid_of(mailbox)
    if not present.stands:
        waiting, _ = await others_of(host.database, mailbox)
        if waiting:
            raise TryAgain(f"An earlier account {mailbox.address} is not archived yet.")
        await _refuse_unknown(host, mailbox, present)
        if present.result is not None or host.trust_homes:
            await _bring_back(host, mailbox, present, uid)
    home = await on_disk(partial(ensure_home, host.homes, mailbox.home, uid))
    result = {
        "uid": host.ids_of(mailbox)[0],
        "gid": host.ids_of(mailbox)[1],
        "home": home,
        "archived": False,
        **access.result,
    }
    if not present.stands or (present.get("uid"), present.get("home")) != (result["uid"], home):
        standing = Outcome(present.version, True, present.proofs or {}, result)
        await write_applied(host.database, host.name, mailbox.id, standing, host.clock())
        host.stood += 1
        host.somebody_stood.set()
    if present.version > 0:
        # Dovecot remembers what it looked up before: the quota, the home, or that there was none.
        await host.commands.flush_auth_cache(mailbox.address)
    proofs = {"maildir": prove_maildir(host, mailbox)}
    proofs["postfix"], proofs["dovecot"] = await asyncio.gather(
        _prove_recipient(host, mailbox), _prove_login(host, mailbox, home)
    )
    return await _end(host, mailbox, present, access, Outcome(mailbox.version, True, proofs, result))


async def _bring_back(host: Host, mailbox: Mailbox, present: Present, uid: int) -> None:
    """Its home from the archive, if one lies there: a run that was cut off may have moved it without saying so."""
    if present.get("archived") and present.get("home") is None:
        moving = {**(present.result or {}), "home": host.homes.path_of(mailbox.home)}
        outcome = Outcome(present.version, False, present.proofs or {}, moving)
        await write_applied(host.database, host.name, mailbox.id, outcome, host.clock())
    try:
        await on_disk(partial(ensure_restored, host.homes, mailbox.home, uid, mailbox.id))
    except ArchiveMissing:
        if present.get("archived"):
            raise


async def _make_away(host: Host, mailbox: Mailbox, present: Present, access: Access) -> Outcome:
    uid = host.uid_of(mailbox)
    result = {
        "uid": present.get("uid"),
        "gid": present.get("gid"),
        "home": present.get("home"),
        "archived": bool(present.get("archived")),
        **access.result,
    }
    if present.stands or present.version == 0:
        # Committed before the home moves: no mail meets a missing Maildir.
        hidden = Outcome(present.version, False, present.proofs or {}, result)
        await write_applied(host.database, host.name, mailbox.id, hidden, host.clock())
    await host.commands.flush_auth_cache(mailbox.address)
    may_lie_there = await _may_lie_there(host, mailbox, present)
    await _refuse_unknown(host, mailbox, present, look_in_place=may_lie_there)
    if may_lie_there:
        await on_disk(partial(ensure_archived, host.homes, mailbox.home, uid, mailbox.id))
    archived = has_archive(host.homes, mailbox.id)
    if result["archived"] and not archived and not mailbox.purged:
        raise ArchiveMissing(f"The archive of user {mailbox.id} is gone, and its mail with it.")
    result["home"], result["archived"] = None, archived
    detail = "archived" if archived else "there was none to keep"
    if mailbox.purged:
        stopped = threading.Event()
        await on_disk(partial(ensure_purged, host.homes, mailbox.id, stopped=stopped.is_set), stopped=stopped)
        result["archived"], detail = False, "purged"
    proofs: dict[str, Any] = {"maildir": {"result": "ok", "detail": detail}}
    proofs["postfix"], proofs["dovecot"] = await asyncio.gather(
        _prove_no_recipient(host, mailbox), _prove_no_login(host, mailbox, uid)
    )
    return await _end(host, mailbox, present, access, Outcome(mailbox.version, False, proofs, result))


async def _may_lie_there(host: Host, mailbox: Mailbox, present: Present) -> bool:
    """Whether a home in the place may be this deleted account's, and not a successor's."""
    if host.tells_apart(mailbox) or present.get("home") is not None:
        return True
    if present.version > 0:
        return False
    _, successor = await others_of(host.database, mailbox)
    return not successor


async def _end(host: Host, mailbox: Mailbox, present: Present, access: Access, outcome: Outcome) -> Outcome:
    """Refuses to call it done while a proof fails; what failed is shown with the account meanwhile."""
    proofs = outcome.proofs | access.proofs
    if access.new and await host.commands.list_sessions(mailbox.address):
        # Of a login that was past Dovecot's user lookup when the sessions were listed.
        proofs["sessions"] = await _end_sessions(host, mailbox)
    if access.new and mailbox.locked:
        # What rspamd was looking at when the queue was listed.
        again = await _hold_mail(host, mailbox, present, access)
        proofs, outcome.result["held"] = proofs | {"queue": again.proofs["queue"]}, again.result["held"]
    outcome = replace(outcome, proofs=proofs)
    broken = [f"{name}: {proof['detail']}" for name, proof in proofs.items() if proof["result"] == "failed"]
    if broken:
        seen = replace(outcome, version=present.version)
        await write_applied(host.database, host.name, mailbox.id, seen, host.clock())
        raise TryAgain("; ".join(broken))
    return outcome


def is_access_due(mailbox: Mailbox, present: Present) -> bool:
    """Whether access has been ended and this host has not carried that out."""
    ended = mailbox.access_ended_at
    if ended is None:
        return False
    carried_out = present.get("access_ended_at") == ended.isoformat() and present.get("flushed_at") is not None
    return not carried_out or "sessions" not in (present.proofs or {})


async def _end_access(host: Host, mailbox: Mailbox, present: Present) -> Access:
    """First of all, since a home that needs somebody to look must not keep a thief signed in.

    `flushed_at` is when Dovecot had forgotten the old password for the last time, by this host's clock: the policy process, on
    the same host, compares it with when an SMTP connection began (decision 17).
    """
    before = {name: present.get(name) for name in ("access_ended_at", "flushed_at")}
    if mailbox.access_ended_at is None:
        return Access({}, before)
    if not is_access_due(mailbox, present):
        return Access({"sessions": (present.proofs or {})["sessions"]}, before)
    proof = await _end_sessions(host, mailbox)
    if proof["result"] == "failed":
        return Access({"sessions": proof}, before)
    # A login that had read the old password before the first time may have put it back.
    await host.commands.flush_auth_cache(mailbox.address)
    ended = {"access_ended_at": mailbox.access_ended_at.isoformat(), "flushed_at": host.clock().isoformat()}
    return Access({"sessions": proof}, ended, new=True)


async def _end_sessions(host: Host, mailbox: Mailbox) -> dict[str, Any]:
    """Dovecot forgets the login, every session is ended, and then none is left."""
    if host.commands.dovecot_config is None:
        return NOT_CONFIGURED
    await host.commands.flush_auth_cache(mailbox.address)
    left = 0
    for attempt in range(KICKS):
        await host.commands.kick_sessions(mailbox.address)
        left = await host.commands.list_sessions(mailbox.address)
        if left == 0:
            return _ok("login cache flushed; no session is left")
        await asyncio.sleep(0.05 * 2**attempt)
    return _failed(f"{left} sessions are still open")


async def _hold_mail(host: Host, mailbox: Mailbox, present: Present, access: Access) -> Access:
    """What a locked account sent and is still in the queue waits on hold. Unlocking releases just that: `held` remembers it,
    and is written first, so that a run that is cut off leaves nothing on hold of which nobody knows why.

    A deleted account's is not released: who deletes a stolen account does not want its mail sent.
    """
    held: list[str] = access.result.get("held") or present.get("held") or []
    if not mailbox.locked:
        if held and mailbox.state is not UserState.DELETED:
            with suppress(NotConfigured):
                await host.commands.release_mail(held)
            held = []
        return replace(access, result={**access.result, "held": held} if held else access.result)
    try:
        found = await host.commands.list_mail_of(mailbox.address) if present.result is not None else []
        if found:
            held = list(dict.fromkeys([*held, *found]))
            told = {**(present.result or {}), **access.result, "held": held[:MAX_HELD]}
            before = Outcome(present.version, present.stands, {**(present.proofs or {}), **access.proofs}, told)
            await write_applied(host.database, host.name, mailbox.id, before, host.clock())
            await host.commands.hold_mail(found)
        proof = _ok(_held(len(held)))
    except NotConfigured:
        proof = NOT_CONFIGURED
    return replace(access, proofs={**access.proofs, "queue": proof}, result={**access.result, "held": held[:MAX_HELD]})


def _held(count: int) -> str:
    if count == 0:
        return "it has sent nothing that is still in the queue"
    more = f"; unlocking releases {MAX_HELD} of them" if count > MAX_HELD else ""
    return f"{count} {'message is' if count == 1 else 'messages are'} held{more}"


def prove_maildir(host: Host, mailbox: Mailbox) -> dict[str, Any]:
    try:
        check_home(host.homes, mailbox.home, host.uid_of(mailbox))
    except HostError as error:
        return _failed(str(error))
    owner = host.owner_of(mailbox)
    if host.tells_apart(mailbox):
        return _ok(f"owner {owner}, mode 0700")
    return _ok(f"owner {owner}, mode 0700; its own uid {host.uid_of(mailbox)} needs root, which this worker is not")


async def _prove_recipient(host: Host, mailbox: Mailbox) -> dict[str, Any]:
    try:
        found = await host.ask_postfix(mailbox.address)
    except NotConfigured:
        return NOT_CONFIGURED
    return judge_recipient(mailbox, found)


async def _prove_login(host: Host, mailbox: Mailbox, home: str) -> dict[str, Any]:
    try:
        found = await host.ask_dovecot(mailbox.address)
    except NotConfigured:
        return NOT_CONFIGURED
    return judge_login(found, host.ids_of(mailbox), home)


def judge_recipient(mailbox: Mailbox, found: str | None) -> dict[str, Any]:
    return _ok("its map has the address") if found == mailbox.address else _failed("its map does not have the address")


def judge_login(found: DovecotUser | None, ids: tuple[int, int], home: str) -> dict[str, Any]:
    if found is None:
        return _failed("it does not know the login")
    if (found.uid, found.gid, found.home) != (*ids, home):
        return _failed(f"it has uid {found.uid}, gid {found.gid} and home {found.home} for the login")
    return _ok("it knows the login, with uid and home")


async def _prove_no_recipient(host: Host, mailbox: Mailbox) -> dict[str, Any]:
    try:
        found = await host.ask_postfix(mailbox.address)
    except NotConfigured:
        return NOT_CONFIGURED
    if found is None:
        return _ok("the address is unknown")
    _, successor = await others_of(host.database, mailbox)
    return _ok("the address is somebody else's now") if successor else _failed("its map still has the address")


async def _prove_no_login(host: Host, mailbox: Mailbox, uid: int) -> dict[str, Any]:
    try:
        found = await host.ask_dovecot(mailbox.address)
    except NotConfigured:
        return NOT_CONFIGURED
    if found is None:
        return _ok("the login is unknown")
    return _ok("the login is somebody else's now") if found.uid != uid else _failed("it still knows the login")


def _ok(detail: str) -> dict[str, Any]:
    return {"result": "ok", "detail": detail}


def _failed(detail: str) -> dict[str, Any]:
    return {"result": "failed", "detail": detail[:500]}
