"""The running parts of the demo: a private mail host, and our processes on it as in production."""

import asyncio
import imaplib
import secrets
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx

from app.cli.db import upgrade_database
from app.credentials.links import create_link_key
from app.credentials.tokens import create_request_key, create_signing_key
from app.db import Database, utc_now
from app.models.domains import DomainKind
from app.permissions import Role
from app.services.changes import Actor, Change
from app.services.domains import create_domain
from app.services.hosts import change_host, create_host
from app.services.principals import create_principal
from tests.stack.mail import HOST, PRIMARY_DOMAIN, MailStack, write_host_file
from tests.stack.mariadb import MariaDB
from tests.stack.name_servers import NameServers
from tests.stack.processes import Processes, free_ports
from tests.stack.sink import Sink

ALICE, BOB = f"alice@{PRIMARY_DOMAIN}", f"bob@{PRIMARY_DOMAIN}"
PASSWORD = "seven green lanterns over the harbour"
NEW_PASSWORD = "eight blue herons by the weir"
SUCCESSOR_PASSWORD = "nine quiet otters under the bridge"

Ask = Callable[..., dict[str, Any]]
"""Method, path, body: an answer that says it is ready."""


class Demo:
    """The running parts, and the clock between two lines of the story."""

    def __init__(self) -> None:
        self.mariadb, self.mail, self.processes = MariaDB(), MailStack(), Processes()
        self.names = NameServers(PRIMARY_DOMAIN, ("ns1",))
        self.url = ""
        self.credentials = ("", "")
        self._started = time.perf_counter()

    def start(self) -> None:
        self.mariadb.start()
        self.mariadb.create_database(lambda url: asyncio.run(_with(url, upgrade_database)))
        self.mariadb.apply_grants()
        base = self.processes.directory
        [port] = free_ports(1)
        self.url = f"http://127.0.0.1:{port}"
        key = secrets.token_hex(24)
        (base / "policy.key").write_text(key)
        (base / "policy.key").chmod(0o600)
        self.mail.auth_policy = {"url": f"{self.url}/dovecot/auth-policy", "key": key}
        self.mail.start(self.mariadb)
        self.credentials = asyncio.run(_with(self.mariadb.url("api"), self._prepare))
        create_signing_key(base / "keys")
        create_request_key(base / "keys")
        create_link_key(base / "keys/link.key")
        self.elsewhere = Sink(self.processes, self.mail.relay_port)
        self.elsewhere.start()
        dns_file = base / "dns.toml"
        dns_file.touch(mode=0o600)
        dns_file.write_text(f"[main]\n{self.names.publisher}")
        shared = {"WAKE_DIRECTORY": str(base), "LOG_LEVEL": "warning", "PYTHONPATH": str(Path.cwd())}
        shared |= {"DNS_RESOLVERS": self.names.address, "DNS_PORT": str(self.names.port)}
        links = {"LINK_KEY_FILE": str(base / "keys/link.key"), "PUBLIC_URL": self.url}
        command = [sys.executable, "-m", "app.cli.main"]
        self.processes.start(
            [*command, "api"],
            **shared,
            DATABASE_URL=self.mariadb.url("api"),
            PORT=str(port),
            ISSUER=self.url,
            KEY_DIRECTORY=str(base / "keys"),
            AUTH_POLICY_KEY_FILE=str(base / "policy.key"),
            GUESSES_PER_PAIR="4",
            TARPIT_SECONDS="0",
            **links,
        )
        self.processes.start(
            [*command, "worker"],
            **shared,
            DATABASE_URL=self.mariadb.url("worker"),
            MAIL_HOST=HOST,
            HOST_ROOT=str(self.mail.host_root),
            UID_FIRST=str(self.mail.file.uid_first),
            UID_LAST=str(self.mail.file.uid_last),
            LOCK_FILE=str(base / "worker.lock"),
            POSTFIX_CONFIG=str(self.mail.postfix_config),
            POSTFIX_RECIPIENTS=self.mail.recipients_map,
            POSTFIX_LOCAL_ALIASES=self.mail.local_aliases_map,
            POSTFIX_VIRTUAL_ALIASES=self.mail.virtual_aliases_map,
            ALIASES_DIRECTORY=str(self.mail.aliases),
            DOVECOT_CONFIG=str(self.mail.dovecot_config),
            HOST_FILE=str(write_host_file(self.mail)),
        )
        self.processes.start(
            [*command, "service"],
            **shared,
            **links,
            DATABASE_URL=self.mariadb.url("service"),
            SMTP_PORT=str(self.mail.settings.service_port),
            RETURNS_MAILDIR=str(self.mail.returns),
            DNS_FILE=str(dns_file),
            AUDIT_HEAD_FILE=str(base / "audit-heads"),
        )
        self._wait_for_api()

    async def _prepare(self, database: Database) -> tuple[str, str]:
        async with database.write.begin() as connection:
            change = Change(connection, Actor("cacert-mail", "", "demo"), utc_now())
            await create_domain(change, PRIMARY_DOMAIN, DomainKind.PRIMARY)
            await create_host(change, HOST)
            await change_host(change, HOST, {"settings": self.mail.settings.model_dump(mode="json")})
            return await create_principal(change, "Demo", Role.PRIMARY)

    def _wait_for_api(self) -> None:
        deadline = time.monotonic() + 20
        with httpx.Client(base_url=self.url, auth=self.credentials, trust_env=False) as client:
            while time.monotonic() < deadline:
                try:
                    if client.get(f"/v1/hosts/{HOST}").json()["started_at"]:
                        return
                except (httpx.TransportError, KeyError):
                    pass
                time.sleep(0.02)
        raise RuntimeError("The API or the worker did not start.")

    def close(self) -> None:
        self.processes.close()
        self.mail.close()
        self.names.close()
        self.mariadb.close()

    def line(self, text: str) -> None:
        now = time.perf_counter()
        print(f"{(now - self._started) * 1000:7.0f} ms  {text}", flush=True)
        self._started = time.perf_counter()


async def _with(url: str, function: Callable[[Database], Any]) -> Any:
    database = Database(url)
    try:
        return await function(database)
    finally:
        await database.close()


def expect(true: bool, otherwise: str) -> None:
    if not true:
        raise RuntimeError(otherwise)


def refused(demo: Demo, password: str, *, source: str = "127.0.0.1") -> bool:
    try:
        demo.mail.imap(ALICE, password, source=source).logout()
    except imaplib.IMAP4.error:
        return True
    return False


def closed(session: imaplib.IMAP4_SSL) -> bool:
    try:
        session.noop()
    except (imaplib.IMAP4.abort, OSError):
        return True
    finally:
        session.shutdown()
    return False
