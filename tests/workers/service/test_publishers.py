"""PowerDNS by its HTTP API, a real one. (Signed updates are tried in test_dkim.py and tests/mail.)"""

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import dns.exception
import dns.message
import dns.query
import dns.rdatatype
import pytest

from app.addresses import DomainName
from app.dns.records import Record
from app.workers.service import publishers
from app.workers.service.publishers import PowerDns, PublishFailed, Update, load_publishers, text_of
from tests.conftest import PRIMARY
from tests.stack.name_servers import NameServers, PowerDnsServer

pytestmark = pytest.mark.asyncio

NAME = f"s1._domainkey.{PRIMARY}"
ZONE = DomainName(PRIMARY)


@pytest.fixture(scope="module")
def server() -> Iterator[PowerDnsServer]:
    made = PowerDnsServer(PRIMARY)
    yield made
    made.close()


def publisher(running: PowerDnsServer, /, **members: str) -> PowerDns:
    return PowerDns.model_validate({"kind": "powerdns", "url": running.url, "api_key": running.key, **members})


async def test_a_set_of_records_is_replaced_and_taken_away(server: PowerDnsServer) -> None:
    ours = publisher(server)
    long = Record(NAME, "TXT", "v=DKIM1; k=rsa; p=" + "A" * 540)
    for records in ([long], [Record(NAME, "TXT", 'a "quoted" \\ one'), Record(NAME, "TXT", "v=2")], [], []):
        await ours.replace(ZONE, NAME, "TXT", records)
        assert server.says(NAME) == sorted(record.value for record in records)


async def test_what_stands_beside_it_stays(server: PowerDnsServer) -> None:
    ours = publisher(server)
    other = f"other.{PRIMARY}"
    await ours.replace(ZONE, other, "TXT", [Record(other, "TXT", "stays")])
    await ours.replace(ZONE, NAME, "TXT", [Record(NAME, "TXT", "goes")])
    await ours.replace(ZONE, NAME, "TXT", [])
    assert server.says(other) == ["stays"]


@pytest.mark.parametrize(
    ("members", "zone", "name", "says"),
    [
        ({"api_key": "hunter2"}, PRIMARY, NAME, "refuses the key (401)"),
        ({}, "elsewhere.test", "x.elsewhere.test", "has no zone elsewhere.test (404)"),
        ({}, PRIMARY, "x.elsewhere.test", f"refuses these records of {PRIMARY} (422)"),
        ({"server": "another"}, PRIMARY, NAME, "(4"),
        ({"url": "http://127.0.0.1:9"}, PRIMARY, NAME, "does not answer: ConnectError"),
    ],
)
async def test_a_refusal_is_said_and_changes_nothing(
    server: PowerDnsServer, members: dict[str, str], zone: str, name: str, says: str
) -> None:
    before = server.says(NAME)
    with pytest.raises(PublishFailed) as failed:
        await publisher(server, **members).replace(DomainName(zone), name, "TXT", [Record(name, "TXT", "new")])
    assert says in str(failed.value)
    assert members.get("api_key", server.key) not in str(failed.value)
    assert server.says(NAME) == before


@asynccontextmanager
async def rubbish(said: bytes, *, stays: bool) -> AsyncIterator[tuple[str, list[bytes]]]:
    """Something that listens where PowerDNS should, and what it was told."""
    told: list[bytes] = []
    answering: list[asyncio.Task[None]] = []

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        told.append(await reader.read(65536))
        writer.write(said)
        with suppress(ConnectionError):
            await writer.drain()
            if stays:
                await reader.read()
        writer.close()
        with suppress(ConnectionError):
            await writer.wait_closed()

    listening = await asyncio.start_server(
        lambda *streams: answering.append(asyncio.create_task(answer(*streams))), "127.0.0.1", 0
    )
    async with listening:
        yield f"http://127.0.0.1:{listening.sockets[0].getsockname()[1]}", told
        await asyncio.gather(*answering)


@pytest.mark.parametrize(
    ("said", "stays", "says"),
    [
        (b"", False, "does not answer: RemoteProtocolError"),
        (b"\x00\xff rubbish\r\n\r\n", False, "does not answer: RemoteProtocolError"),
        (b"", True, "does not answer within"),
        (b"HTTP/1.1 204 No", True, "does not answer within"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 99999999\r\n\r\n<html>", True, "answers (200)"),
        (b"HTTP/1.1 302 Found\r\nLocation: http://127.0.0.1:9/\r\nContent-Length: 0\r\n\r\n", False, "answers (302)"),
        (b"HTTP/1.1 500 Oops\r\nContent-Length: 0\r\n\r\n", False, "answers (500)"),
    ],
)
async def test_slow_and_rubbish_answers(
    server: PowerDnsServer, monkeypatch: pytest.MonkeyPatch, said: bytes, stays: bool, says: str
) -> None:
    monkeypatch.setattr(publishers, "SECONDS", 1)
    async with rubbish(said, stays=stays) as (url, told):
        with pytest.raises(PublishFailed) as failed:
            await publisher(server, url=url).replace(ZONE, NAME, "TXT", [])
    assert says in str(failed.value)
    assert len(told) == 1, "no redirect is followed"


async def test_no_proxy_of_the_environment_sees_the_key(
    server: PowerDnsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with rubbish(b"", stays=False) as (url, told):
        for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
            monkeypatch.setenv(name, url)
        await publisher(server).replace(ZONE, NAME, "TXT", [])
    assert told == []


async def test_other_texts_stay_beside_spf(server: PowerDnsServer) -> None:
    """Those of the domain itself are also other people's: proofs of ownership, for example."""
    knot = NameServers(PRIMARY, ["ns1"])
    try:
        update = Update.model_validate(
            {"kind": "rfc2136", "server": "127.0.0.31", "port": knot.port, **knot.tsig._asdict()}
        )

        def in_knot() -> list[str]:
            found = dns.query.tcp(dns.message.make_query(PRIMARY, "TXT"), "127.0.0.31", port=knot.port, timeout=5)
            return sorted(text_of(rdata) for each in found.answer if each.rdtype == dns.rdatatype.TXT for rdata in each)

        for ours, says in ((publisher(server), lambda: server.says(PRIMARY)), (update, in_knot)):
            foreign = ["site-verification=" + "x" * 300, 'quoted " \\ ; one', "v=spf1x is none"]
            await ours.replace(
                ZONE, PRIMARY, "TXT", [Record(PRIMARY, "TXT", text) for text in [*foreign, "v=spf1 +all"]]
            )
            for values in (["v=spf1 mx -all"], ["v=spf1 mx -all"], ["V=SPF1 a -all"], ["v=spf1 -all"], []):
                records = [Record(PRIMARY, "TXT", value) for value in values]
                await ours.replace(ZONE, PRIMARY, "TXT", records, purpose="spf")
                assert says() == sorted([*foreign, *values])
            with pytest.raises(PublishFailed):
                await ours.replace(DomainName("elsewhere.test"), "elsewhere.test", "TXT", [], purpose="spf")
            await ours.replace(ZONE, PRIMARY, "TXT", [])
            await ours.replace(ZONE, PRIMARY, "TXT", [Record(PRIMARY, "TXT", "v=spf1 -all")], purpose="spf")
            await ours.replace(ZONE, PRIMARY, "TXT", [], purpose="spf")
            assert says() == []
    finally:
        knot.close()


@pytest.mark.parametrize(
    "said",
    [
        b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nnone",
        b'HTTP/1.1 200 OK\r\nContent-Length: 13\r\n\r\n{"rrsets": 1}',
        b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n[]",
        b"HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\n{",
    ],
)
async def test_nothing_is_written_where_it_is_not_known_what_is_there(server: PowerDnsServer, said: bytes) -> None:
    async with rubbish(said, stays=False) as (url, told):
        with pytest.raises(PublishFailed):
            await publisher(server, url=url).replace(ZONE, PRIMARY, "TXT", [], purpose="spf")
    assert [each.split()[0] for each in told] == [b"GET"]


async def test_both_kinds_stand_in_one_file(server: PowerDnsServer, tmp_path: Path) -> None:
    file = tmp_path / "dns.toml"
    file.write_text(
        f'[one]\nkind = "powerdns"\nurl = "{server.url}/"\napi_key = "{server.key}"\n'
        '[two]\nkind = "rfc2136"\nserver = "192.0.2.53"\nkey_name = "k"\nkey_secret = "eA=="\n'
    )
    file.chmod(0o600)
    found = load_publishers(file)
    assert {name: each.kind for name, each in found.items()} == {"one": "powerdns", "two": "rfc2136"}
    await found["one"].replace(ZONE, NAME, "TXT", [Record(NAME, "TXT", "by the file")])
    assert server.says(NAME) == ["by the file"]
