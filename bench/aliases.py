"""Aliases: how soon one answers in Postfix, what a burst costs, and how long ten thousand lines take."""

import asyncio
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

from pydantic import SecretStr

from app.addresses import LocalPart, MailAddress
from app.config import WorkerSettings
from app.db import Database, utc_now
from app.models.aliases import AliasKind
from app.queue.wake import wake
from app.services.aliases import NewAlias, create_alias
from app.services.changes import Actor, Change
from app.workers.host.alias_file import render
from app.workers.host.handlers.aliases import Plan, ensure_file
from app.workers.host.loop import opened
from bench.system import System
from tests.stack.mail import HOST, PRIMARY_DOMAIN

FEW = 100
QUIET = 2.5
"""Seconds between two, so that each finds the worker idle."""


@dataclass(frozen=True)
class Aliases:
    idle: float
    """Milliseconds from the insert of the job to its end, proved; the median, with `FEW` others there."""
    rebuilds: int
    """For all of the burst."""
    rebuild: float
    """Milliseconds for a file of as many lines as the burst had."""


def measure_aliases(system: System, one_by_one: int, burst: int) -> Aliases:
    """Wants a worker that runs."""
    asyncio.run(_create(system, "few", FEW, at_once=FEW))
    system.wait_for_jobs(seconds=60)
    for number in range(one_by_one):
        time.sleep(QUIET)
        asyncio.run(_create(system, f"one{number}-", 1, at_once=1))
        system.wait_for_jobs(seconds=30)
    took = (
        "SELECT TIMESTAMPDIFF(MICROSECOND, j.created_at, j.finished_at) FROM jobs j JOIN aliases a ON a.id = j.subject_id"
        " WHERE j.kind = 'aliases.sync' AND a.local_part LIKE 'one%'"
    )
    idle = statistics.median(int(row[0]) for row in system.mariadb.sql(took, "owner")) / 1e3
    asyncio.run(_create(system, "burst", burst, at_once=20))
    system.wait_for_jobs(seconds=120)
    runs = (
        "SELECT COUNT(*) FROM jobs j JOIN aliases a ON a.id = j.subject_id"
        " WHERE j.kind = 'aliases.sync' AND j.fence > 0 AND a.local_part LIKE 'burst%'"
    )
    rebuilds = int(system.mariadb.sql(runs, "owner")[0][0])
    rebuild = asyncio.run(_rebuild(system, burst))
    system.mariadb.sql(_FORGET, "owner")
    return Aliases(idle, rebuilds, rebuild)


_FORGET = """
DELETE FROM alias_destinations; DELETE FROM aliases; DELETE FROM addresses WHERE kind = 'alias';
DELETE FROM jobs WHERE kind = 'aliases.sync'; DELETE FROM applied WHERE kind = 'aliases.sync';
DELETE FROM audit_events WHERE subject_kind = 'alias';
"""


async def _create(system: System, prefix: str, count: int, *, at_once: int) -> None:
    """By the API's own function, so many in a transaction, each with its job."""
    database = Database(system.mariadb.url("api"))
    for start in range(0, count, at_once):
        async with database.write.begin() as connection:
            change = Change(connection, Actor("bench", "127.0.0.1", "bench"), utc_now())
            for number in range(start, min(start + at_once, count)):
                address = MailAddress(f"{prefix}{number}@{PRIMARY_DOMAIN}")
                await create_alias(change, NewAlias(address, AliasKind.RECEIVE_ONLY, [system.address(1)]))
        wake(system.sockets, HOST)
    await database.close()


async def _rebuild(system: System, lines: int) -> float:
    settings = WorkerSettings(
        database_url=SecretStr(system.mariadb.url("worker")),
        mail_host=HOST,
        host_root=system.mail.host_root,
        postfix_config=system.mail.postfix_config,
        aliases_directory=Path(system.mail.directory) / "bench-aliases",
        wake_directory=system.sockets,
    )
    took: list[float] = []
    async with opened(settings) as host:
        for turn in range(5):
            entries = {LocalPart(f"alias{number}x{turn}"): [system.address(1)] for number in range(lines)}
            plan = Plan({str(name): value for name, value in entries.items()}, render(entries, turn + 1), {})
            began = time.perf_counter()
            await ensure_file(host, plan, turn + 1)
            took.append(time.perf_counter() - began)
    return statistics.median(took) * 1e3
