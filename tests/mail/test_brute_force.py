"""Guessing at real logins: Dovecot and Postfix ask the API, which runs as its own process, from several addresses at once."""

import asyncio
import imaplib
import json
import poplib
import smtplib
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from app.db import Database, utc_now
from app.permissions import Permission, Role
from app.services.changes import Change
from app.services.principals import create_principal
from tests.conftest import ACTOR
from tests.stack import accounts
from tests.stack.accounts import PASSWORD, Account
from tests.stack.mail import PRIMARY_DOMAIN, MailStack
from tests.stack.mariadb import MariaDB
from tests.stack.processes import Processes, free_ports, run, wait_until

ALICE = f"alice@{PRIMARY_DOMAIN}"
KEY = "0123456789abcdef" * 3
HERE, THERE, ELSEWHERE, WEBMAIL = "127.0.0.21", "127.0.0.22", "127.0.0.23", "127.0.0.99"
REFUSED = (imaplib.IMAP4.error, poplib.error_proto, smtplib.SMTPAuthenticationError)

account = accounts.account


@dataclass
class Site:
    mail: MailStack
    mariadb: MariaDB
    processes: Processes
    start_api: Callable[[], Any]
    api: Any
    port: int

    @property
    def log(self) -> str:
        return (self.processes.directory / "python.out").read_text()

    def sign_in(self, password: str = PASSWORD, *, by: str = "imap", source: str = HERE, login: str = "alice") -> float:
        """Seconds that it took. Raises one of `REFUSED`."""
        began = time.monotonic()
        if by == "imap":
            self.mail.imap(login, password, source=source).logout()
        elif by == "pop3":
            self.mail.pop3(login, password, source=source).quit()
        else:
            self.mail.submission(login, password, source=source).quit()
        return time.monotonic() - began

    def gets_in(self, **how: Any) -> bool:
        try:
            self.sign_in(**how)
        except REFUSED:
            return False
        return True

    def failures(self, where: str = "1") -> list[list[str]]:
        return self.mariadb.sql(f"SELECT login, network, guess, attempts FROM login_failures WHERE {where}", "owner")

    def wrote(self, count: int, *, login: str, network: str) -> None:
        """As if so many wrong passwords had been tried a moment ago."""
        self.mariadb.sql(
            "INSERT login_failures (kind, login, network, guess, attempts, first_at, last_at)"
            f" SELECT 'mail', REPLACE('{login}', 'N', seq), REPLACE('{network}', 'N', seq), CONCAT('a', seq), 1,"
            f" UTC_TIMESTAMP(6), UTC_TIMESTAMP(6) FROM seq_1_to_{count}",
            "owner",
        )


@pytest.fixture(scope="module")
def running(mariadb: MariaDB, key_directory: Path) -> Iterator[Site]:
    processes = Processes()
    (port,) = free_ports(1)
    key_file = processes.directory / "policy.key"
    key_file.write_text(KEY)
    key_file.chmod(0o600)

    def start() -> Any:
        process = processes.start(
            [sys.executable, "-m", "app.cli.main", "api"],
            DATABASE_URL=mariadb.url("api"),
            KEY_DIRECTORY=str(key_directory),
            LINK_KEY_FILE=str(key_directory / "link.key"),
            PORT=str(port),
            WAKE_DIRECTORY=str(processes.directory),
            AUTH_POLICY_KEY_FILE=str(key_file),
            SHARED_SOURCES=f"{WEBMAIL}/32",
            TARPIT_SECONDS="1",
            LOG_FORMAT="json",
            PYTHONPATH=str(Path(__file__).parents[2]),
        )
        processes.wait_for(process, port, processes.directory / "python.out")
        return process

    stack = MailStack()
    stack.auth_policy = {"url": f"http://127.0.0.1:{port}/dovecot/auth-policy", "key": KEY}
    try:
        api = start()
        stack.start(mariadb)
        yield Site(stack, mariadb, processes, start, api, port)
    finally:
        processes.close()
        stack.close()


@pytest.fixture
def mail_stack(running: Site) -> MailStack:
    """Instead of the session's, so that the accounts are made here."""
    return running.mail


stack = accounts.stack


@pytest.fixture
def site(running: Site, account: Account) -> Site:
    account(ALICE)
    account(f"bob@{PRIMARY_DOMAIN}")
    return running


def test_the_key_is_for_root_alone(running: Site) -> None:
    directory = running.mail.dovecot_config.parent
    holding = {path.name: path.stat().st_mode & 0o777 for path in directory.iterdir() if KEY in path.read_text()}
    assert holding == {"auth-policy.conf.ext": 0o600}
    assert KEY not in running.log


def test_guesses_by_imap_pop3_and_submission_are_one_count(site: Site) -> None:
    site.wrote(7, login=ALICE, network=f"{HERE}/32")
    for by, password in (("imap", "first"), ("pop3", "second"), ("submission", "third")):
        with pytest.raises(REFUSED):
            site.sign_in(password, by=by)
    assert wait_until(lambda: len(site.failures(f"network = '{HERE}/32'")) == 10)
    for by in ("imap", "pop3", "submission"):
        assert not site.gets_in(by=by), "the right password does not help"
        assert site.gets_in(by=by, source=THERE), "but it does elsewhere"
    assert site.gets_in(login="bob"), "and for others here"
    assert f'{{"client_address": "{HERE}", "event": "login_refused", "request_id": "' in site.log, (
        "as fail2ban wants it"
    )


def test_a_stale_phone_is_slowed_and_its_owner_gets_in(site: Site) -> None:
    for _ in range(3):
        with pytest.raises(REFUSED):
            site.sign_in("the old password")
    site.mariadb.sql("UPDATE login_failures SET attempts = 500", "owner")
    with pytest.raises(REFUSED):
        site.sign_in("the old password")
    assert wait_until(lambda: site.failures()[0][3] == "501"), "one guess, and one row"
    assert len(site.failures()) == 1
    slowed = site.sign_in()
    assert slowed > 1, "behind the same router, after the tarpit"
    assert site.sign_in(source=THERE) < slowed
    assert wait_until(lambda: [row[2] for row in site.failures(f"network = '{THERE}/32'")] == ["known"])


def test_forty_connections_at_once_are_ten_guesses(site: Site) -> None:
    """Each with another password, and the right one among them: all ask before the first has been reported."""

    def guess(number: int) -> bool:
        return site.gets_in(password=PASSWORD if number == 39 else f"guess {number}")

    with ThreadPoolExecutor(40) as pool:
        assert not any(pool.map(guess, range(40)))
    assert wait_until(lambda: not site.gets_in())
    assert 0 < len(site.failures("guess != 'known'")) <= 10


def test_the_world_guesses_and_the_owner_gets_in(site: Site) -> None:
    assert site.gets_in(source=THERE)
    assert wait_until(lambda: len(site.failures(f"network = '{THERE}/32' AND guess = 'known'")) == 1)
    site.wrote(100, login=ALICE, network="10.0.N.1/32")
    assert not site.gets_in(source=HERE), "a stranger, as far as one can know"
    for by in ("imap", "pop3", "submission"):
        assert site.gets_in(by=by, source=THERE)
    assert site.gets_in(source=WEBMAIL)


def test_a_network_that_tries_many_is_refused_and_a_shared_source_is_not(site: Site) -> None:
    site.wrote(40, login=f"userN@{PRIMARY_DOMAIN}", network=f"{HERE}/32")
    site.wrote(400, login=f"userN@{PRIMARY_DOMAIN}", network="shared")
    assert not site.gets_in(source=HERE)
    assert site.gets_in(source=THERE)
    assert site.gets_in(source=WEBMAIL)


@pytest.mark.parametrize("login", ["alice+x", "älice", "al ice", "hunter2 is my password", "alice>, rip=192.0.2.1"])
def test_strange_logins_are_refused_and_break_nothing(site: Site, login: str) -> None:
    client = site.mail.imap("alice", PASSWORD, source=ELSEWHERE)
    client.logout()
    plain = imaplib.IMAP4_SSL("127.0.0.1", site.mail.settings.imaps_port, ssl_context=site.mail.tls, timeout=10)
    with pytest.raises(imaplib.IMAP4.error):
        plain.authenticate("PLAIN", lambda _: b"\0" + login.encode() + b"\0guess")
    plain.shutdown()
    assert wait_until(lambda: len(site.failures("guess != 'known'")) == 1)
    assert "hunter2" not in str(site.failures()) + site.log


def test_what_a_lift_does(site: Site) -> None:
    site.wrote(10, login=ALICE, network=f"{HERE}/32")
    assert not site.gets_in()

    async def make() -> tuple[str, str]:
        database = Database(site.mariadb.url("api"))
        async with database.write.begin() as connection:
            wanted = [Permission.LOCKOUTS_READ, Permission.LOCKOUTS_WRITE]
            made = await create_principal(Change(connection, ACTOR, utc_now()), "lifter", Role.PRIMARY, wanted)
        await database.close()
        return made[0], made[1]

    credentials = ":".join(asyncio.run(make()))
    url = f"http://127.0.0.1:{site.port}/v1/lockouts"
    (lockout,) = json.loads(run(["curl", "-s", "-u", credentials, f"{url}?login={ALICE}"]))["items"]
    assert (lockout["state"], lockout["network"], lockout["guesses"]) == ("refused", f"{HERE}/32", 10)
    run(["curl", "-sf", "-u", credentials, "-X", "DELETE", f"{url}/{lockout['id']}"])
    assert site.gets_in()


def test_away_it_lets_in_or_not_as_the_setting_says(site: Site) -> None:
    site.wrote(10, login=ALICE, network=f"{HERE}/32")
    included = site.mail.dovecot_config.parent / "auth-policy.conf.ext"
    text = included.read_text()
    site.processes.stop(site.api)
    try:
        assert site.gets_in(), "nobody is there to count"
        included.write_text(text.replace("reject_on_fail = no", "reject_on_fail = yes"))
        site.mail.doveadm("reload")
        assert wait_until(lambda: not site.gets_in(source=THERE))
    finally:
        included.write_text(text)
        site.mail.doveadm("reload")
        site.api = site.start_api()
    assert wait_until(lambda: site.gets_in(source=THERE))
    assert not site.gets_in()


def test_an_app_password_shows_when_and_from_where_it_was_last_used(site: Site) -> None:
    secrets = {name: f"{name}-{name}-2222-3333-4444-5555-6666" for name in ("aaaa", "bbbb", "cccc")}
    for name, protocols in (("aaaa", "imap"), ("bbbb", "imap smtp"), ("cccc", "imap")):
        allowed = ", ".join(f"{each} = {int(each in protocols)}" for each in ("imap", "pop3", "smtp", "sieve"))
        site.mariadb.sql(
            f"INSERT app_passwords SET user_id = (SELECT id FROM users WHERE address = '{ALICE}'), name = '{name}',"
            f" secret_hash = SHA2('{secrets[name]}', 256), created_at = UTC_TIMESTAMP(6), {allowed}",
            "owner",
        )

    def used() -> dict[str, str]:
        recently = "last_used_at > UTC_TIMESTAMP(6) - INTERVAL 1 MINUTE"
        return dict(site.mariadb.sql(f"SELECT name, last_used_from FROM app_passwords WHERE {recently}", "owner"))

    site.sign_in()
    site.sign_in(secrets["aaaa"])
    site.sign_in(secrets["bbbb"], by="submission", source=THERE)
    assert not site.gets_in(password=secrets["cccc"], by="pop3", source=ELSEWHERE), "it is for IMAP"
    assert wait_until(lambda: used() == {"aaaa": HERE, "bbbb": THERE}), used()
