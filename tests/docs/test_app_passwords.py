"""docs/app-passwords.md: every command of the page is run as it stands, against a real API and worker."""

import asyncio
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from app.addresses import DomainName
from app.db import Database, utc_now
from app.models.domains import DomainKind
from app.permissions import Role
from app.services.app_passwords import Protocol
from app.services.changes import Change
from app.services.domains import create_domain
from app.services.hosts import create_host
from app.services.principals import create_principal
from tests.conftest import ACTOR, HOST
from tests.stack.processes import Processes, free_ports

DOCS = Path(__file__).parents[2] / "docs"
PAGE = (DOCS / "app-passwords.md").read_text()
BLOCKS = re.findall(r"^```sh\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def environment(sqlite_template: Path, key_directory: Path) -> Iterator[dict[str, str]]:
    """Of the page's commands: URL, CLIENT_ID, CLIENT_SECRET, and alice has an account."""
    processes = Processes()
    try:
        directory = processes.directory
        shutil.copy(sqlite_template, directory / "docs.db")
        (directory / "host").mkdir(mode=0o755)
        (port,) = free_ports(1)
        settings = {
            "DATABASE_URL": f"sqlite+aiosqlite:///{directory}/docs.db",
            "KEY_DIRECTORY": str(key_directory),
            "LINK_KEY_FILE": str(key_directory / "link.key"),
            "PORT": str(port),
            "WAKE_DIRECTORY": str(directory),
            "MAIL_HOST": HOST,
            "HOST_ROOT": str(directory / "host"),
            "LOCK_FILE": str(directory / "worker.lock"),
        }

        async def fill() -> tuple[str, str]:
            database = Database(settings["DATABASE_URL"])
            async with database.write.begin() as connection:
                change = Change(connection, ACTOR, utc_now())
                await create_domain(change, DomainName("cacert.org"), DomainKind.PRIMARY)
                await create_host(change, HOST)
                made = await create_principal(change, "docs", Role.PRIMARY)
            await database.close()
            return made[0], made[1]

        client_id, secret = asyncio.run(fill())
        for name in ("worker", "api"):
            process = processes.start([sys.executable, "-m", "app.cli.main", name], **settings)
        processes.wait_for(process, port, directory / "python.out")
        url = f"http://127.0.0.1:{port}"
        made = httpx.post(
            f"{url}/v1/users",
            json={"address": "alice@cacert.org"},
            auth=(client_id, secret),
            headers={"Prefer": "wait=20"},
            timeout=30,
            trust_env=False,
        )
        assert made.status_code == 201, made.text
        yield {"PATH": os.environ["PATH"], "URL": url, "CLIENT_ID": client_id, "CLIENT_SECRET": secret}
    finally:
        processes.close()


def run(environment: dict[str, str], containing: str, **more: str) -> dict[str, object]:
    (block,) = [text for text in BLOCKS if containing in text]
    done = subprocess.run(
        ["sh", "-euc", block], env={**environment, **more}, capture_output=True, text=True, check=True, timeout=60
    )
    return dict(json.loads(done.stdout))


def test_make_list_and_revoke(environment: dict[str, str]) -> None:
    made = run(environment, '"protocols"')
    assert re.fullmatch(r"(?:[a-hjkmnp-z2-9]{4}-){6}[a-hjkmnp-z2-9]{4}", str(made.pop("password")))
    assert made["protocols"] == ["imap", "smtp"]
    listing = '"$CLIENT_ID:$CLIENT_SECRET" "$URL/v1/users/alice@cacert.org/app-passwords"\n'
    assert run(environment, listing) == {"items": [made]} == run(environment, "$TOKEN")
    revoked = run(environment, "DELETE", ID=str(made["id"]))
    assert (revoked["ready"], revoked["revoked_at"] is not None) == (True, True)
    assert "sessions" in str(revoked["proofs"])
    assert run(environment, listing) == {"items": []}


def test_no_command_is_left_out() -> None:
    assert len(BLOCKS) == 4
    assert PAGE.count("```") == 2 * len(BLOCKS)


def test_every_protocol_is_in_the_table_and_every_page_is_there() -> None:
    rows = "".join(re.findall(r"^\| (`.*?) \|", PAGE, re.MULTILINE))
    assert set(re.findall(r"`(\w+)`", rows)) == set(Protocol)
    for name in re.findall(r"\]\(([\w.-]+)\)", PAGE):
        assert (DOCS / name).is_file(), name
