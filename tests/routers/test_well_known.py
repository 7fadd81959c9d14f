"""The MTA-STS policy and autoconfig: what is fetched without credentials, from the same data as the DNS records."""

import xml.etree.ElementTree as ET
from collections.abc import AsyncIterator
from typing import Any

import dns.zone
import httpx
import pytest
import pytest_asyncio
from fastapi import FastAPI

from tests.conftest import PRIMARY, anonymous

pytestmark = pytest.mark.asyncio

URL = f"/v1/domains/{PRIMARY}"
POLICY = "/.well-known/mta-sts.txt"
CONFIGS = ("/mail/config-v1.1.xml", "/.well-known/autoconfig/mail/config-v1.1.xml")
ALL = {"mx": ["mx1.example.net", "mx2.example.net"], "web_name": "api.example.net", "mail_name": "mail.example.net"}


@pytest_asyncio.fixture
async def visitor(api: FastAPI) -> AsyncIterator[httpx.AsyncClient]:
    async with anonymous(api) as made:
        yield made


async def wants(client: httpx.AsyncClient, domain: str = PRIMARY, **settings: Any) -> None:
    answer = await client.patch(f"/v1/domains/{domain}", json={"settings": settings})
    assert answer.status_code == 200, answer.text


async def records(client: httpx.AsyncClient) -> dict[tuple[str, str], str]:
    text = (await client.get(f"{URL}/dns?format=zone")).text
    parsed = dns.zone.from_text(text, origin=f"{PRIMARY}.", check_origin=False)
    return {(str(name), data.rdtype.name): data.to_text() for name, _, data in parsed.iterate_rdatas()}


async def policy(visitor: httpx.AsyncClient, host: str = f"mta-sts.{PRIMARY}") -> httpx.Response:
    return await visitor.get(POLICY, headers={"Host": host})


async def test_the_policy_says_what_the_settings_say(client: httpx.AsyncClient, visitor: httpx.AsyncClient) -> None:
    assert (await policy(visitor)).status_code == 404
    await wants(client, **ALL, mta_sts="testing")
    answer = await policy(visitor, f"MTA-STS.{PRIMARY.upper()}:443")
    assert answer.headers["content-type"].startswith("text/plain")
    assert answer.text.split("\r\n") == [
        "version: STSv1",
        "mode: testing",
        "mx: mx1.example.net",
        "mx: mx2.example.net",
        "max_age: 86400",
        "",
    ]
    await wants(client, mta_sts="enforce")
    assert "mode: enforce\r\n" in (await policy(visitor)).text
    await wants(client, mta_sts="none", mx=None)
    assert (await policy(visitor)).text == "version: STSv1\r\nmode: none\r\nmax_age: 86400\r\n"
    await wants(client, mta_sts=None)
    assert (await policy(visitor)).status_code == 404


async def test_another_policy_has_another_id(client: httpx.AsyncClient) -> None:
    await wants(client, **ALL)
    assert not [name for name, _ in await records(client) if "mta-sts" in name]
    seen = []
    for change in ({"mta_sts": "testing"}, {"mta_sts": "enforce"}, {"mx": ["mx3.example.net"]}, {"dmarc": "reject"}):
        await wants(client, **change)
        found = await records(client)
        assert found["mta-sts", "CNAME"] == "api.example.net."
        seen.append(found["_mta-sts", "TXT"])
    assert len(set(seen)) == 3
    assert seen[2] == seen[3], "what is not in the policy changes nothing"
    for text in seen:
        identity = text.removeprefix('"v=STSv1; id=').removesuffix(';"')
        assert identity.isalnum()
        assert len(identity) <= 32


@pytest.mark.parametrize(
    ("wanted", "lacks"),
    [
        ({"mta_sts": "enforce", "mx": ["mx.example.net"]}, "web_name"),
        ({"mta_sts": "none"}, "web_name"),
        ({"mta_sts": "testing", "web_name": "api.example.net"}, "mta_sts wants mx"),
        ({"mta_sts": "enforce", "web_name": "api.example.net", "mx": []}, "mta_sts wants mx"),
        ({"mta_sts": "yes", "web_name": "api.example.net"}, "testing"),
        ({"mail_name": "mail.example.net\r\nmx: evil.test"}, "domain"),
        ({"web_name": "<x>"}, "domain"),
    ],
)
async def test_a_policy_that_nobody_could_keep_is_refused(
    client: httpx.AsyncClient, wanted: dict[str, Any], lacks: str
) -> None:
    answer = await client.patch(URL, json={"settings": wanted})
    assert answer.status_code == 422, answer.text
    assert lacks in answer.text
    assert (await client.get(URL)).json()["settings"]["mta_sts"] is None


async def test_what_a_policy_wants_is_not_taken_away_under_it(client: httpx.AsyncClient) -> None:
    await wants(client, **ALL, mta_sts="enforce")
    for gone in ("mx", "web_name"):
        assert (await client.patch(URL, json={"settings": {gone: None}})).status_code == 422


async def test_mail_programs_find_the_ports_of_the_host(client: httpx.AsyncClient, visitor: httpx.AsyncClient) -> None:
    assert not [name for name, kind in await records(client) if kind == "SRV"]
    await wants(client, **ALL)
    assert {name: value for (name, kind), value in (await records(client)).items() if kind == "SRV"} == {
        "_submissions._tcp": "0 1 465 mail.example.net.",
        "_submission._tcp": "10 1 587 mail.example.net.",
        "_imaps._tcp": "0 1 993 mail.example.net.",
        "_imap._tcp": "10 1 143 mail.example.net.",
        "_pop3s._tcp": "20 1 995 mail.example.net.",
        "_pop3._tcp": "0 0 0 .",
    }
    host = (await client.get("/v1/hosts")).json()["items"][0]["name"]
    changed = await client.patch(f"/v1/hosts/{host}", json={"settings": {"pop3_enabled": False, "imaps_port": 10993}})
    assert changed.status_code in (200, 202), changed.text
    found = await records(client)
    assert (found["_pop3s._tcp", "SRV"], found["_imaps._tcp", "SRV"]) == ("0 0 0 .", "0 1 10993 mail.example.net.")
    assert found["autoconfig", "CNAME"] == "api.example.net."
    config = await visitor.get(CONFIGS[0], headers={"Host": f"autoconfig.{PRIMARY}"})
    root = ET.fromstring(config.content)  # noqa: S314  our own
    servers = [
        (each.get("type"), each.findtext("hostname"), each.findtext("port"), each.findtext("socketType"))
        for each in root.iterfind("emailProvider/*[hostname]")
    ]
    assert servers == [
        ("imap", "mail.example.net", "10993", "SSL"),
        ("imap", "mail.example.net", "143", "STARTTLS"),
        ("smtp", "mail.example.net", "465", "SSL"),
        ("smtp", "mail.example.net", "587", "STARTTLS"),
    ]


@pytest.mark.parametrize("path", CONFIGS)
async def test_autoconfig_by_name_or_by_address(
    client: httpx.AsyncClient, visitor: httpx.AsyncClient, path: str
) -> None:
    await wants(client, **ALL)
    await client.post("/v1/domains", json={"name": "second.test", "kind": "virtual"})
    await wants(client, "second.test", mail_name="mail.second.test")

    async def ask(host: str, address: str | None = None) -> str | None:
        asked = {} if address is None else {"emailaddress": address}
        answer = await visitor.get(path, headers={"Host": host}, params=asked)
        if answer.status_code == 404:
            return None
        assert answer.headers["content-type"].startswith("text/xml")
        root = ET.fromstring(answer.content)  # noqa: S314  our own
        assert {each.text for each in root.iter("username")} == {"%EMAILADDRESS%"}, "no address is repeated"
        return root.findtext("emailProvider/domain")

    assert await ask(f"autoconfig.{PRIMARY}") == PRIMARY
    assert await ask(PRIMARY) == PRIMARY
    assert await ask("AutoConfig.Second.test:8443") == "second.test"
    assert await ask("api.example.net", f"nobody@{PRIMARY}") == PRIMARY
    assert await ask("api.example.net", "x@SECOND.test") == "second.test"
    assert await ask(PRIMARY, "x@second.test") == PRIMARY, "who asks a domain is told about it"
    for host, address in [("api.example.net", None), ("api.example.net", "x@elsewhere.test"), ("autoconfig.", "@")]:
        assert await ask(host, address) is None
    assert await ask('x"><y>', "<script>@<x>") is None


async def test_relays_and_others_say_nothing(client: httpx.AsyncClient, visitor: httpx.AsyncClient) -> None:
    await client.post("/v1/domains", json={"name": "relay.test", "kind": "relay"})
    await wants(client, **ALL, mta_sts="enforce")
    hosts = (
        PRIMARY,
        "mta-sts.relay.test",
        "mta-sts.none.test",
        f"mta-sts.mta-sts.{PRIMARY}",
        "mta-sts.",
        "mta-sts.%C3%A9",
        "",
        "[::1]",
    )
    for host in hosts:
        assert (await policy(visitor, host)).status_code == 404, host
    for path in CONFIGS:
        assert (await visitor.get(path, headers={"Host": "autoconfig.relay.test"})).status_code == 404
