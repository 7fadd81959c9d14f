"""The policy process on a database with a few people in it. Import the fixtures that you use."""

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from http.client import HTTPConnection
from pathlib import Path

import pytest
import pytest_asyncio
from sqlalchemy import insert, select

from app.addresses import MailAddress
from app.db import Database, utc_now
from app.models.aliases import AliasKind, aliases, sender_rules
from app.models.domains import domains
from app.models.jobs import applied
from app.models.users import users
from app.queue.contracts import MAILBOX_SYNC
from app.services.changes import Change
from app.services.users import NewUser, create_user
from tests.conftest import ACTOR, HOST, PRIMARY, TestDatabase
from tests.stack.processes import free_ports, wait_until
from tests.workers.policy.questions import CONNECT


async def add_people(database: Database, worker: Database, *names: str) -> dict[str, int]:
    """Accounts that stand, and their ids."""
    now = utc_now()
    made = {}
    async with database.write.begin() as connection:
        for name in names:
            new = NewUser(MailAddress(f"{name}@{PRIMARY}"), password_hash="{CRYPT}x")
            made[name] = (await create_user(Change(connection, ACTOR, now), new)).id
    async with worker.write.begin() as connection:
        for user_id in made.values():
            row = {
                "host": HOST,
                "kind": MAILBOX_SYNC,
                "subject_id": user_id,
                "version": 1,
                "stands": True,
                "revision": 1,
            }
            await connection.execute(insert(applied).values(**row, proofs={}, result={}, applied_at=now))
    return made


async def designate(database: Database, name: str, *user_ids: int, kind: AliasKind = AliasKind.SEND_AS) -> None:
    now = utc_now()
    async with database.write.begin() as connection:
        domain = (await connection.execute(select(domains.c.id).where(domains.c.name == PRIMARY))).scalar_one()
        row = {
            "address": f"{name}@{PRIMARY}",
            "local_part": name,
            "domain_id": domain,
            "kind": kind,
            "note": "",
            "version": 1,
        }
        done = await connection.execute(insert(aliases).values(**row, created_at=now, updated_at=now))
        assert done.inserted_primary_key is not None
        for user_id in user_ids:
            await connection.execute(
                insert(sender_rules).values(alias_id=done.inserted_primary_key[0], user_id=user_id)
            )


@pytest_asyncio.fixture
async def people(seeded: Database, worker_database: Database) -> dict[str, int]:
    """alice, who is also pr@; bob, who may write to 3 recipients an hour; zoe, who may write to none; carol, suspended;
    dora, whose home does not stand; info@, which nobody sends as."""
    ids = await add_people(seeded, worker_database, "alice", "bob", "zoe", "carol", "dora")
    await designate(seeded, "pr", ids["alice"], ids["carol"])
    await designate(seeded, "info")
    await designate(seeded, "postmaster", ids["bob"], kind=AliasKind.RECEIVE_ONLY)
    async with seeded.write.begin() as connection:
        for name, changed in (
            ("bob", {"send_limit": 3}),
            ("zoe", {"send_limit": 0}),
            ("carol", {"state": "suspended"}),
        ):
            await connection.execute(users.update().where(users.c.id == ids[name]).values(**changed))
    async with worker_database.write.begin() as connection:
        gone = applied.update().where(applied.c.subject_id == ids["dora"])
        await connection.execute(gone.values(stands=False))
    return ids


@dataclass
class Policy:
    """A running process."""

    process: subprocess.Popen[str]
    policy_port: int
    from_port: int
    log_file: Path

    def connect(self, *, port: int = 0) -> socket.socket:
        return socket.create_connection(("127.0.0.1", port or self.policy_port), 10)

    def ask(self, *questions: bytes) -> list[str]:
        """All sent at once on a new connection; their actions."""
        with self.connect() as client:
            client.sendall(b"".join(questions))
            with suppress(OSError):  # the process may have closed it by then
                client.shutdown(socket.SHUT_WR)
            answers = everything(client).decode("ascii")
        assert not answers or answers.endswith("\n\n")
        return [answer.removeprefix("action=") for answer in answers.split("\n\n")[:-1]]

    def ask_from(self, login: str, header: str | bytes) -> str | None:
        """None for accepted, else the reason."""
        connection = HTTPConnection("127.0.0.1", self.from_port, timeout=10)
        body = header.encode() if isinstance(header, str) else header
        connection.request("POST", "/from", body, {"X-Login": login, "X-Envelope-From": login})
        response = connection.getresponse()
        assert response.status == 200, response.status
        answer = json.loads(response.read())
        connection.close()
        assert answer["action"] in ("accept", "reject")
        assert ("reason" in answer) == (answer["action"] == "reject")
        return answer.get("reason")

    @property
    def log(self) -> str:
        return self.log_file.read_text()

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(5)


def everything(client: socket.socket) -> bytes:
    """Until the other side closes, in whichever way."""
    received = b""
    try:
        while chunk := client.recv(65536):
            received += chunk
    except ConnectionError:
        pass
    return received


@contextmanager
def running(test_database: TestDatabase, scratch: Path, *, patch: str = "", **environment: str) -> Iterator[Policy]:
    """`cacert-mail policy`, as its own database user. `patch` runs before it, to make waits short."""
    policy_port, from_port = free_ports(2)
    given = {
        "PATH": os.environ["PATH"],
        "DATABASE_URL": test_database.url("policy"),
        "POLICY_PORT": str(policy_port),
        "FROM_PORT": str(from_port),
        "LOG_FORMAT": "json",
    }
    log_file = scratch / "policy.log"
    with log_file.open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-X", "dev", "-c", f"{patch}\nfrom app.cli.main import main; main()", "policy"],
            env=given | environment,
            cwd=Path(__file__).parents[3],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            text=True,
        )
    given |= environment
    policy = Policy(process, int(given["POLICY_PORT"]), int(given["FROM_PORT"]), log_file)

    def is_up() -> bool:
        assert process.poll() is None, policy.log
        return "policy_started" in policy.log

    try:
        assert wait_until(is_up), policy.log
        assert policy.ask(CONNECT) == ["DUNNO"]
        yield policy
    finally:
        process.kill()
        process.wait()


@pytest.fixture
def policy(people: dict[str, int], test_database: TestDatabase, scratch: Path) -> Iterator[Policy]:
    """Ends as it should: when asked, with 0, and without a word about something that went wrong."""
    with running(test_database, scratch) as policy:
        yield policy
        assert policy.process.poll() is None, policy.log
        assert policy.stop() == 0
        assert "policy_stopped" in policy.log
        assert "Traceback" not in policy.log
        assert "Warning" not in policy.log
        assert '"level": "error"' not in policy.log
