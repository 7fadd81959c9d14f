"""The unprivileged background process, one for all hosts: what should be changes when its time has come.

Now: accounts whose retention time ended are purged, like by hand, with version, audit event and host job; finished jobs and
old idempotency keys are pruned, in small batches by primary key.
"""

import asyncio
import random
import secrets
import signal
from datetime import datetime, timedelta

from sqlalchemy import delete, select, tuple_

from app.config import ServiceSettings
from app.db import Clock, Database, is_lost, reason_of, utc_now
from app.log import log
from app.models.hosts import SERVICE_HOST
from app.models.idempotency_keys import idempotency_keys
from app.queue.claim import prune
from app.queue.wake import Listener, wake
from app.services.changes import Actor, Change
from app.services.users import API, SERVICE, Rights, due_for_purge, purge_user

KEEP_KEYS = timedelta(hours=24)
BATCH = 100


async def run_service(settings: ServiceSettings, *, clock: Clock = utc_now) -> None:
    """Until SIGTERM or SIGINT."""
    stopping = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopping.set)
    settings.wake_directory.mkdir(parents=True, exist_ok=True)
    listener = Listener(settings.wake_directory, SERVICE_HOST)
    stopped = asyncio.create_task(stopping.wait())
    stopped.add_done_callback(lambda _: listener.event.set())
    database = Database(settings.database_url.get_secret_value(), ca_file=settings.database_ca_file, pool_size=4)
    log.info("service_started")
    away = False
    try:
        while not stopping.is_set():
            try:
                await run_due(database, settings, clock())
            except Exception as error:  # whatever it is, the next round tries again
                if not is_lost(error):
                    log.error("service_round_failed", exc_info=error)
                elif not away:
                    log.warning("database_away", kind=type(error).__name__, error=reason_of(error))
                away = is_lost(error)
            else:
                if away:
                    log.warning("database_back")
                away = False
            await listener.wait(settings.poll_seconds * (0.75 + random.random() / 2))  # noqa: S311  spreads polls
    finally:
        stopped.cancel()
        listener.close()
        await database.close()
        log.info("service_stopped")


async def run_due(database: Database, settings: ServiceSettings, now: datetime) -> None:
    """One round: everything whose time has come."""
    rights = API if database.dialect == "sqlite" else SERVICE  # views cannot be written through on SQLite
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
