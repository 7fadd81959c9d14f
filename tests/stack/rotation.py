"""All that a DKIM rotation needs: worker, service process, rspamd, Postfix, and a name server that takes our records."""

import asyncio
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from pydantic import SecretStr
from sqlalchemy import select

from app.config import WorkerSettings
from app.credentials.links import create_link_key
from app.db import Database, utc_now
from app.models.dkim_keys import DkimState, dkim_keys
from app.models.domains import DomainKind
from app.queue.wake import wake
from app.services.changes import Actor, Change
from app.services.dkim_keys import rotate_dkim_keys
from app.services.domains import change_domain, create_domain
from app.services.hosts import change_host, create_host
from app.workers.host.dkim_files import TABLE, begin_table
from tests.stack.mail import HOST, PRIMARY_DOMAIN, MailStack, write_host_file
from tests.stack.mariadb import MariaDB
from tests.stack.name_servers import NameServers, PowerDnsServer
from tests.stack.processes import Processes
from tests.stack.sink import Sink
from tests.workers.host.machine import environment

_ACTOR = Actor("rotation", "127.0.0.1", "rotation")


class Rotation:
    """Use as `async with rotation(...) as site`."""

    def __init__(
        self,
        mail: MailStack,
        names: NameServers | PowerDnsServer,
        database: Database,
        commands: dict[str, dict[str, str]],
    ) -> None:
        self.mail, self.names, self.database = mail, names, database
        self._commands = commands
        self.processes = Processes()
        self._running: dict[str, subprocess.Popen[bytes]] = {}
        self.sink = Sink(self.processes, mail.relay_port)
        self.sink.start()

    def start(self, name: str) -> None:
        """`worker`, `service`, or `names`, which is running at first."""
        if name == "names":
            self.names.start_again()
            return
        command = [sys.executable, "-m", "app.cli.main", name]
        self._running[name] = self.processes.start(command, **self._commands[name])

    def kill(self, name: str) -> None:
        if name == "names":
            self.names.stop()
            return
        process = self._running.pop(name)
        process.kill()
        self.processes.stop(process)

    async def rotate(self) -> int:
        """As the API does; the id of the new key."""
        async with self.database.write.begin() as connection:
            [key_id] = await rotate_dkim_keys(Change(connection, _ACTOR, utc_now()), PRIMARY_DOMAIN)
        for host in (HOST, "-"):
            wake(self.mail.directory, host)
        return key_id

    def signs(self, selector: str) -> bool:
        """rspamd reads this list for each message."""
        return f'"{selector}"' in (self.mail.dkim / TABLE).read_text()

    async def selector(self, key_id: int) -> str:
        async with self.database.read.connect() as connection:
            query = select(dkim_keys.c.selector).where(dkim_keys.c.id == key_id)
            return str((await connection.execute(query)).scalar_one())

    async def states(self) -> dict[int, tuple[str, bool, str | None]]:
        """Of each key: its state, whether a probe has verified, and what stands in its way."""
        query = select(dkim_keys.c.id, dkim_keys.c.state, dkim_keys.c.proved_at, dkim_keys.c.problem)
        async with self.database.read.connect() as connection:
            rows = await connection.execute(query)
            return {row.id: (row.state, row.proved_at is not None, row.problem) for row in rows}

    async def until_proved(self, key_id: int, *, seconds: float = 30) -> float:
        """The seconds it took. Raises RuntimeError with what everybody said."""
        began = time.monotonic()
        while not (state := (await self.states())[key_id])[1]:
            self._complain_after(began, seconds, state)
            await asyncio.sleep(0.05)
        return time.monotonic() - began

    async def until_removed(self, key_id: int, *, seconds: float = 60) -> None:
        """Raises RuntimeError with what everybody said."""
        began = time.monotonic()
        while (state := (await self.states())[key_id])[0] != DkimState.REMOVED.value:
            self._complain_after(began, seconds, state)
            await asyncio.sleep(0.05)

    def _complain_after(self, began: float, seconds: float, state: object) -> None:
        if time.monotonic() - began > seconds:
            log = (self.processes.directory / "python.out").read_text()[-3000:]
            raise RuntimeError(f"{state}\n{log}\n{self.mail.mail_log.read_text()[-2000:]}")


@asynccontextmanager
async def rotation(
    mariadb: MariaDB, mail: MailStack, *, powerdns: bool = False, **service: str
) -> AsyncIterator[Rotation]:
    """With an empty database, and no key on the host. `service`: more settings of the service process."""
    for path in mail.dkim.iterdir():
        path.unlink()
    begin_table(mail.dkim)
    names = PowerDnsServer(PRIMARY_DOMAIN) if powerdns else NameServers(PRIMARY_DOMAIN, ("ns1",))
    database = Database(mariadb.url("api"))
    async with database.write.begin() as connection:
        change = Change(connection, _ACTOR, utc_now())
        await create_domain(change, PRIMARY_DOMAIN, DomainKind.PRIMARY)
        await change_domain(change, PRIMARY_DOMAIN, {"settings": {"publisher": "main"}})
        await create_host(change, HOST)
        await change_host(change, HOST, {"settings": mail.settings.model_dump(mode="json")})
    link_key, dns_file = mail.directory / "link.key", mail.directory / "dns.toml"
    create_link_key(link_key)
    dns_file.touch(mode=0o600)
    dns_file.write_text(f"[main]\n{names.publisher}")
    worker = WorkerSettings(
        database_url=SecretStr(mariadb.url("worker")),
        mail_host=HOST,
        host_root=mail.host_root,
        uid_first=mail.file.uid_first,
        uid_last=mail.file.uid_last,
        lock_file=mail.directory / "worker.lock",
        wake_directory=mail.directory,
        postfix_config=mail.postfix_config,
        postfix_recipients=mail.recipients_map,
        postfix_local_aliases=mail.local_aliases_map,
        postfix_virtual_aliases=mail.virtual_aliases_map,
        aliases_directory=mail.aliases,
        dovecot_config=mail.dovecot_config,
        host_file=write_host_file(mail),
    )
    service = {
        "DATABASE_URL": mariadb.url("service"),
        "LINK_KEY_FILE": str(link_key),
        "WAKE_DIRECTORY": str(mail.directory),
        "SMTP_PORT": str(mail.settings.service_port),
        "RETURNS_MAILDIR": str(mail.returns),
        "DNS_RESOLVERS": names.address,
        "DNS_PORT": str(names.port),
        "DNS_FILE": str(dns_file),
        "LOG_LEVEL": "info",
        **service,
    }
    commands = {"worker": environment(worker, HOST_FILE=str(worker.host_file)), "service": service}
    site = Rotation(mail, names, database, commands)
    try:
        for name in ("worker", "service"):
            site.start(name)
        yield site
    finally:
        site.processes.close()
        names.close()
        await database.close()
