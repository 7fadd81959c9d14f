"""`cacert-mail import`: against a real API and a real worker, in place, with homes that stand."""

import os
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import httpx
import pytest

from app.cli.imports import Entry, destinations_of, read_entries
from tests.web.site import Site, site

__all__ = ["site"]

HASH = (
    "{SHA512-CRYPT}$6$saltsalt$qFmFH.bQmmtXzyBY0s9v7Oicd2z4XSIecDzlB5KiA2/jctKu9YterLp8wwnSq.qc.eoxqOmSuNp2xS0ktL3nh/"
)
ROOT = Path(__file__).parents[2]


def command(site: Site, *arguments: str | Path, **changed: str) -> tuple[int, list[str], str]:
    environment = {
        "PATH": os.environ["PATH"],
        "API_URL": site.url,
        "CLIENT_ID": site.client_id,
        "CLIENT_SECRET": site.secret,
        "HOST_ROOT": str(site.processes.directory / "host"),
        "ADOPTED_HOMES": str(site.processes.directory / "etc/adopted-homes"),
    }
    done = subprocess.run(
        [sys.executable, "-m", "app.cli.main", "import", *arguments],
        env=environment | changed,
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    return done.returncode, done.stdout.splitlines(), done.stderr


@pytest.fixture
def client(site: Site) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=site.url, auth=(site.client_id, site.secret), timeout=30) as client:
        yield client


def old_home(site: Site, name: str, uid: int, gid: int) -> Path:
    """As a hand made it: open to others, with mail."""
    home = site.processes.directory / "host/home" / name
    for part in ("cur", "new", "tmp"):
        (home / "Maildir" / part).mkdir(parents=True)
    (home / "Maildir/cur/1:2,S").write_text("old mail")
    (home / ".bashrc").touch()
    for path in (home, *home.rglob("*")):
        os.chown(path, uid, gid)
    home.chmod(0o755)
    return home


def table(site: Site, name: str, *lines: str) -> Path:
    path = site.processes.directory / name
    path.write_text("\n".join(lines) + "\n")
    return path


def users(client: httpx.Client) -> dict[str, Any]:
    return {user["address"]: user for user in client.get("/v1/users").json()["items"]}


def test_users_are_taken_over_in_place(site: Site, client: httpx.Client) -> None:
    old = table(
        site,
        "users.tsv",
        "address\tpassword_hash\tdisplay_name\tquota_bytes\tstate",
        f"alice@cacert.org\t{HASH}\tAlice\tNULL\tactive",
        f"bob@cacert.org\t{HASH}\tBob\t10485760\tsuspended",
        "carol@cacert.org\t{MADE-UP}x\tCarol\tNULL\tactive",
        f"dave@cacert.org\t{HASH}\tDave\tNULL\tactive",
        f"erin@cacert.org\t{HASH}\tErin\tNULL\tactive",
        f"postmaster@cacert.org\t{HASH}\tPost\tNULL\tactive",
        f"../etc@cacert.org\t{HASH}\tBad\tNULL\tactive",
        f"frank@nowhere.example\t{HASH}\tFrank\tNULL\tactive",
    )
    alice = old_home(site, "alice", 1001, 1002)
    old_home(site, "dave", 0, 0)
    old_home(site, "erin", 1001, 1003)
    adopted = site.processes.directory / "etc/adopted-homes"

    status, said, complaints = command(site, "users", old)
    assert (status, complaints) == (1, "")
    assert said[0] == "line 2: alice@cacert.org: would be created, its home keeps uid 1001 and gid 1002"
    assert said[1] == "line 3: bob@cacert.org: would be created"
    for line, word in zip(
        said[2:8],
        ("scheme is unknown", "belongs to 0:0", "is alice@cacert.org's already", "Kept", "takes", "nowhere.example"),
        strict=True,
    ):
        assert word in line
    assert said[-2:] == [
        "2 would be made, 0 are there already, 6 refused.",
        "Nothing was changed: this was a dry run. --apply does it.",
    ]
    assert users(client) == {}
    assert not adopted.exists()
    assert alice.stat().st_mode & 0o777 == 0o755

    status, said, complaints = command(site, "users", old, "--apply")
    assert (status, complaints) == (1, "")
    assert said[0] == "line 2: alice@cacert.org: created, its home keeps uid 1001 and gid 1002"
    assert said[1] == "line 3: bob@cacert.org: created"
    assert "uid 1001 is alice@cacert.org's already" in said[4]
    assert said[-1] == "2 made, 0 are there already, 6 refused."
    found = users(client)
    assert sorted(found) == ["alice@cacert.org", "bob@cacert.org"]
    assert (found["alice@cacert.org"]["uid"], found["alice@cacert.org"]["ready"]) == (1001, True)
    assert (found["bob@cacert.org"]["state"], found["bob@cacert.org"]["ready"]) == ("suspended", True)
    assert found["bob@cacert.org"]["uid"] == 200_000 + found["bob@cacert.org"]["id"]
    assert (alice / "Maildir/cur/1:2,S").read_text() == "old mail"
    status_of = alice.stat()
    assert (status_of.st_uid, status_of.st_gid, status_of.st_mode & 0o777) == (1001, 1002, 0o700)
    user_id = found["alice@cacert.org"]["id"]
    assert adopted.read_text().splitlines()[1:] == [f"{user_id} alice@cacert.org 1001 1002"]
    with closing(sqlite3.connect(site.database_url.partition("///")[2])) as rows:
        row = rows.execute("SELECT uid, gid FROM dovecot_users WHERE address = 'alice@cacert.org'").fetchone()
    assert row == (1001, 1002)

    _, said, _ = command(site, "users", old, "--apply")
    assert said[0] == "line 2: alice@cacert.org: is there already, its home keeps uid 1001 and gid 1002"
    assert said[-1] == "0 made, 2 are there already, 6 refused."

    # A successor is nobody's heir, and whoever is restored finds everything.
    wait = {"Prefer": "wait=20"}
    assert client.delete(f"/v1/users/{user_id}", headers=wait).json()["ready"]
    second = client.post("/v1/users", json={"address": "alice@cacert.org", "reuse_address": True}, headers=wait).json()
    assert (second["ready"], second["uid"]) == (True, 200_000 + second["id"])
    assert list(alice.rglob("cur/*")) == []
    assert client.delete(f"/v1/users/{second['id']}", headers=wait).json()["ready"]
    again = client.post(f"/v1/users/{user_id}/restore", headers=wait)
    assert again.status_code == 409, "the tombstone is the successor's now"


def test_a_table_that_is_none(site: Site, scratch: Path) -> None:
    for text, word in (
        ("name\nalice\n", "begins with a line of column names"),
        ("address,secret\na@cacert.org,x\n", "'secret' cannot"),
        ("address,display_name\na@cacert.org\n", "more or fewer fields"),
        ("", "begins with a line of column names"),
    ):
        (scratch / "bad").write_text(text)
        status, said, complaints = command(site, "users", scratch / "bad")
        assert (status, said) == (1, [])
        assert word in complaints, text
        assert complaints.count("\n") == 1
    status, _, complaints = command(site, "users", scratch / "missing")
    assert (status, complaints.count("\n")) == (1, 1)


def test_a_wrong_secret_and_an_api_that_is_away(site: Site, scratch: Path) -> None:
    (scratch / "users.csv").write_text("address\nzoe@cacert.org\n")
    status, _, complaints = command(site, "users", scratch / "users.csv", CLIENT_SECRET="wrong")
    assert status == 1
    assert "wrong" in complaints.lower()
    assert site.secret not in complaints
    status, _, complaints = command(site, "users", scratch / "users.csv", API_URL="http://127.0.0.1:9")
    assert (status, complaints.count("\n")) == (1, 1)


OLD_ALIASES = """# by hand, 2009
postmaster: root
root:   zoe,
        \\yves
MAILER-DAEMON: postmaster
lists: "|/usr/bin/lists"
archive: /var/mail/archive
all: :include:/etc/all
outside: somebody@example.net

nobody: /dev/null
press: zoe@cacert.org, postmaster
gone: who
"""


def test_entries_of_a_hand_made_file() -> None:
    entries = read_entries(OLD_ALIASES)
    assert entries[0] == Entry("postmaster", "root", range(2, 3))
    assert entries[1] == Entry("root", "zoe, \\yves", range(3, 5))
    assert destinations_of(entries[1], "cacert.org") == ["zoe@cacert.org", "yves@cacert.org"]


def test_aliases_are_taken_over(site: Site, client: httpx.Client, scratch: Path) -> None:
    for name in ("zoe", "yves"):
        assert client.post("/v1/users", json={"address": f"{name}@cacert.org"}).status_code == 202
    file = scratch / "aliases"
    file.write_text(OLD_ALIASES)
    status, said, complaints = command(site, "aliases", file)
    assert (status, complaints) == (1, "")
    assert "line 2: postmaster: would be created, leads to root@cacert.org" in said
    assert file.read_text() == OLD_ALIASES
    assert client.get("/v1/aliases").json()["items"] == []

    status, said, complaints = command(site, "aliases", file, "--apply")
    assert (status, complaints) == (1, "")
    made = {alias["address"]: alias["destinations"] for alias in client.get("/v1/aliases").json()["items"]}
    assert made == {
        "root@cacert.org": ["zoe@cacert.org", "yves@cacert.org"],
        "postmaster@cacert.org": ["root@cacert.org"],
        "press@cacert.org": ["zoe@cacert.org", "postmaster@cacert.org"],
    }
    left = file.read_text()
    assert [entry.name for entry in read_entries(left)] == [
        "mailer-daemon",
        "lists",
        "archive",
        "all",
        "outside",
        "nobody",
        "gone",
    ]
    assert "# by hand, 2009" in left
    [copy] = scratch.glob("aliases.before-*")
    assert copy.read_text() == OLD_ALIASES
    assert "POSTFIX_CONFIG is not set: run `newaliases`, or the lines that are gone stay in force." in said
    assert "3 made, 0 are there already, 7 refused." in said
    for word in ("is a program, a file", "There is no account and no alias who@cacert.org", "SRS"):
        assert any(word in line for line in said), word
