"""From an empty Debian to mail, on Debian's own paths and ports: /etc/postfix, /etc/dovecot, /home, 25 to 995.

In private mount, network and process namespaces: the same paths and ports outside are neither used nor touched.
"""

import asyncio
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from app.db import Database, utc_now
from app.models.domains import DomainKind
from app.permissions import Role
from app.services.changes import Change
from app.services.domains import create_domain
from app.services.hosts import create_host
from app.services.principals import create_principal
from tests.conftest import ACTOR
from tests.stack.mail import PRIMARY_DOMAIN
from tests.stack.mariadb import USERS, MariaDB

ROOT = Path(__file__).parents[2]


async def fill(mariadb: MariaDB) -> tuple[str, str]:
    mariadb.empty()
    database = Database(mariadb.url("api"))
    async with database.write.begin() as connection:
        change = Change(connection, ACTOR, utc_now())
        await create_domain(change, PRIMARY_DOMAIN, DomainKind.PRIMARY)
        await create_host(change, "mail")
        credentials = await create_principal(change, "tests", Role.PRIMARY)
    await database.close()
    return credentials


@pytest.fixture(scope="module")
def found(mariadb: MariaDB) -> dict[str, Any]:
    given = {
        "socket": str(mariadb.socket),
        "passwords": {user: mariadb.passwords[user] for user in USERS},
        "credentials": asyncio.run(fill(mariadb)),
    }
    private = ["unshare", "--mount", "--net", "--uts", "--pid", "--fork", "--mount-proc", "--kill-child"]
    done = subprocess.run(
        [*private, sys.executable, "-m", "tests.mail.stock_host"],
        input=json.dumps(given),
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=180,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    result: dict[str, Any] = json.loads(done.stdout)
    assert "error" not in result, json.dumps(result, indent=1)
    return result


def test_the_configuration_is_installed(found: dict[str, Any]) -> None:
    status, written, complaints = found["first install"]
    assert status == 1, "nothing runs yet"
    for path in (
        "/etc/postfix/main.cf",
        "/etc/postfix/master.cf",
        "/etc/dovecot/dovecot.conf",
        "/etc/rspamd/rspamd.conf",
    ):
        assert f"{path} was written." in written
    assert "Start what does not run" in complaints
    assert found["second install"] == [0, "Every file is as it should be.\n", ""]
    assert found["check"] == [0, "Every file is as it should be.\n", ""]


def test_accounts_and_aliases_are_ready(found: dict[str, Any]) -> None:
    for name in ("alice", "bob"):
        assert (found[name]["ready"], found[name]["home"]) == (True, f"/home/{name}"), found[name]
        assert {proof["result"] for proof in found[name]["proofs"].values()} == {"ok"}
    for address in ("postmaster@cacert.test", "pr@cacert.test"):
        assert found[address]["ready"], found[address]


def test_mail_comes_in(found: dict[str, Any]) -> None:
    codes = [found[f"to {name}"] for name in ("alice", "postmaster", "pr", "nobody-here")]
    assert codes == [250, 250, 250, 550]
    assert (found["imaps"], found["imap"], found["pop3s"]) == ("2", "2", 1)


@pytest.mark.parametrize("port", [587, 465])
def test_mail_goes_out_under_one_s_own_names(found: dict[str, Any], port: int) -> None:
    assert found[f"{port} alice@cacert.test alice@cacert.test"] == 250
    assert found[f"{port} pr@cacert.test PR <pr@cacert.test>"] == 250
    assert found[f"{port} bob@cacert.test bob@cacert.test"] == 553
    assert 500 <= found[f"{port} alice@cacert.test bob@cacert.test"] < 600


def test_nothing_is_left(found: dict[str, Any]) -> None:
    assert found
    for path in ("/etc/cacert-mail", "/home/alice", "/etc/postfix/recipients.cf", "/run/cacert-mail"):
        assert not Path(path).exists(), path
