"""Looks at the DNS of each domain now and then, and writes down what it sees; `GET …/dns/health` reads it."""

import asyncio
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import timedelta
from typing import Any

from sqlalchemy import Row, insert, or_, select, update
from sqlalchemy.exc import IntegrityError

from app.addresses import DomainName
from app.config import ServiceSettings
from app.db import Clock, Database
from app.dns.ask import DnsUnclear, find_zone
from app.dns.checks import Checked, check_records
from app.dns.records import Wanted
from app.errors import CacertMailError
from app.models.dns_checks import Health, dns_checks
from app.models.domains import DomainKind, domains
from app.services.dns import read_wanted_records
from app.services.domains import domain_settings
from app.workers.service.publishers import Publisher, PublishFailed, load_publishers
from app.workers.service.rounds import Rounds

STEADY = timedelta(minutes=10)
WRONG = timedelta(minutes=1)
AT_ONCE = 4
"""Domains whose name servers are asked side by side."""
BATCH = 100
"""Domains of one round."""


class DnsChecks:
    """All domains, one round after another."""

    def __init__(self, database: Database, settings: ServiceSettings, clock: Clock) -> None:
        self.database = database
        self.settings = settings
        self._clock = clock
        self.publishers: Mapping[str, Publisher] = load_publishers(settings.dns_file)
        self._asked: set[int] = set()
        self.rounds = Rounds(self.round, "dns_round_failed")

    def ask(self, domain_id: int) -> None:
        """Its turn comes in the next round."""
        self._asked.add(domain_id)

    async def round(self) -> None:
        asked, self._asked = self._asked, set()
        turn = asyncio.Semaphore(AT_ONCE)

        async def look_at(row: Row[Any]) -> None:
            async with turn:
                await self._check(row)

        await asyncio.gather(*map(look_at, await self._due(asked)))

    async def _due(self, asked: set[int]) -> Sequence[Any]:
        """Never looked at, or the longest ago, first."""
        now, c = self._clock(), dns_checks.c
        due = or_(
            c.checked_at.is_(None),
            c.checked_at <= now - STEADY,
            (c.status != Health.OK.value) & (c.checked_at <= now - WRONG),
            domains.c.id.in_(asked),
        )
        query = (
            select(
                domains.c.id,
                domains.c.name,
                domains.c.settings,
                domains.c.publish_version,
                c.published_version,
                c.published,
            )
            .outerjoin(dns_checks, c.domain_id == domains.c.id)
            .where(domains.c.kind != DomainKind.RELAY.value, due)
            .order_by(c.checked_at.is_not(None), c.checked_at)
            .limit(BATCH)
        )
        async with self.database.read.connect() as connection:
            rows: Sequence[Any] = (await connection.execute(query)).all()
            return rows

    async def _check(self, row: Row[Any]) -> None:
        try:
            async with self.database.read.connect() as connection:
                wanted = await read_wanted_records(connection, DomainName(row.name))
        except CacertMailError:
            return  # it was removed at this moment
        checked = await check_records(row.name, wanted, self.settings)
        known = {"published_version": row.published_version or 0, "published": row.published or []}
        if row.publish_version > known["published_version"]:
            checked, known = await self._publish(row, wanted, checked, known)
        await self._keep(row.id, checked, known)

    async def _keep(self, domain_id: int, checked: Checked, known: dict[str, Any]) -> None:
        values = {"status": checked.status.value, "records": checked.records, "checked_at": self._clock(), **known}
        async with self.database.write.begin() as connection:
            changed = await connection.execute(
                update(dns_checks).where(dns_checks.c.domain_id == domain_id).values(**values)
            )
            if changed.rowcount == 0:
                with suppress(IntegrityError):  # the domain was removed at this moment
                    await connection.execute(insert(dns_checks).values(domain_id=domain_id, **values))

    async def _publish(
        self, row: Row[Any], wanted: Sequence[Wanted], checked: Checked, known: dict[str, Any]
    ) -> tuple[Checked, dict[str, Any]]:
        """Enters what is not as it should be, but for keys, and takes away what it had entered and nobody wants."""
        ours = [each for each in wanted if each.purpose != "dkim"]
        places = [[each.records[0].name, each.records[0].type] for each in ours]
        gone = [place for place in known["published"] if place not in places]
        # Before it is tried: a record that was entered by a process that then died is known to be ours.
        known |= {"published": [*places, *gone]}
        await self._keep(row.id, checked, known)
        right = {(record["name"], record["type"]) for record in checked.records if record["ok"]}
        try:
            chosen = self.publishers.get(domain_settings(row.settings).publisher or "")
            if chosen is None:
                raise PublishFailed("DNS_FILE has no publisher of the name that the domain's settings have.")
            for each in ours:
                first = each.records[0]
                if (first.name, first.type) not in right:
                    zone = await find_zone(first.name, self.settings)
                    await chosen.replace(DomainName(zone), first.name, first.type, each.records, purpose=each.purpose)
            for name, kind in gone:
                await chosen.replace(DomainName(await find_zone(name, self.settings)), name, kind, [])
        except (PublishFailed, DnsUnclear) as error:
            for record in checked.records:
                if not record["ok"] and record["purpose"] != "dkim":
                    record["problem"] = f"{error} {record['problem']}"
            return checked, known
        checked = await check_records(row.name, wanted, self.settings)
        if all(record["ok"] for record in checked.records if record["purpose"] != "dkim"):
            known = {"published_version": row.publish_version, "published": places}
        return checked, known
