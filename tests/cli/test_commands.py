"""`cacert-mail`, as typed: each command a process of its own."""

import os
import re
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def cacert_mail(*arguments: str, at: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    clean = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), "COLUMNS": "120", "NO_COLOR": "1", "HOME": str(at)}
    settings = {"DATABASE_URL": f"sqlite+aiosqlite:///{at}/test.db", "KEY_DIRECTORY": str(at / "keys")}
    return subprocess.run(
        [sys.executable, "-m", "app.cli.main", *arguments],
        cwd=at,
        env={**clean, **settings, **environment},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_upgrade_makes_the_schema_and_says_so(scratch: Path) -> None:
    first = cacert_mail("db", "upgrade", at=scratch)
    assert (first.returncode, first.stdout) == (0, "The schema went from nothing to 2026_11_23_accounts.\n")
    again = cacert_mail("db", "upgrade", at=scratch)
    assert (again.returncode, again.stdout) == (0, "The schema is at 2026_11_23_accounts.\n")


def test_upgrade_leaves_foreign_tables_alone(scratch: Path) -> None:
    with sqlite3.connect(scratch / "test.db") as theirs:
        theirs.execute("CREATE TABLE user (name TEXT)")
    theirs.close()
    before = (scratch / "test.db").read_bytes()
    refused = cacert_mail("db", "upgrade", at=scratch)
    assert refused.returncode == 1
    assert "not ours (user)" in refused.stderr
    assert "RENAME TABLE" in refused.stderr, "it says how to go on"
    assert (scratch / "test.db").read_bytes() == before
    with sqlite3.connect(scratch / "test.db") as theirs:
        assert theirs.execute("SELECT name FROM sqlite_master").fetchall() == [("user",)]
    theirs.close()


def test_a_database_that_cannot_be_reached_is_named_without_its_password(scratch: Path) -> None:
    url = "mysql+asyncmy://api:hunter2hunter2@127.0.0.1:1/cacertusers"
    failed = cacert_mail("db", "upgrade", at=scratch, DATABASE_URL=url)
    assert failed.returncode == 1
    assert "cannot be reached" in failed.stderr
    assert "hunter2" not in failed.stderr + failed.stdout


def test_an_interrupted_migration_is_called_that(scratch: Path) -> None:
    cacert_mail("db", "upgrade", at=scratch)
    with sqlite3.connect(scratch / "test.db") as half:
        half.execute("DELETE FROM alembic_version")
    half.close()
    refused = cacert_mail("db", "upgrade", at=scratch)
    assert refused.returncode == 1
    assert "interrupted" in refused.stderr


@pytest.mark.parametrize(
    "command", [["db", "upgrade"], ["principal", "list"], ["principal", "disable", "x"], ["sweep", "--dry-run"]]
)
def test_no_command_answers_with_a_traceback(scratch: Path, command: list[str]) -> None:
    url = "mysql+asyncmy://api:hunter2hunter2@127.0.0.1:1/cacertusers"
    (scratch / "home").mkdir(exist_ok=True)
    failed = cacert_mail(*command, at=scratch, DATABASE_URL=url, HOST_ROOT=str(scratch))
    assert failed.returncode == 1
    assert "Traceback" not in failed.stderr
    assert len(failed.stderr.splitlines()) < 4
    assert "hunter2" not in failed.stderr


def test_a_dry_run_makes_nothing(scratch: Path) -> None:
    cacert_mail("db", "upgrade", at=scratch)
    (scratch / "host/home").mkdir(parents=True)
    for directory in (scratch / "host", scratch / "host/home"):
        directory.chmod(0o755)
    done = cacert_mail("sweep", "--dry-run", at=scratch, HOST_ROOT=str(scratch / "host"))
    assert done.returncode == 0, done.stderr
    assert list((scratch / "host/home").iterdir()) == []


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("DATABASE_URL", "postgresql://hunter2"),
        ("DATABASE_URL", "mysql+asyncmy://ü"),
        ("PORT", "hunter2"),
        ("PASSWORD_MIN_LENGTH", "8"),
        ("LOG_FORMAT", "xml"),
    ],
)
def test_a_wrong_setting_is_named_without_its_value(scratch: Path, name: str, value: str) -> None:
    failed = cacert_mail("api", at=scratch, **{name: value})
    assert failed.returncode == 2
    assert failed.stderr.startswith(f"{name}: ")
    assert "hunter2" not in failed.stderr
    assert "Traceback" not in failed.stderr


@pytest.mark.parametrize("command", [["db", "upgrade"], ["principal", "list"], ["principal", "disable", "x"], ["run"]])
def test_no_command_shows_a_wrong_database_url(scratch: Path, command: list[str]) -> None:
    failed = cacert_mail(*command, at=scratch, DATABASE_URL="postgresql://api:hunter2@db/cacertusers")
    assert failed.returncode == 2
    assert failed.stderr.startswith("DATABASE_URL: ")
    assert "hunter2" not in failed.stderr + failed.stdout
    assert "Traceback" not in failed.stderr


def test_the_api_without_keys_says_what_to_do(scratch: Path) -> None:
    failed = cacert_mail("api", at=scratch)
    assert failed.returncode == 1
    assert "cacert-mail keys create" in failed.stderr


def test_keys_are_made_private(scratch: Path) -> None:
    made = cacert_mail("keys", "create", at=scratch)
    assert made.returncode == 0, made.stderr
    assert (scratch / "keys").stat().st_mode & 0o777 == 0o700
    files = list((scratch / "keys").iterdir())
    assert sorted(file.suffix for file in files) == [".key", ".pem"]
    assert {file.stat().st_mode & 0o777 for file in files} == {0o600}
    assert cacert_mail("keys", "create", at=scratch).returncode == 0
    assert len(list((scratch / "keys").glob("*.pem"))) == 2


def test_principals_are_made_listed_disabled_and_given_new_secrets(scratch: Path) -> None:
    cacert_mail("db", "upgrade", at=scratch)
    made = cacert_mail(
        "principal", "create", "--role", "primary", "--name", "Site", "--permission", "users:read", at=scratch
    )
    assert made.returncode == 0, made.stderr
    found = re.fullmatch(r"CLIENT_ID=(\S+)\nCLIENT_SECRET=(\S{43})\n", made.stdout)
    assert found is not None
    client_id, secret = found.groups()
    listed = cacert_mail("principal", "list", at=scratch).stdout
    assert listed == f"{client_id}  active  primary  Site  (users:read)\n"
    with sqlite3.connect(scratch / "test.db") as database:
        stored = database.execute("SELECT * FROM principals").fetchall()
        events = database.execute("SELECT action, principal_id FROM audit_events").fetchall()
    database.close()
    assert secret not in str(stored)
    assert events == [("principals.create", "cacert-mail")]
    reset = cacert_mail("principal", "reset-secret", client_id, at=scratch)
    assert re.fullmatch(rf"CLIENT_ID={client_id}\nCLIENT_SECRET=\S{{43}}\n", reset.stdout)
    assert secret not in reset.stdout
    assert cacert_mail("principal", "disable", client_id, at=scratch).returncode == 0
    assert "disabled" in cacert_mail("principal", "list", at=scratch).stdout
    again = cacert_mail("principal", "create", "--role", "primary", "--name", "Site", at=scratch)
    assert (again.returncode, "already" in again.stderr) == (1, True)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--role", "king", "--name", "x"], "Roles: primary"),
        (["--role", "primary", "--name", "x", "--permission", "all"], "users:read"),
    ],
)
def test_a_principal_that_cannot_be_is_refused(scratch: Path, arguments: list[str], says: str) -> None:
    refused = cacert_mail("principal", "create", *arguments, at=scratch)
    assert refused.returncode == 2
    assert says in refused.stderr


def test_unknown_principals_are_named(scratch: Path) -> None:
    cacert_mail("db", "upgrade", at=scratch)
    for verb in ("disable", "reset-secret"):
        refused = cacert_mail("principal", verb, "nobody", at=scratch)
        assert (refused.returncode, "no principal nobody" in refused.stderr) == (1, True)


def test_openapi_is_the_committed_document(scratch: Path) -> None:
    printed = cacert_mail("openapi", at=scratch)
    assert printed.stdout == (ROOT / "openapi" / "openapi.json").read_text()


@pytest.mark.parametrize(
    "arguments",
    [[], ["db"], ["keys"], ["principal"], ["api"], ["worker"], ["service"], ["sweep"], ["run"], ["db", "upgrade"]],
)
def test_help_is_there_for_everything(scratch: Path, arguments: list[str]) -> None:
    shown = cacert_mail(*arguments, "--help", at=scratch)
    assert shown.returncode == 0
    assert "Usage" in shown.stdout
