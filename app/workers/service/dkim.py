"""Takes DKIM keys from state to state: publishes them, asks every name server, has their hosts sign, sends probes, retires.

Each step begins with what the rows and the DNS say now, and ends in one transaction, so it may be cut off anywhere and begun
again. Nothing is believed but what all name servers of the zone answer, also when a publisher says that it is done; where
nobody publishes, somebody enters the record by hand meanwhile.
"""

import asyncio
import secrets
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from datetime import datetime, timedelta
from typing import Any

import aiosmtplib
from sqlalchemy import Row, and_, or_, select, update

from app.addresses import DomainName
from app.config import ServiceSettings
from app.db import Clock, Database
from app.dns.ask import DnsUnclear, Server, all_say, ask_all, find_servers, find_zone
from app.dns.records import Record, dkim_name
from app.errors import CacertMailError, RotationUnderWay, VersionConflict
from app.log import log
from app.models.dkim_keys import Algorithm, DkimState, dkim_keys
from app.models.domains import DomainKind, domains
from app.models.hosts import SERVICE_HOST
from app.models.jobs import JobState
from app.queue.claim import Claim, LeaseLost, claim, end_job
from app.queue.contracts import DNS_PUBLISH
from app.queue.wake import wake
from app.services.changes import Actor, Change
from app.services.dkim_keys import DKIM_KEYS, check_public_key, record_of, rotate_dkim_keys, set_dkim_state
from app.services.domains import domain_settings
from app.services.hosts import is_gone
from app.workers.service.probes import Probes, is_signed, probe_address, read_probe, send_probe
from app.workers.service.publishers import Publisher, PublishFailed, load_publishers
from app.workers.service.rounds import Rounds

BATCH = 50
"""Jobs of one round: each only says which domain to look at."""
AT_ONCE = 10
"""Domains whose name servers are asked side by side."""
STEADY = timedelta(minutes=10)
"""How often a key is looked at of which nothing is awaited."""
PROBE_AGAIN = timedelta(minutes=2)
PROBE_LATE = timedelta(minutes=1)
"""After that a probe that has not come back is said to be missing."""
SERVERS_LIFETIME = timedelta(minutes=1)


class Waiting(Exception):
    """What stands in the way of the next step, in a sentence; empty: nothing, it only takes its time."""


class Keys:
    """All of them. `key` is that of the links: it shows that a probe is ours."""

    def __init__(
        self,
        database: Database,
        settings: ServiceSettings,
        key: bytes,
        clock: Clock,
        published: Callable[[int], None] = lambda domain_id: None,
    ) -> None:
        """`published` is told of each domain whose records may be others now."""
        self.database = database
        self.settings = settings
        self.publishers: Mapping[str, Publisher] = load_publishers(settings.dns_file)
        self._clock = clock
        self._key = key
        self._published = published
        self._probes = None if settings.returns_maildir is None else Probes(settings.returns_maildir, key)
        self._retention = timedelta(days=settings.dkim_retention_days)
        self._watch = timedelta(seconds=settings.dns_watch_seconds)
        self._servers: dict[str, tuple[datetime, list[Server]]] = {}
        self.rounds = Rounds(self.round, "dkim_round_failed")

    async def round(self) -> None:
        now = self._clock()
        claimed = await claim(self.database, SERVICE_HOST, now, limit=BATCH, kinds=[DNS_PUBLISH])
        await self._rotate_due(now)
        asked_for = {taken.subject_id for taken in claimed}
        keys = await self._due(now, asked_for)
        by_domain: dict[int, list[Row[Any]]] = {}
        for row in keys:
            by_domain.setdefault(row.domain_id, []).append(row)
        turn = asyncio.Semaphore(AT_ONCE)

        async def look_at(domain_id: int) -> str | None:
            async with turn:
                return await self._advance_domain(by_domain[domain_id])

        problems = dict(zip(by_domain, await asyncio.gather(*map(look_at, by_domain)), strict=True))
        for taken in claimed:
            await self._end_job(taken, problems.get(taken.subject_id))
            self._published(taken.subject_id)

    async def _due(self, now: datetime, asked_for: set[int]) -> Sequence[Row[Any]]:
        c = dkim_keys.c
        long_ago = or_(c.checked_at.is_(None), c.checked_at <= now - self._watch)
        steady = and_(c.state == DkimState.ACTIVE.value, c.proved_at.is_not(None))
        leaving = c.state.in_((DkimState.RETIRING.value, DkimState.REVOKED.value))
        due = or_(
            c.state == DkimState.GENERATING.value,
            c.domain_id.in_(asked_for),
            and_(steady, or_(c.checked_at.is_(None), c.checked_at <= now - STEADY)),
            and_(leaving, c.due_at <= now, long_ago),
            and_(~steady, ~leaving, long_ago),
        )
        if self._probes is not None:
            due = or_(due, and_(c.state == DkimState.ACTIVE.value, c.proved_at.is_(None)))
        query = DKIM_KEYS.where(c.state != DkimState.REMOVED.value, due).order_by(c.id)
        async with self.database.read.connect() as connection:
            rows: Sequence[Row[Any]] = (await connection.execute(query)).all()
            return rows

    async def _advance_domain(self, rows: Sequence[Row[Any]]) -> str | None:
        """As far as each key goes now. Returns what stood in the way of one of them."""
        said = None
        for row in rows:
            present: Row[Any] | None = row
            while present is not None:
                try:
                    moved = await self._advance(present)
                except Waiting as waiting:
                    moved = False
                    said = str(waiting) or said
                    await self._note(present, str(waiting) or None)
                except VersionConflict:
                    moved = True  # somebody changed it: look again
                except CacertMailError as error:
                    moved = False
                    said = error.detail
                    await self._note(present, error.detail)
                present = await self._read(present.id) if moved else None
        return said

    async def _advance(self, row: Row[Any]) -> bool:
        """One step. False: nothing is to be done now. Raises Waiting, and VersionConflict when somebody was faster."""
        now = self._clock()
        match DkimState(row.state):
            case DkimState.GENERATING:
                public_key = (row.result or {}).get("public_key")
                if row.applied_version != row.version or not isinstance(public_key, str):
                    return False
                check_public_key(Algorithm(row.algorithm), public_key)
                return await self._set(row, DkimState.UNPUBLISHED, public_key=public_key)
            case DkimState.UNPUBLISHED:
                await self._publish(row, record_of(row))
                return await self._set(row, DkimState.PUBLISHED)
            case DkimState.PUBLISHED:
                await self._publish(row, record_of(row))
                if not row.activate:
                    raise Waiting
                return await self._set(row, DkimState.ACTIVE)
            case DkimState.ACTIVE if row.proved_at is None:
                return await self._prove(row, now)
            case DkimState.ACTIVE:
                await self._publish(row, record_of(row))
                raise Waiting
            case DkimState.RETIRING if row.due_at <= now:
                await self._check_signs_no_more(row, now)
                revoked = Record(dkim_name(row.selector, row.domain), "TXT", f"v=DKIM1; k={_family(row)}; p=")
                await self._publish(row, revoked)
                return await self._set(row, DkimState.REVOKED, due_at=now + self._retention)
            case DkimState.REVOKED if row.due_at <= now:
                await self._publish(row, None)
                return await self._set(row, DkimState.REMOVED)
        return False

    async def _prove(self, row: Row[Any], now: datetime) -> bool:
        try:
            await self._publish(row, record_of(row))
        except Waiting as waiting:
            # Whoever gets its mail cannot find it: it signs no more, until it is there. The old one has gone on all the time.
            return await self._set(row, DkimState.PUBLISHED, problem=str(waiting), checked_at=now)
        signing = (row.proofs or {}).get("signing", {})
        if row.applied_version != row.version or signing.get("result") != "ok":
            raise Waiting(f"The host {row.host} does not sign with it yet.")
        if self._probes is None:
            raise Waiting("RETURNS_MAILDIR is not set: probes cannot be read, so the key is not known to verify.")
        record = record_of(row)
        assert record is not None  # noqa: S101  for mypy: an active key has one
        for path in self._probes.arrived().get(row.id, []):
            signed = is_signed(read_probe(path), row.domain, row.selector, record.value)
            if signed:
                await self._take_over(row, now)
            self._probes.take_away(path)
            if signed:
                return True
            log.warning("probe_not_signed", domain=row.domain, selector=row.selector)
        if row.probed_at is None or row.probed_at <= now - PROBE_AGAIN:
            await self._send_probe(row, now)
        if row.active_at is not None and row.active_at <= now - PROBE_LATE:
            raise Waiting("No probe has come back yet whose signature verifies.")
        raise Waiting

    async def _check_signs_no_more(self, row: Row[Any], now: datetime) -> None:
        """Raises Waiting as long as mail that the host signed with it may be on its way: whoever gets it needs the record."""
        since = row.applied_at
        if row.applied_version != row.version or (row.proofs or {}).get("signing", {}).get("result") != "ok":
            async with self.database.read.connect() as connection:
                if not await is_gone(connection, row.host, now):
                    raise Waiting(f"The host {row.host} has not said yet that it signs no more with it.")
            since = row.retiring_at
        if now < since + self._retention:
            raise Waiting

    async def _take_over(self, row: Row[Any], now: datetime) -> None:
        """It verifies, so those that it replaces need sign no more: one transaction."""
        query = DKIM_KEYS.where(
            dkim_keys.c.domain_id == row.domain_id,
            dkim_keys.c.host == row.host,
            dkim_keys.c.state == DkimState.ACTIVE.value,
            dkim_keys.c.id != row.id,
        )
        async with self.database.write.begin() as connection:
            change = self._change(connection, now)
            others = (await connection.execute(query)).all()
            await set_dkim_state(
                change, row, DkimState.ACTIVE, verb="prove", active_at=row.active_at, proved_at=now, checked_at=now
            )
            for other in others:
                if _family(other) == _family(row):
                    await set_dkim_state(change, other, DkimState.RETIRING, due_at=now + self._retention)
        wake(self.settings.wake_directory, row.host)

    async def _send_probe(self, row: Row[Any], now: datetime) -> None:
        async with self.database.read.connect() as connection:
            primary = await connection.execute(select(domains.c.name).where(domains.c.kind == DomainKind.PRIMARY))
            domain = primary.scalar()
        returns = probe_address(self.settings.return_path or f"returns@{domain}", self._key, row.id)
        try:
            await send_probe(self.settings, row.host, row.domain, returns, self._clock)
        except (OSError, aiosmtplib.SMTPException) as error:
            raise Waiting(f"A probe cannot be sent: {type(error).__name__}") from None
        async with self.database.write.begin() as connection:
            await connection.execute(update(dkim_keys).where(dkim_keys.c.id == row.id).values(probed_at=now))

    async def _publish(self, row: Row[Any], record: Record | None) -> None:
        """Returns when every name server has exactly this, or nothing. Raises Waiting."""
        name = dkim_name(row.selector, row.domain)
        values = [] if record is None else [record.value]
        wrong = await self._ask(row.domain, name, values)
        publisher = domain_settings(row.settings).publisher
        if wrong is None or publisher is None:
            if wrong is not None:
                raise Waiting(wrong)
            return
        chosen: Publisher | None = self.publishers.get(publisher)
        if chosen is None:
            raise Waiting(f"DNS_FILE has no publisher {publisher}.")
        try:
            zone = DomainName(await find_zone(name, self.settings))
            await chosen.replace(zone, name, "TXT", [] if record is None else [record])
        except (PublishFailed, DnsUnclear) as error:
            raise Waiting(str(error)) from None
        wrong = await self._ask(row.domain, name, values)
        if wrong is not None:
            raise Waiting(wrong)

    async def _ask(self, domain: str, name: str, values: Sequence[str]) -> str | None:
        """What a name server has otherwise. Raises Waiting when it cannot be said which servers there are."""
        now = self._clock()
        known = self._servers.get(domain)
        if known is None or now - known[0] > SERVERS_LIFETIME:
            try:
                known = self._servers[domain] = now, await find_servers(domain, self.settings)
            except DnsUnclear as error:
                raise Waiting(str(error)) from None
        return all_say(await ask_all(known[1], name, "TXT", self.settings), values)

    async def _rotate_due(self, now: datetime) -> None:
        """Where a domain's settings ask for it, and its youngest key has signed for so long."""
        proved = and_(dkim_keys.c.state == DkimState.ACTIVE.value, dkim_keys.c.proved_at.is_not(None))
        query = (
            select(domains.c.name, domains.c.settings, dkim_keys.c.active_at)
            .join(dkim_keys, dkim_keys.c.domain_id == domains.c.id)
            .where(proved)
        )
        async with self.database.read.connect() as connection:
            rows = (await connection.execute(query)).all()
        youngest: dict[str, datetime] = {}
        days: dict[str, int | None] = {}
        for row in rows:
            youngest[row.name] = max(youngest.get(row.name, row.active_at), row.active_at)
            days[row.name] = domain_settings(row.settings).rotate_every_days
        for name, active_at in youngest.items():
            every = days[name]
            if every is None or now - active_at < timedelta(days=every):
                continue
            with suppress(RotationUnderWay):
                async with self.database.write.begin() as connection:
                    await rotate_dkim_keys(self._change(connection, now), DomainName(name))
                log.info("dkim_rotation_begun", domain=name)
                self._wake_all()

    async def _set(self, row: Row[Any], state: DkimState, **columns: Any) -> bool:
        now = self._clock()
        async with self.database.write.begin() as connection:
            await set_dkim_state(self._change(connection, now), row, state, **{"checked_at": now, **columns})
        wake(self.settings.wake_directory, row.host)
        log.info("dkim_key", domain=row.domain, selector=row.selector, state=state.value)
        return "problem" not in columns

    async def _note(self, row: Row[Any], problem: str | None) -> None:
        """That it was looked at, and what stands in the way: no change of what should be."""
        query = update(dkim_keys).where(dkim_keys.c.id == row.id, dkim_keys.c.version == row.version)
        said = None if problem is None else problem[:500]
        async with self.database.write.begin() as connection:
            await connection.execute(query.values(checked_at=self._clock(), problem=said))
        if said is not None and said != row.problem:
            log.warning("dkim_key_waits", domain=row.domain, selector=row.selector, state=row.state, problem=said)

    async def _read(self, key_id: int) -> Row[Any] | None:
        async with self.database.read.connect() as connection:
            row: Row[Any] | None = (await connection.execute(DKIM_KEYS.where(dkim_keys.c.id == key_id))).one_or_none()
            return row

    async def _end_job(self, taken: Claim, problem: str | None) -> None:
        """It only said where to look. What stands in the way is shown with the key, and looked at again without a job."""
        try:
            async with self.database.write.begin() as connection:
                await end_job(connection, taken, JobState.DONE, problem, self._clock())
        except LeaseLost:
            log.warning("job_lost", subject_id=taken.subject_id)

    def _change(self, connection: Any, now: datetime) -> Change:
        return Change(connection, Actor("service", "", f"dkim-{secrets.token_hex(6)}"), now)

    def _wake_all(self) -> None:
        for socket in self.settings.wake_directory.glob("*.wake"):
            wake(self.settings.wake_directory, socket.stem)


def _family(row: Row[Any]) -> str:
    return Algorithm(row.algorithm).family
