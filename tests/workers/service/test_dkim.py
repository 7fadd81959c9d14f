"""The life of a DKIM key, on both databases, with real name servers. The host is rows here; see tests/mail for the whole."""

from base64 import b64encode
from collections.abc import AsyncIterator, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from pydantic import SecretStr
from sqlalchemy import insert, select, update

from app.config import ServiceSettings
from app.db import Database
from app.dns.records import Record, dkim_record
from app.errors import DkimKeySigns
from app.models.audit_events import audit_events
from app.models.dkim_keys import Algorithm, dkim_keys
from app.models.hosts import host_status
from app.models.jobs import applied, jobs
from app.services.changes import Change
from app.services.dkim_keys import DKIM_KEYS, create_dkim_key, delete_dkim_key, rotate_dkim_keys
from app.services.domains import change_domain
from app.services.hosts import change_host
from app.workers.service.dkim import Keys
from app.workers.service.publishers import PublishersUnusable, load_publishers
from tests.conftest import ACTOR, HOST, PRIMARY, Clock, TestDatabase
from tests.stack.name_servers import NameServers

pytestmark = pytest.mark.asyncio

DAYS = timedelta(days=7)


@pytest.fixture(scope="module")
def zone() -> Iterator[NameServers]:
    servers = NameServers(PRIMARY)
    yield servers
    servers.close()


class Site:
    """`api`, `service` and `worker` each have a database user of their own."""

    def __init__(self, databases: dict[str, Database], settings: ServiceSettings, clock: Clock) -> None:
        self.databases, self.settings, self.clock = databases, settings, clock
        self.database = databases["api"]

    async def do(self, function: Any, *arguments: Any, **named: Any) -> Any:
        async with self.database.write.begin() as connection:
            return await function(Change(connection, ACTOR, self.clock()), *arguments, **named)

    async def row(self, key_id: int) -> Any:
        async with self.database.read.connect() as connection:
            return (await connection.execute(DKIM_KEYS.where(dkim_keys.c.id == key_id))).one()

    async def state(self, key_id: int) -> str:
        return str((await self.row(key_id)).state)

    async def service(self, *, later: timedelta = timedelta(minutes=1)) -> None:
        """One round of a process that was started for it: it remembers nothing of the one before."""
        self.clock.now += later
        await Keys(self.databases["service"], self.settings, b"k" * 32, self.clock).round()

    async def host(self, key_id: int, public_key: str | None = None) -> None:
        """What its worker would report."""
        row = await self.row(key_id)
        signing = {"result": "ok", "detail": "it signs" if row.state == "active" else "it does not sign"}
        values = {
            "version": row.version,
            "stands": True,
            "revision": 1,
            "proofs": {"key": {"result": "ok", "detail": None}, "signing": signing},
            "result": {"public_key": public_key or row.public_key},
            "applied_at": self.clock(),
        }
        subject = {"host": row.host, "kind": "dkim.sync", "subject_id": key_id}
        async with self.databases["worker"].write.begin() as connection:
            changed = await connection.execute(
                update(applied).where(*(applied.c[name] == value for name, value in subject.items())).values(**values)
            )
            if changed.rowcount == 0:
                await connection.execute(insert(applied).values(**subject, **values))

    async def prove(self, key_id: int) -> None:
        """As if its probe had come back."""
        keys = Keys(self.databases["service"], self.settings, b"k" * 32, self.clock)
        await keys._take_over(await self.row(key_id), self.clock())


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
        returns_maildir=tmp_path / "returns",
        smtp_port=9,
    )
    databases = {"api": seeded, **{user: Database(test_database.url(user)) for user in ("service", "worker")}}
    yield Site(databases, settings, clock)
    for user in ("service", "worker"):
        await databases[user].close()


def public_key() -> str:
    raw = Ed25519PrivateKey.generate().public_key().public_bytes(Encoding.Raw, PublicFormat.Raw)
    return b64encode(raw).decode()


def record(row: Any) -> Record:
    return dkim_record(row.selector, PRIMARY, Algorithm.ED25519, row.public_key or "")


async def made(site: Site, selector: str | None = None, *, activate: bool = True) -> int:
    key_id: int = await site.do(
        create_dkim_key, PRIMARY, selector=selector, algorithm=Algorithm.ED25519, activate=activate
    )
    await site.host(key_id, public_key())
    await site.service()
    return key_id


async def test_by_hand_from_its_making_to_its_end(site: Site, zone: NameServers) -> None:
    old = await made(site)
    assert await site.state(old) == "unpublished"
    row = await site.row(old)
    assert "no such record" in row.problem
    zone.enter("ns1", record(row), record(row).name)
    await site.service()
    row = await site.row(old)
    assert (row.state, "ns2" in row.problem) == ("unpublished", True), "one of two name servers lags"
    zone.enter("ns2", record(row), record(row).name)
    await site.service()
    assert await site.state(old) == "active"
    await site.service()
    assert "does not sign with it yet" in (await site.row(old)).problem
    await site.host(old)
    await site.service()
    assert "probe cannot be sent" in (await site.row(old)).problem, "nobody listens at port 9"
    await site.prove(old)

    (new,) = await site.do(rotate_dkim_keys, PRIMARY)
    await site.host(new, public_key())
    await site.service()
    row = await site.row(new)
    for server in ("ns1", "ns2"):
        zone.enter(server, record(row), record(row).name)
    await site.service()
    assert (await site.state(old), await site.state(new)) == ("active", "active"), (
        "both sign until the new one is proved"
    )
    await site.prove(new)
    row = await site.row(old)
    assert (row.state, row.due_at) == ("retiring", site.clock() + DAYS)
    await site.service()
    assert await site.state(old) == "retiring", "mail under way needs it"

    await site.service(later=DAYS)
    row = await site.row(old)
    assert (row.state, "has not said yet" in row.problem) == ("retiring", True), "the host may still sign with it"
    await site.host(old)
    await site.service()
    row = await site.row(old)
    assert (row.state, row.problem) == ("retiring", None), "what it signed last is under way"
    await site.service(later=DAYS)
    assert "answers: v=DKIM1" in (await site.row(old)).problem
    revoked = Record(record(row).name, "TXT", "v=DKIM1; k=ed25519; p=")
    for server in ("ns1", "ns2"):
        zone.enter(server, revoked, revoked.name)
    await site.service()
    row = await site.row(old)
    assert (row.state, row.due_at) == ("revoked", site.clock() + DAYS)
    await site.service(later=DAYS)
    assert await site.state(old) == "revoked"
    for server in ("ns1", "ns2"):
        zone.enter(server, None, revoked.name)
    await site.service()
    assert await site.state(old) == "removed"
    assert await site.state(new) == "active"
    async with site.database.read.connect() as connection:
        query = select(audit_events.c.action).where(
            audit_events.c.subject_kind == "dkim-key", audit_events.c.subject_id == str(old)
        )
        actions = list((await connection.execute(query.order_by(audit_events.c.id))).scalars())
        waiting = await connection.execute(select(jobs.c.version).where(jobs.c.kind == "dkim.sync"))
    assert [action.partition(".")[2] for action in actions] == [
        "create", "generate", "publish", "sign", "prove", "retire", "revoke", "remove"
    ]  # fmt: skip
    assert len(list(waiting.scalars())) == 8 + 5, "each change has a job for its host"


async def test_a_record_that_is_lost_before_the_proof_takes_the_key_back(site: Site, zone: NameServers) -> None:
    key = await made(site)
    row = await site.row(key)
    for server in ("ns1", "ns2"):
        zone.enter(server, record(row), record(row).name)
    await site.service()
    assert await site.state(key) == "active"
    zone.enter("ns2", None, record(row).name)
    await site.service()
    row = await site.row(key)
    assert (row.state, row.active_at) == ("published", None)
    assert "ns2" in row.problem
    zone.enter("ns2", record(row), record(row).name)
    await site.service()
    assert await site.state(key) == "active"


async def test_what_a_host_reports_is_not_believed(site: Site) -> None:
    key: int = await site.do(create_dkim_key, PRIMARY, algorithm=Algorithm.ED25519)
    await site.host(key, "AAAA; p=\n")
    await site.service()
    row = await site.row(key)
    assert (row.state, row.public_key) == ("generating", None)
    assert "base64" in row.problem


async def test_one_that_is_deleted_leaves_nothing(site: Site, zone: NameServers) -> None:
    key = await made(site, activate=False)
    row = await site.row(key)
    for server in ("ns1", "ns2"):
        zone.enter(server, record(row), record(row).name)
    await site.service()
    assert await site.state(key) == "published"
    await site.do(delete_dkim_key, PRIMARY, row.selector)
    await site.service()
    assert "v=DKIM1" in (await site.row(key)).problem
    for server in ("ns1", "ns2"):
        zone.enter(server, None, record(row).name)
    await site.service()
    assert await site.state(key) == "removed"


async def test_the_key_of_a_host_that_is_gone_goes_too(site: Site, zone: NameServers) -> None:
    key = await made(site)
    row = await site.row(key)
    for server in ("ns1", "ns2"):
        zone.enter(server, record(row), record(row).name)
    await site.service()
    await site.host(key)
    await site.prove(key)
    beat = {"host": HOST, "heartbeat_at": site.clock(), "started_at": site.clock(), "release": "1"}
    async with site.databases["worker"].write.begin() as connection:
        await connection.execute(insert(host_status).values(**beat))

    async def is_refused() -> bool:
        try:
            await site.do(delete_dkim_key, PRIMARY, row.selector)
        except DkimKeySigns:
            return True
        return False

    site.clock.forward(hours=2)
    assert await is_refused(), "it is enabled, so it will be back"
    site.clock.forward(hours=-2)
    await site.do(change_host, HOST, {"enabled": False})
    assert await is_refused(), "it was heard a moment ago"
    site.clock.forward(hours=2)
    assert not await is_refused()
    assert await site.state(key) == "retiring"
    await site.service()
    assert ((await site.row(key)).state, (await site.row(key)).problem) == ("retiring", None), "its mail is under way"
    await site.service(later=DAYS)
    assert "answers: v=DKIM1" in (await site.row(key)).problem, (
        "the record is to be emptied, without a word of the host"
    )
    revoked = Record(record(row).name, "TXT", "v=DKIM1; k=ed25519; p=")
    for server in ("ns1", "ns2"):
        zone.enter(server, revoked, revoked.name)
    await site.service()
    assert await site.state(key) == "revoked"
    for server in ("ns1", "ns2"):
        zone.enter(server, None, revoked.name)
    await site.service(later=DAYS)
    assert await site.state(key) == "removed"


def publisher(site: Site, zone: NameServers, tmp_path: Path, **members: Any) -> None:
    values = {"kind": "rfc2136", "server": "127.0.0.31", "port": zone.port, **zone.tsig._asdict(), **members}
    lines = [f"{name} = {value if isinstance(value, int) else repr(value)}" for name, value in values.items()]
    file = tmp_path / "dns.toml"
    file.write_text("\n".join(["[main]", *lines, ""]).replace("'", '"'))
    file.chmod(0o600)
    site.settings = site.settings.model_copy(update={"dns_file": file})


async def test_published_by_update(site: Site, zone: NameServers, tmp_path: Path) -> None:
    await site.do(change_domain, PRIMARY, {"settings": {"publisher": "main"}})
    key = await made(site, activate=False)
    assert (await site.row(key)).problem == "DNS_FILE has no publisher main."
    publisher(site, zone, tmp_path, key_secret="d3JvbmcgbXV4IHdyb25nIG11eCB3cm9uZyBtdXg=")
    await site.service()
    assert "refuses the key" in (await site.row(key)).problem
    publisher(site, zone, tmp_path, port=9)
    await site.service()
    assert "does not answer" in (await site.row(key)).problem
    publisher(site, zone, tmp_path)
    await site.service()
    row = await site.row(key)
    assert (row.state, "ns2" in row.problem) == ("unpublished", True), "it was entered at one name server alone"
    zone.enter("ns2", record(row), record(row).name)
    await site.service()
    row = await site.row(key)
    assert (row.state, row.problem) == ("published", None)


async def test_a_rotation_begins_when_its_time_has_come(site: Site, zone: NameServers) -> None:
    await site.do(change_domain, PRIMARY, {"settings": {"rotate_every_days": 30}})
    old = await made(site)
    row = await site.row(old)
    for server in ("ns1", "ns2"):
        zone.enter(server, record(row), record(row).name)
    await site.service()
    await site.prove(old)
    await site.service(later=timedelta(days=29))
    assert await keys_of(site) == {old: "active"}
    await site.service(later=timedelta(days=1))
    await site.service()
    found = await keys_of(site)
    assert sorted(found.values()) == ["active", "generating"], "one rotation, although there were two rounds"


async def keys_of(site: Site) -> dict[int, str]:
    async with site.database.read.connect() as connection:
        return {row.id: row.state for row in await connection.execute(select(dkim_keys.c.id, dkim_keys.c.state))}


@pytest.mark.parametrize(
    ("text", "mode", "says"),
    [
        ("[main]\nkind = 'rfc2136'\n", 0o600, "main.server"),
        ("[main]\nkind = 'bind'\n", 0o600, "main"),
        (
            "[main]\nkind = 'powerdns'\nurl = 'http://192.0.2.1:8081'\napi_key = 'hunter2'\n",
            0o600,
            "main.url: takes https",
        ),
        (
            "[main]\nkind = 'powerdns'\nurl = 'http://u:hunter2@127.0.0.1'\napi_key = 'x'\n",
            0o600,
            "main.url: takes https",
        ),
        ("[main]\nkind = 'powerdns'\nurl = 'https://'\napi_key = 'x'\n", 0o600, "main.url: takes https"),
        (
            "[main]\nkind = 'powerdns'\nurl = 'https://ns'\napi_key = \"hunter2\\n\"\n",
            0o600,
            "main.api_key: takes one line",
        ),
        ("[main", 0o600, "is no TOML"),
        ("", 0o644, "chmod"),
        (
            "[main]\nkind = 'rfc2136'\nserver = 'hunter2'\nkey_name = 'x'\nkey_secret = 'hunter2'\n",
            0o600,
            "main.server",
        ),
    ],
)
async def test_a_file_that_cannot_be_used_is_named_without_its_secrets(
    tmp_path: Path, text: str, mode: int, says: str
) -> None:
    file = tmp_path / "dns.toml"
    file.write_text(text)
    file.chmod(mode)
    with pytest.raises(PublishersUnusable) as caught:
        load_publishers(file)
    assert says in str(caught.value)
    assert "hunter2" not in str(caught.value)
