"""A rotation with everything real: worker, service process, rspamd, Postfix, a name server that takes updates. Mail goes out
all the time, and each message verifies with the keys that the name server has."""

import asyncio
import random
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import dkim
import dns.message
import dns.query
import dns.rdatatype
import pytest
import pytest_asyncio
from pydantic import SecretStr
from sqlalchemy import select

from app.config import WorkerSettings
from app.credentials.links import create_link_key
from app.db import Database, utc_now
from app.models.dkim_keys import dkim_keys
from app.models.domains import DomainKind
from app.services.changes import Change
from app.services.dkim_keys import rotate_dkim_keys
from app.services.domains import change_domain, create_domain
from app.services.hosts import change_host, create_host
from app.workers.host.dkim_files import begin_table
from tests.conftest import ACTOR
from tests.mail.test_mailhost import write_host_file
from tests.routers.name_servers import SERVERS, NameServers
from tests.stack.accounts import PASSWORD, account
from tests.stack.mail import HOST, PRIMARY_DOMAIN, MailStack
from tests.stack.mariadb import MariaDB
from tests.stack.processes import Processes, wait_until
from tests.stack.sink import Sink
from tests.workers.host.machine import environment

__all__ = ["account"]

pytestmark = pytest.mark.asyncio

ALICE = f"alice@{PRIMARY_DOMAIN}"
DICE = random.Random(20261124)


class Site:
    def __init__(
        self, mail: MailStack, zone: NameServers, database: Database, commands: dict[str, dict[str, str]]
    ) -> None:
        self.mail, self.zone, self.database = mail, zone, database
        self._commands = commands
        self.processes = Processes()
        self.running: dict[str, subprocess.Popen[bytes]] = {}
        self.sink = Sink(self.processes, mail.relay_port)
        self.sink.start()

    def start(self, name: str) -> None:
        command = [sys.executable, "-m", "app.cli.main", name]
        self.running[name] = self.processes.start(command, **self._commands[name])

    def kill(self, name: str) -> None:
        self.processes.stop(self.running.pop(name), signal.SIGKILL)

    async def rotate(self) -> int:
        async with self.database.write.begin() as connection:
            (key_id,) = await rotate_dkim_keys(Change(connection, ACTOR, utc_now()), PRIMARY_DOMAIN)
        return key_id

    async def states(self) -> dict[int, tuple[str, bool, str | None]]:
        query = select(dkim_keys.c.id, dkim_keys.c.state, dkim_keys.c.proved_at, dkim_keys.c.problem)
        async with self.database.read.connect() as connection:
            rows = await connection.execute(query)
            return {row.id: (row.state, row.proved_at is not None, row.problem) for row in rows}

    async def until_proved(self, key_id: int, *, seconds: float = 30) -> float:
        began = time.monotonic()
        while not (state := (await self.states())[key_id])[1]:
            log = (self.processes.directory / "python.out").read_text()[-3000:]
            assert time.monotonic() - began < seconds, (state, log, self.mail.mail_log.read_text()[-2000:])
            await asyncio.sleep(0.05)
        return time.monotonic() - began

    def send(self, subject: str) -> None:
        text = f"From: {ALICE}\r\nTo: x@example.org\r\nSubject: {subject}\r\n\r\ntext\r\n"
        with self.mail.submission(ALICE, PASSWORD) as client:
            client.sendmail(ALICE, ["x@example.org"], text)

    def look_up(self, name: bytes, timeout: float = 5) -> bytes:
        query = dns.message.make_query(name.decode(), "TXT")
        answer = dns.query.udp(query, SERVERS["ns1"], port=self.zone.port, timeout=timeout)
        return b"".join(
            b"".join(rdata.strings) for rrset in answer.answer if rrset.rdtype == dns.rdatatype.TXT for rdata in rrset
        )

    def judged(self) -> dict[str, list[bool]]:
        """Of each message that arrived elsewhere, whether each of its signatures verifies."""
        found = {}
        for path in self.sink.directory.iterdir():
            lines = path.read_bytes().replace(b"\r\n", b"\n").split(b"\n")
            while lines[0].startswith((b"X-Client-", b"X-Helo-", b"X-Mail-", b"X-Rcpt-")):
                lines.pop(0)
            raw = b"\r\n".join(lines)
            signed = dkim.DKIM(raw)
            count = sum(name.lower() == b"dkim-signature" for name, _ in signed.headers)
            subject = next(value.strip().decode() for name, value in signed.headers if name.lower() == b"subject")
            found[subject] = [dkim.DKIM(raw).verify(place, dnsfunc=self.look_up) for place in range(count)]
        return found

    async def all_arrived(self, count: int) -> dict[str, list[bool]]:
        files = self.sink.directory
        arrived = wait_until(lambda: len([path for path in files.iterdir() if path.stat().st_size]) >= count)
        assert arrived, self.mail.mail_log.read_text()[-2000:]
        found = await asyncio.to_thread(self.judged)
        assert len(found) == count
        return found

    def close(self) -> None:
        self.processes.close()


@pytest.fixture(scope="module")
def stack(mariadb: MariaDB) -> Iterator[MailStack]:
    """One of our own, whose configuration the worker looks after."""
    mail = MailStack()
    mail.extra = ""
    mail.start(mariadb)
    yield mail
    mail.close()


@pytest_asyncio.fixture
async def site(mariadb: MariaDB, stack: MailStack, tmp_path: Path) -> AsyncIterator[Site]:
    mariadb.empty()
    stack.empty()
    for path in stack.dkim.iterdir():  # those of the test before, whose rows are gone
        path.unlink()
    begin_table(stack.dkim)
    zone = NameServers(PRIMARY_DOMAIN, ("ns1",))
    database = Database(mariadb.url("api"))
    async with database.write.begin() as connection:
        change = Change(connection, ACTOR, utc_now())
        await create_domain(change, PRIMARY_DOMAIN, DomainKind.PRIMARY)
        await change_domain(change, PRIMARY_DOMAIN, {"settings": {"publisher": "main"}})
        await create_host(change, HOST)
        await change_host(change, HOST, {"settings": stack.settings.model_dump(mode="json")})
    create_link_key(stack.directory / "link.key")
    dns_file = stack.directory / "dns.toml"
    dns_file.write_text(
        f'[main]\nkind = "rfc2136"\nserver = "{SERVERS["ns1"]}"\nport = {zone.port}\n'
        f'key_name = "{zone.tsig.key_name}"\nkey_secret = "{zone.tsig.key_secret}"\n'
    )
    dns_file.chmod(0o600)
    worker = WorkerSettings(
        database_url=SecretStr(mariadb.url("worker")),
        mail_host=HOST,
        host_root=stack.host_root,
        lock_file=stack.directory / "worker.lock",
        wake_directory=stack.directory,
        postfix_config=stack.postfix_config,
        postfix_recipients=stack.recipients_map,
        postfix_local_aliases=stack.local_aliases_map,
        postfix_virtual_aliases=stack.virtual_aliases_map,
        aliases_directory=stack.aliases,
        dovecot_config=stack.dovecot_config,
        host_file=write_host_file(stack),
    )
    service = {
        "DATABASE_URL": mariadb.url("service"),
        "LINK_KEY_FILE": str(stack.directory / "link.key"),
        "WAKE_DIRECTORY": str(stack.directory),
        "SMTP_PORT": str(stack.settings.service_port),
        "RETURNS_MAILDIR": str(stack.returns),
        "DNS_RESOLVERS": SERVERS["ns1"],
        "DNS_PORT": str(zone.port),
        "DNS_SECONDS": "1",
        "DNS_WATCH_SECONDS": "0.3",
        "DNS_FILE": str(dns_file),
        "POLL_SECONDS": "0.2",
        "LOG_LEVEL": "info",
    }
    given = environment(worker, HOST_FILE=str(worker.host_file), LOG_LEVEL="info")
    made = Site(stack, zone, database, {"worker": given, "service": service})
    try:
        for name in ("worker", "service"):
            made.start(name)
        yield made
    finally:
        made.close()
        zone.close()
        await database.close()


async def test_every_message_verifies_before_during_and_after(site: Site, account: object) -> None:
    account(ALICE)  # type: ignore[operator]
    first = await site.rotate()
    await site.until_proved(first)
    over = False
    sent = 0

    async def keep_sending() -> None:
        nonlocal sent
        while not over:
            await asyncio.to_thread(site.send, f"message {sent}")
            sent += 1

    sending = asyncio.create_task(keep_sending())
    for _ in range(3):
        await site.until_proved(await site.rotate())
    over = True
    await sending
    states = await site.states()
    assert [state for state, *_ in states.values()] == ["retiring"] * 3 + ["active"]
    assert sent > 20
    found = await site.all_arrived(sent)
    wrong = {subject: judged for subject, judged in found.items() if not judged or not all(judged)}
    assert not wrong
    assert max(map(len, found.values())) == 2, "old and new side by side, until the probe was back"


async def test_killed_again_and_again_it_gets_there(site: Site, account: object) -> None:
    account(ALICE)  # type: ignore[operator]
    await site.until_proved(await site.rotate())
    new = await site.rotate()
    over = False

    async def kill() -> None:
        while not over:
            name = DICE.choice(["worker", "service", "ns1"])
            await asyncio.sleep(DICE.random() * 0.5)
            if name == "ns1":
                site.zone.stop(name)
                await asyncio.sleep(0.2)
                site.zone.start_again(name)
            else:
                site.kill(name)
                site.start(name)
            await asyncio.sleep(0.8 + DICE.random())

    killing = asyncio.create_task(kill())
    sent = 0
    while not (await site.states())[new][1]:
        assert sent < 600, (await site.states(), (site.processes.directory / "python.out").read_text()[-3000:])
        await asyncio.to_thread(site.send, f"message {sent}")
        sent += 1
    over = True
    await killing
    found = await site.all_arrived(sent)
    assert all(judged and all(judged) for judged in found.values()), found
