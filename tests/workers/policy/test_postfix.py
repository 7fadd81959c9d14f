"""A small Postfix of its own asks the policy process: what each answer becomes in SMTP. Who signed in is told by XCLIENT."""

import os
import shutil
import smtplib
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from sqlalchemy import text

from app.db import Database
from tests.conftest import TestDatabase
from tests.stack.processes import Processes, free_ports, run
from tests.workers.policy.site import Policy, people, running

pytestmark = pytest.mark.asyncio
__all__ = ["people"]
only_sqlite = pytest.mark.parametrize("test_database", ["sqlite"], indirect=True)

MAIN = """
compatibility_level = 3.6
default_database_type = lmdb
queue_directory = {base}/queue
data_directory = {base}/data
maillog_file = {base}/mail.log
maillog_file_prefixes = {base}
command_directory = /usr/sbin
daemon_directory = /usr/lib/postfix/sbin
meta_directory = /etc/postfix
inet_interfaces = 127.0.0.1
inet_protocols = ipv4
myhostname = mail.cacert.test
mydestination =
alias_maps =
local_recipient_maps =
default_transport = discard:
smtpd_peername_lookup = no
smtpd_authorized_xclient_hosts = 127.0.0.0/8
mynetworks = 127.0.0.0/8
smtpd_delay_reject = no
smtpd_client_restrictions = check_policy_service inet:127.0.0.1:{policy}
smtpd_sender_restrictions = check_policy_service inet:127.0.0.1:{policy}
# Twice, so that it asks twice about each recipient.
smtpd_relay_restrictions = check_policy_service inet:127.0.0.1:{policy}, permit_mynetworks, reject_unauth_destination
smtpd_recipient_restrictions = check_policy_service inet:127.0.0.1:{policy}
smtpd_data_restrictions = check_policy_service inet:127.0.0.1:{policy}
smtpd_end_of_data_restrictions = check_policy_service inet:127.0.0.1:{policy}
smtpd_policy_service_retry_delay = 1s
"""
MASTER = """
127.0.0.1:{smtp} inet n - n - - smtpd
cleanup  unix n - n -    0 cleanup
qmgr     unix n - n 300  1 qmgr
rewrite  unix - - n -    - trivial-rewrite
bounce   unix - - n -    0 bounce
defer    unix - - n -    0 bounce
discard  unix - - n -    - discard
proxymap unix - - n -    - proxymap
anvil    unix - - n -    1 anvil
postlog  unix-dgram n - n - 1 postlogd
"""


@contextmanager
def postfix(policy: Policy) -> Iterator[int]:
    """Its port."""
    processes = Processes()
    base = processes.directory
    (port,) = free_ports(1)
    try:
        config = base / "postfix"
        config.mkdir()
        (base / "queue").mkdir()
        (base / "data").mkdir(mode=0o700)
        shutil.chown(base / "data", "postfix")
        (config / "main.cf").write_text(MAIN.format(base=base, policy=policy.policy_port))
        (config / "master.cf").write_text(MASTER.format(smtp=port))
        for path in config.iterdir():  # Postfix waits for seconds when a file is younger than that
            os.utime(path, (time.time() - 60, time.time() - 60))
        run(["postfix", "-c", config, "check"])
        master = processes.start(["/usr/lib/postfix/sbin/master", "-c", config, "-d"], MAIL_CONFIG=str(config))
        processes.wait_for(master, port, base / "mail.log")
        yield port
    finally:
        processes.close()


def session(port: int, login: str) -> smtplib.SMTP:
    client = smtplib.SMTP("127.0.0.1", port, "client.test", 10)
    client.ehlo()
    if login:
        assert client.docmd("XCLIENT", f"LOGIN={login}")[0] == 220
    client.ehlo()
    return client


def recipients(client: smtplib.SMTP, *names: str) -> list[tuple[int, bytes]]:
    """The answers to them, or the one that refuses the sender."""
    refused = client.mail("someone@cacert.test")
    return [client.rcpt(f"{name}@example.org") for name in names] if refused[0] == 250 else [refused]


async def test_what_the_answers_become(people: dict[str, int], test_database: TestDatabase, scratch: Path) -> None:
    with running(test_database, scratch) as policy, postfix(policy) as port:
        with session(port, "") as client:
            assert recipients(client, "a")[0][0] == 250, "whoever did not sign in is not our matter"
        with session(port, "alice@cacert.test") as client:
            assert [code for code, _ in recipients(client, *"abcdefgh")] == [250] * 8
            assert client.data(b"From: alice@cacert.test\r\n\r\nhello\r\n")[0] == 250
        with session(port, "bob@cacert.test") as client:
            # Asked twice about each, and one is named twice.
            (*taken, refused) = recipients(client, "a", "b", "b", "c", "d")
            assert [code for code, _ in taken] == [250] * 4
            assert refused[0] == 450
            assert refused[1].startswith(b"4.7.1 ")
            assert refused[1].endswith(b"You may write to 3 recipients an hour, and have. Try again in 60 minutes.")
            assert client.data(b"From: bob@cacert.test\r\n\r\nhello\r\n")[0] == 250, "to the three"
            assert [code for code, _ in recipients(client, "a")] == [450], (
                "of another message, that would be the fourth"
            )
        for login in ("carol", "dora", "zoe", "nobody"):
            with session(port, f"{login}@cacert.test") as client:
                ((code, said),) = recipients(client, "a")
                assert code == 550
                assert said.startswith(b"5.7.1 ")
                assert said.endswith(b"This account may not send mail. Ask the administrators of your mail server.")


@only_sqlite
async def test_what_is_away_is_451(people: dict[str, int], test_database: TestDatabase, scratch: Path) -> None:
    with running(test_database, scratch) as policy, postfix(policy) as port:
        with session(port, "alice@cacert.test") as client:
            assert [code for code, _ in recipients(client, "a")] == [250]
            policy.stop()
            client.rset()
            assert [code for code, _ in recipients(client, "a")] == [451]
        owner = Database(test_database.url("owner"))
        async with owner.write.begin() as connection:
            await connection.execute(text("DROP VIEW policy_logins"))
        await owner.close()
        ports = {"POLICY_PORT": str(policy.policy_port), "FROM_PORT": str(policy.from_port)}
        with running(test_database, scratch, **ports) as again, session(port, "alice@cacert.test") as client:
            ((code, said),) = recipients(client, "a")
            assert code == 451
            assert said.startswith(b"4.3.0 ")
            assert said.endswith(
                b"This server cannot look up your account now. Your message was not sent; try again in a minute."
            )
            assert again.process.poll() is None
