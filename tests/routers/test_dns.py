"""Which records a domain should have, and what real name servers answer."""

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace

import dns.zone
import httpx
import pytest
from fastapi import FastAPI
from pydantic import SecretStr

from app.addresses import DomainName
from app.config import DnsSettings
from app.db import Database, utc_now
from app.dns.ask import all_say, ask_all, find_servers, find_zone
from app.dns.records import Record
from app.queue.claim import Outcome
from app.queue.claim import record as record_applied
from app.queue.contracts import THE_HOST, JobKind
from app.workers.service.publishers import Update
from tests.conftest import HOST, PRIMARY
from tests.stack.name_servers import SERVERS, NameServers
from tests.stack.processes import free_ports

pytestmark = pytest.mark.asyncio

URL = f"/v1/domains/{PRIMARY}/dns"


@pytest.fixture(scope="module")
def zone() -> Iterator[NameServers]:
    servers = NameServers(PRIMARY)
    yield servers
    servers.close()


@pytest.fixture
def asking(api: FastAPI, zone: NameServers) -> None:
    known = {"dns_resolvers": SERVERS["ns1"], "dns_port": zone.port, "dns_seconds": 1}
    service = api.state.service
    api.state.service = replace(service, settings=service.settings.model_copy(update=known))


async def fill(client: httpx.AsyncClient) -> None:
    settings = {
        "mx": ["mx1.example.net", "mx2.example.net"],
        "dmarc": "reject",
        "dmarc_reports": "d@example.net",
        "tls_reports": "t@example.net",
    }
    assert (await client.patch(f"/v1/domains/{PRIMARY}", json={"settings": settings})).status_code == 200
    for sender in ({"kind": "ip4", "value": "192.0.2.0/24"}, {"kind": "include", "value": "spf.example.net"}):
        assert (await client.post(f"/v1/domains/{PRIMARY}/senders", json={**sender, "note": "x"})).status_code == 201


async def test_the_zone_text_is_one_that_a_name_server_takes(client: httpx.AsyncClient) -> None:
    await fill(client)
    answer = await client.get(f"{URL}?format=zone")
    assert answer.headers["content-type"].startswith("text/plain")
    parsed = dns.zone.from_text(answer.text, origin=f"{PRIMARY}.", check_origin=False)
    found = {(str(name), rdata.to_text()) for name, _, rdata in parsed.iterate_rdatas()}
    assert found == {
        ("@", "10 mx1.example.net."),
        ("@", "20 mx2.example.net."),
        ("@", '"v=spf1 mx ip4:192.0.2.0/24 include:spf.example.net -all"'),
        ("_dmarc", '"v=DMARC1; p=reject; rua=mailto:d@example.net"'),
        ("_smtp._tls", '"v=TLSRPTv1; rua=mailto:t@example.net"'),
    }


@pytest.mark.usefixtures("asking")
async def test_each_record_says_whether_it_is_live_and_why_not(client: httpx.AsyncClient, zone: NameServers) -> None:
    for server in SERVERS:
        for name in (PRIMARY, f"_dmarc.{PRIMARY}"):  # of the test on the other database
            zone.enter(server, None, name)
    first = (await client.get(URL)).json()
    assert [record["purpose"] for record in first["records"]] == ["spf", "dmarc"]
    assert first["servers"] == ["ns1." + PRIMARY + " (127.0.0.31)", "ns2." + PRIMARY + " (127.0.0.32)"]
    assert not first["ok"]
    assert all("ns1" in record["problem"] and not record["ok"] for record in first["records"])
    for record in first["records"]:
        zone.enter("ns1", Record(record["name"], "TXT", record["values"][0]), record["name"])
    lagging = (await client.get(URL)).json()
    assert all("ns2" in record["problem"] for record in lagging["records"])
    for record in first["records"]:
        zone.enter("ns2", Record(record["name"], "TXT", record["values"][0]), record["name"])
    whole = (await client.get(URL)).json()
    assert (whole["ok"], [record["problem"] for record in whole["records"]]) == (True, [None, None])
    zone.add("ns2", Record(PRIMARY, "TXT", "site-verification=4711"))
    assert (await client.get(URL)).json()["ok"], "other texts are none of our business"
    zone.add("ns2", Record(PRIMARY, "TXT", "v=spf1 -all"))
    two = (await client.get(URL)).json()
    assert (two["ok"], two["records"][0]["ok"]) == (False, False), "two SPF records are an error (RFC 7208, 4.5)"


@pytest.mark.usefixtures("asking")
async def test_each_kind_of_record_is_seen_to_be_live(client: httpx.AsyncClient, zone: NameServers) -> None:
    settings = {"web_name": "api.example.net", "mail_name": "Mail.example.net", "mta_sts": "enforce"}
    await fill(client)
    assert (await client.patch(f"/v1/domains/{PRIMARY}", json={"settings": settings})).status_code == 200
    found = (await client.get(URL)).json()
    kinds = ["mx", "spf", "dmarc", "tls-rpt", "mta-sts", "mta-sts", *["srv"] * 6, "autoconfig"]
    assert [record["purpose"] for record in found["records"]] == kinds
    assert not any(record["ok"] for record in found["records"])
    for address in SERVERS.values():
        publisher = Update.model_validate(
            {"kind": "rfc2136", "server": address, "port": zone.port, **zone.tsig._asdict()}
        )
        for each in found["records"]:
            values = [Record(each["name"], each["type"], value) for value in each["values"]]
            await publisher.replace(DomainName(PRIMARY), each["name"], each["type"], values)
    whole = (await client.get(URL)).json()
    assert (whole["ok"], [record["problem"] for record in whole["records"]]) == (True, [None] * len(kinds))
    await publisher.replace(DomainName(PRIMARY), f"_imaps._tcp.{PRIMARY}", "SRV", [])
    lacks = [record["name"] for record in (await client.get(URL)).json()["records"] if not record["ok"]]
    assert lacks == [f"_imaps._tcp.{PRIMARY}"]
    for address in SERVERS.values():  # for the test on the other database
        publisher = publisher.model_copy(update={"server": address})
        for each in found["records"]:
            await publisher.replace(DomainName(PRIMARY), each["name"], each["type"], [])


@pytest.mark.usefixtures("asking")
async def test_what_means_the_same_is_the_same(client: httpx.AsyncClient, zone: NameServers) -> None:
    settings = {"dmarc": "reject", "dmarc_reports": "d@example.net", "tls_reports": "t@example.net"}
    await client.patch(f"/v1/domains/{PRIMARY}", json={"settings": settings})
    live = {
        PRIMARY: "V=SPF1  MX -all",
        f"_dmarc.{PRIMARY}": "v=DMARC1;rua = mailto:d@example.net;p=reject;",
        f"_smtp._tls.{PRIMARY}": "v=TLSRPTv1;rua=mailto:t@example.net;",
    }
    for server in SERVERS:
        for name, value in live.items():
            zone.enter(server, Record(name, "TXT", value), name)
    found = (await client.get(URL)).json()
    assert [record["problem"] for record in found["records"]] == [None] * 3
    assert found["records"][1]["live"][0]["values"] == [live[f"_dmarc.{PRIMARY}"]], "shown as it is"
    zone.enter("ns2", Record(PRIMARY, "TXT", "v=spf1 mx ?all"), PRIMARY)
    zone.enter("ns2", Record(f"_dmarc.{PRIMARY}", "TXT", "v=DMARC1; p=reject"), f"_dmarc.{PRIMARY}")
    zone.enter("ns2", Record(f"_smtp._tls.{PRIMARY}", "TXT", "=;"), f"_smtp._tls.{PRIMARY}")
    found = (await client.get(URL)).json()
    assert [record["ok"] for record in found["records"]] == [False] * 3
    for server in SERVERS:
        for name in live:
            zone.enter(server, None, name)


async def test_mail_goes_to_the_hosts_unless_somebody_says_otherwise(
    client: httpx.AsyncClient, worker_database: Database
) -> None:
    async def mx() -> list[str]:
        records = (await client.get(URL)).json()["records"]
        return next((record["values"] for record in records if record["purpose"] == "mx"), [])

    assert await mx() == [], "no host has reported its name"
    for hostname, said in (("Mail.Example.net", ["10 mail.example.net."]), ("no name\n", []), (None, [])):
        async with worker_database.write.begin() as connection:
            outcome = Outcome(1, True, {}, {"hostname": hostname})
            await record_applied(connection, HOST, JobKind.MAILHOST_SYNC, THE_HOST, outcome, utc_now())
        assert await mx() == said
    async with worker_database.write.begin() as connection:
        outcome = Outcome(1, True, {}, {"hostname": "mail.example.net"})
        await record_applied(connection, HOST, JobKind.MAILHOST_SYNC, THE_HOST, outcome, utc_now())
    await client.patch(f"/v1/domains/{PRIMARY}", json={"settings": {"mx": ["mx.example.net"]}})
    assert await mx() == ["10 mx.example.net."]
    await client.patch(f"/v1/domains/{PRIMARY}", json={"settings": {"mx": []}})
    assert await mx() == []
    await client.patch(f"/v1/domains/{PRIMARY}", json={"settings": {"mx": None}})
    await client.patch(f"/v1/hosts/{HOST}", json={"enabled": False})
    assert await mx() == [], "no mail goes to a host that is out of use"


async def test_a_name_in_a_zone_of_its_own_is_asked_there() -> None:
    """`_domainkey` of other name servers than the rest: the resolver knows both, as a recursive one would."""
    name = f"s1._domainkey.{PRIMARY}"
    settings = DnsSettings(
        database_url=SecretStr("sqlite+aiosqlite:///none.db"),
        dns_resolvers=f"{SERVERS['ns2']},{SERVERS['ns1']}",
        dns_port=free_ports(1)[0],
        dns_seconds=1,
    )
    with ExitStack() as stack:
        below = NameServers(f"_domainkey.{PRIMARY}", ("ns2",), port=settings.dns_port)
        stack.callback(below.close)
        above = NameServers(PRIMARY, ("ns1",), port=settings.dns_port)
        stack.callback(above.close)
        update = above.update()
        update.add(f"_domainkey.{PRIMARY}.", 3600, "NS", f"ns2._domainkey.{PRIMARY}.")
        update.add(f"ns2._domainkey.{PRIMARY}.", 3600, "A", SERVERS["ns2"])
        above.send("ns1", update)
        below.enter("ns2", Record(name, "TXT", "v=DKIM1; p="), name)
        servers = await find_servers(PRIMARY, settings)
        assert [server.name for server in servers] == [f"ns1.{PRIMARY}"]
        assert all_say(await ask_all(servers, name, "TXT", settings), ["v=DKIM1; p="]) is None
        assert await find_zone(name, settings) == f"_domainkey.{PRIMARY}"
        below.stop("ns2")
        away = await ask_all(servers, name, "TXT", settings)
        assert [answer.values for answer in away] == [None]


async def test_name_servers_that_cannot_be_found_are_a_problem_and_no_error(client: httpx.AsyncClient) -> None:
    answer = await client.get(URL)
    assert answer.status_code == 200
    assert not answer.json()["ok"]
    assert all(record["problem"] for record in answer.json()["records"])


async def test_a_relay_and_an_unknown_domain(client: httpx.AsyncClient) -> None:
    await client.post("/v1/domains", json={"name": "relay.test", "kind": "relay"})
    answer = await client.get("/v1/domains/relay.test/dns")
    assert (answer.status_code, answer.json()["type"]) == (409, "/problems/domain-is-relay")
    assert (await client.get("/v1/domains/none.test/dns")).status_code == 404
