"""The unprivileged background process, one for all hosts: it sends mail to owners, and does what has its time.

Accounts whose retention time ended are purged, like by hand, with version, audit event and host job; what was kept for a while
is pruned, in small batches by primary key. Sending is in `mail`, what comes back in `bounces`.
"""

import asyncio
import random
import secrets
import signal
from datetime import datetime, timedelta

from sqlalchemy import and_, delete, select, tuple_, update

from app.config import ServiceSettings
from app.credentials.links import load_link_key
from app.db import Clock, Database, is_lost, reason_of, utc_now
from app.log import log
from app.models.hosts import SERVICE_HOST
from app.models.idempotency_keys import idempotency_keys
from app.models.login_failures import login_failures
from app.models.notices import notices
from app.models.password_resets import password_resets
from app.queue.claim import prune, take_back
from app.queue.wake import Listener, wake
from app.services.changes import Actor, Change
from app.services.login_failures import lapsed
from app.services.users import API, SERVICE, Rights, due_for_purge, purge_user
from app.workers.service.audit_chain import Chain
from app.workers.service.bounces import Returns
from app.workers.service.dkim import Keys
from app.workers.service.dns_checks import DnsChecks
from app.workers.service.mail import ATTEMPTS, Postman

KEEP_KEYS = timedelta(hours=24)
TIDY = timedelta(minutes=1)
BATCH = 100


async def run_service(settings: ServiceSettings, *, clock: Clock = utc_now) -> None:
    """Until SIGTERM or SIGINT. Raises KeysUnusable: without the key of the links there is nothing to send."""
    key = load_link_key(settings.link_key_file)
    stopping = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopping.set)
    settings.wake_directory.mkdir(parents=True, exist_ok=True)
    listener = Listener(settings.wake_directory, SERVICE_HOST)
    stopped = asyncio.create_task(stopping.wait())
    stopped.add_done_callback(lambda _: listener.event.set())
    database = Database(settings.database_url.get_secret_value(), ca_file=settings.database_ca_file, pool_size=4)
    parts = Parts(database, settings, key, clock)
    if settings.outbox is not None:
        settings.outbox.mkdir(mode=0o700, parents=True, exist_ok=True)
    log.info("service_started")
    away = False
    more = False
    try:
        while not stopping.is_set():
            try:
                more = await parts.round(stopping)
                parts.keys.rounds.begin()
                parts.checks.rounds.begin()
            except Exception as error:  # whatever it is, the next round tries again
                more = False
                if not is_lost(error):
                    log.error("service_round_failed", exc_info=error)
                elif not away:
                    log.warning("database_away", kind=type(error).__name__, error=reason_of(error))
                away = is_lost(error)
            else:
                if away:
                    log.warning("database_back")
                away = False
            if not more:
                await listener.wait(settings.poll_seconds * (0.75 + random.random() / 2))  # noqa: S311  spreads polls
    finally:
        stopped.cancel()
        await parts.keys.rounds.close()
        await parts.checks.rounds.close()
        listener.close()
        await database.close()
        log.info("service_stopped")


class Parts:
    """All that one round does, and what it remembers of the one before."""

    def __init__(self, database: Database, settings: ServiceSettings, key: bytes, clock: Clock) -> None:
        self.database = database
        self.settings = settings
        self.clock = clock
        self.postman = Postman(database, settings, key, _rights(database), clock)
        self.returns = None if settings.returns_maildir is None else Returns(settings.returns_maildir, key)
        self.chain = Chain(database, settings)
        self.checks = DnsChecks(database, settings, clock)
        self.keys = Keys(database, settings, key, clock, self.checks.ask)
        self._tidied_at: datetime | None = None
        self._said = ""

    async def round(self, stopping: asyncio.Event) -> bool:
        """True when there is more to send at once."""
        now = self.clock()
        if self._tidied_at is None or now - self._tidied_at >= TIDY:
            # At the start nobody else sends: whatever is claimed was left behind.
            await take_back(self.database, SERVICE_HOST, now, all_running=self._tidied_at is None, attempts=ATTEMPTS)
            await tidy(self.database, self.settings, now)
            self._tidied_at = now
        more = await self.postman.send_due(stopping)
        await run_due(self.database, self.settings, self.clock())
        await self.chain.extend(self.clock())
        await self._read_returns()
        return more

    async def _read_returns(self) -> None:
        if self.returns is None:
            return
        try:
            await self.returns.read(self.database, self.clock())
        except OSError as error:
            if str(error) != self._said:
                log.error("returns_unreadable", error=str(error))
            self._said = str(error)
        else:
            self._said = ""


def _rights(database: Database) -> Rights:
    return API if database.dialect == "sqlite" else SERVICE  # views cannot be written through on SQLite


async def run_due(database: Database, settings: ServiceSettings, now: datetime) -> None:
    """One round: everything whose time has come."""
    rights = _rights(database)
    async with database.read.connect() as connection:
        due = await due_for_purge(connection, now, limit=BATCH, rights=rights)
    for user_id in due:
        try:
            await purge_due(database, user_id, now, rights)
        except Exception as error:  # one account keeps no other from its turn
            if is_lost(error):
                raise
            log.error("user_not_purged", user_id=user_id, exc_info=error)
    if due:
        for socket in settings.wake_directory.glob("*.wake"):
            wake(settings.wake_directory, socket.stem)
    await prune(database, now - timedelta(days=settings.keep_jobs_days))
    await prune_keys(database, now - KEEP_KEYS)


async def purge_due(database: Database, user_id: int, now: datetime, rights: Rights) -> None:
    actor = Actor("service", "", f"purge-{secrets.token_hex(6)}")
    columns = rights.users.c
    async with database.write.begin() as connection:
        # By version: since it was found due it may have been restored, and deleted again for another month.
        query = select(columns.version).where(columns.id == user_id, columns.purge_at <= now)
        version = (await connection.execute(query)).scalar()
        if version is None:
            return
        await purge_user(Change(connection, actor, now), user_id, expected_version=version, rights=rights)
    log.info("user_purged", user_id=user_id, request_id=actor.request_id)


async def prune_keys(database: Database, before: datetime, *, limit: int = 500) -> int:
    key = (idempotency_keys.c.principal_id, idempotency_keys.c.key)
    async with database.read.connect() as connection:
        old = (
            await connection.execute(
                select(*key)
                .where(idempotency_keys.c.created_at < before)
                .order_by(idempotency_keys.c.created_at)
                .limit(limit)
            )
        ).all()
        if not old:
            return 0
        result = await connection.execute(delete(idempotency_keys).where(tuple_(*key).in_([tuple(row) for row in old])))
        return result.rowcount


async def tidy(database: Database, settings: ServiceSettings, now: datetime, *, limit: int = 500) -> None:
    """What need not be done every second: old mail, old links and old failures go, and addresses of purged accounts."""
    users = _rights(database).users
    kept = now - timedelta(days=settings.keep_notices_days)
    purged = select(notices.c.id).join(users, users.c.id == notices.c.user_id).where(users.c.purged_at.is_not(None))
    forgotten = purged.where(notices.c.recipient.is_not(None)).limit(limit)
    # A notice may be younger than the link it is about.
    about = select(notices.c.id).where(notices.c.reset_id == password_resets.c.id).exists()
    async with database.read.connect() as connection:
        ids = list((await connection.execute(forgotten)).scalars())
        if ids:
            await connection.execute(update(notices).where(notices.c.id.in_(ids)).values(recipient=None))
        for table, old in (
            (notices, notices.c.created_at < kept),
            (password_resets, and_(password_resets.c.created_at < kept, ~about)),
            (login_failures, lapsed(now)),
        ):
            ids = list((await connection.execute(select(table.c.id).where(old).limit(limit))).scalars())
            if ids:
                await connection.execute(delete(table).where(table.c.id.in_(ids)))
