"""docs/passwords.md: every command of the page is run as it stands, against a real API and worker."""

import asyncio
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from app.addresses import DomainName
from app.config import ApiSettings
from app.db import Database, utc_now
from app.models.domains import DomainKind
from app.permissions import Role
from app.services.changes import Change
from app.services.domains import create_domain
from app.services.hosts import create_host
from app.services.principals import create_principal
from app.web.problems import CATALOGUE
from tests.conftest import ACTOR, HOST
from tests.stack.processes import Processes, free_ports

DOCS = Path(__file__).parents[2] / "docs"
PAGE = (DOCS / "passwords.md").read_text()
BLOCKS = re.findall(r"^```sh\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)


class Commands:
    """Runs the page's, as a client of some role."""

    def __init__(self, url: str, credentials: dict[Role, tuple[str, str]]) -> None:
        self.url = url
        self._credentials = credentials

    def run(self, containing: str, role: Role = Role.PRIMARY, **more: str) -> dict[str, Any]:
        (block,) = [text for text in BLOCKS if containing in text]
        client_id, secret = self._credentials[role]
        given = {"PATH": os.environ["PATH"], "URL": self.url, "CLIENT_ID": client_id, "CLIENT_SECRET": secret}
        done = subprocess.run(
            ["sh", "-euc", block], env={**given, **more}, capture_output=True, text=True, check=True, timeout=60
        )
        return dict(json.loads(done.stdout))


@pytest.fixture(scope="module")
def commands(sqlite_template: Path, key_directory: Path) -> Iterator[Commands]:
    processes = Processes()
    try:
        directory = processes.directory
        shutil.copy(sqlite_template, directory / "docs.db")
        (directory / "host").mkdir(mode=0o755)
        (port,) = free_ports(1)
        url = f"http://127.0.0.1:{port}"
        settings = {
            "DATABASE_URL": f"sqlite+aiosqlite:///{directory}/docs.db",
            "KEY_DIRECTORY": str(key_directory),
            "LINK_KEY_FILE": str(key_directory / "link.key"),
            "PUBLIC_URL": url,
            "PORT": str(port),
            "WAKE_DIRECTORY": str(directory),
            "MAIL_HOST": HOST,
            "HOST_ROOT": str(directory / "host"),
            "LOCK_FILE": str(directory / "worker.lock"),
        }

        async def fill() -> dict[Role, tuple[str, str]]:
            database = Database(settings["DATABASE_URL"])
            made = {}
            async with database.write.begin() as connection:
                change = Change(connection, ACTOR, utc_now())
                await create_domain(change, DomainName("cacert.org"), DomainKind.PRIMARY)
                await create_host(change, HOST)
                for role in (Role.PRIMARY, Role.LIMITED, Role.WEBSITE, Role.WEBMAIL):
                    made[role] = tuple(await create_principal(change, f"docs {role}", role))
            await database.close()
            return made  # type: ignore[return-value]  # a named tuple of two

        credentials = asyncio.run(fill())
        for name in ("worker", "api"):
            process = processes.start([sys.executable, "-m", "app.cli.main", name], **settings)
        processes.wait_for(process, port, directory / "python.out")
        yield Commands(url, credentials)
    finally:
        processes.close()


def test_the_page_from_top_to_bottom(commands: Commands) -> None:
    invited = commands.run('"invite"', Role.WEBSITE)
    assert (invited["address"], invited["has_password"]) == ("alice@cacert.org", False)
    assert commands.run("""'{"user": "alice@cacert.org"}'""", Role.WEBSITE) == {"accepted": True, "minutes": 30}

    summary = commands.run("/summary", Role.LIMITED)
    assert (summary["contact_address"], summary["may_reset"]) == ("a•••@e•••.net", True)
    shown = commands.run('"deliver": "show"', Role.LIMITED)
    base, _, token = shown["link"].partition("#")
    assert base == f"{commands.url}/reset"
    assert commands.run("$RESET", Role.LIMITED, RESET=shown["id"])["state"] == "pending"

    done = commands.run("/confirm", TOKEN=token)
    assert (done["address"], done["ready"], done["app_passwords"]) == ("alice@cacert.org", True, [])
    assert commands.run("/confirm", TOKEN=token)["type"] == "/problems/link-not-valid"
    assert commands.run("$RESET", Role.LIMITED, RESET=shown["id"])["state"] == "used"

    assert commands.run('"current_password"', Role.WEBMAIL)["ready"] is True
    assert commands.run('"current_password"', Role.WEBMAIL)["type"] == "/problems/wrong-password"

    locked = commands.run("/lock")
    assert (locked["state"], locked["ready"], locked["suspended_reason"]) == (
        "suspended",
        True,
        "Sends spam since this morning",
    )
    unlocked = commands.run("/unlock")
    assert (unlocked["state"], unlocked["locked_at"], unlocked["ready"]) == ("active", None, True)


def test_no_command_is_left_out() -> None:
    assert len(BLOCKS) == 9
    assert PAGE.count("```") == 2 * len(BLOCKS)


def test_every_problem_setting_and_page_exists() -> None:
    named = set(re.findall(r"/problems/([a-z-]+)", PAGE))
    assert named <= set(CATALOGUE)
    settings = set(re.findall(r"`([A-Z]+(?:_[A-Z]+)+)`", PAGE))
    assert settings <= {name.upper() for name in ApiSettings.model_fields}
    for name in re.findall(r"\]\(([\w.-]+)\)", PAGE):
        assert (DOCS / name).is_file(), name
