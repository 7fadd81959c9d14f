"""`cacert-mail`, as typed: each command a process of its own."""

import json
import os
import re
import shutil
import signal
import socket
import sqlite3
import ssl
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from app.models.schema import REVISION
from app.permissions import Permission, Role
from tests.stack.processes import free_ports, wait_until

ROOT = Path(__file__).parents[2]
COMMAND = [sys.executable, "-m", "app.cli.main"]


def environment_of(at: Path, **environment: str) -> dict[str, str]:
    clean = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), "COLUMNS": "120", "NO_COLOR": "1", "HOME": str(at)}
    settings = {
        "DATABASE_URL": f"sqlite+aiosqlite:///{at}/test.db",
        "KEY_DIRECTORY": str(at / "keys"),
        "LINK_KEY_FILE": str(at / "keys/link.key"),
    }
    return {**clean, **settings, **environment}


def cacert_mail(*arguments: str, at: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, *arguments],
        cwd=at,
        env=environment_of(at, **environment),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_upgrade_makes_the_schema_and_says_so(scratch: Path) -> None:
    first = cacert_mail("db", "upgrade", at=scratch)
    assert (first.returncode, first.stdout) == (0, f"The schema went from nothing to {REVISION}.\n")
    again = cacert_mail("db", "upgrade", at=scratch)
    assert (again.returncode, again.stdout) == (0, f"The schema is at {REVISION}.\n")


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
    assert {file.name for file in files if file.suffix == ".key"} == {"link.key", "request.key"}
    assert len(files) == 3
    modes = {file.name: file.stat().st_mode & 0o777 for file in files}
    assert modes.pop("link.key") == 0o640, "two processes read it, by a group of theirs"
    assert set(modes.values()) == {0o600}
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
    rotated = cacert_mail("principal", "rotate", client_id, "--overlap-hours", "1", at=scratch)
    assert re.fullmatch(rf"CLIENT_ID={client_id}\nCLIENT_SECRET=\S{{43}}\n", rotated.stdout)
    third = cacert_mail("principal", "rotate", client_id, at=scratch)
    assert (third.returncode, "side by side already" in third.stderr) == (1, True)
    assert cacert_mail("principal", "disable", client_id, at=scratch).returncode == 0
    assert "disabled" in cacert_mail("principal", "list", at=scratch).stdout
    again = cacert_mail("principal", "create", "--role", "primary", "--name", "Site", at=scratch)
    assert (again.returncode, "already" in again.stderr) == (1, True)
    made = cacert_mail(
        *("principal", "create", "--role", "webmail", "--name", "Webmail"),
        *("--network", "192.0.2.7", "--network", "2001:db8::/32"),
        at=scratch,
    )
    assert made.returncode == 0, made.stderr
    listed = cacert_mail("principal", "list", at=scratch).stdout.splitlines()[-1]
    assert listed.endswith("  active  webmail  Webmail  (all of its role)  from 192.0.2.7/32 2001:db8::/32")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--role", "king", "--name", "x"], "'king' is not a valid Role. Roles: primary, secondary, limited, "),
        (["--role", "owner", "--name", "x"], "An owner is no client"),
        (["--role", "primary", "--name", "x", "--permission", "all"], "'all' is not a valid Permission. "),
    ],
)
def test_a_principal_that_cannot_be_is_refused_in_one_line(scratch: Path, arguments: list[str], says: str) -> None:
    refused = cacert_mail("principal", "create", *arguments, at=scratch)
    assert refused.returncode == 2
    assert refused.stderr.startswith(says)
    assert refused.stderr.endswith(f"Permissions: {', '.join(Permission)}.\n")
    assert len(refused.stderr.splitlines()) == 1


def test_a_network_that_is_none_is_refused_in_one_line(scratch: Path) -> None:
    arguments = ["--role", "website", "--name", "x", "--network", "10.0.0.5/8"]
    refused = cacert_mail("principal", "create", *arguments, at=scratch)
    assert (refused.returncode, refused.stdout) == (2, "")
    assert refused.stderr.startswith("--network takes networks such as")


def test_the_help_lists_roles_and_permissions(scratch: Path) -> None:
    shown = cacert_mail("principal", "create", "--help", at=scratch, COLUMNS="80").stdout
    for each in {*Role, *Permission} - {Role.OWNER}:
        assert re.search(rf"(?<![\w:]){each}(?![\w:])", shown), f"{each}, unbroken"


def test_unknown_principals_are_named(scratch: Path) -> None:
    cacert_mail("db", "upgrade", at=scratch)
    for verb in ("disable", "reset-secret", "rotate"):
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


@pytest.fixture
def prepared(scratch: Path, sqlite_template: Path, key_directory: Path) -> Path:
    """A directory with a schema and keys."""
    shutil.copy(sqlite_template, scratch / "test.db")
    shutil.copytree(key_directory, scratch / "keys")
    return scratch


@contextmanager
def started(
    command: str, *arguments: str, at: Path, **environment: str
) -> Iterator[tuple[subprocess.Popen[bytes], Path]]:
    """The process, once it says that it started, and the file to which it writes its log."""
    said = at / f"{command}.log"
    with said.open("wb") as log:
        process = subprocess.Popen(
            [*COMMAND, command, *arguments],
            cwd=at,
            env=environment_of(at, LOG_FORMAT="json", WAKE_DIRECTORY=str(at), **environment),
            stderr=log,
        )
    try:
        assert wait_until(lambda: process.poll() is not None or f"{command}_started" in said.read_text())
        assert process.poll() is None, said.read_text()
        yield process, said
    finally:
        process.kill()
        process.wait()


def logged(said: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in said.read_text().splitlines()]


def change(database: Path, statement: str) -> None:
    with closing(sqlite3.connect(database)) as connection:
        connection.execute(statement)
        connection.commit()


OLDER = f"The schema is at 2026_01_01_older, this release needs {REVISION}: run `cacert-mail db upgrade`.\n"


@pytest.mark.parametrize("command", ["api", "service"])
def test_without_its_schema_a_process_ends_with_one_sentence(prepared: Path, command: str) -> None:
    change(prepared / "test.db", "UPDATE alembic_version SET version_num = '2026_01_01_older'")
    failed = cacert_mail(command, at=prepared)
    assert (failed.returncode, failed.stdout, failed.stderr) == (1, "", OLDER)
    (prepared / "test.db").unlink()
    failed = cacert_mail(command, at=prepared)
    assert failed.returncode == 1
    assert failed.stderr == "The database has no schema of ours: run `cacert-mail db upgrade`.\n"


def test_a_database_that_refuses_is_named(prepared: Path) -> None:
    (prepared / "test.db").write_text("This is no database, and hunter2 is not shown." * 100)
    for command in ("api", "service"):
        failed = cacert_mail(command, at=prepared)
        assert failed.returncode == 1
        assert failed.stderr == "The database cannot be reached or refused: file is not a database\n"


@pytest.mark.parametrize("command", ["api", "service"])
@pytest.mark.parametrize("silent", [False, True], ids=["refuses connections", "never answers"])
def test_a_database_that_is_away_does_not_keep_a_process_from_starting(
    prepared: Path, command: str, silent: bool
) -> None:
    [port] = free_ports(1)
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        if silent:
            server.listen()
        away = f"mysql+asyncmy://api:hunter2@127.0.0.1:{server.getsockname()[1]}/cacertusers"
        with started(command, at=prepared, DATABASE_URL=away, PORT=str(port)) as (_, said):
            assert logged(said)[0]["event"] == "database_away"
            if command == "api":
                assert httpx.get(f"http://127.0.0.1:{port}/livez").status_code == 200
        assert "hunter2" not in said.read_text()
        assert "Traceback" not in said.read_text()


@pytest.mark.parametrize("attempt", range(3))
def test_a_file_that_cannot_be_opened_is_one_line(scratch: Path, attempt: int) -> None:
    """Every time: the driver's thread complains when its loop is gone before it has said all."""
    failed = cacert_mail("principal", "list", at=scratch, DATABASE_URL="sqlite+aiosqlite:////nowhere/test.db")
    assert failed.returncode == 1
    assert failed.stderr == "The database cannot be reached or refused: unable to open database file\n"


def test_the_api_says_where_it_is_serves_and_stops(prepared: Path) -> None:
    [port] = free_ports(1)
    url = f"http://127.0.0.1:{port}"
    for _ in range(2):  # the second on the same port at once, while the system still keeps the first's connections
        with started("api", at=prepared, PORT=str(port)) as (process, said), httpx.Client(base_url=url) as client:
            [line] = logged(said)
            assert (line["event"], line["level"], line["url"], line["docs"]) == (
                "api_started",
                "info",
                url,
                f"{url}/docs",
            )
            assert client.get(line["docs"]).status_code == 200
            assert client.get("/readyz").status_code == 200
            process.send_signal(signal.SIGTERM)
            assert process.wait(10) == -signal.SIGTERM
        assert {line["event"] for line in logged(said)} == {"api_started", "request"}
    with started("api", at=prepared, PORT=str(port)) as (process, _):
        process.send_signal(signal.SIGINT)
        assert process.wait(10) == 0


def test_sigterm_lets_a_request_end(prepared: Path) -> None:
    made = cacert_mail("principal", "create", "--role", "primary", "--name", "x", at=prepared).stdout
    credentials = tuple(line.partition("=")[2] for line in made.splitlines())
    [port] = free_ports(1)
    answers: list[httpx.Response] = []
    with (
        started("api", at=prepared, PORT=str(port)) as (process, _),
        httpx.Client(base_url=f"http://127.0.0.1:{port}", auth=credentials) as client,  # type: ignore[arg-type]
    ):
        client.post("/v1/domains", json={"name": "cacert.test", "kind": "primary"}).raise_for_status()
        client.post("/v1/hosts", json={"name": "mail"}).raise_for_status()

        def ask() -> None:
            new = {"address": "alice@cacert.test"}
            answers.append(client.post("/v1/users", json=new, headers={"Prefer": "wait=1"}))

        def waits() -> bool:
            with closing(sqlite3.connect(prepared / "test.db")) as database:
                return bool(database.execute("SELECT 1 FROM users").fetchall())

        asking = threading.Thread(target=ask)
        asking.start()
        assert wait_until(waits)
        process.send_signal(signal.SIGTERM)
        asking.join(10)
        assert process.wait(10) == -signal.SIGTERM
    assert [answer.status_code for answer in answers] == [202]


@pytest.mark.parametrize(("address", "hosts"), [("::1", ["[::1]"]), ("localhost", ["localhost", "127.0.0.1"])])
def test_the_api_listens_on_names_and_on_ipv6(prepared: Path, address: str, hosts: list[str]) -> None:
    [port] = free_ports(1)
    with started("api", at=prepared, LISTEN_ADDRESS=address, PORT=str(port)) as (_, said):
        assert logged(said)[0]["url"] == f"http://{hosts[0]}:{port}"
        for host in hosts:
            assert httpx.get(f"http://{host}:{port}/livez").status_code == 200


def test_all_of_ipv6_is_not_ipv4(prepared: Path) -> None:
    [port] = free_ports(1)
    with started("api", at=prepared, LISTEN_ADDRESS="::", PORT=str(port)):
        assert httpx.get(f"http://[::1]:{port}/livez").status_code == 200
        with socket.socket() as client:
            assert client.connect_ex(("127.0.0.1", port)) != 0


def test_a_port_that_is_taken_is_named(prepared: Path) -> None:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        port = holder.getsockname()[1]
        failed = cacert_mail("api", at=prepared, PORT=str(port))
    assert failed.returncode == 1
    says = f"Port {port} on 127.0.0.1 is taken: Address already in use. PORT= chooses another one.\n"
    assert (failed.stdout, failed.stderr) == ("", says)


@pytest.mark.parametrize(
    ("address", "port", "reason"),
    [
        ("192.0.2.1", "8825", "Cannot assign requested address"),
        ("nowhere.invalid", "8825", "Name or service not known"),
        ("a..b", "8825", "label empty"),
        ("127.0.0.1", "88250", "port must be 0-65535"),
    ],
)
def test_a_place_where_nobody_can_listen_is_named(prepared: Path, address: str, port: str, reason: str) -> None:
    failed = cacert_mail("api", at=prepared, LISTEN_ADDRESS=address, PORT=port)
    assert failed.returncode == 1
    [line] = failed.stderr.splitlines()
    assert line.startswith(f"This machine cannot listen on {address}, port {port}: ")
    assert reason in line
    assert line.endswith("LISTEN_ADDRESS= and PORT= choose another place.")


def test_a_port_without_the_right_to_it_is_named(prepared: Path) -> None:
    failed = subprocess.run(
        ["setpriv", "--bounding-set=-net_bind_service", *COMMAND, "api"],
        cwd=prepared,
        env=environment_of(prepared, PORT="80"),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert failed.returncode == 1
    assert (
        failed.stderr == "Port 80 on 127.0.0.1 is not for this user: Permission denied. PORT= chooses one above 1023.\n"
    )


@pytest.fixture(scope="session")
def certificate(memory_directory: Path) -> tuple[Path, Path]:
    """For localhost, by itself: the chain, and its key."""
    chain, key = memory_directory / "cert.pem", memory_directory / "key.pem"
    wanted = ["-newkey", "rsa:2048", "-nodes", "-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost"]
    subprocess.run(["openssl", "req", "-x509", *wanted, "-keyout", key, "-out", chain], check=True, capture_output=True)
    return chain, key


def test_the_api_serves_tls(prepared: Path, certificate: tuple[Path, Path]) -> None:
    [port] = free_ports(1)
    options = [f"--ssl-certfile={certificate[0]}", f"--ssl-keyfile={certificate[1]}"]
    with started("api", *options, at=prepared, LISTEN_ADDRESS="localhost", PORT=str(port)) as (process, said):
        url = logged(said)[0]["url"]
        assert url == f"https://localhost:{port}"
        assert httpx.get(f"{url}/livez", verify=ssl.create_default_context(cafile=certificate[0])).status_code == 200
        process.send_signal(signal.SIGTERM)
        assert process.wait(10) == -signal.SIGTERM


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--ssl-certfile=missing.pem"], "The TLS certificate or its key cannot be used: "),
        (["--ssl-certfile=test.db"], "The TLS certificate or its key cannot be used: "),
        (["--ssl-keyfile=missing.pem"], "--ssl-keyfile goes with --ssl-certfile."),
    ],
)
def test_a_certificate_that_cannot_be_used_is_one_line(prepared: Path, options: list[str], says: str) -> None:
    failed = cacert_mail("api", *options, at=prepared)
    assert failed.returncode in (1, 2)
    [line] = failed.stderr.splitlines()
    assert line.startswith(says)
