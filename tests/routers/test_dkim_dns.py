"""What the name servers say of a key, asked while it is read: two real ones, of which one lags, is dead, or knows more."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from pydantic import SecretStr

from app.config import ApiSettings
from app.db import Database
from app.dns.records import Record
from app.models.dkim_keys import Algorithm, DkimState
from tests.conftest import ISSUER, PRIMARY, TestDatabase
from tests.routers.keys import KEYS, bring_to, make_key, public_key
from tests.stack.name_servers import SERVERS, NameServers

pytestmark = pytest.mark.asyncio


@pytest.fixture
def names() -> Iterator[NameServers]:
    made = NameServers(PRIMARY)
    yield made
    made.close()


@pytest.fixture
def settings(test_database: TestDatabase, key_directory: Path, scratch: Path, names: NameServers) -> ApiSettings:
    return ApiSettings(
        database_url=SecretStr(test_database.url("api")),
        key_directory=key_directory,
        link_key_file=key_directory / "link.key",
        issuer=ISSUER,
        wake_directory=scratch,
        dns_resolvers=SERVERS["ns1"],
        dns_port=names.port,
        dns_seconds=1,
    )


def record_of(key: dict[str, Any], value: str | None = None) -> Record:
    shown = key["record"]
    return Record(shown["name"], "TXT", shown["value"] if value is None else value)


async def test_each_name_server_is_asked(client: httpx.AsyncClient, seeded: Database, names: NameServers) -> None:
    key = await make_key(client, algorithm="rsa-3072")
    url = f"{KEYS}/{key['selector']}"
    assert (await client.get(url)).json()["dns"] is None, "nothing could be there yet"
    await bring_to(seeded, key, DkimState.UNPUBLISHED)

    missing = (await client.get(url)).json()
    assert missing["dns"]["same"] is False
    assert missing["dns"]["problem"] == "ns1.cacert.test (127.0.0.31) answers: no such record"
    record = record_of(missing)
    assert len(record.value) > 510, "it is split, on its way"

    names.enter("ns1", record, record.name)
    lags = (await client.get(url)).json()["dns"]
    assert (lags["same"], lags["problem"]) == (False, "ns2.cacert.test (127.0.0.32) answers: no such record")
    assert [(each["server"], each["address"], each["same"]) for each in lags["answers"]] == [
        ("ns1.cacert.test", "127.0.0.31", True),
        ("ns2.cacert.test", "127.0.0.32", False),
    ]
    assert [each["values"] for each in lags["answers"]] == [[record.value], []]

    names.enter("ns2", record, record.name)
    both = (await client.get(url)).json()
    assert (both["dns"]["same"], both["dns"]["problem"]) == (True, None)
    assert both["dns"]["asked_at"] == "2026-11-23T12:00:00Z"
    assert both["state"] == "unpublished", "reading changes nothing: the service process looks for itself"

    other = record_of(missing, f"v=DKIM1; k=rsa; p={public_key(Algorithm.RSA_2048)}")
    names.enter("ns2", other, record.name)
    wrong = (await client.get(url)).json()["dns"]
    assert (wrong["same"], wrong["answers"][1]["values"]) == (False, [other.value])


async def test_a_name_server_that_is_away_is_named(
    client: httpx.AsyncClient, seeded: Database, names: NameServers
) -> None:
    key = await make_key(client, algorithm="ed25519")
    url = f"{KEYS}/{key['selector']}"
    await bring_to(seeded, key, DkimState.PUBLISHED)
    record = record_of((await client.get(url)).json())
    names.enter("ns1", record, record.name)
    names.enter("ns2", record, record.name)
    names.stop("ns2")
    half = await client.get(url)
    said = half.json()["dns"]
    assert (half.status_code, said["same"]) == (200, False)
    assert "ns2.cacert.test" in said["problem"]
    assert (said["answers"][0]["same"], said["answers"][1]["values"]) == (True, None)
    names.stop("ns1")
    none = await client.get(url)
    assert (none.status_code, none.json()["dns"]["same"], none.json()["dns"]["answers"]) == (200, False, [])
    assert none.json()["dns"]["problem"]
    assert none.json()["record"]["value"] == record.value


async def test_a_zone_that_nobody_knows_is_said(client: httpx.AsyncClient, seeded: Database) -> None:
    await client.post("/v1/domains", json={"name": "other.test"})
    url = "/v1/domains/other.test/dkim-keys"
    key = await make_key(client, url, algorithm="ed25519")
    await bring_to(seeded, key, DkimState.UNPUBLISHED)
    answer = await client.get(f"{url}/{key['selector']}")
    assert answer.status_code == 200, answer.text
    said = answer.json()["dns"]
    assert (said["same"], said["answers"]) == (False, [])
    assert said["problem"].startswith(f"The name servers of {key['selector']}._domainkey.other.test cannot be found")


async def test_a_key_on_its_way_out(client: httpx.AsyncClient, seeded: Database, names: NameServers) -> None:
    key = await make_key(client, algorithm="ed25519")
    url = f"{KEYS}/{key['selector']}"
    await bring_to(seeded, key, DkimState.RETIRING)
    record = record_of((await client.get(url)).json())
    for server in SERVERS:
        names.enter(server, record, record.name)
    await bring_to(seeded, key, DkimState.REVOKED)
    assert (await client.get(url)).json()["dns"]["same"] is False, "the key is in it still"
    for server in SERVERS:
        names.enter(
            server, record_of({"record": {"name": record.name, "value": "v=DKIM1; k=ed25519; p="}}), record.name
        )
    assert (await client.get(url)).json()["dns"]["same"] is True
    await bring_to(seeded, key, DkimState.REMOVED)
    assert (await client.get(url)).json()["dns"]["same"] is False
    for server in SERVERS:
        names.enter(server, None, record.name)
    assert (await client.get(url)).json()["dns"]["same"] is True


async def test_what_a_name_server_says_is_shown_and_nothing_else(
    client: httpx.AsyncClient, seeded: Database, names: NameServers
) -> None:
    """Whoever has the zone may write what they like, and much of it."""
    key = await make_key(client, algorithm="ed25519")
    url = f"{KEYS}/{key['selector']}"
    await bring_to(seeded, key, DkimState.PUBLISHED)
    name = (await client.get(url)).json()["record"]["name"]
    update = names.update()
    for number in range(25):
        update.add(f"{name}.", 60, "TXT", f'"{number:02}\\007<script>\\200{"x" * 200}" ' * 6)
    names.send("ns1", update)
    answer = await client.get(url)
    [first, _] = answer.json()["dns"]["answers"]
    assert (first["same"], len(first["values"])) == (False, 20)
    assert max(len(value) for value in first["values"]) <= 1000
    assert "\\xc8" in first["values"][0], "octets outside ASCII are written out"
    assert (await client.get(KEYS)).status_code == 200
