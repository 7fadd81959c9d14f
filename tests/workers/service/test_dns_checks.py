"""The health of a domain's DNS, as the service process sees it and the API shows it, with real name servers."""

from collections.abc import AsyncIterator, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import dns.message
import dns.query
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
from app.workers.service.publishers import Update, load_publishers, text_of
from tests.conftest import ACTOR, PRIMARY, Clock, TestDatabase
from tests.stack.name_servers import NameServers

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

    async def publisher(self, zone: NameServers, file: Path, **members: Any) -> None:
        values = {"kind": "rfc2136", "server": "127.0.0.31", "port": zone.port, **zone.tsig._asdict(), **members}
        lines = [f"{name} = {value if isinstance(value, int) else repr(value)}" for name, value in values.items()]
        file.write_text("\n".join(["[main]", *lines, ""]))
        file.chmod(0o600)
        self.settings = self.settings.model_copy(update={"dns_file": file})
        self.checks = DnsChecks(self.service, self.settings, self.clock)

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
    assert never == {"domain": PRIMARY, "status": "unknown", "checked_at": None, "publishing": False, "records": []}
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


async def test_published_by_the_publisher_and_nothing_else_is_touched(
    site: Site, zone: NameServers, client: httpx.AsyncClient, tmp_path: Path
) -> None:
    refused = await client.post(f"/v1/domains/{PRIMARY}/dns/publish")
    assert (refused.status_code, refused.json()["type"]) == (409, "/problems/no-publisher")
    await site.change(publisher="main", mx=["mx1.example.net"], web_name="api.example.net", mta_sts="testing")
    await site.round()
    assert not (await client.get(URL)).json()["publishing"], "it is done when somebody asks for it"
    zone.add("ns1", Record(PRIMARY, "TXT", "site-verification=4711"))
    zone.add("ns1", Record(PRIMARY, "TXT", "v=spf1 +all"))

    async def publish() -> None:
        asked = await client.post(f"/v1/domains/{PRIMARY}/dns/publish")
        assert (asked.status_code, asked.headers["location"]) == (202, f"/v1/jobs/{asked.json()['job']}")

    async def seen(*, later: timedelta = timedelta(minutes=1)) -> Any:
        await site.round(later=later)
        return (await client.get(URL)).json()

    await publish()
    assert (await client.get(URL)).json()["publishing"]
    lost = await seen()
    assert (lost["publishing"], lost["status"]) == (True, "wrong")
    assert all("DNS_FILE has no publisher" in each["problem"] for each in lost["records"])
    await site.publisher(zone, tmp_path / "dns.toml", key_secret="d3JvbmcgbXV4IHdyb25nIG11eCB3cm9uZyBtdXg=")
    assert "refuses the key" in (await seen())["records"][0]["problem"]
    await site.publisher(zone, tmp_path / "dns.toml")
    entered = await seen()
    assert (entered["publishing"], entered["status"]) == (True, "wrong"), "ns2 has nothing yet"
    assert all("ns2" in each["problem"] for each in entered["records"])
    ns2 = load_publishers(site.settings.dns_file)["main"].model_copy(update={"server": "127.0.0.32"})
    for each in entered["records"]:
        records = [Record(each["name"], each["type"], value) for value in each["values"]]
        await ns2.replace(DomainName(PRIMARY), each["name"], each["type"], records, purpose=each["purpose"])
    done = await seen()
    assert (done["publishing"], done["status"]) == (False, "ok")
    texts = dns.query.tcp(dns.message.make_query(PRIMARY, "TXT"), "127.0.0.31", port=zone.port).answer[0]
    assert sorted(text_of(rdata) for rdata in texts) == ["site-verification=4711", "v=spf1 mx -all"]

    zone.enter("ns1", None, f"_dmarc.{PRIMARY}")
    drifted = await seen(later=timedelta(minutes=10))
    assert (drifted["status"], drifted["publishing"]) == ("wrong", False), "it is shown, and not fought over"
    await site.change(mta_sts=None, mx=None)
    await publish()
    zone.enter("ns1", Record(f"other.{PRIMARY}", "TXT", "not ours"), f"other.{PRIMARY}")
    await seen()
    for name, kind, there in (
        (PRIMARY, "MX", False),
        (f"_mta-sts.{PRIMARY}", "TXT", False),
        (f"mta-sts.{PRIMARY}", "CNAME", False),
        (f"_dmarc.{PRIMARY}", "TXT", True),
        (f"other.{PRIMARY}", "TXT", True),
        (PRIMARY, "NS", True),
    ):
        answer = dns.query.tcp(dns.message.make_query(name, kind), "127.0.0.31", port=zone.port)
        assert bool(answer.answer) == there, (name, kind)
    assert (await seen())["publishing"] is False


async def test_a_kill_while_publishing_loses_nothing(
    site: Site, zone: NameServers, client: httpx.AsyncClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After each record in turn; what had been entered is known to be ours, and is taken away when it is wanted no more."""
    await site.publisher(zone, tmp_path / "dns.toml")
    await site.change(publisher="main", mx=["mx1.example.net"], tls_reports="t@example.net")
    assert (await client.post(f"/v1/domains/{PRIMARY}/dns/publish")).status_code == 202
    real, left = Update.replace, 0

    async def dies(self: Update, *arguments: Any, **named: Any) -> None:
        nonlocal left
        if left == 0:
            raise KeyboardInterrupt
        left -= 1
        await real(self, *arguments, **named)

    monkeypatch.setattr(Update, "replace", dies)
    for number in range(4):
        left = number
        site.clock.now += timedelta(minutes=1)
        (row,) = await site.checks._due(set())
        with pytest.raises(KeyboardInterrupt):
            await site.checks._check(row)  # not in a task of its own, which would take the whole loop along
    monkeypatch.setattr(Update, "replace", real)
    mx = dns.message.make_query(PRIMARY, "MX")
    assert dns.query.tcp(mx, "127.0.0.31", port=zone.port).answer
    await site.change(mx=None)
    await site.round(later=timedelta(minutes=1))
    assert not dns.query.tcp(mx, "127.0.0.31", port=zone.port).answer
    assert (await client.get(URL)).json()["publishing"], "of ns2 nothing is known"


async def test_a_relay_is_not_published(client: httpx.AsyncClient) -> None:
    await client.post("/v1/domains", json={"name": "relay.test", "kind": "relay"})
    answer = await client.post("/v1/domains/relay.test/dns/publish")
    assert (answer.status_code, answer.json()["type"]) == (409, "/problems/domain-is-relay")
    assert (await client.post("/v1/domains/none.test/dns/publish")).status_code == 404
