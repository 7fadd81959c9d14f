"""`make run`: everything on one machine, without root, to try it out.

Starts API, worker and service as three processes, as on a real host. This file starts programs, which elsewhere only the
worker may: they are this very command, and nothing of a request reaches them.
"""

import asyncio
import ctypes
import email
import hashlib
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from email.policy import SMTP
from pathlib import Path
from typing import NamedTuple

from sqlalchemy.engine import make_url
from sqlalchemy.exc import DBAPIError

from app.addresses import DomainName
from app.cli.db import NotOurs, upgrade_database
from app.config import ApiSettings
from app.credentials.links import create_link_key
from app.credentials.tokens import KeysUnusable, create_request_key, create_signing_key
from app.db import Database, utc_now
from app.models.domains import DomainKind
from app.permissions import Role
from app.services.changes import Actor, Change
from app.services.domains import create_domain, list_domains
from app.services.hosts import create_host, list_hosts
from app.services.principals import create_principal, list_principals

VAR = Path("var")
DOMAIN = DomainName("cacert.org")
HOST = "local"


def run_all() -> int:
    """Prepares what is missing, starts the processes, and waits for Ctrl-C. Returns the exit status."""
    os.umask(0o077)  # the database file holds password hashes
    VAR.mkdir(mode=0o700, exist_ok=True)
    settings = ApiSettings()
    url = f"http://127.0.0.1:{settings.port}"
    place = _place(settings)
    environment = {
        "PYTHONUNBUFFERED": "1",
        "MAIL_HOST": HOST,
        "HOST_ROOT": str(place.host.resolve()),
        "LOCK_FILE": str((VAR / "worker.lock").resolve()),
        "LOG_LEVEL": "warning",
        "OUTBOX": str(place.outbox.resolve()),
        "PUBLIC_URL": url,
        **os.environ,
        "ISSUER": os.environ.get("ISSUER", url),
        "DATABASE_URL": settings.database_url.get_secret_value(),
    }
    if (taken := _port_taken(settings.port)) is not None:
        print(
            f"Port {settings.port} on 127.0.0.1 is taken: {taken}. Choose another one: make run PORT=8826",
            file=sys.stderr,
        )
        return 1
    place.host.mkdir(mode=0o755, exist_ok=True)
    try:
        fresh = asyncio.run(_prepare(settings, place.administrator))
    except (NotOurs, KeysUnusable) as error:
        print(error, file=sys.stderr)
        return 1
    except (DBAPIError, OSError) as error:
        print(f"The database cannot be reached or refused: {getattr(error, 'orig', error)}", file=sys.stderr)
        return 1
    processes = [_start(name, environment) for name in ("api", "worker", "service")]
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        if not _answers(url, processes):
            print("The API did not start; what it said stands above.", file=sys.stderr)
            return 1
        _explain(url, fresh, place)
        seen = set(place.outbox.glob("*.eml"))
        while all(process.poll() is None for process in processes):
            for path in sorted(set(place.outbox.glob("*.eml")) - seen):
                seen.add(path)
                _show(path)
            time.sleep(0.2)
        print("One of the processes ended by itself; what it said stands above. Stopping the others.", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 0
    finally:
        _stop(processes)
        print("Stopped.", flush=True)


class Place(NamedTuple):
    """What belongs to one database: another one numbers its accounts, and so their uids, from the start."""

    host: Path
    administrator: Path
    outbox: Path


def _place(settings: ApiSettings) -> Place:
    url = settings.database_url.get_secret_value()
    suffix = ""
    if url != ApiSettings.model_fields["database_url"].default.get_secret_value():
        suffix = "-" + hashlib.sha256(make_url(url).render_as_string().encode()).hexdigest()[:8]
    return Place(VAR / f"host{suffix}", VAR / f"first-administrator{suffix}.env", VAR / f"outbox{suffix}")


def _interrupt(number: int, frame: object) -> None:
    raise KeyboardInterrupt


def _port_taken(port: int) -> str | None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            return error.strerror
    return None


async def _prepare(settings: ApiSettings, administrator: Path) -> tuple[str, str] | None:
    """Schema, keys, domain, host and a first administrator, each only if it is missing."""
    if not settings.key_directory.is_dir() or not any(settings.key_directory.glob("*.pem")):
        create_signing_key(settings.key_directory)
    create_request_key(settings.key_directory)
    create_link_key(settings.link_key_file)
    database = Database(settings.database_url.get_secret_value(), ca_file=settings.database_ca_file)
    try:
        await upgrade_database(database)
        async with database.write.begin() as connection:
            change = Change(connection, Actor("cacert-mail", "", "make-run"), utc_now())
            if not await list_domains(connection, kind=DomainKind.PRIMARY, limit=1):
                await create_domain(change, DOMAIN, DomainKind.PRIMARY)
            if not await list_hosts(connection, limit=1):
                await create_host(change, HOST)
            if await list_principals(connection):
                return None
            client_id, secret = await create_principal(change, "First administrator", Role.PRIMARY)
            # Before the commit: an administrator whose secret was never written down is of no use.
            _keep(administrator, client_id, secret)
            return client_id, secret
    finally:
        await database.close()


def _keep(administrator: Path, client_id: str, secret: str) -> None:
    administrator.unlink(missing_ok=True)
    handle = os.open(administrator, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
    with os.fdopen(handle, "w") as file:
        file.write(f"CLIENT_ID={client_id}\nCLIENT_SECRET={secret}\n")


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG: nothing is left over when this process is killed


def _start(name: str, environment: dict[str, str]) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", "app.cli.main", name],
        env=environment,
        stdin=subprocess.DEVNULL,
        start_new_session=True,  # Ctrl-C reaches this process alone, which then stops the others in order
        preexec_fn=_die_with_parent,
    )


def _answers(url: str, processes: list[subprocess.Popen[bytes]]) -> bool:
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline and all(process.poll() is None for process in processes):
        try:
            with urllib.request.urlopen(f"{url}/readyz", timeout=2):
                return True
        except (urllib.error.URLError, OSError):
            time.sleep(0.05)
    return False


def _explain(url: str, fresh: tuple[str, str] | None, place: Place) -> None:
    credentials = '-u "$CLIENT_ID:$CLIENT_SECRET"'
    body = (
        '{"address": "alice@cacert.org", "display_name": "Alice", "password": "seven green lanterns over the harbour"}'
    )
    if fresh:
        print(f"\nThe first administrator (shown only now; also in {place.administrator}):")
        print(f"  CLIENT_ID={fresh[0]}\n  CLIENT_SECRET={fresh[1]}")
    elif not place.administrator.exists():
        print(
            "\nThis database has clients already. Use one, or make one: .venv/bin/cacert-mail principal create --help"
        )
    print(f"\nThe docs page:  {url}/docs\n\nPaste into another terminal, in this directory:\n")
    print(f"  . {place.administrator}")
    print(
        f"  curl -s {credentials} -H 'Prefer: wait=10' -H 'Content-Type: application/json' {url}/v1/users -d '{body}'"
    )
    print(f"  curl -s {credentials} {url}/v1/users/alice@cacert.org")
    print(
        f"\nIts Maildir then lies in {place.host / 'home' / 'alice' / 'Maildir'}. Ctrl-C stops everything.",
        flush=True,
    )


def _show(path: Path) -> None:
    """Mail that would have been sent. Here, and nowhere else, its link is printed."""
    message = email.message_from_bytes(path.read_bytes(), policy=SMTP)
    text = message.get_body(("plain",))
    found = re.search(r"^https?://\S+#\S+", text.get_content(), re.MULTILINE) if text else None
    print(f"\nMail to {message['To']}: {message['Subject']} ({path})", flush=True)
    if found:
        print(f"  {found[0]}", flush=True)


def _stop(processes: list[subprocess.Popen[bytes]]) -> None:
    for process in processes:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
    for process in processes:
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
