"""The health of a domain's DNS, as the service process sees it and the API shows it, with real name servers."""

from collections.abc import AsyncIterator, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest
import pytest_asyncio
from pydantic import SecretStr
from sqlalchemy import select

from app.addresses import DomainName
from app.config import ServiceSettings
from app.db import Database
from app.dns.records import Record
from app.models.domains import domains
from app.services.changes import Change
from app.services.dns import read_wanted_records
from app.services.domains import change_domain
from app.workers.service.dkim import Keys
from app.workers.service.dns_checks import DnsChecks
from tests.conftest import ACTOR, PRIMARY, Clock, TestDatabase
from tests.routers.name_servers import NameServers

pytestmark = pytest.mark.asyncio

URL = f"/v1/domains/{PRIMARY}/dns/health"


@pytest.fixture
def zone() -> Iterator[NameServers]:
    servers = NameServers(PRIMARY)
    yield servers
    servers.close()


class Site:
    def __init__(self, database: Database, service: Database, settings: ServiceSettings, clock: Clock) -> None:
        self.database, self.service, self.settings, self.clock = database, service, settings, clock
        self.checks = DnsChecks(service, settings, clock)

    async def wanted(self) -> list[Record]:
        async with self.database.read.connect() as connection:
            found = await read_wanted_records(connection, DomainName(PRIMARY))
        return [record for each in found for record in each.records]

    async def change(self, **settings: Any) -> None:
        async with self.database.write.begin() as connection:
            await change_domain(Change(connection, ACTOR, self.clock()), DomainName(PRIMARY), {"settings": settings})

    async def round(self, *, later: timedelta = timedelta(0)) -> None:
        self.clock.now += later
        await self.checks.round()


@pytest_asyncio.fixture
async def site(
    seeded: Database, clock: Clock, zone: NameServers, tmp_path: Path, test_database: TestDatabase
) -> AsyncIterator[Site]:
    settings = ServiceSettings(
        database_url=SecretStr(test_database.url("service")),
        wake_directory=tmp_path,
        dns_resolvers="127.0.0.31",
        dns_port=zone.port,
        dns_seconds=1,
    )
    service = Database(test_database.url("service"))
    yield Site(seeded, service, settings, clock)
    await service.close()


async def test_unknown_wrong_lagging_right_and_away(site: Site, zone: NameServers, client: httpx.AsyncClient) -> None:
    never = (await client.get(URL)).json()
    assert never == {"domain": PRIMARY, "status": "unknown", "checked_at": None, "records": []}
    await site.round()
    seen = (await client.get(URL)).json()
    assert (seen["status"], [each["purpose"] for each in seen["records"]]) == ("wrong", ["spf", "dmarc"])
    assert [each["values"] for each in seen["records"][0]["live"]] == [[], []]
    for record in await site.wanted():
        zone.enter("ns1", record, record.name)
    await site.round(later=timedelta(seconds=59))
    assert (await client.get(URL)).json()["checked_at"] == seen["checked_at"], "not yet"
    await site.round(later=timedelta(seconds=1))
    lagging = (await client.get(URL)).json()
    assert lagging["status"] == "wrong"
    assert all("ns2" in each["problem"] for each in lagging["records"])
    for record in await site.wanted():
        zone.enter("ns2", record, record.name)
    await site.round(later=timedelta(minutes=1))
    right = (await client.get(URL)).json()
    assert (right["status"], [each["problem"] for each in right["records"]]) == ("ok", [None, None])
    zone.stop("ns2")
    await site.round(later=timedelta(minutes=9))
    assert (await client.get(URL)).json()["status"] == "ok", "what is right is looked at every ten minutes"
    await site.round(later=timedelta(minutes=1))
    away = (await client.get(URL)).json()
    assert away["status"] == "unknown", "who does not answer says nothing wrong"
    assert all("ns2" in each["problem"] for each in away["records"])
    zone.enter("ns1", None, f"_dmarc.{PRIMARY}")
    await site.round(later=timedelta(minutes=1))
    assert (await client.get(URL)).json()["status"] == "wrong", "but another one does"
    zone.stop("ns1")
    await site.round(later=timedelta(minutes=1))
    gone = (await client.get(URL)).json()
    assert gone["status"] == "unknown"
    assert all(each["problem"] and each["live"] == [] for each in gone["records"])


async def test_a_change_is_looked_at_at_once(site: Site, zone: NameServers, client: httpx.AsyncClient) -> None:
    for record in await site.wanted():
        for server in ("ns1", "ns2"):
            zone.enter(server, record, record.name)
    await site.round()
    assert (await client.get(URL)).json()["status"] == "ok"
    await site.change(dmarc="reject")
    await site.round()
    assert (await client.get(URL)).json()["status"] == "ok", "nobody asked"
    await Keys(site.service, site.settings, b"k" * 32, site.clock, site.checks.ask).round()
    await site.round()
    seen = (await client.get(URL)).json()
    assert (seen["status"], [each["purpose"] for each in seen["records"] if not each["ok"]]) == ("wrong", ["dmarc"])


async def test_relays_are_not_looked_at_and_a_domain_takes_its_row_along(site: Site, client: httpx.AsyncClient) -> None:
    for name, kind in (("relay.test", "relay"), ("second.test", "virtual")):
        assert (await client.post("/v1/domains", json={"name": name, "kind": kind})).status_code == 201
    await site.round()
    answer = await client.get("/v1/domains/relay.test/dns/health")
    assert (answer.status_code, answer.json()["type"]) == (409, "/problems/domain-is-relay")
    other = (await client.get("/v1/domains/second.test/dns/health")).json()
    assert (other["status"], "cannot be found" in other["records"][0]["problem"]) == ("unknown", True)
    assert (await client.delete("/v1/domains/second.test")).status_code in (200, 204)
    await site.round(later=timedelta(minutes=20))
    async with site.database.read.connect() as connection:
        assert (await connection.execute(select(domains.c.name).order_by(domains.c.id))).scalars().all() == [
            PRIMARY,
            "relay.test",
        ]
