"""The privileged worker of one mail host: claims jobs, runs their handlers side by side, sweeps, and reports.

SECURITY: runs as root with CAP_CHOWN, DAC_OVERRIDE, FOWNER, SETUID, SETGID and KILL. Talks to the database, as its user
`worker`, and to this host's own programs; to nothing else. Loads nothing of the web side. Its input are the queue's ids and
the views `worker_users`, `worker_aliases` and `worker_dkim_keys`; it writes through `handlers`, `rows` and `queue.claim` alone.
"""

import asyncio
import random
import signal
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager, suppress
from datetime import timedelta
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TypeVar
from weakref import WeakValueDictionary

import structlog
from sqlalchemy.exc import DBAPIError

from app.config import WorkerSettings
from app.db import Clock, Database, end_tasks, is_busy, is_lost, reason_of, utc_now
from app.errors import CacertMailError, Unavailable
from app.log import log
from app.models.jobs import JobState
from app.models.schema import check_schema
from app.queue.claim import (
    Claim,
    End,
    LeaseLost,
    Outcome,
    claim,
    finish,
    finish_batch,
    give_up,
    heartbeat,
    retry,
    take_back,
)
from app.queue.contracts import ALIASES_LANE, ALIASES_SYNC, DKIM_LANE, DKIM_SYNC, JobKind
from app.queue.wake import Listener
from app.workers.host.adopted import AdoptedHomes
from app.workers.host.commands import CommandFailed, Commands
from app.workers.host.fs import FlockHeld, HostError, hold_lock, open_homes
from app.workers.host.handlers.aliases import follow_accounts, sync_aliases
from app.workers.host.handlers.dkim import sync_dkim_key
from app.workers.host.handlers.mailhost import sync_mailhost
from app.workers.host.handlers.users import GiveUp, Host, TryAgain, sync_mailbox
from app.workers.host.rows import write_status
from app.workers.host.sweep import Report, sweep

R = TypeVar("R")

HANDLERS: dict[str, Callable[[Host, int], Awaitable[Outcome | list[End]]]] = {
    JobKind.MAILBOX_SYNC.value: sync_mailbox,
    JobKind.ALIASES_SYNC.value: sync_aliases,
    JobKind.MAILHOST_SYNC.value: sync_mailhost,
    JobKind.DKIM_SYNC.value: sync_dkim_key,
}
"""All that root does when it is asked to. A job of another kind is never claimed. Where one run does for all jobs that wait
in a lane, it returns an end for each."""

_ONE_LANE = {ALIASES_SYNC: ALIASES_LANE, DKIM_SYNC: DKIM_LANE}

HEARTBEAT = timedelta(seconds=15)
BUSY_TRIES = 5
GRACE = 20
"""Seconds that running jobs get to end after SIGTERM. What does not make it is taken back at the next start."""


class Worker:
    """One per host, under the lock that `run_worker` holds."""

    def __init__(self, host: Host, settings: WorkerSettings, *, jitter: random.Random | None = None) -> None:
        self.host = host
        self.settings = settings
        self.running: dict[asyncio.Task[None], Claim] = {}
        self.stopping = host.stopping = asyncio.Event()
        self._jitter = jitter or random.Random()  # noqa: S311  spreads retries, guards nothing
        self._lanes: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        self._outage = False
        self._said = ""

    @asynccontextmanager
    async def lane(self, name: str, subject_id: int, kind: str) -> AsyncIterator[None]:
        """Within this process: a repair of the sweep and a job never work on the same lane at once.

        Nor on the same subject: a job's lane is what the API wrote, and could name another for the same account. Of
        alias jobs, which all write one file, what it wrote is not asked at all; nor of DKIM jobs, which all write one list.
        """
        if kind in _ONE_LANE:
            async with self._lock(f"lane {_ONE_LANE[kind]}"):
                yield
            return
        async with self._lock(f"lane {name}"), self._lock(f"subject {kind} {subject_id}"):
            yield

    def _lock(self, name: str) -> asyncio.Lock:
        lock = self._lanes.get(name)
        if lock is None:
            lock = self._lanes[name] = asyncio.Lock()
        return lock

    async def round(self) -> int:
        """Claims as many jobs as there is room for and starts them. Returns how many."""
        free = self._free()
        if free <= 0:
            return 0
        claims = await claim(self.host.database, self.host.name, self.host.clock(), limit=free, kinds=HANDLERS)
        for taken in claims:
            task = asyncio.create_task(self.work(taken))
            self.running[task] = taken
            task.add_done_callback(lambda done: self.running.pop(done, None))
        return len(claims)

    def _free(self) -> int:
        """An alias job may only be waiting for its turn: the first takes no account's place."""
        taken = len(self.running) - any(claim.kind == ALIASES_SYNC for claim in self.running.values())
        return self.settings.concurrency - taken

    async def work(self, taken: Claim) -> None:
        """One job, from the claim to its end. Never raises: what cannot be written now is taken back later."""
        structlog.contextvars.bind_contextvars(request_id=taken.request_id, job_id=taken.id)
        database, clock = self.host.database, self.host.clock
        state = JobState.DONE
        error: str | None = None
        try:
            try:
                async with self.lane(taken.lane, taken.subject_id, taken.kind):
                    outcome = await HANDLERS[taken.kind](self.host, taken.subject_id)
                if isinstance(outcome, Outcome):
                    await self._written(partial(finish, database, taken, outcome, clock()))
                else:
                    write = partial(finish_batch, database, taken, outcome, clock(), jitter=self._jitter)
                    state = await self._written(write)
                    error = next(end.error for end in outcome if end.subject_id == taken.subject_id)
            except GiveUp as reason:
                state, error = JobState.DEAD, str(reason)
                await self._written(partial(give_up, database, taken, error, clock()))
            except LeaseLost:
                raise
            except Exception as reason:
                error = str(reason) if isinstance(reason, TryAgain | OSError) else type(reason).__name__
                if not isinstance(reason, TryAgain | OSError) and not is_lost(reason):
                    log.error("job_failed", exc_info=reason)
                state = await self._written(partial(retry, database, taken, error, clock(), jitter=self._jitter))
        except LeaseLost:
            log.warning("job_lost", subject_id=taken.subject_id)
            return
        except Exception as reason:
            # The lease runs out and the job is taken back.
            log.warning("job_not_finished", kind=type(reason).__name__)
            return
        level = log.info if state is JobState.DONE else log.warning
        level(
            "job", kind=taken.kind, subject_id=taken.subject_id, state=state.value, attempts=taken.attempts, error=error
        )

    async def _written(self, write: Callable[[], Awaitable[R]]) -> R:
        """Writes how a job ended; again while another transaction is in the way, or until the database is back.

        The fence guards it: once the job was taken back, LeaseLost.
        """
        busy = 0
        while True:
            try:
                return await write()
            except DBAPIError as error:
                if is_busy(error) and busy < BUSY_TRIES:
                    busy += 1
                    await asyncio.sleep(self._jitter.random() * 0.05 * busy)
                elif is_lost(error) and not self.stopping.is_set():
                    await asyncio.sleep(self.settings.poll_seconds)
                else:
                    raise

    async def beat(self) -> None:
        """Renews the leases of what is at work, takes back what expired, and says that we are alive."""
        now = self.host.clock()
        lost = await heartbeat(self.host.database, list(self.running.values()), now)
        for task in [task for task, taken in self.running.items() if taken in lost]:
            task.cancel()
        await take_back(self.host.database, self.host.name, now)
        await write_status(self.host.database, self.host.name, heartbeat_at=now)

    async def guarded(self, what: Callable[[], Awaitable[object]]) -> bool:
        """False when the database was away. When it is back, Postfix is told: it keeps a map down for a minute."""
        try:
            await what()
        except Unavailable:
            raise  # The schema is not ours: nothing that another try would mend.
        except Exception as error:
            if is_lost(error):
                if not self._outage:
                    log.warning("database_away", kind=type(error).__name__, error=reason_of(error))
                self._outage = True
            else:
                # Once, and not at every poll: a schema that is missing stays so until somebody comes.
                if repr(error) != self._said:
                    log.error("worker_error", exc_info=error)
                self._said = repr(error)
            return False
        self._said = ""
        if self._outage:
            log.warning("database_back")
            try:
                await self.host.commands.reload_postfix()
            except CommandFailed as error:
                log.error("postfix_not_reloaded", error=str(error))
                return True
            self._outage = False
        return True

    async def run(self, listener: Listener) -> None:
        """Until `stopping` is set."""
        # The signal ends the wait for the next poll as well.
        stopped = asyncio.create_task(self.stopping.wait())
        stopped.add_done_callback(lambda _: listener.event.set())
        beats = asyncio.create_task(self._every(HEARTBEAT.total_seconds(), self.beat))
        sweeps = asyncio.create_task(self._every(self.settings.sweep_minutes * 60, self.sweep))
        follows = asyncio.create_task(self.follow())
        pause = self.settings.poll_seconds
        try:
            while not self.stopping.is_set():
                started: list[int] = []

                async def claim_some(counts: list[int] = started) -> None:
                    counts.append(await self.round())

                alive = await self.guarded(claim_some)
                if self.running and self._free() <= 0:
                    await asyncio.wait([*self.running, stopped], return_when=asyncio.FIRST_COMPLETED)
                elif not alive or not started[0]:
                    await self._idle(listener, pause)
        finally:
            await end_tasks(beats, sweeps, follows, stopped)
            if self.running:
                await asyncio.wait(list(self.running), timeout=GRACE)
            await end_tasks(*self.running)

    async def _idle(self, listener: Listener, pause: float) -> None:
        """Until something wakes us, a job ends (its lane may have a successor waiting), or the poll is due."""
        waking = asyncio.create_task(listener.wait(pause * (0.75 + self._jitter.random() / 2)))
        await asyncio.wait([waking, *self.running], return_when=asyncio.FIRST_COMPLETED)
        await end_tasks(waking)

    async def _every(self, seconds: float, what: Callable[[], Awaitable[object]]) -> None:
        while True:
            alive = await self.guarded(what)
            await asyncio.sleep(min(seconds, self.settings.poll_seconds) if self._outage and not alive else seconds)

    async def follow(self) -> None:
        """The alias file follows accounts that came to stand. What is missed, by a kill or an error, the sweep finds."""
        while True:
            await self.host.somebody_stood.wait()
            await self.host.alias_pace.wait(self.stopping)
            self.host.somebody_stood.clear()
            await self.guarded(self._follow)

    async def _follow(self) -> None:
        try:
            async with self.lane(ALIASES_LANE, 0, ALIASES_SYNC):
                changed = await follow_accounts(self.host)
        except (TryAgain, HostError, OSError) as error:
            log.warning("aliases_do_not_follow", error=str(error))
        else:
            if changed:
                log.info("aliases_followed", changed=changed)

    async def sweep(self) -> Report:
        return await sweep(self.host, self.lane)


@contextmanager
def _explained(setting: str, value: Path) -> Iterator[None]:
    """What keeps us from starting is a sentence for whoever started us, with the setting to look at, not a traceback."""
    try:
        yield
    except FlockHeld as error:
        raise CacertMailError(str(error)) from None
    except (HostError, OSError) as error:
        raise CacertMailError(f"{setting} ({value}): {getattr(error, 'strerror', None) or error}") from None


@asynccontextmanager
async def opened(settings: WorkerSettings, *, clock: Clock = utc_now, make: bool = True) -> AsyncIterator[Host]:
    """This machine as the settings describe it. Raises CacertMailError when its directories cannot be trusted."""
    async with AsyncExitStack() as stack:
        with _explained("HOST_ROOT", settings.host_root):
            homes = stack.enter_context(open_homes(settings.host_root, durable=settings.durable, make=make))
        database = Database(
            settings.database_url.get_secret_value(),
            ca_file=settings.database_ca_file,
            pool_size=settings.concurrency + 4,
        )
        stack.push_async_callback(database.close)
        commands = Commands(
            postfix_config=settings.postfix_config,
            recipient_map=settings.postfix_recipients,
            dovecot_config=settings.dovecot_config,
            local_alias_map=settings.postfix_local_aliases,
            virtual_alias_map=settings.postfix_virtual_aliases,
        )
        yield Host(
            settings.mail_host,
            database,
            homes,
            commands,
            settings.uid_first,
            settings.uid_last,
            clock,
            aliases_directory=settings.aliases_directory,
            hand_made_aliases=settings.hand_made_aliases,
            host_file=settings.host_file,
            adopted=AdoptedHomes(settings.adopted_homes),
        )


async def run_worker(settings: WorkerSettings, *, clock: Clock = utc_now) -> None:
    """Until SIGTERM or SIGINT. Raises CacertMailError: another worker runs here, or a directory is not safe."""
    with _explained("LOCK_FILE", settings.lock_file):
        hold_lock(settings.lock_file)
    with _explained("WAKE_DIRECTORY", settings.wake_directory):
        settings.wake_directory.mkdir(parents=True, exist_ok=True)
    async with opened(settings, clock=clock) as host:
        worker = Worker(host, settings)
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, worker.stopping.set)
        listener = Listener(settings.wake_directory, settings.mail_host)
        try:
            await _begin(worker)
            await worker.run(listener)
        finally:
            listener.close()
    log.info("worker_stopped")


async def _begin(worker: Worker) -> None:
    """Takes back what an earlier process left behind; waits for the database when it is not there yet."""
    host = worker.host

    async def begin() -> None:
        async with host.database.read.connect() as connection:
            await check_schema(connection)
        now = host.clock()
        taken = await take_back(host.database, host.name, now, all_running=True)
        release = version("cacert-mail")
        await write_status(host.database, host.name, heartbeat_at=now, started_at=now, release=release)
        log.info("worker_started", host=host.name, taken_back=taken)

    while not worker.stopping.is_set() and not await worker.guarded(begin):
        with suppress(TimeoutError):
            await asyncio.wait_for(worker.stopping.wait(), worker.settings.poll_seconds)


async def sweep_once(
    settings: WorkerSettings, *, dry_run: bool, trust_homes: bool = False, clock: Clock = utc_now
) -> Report:
    """One sweep, for the command line. A repairing one needs the lock: the running worker sweeps by itself."""
    if not dry_run:
        with _explained("LOCK_FILE", settings.lock_file):
            hold_lock(settings.lock_file)
    async with opened(settings, clock=clock, make=not dry_run) as host:
        host.trust_homes = trust_homes
        try:
            return await sweep(host, Worker(host, settings).lane, dry_run=dry_run)
        except Exception as error:
            if is_lost(error):
                raise CacertMailError("The database cannot be reached.") from None
            raise
