"""The system that is measured: a private MariaDB, Postfix and Dovecot, our own processes, and as many accounts as wanted."""

import asyncio
import json
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any

import httpx

from app.addresses import DomainName, MailAddress
from app.cli.db import upgrade_database
from app.credentials.links import create_link_key
from app.credentials.tokens import create_request_key, create_signing_key
from app.db import Database, utc_now
from app.models.domains import DomainKind
from app.permissions import Role
from app.queue.wake import wake
from app.services.changes import Actor, Change
from app.services.domains import create_domain
from app.services.hosts import create_host
from app.services.principals import create_principal
from app.services.users import NewUser, create_user
from tests.stack.mail import HOST, PRIMARY_DOMAIN, MailStack
from tests.stack.mariadb import MariaDB
from tests.stack.processes import Processes, free_ports, wait_until

OTHER_DOMAIN = DomainName("other.test")
"""Every tenth account is in it."""
PASSWORD_HASH = (
    "{ARGON2ID}$argon2id$v=19$m=65536,t=3,p=1$c29tZXNhbHRzb21lc2FsdA$Z3VyZ2xlZ3VyZ2xlZ3VyZ2xlZ3VyZ2xlZ3VyZ2xl"
)
POLICY_KEY = "k" * 40
"""What Dovecot shows to the API."""
_ACTOR = Actor("bench", "127.0.0.1", "bench")

_PROOFS = {
    "maildir": {"result": "ok", "detail": "owner 200001, mode 0700"},
    "postfix": {"result": "ok", "detail": "its map has the address"},
    "dovecot": {"result": "ok", "detail": "it knows the login, with uid and home"},
}

# As if each account had been created over HTTP and its job were done. `{homes}` and the like are filled in below.
_ACCOUNTS = """
SET @now = UTC_TIMESTAMP(6);
INSERT INTO users (id, address, local_part, domain_id, host, display_name, contact_address, external_id, quota_bytes,
    state, password_hash, version, created_at, updated_at)
  SELECT seq, CONCAT('user', seq, '@', d.name), CONCAT('user', seq), d.id, '{host}', CONCAT('User Number ', seq),
    CONCAT('user', seq, '@example.net'), CONCAT('member-', seq), 1073741824, 'active', '{password}', 1, @now, @now
  FROM seq_{first}_to_{last} JOIN domains d ON d.name = IF(seq % 10, '{primary}', '{other}');
INSERT INTO addresses (address, kind, subject_id) SELECT address, 'user', id FROM users WHERE id >= {first};
INSERT INTO jobs (host, lane, kind, subject_id, version, request_id, state, run_at, attempts, fence, created_at, finished_at)
  SELECT host, address, 'mailbox.sync', id, 1, 'bench', 'done', @now, 1, 1, @now, @now FROM users WHERE id >= {first};
INSERT INTO audit_events (at, principal_id, client_address, request_id, action, subject_kind, subject_id, after)
  SELECT @now, 'bench', '127.0.0.1', 'bench', 'users.create', 'user', id, JSON_OBJECT('address', address)
  FROM users WHERE id >= {first};
INSERT INTO applied (host, kind, subject_id, version, stands, revision, proofs, result, applied_at)
  SELECT host, 'mailbox.sync', id, 1, 1, 2, '{proofs}', CONCAT('{{"uid": ', {uid} + id, ', "home": "{homes}/',
    IF(id % 10, '', '@{other}/'), local_part, '", "archived": false, "access_ended_at": null}}'), @now
  FROM users WHERE id >= {first};
ANALYZE TABLE users, addresses, jobs, applied;
"""
_SHRINK = """
DELETE FROM addresses WHERE kind = 'user' AND subject_id > {last};
DELETE FROM users WHERE id > {last};
DELETE FROM jobs WHERE subject_id > {last};
DELETE FROM applied WHERE subject_id > {last};
DELETE FROM audit_events WHERE action = 'users.create' AND CAST(subject_id AS INT) > {last};
"""


class System:
    """Use as `with running(...) as system`."""

    def __init__(self) -> None:
        self.processes = Processes()
        self.mariadb = MariaDB()
        self.mail = MailStack()
        self.accounts = 0
        self._numbers = count(1)

    def start(self) -> None:
        self.mariadb.start(durable=True)
        self.mariadb.create_database(create_schema)
        self.mariadb.apply_grants()
        self.mail.start(self.mariadb)
        self.keys = self.processes.directory / "keys"
        self.sockets = self.processes.directory / "run"
        self.sockets.mkdir()
        create_signing_key(self.keys)
        create_request_key(self.keys)
        create_link_key(self.keys / "link.key")
        self.policy_key = self.keys / "policy-key"
        self.policy_key.write_text(POLICY_KEY)
        self.policy_key.chmod(0o600)
        self.client_id, self.secret = asyncio.run(self._populate())

    async def _populate(self) -> tuple[str, str]:
        database = Database(self.mariadb.url("owner"))
        async with database.write.begin() as connection:
            change = Change(connection, _ACTOR, utc_now())
            await create_domain(change, PRIMARY_DOMAIN, DomainKind.PRIMARY)
            await create_domain(change, OTHER_DOMAIN, DomainKind.VIRTUAL)
            await create_host(change, HOST)
            credentials = await create_principal(change, "bench", Role.PRIMARY)
        await database.close()
        return credentials

    def close(self) -> None:
        self.processes.close()
        for part in (self.mail, self.mariadb):
            if hasattr(part, "_processes"):  # it was started
                part.close()

    def grow(self, accounts: int) -> None:
        """Adds accounts that are ready, homes and all, until there are so many."""
        first, last = self.accounts + 1, accounts
        if first > last:
            return
        makers = [
            subprocess.Popen([sys.executable, "-m", "bench.homes", self.mail.homes, *map(str, numbers)])
            for numbers in ((first, last, 2, self.mail.file.uid_first), (first + 1, last, 2, self.mail.file.uid_first))
        ]
        statements = _ACCOUNTS.format(
            first=first,
            last=last,
            host=HOST,
            primary=PRIMARY_DOMAIN,
            other=OTHER_DOMAIN,
            password=PASSWORD_HASH,
            proofs=json.dumps(_PROOFS),
            homes=self.mail.homes,
            uid=self.mail.file.uid_first,
        )
        self.mariadb.sql(statements, "owner")
        if any(maker.wait() for maker in makers):
            raise RuntimeError("the homes could not be made")
        self.accounts = accounts

    def shrink(self) -> None:
        """Forgets the accounts that were created since, so that each measurement meets the same number."""
        self.mariadb.sql(_SHRINK.format(last=self.accounts), "owner")
        for home in (self.mail.host_root / "home").glob("new*"):
            shutil.rmtree(home)

    @property
    def database_pid(self) -> int:
        return int((self.mariadb.directory / "run/pid").read_text())

    def address(self, number: int) -> str:
        """Of one of the accounts, 1 to `accounts`."""
        return f"user{number}@{PRIMARY_DOMAIN if number % 10 else OTHER_DOMAIN}"

    def new_address(self) -> str:
        """Never used before."""
        return f"new{next(self._numbers)}@{PRIMARY_DOMAIN}"

    @contextmanager
    def api(self, module: str = "app.cli.main") -> Iterator["Api"]:
        """`cacert-mail api` (or `bench.hello`) as one process, under the database user `api`."""
        (port,) = free_ports(1)
        process = self.processes.start(
            [sys.executable, "-m", module, *(["api"] if module == "app.cli.main" else [])],
            **_ENVIRONMENT,
            DATABASE_URL=self.mariadb.url("api"),
            KEY_DIRECTORY=str(self.keys),
            LINK_KEY_FILE=str(self.keys / "link.key"),
            WAKE_DIRECTORY=str(self.sockets),
            AUTH_POLICY_KEY_FILE=str(self.policy_key),
            PORT=str(port),
            ISSUER=f"http://127.0.0.1:{port}",
        )
        try:
            self.processes.wait_for(process, port, self.processes.directory / "python.out")
            yield Api(port, process.pid, self._token(port))
        finally:
            self.processes.stop(process)

    def _token(self, port: int) -> str:
        form = f"grant_type=client_credentials&client_id={self.client_id}&client_secret={self.secret}".encode()
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/oauth/token", form, timeout=10) as answer:
            token: str = json.load(answer)["access_token"]
        return token

    @contextmanager
    def worker(self) -> Iterator[dict[str, Any]]:
        """`cacert-mail worker` as one process, under the database user `worker`, once its first sweep has ended.

        Yields what that sweep found, and the `seconds` that it took.
        """
        before = self.mariadb.sql("SELECT COALESCE(MAX(swept_at), 0) FROM host_status", "owner")
        process = self.processes.start(
            [sys.executable, "-m", "app.cli.main", "worker"],
            **_ENVIRONMENT,
            DATABASE_URL=self.mariadb.url("worker"),
            WAKE_DIRECTORY=str(self.sockets),
            LOCK_FILE=str(self.processes.directory / "worker.lock"),
            MAIL_HOST=HOST,
            HOST_ROOT=str(self.mail.host_root),
            UID_FIRST=str(self.mail.file.uid_first),
            UID_LAST=str(self.mail.file.uid_last),
            POSTFIX_CONFIG=str(self.mail.postfix_config),
            POSTFIX_RECIPIENTS=self.mail.recipients_map,
            POSTFIX_LOCAL_ALIASES=self.mail.local_aliases_map,
            POSTFIX_VIRTUAL_ALIASES=self.mail.virtual_aliases_map,
            ALIASES_DIRECTORY=str(self.mail.aliases),
            DOVECOT_CONFIG=str(self.mail.dovecot_config),
        )
        query = "SELECT sweep, TIMESTAMPDIFF(MICROSECOND, started_at, swept_at) FROM host_status WHERE swept_at > '{}'"
        query = query.format(before[0][0]) + " AND swept_at > started_at"
        try:
            deadline = time.monotonic() + 300
            while not (rows := self.mariadb.sql(query, "owner")):
                if process.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError(f"the worker did not sweep:\n{self.output()}")
                time.sleep(0.2)
            report = json.loads(rows[0][0])
            yield {**report, "seconds": int(rows[0][1]) / 1e6}
        finally:
            self.processes.stop(process)

    def output(self) -> str:
        """The end of what our processes said."""
        return (self.processes.directory / "python.out").read_text(errors="replace")[-4000:]

    async def create_at_once(self, number: int) -> None:
        """So many accounts in one transaction, by the API's own function, and one wake-up."""
        database = Database(self.mariadb.url("api"))
        async with database.write.begin() as connection:
            change = Change(connection, _ACTOR, utc_now())
            for _ in range(number):
                await create_user(change, NewUser(MailAddress(self.new_address()), password_hash=PASSWORD_HASH))
        self.committed_at = utc_now()
        wake(self.sockets, HOST)
        await database.close()

    def wait_for_jobs(self, seconds: float) -> None:
        """Until every job has ended."""
        waiting = "SELECT COUNT(*) FROM jobs WHERE state IN ('ready', 'running')"
        if not wait_until(lambda: self.mariadb.sql(waiting, "owner") == [["0"]], seconds=seconds):
            raise RuntimeError(f"the worker did not end its jobs:\n{self.output()}")


class Api:
    """A running API, and how to ask it."""

    def __init__(self, port: int, pid: int, token: str) -> None:
        self.port = port
        self.pid = pid
        self.token = token

    def tag(self, path: str) -> str:
        """The ETag of what is there."""
        with httpx.Client(base_url=f"http://127.0.0.1:{self.port}", trust_env=False) as client:
            return client.get(path, headers={"Authorization": f"Bearer {self.token}"}).headers["ETag"]

    def request(self, method: str, path: str, body: object = None, **headers: str) -> bytes:
        lines = [f"{method} {path} HTTP/1.1", f"Host: 127.0.0.1:{self.port}", f"Authorization: Bearer {self.token}"]
        lines += [f"{name}: {value}" for name, value in headers.items()]
        content = b""
        if body is not None:
            content = json.dumps(body).encode()
            lines += ["Content-Type: application/json", f"Content-Length: {len(content)}"]
        return "\r\n".join([*lines, "", ""]).encode() + content


# As in production: the log has warnings and errors, and no line for each request.
_ENVIRONMENT = {"LOG_LEVEL": "warning", "LOG_FORMAT": "json", "PYTHONPATH": str(Path(__file__).parents[1])}


def create_schema(url: str) -> None:
    """By the migrations."""

    async def migrate() -> None:
        database = Database(url)
        await upgrade_database(database)
        await database.close()

    asyncio.run(migrate())


@contextmanager
def running() -> Iterator[System]:
    """Everything started; stopped and removed at the end, however it comes."""
    system = System()
    try:
        system.start()
        yield system
    finally:
        previous = signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second Ctrl-C leaves nothing half removed
        system.close()
        signal.signal(signal.SIGINT, previous)
